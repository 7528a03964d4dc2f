"""The model as lmms-eval sees it; needs the extra `lmms-eval`."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="the extra lmms-eval is not installed")


def test_lmms_eval_gets_the_answers_that_evaluate_gives(exported: Path) -> None:
    from training.answers.answer import load_model, reply
    from training.answers.lmms import MANIFEST, CompactVision
    from training.answers.processes import AnsweringProcess

    module, _, name = MANIFEST.simple_class_path.rpartition(".")
    assert (module, name) == (CompactVision.__module__, CompactVision.__name__)
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    documents = [{"image": picture, "text": f"Which colour {n}?"} for n, picture in enumerate(pictures)]
    adapter = CompactVision(str(exported), batch_size=2)
    adapter.task_dict = {"task": {"test": documents}}
    settings = {"max_new_tokens": 6, "until": ["\n"]}
    requests = [
        SimpleNamespace(args=(document["text"], settings, lambda d: [d["image"]], n, "task", "test"))
        for n, document in enumerate(documents)
    ]
    loaded = load_model(str(exported), AnsweringProcess().device())
    expected = [reply(*loaded, [d["text"]], [d["image"]], 6)[0].partition("\n")[0].strip() for d in documents]
    assert adapter.generate_until(requests) == expected
    two = SimpleNamespace(args=("x", settings, lambda d: [d["image"]] * 2, 0, "task", "test"))
    with pytest.raises(ValueError, match="document 0 of task has 2 images"):
        adapter.generate_until([two])
