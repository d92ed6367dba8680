"""Weights as they lie in files: what is there, whether it is what a network needs, and reading it.

One comparison serves all: a folder, its shards, a single checkpoint, packed layers and pickles all become
entries, which are held against the network before one weight is read. What is read is what was compared.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tunekit import layers, records
from tunekit.errors import ModelError
from tunekit.families import gguf_files

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHTS = ("model", "pytorch_model", "diffusion_pytorch_model")
PICKLE_REFUSED = "weights in a pickle are refused: a pickle can run any program while it is opened"
PICKLE_HINT = "use the .safetensors version, or set model.allow_pickle: true if you trust whoever made it"
TEXT_LEVEL = "text_model."
DAMAGED = "it is damaged, or of another program: take it from the original model"
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
HARMLESS = (r"(^|\.)position_ids$", r"(^|\.)logit_scale$", r"^text_projection(\.weight)?$")
"""Of CLIP: counted up, or used by its picture half alone; a text encoder that has such a layer reads it."""
FORMER = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."))
"""Parts of names of attention layers, now and in the files of 2022."""


def read_json(file: Path) -> dict[str, Any]:
    """Reads a configuration file.

    Raises:
        ModelError: it cannot be read, or it is no JSON object.
    """
    try:
        # Not as strictly as our own: tokenizers say "no limit" with a number of 31 digits.
        content = json.loads(records.read_bytes(file, error=ModelError).decode("utf-8"))
    except FileNotFoundError as error:
        raise ModelError("is missing", where=str(file)) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"not JSON: {error}", where=str(file), hint=DAMAGED) from error
    if not isinstance(content, dict):
        raise ModelError(
            f"holds a {type(content).__name__} where settings by name are expected",
            where=str(file),
            hint=DAMAGED,
        )
    return content


# Which files ------------------------------------------------------------------------------------------------


def variants(folder: Path) -> set[str]:
    """The variants in which a component's weights are there, such as "fp16"; "" stands for the plain ones."""
    stems = "|".join(WEIGHTS)
    one = re.compile(rf"({stems})(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.safetensors")
    index = re.compile(rf"({stems})\.safetensors\.index(?:\.([\w-]+))?\.json")
    if not folder.is_dir():
        return set()
    matches = (one.fullmatch(file.name) or index.fullmatch(file.name) for file in folder.iterdir())
    return {match[2] or "" for match in matches if match}


def weight_files(folder: Path, variant: str | None = None, *, allow_pickle: bool = False) -> tuple[Path, ...]:
    """The files that one component's weights are read from, its shards in order; empty if it has none.

    Args:
        folder: of the component.
        variant: such as "fp16"; where no file has it, the plain ones are taken, as diffusers does. Where
            none is named and the files are there in one variant alone, that is taken.
        allow_pickle: take pickles where there is no safetensors file.

    Raises:
        ModelError: an index that is damaged, or names a file outside, absent or refused.
    """
    there = variants(folder)
    only = next(iter(there)) if len(there) == 1 else ""
    for choice in dict.fromkeys((variant or "", "", only)):
        found = _files(folder, choice, ".safetensors", allow_pickle)
        if found:
            return found
    for choice in dict.fromkeys((variant or "", "")) if allow_pickle else ():
        found = _files(folder, choice, ".bin", allow_pickle)
        if found:
            return found
    return ()


def _files(folder: Path, variant: str, suffix: str, allow_pickle: bool) -> tuple[Path, ...]:
    infix = f".{variant}" if variant else ""
    for stem in WEIGHTS:
        index = folder / f"{stem}{suffix}.index{infix}.json"
        if index.is_file():
            return _shards(index, allow_pickle)
        file = folder / f"{stem}{infix}{suffix}"
        if file.is_file():
            return (file,)
    return ()


def _shards(index: Path, allow_pickle: bool) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ModelError('has no "weight_map" of tensors and files', where=str(index))
    shards = []
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise ModelError(f'names "{name}", which is not a file beside it', where=str(index))
        if not name.endswith(".safetensors") and not (allow_pickle and name.endswith(PICKLES)):
            raise ModelError(f'names "{name}": {PICKLE_REFUSED}', where=str(index), hint=PICKLE_HINT)
        if not (index.parent / name).is_file():
            raise ModelError(f'names "{name}", which is not there', where=str(index))
        shards.append(index.parent / name)
    return tuple(shards)


# What they hold ---------------------------------------------------------------------------------------------


