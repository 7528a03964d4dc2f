"""Ablations: every file is a whole one, arms differ in their connector alone, tables are made from files."""

import json
import math
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load_config
from training import ablate
from training.benchmarks import AVERAGED
from training.benchmarks.metrics import Scored, together
from training.model.reducers import connector_config
from training.release.table import Comparison, EncodingCost, Row, Score, Table
from training.sweep.plan import STAGES, AblationConfig, Run, check_stores, part_of, plan_runs

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
    for stage in STAGES:
        first, *others = [run.stages[stage].model_dump() for run in plan_runs(config) if run.seed == 0]
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
        plan_runs(config)
    for wrong, said in (
        ("{arm: mbft}", r"model\.connector: arm: no such connector; did you mean 'mbtf'\?"),
        ("{arm: [mbtf]}", "arm: no such connector; did you mean 'mbtf'"),
        ("{kernel_size: two}", r"kernel_size: .*\(found 'two', from arm 'mine'\)"),
        ("{kernal_size: 2}", r"kernal_size: .*did you mean 'kernel_size'"),
    ):
        config = read(FILES[0], f"arms=[{{name: mine, connector: {wrong}}}]")
        with pytest.raises(ConfigError, match=rf"arm 'mine', pretrain: 1 problem[\s\S]*{said}"):
            plan_runs(config)
    for seeds, said in (("[0, 1, 0]", "one is there twice"), ("[-1]", "greater than or equal to 0")):
        with pytest.raises(ConfigError, match=said):
            read(FILES[0], f"seeds={seeds}")
    monkeypatch.setattr("sys.argv", ["ablate.py", "training/ablations/table3.yaml", "--part", "8/8"])
    with pytest.raises(SystemExit, match="--part '8/8' is not I/N"):
        ablate.main()


def test_a_stages_settings_replace_single_ones_of_its_file_and_the_arms_come_last() -> None:
    lora = ["finetune.settings.model.lora={rank: 2}", "finetune.settings.parallelism=zero2"]
    config = read(ROOT / "training" / "ablations" / "table3.yaml", *lora)
    run = plan_runs(config)[2]
    stage = run.stages["finetune"]
    assert stage.model.connector.arm == run.arm.connector["arm"] == "stf"
    assert stage.model.connector_from == "runs/table3/stf/seed0/pretrain/connector"
    assert stage.model.lora is not None
    assert stage.model.lora.rank == 2
    assert (stage.data.store, stage.data.template) == ("stores/instruct158k", "v1")  # the second is its file's
    assert config.finetune.settings["data"] == {"store": "stores/instruct158k"}


def test_parts_are_disjoint_and_whole() -> None:
    plan: list[Run] = plan_runs(read(ROOT / "training" / "ablations" / "table4.yaml"))
    parts = [part_of(plan, f"{i}/4") for i in range(4)]
    assert sorted(run.folder for part in parts for run in part) == sorted(run.folder for run in plan)
    assert part_of(plan, None) == plan


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


ROW = {
    "arm": "STF",
    "runs": ["stf/seed0", "stf/seed1"],
    "tokens": 144,
    "columns": 1,
    "parameters": 151019520,
    "prefill_flops": 1875961000000,
    "total_flops": 3000000000000,
    "loss_pretrain": 2.0,
    "loss_finetune": 1.0,
    "scores": {"gqa": {"score": 61.25, "interval": [60.0, 62.5], "units": 9, "by_seed": [60.0, 62.5]}},
    "seconds_train": 99.6,
    "seconds_answer": 3.0,
    "data_wait": 0.01,
    "published": {"tflops": 1.9, "gqa": 61.8, "avg": 65.6},
}


