"""The fewest calls that keep the pictures: found, written where all read it, true of unseen pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.errors import ChainError
from tunekit.passes import tune_sampler
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
from tunekit.passes.samplers import TABLE, Candidate, candidates
from tunekit.passes.start import Start
from tunekit.resources import Source
from tunekit.runtime import open_runtime, remarks

SIX = SamplingConfig(steps=6, guidance=3)


def run(chain: list[Any], artifact: Artifact, folder: Path, **options: Any) -> tuple[Artifact, list[str]]:
    said: list[str] = []
    context = Context(
        run_dir=folder,
        device="cpu",
        prompts=("a cat", "the moon", "a dog"),
        sampling=options.pop("sampling", SIX),
        say=said.append,
    )
    return run_chain(parse_chain(chain), artifact, context), said


# Whole ------------------------------------------------------------------------------------------------------


@pytest.mark.each_family
def test_every_family_is_tuned(family: Any, tmp_path: Path) -> None:
    """And from "tiny", which like a hub id has no folder whose files could be written again."""
    start = open_artifact("tiny", family=family.name)
    settings = {"keep": {"psnr": 15}, "samplers": ["dpm++2m", "unipc"], "pictures": 1, "interval": False}
    last, _ = run([{"tune_sampler": settings}], start, tmp_path, sampling=SamplingConfig(steps=4, guidance=2))
    made = last.lineage[-1]
    assert last.source == "tiny" and last.hash == start.hash and last.sampling is not None
    assert last.sampling.steps is not None and last.sampling.steps <= 4
    assert made.metrics["calls"] <= made.metrics["calls_before"]  # type: ignore[operator]
    tried = made.details["tried"]
    assert {row["sampler"].partition(" ")[0] for row in tried} >= {"own", "dpm++2m", "unipc"}
    assert all(math.isfinite(row["psnr_db"]) for row in tried)
    assert [path.name for path in sorted((last.path or tmp_path).glob("pictures/*"))] == [
        "after-00.png",
        "before-00.png",
    ]
    runtime = open_runtime(last, device="cpu")
    assert runtime.sampling.steps == last.sampling.steps
    assert runtime.sampling.scheduler == last.sampling.scheduler


def test_all_that_follows_draws_as_was_found(tiny_source: Path, tmp_path: Path) -> None:
    """`verify` and `benchmark` compare it with the model it was, in that model's own steps."""
    chain: list[Any] = [
        {"tune_sampler": {"steps": 2, "samplers": ["unipc"], "pictures": 1}},
        {"verify": {"pictures": 1}},
        {"benchmark": {"repeats": 1, "memory": False}},
    ]
    start = open_artifact(tiny_source, family="sd15")
    last, said = run(chain, start, tmp_path)
    tuned, verified, measured = last.lineage
    assert last.sampling is not None and last.sampling.steps == 2 and last.source == start.source
    assert tuned.metrics["calls"] == 4 and tuned.metrics["calls_before"] == 14  # PNDM asks once more
    assert "1 pictures of 2 steps, of the reference 6" in verified.details["note"]
    assert verified.metrics["relative_error"] == 0 and verified.details["trajectory"] == []
    assert [row["steps"] for row in measured.details["models"]] == [6, 2]
    assert measured.metrics["picture_steps"] == 2 and measured.metrics["picture_steps_first"] == 6
    assert ", 6 steps), whole pictures, in 2 steps" in measured.details["note"]
    assert any("tune_sampler (torch fp32 cpu)" in line for line in said)
    again, said = run(chain, start, tmp_path)
    assert again.path == last.path and sum("already there" in line for line in said) == 3
    # Steps behind it that did not change are found, and say in a folder of their own what they come from.
    exported, _ = run([{"single_file": {}}], start, tmp_path / "other")
    tuned_too, _ = run([chain[0], {"single_file": {}}], start, tmp_path / "other")
    assert tuned_too.path != exported.path and tuned_too.hash == exported.hash
    assert Artifact.load(exported.path or "").sampling == SIX  # each chain's own
    assert [step.kind for step in tuned_too.lineage] == ["tune_sampler", "single_file"]
    assert tuned_too.sampling is not None and tuned_too.sampling.steps == 2


