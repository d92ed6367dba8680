"""One file with a whole model, laid out as Stable Diffusion was published: reading and writing it.

`Component.published` says under which prefix a network lies there. What its tensors are called behind it is
the same in both directions, so what is written is what is read. The layout is that of the configs in
https://github.com/CompVis/stable-diffusion and https://github.com/Stability-AI/generative-models.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tunekit import layers
from tunekit.errors import ModelError, output_errors
from tunekit.families import tiny
from tunekit.families.weights import TEXT_LEVEL, Entry
from tunekit.resources import ASSETS

if TYPE_CHECKING:
    from tunekit.families.family import Component, FamilyFacts, Pipeline, Published

OPEN_CLIP = ".model."
"""How the prefix of a text encoder ends that is named as in OpenCLIP; others are named as in transformers."""
UNREAD = re.compile(
    r"(model_ema|ema|first_stage_model\.loss|first_stage_model\.perceptual|embedding_manager)\."
    r"|(alphas|betas|sqrt_|log_|posterior_|logvar|lvlb|denoiser\.sigmas|edm_|global_step|iteration|epoch)"
    r"|(cond_stage_model|conditioner)\.([\w.]*\.)?logit_scale$"
    r"|(v_pred|ztsnr|model\.diffusion_model\.scaled_fp8|scaled_fp8)$"
)
"""What is no part of the model: the noise schedule, a second average of the weights, marks."""
AVERAGE = re.compile(r"(model_)?ema\.")
OTHERS = re.compile(r"(text_encoders|vae|cond_stage_model|conditioner|first_stage_model)\.")
"""Networks beside the denoiser, in files of whole models."""
V_PRED, ZERO_SNR = "v_pred", "ztsnr"
"""Empty tensors by which other programs know a Stable Diffusion XL that predicts v."""


# What a file is ---------------------------------------------------------------------------------------------

KINDS = (
    (r"\.(lora_|dora_)|\.lora[AB]?\.|lora_linear_layer|to_[qkv]_lora", "a LoRA: an adapter, not a model"),
    (r"\.(hada|lokr)_", "a LoHa or LoKr: an adapter, not a model"),
    (r"(^|\.)(ip_adapter|image_proj)\.", "an IP-Adapter, not a model"),
    (r"^(string_to_param|emb_params|clip_[lg]|<.*>)$", "a textual inversion, not a model"),
    (r"^(control_model|controlnet_|input_hint_block)", "a ControlNet, not a model"),
    (r"^conditioner\.embedders\.1\.", "a Stable Diffusion XL model"),
    (r"^conditioner\.embedders\.0\.model\.", "a Stable Diffusion XL refiner"),
    (r"^cond_stage_model\.model\.", "a Stable Diffusion 2.x model"),
    (r"^cond_stage_model\.", "a Stable Diffusion 1.x model"),
)
UNET = "a U-Net without text encoder and VAE"
OWN = "a network alone, with the names of diffusers"
PARTS = (
    (r"(^|\.)double_blocks\.", "a FLUX model"),
    (r"(^|\.)joint_blocks\.", "a Stable Diffusion 3 model"),
    (r"^(model\.diffusion_model\.|diffusion_model\.)?input_blocks\.", UNET),
    (r"^((transformer|unet)\.)?(down_blocks|(single_)?transformer_blocks|all_x_embedder)\.", OWN),
    (r"^(first_stage_model\.|encoder\.|decoder\.)", "a VAE alone"),
    (r"^text_model\.", "a text encoder alone"),
)


def what_is(names: Collection[str]) -> str:
    """What a file with tensors of these names is, for people; "" where that is not known."""
    from tunekit.registry import FAMILIES

    for pattern, words in KINDS:
        if any(re.search(pattern, name) for name in names):
            return words
    titles = [family.facts.title for _, family in FAMILIES.items() if held(names, family.facts)]
    if len(titles) == 1:
        return f"a {titles[0]} model"
    for pattern, words in PARTS:
        if any(re.search(pattern, name) for name in names):
            return words
    return ""


DENOISER = ("model.diffusion_model.", "diffusion_model.", "")
"""What stands before the names of a denoiser's tensors; the first where the file is of a whole model."""