def test_a_column_that_a_store_lacks_is_named_before_anything_is_trained(store: Path, tmp_path: Path) -> None:
    stores = [f"{stage}.settings.data.store={store}" for stage in ("pretrain", "finetune")]
    far = "arms=[{name: near, connector: {arm: stf, block: 3}}, {name: far, connector: {arm: stf, block: 99}}]"
    with pytest.raises(ValueError, match=rf"arm 'far', pretrain: store {store} lacks block99; choose other blocks"):
        check_stores(plan_runs(read(FILES[0], far, *stores)))
    with pytest.raises(ValueError, match=f"{tmp_path} is not a feature store"):
        check_stores(plan_runs(read(FILES[0], far, stores[0], f"finetune.settings.data.store={tmp_path}")))


def test_a_table_in_words() -> None:
    from training.sweep.table import as_text

    cost = EncodingCost(images=10, once=5.0, again=20.0, train=10.0, cached_total=15.0, uncached_total=30.0)
    row = Row.model_validate({**ROW, "arm": "STF | b"})
    text = as_text(Table(title="T", seeds=(0, 1), patches=576, rows=(row,), encoding=cost, stores=()))
    assert (
        "| STF \\| b | 144 | 151,019,520 | 1.876 | 3 | 2.000 | 1.000 | 61.2 [60.0, 62.5] | 100 | 1.9 | 61.8 | 65.6 |"
        in text
    )
    assert "15 s against 30 s in all, 2.00 times as long" in text


def test_a_table_in_words_says_what_is_told_apart(tmp_path: Path) -> None:
    from training.sweep.table import as_text

    scored = ROW["scores"]["gqa"]
    rows = [{**ROW, "arm": arm, "categories": {"color": scored, "count": scored}} for arm in ("STF | b", "MLP")]
    rows[1] |= {"published": {"gqa": 62.0}}
    pair = {"score": "gqa", "arms": ("STF | b", "MLP"), "by_seed": (1.0, 3.0), "units": 90, "clusters": 90}
    told = {**pair, "difference": 2.0, "interval": (1.0, 3.0), "missed": 1.5, "from_seeds": 0.4}
    found = [told, {**told, "category": "count"}, {**pair, "difference": 2.0, "category": "color"}]
    table = Table.model_validate(
        {"title": "T", "seeds": [0, 1], "patches": 576, "rows": rows, "stores": [], "comparisons": found}
        | {"guessing": {"gqa": 40.0}, "guessing_by_category": {"color": 25.0, "count": 55.0}}
    )
    table.write(tmp_path)
    text = as_text(Table.read(tmp_path))
    better = "STF \\| b is better by 2.0 [1.0, 3.0]"
    assert f"| STF \\| b - MLP | gqa | +2.0 | [+1.0, +3.0] | +1.0, +3.0 | 40% | {better} | -0.2 (gqa) |\n" in text
    assert "| STF \\| b - MLP | +2.0, too few questions: 90 independent ones | **+2.0 [+1.0, +3.0] / 1.5** |\n" in text
    assert "| always the most frequent answer of the category | 25.0 | 55.0 |\n" in text
    assert text.count("over questions and seeds, hold for all 1 together") == 2, "of two by category, one has too few"
    few = [{**pair, "difference": 2.0, "category": category} for category in (None, "count")]
    without = as_text(table.model_copy(update={"comparisons": tuple(map(Comparison.model_validate, few))}))
    assert without.count("There are too few questions for intervals.") == 2
    assert "hold for all" not in without


def test_a_table_comes_back_from_its_file_and_so_does_one_of_an_older_version(tmp_path: Path) -> None:
    older = {"title": "T", "seeds": [0], "patches": 576, "rows": [ROW], "encoding": None, "stores": []}
    (tmp_path / "table.json").write_text(json.dumps(older))
    table = Table.read(tmp_path)
    assert (table.text_tokens, table.last_steps) == (64, 20)
    diverged = table.rows[0].model_copy(update={"loss_finetune": math.inf, "scores": {"gqa": Score(score=None)}})
    table.model_copy(update={"rows": (diverged,)}).write(tmp_path)
    assert Table.read(tmp_path).rows == (diverged,)
