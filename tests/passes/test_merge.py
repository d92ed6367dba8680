from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit import families, layers
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.errors import ChainError
from tunekit.passes.base import Context, run_chain
from tunekit.passes.merge import Merge
from tunekit.runtime import open_runtime

FAMILY = families.get("sd15")
Make = Callable[..., Artifact]


def outputs(runtime: Any) -> torch.Tensor:
    shape = runtime.latent_shape(64, 64)
    noisy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    return runtime.denoise(noisy, 300, runtime.conditioning(["a cat", "a dog"], SamplingConfig()))


def merged(artifact: Artifact, folder: Path, **settings: Any) -> Artifact:
    return run_chain([Merge(**settings)], artifact, Context(run_dir=folder / "run", say=lambda line: None))


@pytest.mark.each_family
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_merged_model_is_the_base_with_its_adapter(
    family: Any, tiny_sources: Callable[[str], Path], make_adapter: Make, tmp_path: Path, kind: str
):
    base = tiny_sources(family.name)
    adapter = make_adapter(family, tmp_path / "adapter", str(base), kind=kind)
    result = merged(adapter, tmp_path)
    wanted = outputs(open_runtime(adapter, device="cpu"))
    assert torch.allclose(outputs(open_runtime(result, device="cpu")), wanted, atol=1e-4)
    plain = open_runtime(base, family=family.name, device="cpu")
    assert not torch.allclose(outputs(plain), wanted, atol=1e-2)
    assert result.format == "torch" and result.base is None
    assert [step.kind for step in result.lineage] == ["train", "merge"]
    metrics = result.lineage[-1].metrics
    assert metrics["merged_layers"] > 10 and metrics["parameters"] == sum(
        parameter.numel() for parameter in family.denoiser(family.tiny()).parameters()
    )


@pytest.mark.each_family
def test_in_half_precision_all_is_half_but_what_overflows(
    family: Any, tiny_sources: Callable[[str], Path], make_adapter: Make, tmp_path: Path
):
    import diffusers

    adapter = make_adapter(family, tmp_path / "adapter", str(tiny_sources(family.name)))
    result, whole = merged(adapter, tmp_path, dtype="fp16"), merged(adapter, tmp_path)
    parts = (family.facts.denoiser, family.facts.vae, *family.facts.encoders)
    for part in parts:
        stored = layers.stored_dtype(Path(result.source) / part.name)
        assert stored == (torch.float16 if part.fp16 else torch.float32), part.name
    plain = getattr(diffusers, family.facts.pipeline_class)
    pipeline = plain.from_pretrained(result.source, dtype=torch.float16)
    assert getattr(pipeline, family.facts.denoiser_name).dtype == torch.float16
    tiny = family.tiny()
    half = sum(
        tensor.nbytes // 2
        for part in parts
        if part.fp16
        for tensor in getattr(tiny, part.name).state_dict().values()
        if tensor.is_floating_point()
    )
    saved = whole.size_bytes - result.size_bytes
    print(f"{family.name}: {result.size_bytes / whole.size_bytes:.3f} of float32; {saved} of {half} bytes")
    assert saved == pytest.approx(half, rel=0.01)  # but for what the headers and configurations say of it


def test_a_quantized_base_stays_quantized(make_adapter: Make, tmp_path: Path):
    pipeline = FAMILY.tiny()
    layers.quantize(FAMILY.denoiser(pipeline), "int8", keep=["conv_in"])
    described = layers.describe(FAMILY.denoiser(pipeline))
    FAMILY.save(pipeline, tmp_path / "base")
    adapter = make_adapter(FAMILY, tmp_path / "adapter", str(tmp_path / "base"))
    result = merged(adapter, tmp_path)
    assert layers.describe(FAMILY.denoiser(FAMILY.load(result.source))) == described
    wanted, made = (outputs(open_runtime(item, device="cpu")) for item in (adapter, result))
    assert (made - wanted).norm() < 0.05 * wanted.norm()  # what rounding to 8 bits costs


def test_an_adapter_without_a_base_asks_for_it(tiny_source: Path, make_adapter: Make, tmp_path: Path):
    make_adapter(FAMILY, tmp_path / "adapter", None)
    bare = open_artifact(tmp_path / "adapter" / "test.kohya.safetensors", family="sd15")
    with pytest.raises(ChainError, match=r"needs the base of the adapter.*merge: \{base"):
        merged(bare, tmp_path)
    assert not (tmp_path / "run").exists()
    result = merged(bare, tmp_path, base=str(tiny_source))
    assert result.lineage[-1].metrics["merged_layers"] > 10
