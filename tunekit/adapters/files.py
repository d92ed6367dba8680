"""Adapter files: written in two layouts and read back at once; read in any."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tunekit.adapters.delta import Delta, Deltas, Dora, Lora, State, changeable, deltas_of, some
from tunekit.adapters.layouts import HEADER_KEY, parse, to_kohya, to_peft
from tunekit.artifacts import ADAPTER_FILE, COMFYUI_ENDINGS, what_it_is
from tunekit.config import AdapterConfig
from tunekit.errors import AdapterError, output_errors
from tunekit.families.family import Family, Pipeline
from tunekit.families.loading import PICKLE_HINT, PICKLE_REFUSED, PICKLES
from tunekit.quiet import report_warnings

ADAPTER_FILES = (ADAPTER_FILE, "adapter_model.safetensors")
"""What the adapter in a folder is called, by diffusers and by peft."""
SAME = 1e-6
"""By how much of its largest entry an update may differ that was stacked with others and cut out again."""
CONFIG = "adapter_config.json"
CONFIG_BYTES = 1_000_000  # of text; peft writes two thousand
DORA_NOTE = (
    "DoRA in this layout is applied rightly by LyCORIS; ComfyUI, A1111 and Forge scale by other lengths, and"
    " sd-scripts and diffusers leave the scale out. For those use the merged model, or"
    f" {ADAPTER_FILE} in diffusers."
)


def save_adapter(
    folder: Path,
    denoiser: nn.Module,
    family: Family,
    config: AdapterConfig,
    *,
    name: str,
    title: str,
    base_source: str | None = None,
    facts: Mapping[str, str] | None = None,
) -> tuple[Path, Path]:
    """Write the adapter of `denoiser` in both layouts and read the files back against the module list.

    Nothing private is written: no paths, no captions; the base only if it is a public name. The PEFT file has
    alpha / rank within its weights and says alpha = rank, so that a reader which knows no alpha is right too.

    Args:
        folder: receives `pytorch_lora_weights.safetensors` and `<name>.kohya.safetensors`, or
            `<name>.comfyui.safetensors` of a family whose layers have dotted names there.
        denoiser: holds the adapter; not wrapped (unwrap DDP and compiled modules first).
        config: what `add_adapter` was given.
        name: of the second file.
        title: for people, in the header.
        base_source: what the adapter was trained on.
        facts: of the training, for the second file's header: "ss_learning_rate" and so on.

    Raises:
        AdapterError: a key that no module answers to, before or after writing.
        OutputError: the disk is full or unwritable; no file is left half-written.
    """
    component = family.facts.denoiser_name
    trained = {component: deltas_of(denoiser)}
    modules = {component: changeable(denoiser)}
    first = next(iter(trained[component].values()), None)
    if first is None:
        raise AdapterError("there is no adapter in the denoiser to save")
    folded = {component: {path: d.with_alpha(d.rank) for path, d in trained[component].items()}}
    peft = to_peft(trained)
    settings = first.settings(first.rank, first.rank, sorted(trained[component]), config.dropout)
    others = to_kohya(trained, modules, family)
    dotted = bool(family.facts.denoiser.dotted)
    dora = first.kind == "dora"
    files: dict[Path, tuple[State, dict[str, str], Deltas]] = {
        folder / ADAPTER_FILE: (
            peft,
            {
                "format": "pt",
                HEADER_KEY: json.dumps({f"{component}.{k}": v for k, v in settings.items()}, indent=2),
                **_modelspec(peft, family, title, base_source),
            },
            {component: dict(folded[component])},
        ),
        folder / f"{name}{COMFYUI_ENDINGS[dotted]}": (
            others,
            {
                "format": "pt",
                **(facts or {}),
                "ss_base_model_version": family.facts.ss_base_model_version,
                "ss_network_module": "lycoris.kohya" if dora else "networks.lora",
                "ss_network_dim": str(first.rank),
                "ss_network_alpha": str(float(first.rank) if dotted else first.alpha),
                **_network_args(trained[component]),
                "ss_v2": str(family.facts.ss_v2),
                "ss_output_name": name,
                **_modelspec(others, family, title, base_source),
                **({"modelspec.usage_hint": DORA_NOTE} if dora else {}),
            },
            {component: dict(folded[component] if dotted else trained[component])},
        ),
    }
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path, (state, header, meant) in files.items():
            aside = path.with_name(f".{path.name}.tmp")
            try:
                aside.write_bytes(_file_content(state, header))
                written, read_header = _read_tensors(aside, allow_pickle=False)
                _check_same(path, meant, parse(written, read_header, modules, family, str(path)))
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)
    peft_file, other_file = files
    if dora:
        _say_once(f"{other_file.name}: {DORA_NOTE}")
    return peft_file, other_file


@cache
def _say_once(text: str) -> None:
    report_warnings([text])


def _network_args(deltas: Mapping[str, Lora]) -> dict[str, str]:
    """What kohya's tools are told beside rank and alpha, as JSON: of convolutions, and of DoRA."""
    args: dict[str, str] = {}
    for delta in deltas.values():
        if delta.down.ndim == 4 and delta.down[0, 0].numel() > 1:
            args |= {"conv_dim": str(delta.rank), "conv_alpha": str(delta.alpha)}
        if isinstance(delta, Dora):
            args |= {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
    return {"ss_network_args": json.dumps(args)} if args else {}


def read_adapter(
    pipeline: Pipeline, family: Family, source: str | Path, *, allow_pickle: bool = False
) -> Deltas:
    """Read an adapter file, or the one in a folder, in any layout, for the modules of `pipeline`.

    What is left out because it is no part of the model, such as a bundled embedding, is named in the log.

    Raises:
        AdapterError: see `load_adapter`.
    """
    path = adapter_file(source)
    state, header = _read_tensors(path, allow_pickle)
    parts = (name for name in family.facts.kohya_prefixes if getattr(pipeline, name, None) is not None)
    modules = {name: changeable(getattr(pipeline, name)) for name in parts}
    return parse(state, header, modules, family, str(path), _config_beside(path))


def adapter_file(source: str | Path) -> Path:
    """Return the adapter's file: `source` itself, or the one that the folder `source` holds.

    Raises:
        AdapterError: there is none, or there are several.
    """
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return path
        if not path.is_dir():
            raise AdapterError("no such file or folder", where=str(source))
        for name in ADAPTER_FILES:
            if (path / name).is_file():
                return path / name
        return _only_file(path, str(source))
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, `~nobody`, a zero byte
        raise AdapterError(f"cannot be read: {error}", where=str(source)) from error


def _only_file(folder: Path, where: str) -> Path:
    found = [file for file in sorted(folder.iterdir()) if file.is_file()]
    for suffixes in ((".safetensors",), (".bin",)):
        files = [file for file in found if file.suffix in suffixes and not file.name.startswith(".")]
        if len(files) == 1:
            return files[0]
        if files:
            raise AdapterError(
                f"expected one adapter file in the folder, found {some([file.name for file in files])}",
                where=where,
                hint="name the file itself",
            )
    raise AdapterError("expected one adapter file in the folder, found none", where=where)


def _config_beside(path: Path) -> dict[str, Any] | None:
    """What peft's adapter_config.json says, where it is of this file: peft's own, or the only one there."""
    file = path.with_name(CONFIG)
    try:
        if not file.is_file():
            return None
        others = [f for f in path.parent.iterdir() if f.suffix == path.suffix and f.name != path.name]
        if path.stem not in ("adapter_model", ADAPTER_FILE.partition(".")[0]) and others:
            return None
        if file.stat().st_size > CONFIG_BYTES:
            raise AdapterError(f"is larger than {CONFIG_BYTES} bytes, and no settings", where=str(file))
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot be read as JSON: {error}", where=str(file)) from error
    if not isinstance(said, dict):
        raise AdapterError(f"holds no settings by name, but {said!r:.40}", where=str(file))
    return said


def _check_same(path: Path, wanted: Deltas, read: Deltas) -> None:
    """Raise unless the file that was just written says what was meant."""
    for component, updates in wanted.items():
        found = read.get(component, {})
        # A file that stacks modules cannot tell one that has learned nothing from one that is not adapted.
        odd = [
            name for name in found.keys() ^ updates.keys() if not _zero(found.get(name, updates.get(name)))
        ]
        if odd:
            raise AdapterError(
                f"the file just written names other modules than the adapter has: {some(sorted(odd))}",
                where=str(path),
            )
        for name in found.keys() & updates.keys():
            if not _same(found[name], updates[name]):
                raise AdapterError(
                    f"the file just written differs from the adapter in {name}", where=str(path)
                )


def _zero(delta: Delta | None) -> bool:
    return type(delta) is Lora and not delta.up.any()


def _same(found: Delta, meant: Delta) -> bool:
    """Whether two updates are one: field by field, or in what they do, where one was rows of a stack."""
    if type(found) is not type(meant):
        return False
    pairs = [(getattr(found, field.name), getattr(meant, field.name)) for field in fields(meant)]
    if all(
        a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a is b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6))
        for a, b in pairs
    ):
        return True
    if not isinstance(found, Lora) or not isinstance(meant, Lora):
        return False
    if isinstance(meant, Dora) and not torch.equal(found.magnitude.cpu(), meant.magnitude.cpu()):  # type: ignore[attr-defined]
        return False
    draw = torch.Generator().manual_seed(0)
    probe = torch.randn(meant.down[0].numel(), 4, generator=draw, dtype=torch.float64)
    did, wanted = (
        delta.alpha
        / delta.rank
        * delta.up.cpu().double().flatten(1)
        @ (delta.down.cpu().double().flatten(1) @ probe)
        for delta in (found, meant)
    )
    return bool((did - wanted).abs().max() <= SAME * wanted.abs().max())


def _read_tensors(path: Path, allow_pickle: bool) -> tuple[State, dict[str, str]]:
    if path.suffix in PICKLES:
        if not allow_pickle:
            raise AdapterError(PICKLE_REFUSED, where=str(path), hint=PICKLE_HINT)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle raises anything
            raise AdapterError("holds more than weights, or is damaged", where=str(path)) from error
        if not isinstance(content, dict) or not all(
            isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in content.items()
        ):
            kind = what_it_is(str(key) for key in content) if isinstance(content, dict) else None
            raise AdapterError(
                f"holds {kind or 'something other than tensors by name'}, and no adapter", where=str(path)
            )
        return content, {}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    # Types that torch lacks, shapes that are no sizes: whatever a damaged header leads to.
    except Exception as error:
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
