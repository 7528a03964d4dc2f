"""The paper's benchmarks, read from their official files and scored as LLaVA-1.5 scores them.

`open_benchmark` finds one by its name. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from training.benchmarks.multiple_choice import MMBench, MMBenchCN, ScienceQA
from training.benchmarks.open_ended import GQA, TextVQA, VizWiz, VQAv2
from training.benchmarks.questions import Benchmark
from training.benchmarks.yes_no import MME, POPE

# In the order of the paper's tables; MME is not in its average.
BENCHMARKS: dict[str, type[Benchmark]] = {
    kind.name: kind for kind in (GQA, ScienceQA, TextVQA, POPE, MMBench, MMBenchCN, VQAv2, VizWiz, MME)
}
AVERAGED = tuple(name for name in BENCHMARKS if name != "mme")


def open_benchmark(name: str, folder: Path, split: str | None = None) -> Benchmark:
    """The benchmark called `name` (any case, `-` as `_`), from `folder` or the folder of its name in it.

    Raises:
        ValueError: if there is no such benchmark or split, or naming every file that is missing and where it is had.
    """
    key = name.lower().replace("_", "-")
    if key not in BENCHMARKS:
        close = difflib.get_close_matches(key, BENCHMARKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(BENCHMARKS)}"
        raise ValueError(f"benchmark {name!r} is unknown; {hint}")
    return BENCHMARKS[key](folder, split)
