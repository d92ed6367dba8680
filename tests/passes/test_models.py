"""The models of a chain in memory: read once, shared by all, changed by nobody."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit import families
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.passes.base import Context, parse_chain, run_chain
from tunekit.passes.metrics import declared, find_metric
from tunekit.passes.models import Models, around, in_types

SIX: list[Any] = [
    "merge",
    {"prune": {"ratio": 0.3, "samples": 8, "multiple": 1}},
    {"heal": {"max_steps": 2, "batch_size": 2, "pictures": 8, "lr": 1e-3}},
    "quantize",
    {"verify": {"pictures": 1, "steps": 2}},
    {"benchmark": {"repeats": 1, "memory": False}},
]


def digest(pipeline: Any, family: Any) -> str:
    """Of all weights."""
    found = hashlib.sha256()
    for part in family.facts.components:
        if part.role != "scheduler":
            for name, tensor in getattr(pipeline, part.name).state_dict().items():
                found.update(name.encode() + str(tensor.dtype).encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def test_a_chain_of_six_reads_each_model_once(
    tiny_sources: Callable[[str], Path],
    make_adapter: Callable[..., Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = families.get("sdxl")
    reads: Counter[str] = Counter()
    shared: list[tuple[Any, str]] = []
    load = type(family).load

    def counted(self: Any, source: Any, *arguments: Any, **options: Any) -> Any:
        reads[Path(str(source)).name] += 1
        pipeline = load(self, source, *arguments, **options)
        if len(reads) > 1:  # merge changes the base that it has read
            shared.append((pipeline, digest(pipeline, family)))
        return pipeline

    adapter = make_adapter(family, tmp_path / "adapter", str(tiny_sources(family.name)))
    context = Context(
        run_dir=tmp_path / "run",
        device="cpu",
        prompts=("a cat",),
        sampling=SamplingConfig(steps=2),
        say=lambda line: None,
    )
    with monkeypatch.context() as patch:
        patch.setattr(type(family), "load", counted)
        last = run_chain(parse_chain(SIX), adapter, context)
    print(f"{family.name}: {sum(reads.values())} reads for six passes: {dict(reads)}")
    assert set(reads.values()) == {1}
    assert len(reads) == 5  # base, merged, pruned, healed, quantized
    assert all(digest(pipeline, family) == before for pipeline, before in shared)
    assert not context.models._pipelines and not context.models._recorded, "nothing is held when it ends"
    assert [step.kind for step in last.lineage][1:] == [
        *("merge", "prune", "heal", "quantize", "verify", "benchmark")
    ]
    metrics = {name for step in last.lineage[1:] for name in step.metrics}
    undeclared = [name for name in metrics if find_metric(name) not in declared()]
    assert undeclared == []
    pruned, healed, quantized, verified = (step.metrics for step in last.lineage[2:6])
    assert healed["parameters"] == pruned["parameters"] < pruned["parameters_before"]  # type: ignore[operator]
    assert healed["relative_error"] <= healed["relative_error_before"]  # type: ignore[operator]
    # What is verified is what was written, not what quantize had in memory.
    assert verified["relative_error"] == pytest.approx(quantized["relative_error"], rel=1)
    assert verified["relative_error_vae_decoder"] == 0


def test_what_no_later_step_can_want_is_let_go(tiny_source: Path) -> None:
    family, models = families.get("sd15"), Models()
    artifact = open_artifact(tiny_source, family="sd15")
    models.begin([artifact])
    pipeline = models.load(family, artifact.model_source)
    calls: list[int] = []
    for _ in range(2):
        assert models.recorded(artifact, "what", lambda: calls.append(1) or 7) == 7
        models.done(artifact)
        models.end()
    assert models.load(family, artifact.model_source) is pipeline and calls == [1]
    models.begin([])
    models.done(artifact)
    assert models.load(family, artifact.model_source) is not pipeline
    models.end()
    models.recorded(artifact, "what", lambda: calls.append(1))
    assert calls == [1, 1]


def test_what_is_shared_is_neither_trained_nor_cast(family: Any, tiny_sources: Callable[[str], Path]) -> None:
    models, source = Models(), open_artifact(tiny_sources(family.name), family=family.name).model_source
    pipeline = models.load(family, source)
    denoiser = family.denoiser(pipeline)
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    half = models.load(family, source, family.facts.drawing_dtypes(torch.float16))
    assert half is not pipeline and family.denoiser(half).dtype == torch.float16
    assert denoiser.dtype == torch.float32 and half.tokenizer is pipeline.tokenizer
    kept = {name for name in family.facts.overflowing if getattr(half, name) is getattr(pipeline, name)}
    assert kept == set(family.facts.overflowing)
    assert in_types(pipeline, family.facts, torch.float32) is pipeline
    other = around(pipeline, {family.facts.denoiser_name: family.denoiser(half)})
    assert family.denoiser(other) is family.denoiser(half) and family.denoiser(pipeline) is denoiser
    assert dict(other.config) == dict(pipeline.config)
