"""A network's ONNX graph: traced once for each structure, kept for the next time, and filled with weights.

To the exporter and its optimizer weights are inputs: nothing in a graph depends on their values, so a graph
serves every network that is built alike. Tracing is most of an export; a model that was trained further,
healed or merged with another adapter needs none.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunekit.errors import ModelError
from tunekit.kept import Kept
from tunekit.memory.plan import code
from tunekit.networks import collected_once

if TYPE_CHECKING:
    from tunekit.families import ExportComponent

PACKAGES = ("torch", "onnxscript", "onnx_ir", "diffusers", "transformers")
"""Whose code a graph comes from, beside our own."""


def graph_of(component: ExportComponent, opset: int) -> Any:
    """The graph of a component in its module's weights, as an `onnx_ir.Model`.

    Raises:
        ModelError: the exporter refuses it.
    """
    import onnx
    import onnx_ir

    kept, key = Kept.of("graphs"), _structure(component, opset)
    stored = kept.read(key) if key else None
    if stored is None:
        stored = base64.b64encode(onnx_ir.to_proto(_trace(component, opset)).SerializeToString()).decode()
        if key:
            kept.write(key, stored)
    model = onnx_ir.from_proto(onnx.load_from_string(base64.b64decode(stored)))  # the same, kept or not
    _fill(model, component)
    return model


# Tracing ---------------------------------------------------------------------------------------------------


def _trace(component: ExportComponent, opset: int) -> Any:
    """A graph whose last inputs are the weights, by the names of the module's parameters."""
    from onnxscript.optimizer import optimize_ir

    dynamic: tuple[Any, ...] = tuple(
        dict.fromkeys(component.dynamic.get(name, {}), torch.export.Dim.DYNAMIC) for name in component.inputs
    )
    taken = inspect.signature(component.module.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in taken):
        dynamic = (dynamic,)  # to the exporter, `*values` is one argument
    _read_translations_once()
    with _quiet(), collected_once(), torch.no_grad():
        try:
            program = torch.onnx.export(
                component.module,
                tuple(component.inputs.values()),
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=list(component.inputs),
                output_names=component.outputs,
                opset_version=opset,
                verbose=False,
                optimize=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ModelError(f"{component.name} cannot be exported: {reason}") from error
        assert program is not None
        model: Any = program.model
        parameters = _parameters(component)  # a set, whose order is another in each process
        for name in [name for name in model.graph.initializers if name in parameters]:
            weight = model.graph.initializers.pop(name)
            weight.const_value = None
            model.graph.inputs.append(weight)
        with _rules_by_kind():
            optimize_ir(model)
        _promote(model)
        _name_axes(model, component)
        _tidy(model)
    return model


def _parameters(component: ExportComponent) -> set[str]:
    return {name for name, _ in component.module.named_parameters(remove_duplicate=False)}


def _promote(model: Any) -> None:
    """Casts what is concatenated to one type: torch does so by itself, and the exporter does not say it."""
    import onnx_ir

    for node in list(model.graph.all_nodes()):
        wanted = node.outputs[0].dtype
        if node.op_type != "Concat" or wanted is None:
            continue
        for index, value in enumerate(node.inputs):
            if value.dtype not in (None, wanted):
                cast = onnx_ir.node("Cast", [value], {"to": wanted}, name=f"{node.name}_cast_{index}")
                cast.outputs[0].name = f"{value.name}_{wanted.name.lower()}_{index}"
                node.graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])


def _name_axes(model: Any, component: ExportComponent) -> None:
    """Gives every dynamic dimension its name."""
    import onnx_ir

    inputs = model.graph.inputs[: len(component.inputs)]
    names: dict[str, str] = {}
    for value in inputs:
        for dim, axis in component.dynamic.get(value.name, {}).items():
            names[str(value.shape[dim])] = axis
    for value in (*inputs, *model.graph.outputs):
        shape = [
            size if isinstance(size, int) else names.get(str(size), f"{value.name}_{index}")
            for index, size in enumerate(value.shape)
        ]
        value.shape = onnx_ir.Shape(shape)
    model.graph.name = component.name


