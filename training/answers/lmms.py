"""The model as lmms-eval sees it (extra `lmms-eval`): every task of it that asks about one image.

    python -m lmms_eval --model compact_vision --model_args pretrained=FOLDER --tasks pope --batch_size 16

lmms-eval finds this file through the entry point `lmms_eval.models`. Its prompts and scores are its own: for the
paper's numbers use training/evaluate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from pipeline.encoders.decode import upright_rgb
from training.answers.answer import load_model, reply
from training.answers.processes import AnsweringProcess
from training.model.markers import IMAGE

MANIFEST = ModelManifest(model_id="compact_vision", simple_class_path="training.answers.lmms.CompactVision")
MAX_NEW_TOKENS = 128  # of a task that does not say


class CompactVision(lmms):  # type: ignore[misc]
    """Greedy answers of an exported model, in one process.

    Args:
        pretrained: folder that training/train.py exported, or a Hub id.
        batch_size: requests answered at once.
        **ignored: what lmms-eval passes to every model (device, max_batch_size).
    """

    is_simple = True

    def __init__(self, pretrained: str, batch_size: int | str = 1, **ignored: Any) -> None:
        super().__init__()
        self._model, self._processor = load_model(pretrained, AnsweringProcess().device())
        self._batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to requests of (text, settings, document -> images, document's index, task, split).

        Raises:
            ValueError: if a document has several images: the model takes one.
        """
        answers: list[str] = []
        for first in range(0, len(requests), self._batch_size):
            batch = [request.args for request in requests[first : first + self._batch_size]]
            pictures = [self._picture(*arguments[2:6]) for arguments in batch]
            longest = max(settings.get("max_new_tokens", MAX_NEW_TOKENS) for _, settings, *_ in batch)
            texts = [text.replace(IMAGE, "").strip() for text, *_ in batch]
            said = reply(self._model, self._processor, texts, pictures, longest)
            answers += [
                _until(text, settings.get("until")) for text, (_, settings, *_) in zip(said, batch, strict=True)
            ]
        return answers

    def _picture(self, images_of: Any, index: int, task: str, split: str) -> Any:
        """A document's image, RGB; None if it has none."""
        images = images_of(self.task_dict[task][split][index]) or []
        if len(images) > 1:
            raise ValueError(
                f"document {index} of {task} has {len(images)} images; the model takes one: leave that task out"
            )
        return upright_rgb(images[0]) if images else None

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: each of the model's tasks is one question."""
        raise NotImplementedError("compact_vision answers one question about one image, not several rounds")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported: tasks of the paper generate their answers."""
        raise NotImplementedError("compact_vision generates answers; choose a task with output_type generate_until")


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    """An answer up to the first of the task's ends."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        text = text.partition(end)[0] if end else text
    return text.strip()
