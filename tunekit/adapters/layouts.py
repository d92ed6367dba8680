"""The layouts of adapter files: updates by module to tensors by key, and back.

Two are written: PEFT's, and the one that ComfyUI and kohya's tools read, which names layers as their network
was published; several modules here may be one there. One reader takes these and every other that is found:
names, shapes and scales first become those of an update, then every key is checked.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from tunekit.adapters.delta import (
    KINDS,
    ColumnDora,
    Delta,
    Deltas,
    Dora,
    Full,
    Kind,
    Lora,
    State,
    lengths_of,
    peft_state,
    some,
    weight_shape,
)
from tunekit.adapters.names import (
    Modules,
    Place,
    looks_like,
    made_for,
    places_of,
    plain,
    read_key,
    written_layers,
)
from tunekit.artifacts import what_it_is
from tunekit.errors import AdapterError
from tunekit.families.family import Family, Published
from tunekit.quiet import report_warnings

ROUNDED = 1e-3
"""By how much lengths of rows differ, relatively, where a base is in 16 bits here and was not there."""
HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps alpha, as JSON

Trained = Mapping[str, Mapping[str, Kind]]
"""Component -> module path -> update that a trained adapter makes."""


# Written ----------------------------------------------------------------------------------------------------


def to_peft(deltas: Trained) -> State:
    """Lay updates out as PEFT does, with alpha / rank within `lora_B`: a reader that knows no alpha is right.

    The alpha to say beside it is the rank.
    """
    return {
        f"{component}.{key}": tensor
        for component, updates in deltas.items()
        for key, tensor in peft_state({path: d.with_alpha(d.rank) for path, d in updates.items()}).items()
    }


def to_kohya(deltas: Trained, modules: Modules, family: Family) -> State:
    """Lay updates out as ComfyUI and kohya's tools read them, under the names that the family says.

    Modules that are rows of one layer there are stacked, and what is not trained of it is left as it is.
    Kohya's keys have alpha and DoRA scale as tensors; those with dots have alpha / rank within `lora_B`.

    Raises:
        AdapterError: two layers whose names become equal; a LoRA and a DoRA in one layer.
    """
    state: State = {}
    for component, updates in deltas.items():
        part = family.facts.component(component)
        for layer in written_layers(component, modules, family):
            parts = [updates.get(path) for path in layer.parts]
            if all(delta is None for delta in parts):
                continue
            delta = _stacked(layer, parts, [modules[component][path] for path in layer.parts])
            if part.dotted:
                name = f"{part.dotted}.{layer.name}"
                tensors = delta.with_alpha(delta.rank).dotted()
            else:
                name = f"{part.kohya[0]}_{layer.name}".replace(".", "_")
                tensors = {**delta.kohya(), "alpha": torch.tensor(float(delta.alpha))}
            keys = {f"{name}.{ending}": tensor for ending, tensor in tensors.items()}
            if not state.keys().isdisjoint(keys):
                raise AdapterError(f"two layers have the name {name} in files for other programs")
            state |= keys
    return state


def _stacked(layer: Published, parts: list[Kind | None], layers: list[nn.Module]) -> Kind:
    """One update of a published layer, made of those of its modules here."""
    kinds = {type(delta) for delta in parts if delta is not None}
    if len(kinds) > 1:
        raise AdapterError(f"{layer.name} cannot be part LoRA and part DoRA: adapt all of it alike")
    delta = parts[0]
    if delta is None or len(parts) > 1:
        delta = kinds.pop().stack(parts, layers)
    return delta.rows(_halves_swapped(layers[0])) if layer.swapped else delta


def _halves_swapped(layer: nn.Module) -> Tensor:
    """The rows of a layer, the second half before the first."""
    return torch.cat(list(reversed(torch.arange(weight_shape(layer)[0]).chunk(2))))


# Read -------------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """What a file holds for one layer: field -> tensor, and the keys they stand under."""

    module: str
    """As the first of its keys spells it."""
    tensors: State = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def parse(
    state: Mapping[str, Tensor],
    header: Mapping[str, str],
    modules: Modules,
    family: Family,
    where: str,
    config: Mapping[str, Any] | None = None,
) -> Deltas:
    """Read tensors by key, in any layout, and check every one against its module.

    Args:
        state: what the file holds.
        header: its metadata.
        modules: all that can be changed, see `changeable`.
        family: of the model.
        where: the file, for messages.
        config: the adapter_config.json that lies beside it, if any.

    Raises:
        AdapterError: keys that name no module, or are of a method that is none of these; tensors that do not
            fit, are not finite or no floats; settings that are none.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    made, here = made_for(header) or family.facts, family.facts
    said = f"its header says that it was made for {made.title}, and this is {here.title}" * (made is not here)
    try:
        read = _parse(state, header, modules, family, config)
    except AdapterError as error:
        hint = error.hint
        if hint == _OTHER_BASE and not said and (looks := looks_like(shapes, here)):
            hint = f"{hint}; it looks like {looks}"
        raise AdapterError(error.message, where=where, hint=said or hint) from error
    if said:
        raise AdapterError(said, where=where, hint="use it with a base of its own family")
    return read