def _tidy(model: Any) -> None:
    """Leaves only what running needs.

    The exporter notes on each node the Python lines it came from, with paths of this machine; and the shape
    of every value in between, over which tools that change the graph (onnxruntime's quantizer) then trip.
    """
    ends = {*model.graph.inputs, *model.graph.outputs}
    values = {*ends, *model.graph.initializers.values()}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values.update(node.outputs)
    for value in values:
        value.metadata_props.clear()
        if value not in ends:
            value.shape = value.type = None
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


@cache
def _read_translations_once() -> None:
    """Lets the exporter keep its table of translations, which it makes anew for each graph.

    It parses the source of some 500 functions for that, a second or more each time. A torch that has no such
    table exports as before.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        make = ONNXRegistry.from_torchlib
    except (ImportError, AttributeError):
        return
    ONNXRegistry.from_torchlib = staticmethod(cache(make))  # type: ignore[method-assign]


@contextmanager
def _rules_by_kind() -> Iterator[None]:
    """Tries a rewriting rule of the optimizer only on the kind of node that its pattern ends in.

    By itself it tries every rule on every node, and for a rule with several outputs goes through the whole
    graph each time: of the 41 s in which a tiny SDXL was traced 11, and more in larger graphs. An
    onnxscript whose rules do not say what they end in optimizes as before.
    """
    try:
        from onnxscript.rewriter._rewrite_rule import RewriteRule

        tried = RewriteRule.try_rewrite
    except (ImportError, AttributeError):
        yield
        return
    ends: dict[int, tuple[str, str] | None] = {}  # of rules, which live as long as the package

    def end(rule: Any) -> tuple[str, str] | None:
        try:
            kind = rule._target_pattern.output_nodes[0].op_identifier()
        except (AttributeError, IndexError):
            return None
        return None if kind is None else (kind[0], kind[1])

    def try_rewrite(rule: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        if id(rule) not in ends:
            ends[id(rule)] = end(rule)
        if ends[id(rule)] not in (None, (node.domain, node.op_type)):
            return None
        return tried(rule, model, graph, node, **options)

    RewriteRule.try_rewrite = try_rewrite
    try:
        yield
    finally:
        RewriteRule.try_rewrite = tried


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the exporter says about its own insides; its errors are exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# Filling ---------------------------------------------------------------------------------------------------


def _fill(model: Any, component: ExportComponent) -> None:
    """Puts a module's weights into its graph, and what follows from weights alone in the place of its nodes.

    The transposed weight of a Linear layer is named after its module, as all others are; passes go by it.
    """
    from onnx_ir.passes.common import (
        DeduplicateInitializersPass,
        LiftConstantsToInitializersPass,
        RemoveUnusedNodesPass,
    )
    from onnx_ir.tensor_adapters import TorchTensor
    from onnxscript.optimizer import fold_constants_ir

    graph = model.graph
    weights = {
        name: value.detach() for name, value in component.module.named_parameters(remove_duplicate=False)
    }
    fixed = set(graph.initializers.values())
    while len(graph.inputs) > len(component.inputs):
        weight = graph.inputs.pop()
        weight.const_value = TorchTensor(weights[weight.name], weight.name)
        weight.shape = weight.type = None
        graph.initializers[weight.name] = weight
        fixed.add(weight)
    foldable = set()
    for node in graph:
        if node.inputs and fixed.issuperset(node.inputs):
            weight = node.inputs[0]
            if node.op_type == "Transpose" and weight.name in weights and len(weight.uses()) == 1:
                fixed.add(_turned(graph, node, weights[weight.name]))
                continue
            foldable.add(node)
            fixed.update(node.outputs)
    no_limit = sys.maxsize
    fold_constants_ir(
        model, input_size_limit=no_limit, output_size_limit=no_limit, should_fold=foldable.__contains__
    )
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    DeduplicateInitializersPass()(model)  # small ones that are equal in these weights
    RemoveUnusedNodesPass()(model)
    _tidy(model)


def _turned(graph: Any, node: Any, weight: torch.Tensor) -> Any:
    """Puts a transposed weight in the place of the node; it is there once it is written, one at a time."""
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    given, name = node.inputs[0], node.inputs[0].name
    order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(weight.dim())[::-1]
    like = TorchTensor(weight.permute(*order), name)

    def turn() -> Any:
        return TorchTensor(weight.permute(*order).contiguous(), name)

    lazy = onnx_ir.LazyTensor(turn, dtype=like.dtype, shape=like.shape, name=name)
    made = onnx_ir.Value(name=name, const_value=lazy)
    node.outputs[0].replace_all_uses_with(made)
    graph.remove(node, safe=True)
    del graph.initializers[given.name]
    graph.initializers[name] = made
    return made


# Structure -------------------------------------------------------------------------------------------------


def _structure(component: ExportComponent, opset: int) -> str | None:
    """A digest of all that a graph follows from; None where something cannot be told from another."""
    digest = hashlib.sha256()
    aliases: dict[int, int] = {}
    parameters = [
        (name, aliases.setdefault(id(value), len(aliases)))
        for name, value in component.module.named_parameters(remove_duplicate=False)
    ]
    try:
        for value in (component, opset, parameters, torch.get_default_dtype(), _versions()):
            _describe(value, digest.update)
    except (_UnknownError, RuntimeError, TypeError):  # of tensors that have no data, too
        return None
    return digest.hexdigest()


@cache
def _versions() -> list[str]:
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return [own, code(), *(metadata.version(name) for name in PACKAGES)]


class _UnknownError(Exception):
    """A thing that has more to it than can be seen from outside."""


def _versioned(module: str) -> str:
    """The module's name, if its code is told by the versions that are in the digest."""
    if (root := module.partition(".")[0]) in ("tunekit", *PACKAGES) or root in sys.stdlib_module_names:
        return module
    raise _UnknownError(module)


