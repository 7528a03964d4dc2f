#!/usr/bin/env python
"""Talk with a model about an image: `python training/chat.py MODEL IMAGE ["question"]`.

With a question it answers and ends; without, it keeps talking: /image PATH shows another image, /new forgets what was
said, /quit or Ctrl-D ends, Ctrl-C stops an answer. `--web` opens a page for the browser (pip install
'compact-vision-tokens[web]'), where `--against MODEL` answers the same questions side by side.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

if TYPE_CHECKING:
    from PIL.Image import Image

DIM, PLAIN = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that training/train.py exported, or a Hub id")
    parser.add_argument("image", nargs="?", type=Path, help="image file")
    parser.add_argument("question", nargs="?", help="ask this alone")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token (default)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--web", action="store_true", help="a page for the browser")
    parser.add_argument("--against", metavar="MODEL", help="with --web: a second model, side by side")
    parser.add_argument("--port", type=int, default=7860, help="with --web (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.web and arguments.image:
        parser.error("with --web the image is chosen in the browser")
    if not arguments.web and (arguments.image is None or arguments.against):
        parser.error("--against goes with --web" if arguments.against else "give an IMAGE, or --web")
    if arguments.max_new_tokens < 1 or arguments.temperature < 0:
        parser.error("--max-new-tokens is at least 1, --temperature at least 0")
    try:
        start(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def start(arguments: argparse.Namespace) -> None:
    """Load what was asked for, and talk.

    Raises:
        ValueError: if the image or the question cannot be used. OSError: if a model or the image cannot be read.
    """
    names = [name for name in (arguments.model, arguments.against) if name]
    if arguments.web:
        from training.answers.web import serve

        serve(lambda: [Speaker.load(name, arguments) for name in names], arguments.port)
        return
    image = open_image(arguments.image)
    talk = Talk(Speaker.load(arguments.model, arguments), image)
    if arguments.question is not None:
        say(talk, arguments.question)
    else:
        converse(talk)


def open_image(path: Path) -> Image:
    """Decode an image as the build job does.

    Raises:
        ValueError: if it is no image. OSError: if there is no such file.
    """
    from pipeline.encoder import load_image

    try:
        return load_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass
class Speaker:
    """A model that answers, with its processor."""

    name: str
    model: Any
    processor: Any
    max_new_tokens: int
    temperature: float

    @classmethod
    def load(cls, name: str, arguments: argparse.Namespace) -> Speaker:
        """Onto a GPU in bfloat16, or onto the CPU in float32.

        Raises:
            ValueError: if it is no model of this project, or there is no GPU. OSError: if it cannot be read.
        """
        import torch
        from transformers.utils.logging import disable_progress_bar

        from training.model.model import CompactVisionForConditionalGeneration
        from training.model.processor import CompactVisionProcessor

        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here; use --device cpu")
        disable_progress_bar()
        gpu = torch.cuda.is_available() and arguments.device != "cpu"
        dtype, device = (torch.bfloat16, "cuda") if gpu else (torch.float32, "cpu")
        model = CompactVisionForConditionalGeneration.from_pretrained(name, dtype=dtype).to(device).eval()
        if model.vision_tower is None:
            raise ValueError(f"{name} has no vision tower; training/export.py writes models with one")
        processor = CompactVisionProcessor.from_pretrained(name)
        return cls(name, model, processor, arguments.max_new_tokens, arguments.temperature)

    @property
    def tokens(self) -> str:
        """What an image becomes, in words."""
        connector = self.model.connector
        return f"{connector.tokens} vision tokens of {connector.config.grid**2}"


@dataclass
class Talk:
    """A conversation about one image.

    Attributes:
        history: (question, answer) pairs so far, the first question with the image's placeholder.
        first_token_s: from the question to the first token of the last answer. tokens_per_s: after that.
    """

    speaker: Speaker
    image: Image
    history: list[tuple[str, str]] = field(default_factory=list)
    first_token_s: float = 0.0
    tokens_per_s: float = 0.0

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece; what was said until the iterator is closed is kept.

        Raises:
            ValueError: if the question is empty, holds `<image>`, or the conversation is too long for the model.
        """
        from training.text.image import IMAGE
        from training.text.templates import prompt_for

        text = question.strip()
        if not text or IMAGE in text:
            raise ValueError(f"a question is some text without {IMAGE}; found {question!r}")
        text = text if self.history else f"{IMAGE}\n{text}"
        speaker = self.speaker
        asked = time.perf_counter()
        inputs = speaker.processor(images=[self.image], text=prompt_for(text, self.history), return_tensors="pt")
        inputs = inputs.to(speaker.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(speaker.model.dtype)
        room = speaker.model.llm.config.max_position_embeddings - inputs["input_ids"].shape[1]
        if room < 1:
            raise ValueError("the conversation has become longer than the model can read; begin a new one (/new)")
        answer = _Answer(speaker, inputs, min(room, speaker.max_new_tokens))
        said = ""
        try:
            for piece in answer.pieces():
                said += piece
                yield piece
        finally:
            answer.stop()
            self.history.append((text, said.strip()))
            self.first_token_s = answer.times[0] - asked if answer.times else 0.0
            if len(answer.times) > 1:
                self.tokens_per_s = (len(answer.times) - 1) / (answer.times[-1] - answer.times[0])

    @property
    def facts(self) -> str:
        """About the last answer."""
        return (
            f"{self.speaker.tokens}, first token after {1e3 * self.first_token_s:.0f} ms, "
            f"{self.tokens_per_s:.1f} tokens/s"
        )


class _Answer:
    """One generation in a thread of its own, whose text can be read while it grows."""

    def __init__(self, speaker: Speaker, inputs: Any, max_new_tokens: int) -> None:
        from transformers import TextIteratorStreamer

        self.times: list[float] = []  # of each new token
        self._stopped = threading.Event()
        self._fault: BaseException | None = None
        self._streamer = TextIteratorStreamer(speaker.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._thread = threading.Thread(target=self._run, args=(speaker, inputs, max_new_tokens), daemon=True)

    def _run(self, speaker: Speaker, inputs: Any, max_new_tokens: int) -> None:
        import torch
        from transformers import StoppingCriteriaList

        how = {"do_sample": True, "temperature": speaker.temperature} if speaker.temperature else {"do_sample": False}
        try:
            with torch.inference_mode():
                speaker.model.generate(
                    **inputs,
                    **how,
                    max_new_tokens=max_new_tokens,
                    streamer=self._streamer,
                    stopping_criteria=StoppingCriteriaList([self._after_token]),
                )
        except BaseException as error:
            self._fault = error  # raised again where the text is read
        finally:
            self._streamer.end()

    def _after_token(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        self.times.append(time.perf_counter())
        return torch.full((input_ids.shape[0],), self._stopped.is_set(), device=input_ids.device)

    def pieces(self) -> Iterator[str]:
        """Text as it comes.

        Raises:
            BaseException: what went wrong in the thread.
        """
        self._thread.start()
        yield from self._streamer
        self._thread.join()
        if self._fault is not None:
            raise self._fault

    def stop(self) -> None:
        """End at the next token, and wait for it."""
        self._stopped.set()
        self._thread.join()


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
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
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
    command, _, rest = line.partition(" ")
    if command == "/image":
        return Talk(talk.speaker, open_image(Path(rest.strip()).expanduser()))
    if command == "/new":
        return Talk(talk.speaker, talk.image)
    if command.startswith("/"):
        raise ValueError(f"{command} is unknown; there are /image PATH, /new and /quit")
    say(talk, line)
    return talk


if __name__ == "__main__":
    main()
