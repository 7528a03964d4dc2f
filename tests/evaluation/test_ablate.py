"""Ablations: every file is a whole one, arms differ in their connector alone, tables are made from files."""

import json
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load_config
from training import ablate
from training.ablate import AblationConfig, runs, stage_config
from training.benchmarks import AVERAGED
from training.benchmarks.metrics import Scored, together
from training.model.reducers import connector_config

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "training" / "ablations").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the files name others from there


def read(path: Path, *settings: str) -> AblationConfig:
    return load_config(AblationConfig, path, list(settings))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_arms_differ_in_their_connector_and_folder_alone(path: Path) -> None:
    config = read(path)
    for stage in ablate.STAGES:
        first, *others = [stage_config(config, run, stage).model_dump() for run in runs(config) if run.seed == 0]
        assert first["data"]["seed"] == first["seed"] == 0
        for other in others:
            assert other.pop("run") != first["run"]
            assert {key for key in other if other[key] != first[key]} == {"model"}
            differing = {key for key in first["model"] if other["model"][key] != first["model"][key]}
            assert differing <= {"connector", "connector_from"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_published_rows_agree_with_themselves_and_with_the_tokens(path: Path) -> None:
    from training.cost.flops import prefill_flops
    from training.cost.shapes import shape

    config = read(path)
    for arm in config.arms:
        scores = [arm.published[name] for name in AVERAGED]
        # TokenConcat's mean is 65.46, of which the paper prints 65.4
        assert sum(scores) / 8 == pytest.approx(arm.published["avg"], abs=0.07), arm.name
        tokens = connector_config(**arm.connector).tokens
        assert round(prefill_flops(shape("7b").text_config, tokens) / 1e12, 1) == arm.published["tflops"]


def test_mistakes_are_named_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="give either benchmarks"):
        read(FILES[0], "benchmarks=[gqa]", "data=x", "questions=q.jsonl", "images=i")
    config = read(ROOT / "training" / "ablations" / "table3.yaml", "pretrain.settings.optimiser.lr=1")
    with pytest.raises(ConfigError, match="did you mean 'optimizer'"):
        stage_config(config, next(runs(config)), "pretrain")
    monkeypatch.setattr("sys.argv", ["ablate.py", "training/ablations/table3.yaml", "--part", "8/8"])
    with pytest.raises(SystemExit, match="--part '8/8' is not I/N"):
        ablate.main()


def test_parts_are_disjoint_and_whole() -> None:
    plan = list(range(14))
    parts = [plan[ablate._part(f"{i}/4")] for i in range(4)]
    assert sorted(run for part in parts for run in part) == plan
    assert plan[ablate._part(None)] == plan


def test_the_mean_over_seeds_pairs_the_questions() -> None:
    first = Scored("", {"a": ("", 1.0), "b": ("", 0.0), "c": ("", 1.0), "d": ("", 1.0)})
    second = Scored("", {"d": ("", 0.0), "c": ("", 1.0), "b": ("", 0.0), "a": ("", 1.0)})
    both = together([first, second])
    report = both.report()
    assert report["score"] == pytest.approx(62.5)
    assert report["units"] == 4
    assert report["interval"][0] < 62.5 < report["interval"][1]
    assert together([first]).report()["interval"] == first.report()["interval"]
    worse = together([Scored("", {**first.units, "a": ("", 0.0)}), second])
    assert both.against(worse)["difference"] == pytest.approx(12.5)


def test_a_table_in_words() -> None:
    from training.sweep.table import as_text

    score = {"score": 61.25, "interval": [60.0, 62.5], "units": 9, "by_seed": [60, 62.5]}
    row = {
        "arm": "STF",
        "tokens": 144,
        "parameters": 151019520,
        "prefill_flops": 1.875961e12,
        "total_flops": 3e12,
        "loss_pretrain": 2.0,
        "loss_finetune": 1.0,
        "scores": {"gqa": score},
        "seconds_train": 99.6,
        "published": {"tflops": 1.9, "gqa": 61.8, "avg": 65.6},
    }
    encoding = {"images": 10, "once": 5.0, "again": 20.0, "train": 10.0, "cached_total": 15.0, "uncached_total": 30.0}
    text = as_text({"title": "T", "seeds": [0, 1], "rows": [row], "encoding": encoding})
    assert (
        "| STF | 144 | 151,019,520 | 1.876 | 3 | 2.000 | 1.000 | 61.2 [60.0, 62.5] | 100 | 1.9 | 61.8 | 65.6 |" in text
    )
    assert "15 s against 30 s in all, 2.00 times as long" in text
    assert json.loads(json.dumps(row))["tokens"] == 144