_IDLE = {
    *("name_or_path", "_name_or_path", "_commit_hash", "_diffusers_version", "transformers_version"),
    *("_class_name", "_use_default_values", "_output_capturing_hooks_installed"),
}
"""Where a network came from, what its type says already, which settings nobody gave (in the order of a set,
another in each process), and whether it has been called before."""
_WATCHER = "transformers.utils.output_capturing"
"""Whose hooks a network has once it was called; they note what goes by for those who ask for it."""


def _describe(value: Any, add: Callable[[bytes], None], around: tuple[int, ...] = ()) -> None:
    """Gives all that can make a difference, bit by bit: modules, settings, shapes of weights, other tensors.

    Args:
        around: what the value is in, by identity.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | Enum):
        add(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, torch.dtype | torch.device | torch.Size):
        add(f"{value!r};".encode())
    elif isinstance(value, torch.Tensor):
        add(f"{type(value)} {value.dtype} {tuple(value.shape)} {value.stride()} {value.device};".encode())
        if not isinstance(value, torch.nn.Parameter):
            add(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif id(value) in around:
        add(f"up {len(around) - around.index(id(value))};".encode())
    elif isinstance(value, dict | list | tuple):
        rows = [
            (key, item)
            for key, item in (value.items() if isinstance(value, dict) else enumerate(value))
            if key not in _IDLE and getattr(item, "__module__", None) != _WATCHER
        ]
        add(f"{type(value).__name__} {len(rows)};".encode())
        for place, (key, item) in enumerate(rows):
            # Keys of hooks are counted through the whole process.
            of_hook = isinstance(key, int) and (callable(item) or item is True)
            _describe(place if of_hook else key, add, (*around, id(value)))
            _describe(item, add, (*around, id(value)))
    elif isinstance(value, set | frozenset):
        _describe(sorted(value, key=repr), add, around)
    elif isinstance(value, type):
        add(f"{_versioned(value.__module__)}.{value.__qualname__};".encode())
    elif inspect.isfunction(value):
        line = value.__code__.co_firstlineno  # a lambda has no other name
        add(f"{_versioned(value.__module__)}.{value.__qualname__} {line};".encode())
        inner = [cell.cell_contents for cell in value.__closure__ or ()]
        _describe([value.__defaults__, value.__kwdefaults__, *inner], add, (*around, id(value)))
    elif inspect.isbuiltin(value) and (value.__self__ is None or inspect.ismodule(value.__self__)):
        add(f"{value.__module__}.{value.__qualname__};".encode())
    elif inspect.ismethod(value):
        _describe([value.__func__, value.__self__], add, around)
    elif isinstance(value, partial):
        _describe([value.func, value.args, value.keywords], add, around)
    elif type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
        _describe([type(value), vars(value)], add, (*around, id(value)))
    else:
        raise _UnknownError(type(value))
