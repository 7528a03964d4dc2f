#!/usr/bin/env python
"""Make the demo's tiny but real models: `python training/demo_models.py OUT --captions chat.json --talk instruct.json`.

    OUT/clip    a CLIPVisionModel of 8 blocks, 64 pixels, patches of 16: 16 patch tokens; seeded random weights, frozen
    OUT/llm     a LlamaForCausalLM with a SentencePiece tokenizer, both trained for a moment on the given texts alone

As a real language model has read before it sees, so has this one: where an image will stand, it read its caption.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from training.batch import Encoded
    from training.tokenizer import Tokenizer

CLIP = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
VOCABULARY = 480
BATCH, RATE, WARMUP = 16, 2e-3, 20
MAX_LENGTH = 512


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for clip/ and llm/")
    parser.add_argument("--captions", type=Path, required=True, help="LLaVA JSON of captions (stage 1)")
    parser.add_argument("--talk", type=Path, required=True, help="LLaVA JSON of conversations (stage 2)")
    parser.add_argument("--steps", type=int, default=300, help="of the language model's reading (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.captions, arguments.talk, arguments.steps, arguments.seed)


def make(out: Path, captions: Path, talk: Path, steps: int, seed: int) -> None:
    """Write both models; the file `done` says that they are complete."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from training.tokenizer import Tokenizer

    torch.manual_seed(seed)
    caption_of = {r["image"]: r["conversations"][1]["value"] for r in json.loads(captions.read_text(encoding="utf-8"))}
    conversations = [r for r in json.loads(talk.read_text(encoding="utf-8")) if "image" in r]
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(out / "clip")
    (out / "llm").mkdir(parents=True, exist_ok=True)
    (out / "llm" / "tokenizer.model").write_bytes(train_tokenizer(caption_of, conversations))
    tokenizer = Tokenizer(out / "llm" / "tokenizer.model", legacy=False)
    tokenizer.save(out / "llm")
    config = LlamaConfig(
        **LLAMA,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    llm = LlamaForCausalLM(config)
    read(llm, reading_matter(caption_of, conversations, tokenizer), tokenizer.pad_id, steps, seed)
    llm.save_pretrained(out / "llm")
    (out / "done").touch()


def train_tokenizer(captions: dict[str, str], conversations: list[dict[str, Any]]) -> bytes:
    """A SentencePiece model (BPE with byte fallback, as Llama's) of the texts at hand."""
    import sentencepiece

    from training.conversation import prompt_for

    texts = set(captions.values())
    texts |= {turn["value"].replace("<image>", "").strip() for r in conversations for turn in r["conversations"]}
    sentences = [*sorted(texts), *[prompt_for("")] * 300]  # the frame of every prompt gets whole words
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


def reading_matter(
    captions: dict[str, str], conversations: list[dict[str, Any]], tokenizer: Tokenizer
) -> list[Encoded]:
    """Every conversation with its image's caption where the image will stand."""
    from training.batch import IGNORE, encode

    matter = []
    for record in conversations:
        text = captions.get(record["image"], "")
        turns = [{**turn, "value": turn["value"].replace("<image>", text)} for turn in record["conversations"]]
        matter.append(encode(turns, tokenizer, "v1", False, 0, MAX_LENGTH, -1))
    return [example for example in matter if any(label != IGNORE for label in example.labels)]


def read(llm: LlamaForCausalLM, matter: list[Encoded], pad_id: int, steps: int, seed: int) -> None:
    """Ordinary language modelling: the answers, given what stands before them."""
    import torch

    from training.batch import collate

    optimizer = torch.optim.AdamW(llm.parameters(), lr=RATE, weight_decay=0.0)
    shuffled = random.Random(seed)
    order: list[Encoded] = []
    start = time.perf_counter()
    for step in range(steps):
        if len(order) < BATCH:
            order = shuffled.sample(matter, len(matter)) + order
        batch = collate([order.pop() for _ in range(min(BATCH, len(order)))], pad_id)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, 1 - step / steps)
        loss = llm(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            rate = (step + 1) / (time.perf_counter() - start)
            print(f"read {step + 1}/{steps}  loss {float(loss):.3f}  {rate:.1f} steps/s", flush=True)


if __name__ == "__main__":
    main()
