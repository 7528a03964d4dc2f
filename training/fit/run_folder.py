"""The folder of a run: whose it is when a stage begins, and what lies in it when the stage is complete."""

from __future__ import annotations

import json
from pathlib import Path

from composer.core import State
from composer.utils import dist

from pipeline.config import differences
from training.config import TrainConfig
from training.engines.base import Engine
from training.fit.build import is_exported, whole_model
from training.fit.parts import Parts
from training.release.card import CardFiles
from training.release.connector import export_connector
from training.release.folder import export_model
from training.release.records import final_loss, read_log


def claim(config: TrainConfig, write: bool) -> None:
    """A run folder belongs to one configuration: say what differs instead of mixing two runs. A collective.

    Raises:
        ValueError: if the folder holds another run.
    """
    path = Path(config.run) / "config.json"
    now = config.model_dump(mode="json")
    if path.exists():
        differing = differences(json.loads(path.read_text(encoding="utf-8")), now)
        if differing:
            raise ValueError(
                f"{config.run} holds a run with other settings; take another run=..., or delete it:\n  "
                + "\n  ".join(differing)
            )
    dist.barrier()  # all have read before it is written
    if write and dist.get_global_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1), encoding="utf-8")


def what_it_holds(config: TrainConfig) -> str | None:
    """Of a complete run what its folder holds, for a person; None if anything of its end is missing. A collective."""
    found = None
    run = Path(config.run)
    parts = ["connector", "model"] if "llm" in config.train else ["connector"]
    if dist.get_global_rank() == 0 and (run / "summary.json").is_file() and all((run / p).is_dir() for p in parts):
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        found = (
            f"complete  {run} holds {' and '.join(f'{part}/' for part in parts)} of {summary['steps']} steps, loss "
            f"{summary['loss_first']:.4f} -> {summary['loss_last']:.4f}; nothing is left to do"
        )
    return dist.all_gather_object(found)[0]  # type: ignore[no-any-return]


def finish(config: TrainConfig, parts: Parts, engine: Engine, state: State, steps: int) -> None:
    """Write what the next stage needs, then `summary.json`: its presence says that the stage is complete.

    A collective, as the ranks may hold parts of the weights; rank 0 writes.
    """
    # Every rank takes part, weight by weight; only rank 0 keeps them.
    weights = engine.whole_weights(state, lambda name: is_exported(config, name))
    if dist.get_global_rank() != 0:
        return
    run = Path(config.run)
    whole = whole_model(config, parts.model, weights)
    export_connector(whole.connector, run / "connector")
    if "llm" in config.train:
        export_model(whole, parts.tokenizer, parts.store, run / "model", files=CardFiles(run))
    lines = read_log(run)
    seconds = sum(line["step_s"] for line in lines)
    summary = {
        "steps": steps,
        "loss_first": lines[0]["loss"],
        "loss_last": final_loss(lines),
        "seconds": round(seconds, 2),
        "data_wait": sum(line["data_wait"] * line["step_s"] for line in lines) / seconds,  # share of all steps' time
        "vision_tokens_in": parts.store.encoder.grid**2,
        "vision_tokens_out": parts.model.connector.tokens,
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print(f"done      loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f}; weights in {run}", flush=True)
