"""What is learned is what plain diffusers and peft learn: the loss, and the gradient of every parameter.

The other side is written out here as diffusers' own training scripts have it, and shares no code with ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from tunekit import families
from tunekit.config import AdapterConfig, ObjectiveConfig
from tunekit.diffusion.batch import Batch
from tunekit.diffusion.objectives import FlowMatching, configured
from tunekit.families import Family, Frame
from tunekit.memory.levers import Levers, fit
from tunekit.tasks import Denoising

PROMPTS = ("a red cat", "the moon over a long wall")
FRAMES = (Frame((480, 640), (0, 12), (64, 64)), Frame((1024, 768), (40, 0), (64, 64)))
TIMESTEPS = (37.0, 811.0)
BATCHES = {"both": slice(0, 2), "the first": slice(0, 1), "the second": slice(1, 2)}
RANK, ALPHA = 4, 10.0
TOLERANCE = 1e-5
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """What both sides are given."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: list[str]
    frames: list[Frame]


def samples(family: Family, pipeline: Any, rows: slice) -> Sample:
    draw = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(2, 2, *family.latent_shape(pipeline, 64, 64), generator=draw)
    latents[1] *= 1.5  # so that the losses of the rows are unlike, whatever the network makes of them
    times = torch.tensor(TIMESTEPS)
    return Sample(latents[rows], noise[rows], times[rows], list(PROMPTS[rows]), list(FRAMES[rows]))


def moved(denoiser: torch.nn.Module) -> None:
    """Moves what is trained, as training would: at the start, half of all gradients are 0."""
    for index, parameter in enumerate(p for p in denoiser.parameters() if p.requires_grad):
        draw = torch.Generator().manual_seed(index)
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


def gradients(denoiser: torch.nn.Module) -> Gradients:
    found = {name: p.grad for name, p in denoiser.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    assert all(p.grad is None for p in denoiser.parameters() if not p.requires_grad)
    return found


# The two sides ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of ours: the loss of each row, the gradients, and what the parameters were."""

    loss: Tensor
    gradients: Gradients
    parameters: dict[str, Tensor]


def prepared(family: Family, kind: str, config: ObjectiveConfig, rows: slice) -> tuple[Denoising, Batch]:
    pipeline = family.tiny()
    adapter = AdapterConfig(kind=kind, rank=RANK, alpha=ALPHA)
    fitted = fit(family.denoiser(pipeline), adapter, family.facts, Levers(), device="cpu")
    moved(fitted.module)
    pipeline.register_modules(scheduler=configured(pipeline.scheduler, config))
    sample = samples(family, pipeline, rows)
    batch = Batch(
        tuple(sample.prompts),
        {
            "latents": sample.latents,
            "noise": sample.noise,
            "timesteps": sample.timesteps,
            "weight": torch.ones(len(sample.prompts)),
            "frame": torch.stack([frame.row for frame in sample.frames]),
        },
        family.encode_prompt(pipeline, sample.prompts),
    )
    return Denoising(fitted, family, family.objective(pipeline, config)), batch


def ours(family: Family, kind: str, config: ObjectiveConfig, rows: slice) -> Step:
    task, batch = prepared(family, kind, config, rows)
    loss = task.loss(task.fitted.module, batch)["loss"]
    loss.mean().backward()
    parameters = {name: p.detach() for name, p in task.fitted.parameters.items()}
    return Step(loss.detach(), gradients(task.fitted.module), parameters)


def theirs(
    pipeline: Any,
    denoiser: torch.nn.Module,
    lora: LoraConfig,
    config: ObjectiveConfig,
    parameters: dict[str, Tensor],
    sample: Sample,
) -> tuple[Tensor, Gradients]:
    """The same step in diffusers and peft alone."""
    network: Any = denoiser
    network.requires_grad_(False)
    network.add_adapter(lora)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert trained.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(parameters[name])
    loss = PLAIN[type(pipeline).__name__](pipeline, sample, config)
    loss.backward()
    return loss.detach(), gradients(network)


def layers_at(denoiser: torch.nn.Module, ends: Sequence[str]) -> list[str]:
    """Paths of layers that end so; peft takes an end alone too, but not where a list of modules has it."""
    return [
        path
        for path, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        and any(path.endswith(f".{end}") for end in ends)
    ]


# One function for each pipeline: the loss of a step, as diffusers' training script for it has it.


def of_a_unet(pipeline: Any, sample: Sample, config: ObjectiveConfig) -> Tensor:
    unet = pipeline.unet
    timesteps = sample.timesteps.long()
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=config.prediction)
    noisy = scheduler.add_noise(sample.latents, sample.noise, timesteps)
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            sample.prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    told: dict[str, Any] = {"encoder_hidden_states": encoded[0]}
    if unet.config.addition_embed_type == "text_time":
        time_ids = [[*frame.original, *frame.crop, *frame.size] for frame in sample.frames]
        told["added_cond_kwargs"] = {"text_embeds": encoded[2], "time_ids": torch.tensor(time_ids).float()}
    predicted = unet(noisy, timesteps, **told).sample

    if config.prediction == "epsilon":
        target = sample.noise
    else:
        target = scheduler.get_velocity(sample.latents, sample.noise, timesteps)
    if config.snr_gamma is None:
        return F.mse_loss(predicted, target)
    # Hang et al. 2023, arXiv:2303.09556, section 3.4
    alphas = scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    weight = snr.clamp(max=config.snr_gamma) / (snr if config.prediction == "epsilon" else snr + 1)
    return (F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3)) * weight).mean()


