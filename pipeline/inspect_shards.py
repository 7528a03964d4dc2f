#!/usr/bin/env python
"""Look into a feature store: `python pipeline/inspect_shards.py STORE --html out.html [--images DIR]`.

One self-contained page: what the store is, its columns and shards, its failures, and some samples with their
conversations and a heat map of every block: how far each patch's feature is from the image's mean.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

import numpy as np
import numpy.typing as npt

from pipeline.manifest import FAILURES, committed, read_commit, read_manifest, read_store
from pipeline.schema import SAMPLES, Column, Failure, Sample, StoreSpec, tar_path
from pipeline.shard import read_sample
from pipeline.storage import Storage

CELL = 12  # pixels of a heat map's square
_COLD, _WARM = np.array([18.0, 24, 61]), np.array([255.0, 196, 84])
_MIDDLE = np.array([188.0, 62, 104])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="feature store, local or s3://")
    parser.add_argument("--html", type=Path, required=True, help="where the page goes")
    parser.add_argument("--images", action="append", default=[], help="image folder or zip (repeatable)")
    parser.add_argument("--samples", type=int, default=8, help="samples to show (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        page = render(Storage(arguments.store), tuple(arguments.images), arguments.samples)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    arguments.html.write_text(page, encoding="utf-8")
    print(arguments.html)


def render(storage: Storage, images: tuple[str, ...], samples: int) -> str:
    """The page, as one string of HTML that needs nothing beside itself.

    Raises:
        ValueError: if there is no complete store.
    """
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    spec = read_store(storage)
    rows = read_manifest(storage).to_pylist()
    chosen = rows[:: max(1, len(rows) // samples)][:samples] if samples else []
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"]))
    shown = [_sample(storage, spec, row, images) for row in chosen]
    return environment.get_template("inspect.html").render(
        root=storage.root,
        spec=spec,
        samples=len(rows),
        images=sum(row["image"] is not None for row in rows),
        conversations=sum(len(row["words"]) for row in rows),
        columns=_columns(spec, rows, shown),
        shards=_shards(storage),
        failures=_failures(storage),
        shown=shown,
    )


def _columns(spec: StoreSpec, rows: list[dict[str, Any]], shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each column with its bytes and the mean length of its features over the samples shown."""
    table: list[dict[str, Any]] = []
    for column in spec.columns:
        norms = [m["norm"] for sample in shown for m in sample["maps"] if m["name"] == column.name]
        size = sum(row.get(f"{column.name}.size") or 0 for row in rows)
        norm = float(np.mean(norms)) if norms else 0.0
        table.append({"name": column.name, "tokens": column.tokens, "width": column.width, "bytes": size, "norm": norm})
    longest = max((entry["norm"] for entry in table), default=0.0) or 1.0
    return [{**entry, "percent": 100 * entry["norm"] / longest} for entry in table]


def _shards(storage: Storage) -> dict[str, Any]:
    """Bytes of every shard, as bars of equal width."""
    commits = [read_commit(storage, shard) for shard in sorted(committed(storage))]
    sizes = [sum(file.bytes for file in commit.files.values()) for commit in commits if commit]
    largest = max(sizes, default=1)
    return {"sizes": sizes, "largest": largest, "total": sum(sizes), "percents": [100 * s / largest for s in sizes]}


def _failures(storage: Storage) -> dict[str, Any]:
    lines = storage.read(FAILURES).decode().splitlines() if storage.exists(FAILURES) else []
    failures = [Failure.model_validate_json(line) for line in lines]
    return {
        "count": len(failures),
        "reasons": Counter(failure.reason for failure in failures).most_common(10),
        "first": failures[:20],
    }


def _sample(storage: Storage, spec: StoreSpec, row: dict[str, Any], images: tuple[str, ...]) -> dict[str, Any]:
    data = storage.read_range(tar_path(SAMPLES, row["shard"]), row[f"{SAMPLES}.offset"], row[f"{SAMPLES}.size"])
    sample = read_sample(data)
    maps = []
    for column in spec.columns:
        size = row.get(f"{column.name}.size")
        if size:
            payload = storage.read_range(tar_path(column.name, row["shard"]), row[f"{column.name}.offset"], size)
            maps.append(_map(payload, column, spec))
    return {
        "key": sample.key,
        "image": sample.image,
        "size": None if sample.image is None else f"{sample.width} x {sample.height}",
        "conversations": [json.loads(c.model_dump_json(by_alias=True)) for c in sample.conversations],
        "picture": _picture(storage, spec, row, sample, images),
        "maps": maps,
    }


def _map(payload: bytes, column: Column, spec: StoreSpec) -> dict[str, Any]:
    """A column of one image: the mean length of its tokens, and the heat map of a patch grid."""
    import torch

    from pipeline.codec import decode

    raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8)[None]
    features = decode(raw, column, spec.codec, torch.float32)[0]
    distance = (features - features.mean(dim=0)).norm(dim=-1).numpy()
    picture = _heat(distance.reshape(spec.encoder.grid, -1)) if column.tokens == spec.encoder.grid**2 else None
    return {"name": column.name, "norm": float(features.norm(dim=-1).mean()), "picture": picture}


def _heat(values: npt.NDArray[np.float32]) -> str:
    """(grid, grid) -> an image, from the smallest value to the largest."""
    from PIL import Image

    spread = float(values.max() - values.min()) or 1.0
    place = ((values - values.min()) / spread)[..., None]
    low = _COLD + (_MIDDLE - _COLD) * np.minimum(place * 2, 1)
    colours = (low + (_WARM - _MIDDLE) * np.maximum(place * 2 - 1, 0)).astype(np.uint8)
    cell = max(1, 24 * CELL // len(values))
    image = Image.fromarray(colours).resize((cell * values.shape[1], cell * len(values)), Image.Resampling.NEAREST)
    return _data_url(image, "PNG")


def _picture(
    storage: Storage, spec: StoreSpec, row: dict[str, Any], sample: Sample, images: tuple[str, ...]
) -> str | None:
    """The source image, from the image folders or, if the store keeps it, from behind the record."""
    from pipeline.dataset import ImageSource, index_zips
    from pipeline.encoder import load_image
    from pipeline.shard import members

    if sample.image is None:
        return None
    if images:
        places = [index.get(sample.image) for index in index_zips(images)]
        data = ImageSource(images).read(sample.image, places)
    elif spec.stores_images:
        with storage.open(tar_path(SAMPLES, row["shard"])) as file:
            own = [m for m in members(file) if m[0].startswith(f"{sample.key}.") and not m[0].endswith(".json")]
            file.seek(own[0][1])
            data = file.read(own[0][2])
    else:
        return None
    image = load_image(data)
    image.thumbnail((480, 480))
    return _data_url(image, "JPEG")


def _data_url(image: Any, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=88)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main()
