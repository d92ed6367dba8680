"""The chain: read, checked, run, skipped, resumed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import tunekit
from tunekit import workspace
from tunekit.artifacts import Artifact, RunFolder, Step, open_artifact
from tunekit.config import DataConfig, SamplingConfig, load
from tunekit.errors import ArtifactError, ChainError, OutputError, VerificationFailed
from tunekit.passes.base import (
    Context,
    Outcome,
    Pass,
    Start,
    check_chain,
    describe_metrics,
    format_metric,
    parse_chain,
    run_chain,
)
from tunekit.passes.benchmark import Benchmark
from tunekit.passes.build_tensorrt import BuildTensorrt
from tunekit.passes.export_onnx import ExportOnnx
from tunekit.passes.heal import Heal
from tunekit.passes.merge import Merge
from tunekit.passes.prune import Prune
from tunekit.passes.quantize import Quantize
from tunekit.passes.verify import Verify
from tunekit.resources import Source

QUIET: Callable[[str], None] = lambda line: None  # noqa: E731
RTX = BuildTensorrt(devices=["rtx-4090"])
USUAL = Start("torch", "sd15", Source("stable-diffusion-v1-5/stable-diffusion-v1-5"))
TINY = Start("torch", "sd15", Source("tiny"))


class Mark(Pass):
    """Appends a word to the model's one file."""

    kind: ClassVar[str] = "mark"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})
    word: str = "x"

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        text = Path(artifact.source, "model.txt").read_text() + self.word
        (context.folder / "model.txt").write_text(text)
        (context.folder / "pictures").mkdir()
        (context.folder / "pictures" / "a.png").write_bytes(os.urandom(8))  # no part of the model
        return Outcome(metrics={"length": len(text)}, pictures=[{"file": "pictures/a.png", "label": "a"}])


class Look(Pass):
    """Measures the model's length and fails above a limit."""

    kind: ClassVar[str] = "look"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})
    looks: ClassVar[bool] = True
    limit: int = 99

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        length = len(Path(artifact.source, "model.txt").read_text())
        failure = f"length {length} is above {self.limit}" if length > self.limit else None
        reference = context.reference("parent")
        return Outcome(
            metrics={"length": length, "parent": reference.source if reference else None},
            details={"first": getattr(context.reference("first"), "source", None)},
            failure=failure,
        )


class Fill(Pass):
    """Writes a file and then finds the disk full."""

    kind: ClassVar[str] = "fill"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        (context.folder / "half").write_text("half")
        raise OSError(28, "No space left on device")


@pytest.fixture
def start(tmp_path: Path) -> Artifact:
    folder = tmp_path / "start"
    folder.mkdir()
    (folder / "model.txt").write_text("m")
    (folder / "model_index.json").write_text("{}")
    return open_artifact(folder, family="sd15")


