"""FLUX.1: CLIP and T5 text encoders, a transformer of 11.9 G parameters; dev is told the guidance scale."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunekit.diffusion.sampling import SamplingConfig
from tunekit.families import family as answers
from tunekit.families import graphs, sizes, tiny, unet, vae
from tunekit.families.family import (
    Component,
    Conditioning,
    ExportComponent,
    FamilyFacts,
    Pipeline,
    Published,
    Tokens,
)
from tunekit.families.transformer import (
    JOINT_ATTENTION,
    JOINT_FEED_FORWARD,
    PATCH,
    Transformer,
    bare,
    pack,
    positions,
    unpack,
)
from tunekit.families.weights import Entry

ABSENT: dict[str, Any] = {"image_encoder": None, "feature_extractor": None}
"""Parts of the pipeline that are left out."""
VARIANTS = {2: "one that is steered by a second picture (Canny, Depth)", 6: "an inpainting model (Fill)"}
"""Times the channels of a plain model -> what takes so many."""
FEED_FORWARD = (
    *JOINT_FEED_FORWARD,
    *("single_transformer_blocks.*.proj_mlp", "single_transformer_blocks.*.proj_out"),
)

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
# https://github.com/black-forest-labs/flux/blob/main/src/flux/model.py and modules/layers.py there
PUBLISHED: dict[str, str | tuple[str, ...]] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "double_blocks.{}.img_mod.lin": f"{_DOUBLE}.norm1.linear",
    "double_blocks.{}.img_attn.qkv": tuple(f"{_DOUBLE}.attn.to_{part}" for part in "qkv"),
    "double_blocks.{}.img_attn.norm.query_norm.scale": f"{_DOUBLE}.attn.norm_q.weight",
    "double_blocks.{}.img_attn.norm.key_norm.scale": f"{_DOUBLE}.attn.norm_k.weight",
    "double_blocks.{}.img_attn.proj": f"{_DOUBLE}.attn.to_out.0",
    "double_blocks.{}.img_mlp.0": f"{_DOUBLE}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.2": f"{_DOUBLE}.ff.net.2",
    "double_blocks.{}.txt_mod.lin": f"{_DOUBLE}.norm1_context.linear",
    "double_blocks.{}.txt_attn.qkv": tuple(f"{_DOUBLE}.attn.add_{part}_proj" for part in "qkv"),
    "double_blocks.{}.txt_attn.norm.query_norm.scale": f"{_DOUBLE}.attn.norm_added_q.weight",
    "double_blocks.{}.txt_attn.norm.key_norm.scale": f"{_DOUBLE}.attn.norm_added_k.weight",
    "double_blocks.{}.txt_attn.proj": f"{_DOUBLE}.attn.to_add_out",
    "double_blocks.{}.txt_mlp.0": f"{_DOUBLE}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.2": f"{_DOUBLE}.ff_context.net.2",
    "single_blocks.{}.modulation.lin": f"{_SINGLE}.norm.linear",
    "single_blocks.{}.linear1": (
        *(f"{_SINGLE}.attn.to_{part}" for part in "qkv"),
        f"{_SINGLE}.proj_mlp",
    ),
    "single_blocks.{}.norm.query_norm.scale": f"{_SINGLE}.attn.norm_q.weight",
    "single_blocks.{}.norm.key_norm.scale": f"{_SINGLE}.attn.norm_k.weight",
    "single_blocks.{}.linear2": f"{_SINGLE}.proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
"""Layers of the transformer as it was published -> modules here; of several the rows are stacked there.
Of norms it is the tensor, whose name differs."""
SWAPPED = ("final_layer.adaLN_modulation.1",)
"""(shift, scale) there, (scale, shift) here."""
# https://github.com/XLabs-AI/x-flux/blob/main/src/flux/modules/layers.py
XLABS: dict[str, str | tuple[str, ...]] = {
    "double_blocks.{}.qkv_lora1": PUBLISHED["double_blocks.{}.img_attn.qkv"],
    "double_blocks.{}.proj_lora1": PUBLISHED["double_blocks.{}.img_attn.proj"],
    "double_blocks.{}.qkv_lora2": PUBLISHED["double_blocks.{}.txt_attn.qkv"],
    "double_blocks.{}.proj_lora2": PUBLISHED["double_blocks.{}.txt_attn.proj"],
    "single_blocks.{}.qkv": PUBLISHED["single_blocks.{}.linear1"][:3],
    "single_blocks.{}.proj": PUBLISHED["single_blocks.{}.linear2"],
}
"""What XLabs' trainer calls its adapters in the same network."""


