"""A family at the size of one base, without weights: all that planning memory needs to know.

The families' tables have the sizes of their usual bases; here these are read from a folder or a pipeline
instead, and made into a pipeline on the meta device, which the family's own code runs on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tunekit.errors import ModelError
from tunekit.families.family import (
    Component,
    Conditioning,
    Family,
    Pipeline,
    Planned,
    Table,
    Tokens,
    as_kept,
)
from tunekit.families.weights import read_json
from tunekit.resources import Source


@dataclass(frozen=True)
class Sizes(Table):
    """A family's table of components, at the size of one base.

    Attributes:
        family: whose code runs on it.
        components: the table.
        assumed: whether the sizes are those of the usual base because the source could not be looked at.
        settings: of the pipeline itself, such as whether it was distilled.
    """

    family: Planned
    components: tuple[Component, ...]
    assumed: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """For people: of the base whose sizes these are."""
        facts = self.family.facts
        return facts.base_title or facts.title

    def pipeline(self, *, built: Mapping[str, Any] | None = None, device: str = "meta") -> Pipeline:
        """A stand-in for a pipeline; each network is made when it is first asked for.

        Args:
            built: networks that are there already, by name.
            device: where others are made.
        """
        return _Skeleton(self, dict(built or {}), device)

    @cached_property
    def configs(self) -> Pipeline:
        """A stand-in whose networks have a `config` and nothing else, for questions about sizes."""
        return _Configs(self)

    def tokens(self, batch: int) -> Tokens:
        """Token ids of the longest prompts, without data."""
        return {
            part.name: torch.empty(batch, part.tokens, dtype=torch.int64, device="meta")
            for part in self.encoders
        }

    def encoded(self, batch: int) -> Conditioning:
        """What encoding the longest prompts gives, without data, float32 as the cache keeps it."""
        known = self._encoded
        return {name: value.new_empty((batch, *value.shape[1:])) for name, value in known.items()}

    @cached_property
    def _encoded(self) -> Conditioning:
        with torch.no_grad():
            made = self.family.encode_tokens(self.pipeline(), self.tokens(1))
        return as_kept(made)

    def latents(self, batch: int, height: int, width: int) -> Tensor:
        """Latents of pictures of that size in pixels, float32, without data."""
        return torch.empty(batch, *self.family.latent_shape(self.configs, height, width), device="meta")


class _Skeleton:
    """Makes networks without data when they are asked for."""

    def __init__(self, sizes: Sizes, built: dict[str, Any], device: str) -> None:
        self._sizes, self._device = sizes, device
        self.__dict__ |= built
        self.config = SimpleNamespace(**{**sizes.settings, "force_zeros_for_empty_prompt": False})

    def __getattr__(self, name: str) -> Any:
        for part in self._sizes.components:
            if part.name == name:
                made = part.build(self._device)
                if part.dtype is not None and part.role != "scheduler":
                    made = made.to({"fp32": torch.float32, "bf16": torch.bfloat16}[part.dtype])
                setattr(self, name, made)
                return made
        raise AttributeError(name)


class _Configs:
    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self.config = SimpleNamespace(**sizes.settings)

    def __getattr__(self, name: str) -> Any:
        try:
            part = self._sizes.component(name)
        except StopIteration:
            raise AttributeError(name) from None
        return SimpleNamespace(config=_Config(part))


class _Config:
    """A row's configuration with the defaults of its class, which is imported only if one is asked for."""

    def __init__(self, part: Component) -> None:
        self._part = part

    def __getattr__(self, key: str) -> Any:
        if key in self._part.config:
            return self._part.config[key]
        import inspect

        known = inspect.signature(self._part.type.__init__).parameters
        if key not in known or known[key].default is inspect.Parameter.empty:
            raise AttributeError(key)
        return known[key].default


def sized(family: Planned, source: Source) -> Sizes:
    """The sizes of a folder, read from its config.json files; nothing is downloaded.

    Args:
        source: folder, "builtin/..." or hub id; of one that is not among `FamilyFacts.bases`, the
            sizes of its usual base are assumed.

    Raises:
        ModelError: a folder without the family's components.
    """
    facts = family.facts
    rest = source.rest
    folder = rest.path if rest else source.path
    if folder is not None and folder.is_file():
        beside = folder.with_suffix("")  # where the configs of a single file lie, see loading.py
        folder = beside if (beside / "model_index.json").is_file() else None
    if folder is None:
        other = facts.bases.get(source.name)
        parts = (
            facts.components if other is None else tuple(_otherwise(part, other) for part in facts.components)
        )
        return Sizes(family, parts, assumed=other is None and source.name != facts.default_source)

    def read(part: Component) -> Component:
        name = "scheduler_config.json" if part.role == "scheduler" else "config.json"
        path = folder / part.name / name
        if rest is not None and not path.exists() and source.path is not None:
            path = source.path / part.name / name
        if (part.role == "scheduler" or (part.name == facts.denoiser_name and rest)) and not path.exists():
            return part
        try:
            made = with_config(part, read_json(path))
            reads = folder / part.tokenizer / "tokenizer_config.json"
            length = read_json(reads).get("model_max_length") if part.tokenizer and reads.is_file() else None
            # As loading has it: the shorter of what its words and what its positions are made for.
            return replace(made, tokens=min(int(length), made.tokens)) if length else made
        except (ModelError, TypeError, ValueError) as error:
            needed = ", ".join(other.name for other in facts.components)
            raise ModelError(
                f"the sizes of {part.name} cannot be read ({getattr(error, 'message', error)})",
                where=str(path),
                hint=f"{facts.title} needs the folders {needed}",
            ) from error

    index = folder / "model_index.json"
    said = read_json(index) if index.is_file() else {}
    there = tuple(read(part) for part in facts.components if not part.is_left_out(said))
    return Sizes(family, there, settings=_plain(said))


