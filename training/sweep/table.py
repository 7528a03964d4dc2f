"""The table of an ablation, from what its runs left in files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.benchmarks.metrics import Scored, together

if TYPE_CHECKING:
    from training.ablate import AblationConfig, Run

TEXT_TOKENS = 64  # of a prompt, in the total: with LLaVA-1.5's system text, a question and no OCR tokens
LAST = 20  # losses are means over so many last steps: one batch says little


def build_table(config: AblationConfig, plan: Sequence[Run]) -> dict[str, Any]:
    """Rows of arms: sizes, FLOPs, losses, scores with intervals, seconds; the first arm is what others are compared to.

    Raises:
        ValueError: if answers are missing.
    """
    rows: list[dict[str, Any]] = []
    baseline: dict[str, Scored] = {}
    for arm in config.arms:
        folders = [run.folder for run in plan if run.arm.name == arm.name]
        scored = _scored(config, folders)
        baseline = baseline or {name: together(each) for name, each in scored.items()}
        against = {} if arm is config.arms[0] else baseline
        rows.append(
            {
                "arm": arm.name,
                "runs": [str(folder.relative_to(config.run)) for folder in folders],
                **_sizes(folders[0]),
                **_training(folders),
                "scores": {name: _score(each, against.get(name)) for name, each in scored.items()},
                "published": arm.published,
            }
        )
        _averages(rows[-1]["scores"])
    return {
        "title": config.title,
        "seeds": list(config.seeds),
        "patches": json.loads((plan[0].folder / "finetune" / "summary.json").read_text())["vision_tokens_in"],
        "rows": rows,
        "encoding": _encoding(config, rows),
        "stores": [store_of(plan[0].folder / stage) for stage in ("pretrain", "finetune")],
    }


def store_of(stage: Path) -> dict[str, str]:
    """What a stage was trained on, by the fingerprints of its store."""
    from pipeline.manifest import read_store
    from pipeline.storage import Storage

    name = json.loads((stage / "config.json").read_text(encoding="utf-8"))["data"]["store"]
    store = read_store(Storage(name))
    text = f"{store.samples} images, data {store.dataset[:16]}, codec {store.codec}, computed in {store.compute}, "
    return {"name": name, "text": text + f"encoder {Path(store.encoder.id).name} at {store.encoder.revision[:16]}"}


def _scored(config: AblationConfig, folders: Iterable[Path]) -> dict[str, list[Scored]]:
    """Per benchmark, what each seed scored."""
    from training.ablate import open_all
    from training.benchmarks.predictions import read_predictions

    result = {}
    for benchmark in open_all(config):
        files = [benchmark.answers_in(folder) for folder in folders]
        each = [benchmark.score(read_predictions(file, benchmark).answers) for file in files]
        result[benchmark.heading] = [next(iter(scores.values())) for scores in each]
    return result


def _score(each: list[Scored], baseline: Scored | None) -> dict[str, Any]:
    mean = together(each)
    report = mean.report()
    kept: dict[str, Any] = {"score": report["score"], "interval": report["interval"], "units": report["units"]}
    kept["by_seed"] = [run.report()["score"] for run in each]
    if baseline is not None:
        pair = mean.against(baseline)
        kept["against_first"] = {"difference": pair["difference"], "interval": pair["interval"]}
    return kept


def _averages(scores: dict[str, Any]) -> None:
    """The paper's average of eight benchmarks, and the same without VizWiz, where all of them were run."""
    from training.benchmarks import paper_average

    known = {name: score["score"] for name, score in scores.items()}
    if paper_average(known).score is not None:
        for title, without in (("avg", None), ("avg-no-vizwiz", "vizwiz")):
            scores[title] = {"score": paper_average(known, without).score, "interval": None}


