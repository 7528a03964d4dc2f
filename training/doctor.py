#!/usr/bin/env python
"""Is everything ready for a run? One line for each question: ok, warn or fail, with what to do about it.

    python training/doctor.py training/finetune.yaml data.store=...           # only this process
    composer -n 8 training/doctor.py training/finetune.yaml data.store=...    # every rank, and the links between them

Nothing is trained or kept; files that are written as a trial are removed. Without a CONFIG only the machine is looked
at. Exit code 1 if anything fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from pipeline.config import ConfigError, load_config
from training.checkup.examine import examine
from training.config import TrainConfig
from training.fit.finding import Finding, ThisRank


def main() -> int:
    """Command line: [CONFIG.yaml] key=value ..."""
    parser = argparse.ArgumentParser(
        prog="python training/doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="YAML file of the run, e.g. training/finetune.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. data.store=s3://bucket/store")
    parser.add_argument("--ranks", type=int, metavar="N", help="reckon with N ranks (default: those that run)")
    arguments = parser.parse_intermixed_args()
    if arguments.ranks is not None and arguments.ranks < 1:
        parser.error(f"--ranks {arguments.ranks}: a run has at least one")
    if arguments.config is not None and "=" in arguments.config:
        parser.error(f"settings such as {arguments.config} need a CONFIG before them; give training/finetune.yaml, say")
    try:
        config = None if arguments.config is None else load_config(TrainConfig, arguments.config, arguments.settings)
    except ConfigError as error:
        print(Finding("fail", "configuration", str(error)))
        return 1
    try:
        rank = ThisRank.of_environment(arguments.ranks)
    except ValueError as error:
        print(Finding("fail", "ranks", str(error)))
        return 1
    findings = examine(config, rank)
    if rank.rank == 0:
        for finding in findings:
            print(finding)
        counts = {level: sum(finding.level == level for finding in findings) for level in ("ok", "warn", "fail")}
        print(", ".join(f"{count} {level}" for level, count in counts.items()), flush=True)
    # Rank 0 fails for all: a launcher would end it before it has told, if another failed first.
    return int(rank.rank == 0 and any(finding.level == "fail" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
