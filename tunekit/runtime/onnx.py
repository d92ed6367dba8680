"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from tunekit import hardware, install
from tunekit.artifacts import Artifact
from tunekit.config import RuntimeConfig
from tunekit.errors import ConfigError, DeviceError, ModelError
from tunekit.families.family import Family, Middle
from tunekit.hardware import Device
from tunekit.records import read_mapping
from tunekit.resources import cache_dir
from tunekit.runtime.base import Runtime, settings_here
from tunekit.runtime.graph import Array, GraphModule, first_line, graph_module, graph_pipeline
from tunekit.runtime.onnx_split import with_middle, without_middle
from tunekit.runtime.step_cache import GraphSplit, Split

ORT_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "directml": "DmlExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
"""Of which a package of ONNX Runtime has some; `package_with` says which."""
DOWN, UP = ".lora_down", ".lora_up"
"""How the names of the two inputs of a layer end that adapters are for; see `runtime.swap`."""
_ORT_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int8)": np.dtype(np.int8),
}


_ONNX_TYPES = {"tensor(float)": 1, "tensor(uint8)": 2, "tensor(int8)": 3, "tensor(float16)": 10}
"""Of values within a graph, as TensorProto counts them."""


def open_in_onnxruntime(
    artifact: Artifact,
    folder: Path,
    family: Family,
    place: Device,
    precision: torch.dtype | None,
    provider: str,
    threads: int | None,
) -> Runtime:
    """Open the ONNX model in `folder` with one of ORT_PROVIDERS."""
    if precision is not None:
        raise ConfigError("dtype has no effect on an ONNX model: its precision is in the file")
    providers = _ort_choice(provider, artifact, place.index)
    title = f"onnxruntime {ORT_PROVIDERS[provider]}"
    settings, name = settings_here(artifact, title), family.facts.denoiser_name
    turns = Turns() if provider == "cpu" and _is_crowded(folder) else None

    def graph(path: Path, settings: RuntimeConfig | None = settings) -> OrtGraph:
        made = OrtGraph(path / "model.onnx", providers(path.name), threads, settings, turns=turns)
        made.max_rows = settings.rows if settings and path.name == name else None
        return made

    def denoiser(settings: RuntimeConfig) -> GraphModule:
        return graph_module(folder / name, lambda path: graph(path, settings))

    def take_apart(runtime: Runtime, middle: Middle) -> Split:
        module = family.denoiser(runtime.pipeline)
        assert isinstance(module, GraphModule)
        return _apart(module, middle, providers(name), threads, runtime.settings)

    return Runtime(
        family,
        graph_pipeline(folder, family, graph),
        title,
        artifact,
        threads=threads or (settings.threads if settings else None),
        settings=settings,
        reopen=denoiser,
        take_apart=take_apart,
    )


def _apart(
    module: GraphModule,
    middle: Middle,
    providers: list[tuple[str, dict[str, Any]]],
    threads: int | None,
    settings: RuntimeConfig | None,
) -> GraphSplit:
    """Opens the two graphs that a denoiser's can be taken apart into, in place of it."""
    whole_graph = cast("OrtGraph", module.graph)
    path, rows = whole_graph.path, whole_graph.max_rows
    model, names = with_middle(path, [f"{module.name}.{part}." for part in middle.paths])
    whole = OrtGraph(path, providers, threads, settings, model=model.SerializeToString())
    taken = {
        node.name: (_ONNX_TYPES[node.type], list(node.shape))
        for node in whole.session.get_outputs()
        if node.name in names
    }
    outer = OrtGraph(
        path, providers, threads, settings, model=without_middle(model, taken).SerializeToString()
    )
    whole.max_rows = outer.max_rows = rows
    whole.adapter = whole_graph.adapter
    return GraphSplit(module, whole, outer, names)


