"""Pages are made of files: an ablation's, also of an older version, and a run's; nothing beside them is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from pipeline.manifest import create_or_check
from pipeline.schema import Column, EncoderSpec, StoreSpec
from pipeline.storage import Storage
from training.pages.ablation import ablation_page
from training.pages.charts import bars, loss_chart, score_plot
from training.pages.page import shown
from training.pages.run import run_page
from training.release.table import Row

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "finetune")
STORE = StoreSpec(
    dataset="d" * 64,
    samples=9,
    shards=1,
    shard_size=9,
    seed=0,
    encoder=EncoderSpec(id="clip", revision="r1", blocks=4, width=8, image_size=8, patch_size=2),
    aspect="pad",
    compute="float32",
    codec="bf16",
    columns=(Column(name="block03", tokens=16, width=8),),
)


PAIR = {
    "score": "accuracy",
    "arms": ["MLP", "STF"],
    "units": 90,
    "clusters": 90,
    "by_seed": [-50.0],
    "difference": -5.0,
}


def row(arm: str, score: float) -> dict[str, object]:
    """One arm with one seed, as `table.json` of an older version keeps it."""
    scored = {"score": score, "interval": [score - 5, score + 5], "units": 2, "by_seed": [score]}
    return {
        "arm": arm,
        "runs": [f"{arm.lower()}/seed0"],
        "tokens": 4,
        "columns": 1,
        "parameters": 1000,
        "prefill_flops": 1_000_000,
        "total_flops": 3_000_000,
        "loss_pretrain": 2.0,
        "loss_finetune": 1.0,
        "seconds_train": 30.0,
        "seconds_answer": 30.0,
        "data_wait": 0.01,
        "scores": {"accuracy": scored},
        "published": {"tflops": 1.9},
    }


def write_log(stage: Path) -> None:
    stage.mkdir(parents=True)
    lines = [{"step": n, "loss": 4.0 - n, "samples_per_s": 10.0, "data_wait": 0.1, "step_s": 1.0} for n in (1, 2)]
    (stage / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')


def write_answers(path: Path, texts: list[str]) -> None:
    lines = [
        {"question_id": n, "image": "red.png", "prompt": "What <color>?\nOne word.", "text": text, "answer": "red"}
        for n, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "red.png")
    return tmp_path / "images"


@pytest.fixture
def ablation(tmp_path: Path) -> Path:
    """The files of two arms that differ on the second of two questions."""
    folder = tmp_path / "ablation"
    for arm, second in (("STF", "red"), ("MLP", "blue")):
        for stage in STAGES:
            write_log(folder / arm.lower() / "seed0" / stage)
        write_answers(folder / arm.lower() / "seed0" / "answers.jsonl", ["Red.", second])
    table = {
        "title": "Two arms",
        "seeds": [0],
        "patches": 16,
        "rows": [row("STF", 100.0), row("MLP", 50.0)],
        "encoding": {"images": 9, "once": 1.0, "again": 4.0, "train": 3.0, "cached_total": 4.0, "uncached_total": 7.0},
        "stores": [{"name": "runs/store", "text": "9 images"}],
    }
    (folder / "table.json").write_text(json.dumps(table))
    return folder


def test_an_ablations_page_holds_its_table_and_the_questions_on_which_arms_differ(ablation: Path, images: Path) -> None:
    page = ablation_page(ablation, images)
    assert "What &lt;color&gt;?" in page
    assert page.count("data:image/jpeg;base64,") == 1
    assert "1.75 x" in page
    assert "mean of the last 20 steps" in page
    assert "64 text tokens" in page
    assert "data:image" not in ablation_page(ablation, None)


def test_an_ablations_page_says_which_arms_differ_and_by_how_much_it_may_be_wrong(ablation: Path) -> None:
    assert "is of an older version, which compared no arms" in ablation_page(ablation, None)
    table = json.loads((ablation / "table.json").read_text())
    pair = {**PAIR, "missed": 9.0}
    told = {**pair, "difference": -50.0, "interval": [-60.0, -40.0]}
    untold = {**pair, "category": "<count>", "difference": 1.0, "interval": [-3.0, 5.0]}
    table |= {"comparisons": [told, untold], "guessing": {"accuracy": 25.0}, "guessing_by_category": {"<count>": 30.0}}
    for each in table["rows"]:
        each["categories"] = {"<count>": each["scores"]["accuracy"]}
        each["published"] |= {"avg": 65.5 if each["arm"] == "MLP" else 66.6}
    (ablation / "table.json").write_text(json.dumps(table))
    page = ablation_page(ablation, None)
    assert "STF is better by 50.0 [40.0, 60.0]" in page
    assert "-1.1 (avg)" in page
    assert "not told apart: differences beyond [-3.0, +5.0] are excluded; one of 9.0 would have been found" in page
    assert "+1.0<br><small>[-3.0, +5.0]<br>9.0</small>" in page
    assert "hold for all 1 together" in page
    assert "There is one seed: with another one the arms may lie otherwise" in page
    assert "&lt;count&gt;<br>2 questions" in page
    assert "accuracy of always the most frequent answer of the category: 25.0" in page
    assert "older version" not in page


def test_a_plots_axis_has_round_numbers_around_every_interval() -> None:
    plot = score_plot([Row.model_validate(row(arm, score)) for arm, score in (("A", 61.0), ("B", 48.5))], "accuracy")
    assert [tick.label for tick in plot.ticks] == [40, 45, 50, 55, 60, 65, 70]
    first, last = plot.ticks[0].at, plot.ticks[-1].at
    assert all(first <= mark.low < mark.x < mark.high <= last for mark in plot.marks)


def test_bars_are_percent_of_the_longest_and_curves_rise_with_the_loss() -> None:
    assert [bar.percent for bar in bars({"a": [1.0, 1.0], "b": [4.0]})] == [[25.0, 25.0], [100.0]]
    (line,) = loss_chart({"loss": ([1, 2], [4.0, 2.0])}).lines
    heights = [float(point.partition(",")[2]) for point in line.raw.split()]
    assert heights[0] < heights[1]  # SVG counts from the top


def test_a_held_out_curve_has_the_scale_of_the_training_loss_and_lies_over_the_same_steps() -> None:
    chart = loss_chart({"loss": ([1, 2, 3], [4.0, 2.0, 1.0])}, ([2, 3], [5.0, float("nan")]))
    (point,) = chart.held_out.split()
    x, y = map(float, point.split(","))
    (line,) = chart.lines
    assert x == float(line.raw.split()[1].split(",")[0])
    assert 0 < y < float(line.raw.split()[0].split(",")[1])  # the highest of all
    assert loss_chart({"loss": ([1], [1.0])}).held_out == ""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files of a run of the main job, which answered two questions."""
    run = tmp_path / "run"
    for stage in STAGES:
        write_log(run / stage)
        store = tmp_path / f"{stage}-store"
        create_or_check(Storage(str(store)), STORE)
        config = {"run": "r", "train": ["connector"], "model": {"llm": "l"}, "optimizer": {"lr": 1}}
        config |= {"data": {"store": str(store), "template": "v1"}, "global_batch_size": 1}
        (run / stage / "config.json").write_text(json.dumps(config))
    write_answers(run / "answers.jsonl", ["red", "blue"])
    summary = {
        "accuracy": 0.5,
        "accuracy_shuffled_images": None,
        "questions": 2,
        "categories": {},
        "vision_tokens_in": 16,
        "vision_tokens_out": 4,
        "loss_first": dict.fromkeys(STAGES, 3.0),
        "loss_last": dict.fromkeys(STAGES, 2.0),
        "data_wait": dict.fromkeys(STAGES, 0.1),
        "store_images": 9,
        "store_bytes": 1000,
        "seconds": {"stage 1": 1.0, "stage 2": 2.0},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_a_runs_page_says_who_was_right_and_what_it_was_trained_on(run: Path, images: Path) -> None:
    page = run_page(run, images)
    assert [match[1] for match in re.finditer(r'<div class="(right|wrong)">', page)] == ["right", "wrong"]
    assert "loss 3.000 &rarr; 2.500, 2 steps" in page  # the unfinished third line is none
    assert page.count("9 images, data dddddddddddddddd") == 2
    assert f"Run <b>{run.name}</b>" in page


def test_a_runs_page_says_what_its_result_means(run: Path, images: Path) -> None:
    assert "What this result means" not in run_page(run, images)  # a summary of an older version
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "meaning": ["Means nothing: 2 of 2 answers are '<a>'."]}))
    page = run_page(run, images)
    assert "What this result means" in page
    assert "Means nothing: 2 of 2 answers are &#39;&lt;a&gt;&#39;." in page


