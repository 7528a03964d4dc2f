#!/usr/bin/env python
"""From training to files: `python training/export.py runs/finetune [--push NAME/REPO]`.

The folder that comes out is an ordinary Hugging Face model: weights, configuration, tokenizer, processor, the code that
runs them, and a card with the run's settings, losses and scores. A run that is not finished is taken from its newest
checkpoint. Every folder is written beside its final place and renamed, so one that exists is whole.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

if TYPE_CHECKING:
    import torch

    from pipeline.schema import StoreSpec
    from training.config import TrainConfig
    from training.model.connectors import Connector
    from training.model.model import CompactVisionForConditionalGeneration
    from training.model.tokenizer import Tokenizer

WEIGHTS, SHAPE = "connector.safetensors", "connector.json"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a training run: the setting `run` of training/train.py")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/model)")
    parser.add_argument("--checkpoint", type=Path, help="one of RUN/checkpoints, instead of the end or the newest")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as trained)")
    parser.add_argument("--scores", type=Path, nargs="*", default=[], help="for the card, beside RUN/*.scores.json")
    parser.add_argument(
        "--push", metavar="NAME/REPO", help="upload it to the Hugging Face Hub, as who is logged in there"
    )
    parser.add_argument("--private", action="store_true", help="with --push: a repository that only you see")
    arguments = parser.parse_args()
    if arguments.private and not arguments.push:
        parser.error("--private goes with --push")
    out = arguments.out or arguments.run / "model"
    try:
        export_run(arguments.run, out, arguments.checkpoint, arguments.dtype, arguments.scores)
        print(out)
        if arguments.push:
            print(push(out, arguments.push, arguments.private))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def export_run(
    run: Path, out: Path, checkpoint: Path | None = None, dtype: str | None = None, scores: Sequence[Path] = ()
) -> None:
    """Write the model that a training run has come to.

    Raises:
        ValueError: if there is no run, no checkpoint, or the parts do not fit. OSError: if one cannot be read.
    """
    import torch

    from pipeline.manifest import read_store
    from pipeline.storage import Storage
    from training.config import TrainConfig
    from training.fit.assemble import load_tokenizer

    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is no training run: it has no config.json; name the folder given as run=...")
    config = TrainConfig.model_validate_json((run / "config.json").read_text(encoding="utf-8"))
    store = read_store(Storage(config.data.store))
    model = _trained(config, store, run, checkpoint)
    target = None if dtype is None else getattr(torch, dtype)
    export_model(model, load_tokenizer(config), store, out, target, run, [*sorted(run.glob("*.scores.json")), *scores])


def _trained(
    config: TrainConfig, store: StoreSpec, run: Path, checkpoint: Path | None
) -> CompactVisionForConditionalGeneration:
    """The model at the end of a run, or at a checkpoint."""
    from training.fit.assemble import build_model
    from training.fit.lora import merge_lora
    from training.model.model import CompactVisionForConditionalGeneration

    finished = (run / "summary.json").is_file() and checkpoint is None
    if finished and "llm" in config.train:
        model: CompactVisionForConditionalGeneration = CompactVisionForConditionalGeneration.from_pretrained(
            run / "model"
        )
        model.llm.name_or_path = config.model.llm
        return model
    anew = config.model.model_copy(update={"connector_from": None})  # its weights are about to be replaced
    model = build_model(config.model_copy(update={"model": anew}), store)
    if finished:
        load_connector(model, run / "connector")
        return model
    path = checkpoint or _newest_checkpoint(run)
    state = _weights_of(path / "composer.pt" if path.is_dir() else path)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing, unused = model.load_state_dict(state, strict=False)
    lost = sorted(learning.intersection(missing))
    if lost or unused:
        raise ValueError(f"{path} is of another model: missing {lost or 'nothing'}, not used {unused or 'nothing'}")
    if config.model.lora is not None:
        merge_lora(model.llm)
    return model


def _newest_checkpoint(run: Path) -> Path:
    from training.checkpoints.checkpoint import newest_on_disk

    found = newest_on_disk(run / "checkpoints")
    if found is None:
        raise ValueError(f"{run} has neither finished nor saved a checkpoint yet")
    folder, mark = found
    if not mark.whole_file:
        raise ValueError(
            f"{folder} holds the shards of {mark.ranks} {mark.engine} ranks; let the run go on to its end: it exports"
        )
    return folder


def _weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's weights in a Composer checkpoint, unpickled without running anything that it names.

    Raises:
        ValueError: if it is none.
    """
    import datetime
    import pickle

    import numpy as np
    import torch
    from torch.torch_version import TorchVersion

    # What Composer keeps beside the weights: random states, durations, a version.
    plain: list[Any] = [np.ndarray, np.dtype, np.dtypes.UInt32DType, np.empty(0).__reduce__()[0], TorchVersion]
    try:
        with torch.serialization.safe_globals([*plain, datetime.timedelta]):
            state = torch.load(checkpoint, weights_only=True, mmap=True, map_location="cpu")["state"]["model"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"{checkpoint} is no checkpoint of training/train.py: {first}") from error
    return {name.removeprefix("model."): weight for name, weight in state.items()}


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


