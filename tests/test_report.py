"""The report: what is read from a run folder, and what a person and a program get to see."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tunekit import report
from tunekit.artifacts import Artifact, RunFolder, Step, write_json, write_text
from tunekit.errors import ArtifactError
from tunekit.passes.metrics import Metric, Tile
from tunekit.registry import PASSES


def add_step(
    run: RunFolder, index: int, kind: str, lineage: tuple[Step, ...], **fields: object
) -> tuple[Step, ...]:
    """Writes the folder of one finished pass with a small file as its model."""
    folder = run.pass_folder(index, kind, f"{index:08x}")
    (folder / "pictures").mkdir(parents=True)
    (folder / "model.bin").write_bytes(bytes(1000 * index))
    step = Step(kind=kind, artifact=folder.name, seconds=1.5, **fields)  # type: ignore[arg-type]
    for picture in step.pictures:
        Image.new("RGB", (8, 8), (index * 20, 0, 0)).save(folder / picture["file"])
    lineage = (*lineage, step)
    Artifact(folder, folder, "torch", "sd15", str(folder), lineage).write()
    return lineage


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that trained, merged, quantized, verified and benchmarked."""
    run = RunFolder(tmp_path / "runs" / "mine")
    run.adapter.mkdir(parents=True)
    (run.adapter / "weights").write_bytes(b"adapter")
    train = Step(kind="train", artifact="adapter", seconds=60.0, metrics={"loss": 0.5})
    Artifact(run.adapter, run.adapter, "adapter", "sd15", str(run.adapter), (train,), base="tiny").write()
    write_text(
        run.config,
        "recipe: lora\nmodel: {family: sd15, source: tiny}\npreview: {prompts: [an <owl> & a cat]}\n",
    )
    rows = [{"step": 0, "val_loss": 1.0}]
    rows += [{"step": step, "loss": 1 / step} for step in range(1, 20)]
    rows.append({"step": 20, "loss": 0.05, "val_loss": 0.8})
    write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 21, "lo')
    for step in (0, 10, 20):
        folder = run.previews / f"step-{step:06d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (0, step, 0)).save(folder / "00.png")
    lineage = add_step(run, 1, "merge", (train,), metrics={"size_bytes": 4000, "parameters": 1000})
    lineage = add_step(
        run,
        2,
        "quantize",
        lineage,
        settings={"scheme": "int8"},
        metrics={"size_bytes": 1000, "relative_error": 0.01},
    )
    pictures = [
        {"file": f"pictures/{label}.png", "label": label, "prompt": "an <owl>", "seed": 3}
        for label in ("before", "now")
    ]
    lineage = add_step(
        run, 3, "verify", lineage, metrics={"psnr_db": 31.5, "ssim": 0.95}, pictures=pictures,
        details={"components": [{"component": "unet", "relative error": 0.012}]},
    )  # fmt: skip
    add_step(
        run, 4, "benchmark", lineage,
        metrics={"picture_ms_p50": 80.0, "speedup": 0.5, "slower": True, "speedup_first": 0.5},
        details={"artifacts": {"01-merge-00000001": {"picture_ms_p50": 40.0}}},
    )  # fmt: skip
    return run


def test_report_json_has_the_documented_shape(run: RunFolder) -> None:
    report.write(run.path)
    content = json.loads((run.path / "report.json").read_text())
    assert content["version"] == 1
    assert content["final"] == "04-benchmark-00000004"
    assert [step["kind"] for step in content["steps"]] == ["merge", "quantize", "verify", "benchmark"]
    assert all(
        set(step) == {"kind", "artifact", "seconds", "settings", "metrics"} for step in content["steps"]
    )
    training = content["training"]
    assert (training["recipe"], training["source"], training["steps"]) == ("lora", "tiny", 20)
    assert training["finished"] is True
    assert training["metrics"]["val_loss_change"] == pytest.approx(-0.2)


