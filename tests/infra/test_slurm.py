"""infra/slurm on a real SLURM of three emulated hosts: the whole chain, then hosts that die and jobs told to stop."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Cluster

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

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
    from training.demo_models import train_tokenizer
    from training.tokenizer import Tokenizer

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
        slurm.wait_for_job(job, "COMPLETED", 600)
    return run


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def submit(slurm: Cluster, chain: Path, name: str, *more: str) -> tuple[str, Path]:
    """Stage 2 again, into a run of its own: (job, run)."""
    settings = json.loads((chain / "finetune" / "config.json").read_text())
    run = chain / name
    words = [
        f"{group}.{key}={json.dumps(value)}"
        for group in ("model", "data", "optimizer", "checkpoint")
        for key, value in settings[group].items()
    ]
    keys = ("global_batch_size", "microbatch_size", "steps", "precision", "device")
    words += [f"{key}={json.dumps(settings[key])}" for key in keys]
    sbatch = ["sbatch", "--parsable", "--nodes=2", f"--output={slurm.folder}/{name}.log", "infra/slurm/train.sbatch"]
    return slurm.run(*sbatch, "training/finetune.yaml", *words, f"run={run}", *more).strip(), run


def reach(slurm: Cluster, run: Path, step: int) -> None:
    slurm.wait_until(
        f"step {step} of {run.name}", lambda: (run / "log.jsonl").exists() and len(losses(run)) >= step, 300
    )


def start_now(slurm: Cluster, job: str) -> None:
    """SLURM lets a requeued job wait for two minutes; the test does not."""
    slurm.wait_for_job(job, "PENDING", 120)
    slurm.run(
        "scontrol", "update", f"JobId={job}", "StartTime=now+3"
    )  # not at once: the nodes have just revoked its credential


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
    reach(slurm, run, 12)
    hosts = slurm.run("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).split()
    slurm.kill_host(hosts[which])
    start_now(slurm, job)
    done = slurm.wait_for_job(job, "COMPLETED")
    assert int(done["Restarts"]) == 1
    assert hosts[which] not in slurm.run("scontrol", "show", "hostnames", done["NodeList"]).split()
    assert losses(run) == losses(chain / "finetune")


def test_a_job_told_to_stop_goes_back_into_the_queue_and_on(slurm: Cluster, chain: Path) -> None:
    slurm.start_hosts()
    job, run = submit(slurm, chain, "told-to-stop")
    reach(slurm, run, 12)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as `--signal=B:USR1@300` does before the time limit
    start_now(slurm, job)
    assert int(slurm.wait_for_job(job, "COMPLETED")["Restarts"]) == 1
    assert "told to stop; back into the queue" in (slurm.folder / "told-to-stop.log").read_text()
    assert losses(run) == losses(chain / "finetune")


def test_a_fault_of_the_jobs_own_is_not_repeated(slurm: Cluster, chain: Path) -> None:
    slurm.start_hosts()
    job, _ = submit(slurm, chain, "misspelt", "optimiser.lr=1")
    assert slurm.wait_for_job(job, "FAILED")["Restarts"] == "0"
    assert "did you mean 'optimizer'?" in (slurm.folder / "misspelt.log").read_text()
