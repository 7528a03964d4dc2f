"""On a real SLURM of three emulated hosts: infra/slurm's chain, hosts that die, jobs told to stop.

What SkyPilot and Kubernetes start on each of their machines is run on the same hosts, without SLURM's environment.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from conftest import Cluster

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
STEPS = 60

pytestmark = pytest.mark.cluster

CONF = """
RUN={run}
BUILD_NODES=(--nodes=2 --output={logs}/%x-%j.log)
TRAIN_NODES=(--nodes=2 --output={logs}/%x-%j.log)
EVALUATE_NODES=(--nodes=1 --output={logs}/%x-%j.log)
BUILD=(images={data}/images encoder={data}/clip blocks=[1,2,3,4] compute=float32 shard_size=8)
TINY=(device=cpu precision=fp32 model.frozen_dtype=float32 data.max_length=512 global_batch_size=8 microbatch_size=4
  model.llm={data}/llm model.connector.blocks=[1,2,3,4] checkpoint.interval=5ba)
PRETRAIN_STORE={run}/stores/pretrain
PRETRAIN_BUILD=(data={data}/chat.json "${{BUILD[@]}}")
PRETRAIN=("${{TINY[@]}}" steps=10)
FINETUNE_STORE={run}/stores/finetune
FINETUNE_BUILD=(data={data}/instruct.json "${{BUILD[@]}}")
FINETUNE=("${{TINY[@]}}" steps={steps} model.activation_checkpointing=false)
EVALUATE=(--questions {data}/heldout.jsonl --images {data}/images --max-new-tokens 4)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes, and models with random weights."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from pipeline.demo_data import draw
    from training.model.tokenizer import Tokenizer
    from training.toy.models import train_tokenizer

    folder = tmp_path_factory.mktemp("data")
    draw(folder, images=80, heldout=4, image_size=48)
    captions = {r["image"]: r["conversations"][1]["value"] for r in json.loads((folder / "chat.json").read_text())}
    (folder / "llm").mkdir()
    talk = json.loads((folder / "instruct.json").read_text())
    (folder / "llm" / "tokenizer.model").write_bytes(train_tokenizer(captions, talk))
    tokenizer = Tokenizer(folder / "llm" / "tokenizer.model", legacy=False)
    tokenizer.save(folder / "llm")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=32, patch_size=8)).save_pretrained(folder / "clip")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    llama = LlamaConfig(**shape, vocab_size=tokenizer.vocab_size, max_position_embeddings=1024, **ids)
    LlamaForCausalLM(llama).save_pretrained(folder / "llm")
    return folder


