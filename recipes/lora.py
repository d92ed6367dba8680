"""Fine-tune on captioned pictures: a LoRA or DoRA, or with `adapter: null` all weights.

accelerate launch recipes/lora.py --config configs/sd15/lora.yaml data.path=photos
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunekit.config import DataConfig, Loaded, TrainingRunConfig
from tunekit.launch import run_recipe

if TYPE_CHECKING:
    from tunekit.running import Run


class Config(TrainingRunConfig):
    """A base model, captioned pictures, and how to train."""

    data: DataConfig


def main(config: Config, loaded: Loaded) -> None:
    """From a config to an adapter (or a model), its optimized versions and a report."""
    from tunekit.running import open_run

    with open_run(config, loaded) as run:
        if run.begin():
            fine_tune(config, run)
        run.optimize()


def fine_tune(config: Config, run: Run) -> None:
    """Load, encode, adapt, train, save."""
    from tunekit.data.cache import Draws, Stream
    from tunekit.tasks import Denoising
    from tunekit.training.evaluation import validation

    base = run.load()
    with run.encoding(base) as encoder:  # behind it text encoders and VAE have left memory
        pictures = encoder.dataset(run.scan.samples, config.data, seed=config.seed)
        held_out = encoder.dataset(run.scan.held_out, config.data, seed=config.seed, fixed=True)

    # Noise is added to the latents, and the denoiser asked for what the objective wants of them.
    task = Denoising(run.fit(base), base.family, base.objective)

    micro_batch = run.config.memory.micro_batch  # as it was decided, not as it was given
    draws = Draws(config.train.batch_size, micro_batch, caption_dropout=config.data.caption_dropout)
    batches = Stream(pictures, base.objective, draws, seed=config.seed)
    evaluate = validation(held_out, task, micro_batch or config.train.batch_size, run.accelerator)
    run.train(base, task, batches, evaluate)


if __name__ == "__main__":
    run_recipe(main, Config)
