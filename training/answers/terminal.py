"""The talk in a terminal: `python training/chat.py MODEL IMAGE`."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.encoders.decode import open_image
from training.answers.talk import Talk

DIM, PLAIN = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")


def say(talk: Talk, question: str) -> None:
    """Ask, and print the answer while it comes; Ctrl-C stops it."""
    pieces = talk.ask(question)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        print(" ...", end="")
    print(f"\n{DIM}({talk.facts}){PLAIN}", flush=True)


def converse(talk: Talk) -> None:
    """Questions from the keyboard until /quit or the end of input."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - it gives `input` a history and its keys

    print(f"{DIM}{talk.speaker.name}: {talk.speaker.tokens}. /image PATH, /new, /quit{PLAIN}")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:  # Ctrl-D
            print()
            return
        except UnicodeDecodeError as error:
            print(f"{DIM}that line is not UTF-8 ({error}); type it again{PLAIN}")
            continue
        except KeyboardInterrupt:  # Ctrl-C drops the line, as a shell does
            print()
            continue
        if line == "/quit":
            return
        if not line:
            continue
        try:
            talk = _obey(talk, line)
        except (ValueError, OSError) as error:
            print(f"{DIM}{error}{PLAIN}")


def _obey(talk: Talk, line: str) -> Talk:
    """Do what a line says: a command, or a question; the talk that goes on from here."""
    command, _, rest = line.partition(" ")
    if command == "/image":
        return Talk(talk.speaker, open_image(_path(rest.strip())))
    if command == "/new":
        return Talk(talk.speaker, talk.image)
    if command.startswith("/"):
        raise ValueError(f"{command} is unknown; say /image PATH, /new or /quit")
    say(talk, line)
    return talk


def _path(text: str) -> Path:
    """A path as it was typed, `~` being the home folder; ValueError if there is no such home, or no text."""
    if not text:
        raise ValueError(f"/image needs a PATH, found {text!r}; give one")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text!r}: {error} Write the folder out") from error
