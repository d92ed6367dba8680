"""What the families with a U-Net share: sizes, blocks, names of modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from tunekit.config import ObjectiveConfig
from tunekit.diffusion.objectives import Discrete, Objective
from tunekit.errors import TunekitError
from tunekit.families import depth, graphs, tiny
from tunekit.families import family as answers
from tunekit.families.family import ExportComponent, Middle, Pipeline, Published
from tunekit.families.usual import Usual
from tunekit.families.vae import misfits as vae_misfits
from tunekit.families.vae import vae_factor
from tunekit.families.weights import Entry
from tunekit.layers import replace

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),  # both attentions
    *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
)
"""Adapter targets: all that is linear in the transformer blocks."""
PRESETS = {"attention": TARGETS[:4], "attention_feed_forward": TARGETS[:6]}
"""See `FamilyFacts.presets`."""


class UNet(Usual):
    """A U-Net that learns noise of a discrete schedule, or v."""

    def misfits(self, parts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Entry]]) -> list[str]:
        return misfits(parts, tensors)

    def objective(self, pipeline: Pipeline, config: ObjectiveConfig | None = None) -> Objective:
        return Discrete.from_scheduler(pipeline.scheduler, config)

    def default_size(self, pipeline: Pipeline) -> tuple[int, int]:
        size = pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * vae_factor(pipeline), width * vae_factor(pipeline)

    def resolution_multiple(self, pipeline: Pipeline) -> int:
        return vae_factor(pipeline) * unet_factor(pipeline)

    def begin(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        return answers.begin(scheduler, steps, latents)

    def blocks(self, denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
        unet: Any = denoiser
        down = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
        up = [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
        middle = [("mid_block", unet.mid_block)] if unet.mid_block is not None else []  # BK-SDM has none
        return [*down, *middle, *up]

    def middle(self, denoiser: Any) -> Middle | None:
        # As DeepCache has it: all but the first convolution and the last layer on the way up.
        config = denoiser.config
        inside = () if config.mid_block_type is None else ("mid_block",)
        blocks = [f"down_blocks.{index}" for index in range(len(config.down_block_types))]
        last = len(config.up_block_types) - 1
        paths = [*blocks, *inside, *(f"up_blocks.{index}" for index in range(last))]
        layers = config.layers_per_block
        count = layers if isinstance(layers, int) else layers[0]
        if isinstance(denoiser, nn.Module):  # blocks may have lost some
            own: Any = denoiser
            count = len(own.up_blocks[last].resnets) - 1
        parts = ("resnets", "attentions") if "Attn" in config.up_block_types[-1] else ("resnets",)
        for index in range(count):
            paths += [f"up_blocks.{last}.{part}.{index}" for part in parts]
        return Middle(tuple(paths), skipped=_skipped)

    def removable(self, denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
        """The middle; of each level pairs of residual block and attention, down and up; all its attentions.

        The first pair of a level changes the number of channels, and the last one up reads what comes from
        the level above: they stay, as in BK-SDM (Kim et al. 2023, arXiv:2305.15798).
        """
        return {**_middle(denoiser), **_pairs(denoiser), **_attentions(denoiser)}

    def layouts(self, denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
        """Those of BK-SDM, as far as this network has what they are without.

        "base" is without the second pairs, "small" without the middle too, "tiny" without the lowest level
        too, where that is as wide as the one above.
        """
        unet: Any = denoiser
        found = {}
        pairs = tuple(path for paths in _pairs(denoiser).values() for path in paths)
        small = (*pairs, *_middle(denoiser))
        if pairs:
            found["base"] = pairs
        if len(small) > len(pairs):
            found["small"] = small
        last = len(unet.down_blocks) - 1
        widths = unet.config.block_out_channels
        if last and small and widths[last] == widths[last - 1]:
            lowest = (f"down_blocks.{last}", f"down_blocks.{last - 1}.downsamplers", "up_blocks.0")
            middle = "mid_block" if unet.mid_block is not None else ""
            found["tiny"] = tuple(dict.fromkeys(filter(None, (*small, middle, *lowest))))
        return found

    def without(self, denoiser: nn.Module, gone: Collection[str]) -> nn.Module:
        # The configuration decides which classes levels have.
        built = depth.described(denoiser, _configured(denoiser, gone))
        there = dict(denoiser.named_modules())
        units = [path for path in there if _is_unit(path)]
        for path, name in depth.renumbered(units, gone).items():
            replace(built, name, there[path])
        network: nn.Module = built.train(denoiser.training)
        return network


def _skipped(module: nn.Module, state: Tensor) -> Any:
    """What stands in for a module that is not run: a way down gives a state for each of its parts as well."""
    own: Any = module
    if hasattr(module, "downsamplers"):
        return state, (state,) * (len(own.resnets) + len(own.downsamplers or ()))
    return (state,) if hasattr(module, "transformer_blocks") else state


def unet_factor(pipeline: Pipeline) -> int:
    """The number that both sides of the latents have to be divisible by."""
    return int(2 ** (len(pipeline.unet.config.block_out_channels) - 1))


# Fewer blocks ----------------------------------------------------------------------------------------------

_ATTENDED = {"CrossAttnDownBlock2D": "DownBlock2D", "CrossAttnUpBlock2D": "UpBlock2D"}
"""Classes of levels with attentions -> the same without."""


def _middle(denoiser: Any) -> dict[str, tuple[str, ...]]:
    return {} if denoiser.mid_block is None else {"mid_block": ("mid_block",)}


def _pairs(denoiser: Any) -> dict[str, tuple[str, ...]]:
    """Second and later pairs on the way down, each with one on the way up, which has one pair more."""
    found = {}
    for level, (down, up) in enumerate(_levels(denoiser)):
        count = len(getattr(down, "resnets", ()))
        if len(getattr(up, "resnets", ())) != count + 1:
            continue
        place = len(denoiser.up_blocks) - 1 - level
        for index in range(1, count):
            paths = []
            for block, path, number in (
                (down, f"down_blocks.{level}", index),
                (up, f"up_blocks.{place}", count - index),
            ):
                parts = ("resnets", "attentions") if hasattr(block, "attentions") else ("resnets",)
                paths += [f"{path}.{part}.{number}" for part in parts]
            found[f"down_blocks.{level}.resnets.{index}"] = tuple(paths)
    return found


def _attentions(denoiser: Any) -> dict[str, tuple[str, ...]]:
    found = {}
    for level, blocks in enumerate(_levels(denoiser)):
        places = (f"down_blocks.{level}", f"up_blocks.{len(denoiser.up_blocks) - 1 - level}")
        paths = tuple(
            f"{path}.attentions"
            for block, path in zip(blocks, places, strict=True)
            if type(block).__name__ in _ATTENDED
        )
        if paths:
            found[paths[0]] = paths
    return found


def _levels(denoiser: Any) -> list[tuple[Any, Any]]:
    """The blocks of each level on the way down and on the way up."""
    return list(zip(denoiser.down_blocks, reversed(denoiser.up_blocks), strict=True))


def _configured(denoiser: Any, gone: Collection[str]) -> dict[str, Any]:
    """What the configuration of a U-Net says without some of its modules."""
    config, count = denoiser.config, len(denoiser.down_blocks)
    levels = [level for level in range(count) if not depth.lies_in(f"down_blocks.{level}", gone)]

    def kind(path: str, known: str) -> str:
        return _ATTENDED.get(known, known) if depth.lies_in(f"{path}.attentions", gone) else known

    def left(level: int) -> int:
        path = f"down_blocks.{level}.resnets"
        return sum(
            not depth.lies_in(f"{path}.{index}", gone)
            for index in range(len(denoiser.down_blocks[level].resnets))
        )

    def each(key: str) -> Any:
        """A setting of every level, or of all alike."""
        known = config[key]
        return [known[level] for level in levels] if isinstance(known, list | tuple) else known

    depths = [left(level) for level in levels]
    changes: dict[str, Any] = {
        key: each(key)
        for key in (
            *("block_out_channels", "attention_head_dim", "num_attention_heads", "cross_attention_dim"),
            *("only_cross_attention", "transformer_layers_per_block"),
        )
    }
    changes["layers_per_block"] = depths[0] if len(set(depths)) == 1 else depths
    changes["down_block_types"] = [
        kind(f"down_blocks.{level}", config.down_block_types[level]) for level in levels
    ]
    changes["up_block_types"] = [
        kind(f"up_blocks.{count - 1 - level}", config.up_block_types[count - 1 - level])
        for level in reversed(levels)
    ]
    if depth.lies_in("mid_block", gone):
        changes["mid_block_type"] = None
    return changes


def _is_unit(path: str) -> bool:
    """Whether a module moves as a whole: parts of levels, and whatever is no level."""
    parts = path.split(".")
    if parts[0] in ("down_blocks", "up_blocks"):
        return len(parts) == 4
    return len(parts) == 1 and bool(path)


# Whether components make up a model ------------------------------------------------------------------------

CHANNELS = {
    5: "a model of depth-to-image",
    7: "an upscaler",
    8: "a model that edits pictures (InstructPix2Pix)",
    9: "an inpainting model",
}
"""Channels that a U-Net takes -> what has so many."""


def misfits(parts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Entry]]) -> list[str]:
    """Why components do not make up a model that is trained and drawn here; see `loading.Misfits`."""
    found = []
    unet, vae = parts["unet"].config, parts["vae"].config
    size = unet.sample_size
    if not all(
        _is_count(side) for side in (size if isinstance(size, list | tuple) and len(size) == 2 else [size])
    ):
        found.append(f"its U-Net has sample_size {size!r}: one or two whole numbers are needed")
    found += vae_misfits(vae)
    first = tensors.get("unet", {}).get("conv_in.weight")
    taken = first.shape[1] if first and len(first.shape) > 1 else unet.in_channels
    if taken != vae.latent_channels:
        kind = CHANNELS.get(taken, f"made for {taken} channels, where the VAE gives {vae.latent_channels}")
        found.append(f"its U-Net takes {taken} channels: it is {kind}; a plain text-to-image model is needed")
    elif unet.out_channels != taken:
        found.append(f"its U-Net gives {unet.out_channels} channels and takes {taken}")
    if getattr(unet, "time_cond_proj_dim", None):
        found.append(
            "its U-Net is told the guidance scale (time_cond_proj_dim: a latent consistency model), which is"
            " not done here; its base with an LCM LoRA draws the same"
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if getattr(unet, key, None):
            found.append(f"its U-Net wants more than text and time ({key}: {getattr(unet, key)})")
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
    for encoder in encoders:
        if not isinstance(end := getattr(encoder.config, "eos_token_id", None), int):
            found.append(f"a text encoder has eos_token_id {end!r}: a whole number is needed")
    width = sum(encoder.config.hidden_size for encoder in encoders)
    wanted = unet.cross_attention_dim
    if isinstance(wanted, int) and wanted != width:
        found.append(f"its U-Net reads text of width {wanted}, and the text encoders give {width}")
    added = "text_time" if len(encoders) > 1 else None
    if getattr(unet, "addition_embed_type", None) != added:
        found.append(f"its U-Net has addition_embed_type {unet.addition_embed_type}, and {added} is needed")
    try:
        Discrete.from_scheduler(parts["scheduler"])
    except TunekitError as error:
        found.append(f"{error.message}; {error.hint}" if error.hint else error.message)
    return found


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


# Names -----------------------------------------------------------------------------------------------------

_INSIDE = (
    (".norm1", ".in_layers.0"),
    (".conv1", ".in_layers.2"),
    (".time_emb_proj", ".emb_layers.1"),
    (".norm2", ".out_layers.0"),
    (".conv2", ".out_layers.3"),
    (".conv_shortcut", ".skip_connection"),
)
"""Parts of a residual block: diffusers' names, then those of the network that SDXL was published with."""
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def published_names(paths: Collection[str]) -> dict[str, str]:
    """What a U-Net's modules are called in the code that Stable Diffusion was published with.

    There blocks are numbered through all levels: each of diffusers' down blocks of n residual blocks is n
    input blocks and one more for the downsampler, and likewise on the way up.

    Args:
        paths: of all modules that can be asked for; how many blocks a level has is read from them.

    Returns:
        diffusers' module path -> path there.
    """
    down, up = _starts(paths, "down_blocks", 1), _starts(paths, "up_blocks", 0)
    attended = {path.split(".attentions.")[0] for path in paths if ".attentions." in path}
    return {path: _published(path, down, up, attended) for path in paths}


