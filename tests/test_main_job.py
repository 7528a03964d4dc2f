"""The main job through its real commands: one whole demo run, then every way to launch training on its stores."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPOSER = [sys.executable, str(Path(sys.executable).parent / "composer")]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one complete demo run."""
    run = tmp_path_factory.mktemp("demo") / "run"
    shell(sys.executable, "training/demo.py", "--run", str(run))
    return run


def shell(*command: str, fails: bool = False) -> str:
    done = subprocess.run(command, check=False, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) is fails, output[-4000:]
    return output


def stage2(demo: Path, run: Path, *more: str) -> list[str]:
    """Settings that train a few steps of stage 2 on the demo's store."""
    return [
        f"run={run}",
        f"data.store={demo}/finetune-store",
        f"model.llm={demo}/models/llm",
        f"model.connector_from={demo}/pretrain/connector",
        "model.connector.blocks=[1,2,3,4,5,6,7,8]",
        "model.activation_checkpointing=false",
        "data.max_length=512",
        "data.group_by_length=false",
        "optimizer.lr=1e-3",
        "precision=fp32",
        "device=cpu",
        "global_batch_size=16",
        "microbatch_size=4",
        "steps=4",
        *more,
    ]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.minutes(8)
def test_the_demo_learns_to_see(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["accuracy"] >= summary["accuracy_shuffled_images"] + 0.25
    assert summary["vision_tokens_out"] * 4 == summary["vision_tokens_in"]
    for stage in ("pretrain", "finetune"):
        assert summary["loss_last"][stage] < summary["loss_first"][stage]
    assert summary["store_images"] > 0
    assert summary["store_bytes"] > 0
    assert all(seconds > 0 for seconds in summary["seconds"].values())


@pytest.mark.slow
def test_the_demos_report_needs_nothing_beside_itself(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


@pytest.mark.slow
def test_running_the_demo_again_repeats_nothing(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*.tar")}
    output = shell(sys.executable, "training/demo.py", "--run", str(demo))
    assert output.count("done before") >= 6
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*.tar")} == before


@pytest.mark.slow
def test_every_launch_form_trains_the_same_losses(demo: Path, tmp_path: Path) -> None:
    forms = {
        "script": [*COMPOSER, "-n", "1", "training/train.py", "training/finetune.yaml"],
        "literal yaml": [*COMPOSER, "-n", "1", "training/finetune.yaml"],
        "two ranks": [*COMPOSER, "-n", "2", "training/finetune.yaml"],
        "no launcher": [sys.executable, "training/train.py", "training/finetune.yaml"],
    }
    seen = {}
    for name, command in forms.items():
        run = tmp_path / name.replace(" ", "-")
        shell(*command, *stage2(demo, run))
        seen[name] = losses(run)
    assert len(seen["script"]) == 4
    assert seen["literal yaml"] == seen["script"] == seen["no launcher"]
    assert seen["two ranks"] == pytest.approx(seen["script"], rel=2e-5)


@pytest.mark.slow
def test_the_readmes_first_hour_runs(demo: Path, tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (typed,) = re.findall(r"^```bash\nsource .venv/bin/activate\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (script,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    typed, script = (text.replace("runs/demo", str(demo)) for text in (typed, script))
    before = set(demo.rglob("*"))
    output = shell("bash", "-euc", f'export PATH="{Path(sys.executable).parent}:$PATH"\n{typed}')
    assert "16 patch tokens -> 4 vision tokens" in output
    assert '"questions": 8' in output
    assert {path.name for path in set(demo.rglob("*")) - before} == {
        "eight.jsonl",
        "eight.jsonl.run.json",
        "eight.scores.json",
    }
    for path in demo.glob("eight.*"):
        path.unlink()
    (tmp_path / "readme.py").write_text(script)
    said = shell(sys.executable, str(tmp_path / "readme.py")).splitlines()
    assert set("123456789") & {line.strip() for line in said}


def test_a_misspelt_setting_is_named_with_what_was_meant(tmp_path: Path) -> None:
    output = shell(
        sys.executable, "training/train.py", "training/finetune.yaml", "optimiser.lr=1", "epochs=0", fails=True
    )
    assert "did you mean 'optimizer'?" in output
    assert "epochs" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_store_that_is_not_there_is_a_clear_error(demo: Path, tmp_path: Path) -> None:
    settings = stage2(demo, tmp_path / "run", f"data.store={tmp_path}/nothing")
    output = shell(sys.executable, "training/train.py", "training/finetune.yaml", *settings, fails=True)
    assert f"{tmp_path}/nothing" in output
    assert "build_shards.py" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_stage_one_leaves_the_language_model_as_it_was(demo: Path) -> None:
    from safetensors.torch import load_file

    before = load_file(demo / "models" / "llm" / "model.safetensors")
    assert set(load_file(demo / "pretrain" / "connector" / "connector.safetensors"))
    after = load_file(demo / "finetune" / "model" / "model.safetensors")
    changed = [
        name
        for name, weight in before.items()
        if name.endswith("q_proj.weight")
        and not any(weight.shape == other.shape and weight.equal(other) for other in after.values())
    ]
    assert changed, "stage 2 trains the language model"


@pytest.mark.slow
def test_the_photos_go_through_the_same_commands(photos: Path, demo: Path, tmp_path: Path) -> None:
    (questions,) = photos.glob("*questions.jsonl")
    shutil.copytree(demo / "models", tmp_path / "run" / "models")  # not done again
    command = [sys.executable, "training/demo.py", "--run", str(tmp_path / "run"), "--images", str(photos / "images")]
    command += ["--chat", str(photos / "chat.json"), "--instruct", str(photos / "instruct.json")]
    command += ["--questions", str(questions)]
    assert re.search(r"make tiny models +done before", shell(*command))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    images = [
        {entry["image"] for entry in json.loads((photos / f"{name}.json").read_text(encoding="utf-8"))}
        for name in ("chat", "instruct")
    ]
    assert summary["store_images"] == sum(map(len, images))
    for store in ("pretrain-store", "finetune-store"):
        assert (tmp_path / "run" / store / "failures.jsonl").read_text() == ""
    assert summary["questions"] == len(questions.read_text(encoding="utf-8").splitlines())
    assert any("learn these by heart" in sentence for sentence in summary["meaning"])
    assert "What this result means" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_an_ablation_trains_its_arms_once_and_writes_one_table(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "ablation"
    command = [
        sys.executable,
        "training/ablate.py",
        "training/ablations/demo.yaml",
        f"run={run}",
        "limit=16",
        "seeds=[0,1]",
    ]
    for stage in ("pretrain", "finetune"):
        command.append(f"{stage}.settings.data.store={demo}/{stage}-store")
        command += [f"{stage}.settings.model.llm={demo}/models/llm", f"{stage}.settings.steps=3"]
    command += [f"questions={demo}/data/heldout.jsonl", f"images={demo}/data/images"]
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads((demo / "data" / "chat.json").read_text())[:64]))
    command += [f"encoding.encoder={demo}/models/clip", f"encoding.data=[{few}]", f"encoding.images={demo}/data/images"]
    command.append("arms=[{name: MLP, connector: {arm: mlp}}, {name: STF, connector: {arm: stf}}]")
    assert "3 of 4 runs are not done yet" in shell(*command, "--part", "0/4")
    assert re.findall(r"^run \d of 4: (\w+), seed (\d)$", shell(*command), re.MULTILINE) == [
        ("STF", "0"),
        ("MLP", "1"),
        ("STF", "1"),
    ]
    result = json.loads((run / "table.json").read_text())
    assert [(row["arm"], row["tokens"]) for row in result["rows"]] == [("MLP", 16), ("STF", 4)]
    for row in result["rows"]:
        score = row["scores"]["accuracy"]
        assert len(score["by_seed"]) == 2
        assert score["interval"][0] <= score["score"] <= score["interval"][1]
    assert result["encoding"]["again"] > result["encoding"]["once"]
    assert losses(run / "mlp" / "seed0" / "pretrain") != losses(run / "mlp" / "seed1" / "pretrain")
    assert "data:image/jpeg;base64," in (run / "report.html").read_text()
