"""What encoding the images again for every arm would cost: a pass of the vision encoder for each set of columns."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.release.table import EncodingCost
from training.sweep.plan import AblationConfig, Encoding, Run

if TYPE_CHECKING:
    from pipeline.schema import Column, EncoderSpec

FILE = "encoding.json"  # in the ablation's folder; what stands there is not measured again


def measure_encoding(config: AblationConfig, plan: Sequence[Run]) -> None:
    """Seconds of one pass of every image: with the columns of all arms, as a store has them, and with those of each.

    Raises:
        ValueError: if the encoder cannot be read, or does not give a column that an arm reads.
    """
    from pipeline.encoder import describe_encoder

    path = Path(config.run) / FILE
    if config.encoding is None or path.exists():
        return
    spec = describe_encoder(config.encoding.encoder, None)
    by_arm = {run.arm.name: _columns(run, spec) for run in plan}
    every = {column.name: column for columns in by_arm.values() for column in columns}
    names = _image_names(config.encoding)
    once = _encode_all(config.encoding, "the stores", list(every.values()), names, spec.image_size)
    seconds = {
        arm: _encode_all(config.encoding, arm, columns, names, spec.image_size) for arm, columns in by_arm.items()
    }
    path.write_text(json.dumps({"images": len(names), "once": once, "arms": seconds}), encoding="utf-8")


def encoding_cost(config: AblationConfig, seconds_train: float) -> EncodingCost | None:
    """What was measured, beside the training of all arms and seeds; None if nothing was."""
    path = Path(config.run) / FILE
    if not path.exists():
        return None
    measured = json.loads(path.read_text(encoding="utf-8"))
    again = sum(measured["arms"].values()) * len(config.seeds)
    return EncodingCost(
        images=measured["images"],
        once=measured["once"],
        again=again,
        train=seconds_train,
        cached_total=seconds_train + measured["once"],
        uncached_total=seconds_train + again,
    )


def _columns(run: Run, spec: EncoderSpec) -> list[Column]:
    """The columns that a run's connector reads."""
    from pipeline.encoder import columns_of
    from training.model.reducers import connector_config

    blocks = range(spec.blocks + 1)  # 0 is the input of the first one
    given = {column.name: column for column in columns_of(spec, blocks, blocks)}
    wanted = connector_config(run.stages["pretrain"].model.connector.model_dump(), grid=spec.grid).columns
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ValueError(
            f"arm {run.arm.name} reads {', '.join(missing)}, but encoder {spec.id} has {spec.blocks} blocks; "
            "correct the arm's connector, or name the encoder of the stores"
        )
    return [given[name] for name in wanted]


def _image_names(encoding: Encoding) -> list[str]:
    """Every image of the data files once, in the order of its first mention."""
    names: dict[str, None] = {}
    for path in encoding.data:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        names |= {record["image"]: None for record in records if "image" in record}
    return list(names)


def _encode_all(encoding: Encoding, what: str, columns: Sequence[Column], names: Sequence[str], size: int) -> float:
    """Seconds from image files to features in host memory; `size` is the encoder's, in pixels."""
    import torch

    from pipeline.encoder import Encoder
    from pipeline.encoders.decode import load_image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = Encoder(encoding.encoder, None, tuple(columns), "bfloat16" if device == "cuda" else "float32", device)
    start = time.perf_counter()
    for first in range(0, len(names), encoding.batch_size):
        batch = [Path(encoding.images, name).read_bytes() for name in names[first : first + encoding.batch_size]]
        pixels = [torch.from_numpy(encoder.pixels(load_image(data), "pad")) for data in batch]
        for features in encoder(torch.stack(pixels)).values():  # (batch, tokens, width) of each column
            features.cpu()
    seconds = time.perf_counter() - start
    print(f"encoded {len(names)} images for {what} in {seconds:.1f} s", flush=True)
    return seconds