def test_of_two_questions_with_one_id_each_has_its_own_answer_to_another_image(run: Path, images: Path) -> None:
    lines = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    for line, image, said in zip(
        lines, ("blue.png", "red.png"), ("told of the first", "told of the second"), strict=True
    ):
        line |= {"question_id": 7, "answer": image}
        other = {**line, "image": image, "text": said}
        with (run / "answers_shuffled.jsonl").open("a") as file:
            file.write(json.dumps(other) + "\n")
    (run / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = run_page(run, images)
    assert 0 < page.index("told of the first") < page.index("told of the second")


@pytest.mark.parametrize("name", ["../outside.png", "{outside}", "link.png", "none.png", "text.png", ["red.png"]])
def test_a_page_embeds_images_of_the_given_folder_only(name: object, tmp_path: Path, images: Path) -> None:
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8), "blue").save(outside)
    (images / "link.png").symlink_to(images / "nowhere.png")
    (images / "text.png").write_text("<script>")
    named = str(outside) if name == "{outside}" else name
    with pytest.raises(ValueError, match=r"not a file within|unreadable image"):
        shown({"image": named, "prompt": "What?"}, images)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("pretrain/log.jsonl", "", r"pretrain/log\.jsonl holds no step"),
        ("answers.jsonl", '{"question_id": 0, "image": "red.png"}\n', r"answers\.jsonl:1 is not an answer .*'text'"),
        ("answers.jsonl", '{"question_id": 0, "image": "red.png", "text": "a", "prompt": 5}\n', "prompt is int"),
        ("answers_shuffled.jsonl", "{}\n", r"answers_shuffled\.jsonl:1 is not an answer"),
        ("summary.json", "0", r"summary\.json is damaged"),
        ("summary.json", '"vision_tokens_in": 16', "vision_tokens_in: Input should be greater than 0"),
    ],
)
def test_damaged_files_of_a_run_are_named(run: Path, images: Path, file: str, text: str, said: str) -> None:
    path = run / file
    path.write_text(path.read_text().replace(text, text.replace("16", "0")) if "16" in text else text)
    with pytest.raises(ValueError, match=said):
        run_page(run, images)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 0.0])
