"""The files of a language model, from which each rank fills its part of the weights: one weight at a time.

A model is built on the `meta` device, where tensors have shapes and no memory. Its engine gives every weight, or this
rank's rows of it, a place, and `LlmWeights.fill` copies the contents there. Files are mapped, not read: the ranks of a
node share one copy in the system's page cache, and a mapping ends with its weight.
"""

from __future__ import annotations

import ctypes
import json
import logging
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import swap_tensors
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from training.config import ModelSettings

# In the order in which transformers takes them; an index names the files that it is split into.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# As safetensors names them.
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
MMAP_THRESHOLD = -3  # of glibc's malloc.h
LLM, ADAPTED = "llm.", ".base_layer."  # what names begin with in our model; what peft puts before an adapted weight's


@contextmanager
def memory_returned() -> Iterator[None]:
    """Within, memory that is freed goes back to the system at once, from 1 MiB on.

    glibc keeps it otherwise, in pieces that the next weight does not fit into: a process grows by a model's size.
    """
    libc = ctypes.CDLL(None)
    set_option = libc.mallopt if hasattr(libc, "mallopt") else lambda *_: None  # other systems' have no such option
    set_option(MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        set_option(MMAP_THRESHOLD, 2**25)  # what glibc itself comes to


def empty_llm(settings: ModelSettings, dtype: torch.dtype) -> PreTrainedModel:
    """The language model that `from_pretrained` gives, with weights on `meta`; its buffers, which are small, are there.

    Of the files only headers are read.

    Raises:
        ValueError: if a file is damaged, a weight is missing, or has another shape or dtype. OSError: if there is none.
    """
    _files(settings)  # says which file is wrong, before transformers stumbles over it
    llm, found = _by_transformers(settings, dtype, device_map="meta", ignore_mismatched_sizes=True)
    if llm._hf_peft_config_loaded:  # it then loads the model that the adapters were made for, and them
        raise ValueError(
            f"{settings.llm} holds adapters (adapter_config.json): merge them into their model, and name what comes out"
        )
    wrong = [f"lack {name}" for name in sorted(found["missing_keys"])]
    for name, there, wanted in sorted(found["mismatched_keys"]):
        wrong.append(f"hold {name} with shape {tuple(there)} instead of {tuple(wanted)}")
    if wrong:
        more = f", and {len(wrong) - 1} more such weights" if len(wrong) > 1 else ""
        raise ValueError(
            f"the files of {settings.llm} {wrong[0]}{more}; fetch again those that belong to its config.json"
        )
    weights = LlmWeights(settings, llm)
    weights.check()
    for one, other_one in list(llm.all_tied_weights_keys.items()):
        # Files may hold a tied weight under both names; transformers then ties what is equal, and cannot look on meta.
        if llm.get_parameter(one) is not llm.get_parameter(other_one) and not weights.same(one, other_one):
            llm.all_tied_weights_keys.pop(one)
            llm.config.tie_word_embeddings = False  # who builds such a model anew, for its export say, keeps both too
    llm.tie_weights(recompute_mapping=False)
    for module in llm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(
                name, torch.empty_like(buffer, device="cpu"), name not in module._non_persistent_buffers_set
            )
        if module._non_persistent_buffers_set:
            llm._init_weights(module)  # computes them, rotary frequencies say
    for name, buffer in llm.named_buffers():
        if name in llm.state_dict():
            weights.read(name, buffer)
    return llm


def shape_only(text: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The language model of a configuration, on `meta`, and nothing of its files."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text, dtype=dtype)


def _by_transformers(settings: ModelSettings, dtype: torch.dtype, **how: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of `from_pretrained`, and what that says of names and shapes."""
    log = logging.getLogger("transformers")
    before = log.level
    log.setLevel(logging.ERROR)  # its report says of what is lost that it was drawn anew, which is refused here
    try:
        found: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            settings.llm, revision=settings.revision, dtype=dtype, output_loading_info=True, **how
        )
    except FileNotFoundError as error:
        raise ValueError(f"{settings.llm} lacks a file that its index names ({error}); put it there") from error
    except pickle.UnpicklingError as error:
        raise ValueError(_no_weights(settings.llm)) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(_unreadable(settings.llm, error)) from error
    except OSError as error:
        if error.errno is None or error.filename is not None:  # it says what is wrong
            raise
        raise ValueError(_unreadable(settings.llm, error)) from error
    finally:
        log.setLevel(before)
    return found


def _no_weights(where: Path | str) -> str:
    """What to say of a pickle that would build something else than tensors: PyTorch's advice is to run it."""
    return (
        f"a .bin file of weights, {where}, is damaged or holds code, which is never run; fetch it again, or name a "
        "model in safetensors"
    )


def _unreadable(where: Path | str, error: Exception) -> str:
    """What to say of any other file that does not open."""
    first = str(error).strip().partition("\n")[0] or "it ends too soon"
    return (
        f"a file of weights, {where}, cannot be opened: {first}; fetch it again if it is damaged; "
        "one that is larger than this machine's memory has to be split"
    )


def _files(settings: ModelSettings) -> dict[str, Path]:
    """Each weight's name in the files, and its file; nothing for files that cannot be mapped.

    Raises:
        ValueError: if an index or a file that is here already is damaged.
    """
    for name in FILES:
        found = cached_file(settings.llm, name, revision=settings.revision, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        path = Path(found)
        files = _of_index(path) if path.suffix == ".json" else {}
        there = {file: _kinds(file) for file in sorted(set(files.values()) or {path}) if file.exists()}
        if None in there.values():
            return {}
        return files or dict.fromkeys(there[path] or (), path)
    return {}


def _of_index(path: Path) -> dict[str, Path]:
    """Each weight's name, and the file beside the index in which it says that the weight is."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; fetch it again") from error
    files = index.get("weight_map") if isinstance(index, dict) and "metadata" in index else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f'{path} has no "metadata" and "weight_map", names of weights and their files; fetch it again')
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError(f"{path} says that {name} is in {file!r}, which is no file beside it; fetch it again")
    return {name: path.parent / file for name, file in files.items()}


def _kinds(path: Path) -> dict[str, str] | None:
    """The name and the dtype of each weight of a file, by its header; None for a file that cannot be mapped."""
    try:
        path.open("rb").close()  # safetensors would say of a file that may not be read that there is none
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
        if not zipfile.is_zipfile(path):  # of PyTorch before 1.6, or damaged
            return None
        weights = _mapped(path)
    except pickle.UnpicklingError as error:
        raise ValueError(_no_weights(path)) from error
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(_unreadable(path, error)) from error
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path} holds a {type(weights).__name__}, not weights by their names; fetch it again")
    kinds: dict[str, Any] = {name: getattr(weight, "dtype", type(weight).__name__) for name, weight in weights.items()}
    return {name: FLOATS.get(kind, str(kind)) for name, kind in kinds.items()}


def _mapped(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a .bin file, whose pages are read when they are used."""
    found: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return found


class LlmWeights:
    """Where the contents of a language model's weights are.

    Args:
        settings: say which model.
        llm: as `empty_llm` gives it, with or without adapters.
    """

    def __init__(self, settings: ModelSettings, llm: PreTrainedModel) -> None:
        self.settings = settings
        self.llm = llm
        self._whole: Mapping[str, Tensor] | None = None

    @cached_property
    def files(self) -> dict[str, Path] | None:
        """Each weight's name, and the file that holds it.

        None if transformers renames or transforms what the files hold, or they cannot be mapped: then every rank reads
        the whole model for a moment.
        """
        kept = self.llm.state_dict().keys()  # without what is computed
        buffers = ((name, buffer) for name, buffer in self.llm.named_buffers() if name in kept)
        names = {_in_file(name) for name, _ in (*self.llm.named_parameters(), *buffers) if "lora_" not in name}
        files = _files(self.settings) if self.llm._weight_conversions == [] else {}
        return {name: files[name] for name in names} if names <= files.keys() else None

    def check(self) -> None:
        """Refuse weights that are no plain floating-point numbers, or not in the file that an index names.

        Raises:
            ValueError: with the weight, its dtype and its file.
        """
        files = self.files or {}
        kinds = {path: _kinds(path) or {} for path in set(files.values())}
        for name, path in sorted(files.items()):
            kind = kinds[path].get(name)
            if kind is None:
                raise ValueError(f"{path} lacks {name}, which the index beside it says is there; fetch both again")
            if kind not in FLOATS.values():
                raise ValueError(
                    f"{path} holds {name} as {kind}, not as one of {', '.join(sorted(FLOATS.values()))}: a quantized "
                    "model cannot be trained here; name the one that it was made from"
                )

    def same(self, one: str, other: str) -> bool:
        """Whether two weights of the files are equal, bit for bit."""
        return torch.equal(self._rows(one, slice(None)), self._rows(other, slice(None)))

    def fill(self, name: str, weight: nn.Parameter, device: torch.device) -> None:
        """Give a weight on `meta` its place on `device`, and its contents; of a sharded one this rank's rows.

        The parameter stays the same object, for its optimizer and where it is tied.

        Args:
            name: within the multimodal model.
            weight: (rows, ...), or a DTensor of it, sharded by rows.
            device: where it goes.
        """
        place = nn.Parameter(torch.empty_like(weight, device=device), weight.requires_grad)
        swap_tensors(weight, place)  # type: ignore[no-untyped-call]
        mine, first = weight.detach(), 0
        if isinstance(mine, DTensor):
            ranks, rank = mine.device_mesh.size(), mine.device_mesh.get_local_rank()
            first = rank * -(-mine.shape[0] // ranks)  # as torch.chunk cuts: all but the last are rounded up
            mine = mine.to_local()
        if mine.numel():
            self.read(_in_file(name.removeprefix(LLM)), mine, first)

    def read(self, name: str, into: Tensor, first: int = 0) -> None:
        """Copy a weight of the language model, from row `first` on, and cast it."""
        into.copy_(self._rows(name, slice(first, first + into.shape[0])))

    def _rows(self, name: str, rows: slice) -> Tensor:
        """Rows of a weight, as its file has them; the memory is the file's."""
        if self.files is None:
            if self._whole is None:
                self._whole = _by_transformers(self.settings, self.llm.dtype)[0].state_dict()
            return self._whole[name][rows]
        path = self.files[name]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return file.get_slice(name)[rows]  # type: ignore[no-any-return]
        return _mapped(path)[name][rows]


def fill_whole(settings: ModelSettings, model: nn.Module, device: torch.device) -> None:
    """Fill in every weight of the multimodal model that is on `meta`."""
    weights = LlmWeights(settings, model.llm)
    for name, weight in model.named_parameters():
        if weight.is_meta:
            weights.fill(name, weight, device)


def _in_file(name: str) -> str:
    """The name in the files, of a weight of the language model with adapters."""
    return name.replace(ADAPTED, ".")
