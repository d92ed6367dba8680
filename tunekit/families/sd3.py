"""Stable Diffusion 3.5 medium and large, and 3 medium: two CLIP and a T5 text encoder, an MMDiT."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunekit.diffusion.sampling import SamplingConfig
from tunekit.errors import ConfigError
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
    shift,
)
from tunekit.families.weights import Entry

ABSENT: dict[str, Any] = {"image_encoder": None, "feature_extractor": None}
"""Parts of the pipeline that are left out: those of IP-Adapters."""
CLIP = ["text_embeds", "last_hidden_state"]
"""Outputs of the graphs of both CLIP encoders, before their hidden states."""
T5 = "text_encoder_3"
"""The text encoder that may be missing: 4.8 of the 8 G parameters of 3.5 medium."""
ATTENTION = (
    *JOINT_ATTENTION,
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
)

_BLOCK, _PICTURE, _TEXT = "transformer_blocks.{}", "joint_blocks.{}.x_block", "joint_blocks.{}.context_block"
# https://github.com/Stability-AI/sd3.5/blob/main/mmditx.py
PUBLISHED: dict[str, str | tuple[str, ...]] = {
    "x_embedder.proj": "pos_embed.proj",
    "pos_embed": "pos_embed.pos_embed",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    f"{_PICTURE}.adaLN_modulation.1": f"{_BLOCK}.norm1.linear",
    f"{_PICTURE}.attn.qkv": tuple(f"{_BLOCK}.attn.to_{part}" for part in "qkv"),
    f"{_PICTURE}.attn.ln_q": f"{_BLOCK}.attn.norm_q",
    f"{_PICTURE}.attn.ln_k": f"{_BLOCK}.attn.norm_k",
    f"{_PICTURE}.attn.proj": f"{_BLOCK}.attn.to_out.0",
    f"{_PICTURE}.attn2.qkv": tuple(f"{_BLOCK}.attn2.to_{part}" for part in "qkv"),
    f"{_PICTURE}.attn2.ln_q": f"{_BLOCK}.attn2.norm_q",
    f"{_PICTURE}.attn2.ln_k": f"{_BLOCK}.attn2.norm_k",
    f"{_PICTURE}.attn2.proj": f"{_BLOCK}.attn2.to_out.0",
    f"{_PICTURE}.mlp.fc1": f"{_BLOCK}.ff.net.0.proj",
    f"{_PICTURE}.mlp.fc2": f"{_BLOCK}.ff.net.2",
    f"{_TEXT}.adaLN_modulation.1": f"{_BLOCK}.norm1_context.linear",
    f"{_TEXT}.attn.qkv": tuple(f"{_BLOCK}.attn.add_{part}_proj" for part in "qkv"),
    f"{_TEXT}.attn.ln_q": f"{_BLOCK}.attn.norm_added_q",
    f"{_TEXT}.attn.ln_k": f"{_BLOCK}.attn.norm_added_k",
    f"{_TEXT}.attn.proj": f"{_BLOCK}.attn.to_add_out",
    f"{_TEXT}.mlp.fc1": f"{_BLOCK}.ff_context.net.0.proj",
    f"{_TEXT}.mlp.fc2": f"{_BLOCK}.ff_context.net.2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
"""Layers of the network as it was published -> modules here; of several the rows are stacked there."""
SWAPPED = ("final_layer.adaLN_modulation.1",)
"""(shift, scale) there, (scale, shift) here; so is the text's modulation in the last block."""

LARGE = {
    "transformer": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "dual_attention_layers": (),
    }
}
FIRST = {"transformer": {"pos_embed_max_size": 192, "dual_attention_layers": (), "qk_norm": None}}
"""What the configurations of 3.5 large and of 3 medium have instead."""


def layers(paths: Collection[str]) -> list[Published]:
    """The transformer's layers as it was published; see `Component.layers`."""
    blocks = [int(path.split(".")[1]) for path in paths if path.startswith("transformer_blocks.")]
    last = f"joint_blocks.{max(blocks, default=0)}.context_block.adaLN_modulation.1"
    return answers.published(PUBLISHED, paths, swapped=(*SWAPPED, last))


