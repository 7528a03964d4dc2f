#!/usr/bin/env python
"""From training to files: `python training/export.py runs/finetune [--push NAME/REPO]`.

The folder that comes out is an ordinary Hugging Face model: weights, configuration, tokenizer, processor, the code that
runs them, and a card with the run's settings, losses and scores. A run that is not finished is taken from its newest
checkpoint, whatever engine and number of ranks wrote it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a training run: the setting `run` of training/train.py")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/model, with --best RUN/best)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", type=Path, help="one of RUN/checkpoints, instead of the end or the newest")
    which.add_argument(
        "--best", action="store_true", help="the checkpoint with the lowest held-out loss (checkpoint.keep_best)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as trained)")
    parser.add_argument("--scores", type=Path, nargs="*", default=[], help="for the card, beside RUN/*.scores.json")
    parser.add_argument(
        "--push", metavar="NAME/REPO", help="upload it to the Hugging Face Hub, as who is logged in there"
    )
    parser.add_argument("--private", action="store_true", help="with --push: a repository that only you see")
    arguments = parser.parse_args()
    if arguments.private and not arguments.push:
        parser.error("--private goes with --push")
    out = arguments.out or arguments.run / ("best" if arguments.best else "model")
    from training.fit.trained import best_checkpoint, export_run
    from training.release.folder import push

    try:
        checkpoint = best_checkpoint(arguments.run) if arguments.best else arguments.checkpoint
        export_run(arguments.run, out, checkpoint, arguments.dtype, arguments.scores)
        print(out)
        if arguments.push:
            print(push(out, arguments.push, arguments.private))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