def _sizes(folder: Path) -> dict[str, Any]:
    """Tokens, parameters and FLOPs, from the trained model's own configuration."""
    from safetensors import safe_open

    from training.cost.flops import image_flops
    from training.model.model import CompactVisionConfig
    from training.model.reducers import connector_config

    model: Any = CompactVisionConfig.from_pretrained(folder / "finetune" / "model")
    connector = connector_config(model.connector)
    with safe_open(folder / "finetune" / "connector" / "connector.safetensors", framework="np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
    parameters = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        parameters += size
    flops = image_flops(model.text_config, model.vision_config, connector, TEXT_TOKENS)
    return {
        "tokens": connector.tokens,
        "columns": len(connector.columns),
        "parameters": parameters,
        "prefill_flops": flops.prefill,
        "total_flops": flops.total,
    }


def _training(folders: Sequence[Path]) -> dict[str, Any]:
    """Means over seeds of the last losses, the seconds and the waiting for data."""
    result: dict[str, Any] = {}
    waits = []
    for stage in ("pretrain", "finetune"):
        logs = [log_lines(folder / stage) for folder in folders]
        result[f"loss_{stage}"] = _mean(_mean(line["loss"] for line in log[-LAST:]) for log in logs)
        waits += [line["data_wait"] * line["step_s"] for log in logs for line in log]
    done = [json.loads((folder / "done.json").read_text(encoding="utf-8")) for folder in folders]
    result["seconds_train"] = _mean(each["train"] for each in done)
    result["seconds_answer"] = _mean(each["answer"] for each in done)
    result["data_wait"] = sum(waits) / sum(each["train"] for each in done)
    return result


def log_lines(stage: Path) -> list[dict[str, Any]]:
    """The lines that training wrote, one a step."""
    return [json.loads(line) for line in (stage / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _encoding(config: AblationConfig, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What encoding once costs, and what encoding again for every arm and seed would."""
    path = Path(config.run) / "encoding.json"
    if not path.exists():
        return None
    measured = json.loads(path.read_text(encoding="utf-8"))
    trained = sum(row["seconds_train"] for row in rows) * len(config.seeds)
    again = sum(measured["arms"].values()) * len(config.seeds)
    return {
        "images": measured["images"],
        "once": measured["once"],
        "again": again,
        "train": trained,
        "cached_total": trained + measured["once"],
        "uncached_total": trained + again,
    }


def as_text(table: dict[str, Any]) -> str:
    """The table in Markdown."""
    names = list(table["rows"][0]["scores"])
    shown = [name for name in (*names, "avg") if any(name in row["published"] for row in table["rows"])]
    scale, unit = flops_unit(table["rows"])
    head = ["arm", "tokens", "parameters", f"{unit} (vision prefill)", f"{unit} (all)", "loss 1", "loss 2", *names]
    head += ["seconds", "published TFLOPs", *[f"published {name}" for name in dict.fromkeys(shown)]]
    lines = [f"# {table['title']}", "", _row(head), _row(["---"] * len(head))]
    for row in table["rows"]:
        cells = [row["arm"], str(row["tokens"]), f"{row['parameters']:,}"]
        cells += [f"{row[key] / scale:.4g}" for key in ("prefill_flops", "total_flops")]
        cells += [f"{row[key]:.3f}" for key in ("loss_pretrain", "loss_finetune")]
        cells += [score_text(row["scores"][name]) for name in names]
        cells += [f"{row['seconds_train']:.0f}", str(row["published"].get("tflops", ""))]
        cells += [str(row["published"].get(name, "")) for name in dict.fromkeys(shown)]
        lines.append(_row(cells))
    seeds = ", ".join(map(str, table["seeds"]))
    lines += ["", f"Means over seeds {seeds}, 95% intervals over questions. Published figures are of Vicuna-1.5-7B."]
    if table["encoding"]:
        lines.append(encoding_text(table["encoding"]))
    return "\n".join(lines) + "\n"


def flops_unit(rows: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """What FLOPs are shown in: TFLOPs as in the paper, MFLOPs for tiny models."""
    return (1e12, "TFLOPs") if max(row["total_flops"] for row in rows) > 1e11 else (1e6, "MFLOPs")


def encoding_text(encoding: dict[str, Any]) -> str:
    """What the cache bought, in words."""
    ratio = encoding["uncached_total"] / encoding["cached_total"]
    return (
        f"Encoding: {encoding['images']} images once for all {encoding['once']:.0f} s; once again for every arm and "
        f"seed {encoding['again']:.0f} s. With training ({encoding['train']:.0f} s) {encoding['cached_total']:.0f} s "
        f"against {encoding['uncached_total']:.0f} s in all, {ratio:.2f} times as long."
    )


def score_text(score: dict[str, Any]) -> str:
    """A score with its interval."""
    if score["score"] is None:
        return "-"
    interval = score["interval"]
    return f"{score['score']:.1f}" + ("" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