Get = Callable[[str, tuple[int, int] | None], Tensor]
"""A tensor's name in a file, and its rows that are wanted (None: all) -> their values."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file, or a part of it.

    Attributes:
        file: where it lies.
        name: what it is called there.
        dtype: as safetensors says it: "F32", "F16", "I8"; of a GGUF file its own name: "Q4_K".
        shape: of what is taken.
        rows: the first and the one behind the last that are taken: what a network has as layers of their own
            may lie side by side in one tensor.
        swapped: whether its two halves of rows are exchanged.
        transposed: whether rows and columns are exchanged.
        scale: what it is multiplied by: one number, or one for each row of the whole.
        held: the tensor itself, where its file was a pickle.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    swapped: bool = False
    transposed: bool = False
    scale: Entry | None = None
    held: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def is_float(self) -> bool:
        """Whether it is read as floating numbers."""
        return self.dtype in FLOATS or self.file.suffix == gguf_files.SUFFIX

    def part(self, first: int, end: int) -> Entry:
        """Some of its rows."""
        return replace(self, rows=(first, end), shape=(end - first, *self.shape[1:]))

    def exchanged(self) -> Entry:
        """The second half of its rows before the first."""
        return replace(self, swapped=True)

    def shaped(self, shape: tuple[int, ...]) -> Entry:
        """A row as a tensor of that shape, which whoever reads it gives it, if it has as many numbers."""
        fits = len(self.shape) == 1 and math.prod(shape) == self.shape[0]
        return replace(self, shape=shape) if fits else self

    def turned(self) -> Entry:
        """Rows as columns."""
        return replace(self, transposed=True, shape=tuple(reversed(self.shape)))

    def taken(self, get: Get) -> Tensor:
        """What is taken of the stored tensor.

        Args:
            get: reads some rows of a tensor of the file, or all.
        """
        value, scale = self._stored(get)
        if scale is not None:
            value = value.float() * scale
        return value.t().contiguous() if self.transposed else value

    @property
    def is_packed(self) -> bool:
        """Whether it is a matrix that lies there as `layers` pack one in fp8."""
        return FLOATS.get(self.dtype) == layers.FP8 and len(self.shape) == 2 and not self.transposed

    def packed(self, get: Get) -> tuple[Tensor, Tensor]:
        """Of a tensor that `is_packed`: its values as they are stored, and a scale for each row, float32."""
        value, scale = self._stored(get)
        scale = torch.ones(()) if scale is None else scale
        return value, scale.expand(len(value), 1).contiguous()

    def _stored(self, get: Get) -> tuple[Tensor, Tensor | None]:
        """Values, and what they are multiplied by: one number, or one for each row; None where nothing is."""

        def ordered(rows: Tensor) -> Tensor:
            return torch.cat(rows.chunk(2)[::-1]) if self.swapped else rows

        value = get(self.name, self.rows)
        if self.scale is None:
            return ordered(value), None
        scale = get(self.scale.name, None).float()
        if scale.numel() == 1:
            return ordered(value), scale.reshape(())
        scale = scale.reshape(-1, *[1] * (value.dim() - 1))
        return ordered(value), ordered(scale[slice(*self.rows)] if self.rows else scale)


def entries(files: Iterable[Path], *, allow_pickle: bool = False) -> dict[str, Entry]:
    """Every tensor in some files, by name. Of safetensors files the headers alone are read.

    Raises:
        ModelError: a file that is refused, damaged or of another kind, or a tensor in two files.
    """
    found: dict[str, Entry] = {}
    for file in files:
        if file.suffix in PICKLES:
            listed = _pickled(file, allow_pickle)
        elif file.suffix == gguf_files.SUFFIX:
            listed = _in_gguf(file)
        else:
            listed = _listed(file)
        twice = next((name for name in listed if name in found), None)
        if twice is not None:
            raise ModelError(f"{twice} is in {found[twice].file.name} and in {file.name}", where=str(file))
        found |= listed
    return found


def _listed(file: Path) -> dict[str, Entry]:
    listed = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(name)
                listed[name] = Entry(file, name, part.get_dtype(), tuple(part.get_shape()))
    except Exception as error:  # SafetensorError, OSError, and what its native code raises
        raise ModelError(
            f"cannot be read as safetensors: {' '.join(str(error).split())[:200]}",
            where=str(file),
            hint="the file is cut, damaged or of another kind: load it again from where it came",
        ) from error
    return listed


def _in_gguf(file: Path) -> dict[str, Entry]:
    header = gguf_files.header(file)
    types = gguf_files.type_names(file, header)
    return {name: Entry(file, name, types[name], stored.shape) for name, stored in header.tensors.items()}


def _pickled(file: Path, allow_pickle: bool) -> dict[str, Entry]:
    if not allow_pickle:
        raise ModelError(PICKLE_REFUSED, where=str(file), hint=PICKLE_HINT)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and zip raise many kinds
        raise ModelError(
            f"cannot be read as weights: {' '.join(str(error).split())[:200]}", where=str(file)
        ) from error
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ModelError("holds no weights by name", where=str(file))
    kinds = {dtype: name for name, dtype in FLOATS.items()}
    return {
        str(name): Entry(
            file, str(name), kinds.get(value.dtype, str(value.dtype)), tuple(value.shape), held=value
        )
        for name, value in content.items()
        if isinstance(value, Tensor)
    }


SCALES = (".scale_weight", ".weight_scale")
"""How the names of numbers end that a layer's weights are multiplied by, as ComfyUI writes 8-bit floats."""
UNUSED = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
"""Beside them: what 8-bit arithmetic needs, and marks."""
FORMATS = ("float8_e4m3fn", "float8_e5m2")
"""What marks may say that weights are in, which are read as floats times a scale."""


