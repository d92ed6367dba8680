"""recipes/optimize.py: a chain on whatever can be opened."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunekit.artifacts import Artifact, RunFolder
from tunekit.config import load
from tunekit.errors import ConfigError
from tunekit.passes.base import check_chain, parse_chain
from tunekit.registry import load_recipe

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"samples": 4, "ratio": 0.2, "multiple": 1}


def tree(source: Path | str, chain: list[Any]) -> dict[str, Any]:
    return {
        "recipe": "optimize",
        "model": {"family": "sd15", "source": str(source)},
        "preview": {"prompts": ["a disc", "a ring"], "steps": 2, "guidance": 3},
        "memory": {"device": "cpu"},
        "optimize": chain,
    }


def launch(config: Path, environment: dict[str, str], *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes" / "optimize.py"), "--config", str(config), *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_a_folder_goes_through_the_chain_and_gets_a_report(
    tiny_source: Path, tmp_path: Path, configured: Callable[..., Path], environment: dict[str, str]
):
    chain = [{"prune": SMALL}, {"heal": {"max_steps": 2, "batch_size": 2, "pictures": 2}}, "quantize"]
    config = configured(tmp_path, tree(tiny_source, chain))
    done = launch(config, environment)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "run"
    report = json.loads((folder / "report.json").read_text())
    assert [step["kind"] for step in report["steps"]] == ["prune", "heal", "quantize"]
    assert report["final"] == RunFolder(folder).passes()[-1].name
    assert (folder / "report.html").is_file() and (folder / "config.yaml").is_file()
    assert "01 prune: " in done.stdout and "parameters" in done.stdout and "report: " in done.stdout
    again = launch(config, environment)
    assert again.returncode == 0 and again.stdout.count("already there") == 3


def test_a_missed_threshold_leaves_with_1_and_a_report(
    tiny_source: Path, tmp_path: Path, configured: Callable[..., Path], environment: dict[str, str]
):
    chain = [{"quantize": {"scheme": "int4"}}, {"verify": {"min_psnr_db": 90, "pictures": 1, "steps": 2}}]
    done = launch(configured(tmp_path, tree(tiny_source, chain)), environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "optimize[1] (verify)" in done.stderr
    report = json.loads((tmp_path / "runs" / "run" / "report.json").read_text())
    assert [step["kind"] for step in report["steps"]] == ["quantize", "verify"]
    assert report["steps"][1]["metrics"]["psnr_db"] < 90


def test_a_wrong_chain_leaves_with_2_and_nothing_started(
    tiny_source: Path, tmp_path: Path, configured: Callable[..., Path], environment: dict[str, str]
):
    config = configured(tmp_path, tree(tiny_source, ["merge"]))
    done = launch(config, environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = next(n for n, text in enumerate(config.read_text().splitlines(), 1) if "merge" in text)
    assert f"run.yaml:{line}: optimize[0] (merge) needs an adapter" in done.stderr
    assert not (tmp_path / "runs" / "run").exists()


def test_any_artifact_can_be_the_source(
    tmp_path: Path, configured: Callable[..., Path], run_here: Callable[..., Path]
):
    # "tiny" has no files, so it is written down first.
    first = run_here(configured(tmp_path / "a", tree("tiny", [{"prune": SMALL}])))
    assert Artifact.load(first / "model").lineage[0].kind == "fetch"
    pruned = RunFolder(first).final()
    for source in (first, pruned.path):  # a run, and a step of it
        run = run_here(configured(tmp_path / f"b-{Path(str(source)).name}", tree(str(source), ["quantize"])))
        final = RunFolder(run).final()
        assert [step.kind for step in final.lineage] == ["fetch", "prune", "quantize"]
        assert final.lineage[-1].parent_hash == pruned.hash
        assert not (run / "model").exists()


def test_another_family_is_refused(
    tiny_source: Path, tmp_path: Path, configured: Callable[..., Path], run_here: Callable[..., Path]
):
    record = tmp_path / "other"
    record.mkdir()
    Artifact(record, tiny_source, "torch", "sdxl", str(tiny_source)).write()
    with pytest.raises(
        ConfigError, match=r"model\.family is sd15, but the source is of family sdxl"
    ) as caught:
        run_here(configured(tmp_path, tree(record, ["quantize"])))
    assert "run.yaml:" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("memory.precision=bf16", "memory.precision: has no effect"),
        ("preview.every=5", "preview.every: has no effect"),
        ("optimize=[]", "at least 1"),
    ],
)
def test_options_without_effect_are_refused(
    override: str, message: str, tiny_source: Path, tmp_path: Path, configured: Callable[..., Path]
):
    config = configured(tmp_path, tree(tiny_source, ["quantize"]))
    with pytest.raises(ConfigError, match=message):
        load(config, [override])


def test_the_ready_made_config_is_a_good_chain():
    loaded = load("sd15/optimize", ["model.source=tiny"])
    assert loaded.config.recipe == "optimize" and load_recipe("optimize").Config is type(loaded.config)
    chain = parse_chain(loaded.config.optimize, loaded.chain_where)
    assert check_chain(chain, "torch", loaded.chain_where) == "onnx"
