"""Images and text to what the model reads, exactly as LLaVA-1.5: pixels bit for bit, token ids one by one.

It travels with every exported model: Pillow, numpy, sentencepiece and transformers suffice.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, BatchFeature, PreTrainedTokenizer, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from pipeline.encoders import encoder_of
from pipeline.encoders.decode import open_image, upright_rgb
from pipeline.encoders.pixels import Pixels

from .markers import IMAGE
from .tokenizer import Tokenizer


class CompactVisionTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """The language model's own SentencePiece tokenizer, exactly, with a placeholder for vision tokens.

    Text is split at `<image>` and each chunk tokenized by itself, as LLaVA-1.5 does. transformers' LlamaTokenizer
    would not do: it ignores the scores of pieces.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - transformers' own way to declare it
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self, vocab_file: str | None, legacy: bool = True, image_token_id: int | None = None, **kwargs: Any
    ) -> None:
        if vocab_file is None:  # transformers found no such file
            folder = kwargs.get("name_or_path", "the model's folder")
            raise ValueError(f"{folder} has no tokenizer.model; put the language model's there")
        self.vocab_file, self.legacy = str(vocab_file), legacy
        self._exact = Tokenizer(Path(vocab_file), legacy=legacy)
        model = SentencePieceProcessor(model_file=self.vocab_file)
        # transformers asks these before `super().__init__` has ended, so they come first.
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
    """The vision encoder's preprocessing; of CLIP as LLaVA-1.5's, bit for bit: pad to a square or not, then CLIP's.

    Attributes:
        aspect: `pad` pads to a square, `square` crops its centre.
        image_size: side of the result in pixels.
        encoder: model type of the vision encoder.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self, aspect: str = "pad", image_size: int = 336, encoder: str = "clip_vision_model", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.aspect = aspect
        self.image_size = image_size
        self.encoder = encoder

    def __call__(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """As `preprocess`."""
        return self.preprocess(images, return_tensors=return_tensors)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """As transformers', with files read as the build reads them; arrays (H, W), which it refuses, as PIL."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):  # noqa: PTH113 - never raises
            return open_image(Path(image_url_or_urls))
        if getattr(image_url_or_urls, "ndim", 0) == 2:
            return _as_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """PIL images or uint8 arrays as `_as_image` takes, in lists or stacked -> pixel_values (n, 3, S, S), float32.

        Raises:
            ValueError: if there is none, or one is no image.
        """
        pixels = [self.pixels(upright_rgb(_as_image(image))) for image in _flat(images)]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def pixels(self, image: Image.Image) -> Pixels:
        """RGB image -> (3, S, S)."""
        return encoder_of(self.encoder).pixels(image, self.aspect, self.image_size)


def _flat(images: Any) -> list[Any]:
    """The images of lists, however nested, and of arrays (n, H, W, C) or (n, C, H, W), in order.

    transformers' own function takes no arrays (H, W).
    """
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) > 3:
        return [image for each in images for image in _flat(each)]
    return [images]


def _as_image(image: Any) -> Image.Image:
    """A PIL image as it is, a uint8 array (H, W), (H, W, C) or (C, H, W) as one; C is 1 to 4."""
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8, found {array.dtype}; give PIL images otherwise")
    if array.ndim not in (2, 3) or (array.ndim == 3 and not {array.shape[0], array.shape[2]} & {1, 2, 3, 4}):
        raise ValueError(f"an image array is (H, W), (H, W, C) or (C, H, W), C 1 to 4; found {array.shape}")
    if array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4):
        array = array.transpose(1, 2, 0)  # channels first
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


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
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _get_arguments_from_pretrained(cls, name: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        """Both parts are known classes: nothing is looked up by name, and nothing needs to be trusted again."""
        kwargs.pop("trust_remote_code", None)
        if not processor_dict or "image_processor" not in processor_dict:
            raise ValueError(f"{name} has no processor_config.json with image_processor; export the model again")
        settings = processor_dict["image_processor"]
        known = {name: settings[name] for name in ("aspect", "image_size", "encoder") if name in settings}
        images = CompactVisionImageProcessor(**known)
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
                    f"prompt {number} holds {prompt.count(IMAGE)} images; give one: the model was trained with one per "
                    "conversation and takes one"
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        """For vLLM: vision tokens and patches of images of these sizes."""
        from transformers.processing_utils import MultiModalData

        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.image_tokens] * count, num_image_patches=[1] * count)
