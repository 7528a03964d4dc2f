"""What this project must be told of a family of language models.

Layers, heads, widths and the linear layers that adapters go to are asked of the model itself, in transformers' words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """A family of language models.

    Attributes:
        template: of conversations, a name of text/templates.py: how the model is asked. Training takes `data.template`.
        chat_template: the same prompt as a Jinja template, which an export gives to transformers.
        sees_all_before: whether in every layer a token sees all tokens before it, and no other: no window, no blocks.
    """

    template: str
    chat_template: str
    sees_all_before: bool = False
