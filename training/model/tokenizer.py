"""Llama's SentencePiece tokenizer, id for id as the slow `LlamaTokenizer` that LLaVA-1.5 was trained with.

transformers 5 builds its tokenizer from the same file without the scores of its pieces, and so splits some texts
otherwise; SentencePiece itself does not. This file needs only sentencepiece: it travels with every exported model.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"  # SentencePiece's mark of a space
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
# A protobuf message that is appended to another overrides its fields: normalizer_spec { add_dummy_prefix: false }.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_SPECIAL = re.compile(f"({re.escape(UNK)}|{re.escape(BOS)}|{re.escape(EOS)})")


class Tokenizer:
    """Text to ids and back.

    Args:
        model_file: `tokenizer.model`.
        legacy: whether text after a special token gets a space before it, as tokenizers did before 2023
            (`legacy` in tokenizer_config.json; Vicuna-7B v1.5 has false).

    Raises:
        ValueError: if the file is not a SentencePiece model with Llama's special tokens.
    """

    def __init__(self, model_file: Path, legacy: bool) -> None:
        self.model_file = Path(model_file)
        self.legacy = legacy
        self._plain = _load(self.model_file)
        self._pieces = self._plain if legacy else _load(self.model_file, NO_DUMMY_PREFIX)
        self._unk_length = len(self._pieces.encode(UNK))  # pieces of the text "<unk>", which `_encode_part` cuts off
        self.unk_id, self.bos_id, self.eos_id = (self._plain.piece_to_id(piece) for piece in (UNK, BOS, EOS))
        special = (self._plain.unk_id(), self._plain.bos_id(), self._plain.eos_id())
        if special != (0, 1, 2):
            raise ValueError(
                f"{self.model_file}: the ids of its unk, bos and eos are {special}, expected Llama's <unk>, <s>, </s> "
                "with 0, 1, 2"
            )
        self.pad_id = self.unk_id  # as LLaVA-1.5

    @classmethod
    def from_pretrained(cls, name: str, revision: str | None = None) -> Tokenizer:
        """The tokenizer of a folder or a Hub id that has `tokenizer.model`.

        Raises:
            ValueError: if it has none.
        """
        folder = Path(name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            wanted = ["tokenizer.model", "tokenizer_config.json"]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        settings = folder / "tokenizer_config.json"
        legacy = json.loads(settings.read_text(encoding="utf-8")).get("legacy") if settings.is_file() else True
        # Absent or null is legacy: those files are older than the choice.
        return cls(folder / "tokenizer.model", legacy is not False)

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._plain.vocab_size())

    def encode(self, text: str) -> list[int]:
        """BOS and the ids of `text`; `<s>`, `</s>` and `<unk>` in it are the special tokens.

        Raises:
            ValueError: if it holds half a surrogate pair, which no UTF-8 text does.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds half a surrogate pair at character {error.start}: {text[: error.start + 1][-60:]!r}; "
                "write it in UTF-8"
            ) from error
        if not self.legacy and text:
            text = SPACE + text.replace(SPACE, " ")  # one space before the whole text, none after special tokens
        ids: list[int] = []
        parts = [part for part in _SPECIAL.split(text) if part]
        for number, part in enumerate(parts):
            if _SPECIAL.fullmatch(part):
                ids.append(self._plain.piece_to_id(part))
                continue
            pieces = self._encode_part(part)
            # A text that begins with a special token has no space before it: drop the one that was added above.
            only_space = number == 0 and len(parts) > 1 and [self._plain.id_to_piece(i) for i in pieces] == [SPACE]
            if self.legacy or not only_space:
                ids += pieces
        return [self.bos_id, *ids]

    def _encode_part(self, text: str) -> list[int]:
        """Ids of text without special tokens."""
        if self.legacy or not text.startswith((SPACE, " ")):
            pieces: list[int] = self._pieces.encode(text)
            return pieces
        # SentencePiece drops a space at the beginning; behind some other text it stays.
        pieces = self._pieces.encode(UNK + text)
        return pieces[self._unk_length :]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Ids to text; ids beyond the vocabulary (image placeholders) are left out."""
        special = {self.unk_id, self.bos_id, self.eos_id}
        # SentencePiece decodes runs of ordinary ids; a special one ends the run, and one more </s> ends the last.
        text, run = "", list[int]()
        for i in [*ids, self.eos_id]:
            if i not in special:
                run += [i] if 0 <= i < self.vocab_size else []
                continue
            text += self._plain.decode(run)
            run = []
            if not skip_special_tokens:
                text += str(self._plain.id_to_piece(i))
        return text if skip_special_tokens else text.removesuffix(EOS)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.model` and `tokenizer_config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "tokenizer.model").resolve() != self.model_file.resolve():
            shutil.copyfile(self.model_file, folder / "tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": self.legacy, "add_bos_token": True}
        settings |= {"unk_token": UNK, "bos_token": BOS, "eos_token": EOS, "pad_token": UNK}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _load(model_file: Path, override: bytes = b"") -> SentencePieceProcessor:
    """The model of a file; the protobuf fields `override` replace those of the file."""
    if not model_file.is_file():
        raise ValueError(
            f"{model_file} does not exist: the language model's SentencePiece file is needed (for Vicuna it is on the "
            "Hub beside the weights); name its folder with model.tokenizer"
        )
    try:
        found = SentencePieceProcessor()
        found.load_from_serialized_proto(model_file.read_bytes() + override)
        return found
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{model_file} is no SentencePiece model: {error}; copy or download it again") from error
