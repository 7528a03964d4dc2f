#!/usr/bin/env python
"""Train one stage: `composer training/train.py training/finetune.yaml key=value ...`.

`training/fit/stage.py` is the table of contents of what happens then.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Run as a file, or from a YAML file beside it, Python looks in this folder first.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root

from pipeline.config import ConfigError, load_config
from training.config import TrainConfig


def main(config_file: str | None = None) -> None:
    """Command line: CONFIG.yaml key=value ...; a YAML file that starts itself passes its own path."""
    parser = argparse.ArgumentParser(prog="composer training/train.py", description=__doc__)
    if config_file is None:
        parser.add_argument("config", help="YAML file, e.g. training/finetune.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. data.store=s3://bucket/store steps=100")
    parser.add_argument("--check", action="store_true", help="say what would be trained, on what, and stop")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(TrainConfig, config_file or arguments.config, arguments.settings)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    from training.fit.stage import train

    train(config, check_only=arguments.check)


if __name__ == "__main__":
    main()
