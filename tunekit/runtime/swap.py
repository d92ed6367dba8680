"""Adapters on ONNX graphs that were exported for them: put on, changed and taken off while a graph is open.

What is fed beside a picture is the adapter alone, so a graph keeps nothing of one that was on it before, and
the base's weights may be in int8 (`passes.onnx_adapters` has the layout).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from tunekit.errors import AdapterError, ConfigError, output_errors
from tunekit.runtime.graph import Array, read_json
from tunekit.runtime.onnx import DOWN, UP, OrtGraph

if TYPE_CHECKING:
    from tunekit.adapters import Deltas
    from tunekit.families.family import Family
    from tunekit.runtime.base import Runtime

KEY = "swappable_adapters"
"""Of a component's config.json: what was exported for adapters, with the modules that have no effect."""
ENDING = ".onnx_adapter"
"""Of ONNX Runtime's own files of adapters."""
VERSION = 1


def put_adapter(runtime: Runtime, source: str | Path | None) -> None:
    """Puts an adapter on the denoiser of an ONNX model in place of the one that was there.

    Args:
        runtime: of ONNX Runtime.
        source: an adapter's folder or file, in any layout that tunekit reads, or a file of ONNX Runtime
            (`.onnx_adapter`); None takes it off.

    Raises:
        ConfigError: the model was not exported for adapters.
        AdapterError: see `adapters.load_adapter`; or it is more than a LoRA of the layers that the model was
            exported for.
    """
    graph = _graph(runtime)
    if source is None:
        graph.adapter = {}
    elif str(source).endswith(ENDING):
        graph.adapter = _read_own(graph, Path(source))
    else:
        graph.adapter = _converted(runtime, graph, source)


def save_onnx_adapter(runtime: Runtime, file: Path) -> None:
    """Writes the adapter that is on an ONNX model as ONNX Runtime's own file (`.onnx_adapter`).

    Raises:
        ConfigError: there is none.
        OutputError: disk full, no permission.
    """
    import onnxruntime as ort

    graph = _graph(runtime)
    if not graph.adapter:
        raise ConfigError("there is no adapter on this model to write")
    made = ort.AdapterFormat()
    made.set_adapter_version(VERSION)
    made.set_model_version(VERSION)
    values = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in graph.adapter.items()}
    made.set_parameters(values)
    with output_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        made.export_adapter(str(file))


@contextmanager
def at_strength(runtime: Runtime, strength: float) -> Iterator[None]:
    """Inside, the adapter has another strength: 0 is the base alone, 1 the adapter as it is.

    Raises:
        AdapterError: see `adapters.at_strength`.
    """
    graph = getattr(runtime.family.denoiser(runtime.pipeline), "graph", None)
    if not isinstance(graph, OrtGraph):
        from tunekit import adapters

        runtime.forget_prompts()  # the adapter may be on a text encoder, too
        try:
            with adapters.at_strength(runtime.pipeline, runtime.family, strength):
                yield
        finally:
            runtime.forget_prompts()
        return
    before = graph.adapter
    graph.adapter = {
        name: (value * np.float32(strength)).astype(value.dtype) if name.endswith(UP) else value
        for name, value in before.items()
    }
    try:
        yield
    finally:
        graph.adapter = before


def _graph(runtime: Runtime) -> OrtGraph:
    graph = getattr(runtime.family.denoiser(runtime.pipeline), "graph", None)
    if isinstance(graph, OrtGraph) and graph.open_inputs:
        return graph
    raise ConfigError(
        f"an adapter has no effect on this model ({runtime.title}): it was not exported for adapters",
        where=runtime.artifact.source if runtime.artifact else None,
        hint="export it with `export_onnx: {adapters: swappable}` for ONNX Runtime; or merge the adapter, and"
        " export that",
    )


def _read_own(graph: OrtGraph, file: Path) -> dict[str, Array]:
    import onnxruntime as ort

    try:
        values = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
        found = {name: value.numpy().copy() for name, value in values.items()}
    except Exception as error:  # its exception classes have no common base
        raise AdapterError("not an adapter of ONNX Runtime, or damaged", where=str(file)) from error
    for name, value in found.items():
        kind, shape = graph.open_inputs.get(name, (None, []))
        fits = value.dtype == kind and len(value.shape) == len(shape)
        if not fits or any(want not in (None, side) for want, side in zip(shape, value.shape, strict=True)):
            raise AdapterError(f"made for another model: {name} does not fit this one", where=str(file))
    return found


def _converted(runtime: Runtime, graph: OrtGraph, source: str | Path) -> dict[str, Array]:
    """What the graph is fed for an adapter: arrays by the names of its inputs."""
    from tunekit.adapters.delta import Lora

    name = runtime.family.facts.denoiser_name
    folder = graph.path.parent.parent
    unused = set((read_json(folder / name / "config.json").get(KEY) or {}).get("without_effect", ()))
    deltas = _read(runtime.family, folder, source)
    if others := sorted(deltas.keys() - {name}):
        raise AdapterError(
            f"it changes the {others[0]}, and only the {name} was exported for adapters",
            where=str(source),
            hint="merge it, and export that",
        )
    found: dict[str, Array] = {}
    for path, delta in deltas[name].items():
        if path in unused:
            continue  # nothing that this module computes is used
        down, up = (f"{name}.{path}{end}" for end in (DOWN, UP))
        if type(delta) is not Lora or delta.bias is not None:
            raise AdapterError(
                f"it changes {path} by more than a LoRA, which the graph has no inputs for",
                where=str(source),
                hint="merge it, and export that",
            )
        if down not in graph.open_inputs:
            raise AdapterError(
                f"it changes {path}, and the model was not exported for adapters of that layer",
                where=str(source),
                hint="export it with `adapter_targets: all_linear` or that name among them; or merge the"
                " adapter",
            )
        # In float64, so that it is rounded once, to what the graph computes in.
        low, high = delta.down.double(), delta.up.double() * (delta.alpha / delta.rank)
        if low.ndim == 2:
            low, high = low.T, high.T
        for key, value in ((down, low), (up, high)):
            kind, shape = graph.open_inputs[key]
            if len(shape) == 4 and value.ndim == 2:  # a convolution of one pixel, whose file is of a Linear
                value = value.T[..., None, None]
            array = value.cpu().numpy().reshape([-1 if side is None else side for side in shape])
            with np.errstate(over="ignore"):
                found[key] = np.ascontiguousarray(array.astype(kind))
            if not np.isfinite(found[key]).all():
                raise AdapterError(f"{path}: too large for the graph's {kind}", where=str(source))
    return found


def _read(family: Family, folder: Path, source: str | Path) -> Deltas:
    """An adapter for the modules that the graphs in a folder were made from, by their configurations."""
    from tunekit.adapters import read_adapter
    from tunekit.families.sizes import with_config

    parts: dict[str, Any] = {}
    for row in family.facts.components:
        file = folder / row.name / "config.json"
        if row.name in family.facts.kohya_prefixes and file.is_file():
            parts[row.name] = with_config(row, read_json(file)).build()
    return read_adapter(SimpleNamespace(**parts), family, source)
