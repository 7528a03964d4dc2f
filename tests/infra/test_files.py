"""The files of infra/: what they pass to the two jobs is what those take, and infra/check.py finds what is planted."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest
import yaml

from pipeline.config import BuildConfig, load_config
from training.config import TrainConfig
from training.launch import find_place

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
TOOLS = ROOT / ".venv-infra" / "bin" / "python"

PLANTED = {
    "slurm/train.sbatch": ('wait "$train"', 'wait "$trian"', "trian is referenced but not assigned"),
    "Dockerfile": ("COPY training", "COPPY training", "unexpected 'C'"),
    "kubernetes/base/train.yaml": ("parallelism: 2", "paralelism: 2", "paralelism"),
    "kubernetes/base/build.yaml": ("maxReplicas:", "maxReplica:", "maxReplica"),
    "kubernetes/overlays/finetune/kustomization.yaml": ("behavior:", "behaviour:", "behaviour"),
    "skypilot/train.yaml": ("use_spot:", "use_spots:", "use_spots"),
    "skypilot/build.yaml": ('"$DATA" images', '"$DATA images', "SC1078"),
    "aws/storage.yaml": ("BucketEncryption:", "BucketEncrypton:", "BucketEncrypton"),
}


def documents(path: str) -> list[dict]:
    return list(yaml.safe_load_all((INFRA / path).read_text(encoding="utf-8")))


def settings(overlay: str) -> dict[str, str]:
    """The literals of a kustomization's ConfigMap."""
    (kustomization,) = documents(f"kubernetes/{overlay}/kustomization.yaml")
    return dict(line.split("=", 1) for line in kustomization["configMapGenerator"][0]["literals"])


def kubernetes_commands() -> Iterator[list[str]]:
    (build,), (train,) = documents("kubernetes/base/build.yaml"), documents("kubernetes/base/train.yaml")
    (container,) = train["spec"]["template"]["spec"]["containers"]
    trained = " ".join([*container["command"], *container["args"]]).replace("$(", "${").replace(")", "}")
    for chosen in (settings("base"), settings("base") | settings("overlays/finetune")):
        yield shlex.split(Template(build["spec"]["entrypoint"]).substitute(chosen))
        yield shlex.split(Template(trained).substitute(chosen))


def skypilot_commands() -> Iterator[list[str]]:
    for name in ("build", "train"):
        (task,) = documents(f"skypilot/{name}.yaml")
        for line in task["run"].replace("\\\n", " ").splitlines():
            if "pipeline/" in line or "training/" in line:
                yield shlex.split(Template(line.partition("||")[0]).safe_substitute(task["envs"]))


def slurm_commands() -> Iterator[list[str]]:
    submit = [str(INFRA / "slurm" / "submit.sh"), "--dry-run", str(INFRA / "slurm" / "paper.conf")]
    done = subprocess.run(submit, check=True, capture_output=True, text=True)
    yield from (shlex.split(line) for line in done.stderr.splitlines())


def readme_commands() -> Iterator[list[str]]:
    """What tests/test_readme.py does not know how to read: the lines that go through sbatch."""
    page = (INFRA / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    yield from (shlex.split(line) for line in page.splitlines() if line.startswith("sbatch "))


COMMANDS = [*readme_commands(), *kubernetes_commands(), *skypilot_commands(), *slurm_commands()]


def test_every_world_has_its_commands() -> None:
    assert len(COMMANDS) == 2 + 4 + 2 + 5


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_what_the_files_pass_on_is_what_the_jobs_take(words: list[str]) -> None:
    given = [word for word in words if re.match(r"[a-z_.]+=", word)]
    files = [word for word in words if word.startswith(("pipeline/", "training/", "infra/"))]
    assert files
    for file in files:
        assert (ROOT / file).is_file()
    if any("build" in file for file in files):
        load_config(BuildConfig, None, given)
    elif files[-1].endswith(".yaml"):
        load_config(TrainConfig, str(ROOT / files[-1]), given)


def test_a_pod_of_the_indexed_job_finds_its_place() -> None:
    (job,) = documents("kubernetes/base/train.yaml")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    shared = {(document["kind"], document["metadata"]["name"]) for document in documents("kubernetes/base/shared.yaml")}
    given = {item["name"]: item.get("value", "") for item in pod["containers"][0]["env"]}
    given["MASTER_ADDR"] = given["MASTER_ADDR"].replace("$(JOB)", job["metadata"]["name"])
    place = find_place({**given, "JOB_COMPLETION_INDEX": "1"})
    assert (place.rank, place.nodes, place.leader) == (1, spec["completions"], "pretrain-0.ranks")
    assert spec["completions"] == spec["parallelism"]
    assert {("Service", pod["subdomain"]), ("ServiceAccount", pod["serviceAccountName"])} <= shared
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert {("PersistentVolumeClaim", claim) for claim in claims} <= shared


def test_only_the_head_of_a_cluster_that_scales_may_ask_the_api_server() -> None:
    (build,) = documents("kubernetes/base/build.yaml")
    cluster = build["spec"]["rayClusterSpec"]
    head, workers = (group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))
    accounts = {d["metadata"]["name"]: d for d in documents("kubernetes/base/shared.yaml") if "Account" in d["kind"]}
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())
    # KubeRay's autoscaler runs beside the head as its service account; without a token no worker ever comes.
    assert cluster["enableInTreeAutoscaling"]
    assert head.get("automountServiceAccountToken") is True
    assert "automountServiceAccountToken" not in workers