def _otherwise(part: Component, changes: Mapping[str, Mapping[str, Any]]) -> Component:
    return replace(part, config={**part.config, **changes.get(part.name, {})})


def like(family: Family, pipeline: Pipeline) -> Sizes:
    """The sizes of a pipeline that is there."""

    def read(part: Component) -> Component:
        config = getattr(pipeline, part.name).config
        plain = dict(config.to_dict() if hasattr(config, "to_dict") else config)
        tokenizer = getattr(pipeline, part.tokenizer, None) if part.tokenizer else None
        made = with_config(part, plain)
        length = getattr(tokenizer, "model_max_length", None)
        if not isinstance(length, int) or length >= 10**6:
            return made
        return replace(made, tokens=min(length, made.tokens) if part.chat is not None else length)

    settings = _plain(dict(getattr(pipeline, "config", {})))
    there = (part for part in family.facts.components if getattr(pipeline, part.name) is not None)
    return Sizes(family, tuple(read(part) for part in there), settings=settings)


def _plain(index: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a pipeline itself, and not of its parts."""
    return {key: value for key, value in index.items() if isinstance(value, bool) and not key.startswith("_")}


def with_config(part: Component, config: Mapping[str, Any]) -> Component:
    """The row of a base with another configuration, which may say how long its prompts may be."""
    name = config.get("_class_name")
    classes = f"diffusers:{name}" if part.role == "scheduler" and isinstance(name, str) else part.classes
    tokens = part.reads(config) if part.tokenizer else part.tokens
    return replace(part, config=config, classes=classes, tokens=tokens)


# Rows that several families have ----------------------------------------------------------------------------


def clip(
    name: str,
    tokenizer: str,
    width: int,
    layers: int,
    heads: int,
    *,
    act: str = "quick_gelu",
    projection: int | None = None,
    **names: Any,
) -> Component:
    """A CLIP text encoder of 77 tokens and 49,408 words; with `projection` it gives a pooled embedding.

    Args:
        names: what it is called in files: `kohya` and `published` of the row.
    """
    config = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": act,
        "projection_dim": projection or width,
    }
    kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return Component(
        name,
        "text_encoder",
        f"transformers:{kind}",
        config,
        tokenizer=tokenizer,
        tokens=77,
        **names,
    )


def t5_xxl(
    name: str, tokenizer: str, tokens: int, *, kohya: Collection[str] = (), optional: bool = False
) -> Component:
    """The T5 1.1 XXL encoder, 4.76 G parameters, in bfloat16."""
    config = {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 32128,
    }
    return Component(
        name,
        "text_encoder",
        "transformers:T5EncoderModel",
        config,
        tokenizer=tokenizer,
        tokens=tokens,
        kohya=tuple(kohya),
        dtype="bf16",
        fp16=False,
        optional=optional,
    )


QWEN3: dict[str, dict[str, Any]] = {
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}
"""Sizes that differ: https://huggingface.co/Qwen/Qwen3-4B and Qwen3-8B, config.json."""


def qwen3(
    name: str,
    size: str,
    *,
    thinking: bool,
    tokenizer: str = "tokenizer",
    tokens: int = 512,
    causal: bool = False,
) -> Component:
    """Qwen3 as a text encoder, in bfloat16: 4.02 G or 8.19 G parameters.

    Args:
        size: "4B" or "8B".
        thinking: see `Component.chat`.
        tokens: longest prompt with the chat template around it; the network itself has positions for 40,960.
        causal: whether it is stored with the head that predicts words, which is not read here.
    """
    config = {
        **QWEN3[size],
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    }
    return Component(
        name,
        "text_encoder",
        "transformers:Qwen3ForCausalLM" if causal else "transformers:Qwen3Model",
        config,
        tokenizer=tokenizer,
        tokens=tokens,
        chat=thinking,
        dtype="bf16",
        fp16=False,
    )


def qwen3_vl(name: str, *, tokens: int, causal: bool = False) -> Component:
    """Qwen3-VL 4B as a text encoder, in bfloat16: 4.44 G parameters, 0.42 of them for pictures.

    Args:
        tokens: longest prompt.
        causal: whether it is stored with the head that predicts words, which is not read here.
    """
    # https://huggingface.co/Qwen/Qwen3-VL-4B-Instruct, config.json
    text = {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rope_theta": 5000000.0,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
    }
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    return Component(
        name,
        "text_encoder",
        "transformers:Qwen3VLForConditionalGeneration" if causal else "transformers:Qwen3VLModel",
        {"text_config": text, "vision_config": vision, "tie_word_embeddings": True},
        tokenizer="tokenizer",
        tokens=tokens,
        dtype="bf16",
        fp16=False,
    )


def vae(
    channels: int,
    *,
    quant: bool = True,
    scaling: float = 0.18215,
    shift: float | None = None,
    fp16: bool = True,
    **config: Any,
) -> Component:
    """The autoencoder that the families of Stable Diffusion and FLUX.1 share: 8 pixels per latent."""
    config = {
        **config,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
        "scaling_factor": scaling,
        "shift_factor": shift,
    }
    return Component(
        "vae", "vae", "diffusers:AutoencoderKL", config, published="first_stage_model.", fp16=fp16
    )


FLUX_VAE = vae(16, quant=False, scaling=0.3611, shift=0.1159, sample_size=1024)
"""That of FLUX.1, which Chroma and Z-Image took. https://huggingface.co/black-forest-labs/FLUX.1-dev"""


def scheduler(name: str, **config: Any) -> Component:
    """The sampler that a base is configured with."""
    return Component("scheduler", "scheduler", f"diffusers:{name}", config)


STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Noise schedule of Stable Diffusion 1, 2 and XL."""
