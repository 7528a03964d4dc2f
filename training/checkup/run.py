"""Do the store, the model, the batch, the memory and the disk fit what a configuration asks for? `doctor.py` asks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from training.checkup.examples import examples
from training.config import TrainConfig
from training.fit.finding import Finding, ThisRank, run_check
from training.fit.needs import end_needs, host_memory, needs, shape_of
from training.release.records import CONFIG

if TYPE_CHECKING:
    from pipeline.schema import StoreSpec
    from training.model.model import CompactVisionForConditionalGeneration


def of_run(config: TrainConfig, ranks: ThisRank, every_example: bool = False) -> list[Finding]:
    """Whether store, model, memory and disk fit what the configuration asks for; and every example, if wanted."""
    from pipeline.manifest import read_store
    from pipeline.storage import Storage

    try:
        store = read_store(Storage(config.data.mixture[0].store))
    except (ValueError, OSError) as error:
        return [Finding("fail", "store", str(error))]
    try:
        from training.fit.build import empty_model

        model = empty_model(config, store, files=False)
    except (ValueError, OSError) as error:
        return [Finding("fail", "model", str(error))]
    found = run_check("run", lambda: folder(config))
    found += run_check("model", lambda: model_fits(config, model))
    found += run_check("weights", lambda: llm_files(config))
    found += run_check("batch", lambda: batch(config, model, ranks))
    found += run_check("held out", lambda: held_out(config, store, model, ranks))
    for entry in config.data.mixture:
        found += run_check("store", partial(columns, entry.store, model))
    if every_example:
        found += run_check("examples", lambda: examples(config, model))
    found += needs(config, model, ranks) + run_check("host", lambda: host_memory(config, store, model, ranks))
    if ranks.rank == 0:
        found += end_needs(config, store, model)
    return found + run_check("cache", lambda: cache(config))


def folder(config: TrainConfig) -> Iterator[Finding]:
    """Whether the run's folder is free, or holds this very run, which then goes on."""
    from training.fit.identity import refuse_another
    from training.fit.run_folder import working

    refuse_another(config)
    run = Path(config.run)
    who = working(run)
    if who is not None:
        yield Finding("warn", "run", f"another process works in {run}: {who}; a second one would wait for it")
    elif (run / CONFIG).exists():
        yield Finding("ok", "run", f"{run} holds this run, which goes on")
    else:
        yield Finding("ok", "run", f"{run} is free")


def model_fits(config: TrainConfig, model: CompactVisionForConditionalGeneration) -> Iterator[Finding]:
    """The parts fit each other (they were put together), and the tokenizer is there."""
    from training.fit.build import load_tokenizer

    load_tokenizer(config)
    shape = shape_of(model)
    text = f"{', '.join(config.train)} learn: {shape.learning:,} weights, {shape.frozen:,} are frozen"
    yield Finding("ok", "model", f"{text}; {model.connector.tokens} vision tokens per image")


def llm_files(config: TrainConfig) -> Iterator[Finding]:
    """The files of a language model in a folder hold its weights, by their headers; those of the Hub come later."""
    import torch

    from training.engines.weights import LlmWeights, empty_llm

    name = config.model.llm
    if not Path(name).is_dir():
        return
    files = LlmWeights(config.model, empty_llm(config.model, torch.float32)).files
    if files is None:
        text = f"the files of {name} hold weights otherwise than the model does: every rank reads all of them at once"
        yield Finding("warn", "weights", text)
    else:
        yield Finding("ok", "weights", f"{name} holds all weights, in {len(set(files.values()))} file(s)")


