"""What a run needs to come to its end, looked at before it begins: memory, disk, bucket, and what the export reads.

`train.py --check` and the doctor show all of it. A run does not start without what only its end would miss.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from training.checkpoints.mark import checkpoint_folders, file_sizes, read_mark
from training.config import TrainConfig
from training.cost.memory import CHECKPOINT, WEIGHT, ModelShape, activations, stored
from training.engines import engine_of
from training.fit.finding import Finding, Level, ThisRank, run_check

PROCESS = 10**9  # bytes of a rank's programs, before it has a model: measured 0.7 to 0.9 GB
PROC = Path("/proc")
# How Linux says what a group of processes may have: its name for these limits in /proc/self/cgroup, the folder of all
# groups, and in a group's folder the limit, what is in use, and what of it is only cached files.
CGROUPS = (
    ("", "/sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "memory",
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)

if TYPE_CHECKING:
    from pipeline.schema import StoreSpec
    from training.model.model import CompactVisionForConditionalGeneration


def needs(config: TrainConfig, model: CompactVisionForConditionalGeneration, rank: ThisRank) -> list[Finding]:
    """What each rank of a run needs, seen from this one; the weights of `model` may have no contents."""
    found = run_check("memory", lambda: memory(config, model, rank))
    return found + run_check("bucket", lambda: bucket(config))


def end_needs(config: TrainConfig, store: StoreSpec, model: CompactVisionForConditionalGeneration) -> list[Finding]:
    """What rank 0, which exports, misses only after hours: files that it reads, room for them and for checkpoints."""
    found = run_check("export", lambda: export(config, store))
    readable = all(finding.level != "fail" for finding in found)
    return found + run_check("disk", lambda: disk(config, store if readable else None, model))


def refuse_unready(found: list[Finding]) -> None:
    """Refuse to begin what cannot come to its end, by what any rank has `found`. A collective.

    Raises:
        ValueError: with all that is missing.
    """
    from composer.utils import dist

    told = dist.all_gather_object([finding.text for finding in found if finding.level == "fail"])
    missing = list(dict.fromkeys(text for texts in told for text in texts))
    if missing:
        raise ValueError("this run could not come to its end: " + "; ".join(missing))


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


def memory(config: TrainConfig, model: CompactVisionForConditionalGeneration, ranks: ThisRank) -> Iterator[Finding]:
    """What a rank needs against what its device, or its share of the host, has."""
    import torch

    shape = shape_of(model)
    per_rank = max(1, config.global_batch_size // ranks.planned)
    examples = 1 if config.microbatch_size == "auto" else min(config.microbatch_size, per_rank)
    engine = engine_of(config, ranks.planned)
    held = engine.memory(shape)
    kept = activations(config, shape, examples, config.data.max_length - model.connector.tokens)
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    room = torch.cuda.mem_get_info(ranks.local_rank)[1] if on_gpu else free_host_memory() / ranks.local_size
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


def host_memory(
    config: TrainConfig, store: StoreSpec, model: CompactVisionForConditionalGeneration, ranks: ThisRank
) -> Iterator[Finding]:
    """What a rank holds in its host's memory, against its share of what is free there. Asked before weights are read.

    What is counted is what is sure: activations come to it.
    """
    import torch

    from pipeline.codec import payload_bytes
    from training.fit.parts import HELD_OUT_AHEAD

    shape, engine = shape_of(model), engine_of(config, ranks.planned)
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    held = engine.host(shape) if on_gpu else engine.memory(shape).total
    one = max(WEIGHT * p.numel() for p in model.parameters())
    image = sum(payload_bytes(c, store.codec) for c in store.columns if c.name in model.connector.columns)
    # Held-out examples have a second set of buffers.
    batches = config.data.prefetch + 1 + (HELD_OUT_AHEAD + 1 if config.data.validation is not None else 0)
    ahead = batches * max(1, config.global_batch_size // ranks.planned) * image
    free = free_host_memory()
    need, room = PROCESS + held + one + ahead, free / ranks.local_size
    text = (
        f"{need / 1e9:.1f} GB per rank: {PROCESS / 1e9:.1f} of programs, {held / 1e9:.1f} of the model under "
        f"{engine.name}, {one / 1e9:.1f} of a weight on its way, {ahead / 1e9:.1f} of {batches} "
        f"batches that are read or read ahead; of {room / 1e9:.1f} GB, a share of "
        f"{free / 1e9:.1f} GB free for {ranks.local_size} rank(s)"
    )
    if need > room:
        yield Finding(
            "fail",
            "host",
            f"host memory: {text}; start fewer ranks on a node, shard more, lower data.prefetch, or take more memory",
        )
    else:
        yield Finding("ok", "host", text)


def free_host_memory() -> int:
    """Bytes that new processes can have: of the machine, or of what a container or a batch system gave of it."""
    try:
        lines = dict(line.split(":") for line in (PROC / "meminfo").read_text(encoding="utf-8").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024  # Linux counts in KiB
    except FileNotFoundError:  # not Linux: all that the machine has is the only limit known
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    own = PROC / "self/cgroup"
    groups = [line.split(":", 2) for line in own.read_text("utf-8").splitlines()] if own.exists() else []
    for kind, root, limit, used, cached in CGROUPS:
        mine = next((path for _, kinds, path in groups if kind in kinds.split(",")), "/")
        group = Path(root) / mine.lstrip("/")
        for folder in (group, *group.parents):  # what is around a group limits it too
            if folder.is_relative_to(root):
                free = min([free, *_free_in(folder, limit, used, cached)])
    return max(free, 0)


def _free_in(group: Path, limit: str, used: str, cached: tuple[str, ...]) -> list[int]:
    """Bytes that a group of processes has left; none if nothing limits it, or the system does not say so in numbers."""
    try:
        most, now = ((group / name).read_text(encoding="utf-8").strip() for name in (limit, used))
        stat = dict(line.partition(" ")[::2] for line in (group / "memory.stat").read_text("utf-8").splitlines())
    except OSError:  # another version of cgroups, or a group that the container does not see
        return []
    if not (most.isdecimal() and now.isdecimal()):  # "max" is no limit
        return []
    return [int(most) - int(now) + sum(int(stat[name]) for name in cached if stat.get(name, "").isdecimal())]


def disk(
    config: TrainConfig, store: StoreSpec | None, model: CompactVisionForConditionalGeneration
) -> Iterator[Finding]:
    """Room for checkpoints and the export where the run goes, and that we may write there."""
    folder = Path(config.run).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    trial = there / f".trial-{uuid.uuid4().hex}"
    try:
        trial.write_bytes(b"trial")
    except OSError as error:
        yield Finding("fail", "disk", f"cannot write to {there} ({error.strerror}); choose another run=...")
        return
    finally:
        trial.unlink(missing_ok=True)
    one = CHECKPOINT * shape_of(model).learning
    count = _checkpoints(config)
    sizes = {path: sum(file_sizes(path).values()) for path in checkpoint_folders(folder / "checkpoints")}
    # What is left of one that was not finished goes before the next one is written.
    unfinished = sum(size for path, size in sizes.items() if read_mark(path) is None)
    held, free = sum(sizes.values()) - unfinished, shutil.disk_usage(there).free + unfinished
    last = _export_bytes(config, store, model)
    text = (
        f"a checkpoint takes {one / 1e9:.2f} GB, {count} of them {count * one / 1e9:.2f}, the export {last / 1e9:.2f}; "
        f"{free / 1e9:.1f} GB free in {there}" + (f", {held / 1e9:.2f} held" if held else "")
    )
    all_of_it = max(one, count * one - held) + last
    level: Level = "fail" if free < one + last else "warn" if free < all_of_it else "ok"
    hint = "" if level == "ok" else "; make room, lower checkpoint.keep, or choose another run=..."
    yield Finding(level, "disk", text + hint)


def _checkpoints(config: TrainConfig) -> int:
    """How many checkpoints lie on the disk at the same time, at most; at least, where only the data tell."""
    keep, every, unit = config.checkpoint.keep, int(config.checkpoint.interval[:-2]), config.checkpoint.interval[-2:]
    total = config.steps if unit == "ba" else None if config.steps else config.epochs
    if keep < 0 and total is not None and every:  # 0: none but the one at a stop
        return total // every + 1  # all, and the one at the end
    return max(1, keep) + 1 + config.checkpoint.keep_best  # a new one is written before the oldest goes


def _export_bytes(config: TrainConfig, store: StoreSpec | None, model: CompactVisionForConditionalGeneration) -> int:
    """Bytes that a finished stage exports: the connector; after stage 2 the whole model, where it can be exported."""
    import torch

    from pipeline.encoder import family_of

    connector: int = sum(p.numel() for p in model.connector.parameters())
    if "llm" not in config.train or store is None:
        return WEIGHT * connector
    # Adapters are merged: the language model has its own weights, in the dtype that it was trained with.
    width = WEIGHT if config.model.lora is None else stored(config)
    llm: int = sum(p.numel() for name, p in model.llm.named_parameters() if "lora_" not in name)
    name, revision = store.encoder.id, _revision(store)
    family = family_of(name, revision)
    with torch.device("meta"):
        tower = family.build(family.read_config(name, revision))
    return 2 * WEIGHT * connector + width * (llm + sum(p.numel() for p in tower.parameters()))


def _revision(store: StoreSpec) -> str | None:
    """What the Hub is asked for; the revision of a folder is a digest, which no Hub knows."""
    return None if Path(store.encoder.id).is_dir() else store.encoder.revision


def export(config: TrainConfig, store: StoreSpec) -> Iterator[Finding]:
    """What a finished stage 2 reads: the store's own vision encoder, the tokenizer's file, what stage 1 says of itself.

    Own questions at an epoch's end need the encoder too.

    The digest of an encoder in a folder is taken anew: some seconds for a ViT-L.
    """
    from pipeline.encoder import describe_encoder
    from training.fit.build import load_tokenizer
    from training.release.card import stage_before, trained

    asks = config.data.validation is not None and config.data.validation.questions is not None
    if "llm" not in config.train and not asks:
        yield Finding("ok", "export", "the connector; nothing else is read for it")
        return
    spec = store.encoder
    use = (
        "goes into the exported model" if "llm" in config.train else "looks at the images of data.validation.questions"
    )
    there = f"the store's features are of {spec.id} at {spec.revision[:12]}, which {use}"
    try:
        found = describe_encoder(spec.id, _revision(store)).revision
    except ValueError as error:
        yield Finding("fail", "export", f"{there}, and cannot be read here: {error}")
        return
    if found != spec.revision:
        text = f"{there}, but {spec.id} is another one by now, at {found[:12]}; put the encoder of the build back there"
        yield Finding("fail", "export", text)
        return
    tokenizer = load_tokenizer(config).model_file
    trained(stage_before(config))  # for the card
    yield Finding("ok", "export", f"reads {spec.id} at {found[:12]}, as the store says, and {tokenizer}")


def bucket(config: TrainConfig) -> Iterator[Finding]:
    """The bucket of the checkpoints takes a file, gives it back, and lets it go."""
    from pipeline.storage import Storage

    if config.checkpoint.remote is None:
        return
    storage, name, data = Storage(config.checkpoint.remote), f".trial-{uuid.uuid4().hex}", uuid.uuid4().bytes * 2**16
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
