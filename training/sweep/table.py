"""The table of an ablation, made from what its runs left in files, and the same in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from training.benchmarks import paper_average
from training.benchmarks.metrics import Scored, together
from training.benchmarks.predictions import read_predictions
from training.benchmarks.questions import Benchmark
from training.release.records import LAST, SUMMARY, Summary, final_loss, read_as, read_log
from training.release.table import GUESSING, LUCK, Comparison, EncodingCost, Row, Score, StoreUsed, Table
from training.sweep.comparisons import compare, scores_of
from training.sweep.encoding import encoding_cost
from training.sweep.plan import DONE, STAGES, AblationConfig, Done, Run

CELLS = "Bold: told apart. After the stroke: the difference that would have been found with 80% power."
TEXT_TOKENS = 64  # of a prompt, in the total: with LLaVA-1.5's system text, a question and no OCR tokens


def build_table(config: AblationConfig, plan: Sequence[Run], benchmarks: Sequence[Benchmark]) -> Table:
    """One row per arm; the first arm is what the others are compared to.

    Raises:
        ValueError: if answers are missing.
    """
    runs_of = [[run for run in plan if run.arm.name == arm.name] for arm in config.arms]
    asked = [_asked(each, runs_of) for each in benchmarks]
    rows: list[Row] = []
    for number, (arm, runs) in enumerate(zip(config.arms, runs_of, strict=True)):
        scores = {each.name: _score(each.runs[number]) for each in asked}
        row = Row(
            arm=arm.name,
            runs=tuple(str(run.folder.relative_to(config.run)) for run in runs),
            **_sizes(runs[0].folder),
            **_training([run.folder for run in runs]),
            scores={**scores, **_averages(scores)},
            categories={name: _score(arms[number]) for each in asked for name, arms in each.categories.items()},
            published=arm.published,
        )
        rows.append(row)
    first = plan[0].folder
    trained = sum(row.seconds_train for row in rows) * len(config.seeds)
    return Table(
        title=config.title,
        seeds=config.seeds,
        patches=read_as(Summary, first / "finetune" / SUMMARY).vision_tokens_in,
        rows=tuple(rows),
        encoding=encoding_cost(config, trained),
        comparisons=_comparisons(config, asked),
        guessing={name: score for each in asked for name, score in each.guessing.items()},
        guessing_by_category={name: score for each in asked for name, score in each.guessing_by_category.items()},
        stores=tuple(StoreUsed.of_stage(first / stage) for stage in STAGES),
        text_tokens=TEXT_TOKENS,
        last_steps=LAST,
    )


class _Asked(NamedTuple):
    """What all runs made of one benchmark: a `Scored` for each arm and seed; and what guessing makes of it.

    Attributes:
        name: the table's, of the first score; it shows no other.
        runs: of each arm, its seeds.
        categories: the same by category.
        images: of each unit, by its name.
    """

    name: str
    runs: list[list[Scored]]
    categories: dict[str, list[list[Scored]]]
    images: dict[str, str | None]
    guessing: dict[str, float]
    guessing_by_category: dict[str, float]


def _asked(benchmark: Benchmark, runs_of: Sequence[Sequence[Run]]) -> _Asked:
    """Score the answers of every run."""
    runs: list[list[Scored]] = []
    by_category: list[list[dict[str, Scored]]] = []
    for arm in runs_of:
        scores = [benchmark.score(read_predictions(benchmark.answers_in(run.folder), benchmark).answers) for run in arm]
        runs.append([next(iter(each.values())) for each in scores])
        by_category.append([benchmark.categories(each) for each in scores])
    guesses = benchmark.guesses()
    guessed = benchmark.score(guesses) if guesses else {}
    return _Asked(
        name=benchmark.heading,
        runs=runs,
        categories={name: [[each[name] for each in arm] for arm in by_category] for name in by_category[0][0]},
        images={question.id: question.image for question in benchmark.questions},
        guessing=dict(zip([benchmark.heading], map(_value, guessed.values()), strict=False)),
        guessing_by_category={name: _value(scored) for name, scored in benchmark.categories(guessed).items()},
    )


def _value(scored: Scored) -> float:
    return scored.statistic(scored.counts())


def _score(seeds: Sequence[Scored]) -> Score:
    """The mean over seeds; its interval is over the questions, of these very seeds."""
    report = together(seeds).report()
    return Score(
        score=report["score"],
        interval=report["interval"],
        units=report["units"],
        by_seed=tuple(seed.report()["score"] for seed in seeds),
    )


def _comparisons(config: AblationConfig, asked: Sequence[_Asked]) -> tuple[Comparison, ...]:
    """Every pair of arms, in two families: on all questions of each benchmark, and on those of each category."""
    arms, pairs = [arm.name for arm in config.arms], config.pairs()
    whole = [scores_of(each.name, None, each.runs, each.images) for each in asked]
    parts = [
        scores_of(each.name, category, runs, each.images)
        for each in asked
        for category, runs in each.categories.items()
    ]
    return (*compare(whole, pairs, arms), *compare(parts, pairs, arms))


def _averages(scores: Mapping[str, Score]) -> dict[str, Score]:
    """The paper's average of eight benchmarks, and the same without VizWiz, where all of them were run."""
    known = {name: score.score for name, score in scores.items()}
    if paper_average(known).score is None:
        return {}
    return {
        title: Score(score=paper_average(known, without).score)
        for title, without in (("avg", None), ("avg-no-vizwiz", "vizwiz"))
    }


