"""The stream under Composer: killed with SIGKILL in the middle of an epoch and resumed, also on another rank count.

Ranks are forked from a process that has imported Composer already, with the variables that its launcher sets.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from training.stream.batch import Batch, split
from training.stream.order import Order
from training.stream.reader import Reading
from training.stream.source import Source
from training.stream.stream import Stream
from training.text.collate import Example

if TYPE_CHECKING:
    from composer import Callback
    from composer.loggers import LoggerDestination
    from composer.models import ComposerModel

BATCHES = 5  # per epoch
Become = Callable[[int, int, int, Path], None]


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """What a regression learns: how much text there is."""
    words = [sum(len(turn.value) for turn in example.conversation.turns) for example in examples]
    return {"labels": torch.tensor(words, dtype=torch.float32)[:, None] / 100}


def regression() -> ComposerModel:
    """From features to `labels`, with weights from a seed."""
    from composer.models import ComposerModel

    class Model(ComposerModel):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

        def forward(self, batch):
            return self.layers(batch["columns"]["block03"].float() / 255)

        def loss(self, outputs, batch):
            return torch.nn.functional.mse_loss(outputs, batch["labels"])

    return Model()


def log_and_kill(log: Path | None, kill_at: int) -> tuple[LoggerDestination, Callback]:
    """What writes each step's loss to `log`, if there is one, and what kills its process at step `kill_at`."""
    from composer import Callback
    from composer.loggers import LoggerDestination

    class Log(LoggerDestination):
        def log_metrics(self, metrics, step=None):
            if "loss/train/total" in metrics and log is not None:
                with log.open("a") as file:
                    file.write(json.dumps([step, metrics["loss/train/total"]]) + "\n")

    class Kill(Callback):
        def batch_start(self, state, logger):
            if state.timestamp.batch.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    return Log(), Kill()


def run_rank(
    become_rank: Become,
    rank: int,
    ranks: int,
    port: int,
    store: Path,
    run: Path,
    kill_at: int,
    interval: str,
    patience_s: int,
) -> None:
    """One process of a Composer run over `store`; at step `kill_at` it is killed."""
    become_rank(rank, ranks, port, run / "output")

    from composer import DataSpec, Trainer
    from composer.utils import dist
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    dist.initialize_dist("cpu", timeout=patience_s)
    order = Order(global_batch_size=8, window_shards=2, seed=4)
    stream = Stream([Source(str(store))], ("block03",), order, Reading(rank=rank, world_size=ranks, threads=2), collate)
    loader = DataLoader(stream, batch_size=None, num_workers=0, collate_fn=lambda batch: batch)
    model = regression()
    log, kill = log_and_kill(run / "log" if rank == 0 else None, kill_at)
    Trainer(
        model=model, optimizers=torch.optim.Adam(model.parameters(), lr=0.01), max_duration="3ep",
        train_dataloader=DataSpec(loader, split_batch=split, microbatch_transforms=Batch,
                                  get_num_samples_in_batch=lambda batch: len(batch["keys"])),
        device_train_microbatch_size=2, callbacks=[kill], loggers=[log], device="cpu", precision="fp32", seed=1,
        save_folder=str(run / "checkpoints"), save_interval=interval, save_num_checkpoints_to_keep=3, autoresume=True,
        save_overwrite=True, run_name="run", progress_bar=False,
    ).fit()  # fmt: skip


@pytest.fixture(scope="module")
def store(make_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 conversations about 21 images."""
    return make_store(tmp_path_factory.mktemp("store"), [9, 4, 8])


Train = Callable[..., int]


@pytest.fixture(scope="module")
def train(
    fork: ForkServerContext,
    free_port: Callable[[], int],
    become_rank: Become,
    ended: Callable[..., list[int]],
    hang_s: int,
    store: Path,
) -> Train:
    """train(run, ranks, kill_at, interval): 0, or the exit code of a process that failed; output goes to `run`."""

    def start(run: Path, ranks: int, kill_at: int = -1, interval: str = "1ba") -> int:
        run.mkdir(exist_ok=True)
        port = free_port()
        common = (ranks, port, store, run, kill_at, interval, hang_s)
        processes = [fork.Process(target=run_rank, args=(become_rank, rank, *common)) for rank in range(ranks)]
        for process in processes:
            process.start()
        codes = ended(processes, expected=0 if kill_at < 0 else -signal.SIGKILL)
        return next((code for code in codes if code), 0)

    return start


def losses(run: Path) -> dict[int, float]:
    """Step -> loss; what a resumed run repeated counts as it was repeated."""
    return dict(json.loads(line) for line in (run / "log").read_text().splitlines())


@pytest.fixture(scope="module")
def undisturbed(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    run = tmp_path_factory.mktemp("undisturbed")
    assert train(run, 2) == 0, (run / "output").read_text()[-3000:]
    assert len(losses(run)) == 3 * BATCHES
    return losses(run)


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_has_the_losses_of_an_undisturbed_one(
    train: Train, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    assert train(two, 2, kill_at=BATCHES + 2) == -signal.SIGKILL
    assert max(losses(two)) == BATCHES + 1
    shutil.copytree(two, one)
    assert train(two, 2) == 0, (two / "output").read_text()[-3000:]
    assert losses(two) == undisturbed  # to the last bit
    assert train(one, 1) == 0, (one / "output").read_text()[-3000:]
    assert losses(one) == pytest.approx(undisturbed, rel=1e-5)  # sums in another order


@pytest.mark.parametrize("interval", ["1ba", pytest.param("1ep", marks=pytest.mark.slow)])
def test_a_run_killed_between_two_epochs_goes_on_with_the_next(
    train: Train, undisturbed: dict[int, float], tmp_path: Path, interval: str
) -> None:
    assert train(tmp_path, 1, kill_at=2 * BATCHES, interval=interval) == -signal.SIGKILL
    assert train(tmp_path, 1, interval=interval) == 0, (tmp_path / "output").read_text()[-3000:]
    assert losses(tmp_path) == pytest.approx(undisturbed, rel=1e-5)
    assert (tmp_path / "log").read_text().count("\n") == 3 * BATCHES  # no step was taken twice
