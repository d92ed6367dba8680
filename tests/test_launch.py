from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunekit.errors import ConfigError
from tunekit.launch import take_sharding

ROOT = Path(__file__).resolve().parents[1]

RECIPE = '''
"""Does what its config says."""

import os, sys, time
from pathlib import Path

from tunekit.config import MemoryConfig, RunConfig
from tunekit.errors import DataError, NonFiniteError
from tunekit.launch import run_recipe


class Config(RunConfig):
    what: str = "nothing"
    """What to do."""
    memory: MemoryConfig = MemoryConfig(device="cpu")
    """Where."""


def tell(line):
    sys.stdout.write(line + "\\n")  # in one piece: processes share the pipe
    sys.stdout.flush()


def main(config, loaded):
    rank = int(os.environ.get("RANK", "0"))
    tell(f"rank {rank} of {os.environ.get('WORLD_SIZE', '1')} does {config.what}")
    if config.what == "together":
        import torch
        from accelerate import Accelerator

        accelerator = Accelerator()
        total = accelerator.reduce(torch.ones(1))
        tell(f"sum {total.item():g} on {accelerator.device.type}")
        accelerator.end_training()
    if config.what == "data":
        raise DataError("no pictures", where="photos", hint="give some")
    if config.what == "data on rank 1":
        if rank == 1:
            raise DataError("no pictures", where="photos")
        raise RuntimeError("Connection closed by peer") if time.sleep(2) is None else None
    if config.what == "non-finite":
        raise NonFiniteError("the loss became NaN")
    if config.what == "bug":
        raise ZeroDivisionError("a bug")
    if config.what == "die":
        os.kill(os.getpid(), 9)
    if config.what == "killed on rank 1":
        if rank == 1:
            os.kill(os.getpid(), 9)
        time.sleep(0.3)
        raise RuntimeError("Connection closed by peer")
    if config.what == "abort":
        os.abort()
    if config.what == "disk":
        raise OSError(28, "No space left on device", f"runs/x/.adapter.tmp-{os.getpid()}/a.safetensors")
    if config.what == "gone":
        open("runs/x/.metrics.jsonl.tmp-12")
    if config.what == "memory":
        raise RuntimeError("could not create a primitive")
    if config.what == "much":
        raise MemoryError
    if config.what == "term":  # in the middle of what makes an error of ours of whatever goes wrong
        try:
            os.kill(os.getpid(), 15)
            time.sleep(5)
        except Exception as error:
            raise DataError("the runtime cannot run it") from error
    if config.what == "wait":
        Path("waiting").write_text(str(os.getpid()))
        time.sleep(60)
    Path(f"done-{rank}").touch()


if __name__ == "__main__":
    run_recipe(main, Config)
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE)
    (tmp_path / "mine.yaml").write_text("recipe: mine.py\n")
    return tmp_path


def direct(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "mine.py", "--config", "mine.yaml", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


# A recipe on its own --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("nothing", 0, ""),
        ("data", 2, "error: photos: no pictures\ngive some\n"),
        ("non-finite", 1, "error: the loss became NaN\n"),
        (
            "disk",
            1,
            "error: runs/x/adapter/a.safetensors: could not be read or written: no space left on the disk\n",
        ),
        ("gone", 1, "error: runs/x/metrics.jsonl: could not be read or written: No such file or directory\n"),
        ("memory", 1, "error: memory ran out (could not create a primitive)\n"),
        ("much", 1, "error: memory ran out\n"),
        (
            "term",
            143,
            "stopped; nothing was being trained\ngive the same command again to continue\n",
        ),
    ],
)
def test_exit_codes_and_messages(here: Path, what: str, code: int, said: str):
    run = direct(f"what={what}")
    assert run.returncode == code
    assert run.stderr == said or (run.stderr.startswith(said) and run.stderr.count("\n") == 2)
    assert (here / "done-0").exists() == (code == 0)


def test_config_errors_are_said_once_and_end_every_rank(here: Path):
    first, second = direct("wat=x"), direct("wat=x", RANK="1")
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr == 'error: command line: wat: unknown key; did you mean "what"?\n'
    assert second.stderr == ""


def test_debug_shows_the_traceback(here: Path):
    run = direct("what=data", "--debug")
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "DataError" in run.stderr


def test_a_bug_keeps_its_traceback(here: Path):
    run = direct("what=bug")
    assert run.returncode == 1
    assert "ZeroDivisionError: a bug" in run.stderr


def test_a_config_for_another_recipe(here: Path):
    (here / "mine.yaml").write_text("recipe: lora\n")
    run = direct()
    assert run.returncode == 2
    assert run.stderr == 'error: mine.yaml:1: this config is for the recipe "lora", not "mine"\n'


def test_help_says_what_the_recipe_does(here: Path):
    run = subprocess.run([sys.executable, "mine.py", "--help"], capture_output=True, text=True, check=True)
    assert "usage: recipes/mine.py" in run.stdout


# Through `tunekit run` ------------------------------------------------------------------------------------


def told(stderr: str) -> str:
    """What was said, but for the notice that the recipe's own file is code, and what a slow machine says."""
    notice, _, rest = stderr.partition("\n")
    assert notice.startswith("mine.yaml:1: the recipe ") and notice.endswith(
        " is code, and runs from here on"
    )
    return re.sub(r"(?m)^\w.*: \([\d.]+ s\)\n", "", rest)


def test_run_says_that_the_recipe_was_killed(here: Path, tunekit_command: Callable[..., Any]):
    run = tunekit_command("run", "mine.yaml", "what=die")
    assert run.returncode == 1
    assert told(run.stderr).startswith("error: the recipe was killed, perhaps because memory ran out\n")
    assert "Traceback" not in run.stderr


def test_run_shows_a_bug_once(here: Path, tunekit_command: Callable[..., Any]):
    run = tunekit_command("run", "mine.yaml", "what=bug")
    assert run.returncode == 1
    assert run.stderr.count("Traceback") == 1
    assert run.stderr.endswith("ZeroDivisionError: a bug\n")


def test_two_processes_meet_whatever_the_users_accelerate_config_says(
    here: Path, tunekit_command: Callable[..., Any]
):
    (here / "accelerate").mkdir()
    (here / "accelerate" / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_processes: 7\n"
    )
    run = tunekit_command("run", "mine.yaml", "what=together", "--processes", "2", env={"HF_HOME": str(here)})
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if not line.startswith("starting: ")]
    assert sorted(lines) == [
        "rank 0 of 2 does together",
        "rank 1 of 2 does together",
        "sum 2 on cpu",
        "sum 2 on cpu",
    ]
    assert {"done-0", "done-1"} <= set(os.listdir(here))


def test_an_error_on_one_rank_is_the_one_that_is_told(here: Path, tunekit_command: Callable[..., Any]):
    run = tunekit_command("run", "mine.yaml", "what=data on rank 1", "--processes", "2")
    assert run.returncode == 2
    assert told(run.stderr) == "error: photos: no pictures\n"


def test_a_killed_rank_ends_in_one_line(here: Path, tunekit_command: Callable[..., Any]):
    run = tunekit_command("run", "mine.yaml", "what=killed on rank 1", "--processes", "2")
    assert run.returncode == 1
    assert told(run.stderr) == (
        "error: rank 1 was killed, perhaps because memory ran out\n"
        "give the same command again to continue; if it happens again, use less memory\n"
    )


def test_a_fault_in_a_library_is_not_called_memory(here: Path, tunekit_command: Callable[..., Any]):
    run = tunekit_command("run", "mine.yaml", "what=abort")
    assert run.returncode == 1
    assert told(run.stderr).startswith(
        "error: the recipe was ended by SIGABRT, which comes from outside or from"
    )


def wait_for(path: Path) -> str:
    for _ in range(600):
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.1)
    raise TimeoutError(path)


@pytest.fixture
def waiting(here: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A run in the middle of its recipe, and the recipe's process id."""
    command = [sys.executable, "-m", "tunekit", "run", "mine.yaml", "what=wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, int(wait_for(here / "waiting"))
        finally:
            process.kill()


def test_ctrl_c_reaches_the_recipe(waiting: tuple[subprocess.Popen[str], int]):
    process, _ = waiting
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert told(said) == "stopped; nothing was being trained\ngive the same command again to continue\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_nothing_runs_on_when_the_command_is_killed(waiting: tuple[subprocess.Popen[str], int]):
    process, recipe = waiting
    process.kill()
    for _ in range(100):
        try:
            state = Path(f"/proc/{recipe}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # ended; whoever adopted it has not noticed yet
            return
        time.sleep(0.1)
    pytest.fail("the recipe is still running")


# What accelerate launch is told

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def test_accelerate_may_ask_for_weights_that_are_split():
    environment = {**FSDP2, "HOME": "/"}
    assert take_sharding(environment)
    assert environment == {"HOME": "/"}  # accelerate does not do it once more
    assert not take_sharding(environment)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"told to use DeepSpeed.*\n.*fsdp2\.yaml"),
        ({**FSDP2, "FSDP_VERSION": "1"}, "is FSDP 1; say fsdp_version: 2"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true, which keeps weights on the"),
        ({**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward: false, which keeps"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, r"is the key memory\.gradient_checkpointing"),
    ],
)
def test_what_else_accelerate_asks_for_is_refused(told: dict[str, str], said: str):
    with pytest.raises(ConfigError, match=said):
        take_sharding(dict(told))


def test_the_config_for_accelerate_says_what_is_done():
    """As `accelerate launch` reads it."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.utils import DistributedType

    made = ClusterConfig.from_yaml_file(str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"))
    assert made.distributed_type == DistributedType.FSDP
    environment = {key.upper(): str(value).lower() for key, value in made.fsdp_config.items()}
    assert take_sharding({"ACCELERATE_USE_FSDP": "true", **environment})