MARKS = ("time_embed.0.weight", "input_blocks.0.0.weight")
"""Tensors that every U-Net has under the names that it was published with."""


def published_layers(paths: Collection[str]) -> list[Published]:
    """`Family.adapter_names` of a U-Net under the names that it was published with."""
    return [Published(name, (path,)) for path, name in published_names(paths).items()]


def encoder_names(paths: Collection[str]) -> list[Published]:
    """`Family.adapter_names` of a CLIP text encoder.

    transformers 5 dropped the level `text_model` of encoders without a projection; kohya's files keep it.
    """
    names = []
    for path in paths:
        short = path.removeprefix("text_model.")
        inside = short if short.startswith("text_projection") else f"text_model.{short}"
        names += [Published(name, (path,)) for name in dict.fromkeys((inside, short))]
    return names


def _starts(paths: Collection[str], way: str, beside: int) -> list[int]:
    """How many residual blocks there are before each level, and in all; `beside` them, so many more each."""
    starts = [0]
    while found := _count(paths, f"{way}.{len(starts) - 1}.resnets."):
        starts.append(starts[-1] + found + beside)
    return starts


def _count(paths: Collection[str], prefix: str) -> int:
    found = {path.removeprefix(prefix).partition(".")[0] for path in paths if path.startswith(prefix)}
    return len(found)