def export_connector(model: CompactVisionForConditionalGeneration, folder: Path) -> None:
    """Write the connector's weights and its shape: what stage 2 starts from."""
    from safetensors.torch import save_file

    with replaced_folder(folder) as target:
        weights = {name: weight.detach().cpu().contiguous() for name, weight in model.connector.state_dict().items()}
        save_file(weights, target / WEIGHTS)
        (target / SHAPE).write_text(json.dumps(asdict(model.connector.config), indent=1), encoding="utf-8")


def load_connector(target: Connector | CompactVisionForConditionalGeneration, folder: Path) -> None:
    """Load the weights that `export_connector` wrote.

    Raises:
        ValueError: if there are none, or the connector has another shape, naming each difference.
    """
    from safetensors.torch import load_file

    from training.model.connectors import Connector, ConnectorConfig

    connector = target if isinstance(target, Connector) else target.connector
    if not (folder / WEIGHTS).is_file() or not (folder / SHAPE).is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS} with its {SHAPE}; stage 1 writes them to its run's connector/")
    theirs = asdict(ConnectorConfig(**json.loads((folder / SHAPE).read_text(encoding="utf-8"))))
    mine = asdict(connector.config)
    differing = [f"{name}: {theirs[name]} there, {mine[name]} here" for name in mine if theirs[name] != mine[name]]
    if differing:
        raise ValueError(f"{folder} holds another connector: " + "; ".join(differing))
    connector.load_state_dict(load_file(folder / WEIGHTS))


def export_model(
    model: CompactVisionForConditionalGeneration,
    tokenizer: Tokenizer,
    store: StoreSpec,
    folder: Path,
    dtype: torch.dtype | None = None,
    run: Path | None = None,
    scores: Sequence[Path] = (),
) -> None:
    """Write a folder from which transformers loads the whole model, the store's own vision encoder included.

    Args:
        model: as trained; it is left as it is.
        tokenizer: of the language model.
        store: says which encoder made the features and how images became square.
        folder: replaced if it exists.
        dtype: of the weights; None keeps each part's own.
        run: the training run's folder, whose settings and losses go into the card. scores: files for it too.

    Raises:
        ValueError: if a file of scores is none. OSError: if the vision encoder cannot be read.
    """
    from transformers import CLIPVisionModel

    from training.model.model import CompactVisionForConditionalGeneration
    from training.release.card import model_card, store_facts

    local = Path(store.encoder.id).is_dir()  # its revision is then a digest, which no Hub knows
    tower = CLIPVisionModel.from_pretrained(
        store.encoder.id, revision=None if local else store.encoder.revision, dtype=dtype or model.llm.dtype
    )
    whole = CompactVisionForConditionalGeneration.from_parts(model.llm, model.connector, tower, aspect=store.aspect)
    write_model(whole, tokenizer, folder, model_card(whole, store_facts(store), run, scores), dtype)


def write_model(
    whole: CompactVisionForConditionalGeneration,
    tokenizer: Tokenizer,
    folder: Path,
    card: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a whole model with its processor, tokenizer, generation settings, code and card."""
    from transformers import GenerationConfig

    from training.model.processor import CompactVisionImageProcessor, CompactVisionProcessor, CompactVisionTokenizer

    assert whole.vision_tower is not None, "a model that is written sees"
    text = CompactVisionTokenizer(
        str(tokenizer.model_file), legacy=tokenizer.legacy, image_token_id=whole.config.image_token_id
    )
    images = CompactVisionImageProcessor(whole.config.aspect, whole.vision_tower.config.image_size)
    processor = CompactVisionProcessor(images, text, image_tokens=whole.config.image_tokens)
    whole.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    state: dict[str, Any] | None = None
    if dtype is not None:
        whole.config.dtype = dtype
        state = {name: weight.to(dtype) for name, weight in whole.state_dict().items()}
    with replaced_folder(folder) as target:
        processor.save_pretrained(target)
        whole.save_pretrained(target, state_dict=state)
        (target / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which becomes `folder` at the end, or nothing at all if writing fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    fresh.mkdir()
    try:
        yield fresh
        if folder.exists():
            old = fresh.with_name(fresh.name + ".old")
            folder.rename(old)
            fresh.rename(folder)
            shutil.rmtree(old)
        else:
            fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


if __name__ == "__main__":
    main()
