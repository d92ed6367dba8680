"""Opens anything that can draw, with the runtime that its format asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from tunekit import families, hardware
from tunekit.artifacts import Artifact, open_artifact
from tunekit.errors import ArtifactError, ConfigError, ModelError, did_you_mean
from tunekit.families.family import DTYPES, Dtypes, Family, Pipeline
from tunekit.resources import Source
from tunekit.runtime.base import Runtime, torch_runtime
from tunekit.runtime.graph import model_folder
from tunekit.runtime.onnx import ORT_PROVIDERS, open_in_onnxruntime, ort_providers
from tunekit.runtime.openvino import open_in_openvino, open_ir
from tunekit.runtime.tensorrt import open_engines

PROVIDERS = (*ORT_PROVIDERS, "openvino", "openvino_bf16")  # of ONNX artifacts
Load = Callable[[Family, Source, Dtypes], Pipeline]


def open_runtime(
    source: Artifact | Source | str | Path,
    *,
    family: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    provider: str | None = None,
    adapter: str | Path | None = None,
    threads: int | None = None,
    load: Load | None = None,
) -> Runtime:
    """Open anything that can draw.

    Args:
        source: an artifact, a run folder, an adapter (with its base), a diffusers, ONNX or OpenVINO folder,
            engines, a hub id, "builtin/..." or "tiny"; a `Source` says how it is opened, too.
        family: the family's name, where the source does not say it.
        device: "auto", "cpu", "cuda", "cuda:1", "xpu" or "mps".
        dtype: "fp32", "bf16" or "fp16", of torch and OpenVINO; what is not given is what the device is good
            at, fp32 on a processor. ONNX files state their own; OpenVINO's note what they are meant for.
        provider: of ONNX artifacts: "cpu", "cuda", "tensorrt", or "openvino" (the package, which reads the
            same model.onnx; "openvino_bf16" is the same with dtype bf16); chosen by the device if not given.
        adapter: an adapter to put on a torch source, unmerged; or on an ONNX model that was exported for
            adapters.
        threads: CPU threads.
        load: gives the torch model, where it need not be read from disk (again); not if an adapter is put on
            it, which changes it.

    Raises:
        ArtifactError, ModelError, AdapterError: nothing there, or it cannot be used.
        DeviceError, MissingPackageError: what should run it does not answer.
        ConfigError: an option without effect.
    """
    artifact = _artifact(source, family)
    if artifact.format == "adapter" and artifact.base is None:
        raise ArtifactError(
            "an adapter draws nothing without the base it was trained on, and this one does not name it",
            where=artifact.source,
            hint="open the base, and give this as its adapter",
        )
    if artifact.source == "tiny" and not (family or artifact.family):
        raise ModelError(
            '"tiny" is a size of every family', hint=f"name one: {', '.join(families.runnable())}"
        )
    chosen = families.get(family or artifact.family or families.detect(artifact.model_source))
    precision = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and precision is None:
        raise ConfigError(f'unknown dtype "{dtype}"', hint=f"one of {', '.join(DTYPES)}")

    if artifact.format in ("onnx", "openvino", "tensorrt"):
        if adapter is not None and artifact.format != "onnx":
            raise ConfigError(
                f"an adapter has no effect on a model in {artifact.format}",
                hint="merge it first: a chain of merge, then an export",
            )
        if artifact.format == "tensorrt":
            if provider is not None:
                raise ConfigError("provider has no effect on TensorRT engines: they run by themselves")
            if precision is not None:
                raise ConfigError("dtype has no effect on TensorRT engines: their precision is built in")
            return open_engines(artifact, chosen, device)
        if artifact.format == "openvino":
            if provider is not None:
                raise ConfigError(
                    "provider has no effect on a model in openvino: OpenVINO runs its own files"
                )
            return open_ir(artifact, chosen, device, precision, threads)
        opened = _open_onnx(artifact, chosen, device, precision, provider, threads)
        if adapter is not None:
            from tunekit.runtime.swap import put_adapter

            put_adapter(opened, adapter)
        return opened

    if provider is not None:
        raise ConfigError(
            f'provider "{provider}" has no effect on a torch model', hint="export it first: export_onnx"
        )
    found = hardware.probe(device)
    precision = precision or DTYPES[hardware.best_precision(found.kind, found.supports_bf16)]
    adapters = [artifact.source] if artifact.format == "adapter" else []
    if adapter is not None:
        adapters.append(str(adapter))
    if len(adapters) > 1:
        raise ConfigError(
            "two adapters at once are not supported", hint="merge the first, then add the other"
        )
    dtypes = chosen.facts.drawing_dtypes(precision)
    if load is None or adapters:
        pipeline = chosen.load(artifact.model_source, dtypes)
    else:
        pipeline = load(chosen, artifact.model_source, dtypes)
    if adapters:
        from tunekit.adapters import load_adapter  # peft takes seconds to import

        load_adapter(pipeline, chosen, adapters[0], allow_pickle=artifact.model_source.allow_pickle)
    return torch_runtime(
        chosen, pipeline, artifact=artifact, device=found.torch_device, dtype=precision, threads=threads
    )


def _artifact(source: Artifact | Source | str | Path, family: str | None) -> Artifact:
    if isinstance(source, Artifact):
        return source
    if isinstance(source, Source):
        return replace(open_artifact(source.name, family=family), opened=source)
    return open_artifact(source, family=family)


def _open_onnx(
    artifact: Artifact,
    family: Family,
    device: str,
    precision: torch.dtype | None,
    provider: str | None,
    threads: int | None,
) -> Runtime:
    folder = model_folder(artifact)
    place = hardware.probe(device)
    if provider is None:
        provider = "cuda" if place.kind == "cuda" and ORT_PROVIDERS["cuda"] in ort_providers() else "cpu"
    if provider not in PROVIDERS:
        raise ConfigError(
            f'unknown provider "{provider}"',
            hint=did_you_mean(provider, PROVIDERS) or f"one of {', '.join(PROVIDERS)}",
        )
    if provider == "openvino_bf16":
        if precision not in (None, torch.bfloat16):
            raise ConfigError('dtype contradicts the provider "openvino_bf16"', hint="leave one of them out")
        provider, precision = "openvino", torch.bfloat16
    if provider == "openvino":
        return open_in_openvino(artifact, folder, family, place, precision, threads)
    return open_in_onnxruntime(artifact, folder, family, place, precision, provider, threads)
