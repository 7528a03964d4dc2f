"""What encoding the images again for every arm would cost: a pass of the vision encoder for each set of columns."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.benchmarks.questions import read_json
from training.release.table import EncodingCost
from training.sweep.plan import AblationConfig, Encoding, Run

if TYPE_CHECKING:
    from PIL.Image import Image

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
        names |= {record["image"]: None for record in read_json(Path(path)) if "image" in record}
    return list(names)


def _encode_all(encoding: Encoding, what: str, columns: Sequence[Column], names: Sequence[str], size: int) -> float:
    """Seconds from image files to features in host memory; `size` is the encoder's, in pixels.

    Raises:
        ValueError: if no image can be read.
    """
    import torch

    from pipeline.encoder import Encoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = Encoder(encoding.encoder, None, tuple(columns), "bfloat16" if device == "cuda" else "float32", device)
    start, count = time.perf_counter(), 0
    for first in range(0, len(names), encoding.batch_size):
        paths = [Path(encoding.images, name) for name in names[first : first + encoding.batch_size]]
        pixels = [torch.from_numpy(encoder.pixels(image, "pad")) for image in _sound(paths)]
        count += len(pixels)
        features = encoder(torch.stack(pixels)) if pixels else {}  # {column: (batch, tokens, width)}
        for value in features.values():
            value.cpu()
    seconds = time.perf_counter() - start
    if not count:
        raise ValueError(
            f"none of the {len(names)} images of the data can be read in {encoding.images}; correct encoding.images"
        )
    print(f"encoded {count} of {len(names)} images for {what} in {seconds:.1f} s", flush=True)
    return seconds


def _sound(paths: Sequence[Path]) -> Iterator[Image]:
    """The images that can be read; the stores lack the others too."""
    from pipeline.encoders.decode import open_image

    for path in paths:
        with contextlib.suppress(ValueError, FileNotFoundError):
            yield open_image(path)
