"""What every page needs: its template filled in, the packages it was made with, images inside."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.encoders.decode import open_image
from pipeline.images import find_file
from training.release.records import LOG, read_log

T = TypeVar("T")

EXAMPLES = 12  # questions that a page shows, unless it is told otherwise
TITLES = {"pretrain": "Stage 1", "finetune": "Stage 2"}  # of the stages, by their folders
PACKAGES = ("torch", "mosaicml", "ray", "transformers", "webdataset", "pyarrow")


def filled(template: str, parts: Mapping[str, Any]) -> str:
    """A page as one string of HTML that needs nothing beside itself."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,  # a name that a template gets wrong is an error, not an empty cell
    )
    page: str = templates.get_template(template).render(environment=_environment(), **parts)
    return page


def _environment() -> dict[str, str]:
    """What the page was made with and on, by name."""
    return {
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "machine": platform.machine(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def picture(path: Path, side: int = 320) -> str:
    """An image as a `data:` address, at most `side` pixels wide and high.

    Raises:
        ValueError: if it is no image. OSError: if there is no such file.
    """
    image = open_image(path)
    if max(image.size) > side:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def spread(items: Sequence[T], count: int) -> Sequence[T]:
    """At most `count` of them, from the first one on, as far from each other as they can be."""
    return items[:: max(1, len(items) // max(1, count))][:count]


def stage_log(stage: Path) -> list[dict[str, Any]]:
    """The lines of a stage's log, one at least.

    Raises:
        ValueError: if it has none, or one is damaged.
    """
    lines = read_log(stage)
    if not lines:
        raise ValueError(f"{stage / LOG} holds no step, or is not there; let the stage train first")
    return lines


def shown(answer: Mapping[str, Any], images: Path) -> dict[str, Any]:
    """What a page shows of a question: its image, its first line, and the truth where it is known.

    Raises:
        ValueError: if the image is none, or lies outside the folder `images`.
    """
    path = find_file(images, str(answer["image"]))
    if path is None:
        raise ValueError(f"{answer['image']!r} is not a file within {images}; name the folder of the questions' images")
    return {
        "image": picture(path),
        "question": answer.get("prompt", "").partition("\n")[0],
        "truth": answer.get("answer"),
    }
