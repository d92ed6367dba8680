"""Fine-tune on captioned pictures: a LoRA or DoRA, or with `adapter: null` all weights.

accelerate launch recipes/lora.py --config configs/sd15/lora.yaml data.path=photos
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunekit.config import DataConfig, Loaded, TrainingRunConfig
from tunekit.launch import run_recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunekit.data.cache import Batch
    from tunekit.data.images import Scan
    from tunekit.diffusion.objectives import Objective
    from tunekit.training.run import Run


class Config(TrainingRunConfig):
    """A base model, captioned pictures, and how to train."""

    data: DataConfig


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
    from tunekit.training.evaluation import previews, validation
    from tunekit.training.loop import train, weighted_mse
    from tunekit.training.run import build_optimizer, fit_denoiser, load_base

    accelerator = run.accelerator
    family = families.get(config.model.family)
    pipeline = load_base(config, family)
    objective = family.objective(pipeline, snr_gamma=config.train.snr_gamma)
    unweighted = family.objective(pipeline)  # for validation: comparable whatever is trained with
    size = (config.preview.height or config.data.resolution, config.preview.width or config.data.resolution)

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
    dataset = encoder.dataset(scan.samples, config.data, seed=config.seed)
    held_out = encoder.dataset(scan.held_out, config.data, seed=config.seed, fixed=True)
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
        caption_dropout=config.data.caption_dropout,
    )

    def loss(model: nn.Module, batch: Batch, objective: Objective = objective) -> Tensor:
        noisy, target, weight = objective.sample(batch.latents, batch.noise, batch.timesteps)
        prediction = family.denoise(model, noisy, batch.timesteps, batch.conditioning)
        return weighted_mse(prediction, target, weight)

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
        evaluate=validation(
            held_out,
            partial(loss, objective=unweighted),
            unweighted,
            config.memory.micro_batch or config.train.batch_size,
            accelerator,
        ),
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