def _published(path: str, down: list[int], up: list[int], attended: Collection[str]) -> str:
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    kind, *rest = path.split(".")
    if kind == "mid_block":
        part, index, *inner = rest
        place = f"middle_block.{1 if part == 'attentions' else 2 * int(index)}"
    elif kind in ("down_blocks", "up_blocks"):
        level, part, index, *inner = rest
        if part == "downsamplers":
            return f"input_blocks.{down[int(level) + 1]}.0.op"
        if part == "upsamplers":
            last = 2 if f"up_blocks.{level}" in attended else 1
            return f"output_blocks.{up[int(level) + 1] - 1}.{last}.conv"
        within = 1 if part == "attentions" else 0
        if kind == "down_blocks":
            place = f"input_blocks.{1 + down[int(level)] + int(index)}.{within}"
        else:
            place = f"output_blocks.{up[int(level)] + int(index)}.{within}"
    else:
        return path
    name = ".".join([place, *inner])
    if part == "resnets":
        for ours, theirs in _INSIDE:
            name = name.replace(ours, theirs)
    return name


# Graphs and tiny ones ---------------------------------------------------------------------------------------


def example(family: UNet, pipeline: Pipeline) -> Tensor:
    """Two rows of noisy latents of the size that a model was made for."""
    shape = family.latent_shape(pipeline, *family.default_size(pipeline))
    return graphs.example(2, *shape, like=pipeline.unet)