def scaled(found: Mapping[str, Entry], *, where: Path) -> tuple[dict[str, Entry], list[ModelError]]:
    """Puts the scales of 8-bit weights to their tensors, and leaves out what only arithmetic needs.

    Returns:
        Tensors by name; and what is wrong: other formats, scales of no weight or of another shape.
    """
    made = {name: entry for name, entry in found.items() if not name.endswith((*SCALES, *UNUSED))}
    wrong = []
    for name, scale in found.items():
        ending = next((ending for ending in SCALES if name.endswith(ending)), None)
        if ending is None:
            continue
        weight = made.get(f"{name.removesuffix(ending)}.weight")
        sizes = {(), (1,), (1, 1), *([weight.shape[:1], (*weight.shape[:1], 1)] if weight else [])}
        if weight is None or scale.shape not in sizes or not scale.is_float:
            of = f"a scale of no weight: {name.removesuffix(ending)}.weight is not there"
            wrong.append(f"{name} is {list(scale.shape)} of {scale.dtype}" if weight else f"{name} is {of}")
            continue
        made[f"{name.removesuffix(ending)}.weight"] = replace(weight, scale=scale)
    formats = {kind: name for name, kind in _formats(found, where).items() if kind not in FORMATS}
    wrong += [f"{name} is in {kind}" for kind, name in sorted(formats.items())]
    if not wrong:
        return made, []
    hint = (
        f"weights in {' or '.join(FORMATS)} with one scale, or one for each row, are read; or take bf16, fp16"
    )
    return made, [ModelError(_named(wrong), where=str(where), hint=hint)]


def _formats(found: Mapping[str, Entry], file: Path) -> dict[str, str]:
    """Layer -> the format that marks say its weights are in."""
    marks = [entry for name, entry in found.items() if name.endswith(".comfy_quant")]
    if file.suffix != ".safetensors":
        return {}
    said: dict[str, str] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get("_quantization_metadata", "{}"))
            layers_said = {**header.get("layers", {})}
            for entry in marks:
                if math.prod(entry.shape) > 10_000:
                    raise ValueError(f"{entry.name} is {list(entry.shape)}")
                mark = bytes(opened.get_tensor(entry.name).to(torch.uint8).tolist())
                layers_said[entry.name.removesuffix(".comfy_quant")] = json.loads(mark)
            said = {layer: str(how["format"]) for layer, how in layers_said.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"what it says of its quantized layers cannot be read: {type(error).__name__}: {error}",
            where=str(file),
            hint=DAMAGED,
        ) from error
    return said


# Against the network ----------------------------------------------------------------------------------------


