#!/usr/bin/env python
"""The authors' checkpoints to models of this project, and back.

    python training/convert.py import CHECKPOINT --out FOLDER [--llm LLM] [--clip CLIP]
    python training/convert.py export MODEL --out FOLDER

CHECKPOINT is a published `mm_projector.bin` (stage 1; it needs --llm) or a whole fine-tuned LLaVA-STF or LLaVA-1.5
folder: the language model's keys, `model.mm_projector*`, and with or without CLIP's under `model.vision_tower`. Keys
that nothing reads, and keys that are missing, are named; nothing is unpickled but tensors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from training.release.llava import CLIP, give_out, take_in


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("import", help="the authors' checkpoint -> our folder")
    take.add_argument("source", type=Path, metavar="CHECKPOINT", help="mm_projector.bin, or a fine-tuned folder")
    take.add_argument("--llm", help="folder or Hub id of the language model, where the checkpoint has none")
    take.add_argument("--clip", help=f"folder or Hub id of CLIP (default: what the checkpoint names, or {CLIP})")
    take.add_argument(
        "--aspect", choices=("pad", "square"), help="of images (default: what the checkpoint says, or pad)"
    )
    take.add_argument("--ignore-unused", action="store_true", help="go on although there are keys that nothing reads")
    give = commands.add_parser("export", help="our folder -> a LLaVA-1.5-style folder")
    give.add_argument("source", type=Path, metavar="MODEL", help="folder of this project's model")
    give.add_argument("--clip", default=CLIP, help="name to write for its CLIP (default: %(default)s)")
    for command in (take, give):
        command.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    try:
        if arguments.command == "import":
            unused = take_in(**{k: v for k, v in vars(arguments).items() if k != "command"})
            print("".join(f"not used: {name}\n" for name in unused) + str(arguments.out))
        else:
            give_out(arguments.source, arguments.out, arguments.clip)
            print(arguments.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
