"""What a model family answers, and functions that answer for several; see `usual` for what most answer."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from tunekit import networks
from tunekit.config import ObjectiveConfig
from tunekit.diffusion.objectives import FlowMatching, Objective
from tunekit.diffusion.sampling import SamplingConfig
from tunekit.errors import ModelError, TunekitError
from tunekit.resources import Source

Conditioning = dict[str, Tensor]
"""What the denoiser is told besides latents and time, keyed by its own keyword names; batched along dim 0."""

Tokens = dict[str, Tensor]
"""What each text encoder reads: its component's name -> token ids [B, tokens], int64; of those that are told
where a prompt ends, its name + `MASK` -> [B, tokens], bool. Without a mask, all is read."""

MASK = ".mask"

Pipeline = Any
"""A diffusers pipeline, or anything with its components as attributes (the ONNX runtime makes such)."""

POSITIONS = "max_position_embeddings"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Dtypes = torch.dtype | Mapping[str, torch.dtype]
"""Type of all weights, or component name -> type of its own; those that are not named are float32."""

Packing = Literal["", "int8", "fp8", "nf4"]
"""How the linear layers in a denoiser's blocks are kept; "" is as floats."""

Role = Literal["denoiser", "vae", "text_encoder", "scheduler"]


@dataclass(frozen=True)
class Component:
    """One part of a family's pipeline: the row that planning, loading, quantizing, exporting and naming read.

    Attributes:
        name: attribute of the pipeline, and folder in diffusers' layout: "unet", "text_encoder_2".
        role: what it is for.
        classes: "diffusers:UNet2DConditionModel"; a transformers model is made from its config class.
        config: what the config.json of the usual base says, as far as it differs from the class's defaults.
        tokenizer: attribute of the tokenizer that a text encoder reads.
        tokens: longest prompt of a text encoder, in tokens. Where `config` says how many positions there are,
            prompts are kept shorter than that; otherwise they are as long.
        chat: of a text encoder that is a chat model, whether it thinks first: prompts are written into the
            chat template of its tokenizer, see `chat`.
        kohya: prefixes of its keys in kohya files; the first is written, all are read. Empty: not adapted.
        dotted: prefix of its layers in the adapter file for ComfyUI, where that names them with dots, as
            "diffusion_model"; empty: kohya's names are written.
        published: prefix of its tensors in a single file of the whole model, see `single_file`; empty: the
            family was not published so.
        layers: of all its module paths, its layers as they are named there (`published` makes it of a table);
            None: as here. Rows may name a single tensor in place of a module: "norm.scale": "norm.weight".
        marks: of a denoiser, tensors by which a single file of it is known: all are there, under the names
            that it was published with, and no other family has them all.
        unread: regular expression of tensors in such a file that the network does not have.
        flat: regular expression of tensors that lie in such a file as one row, without their sides.
        dtype: what it computes in while pictures and captions are encoded; None: what the run says.
        fp16: whether float16 has the range for it. Where not, it stays float32 in a model of float16.
        sensitive: module paths that lose most in few bits.
        optional: whether a base may be without it; the family says what stands in for what it gives.
        keeps: inputs that keep their type when the component computes in 16 bits: sizes, positions, times.
    """

    name: str
    role: Role
    classes: str
    config: Mapping[str, Any]
    tokenizer: str = ""
    tokens: int = 0
    chat: bool | None = None
    kohya: tuple[str, ...] = ()
    dotted: str = ""
    published: str = ""
    layers: Callable[[Collection[str]], list[Published]] | None = None
    marks: tuple[str, ...] = ()
    unread: str = ""
    flat: str = ""
    dtype: str | None = "fp32"
    fp16: bool = True
    sensitive: tuple[str, ...] = ()
    optional: bool = False
    keeps: tuple[str, ...] = ()

    @property
    def type(self) -> Any:
        """The class."""
        module, name = self.classes.split(":")
        return getattr(importlib.import_module(module), name)

    def reads(self, config: Mapping[str, Any]) -> int:
        """The longest prompt of a base whose text encoder has that configuration, in tokens."""
        positions = config.get(POSITIONS)
        if not isinstance(positions, int):
            return self.tokens
        return min(positions, self.tokens) if POSITIONS in self.config else positions

    def is_left_out(self, index: Mapping[str, Any]) -> bool:
        """Whether a model_index.json says that its base is without this part, as it may be."""
        return self.optional and bool(index) and index.get(self.name) in (None, [None, None])

    def build(self, device: str = "meta") -> Any:
        """Makes the network: on the meta device without data, elsewhere with random weights.

        Raises:
            ModelError: the configuration does not describe it.
        """
        if device != "meta" or self.role == "scheduler":
            return self._made(device)
        key = repr((self.classes, sorted(self.config.items(), key=str)))
        with _disable_current_modes():  # what is remembered is nothing to whoever follows tensors now
            if key not in _BUILT:
                while len(_BUILT) >= REMEMBERED:
                    del _BUILT[next(iter(_BUILT))]
                _BUILT[key] = self._made(device)
            return networks.twin(_BUILT[key])

    def _made(self, device: str) -> Any:
        made = self.type
        try:
            if self.role == "scheduler":
                return made.from_config(dict(self.config))
            with torch.device(device):
                if self.classes.startswith("transformers:"):
                    module: nn.Module = made(made.config_class(**self.config))
                else:
                    known = inspect.signature(made.__init__).parameters
                    module = made(**{key: value for key, value in self.config.items() if key in known})
        except Exception as error:  # whatever a wrong value leads to in there
            raise ModelError(
                f"the configuration of {self.name} does not describe a {made.__name__}: {error}"
            ) from error
        return module.eval().requires_grad_(False)


