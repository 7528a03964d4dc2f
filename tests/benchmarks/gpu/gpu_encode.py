"""bench_gpu.py, the build: CLIP ViT-L/14-336 with eight blocks kept, then ShardWorker from JPEGs to tars in memory."""

from __future__ import annotations

import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_part import BLOCKS, TINY_CLIP, Job, Rows, median_seconds
from PIL import Image

from pipeline.build_shards import read_sources
from pipeline.codec import to_payload
from pipeline.config import BuildConfig
from pipeline.encoder import Encoder, columns_of, describe_encoder
from pipeline.encoders.clip import Clip
from pipeline.encoders.decode import load_image
from pipeline.plan import Work, row_of, shard_records
from pipeline.schema import Codec
from pipeline.shard import TarWriter
from pipeline.worker import ShardWorker, to_host
from training.cost.flops import encoder_flops
from training.cost.shapes import CLIP_L

SIZE = (640, 480)  # most of COCO's photos


class Bench:
    """A random CLIP in a folder, and JPEGs with a LLaVA file about them."""

    def __init__(self, job: Job) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.job, self.cores = job, os.cpu_count() or 1
        shape = TINY_CLIP if job.cpu else CLIP_L
        self.config = CLIPVisionConfig(**shape)
        self.clip, self.images = job.scratch / "clip", job.scratch / "images"
        if not self.clip.exists():
            torch.manual_seed(0)
            with torch.device(job.device):
                CLIPVisionModel._from_config(self.config, dtype=torch.bfloat16).save_pretrained(self.clip)
        self.shard, self.shards = (8, 1) if job.cpu else (256, 2)
        self._draw(self.shard * self.shards)
        self.encoder = describe_encoder(str(self.clip), None)
        self.columns = columns_of(self.encoder, BLOCKS, ())

    def _draw(self, count: int) -> None:
        """Photos' sizes and about their bytes: smooth colours with noise, at quality 90."""
        self.images.mkdir(exist_ok=True)
        rng, files = np.random.default_rng(0), []
        for _ in range(min(count, 32)):
            small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(SIZE)
            noisy = np.asarray(small, dtype=np.int16) + rng.integers(-12, 12, (SIZE[1], SIZE[0], 3), dtype=np.int16)
            buffer = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A picture."}]
        records = []
        for number in range(count):
            (self.images / f"{number}.jpg").write_bytes(files[number % len(files)])
            records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
        (self.job.scratch / "chat.json").write_text(json.dumps(records))
        self.jpeg_bytes = sum(map(len, files)) / len(files)

    def forward(self, batch: int) -> dict[str, Any]:
        """Images/s of the encoder; transformers' own model with all hidden states, in the same turn, as the peer."""
        from transformers import CLIPVisionModel

        encoder = Encoder(str(self.clip), None, self.columns, "bfloat16", self.job.device)
        model = CLIPVisionModel.from_pretrained(self.clip, dtype=torch.bfloat16).to(self.job.device).eval()
        side = self.encoder.image_size
        pixels = torch.randn(batch, 3, side, side, device=self.job.device)
        with torch.inference_mode():
            ours = median_seconds(lambda: encoder(pixels), self.job.device, rounds=5)
            half = pixels.to(torch.bfloat16)
            peer = median_seconds(lambda: model(half, output_hidden_states=True), self.job.device, rounds=5)
        flops = batch * encoder_flops(self.config, max(BLOCKS))
        rate = {"images_per_s": batch / ours, "of_limit": flops / ours / self.job.flops}
        return {**rate, "peer": "transformers, all hidden states", "x": peer / ours}

    def build(self, codec: Codec) -> dict[str, Any]:
        """ShardWorker as the Ray job calls it: images/s from JPEGs to tars of a store in memory."""
        store = self.job.scratch / f"store-{codec}"
        settings = {"data": str(self.job.scratch / "chat.json"), "images": str(self.images), "store": str(store)}
        settings |= {"encoder": str(self.clip), "blocks": BLOCKS, "codec": codec, "shard_size": self.shard}
        settings |= {"num_gpus": 0 if self.job.cpu else 1, "num_cpus": self.cores, "decode_threads": self.cores}
        config = BuildConfig.model_validate({**settings, "batch_size": min(64, self.shard)})
        dataset, spec = read_sources(config)
        worker, names = ShardWorker(config, spec), tuple(column.name for column in spec.columns)
        outcomes = []
        for shard in range(self.shards):
            work = Work(shard, names, base=True)
            outcomes.append(worker(row_of(work, shard_records(dataset.records, spec, shard), [], "bench", False)))
        shutil.rmtree(store, ignore_errors=True)
        last = outcomes[-1]  # the first loads the encoder
        assert last["made"] and not last["failures"], outcomes
        rate = last["images"] / last["seconds"]
        return {"images_per_s": rate, "written_gb_per_s": last["bytes"] / last["seconds"] / 1e9}

    def decoding(self) -> dict[str, Any]:
        """Images/s of reading, decoding and preprocessing alone, on all cores."""
        names = [self.images / f"{number}.jpg" for number in range(self.shard)]

        def one(path: Path) -> None:
            Clip().pixels(load_image(path.read_bytes()), "pad", self.encoder.image_size)

        with ThreadPoolExecutor(self.cores) as pool:
            seconds = median_seconds(lambda: list(pool.map(one, names)), "cpu", rounds=2)
        return {"images_per_s": len(names) / seconds, "threads": self.cores, "jpeg_kb": self.jpeg_bytes / 1e3}

    def packing(self, codec: Codec) -> dict[str, Any]:
        """Images/s from features on the device to bytes on the host, page-locked; the peer's are pageable."""
        count = 8 if self.job.cpu else 64
        shape = (count, self.columns[0].tokens, self.columns[0].width)
        numbers = torch.randn(shape, device=self.job.device, dtype=torch.bfloat16)
        names = [column.name for column in self.columns]
        ours = lambda: to_host({name: to_payload(numbers, codec) for name in names})  # noqa: E731
        plain = lambda: [to_payload(numbers, codec).cpu() for _ in names]  # noqa: E731
        seconds, peer = (median_seconds(call, self.job.device, rounds=3) for call in (ours, plain))
        return {"images_per_s": count / seconds, "peer": "pageable copies", "x": peer / seconds}

    def writing(self, codec: Codec) -> dict[str, Any]:
        """Images/s of the tars alone: eight files with their checksums, one thread that writes, as in the worker."""
        count = 8 if self.job.cpu else 64
        features = torch.randn(1, self.columns[0].tokens, self.columns[0].width, dtype=torch.bfloat16)
        payload = to_payload(features, codec).numpy()[0]
        target = self.job.scratch / "tars"
        target.mkdir(exist_ok=True)

        def write() -> None:
            writers = [TarWriter(target / f"{column.name}.tar") for column in self.columns]
            for row in range(count):
                for column, writer in zip(self.columns, writers, strict=True):
                    writer.add(f"{row:09d}.{column.name}.{codec}", payload)
            for writer in writers:
                writer.finish()
                writer.__exit__(None, None, None)

        seconds = median_seconds(write, "cpu", rounds=2)
        shutil.rmtree(target)
        total = count * len(payload) * len(self.columns)
        return {"images_per_s": count / seconds, "gb_per_s": total / seconds / 1e9}


