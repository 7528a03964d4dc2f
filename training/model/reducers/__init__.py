"""Ways to need fewer vision tokens: a file for each family, a line for each in `FAMILIES`.

Nothing else names them: settings, costs, exports, sweeps and pages follow from what a `ConnectorConfig` declares.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from importlib import import_module
from inspect import isabstract
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import ConnectorConfig
    from .connector import Connector

_FUSION = ("fusion:FusionConfig", "fusion_layers:Fusion")
FAMILIES = {  # arm -> "file:class" of what it declares, and of what it computes
    **dict.fromkeys(("mbtf+stf", "mbtf", "stf", "mlp", "avgpool", "tokenconcat"), _FUSION),
}
DEFAULT = "mbtf+stf"  # the method of the paper
SHAPE = ("grid", "vision_width", "llm_width")  # of a configuration: follow from encoder and language model


def config_class(arm: str) -> type[ConnectorConfig]:
    """The class that declares the connector `arm`.

    Raises:
        ValueError: if there is no such connector.
    """
    if not isinstance(arm, str) or arm not in FAMILIES:
        raise ValueError(f"connector.arm {arm!r} is unknown; choose one of {', '.join(FAMILIES)}")
    found: type[ConnectorConfig] = _open(FAMILIES[arm][0])
    return found


def _open(place: str) -> Any:
    """The class at `file:class`.

    Raises:
        ValueError: if it is not there, or lacks a method.
    """
    file, _, name = place.partition(":")
    try:
        found = getattr(import_module(f"{__name__}.{file}"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"training/model/reducers names {place!r} in FAMILIES: {error}; correct that line") from error
    if isabstract(found):
        lacking = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"{place} of training/model/reducers lacks {lacking}; write it there")
    return found


def connector_config(given: Mapping[str, Any] | None = None, **more: Any) -> ConnectorConfig:
    """The configuration of `given` fields: `arm`, the settings of its family, and `SHAPE`.

    Raises:
        ValueError: if the connector is unknown, has no such setting, or its settings do not fit each other.
    """
    values = {"arm": DEFAULT, **(given or {}), **more}  # the later ones win
    cls = config_class(values["arm"])
    known = [field.name for field in fields(cls)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(
            f"connector {values['arm']} has no setting {', '.join(unknown)}; choose among "
            f"{', '.join(name for name in known if name not in ('arm', *SHAPE))}"
        )
    return cls(**values)


def build_connector(config: ConnectorConfig, available: Collection[str] | None = None) -> Connector:
    """The connector of `config`, with PyTorch's initial weights, as LLaVA-1.5.

    Raises:
        ValueError: if it needs a column that is not `available`.
    """
    missing = [name for name in config.columns if available is not None and name not in available]
    if missing:
        raise ValueError(
            f"connector {config.arm} needs {', '.join(missing)}; there is only {', '.join(sorted(available or ()))}. "
            "Choose other blocks, or add them to the store"
        )
    layers = config.tokens_per_layer(2)
    if layers != (config.tokens, config.tokens):
        raise ValueError(
            f"connector {config.arm} declares {layers} tokens in two layers; the model shows all {config.tokens} of "
            "them to every layer: declare that"
        )
    connector: Connector = _open(FAMILIES[config.arm][1])(config)
    return connector
