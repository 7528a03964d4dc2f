"""Checkpoints are data: whoever can write one, in a folder or a bucket, runs nothing on the ranks that load it.

Three libraries write a checkpoint, and each reads its own files by unpickling, which calls whatever a pickle names:
Composer and DeepSpeed with `torch.load(weights_only=False)`, PyTorch's sharded reader with that and `pickle.load`. Two
things together make that safe. `refuse_code` looks at every file before one is loaded, and says which one names what
does not belong there. `only_data` holds around the loading: every `torch.load` within takes arrays, plain values and
the few classes listed here, wherever it gets its bytes. Composer also evaluates text of a checkpoint, as the call that
makes an algorithm; `evaluated_names` keeps it from that.

Ranks of one job do pickle objects for each other (`all_gather_object`). Those bytes stay inside the job.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as sharded
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.utils import _create_file_view
from torch.torch_version import TorchVersion

from training.engines import engine_class

# What Composer keeps beside the weights: random states, durations, a version.
_PLAIN: list[Any] = [np.ndarray, np.dtype, np.dtypes.UInt32DType, np.empty(0).__reduce__()[0], timedelta, TorchVersion]
_SHARDED = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        sharded.Metadata, sharded.MetadataIndex, sharded.StorageMeta, sharded.TensorProperties,
        sharded.TensorStorageMetadata, sharded.BytesStorageMetadata, sharded.ChunkStorageMetadata,
        sharded._MEM_FORMAT_ENCODING, _StorageInfo, torch.Size, torch.serialization._get_layout,
    )
}  # fmt: skip
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # PyTorch asks at each load
_DATA = (".json", ".part", ".safetensors")  # formats that can hold nothing else; .part is a mark that was not finished
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")  # DeepSpeed put them there up to now; nothing here runs them


@contextmanager
def only_data(engine: str) -> Iterator[None]:
    """Every `torch.load` within, whoever calls it, takes arrays, plain values, and what this engine saves beside them.

    Raises:
        ValueError: if the engine is not known here.
    """
    allowed = [*_PLAIN, *engine_class(engine).saved_types()]
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    others = torch.serialization.get_safe_globals()
    os.environ[_FORCE] = "1"
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def evaluated_names() -> list[str]:
    """The algorithms for which Composer would evaluate the text that a checkpoint gives: all that it knows."""
    import composer.algorithms

    return dir(composer.algorithms)


def refuse_code(folder: Path, engine: str) -> None:
    """Look at every file of a checkpoint, and at every pickle in it, without running anything.

    Args:
        folder: of one checkpoint; files that its mark does not name are looked at too, since libraries list folders.
        engine: that saved it, which says what may be named beside arrays and plain values.

    Raises:
        ValueError: with the file's name and what it names, if that is more than data; or if its kind is not known.
    """
    with only_data(engine):
        for path in sorted(folder.rglob("*")):
            if path.name in _SCRIPTS or path.suffix in _DATA or (path.is_dir() and not path.is_symlink()):
                continue
            try:
                _look_at(path)
            except Exception as error:  # a pickle of someone else's can fail in any way
                first = str(error).strip().partition("\n")[0] or type(error).__name__
                raise ValueError(
                    f"{path} is not loaded, and nothing in it was run: {first}. A checkpoint holds arrays and plain "
                    f"values only. See who can write there; to go on from an older one remove {folder}, in the bucket "
                    "too if there is one"
                ) from error


def _look_at(path: Path) -> None:
    """Raise, of any kind, for a file that holds more than data, or is of no known kind."""
    if not path.is_file():
        raise ValueError("it is no file")  # a pipe would keep its reader for ever
    if path.name.endswith(".metadata"):
        _look_at_shards(path.parent, read_metadata(path))
    elif path.suffix == ".pt":
        _refuse_foreign(path)
    elif path.suffix != ".distcp":  # those are read where their metadata say so
        raise ValueError("no file of this kind belongs into a checkpoint")


def _look_at_shards(folder: Path, metadata: sharded.Metadata) -> None:
    """Look at every stretch of a file that the metadata take for a saved tensor or value."""
    places: dict[str, list[tuple[int, int]]] = {}
    for place in metadata.storage_data.values():
        places.setdefault(place.relative_path, []).append((place.offset, place.length))
    for name, stretches in places.items():
        if Path(name).name != name:
            raise ValueError(f"it names {name!r}, which does not lie beside it")
        with (folder / name).open("rb") as file:
            for offset, length in stretches:
                try:
                    _refuse_foreign(_create_file_view(file, offset, length))  # as PyTorch reads it
                except Exception as error:
                    raise ValueError(f"its {name}, bytes {offset} to {offset + length}: {error}") from error


def _refuse_foreign(file: Any) -> None:
    """Raise if what `torch.save` wrote, a path or a file, names more than is allowed; or is in another format."""
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if foreign:
        raise ValueError(f"it names {', '.join(sorted(foreign))}")


def read_metadata(path: Path) -> sharded.Metadata:
    """The `.metadata` of PyTorch's sharded checkpoints, which are a pickle.

    Raises:
        pickle.UnpicklingError: if they name anything but what PyTorch itself writes there.
    """
    found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    if not isinstance(found, sharded.Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(found).__name__}, not the metadata of shards")
    return found


class _MetadataUnpickler(pickle.Unpickler):
    """Takes the classes of sharded metadata, dtypes and paths, and refuses every other name before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("pathlib", "PosixPath"):  # where it was first written
            return Path
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _SHARDED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _SHARDED[module, name]
