#!/usr/bin/env python
"""Talk with a model about an image: `python training/chat.py MODEL IMAGE ["question"]`.

With a question it answers and ends; without, it keeps talking: /image PATH shows another image, /new forgets what was
said, /quit or Ctrl-D ends, Ctrl-C stops an answer. `--web` opens a page for the browser (pip install
'compact-vision-tokens[web]'), where `--against MODEL` answers the same questions side by side.
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
    parser.add_argument("model", help="folder that training/train.py exported, or a Hub id")
    parser.add_argument("image", nargs="?", type=Path, help="image file")
    parser.add_argument("question", nargs="?", help="ask this and end")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token (default)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--web", action="store_true", help="a page for the browser")
    parser.add_argument("--against", metavar="MODEL", help="with --web: a second model, side by side")
    parser.add_argument("--port", type=int, default=7860, help="with --web (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.web and arguments.image:
        parser.error(f"with --web the image is chosen in the browser; leave out {arguments.image}")
    if not arguments.web and (arguments.image is None or arguments.against):
        against = f"--against goes with --web; add it, or leave out {arguments.against}"
        parser.error(against if arguments.against else "give an IMAGE, or --web")
    if arguments.max_new_tokens < 1 or not 0 <= arguments.temperature < float("inf"):
        found = f"found {arguments.max_new_tokens} and {arguments.temperature}"
        parser.error(f"--max-new-tokens is at least 1, --temperature at least 0 and finite; {found}")
    try:
        start(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def start(arguments: argparse.Namespace) -> None:
    """Load what was asked for, and talk.

    Raises:
        ValueError: if a model, the image or the question cannot be used. OSError: if the image cannot be read.
    """
    from pipeline.encoders.decode import open_image
    from training.answers.talk import Speaker, Talk

    def load(name: str) -> Speaker:
        return Speaker.load(name, arguments.max_new_tokens, arguments.temperature, arguments.device)

    if arguments.web:
        from training.answers.web import serve

        names = [name for name in (arguments.model, arguments.against) if name]
        serve(lambda: [load(name) for name in names], arguments.port)
        return
    from training.answers.terminal import converse, say

    image = open_image(arguments.image)
    talk = Talk(load(arguments.model), image)
    if arguments.question is not None:
        say(talk, arguments.question)
    else:
        converse(talk)


if __name__ == "__main__":
    main()
