"""A model that says how it is drawn with is drawn so, by whatever draws it and whatever comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.diffusion import sampling as drawing
from tunekit.passes.base import Context, parse_chain, run_chain
from tunekit.runtime import generate, open_runtime

SCHEDULER = {"class": "DDIMScheduler"}  # as many steps as it is asked for
FOUR = SamplingConfig(steps=4, guidance=1, scheduler=SCHEDULER)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`with drawn() as steps:` fills a list with the steps of every batch that is drawn."""
    import tunekit.runtime.draw

    sample_steps = drawing.sample_steps
    counts: list[int] = []

    def counting(denoise: Any, *arguments: Any, **options: Any) -> Any:
        calls: list[int] = []

        def counted(*given: Any) -> Any:
            calls.append(1)
            return denoise(*given)

        yield from sample_steps(counted, *arguments, **options)
        counts.append(len(calls))

    monkeypatch.setattr(tunekit.runtime.draw, "sample_steps", counting)

    @contextmanager
    def watch() -> Iterator[list[int]]:
        counts.clear()
        yield counts

    return watch


@pytest.fixture(scope="module")
def student(tiny_source: Path) -> Artifact:
    return replace(open_artifact(tiny_source, family="sd15"), sampling=FOUR)


def test_four_steps_stay_four(student: Artifact, tmp_path: Path, drawn: Any) -> None:
    context = Context(
        run_dir=tmp_path,
        device="cpu",
        prompts=("a cat",),
        sampling=SamplingConfig(steps=9, guidance=3),
        say=lambda line: None,
    )
    chain = parse_chain(
        [
            "export_onnx",
            {"verify": {"pictures": 1, "max_relative_error": 1e-4, "providers": ["cpu"]}},
            {"benchmark": {"repeats": 1, "memory": False}},
        ]
    )
    with drawn() as steps:
        generate(open_runtime(student, device="cpu"), ["a cat"], seeds=[0])
    assert steps == [4]
    with drawn() as steps:
        last = run_chain(chain, student, context)
    assert set(steps) == {4} and len(steps) == 2 + 2 * 2  # verify's two sides; two rounds of two models
    assert last.format == "onnx" and last.sampling == FOUR
    exported, verified, measured = last.lineage[-3:]
    assert "1 pictures of 4 steps" in verified.details["note"]
    assert len(verified.details["trajectory"]) == 4
    assert [row["steps"] for row in measured.details["models"]] == [4, 4]
    folder = tmp_path / exported.artifact
    with drawn() as steps:
        generate(open_runtime(folder, device="cpu"), ["a cat"], seeds=[0])
    assert steps == [4]


def test_a_student_is_compared_with_a_parent_of_more_steps(
    student: Artifact, tiny_source: Path, tmp_path: Path, drawn: Any
) -> None:
    from tunekit.passes.benchmark import Benchmark
    from tunekit.passes.verify import Verify

    parent = open_artifact(tiny_source, family="sd15")
    other = tmp_path / "student"
    other.symlink_to(tiny_source)
    history = (parent, replace(student, path=other, model_path=other, source=str(other)))
    context = Context(
        run_dir=tmp_path, device="cpu", folder=tmp_path, family="sd15", history=history, say=lambda line: None
    )
    with drawn() as steps:
        outcome = Verify(pictures=2).run(history[-1], context)
    assert steps == [31, 4]  # each in all its own; PNDM asks once more
    assert outcome.details["trajectory"] == []
    assert outcome.metrics["relative_error_trajectory"] is None
    assert outcome.metrics["relative_error"] == 0 and 0 < outcome.metrics["psnr_db"] < 60
    assert outcome.failure is None
    assert "2 pictures of 4 steps, of the reference 30" in outcome.details["note"]
    with drawn() as steps:
        outcome = Benchmark(repeats=1, memory=False).run(history[-1], context)
    assert sorted(set(steps)) == [4, 31]
    assert outcome.metrics["speedup"] > 1
    with drawn() as steps:
        Verify(pictures=1, steps=6).run(history[-1], context)
    assert steps == [7, 6]
