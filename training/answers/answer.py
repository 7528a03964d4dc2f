"""Answers of an exported model to many questions: in batches, by several processes, resumed after a crash."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]  # question_id, image (or None), text; answered: prompt is what was asked, text the answer


class Ranks(NamedTuple):
    """This process among those that share the questions, as Composer's launcher and torchrun tell it."""

    rank: int
    world: int
    local: int

    @classmethod
    def of_environment(cls) -> Ranks:
        """RANK, WORLD_SIZE and LOCAL_RANK; one process where they are not set."""
        names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        return cls(*(int(os.environ.get(name, default)) for name, default in names))


def answer_all(
    model: str,
    asked: Sequence[Record],
    image_bytes: Callable[[str], bytes],
    out: Path,
    batch_size: int,
    max_new_tokens: int,
) -> list[Record] | None:
    """Greedy answers, each appended to a file as soon as it is known; None on every rank but the first.

    Args:
        asked: `question_id`, `image` and `text` (what is asked, without `<image>`) of each question.
        image_bytes: from an image's name to the bytes of its file.
        out: JSON lines; other ranks write beside it, and the first puts all together at the end.

    Raises:
        ValueError: if the model cannot be read, an image cannot be decoded, or `out` is another model's.
    """
    ranks = Ranks.of_environment()
    out.parent.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        _claim(out, {"weights": weights_digest(model) or model, "max_new_tokens": max_new_tokens})
    known = _known(out)
    mine = [q for q in asked[ranks.rank :: ranks.world] if not _is_answered(q, known)]
    if mine:
        part = out if ranks.world == 1 else out.with_name(f"{out.name}.{ranks.rank}-of-{ranks.world}")
        _answer_mine(model, mine, image_bytes, part, batch_size, max_new_tokens, ranks)
    if ranks.world > 1:
        _wait_for_others(ranks)
    if ranks.rank != 0:
        return None
    known = _known(out)
    records = [known[q["question_id"], q["image"]] for q in asked]
    _merge(out, known.values())
    return records


def _claim(out: Path, mine: Record) -> None:
    """One file of answers is one model's."""
    path = out.with_name(f"{out.name}.run.json")
    if path.exists() and (out.exists() or _parts(out)):
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differing = [
            f"{key}: {theirs.get(key)!r} there, {mine[key]!r} now" for key in mine if theirs.get(key) != mine[key]
        ]
        if differing:
            raise ValueError(
                f"{out} holds the answers of another run; name another file with --out, or delete it:\n  "
                + "\n  ".join(differing)
            )
    path.write_text(json.dumps(mine, indent=1), encoding="utf-8")


