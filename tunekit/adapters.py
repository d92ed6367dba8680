"""Adapters over peft: add, save, load, merge, and the two file layouts that the world uses.

Both layouts are read into the same `Delta` per module and written from it, so what one file keeps (alpha,
DoRA magnitudes) the other keeps too. Every key is checked against the modules it is for, when read and when
written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tunekit import layers
from tunekit.artifacts import ADAPTER_FILE
from tunekit.config import AdapterConfig
from tunekit.diffusion.noise import stable_seed
from tunekit.errors import AdapterError, output_errors
from tunekit.families.family import Family, Pipeline
from tunekit.families.loading import PICKLE_HINT, PICKLE_REFUSED, PICKLES

HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps alpha, as JSON
NAME = "default"  # of the adapter inside the model
SHOWN = 3  # keys named in a message

State = dict[str, Tensor]


@dataclass(frozen=True)
class Delta:
    """The update of one Linear or Conv2d: weight + alpha / rank * up @ down.

    Attributes:
        down: [r, in] or [r, in, k, k].
        up: [out, r] or [out, r, 1, 1].
        alpha: the strength.
        magnitude: [out], the norms of DoRA's weight rows; None for LoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    def apply(self, weight: Tensor) -> Tensor:
        """Return `weight` with the update folded in, computed in float32, in the dtype of `weight`."""
        update = (self.up.float().flatten(1) @ self.down.float().flatten(1)).view(weight.shape)
        merged = weight.float() + self.alpha / self.rank * update.to(weight.device)
        if self.magnitude is not None:  # DoRA, arXiv:2402.09353, equation 5
            norm = merged.flatten(1).norm(dim=1)
            factor = self.magnitude.float().to(weight.device) / norm
            merged = merged * factor.view(-1, *[1] * (weight.ndim - 1))
        return merged.to(weight.dtype)


Deltas = dict[str, dict[str, Delta]]
"""Component ("unet", "text_encoder") -> module path -> update."""


# --- on a model ---------------------------------------------------------------------------------------------


def add_adapter(
    denoiser: nn.Module, config: AdapterConfig, default_targets: Sequence[str], *, seed: int = 0
) -> list[tuple[str, nn.Parameter]]:
    """Put a new adapter into `denoiser` and freeze everything else.

    Args:
        denoiser: a diffusers model, in any dtype.
        config: kind, rank, alpha, dropout and target modules.
        default_targets: the family's targets, for a config that names none.
        seed: of the initial weights; they depend on it and on the module's path alone.

    Returns:
        The trainable parameters with their names, in float32 (a gradient scaler refuses fp16 ones).

    Raises:
        AdapterError: a target that matches no Linear or Conv2d.
    """
    targets = list(config.targets or default_targets)
    paths = [path for path, _ in _targetable(denoiser)]
    for target in targets:
        if not any(path == target or path.endswith("." + target) for path in paths):
            ends = sorted(
                {path.rsplit(".", 1)[-1] for path in paths if not path.rsplit(".", 1)[-1].isdigit()}
            )
            raise AdapterError(
                f'adapter target "{target}" names no linear or convolution layer of the denoiser',
                hint=f"there are: {', '.join(ends)}",
            )
    denoiser.requires_grad_(False)
    _inject(
        denoiser,
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # annotated int; any float works
            lora_dropout=config.dropout,
            target_modules=targets,
            use_dora=config.kind == "dora",
        ),
    )
    for path, layer in _adapted(denoiser):
        weight = layer.lora_A[NAME].weight
        generator = torch.Generator().manual_seed(stable_seed(seed, "adapter", path))
        draw = torch.empty(weight.shape)
        nn.init.kaiming_uniform_(draw, a=math.sqrt(5), generator=generator)
        weight.data.copy_(draw)
    return [(name, p) for name, p in denoiser.named_parameters() if p.requires_grad]


def adapter_state(denoiser: nn.Module) -> State:
    """Return the adapter's tensors in PEFT layout without a prefix; they share memory with the model."""
    return _peft_state({path: _delta(layer) for path, layer in _adapted(denoiser)}, _modules(denoiser))


