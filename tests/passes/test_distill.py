"""A student draws in few steps without guidance, by itself, whatever draws it; of each family."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunekit import families
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import AdapterConfig, SamplingConfig
from tunekit.errors import ChainError, ConfigError, TunekitError
from tunekit.passes import distill
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
from tunekit.passes.distill import Distill
from tunekit.runtime import generate, open_runtime, remarks

SHORT = {"max_steps": 4, "batch_size": 2, "pictures": 2, "solver_steps": 6, "lr": 1e-3}
GUIDED = SamplingConfig(guidance=3.0, steps=6)


def distilled(source: Path, folder: Path, family: str = "sd15", **settings: Any) -> Artifact:
    return run_chain(
        [Distill(**{**SHORT, **settings})],
        open_artifact(source, family=family),
        Context(
            run_dir=folder / "run",
            prompts=("a cat", "a dog"),
            device="cpu",
            sampling=GUIDED,
            say=lambda line: None,
        ),
    )


@pytest.fixture(scope="module")
def student(
    family: Any, tiny_sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """Of each family, with an adapter that is folded in."""
    source = tiny_sources(family.name)
    adapter = AdapterConfig(rank=2, alpha=2)
    return distilled(source, tmp_path_factory.mktemp("distilled"), family.name, steps=2, adapter=adapter)


@pytest.mark.each_family
def test_it_draws_in_so_many_calls_by_itself(student: Artifact, monkeypatch: pytest.MonkeyPatch):
    assert student.sampling is not None
    assert student.sampling.steps == 2
    metrics = student.lineage[-1].metrics
    assert metrics["steps"] == 4
    assert metrics["relative_error"] > 0
    assert metrics["relative_error_before"] > 0
    runtime = open_runtime(student, device="cpu")
    calls = []
    denoise = runtime.denoise
    monkeypatch.setattr(runtime, "denoise", lambda *given: calls.append(len(given[0])) or denoise(*given))
    (picture,) = generate(runtime, ["a cat"], seeds=[0])
    assert calls == [1, 1]  # two steps, and no second row for guidance
    assert picture.size[0] > 0
    assert remarks(runtime, ["a cat"], SamplingConfig()) == []
    (said,) = remarks(runtime, ["a cat"], SamplingConfig(steps=30))
    assert said == "distill made this model for 2 sampling steps, and 30 are asked for"


def test_its_adapter_stands_beside_it(student: Artifact, tiny_sources: Callable[[str], Path]):
    """On the teacher, it is the student."""
    import torch

    from tunekit.adapters import merge_adapter

    family = families.get(student.family)
    teacher, made = family.load(str(tiny_sources(family.name))), family.load(student.source)
    assert student.path is not None
    assert merge_adapter(teacher, family, student.path / "adapter") > 0
    pairs = zip(family.denoiser(teacher).parameters(), family.denoiser(made).parameters(), strict=True)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in pairs)


def test_lcm_of_all_weights_goes_on_where_it_was_stopped(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch

    settings: dict[str, Any] = {"method": "lcm", "adapter": None, "steps": 1, "checkpoint_every": 2}
    whole = distilled(tiny_source, tmp_path / "whole", **settings)
    from tunekit.training import consistency

    follow, followed = consistency.Average.follow, []

    def stopped(self: Any) -> None:
        follow(self)
        followed.append(1)
        if len(followed) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(consistency.Average, "follow", stopped)
        distilled(tiny_source, tmp_path / "cut", **settings)
    (state,) = (tmp_path / "cut" / "run").glob(".distill-*.state")
    assert (state / "checkpoints" / "step-000002").is_dir()
    again = distilled(tiny_source, tmp_path / "cut", **settings)
    assert not state.exists()
    family = families.get("sd15")
    states = [family.denoiser(family.load(made.source)).state_dict() for made in (whole, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert again.sampling is not None
    assert (again.sampling.scheduler or {})["class"] == "LCMScheduler"


@pytest.mark.each_family
def test_distributions_are_matched_in_each_family(
    family: Any, tiny_sources: Callable[[str], Path], tmp_path: Path
):
    """Three updates: two of the critic, then one of the student, whose adapter is what is kept."""
    settings: dict[str, Any] = {"method": "dmd", "steps": 2, "critic_steps": 2, "max_steps": 3}
    adapter = AdapterConfig(rank=2, alpha=2)
    made = distilled(tiny_sources(family.name), tmp_path, family.name, **settings, adapter=adapter, ema=0.5)
    assert made.path is not None
    assert math.isfinite(float(made.lineage[-1].metrics["loss"] or math.nan))
    from safetensors.torch import load_file

    state = load_file(made.path / "adapter" / "pytorch_lora_weights.safetensors")
    assert not any("critic" in key for key in state)
    assert any(bool(value.any()) for key, value in state.items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 9}, "steps"),
        ({"guidance": -1}, "guidance"),
        ({"guidance": 1e9}, "guidance"),
        ({"method": "magic"}, "method"),
        ({"ema": 1}, "ema"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], said: str):
    with pytest.raises(ChainError, match=rf"distill.*{said}"):
        parse_chain([{"distill": settings}])


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        ([{"distill": {"solver_steps": 2}}], r"fewer solver_steps \(2\) than steps \(4\)"),
        ([{"distill": {"adapter": {"dropout": 0.1}}}], "adapter.dropout"),
        ([{"distill": {"adapter": {"init": "x"}}}], "adapter.init"),
        ([{"distill": {"method": "dmd", "adapter": None}}], "needs an adapter for dmd"),
        ([{"distill": {"micro_batch": 9}}], "micro_batch larger"),
        (["distill", "distill"], "comes after distill: the model draws in few steps already"),
        (["distill", "heal"], "would teach the student of distill to be its teacher again"),
        (["prune", "distill", "heal"], "would teach the student"),
        ([{"quantize": {"scheme": "int8"}}, "distill"], "packed weights cannot be trained"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_runs(chain: list[Any], said: str):
    with pytest.raises(ChainError, match=said):
        check_chain(parse_chain(chain), "torch")


def test_a_student_is_no_teacher(student: Artifact):
    from tunekit.passes.start import Start

    with pytest.raises(ChainError, match="draws in few steps already"):
        check_chain([Distill()], Start.of(student))


def test_a_base_that_was_distilled_is_no_teacher(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(type(families.get("sd15")), "is_distilled", lambda self, pipeline: True)
    with pytest.raises(ConfigError, match="distilled to few steps already"):
        distilled(tiny_source, tmp_path)


def test_nothing_to_learn_from_is_said(tiny_source: Path, tmp_path: Path):
    with pytest.raises(TunekitError, match="neither pictures nor prompts"):
        run_chain(
            [Distill()],
            open_artifact(tiny_source, family="sd15"),
            Context(run_dir=tmp_path, say=lambda line: None),
        )
    assert distill.HELD_OUT > 0