def _parse(
    state: Mapping[str, Tensor],
    header: Mapping[str, str],
    modules: Modules,
    family: Family,
    config: Mapping[str, Any] | None,
) -> Deltas:
    if not any(read_key(key) for key in state):
        raise AdapterError(
            f"no LoRA or DoRA adapter: it holds {_described(state)}",
            hint=None if not state else "LoRA and DoRA files of any program are read, and whole differences",
        )
    groups, unread = _grouped(state, modules, family)
    if unread:
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        _refuse_or_tell(unread, bool(groups), shapes, modules, family)
    settings = _Settings.read(header, config, list(modules))
    found: Deltas = {}
    zeros = []
    for place, group in groups.items():
        own = modules[place.component]
        layers = [own[path] for path in place.parts]
        alpha = settings.alpha(place.component, group.module if len(layers) > 1 else place.parts[0], group)
        if alpha == 0:
            zeros.append(group.keys["alpha"])
        delta = _delta(str(place), group, _as_filed(layers), alpha or None)
        updates = found.setdefault(place.component, {})
        for path, part in _parts(place, layers, delta):
            if path in updates:
                raise AdapterError(
                    f"{place.component}.{path} has an update of its own and one within {group.module}"
                )
            updates[path] = part
    found = {component: updates for component, updates in found.items() if updates}
    for component, updates in found.items():
        settings.check_kinds(component, updates)
    if not found:
        raise AdapterError("it changes nothing: all of its differences are zero")
    if zeros:
        said = f"alpha is 0 in {len(zeros)} modules of the adapter ({some(zeros)})"
        report_warnings([f"{said}: taken for the rank, as kohya's tools mean it"])
    return found


def _described(state: Mapping[str, Any]) -> str:
    if not state:
        return "nothing"
    kind = what_it_is(state)
    return f"{kind} ({some(sorted(state))})" if kind else some(sorted(state))


def _grouped(
    state: Mapping[str, Tensor], modules: Modules, family: Family
) -> tuple[dict[Place, _Group], list[str]]:
    """Sort tensors by the layer they name; the second are the keys that name none."""
    places = places_of(modules, family)
    groups: dict[Place, _Group] = {}
    unread, labels = [], set()
    for key, tensor in state.items():
        said = read_key(key)
        place = places.get(plain(said.module)) if said else None
        if said is None or place is None:
            unread.append(key)
            continue
        if said.label:
            labels.add(said.label)
        group = groups.setdefault(place, _Group(said.module))
        if said.field in group.tensors:
            if len(labels) > 1:
                break
            raise AdapterError(f"{group.keys[said.field]} and {key} are the same tensor of {place}")
        group.tensors[said.field] = tensor
        group.keys[said.field] = key
    if len(labels) > 1:
        raise AdapterError(
            f"it holds several adapters: {', '.join(sorted(labels))}", hint="save each in a file of its own"
        )
    return groups, unread