def run(
    passes: list[Pass], start: Artifact, folder: Path, after_step: Any = None, **options: Any
) -> Artifact:
    return run_chain(passes, start, Context(run_dir=folder / "run", say=QUIET, **options), after_step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run").iterdir() if path.is_dir())


# Reading ---------------------------------------------------------------------------------------------------


def test_a_chain_is_read_in_every_form():
    chain = parse_chain(["merge", {"prune": {"ratio": 0.5}}, {"quantize": None}, {"prune": {}}])
    assert [type(step) for step in chain] == [Merge, Prune, Quantize, Prune]
    assert isinstance(chain[1], Prune) and chain[1].ratio == 0.5


def test_all_mistakes_are_listed_at_once_with_their_lines(tmp_path: Path):
    config = tmp_path / "run.yaml"
    config.write_text(
        textwrap.dedent("""\
        recipe: optimize
        model: {family: sd15, source: tiny}
        optimize:
          - prun: {}
          - prune: {ratioo: 0.1}
          - prune:
              ratio: lots
          - {merge: {}, prune: {}}
          - quantize: 8
          - quantize: {mode: dynamic, group: 64}
        """)
    )
    loaded = load(config)
    with pytest.raises(ChainError) as caught:
        parse_chain(loaded.config.optimize, loaded.chain_where)
    lines = str(caught.value).splitlines()
    assert len(lines) >= 6
    for number, parts in (
        (4, ["optimize[0]", "prun", 'did you mean "prune"?']),
        (5, ["optimize[1] (prune)", 'did you mean "ratio"?']),
        (7, ["optimize[2] (prune)", "ratio"]),
        (8, ["optimize[3]", "a pass and its settings"]),
        (9, ["optimize[4] (quantize)", "mapping"]),
        (10, ["optimize[5] (quantize)", "group", "scheme is not int4"]),
    ):
        assert any(f"run.yaml:{number}:" in line and all(part in line for part in parts) for line in lines), (
            number,
            lines,
        )


@pytest.mark.parametrize(
    ("chain", "given", "message"),
    [
        ([Merge(), ExportOnnx(), Prune()], "adapter", r"\(prune\) needs a torch model but .* gives onnx"),
        ([Prune()], "adapter", r"needs a torch model but .* starts with adapter\nput `merge: {}` before"),
        ([Merge()], "torch", r"needs an adapter but the chain starts with torch\n.*nothing to merge"),
        ([Heal()], "torch", "nothing to heal"),
        ([Merge(), Heal()], "adapter", "nothing to heal"),
        ([Prune(), Quantize(), Heal()], "torch", "comes after quantize"),
        ([Quantize(), Prune()], "torch", "comes after quantize"),
        ([Quantize(), ExportOnnx()], "torch", "comes after quantize"),
        ([Quantize(), Quantize()], "torch", "quantized already"),
        ([Quantize(scheme="nf4")], "onnx", "scheme nf4, which is for torch"),
        ([Quantize(mode="static")], "torch", "mode static, which is for ONNX"),
        ([Verify()], "torch", "nothing to compare with"),
        ([Prune(ratio={"heads": 0.1})], "torch", "ratios for heads but its targets"),
        ([Prune(), Heal(micro_batch=9, batch_size=8)], "torch", "micro_batch larger"),
        ([Prune(), Heal(optimizer="adamm")], "torch", "adamm"),
    ],
)  # fmt: skip
def test_a_wrong_order_is_refused_before_anything_runs(chain: list[Pass], given: str, message: str):
    with pytest.raises(ChainError, match=message) as caught:
        check_chain(chain, given, lambda index, key: f"run.yaml:{index + 1}")
    assert str(caught.value).startswith("run.yaml:")


class Pack(Pass):
    """Packs weights as a package does that nobody here knows."""

    kind: ClassVar[str] = "pack"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})

    def gives(self) -> frozenset[str]:
        return frozenset({"packed"})


def test_traits_and_not_names_decide_what_may_follow():
    for step, words in (
        (Prune(), "comes after pack, and channels cannot leave packed weights"),
        (Heal(), "comes after pack, and packed weights cannot be trained"),
        (Quantize(), "quantized already, by pack"),
        (ExportOnnx(), "comes after pack, whose packed weights it would unpack; put pack behind it"),
    ):
        with pytest.raises(ChainError, match=words):
            check_chain([Mark(), Pack(), step], "torch")
    check_chain([Mark(), Heal()], "torch")  # any pass that changes a model gives heal something to do
    with pytest.raises(ChainError, match="nothing to heal"):
        check_chain([Look(), Heal()], "torch")


def test_a_good_order_gives_the_last_format():
    whole = [Merge(), Prune(), Heal(), Verify(), ExportOnnx(), Verify(), Quantize(mode="static"), Benchmark()]
    assert check_chain(whole, "adapter") == "onnx"
    assert check_chain([], "adapter") == "adapter"


