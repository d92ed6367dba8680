"""Whatever stands in the files of a run: an error of ours, or what was written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunekit import report, workspace
from tunekit.artifacts import Artifact, RunFolder, Step, write_json, write_text
from tunekit.errors import TunekitError
from tunekit.records import ChainRecord, PlanRecord, StateRecord, metrics_of, parse, read, read_plain

PLAN = {
    "version": 1, "device": "a card", "budget_bytes": 8, "device_bytes": 4, "peak_phase": "step",
    "levers": ["bf16"], "ran_out": [{"budget_bytes": 3, "why": "it did"}], "optimizer": "adamw",
    "optimizer_in_backward": False, "precision": "bf16", "base_precision": "bf16",
    "phases": {"step": {"peak_allocated_bytes": 1, "peak_reserved_bytes": 2, "error": {"allocated": 0.1}}},
}  # fmt: skip
STATE = {
    "version": 1, "step": 4, "identity": {"seed": 1}, "seconds": 1.5, "metrics": {"val_loss": 0.5},
    "recent": [0.1, 0.2], "scaler": None,
}  # fmt: skip

scalars = st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
)
bounded = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value of a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(found for key, item in items for found in places(item, (*way, key)))]


@st.composite
def damaged(draw: st.DrawFn, content: Any) -> bytes:
    """A file with one value replaced or removed, or with its bytes cut or changed."""
    text = json.dumps(content).encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(text) - 1))
        return draw(st.sampled_from([text[:at], text[:at] + draw(st.binary(max_size=3)) + text[at + 1 :]]))
    tree = json.loads(text)
    way = draw(st.sampled_from(places(tree)))
    if not way:
        return json.dumps(draw(anything)).encode()
    holder = tree
    for key in way[:-1]:
        holder = holder[key]
    if isinstance(holder, dict) and draw(st.booleans()):
        del holder[way[-1]]
    else:
        holder[way[-1]] = draw(anything)
    return json.dumps(tree).encode()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with a record of each kind."""
    run = RunFolder(tmp_path / "runs" / "mine")
    train = Step(
        "train", "adapter", {"seed": 1, "model": {"source": "tiny"}}, 2.0, {"loss": 0.5},
        details={"identity": {"seed": 1}, "step": 3},
    )  # fmt: skip
    looked = Step(
        "verify", "01-verify-00000000", {}, 1.0, {"psnr_db": 30.0, "ssim": 0.5},
        details={"failure": "bad", "artifacts": {"adapter": {"psnr_db": 1.0}}, "rows": [{"a": 1.5}]},
        pictures=[{"file": "pictures/a.png", "label": "a", "prompt": "b", "seed": 1}],
    )  # fmt: skip
    for folder, lineage in ((run.adapter, (train,)), (run.path / "01-verify-00000000", (train, looked))):
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"weights")
        Artifact(folder, folder, "adapter", "sd15", str(folder), lineage, base="tiny").write()
    run.write_chain(["01-verify-00000000"])
    write_text(run.config, "recipe: lora\nmodel: {source: tiny}\npreview: {prompts: [a]}\n")
    write_text(run.metrics, "".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(1, 6)))
    write_json(run.path / "plan.json", PLAN)
    (run.checkpoints / "step-000004").mkdir(parents=True)
    write_json(run.checkpoints / "step-000004" / "state.json", STATE)
    return run


def ours(call: Callable[[], object]) -> object:
    """What a call gives, or None where it raises an error of ours."""
    try:
        return call()
    except (TunekitError, FileNotFoundError):
        return None


@pytest.mark.parametrize("name", ["adapter/artifact.json", "01-verify-00000000/artifact.json", "chain.json"])
def test_a_damaged_record_is_an_error_of_ours_or_read(run: RunFolder, name: str) -> None:
    file = run.path / name
    whole = file.read_bytes()

    @bounded
    @given(damaged(json.loads(whole)))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        ours(lambda: report.write(run.path))
        ours(lambda: Artifact.load(file.parent) if name != "chain.json" else run.passes())
        (state,) = workspace.runs(run.path.parent)
        assert state.run == str(run.path)
        assert workspace.verify_files(run.path)

    check()