def _refuse_or_tell(
    unread: list[str],
    others: bool,
    shapes: Mapping[str, tuple[int, ...]],
    modules: Modules,
    family: Family,
) -> None:
    """What is of no update of this model is refused if it would change pictures, else named in the log."""
    unread.sort()
    kind = what_it_is(unread)
    if kind and not kind.startswith("a textual inversion"):
        raise AdapterError(
            f"{len(unread)} of its keys are of {kind}, which cannot be read: {some(unread)}",
            hint="without them the rest would draw something else",
        )
    updates = [key for key in unread if read_key(key)]
    if updates:
        looks = looks_like(shapes, family.facts)
        what = f" (it looks like {looks})" if looks else ""
        raise AdapterError(
            f"{len(updates)} of its keys name nothing in {family.facts.title}: {some(updates)}",
            hint=f"it was made for another model family{what}, or for a base of another size",
        )
    places = places_of(modules, family)
    whole = [key for key in unread if ".modules_to_save." in key or plain(key.rpartition(".")[0]) in places]
    if whole or not others:
        raise AdapterError(
            f"{len(unread)} of its keys are of no method that can be read: {some(unread)}",
            hint="whole weights beside an adapter (modules_to_save) are not supported" if whole else None,
        )
    what = f" ({kind}, which is no part of the model)" if kind else ""
    report_warnings([f"{len(unread)} of the adapter's keys are left out{what}: {some(unread)}"])


# One layer --------------------------------------------------------------------------------------------------


def _as_filed(layers: Sequence[nn.Module]) -> nn.Module:
    """The layer that a file's tensors have to fit: a module, or without data one of the rows of several."""
    if len(layers) == 1:
        return layers[0]
    rows, inside = sum(weight_shape(layer)[0] for layer in layers), weight_shape(layers[0])[1]
    return nn.Linear(inside, rows, bias=getattr(layers[0], "bias", None) is not None, device="meta")


def _parts(place: Place, layers: Sequence[nn.Module], delta: Delta | None) -> list[tuple[str, Delta]]:
    """What an update changes in each module that its layer is made of, but for those that it leaves."""
    if delta is None:
        return []
    if place.swapped:
        delta = delta.rows(_halves_swapped(layers[0]))
    if len(layers) == 1:
        return [(place.parts[0], delta)]
    if isinstance(delta, ColumnDora):
        raise AdapterError(
            f"{place}: its DoRA has the lengths of columns, of rows that are several modules here",
            hint="such a file cannot be split: merge it into the model in the program that made it",
        )
    parts = delta.split([weight_shape(layer)[0] for layer in layers])
    return [
        (path, _with_a_rank(part))
        for path, layer, part in zip(place.parts, layers, parts, strict=True)
        if not _is_left_alone(part, layer)
    ]


def _is_left_alone(delta: Delta, layer: nn.Module) -> bool:
    """Whether what was cut out of a stack is nothing: no ranks, no bias, lengths that the weight has."""
    if not isinstance(delta, Lora) or delta.rank or delta.bias is not None:
        return False
    return not isinstance(delta, Dora) or torch.allclose(
        delta.magnitude.float(), lengths_of(layer).to(delta.magnitude.device), rtol=ROUNDED
    )


def _with_a_rank(delta: Delta) -> Delta:
    """An update that has lengths or a bias alone, with one rank of zeros."""
    if not isinstance(delta, Lora) or delta.rank:
        return delta
    down = delta.down.new_zeros(1, *delta.down.shape[1:])
    return dataclasses.replace(delta, down=down, up=delta.up.new_zeros(len(delta.up), 1), alpha=1.0)


