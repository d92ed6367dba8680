"""FLUX.1: CLIP and T5 text encoders, a transformer of 11.9 G parameters; dev is told the guidance scale."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunekit.config import ObjectiveConfig
from tunekit.diffusion.objectives import FlowMatching, Objective, ShiftByTokens
from tunekit.diffusion.sampling import SamplingConfig
from tunekit.errors import ModelError
from tunekit.families import family as answers
from tunekit.families import graphs, loading, sizes, tiny, unet, vae
from tunekit.families.family import (
    Component,
    Conditioning,
    Dtypes,
    ExportComponent,
    FamilyFacts,
    Packing,
    Pipeline,
    Published,
    Tokens,
)
from tunekit.families.weights import Entry
from tunekit.resources import Source

PATCH = 2
"""The transformer takes 2 x 2 latents as one token."""
ABSENT: dict[str, Any] = {"image_encoder": None, "feature_extractor": None}
"""Parts of the pipeline that are left out."""
VARIANTS = {2: "one that is steered by a second picture (Canny, Depth)", 6: "an inpainting model (Fill)"}
"""Times the channels of a plain model -> what takes so many."""
ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
FEED_FORWARD = (
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
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


class Flux:
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
            sizes.vae(16, quant=False, scaling=0.3611, shift=0.1159, sample_size=1024),
            sizes.clip("text_encoder", "tokenizer", 768, 12, 12, kohya=("lora_te1",)),
            sizes.t5_xxl("text_encoder_2", "tokenizer_2", 512, kohya=("lora_te3", "lora_te2")),
            sizes.scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True),
        ),
        lora_targets=ATTENTION,
        presets={"attention": ATTENTION, "attention_feed_forward": (*ATTENTION, *FEED_FORWARD)},
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

    widths: ClassVar[Mapping[str, tuple[str, str]]] = {
        "text_encoder": ("hidden_size", "pooled_projection_dim"),
        "text_encoder_2": ("d_model", "joint_attention_dim"),
    }
    """Text encoder -> key of its configuration, and of the transformer's that has to say the same."""

    def load(self, source: Source | str, dtypes: Dtypes = torch.float32, *, pack: Packing = "") -> Pipeline:
        source = Source.of(source)
        if source.name == "tiny":
            return loading.cast(self.tiny(), self.facts, dtypes)
        return loading.load_pipeline(
            source, self.facts, dtypes, pack=pack, fixed=ABSENT, misfits=self.misfits
        )

    def look(self, source: Source | str) -> list[ModelError]:
        return loading.look(Source.of(source), self.facts, fixed=ABSENT, misfits=self.misfits)

    def misfits(self, parts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Entry]]) -> list[str]:
        """Why components do not make up a model that is trained and drawn here; see `loading.Misfits`."""
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

    def save(self, pipeline: Pipeline, folder: Path) -> None:
        loading.save_pipeline(pipeline, folder, self.facts)

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

    def recognizes(self, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        return True

    def denoiser(self, pipeline: Pipeline) -> nn.Module:
        network: nn.Module = pipeline.transformer
        return network

    def objective(self, pipeline: Pipeline, config: ObjectiveConfig | None = None) -> Objective:
        return FlowMatching.from_scheduler(pipeline.scheduler, config, patch=PATCH)

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return not pipeline.transformer.config.guidance_embeds  # schnell

    def default_size(self, pipeline: Pipeline) -> tuple[int, int]:
        side = int(pipeline.vae.config.sample_size)  # the transformer's configuration has none
        return side, side

    def resolution_multiple(self, pipeline: Pipeline) -> int:
        return vae.vae_factor(pipeline) * PATCH

    def latent_shape(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
        channels = int(pipeline.transformer.config.in_channels) // PATCH**2
        multiple = self.resolution_multiple(pipeline)
        return vae.latent_shape(channels, vae.vae_factor(pipeline), multiple, height, width)

    def tokenize(self, pipeline: Pipeline, prompts: list[str]) -> Tokens:
        return answers.tokenize(self.facts, pipeline, prompts)

    @torch.no_grad()
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        clip, t5 = pipeline.text_encoder, pipeline.text_encoder_2
        pooled = clip(tokens["text_encoder"].to(clip.device)).pooler_output
        states = t5(tokens["text_encoder_2"].to(t5.device)).last_hidden_state  # padding is read too
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def encode_prompt(self, pipeline: Pipeline, prompts: list[str]) -> Conditioning:
        return self.encode_tokens(pipeline, self.tokenize(pipeline, prompts))

    def encode_image(self, pipeline: Pipeline, pixels: Tensor) -> Tensor:
        return vae.encode_image(pipeline, pixels)

    def decode(self, pipeline: Pipeline, latents: Tensor) -> Tensor:
        return vae.decode(pipeline, latents)

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
        if not bare(denoiser).config.guidance_embeds:
            del known["guidance"]
        made = denoiser(
            hidden_states=pack(noisy),
            timestep=timestep / 1000,
            img_ids=positions(height // PATCH, width // PATCH, noisy.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
            **known,
            return_dict=False,
        )[0]
        return unpack(made, height, width)

    def begin(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        mu = ShiftByTokens.from_scheduler(scheduler, PATCH).mu(tuple(latents.shape))
        return answers.begin_flow(scheduler, steps, latents, mu)

    def blocks(self, denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
        transformer: Any = denoiser
        return [
            (f"{name}.{i}", block)
            for name in ("transformer_blocks", "single_transformer_blocks")
            for i, block in enumerate(getattr(transformer, name))
        ]

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
        rows, columns, length = height // PATCH, width // PATCH, pipeline.tokenizer_2.model_max_length
        inputs = {
            "hidden_states": graphs.example(2, rows * columns, config.in_channels, like=network),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": graphs.example(2, length, config.joint_attention_dim, like=network),
            "pooled_projections": graphs.example(2, config.pooled_projection_dim, like=network),
            "img_ids": positions(rows, columns, torch.device("cpu")),
            "txt_ids": torch.zeros(length, 3),
        }
        dynamic = {
            "hidden_states": {0: "batch", 1: "tokens"},
            "encoder_hidden_states": {0: "batch", 1: "sequence"},
            "pooled_projections": {0: "batch"},
            "img_ids": {0: "tokens"},
            "txt_ids": {0: "sequence"},
        }
        if config.guidance_embeds:
            inputs["guidance"] = torch.tensor([3.5, 3.5])
            dynamic["guidance"] = {0: "batch"}
        return ExportComponent(
            name="transformer",
            component="transformer",
            module=_Transformer(network),
            inputs=inputs,
            dynamic=dynamic,
            outputs=["out_hidden_states"],
            config=graphs.model_config(network),
        )


class _Transformer(nn.Module):
    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        made: Tensor = self.transformer(
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            return_dict=False,
        )[0]
        return made


def bare(denoiser: nn.Module) -> Any:
    """The network itself, which DDP wraps."""
    return getattr(denoiser, "module", denoiser)


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] to tokens [B, h/2 * w/2, 4 C]."""
    batch, channels, height, width = latents.shape
    cut = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The reverse of `pack`, to latents of that height and width."""
    batch, _, depth = tokens.shape
    channels = depth // PATCH**2
    cut = tokens.view(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """[height * width, 3] float32: 0, row and column of each token."""
    ids = torch.zeros(height, width, 3, device=device)
    ids[..., 1] += torch.arange(height, device=device)[:, None]
    ids[..., 2] += torch.arange(width, device=device)[None, :]
    return ids.view(-1, 3)


FAMILY = Flux()