def held(names: Collection[str], facts: FamilyFacts) -> dict[str, str]:
    """Networks of a family that a file with tensors of these names has, each with its prefix there."""
    found = {}
    for part in facts.components:
        if part.role == "denoiser" and part.marks:
            for prefix in DENOISER:
                if all(prefix + mark in names for mark in part.marks):
                    found[part.name] = prefix
                    break
        elif part.published and any(name.startswith(part.published) for name in names):
            found[part.name] = part.published
    return found if facts.denoiser_name in found else {}


def is_of(names: Collection[str], facts: FamilyFacts) -> bool:
    """Whether a file with tensors of these names has all networks of a family."""
    found = held(names, facts)
    return all(part.name in found for part in facts.components if part.role != "scheduler")


# Names ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a network lies in such a file: its name there, and what of that tensor it is."""

    name: str
    rows: tuple[int, int] | None = None
    swapped: bool = False
    transposed: bool = False
    flat: tuple[int, ...] = ()
    """The shape of what lies there as one row."""
    pixel: bool = False
    """Whether the matrix lies there as a convolution of one pixel."""


def _places(part: Component, network: nn.Module) -> dict[str, _Place]:
    """A network's own names -> where each tensor lies, behind the prefix."""
    own = list(network.state_dict())
    if part.role == "denoiser":
        return _denoiser_places(part, network.state_dict())
    if part.role == "vae":
        levels = len(network.decoder.up_blocks)  # type: ignore[union-attr, arg-type]
        return {name: _vae_place(name, levels) for name in own}
    if part.published.endswith(OPEN_CLIP):
        return {name: _open_clip_place(name, value) for name, value in network.state_dict().items()}
    # transformers 5 leaves the level out, and no file does.
    return {name: _Place(_with_level(name)) for name in own}


def _denoiser_places(part: Component, own: Mapping[str, Tensor]) -> dict[str, _Place]:
    if part.layers is None:
        return {name: _Place(name) for name in own}
    modules = dict.fromkeys(name.rpartition(".")[0] for name in own)
    layers: dict[str, Published] = {}
    for layer in (*part.layers(list(own)), *part.layers(list(modules))):
        if layer.parts != (layer.name,):
            layers |= dict.fromkeys(layer.parts, layer)
    places = {}
    for name in own:
        path, _, leaf = name.rpartition(".")
        if path in layers:
            whole = layers[path]
            sizes = [len(own[f"{module}.{leaf}"]) for module in whole.parts]
            at = whole.parts.index(path)
            first = sum(sizes[:at])
            rows = (first, first + sizes[at]) if len(sizes) > 1 else None
            places[name] = _Place(f"{whole.name}.{leaf}", rows, swapped=whole.swapped)
        else:
            there = layers[name].name if name in layers else name
            flat = tuple(own[name].shape) if part.flat and re.fullmatch(part.flat, there) else ()
            places[name] = _Place(there, flat=flat)
    return places


def _with_level(name: str) -> str:
    return name if name.startswith((TEXT_LEVEL, "text_projection")) else TEXT_LEVEL + name


