#!/usr/bin/env python
"""Ask a model questions about images: `python training/evaluate.py MODEL --questions FILE.jsonl --images DIR`.

Each line of the questions is LLaVA's: {"question_id", "image", "text"}, with "answer" (and "category") where the
truth is known. Answers go to `--out` as {"question_id", "image", "prompt", "text", ...}; running the same command
again answers only what is missing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that training/train.py exported, or a Hub id")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines")
    parser.add_argument("--images", type=Path, required=True, help="folder that the questions' images are relative to")
    parser.add_argument("--out", type=Path, required=True, help="answers go here, scores beside it as .scores.json")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument(
        "--shuffle-images", type=int, metavar="SEED", help="show each question another question's image"
    )
    arguments = parser.parse_args()
    try:
        questions = read_questions(arguments.questions, arguments.images)[: arguments.limit]
    except ValueError as error:
        sys.exit(f"error: {error}")
    shown = questions if arguments.shuffle_images is None else with_other_images(questions, arguments.shuffle_images)
    answers = answer_all(
        arguments.model, shown, arguments.images, arguments.out, arguments.batch_size, arguments.max_new_tokens
    )
    scores = score(answers)
    arguments.out.with_suffix(".scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    print(json.dumps(scores))


def read_questions(path: Path, images: Path) -> list[dict[str, Any]]:
    """Read and check a questions file.

    Raises:
        ValueError: naming the file, the line and what is missing; every missing image at once.
    """
    if not path.is_file():
        raise ValueError(f"questions file {path} does not exist")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            question = json.loads(line)
            missing = [key for key in ("question_id", "image", "text") if key not in question]
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if missing:
            raise ValueError(f"{path}:{number} lacks {', '.join(missing)}; it has {', '.join(question)}")
        questions.append(question)
    root = images.resolve()
    absent = sorted({q["image"] for q in questions if not _inside(root, q["image"])})
    if absent:
        raise ValueError(f"{len(absent)} image(s) are not in {images}: {', '.join(absent[:5])} ...")
    return questions


def _inside(root: Path, name: str) -> bool:
    path = (root / name).resolve()
    return path.is_relative_to(root) and path.is_file()


def with_other_images(questions: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The same questions, each with another question's image: what a model that looks cannot answer any more."""
    images = sorted({q["image"] for q in questions})
    if len(images) < 2:
        raise ValueError("shuffling images needs at least two different ones")
    order = images.copy()
    random.Random(seed).shuffle(order)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [{**q, "image": following[q["image"]]} for q in questions]


def answer_all(
    model_name: str, questions: list[dict[str, Any]], images: Path, out: Path, batch_size: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy answers to all questions, each appended to `out` as soon as it is known."""
    done = _read_answers(out)
    todo = [q for q in questions if (q["question_id"], q["image"]) not in done]
    if todo:
        import torch

        from training.model import CompactVisionForConditionalGeneration
        from training.processor import CompactVisionProcessor

        device = "cuda" if torch.cuda.is_available() else "cpu"
        processor = CompactVisionProcessor.from_pretrained(model_name)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = CompactVisionForConditionalGeneration.from_pretrained(model_name, dtype=dtype).to(device).eval()
        out.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with out.open("a", encoding="utf-8") as file:
            for first in range(0, len(todo), batch_size):
                batch = todo[first : first + batch_size]
                for question, text in zip(batch, _answer(model, processor, batch, images, max_new_tokens), strict=True):
                    record = {**question, "prompt": question["text"], "text": text}
                    done[question["question_id"], question["image"]] = record
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                _progress(first + len(batch), len(todo), time.perf_counter() - start)
    return [done[q["question_id"], q["image"]] for q in questions]


def _answer(
    model: Any, processor: Any, questions: list[dict[str, Any]], images: Path, max_new_tokens: int
) -> list[str]:
    import torch
    from PIL import Image

    from training.conversation import prompt_for

    pictures = [Image.open(images / q["image"]).convert("RGB") for q in questions]
    prompts = [prompt_for(f"<image>\n{q['text']}") for q in questions]
    inputs = processor(images=pictures, text=prompts, return_tensors="pt", padding=True).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _read_answers(path: Path) -> dict[tuple[Any, str], dict[str, Any]]:
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        print(f"note: {path} ends in half a line; that question is asked again", file=sys.stderr)
        path.write_text("".join(lines[:-1]), encoding="utf-8")
        lines = lines[:-1]
    records = [json.loads(line) for line in lines]
    return {(r["question_id"], r["image"]): r for r in records}


def _progress(done: int, total: int, seconds: float) -> None:
    rate = done / seconds
    print(f"answered {done}/{total}  {rate:.1f} questions/s  ETA {(total - done) / rate:.0f} s", file=sys.stderr)


def normalise(text: str) -> str:
    """Case, surrounding space and a final full stop do not matter in a one-word answer."""
    return text.strip().rstrip(".").strip().lower()


def score(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy over the answers whose truth is known, in all and by category; counts beside every figure."""
    known = [a for a in answers if "answer" in a]
    by_category: dict[str, list[bool]] = defaultdict(list)
    for a in known:
        by_category[str(a.get("category", "all"))].append(normalise(a["text"]) == normalise(str(a["answer"])))
    right = sum(sum(hits) for hits in by_category.values())
    return {
        "questions": len(answers),
        "scored": len(known),
        "accuracy": right / len(known) if known else None,
        "categories": {
            name: {"accuracy": sum(hits) / len(hits), "questions": len(hits)}
            for name, hits in sorted(by_category.items())
        },
    }


if __name__ == "__main__":
    main()