def test_a_wrong_order_runs_nothing(start: Artifact, tmp_path: Path):
    with pytest.raises(ChainError):
        run([Mark(), Merge()], start, tmp_path)
    assert not (tmp_path / "run").exists()


# Running ---------------------------------------------------------------------------------------------------


def test_each_step_has_a_folder_and_a_record(start: Artifact, tmp_path: Path):
    last = run([Mark(word="a"), Look(), Mark(word="b")], start, tmp_path)
    first, second, third = names(tmp_path)
    assert first.startswith("01-mark-") and second.startswith("02-look-") and third.startswith("03-mark-")
    assert len(third.rpartition("-")[2]) == 8
    assert Path(last.source, "model.txt").read_text() == "mab"
    kinds = [(step.kind, step.artifact, step.settings) for step in last.lineage]
    assert kinds == [
        ("mark", first, {"word": "a"}),
        ("look", second, {"limit": 99}),
        ("mark", third, {"word": "b"}),
    ]
    marked = Artifact.load(tmp_path / "run" / first)
    assert last.lineage[0].parent_hash == start.hash
    assert last.lineage[1].parent_hash == last.lineage[2].parent_hash == marked.hash
    assert last.lineage[0].metrics == {"length": 2, "size_bytes": 2} and last.lineage[0].seconds >= 0
    looked = Artifact.load(tmp_path / "run" / second)
    assert (
        looked.source == marked.source
        and looked.hash == marked.hash
        and "size_bytes" not in looked.lineage[1].metrics
    )
    assert [path.name for path in RunFolder(tmp_path / "run").passes()] == [first, second, third]
    assert RunFolder(tmp_path / "run").final().path == last.path


def test_finished_steps_are_not_run_again(start: Artifact, tmp_path: Path):
    chain: list[Pass] = [Mark(word="a"), Look(), Mark(word="a")]  # the same pass twice
    run(chain, start, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/artifact.json")}
    said: list[str] = []
    again = run_chain(chain, start, Context(run_dir=tmp_path / "run", say=said.append))
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 3
    assert all("already there" in line for line in said) and len(said) == 3
    assert Path(again.source, "model.txt").read_text() == "maa"


def test_a_changed_setting_recomputes_from_there_on(start: Artifact, tmp_path: Path):
    run([Mark(word="a"), Mark(word="b"), Mark(word="c")], start, tmp_path)
    old = names(tmp_path)
    last = run([Mark(word="a"), Mark(word="B"), Mark(word="c")], start, tmp_path)
    new = [path.name for path in RunFolder(tmp_path / "run").passes()]
    assert new[0] == old[0] and not {*new[1:]} & {*old}
    assert Path(last.source, "model.txt").read_text() == "maBc"


def test_a_changed_look_leaves_the_model_steps_alone(start: Artifact, tmp_path: Path):
    run([Mark(word="a"), Look(limit=10), Mark(word="b")], start, tmp_path)
    old = names(tmp_path)
    run([Mark(word="a"), Look(limit=20), Mark(word="b")], start, tmp_path)
    new = [path.name for path in RunFolder(tmp_path / "run").passes()]
    assert new[0] == old[0] and new[2] == old[2] and new[1] != old[1]


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": ("a cat",)},
        {"seed": 1},
        *(
            {"sampling": SamplingConfig(**{key: value})}
            for key, value in {
                "steps": 3,
                "guidance": 2.0,
                "height": 64,
                "negative_prompt": "blue",
                "scheduler": {"class": "LCMScheduler"},
            }.items()
        ),
    ],
)
def test_another_picture_is_another_result(start: Artifact, tmp_path: Path, change: dict[str, object]):
    run([Look()], start, tmp_path)
    run([Look()], start, tmp_path, **change)
    assert len(names(tmp_path)) == 2