_VAE = (
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.", ".mid.attn_1."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".down_blocks.", ".down."),
    (".resnets.", ".block."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
)
_VAE_ATTENTION = (
    (".group_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
)


def _vae_place(name: str, levels: int) -> _Place:
    attention = ".attentions." in name
    for ours, theirs in (*_VAE, *(_VAE_ATTENTION if attention else ())):
        name = name.replace(ours, theirs)
    # Levels of the decoder are counted from the other end.
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)
    return _Place(name, pixel=attention and ".norm." not in name and name.endswith(".weight"))


_OPEN_CLIP = (
    ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers.", "transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    ("final_layer_norm.", "ln_final."),
)


def _open_clip_place(name: str, own: Tensor) -> _Place:
    name = name.removeprefix(TEXT_LEVEL)
    if name == "text_projection.weight":
        return _Place("text_projection", transposed=True)
    third = re.search(r"\.self_attn\.([qkv])_proj\.(weight|bias)$", name)
    if third:
        name = f"{name[: third.start()]}.attn.in_proj_{third[2]}"
    for ours, theirs in _OPEN_CLIP:
        name = name.replace(ours, theirs)
    if third is None:
        return _Place(name)
    at = "qkv".index(third[1]) * len(own)
    return _Place(name, rows=(at, at + len(own)))


def _left_out(part: Component, network: nn.Module) -> str:
    """The last of OpenCLIP's layers, which a text encoder of Stable Diffusion 2 does without."""
    if not part.published.endswith(OPEN_CLIP) or "WithProjection" in part.classes:
        return "\0"
    return f"transformer.resblocks.{network.config.num_hidden_layers}."  # type: ignore[union-attr]


# Reading ----------------------------------------------------------------------------------------------------


def spread(
    found: Mapping[str, Entry],
    parts: Sequence[tuple[Component, str, nn.Module]],
    *,
    where: str,
    whole: bool = True,
) -> tuple[dict[str, dict[str, Entry]], list[ModelError]]:
    """Spreads the tensors of such a file over the networks.

    Args:
        found: the tensors by name.
        parts: networks that are read from it, each with its prefix there.
        where: the file, for messages.
        whole: whether nothing else may lie there; other networks do, where they are read from another place.

    Returns:
        Component -> tensors by the network's own names, or by what stands in the file where they have none
        (`weights.fitted` says what to make of these); and what is wrong: tensors that belong to none.
    """
    made: dict[str, dict[str, Entry]] = {}
    taken: set[str] = set()
    for part, prefix, network in sorted(parts, key=lambda row: -len(row[1])):
        inside = {
            name.removeprefix(prefix): entry
            for name, entry in found.items()
            if name.startswith(prefix) and name not in taken
        }
        places = _places(part, network)
        rows = {place.name: 0 for place in places.values()}
        for place in places.values():
            rows[place.name] = max(rows[place.name], place.rows[1] if place.rows else 0)
        own, used = {}, set()
        for name, place in places.items():
            entry = inside.get(place.name)
            if entry is None:
                continue
            if place.rows is not None and entry.shape[:1] == (rows[place.name],):
                entry = entry.part(*place.rows)
            if place.swapped:
                entry = entry.exchanged()
            if place.flat:
                entry = entry.shaped(place.flat)
            own[name] = entry.turned() if place.transposed and len(entry.shape) == 2 else entry
            used.add(place.name)
        skipped = _left_out(part, network)
        rest = {
            name: entry
            for name, entry in inside.items()
            if name not in used
            and not name.startswith(skipped)
            and not UNREAD.match(prefix + name)
            and not (part.unread and re.fullmatch(part.unread, name))
        }
        made[part.name] = {**rest, **own}
        taken |= {prefix + name for name in inside}
    others = [
        name
        for name in found
        if name not in taken and not UNREAD.match(name) and (whole or not OTHERS.match(name))
    ]
    if not others:
        return made, []
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    text = f"no part of the model reads {', '.join(others[:3])}{more}"
    return made, [ModelError(text, where=where, hint="use a version of the file without them")]


def schedule(found: Mapping[str, Entry], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What such a file says of its noise schedule: keys of the scheduler that differ from the usual base."""
    said = metadata.get("modelspec.prediction_type", "").lower()
    if V_PRED in found or said in ("v", "v_prediction"):
        changes: dict[str, Any] = {"prediction_type": "v_prediction"}
        if ZERO_SNR in found:
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return changes
    if said in ("epsilon", "eps") or metadata.get("modelspec.architecture", "").endswith("v2-512"):
        return {"prediction_type": "epsilon"}
    return {}


def metadata_of(file: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file; empty for a file of another kind."""
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def clip_tokenizer(part: Component) -> Any:
    """The tokenizer of a CLIP text encoder, which such a file does not hold.

    All have one vocabulary; OpenCLIP's encoders were trained with "!" behind the text.
    """
    from transformers import CLIPTokenizer

    merges = gzip.decompress((ASSETS / "clip" / "merges.txt.gz").read_bytes()).decode().splitlines()
    letters = sorted(tiny.byte_letters())  # the visible ones first, as CLIP numbers them
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(merge.split()) for merge in merges]
    special = {
        "bos_token": tiny.START,
        "eos_token": tiny.END,
        "unk_token": tiny.END,
        "pad_token": "!" if part.published.endswith(OPEN_CLIP) else tiny.END,
    }
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {word: index for index, word in enumerate([*words, tiny.START, tiny.END])}
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": part.tokens, **special}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)


# Writing ----------------------------------------------------------------------------------------------------


def save_single_file(
    pipeline: Pipeline,
    file: Path,
    facts: FamilyFacts,
    dtypes: Mapping[str, torch.dtype],
    *,
    title: str = "",
) -> None:
    """Writes a model into one file that AUTOMATIC1111, ComfyUI and diffusers read.

    Of a family that was published as a file of its denoiser alone, such a file: ComfyUI's "diffusion model".

    OpenCLIP's last layer, which Stable Diffusion 2 does not use and other programs ask for, is a copy of the
    one before.

    Args:
        pipeline: of floats.
        file: to write.
        facts: the family's.
        dtypes: component -> type that its weights are written in.
        title: for people, in the file's header.

    Raises:
        ModelError: a family that was not published so, or a model whose layers are pruned or packed.
        OutputError: it cannot be written.
    """
    parts = [part for part in facts.components if part.role != "scheduler"]
    whole = all(part.published for part in parts)
    if not whole:
        parts = [facts.denoiser]
    if not parts[0].published:
        raise ModelError(f"{facts.title} has no layout of a single file")
    if layers.describe(getattr(pipeline, facts.denoiser_name)) is not None:
        raise ModelError(
            "a model with pruned or packed layers does not go into a single file: no other program reads it",
            hint="write the file before these steps",
        )
    state: dict[str, Tensor] = {}
    for part in parts:
        network = getattr(pipeline, part.name)
        rows = _published(part, network) if part.role == "denoiser" else published(part, network).items()
        for name, value in rows:  # one after the other: the whole is not there twice
            own = name if whole else name.removeprefix(part.published)
            state[own] = value.to("cpu", dtypes[part.name]).contiguous()
    metadata = {"format": "pt", **_modelspec(pipeline, facts, title)}
    if whole and "xl" in facts.modelspec_architecture and metadata["modelspec.prediction_type"] == "v":
        state[V_PRED] = torch.tensor([])
        if pipeline.scheduler.config.get("rescale_betas_zero_snr"):
            state[ZERO_SNR] = torch.tensor([])
    with output_errors(file):
        safetensors.torch.save_file(state, file, metadata=metadata)


def _modelspec(pipeline: Pipeline, facts: FamilyFacts, title: str) -> dict[str, str]:
    """What the header says of the model, in the words of modelspec 1.0.1."""
    architecture = facts.modelspec_architecture
    said = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.title": title or facts.title,
    }
    prediction = pipeline.scheduler.config.get("prediction_type")
    if prediction is None:  # flow matching
        return said
    if prediction != "v_prediction":
        said["modelspec.architecture"] = architecture.replace("v2-768-v", "v2-512")
    return said | {
        "modelspec.implementation": "sgm" if "xl" in architecture else "sd",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
    }


