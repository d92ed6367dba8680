"""Further places that a run is logged to: what is there afterwards, read back with their own readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from PIL import Image

from tunekit.config import TRACKERS, TrainConfig
from tunekit.errors import ConfigError, MissingPackageError
from tunekit.files import write_text
from tunekit.training import boards
from tunekit.training.boards import Boards, Told
from tunekit.training.tracking import Tracker

ROWS = [{"step": 0, "val_loss": 0.5}, {"step": 1, "loss": 0.25, "lr": 0.125}, {"step": 2, "loss": 0.125}]
PLAN = {"device": "cpu", "device_bytes": 4096, "phases": {"step": {"peak": 1}}}


@pytest.fixture
def told(tmp_path: Path, accelerator: Accelerator) -> Told:
    run = tmp_path / "run"
    for name, grey in (("red", 40), ("blue", 80)):
        run.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), (grey, 0, 0)).save(run / f"{name}.png")
    write_text(run / "plan.svg", "<svg xmlns='http://www.w3.org/2000/svg'></svg>")
    write_text(run / "plan.json", "{}")
    write_text(run / "config.yaml", "name: mine\n")
    config = {"name": "mine", "train": {"lr": 0.5, "betas": [0.9, 0.99]}, "data": {"path": "/home/me/cats"}}
    return Told("mine", run, config, PLAN, "bf16, micro-batch 2")


def life(told: Told, name: str, step: int = 0) -> None:
    """A run that begins, or goes on after `step`, and logs three rows and the pictures of its last step."""
    said: list[str] = []
    tracker = Tracker(told.folder / "metrics.jsonl", boards=(places := Boards([name], told, said.append)))
    tracker.rewind(step)
    tracker.write([row for row in ROWS if row["step"] >= step])
    places.pictures({"a fox": told.folder / "red.png", "a bird": told.folder / "blue.png"}, 2)
    tracker.close()
    assert said == []


def test_tensorboard_has_figures_pictures_and_the_plan(told: Told) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    life(told, "tensorboard")
    life(told, "tensorboard", 1)
    read = events.EventAccumulator(str(told.folder / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"val_loss", "loss", "lr"}
    assert [(event.step, event.value) for event in read.Scalars("loss")][-2:] == [(1, 0.25), (2, 0.125)]
    assert set(read.Tags()["images"]) == {"preview/a fox", "preview/a bird"}
    picture = read.Images("preview/a fox")[-1]
    assert (picture.step, picture.width, picture.height) == (2, 8, 6)
    (text,) = read.Tensors("run/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert shown.startswith("bf16, micro-batch 2") and '"lr": 0.5' in shown and "/home/me" not in shown


def test_wandb_offline_has_figures_pictures_and_the_plan(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install -e .[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    life(told, "wandb")
    life(told, "wandb", 1)
    found = sorted((told.folder / "wandb").glob("offline-run-*"))
    known = {path.name.rpartition("-")[2] for path in found}
    assert len(known) == 1  # what is continued is one run there
    pictures = list(told.folder.rglob("media/images/*.png"))
    assert len(pictures) >= 2 and list(told.folder.rglob("media/html/plan*.html"))
    content = b"".join(path.read_bytes() for path in told.folder.rglob("*.wandb"))
    for part in (b"val_loss", b"train.lr", b"plan.words", b"bf16, micro-batch 2", b"a bird"):
        assert part in content, part
    assert b"/home/me" not in content


def test_mlflow_has_figures_pictures_and_the_plan(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install -e .[mlflow]")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (told.folder / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(None)
    life(told, "mlflow")
    life(told, "mlflow", 1)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.metrics["loss"] == 0.125 and run.data.params["plan.words"] == "bf16, micro-batch 2"
    files = {path.name for path in (told.folder / "mlruns").rglob("artifacts/**/*") if path.is_file()}
    assert {"plan.json", "plan.svg", "config.yaml", "red.png", "blue.png"} <= files


def test_trackio_has_figures_and_pictures(
    told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed: pip install -e .[trackio]")
    life(told, "trackio")
    assert list((tmp_path / "trackio").rglob("*.db")) and list((tmp_path / "trackio").rglob("*.png"))


class Failing:
    """A place whose server is gone."""

    def __init__(self, told: Told) -> None:
        self.logged = 0

    def begin(self, step: int) -> None:
        if self.logged:
            raise OSError("no api key\nmore lines")

    def log(self, row: Any, step: int) -> None:
        raise ConnectionError("the server does not answer")

    pictures = end = log


def test_a_place_that_fails_is_left_out_and_the_run_goes_on(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boards, "require", lambda name, **words: None)
    monkeypatch.setitem(boards.KINDS, "wandb", Failing)
    said: list[str] = []
    places = Boards(["wandb"], told, said.append)
    places.begin(0)
    places.log(ROWS)
    places.end()
    assert said == ["wandb: the server does not answer; the run goes on without it"]
    places = Boards(["wandb"], told, said.append)
    next(iter(places._boards.values())).logged = 1  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"^wandb cannot be opened: no api key\n.*wandb login") as error:
        places.begin(0)
    assert "more lines" not in str(error.value)


def test_each_name_has_a_place_and_says_what_installs_it(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    assert boards.KINDS.keys() == TRACKERS.keys()
    assert TrainConfig(max_steps=1, lr=1, trackers=list(TRACKERS)).trackers == list(TRACKERS)
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r'train\.trackers: \[wandb\] needs .*\[wandb\]"$'):
        Boards(["wandb"], told, print)
