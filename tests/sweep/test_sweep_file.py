"""What a sweep file may say, and what is said of one that is wrong before anything begins."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tunekit.artifacts import RunFolder
from tunekit.errors import TunekitError
from tunekit.sweep.engine import Sweep

Swept = Callable[..., Path]
TINY = "tiny/lora"


@pytest.mark.parametrize(
    ("over", "lines", "said"),
    [
        ("rnak: [1, 2]", (), 's.yaml:4: rnak: unknown key; did you mean "rank"?'),
        ("train.lrr: [1, 2]", (), 's.yaml:4: train.lrr: unknown key; did you mean "lr"?'),
        ("rank: [1, x]", (), 's.yaml:4: rank: must be a whole number, not "x"; it was "x"'),
        ("rank: 4", (), "s.yaml:4: rank: one value sweeps nothing"),
        ("rank: [4]", (), "s.yaml:4: rank: one value sweeps nothing"),
        ("rank: {choice: [4]}", (), "s.yaml:4: rank: one value sweeps nothing"),
        ("rank: [4, 8, 4]", (), "s.yaml:4: rank: 4 is there twice"),
        ("rank: {unifrom: [1, 2]}", (), 'did you mean "uniform"?'),
        ("rank: {uniform: [1, 2]}", (), "rank is drawn, and trials: does not say how often"),
        ("rank: {uniform: [1.5, 2]}", ("trials: 2",), "rank: takes whole numbers"),
        ("rank: {uniform: [2, 1]}", ("trials: 2",), "the first number must be less than the second"),
        ("train.lr: {loguniform: [0, 1]}", ("trials: 2",), "both numbers must be greater than 0"),
        ("train.lr: {loguniform: [1]}", ("trials: 2",), "loguniform takes two numbers"),
        ("name: [a, b]", (), "s.yaml:4: name: is not for a sweep to vary"),
        ("rank: [1, 2]", ("stop: mdian",), "s.yaml:3: stop: must be 'median' or 'asha'"),
        ("rank: [1, 2]", ("stop: {asha: {grace: 8}}",), "s.yaml:3: stop: has no effect: grace is 8"),
        ("rank: [1, 2]", ("trails: 4",), 's.yaml:3: trails: unknown key; did you mean "trials"?'),
        ("rank: [1, 2]", ("name: a/b",), "must begin with a letter or a digit"),
        ("rank: [1, 2]", ("proposer: optuna",), "proposer: has no effect"),
        ("rank: {uniform: [1, 2]}", ("trials: 0",), "s.yaml:3: trials: must be at least 1, not 0"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(
    swept: Swept, over: str, lines: tuple[str, ...], said: str
) -> None:
    with pytest.raises(TunekitError) as error:
        Sweep.open(swept(over, *lines))
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("over", "lines", "metric", "said"),
    [
        ("adapter.rnk: [1, 2]", (), "val_loss", 's.yaml:4: adapter.rnk: unknown key; did you mean "rank"?'),
        ("learning_rate: [1, 2]", (), "val_loss", 'did you mean "train.lr"?'),
        ("train.log_every: [1, 2]", (), "val_loss", "train.log_every: has no effect on val_loss"),
        ("preview.every: [5, 30]", (), "val_loss", "preview.every: has no effect: training ends before"),
        ("train.batch_size: [1, 4]", (), "val_loss", "micro_batch"),
        ("train.lr: [1.0e-3, 2.0e-3]", (), "val_los", 'no trial reports "val_los"; did you mean "val_loss"?'),
        ("train.lr: [1.0e-3, 2.0e-3]", (), "psnr_db", "s.yaml:2: metric: no trial reports psnr_db"),
        ("optimize: [[], [merge]]", ("stop: asha",), "val_loss", "optimize: has no effect on val_loss"),
        (
            "optimize: [[merge, verify], [merge]]",
            ("stop: asha",),
            "psnr_db",
            "stop: has no effect: psnr_db is known only when a run is over",
        ),
        ("data.validation: [null, 0]", (), "val_loss", "data.validation: "),
    ],
)  # fmt: skip
def test_what_a_real_recipe_says(
    swept: Swept, over: str, lines: tuple[str, ...], metric: str, said: str
) -> None:
    with pytest.raises(TunekitError) as error:
        Sweep.open(swept(over, *lines, config=TINY, metric=metric))
    assert said in str(error.value)


def test_without_held_out_pictures_there_is_no_val_loss(swept: Swept) -> None:
    path = swept("train.lr: [1.0e-3, 2.0e-3]", config=TINY, metric="val_loss")
    with pytest.raises(TunekitError, match="no trial reports val_loss: there are no held-out pictures"):
        Sweep.open(path, ["data.validation=null", "train.validate_every=null"])
    with pytest.raises(TunekitError, match="val_loss is known only at the end"):
        Sweep.open(
            swept("train.lr: [1.0e-3, 2.0e-3]", "stop: median", config=TINY, metric="val_loss"),
            ["train.validate_every=20"],
        )


def test_a_clip_score_needs_a_clip(swept: Swept, tiny_clip: Path) -> None:
    path = swept("train.lr: [1.0e-3, 2.0e-3]", config=TINY, metric="clip")
    for overrides, said in (
        ((), "no trial reports clip: no CLIP scores the previews"),
        (["preview={}"], "no trial reports clip: there are no previews"),
        (["preview.clip_model=nowhere"], "clip finds no CLIP at nowhere: there is no config.json in it"),
    ):
        with pytest.raises(TunekitError) as error:
            Sweep.open(path, overrides)
        assert f"s.yaml:2: metric: {said}" in str(error.value)
    sweep = Sweep.open(path, [f"preview.clip_model={tiny_clip}"])
    assert sweep.figure.larger and sweep.figure.curve
    stopped = swept("train.lr: [1.0e-3, 2.0e-3]", "stop: median", config=TINY, metric="clip")
    with pytest.raises(TunekitError, match="clip is known only at the end"):
        Sweep.open(stopped, [f"preview.clip_model={tiny_clip}", "preview.every=null"])
    drawn = swept("preview.steps: [2, 4]", config=TINY, metric="clip")
    assert len(Sweep.open(drawn, [f"preview.clip_model={tiny_clip}"]).trials) == 2


def test_files_that_are_not_there_or_something_else(here: Path) -> None:
    with pytest.raises(TunekitError, match=r'there is no sweep file "curv\.yaml"\ndid you mean'):
        Sweep.open("curv.yaml")
    with pytest.raises(TunekitError, match="is the config of a run, not of a sweep"):
        Sweep.open("curve.yaml")
    (here / "s.yaml").write_text("config: curv.yaml\nover: {rank: [1, 2]}\n")
    with pytest.raises(TunekitError, match=re.escape('s.yaml:1: config: there is no config "curv.yaml"')):
        Sweep.open("s.yaml")


def test_overrides_are_for_what_is_not_varied(swept: Swept) -> None:
    path = swept("train.lr: [1.0, 2.0]")
    with pytest.raises(TunekitError, match=r"command line: train\.lr: the sweep varies it"):
        Sweep.open(path, ["train.lr=3"])
    with pytest.raises(TunekitError, match="command line: name: a sweep names its runs itself"):
        Sweep.open(path, ["name=mine"])


def test_a_sweep_does_not_write_into_a_run(swept: Swept) -> None:
    RunFolder(Path("runs/s")).config.parent.mkdir(parents=True)
    Path("runs/s/config.yaml").touch()
    with pytest.raises(TunekitError, match="the sweep cannot be called s: runs/s is a run"):
        Sweep.open(swept("rank: [1, 2]"))


def test_a_damaged_state_is_named(swept: Swept) -> None:
    Path("runs/s").mkdir(parents=True)
    Path("runs/s/sweep.json").write_text('{"version": 1, "swee')
    with pytest.raises(TunekitError, match=r"sweep\.json is damaged.*\nremove it"):
        Sweep.open(swept("rank: [1, 2]"))


# Trials -----------------------------------------------------------------------------------------------------


def names(path: Path) -> list[str]:
    return [trial.run for trial in Sweep.open(path).trials]


def test_a_grid_has_all_of_its_lists(swept: Swept) -> None:
    path = swept("rank: [4, 16]\n  train.lr: [1.0e-4, 0.5]")
    assert names(path) == ["s-r4-lr1e-4", "s-r4-lr0.5", "s-r16-lr1e-4", "s-r16-lr0.5"]
    trial = Sweep.open(path, ["pause=2"]).trials[0]
    assert (trial.loaded.config.rank, trial.loaded.config.train.lr, trial.loaded.config.pause) == (4, 1e-4, 2)
    assert trial.overrides == ["pause=2", "rank=4", "train.lr=0.0001", "name=s-r4-lr1e-4"]


def test_more_trials_keep_those_before(swept: Swept) -> None:
    for over in ("rank: [1, 2, 3, 4, 5, 6]", "rank: [1, 2]\n  train.lr: {loguniform: [1.0e-5, 1.0e-1]}"):
        few, many = names(swept(over, "trials: 3")), names(swept(over, "trials: 5"))
        assert len(set(many)) == 5 and many[:3] == few
    assert names(swept(over, "trials: 5", "seed: 1")) != many
    drawn = Sweep.open(swept("rank: {uniform: [1, 4]}", "trials: 9")).trials
    assert {trial.values["rank"] for trial in drawn} == {1, 2, 3, 4}  # there are no more
    rates = [t.values["train.lr"] for t in Sweep.open(swept(over, "trials: 40")).trials]
    assert all(1e-5 <= rate <= 1e-1 and rate == float(f"{rate:.3g}") for rate in rates)
    assert 10 < sum(rate < 1e-3 for rate in rates) < 30  # even by their logarithm


def test_names_are_short_and_differ(swept: Swept) -> None:
    assert names(swept("pause: [0.0, 0.5]\n  train.max_steps: [8, 9]"))[0] == "s-p0-ms8"
    first, second = names(swept("figure: [a/b, c/b]"))
    assert first != second and first.startswith("s-fb-")
    assert all(len(name) < 130 for name in names(swept(f"figure: [{'x' * 500}, {'y' * 500}]")))


def test_the_shipped_sweep_is_valid(here: Path) -> None:
    sweep = Sweep.open("rank")  # by its name
    with pytest.raises(TunekitError, match='there is no sweep file "rnak"\ndid you mean "rank"'):
        Sweep.open("rnak")
    assert sweep.trials[0].run == "rank-r4-lr1e-3"
    assert sweep.rule is not None
    assert json.loads(json.dumps(sweep.record().model_dump()))["goal"] == "min"