@pytest.fixture(scope="module")
def chain(slurm: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose five jobs have all completed."""
    run = tmp_path_factory.mktemp("run")
    conf = run / "tiny.conf"
    conf.write_text(CONF.format(run=run, logs=slurm.folder, data=data, steps=STEPS))
    jobs = re.findall(
        r"\d+", slurm.run("infra/slurm/submit.sh", str(conf)).replace("stage 1", "").replace("stage 2", "")
    )
    assert len(jobs) == 5
    for job in jobs:
        slurm.wait_for_job(job, "COMPLETED")
    return run


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def stage2(chain: Path) -> list[str]:
    """What the chain's second stage was told, but for its run."""
    settings = json.loads((chain / "finetune" / "config.json").read_text())
    return [f"{key}={json.dumps(value)}" for key, value in settings.items() if key != "run"]


def submit(slurm: Cluster, chain: Path, name: str, *more: str) -> tuple[str, Path]:
    """Stage 2 again, into a run of its own: (job, run)."""
    run = chain / name
    sbatch = ["sbatch", "--parsable", "--nodes=2", f"--output={slurm.folder}/{name}.log", "infra/slurm/train.sbatch"]
    return slurm.run(*sbatch, "training/finetune.yaml", *stage2(chain), f"run={run}", *more).strip(), run


def reach(slurm: Cluster, job: str, run: Path, step: int) -> None:
    log = run / "log.jsonl"
    slurm.wait_for_job(job, f"step {step}", lambda now: log.exists() and log.read_text().count("\n") >= step)


def start_again(slurm: Cluster, job: str) -> None:
    """Wait until a job has been requeued. SLURM may let it wait for two minutes; the test does not."""

    def requeued(now: dict[str, str]) -> bool:
        return now["Restarts"] == "1" and now["JobState"] in {"PENDING", "RUNNING", "COMPLETED"}

    slurm.wait_for_job(job, "requeued", requeued)
    soon = "StartTime=now+3"  # not at once: the nodes have just revoked its credential
    slurm.run("scontrol", "update", f"JobId={job}", soon, check=False)  # it may run already


def test_two_stores_two_stages_and_the_evaluation_run_one_after_another(slurm: Cluster, chain: Path) -> None:
    for stage in ("pretrain", "finetune"):
        check = [sys.executable, "pipeline/verify_shards.py", str(chain / "stores" / stage)]
        done = subprocess.run(check, check=False, cwd=ROOT, env=slurm.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (chain / stage / "summary.json").exists()
    (log,) = slurm.folder.glob("finetune-*.log")
    assert "SLURM, node 0 of 2" in log.read_text()
    assert "over 2 rank(s)" in log.read_text()
    (log,) = slurm.folder.glob("build-pretrain-*.log")
    assert "Ray on 2 nodes" in log.read_text()
    assert json.loads((chain / "answers.scores.json").read_text())["questions"] > 0
    assert len(losses(chain / "finetune")) == STEPS


@pytest.mark.parametrize("which", [0, 1], ids=["the first host", "another host"])
def test_a_job_whose_host_dies_ends_with_the_same_losses(slurm: Cluster, chain: Path, which: int) -> None:
    slurm.start_hosts()
    job, run = submit(slurm, chain, f"host-{which}-dies")
    reach(slurm, job, run, 12)
    hosts = slurm.run("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).split()
    slurm.kill_host(hosts[which])
    start_again(slurm, job)
    done = slurm.wait_for_job(job, "COMPLETED")
    assert int(done["Restarts"]) == 1
    assert hosts[which] not in slurm.run("scontrol", "show", "hostnames", done["NodeList"]).split()
    assert losses(run) == losses(chain / "finetune")


def test_a_job_told_to_stop_goes_back_into_the_queue_and_on(slurm: Cluster, chain: Path) -> None:
    slurm.start_hosts()
    job, run = submit(slurm, chain, "told-to-stop")
    reach(slurm, job, run, 12)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as `--signal=B:USR1@300` does before the time limit
    start_again(slurm, job)
    assert int(slurm.wait_for_job(job, "COMPLETED")["Restarts"]) == 1
    assert "told to stop; back into the queue" in (slurm.folder / "told-to-stop.log").read_text()
    assert losses(run) == losses(chain / "finetune")


def test_a_fault_of_the_jobs_own_is_not_repeated(slurm: Cluster, chain: Path) -> None:
    slurm.start_hosts()
    job, _ = submit(slurm, chain, "misspelt", "optimiser.lr=1")
    assert slurm.wait_for_job(job, "FAILED")["Restarts"] == "0"
    assert "did you mean 'optimizer'?" in (slurm.folder / "misspelt.log").read_text()


@pytest.fixture
def hosts(slurm: Cluster, tmp_path: Path) -> Callable[..., None]:
    """hosts(name, script, environment): run it on two hosts that know nothing of SLURM, in a folder like a checkout."""
    for name in ("pipeline", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)

    def run(name: str, script: str, environment: dict[str, str]) -> None:
        slurm.start_hosts()
        exported = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in environment.items())
        exported = exported.replace(NUMBER, "$SLURM_NODEID") + "unset ${!SLURM_*}\n"
        (tmp_path / f"{name}.sh").write_text(f"cd {tmp_path}\n{exported}{script}\n")
        srun = f"srun --cpus-per-task=2 --kill-on-bad-exit=1 --wait=120 bash {tmp_path}/{name}.sh"
        sbatch = [
            "sbatch",
            "--parsable",
            "--nodes=2",
            "--ntasks=2",
            "--exclusive",
            f"--output={slurm.folder}/{name}.log",
        ]
        slurm.wait_for_job(slurm.run(*sbatch, "--wrap", srun).strip(), "COMPLETED")

    return run


NUMBER = "NUMBER-OF-THE-HOST"


def test_skypilots_tasks_run_on_two_hosts(hosts: Callable[..., None], chain: Path, data: Path, tmp_path: Path) -> None:
    build, train = (
        yaml.safe_load((INFRA / "skypilot" / f"{name}.yaml").read_text())["run"] for name in ("build", "train")
    )
    given = {"SKYPILOT_NODE_RANK": NUMBER, "SKYPILOT_NODE_IPS": "10.77.0.1\n10.77.0.2", "SKYPILOT_NUM_NODES": "2"}
    given |= {"SKYPILOT_NUM_GPUS_PER_NODE": "0", "RAY_AUTH_TOKEN": "1" * 64}
    tiny = f"num_gpus=0 encoder={data}/clip blocks=[1,2,3,4] compute=float32 shard_size=8"
    places = {"DATA": f"{data}/instruct.json", "IMAGES": f"{data}/images", "STORE": f"{tmp_path}/store"}
    hosts("sky-build", build.replace("num_gpus=1", tiny), given | places)
    for path in (chain / "stores" / "finetune").rglob("*.tar"):
        copy = tmp_path / "store" / path.relative_to(chain / "stores" / "finetune")
        assert copy.read_bytes() == path.read_bytes()
    places = {"STAGE": "training/finetune.yaml", "STORE": f"{tmp_path}/store", "RUN": f"{tmp_path}/run"}
    places["CONNECTOR"] = f"{chain}/pretrain/connector"
    hosts("sky-train", train.replace('"$STAGE"', f'"$STAGE" {shlex.join(stage2(chain))}'), given | places)
    assert losses(tmp_path / "run") == losses(chain / "finetune")


def test_the_pods_of_the_indexed_job_run_on_two_hosts(hosts: Callable[..., None], chain: Path, tmp_path: Path) -> None:
    job = yaml.safe_load((INFRA / "kubernetes" / "base" / "train.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    words = [re.sub(r"\$\((\w+)\)", r"$\1", word) for word in [*container["command"], *container["args"]]]
    words[3:3] = map(shlex.quote, stage2(chain))
    given = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    given |= {"JOB_COMPLETION_INDEX": NUMBER, "MASTER_ADDR": "node1", "STAGE": "training/finetune.yaml"}
    given |= {"STORE": f"{chain}/stores/finetune", "RUN": f"{tmp_path}/run", "CONNECTOR": f"{chain}/pretrain/connector"}
    hosts("indexed-job", " ".join(words), given)
    assert losses(tmp_path / "run") == losses(chain / "finetune")