@pytest.mark.parametrize("graphs", ["tiny_onnxs", "tiny_irs"])
def test_graphs_are_tuned_as_well(graphs: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    start = Artifact.load(request.getfixturevalue(graphs)("sd15"))
    last, _ = run([{"tune_sampler": {"steps": 3, "pictures": 1}}], start, tmp_path)
    assert last.format == start.format and last.model_path == start.model_path
    assert open_runtime(last, device="cpu").sampling.steps == 3


def test_a_bound_that_nothing_meets_leaves_the_settings(tiny_source: Path, tmp_path: Path) -> None:
    start = open_artifact(tiny_source, family="sd15")
    settings = {"keep": {"psnr": 99}, "samplers": ["euler"], "pictures": 1}
    last, said = run([{"tune_sampler": settings}], start, tmp_path, sampling=SamplingConfig(steps=4))
    note = last.lineage[-1].details["note"]
    assert note.startswith("psnr 99 is not kept in fewer calls than 10; nearest: ")
    assert " dB; its settings stay" in note and any(note in line for line in said)
    assert last.sampling is not None and last.sampling.steps == 4 and last.sampling.scheduler is None
    assert last.lineage[-1].metrics["calls"] == 10


def test_when_the_time_is_over_the_best_so_far_is_taken(tiny_source: Path, tmp_path: Path) -> None:
    start = open_artifact(tiny_source, family="sd15")
    settings = {"keep": {"psnr": 1}, "pictures": 1, "minutes": 1e-9}
    last, said = run([{"tune_sampler": settings}], start, tmp_path)
    assert any("the time is over" in line for line in said)
    assert len(last.lineage[-1].details["tried"]) == 1


def test_other_steps_than_it_was_made_for_are_named(tiny_source: Path, tmp_path: Path) -> None:
    start = open_artifact(tiny_source, family="sd15")
    last, _ = run([{"tune_sampler": {"steps": 2, "samplers": ["ddim"], "pictures": 1}}], start, tmp_path)
    runtime = open_runtime(last, device="cpu")
    assert remarks(runtime, ["a cat"], SamplingConfig()) == []
    said = remarks(runtime, ["a cat"], SamplingConfig(steps=9))
    assert said == ["tune_sampler made this model for 2 sampling steps, and 9 are asked for"]


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samplers": ["dpmpp"]}, "samplers"),
        ({"samplers": []}, "samplers"),
        ({"steps": 0}, "steps"),
        ({"keep": {"ssim": 1}}, "keep"),
        ({"spacings": ["trailing", "trailing"]}, "twice"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ChainError, match=words):
        parse_chain([{"tune_sampler": settings}])


@pytest.mark.parametrize("other", [{"steps": 4}, {"keep": {"psnr": 20}}])
def test_two_goals_at_once(other: dict[str, Any]) -> None:
    for one in ({"steps": 4}, {"calls": 4}):
        if one != other:
            with pytest.raises(ChainError, match=r"sets (steps|calls) and (calls|keep)"):
                check_chain(parse_chain([{"tune_sampler": {**one, **other}}]), "torch")


@pytest.mark.parametrize(("name", "sampler"), [("flux", "ddim"), ("sd3", "lcm")])
def test_a_sampler_that_does_not_suit_the_family(name: str, sampler: str) -> None:
    chain = parse_chain([{"tune_sampler": {"samplers": [sampler]}}])
    with pytest.raises(ChainError, match=rf'"{sampler}" does not suit .* flow matching; unipc, .* do'):
        check_chain(chain, Start("torch", name, Source("tiny")))


# The search -------------------------------------------------------------------------------------------------


@dataclass
class Imagined:
    """Pictures whose fidelity is a function of how they are drawn."""

    fidelity: Any
    own: SamplingConfig
    calls: int
    runtime: Any = None

    def compare(self, sampling: SamplingConfig, bar: float | None = None) -> Any:
        return SimpleNamespace(mean=self.fidelity(sampling), worst=0.0, count=1)


def searched(monkeypatch: pytest.MonkeyPatch, fidelity: Any) -> tune_sampler._Search:
    def calls(runtime: Any, sampling: SamplingConfig) -> int:
        low, high = sampling.guidance_interval or (0, 1)
        assert sampling.steps
        return sampling.steps + sum(low <= i / sampling.steps < high for i in range(sampling.steps))

    monkeypatch.setattr(tune_sampler, "calls", calls)
    own = SamplingConfig(steps=30, guidance=4)
    return tune_sampler._Search(Imagined(fidelity, own, 60), 30.0, math.inf, lambda line: None)  # type: ignore[arg-type]


def named(name: str) -> Candidate:
    return Candidate(name, SamplingConfig(steps=30, guidance=4, scheduler={"class": name}))


def test_the_fewest_calls_are_found_in_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    slope = {"slow": 1.5, "fast": 5.0, "hopeless": 1.0, "middle": 3.0}

    def fidelity(sampling: SamplingConfig) -> float:
        assert sampling.scheduler and sampling.steps
        return slope[sampling.scheduler["class"]] * sampling.steps

    search = searched(monkeypatch, fidelity)
    best = search.fewest([named(name) for name in ("slow", "fast", "hopeless", "middle")], guidance=False)
    assert best is not None and (best.name, best.sampling.steps, best.calls) == ("fast", 6, 12)
    tries = [one.name for one in search.tried]
    assert tries.count("fast") == 5
    assert tries.count("slow") == tries.count("hopeless") == tries.count("middle") == 1
    assert sum(row["taken"] == "yes" for row in search.table(best)) == 1


def test_guidance_is_left_out_where_it_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fidelity(sampling: SamplingConfig) -> float:
        assert sampling.steps
        low, high = sampling.guidance_interval or (0.0, 1.0)
        missed = 100 * low + 10 * max(0.0, 0.5 - high)  # early steps need it, late ones do not
        return 5.0 * sampling.steps - missed

    search = searched(monkeypatch, fidelity)
    best = search.fewest([named("any")], guidance=True)
    assert best is not None and best.sampling.guidance_interval is not None
    low, high = best.sampling.guidance_interval
    assert low == 0 and high < 0.6 and best.sampling.steps in (6, 7) and best.calls <= 9
    assert len(search.tried) < 20
    more = search.after(best, best)
    assert more is not None and best.calls < more.calls <= best.calls + tune_sampler.MORE
    for _ in range(tune_sampler.MORE):  # then guidance everywhere
        assert more is not None
        more = search.after(more, best) if more.sampling.guidance_interval else more
    assert more is not None and more.sampling.guidance_interval is None


def test_late_steps_without_guidance_may_be_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps overshoot with it: one guided step less is worse, and some less are better than all."""

    def fidelity(sampling: SamplingConfig) -> float:
        assert sampling.steps
        low, high = sampling.guidance_interval or (0.0, 1.0)
        overshoot = 8.0 if high > 0.75 else 0.0
        return 5.0 * sampling.steps - overshoot - 3 * (high < 1) - 100 * low - 60 * max(0.0, 0.4 - high)

    search = searched(monkeypatch, fidelity)
    made = search.within([named("any"), named("other")], 10, guidance=True)
    assert made.calls == 10 and (made.sampling.steps, made.sampling.guidance_interval) == (7, (0.0, 0.357))
    assert search.within([named("any")], 10, guidance=False).sampling.steps == 5
    best = search.fewest([named("any")], guidance=True)
    assert best is not None and best.calls < 16  # of 8 steps, that all overshoot


def test_a_model_keeps_what_it_was_told_by_its_training() -> None:
    """Prediction and zero terminal SNR go along; who does not know them does not stand in."""
    from tunekit import families
    from tunekit.runtime import torch_runtime

    family = families.get("sd15")
    runtime = torch_runtime(family, family.tiny())
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    own = SamplingConfig(steps=6, guidance=3, scheduler=told).over(runtime.sampling)
    found, troubles = candidates(runtime, own, None, None)
    assert len(found) > 6 and any(line.startswith("heun does not suit") for line in troubles)
    for candidate in found:
        scheduler = candidate.sampling.scheduler or {}
        assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]
    assert {name.name.partition(" ")[0] for name in found} >= {"own", *TABLE} - {"euler", "heun"}


def test_guidance_in_a_part_of_the_steps_is_the_same_in_graphs(tiny_source: Path, tiny_onnx: Path) -> None:
    from tunekit.diffusion.metrics import relative_error
    from tunekit.runtime import generate_pixels

    ddim = {"class": "DDIMScheduler"}
    part = SamplingConfig(steps=4, guidance=3, guidance_interval=(0.0, 0.6), scheduler=ddim)
    pictures = [
        generate_pixels(open_runtime(source, family="sd15", device="cpu"), ["a cat"], part, seeds=[1])
        for source in (tiny_source, tiny_onnx)
    ]
    assert relative_error(*pictures) < 1e-4
