"""Slow ranks are named: all wait for the slowest in every step, and no rank's step time tells which one that is."""

from __future__ import annotations

import logging
import os
import statistics
import time

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from training.stream.stream import Stream

log = logging.getLogger(__name__)

EVERY = 50  # steps between two looks
SLOW = 4.0  # times the median of all ranks
LEAST_S = 0.02  # a difference that matters


class SlowRanks(Callback):  # type: ignore[misc]
    """Measures, every `EVERY` steps, a small matrix product and the wait for data on each rank, and names outliers.

    Training goes on: whether a node is to be taken out is for its owner to say.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._waited = 0.0  # s, since the last look

    def batch_start(self, state: State, logger: Logger) -> None:
        """Sum up the waits; look, if it is time and there is more than one rank."""
        self._waited += self._stream.data_wait
        if dist.get_world_size() == 1 or state.timestamp.batch.value % EVERY != EVERY - 1:
            return
        device = next(iter(state.batch["columns"].values())).device
        mine = (os.uname().nodename, _product_s(device), self._waited / EVERY)
        self._waited = 0.0
        for line in outliers(dist.all_gather_object(mine)):
            if dist.get_global_rank() == 0:
                log.warning("step %d: %s; the others wait for it", state.timestamp.batch.value, line)


def outliers(ranks: list[tuple[str, float, float]]) -> list[str]:
    """A line for each rank that takes many times what the others take.

    Args:
        ranks: (host, seconds of a matrix product, seconds per step waited for data) of each.
    """
    lines = []
    for what, seconds in (("computes", [rank[1] for rank in ranks]), ("waits for data", [rank[2] for rank in ranks])):
        usual = statistics.median_low(seconds)
        lines += [
            f"rank {number} (host {ranks[number][0]}) {what} {1e3 * taken:.0f} ms where the usual rank takes "
            f"{1e3 * usual:.0f} ms"
            for number, taken in enumerate(seconds)
            if taken > max(SLOW * usual, usual + LEAST_S)
        ]
    return lines


def _product_s(device: torch.device) -> float:
    """Seconds that this rank takes for some matrix products, its device being idle before. Draws no random number."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    matrix @ matrix  # the first one may have to load its kernel
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(5):
        matrix @ matrix
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