def load_adapter_state(denoiser: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors from `adapter_state` into the adapter that is already in `denoiser`.

    Raises:
        AdapterError: other keys or shapes than the adapter has.
    """
    own = adapter_state(denoiser)
    if own.keys() != state.keys():
        differing = sorted(own.keys() ^ state.keys())
        raise AdapterError(f"the adapter and its saved state differ in {_some(differing)}")
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise AdapterError(
                f"{key} has shape {list(state[key].shape)}, the adapter has {list(tensor.shape)}"
            )
        tensor.copy_(state[key])


def load_adapter(
    pipeline: Pipeline, family: Family, source: str | Path, *, allow_pickle: bool = False
) -> None:
    """Put the adapter of a file or folder, in either layout, into the pipeline, unmerged.

    Raises:
        AdapterError: unreadable, pickled, non-finite, or made for another family or another base.
    """
    for component, deltas in read_adapter(pipeline, family, source, allow_pickle=allow_pickle).items():
        module = getattr(pipeline, component)
        most = next(iter(deltas.values()))
        _inject(
            module,
            LoraConfig(
                r=most.rank,
                lora_alpha=most.alpha,
                rank_pattern={f"^{path}": d.rank for path, d in deltas.items() if d.rank != most.rank},
                alpha_pattern={f"^{path}": d.alpha for path, d in deltas.items() if d.alpha != most.alpha},
                target_modules=list(deltas),
                use_dora=most.magnitude is not None,
            ),
        )
        with torch.no_grad():
            load_adapter_state(module, _peft_state(deltas, _modules(module)))
        module.eval()


def merge_adapter(
    pipeline: Pipeline, family: Family, source: str | Path, *, allow_pickle: bool = False
) -> int:
    """Fold the adapter of a file or folder into the pipeline's weights.

    A quantized layer is unpacked, merged and packed again in its own scheme.

    Returns:
        The number of layers that changed.

    Raises:
        AdapterError: see `load_adapter`.
    """
    read = read_adapter(pipeline, family, source, allow_pickle=allow_pickle)
    for component, deltas in read.items():
        for path, delta in deltas.items():
            parent_path, _, leaf = path.rpartition(".")
            parent = getattr(pipeline, component).get_submodule(parent_path)
            layer: Any = getattr(parent, leaf)
            if isinstance(layer, layers.QuantLinear | layers.QuantConv2d):
                plain: Any = layers.dequantize_layer(layer)
                plain.weight = nn.Parameter(delta.apply(plain.weight), requires_grad=False)
                setattr(parent, leaf, layers.quantize_layer(plain, layer.scheme, layer.group))
            else:
                with torch.no_grad():
                    layer.weight.copy_(delta.apply(layer.weight))
    return sum(len(deltas) for deltas in read.values())


# --- files --------------------------------------------------------------------------------------------------


def save_adapter(
    folder: Path,
    denoiser: nn.Module,
    family: Family,
    config: AdapterConfig,
    *,
    name: str,
    title: str,
    base_source: str | None = None,
) -> tuple[Path, Path]:
    """Write the adapter of `denoiser` in both layouts and read the files back against the module list.

    Nothing private is written: no paths, no captions; the base only if it is a public name.

    Args:
        folder: receives `pytorch_lora_weights.safetensors` and `<name>.kohya.safetensors`.
        denoiser: holds the adapter; not wrapped (unwrap DDP and compiled modules first).
        config: what `add_adapter` was given.
        name: of the kohya file.
        title: for people, in the header.
        base_source: what the adapter was trained on.

    Raises:
        AdapterError: a key that no module answers to, before or after writing.
        OutputError: the disk is full or unwritable; no file is left half-written.
    """
    component = family.facts.denoiser_name
    deltas: Deltas = {component: {path: _delta(layer) for path, layer in _adapted(denoiser)}}
    modules = {component: _modules(denoiser)}
    first = next(iter(deltas[component].values()), None)
    if first is None:
        raise AdapterError("there is no adapter in the denoiser to save")
    peft = {f"{component}.{key}": t for key, t in _peft_state(deltas[component], modules[component]).items()}
    # Only keys that every peft version knows: diffusers hands them all to LoraConfig.
    settings = {
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(deltas[component]),
        "use_dora": first.magnitude is not None,
        "rank_pattern": {},  # asked for by diffusers before 0.40
        "alpha_pattern": {},
    }
    kohya = to_kohya(deltas, family)
    modelspec = _modelspec(kohya, family, title, base_source)
    files = {
        folder / ADAPTER_FILE: (
            peft,
            {
                "format": "pt",
                HEADER_KEY: json.dumps({f"{component}.{k}": v for k, v in settings.items()}, indent=2),
            },
        ),
        folder / f"{name}.kohya.safetensors": (
            kohya,
            {
                "format": "pt",
                "ss_base_model_version": family.facts.ss_base_model_version,
                "ss_network_module": "networks.lora",
                "ss_network_dim": str(first.rank),
                "ss_network_alpha": str(first.alpha),
                "ss_v2": "False",
                "ss_output_name": name,
                **modelspec,
            },
        ),
    }
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path, (state, header) in files.items():
            aside = path.with_name(f".{path.name}.tmp")
            try:
                aside.write_bytes(_file_content(state, header))
                written, read_header = _read_tensors(aside, allow_pickle=False)
                _check_same(path, deltas, _parse(written, read_header, modules, family, str(path)))
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)
    peft_file, kohya_file = files
    return peft_file, kohya_file


def read_adapter(
    pipeline: Pipeline, family: Family, source: str | Path, *, allow_pickle: bool = False
) -> Deltas:
    """Read an adapter file, or the one in a folder, in either layout, for the modules of `pipeline`.

    Raises:
        AdapterError: see `load_adapter`.
    """
    path = adapter_file(source)
    state, header = _read_tensors(path, allow_pickle)
    for key, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterError(
                f"tensor {key} holds NaN or infinity", where=str(path), hint="its training diverged"
            )
    parts = (name for name in family.facts.kohya_prefixes if getattr(pipeline, name, None) is not None)
    return _parse(
        state, header, {name: _modules(getattr(pipeline, name)) for name in parts}, family, str(path)
    )


def adapter_file(source: str | Path) -> Path:
    """Return the adapter's file: `source` itself, or the one that the folder `source` holds.

    Raises:
        AdapterError: there is none, or there are several.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise AdapterError("no such file or folder", where=str(source))
    if (path / ADAPTER_FILE).is_file():
        return path / ADAPTER_FILE
    found = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin"))
    if len(found) != 1:
        names = _some([file.name for file in found]) if found else "none"
        raise AdapterError(f"expected one adapter file in the folder, found {names}", where=str(source))
    return found[0]


def to_kohya(deltas: Deltas, family: Family) -> State:
    """Lay updates out as kohya's tools do: underscored names, alpha and DoRA scale as tensors.

    Raises:
        AdapterError: two modules whose names become equal.
    """
    state: State = {}
    for component, updates in deltas.items():
        prefix = family.facts.kohya_prefixes[component][0]
        for path, delta in updates.items():
            name = _kohya_name(prefix, path)
            if f"{name}.alpha" in state:
                raise AdapterError(f"two modules have the kohya name {name}")
            state[f"{name}.lora_down.weight"] = delta.down
            state[f"{name}.lora_up.weight"] = delta.up
            state[f"{name}.alpha"] = torch.tensor(float(delta.alpha))
            if delta.magnitude is not None:
                # One column, so that it scales rows: ComfyUI tells the axis from the shape.
                state[f"{name}.dora_scale"] = delta.magnitude.view(-1, *[1] * (delta.down.ndim - 1))
    return state


def from_kohya(
    state: Mapping[str, Tensor], modules: Mapping[str, Mapping[str, nn.Module]], family: Family
) -> Deltas:
    """Read kohya's layout; a missing alpha means the rank (scale 1).

    Args:
        state: the file's tensors.
        modules: component -> module path -> module.
        family: whose name prefixes to read.

    Raises:
        AdapterError: keys that name no module.
    """
    names = {
        _kohya_name(prefix, path): (component, path)
        for component, prefixes in family.facts.kohya_prefixes.items()
        for prefix in prefixes
        for path in modules.get(component, {})
    }
    groups, unknown = _grouped(state, ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale"), names)
    return _deltas(
        groups, unknown, family, down="lora_down.weight", up="lora_up.weight", magnitude="dora_scale"
    )


def from_peft(
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, nn.Module]],
    family: Family,
) -> Deltas:
    """Read PEFT's layout; `settings` is the header's JSON, without which alpha is the rank.

    Raises:
        AdapterError: keys that name no module.
    """
    names = {
        f"{component}.{path}": (component, path) for component, paths in modules.items() for path in paths
    }
    groups, unknown = _grouped(state, ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), names)
    for (component, path), tensors in groups.items():
        if f"{component}.lora_alpha" in settings and "lora_A.weight" in tensors:
            alpha = float(settings[f"{component}.lora_alpha"])
            for pattern, value in (settings.get(f"{component}.alpha_pattern") or {}).items():
                if path == pattern.removeprefix("^") or path.endswith("." + pattern):
                    alpha = float(value)
            if settings.get(f"{component}.use_rslora"):  # scales by alpha / sqrt(rank)
                alpha *= math.sqrt(len(tensors["lora_A.weight"]))
            tensors["alpha"] = torch.tensor(alpha, dtype=torch.float64)
    return _deltas(
        groups, unknown, family, down="lora_A.weight", up="lora_B.weight", magnitude="lora_magnitude_vector"
    )