def test_what_is_the_models_own_anyway_is_no_other_result(start: Artifact, tmp_path: Path):
    for sampling in (SamplingConfig(), SamplingConfig(steps=30, guidance=7.5, negative_prompt="")):
        run([Look()], start, tmp_path, sampling=sampling)
    student = replace(start, sampling=SamplingConfig(steps=4))
    for steps in (8, 9):  # it takes four whatever the run says
        run([Look()], student, tmp_path, sampling=SamplingConfig(steps=steps))
    assert len(names(tmp_path)) == 2


def test_folders_of_older_chains_are_found(start: Artifact, tmp_path: Path, pictures: Path):
    """A step was named by a hash of all that its run said."""
    data = DataConfig(path=str(pictures))
    sampling = SamplingConfig(steps=6, guidance=3, height=64)
    known = {"seed": 3, "prompts": ("a cat",), "sampling": sampling, "data": data}
    run([Look()], start, tmp_path, **known)
    shared = [3, ["a cat"], "", 6, 3.0, 64, None, data.model_dump(mode="json")]
    described = ["look", {"limit": 99}, [start.hash], shared, tunekit.__version__]
    former = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]
    (tmp_path / "run" / names(tmp_path)[0]).rename(tmp_path / "run" / f"01-look-{former}")
    run([Look()], start, tmp_path, **known)
    assert names(tmp_path) == [f"01-look-{former}"]


class Deaf(Mark):
    """Reads nothing but the model."""

    kind: ClassVar[str] = "deaf"

    def reads(self, context: Context) -> frozenset[str]:
        return frozenset()


def test_a_step_is_found_under_any_number(start: Artifact, tmp_path: Path):
    run([Mark(word="a"), Mark(word="b")], start, tmp_path)
    first, second = names(tmp_path)
    said: list[str] = []
    chain: list[Pass] = [Mark(word="a"), Look(), Mark(word="b")]  # a look put into the middle
    last = run_chain(chain, start, Context(run_dir=tmp_path / "run", say=said.append))
    folders = [path.name for path in RunFolder(tmp_path / "run").passes()]
    assert folders[0] == first and folders[1].startswith("02-look-") and folders[2] == second
    assert sum("already there" in line for line in said) == 2
    assert Path(last.source, "model.txt").read_text() == "mab"


def test_a_step_is_made_again_only_for_what_it_reads(start: Artifact, tmp_path: Path):
    run([Deaf(), Look()], start, tmp_path, prompts=("a cat",), seed=1)
    run([Deaf(), Look()], start, tmp_path, prompts=("a dog",), seed=2, sampling=SamplingConfig(steps=3))
    found = names(tmp_path)
    assert [name[:7] for name in found] == ["01-deaf", "02-look", "02-look"]
    # How it is drawn is noted anew all the same.
    assert Artifact.load(tmp_path / "run" / found[0]).sampling == SamplingConfig(steps=3)
    run([Deaf(word="y")], start, tmp_path)
    assert len(names(tmp_path)) == 4


def test_every_pass_reads_what_it_says():
    plain, told = Context(run_dir=Path()), Context(run_dir=Path(), data=DataConfig(path="photos"))
    assert Merge().reads(plain) == ExportOnnx().reads(plain) == frozenset()
    assert "prompts" in Prune().reads(plain) and "prompts" not in Prune().reads(told)
    assert "steps" not in Prune().reads(plain) and "parent" in Heal().reads(told)
    assert {"prompts", "steps", "parent"} <= Verify().reads(plain) and "data" not in Verify().reads(told)
    assert "first" in Verify(against="first").reads(plain) and "first" not in Verify().reads(plain)


def test_other_pictures_of_the_same_name_are_another_result(
    start: Artifact, tmp_path: Path, make_pictures: Callable[..., Path]
):
    for seed in (0, 1):
        folder = make_pictures(tmp_path / "photos", 2, seed=seed)
        run([Mark()], start, tmp_path, data=DataConfig(path=str(folder), resolution=64))
    assert len(names(tmp_path)) == 2
    moved = folder.rename(tmp_path / "moved")
    run([Mark()], start, tmp_path, data=DataConfig(path=str(moved), resolution=64))
    assert len(names(tmp_path)) == 2


