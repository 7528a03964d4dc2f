#!/usr/bin/env python
"""One self-contained HTML page of a run or an ablation: `python training/report.py runs/demo --images DIR`.

Reads files only: of a run its summary.json, logs and answers, of an ablation its table.json and what that names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from training.pages.page import EXAMPLES
from training.release.records import write_whole


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run (summary.json) or of an ablation (table.json)")
    parser.add_argument("--images", type=Path, help="folder that the questions' images are relative to")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="questions to show")
    arguments = parser.parse_args()
    if arguments.examples < 0:
        parser.error(f"--examples is at least 0; found {arguments.examples}")
    try:
        page = render(arguments.run, arguments.images, arguments.examples)
        write_whole(arguments.run / "report.html", page)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(arguments.run / "report.html")


def render(folder: Path, images: Path | None, examples: int) -> str:
    """The page of the run or the ablation in `folder`, with this many examples.

    Raises:
        ValueError: if it holds neither a run nor an ablation, or the images of a run are not named.
    """
    from training.pages.ablation import ablation_page
    from training.pages.page import TITLES
    from training.pages.run import run_page
    from training.release.records import LOG

    if (folder / "table.json").exists():
        return ablation_page(folder, images, examples)
    if not (folder / "summary.json").exists():
        raise ValueError(f"{folder} holds no summary.json or table.json; run the demo, or name another folder")
    stages = [stage for stage in TITLES if not (folder / stage / LOG).exists()]
    if stages:
        raise ValueError(f"{folder} has no {stages[0]}/{LOG}; name the folder that training/demo.py wrote")
    if images is None:
        raise ValueError(f"{folder} is a run: say --images DIR, the folder that its questions' images are relative to")
    return run_page(folder, images, examples)


if __name__ == "__main__":
    main()
