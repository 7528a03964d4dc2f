#!/usr/bin/env python
"""How fast the stream reads, beside its peers, on the same features: one command, one table, `runs/bench/stream.json`.

    make bench-stream                 # also puts the peers into build/peers
    python tests/benchmarks/bench_stream.py [--samples 400] [--repeats 3]

Everything is read from memory (/dev/shm, which no kernel evicts) by one process; the DataLoader peer has two workers.
Rates count feature bytes and samples; passes of the readers take turns, the median counts. Peers that are not installed
are named and left out. Padding is counted on lengths drawn after LLaVA-Instruct-158K and LLaVA-1.5's 665K mix.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import stream_peers as peers
from stream_peers import COLUMNS, PAYLOAD, PER_SHARD, ROOT, Read

from training.stream.measures import padding_share
from training.stream.order import Examples, Order, epoch_batches

SLOW = 8.0  # seconds after which a reader gets no further pass
PEERS = {"mosaicml-streaming": "streaming", "litdata": "litdata", "megatron-energon": "megatron.energon"}
IMAGE_TOKENS = 144


@dataclass
class Row:
    """Passes of one reader over `blocks` blocks; of several, the first only warms up what can be warmed."""

    name: str
    blocks: int
    passes: list[float] = field(default_factory=list)
    bytes: int = 0

    @property
    def seconds(self) -> float:
        """The median pass."""
        return statistics.median(self.passes[1:] or self.passes)

    def as_json(self) -> dict[str, object]:
        """Rates, and how far the passes lie apart."""
        timed = self.passes[1:] or self.passes
        return {
            "name": self.name,
            "blocks": self.blocks,
            "seconds": round(self.seconds, 3),
            "spread": round((max(timed) - min(timed)) / self.seconds, 3),
            "passes": len(timed),
            "mb_per_s": round(self.bytes / self.seconds / 1e6, 1),
            "samples_per_s": round(self.bytes / (self.blocks * PAYLOAD) / self.seconds, 1),
        }


def measure(readers: dict[str, Read], blocks: int, repeats: int) -> list[Row]:
    """Let the readers take turns, so that a change of the machine's pace meets them all."""
    rows = [Row(name, blocks) for name in readers]
    for _ in range(repeats + 1):
        for row in rows:
            if sum(row.passes) < SLOW:
                start = time.perf_counter()
                row.bytes = sum(readers[row.name]())
                row.passes.append(time.perf_counter() - start)
    for row in rows:
        rates = row.as_json()
        speed = f"{rates['mb_per_s']:>8,.0f} MB/s {rates['samples_per_s']:>7,.0f} samples/s"
        print(f"{blocks} block(s)  {row.name:40} {speed}", flush=True)
    return rows