def test_folders_that_no_chain_names_are_removed(start: Artifact, tmp_path: Path):
    run([Mark(word="a"), Mark(word="b"), Look()], start, tmp_path)
    old = names(tmp_path)
    last = run([Mark(word="a"), Mark(word="c")], start, tmp_path)
    run_folder = tmp_path / "run"
    (run_folder / "notes").mkdir()
    user = RunFolder(tmp_path / "other")
    looked = replace(open_artifact(run_folder / old[1]), path=user.path / "01-look-00000000")
    looked.path.mkdir(parents=True)
    looked.write()  # another run looks at a model of this one
    kept = workspace.prune_folders(str(run_folder), dry=True)
    assert [item.path.name for item in kept] == old[1:] and len(names(tmp_path)) == 5
    found = workspace.prune_folders(str(run_folder))
    assert found == kept and found[0].user.startswith(str(user.path)) and not found[1].user
    assert sorted(names(tmp_path)) == sorted([old[0], old[1], last.path.name, "notes"])
    assert found[1].size_bytes > 0
    (run_folder / "chain.json").unlink()
    with pytest.raises(ArtifactError, match=r"no chain\.json"):
        workspace.prune_folders(str(run_folder))


class Lose(Mark):
    """Gives figures that are no numbers."""

    kind: ClassVar[str] = "lose"

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        outcome = super().run(artifact, context)
        outcome.metrics |= {"psnr_db": float("nan"), "ssim": 0.5}
        outcome.details = {"rows": [{"relative error": float("inf")}]}
        return outcome


