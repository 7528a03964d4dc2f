"""Do the store, the model, the batch, the memory and the disk fit what a configuration asks for? `doctor.py` asks."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from training.checkup.examples import examples
from training.checkup.finding import Finding, Level, ThisRank, run_check
from training.config import TrainConfig
from training.cost.memory import CHECKPOINT, ModelShape, activations
from training.engines import engine_of

if TYPE_CHECKING:
    from pipeline.schema import StoreSpec
    from training.model.model import CompactVisionForConditionalGeneration


def of_run(config: TrainConfig, ranks: ThisRank, every_example: bool = False) -> list[Finding]:
    """Whether store, model, memory and disk fit what the configuration asks for; and every example, if wanted."""
    from pipeline.manifest import read_store
    from pipeline.storage import Storage

    try:
        store = read_store(Storage(config.data.store))
    except (ValueError, OSError) as error:
        return [Finding("fail", "store", str(error))]
    try:
        from training.fit.build import empty_model

        model = empty_model(config, store)
    except (ValueError, OSError) as error:
        return [Finding("fail", "model", str(error))]
    shape = shape_of(model)
    found = run_check("model", lambda: model_fits(config, model, shape))
    found += run_check("batch", lambda: batch(config, model, ranks))
    found += run_check("store", lambda: columns(config, store, model))
    if every_example:
        found += run_check("examples", lambda: examples(config, model))
    found += run_check("memory", lambda: memory(config, shape, model, ranks))
    found += run_check("disk", lambda: disk(config, shape))
    found += run_check("bucket", lambda: bucket(config))
    return found + run_check("cache", lambda: cache(config))


def shape_of(model: CompactVisionForConditionalGeneration) -> ModelShape:
    """What the estimate of memory needs to know."""
    text = model.llm.config
    return ModelShape(
        learning=sum(p.numel() for p in model.parameters() if p.requires_grad),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        layer=sum(p.numel() for p in model.llm.get_decoder().layers[0].parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        mlp=text.intermediate_size,
        vocabulary=text.vocab_size,
    )


def model_fits(
    config: TrainConfig, model: CompactVisionForConditionalGeneration, shape: ModelShape
) -> Iterator[Finding]:
    """The parts fit each other (they were put together), and the tokenizer is there."""
    from training.fit.build import load_tokenizer

    load_tokenizer(config)
    text = f"{', '.join(config.train)} learn: {shape.learning:,} weights, {shape.frozen:,} are frozen"
    yield Finding("ok", "model", f"{text}; {model.connector.tokens} vision tokens per image")


def batch(config: TrainConfig, model: CompactVisionForConditionalGeneration, ranks: ThisRank) -> Iterator[Finding]:
    """How the global batch falls on ranks and microbatches, and how many steps there are."""
    from training.fit.parts import open_stream

    per_rank = config.per_rank(ranks.planned)
    stream = open_stream(config, model.connector.columns, 0, ranks.planned, lambda examples: {})
    examples, steps = len(stream.examples), config.steps or config.epochs * len(stream)
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


def columns(config: TrainConfig, store: StoreSpec, model: CompactVisionForConditionalGeneration) -> Iterator[Finding]:
    """The first image's features are there and decode to numbers, and how long one read takes."""
    import torch

    from pipeline.codec import from_payload
    from pipeline.manifest import fingerprint
    from pipeline.schema import tar_path
    from pipeline.storage import Storage
    from training.stream.index import read_index

    storage = Storage(config.data.store)
    index, examples = read_index(storage, store, model.connector.columns)
    if not examples.has_image.any():
        yield Finding("fail", "store", f"{config.data.store} has no image; a connector has nothing to learn from")
        return
    sample = int(examples.sample[examples.has_image][0])
    known = {column.name: column for column in store.columns}
    start, read = time.perf_counter(), 0
    for name in model.connector.columns:
        place = (int(index.offsets[name][sample]), int(index.sizes[name][sample]))
        data = bytearray(storage.read_range(tar_path(name, int(index.shard[sample])), *place))
        if len(data) != place[1]:
            text = f"{name} of {index.keys[sample]} is cut off; run pipeline/verify_shards.py {config.data.store}"
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


