"""An exported folder is read whole, or refused with what is wrong with it: nothing in it is random or a default."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from training.answers.answer import load_model
from training.cost.shapes import shape

WEIGHTS = "model.safetensors"


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 1000)


def of_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def a_weight_less(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[next(name for name in tensors if name.startswith("connector."))]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def list_instead(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("config.json"), "its config.json is of model type None"),  # transformers would build a 7B at random
        (of_another_kind, "its config.json is of model type 'llama'"),
        (list_instead, "AttributeError 'list' object"),
        (without(WEIGHTS), "no file named model.safetensors"),
        (cut, "SafetensorError"),
        (a_weight_less, r"1 weights are missing, first connector\."),
        (without("tokenizer.model"), "has no tokenizer.model; put the language model's there"),
        (without("processor_config.json"), "has no processor_config.json"),  # the default is another image size
    ],
)
def test_what_is_not_whole_is_refused(
    exported: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    damage(folder)
    with pytest.raises(ValueError, match=rf"model '{folder}' cannot be read: .*{said}.*; name a folder that"):
        load_model(str(folder), "cpu")


def test_a_shape_is_that_of_a_model_of_this_project(exported: Path, tmp_path: Path) -> None:
    assert shape(str(exported)).model_type == "compact_vision"
    with pytest.raises(ValueError, match=r"its config.json is of model type None"):
        shape(str(tmp_path))