# --- details ------------------------------------------------------------------------------------------------


def _targetable(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that can carry an adapter, under their paths without the adapter's own wrapping."""
    for path, child in module.named_modules():
        if isinstance(child, LoraLayer):
            yield path, child.get_base_layer()
        elif isinstance(child, nn.Linear | nn.Conv2d) and not _inside_adapter(path):
            yield path, child


def _inside_adapter(path: str) -> bool:
    return ".base_layer" in path or ".lora_" in path


def _modules(module: nn.Module) -> dict[str, nn.Module]:
    found = dict(_targetable(module))
    # transformers 5 dropped the level "text_model", which files keep naming.
    if any(path.startswith("encoder.layers.") for path in found):
        found |= {f"text_model.{path}": layer for path, layer in found.items()}
    return found


def _adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and NAME in layer.lora_A:
            yield path, layer


def _inject(module: Any, config: LoraConfig) -> None:
    if NAME in getattr(module, "peft_config", {}):
        raise AdapterError(
            "there is an adapter in this model already", hint="merge it, or load the base anew"
        )
    with torch.random.fork_rng(devices=[]):  # peft draws initial weights from the global state
        module.add_adapter(config, NAME)
    for name, parameter in module.named_parameters():
        adapter = ".lora_" in name
        parameter.requires_grad_(adapter)
        if adapter and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _delta(layer: Any) -> Delta:
    magnitude = (
        layer.lora_magnitude_vector[NAME].weight.detach() if NAME in layer.lora_magnitude_vector else None
    )
    return Delta(
        down=layer.lora_A[NAME].weight.detach(),
        up=layer.lora_B[NAME].weight.detach(),
        alpha=float(layer.lora_alpha[NAME]),
        magnitude=None if magnitude is None else magnitude.view(-1),
    )


def _peft_state(deltas: Mapping[str, Delta], modules: Mapping[str, nn.Module]) -> State:
    state: State = {}
    for path, delta in deltas.items():
        state[f"{path}.lora_A.weight"] = delta.down
        state[f"{path}.lora_B.weight"] = delta.up
        if delta.magnitude is not None:
            convolution = isinstance(modules[path], nn.Conv2d)
            state[f"{path}.lora_magnitude_vector"] = delta.magnitude.view(
                (1, -1, 1, 1) if convolution else (-1,)
            )
    return state


def _kohya_name(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def _grouped(
    state: Mapping[str, Tensor], endings: tuple[str, ...], names: Mapping[str, tuple[str, str]]
) -> tuple[dict[tuple[str, str], State], list[str]]:
    """Sort tensors by the module they name; the rest are the unknown keys."""
    groups: dict[tuple[str, str], State] = {}
    unknown = []
    for key, tensor in state.items():
        ending = next((e for e in endings if key.endswith("." + e)), None)
        place = names.get(key.removesuffix(f".{ending}")) if ending else None
        if ending is None or place is None:
            unknown.append(key)
        else:
            groups.setdefault(place, {})[ending] = tensor
    return groups, unknown


def _deltas(
    groups: Mapping[tuple[str, str], State],
    unknown: list[str],
    family: Family,
    *,
    down: str,
    up: str,
    magnitude: str,
) -> Deltas:
    if unknown:
        raise AdapterError(
            f"{len(unknown)} of its keys name nothing in {family.facts.title}: {_some(unknown)}",
            hint="it was made for another model family, or by a method other than LoRA and DoRA",
        )
    found: Deltas = {}
    for (component, path), tensors in groups.items():
        missing = [key for key in (down, up) if key not in tensors]
        if missing:
            raise AdapterError(f"{component}.{path} has no {missing[0]}", hint="the file is incomplete")
        rank = tensors[down].shape[0]
        scale = tensors.get(magnitude)
        found.setdefault(component, {})[path] = Delta(
            down=tensors[down],
            up=tensors[up],
            alpha=float(tensors["alpha"]) if "alpha" in tensors else float(rank),
            magnitude=None if scale is None else scale.reshape(-1),
        )
    return found


def _parse(
    state: State,
    header: Mapping[str, str],
    modules: Mapping[str, Mapping[str, nn.Module]],
    family: Family,
    where: str,
) -> Deltas:
    """Read either layout and check every shape against its module."""
    try:
        if any(".lora_down." in key for key in state):
            deltas = from_kohya(state, modules, family)
        elif any(".lora_A." in key for key in state):
            deltas = from_peft(state, json.loads(header.get(HEADER_KEY, "{}")), modules, family)
        else:
            raise AdapterError(f"no LoRA or DoRA adapter: it holds {_some(sorted(state)) or 'nothing'}")
        for component, updates in deltas.items():
            if len({delta.magnitude is None for delta in updates.values()}) > 1:
                raise AdapterError(f"some modules of {component} have a DoRA magnitude and some have none")
            for path, delta in updates.items():
                _check_shape(f"{component}.{path}", delta, modules[component][path])
    except ValueError as error:
        raise AdapterError(f"its header's {HEADER_KEY} is not JSON: {error}", where=where) from error
    except AdapterError as error:
        raise AdapterError(error.message, where=where, hint=error.hint) from error
    # Aliases of a path (see _modules) become the path itself.
    own = {
        component: {id(m): path for path, m in reversed(list(paths.items()))}
        for component, paths in modules.items()
    }
    return {
        c: {own[c][id(modules[c][path])]: d for path, d in updates.items()} for c, updates in deltas.items()
    }


def _check_shape(name: str, delta: Delta, module: nn.Module) -> None:
    layer: Any = module
    if isinstance(module, nn.Linear):
        down: tuple[int, ...] = (delta.rank, layer.in_features)
        up: tuple[int, ...] = (layer.out_features, delta.rank)
    else:
        down = (delta.rank, layer.in_channels // layer.groups, *layer.kernel_size)
        up = (layer.out_channels, delta.rank, 1, 1)
    rows = None if delta.magnitude is None else delta.magnitude.shape
    if delta.down.shape != down or delta.up.shape != up or rows not in (None, (up[0],)):
        raise AdapterError(
            f"{name}: its tensors are {list(delta.down.shape)} and {list(delta.up.shape)}, "
            f"this model needs {list(down)} and {list(up)}",
            hint="the adapter was made for another base (another version, or before pruning)",
        )


def _check_same(path: Path, wanted: Deltas, read: Deltas) -> None:
    """Raise unless the file that was just written says what was meant."""
    for component, updates in wanted.items():
        if read.get(component, {}).keys() != updates.keys():
            raise AdapterError(
                "the file just written names other modules than the adapter has", where=str(path)
            )
        for name, delta in updates.items():
            other = read[component][name]
            same = torch.equal(other.down, delta.down.cpu()) and torch.equal(other.up, delta.up.cpu())
            if not same or not math.isclose(other.alpha, delta.alpha, rel_tol=1e-6):
                raise AdapterError(
                    f"the file just written differs from the adapter in {name}", where=str(path)
                )


def _read_tensors(path: Path, allow_pickle: bool) -> tuple[State, dict[str, str]]:
    if path.suffix in PICKLES:
        if not allow_pickle:
            raise AdapterError(PICKLE_REFUSED, where=str(path), hint=PICKLE_HINT)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle raises anything
            raise AdapterError("holds more than weights, or is damaged", where=str(path)) from error
        if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
            raise AdapterError("holds something other than tensors by name", where=str(path))
        return content, {}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"not a safetensors file, or damaged: {error}", where=str(path)) from error


def _tensor_content(state: State) -> tuple[dict[str, Any], bytes]:
    """Return what the tensors are in a safetensors file: their part of the header, and their bytes."""
    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    content = safetensors.torch.save(whole)
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def _file_content(state: State, metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file. The library writes metadata in random order, which changes hashes."""
    entries, tensors = _tensor_content(state)
    header = json.dumps({"__metadata__": dict(metadata), **entries}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + tensors


def _modelspec(state: State, family: Family, title: str, base_source: str | None) -> dict[str, str]:
    """Describe the file as modelspec 1.0.1 asks (https://github.com/Stability-AI/ModelSpec)."""
    _, tensors = _tensor_content(state)
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.facts.modelspec_architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.hash_sha256": "0x" + hashlib.sha256(tensors).hexdigest(),
    }
    public = base_source is not None and not Path(base_source).exists() and base_source.count("/") == 1
    if public and base_source is not None and not base_source.startswith((".", "~", "/")):
        spec["ss_sd_model_name"] = base_source
    return spec


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
