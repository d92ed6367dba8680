from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit import layers
from tunekit.artifacts import Artifact
from tunekit.errors import ChainError, ModelError
from tunekit.families import weights
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
from tunekit.resources import Source

CHAIN: list[Any] = ["merge", {"single_file": {"dtype": "fp32"}}]


@pytest.mark.each_family
def test_the_merged_model_is_written_and_the_chain_goes_on(
    family: Any, tiny_sources: Callable[[str], Path], make_adapter: Any, tmp_path: Path
):
    """What another program reads from the one file is the merged model."""
    import diffusers

    adapter: Artifact = make_adapter(family, tmp_path / "adapter", str(tiny_sources(family.name)))
    context = Context(run_dir=tmp_path / "mine", say=lambda line: None)
    if not family.facts.denoiser.published:
        with pytest.raises(ModelError, match="has no layout of a single file"):
            run_chain(parse_chain(CHAIN), adapter, context)
        return
    result = run_chain(parse_chain(CHAIN), adapter, context)
    assert result.path is not None and result.model_path != result.path
    file = result.path / "mine.safetensors"
    assert result.lineage[-1].metrics["file_bytes"] == file.stat().st_size > 100_000
    merged = family.load(result.source)
    names = weights.entries([file])
    read: dict[str, Any] = {}
    coder = family.facts.vae.published
    if coder and any(name.startswith(coder) for name in names):  # a whole model
        plain = getattr(diffusers, family.facts.pipeline_class)
        theirs = plain.from_single_file(str(file), config=str(result.source))
        read = {part.name: getattr(theirs, part.name) for part in family.facts.components}
    else:  # the denoiser alone; the readers of diffusers take the real sizes for granted
        other = family.load(Source(str(file), base=result.source))
        read = {family.facts.denoiser_name: family.denoiser(other)}
    for name, network in read.items():
        if name != "scheduler":
            state = network.state_dict()
            for key, value in getattr(merged, name).state_dict().items():
                assert torch.equal(state[key], value), f"{name}.{key}"
    own, made = family.denoiser(family.tiny()).state_dict(), read[family.facts.denoiser_name].state_dict()
    assert any(not torch.equal(value, made[key]) for key, value in own.items())  # the adapter is in it


def test_packed_weights_are_refused_before_anything_runs():
    with pytest.raises(ChainError, match="no other program reads packed weights"):
        check_chain(parse_chain([{"quantize": {"scheme": "int8"}}, "single_file"]), "torch")


def test_in_half_precision(tiny_source: Path, tmp_path: Path):
    from tunekit.artifacts import open_artifact

    context = Context(run_dir=tmp_path / "half", say=lambda line: None)
    result = run_chain(parse_chain(["single_file"]), open_artifact(tiny_source, family="sd15"), context)
    assert result.path is not None
    assert layers.stored_dtype(result.path) == torch.float16
