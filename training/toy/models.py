"""Make the demo's tiny but real models from LLaVA-format data, each trained for a moment as its great sibling was.

    python -m training.toy.models OUT --captions chat.json --talk instruct.json --images DIR

OUT/llm     a LlamaForCausalLM with a SentencePiece tokenizer. It reads before it ever sees: captions, and
            conversations with the caption where the image will stand.
OUT/clip    a CLIPVisionModel of 8 blocks, 64 pixels, patches of 16: 16 patch tokens. It learns which caption belongs
            to which image (contrastive, with a text tower that is thrown away), and stays frozen from then on.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from training.benchmarks.questions import read_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import CLIPVisionModel, LlamaForCausalLM, PreTrainedModel

    from training.model.tokenizer import Tokenizer
    from training.text.labels import Labelled


class Training(TypedDict):
    """How long and how fast: optimizer steps, examples in each, and the peak learning rate."""

    steps: int
    batch: int
    lr: float


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
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,  # about width**-0.5: with Llama's 0.02 so narrow a model starts far more slowly
}
TEXT_TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCABULARY = 640
LLM_TRAINING: Training = {"steps": 300, "batch": 16, "lr": 3e-3}
CLIP_TRAINING: Training = {"steps": 200, "batch": 64, "lr": 1e-3}
WARMUP = 20  # steps in which the learning rate climbs
MAX_LENGTH = 512  # tokens of an example for the language model
MAX_CAPTION = 77  # tokens, CLIP's limit


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for clip/ and llm/")
    parser.add_argument("--captions", type=Path, required=True, help="LLaVA JSON of captions (stage 1)")
    parser.add_argument("--talk", type=Path, required=True, help="LLaVA JSON of conversations (stage 2)")
    parser.add_argument("--images", type=Path, required=True, help="the folder that the captions' images are in")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_models(arguments.out, arguments.captions, arguments.talk, arguments.images, arguments.seed)


def make_models(out: Path, captions: Path, talk: Path, images: Path, seed: int) -> None:
    """Write both models into folders of `out`; the file `done` says that they are complete.

    Args:
        out: folder for `llm/` and `clip/`.
        captions: LLaVA JSON of one caption per image.
        talk: LLaVA JSON of conversations about these images.
        images: the folder that image names are relative to.
        seed: of initial weights and of the order of examples.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.model.tokenizer import Tokenizer

    torch.manual_seed(seed)
    caption_of = {r["image"]: r["conversations"][1]["value"] for r in read_json(captions)}
    conversations = [r for r in read_json(talk) if "image" in r]
    (out / "llm").mkdir(parents=True, exist_ok=True)
    (out / "llm" / "tokenizer.model").write_bytes(train_tokenizer(caption_of, conversations))
    tokenizer = Tokenizer(out / "llm" / "tokenizer.model", legacy=False)
    tokenizer.save(out / "llm")
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    llm = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=tokenizer.vocab_size, **special))
    train_llm(llm, reading_matter(caption_of, conversations, tokenizer), tokenizer.pad_id, seed)
    llm.save_pretrained(out / "llm")
    train_vision_tower(caption_of, images, tokenizer, seed).save_pretrained(out / "clip")
    (out / "done").touch()


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


def reading_matter(
    captions: dict[str, str], conversations: list[dict[str, Any]], tokenizer: Tokenizer
) -> list[Labelled]:
    """Every caption after itself, and every conversation after its image's caption: it stands where the image will."""
    from pipeline.schema import Turn
    from training.model.markers import IGNORE, IMAGE
    from training.text.collate import Collator
    from training.text.labels import Labelled

    collator = Collator(tokenizer, "v1", MAX_LENGTH, image_tokens=0, image_token_id=-1)
    matter = []
    for text in captions.values():
        ids = tokenizer.encode(f"{text}\n")[1:]
        # The caption is given once and learned once: the model learns to repeat what stands in the image's place.
        matter.append(Labelled([tokenizer.bos_id, *ids, *ids], [IGNORE] * (1 + len(ids)) + ids))
    for record in conversations:
        text = captions.get(record["image"], "")
        turns = [Turn(speaker=t["from"], value=t["value"].replace(IMAGE, text)) for t in record["conversations"]]
        matter.append(collator.labelled(turns, has_image=False))
    return [example for example in matter if any(label != IGNORE for label in example.labels)]


def train_llm(llm: LlamaForCausalLM, matter: list[Labelled], pad_id: int, seed: int) -> None:
    """Ordinary language modelling: the answers, given what stands before them."""
    from training.text.collate import pad

    def loss(chosen: list[int]) -> Tensor:
        result: Tensor = llm(**pad([matter[i] for i in chosen], pad_id)).loss
        return result

    _train("llm", llm, loss, len(matter), LLM_TRAINING, seed)


def train_vision_tower(captions: dict[str, str], images: Path, tokenizer: Tokenizer, seed: int) -> CLIPVisionModel:
    """A vision tower that tells the images apart by what their captions say: CLIP's contrastive loss."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

    from pipeline.encoders.clip import Clip
    from pipeline.encoders.decode import load_image

    size = CLIP["image_size"]
    pixels = torch.stack(
        [torch.from_numpy(Clip().pixels(load_image((images / name).read_bytes()), "pad", size)) for name in captions]
    )
    texts = [[*tokenizer.encode(text)[: MAX_CAPTION - 1], tokenizer.eos_id] for text in captions.values()]
    ids = torch.full((len(texts), max(map(len, texts))), tokenizer.eos_id)  # (captions, longest), padded with </s>
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    text_tower = {**TEXT_TOWER, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": ids.shape[1]}
    text_tower |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    both = CLIPModel(CLIPConfig(text_config=text_tower, vision_config=CLIP, projection_dim=CLIP["hidden_size"]))

    def loss(chosen: list[int]) -> Tensor:
        result: Tensor = both(input_ids=ids[chosen], pixel_values=pixels[chosen], return_loss=True).loss
        return result

    _train("clip", both, loss, len(texts), CLIP_TRAINING, seed)
    tower = CLIPVisionModel(both.config.vision_config)
    tower.load_state_dict(both.vision_model.state_dict())
    return tower


def _train(
    name: str, model: PreTrainedModel, loss_of: Callable[[list[int]], Tensor], examples: int, how: Training, seed: int
) -> None:
    """Adam with a short warm-up, then down to 0 linearly; every epoch is shuffled anew.

    Args:
        name: of the model, in the lines of progress.
        loss_of: the loss of the examples with these numbers.
        examples: how many there are.
    """
    import torch

    steps, batch = how["steps"], min(how["batch"], examples)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    shuffled = random.Random(seed)
    order: list[int] = []
    start = time.perf_counter()
    for step in range(steps):
        if len(order) < batch:
            order = shuffled.sample(range(examples), examples)
        for group in optimizer.param_groups:
            group["lr"] = how["lr"] * min((step + 1) / WARMUP, 1 - step / steps)
        loss = loss_of([order.pop() for _ in range(batch)])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            rate = (step + 1) / (time.perf_counter() - start)
            print(f"{name} {step + 1}/{steps}  loss {float(loss.detach()):.3f}  {rate:.1f} steps/s", flush=True)


if __name__ == "__main__":
    main()
