"""A talk with a model about an image: answers that can be read while they grow, and stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

    from training.model.model import CompactVisionForConditionalGeneration
    from training.model.processor import CompactVisionProcessor

Device = Literal["auto", "cpu", "cuda"]


@dataclass
class Speaker:
    """A model that answers, with its processor.

    Attributes:
        max_new_tokens: of an answer. temperature: 0 always takes the likeliest token.
    """

    name: str
    model: CompactVisionForConditionalGeneration
    processor: CompactVisionProcessor
    max_new_tokens: int
    temperature: float

    @classmethod
    def load(cls, name: str, max_new_tokens: int, temperature: float = 0.0, device: Device = "auto") -> Speaker:
        """An exported folder or Hub id, onto a GPU in bfloat16, or onto the CPU in float32.

        Raises:
            ValueError: if it is no model of this project, or there is no GPU.
        """
        import torch
        from transformers.utils.logging import disable_progress_bar

        from training.answers.answer import load_model

        found = torch.cuda.is_available()
        if device == "cuda" and not found:
            raise ValueError(f"--device cuda: torch {torch.__version__} finds no GPU here; use --device cpu")
        disable_progress_bar()
        model, processor = load_model(name, "cuda" if found and device != "cpu" else "cpu")
        if model.vision_tower is None:
            raise ValueError(f"{name} has no vision tower, it cannot see; name a folder that training/export.py wrote")
        return cls(name, model, processor, max_new_tokens, temperature)

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
        from training.model.decoders import decoder_of
        from training.model.markers import IMAGE
        from training.text.templates import prompt_for

        text = question.strip()
        if not text or IMAGE in text:
            raise ValueError(f"a question is some text without {IMAGE}; found {question!r}, ask something else")
        text = text if self.history else f"{IMAGE}\n{text}"
        speaker = self.speaker
        asked = time.perf_counter()
        template = decoder_of(speaker.model.config.text_config.model_type).template
        prompt = prompt_for(text, self.history, template)
        inputs = speaker.processor(images=[self.image], text=prompt, return_tensors="pt")
        inputs = inputs.to(speaker.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(speaker.model.dtype)
        longest, length = speaker.model.llm.config.max_position_embeddings, inputs["input_ids"].shape[1]
        if length >= longest:
            raise ValueError(
                f"the conversation has {length} tokens and has become longer than the model can read, which is "
                f"{longest}; begin a new one (/new)"
            )
        answer = _Answer(speaker, inputs, min(longest - length, speaker.max_new_tokens))
        said = ""
        try:
            for piece in answer.pieces():
                said += piece
                yield piece
        finally:  # also when the reader stops in the middle: what was said so far is the answer
            answer.stop()
            self.history.append((text, said.strip()))
            self.first_token_s = answer.times[0] - asked if answer.times else 0.0
            if len(answer.times) > 1:
                self.tokens_per_s = (len(answer.times) - 1) / (answer.times[-1] - answer.times[0])

    @property
    def facts(self) -> str:
        """About the last answer, in words."""
        return (
            f"{self.speaker.tokens}, first token after {1e3 * self.first_token_s:.0f} ms, "
            f"{self.tokens_per_s:.1f} tokens/s"
        )


class _Answer:
    """One generation in its thread, whose text is read in another one while it grows.

    transformers hands each new token to a streamer, which queues the decoded text for `pieces`, and to a stopping
    criterion: there its time is noted, and a stop that was asked for takes effect.
    """

    def __init__(self, speaker: Speaker, inputs: Any, max_new_tokens: int) -> None:
        from transformers import TextIteratorStreamer

        self.times: list[float] = []  # of each new token
        self._stopped = threading.Event()
        self._fault: BaseException | None = None
        self._streamer = TextIteratorStreamer(speaker.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._thread = threading.Thread(target=self._run, args=(speaker, inputs, max_new_tokens), daemon=True)

    def _run(self, speaker: Speaker, inputs: Any, max_new_tokens: int) -> None:
        """In the thread: generate to the end, or until `stop`; an error waits for the reader."""
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
            self._streamer.end()  # or the reader would wait for ever

    def _after_token(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """transformers' stopping criterion: ids (rows, length) -> bool (rows,), True to stop."""
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
