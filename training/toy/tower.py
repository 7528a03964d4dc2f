"""The demo's vision tower learns to see as CapPa's does: a small captioner reads its patch tokens, and is thrown away.

Every word of a caption says what to see, and where: far more than which caption belongs to which image, so that a
minute is enough. What the captioner reads is the last block, normalised; the blocks before it are what a real tower's
are, steps on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training.toy.settings import CLIP, Size
from training.toy.steps import train

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

    from training.model.tokenizer import Tokenizer

MAX_CAPTION = 128  # tokens
OUTLIER = 40.0  # about as many times the usual magnitude


def train_tower(
    captions: Mapping[str, str], images: Path, tokenizer: Tokenizer, size: Size, seed: int
) -> CLIPVisionModel:
    """A CLIPVisionModel that was trained to let its captions be told from its patch tokens.

    Args:
        captions: of each image, by its name in the folder `images`.
        size: how long it learns, and its outliers: so many channels of the residual stream have activations some 40
            times larger than the others, as a few of large encoders have. They are there before training, and stay.
        seed: of the order of the images.

    Raises:
        OSError: if an image cannot be read.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from pipeline.encoders.clip import Clip
    from pipeline.encoders.decode import load_image

    side = CLIP["image_size"]
    pixels = torch.stack(
        [torch.from_numpy(Clip().pixels(load_image((images / name).read_bytes()), "pad", side)) for name in captions]
    )
    texts = [[*tokenizer.encode(text)[:MAX_CAPTION], tokenizer.eos_id] for text in captions.values()]
    ids = torch.full((len(texts), max(map(len, texts))), -1)  # (captions, longest)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    tower = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    with torch.no_grad():  # the residual stream begins at this norm: it adds the same to each token's channel
        tower.pre_layrnorm.bias[: size["outliers"]] = OUTLIER
    captioner = Captioner(tokenizer.vocab_size, ids.shape[1])

    def loss(chosen: list[int]) -> Tensor:
        told = ids[chosen]
        told = told[:, : int((told >= 0).sum(1).max())]
        scores = captioner(told[:, :-1].clamp(min=0), tower(pixel_values=pixels[chosen]).last_hidden_state[:, 1:])
        return nn.functional.cross_entropy(scores.flatten(0, 1), told[:, 1:].flatten(), ignore_index=-1)

    train("clip", [tower, captioner], loss, len(texts), size["tower"], seed)
    return tower


class Captioner(nn.Module):
    """One decoder layer that reads the patch tokens by cross-attention."""

    def __init__(self, vocabulary: int, longest: int) -> None:
        super().__init__()
        width, heads = CLIP["hidden_size"], CLIP["num_attention_heads"]
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        nn.init.normal_(self.words.weight, std=0.3)
        nn.init.normal_(self.places.weight, std=0.02)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerDecoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, num_layers=1, norm=nn.LayerNorm(width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, told: Tensor, patches: Tensor) -> Tensor:
        """Scores of the next words (n, L, vocabulary) from those told (n, L) and the patch tokens (n, patches, C)."""
        length = told.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)  # no word sees those after it
        words = self.words(told) + self.places.weight[:length]
        read = self.layers(words, self.norm(patches), tgt_mask=later, tgt_is_causal=True)
        scores: Tensor = self.head(read)
        return scores
