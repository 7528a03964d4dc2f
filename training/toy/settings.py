"""The sizes of the demo: what `training/demo.py` passes to the real commands. Chosen for two CPU cores."""

BLOCKS = (1, 2, 3, 4, 5, 6, 7, 8)  # every block of the tiny CLIP

DRAW = ["--images", "2000", "--heldout", "200", "--seed", "0"]

COMMON = [
    "precision=fp32",
    "model.frozen_dtype=float32",
    "device=cpu",
    "checkpoint.interval=1ep",
    "data.max_length=512",
    "global_batch_size=16",
    "optimizer.betas=[0.9,0.98]",
    "optimizer.clip_grad_norm=1.0",
]

PRETRAIN = [*COMMON, "epochs=3", "optimizer.lr=2e-3"]

FINETUNE = [
    *COMMON,
    "epochs=3",
    "optimizer.lr=8e-4",
    "microbatch_size=auto",
    "model.activation_checkpointing=false",
]

GENERATE = ["--batch-size", "32", "--max-new-tokens", "16"]