def of_flux(pipeline: Any, sample: Sample, config: ObjectiveConfig) -> Tensor:
    """Of the noise levels that are given; dev is told a guidance of 1 while it is trained."""
    count, channels, height, width = sample.latents.shape
    share = (sample.timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1 - share) * sample.latents + share * sample.noise
    with torch.no_grad():
        states, pooled, txt_ids = pipeline.encode_prompt(
            sample.prompts, None, device="cpu", max_sequence_length=pipeline.tokenizer_2.model_max_length
        )
    predicted = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy, count, channels, height, width),
        timestep=sample.timesteps / 1000,
        guidance=torch.ones(count),
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=txt_ids,
        img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
    ).sample
    scale = pipeline.vae_scale_factor
    made = pipeline._unpack_latents(predicted, height * scale, width * scale, scale)
    return F.mse_loss(made, sample.noise - sample.latents)


def of_sd3(pipeline: Any, sample: Sample, config: ObjectiveConfig) -> Tensor:
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(
            *(sample.prompts, sample.prompts, sample.prompts),
            device="cpu",
            do_classifier_free_guidance=False,
            max_sequence_length=pipeline.tokenizer_3.model_max_length,
        )
    sigmas = (sample.timesteps / 1000)[:, None, None, None]
    predicted = pipeline.transformer(
        hidden_states=(1 - sigmas) * sample.latents + sigmas * sample.noise,
        timestep=sample.timesteps,
        encoder_hidden_states=states,
        pooled_projections=pooled,
    ).sample
    return F.mse_loss(predicted, sample.noise - sample.latents)


def of_z_image(pipeline: Any, sample: Sample, config: ObjectiveConfig) -> Tensor:
    share = (sample.timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1 - share) * sample.latents + share * sample.noise
    with torch.no_grad():
        texts, _ = pipeline.encode_prompt(
            list(sample.prompts),
            device="cpu",
            do_classifier_free_guidance=False,
            max_sequence_length=pipeline.tokenizer.model_max_length,
        )
    time = (1000 - sample.timesteps) / 1000
    rows = pipeline.transformer(list(noisy.unsqueeze(2)), time, texts, return_dict=False)[0]
    predicted = -torch.stack(rows).squeeze(2)
    return F.mse_loss(predicted, sample.noise - sample.latents)


def of_chroma(pipeline: Any, sample: Sample, config: ObjectiveConfig) -> Tensor:
    count, channels, height, width = sample.latents.shape
    share = (sample.timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1 - share) * sample.latents + share * sample.noise
    with torch.no_grad():
        states, txt_ids, mask, *_ = pipeline.encode_prompt(
            sample.prompts,
            device="cpu",
            do_classifier_free_guidance=False,
            max_sequence_length=pipeline.tokenizer.model_max_length,
        )
    tokens = pipeline._pack_latents(noisy, count, channels, height, width)
    predicted = pipeline.transformer(
        hidden_states=tokens,
        timestep=sample.timesteps / 1000,
        encoder_hidden_states=states,
        txt_ids=txt_ids,
        img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
        attention_mask=pipeline._prepare_attention_mask(count, tokens.shape[1], torch.float32, mask),
    ).sample
    scale = pipeline.vae_scale_factor
    made = pipeline._unpack_latents(predicted, height * scale, width * scale, scale)
    return F.mse_loss(made, sample.noise - sample.latents)


