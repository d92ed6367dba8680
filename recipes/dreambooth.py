"""DreamBooth: teach a model one subject from a few pictures; with `adapter: null` in all weights.

So that the class keeps its other members, each picture of the subject is learned together with a picture of
the class that the base model has drawn (prior preservation, Ruiz et al. 2022, arXiv:2208.12242).

    accelerate launch recipes/dreambooth.py --config configs/sd15/dreambooth.yaml data.path=robot ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunekit.config import DreamboothData, Loaded, TrainingRunConfig
from tunekit.launch import run_recipe

if TYPE_CHECKING:
    from tunekit.data.cache import CachedDataset, Encoder
    from tunekit.running import Base, Run


class Config(TrainingRunConfig):
    """A base model, a few pictures of one subject, and how to train."""

    data: DreamboothData


def main(config: Config, loaded: Loaded) -> None:
    """From a config to an adapter (or a model), its optimized versions and a report."""
    from tunekit.running import open_run

    with open_run(config, loaded) as run:
        if run.begin():
            teach(config, run)
        run.optimize()


def teach(config: Config, run: Run) -> None:
    """Load, draw the class, encode, adapt, train, save."""
    from tunekit.data.cache import Draws, Stream
    from tunekit.tasks import Denoising

    base = run.load()
    with run.encoding(base) as encoder:
        prior = of_the_class(config, run, base, encoder) if config.data.class_prompt is not None else None
        subject = encoder.dataset(run.scan.samples, config.data, seed=config.seed)
    draws = Draws(
        config.train.batch_size,
        run.config.memory.micro_batch,  # as it was decided, not as it was given
        prior_weight=config.data.prior_weight,  # goes into the weight of each row, which the loss reads
    )
    task = Denoising(run.fit(base), base.family, base.objective)
    run.train(base, task, Stream(subject, base.objective, draws, seed=config.seed, prior=prior))


def of_the_class(config: Config, run: Run, base: Base, encoder: Encoder) -> CachedDataset:
    """Pictures of the class: those that are there, and those that the base draws in addition."""
    from functools import partial

    from tunekit.data.dreambooth import class_folder, class_pictures, class_sampling

    data, seed = config.data, config.seed
    drawing = partial(run.drawing, base, str(data.class_prompt), class_sampling(data))
    pictures = class_pictures(
        data,
        class_folder(data, run.folder.path, model=config.model, seed=seed),
        drawing,
        seed=seed,
        accelerator=run.accelerator,
        say=run.say,
    )
    base.pipeline.to("cpu")  # from here on each network visits the device alone
    return encoder.dataset(pictures, data, seed=seed)


if __name__ == "__main__":
    run_recipe(main, Config)
