"""Which examples of a run's store teach nothing? `doctor.py --examples` looks at all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from training.config import TrainConfig
from training.fit.finding import Finding, Level

if TYPE_CHECKING:
    from training.model.model import CompactVisionForConditionalGeneration
    from training.text.collate import Example

BATCH = 64  # examples that are read together


def examples(config: TrainConfig, model: CompactVisionForConditionalGeneration) -> Iterator[Finding]:
    """Every example that the run may see, made into tokens as the run will; no features are read."""
    from tqdm import tqdm

    from training.fit.build import load_tokenizer
    from training.fit.parts import sources, text_collate
    from training.fit.skipped import by_kind, too_many
    from training.stream.order import Order
    from training.stream.reader import Reading
    from training.stream.stream import Stream

    collate = text_collate(config, load_tokenizer(config), model)
    reasons: dict[str, str] = {}  # of each key
    # In the store's own order; the last batch is filled up, so some are looked at twice.
    order = Order(global_batch_size=BATCH, shuffle=False, last_batch="pad", limit=config.data.limit)
    with tqdm(unit=" examples") as progress:

        def look(batch: Sequence[Example]) -> dict[str, Any]:
            reasons.update({skip.key: skip.reason for skip in collate(batch)["skipped"] if skip is not None})
            progress.update(min(len(batch), progress.total - progress.n))
            return {}

        stream = Stream(sources(config), (), order, Reading.of(config.data), look)
        total = progress.total = len(stream.examples)
        for _ in stream:
            pass
    if not reasons:
        yield Finding("ok", "examples", f"all {total:,} have something to learn")
        return
    level: Level = "fail" if too_many(len(reasons), total, total, config.data.max_skipped) else "warn"
    hint = f"data.max_skipped is {config.data.max_skipped:g}; mend them in the data, or raise it"
    reasons = dict(sorted(reasons.items()))  # several threads looked at them, in any order
    first = next(iter(reasons))
    text = f"{len(reasons):,} of {total:,} would be skipped, {first} first ({hint}):\n{by_kind(reasons.values())}"
    yield Finding(level, "examples", text)