def test_a_file_beside_a_run_never_stops_its_report(run: RunFolder) -> None:
    file = run.path / "plan.json"

    @bounded
    @given(damaged(PLAN), st.sampled_from(["plan.json", "config.yaml", "metrics.jsonl"]))
    def check(content: bytes, name: str) -> None:
        before = (run.path / name).read_bytes()
        (run.path / name).write_bytes(content)
        assert report.write(run.path).is_file()
        ours(lambda: read_plain(file, PlanRecord))
        (run.path / name).write_bytes(before)

    check()


def test_state_of_a_trainer_is_as_it_was_or_refused(run: RunFolder) -> None:
    file = run.checkpoints / "step-000004" / "state.json"

    @bounded
    @given(damaged(STATE))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        state = ours(lambda: read(file, StateRecord))
        if isinstance(state, StateRecord):
            assert state.step >= 0 and all(isinstance(loss, float | int) for loss in state.recent)

    check()


@bounded
@given(st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line), max_size=4), st.integers(0, 5))
def test_metrics_lose_no_row_to_a_broken_line(
    tmp_path_factory: pytest.TempPathFactory, junk: list[bytes], at: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    lines = [b'{"step": %d, "loss": 0.5}' % step for step in range(1, 6)]
    path.write_bytes(b"\n".join([*lines[:at], *junk, *lines[at:]]))
    found = metrics_of(path)
    assert [row["step"] for row in found.rows] == [1, 2, 3, 4, 5]
    assert found.unread == [line for line in junk if line.strip()]


@bounded
@given(anything)
def test_json_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    text = write_json(path, value).read_bytes()

    def plain(value: Any) -> Any:
        if isinstance(value, float) and (value != value or abs(value) == float("inf")):
            return None
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    assert parse(text) == plain(value)


# The runs of a folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["[]", "{", '{"version": 9, "folders": []}'])
def test_one_damaged_run_hides_no_other(run: RunFolder, content: str) -> None:
    other = run.path.parent / "other"
    shutil.copytree(run.path, other)
    write_text(run.chain_file, content)
    damaged, whole = workspace.runs(run.path.parent)
    assert (damaged.state, damaged.final) == ("damaged", None) and "chain.json" in damaged.problem
    assert (whole.run, whole.state, whole.final) == (str(other), "1 pass done", "01-verify-00000000")


def test_verify_files_reads_everything(run: RunFolder) -> None:
    assert all(not row.problem for row in workspace.verify_files(run.path.parent))
    weights = run.adapter / "weights"
    stamp = weights.stat()
    weights.write_bytes(b"Weights")
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # nothing but its content tells
    write_text(run.metrics, "{\n" + run.metrics.read_text())
    write_text(run.path / "plan.json", "5")
    wrong = {Path(row.place).name: row.problem for row in workspace.verify_files(run.path) if row.problem}
    assert set(wrong) == {"adapter", "metrics.jsonl", "plan.json"}
    assert "weights does not hold what was written" in wrong["adapter"]
    wrong = {Path(row.place).name for row in workspace.verify_files(run.path, accept=True) if row.problem}
    assert wrong == {"metrics.jsonl", "plan.json"}
    assert Artifact.load(run.adapter).step is not None
    with pytest.raises(TunekitError, match="there is no folder"):
        workspace.verify_files(run.path / "nowhere")


def test_a_chain_names_folders_in_the_run_only(run: RunFolder) -> None:
    for name in ("../other", "/etc", "..", ""):
        write_json(run.chain_file, {"version": 1, "folders": [name]})
        with pytest.raises(TunekitError, match="is no name of a folder"):
            run.passes()
    assert ChainRecord.newest() == 1