class SD3(Transformer):
    """Stable Diffusion 3.5 and 3; see `Family` for what each method promises.

    The network is Esser et al. 2024 (arXiv:2403.03206). 3.5 medium has a second attention over the picture
    alone in its first blocks, and like 3.5 large normalizes queries and keys; 3 medium does neither.
    """

    name: ClassVar[str] = "sd3"
    # Sizes: https://huggingface.co/stabilityai/stable-diffusion-3.5-medium, the config.json of each folder
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        title="Stable Diffusion 3.5",
        base_title="Stable Diffusion 3.5 medium",
        pipeline_classes=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        components=(
            Component(
                "transformer",
                "denoiser",
                "diffusers:SD3Transformer2DModel",
                {
                    "sample_size": 128,
                    "patch_size": 2,
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_layers": 24,
                    "attention_head_dim": 64,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "caption_projection_dim": 1536,
                    "pooled_projection_dim": 2048,
                    "pos_embed_max_size": 384,
                    "dual_attention_layers": tuple(range(13)),
                    "qk_norm": "rms_norm",
                },
                kohya=("lora_unet",),
                published="model.diffusion_model.",
                layers=layers,
                marks=("joint_blocks.0.x_block.attn.qkv.weight", "y_embedder.mlp.0.weight"),
                dtype=None,
                sensitive=("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out"),
                keeps=("timestep",),
            ),
            sizes.vae(16, quant=False, scaling=1.5305, shift=0.0609),
            sizes.clip("text_encoder", "tokenizer", 768, 12, 12, projection=768, kohya=("lora_te1",)),
            sizes.clip(
                "text_encoder_2",
                "tokenizer_2",
                1280,
                32,
                20,
                act="gelu",
                projection=1280,
                kohya=("lora_te2",),
            ),
            sizes.t5_xxl(T5, "tokenizer_3", 256, kohya=("lora_te3",), optional=True),
            sizes.scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0),
        ),
        lora_targets=ATTENTION,
        presets={"attention": ATTENTION, "attention_feed_forward": (*ATTENTION, *JOINT_FEED_FORWARD)},
        ss_base_model_version="sd3.5",
        modelspec_architecture="stable-diffusion-v3-medium",
        distilled=r"(large)[-_]turbo",  # its configurations are those of 3.5 large
        distilled_from=r"\1",
        bases={
            "stabilityai/stable-diffusion-3.5-large": LARGE,
            "stabilityai/stable-diffusion-3.5-large-turbo": LARGE,
            "stabilityai/stable-diffusion-3-medium-diffusers": FIRST,
        },
        adapter_marks=r"joint_blocks|context_block|(^|transformer[._])transformer_blocks[._]\d+[._]attn2[._]",
        default_source="stabilityai/stable-diffusion-3.5-medium",
        licence="stabilityai-ai-community",
        stored="bf16",
        sampling=SamplingConfig(steps=40, guidance=4.5),
        sampling_distilled=SamplingConfig(steps=4, guidance=1.0),
    )

    absent = ABSENT

    def misfits(self, parts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Entry]]) -> list[str]:
        network, found = parts["transformer"].config, vae.misfits(parts["vae"].config)
        taken, given = network.in_channels, parts["vae"].config.latent_channels
        if taken != given:
            found.append(
                f"its transformer takes {taken} channels and the VAE gives {given}: a plain text-to-image"
                " model is needed"
            )
        if network.out_channels not in (None, taken):
            found.append(f"its transformer gives {network.out_channels} channels and takes {taken}")
        if network.patch_size != PATCH or not isinstance(network.pos_embed_max_size, int):
            found.append(
                f"its transformer has patch_size {network.patch_size} and pos_embed_max_size"
                f" {network.pos_embed_max_size}; {PATCH} and a whole number are needed"
            )
        clip = [parts[name].config for name in ("text_encoder", "text_encoder_2")]
        pooled, wide = (sum(getattr(each, key) for each in clip) for key in ("projection_dim", "hidden_size"))
        if pooled != network.pooled_projection_dim:
            found.append(
                f"its transformer reads a text of {network.pooled_projection_dim} numbers, and text_encoder"
                f" and text_encoder_2 give {pooled}"
            )
        width, t5 = network.joint_attention_dim, parts[T5]
        if t5 is not None and t5.config.d_model != width:
            found.append(f"its transformer reads text of width {width}, and {T5} gives {t5.config.d_model}")
        if wide > width:
            found.append(
                f"its transformer reads text of width {width}, and text_encoder and text_encoder_2 give"
                f" {wide}"
            )
        return found + answers.flow_misfits(parts["scheduler"])

    def tiny(self, seed: int = 0) -> Pipeline:
        from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

        # 4 pixels per latent, a table of positions that is cropped unevenly, three encoders of unequal width.
        tokenizers = [tiny.clip_tokenizer(max_length=22) for _ in range(2)]
        long_tokenizer = tiny.t5_tokenizer(max_length=30)
        network = tiny.randomized(
            lambda: SD3Transformer2DModel(
                sample_size=16,
                patch_size=PATCH,
                in_channels=6,
                out_channels=6,
                num_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=48,
                caption_projection_dim=32,
                pooled_projection_dim=12 + 20,
                pos_embed_max_size=33,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            ),
            seed,
            "transformer",
        )
        return StableDiffusion3Pipeline(
            # Of 8 channels, the convolutions of the CPU take room of their own beside what is planned.
            vae=tiny.autoencoder(6, seed, block_out_channels=(16, 16, 32), norm_num_groups=8),
            text_encoder=tiny.clip_text_encoder(tokenizers[0], width=16, projection=12, seed=seed),
            text_encoder_2=tiny.clip_text_encoder(
                tokenizers[1], width=20, layers=3, seed=seed, act="gelu", projection=20, name="text_encoder_2"
            ),
            text_encoder_3=tiny.t5_text_encoder(long_tokenizer, width=48, seed=seed, name=T5),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            tokenizer_3=long_tokenizer,
            transformer=network,
            scheduler=self.facts.component("scheduler").build(),
        )

    def default_size(self, pipeline: Pipeline) -> tuple[int, int]:
        side = int(pipeline.transformer.config.sample_size) * vae.vae_factor(pipeline)
        return side, side

    def latent_shape(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
        shape = super().latent_shape(pipeline, height, width)
        largest = int(pipeline.transformer.config.pos_embed_max_size) * self.resolution_multiple(pipeline)
        for size in (height, width):
            if size > largest:
                raise ConfigError(
                    f"{size} px is more than this model has positions for (pos_embed_max_size)",
                    hint=f"{largest} px at most, along each side",
                )
        return shape

    @torch.no_grad()
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        """CLIP's two states side by side, padded to T5's width, stand before T5's along the sequence.

        Without T5 they stand before zeros, as many as it reads tokens.
        """
        clip, pooled = [], []
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(pipeline, name)
            output = encoder(tokens[name].to(encoder.device), output_hidden_states=True)
            clip.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        short, t5 = torch.cat(clip, dim=-1), getattr(pipeline, T5, None)
        if t5 is None:  # as the model saw it where T5 was dropped while it was trained
            width, length = pipeline.transformer.config.joint_attention_dim, self.facts.component(T5).tokens
            long = short.new_zeros(len(short), length, width)
        else:
            long = t5(tokens[T5].to(t5.device)).last_hidden_state  # padding is read too
        short = F.pad(short, (0, long.shape[-1] - short.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([short, long], dim=-2),
            "pooled_projections": torch.cat(pooled, dim=-1),
        }

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        # Not divided by 1000, unlike other transformers of flow matching.
        made: Tensor = denoiser(hidden_states=noisy, timestep=timestep, **conditioning, return_dict=False)[0]
        return made

    def begin(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        """Down to the sampler's own least noise, not to 1 / steps as other transformers."""
        if not scheduler.config.get("use_dynamic_shifting"):
            return answers.begin(scheduler, steps, latents)
        scheduler.set_timesteps(steps, device=latents.device, mu=shift(scheduler, latents))
        return latents

    def recounted(self, denoiser: nn.Module, name: str, kept: list[int]) -> dict[str, Any]:
        """The blocks in which the picture attends to itself once more.

        The last block, in which the text is read only, is the last afterwards, too.
        """
        config: Any = denoiser.config
        twice = config.dual_attention_layers
        return {"dual_attention_layers": tuple(new for new, old in enumerate(kept) if old in twice)}

    def picture_state(self, output: Any) -> Tensor | None:
        return answers.last_state(output)  # the text comes first, and is None behind the last block

    def adapter_names(self, component: str, paths: Collection[str]) -> list[Published]:
        """The transformer as it was published, CLIP's names as kohya's tools keep them, T5's own."""
        if component == "transformer":
            return layers(paths)
        return answers.underscored(paths) if component == T5 else unet.encoder_names(paths)

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        network = pipeline.transformer
        config = network.config
        channels, height, width = self.latent_shape(pipeline, *self.default_size(pipeline))
        t5 = getattr(pipeline, "tokenizer_3", None)
        tokens = t5.model_max_length if t5 is not None else self.facts.component(T5).tokens
        length = pipeline.tokenizer.model_max_length + tokens
        inputs = {
            "hidden_states": graphs.example(2, channels, height, width, like=network),
            "timestep": torch.tensor([10.0]),
            "encoder_hidden_states": graphs.example(2, length, config.joint_attention_dim, like=network),
            "pooled_projections": graphs.example(2, config.pooled_projection_dim, like=network),
        }
        dynamic = {
            "hidden_states": graphs.PICTURE_AXES,
            "encoder_hidden_states": graphs.TEXT_AXES,
            "pooled_projections": graphs.ROW_AXES,
        }
        return [
            *(
                graphs.encoder(pipeline, row, ["last_hidden_state"])
                if row.name == T5
                else graphs.encoder(pipeline, row, CLIP, states=True)
                for row in self.facts.encoders_of(pipeline)
            ),
            graphs.denoiser(
                *("transformer", network, inputs, dynamic),
                multiples={"height": PATCH, "width": PATCH},
            ),
            *vae.export_vae(pipeline, self.default_size(pipeline)),
        ]


FAMILY = SD3()
