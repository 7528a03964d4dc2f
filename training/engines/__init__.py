"""How a model is spread over the ranks: `base` says what an engine is, and each has a file.

Runs ask here which engine they have; the settings ask its class what it refuses.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING

from training.config import ENGINES, TrainConfig

if TYPE_CHECKING:
    from training.engines.base import Engine

__all__ = ["ENGINES", "engine_class", "engine_of"]


def engine_of(config: TrainConfig, ranks: int) -> Engine:
    """The engine in force: the one that `parallelism` names, or what it is on one rank, which shares with nobody."""
    name = config.parallelism
    if ranks == 1:
        name = engine_class(name).on_one_rank or name
    return engine_class(name)(name, config, ranks)


def engine_class(name: str) -> type[Engine]:
    """The class behind a name of `ENGINES`.

    Raises:
        ValueError: if there is none.
    """
    if name not in ENGINES:
        raise ValueError(f"no engine is called {name!r}; known are {', '.join(ENGINES)}: add it to training/config.py")
    found: type[Engine] = resolve_name(ENGINES[name])
    return found
