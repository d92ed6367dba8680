"""One way to run an artifact, whatever runs it: torch, ONNX Runtime, OpenVINO or a TensorRT engine.

A family talks to a pipeline's components. For graphs (ONNX, engines) a stand-in with the same components
is built, so the family's own code encodes, denoises and decodes on every runtime.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tunekit import families, hardware
from tunekit.artifacts import Artifact, open_artifact
from tunekit.diffusion.sampling import initial_latents, sample
from tunekit.errors import ArtifactError, ConfigError, DeviceError, ModelError, did_you_mean, require
from tunekit.families.family import DTYPES, Conditioning, Family, Pipeline
from tunekit.resources import cache_dir

PROVIDERS = ("cpu", "cuda", "tensorrt", "openvino")
ORT_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Runtime:
    """A model that is ready to run. Tensors go in and come out on the CPU, in float32.

    Attributes:
        family: what kind of model it is.
        pipeline: a diffusers pipeline, or graphs that stand in for its components.
        title: what runs it, for people: "torch fp32 cpu", "onnxruntime CPUExecutionProvider".
        artifact: where it came from; None for a pipeline that is only in memory.
        threads: CPU threads, None for the library's own choice.
    """

    family: Family
    pipeline: Pipeline
    title: str
    artifact: Artifact | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    threads: int | None = None

    @property
    def scheduler(self) -> Any:
        """The sampler that the model is configured with."""
        return self.pipeline.scheduler

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was made for."""
        return self.family.default_size(self.pipeline)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, h, w] of one picture of `height` x `width` pixels."""
        return self.family.latent_shape(self.pipeline, height, width)

    def encode_prompt(self, prompts: list[str]) -> Conditioning:
        """Encode prompts; dim 0 of every tensor is len(prompts)."""
        with self._running():
            conditioning = self.family.encode_prompt(self.pipeline, prompts)
        return {key: value.float().cpu() for key, value in conditioning.items()}

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode pixels [B, 3, H, W] in [-1, 1] to scaled mean and std, [B, 2C, h, w]."""
        with self._running():
            return self.family.encode_image(self.pipeline, pixels).cpu()

    def denoise(self, latents: Tensor, timestep: Tensor | float, conditioning: Conditioning) -> Tensor:
        """Run the denoiser on latents [B, C, h, w] at one timestep or [B] of them."""
        times = torch.as_tensor(timestep).reshape(-1).expand(len(latents))
        denoiser = self.family.denoiser(self.pipeline)
        with self._running():
            rows, known = latents.to(self.device, self.dtype), self._to_device(conditioning)
            return self.family.denoise(denoiser, rows, times.to(self.device), known).float().cpu()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents [B, C, h, w] to pixels [B, 3, H, W] in [0, 1]."""
        with self._running():
            return self.family.decode(self.pipeline, latents.to(self.device)).cpu()

    def close(self) -> None:
        """Let go of the model's memory."""
        self.pipeline = None

    def _to_device(self, conditioning: Conditioning) -> Conditioning:
        return {
            key: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for key, value in conditioning.items()
        }

    def _running(self) -> torch.no_grad:
        # Of the process, so it is set again before each use: another runtime may have set its own.
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        return torch.no_grad()


def torch_runtime(
    family: Family,
    pipeline: Pipeline,
    *,
    artifact: Artifact | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    threads: int | None = None,
) -> Runtime:
    """Run a pipeline that is in memory, on `device`; `dtype` is that of its denoiser if not given."""
    if torch.device(device) != pipeline.device:
        pipeline.to(device)
    dtype = dtype or cast(torch.dtype, family.denoiser(pipeline).dtype)
    name = {value: key for key, value in DTYPES.items()}.get(dtype, str(dtype))
    return Runtime(
        family,
        pipeline,
        f"torch {name} {device}",
        artifact,
        torch.device(device),
        dtype,
        threads,
    )


