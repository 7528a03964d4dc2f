#!/usr/bin/env python
"""Print the tables of infra/SCALING.md: `python infra/scaling.py`. Everything is computed from the lines below.

Put in what you measure (`python training/stream_bench.py`, `--plan`, a run's log) in place of what is assumed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from pipeline.codec import payload_bytes
from pipeline.config import PAPER_BLOCKS
from pipeline.plan import break_even, count_shards, read_rate
from pipeline.schema import Column

GPUS = 8  # per node
FLOPS, MFU = 989e12, 0.45  # of an H100 SXM in dense bf16 (data sheet), and the share of it that is aimed at
LINK = 50e9  # bytes/s between nodes, per GPU: 400 Gbit/s
GET_S = 0.03 + 1.18e6 / 90e6  # seconds of one ranged request: first byte, then 90 MB/s (assumed; S3's own advice)
ENCODE_FLOPS = 382e9  # of one CLIP ViT-L/14-336 forward pass
WEIGHTS = {"7B": 6_738_415_616, "13B": 13_015_864_320}  # of Vicuna
CONNECTOR = {"7B": (37_753_856, 151_019_520), "13B": (37_753_856, 205_550_592)}  # MBTF sees 576 tokens, STF makes 144
LLAMA = {"7B": (32, 4096), "13B": (40, 5120)}  # layers, width
IMAGES = {"CC-595K": 595_375, "Instruct-158K": 81_479}
SHARD = 256
BLOCKS = [Column(name=f"block{block:02d}", tokens=576, width=1024) for block in PAPER_BLOCKS]
IMAGE = sum(payload_bytes(column, "bf16") for column in BLOCKS)  # bytes of an image's features

# Stage: examples per step, tokens per example (144 of the image), FLOPs per weight and token. Stage 1 spares the
# gradients of the frozen weights; stage 2 computes activations twice.
STAGES = {"stage 1": (256, 174, 4), "stage 2": (128, 400, 8)}


def compute_s(stage: str, gpus: int, size: str = "7B") -> float:
    """Seconds of one step's arithmetic."""
    batch, tokens, flops = STAGES[stage]
    mbtf, stf = CONNECTOR[size]
    example = tokens * flops * WEIGHTS[size] + 6 * (576 * mbtf + 144 * stf)
    return batch / gpus * example / (FLOPS * MFU)


def network_s(stage: str, gpus: int, size: str = "7B") -> float:
    """Seconds to sum the gradients over all nodes: a ring moves them twice, 1/8 of them through each GPU's link."""
    nodes = gpus // GPUS
    gradients = 4 * sum(CONNECTOR[size]) if stage == "stage 1" else 2 * WEIGHTS[size]
    return 2 * gradients * (nodes - 1) / nodes / GPUS / LINK


def step_s(stage: str, gpus: int) -> float:
    """The longer of the two, which overlap."""
    return max(compute_s(stage, gpus), network_s(stage, gpus))


def nodes_table() -> Iterator[str]:
    """What each number of nodes asks of the storage, at the paper's batches."""
    columns = "examples per GPU | arithmetic s | network s | GB/s per GPU | GB/s per node | by range: GET/s in all"
    yield f"| nodes | stage | {columns} | in flight per GPU | by cache: GB/s per node |"
    yield "|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|"
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        for stage, (batch, _, _) in STAGES.items():
            gpus = nodes * GPUS
            if gpus > batch:
                yield f"| {nodes} | {stage} | fewer than one: {batch} for {gpus} GPUs | | | | | | | |"
                continue
            rate = read_rate(batch / gpus, IMAGE, step_s(stage, gpus))
            gets = rate / IMAGE * len(BLOCKS)
            cells = [str(nodes), stage, f"{batch / gpus:g}", f"{compute_s(stage, gpus):.3f}"]
            cells += [f"{network_s(stage, gpus):.3f}", f"{rate / 1e9:.2f}", f"{rate * GPUS / 1e9:.1f}"]
            cells += [f"{gets * gpus:,.0f}", f"{gets * GET_S:.0f}", f"{rate * gpus / 1e9:.1f}"]
            yield f"| {' | '.join(cells)} |"


def break_even_table() -> Iterator[str]:
    """From which bandwidth on stored features are faster than CLIP beside the LLM."""
    yield "| a GPU encodes, images/s | stage 1: needs | stage 1: wins above | stage 2: needs | stage 2: wins above |"
    yield "|--:|--:|--:|--:|--:|"
    for rate in (FLOPS * MFU / ENCODE_FLOPS, 400, 100, 25):  # the first: an H100 at the same MFU
        cells = [f"{rate:,.0f}"]
        for stage, (batch, _, _) in STAGES.items():
            step = compute_s(stage, GPUS)
            cells.append(f"{read_rate(batch / GPUS, IMAGE, step) / 1e9:.2f} GB/s")
            cells.append(f"{break_even(batch / GPUS, IMAGE, step, rate) / 1e9:.2f} GB/s")
        yield f"| {' | '.join(cells)} |"


def objects_table() -> Iterator[str]:
    """Objects and requests of the two stores, in S3's prices of us-east-1."""
    columns = (
        "store | TB in bf16 | in fp8 | shards | objects | PUT | $ | GET by range, an epoch | $ | rent a month, bf16"
    )
    yield f"| {columns} |"
    yield "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for name, images in IMAGES.items():
        shards = count_shards(images, SHARD)
        puts = shards * (len(BLOCKS) * -(-SHARD * payload_bytes(BLOCKS[0], "bf16") // (50 * 2**20)) + 2)
        gets = images * len(BLOCKS)
        small = sum(payload_bytes(column, "fp8") for column in BLOCKS)
        cells = [name, f"{images * IMAGE / 1e12:.2f}", f"{images * small / 1e12:.2f}", f"{shards:,}"]
        cells += [f"{shards * (len(BLOCKS) + 2):,}", f"{puts:,}", f"{puts * 5e-6:.2f}"]
        cells += [f"{gets:,}", f"{gets * 4e-7:.2f}", f"{images * IMAGE / 1e9 * 0.023:.0f} $"]
        yield f"| {' | '.join(cells)} |"


def memory_table() -> Iterator[str]:
    """GB per GPU in stage 2: weights, gradients and Adam by engine, activations of 4 examples beside."""
    yield "| model | GPUs | ddp | zero1 | zero2 | zero3, fsdp | activations, 4 examples |"
    yield "|:--|--:|--:|--:|--:|--:|--:|"
    for size, weights in WEIGHTS.items():
        layers, width = LLAMA[size]
        tokens = 4 * STAGES["stage 2"][1]
        kept = tokens * (layers * width * 2 + 32_000 * 4 * 2)  # each layer's input in bf16; logits and their gradient
        for gpus in (8, 16, 64, 128):
            engines = [16 * weights, 4 * weights + 12 * weights / gpus, 2 * weights + 14 * weights / gpus]
            engines.append(16 * weights / gpus)
            cells = [size, str(gpus), *(f"{value / 1e9:.0f}" for value in engines), f"{kept / 1e9:.1f}"]
            yield f"| {' | '.join(cells)} |"


TABLES = {"nodes": nodes_table, "break-even": break_even_table, "objects": objects_table, "memory": memory_table}

if __name__ == "__main__":
    for title, table in TABLES.items():
        print(f"\n{title}\n", *table(), sep="\n")
