"""DreamBooth: teach a model one subject from a few pictures; with `adapter: null` in all weights.

So that the class keeps its other members, each picture of the subject is learned together with a picture of
the class that the base model has drawn (prior preservation, Ruiz et al. 2022, arXiv:2208.12242).

accelerate launch recipes/dreambooth.py --config configs/sd15/dreambooth.yaml data.path=robot ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunekit.config import CLASS_BATCH, DreamboothData, Loaded, TrainingRunConfig
from tunekit.launch import run_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import Tensor, nn

    from tunekit.data.cache import Batch
    from tunekit.data.dreambooth import Draw
    from tunekit.data.images import Scan
    from tunekit.training.run import Run


class Config(TrainingRunConfig):
    """A base model, a few pictures of one subject, and how to train."""

    data: DreamboothData


def main(config: Config, loaded: Loaded) -> None:
    """From a config to an adapter (or a model), its optimized versions and a report."""
    from tunekit import planning
    from tunekit.data.images import scan_data
    from tunekit.passes.base import check_chain, parse_chain, run_chain
    from tunekit.report import write as write_report
    from tunekit.training.checkpoint import identity
    from tunekit.training.run import open_run

    # Whatever can be wrong with the chain or the pictures is said before anything has started.
    chain = parse_chain(config.optimize, loaded.chain_where)
    check_chain(chain, "adapter" if config.adapter else "torch", loaded.chain_where)
    scan = scan_data(config.data)
    scan.check()

    # Memory is decided before anything is loaded: from here on nothing under `memory:` is open.
    config, plan = planning.settle(config)
    with open_run(config) as run:
        learned = identity(config, scan.samples)
        if run.begin(loaded.config, learned, plan):
            with planning.replanning(config):
                fine_tune(config, run, scan, learned)
        artifact = run.close()  # the processes part here; the main one goes on alone
        if artifact is None:
            return
        write_report(run.folder.path)
        run_chain(
            chain,
            artifact,
            run_dir=run.folder.path,
            device=config.memory.device,
            seed=config.seed,
            prompts=config.preview.prompts,
            negative_prompt=config.preview.negative_prompt,
            data=config.data,
            steps=config.preview.steps,
            guidance=config.preview.guidance,
            height=config.preview.height or config.data.resolution,
            width=config.preview.width or config.data.resolution,
            say=run.say,
            after_step=lambda _: write_report(run.folder.path),
        )
        run.say(f"report: {run.folder.path / 'report.html'}")


def fine_tune(config: Config, run: Run, scan: Scan, learned: dict[str, Any]) -> None:
    """Load, encode, adapt, train, save."""
    from functools import partial

    from tunekit import families
    from tunekit.data.cache import Encoder, Stream
    from tunekit.data.dreambooth import class_folder, class_pictures
    from tunekit.runtime import generate, torch_runtime
    from tunekit.training.evaluation import previews
    from tunekit.training.loop import train, weighted_mse
    from tunekit.training.run import build_optimizer, fit_denoiser, load_base

    accelerator = run.accelerator
    family = families.get(config.model.family)
    pipeline = load_base(config, family)
    objective = family.objective(pipeline, snr_gamma=config.train.snr_gamma)
    size = (config.preview.height or config.data.resolution, config.preview.width or config.data.resolution)

    def drawing() -> Draw:
        pipeline.to(accelerator.device)
        runtime = torch_runtime(family, pipeline, device=str(accelerator.device))

        def draw(*, seeds: Sequence[int]) -> list[Image]:
            with run.meter.phase("class_pictures"):
                return generate(
                    runtime,
                    [str(config.data.class_prompt)],
                    seeds=seeds,
                    steps=config.data.class_steps,
                    guidance=config.data.class_guidance,
                    height=config.data.resolution,
                    width=config.data.resolution,
                    batch=config.memory.class_batch or CLASS_BATCH,
                )

        return draw

    run.watch(pipeline)
    encoder = Encoder(
        family,
        pipeline,
        cache=run.cache(config.data),
        accelerator=accelerator,
        captions_on_host=bool(config.memory.encode_on_host),
        measured=partial(run.meter.phase, "encode"),
        say=run.say,
    )
    prior = None
    if config.data.class_prompt is not None:
        folder = class_folder(config.data, run.folder.path, model=config.model, seed=config.seed)
        pictures = class_pictures(
            config.data, folder, drawing, seed=config.seed, accelerator=accelerator, say=run.say
        )
        pipeline.to("cpu")  # from here on each network visits the device alone
        prior = encoder.dataset(pictures, config.data, seed=config.seed)
    dataset = encoder.dataset(scan.samples, config.data, seed=config.seed)
    prompts = encoder.conditioning([*config.preview.prompts, config.preview.negative_prompt])
    encoder.release(keep_vae=bool(config.preview.prompts))

    fitted = fit_denoiser(config, family, pipeline, accelerator.device)
    optimizer = build_optimizer(
        config.train, fitted.parameters.values(), accelerator.device, in_backward=fitted.optimizer_in_backward
    )
    run.watch(pipeline, fitted, optimizer)
    batches = Stream(
        dataset,
        objective,
        batch_size=config.train.batch_size,
        micro_batch=config.memory.micro_batch,
        seed=config.seed,
        prior=prior,
        prior_weight=config.data.prior_weight,
    )

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        noisy, target, weight = objective.sample(batch.latents, batch.noise, batch.timesteps)
        prediction = family.denoise(model, noisy, batch.timesteps, batch.conditioning)
        return weighted_mse(prediction, target, weight * batch.weights)  # 1, or the prior weight

    result = train(
        accelerator,
        fitted.module,
        optimizer,
        batches,
        loss,
        config.train,
        fitted=fitted,
        meter=run.meter,
        seed=config.seed,
        tracker=run.tracker(config.train),
        checkpoints=run.checkpoints(learned, config.train),
        preview=previews(
            pipeline,
            family,
            config.preview,
            prompts,
            run.folder.previews,
            size,
            accelerator.device,
            tiled=bool(config.memory.vae_tiling),
            meter=run.meter,
        ),
        preview_every=config.preview.every,
    )
    run.save(config, family, pipeline, result, learned, sum(p.numel() for p in fitted.parameters.values()))


if __name__ == "__main__":
    run_recipe(main, Config)