def published(part: Component, network: nn.Module) -> dict[str, Tensor]:
    """A network's tensors by their names in a single file, with the prefix; views, where they can be."""
    made = dict(_published(part, network))
    return made | _filled(part, network, made)


def _published(part: Component, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    values = network.state_dict()
    together: dict[str, list[tuple[_Place, Tensor]]] = {}
    for name, place in _places(part, network).items():
        together.setdefault(place.name, []).append((place, values[name].detach()))
    for name, pieces in together.items():
        place, value = pieces[0]
        if place.rows is not None:
            in_order = sorted(pieces, key=lambda piece: piece[0].rows or (0, 0))
            value = torch.cat([piece for _, piece in in_order])
        if place.swapped:
            value = torch.cat(value.chunk(2)[::-1])
        if place.flat:
            value = value.flatten()
        if place.transposed:
            value = value.t()
        yield part.published + name, value[..., None, None] if place.pixel else value


def _filled(part: Component, network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an OpenCLIP encoder has beyond what is used of it."""
    last = _left_out(part, network)
    if last == "\0":
        return {}
    index = int(last.split(".")[2])
    before = f"{part.published}transformer.resblocks.{index - 1}."
    made = {
        part.published + last + name.removeprefix(before): value.clone()
        for name, value in state.items()
        if name.startswith(before)
    }
    norm = state[f"{part.published}ln_final.weight"]
    made[f"{part.published}text_projection"] = torch.eye(len(norm), dtype=norm.dtype, device=norm.device)
    return made
