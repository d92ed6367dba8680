"""FLUX.2 klein: Qwen3 reads the text, a transformer of 3.9 or 9.1 G parameters, latents of 128 channels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunekit.config import ObjectiveConfig
from tunekit.diffusion.objectives import FlowMatching, Objective, ShiftByTokens
from tunekit.diffusion.sampling import SamplingConfig
from tunekit.families import chat, graphs, sizes, tiny, vae
from tunekit.families import family as answers
from tunekit.families.family import (
    MASK,
    Component,
    Conditioning,
    ExportComponent,
    FamilyFacts,
    Pipeline,
    Published,
    Tokens,
)
from tunekit.families.transformer import JOINT_ATTENTION, PATCH, Transformer
from tunekit.families.weights import Entry

STEPS = 50
"""Steps that the base is drawn in, for whose shift it is trained."""
NINE: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
    },
    "text_encoder": sizes.QWEN3["8B"],
}
"""What klein 9B has instead. https://huggingface.co/black-forest-labs/FLUX.2-klein-base-9B"""
ATTENTION = (
    *JOINT_ATTENTION,
    *("attn.to_qkv_mlp_proj", "attn.to_out"),  # of single blocks, with the feed-forward in the same layers
)
FEED_FORWARD = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")

DOUBLE, SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."
PUBLISHED: dict[str, str | tuple[str, ...]] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "double_blocks.{}.img_attn.qkv": tuple(f"{DOUBLE}attn.{n}" for n in ("to_q", "to_k", "to_v")),
    "double_blocks.{}.img_attn.norm.query_norm.scale": f"{DOUBLE}attn.norm_q.weight",
    "double_blocks.{}.img_attn.norm.key_norm.scale": f"{DOUBLE}attn.norm_k.weight",
    "double_blocks.{}.img_attn.proj": f"{DOUBLE}attn.to_out.0",
    "double_blocks.{}.img_mlp.0": f"{DOUBLE}ff.linear_in",
    "double_blocks.{}.img_mlp.2": f"{DOUBLE}ff.linear_out",
    "double_blocks.{}.txt_attn.qkv": tuple(
        f"{DOUBLE}attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj")
    ),
    "double_blocks.{}.txt_attn.norm.query_norm.scale": f"{DOUBLE}attn.norm_added_q.weight",
    "double_blocks.{}.txt_attn.norm.key_norm.scale": f"{DOUBLE}attn.norm_added_k.weight",
    "double_blocks.{}.txt_attn.proj": f"{DOUBLE}attn.to_add_out",
    "double_blocks.{}.txt_mlp.0": f"{DOUBLE}ff_context.linear_in",
    "double_blocks.{}.txt_mlp.2": f"{DOUBLE}ff_context.linear_out",
    "single_blocks.{}.linear1": f"{SINGLE}attn.to_qkv_mlp_proj",
    "single_blocks.{}.linear2": f"{SINGLE}attn.to_out",
    "single_blocks.{}.norm.query_norm.scale": f"{SINGLE}attn.norm_q.weight",
    "single_blocks.{}.norm.key_norm.scale": f"{SINGLE}attn.norm_k.weight",
}
"""Layers in https://github.com/black-forest-labs/flux2 -> what they are here; see `answers.published`."""
SWAPPED = ("final_layer.adaLN_modulation.1",)
"""Of those, the ones that give (shift, scale), which is (scale, shift) here."""