def test_a_figure_that_is_not_finite_fails_and_is_no_bare_word(start: Artifact, tmp_path: Path):
    with pytest.raises(VerificationFailed, match=r"optimize\[0\] \(lose\): psnr_db: not finite"):
        run([Lose(), Mark()], start, tmp_path)
    (folder,) = names(tmp_path)
    text = (tmp_path / "run" / folder / "artifact.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    step = Artifact.load(tmp_path / "run" / folder).lineage[-1]
    assert step.metrics["psnr_db"] is None and step.metrics["ssim"] == 0.5
    assert step.details["rows"] == [{"relative error": None}]


def test_what_an_earlier_chain_did_is_known(start: Artifact, tmp_path: Path):
    """Its record says it, and where there is no record the files do."""
    half = Step(kind="export_onnx", artifact="x", settings={"dtype": "fp16"})
    with pytest.raises(ChainError, match=r"in fp16, and int8 is made of fp32.*dtype: fp32"):
        check_chain([Quantize()], Start.of(replace(start, format="onnx", lineage=(half,))))
    packed = replace(start, lineage=(Step(kind="quantize", artifact="x", settings={"mode": "dynamic"}),))
    for source, giver in ((packed, "quantize"), (start, "quantize")):
        if source is start:
            (Path(start.source) / "unet").mkdir()
            noted = {"quantization": {"scheme": "int8", "mode": "dynamic"}}
            (Path(start.source) / "unet" / "config.json").write_text(json.dumps(noted))
        with pytest.raises(ChainError, match=f"quantized already, by {giver}"):
            check_chain([Quantize()], Start.of(source))
        with pytest.raises(ChainError, match="channels cannot leave packed weights"):
            check_chain([Prune()], Start.of(source))
    with pytest.raises(ChainError, match="in fp16"):
        check_chain([ExportOnnx(dtype="fp16"), Quantize()], "torch")


@pytest.mark.parametrize(
    ("chain", "start_", "message"),
    [
        ([Merge()], Start("adapter", based=False), "does not name it; write merge: {base"),
        ([Merge(base="no/such/folder")], Start("adapter"), "cannot take its base"),
        ([Prune()], Start("torch", examples=False), "neither pictures nor prompts"),
        ([Mark(), Heal()], Start("torch", examples=False), "neither pictures nor prompts"),
        ([Merge(), Verify()], Start("adapter"), "no parent to compare with: .* only one whole model"),
        ([Merge(), Verify(against="first")], Start("adapter"), "no first model"),
        ([Quantize(), Verify(against="first")], Start("onnx"), "no first model"),
        ([Verify(providers=["cuda"])], Start("onnx"), "nothing to compare"),
        ([Quantize(), Verify(providers=["cuda"])], Start("onnx"), "no CUDAExecutionProvider here"),
        ([Benchmark(provider="tensorrt")], Start("onnx"), "no TensorrtExecutionProvider here"),
        ([Benchmark()], Start("tensorrt"), "no NVIDIA GPU answers"),
        ([Quantize(mode="dynamic"), RTX], Start("onnx"), "reads no uint8 .*target: tensorrt"),
        ([Quantize(mode="static"), RTX], Start("onnx"), "reads no uint8 .*target: tensorrt"),
        ([RTX], Start("onnx", traits={"uint8": "quantize"}), "comes after quantize"),
        ([Quantize(components=["vae"])], Start("torch", "sd15"), "only the unet can be quantized"),
        ([ExportOnnx(), Quantize(components=["vae"])], Start("torch", "sd15"), "no component vae to"),
        (
            [ExportOnnx(), Quantize(mode="static", components=["vae_decoder"])],
            Start("torch", "sd15"),
            "no effect on vae_decoder",
        ),
        ([Quantize(keep=["up_blockz.-1"])], TINY, r'up_blockz.*did you mean "up_blocks"'),
        ([ExportOnnx(), Quantize(keep=["up_blocks.9"])], TINY, "no 9 in up_blocks; there are 0, 1"),
        ([Prune(keep=["up_blocks.-3"])], TINY, '"up_blocks.-3" names nothing'),
        ([Prune(keep=["mid_blok"])], TINY, 'did you mean "mid_block"'),
        ([Prune(keep=["up_blocks.4"])], USUAL, "no 4 in up_blocks; there are 0, 1, 2, 3"),
    ],
)  # fmt: skip
def test_what_could_only_fail_later_is_said_before(chain: list[Pass], start_: Start, message: str):
    with pytest.raises(ChainError, match=message):
        check_chain(chain, start_)


@pytest.mark.parametrize(
    "settings",
    [
        {"verify": {"providers": ["cpu", "cpu"]}},
        {"prune": {"targets": ["heads", "heads"]}},
        {"quantize": {"components": ["unet", "unet"]}},
        {"build_tensorrt": {"devices": ["rtx-3060", "rtx-3060"]}},
    ],
)
def test_a_name_stands_in_a_list_once(settings: dict[str, Any]):
    with pytest.raises(ChainError, match="twice"):
        parse_chain([settings])
    with pytest.raises(ChainError, match="ratio"):
        parse_chain([{"prune": {"ratio": 0}}])


class Hasten(Mark):
    """Makes a model of few steps."""

    kind: ClassVar[str] = "hasten"

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        outcome = super().run(artifact, context)
        outcome.sampling = SamplingConfig(steps=4, guidance=1)
        return outcome


def test_every_artifact_says_how_it_is_drawn_with_and_opened(start: Artifact, tmp_path: Path):
    opened = Source("", variant="fp16")
    start = replace(start, opened=opened, sampling=SamplingConfig(guidance=2))
    run([Look(), Hasten(), Look()], start, tmp_path, sampling=SamplingConfig(steps=9, guidance=3, height=64))
    looked, hastened, after = (Artifact.load(tmp_path / "run" / name) for name in names(tmp_path))
    assert looked.sampling == SamplingConfig(steps=9, guidance=2, height=64)  # its own, then the run's
    assert hastened.sampling == after.sampling == SamplingConfig(steps=4, guidance=1, height=64)
    assert looked.model_source == Source(start.source, variant="fp16")
    assert hastened.model_source == after.model_source == Source(hastened.source)  # written here: plain


class Redraw(Pass):
    """Says how many steps a model is drawn in from here on."""

    kind: ClassVar[str] = "redraw"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})
    redraws: ClassVar[bool] = True
    steps: int = 8

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        return Outcome(sampling=SamplingConfig(steps=self.steps))


