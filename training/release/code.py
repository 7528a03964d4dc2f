"""The code that travels with an exported model: the files that it needs, in one flat folder.

transformers runs a folder's own code (`trust_remote_code`): files beside each other, which import each other as
`from .name import ...`. So `training.model.reducers.fusion` becomes `reducers_fusion.py`, and every import names that.
"""

from __future__ import annotations

import ast
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.model.model import CompactVisionForConditionalGeneration

ROOTS = ("training.model", "pipeline.encoders")  # what may travel; it imports nothing else of ours
ENTRIES = ("training.model.model", "training.model.processor")
CLASSES = {  # what transformers' Auto classes make of the folder
    "AutoConfig": "model.CompactVisionConfig",
    "AutoModel": "model.CompactVisionModel",
    "AutoModelForImageTextToText": "model.CompactVisionForConditionalGeneration",
    "AutoTokenizer": "processor.CompactVisionTokenizer",
    "AutoImageProcessor": "processor.CompactVisionImageProcessor",
    "AutoProcessor": "processor.CompactVisionProcessor",
}
NAMED_IN = {  # file -> which of them transformers looks up there
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForImageTextToText"),
    "tokenizer_config.json": ("AutoTokenizer",),
    "processor_config.json": ("AutoImageProcessor", "AutoProcessor"),
}
_BY_NAME = 'f"{__name__}.{file}"'  # how a registry opens a file of its folder


def write_code(model: CompactVisionForConditionalGeneration, folder: Path) -> None:
    """Write the code of `model` into an exported folder, and name its classes where transformers looks for them."""
    for name, text in flat_code(families_of(model)).items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    for file, autos in NAMED_IN.items():
        path = folder / file
        if path.is_file():
            # A tokenizer has two classes, a slow one and a fast one; ours is the first.
            classes = {auto: [CLASSES[auto], None] if auto == "AutoTokenizer" else CLASSES[auto] for auto in autos}
            settings = json.loads(path.read_text(encoding="utf-8"))
            for part in (settings, settings.get("image_processor")):
                if part is not None:
                    part["auto_map"] = classes
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def families_of(model: CompactVisionForConditionalGeneration) -> list[str]:
    """The modules that registries open by name for this very model."""
    from pipeline.encoders import encoder_of

    encoder = encoder_of(model.config.vision_config.model_type)
    return [type(part).__module__ for part in (model.connector.config, model.connector, encoder)]


def flat_code(families: list[str]) -> dict[str, str]:
    """Flat name -> text, of the entries, of `families`, and of all of ours that they import."""
    # Follow the imports: what a file of ours imports travels too.
    waiting, found = [*ENTRIES, *families], dict[str, str]()
    while waiting:
        module = waiting.pop()
        if _flat(module) not in found:
            text, imported = _rewritten(module)
            found[_flat(module)] = text
            waiting += imported
    named = {auto: place.split(".") for auto, place in CLASSES.items()}
    # transformers copies what it finds imported, so each entry imports what is opened by name behind it. It binds names
    # that nobody uses: a family's own names must not replace those of the entry.
    for entry in map(_flat, ENTRIES):
        behind = {_flat(module) for module in families if entry == "model" or module.startswith("pipeline.")}
        lines = [f"from .{name} import __name__ as _{name}" for name in sorted(behind)]
        # And what is loaded can be saved again, its code included.
        lines += [f'{cls}.register_for_auto_class("{auto}")' for auto, (file, cls) in named.items() if file == entry]
        found[entry] += "\n# Opened by name; imported for transformers to find.\n" + "\n".join(lines) + "\n"
    return found


def _flat(module: str) -> str:
    """`training.model.reducers.fusion` -> `reducers_fusion`."""
    return module.removeprefix("training.model.").removeprefix("pipeline.").replace(".", "_")


def _rewritten(module: str) -> tuple[str, list[str]]:
    """A module's text with flat imports, and the modules of ours that it imports."""
    spec: Any = find_spec(module)
    path = Path(spec.origin)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    text = path.read_text(encoding="utf-8")
    lines, imported = text.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            # One dot is the module's own package, each further one goes up by one name.
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            target = ".".join(part for part in (base, node.module) if part)
            if target.partition(".")[0] in ("pipeline", "training"):
                if not target.startswith(ROOTS):
                    raise ValueError(f"{path}:{node.lineno} imports {target}, which does not travel with an export")
                imported.append(target)
                line = lines[node.lineno - 1]
                lines[node.lineno - 1] = re.sub(r"from\s+\S+\s+import", f"from .{_flat(target)} import", line, count=1)
    # A registry opens `reducers.fusion` by name; among flat files it is `reducers_fusion`.
    return "".join(lines).replace(_BY_NAME, _BY_NAME.replace("}.{", "}_{")), imported