class Flux(Transformer):
    """FLUX.1; see `Family` for what each method promises."""

    name: ClassVar[str] = "flux"
    # Sizes: https://huggingface.co/black-forest-labs/FLUX.1-dev, the config.json of each folder
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        title="FLUX.1",
        base_title="FLUX.1-dev",
        pipeline_classes=("FluxPipeline",),
        components=(
            Component(
                "transformer",
                "denoiser",
                "diffusers:FluxTransformer2DModel",
                {
                    "patch_size": 1,
                    "in_channels": 64,
                    "num_layers": 19,
                    "num_single_layers": 38,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768,
                    "guidance_embeds": True,
                },
                kohya=("lora_unet",),
                published="model.diffusion_model.",
                layers=partial(answers.published, PUBLISHED, swapped=SWAPPED),
                marks=("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
                dtype=None,
                sensitive=("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"),
                keeps=("timestep", "guidance", "img_ids", "txt_ids"),
            ),
            sizes.FLUX_VAE,
            sizes.clip("text_encoder", "tokenizer", 768, 12, 12, kohya=("lora_te1",)),
            sizes.t5_xxl("text_encoder_2", "tokenizer_2", 512, kohya=("lora_te3", "lora_te2")),
            sizes.scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True),
        ),
        lora_targets=JOINT_ATTENTION,
        presets={
            "attention": JOINT_ATTENTION,
            "attention_feed_forward": (*JOINT_ATTENTION, *FEED_FORWARD),
        },
        ss_base_model_version="flux1",
        modelspec_architecture="flux-1-dev",
        adapter_marks="double_blocks|single_transformer_blocks|single_blocks",
        default_source="black-forest-labs/FLUX.1-dev",
        licence="flux-1-dev-non-commercial-license",
        stored="bf16",
        distilled="schnell",
        sampling=SamplingConfig(steps=28, guidance=3.5),
        sampling_distilled=SamplingConfig(steps=4, guidance=0.0),
    )

    absent = ABSENT
    lists = ("transformer_blocks", "single_transformer_blocks")
    counted: ClassVar[Mapping[str, str]] = {
        "transformer_blocks": "num_layers",
        "single_transformer_blocks": "num_single_layers",
    }
    widths: ClassVar[Mapping[str, tuple[str, str]]] = {
        "text_encoder": ("hidden_size", "pooled_projection_dim"),
        "text_encoder_2": ("d_model", "joint_attention_dim"),
    }
    """Text encoder -> key of its configuration, and of the transformer's that has to say the same."""

    def misfits(self, parts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Entry]]) -> list[str]:
        found = vae.misfits(parts["vae"].config)
        network = parts["transformer"].config
        first = tensors.get("transformer", {}).get("x_embedder.weight")  # a file without a config.json
        taken = first.shape[1] if first and len(first.shape) > 1 else network.in_channels
        given = parts["vae"].config.latent_channels * PATCH**2
        if taken != given:
            kind = VARIANTS.get(taken // given, "another model") if isinstance(taken, int) else "damaged"
            found.append(
                f"its transformer takes {taken} channels and the VAE gives {given}: it is {kind}; a plain"
                " text-to-image model is needed"
            )
        for name, (given_as, wanted_as) in self.widths.items():
            width, wanted = getattr(parts[name].config, given_as), getattr(network, wanted_as)
            if width != wanted:
                found.append(f"its transformer reads text of width {wanted}, and {name} gives {width}")
        return found + answers.flow_misfits(parts["scheduler"])

    def tiny(self, seed: int = 0) -> Pipeline:
        from diffusers import FluxPipeline, FluxTransformer2DModel

        # 4 pixels per latent, 6 channels of them, encoders of unequal width and length.
        tokenizers = [tiny.clip_tokenizer(max_length=20), tiny.t5_tokenizer(max_length=28)]
        network = tiny.randomized(
            lambda: FluxTransformer2DModel(
                patch_size=1,
                in_channels=6 * PATCH**2,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=24,
                pooled_projection_dim=16,
                guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            ),
            seed,
            "transformer",
        )
        return FluxPipeline(
            vae=tiny.autoencoder(6, seed),
            text_encoder=tiny.clip_text_encoder(tokenizers[0], width=16, seed=seed),
            tokenizer=tokenizers[0],
            text_encoder_2=tiny.t5_text_encoder(tokenizers[1], width=24, seed=seed),
            tokenizer_2=tokenizers[1],
            transformer=network,
            scheduler=self.facts.component("scheduler").build(),
        )

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return not pipeline.transformer.config.guidance_embeds  # schnell

    @torch.no_grad()
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        clip, t5 = pipeline.text_encoder, pipeline.text_encoder_2
        pooled = clip(tokens["text_encoder"].to(clip.device)).pooler_output
        states = t5(tokens["text_encoder_2"].to(t5.device)).last_hidden_state  # padding is read too
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def conditioning(
        self, encoded: Conditioning, frame: Tensor, guidance: float | None = None
    ) -> Conditioning:
        """Adds the guidance that dev is told, and schnell is not; 1 while training."""
        rows = frame.new_full((len(frame),), 1.0 if guidance is None else guidance)
        return {**encoded, "guidance": rows}

    def cfg_scale(self, pipeline: Pipeline, guidance: float) -> float | None:
        return None  # dev is told the number; schnell was distilled without

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        *_, height, width = noisy.shape
        text = conditioning["encoder_hidden_states"]
        known = dict(conditioning)
        if not getattr(bare(denoiser).config, "guidance_embeds", False):
            known.pop("guidance", None)
        made = denoiser(
            hidden_states=pack(noisy),
            timestep=timestep / 1000,
            img_ids=positions(height, width, noisy.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
            **known,
            return_dict=False,
        )[0]
        return unpack(made, height, width)

    def picture_state(self, output: Any) -> Tensor | None:
        return answers.last_state(output)  # the text comes first

    def adapter_names(self, component: str, paths: Collection[str]) -> list[Published]:
        """The transformer as it was published, CLIP's names as kohya's tools keep them, T5's own."""
        if component == "transformer":
            written = answers.published(PUBLISHED, paths, swapped=SWAPPED)
            return written + answers.published(XLABS, paths)
        return unet.encoder_names(paths) if component == "text_encoder" else answers.underscored(paths)

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        clip, t5 = self.facts.encoders
        return [
            graphs.encoder(pipeline, clip, ["pooler_output", "last_hidden_state"]),
            graphs.encoder(pipeline, t5, ["last_hidden_state"]),
            self._export_transformer(pipeline),
            *vae.export_vae(pipeline, self.default_size(pipeline)),
        ]

    def _export_transformer(self, pipeline: Pipeline) -> ExportComponent:
        """Of tokens, as Optimum has it; positions are the same for all rows."""
        network = pipeline.transformer
        config = network.config
        _, height, width = self.latent_shape(pipeline, *self.default_size(pipeline))
        length, places = pipeline.tokenizer_2.model_max_length, positions(height, width)
        inputs = {
            "hidden_states": graphs.example(2, len(places), config.in_channels, like=network),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": graphs.example(2, length, config.joint_attention_dim, like=network),
            "pooled_projections": graphs.example(2, config.pooled_projection_dim, like=network),
            "img_ids": places,
            "txt_ids": torch.zeros(length, 3),
        }
        dynamic = {
            "hidden_states": graphs.TOKEN_AXES,
            "encoder_hidden_states": graphs.TEXT_AXES,
            "pooled_projections": graphs.ROW_AXES,
            "img_ids": {0: "tokens"},
            "txt_ids": {0: "sequence"},
        }
        if config.guidance_embeds:
            inputs["guidance"] = torch.tensor([3.5, 3.5])
            dynamic["guidance"] = graphs.ROW_AXES
        return graphs.denoiser("transformer", network, inputs, dynamic)


FAMILY = Flux()
