from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit import families, layers
from tunekit.adapters import add_adapter, save_adapter
from tunekit.artifacts import Artifact, Step, open_artifact
from tunekit.config import AdapterConfig
from tunekit.errors import ArtifactError
from tunekit.passes.base import Context, run_chain
from tunekit.passes.merge import Merge
from tunekit.runtime import open_runtime

FAMILY = families.get("sd15")


def make_adapter(folder: Path, source: str | None, **config: Any) -> Artifact:
    """An adapter that changes every layer it is on, with a record as training writes it."""
    settings = AdapterConfig(rank=4, alpha=2, **config)
    denoiser = FAMILY.denoiser(FAMILY.tiny())
    generator = torch.Generator().manual_seed(5)
    for name, parameter in add_adapter(denoiser, settings, FAMILY.facts.lora_targets):
        if "magnitude" not in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    save_adapter(folder, denoiser, FAMILY, settings, name="test", title="test", base_source=None)
    how = {
        "model": {
            "family": "sd15",
            "source": source,
            "revision": None,
            "variant": None,
            "allow_pickle": False,
        }
    }
    step = Step(kind="train", artifact=folder.name, settings=how)
    return Artifact(folder, folder, "adapter", "sd15", str(folder), lineage=(step,), base=source).write()


def outputs(runtime: Any) -> torch.Tensor:
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return runtime.denoise(noisy, 300, runtime.encode_prompt(["a cat", "a dog"]))


def merged(artifact: Artifact, folder: Path, **settings: Any) -> Artifact:
    return run_chain([Merge(**settings)], artifact, Context(run_dir=folder / "run", say=lambda line: None))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_merged_model_is_the_base_with_its_adapter(tiny_source: Path, tmp_path: Path, kind: str):
    adapter = make_adapter(tmp_path / "adapter", str(tiny_source), kind=kind)
    result = merged(adapter, tmp_path)
    wanted = outputs(open_runtime(adapter, device="cpu"))
    assert torch.allclose(outputs(open_runtime(result, device="cpu")), wanted, atol=1e-4)
    assert not torch.allclose(
        outputs(open_runtime(tiny_source, family="sd15", device="cpu")), wanted, atol=1e-2
    )
    assert result.format == "torch" and result.base is None
    assert [step.kind for step in result.lineage] == ["train", "merge"]
    metrics = result.lineage[-1].metrics
    assert metrics["merged_layers"] > 10 and metrics["parameters"] == sum(
        parameter.numel() for parameter in FAMILY.denoiser(FAMILY.tiny()).parameters()
    )


def test_plain_diffusers_loads_the_result(tiny_source: Path, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    result = merged(make_adapter(tmp_path / "adapter", str(tiny_source)), tmp_path, dtype="fp16")
    pipeline = StableDiffusionPipeline.from_pretrained(result.source, torch_dtype=torch.float16)
    assert pipeline.unet.dtype == torch.float16
    whole = merged(make_adapter(tmp_path / "adapter", str(tiny_source)), tmp_path)
    assert result.size_bytes < 0.6 * whole.size_bytes


def test_a_quantized_base_stays_quantized(tmp_path: Path):
    pipeline = FAMILY.tiny()
    layers.quantize(FAMILY.denoiser(pipeline), "int8", keep=["conv_in"])
    described = layers.describe(FAMILY.denoiser(pipeline))
    FAMILY.save(pipeline, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    result = merged(adapter, tmp_path)
    assert layers.describe(FAMILY.denoiser(FAMILY.load(result.source))) == described
    wanted, made = (outputs(open_runtime(item, device="cpu")) for item in (adapter, result))
    assert (made - wanted).norm() < 0.05 * wanted.norm()  # what rounding to 8 bits costs


def test_an_adapter_without_a_base_asks_for_it(tiny_source: Path, tmp_path: Path):
    make_adapter(tmp_path / "adapter", None)
    bare = open_artifact(tmp_path / "adapter" / "test.kohya.safetensors", family="sd15")
    with pytest.raises(ArtifactError, match=r"does not say which base.*\n.*merge: \{base"):
        merged(bare, tmp_path)
    assert list((tmp_path / "run").glob("*")) == []
    result = merged(bare, tmp_path, base=str(tiny_source))
    assert result.lineage[-1].metrics["merged_layers"] > 10
