"""Benchmarks answered with yes or no: POPE and MME."""

from __future__ import annotations

import glob
import json
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar

from training.benchmarks.metrics import Scored, mean_f1, mean_percent, mme_answer, mme_total, pope_answer
from training.benchmarks.questions import SHORT, Answers, Benchmark, Found, Question, Row, read_json_lines, read_text

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_IN_A_ROW = 3  # one prompt, or two, recur elsewhere
_ASK = "Please answer yes or no."


class POPE(Benchmark):
    """POPE on COCO: F1 of `yes` in each of three splits, and their mean.

    LLaVA-1.5 uses the files of commit e3e3926, with 2910 random questions; the newest ones have 3000.
    """

    name = "pope"
    files = "coco/coco_pope_{random,popular,adversarial}.json, llava_pope_test.jsonl if there is one; val2014/"
    folders = ("pope", "POPE")
    splits = ("coco",)
    kinds = ("random", "popular", "adversarial")
    hint = (
        "put LLaVA's llava_pope_test.jsonl into the folder, which tells what the ids mean, or give each line an image"
    )

    def read(self) -> list[Question]:
        """`coco/coco_pope_{random,popular,adversarial}.json`, and COCO's `val2014/`."""
        origin = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
        paths = {
            kind: self.find(origin, f"coco/coco_pope_{kind}.json", f"coco_pope_{kind}.json") for kind in self.kinds
        }
        self.image_folder = self.folder / "val2014"
        self.check()
        questions = [
            Question(f"{kind}/{row['question_id']}", row["text"] + SHORT, row["image"], _label(row), kind)
            for kind, path in paths.items()
            for row in read_json_lines(path)
        ]
        self._rows = {kind: [q for q in questions if q.group == kind] for kind in self.kinds}
        self._asked: dict[tuple[Any, str], list[str]] = defaultdict(list)
        for q in questions:
            self._asked[q.image, _plain(q.text)].append(q.id)
        self._plain_ids = {q.id.partition("/")[2]: q.id for q in questions}
        self._unique = len(self._plain_ids) == len(questions)
        listed = self.folder / "llava_pope_test.jsonl"  # LLaVA's question file tells what its ids mean
        self._listed = {str(row["question_id"]): row for row in read_json_lines(listed)} if listed.is_file() else {}
        self._arranged: dict[tuple[Any, Any], str] = {}
        return questions

    def arrange(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Without LLaVA's question file, the prompts of a whole file of answers tell the order of the splits.

        Lines may be missing, repeated or damaged: what agrees with the order of the questions for a while is aligned.
        """
        self._arranged = {}
        if self._listed or any("image" in record for record in records):
            return
        asked = [_plain(str(record.get("prompt", ""))) for record in records]
        # LLaVA answers the three splits one after another; which comes first is not said, so all six orders are tried.
        found = [
            aligned(asked, [(q.id, _plain(q.text)) for kind in order for q in self._rows[kind]])
            for order in permutations(self.kinds)
        ]
        longest = max(found, key=len)
        whole = len(longest) == len(asked) == sum(map(len, self._rows.values()))
        if not whole and (2 * len(longest) < len(asked) or any(len(f) == len(longest) and f != longest for f in found)):
            return  # another order, or one that the prompts do not tell
        self._arranged = {(records[row].get("file"), records[row].get("row")): id for row, id in longest.items()}

    def identify(self, record: Mapping[str, Any], taken: Container[str]) -> str | None:
        """By split and question, as far as the record, LLaVA's question file or the name of the file tell them."""
        id = str(record.get("question_id"))
        if id in self._by_id:
            return id
        told = {**record, **{key: value for key, value in self._listed.get(id, {}).items() if key != "question_id"}}
        kind = self._kind(record)
        if "image" in told:
            text = _plain(str(told.get("prompt", told.get("question", told.get("text", "")))))
            asked = [a for a in self._asked.get((told["image"], text), []) if kind is None or a.startswith(f"{kind}/")]
            fallback = f"{kind}/{id}" if f"{kind}/{id}" in self._by_id else None
            return next((a for a in asked if a not in taken), asked[-1] if asked else fallback)
        if "question_id" in record:
            # Ids begin anew in each split of POPE's files: one names a question only together with its split.
            if kind is not None or self._unique:
                found = self._plain_ids.get(id) if kind is None else f"{kind}/{id}"
                return found if found in self._by_id else None
            return self._arranged.get((record.get("file"), record.get("row")))
        rows = self._rows.get(str(kind), [])  # POPE's own files: question and answer, in the order of the labels
        row = record.get("row")
        return rows[row].id if isinstance(row, int) and 0 <= row < len(rows) else None

    def _kind(self, record: Mapping[str, Any]) -> str | None:
        """The split of a record, as LLaVA's question file, the record or the name of its file tell it."""
        listed = self._listed.get(str(record.get("question_id")), record)
        told = listed.get("category", next((kind for kind in self.kinds if kind in str(record.get("file", ""))), None))
        return None if told is None else str(told)

    def remarks(self, missing: int, unknown: int) -> list[str]:
        """POPE's labels have two versions, which do not pair."""
        if not missing and not unknown:
            return []
        return [
            f"these labels have {len(self._rows['random'])} random questions; LLaVA-1.5 used those of commit e3e3926, "
            "with 2910, the newest have 3000: answers to another version leave questions missing or unknown"
        ]

    def score(self, answers: Answers) -> dict[str, Scored]:
        """F1, paired by question; accuracy; F1 of each split."""
        said = {id: pope_answer(answer.text) for id, answer in answers.items()}
        units = {q.id: (q.group, (said.get(q.id, _other(q.truth)), q.truth)) for q in self.questions}
        scores = {"f1": Scored("mean F1 of the three splits, paired by question", units, mean_f1)}
        for kind in self.kinds:
            part = {id: unit for id, unit in units.items() if unit[0] == kind}
            scores[f"f1_{kind}"] = Scored(f"F1, {kind}", part, mean_f1)
        hits = {id: ("", float(given == truth)) for id, (_, (given, truth)) in units.items()}
        scores["accuracy"] = Scored("accuracy over all questions", hits, mean_percent)
        return scores

    def score_rows(self, rows: Sequence[Row]) -> dict[str, Scored]:
        """F1 as LLaVA's script pairs: the n-th answer of a split in the file against its n-th label.

        Where the file leaves an answer out or repeats one, all later ones of its split meet the wrong label: `f1` has
        no such flaw. Nothing if a split has no answer.
        """
        given: dict[str, list[str]] = defaultdict(list)
        truths: dict[str, list[str]] = defaultdict(list)
        for record, id, answer in rows:
            if id is None or id in self.kept:
                given[self._kind(record) or "" if id is None else self._by_id[id].group].append(
                    pope_answer(answer.text)
                )
        for q in self.questions:
            truths[q.group].append(q.truth)
        if any(not given[kind] for kind in truths):
            return {}
        units = {
            f"{kind}#{n}": (kind, pair)
            for kind in truths
            for n, pair in enumerate(zip(given[kind], truths[kind], strict=False))
        }
        return {"f1_row_order": Scored("mean F1 of the three splits, paired by the order of rows", units, mean_f1)}

    def server_file(self, answers: Answers) -> tuple[str, bytes]:
        """Lines of question and answer, split after split: what POPE's `evaluate.py` reads."""
        rows = [
            {
                "question_id": q.id.partition("/")[2],
                "category": q.group,
                "question": _plain(q.text),
                "answer": answers[q.id].text,
            }
            for q in self.questions
            if q.id in answers
        ]
        return "pope_coco.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def aligned(asked: Sequence[str], rows: Sequence[tuple[str, str]]) -> dict[int, str]:
    """Row of `asked` -> id, where three or more in a row are the texts of `rows` (id, text) in their order."""
    matcher = SequenceMatcher(None, asked, [text for _, text in rows], autojunk=False)
    return {
        block.a + n: rows[block.b + n][0]
        for block in matcher.get_matching_blocks()
        if block.size >= _IN_A_ROW
        for n in range(block.size)
    }


def _label(row: Mapping[str, Any]) -> str:
    """The truth, `yes` or `no`: what is not "no" is yes."""
    return "no" if row["label"] == "no" else "yes"


def _other(truth: str) -> str:
    """The wrong answer, which stands for a missing one."""
    return "yes" if truth == "no" else "no"


def _plain(text: str) -> str:
    """A question without what prompts add to it, and with single spaces."""
    bare = text.replace("\\n", "\n").replace(SHORT.strip(), "").replace(_ASK, "").replace("<image>", "")
    return " ".join(bare.split())


def _mme_lines(path: Path, malformed: list[str]) -> Iterator[Found]:
    """MME's results: <category>.txt with image, question, truth and answer, separated by tabs."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) != 4:
            malformed.append(
                f"{path.name}:{number}: {len(fields)} fields, image, question, truth and answer were expected"
            )
            continue
        image, question, _, answer = fields
        record = {"question_id": f"{path.stem}/{image}", "prompt": question, "answer": answer}
        yield Found(f"{path.name}:{number}", record)


class MME(Benchmark):
    """MME: accuracy plus accuracy+ (both questions of an image right), summed over categories."""

    name = "mme"
    files = "MME_Benchmark_release_version/<category>/: images and texts of questions"
    folders = ("MME", "mme")
    splits = ("test",)
    prediction_files: ClassVar = {".txt": _mme_lines}

    def read(self) -> list[Question]:
        """`MME_Benchmark_release_version/<category>/`: images and a text file of questions beside each."""
        origin = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
        root = self.find(origin, "MME_Benchmark_release_version")
        self.check()
        nested = root / "MME_Benchmark"
        self.image_folder = nested if nested.is_dir() else root
        questions: list[Question] = []
        for category in (*PERCEPTION, *COGNITION):
            folder = self.image_folder / category
            texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
            images = folder / "images" if (folder / "images").is_dir() else folder
            found = sorted(texts.glob("*.txt"))
            if not found:
                self._missing.append(f"{folder.relative_to(self.folder)}/*.txt  (from {origin})")
            for path in found:
                questions += _mme_questions(category, path, images, self.image_folder)
        self.check()
        self._asked = {(q.group, Path(str(q.image)).stem, _plain(q.text)): q.id for q in questions}
        return questions

    def identify(self, record: Mapping[str, Any], taken: Container[str]) -> str | None:
        """By category, image and question; LLaVA's ids are `category/image`, the same for both questions."""
        id = str(record.get("question_id"))
        if id in self._by_id:
            return id
        category, _, file = id.rpartition("/")
        return self._asked.get((category.partition("/")[0], Path(file).stem, _plain(str(record.get("prompt", "")))))

    def score(self, answers: Answers) -> dict[str, Scored]:
        """Perception and cognition, then each category."""
        images: dict[tuple[str, str], list[bool]] = defaultdict(list)
        for q in self.questions:
            right = q.id in answers and mme_answer(answers[q.id].text) == q.truth
            images[q.group, str(q.image)].append(right)
        units = {image: (category, (sum(hits), len(hits))) for (category, image), hits in images.items()}
        scores = {}
        for name, categories in (("perception", PERCEPTION), ("cognition", COGNITION)):
            part = {image: unit for image, unit in units.items() if unit[0] in categories}
            what = f"sum of accuracy and accuracy+ over {name}'s {len(categories)} categories"
            scores[name] = Scored(what, part, mme_total)
        for category in (*PERCEPTION, *COGNITION):
            part = {image: unit for image, unit in units.items() if unit[0] == category}
            scores[category] = Scored(f"accuracy and accuracy+ of {category}", part, mme_total)
        return scores


def _mme_questions(category: str, path: Path, images: Path, root: Path) -> list[Question]:
    """The questions of one image's text file; the image has its name, with another ending."""
    image = next((p for p in sorted(images.glob(f"{glob.escape(path.stem)}.*")) if p.suffix != ".txt"), None)
    name = str((image or images / f"{path.stem}.jpg").relative_to(root))
    questions = []
    for number, line in enumerate(read_text(path).split("\n")):
        if not line.strip():
            continue
        text, tab, truth = line.strip().rpartition("\t")
        if not tab or truth.strip().lower() not in ("yes", "no"):
            raise ValueError(f"{path}:{number + 1} is not 'question<tab>Yes or No': {line.strip()[:80]!r}; mend it")
        plain = text.replace(_ASK, "").strip()
        questions.append(Question(f"{name}#{number}", plain + SHORT, name, truth.strip().lower(), category))
    return questions
