from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tunekit.artifacts import Artifact, RunFolder, Step
from tunekit.config import load
from tunekit.config.yaml import config_names, read
from tunekit.registry import FAMILIES, PASSES, recipe_names
from tunekit.resources import builtin_names, sweep_names

Command = Callable[..., subprocess.CompletedProcess[str]]

CONFIG = """\
recipe: lora
model: {family: sd15, source: tiny}
data: {path: photos, resolution: 32}
train: {max_steps: 2, lr: 1e-3}
memory: {device: cpu}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def config(here: Path) -> Path:
    (here / "mine.yaml").write_text(CONFIG)
    return here / "mine.yaml"


@pytest.fixture
def finished(here: Path) -> RunFolder:
    """A run with an adapter and two passes, the second slower than before."""
    run = RunFolder(here / "runs" / "fox")
    run.path.mkdir(parents=True)
    run.config.write_text(CONFIG + "name: fox\n")
    steps = (
        Step("train", "adapter", seconds=12.0, metrics={"steps": 2, "loss": 0.5}),
        Step("merge", "01-merge-00000000", seconds=1.0, metrics={"size_bytes": 2048}),
        Step(
            "benchmark",
            "02-benchmark-00000000",
            metrics={"picture_ms_p50": 12.5, "speedup": 0.5, "slower": True},
        ),
    )
    folders = [run.adapter, run.path / steps[1].artifact, run.path / steps[2].artifact]
    for index, folder in enumerate(folders):
        folder.mkdir()
        (folder / "weights").write_bytes(b"w")
        model = folders[1] if index == 2 else folder
        kind = "torch" if index else "adapter"
        Artifact(folder, model, kind, "sd15", str(model), steps[: index + 1], base="tiny").write()
    run.write_chain([step.artifact for step in steps[1:]])
    return run


# Quick ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["ls"],
        ["ls", "--json"],
        ["show", "mine.yaml"],
        ["report", "runs/fox"],
        ["report", "fox", "--json"],
    ],
    ids=" ".join,
)
def test_answers_at_once(config: Path, finished: RunFolder, arguments: list[str]):
    # On a busy machine the clock tells of the others; what the command itself takes is its CPU time.
    seconds = []
    for _ in range(5):
        started, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, "-m", "tunekit", *arguments], stdout=subprocess.DEVNULL, check=True)
        wall, after = time.perf_counter() - started, os.times()
        cpu = after.children_user - before.children_user + after.children_system - before.children_system
        seconds.append((min(wall, cpu), wall))
    best, wall = min(seconds)
    print(f"tunekit {' '.join(arguments)}: {best:.2f} s of CPU, {wall:.2f} s by the clock")
    assert best < 0.8


def test_every_command_explains_itself(tunekit_command: Command):
    overview = tunekit_command("--help").stdout
    for command in (
        "ls",
        "show",
        "check",
        "plan",
        "run",
        "generate",
        "bench",
        "report",
        "compare",
        "prune-folders",
        "doctor",
        "cp",
    ):
        assert f" {command} " in overview
        assert f"Usage: tunekit {command}" in tunekit_command(command, "--help").stdout


# ls, show, cp ---------------------------------------------------------------------------------------------


def test_ls_lists_everything_there_is(finished: RunFolder, tunekit_command: Command):
    found = json.loads(tunekit_command("ls", "--json").stdout)
    assert list(found["configs"]) == config_names()
    assert list(found["sweeps"]) == sweep_names()
    assert list(found["recipes"]) == recipe_names()
    assert list(found["families"]) == FAMILIES.names()
    assert list(found["passes"]) == PASSES.names()
    assert list(found["builtin"]) == builtin_names()
    assert found["runs"] == [{"run": "runs/fox", "state": "2 passes done", "final": "01-merge-00000000"}]
    assert all(
        about for kind in ("configs", "recipes", "families", "passes") for about in found[kind].values()
    )
    text = tunekit_command("ls").stdout
    assert all(name in text for name in ["sd15/lora", "dreambooth", "prune", "runs/fox"])


def test_ls_survives_a_closed_pipe(tunekit_command: Command):
    command = f"{sys.executable} -m tunekit ls | head -2"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("\nconfigs\n", "")


def test_show_is_the_resolved_config(config: Path, here: Path, tunekit_command: Command):
    (here / "child.yaml").write_text("extends: mine.yaml\ntrain: {max_steps: 7}\n")
    run = tunekit_command("show", "child.yaml", "train.lr=0.5")
    tree = yaml.safe_load(run.stdout)
    assert (tree["train"]["max_steps"], tree["train"]["lr"], tree["adapter"]["rank"]) == (7, 0.5, 16)
    assert json.loads(tunekit_command("show", "child.yaml", "train.lr=0.5", "--json").stdout) == tree
    (here / "shown.yaml").write_text(run.stdout)
    assert load("shown.yaml").config == load("child.yaml", ["train.lr=0.5"]).config


def test_show_the_schema(tunekit_command: Command):
    schema = json.loads(tunekit_command("show", "sd15/lora", "--schema").stdout)
    assert schema["additionalProperties"] is False
    train = schema["$defs"]["TrainConfig"]["properties"]
    assert train["batch_size"]["description"] == "Samples per optimizer step, over all processes."


def test_cp(here: Path, tunekit_command: Command):
    run = tunekit_command("cp", "tiny/lora", "mine.yaml")
    assert (run.returncode, run.stdout) == (0, "mine.yaml\n")
    assert load("mine.yaml", ["name=tiny-lora"]).config == load("tiny/lora").config
    (here / "mine.yaml").write_text("changed: by me\n")
    refused = tunekit_command("cp", "tiny/lora", "mine.yaml")
    assert refused.returncode != 0
    assert "mine.yaml: is there already" in refused.stderr
    assert (here / "mine.yaml").read_text() == "changed: by me\n"
    assert tunekit_command("cp", "tiny/lora", "mine.yaml", "--force").returncode == 0
    assert (here / "mine.yaml").read_text() != "changed: by me\n"
    (here / "folder").mkdir()
    assert tunekit_command("cp", "lora", "folder").stdout == "folder/lora.py\n"
    unknown = tunekit_command("cp", "tiny/lorra", "x.yaml")
    assert unknown.returncode == 2
    said = 'error: there is no config, recipe or sweep "tiny/lorra"\ndid you mean "tiny/lora"?\n'
    assert unknown.stderr == said


@pytest.mark.parametrize("name", config_names())
def test_a_copy_has_a_head_and_a_name_of_its_own(here: Path, name: str):
    """So that its commands work from where it lies, and two copies do not write into one run."""
    from tunekit import workspace
    from tunekit.config import load as load_config

    for target in ("one.yaml", "my folder/two.yaml"):
        (here / "my folder").mkdir(exist_ok=True)
        copied = workspace.copy(name, target).read_text(encoding="utf-8")
        known, *rest = copied.splitlines()
        assert known.startswith("# yaml-language-server: $schema=")
        assert json.loads(Path(known.partition("$schema=")[2]).read_text(encoding="utf-8"))["properties"]
        assert "configs/" not in copied and "\nname:" not in copied
        told = [line for line in rest if line.startswith("#   tunekit run ")]
        assert all(shlex.split(line[1:])[2] == target for line in told)
        stand_in = load_config(target, stand_in="x")
        assert stand_in.config.run_dir == Path("runs") / Path(target).stem
        assert f"runs/{Path(name).name}" not in copied or (Path(name).name == "lora" and "optimize" in name)


@pytest.mark.parametrize("command", ["", "run", "explain"])
def test_h_is_help(tunekit_command: Command, command: str):
    assert "Usage: tunekit" in tunekit_command(*filter(None, [command]), "-h").stdout


def test_completion(config: Path, here: Path, tunekit_command: Command):
    (here / "mine").mkdir()
    asked = {"_TUNEKIT_COMPLETE": "complete_bash", "COMP_WORDS": "tunekit check mi", "COMP_CWORD": "2"}
    assert tunekit_command(env=asked).stdout.split() == ["mine/", "mine.yaml"]
    asked |= {"COMP_WORDS": "tunekit check sd15/l"}
    assert tunekit_command(env=asked).stdout.split() == ["sd15/lora"]
    assert "--install-completion" in tunekit_command("--help").stdout


def test_home_is_found_where_no_shell_expands_it(
    config: Path, finished: RunFolder, pictures: Path, tunekit_command: Command
):
    """`--out=~/x` and `data.path=~/x` reach the command as they stand."""
    home = {"HOME": str(config.parent), "USERPROFILE": str(config.parent)}
    assert tunekit_command("show", "~/mine.yaml", env=home).returncode == 0
    assert "fox" in tunekit_command("ls", "--runs=~/runs", env=home).stdout
    assert tunekit_command("report", "~/runs/fox", env=home).returncode == 0
    assert tunekit_command("cp", "tiny/lora", "~/new.yaml", env=home).returncode == 0
    assert (config.parent / "new.yaml").is_file()
    shutil.copytree(pictures, config.parent / "photos")
    checked = tunekit_command("check", "mine.yaml", "data.path=~/photos", "runs=~/made", env=home)
    assert checked.returncode == 0, checked.stderr


def test_what_an_override_makes_idle_is_said(config: Path, tunekit_command: Command):
    config.write_text(CONFIG + "preview: {prompts: [a], every: 2}\n")
    shown = tunekit_command("show", "mine.yaml", "train.max_steps=1")
    assert shown.stderr == (
        "warning: mine.yaml:6: preview.every: has no effect: training ends before, at step 1"
        " (by the command line); left out\n"
    )
    assert yaml.safe_load(shown.stdout)["preview"]["every"] is None


def test_explain(tunekit_command: Command):
    told = tunekit_command("explain", "learning_rate").stdout
    assert "train.lr (key)\nHighest learning rate.\n" in told
    assert "takes: a number above 0 to 100" in told
    assert json.loads(tunekit_command("explain", "prune", "--json").stdout)[0]["kind"] == "pass"
    refused = tunekit_command("explain", "prnue")
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (2, 'did you mean "prune"?')


GIVEN = {
    "lora": ["data.path=x"],
    "dreambooth": ["data.path=x", "data.instance_prompt=a", "data.class_prompt=b"],
    "optimize": ["model.source=x"],
}


@pytest.mark.parametrize("name", config_names())
def test_a_copied_config_means_the_same(here: Path, tunekit_command: Command, name: str):
    assert tunekit_command("cp", name, "elsewhere/copy.yaml").returncode == 0
    overrides = ["name=same", *GIVEN[read(name).tree["recipe"]]]
    assert load("elsewhere/copy.yaml", overrides).config == load(name, overrides).config


# Streams --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_what_a_stream_has_no_letters_for_is_escaped(config: Path, tunekit_command: Command, encoding: str):
    prompts = "preview.prompts=['日本 ü 🦊']"
    shown = tunekit_command(
        "show", "mine.yaml", prompts, env={"PYTHONIOENCODING": encoding}, encoding="ascii"
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert yaml.safe_load(shown.stdout)["preview"]["prompts"] == ["日本 ü 🦊"]
    printed = tunekit_command(
        "show", "mine.yaml", prompts, "--json", env={"PYTHONIOENCODING": encoding}, encoding="ascii"
    )
    assert json.loads(printed.stdout)["preview"]["prompts"] == ["日本 ü 🦊"]
    refused = tunekit_command("show", "日本", env={"PYTHONIOENCODING": encoding}, encoding="ascii")
    assert refused.returncode == 2
    assert refused.stderr.startswith('error: there is no config "\\u65e5\\u672c"')


def test_streams_of_a_recipe_take_any_text(config: Path, pictures: Path, tunekit_command: Command):
    """What a recipe prints goes through a pipe of any encoding, and so do paths that are no text."""
    code = (
        "import sys; from tunekit.quiet import steady_streams; steady_streams();"
        "print('日本', '\\udce9'); print('日本', '\\udce9', file=sys.stderr)"
    )
    for encoding in ("cp1252", "utf-8"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            check=True,
        )
        assert run.stdout == run.stderr
        assert run.stdout.endswith(b" \\udce9\n")


# Mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "mime.yaml"], 'error: there is no config "mime.yaml"; did you mean "mine.yaml"?'),
        (["show", "mine.yaml", "train.lr"], 'error: command line: "train.lr" is not an override'),
        (
            ["run", "mine.yaml", "adapter.rnk=1"],
            'error: command line: adapter.rnk: unknown key; did you mean "rank"?',
        ),
        (
            ["run", "mine.yaml", "recipe=lorra"],
            'error: command line: there is no recipe "lorra"; did you mean "lora"?',
        ),
        (["run", "mine.yaml", "optimize=[prnue]"], "prune"),
        (["run", "mine.yaml", "optimize=[{prune: {ratoi: 1}}]"], "ratoi"),
        (["run", "mine.yaml", "optimize=[prune]"], "needs a torch model but the chain starts with adapter"),
        (["run", "sd15/lora"], "data.path: is required; set it here or give data.path=..."),
        (
            ["run", "mine.yaml", "memory.device=cuda:77", "--processes", "2"],
            'error: command line: the device "cuda:77" is not there',
        ),
        (["generate", "runs/nothing", "--prompt", "x"], 'error: there is no "runs/nothing"'),
        (["generate", "builtin/emojis", "--prompt", "x"], "error: nothing is bundled under the name"),
        (
            ["generate", "tiny", "--prompt", "x", "--count", "2", "--out", "x.png"],
            "error: --out: 2 pictures do not go into one file",
        ),
        (["report", "fxo"], 'error: there is no run "fxo"'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_message_and_code_2(
    config: Path, finished: RunFolder, tunekit_command: Command, arguments: list[str], message: str
):
    run = tunekit_command(*arguments)
    assert run.returncode == 2
    assert message in run.stderr
    # On a slow machine a line says first what takes long.
    said = [line for line in run.stderr.splitlines() if not line.startswith("checking ")]
    assert said[0].startswith("error: ")
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [["nix"], ["ls", "--nix"], ["show"], ["generate", "tiny"], ["run", "x", "--processes", "0"]],
    ids=" ".join,
)
def test_wrong_usage_is_code_2_too(tunekit_command: Command, arguments: list[str]):
    run = tunekit_command(*arguments)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(here: Path, tunekit_command: Command, place: str):
    arguments = ["show", "nowhere.yaml"]
    run = tunekit_command(*(["--debug", *arguments] if place == "before" else [*arguments, "--debug"]))
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "ConfigError" in run.stderr


# check ----------------------------------------------------------------------------------------------------


def test_check_is_content(config: Path, here: Path, pictures: Path, tunekit_command: Command):
    run = tunekit_command(
        "check", "mine.yaml", f"data.path={pictures}", "optimize=[merge, {export_onnx: {}}]"
    )
    assert run.returncode == 0, run.stderr
    assert "merge > export_onnx (onnx)" in run.stdout
    assert "all is well" in run.stdout
    assert sorted(path.name for path in here.iterdir()) == ["mine.yaml"]


def test_check_lists_everything_at_once_and_starts_nothing(
    config: Path, here: Path, make_pictures: Callable[..., Path], tunekit_command: Command
):
    photos = make_pictures(here / "photos", count=5)
    (photos / "00.txt").unlink()
    (photos / "01.png").write_bytes((photos / "01.png").read_bytes()[:60])
    Image.new("RGB", (4, 4)).save(photos / "02.png")
    shutil.copy(photos / "03.png", photos / "04.png")
    run = tunekit_command("check", "mine.yaml", "optimize=[export_onnx]", "model.source=nowhere/at/all")
    assert run.returncode == 2
    for part in (
        "00.png",
        "01.png",
        "02.png",
        "04.png",
        "optimize[0] (export_onnx)",
        'there is no "nowhere/at/all"',
    ):
        assert part in run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in here.iterdir()) == ["mine.yaml", "photos"]


# report ---------------------------------------------------------------------------------------------------


def test_report(finished: RunFolder, tunekit_command: Command):
    run = tunekit_command("report", "fox")
    assert run.returncode == 0, run.stderr
    assert "01-merge-00000000" in run.stdout
    assert (finished.path / "report.html").is_file()
    printed = json.loads(tunekit_command("report", "runs/fox", "--json").stdout)
    assert printed == json.loads((finished.path / "report.json").read_text())
    assert printed["version"] == 1
    assert [step["kind"] for step in printed["steps"]] == ["merge", "benchmark"]
    assert printed["final"] == "01-merge-00000000"


# run, generate, bench -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, pictures: Path, tunekit_command: Command
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "mine.yaml").write_text(CONFIG)
    return folder, tunekit_command("run", "mine.yaml", f"data.path={pictures}", cwd=folder)


def test_run_trains(trained: tuple[Path, subprocess.CompletedProcess[str]], tunekit_command: Command):
    folder, run = trained
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    found = json.loads(tunekit_command("ls", "--json", cwd=folder).stdout)
    assert found["runs"] == [{"run": "runs/mine", "state": "trained", "final": "adapter"}]


def test_generate_draws_what_it_says(trained: tuple[Path, Any], tunekit_command: Command):
    folder, _ = trained
    arguments = [
        "generate",
        "runs/mine",
        "--prompt",
        "a füchs",
        "--seed",
        "5",
        "--count",
        "2",
        "--steps",
        "2",
        "--guidance",
        "3",
    ]
    run = tunekit_command(*arguments, cwd=folder)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["generated/a-füchs-5.png", "generated/a-füchs-6.png"]
    assert run.stderr == ""
    with Image.open(folder / "generated" / "a-füchs-6.png") as picture:
        info = picture.text
    assert (info["prompt"], info["seed"], info["steps"], info["guidance"]) == ("a füchs", "6", "2", "3")
    assert (info["source"], info["software"].split()[0]) == ("runs/mine", "tunekit")


def test_generate_finds_a_run_by_its_name(trained: tuple[Path, Any], tunekit_command: Command):
    folder, _ = trained
    run = tunekit_command("generate", "mine", "-p", "x", "--steps", "1", "--out=one.png", cwd=folder)
    assert (run.returncode, run.stdout) == (0, "one.png\n"), run.stderr


def test_generate_numbers_pictures_it_would_overwrite(here: Path):
    from tunekit.workspace import _picture_path

    assert _picture_path(here, "A fox, running!", 3).name == "a-fox-running-3.png"
    (here / "a-fox-running-3.png").touch()
    assert _picture_path(here, "A fox, running!", 3).name == "a-fox-running-3-2.png"
    assert _picture_path(here, "???", 3).name == "picture-3.png"
    assert _picture_path(here / "x.PNG", "any", 3) == here / "x.PNG"


def test_bench_gives_figures_and_ratios(trained: tuple[Path, Any], tunekit_command: Command):
    folder, _ = trained
    arguments = [
        "bench",
        "tiny",
        "runs/mine",
        "--family",
        "sd15",
        "--steps",
        "1",
        "--repeats",
        "2",
        "--no-memory",
    ]
    run = tunekit_command(*arguments, "--json", cwd=folder)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["version"] == 1
    first, second = found["artifacts"]
    assert first["picture_ms_p50"] > 0
    assert second["denoiser_ms_p50"] > 0
    assert second["speedup"] > 0
    assert second["slower"] == (second["speedup"] < 0.97)
    assert "speedup" not in first


# doctor ---------------------------------------------------------------------------------------------------


def test_doctor(tunekit_command: Command):
    run = tunekit_command("doctor", "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    import torch

    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"][-1]["device"] == "cpu"
    assert "CPUExecutionProvider" in found["providers"]["onnxruntime"]
    assert found["bundled"] == builtin_names()
    assert not [item for item in found["missing"] if item["needed"]]


def test_doctor_names_what_is_missing_and_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import typer

    from tunekit import cli, doctor, install

    absent = {"openvino", "peft"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: None if package in absent else real(package))
    with pytest.raises(typer.Exit) as caught:
        cli.doctor()
    assert caught.value.exit_code == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"peft {install.again()}" in said
    assert f"openvino (export to OpenVINO and run it) {install.with_extra('openvino')}" in said


# plan -------------------------------------------------------------------------------------------------------


def test_plan_for_a_card(config: Path, tunekit_command: Command):
    made = tunekit_command("plan", config, "--device", "rtx-3060")
    assert made.returncode == 0, made.stderr
    assert "rtx-3060: fp32, micro-batch 1, nothing checkpointed" in made.stdout
    assert "optimizer state" in made.stdout
    assert re.search(r"and \S+ [KMG]iB of RAM, most in the phase \w+", made.stdout)
    asked = ("--device", "3060", "--json", "--picture", "step.svg")
    content = json.loads(tunekit_command("plan", config, *asked).stdout)
    assert ">optimizer state<" in Path("step.svg").read_text()
    assert content["fits"] is True
    assert content["device_bytes"] < content["budget_bytes"]
    assert set(content["phases"]) == {"load", "encode", "first_step", "step", "save"}


def test_plan_for_all_cards_and_a_sweep(config: Path, tunekit_command: Command):
    swept = ("--sweep", "data.resolution=32,64", "train.batch_size=1,2")
    plans = json.loads(tunekit_command("plan", config, "--device", "3060", *swept, "--json").stdout)
    assert [plan["device"] for plan in plans] == ["rtx-3060"] * 4
    assert {plan["micro_batch"] for plan in plans} == {1, 2}
    table = tunekit_command("plan", config, "--device", "all", "memory.precision=bf16").stdout
    assert "no bf16 there: needs memory.precision=fp16" in table
    assert "h200" in table and "RAM" in table
    swept = ("--sweep", "data.resolution=32,64", "memory.precision=bf16", "--json")
    everywhere = json.loads(tunekit_command("plan", config, *swept).stdout)
    assert len(everywhere) == 2 * len({plan["device"] for plan in everywhere}) > 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "rtx-306"], 'there is no card "rtx-306" in the table; did you mean "rtx-3060"'),
        (["--budget", "much"], '"much" is not a size'),
        (["--budget", "1 MiB"], "are missing\nwhat helps most"),
        (["--device", "cpu", "memory.budget=lots"], "memory.budget"),
        (["--sweep", "data.resolution"], "sweeps nothing"),
        (["--picture", "all.svg"], "give an .html file"),
    ],
)
def test_plan_says_what_is_wrong(config: Path, tunekit_command: Command, arguments: list[str], message: str):
    made = tunekit_command("plan", config, *arguments)
    assert made.returncode == 2
    assert message in made.stderr
    assert "Traceback" not in made.stderr


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.facts.runs])
def test_families_that_are_planned_only(name: str, here: Path, tunekit_command: Command):
    for command in ("check", "run"):
        done = tunekit_command(command, "sdxl/lora", f"model.family={name}", f"data.path={here}")
        assert done.returncode == 2
        assert f'the family "{name}" is planned only: tunekit plan takes it' in done.stderr


def test_a_run_is_planned_within_its_budget(config: Path, pictures: Path, tunekit_command: Command):
    losses = []
    for name, overrides in (("free", []), ("tight", ["memory.budget=11 MB"])):
        batch = ["train.batch_size=4", "data.resolution=64"]
        done = tunekit_command("run", config, f"data.path={pictures}", f"name={name}", *batch, *overrides)
        assert done.returncode == 0, done.stderr
        lines = Path("runs", name, "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert "plan: fp32, micro-batch" in done.stdout
    assert "Memory of a step, as planned" in Path("runs/tight/report.html").read_text()
    plan = json.loads(Path("runs/tight/plan.json").read_text())
    assert plan["levers"]
    assert plan["device_bytes"] <= plan["budget_bytes"] == 11_000_000
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
