"""Adapters on a model: put in anew, loaded, copied, folded into the weights."""

from __future__ import annotations

import copy
import fnmatch
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tunekit import layers
from tunekit.adapters.delta import (
    KINDS,
    NAME,
    ColumnDora,
    Delta,
    Dora,
    Full,
    Kind,
    Lora,
    State,
    adapted,
    deltas_of,
    modules_of,
    parameters_of,
    peft_state,
    some,
)
from tunekit.adapters.files import read_adapter
from tunekit.config import AdapterConfig
from tunekit.diffusion.noise import stable_seed
from tunekit.errors import AdapterError
from tunekit.families.family import Family, Pipeline

CRITIC = "critic"
"""A second adapter, which learns what the first one draws; see `training.matching`."""
FIXED = "tunekit_fixed"
"""Of a component: a module in which an adapter is folded in, so that its strength cannot be another."""


def add_adapter(
    denoiser: nn.Module,
    config: AdapterConfig,
    default_targets: Sequence[str],
    *,
    presets: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> list[tuple[str, nn.Parameter]]:
    """Put a new adapter into `denoiser` and freeze everything else.

    Args:
        denoiser: a diffusers model, in any dtype.
        config: kind, rank, alpha, dropout and target modules.
        default_targets: the family's targets, for a config that names none.
        presets: the family's, see `FamilyFacts`.
        seed: of the initial weights; they depend on it and on the module's path alone.

    Returns:
        The trainable parameters with their names, in float32 (a gradient scaler refuses fp16 ones).

    Raises:
        AdapterError: a target that matches no Linear or Conv2d.
    """
    targets = targets_of(denoiser, config, default_targets, presets or {})
    check_targets(denoiser, targets)
    targets = _layers_alone(denoiser, targets)
    denoiser.requires_grad_(False)
    kind = KINDS[config.kind]
    _inject(denoiser, kind, kind.settings(config.rank, config.alpha, targets, config.dropout))
    for path, layer in adapted(denoiser):
        kind.draw(layer, torch.Generator().manual_seed(stable_seed(seed, "adapter", path)))
    return [(name, p) for name, p in denoiser.named_parameters() if p.requires_grad]


def targets_of(
    denoiser: nn.Module,
    config: AdapterConfig,
    default_targets: Sequence[str],
    presets: Mapping[str, Sequence[str]],
) -> list[str]:
    """Ends of the paths of the modules that a config asks for; arguments as of `add_adapter`.

    Not every base of a family has all that the family's own lists name: 3.5 large has no second attention.

    Raises:
        AdapterError: a preset that the family does not have.
    """
    wanted = config.targets
    if wanted and not isinstance(wanted, str):
        return list(wanted)
    paths = modules_of(denoiser)
    if not isinstance(wanted, str):
        return _that_are_there(_named(default_targets, paths), paths)
    if wanted == "all_linear":
        return [path for path, layer in paths.items() if isinstance(layer, nn.Linear)]
    if wanted not in presets:
        raise AdapterError(
            f'this family has no preset "{wanted}" of adapter targets',
            hint=f"there are: {', '.join([*presets, 'all_linear'])}; or name modules",
        )
    return _that_are_there(_named(presets[wanted], paths), paths)


def adaptable(
    denoiser: nn.Module,
    config: AdapterConfig,
    default_targets: Sequence[str],
    presets: Mapping[str, Sequence[str]],
) -> list[str]:
    """Paths of the modules that a config asks for; arguments as of `add_adapter`.

    Raises:
        AdapterError: a target that matches no Linear or Conv2d.
    """
    targets = targets_of(denoiser, config, default_targets, presets)
    check_targets(denoiser, targets)
    return [path for path in modules_of(denoiser) if any(_answers(path, target) for target in targets)]


def _named(targets: Sequence[str], paths: Collection[str]) -> list[str]:
    """A family's targets, and in place of one with "*", the whole paths that it stands for."""
    return [
        path for target in targets for path in (fnmatch.filter(paths, target) if "*" in target else [target])
    ]


def _that_are_there(targets: Sequence[str], paths: Collection[str]) -> list[str]:
    """The targets that a layer answers to; all where none does, so that it is said what there is."""
    there = [target for target in targets if any(_answers(path, target) for path in paths)]
    return there or list(targets)


def _answers(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)


def check_targets(denoiser: nn.Module, targets: Sequence[str]) -> None:
    """Refuse a target that no layer answers to; the denoiser may be without data.

    Raises:
        AdapterError: it matches no Linear or Conv2d; says what there is.
    """
    paths = list(modules_of(denoiser))
    for target in targets:
        if not any(_answers(path, target) for path in paths):
            ends = {path.rsplit(".", 1)[-1] for path in paths}
            raise AdapterError(
                f'adapter target "{target}" names no linear or convolution layer of the denoiser',
                hint=f"there are: {', '.join(sorted(end for end in ends if not end.isdigit()))}",
            )


def _layers_alone(denoiser: nn.Module, targets: Sequence[str]) -> list[str]:
    """Targets that reach layers alone: an end of paths that a list of modules has too becomes whole paths."""
    paths, layers = [path for path, _ in denoiser.named_modules()], modules_of(denoiser)
    reached: list[str] = []
    for target in targets:
        hits = [path for path in paths if path == target or path.endswith("." + target)]
        there = [path for path in hits if path in layers]
        reached += [target] if len(there) == len(hits) else there
    return reached


def adapter_state(denoiser: nn.Module) -> State:
    """Return the adapter's tensors in PEFT layout without a prefix; they share memory with the model."""
    return peft_state(deltas_of(denoiser))


def load_adapter_state(denoiser: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors from `adapter_state` into the adapter that is already in `denoiser`.

    Raises:
        AdapterError: other keys or shapes than the adapter has.
    """
    own = adapter_state(denoiser)
    if own.keys() != state.keys():
        differing = sorted(own.keys() ^ state.keys())
        raise AdapterError(f"the adapter and its saved state differ in {some(differing)}")
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise AdapterError(
                f"{key} has shape {list(state[key].shape)}, the adapter has {list(tensor.shape)}"
            )
        tensor.copy_(state[key])


def start_from(denoiser: nn.Module, given: Mapping[str, Delta], source: str | Path) -> None:
    """Give the adapter in `denoiser` the values of another one, strength included.

    Args:
        given: module path -> update.
        source: where it comes from, for messages.

    Raises:
        AdapterError: of another kind or rank, or for other modules.
    """
    own = deltas_of(denoiser)
    where, key = str(source), "adapter.init"
    if given.keys() != own.keys():
        odd = sorted(given.keys() ^ own.keys())
        leaves = ", ".join(sorted({_leaf(path) for path in given}))
        raise AdapterError(
            f"it adapts {len(given)} modules and this run {len(own)}; only one of them has {some(odd)}",
            where=where,
            hint=f"adapter.targets has to name the same ones; it has {leaves}",
            key=key,
        )
    loaded = {}
    for path, delta in own.items():
        other = given[path]
        if not isinstance(other, Lora) or isinstance(other, ColumnDora) or other.bias is not None:
            raise AdapterError(
                f"it changes {path} by more than a LoRA or DoRA that can be trained",
                where=where,
                hint="merge it into the base first, and start from that",
                key=key,
            )
        if (type(other), other.rank) != (type(delta), delta.rank):
            raise AdapterError(
                f"it is a {other.kind} of rank {other.rank} in {path}, and this run makes a {delta.kind} of"
                f" rank {delta.rank}",
                where=where,
                hint=f"set adapter.kind={other.kind} and adapter.rank={other.rank}",
                key=key,
            )
        loaded[path] = other.with_alpha(delta.alpha)
    with torch.no_grad():
        load_adapter_state(denoiser, peft_state(loaded))


def _leaf(path: str) -> str:
    """The last name of a module path that is no number: `to_out.0` of `...attn1.to_out.0`."""
    names = path.split(".")
    return ".".join(names[-2:]) if names[-1].isdigit() else names[-1]


def load_adapter(
    pipeline: Pipeline, family: Family, source: str | Path, *, allow_pickle: bool = False
) -> None:
    """Put the adapter of a file or folder, in any layout, into the pipeline, unmerged.

    What peft has no layer for is folded into the weights at once: whole differences, biases, and DoRA along
    the input axis.

    Raises:
        AdapterError: unreadable, pickled, non-finite, or made for another family or another base.
    """
    for component, deltas in read_adapter(pipeline, family, source, allow_pickle=allow_pickle).items():
        module = getattr(pipeline, component)
        kept: dict[str, Lora] = {}
        for path, delta in deltas.items():
            if isinstance(delta, Lora) and not isinstance(delta, ColumnDora):
                kept[path] = delta
                _add_bias(module.get_submodule(path), path, delta)
            else:
                _fold(module, path, delta)
            if path not in kept or delta.bias is not None:
                vars(module)[FIXED] = path
        if not kept:
            continue
        kind: type[Lora] = Dora if any(isinstance(delta, Dora) for delta in kept.values()) else Lora
        if kind is Dora:  # peft knows one kind per adapter
            kept = {
                path: delta
                if isinstance(delta, Dora)
                else Dora.of_lora(delta, _weight(module.get_submodule(path)))
                for path, delta in kept.items()
            }
        most = next(iter(kept.values()))
        settings = kind.settings(most.rank, most.alpha, list(kept), 0.0)
        settings["rank_pattern"] = _patterns({path: d.rank for path, d in kept.items()}, most.rank)
        settings["alpha_pattern"] = _patterns({path: d.alpha for path, d in kept.items()}, most.alpha)
        _inject(module, kind, settings)
        with torch.no_grad():
            load_adapter_state(module, peft_state(kept))
        module.eval()


def remove_adapter(pipeline: Pipeline, family: Family) -> bool:
    """Take off what `load_adapter` put into a pipeline, so that another one can be put in.

    Returns:
        Whether the base is there again; False, and nothing has changed, where a part was folded into it.
    """
    parts = [getattr(pipeline, part.name, None) for part in family.facts.components]
    modules = [part for part in parts if isinstance(part, nn.Module)]
    if any(FIXED in vars(module) for module in modules):
        return False
    for module in modules:
        for path, layer in list(module.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                parent, _, leaf = path.rpartition(".")
                setattr(module.get_submodule(parent), leaf, layer.get_base_layer())
        if vars(module).pop("peft_config", None) is not None:
            vars(module)["_hf_peft_config_loaded"] = False
    return True


@contextmanager
def at_strength(pipeline: Pipeline, family: Family, strength: float) -> Iterator[None]:
    """Draw with the adapter in the pipeline at another strength: 0 is the base alone, 1 the adapter as it is.

    Every adapted layer gives base + strength * (adapted - base), whatever kind the adapter is of.

    Raises:
        AdapterError: a part of it had to be folded into the weights (`load_adapter`).
    """

    def between(layer: Any, args: Any, options: Any, output: Any) -> Any:
        base = layer.base_layer(*args, **options)
        return base + strength * (output - base)

    hooks = []
    for part in family.facts.components if strength != 1 else ():
        module = getattr(pipeline, part.name, None)
        if not isinstance(module, nn.Module):
            continue
        if path := vars(module).get(FIXED):
            raise AdapterError(
                f"{path}: what this adapter changes there (a whole weight, a bias) has one strength only",
                hint="draw with scale 1",
            )
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                hooks.append(layer.register_forward_hook(between, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without_adapter(denoiser: nn.Module) -> Iterator[None]:
    """Inside, a network computes as if it had no adapter; what is trained stays so."""
    layers = [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in trained:
            parameter.requires_grad_(True)


def add_critic(denoiser: Any) -> None:
    """Put a second adapter, `CRITIC`, beside the one in a network: for the same layers, with equal weights.

    Both are trained; the first one is used.
    """
    settings = copy.deepcopy(denoiser.peft_config[NAME])
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # there are to be two
        denoiser.add_adapter(settings, CRITIC)
    for _, layer in adapted(denoiser):
        for part in layer.adapter_layer_names:
            stacks = getattr(layer, part)
            if CRITIC in stacks:
                stacks[CRITIC].load_state_dict(stacks[NAME].state_dict())
        for parameter in parameters_of(layer):
            parameter.data = parameter.data.float()
        layer.set_adapter([NAME])
        for parameter in parameters_of(layer):
            parameter.requires_grad_(True)


@contextmanager
def using_adapter(denoiser: nn.Module, name: str) -> Iterator[None]:
    """Inside, a network of several adapters computes with that one; what is trained stays so."""
    layers = [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    before = [layer.active_adapters for layer in layers]

    def use(names: Sequence[str | list[str]]) -> None:
        for layer, chosen in zip(layers, names, strict=True):
            layer.set_adapter(chosen)
        for parameter in trained:
            parameter.requires_grad_(True)

    use([name] * len(layers))
    try:
        yield
    finally:
        use(before)


def fold_adapter(denoiser: nn.Module, carrier: nn.Module) -> int:
    """Fold the adapter that another copy of a network carries into its weights.

    Returns:
        The number of layers that changed.

    Raises:
        AdapterError: a weight that would become infinite. The network is then no longer what it was.
    """
    deltas = deltas_of(carrier)
    for path, delta in deltas.items():
        _fold(denoiser, path, delta)
    return len(deltas)


def merge_adapter(
    pipeline: Pipeline, family: Family, source: str | Path, *, allow_pickle: bool = False
) -> int:
    """Fold the adapter of a file or folder into the pipeline's weights.

    A quantized layer is unpacked, merged and packed again in its own scheme.

    Returns:
        The number of layers that changed.

    Raises:
        AdapterError: see `load_adapter`; also a weight that would become infinite. The pipeline is then no
            longer what it was.
    """
    read = read_adapter(pipeline, family, source, allow_pickle=allow_pickle)
    for component, deltas in read.items():
        for path, delta in deltas.items():
            _fold(getattr(pipeline, component), path, delta)
    return sum(len(deltas) for deltas in read.values())


def _patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """What peft is told of layers that differ: one pattern for each value, since it tries all in turn."""
    paths: dict[float, list[str]] = {}
    for path, value in values.items():
        if value != usual:
            paths.setdefault(value, []).append(re.escape(path))
    return {f"^({'|'.join(names)})": value for value, names in paths.items()}


def _weight(layer: Any) -> Tensor:
    """The weight of a layer, unpacked."""
    weight: Tensor = layer.weight
    return weight.detach()


@torch.no_grad()
def _fold(module: nn.Module, path: str, delta: Delta) -> None:
    """Fold an update into the layer at `path`."""
    parent_path, _, leaf = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    layer: Any = getattr(parent, leaf)
    changed = delta.apply(_weight(layer))
    if not torch.isfinite(changed).all():
        raise AdapterError(
            f"{path}: its weights overflow with the adapter", hint="the adapter diverged, or is damaged"
        )
    if isinstance(layer, layers.QuantLinear | layers.QuantConv2d):
        if not (isinstance(delta, Full) and delta.weight is None):
            plain: Any = layers.dequantize_layer(layer)
            plain.weight = nn.Parameter(changed, requires_grad=False)
            layer = layers.quantize_layer(plain, layer.scheme, layer.group)
            setattr(parent, leaf, layer)
    else:
        layer.weight.copy_(changed)
    _add_bias(layer, path, delta)


@torch.no_grad()
def _add_bias(layer: Any, path: str, delta: Delta) -> None:
    if delta.bias is None:
        return
    layer.bias.copy_((layer.bias.float() + delta.bias.float().to(layer.bias.device)).to(layer.bias.dtype))
    if not torch.isfinite(layer.bias).all():
        raise AdapterError(f"{path}: its bias overflows with the adapter")


def _inject(module: Any, kind: type[Kind], settings: Mapping[str, Any]) -> None:
    if NAME in getattr(module, "peft_config", {}):
        raise AdapterError(
            "there is an adapter in this model already", hint="merge it, or load the base anew"
        )
    with torch.random.fork_rng(devices=[]):  # peft draws initial weights from the global state
        module.add_adapter(kind.config(**settings), NAME)
    module.requires_grad_(False)
    for _, layer in adapted(module):
        for parameter in parameters_of(layer):
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