def test_no_file_holds_a_secret() -> None:
    for path in INFRA.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"AKIA[0-9A-Z]{16}|(SECRET_ACCESS_KEY|TOKEN)\s*[:=]\s*[\"']?[A-Za-z0-9/+]{16,}", text)


@pytest.fixture
def tools() -> Path:
    if not TOOLS.exists():
        pytest.skip("the tools of infra/check.py are not there: make infra-check")
    return TOOLS


def check(tools: Path, folder: Path, *more: str) -> str:
    command = [tools, ROOT / "infra" / "check.py", folder, *more]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stdout


def test_each_planted_typo_is_found(tools: Path, tmp_path: Path) -> None:
    folder = tmp_path / "infra"
    shutil.copytree(INFRA, folder)
    for name, (right, wrong, _) in PLANTED.items():
        text = (folder / name).read_text()
        assert right in text
        (folder / name).write_text(text.replace(right, wrong, 1))
    found = check(tools, folder)
    for name, (_, _, said) in PLANTED.items():
        assert said in found, name
    assert "\nok " in found  # what is right stays right


def test_a_manifest_that_opens_a_door_is_found(tools: Path, tmp_path: Path) -> None:
    folder = tmp_path / "infra"
    shutil.copytree(INFRA, folder)
    for name in ("train.yaml", "build.yaml"):
        path = folder / "kubernetes" / "base" / name
        path.write_text(path.read_text().replace("readOnlyRootFilesystem: true, ", ""))
    path = folder / "kubernetes" / "base" / "kustomization.yaml"
    path.write_text(path.read_text().replace("  - network.yaml\n", ""))
    found = check(tools, folder, "--only", "kubernetes")
    for said in ("container train can write", "container ray-head can write", "there is no NetworkPolicy"):
        assert said in found


@pytest.mark.slow  # cfn-lint, twice
@pytest.mark.parametrize("wrong", ["runs/*", "stores/*"])
def test_a_role_that_writes_beyond_its_prefix_is_found(wrong: str, tools: Path, tmp_path: Path) -> None:
    folder = tmp_path / "infra"
    shutil.copytree(INFRA, folder)
    template = folder / "aws" / "storage.yaml"
    own = "runs/${!aws:PrincipalTag/kubernetes-service-account}/*"
    template.write_text(template.read_text().replace(own, wrong))
    assert f"may write ${{Bucket.Arn}}/{wrong}" in check(tools, folder, "--only", "cloudformation")


def test_a_base_image_without_a_digest_is_refused() -> None:
    """The Dockerfile's own line, run as the builder runs it."""
    text = (INFRA / "Dockerfile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^RUN (case .*?esac)$", text, flags=re.DOTALL | re.MULTILINE)
    digest = "sha256:" + "ab" * 32
    for base, status in (
        (f"nvidia/cuda:12.6.3@{digest}", 0),
        ("localhost/debian-base:12", 0),
        ("nvidia/cuda:12.6.3", 1),
        ("nvidia/cuda@sha256:ab", 1),
    ):
        done = subprocess.run(["/bin/sh", "-c", line], env={"BASE": base}, check=False, capture_output=True, text=True)
        assert done.returncode == status, base
        assert ("has no digest" in done.stderr) is bool(status)
    assert "--require-hashes" in text


def test_a_stack_that_does_not_come_up_is_found(tools: Path, tmp_path: Path) -> None:
    folder = tmp_path / "infra"
    shutil.copytree(INFRA, folder)
    template = folder / "aws" / "storage.yaml"
    template.write_text(template.read_text().replace("Roles: [!Ref Reader]", "Roles: [compact-vision-raeder]"))
    assert "compact-vision-raeder" in check(tools, folder, "--only", "cloudformation")
