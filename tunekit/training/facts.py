"""What a training says of itself in the files it leaves: kohya's `ss_*` facts, and nothing private."""

from __future__ import annotations

import math

from tunekit.config import DataConfig, DreamboothData, ObjectiveConfig, TrainConfig


def kohya_facts(
    train: TrainConfig,
    objective: ObjectiveConfig,
    data: DataConfig | DreamboothData,
    *,
    pictures: int,
    seed: int,
    step: int,
    dropout: float,
    precision: str,
) -> dict[str, str]:
    """Return what kohya's tools write into a file's header, by key, as text.

    No paths, no names of pictures, no captions, no times: two equal runs give equal files.

    Args:
        train: optimizer, learning rate and steps.
        objective: what was learned.
        data: from what.
        pictures: how many there were, without those of a class.
        seed: of the run.
        step: after which the adapter was saved.
        dropout: of the adapter.
        precision: what the base computed in.
    """
    of_class = isinstance(data, DreamboothData) and data.class_prompt is not None
    class_pictures = getattr(data, "class_pictures", 0) if of_class else 0
    facts = {
        "seed": seed,
        "steps": step,
        "max_train_steps": train.max_steps,
        "epoch": math.ceil(step * train.batch_size / max(1, pictures + class_pictures)),
        "num_train_images": pictures,
        "num_reg_images": class_pictures,
        "total_batch_size": train.batch_size,
        "resolution": f"({data.resolution}, {data.resolution})",
        "enable_bucket": getattr(data, "buckets", False),
        "caption_dropout_rate": getattr(data, "caption_dropout", 0.0),
        "learning_rate": train.lr,
        "unet_lr": train.lr,
        "text_encoder_lr": None,  # not trained
        "optimizer": train.optimizer,
        "lr_scheduler": train.schedule,
        "lr_warmup_steps": train.warmup_steps,
        "max_grad_norm": train.max_grad_norm,
        "network_dropout": dropout or None,
        "min_snr_gamma": objective.snr_gamma,
        "noise_offset": objective.noise_offset or None,
        "loss_type": {"mse": "l2"}.get(objective.loss, objective.loss),
        "zero_terminal_snr": bool(objective.zero_terminal_snr),
        "mixed_precision": {"fp32": "no"}.get(precision, precision),
        "cache_latents": True,
    }
    return {f"ss_{key}": str(value) for key, value in facts.items()}