_BUILT: dict[str, nn.Module] = {}
"""Networks without data, of which the same are asked for again and again while a plan is made."""
REMEMBERED = 8


@dataclass(frozen=True)
class Published:
    """One layer of a network under a name that adapter files use, and the modules here that it is made of.

    Attributes:
        name: path in that network, with dots: "double_blocks.0.img_attn.qkv".
        parts: paths of the modules here whose rows it has, in their order there.
        swapped: the halves of its rows stand in the other order there, as (shift, scale) of a modulation.
    """

    name: str
    parts: tuple[str, ...]
    swapped: bool = False


@dataclass(frozen=True)
class Frame:
    """What part of which picture a sample is: what SDXL is told, and what is kept beside its latent.

    Attributes:
        original: (height, width) of the picture as it was found, upright, in pixels.
        crop: (top, left) of the cut in the scaled picture, in pixels.
        size: (height, width) of the cut, in pixels.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def whole(cls, height: int, width: int) -> Frame:
        """Of a picture that is not cut, such as one to be drawn."""
        return cls((height, width), (0, 0), (height, width))

    @property
    def row(self) -> Tensor:
        """[6] float32: original, crop, size."""
        return torch.tensor([*self.original, *self.crop, *self.size], dtype=torch.float32)

    def rows(self, count: int) -> Tensor:
        """[count, 6]: the same frame for each of a batch."""
        return self.row.expand(count, -1)


class Table:
    """Rows that can be asked for by what they are for."""

    components: tuple[Component, ...]

    def component(self, name: str) -> Component:
        """The row of that name."""
        return next(part for part in self.components if part.name == name)

    def of_role(self, role: Role) -> tuple[Component, ...]:
        """The rows of a role, in order."""
        return tuple(part for part in self.components if part.role == role)

    @property
    def networks(self) -> tuple[Component, ...]:
        """All that has weights."""
        return tuple(part for part in self.components if part.role != "scheduler")

    @property
    def denoiser(self) -> Component:
        """The network that is trained."""
        return self.of_role("denoiser")[0]

    @property
    def vae(self) -> Component:
        """The autoencoder."""
        return self.of_role("vae")[0]

    @property
    def encoders(self) -> tuple[Component, ...]:
        """The text encoders."""
        return self.of_role("text_encoder")


@dataclass(frozen=True)
class FamilyFacts(Table):
    """Constants of a family.

    Attributes:
        title: for people, e.g. "Stable Diffusion 1.x".
        pipeline_classes: `_class_name`s of model_index.json that this family loads; the first is the one
            it makes.
        components: the table, at the size of `default_source`.
        lora_targets: modules that an adapter goes on where the user names none; in a whole path, "*" stands
            for anything.
        presets: "attention" and "attention_feed_forward" -> modules, for a user who names one of these; with
            "*" as there.
        sampling: how its pictures are drawn where neither the user nor the model says.
        sampling_distilled: the same of bases that were distilled to few steps, where it is another.
        ss_base_model_version: what kohya's tools write for this base, e.g. "sd_v1".
        modelspec_architecture: of modelspec 1.0.1, without "/lora", e.g. "stable-diffusion-v1".
        default_source: hub id of the usual base, whose sizes the table has.
        bases: hub ids of other published bases -> component -> what its configuration has instead, so that
            they are planned before they are here.
        licence: of the usual base, as the hub writes it.
        stored: type that its weights were published in: what is planned while they are not here.
        base_title: the usual base for people, where it is not `title`.
        ss_v2: kohya's name for SD 2.x.
        distilled: regular expression of what names of its published bases that were distilled to few steps
            have in them, or "".
        distilled_from: what it becomes in the name of the base that such a one was made from, as `re.sub`
            has it; "" where that is `default_source`.
        adapter_marks: regular expression of what this family's adapters alone have in their keys, or "".
        runs: False for a family that can be planned only.
        since: the version of diffusers that was the first to have its classes, such as "0.42", where older
            ones are supported too.
    """

    title: str
    pipeline_classes: tuple[str, ...]
    components: tuple[Component, ...]
    lora_targets: tuple[str, ...]
    ss_base_model_version: str
    modelspec_architecture: str
    default_source: str
    presets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=30, guidance=7.5))
    sampling_distilled: SamplingConfig | None = None
    bases: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    licence: str = ""
    stored: Literal["fp32", "bf16"] = "fp32"
    base_title: str = ""
    ss_v2: bool = False
    distilled: str = ""
    distilled_from: str = ""
    adapter_marks: str = ""
    runs: bool = True
    since: str = ""

    @property
    def is_there(self) -> bool:
        """Whether the diffusers that is installed has its classes."""
        here = version("diffusers").split(".")
        needed = self.since.split(".") if self.since else []
        return [int(part) for part in here[: len(needed)]] >= [int(part) for part in needed]

    def usual_sampling(self, *, distilled: bool) -> SamplingConfig:
        """How pictures of a base are drawn where neither the user nor the model says."""
        return (self.sampling_distilled if distilled else None) or self.sampling

    @property
    def pipeline_class(self) -> str:
        """The class of diffusers that the family makes."""
        return self.pipeline_classes[0]

    @property
    def denoiser_name(self) -> str:
        """Attribute of the pipeline that is trained; also the prefix of its keys in PEFT files."""
        return self.denoiser.name

    def encoders_of(self, pipeline: Pipeline) -> tuple[Component, ...]:
        """The text encoders that a pipeline has, in order."""
        return tuple(part for part in self.encoders if getattr(pipeline, part.name, None) is not None)

    @property
    def kohya_prefixes(self) -> dict[str, tuple[str, ...]]:
        """Component that may be adapted -> prefixes of its keys in kohya files."""
        return {part.name: part.kohya for part in self.components if part.kohya}

    @property
    def overflowing(self) -> tuple[str, ...]:
        """Components that stay float32 in a model of float16."""
        return tuple(part.name for part in self.components if not part.fp16)

    def dtypes(self, denoiser: torch.dtype) -> dict[str, torch.dtype]:
        """What each component computes in, in a run whose denoiser computes in `denoiser`."""
        return {part.name: denoiser if part.dtype is None else DTYPES[part.dtype] for part in self.networks}

    def drawing_dtypes(self, precision: torch.dtype) -> dict[str, torch.dtype]:
        """What each component computes in, where pictures are drawn in `precision`."""
        return {
            part.name: torch.float32 if precision == torch.float16 and not part.fp16 else precision
            for part in self.networks
        }


@dataclass(frozen=True)
class ExportComponent:
    """One graph to export: a module with positional tensor inputs, and everything an exporter must know.

    Attributes:
        name: folder of the component, e.g. "unet".
        component: row of the family's table that it is a part of: "vae" for "vae_encoder".
        module: takes `inputs` in order, returns a tensor or a tuple in the order of `outputs`.
        inputs: name -> example tensor, on the CPU.
        dynamic: input name -> {dim: axis name}; equal axis names are equal sizes within one component. An
            input whose first axis is not "batch" is the same for all rows; "a+b" is as long as both.
        outputs: names.
        config: written as config.json beside the graph.
        multiples: axis name -> number that its size is always divisible by, where it is not 1.
    """

    name: str
    component: str
    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    outputs: list[str]
    config: dict[str, Any]
    multiples: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Middle:
    """The part of a denoiser that changes little from step to step, so that steps may take it from another.

    Attributes:
        paths: modules, in the order they run.
        adds: what they give is their input and something on top, as in a transformer: that is what is kept.
            Else it is joined with newer values by what follows, as in a U-Net, and kept as it is.
        skipped: where it does not add, what stands in for the output of a module that is not run, given its
            input; nothing reads it but modules that are not run.
    """

    paths: tuple[str, ...]
    adds: bool = False
    skipped: Callable[[nn.Module, Tensor], Any] = lambda module, state: state


class Planned(Protocol):
    """What planning a family's memory needs. Methods take the pipeline or the denoiser and keep no state."""

    name: str
    facts: FamilyFacts

    def denoiser(self, pipeline: Pipeline) -> nn.Module:
        """Return the network that is trained."""
        ...

    def objective(self, pipeline: Pipeline, config: ObjectiveConfig | None = None) -> Objective:
        """Return what is learned: the objective that the pipeline's scheduler was configured for.

        Args:
            config: the `objective:` section; None is the default one.

        Raises:
            ModelError: a scheduler of another kind, such as one for flow matching.
            ConfigError: an option that this family's objective does not have.
        """
        ...

    def is_distilled(self, pipeline: Pipeline) -> bool:
        """Whether configurations say that the base was distilled to few steps, which training spoils."""
        ...

    def latent_shape(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, ...]:
        """Return [C, h, w] of one picture's latents.

        Raises:
            ConfigError: the size is not a multiple of `resolution_multiple`.
        """
        ...

    def resolution_multiple(self, pipeline: Pipeline) -> int:
        """Return the number that height and width in pixels have to be divisible by."""
        ...

    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        """Encode token ids; every tensor has dim 0 of the batch and lies where the encoders are."""
        ...

    def encode_image(self, pipeline: Pipeline, pixels: Tensor) -> Tensor:
        """Encode pixels [B, 3, H, W] in [-1, 1] to [B, 2C, h, w] float32: scaled mean, then scaled std."""
        ...

    def decode(self, pipeline: Pipeline, latents: Tensor) -> Tensor:
        """Decode scaled latents [B, C, h, w] to pixels [B, 3, H, W] in [0, 1], float32."""
        ...

    def conditioning(
        self, encoded: Conditioning, frame: Tensor, guidance: float | None = None
    ) -> Conditioning:
        """Complete what `encode_prompt` gave with what belongs to the picture.

        Args:
            encoded: dim 0 is the batch.
            frame: [B, 6] float32, see `Frame.row`.
            guidance: for denoisers that are told the guidance scale; None while training.
        """
        ...

    def cfg_scale(self, pipeline: Pipeline, guidance: float) -> float | None:
        """Return the scale of classifier-free guidance: without + scale * (with - without).

        None where the denoiser runs with the prompt alone: there is no guidance, or the network is told it.
        """
        ...

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Run the denoiser on noisy latents [B, C, h, w] at timesteps [B] (or [1] for all), float32."""
        ...

    def blocks(self, denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the denoiser's large blocks, (module path, module), in the order they run."""
        ...

    def picture_state(self, output: Any) -> Tensor | None:
        """Of what a large block returned, the picture's hidden state; None if the block gives none."""
        ...