def memory(
    config: TrainConfig, shape: ModelShape, model: CompactVisionForConditionalGeneration, ranks: ThisRank
) -> Iterator[Finding]:
    """What a rank needs against what its device, or its share of the host, has."""
    import torch

    per_rank = max(1, config.global_batch_size // ranks.planned)
    examples = 1 if config.microbatch_size == "auto" else min(config.microbatch_size, per_rank)
    engine = engine_of(config, ranks.planned)
    held = engine.memory(shape)
    kept = activations(config, shape, examples, config.data.max_length - model.connector.tokens)
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    room = torch.cuda.mem_get_info(ranks.local_rank)[1] if on_gpu else _free_host_memory() / ranks.local_size
    text = "weights {:.1f} + gradients {:.1f} + optimizer {:.1f} + activations about {:.1f} GB".format(
        *(part / 1e9 for part in (held.weights, held.gradients, held.optimizer, kept))
    )
    text += f" ({engine.name}, {ranks.planned} rank(s), {examples} example(s) of {config.data.max_length} tokens)"
    text += f" of {room / 1e9:.1f} GB"
    hint = "; lower microbatch_size, set model.activation_checkpointing=true, or shard more (parallelism, more ranks)"
    if held.total > room:
        yield Finding("fail", "memory", text + hint)
    elif held.total + kept > 0.95 * room:
        yield Finding("warn", "memory", text + hint)
    else:
        yield Finding("ok", "memory", text)


def _free_host_memory() -> int:
    """Bytes that new processes can have (Linux counts in KiB)."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def disk(config: TrainConfig, shape: ModelShape) -> Iterator[Finding]:
    """Room for checkpoints and weights where the run goes, and that we may write there."""
    folder = Path(config.run).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    trial = there / f".doctor-{uuid.uuid4().hex}"
    try:
        trial.write_bytes(b"trial")
        trial.unlink()
    except OSError as error:
        yield Finding("fail", "disk", f"cannot write to {there} ({error.strerror}); choose another run=...")
        return
    one = CHECKPOINT * shape.learning
    keep = max(1, config.checkpoint.keep) + 1  # the new one is written before the oldest goes
    free = shutil.disk_usage(there).free
    text = f"a checkpoint takes {one / 1e9:.2f} GB, {keep} of them {keep * one / 1e9:.2f}; {free / 1e9:.1f} GB free"
    level: Level = "fail" if free < one else "warn" if free < keep * one else "ok"
    hint = "" if level == "ok" else "; make room, lower checkpoint.keep, or choose another run=..."
    yield Finding(level, "disk", f"{text} in {there}{hint}")


def bucket(config: TrainConfig) -> Iterator[Finding]:
    """The bucket of the checkpoints takes a file, gives it back, and lets it go."""
    from pipeline.storage import Storage

    if config.checkpoint.remote is None:
        return
    storage, name, data = Storage(config.checkpoint.remote), f".doctor-{uuid.uuid4().hex}", uuid.uuid4().bytes * 2**16
    start = time.perf_counter()
    storage.replace(name, data)
    same = storage.read(name) == data
    storage.delete(name)
    text = f"{config.checkpoint.remote}: 1 MiB written, read and deleted in {time.perf_counter() - start:.2f} s"
    if same:
        yield Finding("ok", "bucket", text)
    else:
        yield Finding(
            "fail", "bucket", f"{config.checkpoint.remote} gives other bytes than it was given; what is between?"
        )


def cache(config: TrainConfig) -> Iterator[Finding]:
    """A remote store needs a place for its shards."""
    data = config.data
    if not data.store.startswith("s3://"):
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
