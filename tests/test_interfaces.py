"""What docs/interfaces.md promises, on one real run from the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

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
        assert '"unet.lora_alpha": 8' in file.metadata()["lora_adapter_metadata"]


def test_report(run: Path) -> None:
    report = json.loads(tunekit("report", str(run), "--json").stdout)
    assert report == json.loads((run / "report.json").read_text())
    assert set(report) == {"version", "training", "steps", "final"}
    assert report["version"] == 1
    assert [step["kind"] for step in report["steps"]] == ["merge", "quantize", "verify"]
    assert report["final"] == report["steps"][-1]["artifact"]
    merge, quantize, verify = (step["metrics"] for step in report["steps"])
    assert 0 < quantize["size_bytes"] < merge["size_bytes"]
    assert verify["psnr_db"] > 10 and 0 < verify["relative_error"] < 1 and 0 < verify["ssim"] <= 1


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
