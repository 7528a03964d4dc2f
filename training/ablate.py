#!/usr/bin/env python
"""Train every arm of an ablation from the same stores, on the same data in the same order, and write one table.

    python training/ablate.py training/ablations/table3.yaml key=value ...      on one device
    composer training/ablate.py training/ablations/table3.yaml key=value ...    on all GPUs of this machine
    ray job submit --working-dir . -- training/ablate.py training/ablations/table3.yaml run=/shared/table3 --ray

Arms read only their own columns of the stores. Arms and seeds run one after another, with --ray as many at once as the
cluster has groups of GPUs; running the same command again goes on where it stopped. One that fails does not stop the
others (unless several processes do it together); it is named at the end. `--part 3/8` does the fourth eighth of them,
for a cluster without Ray; the last part writes the table.
The run folder gets <arm>/seed<n>/{pretrain,finetune,...}, table.json, table.md and report.html. They say which arms
differ, and which differences questions and seeds leave open.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from pipeline.config import load_config
from training.sweep.plan import AblationConfig, Run, asked, check_stores, open_benchmarks, part_of, plan_runs
from training.sweep.runs import do_runs, is_first_rank, refuse_others

if TYPE_CHECKING:
    from training.benchmarks.questions import Benchmark


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, e.g. training/ablations/table3.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. run=runs/mine seeds=[0,1,2]")
    parser.add_argument("--part", metavar="I/N", help="only the I-th of N parts of the runs, counted from 0")
    parser.add_argument("--ray", action="store_true", help="on a Ray cluster, or on one started on this machine")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="of each run, with --ray (default: 1 where there are any)"
    )
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(AblationConfig, arguments.config, arguments.settings)
        plan = plan_runs(config)
        mine = part_of(plan, arguments.part)
        benchmarks = open_benchmarks(config)  # what is missing is named now, not after days of training
        runs = plan if arguments.ray else mine
        check_stores(runs)
        refuse_others(runs)
        if arguments.ray:
            failed, where = _on_ray(arguments, plan, asked(config, benchmarks)), "in ablate.log of each"
        else:
            failed, where = do_runs(mine, benchmarks, config), "above"
        if failed:
            folders = ", ".join(str(run.folder) for run in failed)
            raise ValueError(
                f"{len(failed)} of {len(runs)} runs failed: {folders}; mend what is said {where} and run the same "
                "command again"
            )
        if is_first_rank():
            finish(config, plan, benchmarks)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _on_ray(arguments: argparse.Namespace, plan: list[Run], questions: str) -> list[Run]:
    """The runs as tasks; those that failed."""
    from training.sweep.on_ray import on_ray

    return on_ray([arguments.config, *arguments.settings], plan, arguments.gpus, questions)


def finish(config: AblationConfig, plan: list[Run], benchmarks: list[Benchmark]) -> None:
    """Write the table and its page, if every run is done."""
    from training.pages.ablation import ablation_page
    from training.release.records import write_whole
    from training.sweep.encoding import measure_encoding
    from training.sweep.table import as_text, build_table

    measure_encoding(config, plan)
    waiting = [run for run in plan if not run.has_answered(asked(config, benchmarks))]
    if waiting:
        print(f"{len(waiting)} of {len(plan)} runs are not done yet: {', '.join(str(run.folder) for run in waiting)}")
        return
    table, folder = build_table(config, plan, benchmarks), Path(config.run)
    table.write(folder)
    write_whole(folder / "table.md", as_text(table))
    images = None if config.images is None else Path(config.images)
    write_whole(folder / "report.html", ablation_page(folder, images))
    print(f"{as_text(table)}\n{folder / 'report.html'}")


if __name__ == "__main__":
    main()