def test_chains_in_one_folder_do_not_change_how_the_other_draws(start: Artifact, tmp_path: Path):
    """They share a step, one of them behind a step that says how it is drawn."""
    chains: list[list[Pass]] = [[Deaf()], [Redraw(), Deaf()], [Redraw(steps=4), Deaf(), Deaf(word="y")]]
    made = [run(chain, start, tmp_path, sampling=SamplingConfig(steps=30)) for chain in chains]
    loaded = [Artifact.load(one.path) for one in made if one.path]
    assert [one.sampling for one in loaded] == [SamplingConfig(steps=steps) for steps in (30, 8, 4)]
    assert [[step.kind for step in one.lineage] for one in loaded] == [
        ["deaf"],
        ["redraw", "deaf"],
        ["redraw", "deaf", "deaf"],
    ]
    first, second = loaded[:2]
    assert first.hash == second.hash
    inodes = [Path(one.source, "model.txt").stat().st_ino for one in (first, second)]
    assert inodes[0] == inodes[1] and first.path != second.path  # nothing was made twice
    before = names(tmp_path)
    for chain, one in zip(chains, made, strict=True):
        assert run(chain, start, tmp_path, sampling=SamplingConfig(steps=30)).path == one.path
    # What the run says is no chain's own, and is noted in place.
    again = run(chains[0], start, tmp_path, sampling=SamplingConfig(steps=20))
    assert again.path == made[0].path and again.sampling == SamplingConfig(steps=20)
    assert Artifact.load(second.path or "").sampling == SamplingConfig(steps=8)
    assert names(tmp_path) == before


def test_another_model_is_another_result(start: Artifact, tmp_path: Path):
    run([Mark()], start, tmp_path)
    Path(start.source, "model.txt").write_text("n")
    run([Mark()], open_artifact(start.source, family="sd15"), tmp_path)
    assert len(names(tmp_path)) == 2


def test_what_a_step_is_compared_with(start: Artifact, tmp_path: Path):
    last = run([Look(), Mark(word="a"), Look(limit=50), Mark(word="b"), Look(limit=60)], start, tmp_path)
    looks = [step for step in last.lineage if step.kind == "look"]
    folders = names(tmp_path)
    assert looks[0].metrics["parent"] is None and looks[0].details["first"] is None
    assert looks[1].metrics["parent"] == start.source == looks[1].details["first"]
    assert (
        Path(str(looks[2].metrics["parent"])).name == folders[1] and looks[2].details["first"] == start.source
    )


# Failing ---------------------------------------------------------------------------------------------------


def test_a_missed_threshold_stops_the_chain_and_is_kept(start: Artifact, tmp_path: Path):
    chain: list[Pass] = [Mark(word="abc"), Look(limit=2), Mark()]
    seen: list[str] = []
    for _ in range(2):  # the second time it is known without looking
        with pytest.raises(
            VerificationFailed, match=r"optimize\[1\] \(look\): length 4 is above 2"
        ) as caught:
            run(chain, start, tmp_path, after_step=lambda artifact: seen.append(artifact.lineage[-1].kind))
        assert caught.value.exit_code == 1
    assert seen == ["mark", "look", "mark", "look"]  # the report is told of the failing step too
    assert [name[:7] for name in names(tmp_path)] == ["01-mark", "02-look"]
    kept = RunFolder(tmp_path / "run").final().lineage[-1]
    assert kept.metrics["length"] == 4 and kept.details["failure"] == "length 4 is above 2"
    chain[1] = Look(limit=9)
    assert Path(run(chain, start, tmp_path).source, "model.txt").read_text() == "mabcx"