def fitted(
    title: str, network: nn.Module, found: Mapping[str, Entry], *, where: str
) -> tuple[dict[str, Entry], list[ModelError]]:
    """Finds each of a network's tensors among those that are there.

    Args:
        title: of the component, such as "text_encoder".
        network: may be on the meta device.
        found: what is there, by name.
        where: folder or file, for messages.

    Returns:
        Its tensors by its own names; and what is wrong: missing tensors, tensors that no layer reads, other
        shapes, whole numbers for floats. Known harmless ones are neither missing nor unread.
    """
    state = network.state_dict()
    own = _spellings(state, getattr(network, "base_model_prefix", ""))
    made = {name for name, _ in network.named_buffers() if name not in state}
    kept: dict[str, Entry] = {}
    unread, wrong = [], []
    for name, entry in found.items():
        match = own.get(name)
        if match is None or match in kept:
            if not _is_known(network, "unexpected", name) and name not in made:
                unread.append(name)
            continue
        kept[match] = entry
        needed = state[match]
        if _matrix(entry.shape) != _matrix(needed.shape):
            wrong.append(f"{entry.name} is {list(entry.shape)} and should be {list(needed.shape)}")
        elif needed.is_floating_point() and not entry.is_float:
            wrong.append(f"{entry.name} holds {entry.dtype}, where floating numbers are needed")
    tied = layers.tied(network)
    missing = [
        name
        for name in state
        if name not in kept
        and not any(other in kept for other in tied.get(name, ()))
        and not _is_known(network, "missing", name)
    ]
    kind = type(network).__name__
    said = [
        f"{words} {_named(names)}"
        for words, names in (
            ("its weights are missing", missing),
            ("no layer reads", unread),
            ("of another kind:", wrong),
        )
        if names
    ]
    if not said:
        return kept, []
    hint = (
        "tensors were renamed, or the weights belong to another model"
        if missing and unread
        else "the weights belong to another config.json, or are damaged"
    )
    return kept, [ModelError(f"{title} ({kind}): {'; '.join(said)}", where=where, hint=hint)]


def _named(items: Sequence[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


def _matrix(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a matrix for a convolution of one pixel: the same numbers, and files have either."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def _spellings(state: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    """What a network's tensors are called in files -> its own names.

    transformers 5 leaves out the level `text_model` of CLIP, which all files have; attention layers had
    other names in 2022. Files of language models have a level (`prefix`) above all that is below the head.
    """
    known = {name: name for name in state}
    for name in state:
        other = name.removeprefix(TEXT_LEVEL) if name.startswith(TEXT_LEVEL) else TEXT_LEVEL + name
        known.setdefault(other, name)
        if prefix and not name.startswith(f"{prefix}."):
            known.setdefault(f"{prefix}.{name}", name)
        for now, then in FORMER:
            if now in name:
                known.setdefault(name.replace(now, then), name)
    return known


def _is_known(network: nn.Module, what: str, name: str) -> bool:
    own = getattr(network, f"_keys_to_ignore_on_load_{what}", None) or ()
    patterns = (*own, *(HARMLESS if what == "unexpected" else ()))
    return any(re.search(pattern, name) for pattern in patterns)


def tensors(kept: Mapping[str, Entry], *, as_stored: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Reads what `fitted` found, file by file: a network's own names and the tensors.

    Args:
        as_stored: layers whose weights, where they lie there so, are given as `packed` and `scale` in fp8.
    """
    stays = set(as_stored)
    by_file: dict[Path, list[tuple[str, Entry]]] = {}
    for name, entry in kept.items():
        by_file.setdefault(entry.file, []).append((name, entry))
    for file, wanted in by_file.items():
        held = {entry.name: entry.held for _, first in wanted for entry in _with_scale(first)}
        with _reading(file, held) as get:
            for name, entry in wanted:
                layer = name.removesuffix(".weight")
                if layer in stays and entry.is_packed:
                    values, scale = entry.packed(get)
                    yield f"{layer}.packed", values
                    yield f"{layer}.scale", scale
                else:
                    yield name, entry.taken(get)


def _with_scale(entry: Entry) -> tuple[Entry, ...]:
    return (entry,) if entry.scale is None else (entry, entry.scale)


@contextmanager
def _reading(file: Path, held: Mapping[str, Tensor | None]) -> Iterator[Get]:
    """Gives what reads the tensors of a file; those of a pickle are there already."""
    if file.suffix == gguf_files.SUFFIX:
        with gguf_files.reading(file) as get:
            yield get
    elif file.suffix in PICKLES:
        yield lambda name, rows: _rows(_there(held[name]), rows)
    else:
        with safe_open(file, framework="pt") as opened:
            yield lambda name, rows: _rows(opened.get_tensor(name), rows)


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _rows(whole: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return whole if rows is None else whole[slice(*rows)]