def _options(title: str, threads: int | None, settings: RuntimeConfig | None) -> Any:
    """How ONNX Runtime runs a graph.

    Args:
        title: ONNX Runtime's name of the provider.
        threads: that were asked for; before those of the settings.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings speak of its own optimizations
    threads = threads or (settings.threads if settings else None)
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    # Idle threads that wait by spinning would slow whatever runs next in this process.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if title == ORT_PROVIDERS["directml"]:  # which takes no other (onnxruntime.ai/docs, DirectML)
        options.enable_mem_pattern = False
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    if settings is None:
        return options
    if settings.optimization is not None:
        level = {"none": "DISABLE_ALL"}.get(settings.optimization, f"ENABLE_{settings.optimization.upper()}")
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    if settings.arena is not None:
        options.enable_cpu_mem_arena = settings.arena
    if settings.memory_pattern is not None and title != ORT_PROVIDERS["directml"]:
        options.enable_mem_pattern = settings.memory_pattern
    if settings.spinning is not None:
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(settings.spinning)))
    return options


ROOM = 0.4
"""Share of the host's free memory from which graphs, by the size of their files, are opened one at a time:
ONNX Runtime reorders weights, and then has some of them twice."""


def _is_crowded(folder: Path) -> bool:
    size = sum(
        path.stat().st_size for graph in folder.glob("*/model.onnx") for path in graph.parent.iterdir()
    )
    return size > ROOM * hardware.machine_memory()[1]


class Turns:
    """Graphs that are in memory one at a time: whose turn it is, is opened, and the one before goes."""

    def __init__(self) -> None:
        self._last: OrtGraph | None = None

    def take(self, graph: OrtGraph) -> None:
        """Before a graph is opened."""
        if self._last is not None and self._last is not graph:
            self._last.put_away()
        self._last = graph


class OrtGraph:
    """A model.onnx in ONNX Runtime."""

    max_rows: int | None = None

    def __init__(
        self,
        path: Path,
        providers: list[tuple[str, dict[str, Any]]],
        threads: int | None,
        settings: RuntimeConfig | None = None,
        model: bytes | None = None,
        turns: Turns | None = None,
    ) -> None:
        """Opens it.

        Args:
            threads: before those of the settings.
            model: what was made of the file, in place of what is in it.
            turns: of graphs of which one is in memory at a time.
        """
        self.path, self._model, self._turns = path, model, turns
        self._how = (providers, threads, settings)
        session = self._opened(at_once=turns is None)
        self._session = session if turns is None else None
        for node in session.get_inputs():
            if node.type not in _ORT_TYPES:
                raise ModelError(f"its input {node.name} is a {node.type}", where=str(path))
        self.inputs: dict[str, tuple[np.dtype[Any], list[int | None]]] = {
            node.name: (_ORT_TYPES[node.type], [d if isinstance(d, int) else None for d in node.shape])
            for node in session.get_inputs()
        }
        self.open_inputs = {
            node.name: (_ORT_TYPES[node.type], [d if isinstance(d, int) else None for d in node.shape])
            for node in session.get_overridable_initializers()
            if node.name.endswith((DOWN, UP)) and node.type in _ORT_TYPES
        }
        """What an adapter feeds, as `inputs`; they have a default, with which it has no effect."""
        self.adapter: dict[str, Array] = {}
        """What is fed in each call beside its inputs."""
        self.outputs = [node.name for node in session.get_outputs()]
        axes = {node.name: str(node.shape[0]) for node in session.get_inputs() if node.shape}
        named = {name: "batch" in axis for name, axis in axes.items() if not axis.isdigit()}
        # Only where the batch has its name are the other names worth something.
        self.unbatched = frozenset(name for name, batch in named.items() if not batch and any(named.values()))

    @property
    def session(self) -> Any:
        """What runs it; opened where it was put away."""
        if self._turns is not None:
            self._turns.take(self)
        if self._session is None:
            self._session = self._opened()
        return self._session

    def put_away(self) -> None:
        """Lets go of its memory until it is used again."""
        self._session = None

    def _opened(self, *, at_once: bool = True) -> Any:
        """A session; or one to look at, which reads no weights that lie beside the graph."""
        import onnxruntime as ort

        providers, threads, settings = self._how
        options = _options(providers[0][0], threads, settings)
        if not at_once:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self._model is not None:  # weights outside of it lie beside the file that it was made of
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self.path.parent)
            )
        if _only_stores_int8(self.path.parent):  # then weights are unpacked once, here, not in each call
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            session = ort.InferenceSession(self._model or self.path, options, providers=providers)
        except Exception as error:  # its exception classes have no common base
            raise ModelError(
                f"ONNX Runtime cannot load it: {first_line(error)}", where=str(self.path)
            ) from error
        wanted = providers[0][0]
        if wanted not in session.get_providers():
            raise DeviceError(f"ONNX Runtime's {wanted} does not start here", hint="see its messages above")
        return session

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """See `Graph.run`."""
        try:
            made = self.session.run(self.outputs, {**feeds, **self.adapter})
            return dict(zip(self.outputs, made, strict=True))
        except Exception as error:  # its exception classes have no common base
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
            raise ModelError(
                f"ONNX Runtime cannot run it on {shapes}: {first_line(error)}", where=str(self.path)
            ) from error


def _only_stores_int8(folder: Path) -> bool:
    """Whether the config.json of a component says that its int8 weights are computed with as floats."""
    config = folder / "config.json"
    noted = read_mapping(config).get("quantization") if config.is_file() else None
    return isinstance(noted, dict) and noted.get("mode") == "weight_only"


def ort_providers() -> list[str]:
    """Return what the installed ONNX Runtime can run on."""
    import onnxruntime as ort

    return list(ort.get_available_providers())


def package_with(provider: str) -> str:
    """How ONNX Runtime comes to have one of ORT_PROVIDERS; one of its packages alone can be there."""
    remove = f"{install.pip('uninstall')} onnxruntime"
    packages = {"directml": "Windows", "migraphx": "an AMD card on Linux", "rocm": "an AMD card on Linux"}
    if provider in packages:
        return f"{remove}; {install.pip('install')} onnxruntime-{provider} ({packages[provider]})"
    if provider == "coreml":
        return "onnxruntime has it on macOS alone"
    return f"{remove}; {install.with_extra('gpu')} (and an NVIDIA driver)"


def _ort_choice(
    provider: str, artifact: Artifact, index: int
) -> Callable[[str], list[tuple[str, dict[str, Any]]]]:
    """Return the provider list, with options, for each component."""
    name = ORT_PROVIDERS[provider]
    if name not in ort_providers():
        raise DeviceError(
            f"ONNX Runtime has no {name} here; it has {', '.join(ort_providers())}",
            hint=package_with(provider),
        )
    cpu: tuple[str, dict[str, Any]] = (ORT_PROVIDERS["cpu"], {})
    cuda = (ORT_PROVIDERS["cuda"], {"device_id": index})
    if provider == "cpu":
        return lambda component: [cpu]
    if provider == "cuda":
        return lambda component: [cuda, cpu]
    if provider != "tensorrt":
        own: dict[str, Any] = {} if provider == "coreml" else {"device_id": index}
        return lambda component: [(name, own), cpu]
    # Building takes minutes; the next start takes the engines from here.
    home = cache_dir()
    if home is None:
        return lambda component: [(name, {"device_id": index}), cuda, cpu]
    cache = home / "tensorrt" / artifact.hash[:16]
    options = {"device_id": index, "trt_engine_cache_enable": True, "trt_timing_cache_enable": True}
    return lambda component: [
        (
            name,
            {
                **options,
                "trt_engine_cache_path": str(cache / component),
                "trt_timing_cache_path": str(cache),
            },
        ),
        cuda,
        cpu,
    ]
