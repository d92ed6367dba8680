"""Krea 2: a transformer of 12.8 G parameters, which reads twelve layers of a Qwen3-VL beside the picture.

Raw is trained. Turbo, which is distilled from it, draws with its adapters too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunekit.diffusion.sampling import SamplingConfig
from tunekit.families import chat, graphs, sizes, tiny, vae
from tunekit.families import family as answers
from tunekit.families.family import (
    MASK,
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
from tunekit.families.transformer import PATCH, Transformer, from_zero, pack, positions, unpack
from tunekit.families.weights import Entry
from tunekit.resources import Source

SIDE = 1024
"""Of the pictures that it was made for, in pixels; no configuration has it."""
BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text,"
    " spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
BEHIND = "<|im_end|>\n<|im_start|>assistant\n"
"""What a prompt stands between; the latter behind the padding."""
DROPPED, KEPT_BEHIND = 34, 5
"""Tokens of both: those before a prompt are read by the text encoder alone."""
TURBO_MU = 1.15
"""Logarithm of Turbo's shift, at every size."""

ATTENTION = tuple(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_gate", "to_out.0"))
FEED_FORWARD = ("ff.gate", "ff.up", "ff.down")
_INSIDE = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
_NORMS = {
    "attn.qknorm.qnorm.scale": "attn.norm_q.weight",
    "attn.qknorm.knorm.scale": "attn.norm_k.weight",
    "prenorm.scale": "norm1.weight",
    "postnorm.scale": "norm2.weight",
}
_BLOCKS = {
    "blocks.{}": "transformer_blocks.{}",
    "txtfusion.layerwise_blocks.{}": "text_fusion.layerwise_blocks.{}",
    "txtfusion.refiner_blocks.{}": "text_fusion.refiner_blocks.{}",
}
# https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/utils.py, krea2_to_diffusers
PUBLISHED: dict[str, str | tuple[str, ...]] = {
    "first": "img_in",
    "last.linear": "final_layer.linear",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
    "txtmlp.0.scale": "txt_in.norm.weight",
    "last.norm.scale": "final_layer.norm.weight",
    "last.modulation.lin": "final_layer.scale_shift_table",
    "blocks.{}.mod.lin": "transformer_blocks.{}.scale_shift_table",
    **{
        f"{there}.{name}": f"{here}.{own}"
        for there, here in _BLOCKS.items()
        for name, own in {**_INSIDE, **_NORMS}.items()
    },
}
"""Layers of the transformer as it was published -> modules here."""


class Krea2(Transformer):
    """Krea 2; see `Family` for what each method promises.

    https://huggingface.co/docs/diffusers/api/pipelines/krea2
    """

    name: ClassVar[str] = "krea2"
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        title="Krea 2",
        base_title="Krea 2 Raw",
        pipeline_classes=("Krea2Pipeline",),
        components=(
            Component(
                "transformer",
                "denoiser",
                "diffusers:Krea2Transformer2DModel",
                {
                    "in_channels": 64,
                    "num_layers": 28,
                    "attention_head_dim": 128,
                    "num_attention_heads": 48,
                    "num_key_value_heads": 12,
                    "intermediate_size": 16384,
                    "text_hidden_dim": 2560,
                    "num_text_layers": 12,
                },
                kohya=("lora_unet",),
                dotted="diffusion_model",
                published="model.diffusion_model.",
                layers=partial(answers.published, PUBLISHED),
                marks=("first.weight", "blocks.0.attn.wq.weight", "txtfusion.projector.weight"),
                flat=r"blocks\.\d+\.mod\.lin",
                dtype=None,
                sensitive=("img_in", "time_embed", "time_mod_proj", "txt_in", "final_layer"),
                keeps=("timestep", "position_ids"),
            ),
            Component("vae", "vae", "diffusers:AutoencoderKLQwenImage", {"z_dim": 16}, fp16=False),
            sizes.qwen3_vl("text_encoder", tokens=512),
            Component(
                "scheduler",
                "scheduler",
                "diffusers:FlowMatchEulerDiscreteScheduler",
                {"use_dynamic_shifting": True, "max_image_seq_len": 6400},
            ),
        ),
        lora_targets=(*ATTENTION, *FEED_FORWARD),
        presets={"attention": ATTENTION, "attention_feed_forward": (*ATTENTION, *FEED_FORWARD)},
        ss_base_model_version="krea2",
        modelspec_architecture="Krea-2",
        adapter_marks=r"text_fusion|txtfusion|attn\.to_gate|attn\.wq",
        default_source="krea/Krea-2-Raw",
        licence="krea-2-community-license",
        stored="bf16",
        distilled="turbo",
        sampling=SamplingConfig(steps=28, guidance=4.5),
        sampling_distilled=SamplingConfig(steps=8, guidance=0.0),
        since="0.42",
    )

    def load(
        self,
        source: Source | str,
        dtypes: Dtypes = torch.float32,
        *,
        pack: Packing = "",
        only: Collection[str] | None = None,
    ) -> Pipeline:
        made = super().load(source, dtypes, pack=pack, only=only)
        if made.config.is_distilled:  # so that its sampler says by itself how it is drawn
            made.scheduler.register_to_config(base_shift=TURBO_MU, max_shift=TURBO_MU)
        return made

    def misfits(self, parts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Entry]]) -> list[str]:
        network, coder, encoder = (parts[name].config for name in ("transformer", "vae", "text_encoder"))
        found = answers.flow_misfits(parts["scheduler"])
        taken, given = network.in_channels, coder.z_dim * PATCH**2
        if taken != given:
            found.append(f"its transformer takes {taken} channels, and the VAE gives {given}")
        if not len(coder.latents_mean) == len(coder.latents_std) == coder.z_dim:
            found.append(
                f"its VAE has {coder.z_dim} channels, latents_mean or latents_std have other numbers"
            )
        wanted, width = network.text_hidden_dim, encoder.text_config.hidden_size
        if wanted != width:
            found.append(f"its transformer reads text of width {wanted}, and the text encoder gives {width}")
        return found

    def tiny(self, seed: int = 0) -> Pipeline:
        from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel

        # Neither 512 tokens nor 8 pixels per latent, and 6 channels, not 16.
        tokenizer = tiny.qwen_tokenizer(max_length=48, words=_words())
        network = tiny.randomized(
            lambda: Krea2Transformer2DModel(
                in_channels=6 * PATCH**2,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=640,
                timestep_embed_dim=16,
                text_hidden_dim=20,
                num_text_layers=3,
                text_num_attention_heads=2,
                text_num_key_value_heads=2,
                text_intermediate_size=24,
                num_layerwise_text_blocks=1,
                num_refiner_text_blocks=1,
                axes_dims_rope=(4, 2, 2),
            ),
            seed,
            "transformer",
        )
        coder = tiny.randomized(
            lambda: AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=6,
                dim_mult=[1, 1, 2],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[0.1 * channel for channel in range(6)],
                latents_std=[1 + 0.1 * channel for channel in range(6)],
            ),
            seed,
            "vae",
        )
        coder.register_to_config(sample_size=64)
        return Krea2Pipeline(
            vae=coder,
            text_encoder=tiny.qwen3_vl(tokenizer, width=20, layers=6, seed=seed),
            tokenizer=tokenizer,
            transformer=network,
            scheduler=self.facts.component("scheduler").build(),
            text_encoder_select_layers=read_layers(6, 3),
        )

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return bool(getattr(pipeline.config, "is_distilled", False))

    def default_size(self, pipeline: Pipeline) -> tuple[int, int]:
        side = getattr(pipeline.vae.config, "sample_size", None) or SIDE
        return side, side

    def resolution_multiple(self, pipeline: Pipeline) -> int:
        return vae.film_factor(pipeline) * PATCH

    def latent_shape(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
        channels, multiple = pipeline.vae.config.z_dim, self.resolution_multiple(pipeline)
        return vae.latent_shape(channels, vae.film_factor(pipeline), multiple, height, width)

    def tokenize(self, pipeline: Pipeline, prompts: list[str]) -> Tokens:
        """[template, prompt, padding, end of the template]."""
        tokenizer = pipeline.tokenizer
        length = tokenizer.model_max_length + DROPPED - KEPT_BEHIND
        first = answers.read(tokenizer, [BEFORE + prompt for prompt in prompts], length)
        last = tokenizer([BEHIND] * len(prompts), return_tensors="pt")
        return {
            "text_encoder": torch.cat([first.input_ids, last.input_ids], dim=1),
            "text_encoder" + MASK: torch.cat([first.attention_mask, last.attention_mask], dim=1).bool(),
        }

    @torch.no_grad()
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        """Some layers' states of each token side by side: [B, tokens, layers, width]."""
        encoder, ids = pipeline.text_encoder, tokens["text_encoder"]
        mask = tokens.get("text_encoder" + MASK)
        if mask is None:  # planned are the tokens that are kept, behind those of the template
            ids = F.pad(ids, (DROPPED, 0))
            mask = torch.ones_like(ids, dtype=torch.bool)
        ids, mask = ids.to(encoder.device), mask.to(encoder.device)
        layers = _read_layers(encoder.config, pipeline.transformer.config)
        states = _states(encoder, ids, mask)
        return {
            "encoder_hidden_states": torch.stack([states[layer] for layer in layers], dim=2)[:, DROPPED:],
            "encoder_attention_mask": mask[:, DROPPED:],
        }

    def encode_image(self, pipeline: Pipeline, pixels: Tensor) -> Tensor:
        return vae.encode_frame(pipeline, pixels)

    def decode(self, pipeline: Pipeline, latents: Tensor) -> Tensor:
        return vae.decode_frame(pipeline, latents)

    def cfg_scale(self, pipeline: Pipeline, guidance: float) -> float | None:
        return from_zero(guidance)

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        *_, height, width = noisy.shape
        places = positions(height, width, noisy.device)
        text = conditioning["encoder_hidden_states"].shape[1]
        made = denoiser(
            hidden_states=pack(noisy),
            timestep=timestep / 1000,
            position_ids=F.pad(places, (0, 0, text, 0)),  # a text has no place
            **conditioning,
            return_dict=False,
        )[0]
        return unpack(made, height, width)

    def adapter_names(self, component: str, paths: Collection[str]) -> list[Published]:
        """The transformer as it was published."""
        return answers.published(PUBLISHED, paths)

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        network, encoder, coder = pipeline.transformer, pipeline.text_encoder, pipeline.vae
        config, length = network.config, pipeline.tokenizer.model_max_length
        height, width = self.default_size(pipeline)
        channels, rows, columns = self.latent_shape(pipeline, height, width)
        mask = torch.ones(2, length + DROPPED, dtype=torch.int64)
        mask[1, DROPPED + 7 : -KEPT_BEHIND] = 0
        layers, places = _read_layers(encoder.config, config), positions(rows, columns)
        inputs = {
            "hidden_states": graphs.example(2, len(places), config.in_channels, like=network),
            "timestep": torch.tensor([0.5]),
            "position_ids": F.pad(places, (0, 0, length, 0)),
            "encoder_hidden_states": graphs.example(
                2, length, config.num_text_layers, config.text_hidden_dim, like=network
            ),
            "encoder_attention_mask": mask[:, DROPPED:],
        }
        dynamic = {
            "hidden_states": graphs.TOKEN_AXES,
            "position_ids": {0: "sequence+tokens"},
            "encoder_hidden_states": graphs.TEXT_AXES,
            "encoder_attention_mask": graphs.TEXT_AXES,
        }
        film = {0: "batch", 3: "height", 4: "width"}
        multiple = vae.film_factor(pipeline)
        return [
            chat.export(encoder, layers, mask, module=_Encoder(encoder, layers)),
            graphs.denoiser("transformer", network, inputs, dynamic, flags=["encoder_attention_mask"]),
            ExportComponent(
                name="vae_encoder",
                component="vae",
                module=_VaeEncoder(coder),
                inputs={"sample": graphs.example(2, 3, 1, height, width, like=coder)},
                dynamic={"sample": film},
                outputs=["latent_parameters"],
                config=graphs.model_config(coder),
                multiples={"height": multiple, "width": multiple},
            ),
            ExportComponent(
                name="vae_decoder",
                component="vae",
                module=_VaeDecoder(coder),
                inputs={"latent_sample": graphs.example(2, channels, 1, rows, columns, like=coder)},
                dynamic={"latent_sample": film},
                outputs=["sample"],
                config=graphs.model_config(coder),
            ),
        ]


def read_layers(depth: int, count: int) -> tuple[int, ...]:
    """Numbers of the states that are read of a text encoder: the last of each of `count` parts."""
    step = depth // count
    return tuple(range(step - 1, step * count, step))


def _read_layers(encoder: Any, transformer: Any) -> tuple[int, ...]:
    """Those of a text encoder's configuration, which a graph has as its config.json, for a transformer's."""
    text = encoder.text_config
    depth = text["num_hidden_layers"] if isinstance(text, dict) else text.num_hidden_layers
    return read_layers(int(depth), transformer.num_text_layers)


def _states(encoder: Any, ids: Tensor, mask: Tensor) -> Any:
    """Hidden states by number; padding, which stands within a text, has no place of its own."""
    if not hasattr(encoder, "language_model"):  # a graph, which counts places itself
        return encoder(ids, attention_mask=mask.long()).hidden_states
    places = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    return encoder(
        input_ids=ids,
        attention_mask=chat.attending(mask) if ids.is_meta or torch.compiler.is_exporting() else mask,
        position_ids=places.expand(3, -1, -1),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states


# Graphs -----------------------------------------------------------------------------------------------------


class _Encoder(nn.Module):
    def __init__(self, encoder: nn.Module, layers: Collection[int]) -> None:
        super().__init__()
        self.encoder, self.layers = encoder, tuple(layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        states = _states(self.encoder, input_ids, attention_mask.bool())
        return tuple(states[layer] for layer in self.layers)


class _VaeEncoder(nn.Module):
    """Of a film of one frame, which nothing is kept of for a second."""

    def __init__(self, coder: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = coder.encoder, coder.quant_conv

    def forward(self, sample: Tensor) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(sample))
        return moments


class _VaeDecoder(nn.Module):
    def __init__(self, coder: Any) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = coder.decoder, coder.post_quant_conv

    def forward(self, latent_sample: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.post_quant_conv(latent_sample)).clamp(-1, 1)
        return pixels


def _words() -> list[str]:
    """What the tiny tokenizer takes as one token each, so that the template has as many as the real one's."""
    inside = BEFORE.partition("\n")[2].partition("<")[0].replace(",", " ,").replace(":", " :").split()
    first, *others = inside
    words = {
        "system",
        "user",
        "assistant",
        first,
        *others,
        *(f" {word}" for word in others if word.isalpha()),
    }
    return sorted(words - {",", ":"})


FAMILY = Krea2()
