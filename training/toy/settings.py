"""What `training/demo.py` passes to the real commands: sizes and settings for two CPU cores."""

from typing import TypedDict


class Training(TypedDict):
    """How long and how fast: optimizer steps, examples in each, and the peak learning rates.

    Few examples are seen at most `epochs` times: models that know them by heart learn nothing from images any more.
    """

    steps: int
    epochs: int
    batch: int
    lr: float  # of Adam
    muon_lr: float  # of Muon, for the matrices inside the layers


class Size(TypedDict):
    """How much of everything: what is drawn, how the models are made, and how long each stage is."""

    images: int
    heldout: int
    outliers: int  # channels of the vision tower with activations far larger than those of the others
    tower: Training
    reading: Training  # the language model: captions,
    talking: Training  # then conversations
    pretrain_epochs: int
    finetune_epochs: int


SIZES: dict[str, Size] = {
    "small": {  # five minutes on two cores
        "images": 4000,
        "heldout": 1050,
        "outliers": 0,
        "tower": {"steps": 1000, "epochs": 20, "batch": 32, "lr": 3e-3, "muon_lr": 2e-2},
        "reading": {"steps": 250, "epochs": 4, "batch": 16, "lr": 4e-3, "muon_lr": 2e-2},
        "talking": {"steps": 400, "epochs": 4, "batch": 8, "lr": 3e-3, "muon_lr": 5e-3},
        "pretrain_epochs": 2,
        "finetune_epochs": 1,
    },
    "large": {  # some 40 minutes
        "images": 20000,
        "heldout": 4200,
        "outliers": 3,
        "tower": {"steps": 6000, "epochs": 20, "batch": 32, "lr": 2e-3, "muon_lr": 2e-2},
        "reading": {"steps": 3000, "epochs": 4, "batch": 16, "lr": 3e-3, "muon_lr": 2e-2},
        "talking": {"steps": 5000, "epochs": 4, "batch": 8, "lr": 2e-3, "muon_lr": 5e-3},
        "pretrain_epochs": 1,
        "finetune_epochs": 3,
    },
}

CLIP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,  # 16 patch tokens, of which the demo's method makes 4
}
LLAMA = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,  # about width**-0.5: with Llama's 0.02 so narrow a model starts far more slowly
}
VOCABULARY = 640

BLOCKS = (1, 2, 3, 4, 5, 6, 7, 8)  # every block of the tiny CLIP

BATCHES = {"pretrain": 16, "finetune": 16}  # examples per step
FEWEST_STEPS, MOST_EPOCHS = 100, 10  # of a stage on few examples

COMMON = [
    "precision=fp32",
    "model.frozen_dtype=float32",
    "device=cpu",
    "checkpoint.interval=1ep",
    "data.max_length=512",
    "optimizer.betas=[0.9,0.98]",
    "optimizer.clip_grad_norm=1.0",
    "optimizer.warmup_ratio=0.2",  # of few steps: with 3% of them some seeds never learn one of the facts
]

PRETRAIN = [*COMMON, f"global_batch_size={BATCHES['pretrain']}", "optimizer.lr=1e-3"]

FINETUNE = [
    *COMMON,
    f"global_batch_size={BATCHES['finetune']}",
    "optimizer.lr=1e-3",
    "microbatch_size=auto",
    "model.activation_checkpointing=false",
]

# Measured on in the course of a stage: the drawn scenes are many, your own images may be few.
HELD_OUT = ["data.validation.share=0.03", "data.validation.interval=100ba"]

GENERATE = ["--batch-size", "128", "--max-new-tokens", "8"]


def epochs_for(least: int, examples: int, batch: int) -> int:
    """Epochs of a stage: `least`, or as many as make FEWEST_STEPS steps of few examples, up to MOST_EPOCHS."""
    return max(least, min(MOST_EPOCHS, FEWEST_STEPS * batch // max(1, examples)))
