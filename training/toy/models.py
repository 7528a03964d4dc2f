"""Make the demo's tiny but real models from LLaVA-format data, each trained for a moment as its great sibling was.

    python -m training.toy.models OUT --captions chat.json --talk instruct.json --images DIR

OUT/llm     a LlamaForCausalLM with a SentencePiece tokenizer. It reads before it ever sees (`reading.py`).
OUT/clip    a CLIPVisionModel of 8 blocks, 64 pixels, patches of 16: 16 patch tokens. It learns to let captions be told
            from them (`tower.py`), and stays frozen from then on.

The two are made side by side, each on one core. They are kept (`cache.py`): the same code and data make the same again.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.images import find_file
from training.toy.cache import digest_of, kept_or_made
from training.toy.own_data import read_records
from training.toy.settings import LLAMA, SIZES, VOCABULARY, Size

if TYPE_CHECKING:
    from training.model.tokenizer import Tokenizer


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for clip/ and llm/")
    parser.add_argument("--captions", type=Path, required=True, help="LLaVA JSON of captions (stage 1)")
    parser.add_argument("--talk", type=Path, required=True, help="LLaVA JSON of conversations (stage 2)")
    parser.add_argument("--images", type=Path, required=True, help="the folder that the captions' images are in")
    parser.add_argument("--size", choices=SIZES, default="small", help="how long they learn (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    given, size = (arguments.captions, arguments.talk, arguments.images), SIZES[arguments.size]
    try:
        digest = _digest(*given, size, arguments.seed)
        kept_or_made(arguments.out, digest, lambda out: make_models(out, *given, size, arguments.seed))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    (arguments.out / "done").touch()


def _digest(captions: Path, talk: Path, images: Path, size: Size, seed: int) -> str:
    """Of all that the models are made from: this code, its libraries, the settings and the data."""
    code = list(Path(__file__).parent.glob("*.py"))
    named = sorted({record["image"] for record in read_records(captions) if "image" in record})
    shown = [path for name in named if (path := find_file(images, name)) is not None]
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "sentencepiece")]
    return digest_of([*code, captions, talk, *shown], json.dumps([size, seed, versions], sort_keys=True))


def make_models(out: Path, captions: Path, talk: Path, images: Path, size: Size, seed: int) -> None:
    """Write both models into folders of `out`.

    Args:
        out: folder for `llm/` and `clip/`.
        captions: LLaVA JSON of one caption per image.
        talk: LLaVA JSON of conversations about these images.
        images: the folder that image names are relative to.
        size: how long each is trained.
        seed: of initial weights and of the order of examples.
    """
    from training.model.tokenizer import Tokenizer

    caption_of = {r["image"]: r["conversations"][1]["value"] for r in read_records(captions) if "image" in r}
    conversations = [r for r in read_records(talk) if "image" in r]
    (out / "llm").mkdir(parents=True, exist_ok=True)
    (out / "llm" / "tokenizer.model").write_bytes(train_tokenizer(caption_of, conversations))
    Tokenizer(out / "llm" / "tokenizer.model", legacy=False).save(out / "llm")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as side_by_side:
        made = [
            side_by_side.submit(make_llm, out, caption_of, conversations, size, seed),
            side_by_side.submit(make_clip, out, caption_of, images, size, seed),
        ]
        for part in made:
            part.result()


def make_llm(out: Path, captions: dict[str, str], conversations: list[dict[str, Any]], size: Size, seed: int) -> None:
    """The language model, beside its tokenizer in `out`/llm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.toy.reading import reading_matter, train_llm

    tokenizer = _start(out, seed)
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    llm = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=tokenizer.vocab_size, **special))
    train_llm(llm, reading_matter(captions, conversations, tokenizer, seed), tokenizer.pad_id, size, seed)
    llm.save_pretrained(out / "llm")


def make_clip(out: Path, captions: dict[str, str], images: Path, size: Size, seed: int) -> None:
    """The vision tower, in `out`/clip."""
    from training.toy.tower import train_tower

    train_tower(captions, images, _start(out, seed), size, seed).save_pretrained(out / "clip")


def _start(out: Path, seed: int) -> Tokenizer:
    """One thread and its seed: what is made does not depend on how many cores there are. The tokenizer of `out`."""
    import torch

    from training.model.tokenizer import Tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return Tokenizer(out / "llm" / "tokenizer.model", legacy=False)


def train_tokenizer(captions: dict[str, str], conversations: list[dict[str, Any]]) -> bytes:
    """A SentencePiece model (BPE with byte fallback, as Llama's) of the texts at hand."""
    import sentencepiece

    from training.model.markers import IMAGE
    from training.text.templates import prompt_for

    texts = list(captions.values())
    texts += [turn["value"].replace(IMAGE, "").strip() for r in conversations for turn in r["conversations"]]
    # Each as often as it is said: frequent words become one piece. So do those of the frame of every prompt.
    sentences = [*texts, *[prompt_for("")] * 300]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        user_defined_symbols=["USER"],  # one piece with and without a space before it, as in Llama's vocabulary
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # more would make the pieces depend on chance
        minloglevel=2,
    )
    return model.getvalue()


if __name__ == "__main__":
    main()