def test_page_is_one_self_contained_file_with_every_picture(run: RunFolder) -> None:
    page = report.write(run.path).read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert page.count("data:image/png;base64,") == 3 + 2
    assert "before" in page and "after" in page and "step 20" in page


def test_page_escapes_prompts(run: RunFolder) -> None:
    page = report.write(run.path).read_text(encoding="utf-8")
    assert "an &lt;owl&gt; &amp; a cat" in page
    assert "<owl>" not in page


def test_figures_of_verify_and_benchmark_stand_in_the_row_of_their_model(run: RunFolder) -> None:
    page = report.write(run.path).read_text(encoding="utf-8")
    table = page[page.index("step by step") : page.index("</table>")]
    merge, quantize = table.split("02-quantize-00000002")
    assert "40.0 ms" in merge and "80.0 ms" in quantize and "31.5 dB" in quantize
    assert '<span class="bad">0.50x slower</span>' in quantize


def test_tables_and_tiles_are_those_that_passes_declare(run: RunFolder) -> None:
    page = report.write(run.path).read_text(encoding="utf-8")
    table = page[page.index("step by step") : page.index("</table>")]
    heads = re.findall(r"<th>([^<]*)</th>", table)
    assert heads[1:] == [
        *("size on disk", "denoiser step p50", "picture p50", "speed-up", "peak memory"),
        *("rel. error", "PSNR", "SSIM", "took"),
    ]
    assert "0.50x of fine-tuned" in table and "1,000 parameters" in table
    tiles = re.findall(r'<div class="tile"><span>(.*?)</span><b(.*?)</b><span>(.*?)</span>', page)
    assert [(title, value.rpartition(">")[2], note) for title, value, note in tiles[1:]] == [
        ("size of the last model", "0.25x", "3.9 KiB -&gt; 1000 B"),
        ("a picture, faster by", "0.50x", "80.0 ms a picture, against the fine-tuned model in torch"),
        ("fidelity of the last model", "31.5 dB", "SSIM 0.9500"),
    ]
    assert 'class="bad"' in tiles[2][1] and 'class="good"' in tiles[1][1]


def test_a_pass_of_a_package_is_shown_like_ours(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has no list of passes: what looks at a model, and at what, its class says."""

    class Taste:
        looks = True
        metrics = (Metric("flavour_db", "flavour", "dB", column="taste", tile=Tile("how it tastes")),)

    ours = list(PASSES.items())
    monkeypatch.setattr(type(PASSES), "items", lambda self: [*ours, ("taste", Taste)])
    lineage = Artifact.load(run.passes()[-1]).lineage
    add_step(run, 5, "taste", lineage, metrics={"flavour_db": 7.25})
    page = report.write(run.path).read_text(encoding="utf-8")
    table = page[page.index("step by step") : page.index("</table>")]
    assert "<th>taste</th>" in table and "7.2 dB" in table and "05-taste" not in table
    assert "how it tastes" in page


def test_missed_threshold_is_said(run: RunFolder) -> None:
    folder = run.path / "03-verify-00000003"
    record = json.loads((folder / "artifact.json").read_text())
    record["lineage"][-1]["details"]["failure"] = "PSNR 31.5 dB is below 40 dB"
    write_json(folder / "artifact.json", record)
    run.write_chain([path.name for path in run.passes()[:3]])
    page = report.write(run.path).read_text(encoding="utf-8")
    assert page.count("PSNR 31.5 dB is below 40 dB") >= 2


def test_run_that_is_still_training(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "young")
    write_text(run.metrics, '{"step": 1, "loss": 0.5, "seconds": 2.0}\n')
    content = report.load(run.path)
    assert content["final"] is None and content["steps"] == []
    assert content["training"]["finished"] is False and content["training"]["steps"] == 1
    assert "nothing is finished" not in report.write(run.path).read_text(encoding="utf-8")


def test_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run"):
        report.load(tmp_path / "nowhere")
