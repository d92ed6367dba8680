"""The memory of what stands around the steps: encoding, previews, class pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from tunekit import networks
from tunekit.families.family import DTYPES, as_kept, pixels_per_latent
from tunekit.memory.job import ENCODERS, GATHERED, STATE, VAE, VISITORS, WEIGHTS, Job
from tunekit.memory.levers import Levers, as_held, lowered, tile_vae
from tunekit.memory.step import adapted, parted
from tunekit.memory.trace import Target, Trace, Tracer

DEVICE, LAYERS, HOST = "device", "layers", "host"
PLACES = (DEVICE, LAYERS, HOST)
"""Where text encoders are while captions are encoded: on the device, there layer by layer, on the CPU."""


def trace_encode(job: Job, target: Target, levers: Levers | None = None, *, captions: str = DEVICE) -> Trace:
    """Follows the encoding of a picture, then of a caption, each with its own networks on the device.

    On the CPU nothing leaves: the whole pipeline is there all the time, the denoiser as it was read.

    Args:
        levers: the denoiser's on the CPU, and the precision of the VAE's arithmetic.
        captions: where they are encoded, a value of `PLACES`.
    """
    family, everything = job.sizes.family, target.name == "cpu"
    levers = levers or Levers(job.precision)
    pipeline = job.sizes.pipeline()
    kept = pipeline.vae
    if levers.encode_precision != "fp32":  # a copy, because previews are decoded in float32
        pipeline.vae = job.sizes.vae.build().to(DTYPES[levers.encode_precision])
    encoders = [getattr(pipeline, part.name) for part in job.sizes.encoders]
    there: list[Tensor] = []
    if everything:
        as_held(denoiser := family.denoiser(pipeline), job.adapter, levers)
        there = tensors(denoiser)

    def begin(tracer: Tracer, *, pictures: bool) -> None:
        tracer.label(there, WEIGHTS)
        if pictures or everything:
            tracer.label(tensors(*({kept, pipeline.vae} if everything else {pipeline.vae})), VAE)
        if everything:
            tracer.label(tensors(*encoders), ENCODERS)

    pixels, tokens = torch.empty(1, 3, *job.size, device="meta"), job.sizes.tokens(1)
    with Tracer(target) as tracer, torch.no_grad():
        begin(tracer, pictures=True)
        with tracer.phase("encode"):
            tracer.label([pixels], "inputs")
            moments = family.encode_image(pipeline, pixels)
            del moments
    if captions == HOST:
        return tracer.trace()
    with Tracer(target) as second, torch.no_grad():
        begin(second, pictures=False)
        with second.phase("encode"), visiting(second, encoders, by_layer=captions == LAYERS):
            told = as_kept(family.encode_tokens(pipeline, tokens))
            del told
    return _after(tracer.trace(), second.trace())


def trace_preview(
    job: Job, target: Target, levers: Levers | None = None, *, held: int = 0, tiled: bool = False
) -> Trace:
    """Follows one preview: a call of the denoiser, then the VAE's decoder.

    Args:
        held: bytes that stay meanwhile beside the denoiser: masters and optimizer state.
        tiled: see `levers.tile_vae`.
    """
    if job.preview is None:
        raise ValueError("this job draws no previews")
    family = job.sizes.family
    fitted = adapted(job, levers or Levers(job.precision))
    denoiser = fitted.module.eval()
    pipeline = job.sizes.pipeline(built={job.sizes.denoiser.name: denoiser})
    host = {id(tensor) for tensor in fitted.host.tensors} if fitted.host else set()
    there = [tensor for tensor in tensors(denoiser) if id(tensor) not in host]
    parts = list(fitted.parameters.values()) if fitted.learns_parts else []
    if tiled:
        tile_vae(pipeline.vae, factor=pixels_per_latent(family, pipeline))
    kept = [torch.empty(held, dtype=torch.uint8, device="meta")] if held else []
    rows = 2 if job.guided else 1
    latents, told = job.sizes.latents(1, *job.preview), job.told(rows)

    def begin(tracer: Tracer) -> None:
        tracer.casting(denoiser)
        if fitted.shards:
            tracer.label([*parted(fitted, tracer, there), *parts], WEIGHTS)
            fitted.shards.watch = lambda tensors: tracer.label(tensors, GATHERED)
        else:
            tracer.label(there, WEIGHTS)
        tracer.label(kept, STATE)
        tracer.label(tensors(pipeline.vae), VAE)
        tracer.label([latents], "inputs")
        if fitted.host:
            fitted.host.watch = lambda copies: tracer.label(copies, VISITORS)

    with Tracer(target, autocast=job.autocast) as tracer, torch.no_grad():
        begin(tracer)
        with tracer.phase("preview forward"):
            tracer.label(told.values(), "inputs")
            noisy, timesteps = torch.cat([latents] * rows), latents.new_empty(rows)
            made = family.denoise(denoiser, noisy, timesteps, told).float()
            del made, noisy, timesteps
    with Tracer(target) as decoder, torch.no_grad():
        begin(decoder)
        with decoder.phase("preview decode"):
            pixels = family.decode(pipeline, latents)
            del pixels
    return _after(tracer.trace(), decoder.trace())


def trace_class_pictures(job: Job, target: Target, batch: int, *, captions: str = DEVICE) -> Trace:
    """Follows the drawing of class pictures by the base, in the types that it was opened in for training.

    The text encoders visit the device alone; then the denoiser and the VAE are there. On the CPU all stay.

    Args:
        batch: pictures at once, each with guidance.
        captions: where their prompt is encoded, a value of `PLACES`.
    """
    if job.class_pictures is None:
        raise ValueError("this job draws no class pictures")
    family, everything = job.sizes.family, target.name == "cpu"
    dtype = torch.float32 if job.adapter is None else DTYPES[job.precision]
    dtypes = family.facts.dtypes(dtype)
    built = {part.name: part.build().to(dtypes[part.name]) for part in job.sizes.networks}
    pipeline = job.sizes.pipeline(built=built)
    encoders = [built[part.name] for part in job.sizes.encoders]
    told = lowered(job.told(2 * batch), dtype, family.facts.denoiser.keeps)
    latents, tokens = job.sizes.latents(batch, *job.class_pictures), job.sizes.tokens(1)

    def begin(tracer: Tracer, *, drawing: bool) -> None:
        if everything or drawing:
            tracer.label(tensors(family.denoiser(pipeline)), WEIGHTS)
            tracer.label(tensors(pipeline.vae), VAE)
        if everything:
            tracer.label(tensors(*encoders), ENCODERS)

    with Tracer(target) as tracer, torch.no_grad():
        begin(tracer, drawing=True)
        with tracer.phase("class pictures"):
            tracer.label(told.values(), "inputs")
            noisy, timesteps = torch.cat([latents] * 2).to(dtype), latents.new_empty(2 * batch)
            made = family.denoise(family.denoiser(pipeline), noisy, timesteps, told).float()
            del made, noisy, timesteps, told
            pixels = family.decode(pipeline, latents)
            del pixels
    if captions == HOST:
        return tracer.trace()
    with Tracer(target) as first, torch.no_grad():
        begin(first, drawing=False)
        with first.phase("class pictures"), visiting(first, encoders, by_layer=captions == LAYERS):
            encoded = as_kept(family.encode_tokens(pipeline, tokens))
            del encoded
    return _after(first.trace(), tracer.trace())


@contextmanager
def visiting(tracer: Tracer, encoders: Sequence[nn.Module], *, by_layer: bool) -> Iterator[None]:
    """Within, text encoders are on the device: whole, or but for their layers, which come one by one."""
    if not by_layer:
        tracer.label(tensors(*encoders), ENCODERS)
        yield
        return
    with ExitStack() as stack:
        for encoder in encoders:
            visitors = {id(tensor) for layer in networks.repeated(encoder) for tensor in tensors(layer)}
            tracer.label([t for t in tensors(encoder) if id(t) not in visitors], ENCODERS)
            stack.enter_context(
                networks.by_layer(encoder, "meta", lambda copies: tracer.label(copies, VISITORS))
            )
        yield


def tensors(*modules: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _after(one: Trace, other: Trace) -> Trace:
    """One trace, then another, with nothing of the first left."""
    shift = 1 + max(one.categories, default=-1)
    moved = [e._replace(storage=e.storage + shift) if e.storage >= 0 else e for e in other.events]
    live: dict[int, int] = {}
    for event in one.events:
        live[event.storage] = live.get(event.storage, 0) + event.size
    phase = one.events[-1].phase
    gone = [one.events[0]._replace(storage=s, size=-size, phase=phase) for s, size in live.items() if size]
    categories = {**one.categories, **{number + shift: name for number, name in other.categories.items()}}
    return Trace((*one.events, *gone, *moved), categories, (*one.work, *other.work))
