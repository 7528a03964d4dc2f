"""What a run has come to: the model at its end, or at a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.release.card import CardFiles
from training.release.connector import export_connector, load_connector
from training.release.folder import export_model
from training.release.records import SUMMARY, HeldOut, Summary, read_as, read_config, records

if TYPE_CHECKING:
    import torch

    from pipeline.schema import StoreSpec
    from training.config import TrainConfig
    from training.model.model import CompactVisionForConditionalGeneration


def export_run(
    run: Path, out: Path, checkpoint: Path | None = None, dtype: str | None = None, scores: Sequence[Path] = ()
) -> None:
    """Write the model that a training run has come to; of a checkpoint of stage 1 also `connector/`, for stage 2.

    Raises:
        ValueError: if there is no run, no checkpoint, or the parts do not fit. OSError: if one cannot be read.
    """
    import torch

    from pipeline.manifest import read_store
    from pipeline.storage import Storage
    from training.checkpoints.mark import FOLDER
    from training.fit.build import load_tokenizer

    config = read_config(run)
    stores = [read_store(Storage(entry.store)) for entry in config.data.mixture]
    model = trained_model(config, stores[0], run, checkpoint)
    target = None if dtype is None else getattr(torch, dtype)
    # Scores beside the run are of the model at its end.
    beside, at = ([], FOLDER.fullmatch(checkpoint.name)) if checkpoint else (sorted(run.glob("*.scores.json")), None)
    files = CardFiles(run, [*beside, *scores], int(at[1]) if at else None)
    export_model(model, load_tokenizer(config), stores, out, target, files)
    if checkpoint is not None and "llm" not in config.train:  # what stage 2 starts from: the end of a run has it
        export_connector(model.connector, out / "connector", records(run, files.step))


def best_checkpoint(run: Path) -> Path:
    """The checkpoint of a run with the lowest loss on held-out examples; says which that is.

    Raises:
        ValueError: if nothing was measured, or that checkpoint was not kept. OSError: if none is sound.
    """
    from training.checkpoints.history import History
    from training.checkpoints.mark import folder_of, read_mark
    from training.checkpoints.resume import newest_on_disk

    config, folder, history = read_config(run), run / "checkpoints", History()
    summary = read_as(Summary, run / SUMMARY).heldout if (run / SUMMARY).is_file() else None
    newest = newest_on_disk(folder) if summary is None else None
    if newest is not None:
        history.take_up(newest[0])
    best = summary or HeldOut.of(history)
    if best is None or best.best_step is None:
        raise ValueError(
            f"{run} has no evaluation on held-out examples in {folder}, so no checkpoint is the best; train with "
            "data.validation and checkpoint.keep_best=true, or name one with --checkpoint"
        )
    found = folder / folder_of(best.best_step)
    if read_mark(found) is None:
        there = config.checkpoint.remote or "the disk that it was saved on"
        raise ValueError(
            f"the best of {run} is step {best.best_step}, with a held-out loss of {best.best:.4f}, and {found} is not "
            f"here: fetch it from {there}; without checkpoint.keep_best it was not kept"
        )
    print(f"best      step {best.best_step}, held-out loss {best.best:.4f}", file=sys.stderr)
    return found


def trained_model(
    config: TrainConfig, store: StoreSpec, run: Path, checkpoint: Path | None
) -> CompactVisionForConditionalGeneration:
    """The model at the end of a run, or at a checkpoint.

    A finished stage 2 has exported its model whole. A finished stage 1 has exported its connector, an unfinished run
    has checkpoints of what learns: the rest is then built as for training.
    """
    from training.fit.build import build_model
    from training.fit.lora import merge_lora
    from training.model.exported import exported_model

    finished = (run / "summary.json").is_file() and checkpoint is None
    if finished and "llm" in config.train and (run / "model").is_dir():
        model = exported_model(run / "model")
        model.llm.name_or_path = config.model.llm
        return model
    anew = config.model.model_copy(update={"connector_from": None})  # its weights are about to be replaced
    model = build_model(config.model_copy(update={"model": anew}), store)
    if finished and "llm" not in config.train and (run / "connector").is_dir():
        load_connector(model.connector, run / "connector")
        return model
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing, unused = model.load_state_dict(_weights_of(config, run, checkpoint), strict=False)
    lost = sorted(learning.intersection(missing))
    if lost or unused:
        raise ValueError(
            f"{checkpoint or run} is of another model: missing {lost or 'nothing'}, not used {unused or 'nothing'}; "
            f"name a checkpoint of {run}"
        )
    if config.model.lora is not None:
        merge_lora(model.llm)
    return model


def _weights_of(config: TrainConfig, run: Path, checkpoint: Path | None) -> dict[str, torch.Tensor]:
    """The weights that learn in a checkpoint of any engine, read by one process; nothing that it names is run.

    Args:
        config: of the run.
        run: whose newest sound checkpoint is read, if none is named.
        checkpoint: a folder, or a composer.pt that holds whole weights.

    Raises:
        ValueError: if there is none, or it holds no weights. OSError: if it cannot be read.
    """
    import pickle

    from training.checkpoints.safe import only_data, refuse_code
    from training.engines import engine_class

    folder, load, engine = _chosen(config, run, checkpoint)
    if checkpoint is None or checkpoint.is_dir():
        refuse_code(folder, engine)
    try:
        with only_data(engine):
            return engine_class(engine).saved_weights(folder, load)
    except (pickle.UnpicklingError, RuntimeError, LookupError, TypeError, AttributeError, EOFError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"{folder / load} is no checkpoint of training/train.py from which {engine} can put the weights together: "
            f"{first}; name another folder of {run}/checkpoints, or start the run's own command again: its end exports"
        ) from error


def _chosen(config: TrainConfig, run: Path, checkpoint: Path | None) -> tuple[Path, str, str]:
    """Folder, what is loaded of it, and engine, of the checkpoint that is named, or of the newest sound one."""
    from training.checkpoints.mark import flaws, read_mark
    from training.checkpoints.resume import newest_on_disk
    from training.engines import engine_of

    if checkpoint is None:
        found = newest_on_disk(run / "checkpoints")
        if found is None:
            raise ValueError(
                f"{run} has neither finished nor saved a checkpoint yet; let it train on to one of them, or fetch one "
                f"from its bucket into {run}/checkpoints"
            )
        return found[0], found[1].load, found[1].engine
    if checkpoint.is_file():
        return checkpoint.parent, checkpoint.name, engine_of(config, ranks=1).name
    mark = read_mark(checkpoint)
    bad = {"complete.json": "is missing or damaged"} if mark is None else flaws(checkpoint, mark)
    if mark is None or bad:
        name, what = next(iter(bad.items()))
        raise ValueError(f"{checkpoint} is no sound checkpoint: {name} {what}; name another of {run}/checkpoints")
    return checkpoint, mark.load, mark.engine
