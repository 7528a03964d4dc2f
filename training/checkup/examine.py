"""Every question on every rank, and the answers of all ranks put together on the first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from training.checkup.machine import WAIT_S, gpus, links, meet, shared_memory, unreached, versions
from training.checkup.run import of_run
from training.config import TrainConfig
from training.fit.finding import Finding, ThisRank, run_check

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]


def examine(config: TrainConfig | None, rank: ThisRank) -> list[Finding]:
    """Every finding: on rank 0 those of all ranks that differ, on the others their own.

    Args:
        config: of the run; None looks at the machine only.
        rank: who we are.
    """
    found = run_check("versions", versions) + run_check("gpus", lambda: gpus(config, rank))
    store: TCPStore | None = None
    if rank.size == 1:
        found.append(Finding("ok", "links", "one rank; start me with `composer -n N` to try the links between ranks"))
    else:
        try:
            store = meet(rank)
        except (ValueError, OSError, RuntimeError) as error:
            found.append(unreached(rank, error))
    if store is not None:
        meeting = store  # a name that is never None, for the lambda
        found += run_check("links", lambda: links(config, rank, meeting))
    found += run_check("shared memory", shared_memory)
    if config is not None:
        found += of_run(config, rank)
    return found if store is None else _gather(found, rank, store)


def _gather(mine: Sequence[Finding], rank: ThisRank, store: TCPStore) -> list[Finding]:
    """Every rank's findings, on rank 0. They go through the store: a collective fails where links are broken."""
    store.set(f"rank {rank.rank}", json.dumps([asdict(finding) for finding in mine]))
    if rank.rank > 0:
        return list(mine)
    everyone = []
    for other in range(rank.size):
        try:
            everyone.append([Finding(**finding) for finding in json.loads(store.get(f"rank {other}"))])
        except RuntimeError:
            text = f"nothing was heard of it within {WAIT_S} s; look at its output"
            everyone.append([Finding("fail", "links", text)])
    return together(everyone)


def together(everyone: Sequence[Sequence[Finding]]) -> list[Finding]:
    """The first rank's findings, what is wrong on other ranks only, and what differs though it should not."""
    merged = list(everyone[0])
    for rank, findings in enumerate(everyone[1:], start=1):
        for finding in findings:
            if finding in everyone[0]:
                continue
            if finding.level != "ok":
                merged.append(Finding(finding.level, finding.check, f"rank {rank}: {finding.text}"))
            elif finding.check in ("versions", "store"):
                merged.append(Finding("fail", finding.check, f"rank {rank} differs from rank 0: {finding.text}"))
    return merged
