"""Z-Image: a Qwen3 text encoder, a transformer of 6.2 G parameters that takes text and picture as one row.

The base is trained. Z-Image-Turbo, which is distilled from it, draws with the base's adapters too.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunekit.config import ObjectiveConfig
from tunekit.diffusion.objectives import FlowMatching, Objective
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
from tunekit.families.transformer import PATCH, Transformer, from_zero, shift
from tunekit.families.weights import Entry

MULTIPLE = 32
"""Tokens of a text, and those of a picture, are filled up to a multiple of this with one that is learned."""
TRAINING_SHIFT = 2.0
"""Of times while training; the base's scheduler has 6 for sampling.
https://github.com/kohya-ss/musubi-tuner/blob/main/docs/zimage.md"""
TURBO_SHIFT = 3.0
"""Of the scheduler of Z-Image-Turbo, which is the one thing in its configurations that is not the base's."""

ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

# https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/utils.py, z_image_to_diffusers
_BLOCKS = ("noise_refiner.{}", "context_refiner.{}", "layers.{}")
PUBLISHED: dict[str, str | tuple[str, ...]] = {
    **{
        f"{block}.attention.qkv": tuple(f"{block}.attention.to_{part}" for part in "qkv") for block in _BLOCKS
    },
    **{f"{at}.attention.out": f"{at}.attention.to_out.0" for at in _BLOCKS},
    **{f"{at}.attention.{of}_norm": f"{at}.attention.norm_{of}" for at in _BLOCKS for of in "qk"},
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
"""Layers of the single file that ComfyUI opens -> modules here; of several the rows are stacked there."""


class ZImage(Transformer):
    """Z-Image; see `Family` for what each method promises.

    https://github.com/Tongyi-MAI/Z-Image
    """

    name: ClassVar[str] = "zimage"
    # Sizes: https://huggingface.co/Tongyi-MAI/Z-Image, the config.json of each folder
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        title="Z-Image",
        pipeline_classes=("ZImagePipeline",),
        components=(
            Component(
                "transformer",
                "denoiser",
                "diffusers:ZImageTransformer2DModel",
                {
                    "all_patch_size": (2,),
                    "all_f_patch_size": (1,),
                    "in_channels": 16,
                    "dim": 3840,
                    "n_layers": 30,
                    "n_refiner_layers": 2,
                    "n_heads": 30,
                    "n_kv_heads": 30,
                    "cap_feat_dim": 2560,
                    "axes_dims": (32, 48, 48),
                    "axes_lens": (1536, 512, 512),
                },
                kohya=("lora_unet",),
                dotted="diffusion_model",
                published="model.diffusion_model.",
                layers=partial(answers.published, PUBLISHED),
                marks=("x_pad_token", "cap_embedder.1.weight", "layers.0.attention.qkv.weight"),
                unread=r"norm_final\.weight",
                dtype=None,
                sensitive=("all_x_embedder", "cap_embedder", "t_embedder", "all_final_layer"),
                keeps=("timestep", "t"),
            ),
            sizes.FLUX_VAE,
            sizes.qwen3("text_encoder", "4B", thinking=True),
            sizes.scheduler("FlowMatchEulerDiscreteScheduler", shift=6.0),
        ),
        lora_targets=ATTENTION,
        presets={
            "attention": ATTENTION,
            "attention_feed_forward": (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
        },
        ss_base_model_version="z_image",
        modelspec_architecture="Z-Image",
        adapter_marks=r"context_refiner|noise_refiner|cap_embedder|adaLN_modulation\.0",
        default_source="Tongyi-MAI/Z-Image",
        licence="apache-2.0",
        stored="bf16",
        since="0.40",  # with transformers 5: before it Qwen3 does not run without data
        distilled="turbo",
        sampling=SamplingConfig(steps=30, guidance=4.0),
        sampling_distilled=SamplingConfig(steps=9, guidance=0.0),
    )

    lists = ("noise_refiner", "layers")  # those that see the picture; a text is refined by its own
    counted: ClassVar[Mapping[str, str]] = {"layers": "n_layers"}  # text and picture have as many refiners

    def misfits(self, parts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Entry]]) -> list[str]:
        network, coder, encoder = (parts[name].config for name in ("transformer", "vae", "text_encoder"))
        found = [*vae.misfits(coder), *answers.flow_misfits(parts["scheduler"])]
        if network.in_channels != coder.latent_channels:
            found.append(
                f"its transformer takes {network.in_channels} channels, and the VAE gives"
                f" {coder.latent_channels}"
            )
        if network.cap_feat_dim != encoder.hidden_size:
            found.append(
                f"its transformer reads text of width {network.cap_feat_dim}, and the text encoder gives"
                f" {encoder.hidden_size}"
            )
        if (tuple(network.all_patch_size), tuple(network.all_f_patch_size)) != ((PATCH,), (1,)):
            found.append(
                f"its transformer takes patches of {network.all_patch_size} latents:"
                f" {PATCH} x {PATCH} are known"
            )
        if network.siglip_feat_dim is not None:
            found.append("its transformer reads pictures too (siglip_feat_dim): it is Z-Image-Omni")
        return found

    def tiny(self, seed: int = 0) -> Pipeline:
        from diffusers import ZImagePipeline, ZImageTransformer2DModel

        # Neither 512 tokens nor 8 pixels per latent, and 6 channels, not 16.
        tokenizer = tiny.qwen_tokenizer(max_length=56)
        network = tiny.randomized(
            lambda: ZImageTransformer2DModel(
                in_channels=6,
                dim=24,
                n_layers=2,
                n_refiner_layers=2,
                n_heads=3,
                n_kv_heads=3,
                cap_feat_dim=20,
                axes_dims=[4, 2, 2],
                axes_lens=[128, 64, 64],
            ),
            seed,
            "transformer",
        )
        autoencoder = tiny.autoencoder(
            6, seed, block_out_channels=(16, 16, 24), norm_num_groups=8, scaling_factor=0.5
        )
        return ZImagePipeline(
            vae=autoencoder,
            text_encoder=tiny.qwen3(tokenizer, width=20, layers=3, seed=seed),
            tokenizer=tokenizer,
            transformer=network,
            scheduler=self.facts.component("scheduler").build(),
        )

    def objective(self, pipeline: Pipeline, config: ObjectiveConfig | None = None) -> Objective:
        return FlowMatching.from_scheduler(pipeline.scheduler, config, patch=PATCH, shift=TRAINING_SHIFT)

    def is_distilled(self, pipeline: Pipeline) -> bool:
        known = getattr(pipeline.scheduler.config, "shift", None)
        return known is not None and known <= TURBO_SHIFT

    def tokenize(self, pipeline: Pipeline, prompts: list[str]) -> Tokens:
        return chat.tokenize(self.facts, pipeline, prompts)

    @torch.no_grad()
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        """The states before the last layer, and which of them are there."""
        encoder, ids = pipeline.text_encoder, tokens["text_encoder"]
        mask = tokens.get("text_encoder" + MASK, torch.ones_like(ids, dtype=torch.bool)).to(encoder.device)
        states = chat.states(encoder, ids.to(encoder.device), mask)
        return {"encoder_hidden_states": states[encoder.config.num_hidden_layers - 1], "attention_mask": mask}

    def cfg_scale(self, pipeline: Pipeline, guidance: float) -> float | None:
        return from_zero(guidance)

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The network counts time from noise to picture, and predicts that way: the negative velocity."""
        time = ((1000 - timestep) / 1000).expand(len(noisy))
        if not isinstance(denoiser, nn.Module):  # a graph takes a batch as it is
            made = denoiser(hidden_states=noisy, timestep=time, **conditioning, return_dict=False)[0]
            return -made
        states, mask = conditioning["encoder_hidden_states"], conditioning["attention_mask"]
        # The network takes a list of texts without what fills them up. Planned is the longest.
        lengths = [mask.shape[1]] * len(mask) if mask.is_meta else mask.sum(1).tolist()
        rows = denoiser(
            x=list(noisy.unsqueeze(2)),
            t=time,
            cap_feats=[row[:length] for row, length in zip(states, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(rows).squeeze(2)

    def begin(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        """The network multiplies time by 1000, so the last bit counts: float32, as diffusers has it."""
        sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
        return answers.begin_flow(scheduler, steps, latents, shift(scheduler, latents), sigmas=sigmas)

    def adapter_names(self, component: str, paths: Collection[str]) -> list[Published]:
        """The names of diffusers, which ComfyUI reads too; those of its own file occur, and are read."""
        return answers.underscored(paths) + answers.published(PUBLISHED, paths)

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        network, encoder = pipeline.transformer, pipeline.text_encoder
        channels, height, width = self.latent_shape(pipeline, *self.default_size(pipeline))
        length = pipeline.tokenizer.model_max_length
        mask = (torch.arange(length) < torch.tensor([[length], [length // 2]])).long()
        inputs = {
            "hidden_states": graphs.example(2, channels, height, width, like=network),
            "timestep": torch.tensor([0.25]),
            "encoder_hidden_states": graphs.example(2, length, network.config.cap_feat_dim, like=network),
            "attention_mask": mask,
        }
        dynamic = {
            "hidden_states": graphs.PICTURE_AXES,
            "encoder_hidden_states": graphs.TEXT_AXES,
            "attention_mask": graphs.TEXT_AXES,
        }
        return [
            chat.export(encoder, [encoder.config.num_hidden_layers - 1], mask),
            graphs.denoiser(
                "transformer",
                network,
                inputs,
                dynamic,
                module=_Transformer(network),
                multiples={"height": PATCH, "width": PATCH},
            ),
            *vae.export_vae(pipeline, self.default_size(pipeline)),
        ]


# The graph --------------------------------------------------------------------------------------------------


class _Transformer(nn.Module):
    """The network on whole batches and in real numbers.

    The network itself takes a list of texts, and turns queries and keys by complex numbers, which graphs do
    not have. Here every row has `MULTIPLE` - 1 tokens more, and masks over those that it does not need.
    """

    turns: list[Tensor]

    def __init__(self, network: Any) -> None:
        super().__init__()
        known = network.rope_embedder
        tables = known.precompute_freqs_cis(known.axes_dims, known.axes_lens, known.theta)
        self.turns = [torch.view_as_real(table) for table in tables]
        shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        self.transformer: Any = copy.deepcopy(network, shared)  # modules of its own, with the same weights
        for module in self.transformer.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(_Attention())

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> Tensor:
        network, (batch, channels, height, width) = self.transformer, hidden_states.shape
        rows, columns = height // PATCH, width // PATCH
        count = rows * columns
        time = network.t_embedder(timestep * network.t_scale).to(hidden_states.dtype)

        lengths = attention_mask.long().sum(1, keepdim=True)
        filled = (lengths + MULTIPLE - 1) // MULTIPLE * MULTIPLE
        text = network.cap_embedder(_longer(encoder_hidden_states))
        place = torch.arange(text.shape[1], device=text.device)[None]
        text = torch.where((place < lengths)[..., None], text, network.cap_pad_token)
        there = place < filled
        turned = self._turned(place + 1, 0 * place, 0 * place)

        cut = hidden_states.reshape(batch, channels, rows, PATCH, columns, PATCH)
        cut = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, count, PATCH**2 * channels)
        name = f"{PATCH}-1"
        picture = network.all_x_embedder[name](_longer(cut))
        place = torch.arange(picture.shape[1], device=picture.device)[None]
        drawn = place < count
        picture = torch.where(drawn[..., None], picture, network.x_pad_token)
        seen = (place < (count + MULTIPLE - 1) // MULTIPLE * MULTIPLE).expand(batch, -1)
        down = torch.arange(rows, device=place.device)[:, None].expand(rows, columns)
        across = torch.arange(columns, device=place.device).expand(rows, columns)
        where = [F.pad(axis.reshape(1, count), (0, MULTIPLE - 1)) for axis in (down, across)]
        at = self._turned((filled + 1) * drawn, *where)

        for layer in network.noise_refiner:
            picture = layer(picture, seen, at, time)
        for layer in network.context_refiner:
            text = layer(text, there, turned)
        both = torch.cat([picture, text], dim=1)
        mask = torch.cat([seen, there], dim=1)
        turns = torch.cat([at, turned.expand(batch, -1, -1, -1)], dim=1)
        for layer in network.layers:
            both = layer(both, mask, turns, time)
        made = network.all_final_layer[name](both, c=time)[:, :count]
        made = made.reshape(batch, rows, columns, PATCH, PATCH, channels)
        latents: Tensor = made.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)
        return latents

    def _turned(self, *places: Tensor) -> Tensor:
        """[B, tokens, half of a head's width, 2]: cosine and sine of each token's angles, axis by axis."""
        axes = [table.to(place.device)[place] for table, place in zip(self.turns, places, strict=True)]
        batch = max(len(axis) for axis in axes)
        return torch.cat([axis.expand(batch, -1, -1, -1) for axis in axes], dim=2)


class _Attention:
    """The attention of Z-Image's blocks, with rotations as pairs of cosine and sine."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is not None
        assert freqs_cis is not None
        layers, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None)
        heads = [layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in layers]
        query, key, value = (
            head if norm is None else norm(head) for head, norm in zip(heads, norms, strict=True)
        )
        query, key, value = (
            x.transpose(1, 2) for x in (_turn(query, freqs_cis), _turn(key, freqs_cis), value)
        )
        made = F.scaled_dot_product_attention(query, key, value, attention_mask[:, None, None, :])
        out: Tensor = attn.to_out[0](made.transpose(1, 2).flatten(2))
        return out


def _turn(heads: Tensor, turns: Tensor) -> Tensor:
    """Turns each pair of channels of [B, tokens, heads, width] by its angle, in float32."""
    one, other = heads.float().reshape(*heads.shape[:-1], -1, 2).unbind(-1)
    cosine, sine = turns[:, :, None].unbind(-1)
    pairs = torch.stack([one * cosine - other * sine, one * sine + other * cosine], dim=-1)
    return pairs.flatten(-2).to(heads.dtype)


def _longer(rows: Tensor) -> Tensor:
    """[B, n, d] with the most tokens that filling up may need."""
    return F.pad(rows, (0, 0, 0, MULTIPLE - 1))


FAMILY = ZImage()
