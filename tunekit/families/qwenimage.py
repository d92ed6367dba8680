"""Qwen-Image: a transformer of 20.4 G parameters beside a Qwen2.5-VL of 7 B. Planned only."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunekit.config import ObjectiveConfig
from tunekit.diffusion.objectives import FlowMatching, Objective
from tunekit.diffusion.sampling import SamplingConfig
from tunekit.families import chat, vae
from tunekit.families import family as answers
from tunekit.families.family import MASK, Component, Conditioning, FamilyFacts, Pipeline, Tokens
from tunekit.families.transformer import JOINT_ATTENTION, PATCH, pack, unpack

DROPPED = 34
"""Tokens of the template before a prompt, which are read by the text encoder alone."""
FEED_FORWARD = tuple(f"{stream}_mlp.net.{part}" for stream in ("img", "txt") for part in ("0.proj", "2"))


class QwenImage:
    """Qwen-Image; see `Planned` for what each method promises.

    https://huggingface.co/docs/diffusers/api/pipelines/qwenimage
    """

    name: ClassVar[str] = "qwenimage"
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        title="Qwen-Image",
        pipeline_classes=("QwenImagePipeline",),
        components=(
            Component(
                "transformer",
                "denoiser",
                "diffusers:QwenImageTransformer2DModel",
                {
                    "patch_size": PATCH,
                    "in_channels": 64,
                    "out_channels": 16,
                    "num_layers": 60,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 3584,
                },
                dtype=None,
                sensitive=("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out"),
                keeps=("timestep",),
            ),
            Component("vae", "vae", "diffusers:AutoencoderKLQwenImage", {"z_dim": 16}, fp16=False),
            # Sizes: https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct, config.json
            Component(
                "text_encoder",
                "text_encoder",
                "transformers:Qwen2_5_VLForConditionalGeneration",
                {
                    "text_config": {
                        "hidden_size": 3584,
                        "intermediate_size": 18944,
                        "num_hidden_layers": 28,
                        "num_attention_heads": 28,
                        "num_key_value_heads": 4,
                        "vocab_size": 152064,
                        "max_position_embeddings": 128000,
                        "rope_theta": 1000000.0,
                        "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]},
                    },
                    "vision_config": {
                        "depth": 32,
                        "hidden_size": 1280,
                        "intermediate_size": 3420,
                        "num_heads": 16,
                        "out_hidden_size": 3584,
                    },
                    "tie_word_embeddings": False,
                },
                tokenizer="tokenizer",
                tokens=512,
                dtype="bf16",
                fp16=False,
            ),
            Component(
                "scheduler",
                "scheduler",
                "diffusers:FlowMatchEulerDiscreteScheduler",
                # https://huggingface.co/Qwen/Qwen-Image, scheduler_config.json
                {
                    "use_dynamic_shifting": True,
                    "base_shift": 0.5,
                    "max_shift": 0.9,
                    "max_image_seq_len": 8192,
                    "shift_terminal": 0.02,
                },
            ),
        ),
        lora_targets=JOINT_ATTENTION,
        presets={
            "attention": JOINT_ATTENTION,
            "attention_feed_forward": (*JOINT_ATTENTION, *FEED_FORWARD),
        },
        ss_base_model_version="qwen_image",
        modelspec_architecture="Qwen-Image",
        default_source="Qwen/Qwen-Image",
        bases={"Qwen/Qwen-Image-2512": {}},
        licence="apache-2.0",
        stored="bf16",
        sampling=SamplingConfig(steps=50, guidance=4.0),
        since="0.40",  # with transformers 5: before it Qwen does not run without data
        runs=False,
    )

    def denoiser(self, pipeline: Pipeline) -> nn.Module:
        network: nn.Module = pipeline.transformer
        return network

    def objective(self, pipeline: Pipeline, config: ObjectiveConfig | None = None) -> Objective:
        return FlowMatching.from_scheduler(pipeline.scheduler, config, patch=PATCH)

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return False

    def resolution_multiple(self, pipeline: Pipeline) -> int:
        return vae.film_factor(pipeline) * PATCH

    def latent_shape(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
        channels, multiple = pipeline.vae.config.z_dim, self.resolution_multiple(pipeline)
        return vae.latent_shape(channels, vae.film_factor(pipeline), multiple, height, width)

    @torch.no_grad()
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        """The last state of each token behind the template's, and which of them is text."""
        encoder, ids = pipeline.text_encoder, tokens["text_encoder"]
        mask = tokens.get("text_encoder" + MASK)
        if mask is None:  # planned are the tokens that are kept, behind those of the template
            ids = F.pad(ids, (DROPPED, 0))
            mask = torch.ones_like(ids, dtype=torch.bool)
        ids, mask = ids.to(encoder.device), mask.to(encoder.device)
        places = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        states = encoder.model(  # without the head, which gives a number for each word at each place
            input_ids=ids,
            attention_mask=chat.attending(mask) if ids.is_meta else mask,
            position_ids=places,
            use_cache=False,
        ).last_hidden_state
        return {
            "encoder_hidden_states": states[:, DROPPED:],
            "encoder_hidden_states_mask": mask[:, DROPPED:],
        }

    def encode_image(self, pipeline: Pipeline, pixels: Tensor) -> Tensor:
        return vae.encode_frame(pipeline, pixels)

    def decode(self, pipeline: Pipeline, latents: Tensor) -> Tensor:
        return vae.decode_frame(pipeline, latents)

    def conditioning(
        self, encoded: Conditioning, frame: Tensor, guidance: float | None = None
    ) -> Conditioning:
        return encoded

    def cfg_scale(self, pipeline: Pipeline, guidance: float) -> float | None:
        return answers.cfg_scale(guidance)

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        batch, _, height, width = noisy.shape
        made = denoiser(
            hidden_states=pack(noisy),
            timestep=timestep / 1000,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * batch,
            **conditioning,
            return_dict=False,
        )[0]
        return unpack(made, height, width)

    def blocks(self, denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
        transformer: Any = denoiser
        return [(f"transformer_blocks.{i}", block) for i, block in enumerate(transformer.transformer_blocks)]

    def picture_state(self, output: Any) -> Tensor | None:
        return answers.last_state(output)  # the text comes first


FAMILY = QwenImage()