def test_a_full_disk_leaves_nothing_half_written(start: Artifact, tmp_path: Path):
    with pytest.raises(OutputError, match="no space left"):
        run([Mark(), Fill()], start, tmp_path)
    assert [path.name[:7] for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["01-mark"]


SCRIPT = """
import sys, time
from pathlib import Path
from typing import ClassVar
from tunekit.artifacts import open_artifact
from tunekit.passes.base import Context, Outcome, Pass, run_chain

class Slow(Pass):
    '''Writes half of its file, says so, and takes its time.'''
    kind: ClassVar[str] = "slow"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})
    word: str

    def run(self, artifact, context):
        text = Path(artifact.source, "model.txt").read_text()
        (context.folder / "model.txt").write_text(text)
        print("half", self.word, flush=True)
        time.sleep(float(sys.argv[3]) if self.word == "b" else 0)
        (context.folder / "model.txt").write_text(text + self.word)
        return Outcome()

start = open_artifact(Path(sys.argv[1]), family="sd15")
last = run_chain([Slow(word="a"), Slow(word="b"), Slow(word="c")], start, Context(run_dir=Path(sys.argv[2])))
print("done", Path(last.source, "model.txt").read_text(), flush=True)
"""


def test_a_killed_chain_goes_on_where_it_stopped(start: Artifact, tmp_path: Path):
    command = [sys.executable, "-c", SCRIPT, start.source, str(tmp_path / "run")]
    process = subprocess.Popen([*command, "600"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("half b"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    assert [name[:7] for name in names(tmp_path)] == [".02-slo", "01-slow"]  # half a folder, out of sight
    first = next((tmp_path / "run").glob("01-*/artifact.json"))
    written = first.stat().st_mtime_ns
    again = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=120, check=True)
    assert "done mabc" in again.stdout and "half a" not in again.stdout and "already there" in again.stdout
    assert first.stat().st_mtime_ns == written
    assert [name[:7] for name in names(tmp_path)] == ["01-slow", "02-slow", "03-slow"]


# Words -----------------------------------------------------------------------------------------------------


def test_figures_carry_their_units():
    assert format_metric("size_bytes", 3 * 2**20) == "3.0 MiB"
    assert format_metric("denoiser_ms_p50", 12.34) == "12.3 ms"
    assert format_metric("psnr_db", 40.0) == "40.0 dB"
    assert format_metric("speedup", 2.0) == "2.00x"
    assert format_metric("parameters", 11_008_132) == "11.0M"
    assert format_metric("slower", True) == "True"
    assert format_metric("relative_error", 0.00123456) == "0.00123"
    assert format_metric("psnr_db_worst", 40.0) == "40.0 dB"  # of a part or another moment
    assert format_metric("relative_error_unet", 0.25) == format_metric("nobody_declared_it", 0.25) == "0.25"
    assert describe_metrics({"slower": True, "speedup": 0.5}) == "speedup 0.50x, slower"
    assert describe_metrics({"slower": False}) == ""
    line = describe_metrics({"steps": 5, "size_bytes": 1024, "psnr_db": 41.23, "ssim": None})
    assert line == "size 1.0 KiB, PSNR 41.2 dB, steps 5"
    parts = {"relative_error_text_encoder": 0.5, "relative_error": 0.5, "parameters_before": 5}
    assert describe_metrics(parts) == (
        "relative error 0.5, relative error text encoder 0.5, parameters before 5"
    )


def test_a_step_says_what_it_did(start: Artifact, tmp_path: Path):
    said: list[str] = []
    run_chain([Mark()], start, Context(run_dir=tmp_path / "run", say=said.append))
    assert said[0] == "01 mark ..." and said[-1].startswith("01 mark: ") and "length 2" in said[-1]
    json.dumps(Artifact.load(next((tmp_path / "run").glob("01-*"))).lineage[-1].metrics)
