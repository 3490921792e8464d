"""Settings of the Hugging Face Trainer with which it trains as a plain loop does."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def arguments(folder: Path, steps: int, micro_batches: int, **more: Any) -> Any:
    """Return ``TrainingArguments`` for micro-batches of two examples each, in order, without saving."""
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=micro_batches,
        max_steps=steps,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **more,
    )