def of_flux2_klein(pipeline: Any, sample: Sample, config: ObjectiveConfig) -> Tensor:
    count, width = len(sample.prompts), sample.latents.shape[-1]
    time = sample.timesteps / 1000
    share = time.view(-1, 1, 1, 1)
    noisy = (1 - share) * sample.latents + share * sample.noise
    with torch.no_grad():
        text, text_ids = pipeline.encode_prompt(
            sample.prompts,
            device="cpu",
            max_sequence_length=pipeline.tokenizer.model_max_length,
            text_encoder_out_layers=(1, 2, 3),  # of four; 9, 18 and 27 of 36
        )
    rows = torch.arange(width * width)
    places = torch.stack([0 * rows, rows // width, rows % width, 0 * rows], dim=1)
    predicted = pipeline.transformer(
        hidden_states=noisy.flatten(2).mT,
        encoder_hidden_states=text,
        timestep=time,
        img_ids=places.expand(count, -1, -1),
        txt_ids=text_ids,
        guidance=None,
    ).sample
    return F.mse_loss(predicted.mT.unflatten(2, (-1, width)), sample.noise - sample.latents)


def of_krea2(pipeline: Any, sample: Sample, config: ObjectiveConfig) -> Tensor:
    count, channels, height, width = sample.latents.shape
    share = (sample.timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1 - share) * sample.latents + share * sample.noise
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(
            list(sample.prompts), "cpu", max_sequence_length=pipeline.tokenizer.model_max_length
        )
    predicted = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy, count, channels, height, width),
        encoder_hidden_states=states,
        timestep=sample.timesteps / 1000,
        position_ids=pipeline.prepare_position_ids(states.shape[1], height // 2, width // 2, "cpu"),
        encoder_attention_mask=mask,
    ).sample
    scale = pipeline.vae_scale_factor
    made = pipeline._unpack_latents(predicted, height * scale, width * scale).squeeze(2)
    return F.mse_loss(made, sample.noise - sample.latents)


PLAIN = {
    "Flux2KleinPipeline": of_flux2_klein,
    "StableDiffusionPipeline": of_a_unet,
    "StableDiffusionXLPipeline": of_a_unet,
    "FluxPipeline": of_flux,
    "ChromaPipeline": of_chroma,
    "StableDiffusion3Pipeline": of_sd3,
    "ZImagePipeline": of_z_image,
    "Krea2Pipeline": of_krea2,
}


# What is equal ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=families.runnable())
def family(request: pytest.FixtureRequest) -> Family:
    return families.get(request.param)


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, relative to the largest value that is wanted; what must be 0 has to be 0."""
    largest, of = float((found - wanted).abs().max()), float(wanted.abs().max())
    return largest / of if of else largest


def learns_by_flow(family: Family) -> bool:
    return isinstance(family.objective(families.sizes_of(family.name, "tiny").pipeline()), FlowMatching)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("snr_gamma", [None, 5.0], ids=["plain", "min-SNR"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_loss_and_gradients_are_those_of_peft(
    family: Family, kind: str, prediction: Any, snr_gamma: float | None, rows: slice
) -> None:
    if learns_by_flow(family):
        if snr_gamma or prediction != "epsilon":
            pytest.skip("flow matching has neither")
        prediction = None
    config = ObjectiveConfig(prediction=prediction, snr_gamma=snr_gamma)
    step = ours(family, kind, config, rows)
    pipeline = family.tiny()
    denoiser = family.denoiser(pipeline)
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=layers_at(denoiser, family.facts.lora_targets),
        use_dora=kind == "dora",
        bias="none",
    )
    sample = samples(family, pipeline, rows)
    loss, wanted = theirs(pipeline, denoiser, lora, config, step.parameters, sample)
    assert step.gradients.keys() == wanted.keys()
    of_loss = difference(step.loss.mean(), loss)
    of_gradients = {name: difference(gradient, wanted[name]) for name, gradient in step.gradients.items()}
    worst = max(of_gradients, key=lambda name: of_gradients[name])
    print(
        f"loss {float(loss):.6f}, difference {of_loss:.1e}; {len(of_gradients)} gradients,"
        f" largest difference {of_gradients[worst]:.1e} in {worst}"
    )
    assert of_loss <= TOLERANCE
    assert of_gradients[worst] <= TOLERANCE
    moving = sum(bool(gradient.any()) for gradient in wanted.values())
    assert moving > 0.9 * len(wanted)  # the last block of some does not read all that it computes


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_batch_is_the_mean_of_its_rows(family: Family, kind: str) -> None:
    flow = learns_by_flow(family)
    config = ObjectiveConfig() if flow else ObjectiveConfig(prediction="v_prediction", snr_gamma=5.0)
    both = ours(family, kind, config, BATCHES["both"])
    first, second = (ours(family, kind, config, BATCHES[name]) for name in ("the first", "the second"))
    assert difference(both.loss, torch.cat([first.loss, second.loss])) <= TOLERANCE
    means = {name: (first.gradients[name] + second.gradients[name]) / 2 for name in both.gradients}
    worst = max(difference(gradient, means[name]) for name, gradient in both.gradients.items())
    print(f"largest difference {worst:.1e}")
    assert worst <= 5 * TOLERANCE  # kernels sum in another order for another batch size
    unlike = abs(float(both.loss[0] / both.loss[1]) - 1)
    print(f"losses {both.loss.tolist()}, unlike by {unlike:.2g}")
    assert unlike > 0.01


@torch.no_grad()
def test_all_that_the_denoiser_is_told_changes_what_it_predicts(family: Family) -> None:
    """Otherwise two prompts and two frames would prove nothing."""
    task, batch = prepared(family, "lora", ObjectiveConfig(), BATCHES["both"])
    told = family.conditioning(batch.conditioning, batch.frame)

    def predicted(**changed: Tensor) -> Tensor:
        return family.denoise(task.fitted.module, batch.latents, batch.timesteps, {**told, **changed})

    for name, tensor in told.items():
        other = tensor + 1 if torch.equal(tensor[0], tensor[1]) else tensor.flip(0)
        assert difference(predicted(**{name: other}), predicted()) > 1e-3, name
