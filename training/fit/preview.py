"""What `train.py --check` shows: settings, what learns at which rate, what is needed, the first example, decoded."""

from __future__ import annotations

import sys
from itertools import groupby

import torch
import yaml

from training.config import TrainConfig
from training.engines import engine_class
from training.fit.finding import Finding
from training.fit.parts import Parts
from training.model.markers import IGNORE

SUPERVISED, IMAGE, PLAIN = "\033[32m", "\033[36m", "\033[0m"  # green, cyan, the terminal's own


def preview(config: TrainConfig, parts: Parts, optimizer: torch.optim.Optimizer, found: list[Finding]) -> str:
    """Configuration, the optimizer's groups, what was `found` of needs, and the first example decoded, for a person."""
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)
    return (
        "\n--- configuration\n"
        + settings
        + "\n--- parameter groups\n"
        + parameter_groups(parts.model, optimizer)
        + "\n\n--- needs\n"
        + "\n".join(map(str, found))
        + "\n\n--- first example\n"
        + example(parts, coloured=sys.stdout.isatty())
        + elsewhere(config)
    )


def elsewhere(config: TrainConfig) -> str:
    """What this run needs and this machine lacks; nothing, or a paragraph."""
    if config.precision == "fp32" or engine_class(config.parallelism).bf16_on_cpu or torch.cuda.is_available():
        return ""
    return (
        "\n\n--- not on this machine\nprecision amp_bf16: Composer takes it only on GPUs, and there is none here; "
        "precision=fp32 trains on a CPU, as does parallelism=zero2 in bf16"
    )


def parameter_groups(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A line for each group: its rate and decay, how many weights it has, and in which parts of the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    lines = []
    for group in optimizer.param_groups:
        weights = sum(parameter.numel() for parameter in group["params"])
        parts = [".".join(names[id(parameter)].split(".")[:2]) for parameter in group["params"]]
        lines.append(
            f"lr {group['lr']:.2e}  weight decay {group['weight_decay']:g}  {weights:>14,} weights in "
            f"{len(parts)} tensors of {', '.join(dict.fromkeys(parts))}"
        )
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return "\n".join([*lines, f"frozen{frozen:>46,} weights"])


def example(parts: Parts, coloured: bool) -> str:
    """The first example that the run will learn from, decoded: what is supervised is green, or in ⟦ ⟧ without colours.

    Where the first batch has none, why the first of them teaches nothing.
    """
    batches = iter(parts.stream)
    batch = next(batches)
    batches.close()
    row = next((number for number, skip in enumerate(batch["skipped"]) if skip is None), None)
    if row is None:
        return (
            f"{batch['keys'][0]}: teaches nothing, nor does any other of the first batch: {batch['skipped'][0].reason}"
        )
    length = int(batch["attention_mask"][row].sum())
    ids, labels = (batch[name][row, :length].tolist() for name in ("input_ids", "labels"))
    text = ""
    # Runs of vision tokens and of text; within text, runs that are supervised and runs that are not.
    for is_image, places in groupby(range(length), lambda i: ids[i] == parts.model.config.image_token_id):
        run = list(places)
        if is_image:
            text += _marked(f"[{len(run)} vision tokens]", IMAGE, coloured, "", "")
            continue
        for is_supervised, part in groupby(run, lambda i: labels[i] != IGNORE):
            words = parts.tokenizer.decode([ids[i] for i in part], skip_special_tokens=False)
            text += _marked(words, SUPERVISED, coloured, "⟦", "⟧") if is_supervised else words
    supervised = sum(label != IGNORE for label in labels)
    return f"{batch['keys'][row]}: {length} tokens, {supervised} supervised\n{text}"


def _marked(text: str, colour: str, coloured: bool, before: str, after: str) -> str:
    """Text in a colour, or between two marks."""
    return f"{colour}{text}{PLAIN}" if coloured else f"{before}{text}{after}"
