#!/usr/bin/env python
"""Answers of an exported model under the transformers on PYTHONPATH; nothing of this project is imported. JSON.

By hand, after `make demo` and `make transformers`, and the same with --against for any other version:

    demo=runs/demo/data
    PYTHONPATH=build/transformers/5.16.0 python tests/release/answers.py runs/demo/finetune/model \
        $demo/heldout.jsonl $demo/images --limit 60 > 5.16.0.json
"""

import argparse
import json
import sys
from pathlib import Path

sys.modules["training"] = sys.modules["pipeline"] = None  # importing either would fail


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an exported folder")
    parser.add_argument("questions", type=Path, help="JSON lines: text, and image or null")
    parser.add_argument("images", type=Path)
    parser.add_argument("--limit", type=int, help="so many questions; default: all")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--against", type=Path, help="what another version printed; exits with 1 if an answer differs")
    arguments = parser.parse_args()
    lines = arguments.questions.read_text(encoding="utf-8").splitlines()[: arguments.limit]
    found = answers(arguments.model, [json.loads(line) for line in lines], arguments.images, arguments.batch_size)
    print(json.dumps(found, ensure_ascii=False))
    if arguments.against:
        other = json.loads(arguments.against.read_text(encoding="utf-8"))
        for how in ("greedy", "beams"):
            equal = sum(mine == theirs for mine, theirs in zip(found[how], other[how], strict=True))
            said = f"{how}: {equal} of {len(lines)} as under {other['transformers']}"
            print(f"transformers {found['transformers']}, {said}", file=sys.stderr)
        sys.exit(any(found[how] != other[how] for how in ("greedy", "beams")))


def answers(folder: Path, questions: list[dict], images: Path, batch_size: int) -> dict:
    """Greedy answers in batches padded on the left, with and without an image; and of three beams."""
    import torch
    import transformers
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    found: dict = {"transformers": transformers.__version__, "from": transformers.__file__}
    found |= {"greedy": [], "beams": [], "own cache": []}
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        pictures = [Image.open(images / question["image"]) for question in batch if question["image"]]
        prompts = [
            processor.apply_chat_template(talk(question), add_generation_prompt=True, tokenize=False)
            for question in batch
        ]
        inputs = processor(images=pictures or None, text=prompts, return_tensors="pt", padding=True)
        own = {"past_key_values": transformers.DynamicCache()}  # the name that each version takes
        for how, settings in (("greedy", {}), ("beams", {"num_beams": 3}), ("own cache", own)):
            said = model.generate(**inputs, max_new_tokens=16, do_sample=False, **settings)
            found[how] += processor.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def talk(question: dict) -> list[dict]:
    """One message, with an image or without."""
    content = [{"type": "image"}] if question["image"] else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": question["text"]}]}]


if __name__ == "__main__":
    main()
