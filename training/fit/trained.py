"""What a run has come to: the model at its end, or at a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.release.card import CardFiles
from training.release.connector import load_connector
from training.release.folder import export_model
from training.release.records import read_config

if TYPE_CHECKING:
    import torch

    from pipeline.schema import StoreSpec
    from training.config import TrainConfig
    from training.model.model import CompactVisionForConditionalGeneration


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
    from training.fit.build import load_tokenizer

    config = read_config(run)
    store = read_store(Storage(config.data.store))
    model = trained_model(config, store, run, checkpoint)
    target = None if dtype is None else getattr(torch, dtype)
    files = CardFiles(run, [*sorted(run.glob("*.scores.json")), *scores])
    export_model(model, load_tokenizer(config), store, out, target, files)


def trained_model(
    config: TrainConfig, store: StoreSpec, run: Path, checkpoint: Path | None
) -> CompactVisionForConditionalGeneration:
    """The model at the end of a run, or at a checkpoint.

    A finished stage 2 has exported its model whole. A finished stage 1 has exported its connector, an unfinished run
    has checkpoints of what learns: the rest is then built as for training.
    """
    from training.fit.build import build_model
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
        load_connector(model.connector, run / "connector")
        return model
    path = checkpoint or _newest_checkpoint(run)
    state = _weights_of(path / "composer.pt" if path.is_dir() else path)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing, unused = model.load_state_dict(state, strict=False)
    lost = sorted(learning.intersection(missing))
    if lost or unused:
        raise ValueError(
            f"{path} is of another model: missing {lost or 'nothing'}, not used {unused or 'nothing'}; name a "
            f"checkpoint of {run}"
        )
    if config.model.lora is not None:
        merge_lora(model.llm)
    return model


def _newest_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run, if its one file has all weights that learn."""
    from training.checkpoints.checkpoint import newest_on_disk

    found = newest_on_disk(run / "checkpoints")
    if found is None:
        raise ValueError(f"{run} has neither finished nor saved a checkpoint yet; let it train on to one of them")
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
        raise ValueError(
            f"{checkpoint} is no checkpoint of training/train.py: {first}; name a folder of RUN/checkpoints"
        ) from error
    return {name.removeprefix("model."): weight for name, weight in state.items()}
