"""Answers of an exported model to many questions: in batches, by several processes, resumed after a crash."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from training.answers.answer_file import AnswerFile, AnswerLine, as_line
from training.answers.processes import AnsweringProcess

if TYPE_CHECKING:
    from PIL.Image import Image

    from training.model.model import CompactVisionForConditionalGeneration
    from training.model.processor import CompactVisionProcessor


class Asked(Protocol):
    """A question: its text without `<image>`, the name of its image or None."""

    @property
    def text(self) -> str:
        """What is asked."""

    @property
    def image(self) -> str | None:
        """The name of its image, if it has one."""

    @property
    def line(self) -> Mapping[str, Any]:
        """What its answer's line begins with: `question_id`, `image`, `text`, and what else is known of it."""


A = TypeVar("A", bound=Asked)


class Questions(Protocol):
    """What a model is asked; every benchmark is such."""

    @property
    def max_new_tokens(self) -> int:
        """Of an answer, unless another length is asked for."""

    def to_ask(self) -> Sequence[Asked]:
        """The questions, in order; all images are there."""

    def image(self, name: str) -> bytes:
        """Bytes of an image file."""


def answer_all(model: str, questions: Questions, out: Path, batch_size: int, max_new_tokens: int | None = None) -> None:
    """Greedy answers, each appended to a file as soon as its batch is done; what the file holds is not asked again.

    A question whose image is damaged is named, and left without an answer; the others are asked.

    Process r of n takes every n-th question from the r-th on, and writes beside `out`; when all have ended, the first
    process puts the answers together.

    Args:
        model: folder of an exported model, or a Hub id.
        out: JSON lines of answers.
        max_new_tokens: of an answer; None for the questions' own.

    Raises:
        ValueError: if the model cannot be read, or `out` is another model's.
    """
    process = AnsweringProcess.of_environment()
    asked = questions.to_ask()
    longest = max_new_tokens or questions.max_new_tokens
    file = AnswerFile(out)
    if process.is_first:
        file.claim(model, longest)
    known = file.answers()
    mine = [q for q in asked[process.rank :: process.world_size] if not _is_answered(q, known)]
    if mine:
        loaded = load_model(model, process.device())
        start = time.perf_counter()
        with file.part(process).open("a", encoding="utf-8") as part:
            for first in range(0, len(mine), batch_size):
                batch = mine[first : first + batch_size]
                sound = with_pictures(batch, questions)
                if sound:
                    texts = reply(*loaded, [q.text for q, _ in sound], [picture for _, picture in sound], longest)
                    part.writelines(as_line(_answered(q, text)) for (q, _), text in zip(sound, texts, strict=True))
                    part.flush()
                process.progress(first + len(batch), len(mine), time.perf_counter() - start)
    process.wait_for_others()
    if process.is_first:
        file.gather()


def _is_answered(question: Asked, known: Mapping[Any, AnswerLine]) -> bool:
    """An answer counts only for the text that was asked: another prompt is another question."""
    answer = known.get((question.line["question_id"], question.image))
    return answer is not None and answer.get("prompt") == question.text


def _answered(question: Asked, text: str) -> AnswerLine:
    """The line of an answer: what the question's line says, with the answer as its text."""
    return cast(AnswerLine, {**question.line, "prompt": question.text, "text": text})


def with_pictures(batch: Sequence[A], questions: Questions) -> list[tuple[A, Image | None]]:
    """Questions with their images decoded, None for one that has none. One with a damaged image is named and left out.

    Raises:
        OSError: if an image file cannot be read.
    """
    from pipeline.encoders.decode import load_image

    sound: list[tuple[A, Image | None]] = []
    for question in batch:
        try:  # as the features were made
            sound.append((question, None if question.image is None else load_image(questions.image(question.image))))
        except ValueError as error:
            print(
                f"question {question.line['question_id']} is not answered: image {question.image}: {error}. Mend or "
                "replace the image and run the same command again",
                file=sys.stderr,
                flush=True,
            )
    return sound


def load_model(name: str, device: str) -> tuple[CompactVisionForConditionalGeneration, CompactVisionProcessor]:
    """Model and processor of an exported folder or Hub id, on a device: bfloat16 on a GPU, float32 on the CPU.

    Raises:
        ValueError: if there is none.
    """
    import torch

    from training.model.exported import exported_model, exported_processor

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = exported_model(name, dtype=dtype)
    return model.to(device).eval(), exported_processor(name)


def reply(
    model: CompactVisionForConditionalGeneration,
    processor: CompactVisionProcessor,
    texts: Sequence[str],
    pictures: Sequence[Image | None],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to texts, each with a picture or None, in one batch. Each is the same as in a batch of one.

    The processor pads prompts on the left, with an attention mask of 0 there: all prompts of the batch, (batch, length)
    token ids, then end at the same place, where `generate` appends. So new tokens begin at `length` in every row.
    """
    import torch

    from training.model.decoders import decoder_of
    from training.model.markers import IMAGE
    from training.text.templates import prompt_for

    asked = zip(texts, pictures, strict=True)
    template = decoder_of(model.config.text_config.model_type).template
    shown = [text if picture is None else f"{IMAGE}\n{text}" for text, picture in asked]
    prompts = [prompt_for(text, template=template) for text in shown]
    images = [picture for picture in pictures if picture is not None] or None
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True).to(model.device)
    if "pixel_values" in inputs:  # (images, 3, side, side); no question of the batch may have one
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]  # (batch, new tokens), padded on the right after an answer's end
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