class Family(Planned, Protocol):
    """A model family that can be run."""

    def load(
        self,
        source: Source | str,
        dtypes: Dtypes = torch.float32,
        *,
        pack: Packing = "",
        only: Collection[str] | None = None,
    ) -> Pipeline:
        """Load a pipeline on the CPU, in eval mode, component by component, each in its own type.

        Args:
            source: what to open, and how.
            dtypes: of weights that are not packed.
            pack: "int8", "fp8" or "nf4" packs the linear layers in the denoiser's blocks while they are read;
                with "fp8" those that are stored in that type, e4m3, stay as they are.
            only: networks whose weights are read; the others are on the meta device. None is all.

        Raises:
            ModelError: nothing there, not this family, pickled or non-finite weights.
        """
        ...

    def look(self, source: Source | str) -> list[ModelError]:
        """Return what keeps a source from being loaded, from configuration files and headers alone.

        Nothing is fetched and no weight is read; of a hub id, nothing is known.
        """
        ...

    def save(self, pipeline: Pipeline, folder: Path) -> None:
        """Write the pipeline in diffusers' layout and its own dtype, pruned and quantized layers too."""
        ...

    def tiny(self, seed: int = 0) -> Pipeline:
        """Build the smallest pipeline that runs all code of the family, with random weights from `seed`."""
        ...

    def recognizes(self, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether a pipeline of one of `pipeline_classes` is this family's.

        Args:
            configs: component name -> its config.json, as far as it could be read.
        """
        ...

    def default_size(self, pipeline: Pipeline) -> tuple[int, int]:
        """Return the (height, width) in pixels the model was made for."""
        ...

    def tokenize(self, pipeline: Pipeline, prompts: list[str]) -> Tokens:
        """Turn prompts into what each text encoder reads, padded or cut to the encoder's length."""
        ...

    def encode_prompt(self, pipeline: Pipeline, prompts: list[str]) -> Conditioning:
        """Encode prompts; every tensor has dim 0 of len(prompts) and lies where the encoders are."""
        ...

    def begin(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        """Set a fresh scheduler's timesteps; return unit noise [B, C, h, w] as the sampler starts from it."""
        ...

    def adapter_names(self, component: str, paths: Collection[str]) -> list[Published]:
        """What layers are called in adapter files of other programs, after the component's prefix.

        A module that has the same name here as there is said by `underscored`; a network that was published
        with other layers, some of them several modules here, states a table for `published`. How many rows a
        part has is read from its module.

        Args:
            component: its name in the table.
            paths: of all its modules that can carry an adapter.

        Returns:
            Every path is part of a layer at least. Of several that have it the first is written, and all are
            read; the path itself is read anyway.
        """
        ...

    def middle(self, denoiser: Any) -> Middle | None:
        """Return the part of a denoiser that sampling steps may take from another; None where there is none.

        Args:
            denoiser: the network, or a graph of it, of which the `config` alone is read.
        """
        ...

    def removable(self, denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
        """Return what may leave the denoiser whole: name -> paths of modules that leave together.

        Any of them may leave, some or all; a configuration of diffusers describes what is left.
        """
        ...

    def layouts(self, denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
        """Return the smaller layouts that people have published: name -> paths of modules that leave."""
        ...

    def without(self, denoiser: nn.Module, gone: Collection[str]) -> nn.Module:
        """Return a denoiser of the same modules, but for those that leave; the one given stays whole.

        Args:
            gone: paths of `removable`, all that leave together, or of one of `layouts`.
        """
        ...

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        """Return the graphs that make up the pipeline, in the layout that Optimum and diffusers expect."""
        ...


# What most families answer. A family calls these; it may answer otherwise.


def read(tokenizer: Any, texts: Sequence[str], length: int | None = None) -> Any:
    """What a tokenizer of transformers makes of texts: `input_ids` and `attention_mask`, [B, length], int64.

    Args:
        length: texts are padded or cut to so many tokens; None is the tokenizer's own `model_max_length`.
    """
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def tokenize(facts: FamilyFacts, pipeline: Pipeline, prompts: list[str]) -> Tokens:
    """`Family.tokenize` of encoders that read ids alone, the padding too."""
    return {
        encoder.name: read(getattr(pipeline, encoder.tokenizer), prompts).input_ids
        for encoder in facts.encoders_of(pipeline)
    }


def flow_misfits(scheduler: Any) -> list[str]:
    """Whether a scheduler is none of flow matching; for `loading.Misfits`."""
    try:
        FlowMatching.from_scheduler(scheduler)
    except TunekitError as error:
        return [f"{error.message}; {error.hint}" if error.hint else error.message]
    return []


def cfg_scale(guidance: float) -> float | None:
    """`Family.cfg_scale` where guidance is counted from 1, as in Ho and Salimans 2022, arXiv:2207.12598."""
    return guidance if guidance > 1 else None


def begin(scheduler: Any, steps: int, latents: Tensor) -> Tensor:
    """`Family.begin` of samplers that start from scaled noise; those for flow matching do not scale it."""
    scheduler.set_timesteps(steps, device=latents.device)
    return latents * getattr(scheduler, "init_noise_sigma", 1.0)


def begin_flow(
    scheduler: Any,
    steps: int,
    latents: Tensor,
    mu: float | None = None,
    *,
    sigmas: Sequence[float] | None = None,
) -> Tensor:
    """`Family.begin` of flow matching: from s = 1 to 1 / steps evenly, then shifted by the sampler.

    Args:
        mu: the shift's logarithm, for samplers with `use_dynamic_shifting`.
        sigmas: the same [steps] numbers, where the last bit of a float32 of them matters.
    """
    known = inspect.signature(scheduler.set_timesteps).parameters
    dynamic = "mu" in known and scheduler.config.get("use_dynamic_shifting")  # others refuse it
    options: dict[str, Any] = {"mu": mu} if mu is not None and dynamic else {}
    # Those with flow sigmas of their own make them; the others would go to the scheduler's least sigma.
    if "sigmas" in known and not scheduler.config.get("use_flow_sigmas"):
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps) if sigmas is None else list(sigmas)
    else:
        options["num_inference_steps"] = steps
    scheduler.set_timesteps(device=latents.device, **options)
    return latents


def pixels_per_latent(family: Planned, pipeline: Pipeline) -> int:
    """Pixels per latent, along one side."""
    side = family.resolution_multiple(pipeline)
    return side // family.latent_shape(pipeline, side, side)[-1]


def as_kept(encoded: Conditioning) -> Conditioning:
    """What a text encoder gave, as it is kept: float32, but for masks and numbers of places."""
    return {name: value.float() if value.is_floating_point() else value for name, value in encoded.items()}


def first_state(output: Any) -> Tensor | None:
    """`Family.picture_state` of blocks that return the hidden state, or a tuple that begins with it."""
    found = output[0] if isinstance(output, tuple) else output
    return found if isinstance(found, Tensor) else None


def last_state(output: Any) -> Tensor | None:
    """`Family.picture_state` of blocks that return (text, picture)."""
    found = output[-1] if isinstance(output, tuple) else output
    return found if isinstance(found, Tensor) else None


def underscored(paths: Collection[str]) -> list[Published]:
    """`Family.adapter_names` where other programs use the names of diffusers."""
    return [Published(path, (path,)) for path in paths]


NUMBER = "{}"
"""Stands for the numbers of blocks in a table for `published`."""


def published(
    table: Mapping[str, str | tuple[str, ...]], paths: Collection[str], *, swapped: Collection[str] = ()
) -> list[Published]:
    """`Family.adapter_names` of a network that was published with other layers.

    Args:
        table: a layer's name there -> the module here, or the modules that it stacks, in the order of its
            rows; "{}" in both is the number of a block. Rows of modules that are not among `paths` are passed
            over; modules that no row has keep their own names.
        paths: of all modules that can be asked for.
        swapped: names, as in the table or of one layer, whose halves stand in the other order there.
    """
    there = set(paths)
    layers: list[Published] = []
    for name, modules in table.items():
        parts = (modules,) if isinstance(modules, str) else modules
        for number in _numbers(parts[0], there):
            filled = tuple(part.replace(NUMBER, number) for part in parts)
            if there.issuperset(filled):
                own = name.replace(NUMBER, number)
                layers.append(Published(own, filled, swapped=name in swapped or own in swapped))
    named = {part for layer in layers for part in layer.parts}
    return layers + underscored([path for path in paths if path not in named])


def _numbers(pattern: str, paths: Collection[str]) -> list[str]:
    """The numbers that a path with `NUMBER` in it has among `paths`, in order."""
    if NUMBER not in pattern:
        return [""]
    first, last = pattern.split(NUMBER)
    found = {
        path[len(first) : len(path) - len(last)]
        for path in paths
        if path.startswith(first) and path.endswith(last)
    }
    return sorted((number for number in found if number.isdigit()), key=int)