def test_a_run_that_diverged_has_a_page(run: Path, images: Path, loss: float) -> None:
    line = {"step": 3, "loss": loss, "samples_per_s": 10.0, "data_wait": 0.1, "step_s": 1.0}
    (run / "pretrain" / "log.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "step": 4}) + "\n")
    assert not re.search(r'points="[^"]*(nan|inf)', run_page(run, images))


def test_as_many_examples_are_shown_as_asked_for(run: Path, ablation: Path, images: Path) -> None:
    counts = [
        (run_page(run, images, n).count("data:image"), ablation_page(ablation, images, n).count("data:image"))
        for n in (0, 1, 9)
    ]
    assert counts == [(0, 0), (1, 1), (2, 1)]


def test_an_ablation_whose_truth_nobody_tells_has_a_page(ablation: Path, images: Path) -> None:
    table = json.loads((ablation / "table.json").read_text())
    for number, each in enumerate(table["rows"]):
        each["scores"] = {"vizwiz": {"score": None, "by_seed": [None]}}
        each["published"] = {"tflops": 1.9} if number else {}  # of the second arm only
    (ablation / "table.json").write_text(json.dumps(table))
    page = ablation_page(ablation, images)
    assert "the best arm" not in page
    assert '<td class="number published">1.9</td>' in page


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rows", [], "rows: Tuple should have at least 1 item"),
        ("seeds", [], "seeds: Tuple should have at least 1 item"),
        ("patches", 0, "patches: Input should be greater than 0"),
        (
            "rows",
            [row("STF", 1.0), {**row("MLP", 1.0), "scores": {}}],
            r"MLP has the scores \[\], STF has \['accuracy'\]",
        ),
        ("comparisons", [PAIR | {"arms": ["STF", "nobody"]}], "STF and nobody are compared on None, which no row has"),
        ("comparisons", [PAIR | {"category": "count"}], "MLP and STF are compared on count, which no row has"),
    ],
)
def test_damaged_tables_are_named(ablation: Path, key: str, value: object, said: str) -> None:
    table = json.loads((ablation / "table.json").read_text())
    (ablation / "table.json").write_text(json.dumps({**table, key: value}))
    with pytest.raises(ValueError, match=rf"table\.json is damaged.*{said}"):
        ablation_page(ablation, None)
