"""Tiny files in the official layout of every benchmark."""

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training.benchmarks.yes_no import COGNITION, PERCEPTION


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def people(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one folder for each benchmark."""
    root = tmp_path_factory.mktemp("eval")
    write_gqa(root / "gqa")
    write_science_qa(root / "scienceqa")
    write_text_vqa(root / "textvqa")
    write_pope(root / "pope")
    write_mmbench(root / "mmbench")
    write_vqav2(root / "vqav2")
    write_vizwiz(root / "vizwiz")
    write_mme(root / "MME" / "MME_Benchmark_release_version")
    return root


def write_gqa(folder: Path) -> None:
    questions = {
        "201": {"question": "Is it red?", "imageId": "n1", "answer": "yes", "types": {"structural": "verify"}},
        "202": {"question": "What is it?", "imageId": "n1", "answer": "cat", "types": {"structural": "query"}},
        "203": {"question": "Where is it?", "imageId": "n2", "answer": "left", "types": {"structural": "query"}},
    }
    put(folder / "data" / "testdev_balanced_questions.json", questions)
    for name in ("n1", "n2"):
        put(folder / "data" / "images" / f"{name}.jpg", png())


def write_science_qa(folder: Path) -> None:
    problem = {
        "hint": "",
        "image": None,
        "answer": 0,
        "choices": ["x", "y"],
        "question": "Which?",
        "subject": "natural",
    }
    problems = {
        "4": {**problem, "hint": "Look.", "image": "image.png", "answer": 1},
        "5": problem,
        "11": {**problem, "image": "image.png", "choices": ["x", "y", "z"], "answer": 2},
        "99": problem,
    }
    put(folder / "problems.json", problems)
    put(folder / "pid_splits.json", {"train": ["99"], "test": ["4", "5", "11"]})
    for id in ("4", "11"):
        put(folder / "images" / "test" / id / "image.png", png())


def write_text_vqa(folder: Path) -> None:
    ten = ["nokia"] * 8 + ["the nokia", "phone"]
    rows = [
        {"question_id": 34602, "image_id": "aa", "question": "What brand?", "answers": ten},
        {"question_id": 34603, "image_id": "aa", "question": "What color?", "answers": ["Red"] * 10},
    ]
    put(folder / "TextVQA_0.5.1_val.json", {"data": rows})
    put(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "aa", "ocr_tokens": ["NOKIA", "12:30"]}]})
    put(folder / "train_images" / "aa.jpg", png())


POPE_LABELS = {"random": "yes no yes".split(), "popular": "no yes".split(), "adversarial": "yes no".split()}  # noqa: SIM905


def write_pope(folder: Path) -> None:
    listed = []
    for number, (kind, labels) in enumerate(POPE_LABELS.items(), 1):
        rows = [
            {
                "question_id": n,
                "image": f"COCO_val2014_{n}.jpg",
                "text": f"Is there a dog{n} in the image?",
                "label": label,
            }
            for n, label in enumerate(labels, 1)
        ]
        put(folder / "coco" / f"coco_pope_{kind}.json", lines(rows))
        for row in rows:
            text = row["text"] + "\nAnswer the question using a single word or phrase."
            id = number * 1_000_000 + row["question_id"]
            listed.append({"question_id": id, "image": row["image"], "text": text, "category": kind})
    put(folder / "llava_pope_test.jsonl", lines(listed))
    for n in (1, 2, 3):
        put(folder / "val2014" / f"COCO_val2014_{n}.jpg", png())


def write_mmbench(folder: Path) -> None:
    picture = base64.b64encode(png()).decode()
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
    columns += ["comment", "split"]
    tail = ["attribute", picture, "web", "coarse", "", "dev"]
    rows = [
        ["1", 'Which, "quoted"?', "A hint.", "cat", "dog", "", "", "A", *tail],
        ["1000001", 'Which, "quoted"?', "A hint.", "dog", "cat", "", "", "B", *tail],
        # Four options, yet three rows: the group is what the table holds.
        ["2", "Where?", "nan", "left", "right", "up", "down", "C", *tail],
        ["1000002", "Where?", "nan", "right", "up", "down", "left", "B", tail[0], "2", *tail[2:]],
        ["2000002", "Where?", "nan", "up", "down", "left", "right", "A", *tail],
    ]
    for name in ("mmbench_dev_20230712.tsv", "mmbench_dev_cn_20231003.tsv"):
        buffer = io.StringIO()
        csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows([columns, *rows])
        put(folder / name, buffer.getvalue())


def write_vqav2(folder: Path) -> None:
    rows = [
        {"question_id": 5, "image_id": 9, "question": "Is it?"},
        {"question_id": 6, "image_id": 9, "question": "What?"},
    ]
    truth = [
        {"question_id": 5, "answers": people(*["no"] * 10), "answer_type": "yes/no"},
        {"question_id": 6, "answers": people(*["2"] * 2, *["three"] * 8), "answer_type": "number"},
    ]
    put(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": rows})
    put(folder / "v2_mscoco_val2014_annotations.json", {"annotations": truth})
    put(folder / "val2014" / "COCO_val2014_000000000009.jpg", png())
    test = [{"question_id": n, "image_id": 7, "question": "What?"} for n in (70, 71, 72)]
    put(folder / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": test})
    put(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": test[:2]})


def write_vizwiz(folder: Path) -> None:
    said = [{"answer": a, "answer_confidence": "yes"} for a in ["cup"] * 4 + ["unanswerable"] * 6]
    rows = [{"image": "VizWiz_val_00000000.jpg", "question": "What is it?", "answers": said, "answer_type": "other"}]
    put(folder / "Annotations" / "val.json", rows)
    put(folder / "val" / "VizWiz_val_00000000.jpg", png())
    put(folder / "Annotations" / "test.json", [{"image": "VizWiz_test_0.jpg", "question": "What?"}])


def write_mme(root: Path) -> None:
    for category in (*PERCEPTION, *COGNITION):
        nested = category in ("posters", "artwork")
        texts = root / category / "questions_answers_YN" if nested else root / category
        images = root / category / "images" if nested else root / category
        for n in (1, 2):
            ask = "Please answer yes or no."
            put(texts / f"{n:04d}.txt", f"Is this {category}? {ask}\tYes\nIs this a hat?  {ask}\tNo\n")
            put(images / f"{n:04d}.png", png())


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """An exported model of random weights that answers a few tokens."""
    return tiny_model(tmp_path_factory.mktemp("model"), tiny_tokenizer)


def tiny_model(folder: Path, tiny_tokenizer: Path) -> Path:
    """Write it into `folder`."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from training.model.model import CompactVisionForConditionalGeneration
    from training.model.processor import CompactVisionImageProcessor, CompactVisionProcessor, CompactVisionTokenizer
    from training.model.reducers import build_connector, connector_config

    torch.manual_seed(0)
    sides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=736, initializer_range=0.3, pad_token_id=0, **sides))
    tower = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **sides))
    connector = build_connector(connector_config(arm="stf", block=1, grid=4, vision_width=32, llm_width=32))
    whole = CompactVisionForConditionalGeneration.from_parts(llm, connector, tower)
    (tokenizer_file,) = tiny_tokenizer.glob("*.model")
    tokenizer = CompactVisionTokenizer(str(tokenizer_file), image_token_id=whole.config.image_token_id)
    images = CompactVisionImageProcessor(aspect="pad", image_size=32)
    whole.generation_config.eos_token_id = tokenizer.eos_token_id
    CompactVisionProcessor(images, tokenizer, image_tokens=connector.tokens).save_pretrained(folder)
    whole.save_pretrained(folder)
    return folder