def _sizes(folder: Path) -> dict[str, Any]:
    """Tokens, parameters and FLOPs, from the trained model's own configuration."""
    from safetensors import safe_open

    from training.cost.flops import image_flops
    from training.model.exported import exported_config
    from training.model.reducers import connector_config

    model: Any = exported_config(folder / "finetune" / "model")
    connector = connector_config(model.connector)
    with safe_open(folder / "finetune" / "connector" / "connector.safetensors", framework="np") as file:
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    flops = image_flops(model.text_config, model.vision_config, connector, TEXT_TOKENS)
    return {
        "tokens": connector.tokens,
        "columns": len(connector.columns),
        "parameters": parameters,
        "prefill_flops": flops.prefill,
        "total_flops": flops.total,
    }


def _training(folders: Sequence[Path]) -> dict[str, Any]:
    """Means over seeds of the final losses and the seconds, and the share of the steps' time that waited for data."""
    logs = {stage: [read_log(folder / stage) for folder in folders] for stage in STAGES}
    done = [read_as(Done, folder / DONE) for folder in folders]
    # A log says which share of each step was waited; seconds add up.
    lines = [line for stage in STAGES for log in logs[stage] for line in log]
    return {
        **{f"loss_{stage}": _mean(map(final_loss, logs[stage])) for stage in STAGES},
        "seconds_train": _mean(each.train for each in done),
        "seconds_answer": _mean(each.answer for each in done),
        "data_wait": sum(line["data_wait"] * line["step_s"] for line in lines) / sum(line["step_s"] for line in lines),
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def as_text(table: Table) -> str:
    """The table in Markdown."""
    rows, (scale, unit) = table.rows, table.flops_unit
    names = list(rows[0].scores)
    published = [name for name in dict.fromkeys((*names, "avg")) if any(name in row.published for row in rows)]
    head = ["arm", "tokens", "parameters", f"{unit} (vision prefill)", f"{unit} (all)", "loss 1", "loss 2", *names]
    head += ["seconds", "published TFLOPs", *[f"published {name}" for name in published]]
    lines = [f"# {table.title}", "", _line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [row.arm, str(row.tokens), f"{row.parameters:,}"]
        cells += [f"{flops / scale:.4g}" for flops in (row.prefill_flops, row.total_flops)]
        cells += [f"{loss:.3f}" for loss in (row.loss_pretrain, row.loss_finetune)]
        cells += [str(row.scores[name]) for name in names]
        cells += [f"{row.seconds_train:.0f}", *[str(row.published.get(name, "")) for name in ("tflops", *published)]]
        lines.append(_line(cells))
    seeds = ", ".join(map(str, table.seeds))
    lines += ["", f"Means over seeds {seeds}, 95% intervals over questions. Published figures are of Vicuna-1.5-7B."]
    lines += [*_by_category(table), *_differences(table)]
    if table.encoding is not None:
        lines.append(_saved(table.encoding))
    return "\n".join(lines) + "\n"


def _by_category(table: Table) -> list[str]:
    """The scores by category, and what guessing would score; nothing where questions have none."""
    names, lines = table.categories, []
    if names:
        cells = [f"{name} ({table.rows[0].categories[name].units} questions)" for name in names]
        lines += ["", "## By category", "", _line(["arm", *cells]), _line(["---"] * (1 + len(names)))]
        lines += [_line([row.arm, *[str(row.categories[name]) for name in names]]) for row in table.rows]
        if guessed := table.guessing_by_category:
            lines.append(_line([GUESSING, *[f"{guessed[name]:.1f}" for name in names]]))
    return lines + [f"\n{GUESSING}: {name} {score:.1f}." for name, score in table.guessing.items()]


def _differences(table: Table) -> list[str]:
    """What is told of each pair of arms, and beside it what the paper says."""
    lines: list[str] = []
    if overall := table.overall:
        lines += ["", "## What is told apart", "", table.meaning(overall), ""]
        head = [
            "difference",
            "of",
            "points",
            "95% together",
            "each seed",
            "luck of seeds",
            "what it tells",
            "the paper",
        ]
        lines += [_line(head), _line(["---"] * len(head))]
        for each in overall:
            bounds = "" if each.interval is None else f"[{each.interval[0]:+.1f}, {each.interval[1]:+.1f}]"
            luck = "" if each.from_seeds is None else f"{100 * each.from_seeds:.0f}%"
            seeds = ", ".join(f"{value:+.1f}" for value in each.by_seed)
            cells = [" - ".join(each.arms), each.score, f"{each.difference:+.1f}", bounds, seeds, luck, each.verdict]
            lines.append(_line([*cells, table.claimed(each)]))
        lines += ["", LUCK]
    if parts := table.by_category:
        family = list(chain.from_iterable(parts.values()))
        lines += ["", "## What is told apart by category", "", f"{table.meaning(family)} {CELLS}", ""]
        lines += [_line(["difference", *table.categories]), _line(["---"] * (1 + len(table.categories)))]
        lines += [_line([" - ".join(arms), *map(_cell, found)]) for arms, found in parts.items()]
    return lines


def _cell(each: Comparison) -> str:
    """A difference on one category."""
    if each.interval is None or each.missed is None:
        return f"{each.difference:+.1f}, {each.verdict}"
    text = f"{each.difference:+.1f} [{each.interval[0]:+.1f}, {each.interval[1]:+.1f}] / {each.missed:.1f}"
    return f"**{text}**" if each.told_apart else text


def _saved(cost: EncodingCost) -> str:
    """What the store has saved, in words."""
    return (
        f"Encoding: {cost.images} images once for all {cost.once:.0f} s; once again for every arm and "
        f"seed {cost.again:.0f} s. With training ({cost.train:.0f} s) {cost.cached_total:.0f} s "
        f"against {cost.uncached_total:.0f} s in all, {cost.ratio:.2f} times as long."
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
