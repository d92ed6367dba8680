"""What docs/interfaces.md promises, on one real run from the command line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from tunekit.resources import configs_dir

CONFIGS = configs_dir()
METRICS = {"step", "loss", "lr", "grad_norm", "samples_per_second", "seconds"}


def tunekit(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command and asks for exit code 0."""
    command = [sys.executable, "-m", "tunekit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny model with a chain of three passes."""
    runs = tmp_path_factory.mktemp("interfaces")
    chain = "optimize=[merge, {quantize: {scheme: int8}}, {verify: {pictures: 1, steps: 2, min_psnr_db: 10}}]"
    tunekit("run", "tiny/lora", f"runs={runs}", "train.max_steps=20", "preview.steps=2", chain)
    return runs / "tiny-lora"


def test_folders(run: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "chain.json", "report.html", "report.json"):
        assert (run / name).is_file(), name
    assert (run / "checkpoints" / "step-000020").is_dir()
    assert sorted(path.name for path in (run / "previews").iterdir()) == [
        "step-000000",
        "step-000010",
        "step-000020",
    ]
    assert [path.name for path in (run / "previews" / "step-000020").iterdir()] == ["00-a-red-fox.png"]
    assert (run / "adapter" / "README.md").is_file()
    adapter = run / "adapter"
    assert (adapter / "pytorch_lora_weights.safetensors").is_file()
    assert (adapter / "tiny-lora.kohya.safetensors").is_file()
    passes = sorted(path.name for path in run.glob("0*"))
    assert [re.sub(r"-[0-9a-f]{8}$", "", name) for name in passes] == ["01-merge", "02-quantize", "03-verify"]
    assert json.loads((run / "chain.json").read_text())["folders"] == passes
    assert all((run / name / "artifact.json").is_file() for name in passes)


def test_metrics(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(21))
    assert set(rows[0]) == {"step", "val_loss"}
    assert all(set(row) >= METRICS for row in rows[1:])
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 10, 20]


