"""Images and text to what the model reads, exactly as LLaVA-1.5: pixels bit for bit, token ids one by one.

This file and `tokenizer.py` travel with every exported model: Pillow, numpy, sentencepiece and transformers suffice.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, BatchFeature, PreTrainedTokenizer, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images

from .tokenizer import Tokenizer

IMAGE = "<image>"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = (122, 116, 104)  # int(mean * 255), as LLaVA-1.5's expand2square

# Vicuna's template, LLaVA-1.5's `v1`: an image goes first in its message, and nothing follows an answer's </s>.
CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system, turns = messages[0]['content'], messages[1:] -%}
    {%- if system is not string -%}
        {%- set system = system | map(attribute='text') | join('\n') -%}
    {%- endif -%}
{%- else -%}
    {%- set system = "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- system + ' ' -}}
{%- for turn in turns -%}
    {%- if turn['content'] is string -%}
        {%- set text = turn['content'] -%}
    {%- else -%}
        {%- set images = turn['content'] | selectattr('type', 'equalto', 'image') | list -%}
        {%- set text = turn['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\n') -%}
        {%- if images -%}
            {%- set text = ('<image>' * (images | length) + '\n' + text.strip()).strip() -%}
        {%- endif -%}
    {%- endif -%}
    {%- if turn['role'] == 'user' -%}
        {{- 'USER: ' + text + ' ' -}}
    {%- elif turn['role'] == 'assistant' -%}
        {{- 'ASSISTANT: ' + text + '</s>' -}}
    {%- else -%}
        {{- raise_exception("roles are user and assistant, and system for the first message; found " + turn['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""


class CompactVisionTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """The language model's own SentencePiece tokenizer, exactly, with a placeholder for vision tokens.

    Text is split at `<image>` and each chunk tokenized by itself, as LLaVA-1.5 does. transformers' LlamaTokenizer
    would not do: it ignores the scores of pieces.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - transformers' own way to declare it
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, legacy: bool = True, image_token_id: int | None = None, **kwargs: Any) -> None:
        self.vocab_file, self.legacy = str(vocab_file), legacy
        self._exact = Tokenizer(Path(vocab_file), legacy=legacy)
        model = SentencePieceProcessor(model_file=self.vocab_file)
        self._pieces: list[str] = [model.id_to_piece(index) for index in range(len(model))]
        self._ids = {piece: index for index, piece in enumerate(self._pieces)}
        self.image_id = len(self._pieces) if image_token_id is None else image_token_id
        self._added_tokens_decoder = {self.image_id: AddedToken(IMAGE, special=True, normalized=False)}
        defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
        settings = {"padding_side": "left", "special_tokens_pattern": "bos", **defaults, **kwargs}
        super().__init__(legacy=legacy, image_token_id=self.image_id, **settings)

    @property
    def vocab_size(self) -> int:
        """Pieces, without the placeholder."""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id."""
        return {**self._ids, **self._added_tokens_encoder}

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Pieces without BOS."""
        pieces: list[str] = []
        for number, chunk in enumerate(text.split(IMAGE)):
            if number:
                pieces.append(IMAGE)
            pieces += [self._pieces[index] for index in self._exact.encode(chunk)[1:]]
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces."""
        return self._exact.decode([self._convert_token_to_id(token) for token in tokens])

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """Text of ids; placeholders are left out."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self._exact.decode(ids, skip_special_tokens=skip_special_tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy `tokenizer.model`."""
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}tokenizer.model"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


class CompactVisionImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """LLaVA-1.5's preprocessing, bit for bit: pad to a square or not, then CLIP's with Pillow.

    Attributes:
        aspect: `pad` pads to a square, `square` crops its centre.
        image_size: side of the result in pixels.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, aspect: str = "pad", image_size: int = 336, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.aspect = aspect
        self.image_size = image_size

    def __call__(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """As `preprocess`."""
        return self.preprocess(images, return_tensors=return_tensors)

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """PIL images, or uint8 arrays (H, W[, C]), any nesting -> pixel_values (n, 3, S, S), float32."""
        pixels = [self.pixels(_upright_rgb(image)) for image in make_flat_list_of_images(images)]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def pixels(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """RGB image -> (3, S, S): bicubic with the short side to S, centre crop, normalised."""
        size = self.image_size
        if self.aspect == "pad":
            image = _padded(image)
        width, height = image.size
        other = int(size * max(width, height) / min(width, height))
        resized = image.resize((size, other) if width <= height else (other, size), Image.Resampling.BICUBIC)
        left, top = (resized.width - size) // 2, (resized.height - size) // 2
        cropped = np.asarray(resized.crop((left, top, left + size, top + size)))
        scaled = (cropped * (1 / 255)).astype(np.float32)
        normalised = (scaled - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def _upright_rgb(image: Any) -> Image.Image:
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8:
            raise ValueError(f"an image array must be uint8, found {array.dtype}; give PIL images otherwise")
        if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
            array = array.transpose(1, 2, 0)  # channels first
        image = Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):  # 16 and 32 bit grey, which `convert` alone would clip to white
        numbers = np.asarray(upright).astype(np.float64)
        top = 255.0 if numbers.max(initial=0) <= 255 else 65535.0
        upright = Image.fromarray(np.clip(numbers * (255.0 / top), 0, 255).astype(np.uint8))
    return upright.convert("RGB")


def _padded(image: Image.Image) -> Image.Image:
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


class CompactVisionProcessor(ProcessorMixin):  # type: ignore[misc]
    """`processor(images=..., text=...)`: input_ids with a placeholder per vision token, attention_mask, pixel_values.

    A prompt holds `<image>` at most once; a batch may mix prompts with and without.
    """

    def __init__(
        self,
        image_processor: CompactVisionImageProcessor,
        tokenizer: CompactVisionTokenizer,
        image_tokens: int = 144,
        chat_template: str | None = None,
    ) -> None:
        self.image_tokens = image_tokens
        self.image_token = IMAGE
        self.image_token_id = tokenizer.image_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @classmethod
    def _get_arguments_from_pretrained(cls, name: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        """Both parts are known classes: nothing is looked up by name, and nothing needs to be trusted again."""
        kwargs.pop("trust_remote_code", None)
        settings = (processor_dict or {}).get("image_processor", {})
        images = CompactVisionImageProcessor(aspect=settings["aspect"], image_size=settings["image_size"])
        return [images, CompactVisionTokenizer.from_pretrained(name, **kwargs)]

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """What stands for one image in the text that is tokenized."""
        return IMAGE * self.image_tokens

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """As transformers': as many images as placeholders; and not several images in one prompt.

        Raises:
            ValueError: naming the prompt.
        """
        for number, prompt in enumerate([text] if isinstance(text, str) else text or []):
            if isinstance(prompt, str) and prompt.count(IMAGE) > 1:
                raise ValueError(
                    f"prompt {number} holds {prompt.count(IMAGE)} images; the model was trained with one per "
                    "conversation and takes one"
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        """For vLLM: vision tokens and patches of images of these sizes."""
        from transformers.processing_utils import MultiModalData

        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.image_tokens] * count, num_image_patches=[1] * count)


CompactVisionTokenizer.register_for_auto_class("AutoTokenizer")
CompactVisionImageProcessor.register_for_auto_class("AutoImageProcessor")
CompactVisionProcessor.register_for_auto_class("AutoProcessor")
