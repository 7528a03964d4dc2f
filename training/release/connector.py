"""The connector that stage 1 leaves and stage 2 starts from: its weights, and its shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import differences
from training.model.reducers import connector_config
from training.release.folder import replaced_folder

if TYPE_CHECKING:
    from training.model.reducers.connector import Connector

WEIGHTS, SHAPE = "connector.safetensors", "connector.json"


def export_connector(connector: Connector, folder: Path, records: Mapping[str, str] | None = None) -> None:
    """Write weights and shape; with `records`, texts by name, of the run where the folder does not lie in its own."""
    from safetensors.torch import save_file

    with replaced_folder(folder) as target:
        weights = {name: weight.detach().cpu().contiguous() for name, weight in connector.state_dict().items()}
        save_file(weights, target / WEIGHTS)
        (target / SHAPE).write_text(json.dumps(asdict(connector.config), indent=1), encoding="utf-8")
        for name, text in (records or {}).items():
            (target / name).write_text(text, encoding="utf-8")


def load_connector(connector: Connector, folder: Path) -> None:
    """Load the weights that `export_connector` wrote.

    Raises:
        ValueError: if there are none, they are damaged, or the connector has another shape, naming each difference.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file() or not (folder / SHAPE).is_file():
        raise ValueError(
            f"{folder} holds no {WEIGHTS} with its {SHAPE}; name the folder connector/ of a finished run of stage 1"
        )
    try:
        theirs = asdict(connector_config(json.loads((folder / SHAPE).read_text(encoding="utf-8"))))
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{folder} holds a damaged connector: {error}; put a copy of it back, or start the command of the run that "
            "it is of, which exports it again"
        ) from error
    mine = asdict(connector.config)
    differing = differences(theirs, mine)
    if differing:
        raise ValueError(
            f"{folder} holds another connector: {'; '.join(differing)}; set model.connector as it was in stage 1"
        )
    try:
        connector.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / WEIGHTS} is not of {folder / SHAPE}: {error}; put both back as they were"
        ) from error