def test_adapter_files_carry_alpha(run: Path) -> None:
    with safe_open(run / "adapter" / "tiny-lora.kohya.safetensors", "pt") as file:
        alphas = [float(file.get_tensor(key)) for key in file.keys() if key.endswith(".alpha")]  # noqa: SIM118
    assert alphas and set(alphas) == {8.0}
    with safe_open(run / "adapter" / "pytorch_lora_weights.safetensors", "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert said["unet.lora_alpha"] == said["unet.r"] == 4  # alpha / rank lies within lora_B


def test_report(run: Path) -> None:
    report = json.loads(tunekit("report", str(run), "--json").stdout)
    assert report == json.loads((run / "report.json").read_text())
    assert set(report) == {"version", "training", "steps", "final"}
    assert report["version"] == 1
    assert [step["kind"] for step in report["steps"]] == ["merge", "quantize", "verify"]
    assert report["final"] == report["steps"][-2]["artifact"]  # verify only looks
    assert (run / report["final"] / "model_index.json").is_file()
    merge, quantize, verify = (step["metrics"] for step in report["steps"])
    assert 0 < quantize["size_bytes"] < merge["size_bytes"]
    assert verify["psnr_db"] > 10 and 0 < verify["relative_error"] < 1 and 0 < verify["ssim"] <= 1


def examined(config: str | Path, *overrides: str, code: int = 2) -> dict[str, Any]:
    """What `check --json` prints, which is one document and nothing else."""
    command = [sys.executable, "-m", "tunekit", "check", str(config), *overrides, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    found: dict[str, Any] = json.loads(done.stdout)
    assert set(found) == {"version", "config", "facts", "problems"}
    assert found["version"] == 1
    assert all(set(row) == {"place", "key", "message", "hint"} for row in found["problems"])
    return found


def test_check_of_a_good_config() -> None:
    found = examined("tiny/lora", "optimize=[merge, export_onnx]", code=0)
    assert found["problems"] == []
    assert found["config"].endswith("configs/tiny/lora.yaml")
    assert found["facts"] == {
        "recipe": "lora",
        "writes_to": "runs/tiny-lora",
        "model": "tiny (torch)",
        "passes": "merge > export_onnx (onnx)",
        "pictures": 19,
        "held_out": 5,
    }


BROKEN = """\
recipe: lora
model: {family: sd15, source: tiny}
data: {path: photos, resolution: 32}
train:
  max_steps: many
  lr: 1e-3
  lrr: 1
"""


def test_check_of_a_config_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(BROKEN)
    found = examined("mine.yaml", "adapter.rank=0")
    assert (found["config"], found["facts"]) == ("mine.yaml", {})
    assert found["problems"] == [
        {"place": place, "key": key, "message": message, "hint": ""}
        for place, key, message in (
            ("command line", "adapter.rank", "must be at least 1, not 0"),
            ("mine.yaml:5", "train.max_steps", 'must be a whole number, not "many"'),
            ("mine.yaml:7", "train.lrr", 'unknown key; did you mean "lr"?'),
        )
    ]
    Path("mine.yaml").write_text("recipe: lora\nseed: 1\nseed: 2\nname: x\nname: y\n")
    places = [(row["place"], row["key"]) for row in examined("mine.yaml")["problems"]]
    assert places == [("mine.yaml:3", "seed"), ("mine.yaml:5", "name")]
    Path("mine.yaml").write_text("recipe: lorra\n")
    (row,) = examined("mine.yaml")["problems"]
    assert (row["place"], row["key"]) == ("mine.yaml:1", "recipe")
    assert 'did you mean "lora"' in row["message"]
    assert "lora" in row["hint"]
    (row,) = examined("nowhere.yaml")["problems"]
    assert (row["place"], row["key"]) == ("", "")
    assert 'no config "nowhere.yaml"' in row["message"]


def test_check_gives_each_picture_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_pictures: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_pictures(Path("photos"))
    Path("photos/00.txt").unlink()
    Path("photos/01.png").write_bytes(b"no picture")
    found = examined("tiny/lora", "data.path=photos", "data.validation=nowhere", "model.source=tinny")
    assert found["facts"]["pictures"] == 2
    model, *rows = found["problems"]
    assert (model["place"], model["key"]) == ("command line", "model.source")
    assert [(row["place"], row["key"]) for row in rows] == [
        ("photos/00.png", ""),
        ("photos/01.png", ""),
        ("nowhere", "data.validation"),
    ]
    assert rows[0]["message"] == "no caption: 00.txt is missing"
    assert rows[0]["hint"] == "write what it shows into 00.txt"
    assert "cannot be read as a picture" in rows[1]["message"]
    found = examined("tiny/lora", "data.path=builtin/pictures/stile", "optimize=[prune]")
    assert [(row["place"], row["key"]) for row in found["problems"]] == [
        ("command line", "optimize[0]"),
        ("command line", "data.path"),
    ]


def test_check_of_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(CONFIGS / "tiny" / "lora.yaml", "mine.yaml")
    with Path("mine.yaml").open("a") as file:
        file.write("optimize:\n  - merge\n  - quantize: {scheme: int8}\n  - export_onnx\n")
    (row,) = examined("mine.yaml", "optimize=[export_onnx, merge]")["problems"]
    assert (row["place"], row["key"]) == ("command line", "optimize[0]")
    assert "needs a torch model but the chain starts with adapter" in row["message"]
    assert row["hint"] == "put `merge: {}` before it"
    lines = Path("mine.yaml").read_text().splitlines()
    file_line = len(lines) - 1
    assert lines[file_line - 1].startswith("  - quantize")
    Path("mine.yaml").write_text("\n".join(lines).replace("scheme: int8", "shceme: int8") + "\n  - prnue\n")
    rows = examined("mine.yaml")["problems"]
    assert [(row["place"], row["key"]) for row in rows] == [
        (f"mine.yaml:{file_line}", "optimize[1].quantize.shceme"),
        (f"mine.yaml:{file_line + 2}", "optimize[3]"),
    ]
    assert [row["message"] for row in rows] == [
        'unknown key; did you mean "scheme"?',
        "there is no pass 'prnue'; did you mean \"prune\"?",
    ]


def test_generate_takes_a_run_an_adapter_and_a_pass(run: Path, tmp_path: Path) -> None:
    merged = next(run.glob("01-merge-*"))
    sources = {"run": run, "adapter": run / "adapter", "merged": merged}
    for name, source in sources.items():
        out = tmp_path / f"{name}.png"
        tunekit(
            "generate", str(source), "--prompt", "a red fox", "--seed", "3", "--steps", "2", "--out", str(out)
        )
        with Image.open(out) as picture:
            assert picture.size[0] == picture.size[1] > 0


def test_bench_gives_the_figures_and_the_ratio(run: Path) -> None:
    merged, packed = next(run.glob("01-merge-*")), next(run.glob("02-quantize-*"))
    arguments = ("--steps", "1", "--repeats", "2", "--no-memory", "--json")
    found = json.loads(tunekit("bench", str(merged), str(packed), *arguments).stdout)
    rows = found["artifacts"]
    assert len(rows) == 2
    assert all(row["denoiser_ms_p50"] > 0 and row["size_bytes"] > 0 for row in rows)
    assert rows[1]["speedup"] > 0 and isinstance(rows[1]["slower"], bool)
    assert 0 < rows[1]["size_ratio"] < 1
