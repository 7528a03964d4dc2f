"""An engine is one file and one line: a toy one trains, saves, stops, resumes and exports."""

from __future__ import annotations

import ast
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipeline.config import ConfigError, load_config
from training.config import ENGINES, TrainConfig
from training.engines import engine_class, engine_of

ROOT = Path(__file__).resolve().parents[2]
TOY = '''
import json
import os
import signal

from training.cost.memory import Held
from training.engines.base import Engine


class Toy(Engine):
    """Counts its steps, and asks for a stop after the third."""

    any_ranks = False
    steps = 0

    @classmethod
    def check(cls, config):
        if config.loss == "microbatch":
            raise ValueError("loss microbatch with parallelism toy: a toy has no microbatches; use loss=global")

    def trainer(self, left_out, settings):
        from composer import Trainer

        path = settings["load_path"]
        if path is not None:
            with open(os.path.join(os.path.dirname(path), "toy.json")) as file:
                self.steps = json.load(file)["steps"]
        return Trainer(precision="fp32", **settings)

    def memory(self, shape):
        return Held(weights=4.0 * shape.learning, gradients=1.0, optimizer=2.0)

    def clip_gradients(self, state):
        super().clip_gradients(state)
        self.steps += 1
        if self.steps == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    def save(self, state, folder):
        (folder / "toy.json").write_text(json.dumps({"steps": self.steps}))
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and the line."""
    (tmp_path / "toy_engine.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(ENGINES, "toy", "toy_engine:Toy")


@pytest.fixture
def signals() -> Iterator[None]:
    """The process's own handlers come back: a run replaces them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("toy", "signals")
def test_a_new_engine_trains_saves_stops_and_resumes(tmp_path: Path, settings: Callable[..., Any]) -> None:
    from training.checkpoints.resume import newest_on_disk
    from training.fit.stage import train
    from training.release.records import read_log

    def config(name: str) -> TrainConfig:
        changes = {"parallelism": name, "steps": 5, "checkpoint.interval": "100ba"}
        return TrainConfig.model_validate(settings(tmp_path / name, 1, changes))

    with pytest.raises(SystemExit) as stopped:
        train(config("toy"))
    assert stopped.value.code == 128 + signal.SIGUSR1
    found = newest_on_disk(tmp_path / "toy" / "checkpoints")
    assert found is not None
    folder, mark = found
    assert (mark.step, mark.engine) == (3, "toy")
    assert json.loads((folder / "toy.json").read_text()) == {"steps": 3}
    assert "toy.json" in mark.files
    train(config("toy"))
    train(config("ddp"))
    toy, ddp = (read_log(tmp_path / name) for name in ("toy", "ddp"))
    assert [line["step"] for line in toy] == [1, 2, 3, 4, 5]
    for name in ("loss", "grad_norm", "lr"):
        assert [line[name] for line in toy] == [line[name] for line in ddp]
    weights = [load_file(tmp_path / name / "connector" / "connector.safetensors") for name in ("toy", "ddp")]
    assert all(weight.equal(weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.usefixtures("toy")
def test_a_new_engine_is_known_by_its_name_and_its_refusals(tmp_path: Path, settings: Callable[..., Any]) -> None:
    from training.checkpoints.mark import Mark
    from training.checkpoints.resume import check_engine

    config = TrainConfig.model_validate(settings(tmp_path, 1, {"parallelism": "toy"}))
    with pytest.raises(ConfigError, match="a toy has no microbatches"):
        load_config(TrainConfig, ROOT / "training" / "pretrain.yaml", ["parallelism=toy", "loss=microbatch"])
    with pytest.raises(ValueError, match=r"saved by toy on 3 ranks, this run is toy on 2; .*start 3"):
        check_engine(tmp_path, Mark(1, "toy", 3, "composer.pt", {}), engine_of(config, 2))
    with pytest.raises(ValueError, match="saved by ddp on 2 ranks, this run is toy on 2; say parallelism=ddp"):
        check_engine(tmp_path, Mark(1, "ddp", 2, "composer.pt", {}), engine_of(config, 2))


def test_no_file_outside_engines_asks_which_engine_it_is() -> None:
    for path in sorted((ROOT / "training").rglob("*.py")):
        if path.parent.name == "engines" or path.name == "config.py":
            continue
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not words & ENGINES.keys(), path


def test_an_unknown_engine_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'zero\d'\? \(found 'zero4', from the command line\)"):
        load_config(TrainConfig, ROOT / "training" / "pretrain.yaml", ["parallelism=zero4"])
    with pytest.raises(ValueError, match="no engine is called 'gone'"):
        engine_class("gone")