def _delta(where: str, group: _Group, layer: nn.Module, alpha: float | None) -> Delta | None:
    """Make an update of what a file holds for one module; None of differences that are zero.

    Args:
        alpha: the strength; None is the rank.
    """
    tensors = {name: _floats(group.keys[name], tensor) for name, tensor in group.tensors.items()}
    tensors.pop("alpha", None)
    bias = tensors.pop("bias", None)
    up_bias = tensors.pop("up_bias", None)
    delta: Delta
    if up_bias is None and (tensors.keys() == {"weight"} or (not tensors and bias is not None)):
        delta = Full(tensors.get("weight"))
    else:
        low = _low_rank(where, group, tensors, layer, alpha)
        if up_bias is not None:  # scaled as the update is
            scaled = up_bias.float() * (low.alpha / low.rank)
            bias = scaled if bias is None else bias.float() + scaled
        delta = low
    delta = _fitted(where, delta, layer)
    if bias is not None:
        delta = _with_bias(where, delta, bias, layer)
    if not delta.bound <= torch.finfo(torch.float32).max:
        raise AdapterError(f"{where}: its update overflows", hint="its training diverged, or it is damaged")
    if isinstance(delta, Full) and delta.weight is None and delta.bias is None:
        return None
    return delta


def _low_rank(where: str, group: _Group, tensors: State, layer: nn.Module, alpha: float | None) -> Lora:
    """Make the kind of update that has just these tensors."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise AdapterError(f"{where} is a {type(layer).__name__}, and its update is that of a matrix")
    for name in ("down", "up"):
        if name not in tensors:
            held = some(sorted(group.keys.values()))
            raise AdapterError(
                f"{where} has no {Lora.peft_names[name]} ({Lora.kohya_names[name]}): there is {held}",
                hint="the file is incomplete",
            )
        if tensors[name].ndim < 2 or not tensors[name].numel():
            shape = list(tensors[name].shape)
            raise AdapterError(f"{group.keys[name]} has shape {shape}: that is no matrix")
    if "weight" in tensors:
        raise AdapterError(
            f"{where} has an update and a whole difference: {some(sorted(group.keys.values()))}"
        )
    if "mid" in tensors:
        rank = len(tensors["down"])  # which alpha is said for
        tensors = _without_mid(where, tensors)
        alpha = (rank if alpha is None else alpha) / rank * len(tensors["down"])
    kinds = {frozenset(kind.peft_names): kind for kind in KINDS.values()}
    kind: type[Lora] = kinds[frozenset(tensors)]
    if kind is Dora:
        kind, tensors["magnitude"] = _magnitude(where, group, tensors["magnitude"], layer)
    return kind.read(tensors, alpha)


def _without_mid(where: str, tensors: State) -> State:
    """Fold the kernel of a Tucker decomposition [r, r', k, k] into `down` [r', in, 1, 1]: [r, in, k, k]."""
    rest = dict(tensors)
    mid, down, up = rest.pop("mid").float(), tensors["down"].float(), tensors["up"]
    if mid.ndim != 4 or mid.shape[:2] != (up.shape[1], down.shape[0]) or down[0].numel() != down.shape[1]:
        shapes = ", ".join(str(list(tensors[name].shape)) for name in ("down", "mid", "up"))
        raise AdapterError(f"{where}: its lora_down, lora_mid and lora_up do not fit together: {shapes}")
    return {**rest, "down": torch.einsum("urkl,ri->uikl", mid, down.flatten(1))}


def _magnitude(where: str, group: _Group, lengths: Tensor, layer: nn.Module) -> tuple[type[Dora], Tensor]:
    """Tell the axis of DoRA's lengths by their shape: rows [out], [out, 1, ...] or columns [1, in, ...]."""
    out, inside = weight_shape(layer)[:2]
    shape = tuple(lengths.shape)
    rows = shape == (out, *[1] * (len(shape) - 1)) and bool(shape)
    columns = len(shape) > 1 and shape == (1, inside, *[1] * (len(shape) - 2))
    of_peft = "magnitude_vector" in group.keys["magnitude"]
    if of_peft and len(shape) == 4 and shape == (1, out, 1, 1):  # peft says rows so, of a convolution
        rows = True
    if not rows and not columns:
        raise AdapterError(
            f"{where}: {group.keys['magnitude']} is {list(shape)}, this model needs [{out}] or [1, {inside}]",
            hint=_OTHER_BASE,
        )
    return (Dora if rows else ColumnDora), lengths.flatten()