def open_runtime(
    source: Artifact | str | Path,
    *,
    family: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    provider: str | None = None,
    adapter: str | Path | None = None,
    threads: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> Runtime:
    """Open anything that can draw.

    Args:
        source: an artifact, a run folder, an adapter (with its base), a diffusers or ONNX folder, engines,
            a hub id, "builtin/..." or "tiny".
        family: the family's name, where the source does not say it.
        device: "auto", "cpu", "cuda", "cuda:1", "xpu" or "mps".
        dtype: "fp32" (the default), "bf16" or "fp16"; of torch and OpenVINO. ONNX files state their own.
        provider: of ONNX artifacts: "cpu", "cuda", "tensorrt", or "openvino" (the package, which reads the
            same model.onnx); chosen by the device if not given.
        adapter: an adapter to put on a torch source, unmerged.
        threads: CPU threads.
        revision: of a hub id.
        variant: of a diffusers folder or hub id, e.g. "fp16".
        allow_pickle: open pickled weights.

    Raises:
        ArtifactError, ModelError, AdapterError: nothing there, or it cannot be used.
        DeviceError, MissingPackageError: what should run it does not answer.
        ConfigError: an option without effect.
    """
    artifact = source if isinstance(source, Artifact) else open_artifact(source, family=family)
    described = artifact.base if artifact.format == "adapter" and not artifact.family else artifact.source
    if artifact.format == "adapter" and artifact.base is None:
        raise ArtifactError(
            "an adapter draws nothing without the base it was trained on, and this one does not name it",
            where=artifact.source,
            hint="open the base, and give this as its adapter",
        )
    if artifact.source == "tiny" and not (family or artifact.family):
        raise ModelError(
            '"tiny" is a size of every family', hint=f"name one: {', '.join(families.FAMILIES.names())}"
        )
    chosen = families.get(family or artifact.family or families.detect(str(described)))
    precision = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and precision is None:
        raise ConfigError(f'unknown dtype "{dtype}"', hint=f"one of {', '.join(DTYPES)}")

    if artifact.format in ("onnx", "tensorrt"):
        if adapter is not None:
            raise ConfigError(
                f"an adapter has no effect on a model in {artifact.format}",
                hint="merge it first: a chain of merge, then export_onnx",
            )
        if artifact.format == "tensorrt":
            if provider is not None:
                raise ConfigError("provider has no effect on TensorRT engines: they run by themselves")
            if precision is not None:
                raise ConfigError("dtype has no effect on TensorRT engines: their precision is built in")
            return _open_engines(artifact, chosen, device)
        return _open_onnx(artifact, chosen, device, precision, provider, threads)

    if provider is not None:
        raise ConfigError(
            f'provider "{provider}" has no effect on a torch model', hint="export it first: export_onnx"
        )
    place = hardware.probe(device).torch_device
    base, options = artifact.source, {}
    if artifact.format == "adapter" and artifact.base:
        base = artifact.base
        # As it was opened for training, so it is opened now.
        trained_on = artifact.lineage[0].settings.get("model") or {} if artifact.lineage else {}
        options = {
            key: trained_on[key] for key in ("revision", "variant", "allow_pickle") if key in trained_on
        }
    asked = {"revision": revision, "variant": variant, "allow_pickle": allow_pickle or None}
    options |= {key: value for key, value in asked.items() if value is not None}
    pipeline = chosen.load(base, dtype=precision or torch.float32, **options)
    adapters = [artifact.source] if artifact.format == "adapter" else []
    if adapter is not None:
        adapters.append(str(adapter))
    if len(adapters) > 1:
        raise ConfigError(
            "two adapters at once are not supported", hint="merge the first, then add the other"
        )
    if adapters:
        from tunekit.adapters import load_adapter  # peft takes seconds to import

        load_adapter(pipeline, chosen, adapters[0], allow_pickle=allow_pickle)
    return torch_runtime(
        chosen, pipeline, artifact=artifact, device=place, dtype=precision or torch.float32, threads=threads
    )


def sample_pixels(
    runtime: Runtime,
    conditioning: Conditioning,
    negative: Conditioning | None,
    *,
    seeds: Sequence[int],
    steps: int = 30,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Draw one batch from prompts that are encoded already; pixels [B, 3, H, W] in [0, 1]."""
    default_height, default_width = runtime.default_size
    shape = runtime.latent_shape(height or default_height, width or default_width)
    latents = sample(
        runtime.denoise,
        runtime.scheduler,
        initial_latents(seeds, shape),
        conditioning,
        negative,
        steps=steps,
        guidance=guidance,
        seeds=seeds,
        on_step=on_step,
    )
    return runtime.decode(latents)


def generate_pixels(
    runtime: Runtime,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    negative_prompt: str = "",
    steps: int = 30,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Draw one picture per seed as pixels [N, 3, H, W] in [0, 1]; see `generate`."""
    if not seeds or not prompts:
        raise ConfigError("nothing to draw: there must be a prompt and a seed")
    if len(prompts) == 1:
        prompts = [prompts[0]] * len(seeds)
    if len(seeds) == 1:
        seeds = [seeds[0]] * len(prompts)
    if len(prompts) != len(seeds):
        raise ConfigError(
            f"{len(prompts)} prompts and {len(seeds)} seeds",
            hint="give one seed per prompt, or one of either",
        )
    size = batch or min(4, len(prompts))
    pixels = []
    for start in range(0, len(prompts), size):
        part = list(prompts[start : start + size])
        pixels.append(
            sample_pixels(
                runtime,
                runtime.encode_prompt(part),
                runtime.encode_prompt([negative_prompt] * len(part)) if guidance > 1 else None,
                seeds=seeds[start : start + size],
                steps=steps,
                guidance=guidance,
                height=height,
                width=width,
                on_step=on_step,
            )
        )
    return torch.cat(pixels)


def generate(
    runtime: Runtime,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    negative_prompt: str = "",
    steps: int = 30,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> list[Image.Image]:
    """Draw one picture per seed, the same on every runtime and in every batch to rounding.

    Args:
        runtime: from `open_runtime`.
        prompts: one per seed, or a single one for all.
        seeds: one per prompt, or a single one for all.
        negative_prompt: what not to draw; used where guidance > 1.
        steps: of the sampler.
        guidance: classifier-free guidance scale.
        height: in pixels; the model's own if not given.
        width: likewise.
        batch: pictures at once.
        on_step: called with (steps done, all steps, latents) in each batch.
    """
    pixels = generate_pixels(
        runtime,
        prompts,
        seeds=seeds,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=guidance,
        height=height,
        width=width,
        batch=batch,
        on_step=on_step,
    )
    return to_images(pixels)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn pixels [B, 3, H, W] in [0, 1] into pictures of 8 bits."""
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in values]


# --- graphs -------------------------------------------------------------------------------------------------


class Graph(Protocol):
    """One loaded ONNX file or engine."""

    inputs: dict[str, tuple[np.dtype[Any], list[int | None]]]
    """Name -> element type and shape, None where a dimension may vary; in the order of the file."""
    max_rows: int | None
    """Largest batch it takes; None means any."""

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run it on named inputs; all outputs by name."""
        ...


class OrtGraph:
    """A model.onnx in ONNX Runtime."""

    max_rows: int | None = None

    def __init__(self, path: Path, providers: list[tuple[str, dict[str, Any]]], threads: int | None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3  # its warnings speak of its own optimizations
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        # Idle threads that wait by spinning would slow whatever runs next in this process.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if _only_stores_int8(path.parent):  # then weights are unpacked once, here, and not in each call
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self.session = ort.InferenceSession(path, options, providers=providers)
        except Exception as error:  # its exception classes have no common base
            raise ModelError(f"ONNX Runtime cannot load it: {_first_line(error)}", where=str(path)) from error
        wanted = providers[0][0]
        if wanted not in self.session.get_providers():
            raise DeviceError(f"ONNX Runtime's {wanted} does not start here", hint="see its messages above")
        self.inputs: dict[str, tuple[np.dtype[Any], list[int | None]]] = {
            node.name: (_ORT_TYPES[node.type], [d if isinstance(d, int) else None for d in node.shape])
            for node in self.session.get_inputs()
        }
        self.outputs = [node.name for node in self.session.get_outputs()]

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """See `Graph.run`."""
        return dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))


def _only_stores_int8(folder: Path) -> bool:
    """Whether the config.json of a component says that its int8 weights are computed with as floats."""
    config = folder / "config.json"
    noted = json.loads(config.read_text(encoding="utf-8")).get("quantization") if config.is_file() else None
    return isinstance(noted, dict) and noted.get("mode") == "weight_only"


class OpenVinoGraph:
    """A model.onnx in OpenVINO."""

    max_rows: int | None = None

    def __init__(self, path: Path, device: str, precision: torch.dtype, threads: int | None) -> None:
        openvino = require("openvino", extra="openvino", why='provider "openvino" needs')
        # Without the hint OpenVINO takes bf16 where the processor has it, which nobody asked for.
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _OPENVINO_TYPES[precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads is not None and device == "CPU":
            settings["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        if device not in core.available_devices:
            raise DeviceError(
                f"OpenVINO finds no device {device}", hint=f"it finds {', '.join(core.available_devices)}"
            )
        try:
            self.compiled = core.compile_model(core.read_model(path), device, settings)
        except RuntimeError as error:
            raise ModelError(f"OpenVINO cannot load it: {_first_line(error)}", where=str(path)) from error
        self.request = self.compiled.create_infer_request()
        self.inputs = {
            port.get_any_name(): (
                np.dtype(port.get_element_type().to_dtype()),
                [d.get_length() if d.is_static else None for d in port.get_partial_shape()],
            )
            for port in self.compiled.inputs
        }
        self.outputs = [port.get_any_name() for port in self.compiled.outputs]

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """See `Graph.run`."""
        results = self.request.infer(feeds, share_inputs=True)
        return {name: results[i].copy() for i, name in enumerate(self.outputs)}


class EngineGraph:
    """A TensorRT-RTX engine on the GPU that torch uses; torch owns its buffers."""

    def __init__(self, path: Path, device: torch.device) -> None:
        trt = require("tensorrt_rtx", extra="tensorrt", why="TensorRT-RTX engines need")
        self.device = device
        # Engine and context borrow from their makers, which must live as long.
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        with torch.cuda.device(device):
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            self._context: Any = self._engine.create_execution_context() if self._engine else None
        if self._context is None:
            raise ModelError(
                f"TensorRT-RTX {trt.__version__} cannot open it on {torch.cuda.get_device_name(device)}",
                where=str(path),
                hint="engines need the card and the TensorRT-RTX they were built for; build them again",
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.inputs = {
            name: (
                np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))),
                [size if size >= 0 else None for size in self._engine.get_tensor_shape(name)],
            )
            for name in inputs
        }
        self.outputs = {
            name: torch.from_numpy(np.empty(0, trt.nptype(self._engine.get_tensor_dtype(name)))).dtype
            for name in names
            if name not in inputs
        }
        most = [
            self._engine.get_tensor_profile_shape(name, 0)[2][0]
            for name, (_, shape) in self.inputs.items()
            if shape and shape[0] is None
        ]
        self.max_rows: int | None = min(most, default=None)

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """See `Graph.run`."""
        held = {name: torch.from_numpy(array).to(self.device) for name, array in feeds.items()}
        for name, tensor in held.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                low, _, high = self._engine.get_tensor_profile_shape(name, 0)
                raise ModelError(
                    f"{name} has shape {list(tensor.shape)}; the engine takes {list(low)} to {list(high)}",
                    hint="build it with a wider range of sizes",
                )
        results = {
            name: torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=kind, device=self.device)
            for name, kind in self.outputs.items()
        }
        for name, tensor in (held | results).items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream(self.device)
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise DeviceError("TensorRT-RTX could not run the engine", hint="its messages are above")
        stream.synchronize()
        return {name: tensor.cpu().numpy() for name, tensor in results.items()}


class GraphModule:
    """A graph that is called like the torch module it was exported from."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, graph: Graph, config: dict[str, Any]) -> None:
        self.graph = graph
        self.config = SimpleNamespace(**config)

    def __call__(self, *args: Tensor, return_dict: bool = True, **kwargs: Tensor) -> Any:
        """Take inputs by position or name; return outputs by name, or as a tuple without `return_dict`."""
        feeds = dict(zip(self.graph.inputs, args, strict=False)) | kwargs
        if feeds.keys() != self.graph.inputs.keys():
            raise ModelError(
                f"the graph takes {', '.join(self.graph.inputs)}; it was given {', '.join(feeds)}",
                hint="export it again with this version",
            )
        outputs = {name: torch.from_numpy(array).float() for name, array in self._run(feeds).items()}
        return SimpleNamespace(**outputs) if return_dict else tuple(outputs.values())

    def _run(self, feeds: dict[str, Tensor]) -> dict[str, Array]:
        arrays = {}
        for name, value in feeds.items():
            kind, _ = self.graph.inputs[name]
            arrays[name] = np.ascontiguousarray(value.detach().cpu().numpy().astype(kind, copy=False))
        rows = max(len(array) for array in arrays.values())
        step = min(rows, self.graph.max_rows or rows)
        # Other programs feed one timestep for the whole batch, so graphs take just one.
        single = [name for name in arrays if self.graph.inputs[name][1][:1] == [1]]
        if any((arrays[name] != arrays[name][0]).any() for name in single):
            step = 1
        parts = []
        for start in range(0, rows, step):
            part = {k: a if len(a) == 1 else a[start : start + step] for k, a in arrays.items()}
            parts.append(self.graph.run({k: a[:1] if k in single else a for k, a in part.items()}))
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class GraphVae:
    """The two graphs of a VAE, called like diffusers' AutoencoderKL."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, encoder: GraphModule | None, decoder: GraphModule) -> None:
        self.encoder, self.decoder = encoder, decoder
        self.config = decoder.config

    def encode(self, sample: Tensor) -> Any:
        """Encode pixels; `.latent_dist` has `.mean` and `.std`."""
        if self.encoder is None:
            raise ModelError("this artifact has no vae_encoder", hint="export it again with all components")
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return SimpleNamespace(
            latent_dist=DiagonalGaussianDistribution(self.encoder(sample).latent_parameters)
        )

    def decode(self, latents: Tensor) -> Any:
        """Decode unscaled latents; `.sample` is in [-1, 1]."""
        return self.decoder(latents)


_ORT_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
}
_OPENVINO_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def _graph_pipeline(folder: Path, family: Family, open_graph: Callable[[Path], Graph]) -> Pipeline:
    """Build the stand-in for a pipeline out of a folder in Optimum's layout.

    Args:
        folder: with model_index.json, scheduler/, tokenizer/ and one folder with config.json per graph.
        family: whose denoiser and encoders to look for.
        open_graph: opens the graph in a component's folder.
    """
    import diffusers
    import transformers

    index_file = folder / "model_index.json"
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"its model_index.json cannot be read: {error}", where=str(folder)) from error

    def component(name: str) -> GraphModule:
        config = folder / name / "config.json"
        if not config.is_file():
            raise ArtifactError(f"its component {name} is missing", where=str(folder))
        return GraphModule(open_graph(folder / name), json.loads(config.read_text(encoding="utf-8")))

    parts: dict[str, Any] = {family.facts.denoiser_name: component(family.facts.denoiser_name)}
    for tokenizer, encoder in family.facts.encoders:
        tokenizer_class = getattr(transformers, index[tokenizer][1])
        parts |= {tokenizer: tokenizer_class.from_pretrained(folder / tokenizer), encoder: component(encoder)}
    encoder_there = (folder / "vae_encoder" / "config.json").is_file()
    parts["vae"] = GraphVae(component("vae_encoder") if encoder_there else None, component("vae_decoder"))
    parts["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    return SimpleNamespace(**parts)


def _open_onnx(
    artifact: Artifact,
    family: Family,
    device: str,
    precision: torch.dtype | None,
    provider: str | None,
    threads: int | None,
) -> Runtime:
    folder = _folder(artifact)
    place = hardware.probe(device)
    if provider is None:
        provider = "cuda" if place.kind == "cuda" and ORT_PROVIDERS["cuda"] in _ort_providers() else "cpu"
    if provider not in PROVIDERS:
        raise ConfigError(
            f'unknown provider "{provider}"',
            hint=did_you_mean(provider, PROVIDERS) or f"one of {', '.join(PROVIDERS)}",
        )
    if provider == "openvino":
        precision = precision or torch.float32
        openvino_device = "GPU" if place.kind == "xpu" else "CPU"
        title = f"openvino {_OPENVINO_TYPES[precision]} {openvino_device}"
        pipeline = _graph_pipeline(
            folder,
            family,
            lambda path: OpenVinoGraph(path / "model.onnx", openvino_device, precision, threads),
        )
    else:
        if precision is not None:
            raise ConfigError("dtype has no effect on an ONNX model: its precision is in the file")
        providers = _ort_choice(provider, artifact, place.index)
        title = f"onnxruntime {ORT_PROVIDERS[provider]}"
        pipeline = _graph_pipeline(
            folder, family, lambda path: OrtGraph(path / "model.onnx", providers(path.name), threads)
        )
    return Runtime(family, pipeline, title, artifact, threads=threads)


def _open_engines(artifact: Artifact, family: Family, device: str) -> Runtime:
    folder = _folder(artifact)
    require("tensorrt_rtx", extra="tensorrt", why="TensorRT-RTX engines need")
    if not torch.cuda.is_available():
        raise DeviceError(
            "TensorRT-RTX engines run on NVIDIA RTX cards, and torch finds none here",
            where=artifact.source,
            hint="open the ONNX model that they were built from, or take this folder to such a machine",
        )
    place = torch.device(hardware.probe("cuda" if device == "auto" else device).torch_device)
    if place.type != "cuda":
        raise DeviceError(f"TensorRT-RTX engines do not run on {device}", where=artifact.source)
    name = "sm{}{}".format(*torch.cuda.get_device_capability(place))
    built = sorted(path.stem for path in (folder / family.facts.denoiser_name).glob("*.engine"))
    if name not in built:
        raise DeviceError(
            f"its engines are for {', '.join(built) or 'nothing'}; "
            f"{torch.cuda.get_device_name(place)} needs {name}",
            where=artifact.source,
            hint="build them for this card: build_tensorrt: {devices: [...]}",
        )
    pipeline = _graph_pipeline(folder, family, lambda path: EngineGraph(path / f"{name}.engine", place))
    return Runtime(family, pipeline, f"tensorrt-rtx {torch.cuda.get_device_name(place)}", artifact)


def _ort_providers() -> list[str]:
    import onnxruntime as ort

    return list(ort.get_available_providers())


def _ort_choice(
    provider: str, artifact: Artifact, index: int
) -> Callable[[str], list[tuple[str, dict[str, Any]]]]:
    """Return the provider list, with options, for each component."""
    name = ORT_PROVIDERS[provider]
    if name not in _ort_providers():
        raise DeviceError(
            f"ONNX Runtime has no {name} here; it has {', '.join(_ort_providers())}",
            hint='pip uninstall onnxruntime; pip install "tunekit[gpu]" (and an NVIDIA driver)',
        )
    cpu: tuple[str, dict[str, Any]] = (ORT_PROVIDERS["cpu"], {})
    cuda = (ORT_PROVIDERS["cuda"], {"device_id": index})
    if provider == "cpu":
        return lambda component: [cpu]
    if provider == "cuda":
        return lambda component: [cuda, cpu]
    # Building takes minutes; the next start takes the engines from here.
    cache = cache_dir() / "tensorrt" / artifact.hash[:16]
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


def _folder(artifact: Artifact) -> Path:
    if artifact.model_path is None or not artifact.model_path.is_dir():
        raise ArtifactError(f"a model in {artifact.format} has to be a folder", where=artifact.source)
    return artifact.model_path


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
