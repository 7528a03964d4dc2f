"""Own questions, answered in the midst of training by the model as it is: with its own weights, where they are.

An engine that shards weights would have to gather them for every word, so there this is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from composer.core import State
from composer.core.precision import get_precision_context
from composer.utils import dist

from training.answers.answer import reply, with_pictures
from training.benchmarks.own import OwnQuestions, is_right
from training.config import TrainConfig
from training.engines.base import Engine
from training.fit.parts import Parts
from training.model.model import CompactVisionForConditionalGeneration
from training.release.folder import processor_of, with_encoder


class Quiz:
    """Questions whose truth is known, and the model that is asked.

    Args:
        questions: all of them; those without a known truth are not asked.
        parts: of this rank.
        engine: of the run.

    Raises:
        ValueError: if no truth is known, an image is missing, or the engine has no whole weights.
    """

    def __init__(self, questions: OwnQuestions, parts: Parts, engine: Engine) -> None:
        if not engine.whole_everywhere:
            raise ValueError(
                f"data.validation.questions with parallelism {engine.name} on {engine.ranks} rank(s): it keeps parts "
                "of the weights on each rank, and answers need them whole; take ddp, zero1 or zero2, or leave the "
                "questions out and ask a checkpoint (training/export.py, then training/evaluate.py)"
            )
        self.questions = questions
        self.parts = parts
        self.engine = engine
        self.asked = [question for question in questions.to_ask() if question.truth is not None]
        if not self.asked:
            raise ValueError(
                f"{questions.folder}: no question has an answer to compare with; give them, or leave it out"
            )

    def right(self, state: State, size: int, go_on: Callable[[], bool]) -> float | None:
        """The share of the questions that the model answers right, each rank asking its part. A collective.

        Args:
            state: Composer's, within an evaluation.
            size: questions in a batch.
            go_on: is asked before each batch, on all ranks alike.

        Returns: None if it was left.
        """
        mine = self.asked[dist.get_global_rank() :: dist.get_world_size()]
        whole = with_encoder(self.parts.model, self.parts.store).to(self.engine.device()).eval()
        processor = processor_of(whole, self.parts.tokenizer)
        answers: dict[str, str] = {}
        with _masked(whole), get_precision_context(state.precision, state.precision_config):
            for first in range(0, -(-len(self.asked) // dist.get_world_size()), size):
                if not go_on():
                    return None
                if sound := with_pictures(mine[first : first + size], self.questions):
                    texts, pictures = [q.text for q, _ in sound], [picture for _, picture in sound]
                    said = reply(whole, processor, texts, pictures, self.questions.max_new_tokens)
                    answers |= {q.id: text for (q, _), text in zip(sound, said, strict=True)}
        everyone = {name: text for part in dist.all_gather_object(answers) for name, text in part.items()}
        right = sum(is_right({"answer": q.truth, "text": everyone.get(q.id, "")}) for q in self.asked)
        return right / len(self.asked)


@contextmanager
def _masked(whole: CompactVisionForConditionalGeneration) -> Iterator[None]:
    """Within, the language model reads attention masks, which training goes without: prompts are padded on the left."""
    before = whole.llm.config._attn_implementation
    whole.llm.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        whole.llm.set_attn_implementation(before)


def open_quiz(config: TrainConfig, parts: Parts, engine: Engine) -> Quiz | None:
    """The questions of `data.validation.questions`; None without.

    Raises:
        ValueError: as `Quiz`, or if the file holds something else.
    """
    settings = config.data.validation
    if settings is None or settings.questions is None or settings.images is None:
        return None
    return Quiz(OwnQuestions(Path(settings.questions), images=Path(settings.images)), parts, engine)