def main() -> None:
    """All rows; what limits the whole is the slowest of its parts."""
    job = Job.from_command_line()
    rows, bench = Rows(job), Bench(job)
    for batch in (2,) if job.cpu else (32, 64, 128, 256):
        rows.row(f"forward, 8 blocks, batch {batch}", lambda batch=batch: bench.forward(batch), 4)
    rows.row("decoding", bench.decoding, 4)
    codecs: tuple[Codec, ...] = ("bf16", "int8")
    for codec in codecs:
        rows.row(f"codec and copy, {codec}", lambda codec=codec: bench.packing(codec), 3)
        rows.row(f"writing, {codec}", lambda codec=codec: bench.writing(codec), 3)
        forward = max(row.get("images_per_s", 0.0) for name, row in rows.found.items() if name.startswith("forward"))
        parts = {name: rows.figure(name, "images_per_s") for name in ("decoding", f"codec and copy, {codec}")}
        parts |= {"forward": forward, f"writing, {codec}": rows.figure(f"writing, {codec}", "images_per_s")}
        slowest = min(parts, key=lambda name: parts[name])

        def whole(codec: Codec = codec, slowest: str = slowest, limit: float = parts[slowest]) -> dict[str, Any]:
            row = bench.build(codec)
            return {**row, "peer": f"slowest part alone: {slowest}", "x": row["images_per_s"] / limit}

        rows.row(f"JPEGs to shards, {codec}", whole, 10)


if __name__ == "__main__":
    main()