def _fitted(where: str, delta: Delta, layer: nn.Module) -> Delta:
    """Give an update the shapes of its module: a 1x1 convolution may lie as a matrix, and a matrix as one."""
    fields = {}
    for name, shape in delta.shapes(layer).items():
        tensor = getattr(delta, name)
        if _without_ones(tensor.shape) != _without_ones(shape):
            ending = getattr(delta, "peft_names", {}).get(name, name)
            raise AdapterError(
                f"{where}: its {ending} is {list(tensor.shape)}, this model needs {list(shape)}",
                hint=_OTHER_BASE,
            )
        fields[name] = tensor.reshape(shape)
    return dataclasses.replace(delta, **fields)


def _with_bias(where: str, delta: Delta, bias: Tensor, layer: Any) -> Delta:
    own = getattr(layer, "bias", None)
    if own is None:
        if bias.any():
            raise AdapterError(
                f"{where} has no bias to which its difference could be added",
                hint="save the adapter without biases",
            )
        return delta
    if _without_ones(bias.shape) != _without_ones(own.shape):
        raise AdapterError(
            f"{where}: its bias is {list(bias.shape)}, this model needs {list(own.shape)}", hint=_OTHER_BASE
        )
    return dataclasses.replace(delta, bias=bias.reshape(own.shape))


def _without_ones(shape: Any) -> tuple[int, ...]:
    """A shape without the ones that stand at its end."""
    sizes = list(shape)
    while len(sizes) > 1 and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _floats(key: str, tensor: Tensor) -> Tensor:
    """A tensor as it can be computed with: types of 8 bits and less become float32.

    Raises:
        AdapterError: whole numbers (but for alpha, which is a figure), NaN or infinity.
    """
    whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    if not tensor.is_floating_point() and not (whole and key.endswith(".alpha")):
        raise AdapterError(
            f"tensor {key} is of type {str(tensor.dtype).removeprefix('torch.')}, and weights are floats",
            hint="it is quantized, or damaged: take the original of the file",
        )
    try:
        found = tensor.float() if tensor.element_size() == 1 or whole else tensor
        finite = bool(torch.isfinite(found).all())
    except (RuntimeError, NotImplementedError) as error:
        raise AdapterError(f"tensor {key} is of type {tensor.dtype}, which cannot be read") from error
    if not finite:
        raise AdapterError(f"tensor {key} holds NaN or infinity", hint="its training diverged")
    return found


_OTHER_BASE = "the adapter was made for another base (another version, or before pruning)"


# Settings ---------------------------------------------------------------------------------------------------

# What peft does to the base when it begins; a file of such an adapter is not one of the plain base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
TIME = 10.0
"""Seconds for all patterns of a file: a regular expression may be made so that it never ends."""


