"""Adapter files: written in both layouts and read back at once, read in either."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tunekit.adapters.delta import Deltas, State, deltas_of, modules_of, peft_state, some
from tunekit.adapters.layouts import HEADER_KEY, parse, to_kohya
from tunekit.artifacts import ADAPTER_FILE
from tunekit.config import AdapterConfig
from tunekit.errors import AdapterError, output_errors
from tunekit.families.family import Family, Pipeline
from tunekit.families.loading import PICKLE_HINT, PICKLE_REFUSED, PICKLES


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
    deltas: Deltas = {component: deltas_of(denoiser)}
    modules = {component: modules_of(denoiser)}
    first = next(iter(deltas[component].values()), None)
    if first is None:
        raise AdapterError("there is no adapter in the denoiser to save")
    peft = {f"{component}.{key}": tensor for key, tensor in peft_state(deltas[component]).items()}
    settings = first.settings(first.rank, first.alpha, sorted(deltas[component]), config.dropout)
    kohya = to_kohya(deltas, modules, family)
    files = {
        folder / ADAPTER_FILE: (
            peft,
            {
                "format": "pt",
                HEADER_KEY: json.dumps({f"{component}.{k}": v for k, v in settings.items()}, indent=2),
                **_modelspec(peft, family, title, base_source),
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
                "ss_v2": str(family.facts.ss_v2),
                "ss_output_name": name,
                **_modelspec(kohya, family, title, base_source),
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
                _check_same(path, deltas, parse(written, read_header, modules, family, str(path)))
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
    return parse(
        state, header, {name: modules_of(getattr(pipeline, name)) for name in parts}, family, str(path)
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
        names = some([file.name for file in found]) if found else "none"
        raise AdapterError(f"expected one adapter file in the folder, found {names}", where=str(source))
    return found[0]


def _check_same(path: Path, wanted: Deltas, read: Deltas) -> None:
    """Raise unless the file that was just written says what was meant."""
    for component, updates in wanted.items():
        if read.get(component, {}).keys() != updates.keys():
            raise AdapterError(
                "the file just written names other modules than the adapter has", where=str(path)
            )
        for name, delta in updates.items():
            other = read[component][name]
            found, meant = other.peft(), delta.peft()
            same = found.keys() == meant.keys() and all(
                torch.equal(found[key], tensor.cpu()) for key, tensor in meant.items()
            )
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
