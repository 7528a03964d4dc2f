"""Settings of what is learned from: feature stores, and how their conversations become tokens."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, ValidationInfo, field_validator

from pipeline.config import Settings, meant
from training.text.templates import TEMPLATES


class StoreSettings(Settings):
    """One of several stores, and how much of it an epoch of the run has."""

    store: str = Field(description="feature store of pipeline/build_shards.py, local or s3://")
    weight: float | None = Field(
        default=None, gt=0, le=1e15, description="its part of an epoch, which has as many examples as all stores"
    )
    epochs: float | None = Field(default=None, gt=0, le=1000, description="how often an epoch has each of its examples")
    template: str | None = Field(default=None, description="instead of data.template")

    @field_validator("template")
    @classmethod
    def _known_template(cls, name: str | None) -> str | None:
        return None if name is None else known_template(name)


class ExampleSettings(Settings):
    """Which stores the examples come from, and how a conversation becomes tokens."""

    stores: tuple[StoreSettings, ...] = Field(
        default=(), description="instead of store, several: [{store, weight or epochs, template}, ...]"
    )
    store: str | None = Field(default=None, description="feature store of pipeline/build_shards.py, local or s3://")
    template: str = Field(description="plain for captions (stage 1), v1 for conversations (stage 2)")
    max_length: int = Field(default=2048, gt=8, description="tokens per example, image tokens included")

    @field_validator("template")
    @classmethod
    def _known_template(cls, name: str) -> str:
        return known_template(name)

    @field_validator("stores", mode="before")
    @classmethod
    def _groups_of_settings(cls, stores: object) -> object:
        if not isinstance(stores, list | tuple) or not all(isinstance(entry, dict | StoreSettings) for entry in stores):
            raise ValueError("expected a list such as [{store: first, weight: 2}, {store: second, weight: 1}]")
        return stores

    @field_validator("stores")
    @classmethod
    def _like_each_other(cls, stores: tuple[StoreSettings, ...]) -> tuple[StoreSettings, ...]:
        weighed = [entry.store for entry in stores if entry.weight is not None]
        counted = [entry.store for entry in stores if entry.epochs is not None]
        without = [entry.store for entry in stores if entry.weight is None]
        if weighed and (counted or without):
            other = f"{counted[0]} has epochs" if counted else f"{without[0]} has none"
            raise ValueError(f"{weighed[0]} has a weight and {other}; give all stores a weight, or none of them")
        if twice := _twice(entry.store.rstrip("/") for entry in stores):
            raise ValueError(f"{twice} is given twice; give it once, with a higher weight or more epochs")
        return stores

    @field_validator("store")
    @classmethod
    def _one_or_several(cls, store: str | None, info: ValidationInfo) -> str | None:
        stores = info.data.get("stores")  # None: they are wrong, which is said of them
        if store is None and stores == ():
            raise ValueError("required, but not given; add data.store=... (several: data.stores=[{store: ...}, ...])")
        if store is not None and stores:
            raise ValueError(f"data.stores names {len(stores)} already; add data.store=null, or leave data.stores out")
        return store

    @property
    def mixture(self) -> tuple[StoreSettings, ...]:
        """All stores, each with its template; one for a run with a single store."""
        given = self.stores or (StoreSettings(store=self.store or ""),)
        return tuple(entry.model_copy(update={"template": entry.template or self.template}) for entry in given)


def known_template(name: str) -> str:
    """The name of a template; ValueError if there is none of that name."""
    if name not in TEMPLATES:
        raise ValueError(f"no such template; {meant(name, TEMPLATES)}")
    return name


def _twice(names: Iterable[str]) -> str | None:
    """The first name that comes again."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