@dataclass(frozen=True)
class _Settings:
    """What a header or an adapter_config.json says of alpha, by component."""

    parts: Mapping[str, Mapping[str, Any]]
    until: float
    """When patterns have to be matched, on the monotonic clock."""

    @classmethod
    def read(
        cls, header: Mapping[str, str], config: Mapping[str, Any] | None, components: list[str]
    ) -> _Settings:
        """Check what is said.

        Raises:
            AdapterError: names the setting.
        """
        if config is not None:
            config = {"lora_alpha": LoraConfig().lora_alpha, **config}  # peft leaves nothing out, people do
        said: Any = {}
        if HEADER_KEY in header:
            try:
                said = json.loads(header[HEADER_KEY])
            except (ValueError, RecursionError) as error:
                raise AdapterError(f"its header's {HEADER_KEY} is not JSON: {error}") from error
            if not isinstance(said, dict):
                raise AdapterError(f"its header's {HEADER_KEY} holds no settings by name, but {said!r:.40}")
        parts: dict[str, Mapping[str, Any]] = {}
        prefixed = any(key.startswith(f"{name}.") for name in components for key in said)
        for name in components:
            own = {k.removeprefix(f"{name}."): v for k, v in said.items() if k.startswith(f"{name}.")}
            if not own and not prefixed:
                own = dict(said)  # of a file whose keys have no prefix
            parts[name] = _checked(own or config or {})
        return cls(parts, time.monotonic() + TIME)

    def alpha(self, component: str, path: str, group: _Group) -> float | None:
        """The strength of one module's update: its own tensor's, else the settings'; None: the rank."""
        if "alpha" in group.tensors:
            return _alpha(group.keys["alpha"], group.tensors["alpha"])
        part = self.parts[component]
        alpha = part.get("lora_alpha")
        patterns: Mapping[str, Any] = part.get("alpha_pattern") or {}
        if patterns:
            as_filed = f"text_model.{path}" if not path.startswith("text_model.") else path
            found = next((k for k in patterns if self._matches(k, path) or self._matches(k, as_filed)), None)
            alpha = patterns[found] if found is not None else alpha
        if alpha is None or "down" not in group.tensors:
            return None
        if part.get("use_rslora"):  # scales by alpha / sqrt(rank)
            return float(alpha) * math.sqrt(len(group.tensors["down"]))
        return float(alpha)

    def check_kinds(self, component: str, updates: Mapping[str, Delta]) -> None:
        """Raise where the settings say DoRA and lengths are missing."""
        plain_ones = [path for path, delta in updates.items() if type(delta) is Lora]
        if self.parts[component].get("use_dora") and plain_ones:
            raise AdapterError(
                f"its settings say DoRA, and {len(plain_ones)} modules of {component} have no"
                f" lora_magnitude_vector: {some(plain_ones)}",
                hint="the file is incomplete",
            )

    def _matches(self, pattern: str, path: str) -> bool:
        """Whether peft takes a key of alpha_pattern for this module; of several, it takes the first."""
        import regex  # type: ignore[import-untyped]  # the rules of `re`, with an end

        try:
            re.compile(pattern)
            left = max(self.until - time.monotonic(), 1e-3)
            return bool(regex.match(rf"(.*\.)?({pattern})$", path, timeout=left))
        except (re.error, regex.error, TimeoutError, RecursionError, OverflowError, MemoryError) as error:
            raise AdapterError(
                f'alpha_pattern: "{pattern:.60}" cannot be matched: {error or "it takes too long"}',
                hint="its keys are module paths or regular expressions",
            ) from error


def _alpha(key: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise AdapterError(f"{key} has {tensor.numel()} values, and alpha is one figure")
    alpha = float(_floats(key, tensor))
    if alpha < 0:
        raise AdapterError(f"{key} is {alpha:g}: alpha is above 0")
    return alpha


def _checked(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check the settings of one component that change what an adapter does."""
    kind = part.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(f'peft_type is "{kind}": only LORA is read, with or without DoRA')
    for key in ("use_rslora", "use_dora"):
        if part.get(key) not in (None, True, False):
            raise AdapterError(f"{key} is {part[key]!r:.40}, and must be true or false")
    if "lora_alpha" in part:
        _positive("lora_alpha", part["lora_alpha"])
    patterns = part.get("alpha_pattern")
    if patterns is not None and not isinstance(patterns, dict):
        raise AdapterError(f"alpha_pattern is {patterns!r:.40}, and must hold figures by module")
    for key, value in (patterns or {}).items():
        _positive(f'alpha_pattern: "{key:.60}"', value)
    start = str(part.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGES_BASE):
        raise AdapterError(
            f'init_lora_weights is "{start:.40}", which changed the base too: alone the adapter is not what'
            " was trained",
            hint="save it from peft with path_initial_model_for_weight_conversion, as an ordinary LoRA",
        )
    return part


def _positive(name: str, value: Any) -> None:
    try:
        right = not isinstance(value, bool | str) and math.isfinite(float(value)) and float(value) > 0
    except (TypeError, ValueError, OverflowError):
        right = False
    if not right:
        raise AdapterError(f"{name} is {json.dumps(value, default=str):.40}: it must be a number above 0")
