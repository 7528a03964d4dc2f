#!/usr/bin/env python
"""What an image costs: FLOPs of every arm of the paper, and times and memory of 576, 288, 144 and 64 vision tokens.

    python training/efficiency.py --flops                          exact, for every arm of Tables 2 to 5; seconds
    python training/efficiency.py runs/demo/finetune/model         measured side by side, with a model's own weights
    python training/efficiency.py --config 7b --layers 2           measured on random weights of a shape

Times are medians over rounds. Each row has a turn in every round, so what else the machine does slows all rows alike.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder that training/train.py exported, or a Hub id")
    parser.add_argument("--config", metavar="SHAPE", help="random weights: 7b, 13b, or a folder with config.json")
    parser.add_argument("--flops", action="store_true", help="the table of FLOPs; with --config 7b (default) or 13b")
    parser.add_argument("--layers", type=int, help="only the first layers of the language model, for small machines")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="bfloat16 on a GPU")
    parser.add_argument("--text-tokens", type=int, default=64, help="of the prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="decoded after it (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts at once (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="what medians are over, after a warm-up (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the figures there too, as JSON")
    arguments = parser.parse_args()
    if arguments.model and (arguments.config or arguments.flops):
        parser.error(f"{arguments.model} is measured with its own shape; leave out --config and --flops")
    if not (arguments.model or arguments.config or arguments.flops):
        parser.error("give a MODEL, --config or --flops")
    counts = (arguments.text_tokens, arguments.batch_size, arguments.rounds, arguments.new_tokens)
    if min(counts[:3]) < 1 or arguments.new_tokens < 2:
        found = f"found {', '.join(map(str, counts[:3]))} and {arguments.new_tokens}"
        parser.error(f"--text-tokens, --batch-size and --rounds are at least 1, --new-tokens at least 2; {found}")
    try:
        if arguments.out:  # not only when all is measured
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            before = arguments.out.exists()
            arguments.out.touch()
            if not before:  # no empty file is left if nothing can be measured
                arguments.out.unlink()
        result = flops(arguments) if arguments.flops else measured(arguments)
        print(render(result))
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def flops(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every arm of the paper: the figure that it prints, and what an image costs in all; TFLOPs.

    Raises:
        ValueError: for a shape that the paper's arms do not fit. AssertionError: if torch counts otherwise.
    """
    from training.cost.flops import paper_rows
    from training.cost.shapes import SIZES, shape

    name = arguments.config or "7b"
    if name not in SIZES:
        raise ValueError(f"--flops is about the paper's shapes, found --config {name}; use {' or '.join(SIZES)}")
    config = shape(name, arguments.layers)
    rows = paper_rows(config, arguments.text_tokens)
    if name != "7b" or arguments.layers is not None:
        rows = [{**row, "paper": None} for row in rows]
    note = (
        f"TFLOPs of one image at {name}, 2 per multiply-add; each figure from its closed form, and counted by torch "
        "on the meta device.\nprefill: only the vision tokens through the language model, without head, as the paper "
        f"prints it.\nall: CLIP + connector + prefill of vision tokens and {arguments.text_tokens} text "
        "tokens + head of one position."
    )
    return {"title": note, "shape": name, "text_tokens": arguments.text_tokens, "rows": rows}


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of each number of vision tokens, one table.

    Raises:
        ValueError: for a shape that cannot be. OSError: if the model cannot be read.
    """
    from training.cost.measured import Measurement, benchmark

    return benchmark(Measurement(**{field.name: getattr(arguments, field.name) for field in fields(Measurement)}))


def render(result: dict[str, Any]) -> str:
    """The rows as a table."""
    keys = list(result["rows"][0])
    lines = [[_cell(key, row[key]) for key in keys] for row in result["rows"]]
    widths = [max(len(key), *(len(line[i]) for line in lines)) for i, key in enumerate(keys)]
    table = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in (keys, *lines)
    ]
    environment = result.get("environment", {})
    about = [", ".join(f"{key} {value}" for key, value in environment.items())] if environment else []
    return "\n".join([result["title"], *about, *table])


def _cell(key: str, value: Any) -> str:
    """A figure of the column `key`, in its unit."""
    if value is None:
        return "-"
    if key.endswith("bytes"):
        return f"{value / 2**20:,.2f} MiB"
    if isinstance(value, float):
        return f"{value:.1f}" if key == "paper" else f"{value:#.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
