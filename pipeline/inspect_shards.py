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
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from pipeline.manifest import FAILURES, existing_commits, read_manifest, read_store, spread
from pipeline.schema import SAMPLES, Column, Failure, Sample, StoreSpec, first_fault, tar_path
from pipeline.shard import read_sample
from pipeline.storage import Storage

VERIFY = "run pipeline/verify_shards.py on the store"
CELL = 12  # pixels of a heat map's square
_COLD, _WARM = np.array([18.0, 24, 61]), np.array([255.0, 196, 84])  # RGB of the smallest and the largest value
_MIDDLE = np.array([188.0, 62, 104])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="feature store, local or s3://")
    parser.add_argument("--html", type=Path, required=True, help="where the page goes")
    parser.add_argument("--images", action="append", default=[], help="image folder or zip (repeatable)")
    parser.add_argument("--samples", type=int, default=8, help="samples to show (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.samples < 0:
        parser.error(f"--samples is {arguments.samples}; give at least 0")
    try:
        page = render(Storage(arguments.store), tuple(arguments.images), arguments.samples)
        arguments.html.write_text(page, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(arguments.html)


def render(storage: Storage, images: tuple[str, ...], samples: int) -> str:
    """The page, as one string of HTML that needs nothing beside itself.

    Raises:
        ValueError: if there is no complete store.
    """
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    spec = read_store(storage)
    table = read_manifest(storage, spec)
    rows = spread(table, samples)
    pictures = _Pictures(storage, spec, images, table.column("image").to_pylist())
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"]))
    shown = [_sample(storage, spec, row, pictures) for row in rows]
    return environment.get_template("inspect.html").render(
        root=storage.root,
        spec=spec,
        samples=len(table),
        images=len(table) - table.column("image").null_count,
        conversations=len(table.column("words").combine_chunks().flatten()),
        columns=_columns(spec, table, shown),
        shards=_shards(storage),
        failures=_failures(storage),
        shown=shown,
    )


def _columns(spec: StoreSpec, manifest: Any, shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each column with its bytes and the mean length of its features over the samples shown."""
    table: list[dict[str, Any]] = []
    for column in spec.columns:
        norms = [m["norm"] for sample in shown for m in sample["maps"] if m["name"] == column.name]
        name = f"{column.name}.size"
        size = int(manifest.column(name).to_numpy().sum()) if name in manifest.column_names else 0
        norm = float(np.mean(norms)) if norms else 0.0
        table.append({"name": column.name, "tokens": column.tokens, "width": column.width, "bytes": size, "norm": norm})
    longest = max((entry["norm"] for entry in table), default=0.0) or 1.0
    return [{**entry, "percent": 100 * entry["norm"] / longest} for entry in table]


def _shards(storage: Storage) -> dict[str, Any]:
    """Bytes of every shard, as bars of equal width."""
    sizes = [sum(file.bytes for file in commit.files.values()) for commit in existing_commits(storage)]
    largest = max(sizes, default=1)
    return {"sizes": sizes, "largest": largest, "total": sum(sizes), "percents": [100 * s / largest for s in sizes]}


def _failures(storage: Storage) -> dict[str, Any]:
    """How many samples failed, the commonest reasons, and the first ones."""
    lines = storage.read(FAILURES).split(b"\n") if storage.exists(FAILURES) else []
    try:
        failures = [Failure.model_validate_json(line) for line in lines if line]
    except ValidationError as error:
        raise ValueError(f"{storage.root}/{FAILURES} is damaged ({first_fault(error)}); build again") from error
    return {
        "count": len(failures),
        "reasons": Counter(failure.reason for failure in failures).most_common(10),
        "first": failures[:20],
    }


def _sample(storage: Storage, spec: StoreSpec, row: dict[str, Any], pictures: _Pictures) -> dict[str, Any]:
    """What the page shows of one row of the manifest: its record, its picture, and each column's heat map."""
    data = storage.read_range(tar_path(SAMPLES, row["shard"]), row[f"{SAMPLES}.offset"], row[f"{SAMPLES}.size"])
    try:
        sample = read_sample(data)
    except ValueError as error:
        raise ValueError(f"{row['key']}.json in {tar_path(SAMPLES, row['shard'])}: {error}; {VERIFY}") from error
    maps = []
    for column in spec.columns:
        size = row.get(f"{column.name}.size")
        if size:
            path = tar_path(column.name, row["shard"])
            payload = storage.read_range(path, row[f"{column.name}.offset"], size)
            if len(payload) != size:
                raise ValueError(f"{path} ends within the features of {row['key']}; {VERIFY}")
            maps.append(_map(payload, column, spec))
    return {
        "key": sample.key,
        "image": sample.image,
        "size": None if sample.image is None else f"{sample.width} x {sample.height}",
        "conversations": [json.loads(c.model_dump_json(by_alias=True)) for c in sample.conversations],
        "picture": None if sample.image is None else pictures(sample, row["shard"]),
        "maps": maps,
    }


def _map(payload: bytes, column: Column, spec: StoreSpec) -> dict[str, Any]:
    """A column of one image: the mean length of its tokens, and the heat map if the tokens are the patch grid."""
    import torch

    from pipeline.codec import from_payload

    raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8)[None]
    features = from_payload(raw, column, spec.codec, torch.float32)[0]  # (tokens, width)
    distance = (features - features.mean(dim=0)).norm(dim=-1).numpy()  # (tokens,): from the mean of all tokens
    picture = _heat(distance.reshape(spec.encoder.grid, -1)) if column.tokens == spec.encoder.grid**2 else None
    return {"name": column.name, "norm": float(features.norm(dim=-1).mean()), "picture": picture}


def _heat(values: npt.NDArray[np.float32]) -> str:
    """(grid, grid) of any unit -> a PNG as a data URL, coloured from the smallest value to the largest."""
    from PIL import Image

    spread = float(values.max() - values.min()) or 1.0
    place = ((values - values.min()) / spread)[..., None]  # (grid, grid, 1), from 0 to 1
    # Two straight lines through RGB, (grid, grid, 3): cold to middle up to one half, then middle to warm.
    low = _COLD + (_MIDDLE - _COLD) * np.minimum(place * 2, 1)
    colours = (low + (_WARM - _MIDDLE) * np.maximum(place * 2 - 1, 0)).astype(np.uint8)
    cell = max(1, 24 * CELL // len(values))
    image = Image.fromarray(colours).resize((cell * values.shape[1], cell * len(values)), Image.Resampling.NEAREST)
    return _data_url(image, "PNG")


class _Pictures:
    """The source images: from the image folders or, if the store keeps them, from behind the records."""

    def __init__(self, storage: Storage, spec: StoreSpec, images: tuple[str, ...], names: list[str | None]) -> None:
        from pipeline.images import ImageSource, index_zips

        self.storage, self.spec = storage, spec
        self.source = ImageSource(images) if images else None
        self.zips = index_zips(images, names)

    def __call__(self, sample: Sample, shard: int) -> str | None:
        """A small copy as a data URL; None if the image cannot be read."""
        from pipeline.encoders.decode import load_image

        assert sample.image is not None
        try:
            if self.source is not None:
                data = self.source.read(sample.image, [index.get(sample.image) for index in self.zips])
            elif self.spec.stores_images:
                data = self._stored(sample, shard)
            else:
                return None
            image = load_image(data)
        except ValueError as error:
            print(f"{sample.image}: {error}; shown without it", file=sys.stderr)
            return None
        image.thumbnail((480, 480))
        return _data_url(image, "JPEG")

    def _stored(self, sample: Sample, shard: int) -> bytes:
        """The source image that the store keeps beside the sample's record."""
        from pipeline.shard import members

        with self.storage.open(tar_path(SAMPLES, shard)) as file:
            try:
                own = [m for m in members(file) if m[0].startswith(f"{sample.key}.") and not m[0].endswith(".json")]
            except tarfile.TarError as error:
                raise ValueError(f"{tar_path(SAMPLES, shard)} cannot be read: {error}; {VERIFY}") from error
            if not own:
                raise ValueError(f"{tar_path(SAMPLES, shard)} does not hold it; {VERIFY}")
            file.seek(own[0][1])
            return file.read(own[0][2])


def _data_url(image: Any, kind: str) -> str:
    """A PIL image as an address that holds its bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=88)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main()