def batch(config: TrainConfig, model: CompactVisionForConditionalGeneration, ranks: ThisRank) -> Iterator[Finding]:
    """How the global batch falls on ranks and microbatches, and how many steps there are."""
    from training.fit.parts import open_stream, shards_at_start

    per_rank = config.per_rank(ranks.planned)
    shards = shards_at_start(config)
    stream = open_stream(config, model.connector.columns, 0, ranks.planned, lambda examples: {}, shards)
    examples, steps = sum(due for _, due in stream.due()), config.steps or config.epochs * len(stream)
    text = f"{config.global_batch_size} examples / {ranks.planned} rank(s) = {per_rank} each"
    if config.microbatch_size != "auto":
        parts = -(-per_rank // config.microbatch_size)  # rounded up
        text += f", in {parts} microbatch(es) of {min(config.microbatch_size, per_rank)}"
        if per_rank % config.microbatch_size and parts > 1:
            better = max(n for n in range(1, config.microbatch_size + 1) if per_rank % n == 0)
            yield Finding("warn", "batch", f"{text}, the last one smaller; microbatch_size={better} would divide it")
    yield Finding("ok", "batch", f"{text}; {len(stream)} per epoch of {examples:,} examples, {steps} steps in all")
    if steps * config.optimizer.warmup_ratio < 1 and config.optimizer.warmup_ratio:
        text = f"of {steps} steps, warmup_ratio {config.optimizer.warmup_ratio} makes less than one that climbs"
        yield Finding("warn", "batch", text + "; more steps, or optimizer.warmup_ratio=0")


def held_out(
    config: TrainConfig, store: StoreSpec, model: CompactVisionForConditionalGeneration, ranks: ThisRank
) -> Iterator[Finding]:
    """There are examples to measure on, and own questions can be asked of the model in training."""
    from training.engines import engine_of
    from training.fit.build import load_tokenizer
    from training.fit.parts import Parts, held_out_stream, learned_too, open_stream, shards_at_start
    from training.fit.quiz import open_quiz

    columns, shards = model.connector.columns, shards_at_start(config)
    stream = held_out_stream(config, columns, 0, 1, lambda examples: {}, shards)
    if stream is None:
        return
    learned = open_stream(config, columns, 0, 1, lambda examples: {}, shards)
    parts = Parts(store, load_tokenizer(config), model, learned, stream)
    quiz = open_quiz(config, parts, engine_of(config, ranks.planned))
    text = f"{len(stream.examples):,} examples, {len(stream.images()):,} images"
    text += "" if quiz is None else f"; {len(quiz.asked):,} own questions after each epoch"
    both = learned_too(stream, learned)
    yield Finding("warn" if both else "ok", "held out", f"{text}; {both}" if both else text)


def columns(url: str, model: CompactVisionForConditionalGeneration) -> Iterator[Finding]:
    """The features of a store's first image are there and decode to numbers, and how long one read takes."""
    import torch

    from pipeline.codec import from_payload
    from pipeline.manifest import fingerprint, read_store
    from pipeline.schema import tar_path
    from pipeline.storage import Storage
    from training.stream.index import read_index

    storage = Storage(url)
    store = read_store(storage)
    index, examples = read_index(storage, store, model.connector.columns)
    if not examples.has_image.any():
        yield Finding("ok", "store", f"{url} is text only")
        return
    sample = int(examples.sample[examples.has_image][0])
    known = {column.name: column for column in store.columns}
    start, read = time.perf_counter(), 0
    for name in model.connector.columns:
        place = (int(index.offsets[name][sample]), int(index.sizes[name][sample]))
        data = bytearray(storage.read_range(tar_path(name, int(index.shard[sample])), *place))
        if len(data) != place[1]:
            text = f"{name} of {index.keys[sample]} is cut off; run pipeline/verify_shards.py {url}"
            yield Finding("fail", "store", text)
            return
        features = from_payload(
            torch.frombuffer(data, dtype=torch.uint8)[None], known[name], store.codec, torch.float32
        )
        read += len(data)
        if not bool(torch.isfinite(features).all()):
            text = f"{name} of {index.keys[sample]} holds NaN or infinity; run pipeline/verify_shards.py --repair"
            yield Finding("fail", "store", text)
            return
    seconds = time.perf_counter() - start
    text = (
        f"{fingerprint(storage)[:12]}: {store.samples:,} samples, {store.encoder.id}, {store.aspect}, {store.codec}; "
    )
    text += f"columns {', '.join(model.connector.columns)}"
    yield Finding("ok", "store", text)
    yield Finding("ok", "store reads", f"an image's {read / 1e6:.1f} MB in {seconds * 1e3:.0f} ms, one read at a time")


def cache(config: TrainConfig) -> Iterator[Finding]:
    """A remote store needs a place for its shards."""
    data = config.data
    if not any(entry.store.startswith("s3://") for entry in data.mixture):
        return
    if data.cache_dir is None:
        text = "none: every image is a ranged request in every epoch; data.cache_dir=/nvme/cache keeps shards"
        yield Finding("warn", "cache", text)
        return
    folder = Path(data.cache_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    held = sum(path.stat().st_size for path in folder.glob("*/*/*.tar"))
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free in {folder} and {held / 1e9:.1f} held, data.cache_gb is {data.cache_gb:.0f}"
    if free + held < data.cache_gb * 1e9:
        yield Finding("fail", "cache", f"{text}; lower it, or choose a larger disk")
    else:
        yield Finding("ok", "cache", text)
