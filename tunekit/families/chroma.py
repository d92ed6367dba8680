"""Chroma: FLUX.1 with T5 alone, whose padding is masked, and a small network in place of its modulations."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunekit.diffusion.sampling import SamplingConfig
from tunekit.families import family as answers
from tunekit.families import flux, graphs, sizes, tiny, vae
from tunekit.families.family import (
    Component,
    Conditioning,
    ExportComponent,
    FamilyFacts,
    Pipeline,
    Published,
    Tokens,
)
from tunekit.families.flux import Flux
from tunekit.families.transformer import PATCH, bare, positions

MASK = "attention_mask"
"""[B, tokens] float32 beside the text: 1 for its tokens and one of padding, 0 for the rest of the padding."""

_LEFT_OUT = ("time_in", "vector_in", "guidance_in", "double_blocks.{}.img_mod", "double_blocks.{}.txt_mod")
# https://github.com/lodestone-rock/flow/tree/master/src/models/chroma
PUBLISHED: dict[str, str | tuple[str, ...]] = {
    "distilled_guidance_layer.layers.{}.in_layer": "distilled_guidance_layer.layers.{}.linear_1",
    "distilled_guidance_layer.layers.{}.out_layer": "distilled_guidance_layer.layers.{}.linear_2",
    "distilled_guidance_layer.norms.{}.scale": "distilled_guidance_layer.norms.{}.weight",
    **{
        name: modules
        for name, modules in flux.PUBLISHED.items()
        if not name.startswith((*_LEFT_OUT, "single_blocks.{}.modulation", "final_layer.adaLN_modulation"))
    },
}
"""See `flux.PUBLISHED`; there are no modulations."""


class Chroma(Flux):
    """Chroma; see `Family` for what each method promises."""

    name: ClassVar[str] = "chroma"
    counted: ClassVar[Mapping[str, str]] = {}  # one network modulates all blocks, each by its number
    # Sizes: https://huggingface.co/lodestones/Chroma1-Base, the config.json of each folder
    facts: ClassVar[FamilyFacts] = replace(
        Flux.facts,
        title="Chroma",
        base_title="Chroma1-Base",
        pipeline_classes=("ChromaPipeline",),
        components=(
            Component(
                "transformer",
                "denoiser",
                "diffusers:ChromaTransformer2DModel",
                {
                    "patch_size": 1,
                    "in_channels": 64,
                    "num_layers": 19,
                    "num_single_layers": 38,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "approximator_num_channels": 64,
                    "approximator_hidden_dim": 5120,
                    "approximator_layers": 5,
                },
                kohya=("lora_unet",),
                published="model.diffusion_model.",
                layers=partial(answers.published, PUBLISHED),
                marks=("double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"),
                dtype=None,
                sensitive=("x_embedder", "context_embedder", "distilled_guidance_layer", "proj_out"),
                keeps=("timestep", "img_ids", "txt_ids"),
            ),
            sizes.FLUX_VAE,
            sizes.t5_xxl("text_encoder", "tokenizer", 512),
            sizes.scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True),
        ),
        ss_base_model_version="chroma",
        modelspec_architecture="chroma",
        adapter_marks="distilled_guidance_layer",
        default_source="lodestones/Chroma1-Base",
        licence="apache-2.0",
        stored="bf16",
        distilled="flash",
        sampling=SamplingConfig(steps=40, guidance=3.0),
        sampling_distilled=None,
    )

    widths: ClassVar[Mapping[str, tuple[str, str]]] = {"text_encoder": ("d_model", "joint_attention_dim")}

    def tiny(self, seed: int = 0) -> Pipeline:
        from diffusers import ChromaPipeline, ChromaTransformer2DModel

        tokenizer = tiny.t5_tokenizer(max_length=30)
        network = tiny.randomized(
            lambda: ChromaTransformer2DModel(
                patch_size=1,
                in_channels=6 * PATCH**2,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=24,
                axes_dims_rope=(4, 6, 6),
                approximator_num_channels=16,
                approximator_hidden_dim=20,
                approximator_layers=2,
            ),
            seed,
            "transformer",
        )
        return ChromaPipeline(
            vae=tiny.autoencoder(6, seed),
            text_encoder=tiny.t5_text_encoder(tokenizer, width=24, seed=seed, name="text_encoder"),
            tokenizer=tokenizer,
            transformer=network,
            scheduler=self.facts.component("scheduler").build(),
        )

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return False  # its configurations do not tell

    def tokenize(self, pipeline: Pipeline, prompts: list[str]) -> Tokens:
        read = answers.read(pipeline.tokenizer, prompts)
        return {"text_encoder": read.input_ids, "text_encoder" + answers.MASK: read.attention_mask}

    @torch.no_grad()
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        """T5's states, whose padding it does not attend to, and which of them the transformer does."""
        encoder = pipeline.text_encoder
        ids = tokens["text_encoder"].to(encoder.device)
        mask = torch.ones_like(ids)
        told = {}
        if (given := tokens.get("text_encoder" + answers.MASK)) is not None:  # there is none in a plan
            mask = told["attention_mask"] = given.to(encoder.device)
        states = encoder(ids, **told).last_hidden_state
        place = torch.arange(ids.shape[1], device=ids.device)
        # A number and no boolean, as diffusers gives it: what is masked scores 1 less, before the softmax.
        seen = (place <= mask.sum(dim=1, keepdim=True)).to(torch.float32)
        return {"encoder_hidden_states": states, MASK: seen}

    def conditioning(
        self, encoded: Conditioning, frame: Tensor, guidance: float | None = None
    ) -> Conditioning:
        return encoded

    def cfg_scale(self, pipeline: Pipeline, guidance: float) -> float | None:
        return answers.cfg_scale(guidance)

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        mask = conditioning[MASK]
        picture = mask.new_ones(len(noisy), noisy.shape[2] * noisy.shape[3] // PATCH**2)
        whole = torch.cat([mask, picture], dim=1)
        with _masked(bare(denoiser), whole):
            return super().denoise(denoiser, noisy, timestep, {**conditioning, MASK: whole})

    def adapter_names(self, component: str, paths: Collection[str]) -> list[Published]:
        """The transformer as it was published, T5's own names."""
        return (
            answers.published(PUBLISHED, paths) if component == "transformer" else answers.underscored(paths)
        )

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        network = pipeline.transformer
        config = network.config
        _, height, width = self.latent_shape(pipeline, *self.default_size(pipeline))
        length, places = pipeline.tokenizer.model_max_length, positions(height, width)
        inputs = {
            "hidden_states": graphs.example(2, len(places), config.in_channels, like=network),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": graphs.example(2, length, config.joint_attention_dim, like=network),
            "img_ids": places,
            "txt_ids": torch.zeros(length, 3),
            MASK: graphs.example(2, length + len(places), like=network).sign().relu(),
        }
        dynamic = {
            "hidden_states": graphs.TOKEN_AXES,
            "encoder_hidden_states": graphs.TEXT_AXES,
            "img_ids": {0: "tokens"},
            "txt_ids": {0: "sequence"},
            MASK: {0: "batch", 1: "sequence+tokens"},
        }
        return [
            graphs.encoder(pipeline, self.facts.encoders[0], ["last_hidden_state"], masked=True),
            graphs.denoiser("transformer", network, inputs, dynamic),
            *vae.export_vae(pipeline, self.default_size(pipeline)),
        ]


@contextmanager
def _masked(network: Any, mask: Tensor) -> Iterator[None]:
    """Gives single blocks the mask where they are checkpointed: diffusers leaves it out there (0.42)."""
    checkpointed = getattr(network, "_gradient_checkpointing_func", None)
    if checkpointed is None:
        yield
        return

    def run(block: nn.Module, *given: Any) -> Any:
        short = type(block).__name__ == "ChromaSingleTransformerBlock" and len(given) == 3
        return checkpointed(block, *given, *([mask] if short else []))

    network._gradient_checkpointing_func = run
    try:
        yield
    finally:
        network._gradient_checkpointing_func = checkpointed


FAMILY = Chroma()
