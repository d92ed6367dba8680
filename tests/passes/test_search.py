"""A search over real passes on a tiny model: it finds the smallest that keeps what it must."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunekit import workspace
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.errors import ArtifactError, ChainError
from tunekit.passes.base import Context, Start, check_chain, parse_chain, run_chain
from tunekit.passes.search import _training
from tunekit.passes.space import Space, describe
from tunekit.runtime import generate_pixels, open_runtime

CHOICES = [
    {"prune": [{"ratio": 0.5, "samples": 4, "multiple": 4}]},
    {"quantize": [{"scheme": "int8"}, {"scheme": "int4"}]},
]
SETTINGS = {
    "keep": {"psnr": 12},
    "minimize": "size",
    "target": "torch",
    "passes": CHOICES,
    "pictures": 2,
}
PROMPTS = ("a cat", "a dog", "a house", "a tree")


def context(folder: Path, lines: list[str]) -> Context:
    return Context(
        run_dir=folder / "run",
        prompts=PROMPTS,
        device="cpu",
        sampling=SamplingConfig(steps=2, guidance=2),
        say=lines.append,
    )


def searched(source: Path, folder: Path, lines: list[str] | None = None, **settings: Any) -> Artifact:
    chain = parse_chain([{"search": {**SETTINGS, **settings}}])
    start = open_artifact(source, family="sd15")
    return run_chain(chain, start, context(folder, lines if lines is not None else []))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def result(tiny_sources: Callable[[str], Path], folder: Path) -> Artifact:
    return searched(tiny_sources("sd15"), folder)


def rows(result: Artifact) -> list[dict[str, Any]]:
    assert result.step is not None
    found: list[dict[str, Any]] = result.step.details["trials"]
    return found


def test_the_winner_is_the_smallest_that_keeps(result: Artifact) -> None:
    told = rows(result)
    (winner,) = [row for row in told if row["kept"] == "winner"]
    kept = [row for row in told if row["kept"] != "no"]
    assert winner["size_bytes"] == min(row["size_bytes"] for row in kept)
    assert all(row["psnr_db"] >= 12 for row in kept)
    assert all(row["psnr_db"] < 12 for row in told if row["kept"] == "no")
    assert result.size_bytes == winner["size_bytes"] < told[0]["size_bytes"]
    assert result.step is not None and result.step.metrics["psnr_db"] >= 12
    assert len(told) >= 3
    front = [row for row in sorted(told, key=lambda row: row["size_bytes"]) if row["front"]]
    assert front == sorted(front, key=lambda row: row["psnr_db"])


def test_the_result_is_whole_without_its_trials(result: Artifact, folder: Path, tmp_path: Path) -> None:
    """It draws what the trial drew, from files of its own."""
    chain = result.step.details["chain"]  # type: ignore[union-attr]
    pixels = []
    for source in (result.path, folder / "run/search" / last_folder(folder, chain)):
        runtime = open_runtime(str(source), device="cpu")
        pixels.append(generate_pixels(runtime, ["a cat"], SamplingConfig(steps=2), seeds=[1]))
        runtime.close()
    assert bool((pixels[0] == pixels[1]).all())


def last_folder(folder: Path, chain: list[Any]) -> str:
    record = json.loads((folder / "run/search/trials.json").read_text())
    (name,) = [trial["folder"] for trial in record["trials"] if trial["chain"] == chain]
    return str(name)


def test_a_search_that_was_killed_makes_nothing_twice(
    result: Artifact, folder: Path, tiny_sources: Callable[[str], Path], tmp_path: Path
) -> None:
    class Kill(list):  # type: ignore[type-arg]
        def append(self, line: str) -> None:
            super().append(line)
            if "trial 2:" in line:
                raise KeyboardInterrupt

    lines: list[str] = Kill()
    with pytest.raises(KeyboardInterrupt):
        searched(tiny_sources("sd15"), tmp_path, lines)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/search").iterdir()}
    assert not list((tmp_path / "run").glob("01-search-*"))
    again: list[str] = []
    other = searched(tiny_sources("sd15"), tmp_path, again)
    strip = [{key: value for key, value in row.items() if key != "seconds"} for row in rows(other)]
    assert strip == rows(result)
    assert other.hash == result.hash
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/search").iterdir()}
    assert all(after[name] == time for name, time in before.items() if name[:2].isdigit())
    tried = [line for line in again if ": trying " in line]
    assert len(tried) == len(rows(result)) - 2


def test_trials_go_and_the_result_stays(tiny_sources: Callable[[str], Path], tmp_path: Path) -> None:
    made = searched(tiny_sources("sd15"), tmp_path, passes=[{"quantize": [{"scheme": "int8"}]}])
    (gone,) = workspace.prune_folders(str(tmp_path / "run"))
    assert gone.path.name == "search"
    assert not gone.path.exists()
    assert Artifact.load(made.path).hash == made.hash  # type: ignore[arg-type]


def test_time_that_is_over_ends_it_with_the_best_so_far(
    tiny_sources: Callable[[str], Path], tmp_path: Path
) -> None:
    made = searched(tiny_sources("sd15"), tmp_path, minutes=1e-6)
    assert len(rows(made)) == 1
    assert "ended by minutes" in made.step.details["note"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": {}}, "says nothing to keep"),
        ({"passes": ["prun"]}, 'did you mean "prune"'),
        ({"passes": ["search"]}, "names no pass 'search'"),
        ({"passes": ["verify"]}, "has nothing to choose"),
        ({"passes": ["prune", "prune"]}, "names prune twice"),
        ({"passes": [{"prune": []}]}, "expects a pass and its settings to try"),
        ({"keep": {"psnr": 200}}, "must be at most 150"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ChainError, match=said):
        parse_chain([{"search": {**SETTINGS, **settings}}])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"passes": [{"prune": [{"ratio": 2}]}]}, "passes that cannot be tried"),
        ({"passes": [{"quantize": [{"mode": "static"}]}]}, "cannot try quantize mode static"),
        ({"target": "cuda"}, "CUDAExecutionProvider"),
    ],
)
def test_choices_that_nobody_can_make_are_refused_before_anything_runs(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ChainError, match=said):
        check_chain(parse_chain([{"search": {**SETTINGS, **settings}}]), "torch")


def test_what_is_offered_suits_the_model(tiny_source: Path) -> None:
    """By itself it leaves blocks out, and trains no longer than its minutes have time for."""
    chain = yaml.safe_load("""
      - search:
          keep: {psnr: 28}
          minimize: latency
          target: cpu
          passes: [distill, prune, quantize, cache, tune_sampler]
          minutes: 60
    """)
    start = Start.of(open_artifact(tiny_source, family="sd15"))
    check_chain(parse_chain(chain), start)
    space = Space.of(["distill", "prune", "quantize", "cache", "tune_sampler"], "cpu", 60, start)
    assert space.names == ["distill", "prune", "quantize", "cache", "tune_sampler"]
    words = [describe(choice) for choice in space.choices[1]]
    assert "prune blocks 1" in words and "prune blocks small, heal minutes 10.0" in words
    assert [line.partition(",")[0] for line in space.absent] == ["prune blocks base", "prune blocks tiny"]
    assert sorted({(rungs.axis, rungs.effort) for rungs in space.rungs}) == [
        (0, 2),
        (1, 1),
        (1, 2),
        (2, 1),
        (3, 0),
        (4, 0),
    ]
    point = (1, 1, 2, 0, 3)
    kinds = [item if isinstance(item, str) else next(iter(item)) for item in space.chain(point)]
    assert kinds == ["distill", "prune", "export_onnx", "quantize", "tune_sampler"]
    assert _training(space.chain(point), []) == 600.0


def test_a_training_that_has_no_time_left_is_not_begun(tiny_source: Path, tmp_path: Path) -> None:
    passes = [
        {"prune": [{"ratio": 0.5, "samples": 4, "multiple": 4}]},
        {"distill": [{"steps": 1, "minutes": 99}]},
    ]
    made = searched(tiny_source, tmp_path, passes=passes, keep={"psnr": 5}, minutes=60)
    assert len(rows(made)) == 2
    assert "no time to train: distill steps 1 minutes 99" in made.step.details["note"]  # type: ignore[union-attr]


def test_a_damaged_book_of_trials_is_named(tiny_sources: Callable[[str], Path], tmp_path: Path) -> None:
    book = tmp_path / "run/search/trials.json"
    book.parent.mkdir(parents=True)
    book.write_text('{"version": 1, "trials": [{"key": 3}]}')
    with pytest.raises(ArtifactError, match=r"trials\.json is damaged"):
        searched(tiny_sources("sd15"), tmp_path)