class Flux2(Transformer):
    """FLUX.2 klein; see `Family` for what each method promises.

    2 x 2 latents of the autoencoder are one latent here, with four times the channels. The text is what Qwen3
    has after a quarter, half and three quarters of its layers, side by side.
    """

    name: ClassVar[str] = "flux2"
    # Sizes: https://huggingface.co/black-forest-labs/FLUX.2-klein-base-4B, the config.json of each folder
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        title="FLUX.2 klein",
        base_title="FLUX.2 klein base 4B",
        pipeline_classes=("Flux2KleinPipeline",),
        components=(
            Component(
                "transformer",
                "denoiser",
                "diffusers:Flux2Transformer2DModel",
                {
                    "patch_size": 1,
                    "in_channels": 128,
                    "num_layers": 5,
                    "num_single_layers": 20,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 7680,
                    "guidance_embeds": False,
                },
                kohya=("lora_unet",),
                dotted="diffusion_model",
                published="model.diffusion_model.",
                layers=partial(answers.published, PUBLISHED, swapped=SWAPPED),
                marks=("double_blocks.0.img_attn.qkv.weight", "single_stream_modulation.lin.weight"),
                dtype=None,
                sensitive=(
                    *("x_embedder", "context_embedder", "time_guidance_embed", "norm_out", "proj_out"),
                    *("double_stream_modulation_img", "double_stream_modulation_txt"),
                    "single_stream_modulation",
                ),
                keeps=("timestep", "img_ids", "txt_ids"),
            ),
            Component(
                "vae",
                "vae",
                "diffusers:AutoencoderKLFlux2",
                {"latent_channels": 32, "sample_size": 1024, "batch_norm_eps": 0.0001},
                fp16=False,
            ),
            sizes.qwen3("text_encoder", "4B", thinking=False, causal=True),
            sizes.scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True),
        ),
        lora_targets=ATTENTION,
        presets={"attention": ATTENTION, "attention_feed_forward": (*ATTENTION, *FEED_FORWARD)},
        ss_base_model_version="flux_2_klein",
        modelspec_architecture="Flux.2-klein",
        distilled=r"klein-(\d+B)",
        distilled_from=r"klein-base-\1",
        adapter_marks="to_qkv_mlp_proj|stream_modulation",
        default_source="black-forest-labs/FLUX.2-klein-base-4B",
        bases={
            "black-forest-labs/FLUX.2-klein-4B": {},
            "black-forest-labs/FLUX.2-klein-base-9B": NINE,
            "black-forest-labs/FLUX.2-klein-9B": NINE,
        },
        licence="apache-2.0",
        stored="bf16",
        since="0.40",  # with transformers 5: before it Qwen3 does not run without data
        sampling=SamplingConfig(steps=STEPS, guidance=4.0),
        sampling_distilled=SamplingConfig(steps=4, guidance=1.0),
    )

    lists = ("transformer_blocks", "single_transformer_blocks")
    counted: ClassVar[Mapping[str, str]] = {
        "transformer_blocks": "num_layers",
        "single_transformer_blocks": "num_single_layers",
    }

    def misfits(self, parts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Entry]]) -> list[str]:
        found = []
        transformer, autoencoder, encoder = (
            parts[name].config for name in ("transformer", "vae", "text_encoder")
        )
        if transformer.guidance_embeds:
            found.append("its transformer is told the guidance: it is FLUX.2 dev, and klein is needed")
        taken, given = transformer.joint_attention_dim, 3 * encoder.hidden_size
        if taken != given:
            found.append(
                f"its transformer reads text of width {taken}, and three layers of its text encoder give"
                f" {given}: klein 4B has 7680, with Qwen3 4B, and klein 9B has 12288, with Qwen3 8B"
            )
        channels = PATCH**2 * autoencoder.latent_channels
        if tuple(autoencoder.patch_size) != (PATCH, PATCH):
            found.append(f"its VAE has patch_size {autoencoder.patch_size}, and {PATCH} x {PATCH} is needed")
        elif transformer.in_channels != channels:
            found.append(
                f"its transformer takes {transformer.in_channels} channels, and its VAE gives {channels}"
            )
        return found + answers.flow_misfits(parts["scheduler"])

    def tiny(self, seed: int = 0) -> Pipeline:
        from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

        tokenizer = tiny.qwen_tokenizer(max_length=56)
        encoder = tiny.qwen3(tokenizer, width=24, layers=4, seed=seed, causal=True)
        network = tiny.randomized(
            lambda: Flux2Transformer2DModel(
                in_channels=12,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=3 * 24,
                timestep_guidance_channels=16,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            ),
            seed,
            "transformer",
        )
        autoencoder = tiny.randomized(
            lambda: AutoencoderKLFlux2(
                sample_size=64,
                block_out_channels=(8, 16, 16),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                layers_per_block=1,
                norm_num_groups=4,
                latent_channels=3,
                batch_norm_eps=0.01,
            ),
            seed,
            "vae",
        )
        draw = torch.Generator().manual_seed(seed)
        for statistic, spread in ((autoencoder.bn.running_mean, 0.5), (autoencoder.bn.running_var, 0.2)):
            statistic.add_(spread * torch.randn(statistic.shape, generator=draw).tanh())
        return Flux2KleinPipeline(
            vae=autoencoder,
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=network,
            scheduler=self.facts.component("scheduler").build(),
        )

    def objective(self, pipeline: Pipeline, config: ObjectiveConfig | None = None) -> Objective:
        """Trained for the shift that pictures of a size are drawn with in the usual number of steps."""
        found = FlowMatching.from_scheduler(pipeline.scheduler, config, patch=1)
        usual = ShiftByTokens(1, mus=(usual_mu(256, STEPS), usual_mu(4096, STEPS)))
        return replace(found, by_tokens=usual)

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return bool(getattr(getattr(pipeline, "config", None), "is_distilled", False))

    def latent_shape(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
        factor = self.resolution_multiple(pipeline)
        return vae.latent_shape(pipeline.transformer.config.in_channels, factor, factor, height, width)

    def tokenize(self, pipeline: Pipeline, prompts: list[str]) -> Tokens:
        return chat.tokenize(self.facts, pipeline, prompts)

    @torch.no_grad()
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        """States of three layers side by side; the denoiser reads what is padding too, as it was trained."""
        encoder = pipeline.text_encoder
        ids, mask = tokens["text_encoder"].to(encoder.device), tokens.get("text_encoder" + MASK)
        known = chat.states(encoder, ids, mask)
        layers = [known[layer] for layer in text_layers(encoder.config)]
        return {"encoder_hidden_states": torch.cat(layers, dim=-1)}

    def encode_image(self, pipeline: Pipeline, pixels: Tensor) -> Tensor:
        """Channels are shifted and scaled when they are made of patches, each by figures of its own."""
        mean, std = (patched(moment) for moment in vae.posterior(pipeline.vae, pixels))
        shift, scale = statistics(pipeline.vae)
        return torch.cat([(mean - shift) / scale, std / scale], dim=1)

    def decode(self, pipeline: Pipeline, latents: Tensor) -> Tensor:
        shift, scale = (figure.to(latents.device) for figure in statistics(pipeline.vae))
        return vae.decoded(pipeline.vae, unpatched(latents * scale + shift))

    def cfg_scale(self, pipeline: Pipeline, guidance: float) -> float | None:
        """A distilled base is drawn without a negative prompt, whatever the guidance."""
        return guidance if guidance > 1 and not self.is_distilled(pipeline) else None

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        *_, height, width = noisy.shape
        text = conditioning["encoder_hidden_states"]
        made: Tensor = denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=timestep / 1000,
            img_ids=positions(height, width, noisy.device),
            txt_ids=ordinals(text.shape[1], noisy.device),
            return_dict=False,
        )[0]
        return made.transpose(1, 2).reshape(noisy.shape)

    def begin(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        tokens = latents.shape[2] * latents.shape[3]
        return answers.begin_flow(scheduler, steps, latents, mu=usual_mu(tokens, steps))

    def picture_state(self, output: Any) -> Tensor | None:
        """Of double blocks; single ones run text and picture as one sequence, and give both."""
        return answers.last_state(output)

    def adapter_names(self, component: str, paths: Collection[str]) -> list[Published]:
        return answers.published(PUBLISHED, paths, swapped=SWAPPED)

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        network, encoder = pipeline.transformer, pipeline.text_encoder
        channels, height, width = self.latent_shape(pipeline, *self.default_size(pipeline))
        length = pipeline.tokenizer.model_max_length
        inputs = {
            "hidden_states": graphs.example(2, height * width, channels, like=network),
            "encoder_hidden_states": graphs.example(
                2, length, network.config.joint_attention_dim, like=network
            ),
            "timestep": torch.tensor([0.01]),
            "img_ids": positions(height, width),
            "txt_ids": ordinals(length),
        }
        dynamic = {
            "hidden_states": graphs.TOKEN_AXES,
            "encoder_hidden_states": graphs.TEXT_AXES,
            "img_ids": {0: "tokens"},
            "txt_ids": {0: "sequence"},
        }
        shift, scale = statistics(pipeline.vae)
        figures = {"latents_mean": shift.flatten().tolist(), "latents_std": scale.flatten().tolist()}
        autoencoder = vae.export_vae(pipeline, self.default_size(pipeline))
        mask = torch.ones(2, length, dtype=torch.int32)
        return [
            chat.export(encoder, text_layers(encoder.config), mask),
            graphs.denoiser("transformer", network, inputs, dynamic),
            *(replace(graph, config={**graph.config, **figures}) for graph in autoencoder),
        ]


# Latents ----------------------------------------------------------------------------------------------------


def patched(latents: Tensor) -> Tensor:
    """[B, C, H, W] to [B, 4 C, H/2, W/2]: each 2 x 2 places become channels of one."""
    return nn.functional.pixel_unshuffle(latents, PATCH)


def unpatched(latents: Tensor) -> Tensor:
    """The reverse of `patched`."""
    return nn.functional.pixel_shuffle(latents, PATCH)


def statistics(autoencoder: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of patched latents, [C, 1, 1], float32.

    They are what a batch norm of the autoencoder has seen; a graph of it says them in its configuration.
    """
    config, seen = autoencoder.config, getattr(autoencoder, "bn", None)
    if seen is None:
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    else:
        mean = seen.running_mean.float()
        std = (seen.running_var.float() + config.batch_norm_eps).sqrt()
    return mean[:, None, None], std[:, None, None]


# Positions and times ----------------------------------------------------------------------------------------


def positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """[height * width, 4] int64: 0, row, column and 0 of each latent."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    nothing = torch.zeros_like(rows)
    return torch.stack([nothing, rows, columns, nothing], dim=-1).flatten(0, 1)


def ordinals(count: int, device: torch.device | None = None) -> Tensor:
    """[count, 4] int64: 0, 0, 0 and the number of each token of a text."""
    return nn.functional.pad(torch.arange(count, device=device)[:, None], (3, 0))


def usual_mu(tokens: int, steps: int) -> float:
    """Logarithm of the shift that a picture of so many latents is drawn with, in so many steps.

    Measured by who made it, for 10 and for 200 steps, and a straight line between; pictures over 4300 latents
    are drawn as in 200 steps. https://github.com/black-forest-labs/flux2, `sampling.py`
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return many + (few - many) * (200 - steps) / 190


def text_layers(config: Any) -> tuple[int, int, int]:
    """After which layers of Qwen3 its states are read: 9, 18 and 27 of 36."""
    count = int(config.num_hidden_layers)
    return count // 4, count // 2, 3 * count // 4


FAMILY = Flux2()