def read_all(folder: Path, samples: int, threads: int, repeats: int) -> tuple[list[Row], list[int]]:
    """Every reader's rows, and the stream's peak memory with the smallest and the largest window.

    One layout after another is written, read and removed: all of them at once would need memory for 15 GB.
    """
    peers.write_store(folder, samples)
    rows = []
    for columns in (COLUMNS, COLUMNS[:1]):
        readers: dict[str, Read] = {
            "readinto": peers.readinto(folder, columns),
            "stream, in order": peers.stream(folder, columns, False, threads),
            "stream, shuffled": peers.stream(folder, columns, True, threads),
            "stream, shuffled, 1 thread": peers.stream(folder, columns, True, 1),
            "DataLoader, 2 workers": peers.dataloader(folder, columns, samples),
        }
        if len(columns) == 1:
            readers["webdataset, raw bytes, that block's tars"] = peers.webdataset_one_column(folder, columns[0])
        rows += measure(readers, len(columns), repeats)
        del readers  # its staging buffers
    memory = [peak_memory(folder, window) for window in (1, samples // PER_SHARD)]
    shutil.rmtree(folder)

    def read_layout(write: Callable[[Path, int], None], readers: dict[str, Callable[..., Read]]) -> None:
        write(folder, samples)
        for columns in (COLUMNS, COLUMNS[:1]):
            rows.extend(
                measure({name: reader(folder, columns) for name, reader in readers.items()}, len(columns), repeats)
            )
        shutil.rmtree(folder)

    mixed = {"webdataset": partial(peers.webdataset, decode=True)}
    mixed["webdataset, raw bytes"] = partial(peers.webdataset, decode=False)
    if installed("megatron-energon"):
        mixed["megatron-energon, raw bytes"] = peers.energon
    read_layout(peers.write_mixed, mixed)
    if installed("mosaicml-streaming"):
        read_layout(peers.write_mds, {"mosaicml-streaming": peers.mds})
    if installed("litdata"):
        read_layout(peers.write_lit, {"litdata": peers.lit})
    return rows, memory


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    module, _, part = PEERS[name].partition(".")
    return importlib.util.find_spec(module) is not None and (not part or bool(importlib.util.find_spec(PEERS[name])))


def instruct_words(count: int, draw: np.random.Generator) -> np.ndarray:
    """Words per example as in LLaVA-Instruct-158K: talk, descriptions, reasoning, after the sizes of its files."""
    kind = draw.choice(3, count, p=[0.37, 0.15, 0.48])
    rounds = 1 + draw.poisson(3.2, 20_000)
    talk = np.array([(draw.lognormal(2.2, 0.3, n) + draw.lognormal(3.64, 0.6, n)).sum() for n in rounds])
    described, reasoned = 10 + draw.normal(97, 25, count), 18 + draw.lognormal(4.65, 0.3, count)
    return np.select([kind == 0, kind == 1], [draw.choice(talk, count), described], reasoned).clip(5, 1400)


def mix_words(count: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(words, has image) as in LLaVA-1.5's 665K mix: instructions, questions of many rounds, long texts."""
    kind = draw.choice(3, count, p=[0.24, 0.06, 0.70])
    questions, texts = draw.lognormal(4.4, 0.8, count), draw.lognormal(6.2, 0.9, count)
    words = np.select([kind == 0, kind == 1], [instruct_words(count, draw), texts], questions)
    return words.clip(5, 1400), kind != 1


def padding(ranks: int = 8, microbatch: int = 4) -> dict[str, dict[str, float]]:
    """Share of stage 2's tokens that are padding: global batches of 128 over 8 ranks, microbatches of 4, shards of 256.

    Tokens per word vary from example to example, by 6%; the order knows words alone.
    """
    draw = np.random.default_rng(0)
    mix, mix_image = mix_words(200_000, draw)
    instruct = instruct_words(158_000, draw)
    shares = {}
    for name, words, image in (("instruct", instruct, np.ones(158_000, bool)), ("mix", mix, mix_image)):
        text = 40 + words * 1.32 * draw.normal(1, 0.06, len(words))
        tokens = np.minimum(text + IMAGE_TOKENS * image, 2048).astype(np.int64)
        number = np.arange(len(words))
        examples = Examples(number, np.zeros_like(number), number // 480, words.astype(np.int64), image, 0 * number)
        plain = Order(global_batch_size=128)
        shares[name] = {
            label: round(padding_share(epoch_batches(examples, order, 0), tokens, order, ranks, microbatch), 4)
            for label, order in (("shuffled", plain), ("grouped", plain.model_copy(update={"group_by_length": True})))
        }
        print(
            f"padding    {name:9} {shares[name]['shuffled']:.1%} -> {shares[name]['grouped']:.1%} with group_by_length"
        )
    return shares


def peak_memory(folder: Path, window: int) -> int:
    """Bytes that a fresh process holds at most while it reads an epoch with this shuffle window."""
    code = (
        "import sys, resource; sys.path[:0] = [sys.argv[1]]\n"
        "import stream_peers as peers; from pathlib import Path\n"
        "sum(peers.stream(Path(sys.argv[2]), peers.COLUMNS, True, 2, window=int(sys.argv[3]))())\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).resolve().parent), str(folder), str(window)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024


def main() -> None:
    """Write the data, read it in every way, print the ratios, keep it all in runs/bench/stream.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400, help="of 9.4 MB (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes, at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="reader threads of the stream (default: %(default)s)")
    parser.add_argument("--data", default="/dev/shm", help="memory of 4 GB, or a disk (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench/stream.json")
    arguments = parser.parse_args()
    if arguments.samples % PER_SHARD:
        sys.exit(f"error: --samples {arguments.samples} is not a multiple of {PER_SHARD}")
    with tempfile.TemporaryDirectory(prefix="bench-stream-", dir=arguments.data) as name:
        rows, memory = read_all(Path(name) / "data", arguments.samples, arguments.threads, arguments.repeats)
    report(rows, memory, padding(), arguments)


def report(
    rows: list[Row], memory: list[int], shares: dict[str, dict[str, float]], arguments: argparse.Namespace
) -> None:
    """Ratios against their targets, on screen and in the JSON file."""
    rate = {(row.name, row.blocks): row.bytes / row.seconds for row in rows}
    shuffled = rate["stream, shuffled", 8]
    checks = {
        "8 blocks in order, of readinto": (rate["stream, in order", 8] / rate["readinto", 8], 0.8),
        "8 blocks in shuffled batches of 32, of readinto": (shuffled / rate["readinto", 8], 0.8),
        "8 blocks, of webdataset": (shuffled / rate["webdataset", 8], 5.0),
        "1 block, of webdataset": (rate["stream, shuffled", 1] / rate["webdataset", 1], 10.0),
        "shuffled, of in order": (shuffled / rate["stream, in order", 8], 0.8),
        "8 blocks, of a DataLoader with 2 workers": (shuffled / rate["DataLoader, 2 workers", 8], 4.0),
        "peak memory with a window of 1 shard, of all shards": (memory[0] / memory[1], 0.9),
        "tokens that are no padding, instruct": (1 - shares["instruct"]["grouped"], 0.95),
        "tokens that are no padding, mix": (1 - shares["mix"]["grouped"], 0.95),
    }
    ratios = {n: {"value": round(value, 3), "target": t, "met": value >= t} for n, (value, t) in checks.items()}
    for name, line in ratios.items():
        print(f"{name:52} {line['value']:>7} (target {line['target']}) {'met' if line['met'] else 'MISSED'}")
    absent = [name for name in PEERS if not installed(name)]
    print(f"not installed, so not measured: {', '.join(absent) or 'none'}")
    versions = ["torch", "numpy", "webdataset", *(name for name in PEERS if name not in absent)]
    result = {
        "bench": "stream",
        "ratios": ratios,
        "environment": {
            "command": " ".join(["python", "tests/benchmarks/bench_stream.py", *sys.argv[1:]]),
            "cpus": os.cpu_count(),
            "load_average_1_min": round(os.getloadavg()[0], 1),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in versions},
        },
        "samples": arguments.samples,
        "threads": arguments.threads,
        "peak_rss_bytes": {"window of 1 shard": memory[0], "window of all shards": memory[1]},
        "padding": shares,
        "rows": [row.as_json() for row in rows],
        "not_installed": absent,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
