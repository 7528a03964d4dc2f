"""A model as an ordinary Hugging Face folder: weights, settings, tokenizer, processor, the code that runs them, card.

Every folder is written beside its final place and renamed, so one that exists is whole.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.release.card import NO_FILES, CardFiles, model_card, store_facts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.schema import StoreSpec
    from training.model.model import CompactVisionForConditionalGeneration
    from training.model.processor import CompactVisionProcessor
    from training.model.tokenizer import Tokenizer

EXPORTS = ("config.json", "connector.json")  # of a model, of a connector: what an exported folder is known by


def export_model(
    model: CompactVisionForConditionalGeneration,
    tokenizer: Tokenizer,
    stores: Sequence[StoreSpec],
    folder: Path,
    dtype: torch.dtype | None = None,
    files: CardFiles = NO_FILES,
) -> None:
    """Write a folder from which transformers loads the whole model, the store's own vision encoder included.

    Args:
        model: as trained; it is left as it is.
        tokenizer: of the language model.
        stores: what it learned from; the first says which encoder made the features and how images became square.
        folder: replaced if it exists.
        dtype: of the weights; None keeps each part's own.
        files: what the card takes its figures from.

    Raises:
        ValueError: if a file of scores is none. OSError: if the vision encoder cannot be read.
    """
    whole = with_encoder(model, stores[0], dtype)
    write_model(whole, tokenizer, folder, model_card(whole, store_facts(stores), files), dtype)


def with_encoder(
    model: CompactVisionForConditionalGeneration, store: StoreSpec, dtype: torch.dtype | None = None
) -> CompactVisionForConditionalGeneration:
    """The model with the vision encoder of the store's features, in `dtype`, by default that of the language model.

    Raises:
        OSError: if the vision encoder cannot be read.
    """
    from pipeline.encoder import family_of
    from training.model.model import CompactVisionForConditionalGeneration

    local = Path(store.encoder.id).is_dir()  # its revision is then a digest, which no Hub knows
    revision = None if local else store.encoder.revision
    tower: Any = family_of(store.encoder.id, revision).load(store.encoder.id, revision, dtype=dtype or model.llm.dtype)
    return CompactVisionForConditionalGeneration.from_parts(model.llm, model.connector, tower, aspect=store.aspect)


def write_model(
    whole: CompactVisionForConditionalGeneration,
    tokenizer: Tokenizer,
    folder: Path,
    card: str,
    dtype: torch.dtype | None = None,
    contents: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write a whole model with its processor, tokenizer, generation settings, code and card.

    Args:
        whole: the model.
        tokenizer: of the language model.
        folder: replaced if it exists.
        card: its README.md.
        dtype: of the weights; None keeps each one's own.
        contents: of weights that are on `meta` in `whole`, by name, one after another; None if there are none.
    """
    from training.release.code import write_code
    from training.release.shards import write_weights

    processor = processor_of(whole, tokenizer)
    here = ((name, weight) for name, weight in whole.state_dict().items() if not weight.is_meta)
    if dtype is not None:
        whole.config.dtype = dtype
    with replaced_folder(folder) as target:
        processor.save_pretrained(target)
        write_weights(whole, chain(here, contents or ()), target, dtype)
        write_code(whole, target)
        (target / "README.md").write_text(card, encoding="utf-8")


def processor_of(whole: CompactVisionForConditionalGeneration, tokenizer: Tokenizer) -> CompactVisionProcessor:
    """What makes the inputs of a whole model, whose generation settings are put in order for this tokenizer."""
    from transformers import GenerationConfig

    from training.model.decoders import decoder_of
    from training.model.processor import CompactVisionImageProcessor, CompactVisionProcessor, CompactVisionTokenizer

    assert whole.vision_tower is not None, "it sees"
    text = CompactVisionTokenizer(
        str(tokenizer.model_file), legacy=tokenizer.legacy, image_token_id=whole.config.image_token_id
    )
    vision = whole.vision_tower.config
    whole.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    return CompactVisionProcessor(
        CompactVisionImageProcessor(whole.config.aspect, vision.image_size, vision.model_type),
        text,
        image_tokens=whole.config.image_tokens,
        chat_template=decoder_of(whole.config.text_config.model_type).chat_template,
    )


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which becomes `folder` at the end, or nothing at all if writing fails.

    Raises:
        ValueError: if `folder` is there and no earlier export. OSError: if something cannot be written.
    """
    from safetensors import SafetensorError

    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    _refuse_others(folder)
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    fresh.mkdir()
    try:
        yield fresh
        for path in fresh.rglob("*"):
            if path.is_file():  # safetensors keeps its files to their owner; what is given away is not
                path.chmod(fresh.stat().st_mode & 0o666)
        if folder.exists():  # a folder with contents cannot be renamed over: move it away, delete it last
            old = fresh.with_name(fresh.name + ".old")
            folder.rename(old)
            fresh.rename(folder)
            shutil.rmtree(old)
        else:
            fresh.rename(folder)
    except SafetensorError as error:  # its writer's word for a full disk, among others
        raise OSError(f"{folder} is not written: {error}; make room, or choose another folder") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _refuse_others(folder: Path) -> None:
    """Refuse to replace what is no earlier export: a file, or a folder such as that of a run, with all it holds.

    Raises:
        ValueError: with what is there.
    """
    if not folder.exists():
        return
    there = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    strange = [path for path in there if path.is_dir() and path.name != "connector" and not path.name.startswith(".")]
    known = any(path.suffix in (".safetensors", ".bin") or path.name in EXPORTS for path in there)
    if strange or (there and not known) or not folder.is_dir():
        found = f"it holds {(strange or there)[0].name}" if folder.is_dir() else "it is a file"
        raise ValueError(f"{folder} is no exported folder ({found}) and would be replaced; name another, or delete it")


def _sweep(folder: Path) -> None:
    """Remove what killed processes left beside `folder`; what one of them had just moved away comes back."""
    ours = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}(\.old)?(\.gone)?")
    for left in sorted(path for path in folder.parent.iterdir() if ours.fullmatch(path.name)):
        if left.suffix == ".old" and not folder.exists():
            left.rename(folder)
            continue
        # Under another name first: a process that still writes there fails, and never renames half a folder.
        gone = left if left.suffix == ".gone" else left.rename(left.with_name(f"{left.name}.gone"))
        shutil.rmtree(gone, ignore_errors=True)


def is_whole(folder: Path, others: Sequence[str]) -> bool:
    """Whether an exported folder has its files of weights, each as long as its own header says, and the `others`."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    try:
        told = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
        weights = {*told} or {path.name for path in folder.glob("*.safetensors")}
        for name in weights:
            with safe_open(folder / name, framework="np"):
                pass
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return bool(weights) and all((folder / name).is_file() for name in others)


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload a folder to the Hub, in one commit; returns its address.

    Raises:
        ValueError: if the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model, processor, tokenizer and card")
    except Exception as error:  # the Hub client raises many kinds; all mean that nothing was uploaded
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{folder} is written, but cannot be uploaded to {repo}: {first}; see `hf auth login`, HF_ENDPOINT and "
            "HF_HUB_OFFLINE"
        ) from error
    return str(address)
