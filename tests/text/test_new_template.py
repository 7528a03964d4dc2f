"""A template is added by a class and its entry in `TEMPLATES`: settings, batches and prompts then know it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load_config
from pipeline.schema import Conversation, Turn
from training.config import DataSettings
from training.model.tokenizer import Tokenizer
from training.text.collate import Collator, Example
from training.text.image import Turns
from training.text.templates import IGNORE, TEMPLATES, Template, prompt_for


class Lines(Template):
    """A line for each turn, all of them learned."""

    def prompt(self, turns: Turns) -> str:
        return "\n".join(turn.value for turn in turns)

    def labels(
        self, prompt: str, ids: Sequence[int], tokenizer: Tokenizer, has_image: bool, max_length: int
    ) -> list[int]:
        return [IGNORE, *(i if i >= 0 else IGNORE for i in ids[1:])]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(TEMPLATES, "lines", Lines())
    return "lines"


def test_settings_batches_and_prompts_know_a_template_by_its_entry(lines: str, tiny_tokenizer: Path) -> None:
    data = load_config(DataSettings, None, ["store=s", f"template={lines}"])
    tokenizer = Tokenizer(tiny_tokenizer / "tokenizer.model", legacy=False)
    turns = (Turn(speaker="human", value="<image>\nWhat?"), Turn(speaker="gpt", value="a dog"))
    example = Example("0#0", Conversation(id="0", turns=turns), has_image=True)
    batch = Collator(tokenizer, data.template, data.max_length, image_tokens=2, image_token_id=9000)([example])
    learned = [i for i in batch["labels"][0].tolist() if i != IGNORE]
    assert tokenizer.decode(learned).split() == ["What?", "a", "dog"]
    assert prompt_for("What?", [("a", "b")], lines) == "a\nb\nWhat?\n"


def test_an_unknown_template_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"template: no such template; did you mean 'plain'\? \(found 'lines', from the"
    ):
        load_config(DataSettings, None, ["store=s", "template=lines"])