def weights_digest(model: str) -> str | None:
    """A digest of a folder's weights by their sizes, beginnings and ends, wherever it lies; None for a Hub id."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def _parts(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.*-of-*"))


def _known(out: Path) -> dict[tuple[Any, Any], Record]:
    """Every answer so far, whatever process wrote it."""
    known: dict[tuple[Any, Any], Record] = {}
    for path in [out, *_parts(out)]:
        if path.exists():
            known |= {(r["question_id"], r["image"]): r for r in _read(path)}
    return known


def _read(path: Path) -> list[Record]:
    """Answers of one file; half a line at its end, left by a crash, is not one."""
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if last:
        print(f"note: {path} ends in half a line; that question is asked again", file=sys.stderr)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({**record, "question_id": record["question_id"], "image": record["image"]})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is not an answer ({error}); delete that line, or the file") from error
    return records


def _is_answered(question: Record, known: dict[tuple[Any, Any], Record]) -> bool:
    record = known.get((question["question_id"], question["image"]))
    return record is not None and record.get("prompt") == question["text"]


def _answer_mine(
    name: str,
    questions: list[Record],
    image_bytes: Callable[[str], bytes],
    part: Path,
    batch_size: int,
    max_new_tokens: int,
    ranks: Ranks,
) -> None:
    model, processor = load_model(name, ranks)
    _drop_half_line(part)
    start = time.perf_counter()
    with part.open("a", encoding="utf-8") as file:
        for first in range(0, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            texts = generate(model, processor, batch, image_bytes, max_new_tokens)
            for question, text in zip(batch, texts, strict=True):
                record = {**question, "prompt": question["text"], "text": text}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            _progress(first + len(batch), len(questions), time.perf_counter() - start, ranks)


def _drop_half_line(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            path.write_bytes(data[: data.rfind(b"\n") + 1])


def load_model(name: str, ranks: Ranks) -> tuple[Any, Any]:
    """Model and processor of an exported folder or Hub id, on this rank's device, in bf16 on a GPU.

    Raises:
        ValueError: if there is none.
    """
    import torch

    from training.model.model import CompactVisionForConditionalGeneration
    from training.model.processor import CompactVisionProcessor

    gpu = torch.cuda.is_available()
    device = f"cuda:{ranks.local % torch.cuda.device_count()}" if gpu else "cpu"
    if ranks.world > 1 and not gpu:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.world))
    try:
        processor = CompactVisionProcessor.from_pretrained(name)
        dtype = torch.bfloat16 if gpu else torch.float32
        model = CompactVisionForConditionalGeneration.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model {name!r} cannot be read: {first}; name a folder that training/train.py exported"
        ) from error
    return model.to(device).eval(), processor


def generate(
    model: Any, processor: Any, questions: list[Record], image_bytes: Callable[[str], bytes], max_new_tokens: int
) -> list[str]:
    """Greedy answers to one batch of questions.

    Raises:
        ValueError: if an image cannot be decoded, naming it and its question.
    """
    pictures = [None if q["image"] is None else _picture(q, image_bytes) for q in questions]
    return reply(model, processor, [q["text"] for q in questions], pictures, max_new_tokens)


def reply(model: Any, processor: Any, texts: Sequence[str], pictures: Sequence[Any], max_new_tokens: int) -> list[str]:
    """Greedy answers to texts, each with one PIL picture or None; padded on the left, the same as each by itself."""
    import torch

    from training.text.templates import prompt_for

    asked = zip(texts, pictures, strict=True)
    prompts = [prompt_for(text if picture is None else f"<image>\n{text}") for text, picture in asked]
    images = [picture for picture in pictures if picture is not None] or None
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _picture(question: Record, image_bytes: Callable[[str], bytes]) -> Any:
    from pipeline.encoder import load_image

    try:
        return load_image(image_bytes(question["image"]))  # upright RGB, as the features were made
    except (ValueError, OSError) as error:
        raise ValueError(f"image {question['image']} of question {question['question_id']}: {error}") from error


def _progress(done: int, total: int, seconds: float, ranks: Ranks) -> None:
    rate = done / seconds
    who = f"process {ranks.rank} of {ranks.world}: " if ranks.world > 1 else ""
    left = (total - done) / rate
    print(f"{who}answered {done}/{total}  {rate:.1f} questions/s  ETA {left:.0f} s", file=sys.stderr, flush=True)


def _wait_for_others(ranks: Ranks) -> None:
    """Until every rank has written its last answer; a rank that dies ends the job through its launcher."""
    from datetime import timedelta

    import torch.distributed

    if not torch.distributed.is_initialized():  # in an ablation, training has done so
        torch.distributed.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world, timeout=timedelta(days=7))
    torch.distributed.barrier()


def _merge(out: Path, records: Iterable[Record]) -> None:
    """All answers in `out`, the parts of other processes removed."""
    parts = _parts(out)
    if parts:
        fresh = out.with_name(f"{out.name}.fresh")
        fresh.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        fresh.replace(out)
        for part in parts:
            part.unlink()


def in_processes(count: int, command: list[str]) -> int:
    """Run `command` as so many ranks on this machine; the first failure ends all. Returns the exit code."""
    import socket
    import subprocess

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)
    ]
    try:
        while any(process.poll() is None for process in ranks):
            failed = [process.returncode for process in ranks if process.returncode]
            if failed:
                return int(failed[0])
            time.sleep(0.1)
        return max((process.returncode for process in ranks), key=abs)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
