"""Opens anything that can draw, with the runtime that its format asks for."""

from __future__ import annotations

from pathlib import Path

import torch

from tunekit import families, hardware
from tunekit.artifacts import Artifact, open_artifact
from tunekit.errors import ArtifactError, ConfigError, ModelError, did_you_mean
from tunekit.families.family import DTYPES, Family
from tunekit.runtime.base import Runtime, torch_runtime
from tunekit.runtime.graph import model_folder
from tunekit.runtime.onnx import ORT_PROVIDERS, open_in_onnxruntime, ort_providers
from tunekit.runtime.openvino import open_in_openvino
from tunekit.runtime.tensorrt import open_engines

PROVIDERS = (*ORT_PROVIDERS, "openvino")  # of ONNX artifacts


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
            return open_engines(artifact, chosen, device)
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
    if provider == "openvino":
        return open_in_openvino(artifact, folder, family, place, precision, threads)
    return open_in_onnxruntime(artifact, folder, family, place, precision, provider, threads)