def export(
    pipeline: Pipeline, inputs: Mapping[str, Tensor], *, module: nn.Module | None = None
) -> ExportComponent:
    """The graph of the U-Net.

    Args:
        inputs: see `ExportComponent`; rows, but for "sample", "timestep" and "encoder_hidden_states".
        module: what is exported in place of the network, which is given its inputs by name.
    """
    network, multiple = pipeline.unet, unet_factor(pipeline)
    axes: dict[str, dict[int, str]] = {
        "sample": graphs.PICTURE_AXES,
        "encoder_hidden_states": graphs.TEXT_AXES,
    }
    return ExportComponent(
        name="unet",
        component="unet",
        module=module or graphs.Called("unet", network, inputs),
        inputs=dict(inputs),
        dynamic={name: axes.get(name, graphs.ROW_AXES) for name in inputs if name != "timestep"},
        outputs=["out_sample"],
        config={"time_cond_proj_dim": None, **graphs.model_config(network)},
        multiples={"height": multiple, "width": multiple},
    )


def tiny_autoencoder(seed: int) -> Any:
    """The small autoencoder of Stable Diffusion's kind: 4 pixels per latent, 4 channels."""
    return tiny.autoencoder(
        4,
        seed,
        block_out_channels=(16, 16, 32),
        norm_num_groups=8,
        use_quant_conv=True,
        use_post_quant_conv=True,
        scaling_factor=0.5,
        shift_factor=None,
    )
