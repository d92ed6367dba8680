"""The report: what is read from a run folder, and what a person and a program get to see."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tunekit import report
from tunekit.artifacts import Artifact, RunFolder, Step, write_json, write_text
from tunekit.errors import ArtifactError
from tunekit.passes.metrics import Metric, Tile
from tunekit.registry import PASSES
from tunekit.report import curve, pictures, scatter


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
        details={"sensitivity": [{"layer": "a", "layer_error": 0.02}, {"layer": "b", "layer_error": 0.005}]},
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
    assert not re.findall(r"url\((?!data:)", page)
    assert page.count("data:image/png;base64,") == 3 + 2 + 1  # previews, versions, a map
    assert "before" in page and "after" in page and "step 20" in page


def test_what_layers_cost_is_drawn(run: RunFolder) -> None:
    page = report.write(run.path).read_text(encoding="utf-8")
    table = page[page.index("02-quantize-00000002: sensitivity") :]
    table = table[: table.index("</table>")]
    assert "error in int8" in table
    assert re.findall(r'<td>0\.(\d+)<span class="bar" style="width:(\d+)%">', table) == [
        ("02", "100"),
        ("005", "25"),
    ]


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
        *("size on disk", "picture p50", "speed-up", "rel. error", "PSNR", "SSIM", "took"),
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


def compared(run: RunFolder, index: int, kind: str, label: str, before: str, colours: dict[str, int]) -> None:
    """A pass that made a model, and a verify step that compared it; grey pictures of two prompts."""
    lineage = Artifact.load(sorted(run.path.glob("0*"))[-1]).lineage
    lineage = add_step(run, index, kind, lineage, settings={"keep": {"psnr": 28.0}})
    pictures = [
        {"file": f"pictures/{name}-{seed}.png", "label": text, "prompt": "a cat", "seed": seed}
        for name, text in (("reference", before), ("candidate", label))
        for seed in (0, 1)
    ]
    metrics = {"psnr_db": 33.3}
    lineage = add_step(run, index + 1, "verify", lineage, metrics=metrics, pictures=pictures)
    for picture in pictures:
        grey = colours[picture["label"]] + picture["seed"] * (picture["label"] == label)
        file = run.path / lineage[-1].artifact / picture["file"]
        Image.new("RGB", (6, 4), (grey, grey, grey + 9)).save(file)


def test_versions_stand_side_by_side_with_their_differences(run: RunFolder) -> None:
    """Each version beside what it was compared with, and beside the step before; no picture twice."""
    colours = {"merge (torch)": 40, "export (ort)": 50, "quantize (ort)": 53}
    compared(run, 5, "export_onnx", "export (ort)", "merge (torch)", colours)
    compared(run, 7, "quantize", "quantize (ort)", "merge (torch)", colours)
    run.write_chain([path.name for path in sorted(run.path.glob("0*"))])
    page = report.write(run.path).read_text(encoding="utf-8")
    page = page[page.index("Every version, side by side") :]
    table = page[page.index("a cat (seed 0)") :]
    rows = re.findall(r'<span class="row">(.*?)</span>', table)
    labels = [row.partition("<br>")[0] for row in rows]
    assert labels == [
        *("merge (torch)", "export (ort)", "difference to merge (torch)"),
        *("quantize (ort)", "difference to merge (torch)", "difference to the step before, export (ort)"),
    ]
    told = re.findall(r"</label><small>(.*?)</small>", table)
    assert told == [
        *("max 10, mean 10.00", "max 11, mean 11.00"),  # export
        *("max 13, mean 13.00", "max 14, mean 14.00"),  # quantize, to the merged one
        *("max 3, mean 3.00", "max 3, mean 3.00"),  # to the export
    ]
    assert "max 11, mean 10.50" in rows[2] and "PSNR 33.3 dB" in rows[1]
    assert table.count('<span class="slide" tabindex="0"') == 4  # two prompts, two versions
    assert table.count("aspect-ratio: 6 / 4") == 2  # the merged model's own row
    kept = re.findall(r"--r\d+: url\(data:", page)
    assert len(kept) == 1 + 2  # what a veil shows too: of the fixture's reference, and of the merged model


def test_colours_of_a_difference_are_the_same_on_every_page(tmp_path: Path) -> None:
    album = pictures.Album(tmp_path)
    for name, grey in (("a", 0), ("b", 32), ("c", 200), ("d", 255)):
        Image.new("RGB", (4, 4), (grey, 0, 0)).save(tmp_path / f"{name}.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "other.png")
    Image.effect_noise((700, 500), 50).convert("RGB").save(tmp_path / "large.png")

    def drawn(name: str, against: str = "a") -> tuple[Image.Image, pictures.Difference]:
        found = album.difference(tmp_path / f"{name}.png", tmp_path / f"{against}.png")
        assert found is not None
        content = base64.b64decode(found.image.partition(",")[2])
        return Image.open(io.BytesIO(content)).convert("RGB"), found

    assert drawn("a")[0].getpixel((0, 0)) == pictures.COLOURS[0]
    assert drawn("c")[0].getpixel((0, 0)) == drawn("d")[0].getpixel((0, 0))
    middle, found = drawn("b")
    assert max(abs(a - b) for a, b in zip(middle.getpixel((0, 0)), pictures.COLOURS[2], strict=True)) < 16
    assert (found.largest, found.mean) == (32, pytest.approx(32 / 3))
    assert drawn("large", "large")[0].size == (256, 183)
    assert album.difference(tmp_path / "other.png", tmp_path / "a.png") is None
    assert album.difference(tmp_path / "gone.png", tmp_path / "a.png") is None
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    assert album.difference(tmp_path / "broken.png", tmp_path / "a.png") is None


def test_the_way_of_a_model_is_a_strip_with_the_command_of_each_step(run: RunFolder) -> None:
    page = report.write(run.path).read_text(encoding="utf-8")
    strip = page[page.index('<ol class="strip">') : page.index("</ol>")]
    assert re.findall(r"<li><b>(.*?)</b>", strip) == ["tiny", "lora", "merge", "quantize"]
    commands = [html.unescape(one) for one in re.findall(r"<pre>(.*?)</pre>", strip, re.DOTALL)]
    assert commands[0] == "tunekit run runs/mine/config.yaml name=mine-again"
    moved, again = commands[2].splitlines()
    assert moved == "mv runs/mine/02-quantize-00000002 runs/mine/02-quantize-00000002.before"
    assert again == "tunekit run runs/mine/config.yaml"
    assert len(commands) == 5  # training, two models, and the two steps that looked at the second
    quantize = strip[strip.index("<b>quantize</b>") :]
    for head, value in (("size on disk", "1000 B"), ("picture p50", "80.0 ms"), ("PSNR", "31.5 dB")):
        assert f"<dt>{head}</dt><dd>{value}</dd>" in quantize


def test_a_step_that_was_made_again_is_shown_as_it_is_now(run: RunFolder) -> None:
    folder = run.path / "03-verify-00000003"
    record = json.loads((folder / "artifact.json").read_text())
    record["lineage"][-1]["metrics"]["psnr_db"] = 44.4
    write_json(folder / "artifact.json", record)
    content = report.load(run.path)
    assert [step["metrics"].get("psnr_db") for step in content["steps"]] == [None, None, 44.4, None]
    (folder / "artifact.json").write_text("{")
    page = report.write(run.path).read_text(encoding="utf-8")  # what a later step noted is enough
    assert "03-verify-00000003" in page.partition("<h2>")[0] and "31.5 dB" in page


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


def test_a_page_runs_nothing_and_loads_nothing(run: RunFolder) -> None:
    """Whatever the records hold: there is no way out of the page, and no way in for a script."""
    page = report.write(run.path).read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src 'none'" in policy and "script" not in policy and "img-src data:;" in policy
    assert "<script" not in page and "javascript:" not in page
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_only_pictures_of_the_run_are_shown(run: RunFolder, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(secret)
    step = run.previews / "step-000020"
    (step / "01.png").symlink_to(secret)
    (step / "02.png").write_text("<svg onload='alert(1)'/>")
    (step / "03.png").mkdir()
    os.mkfifo(step / "04.png")
    (run.path / "03-verify-00000003" / "pictures" / "now.png").unlink()
    (run.path / "03-verify-00000003" / "pictures" / "now.png").symlink_to(secret)
    page = report.write(run.path).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 + 1
    assert base64.b64encode(secret.read_bytes()).decode() not in page and "onload" not in page


def test_a_picture_of_a_plan_is_an_image(run: RunFolder) -> None:
    svg = "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    encoded = base64.b64encode(svg.encode()).decode()
    write_text(run.path / "plan.svg", svg)
    write_json(run.path / "plan.json", PLAN)
    page = report.write(run.path).read_text(encoding="utf-8")
    assert "alert" not in page and f"data:image/svg+xml;base64,{encoded}" in page
    assert "On a &lt;card&gt;" in page
    write_text(run.path / "plan.svg", "<script>alert(1)</script>")
    assert "svg+xml" not in report.write(run.path).read_text(encoding="utf-8")


PLAN = {
    "device": "a <card>", "budget_bytes": 8, "device_bytes": 4, "peak_phase": "step", "levers": [],
    "phases": {"step": {"peak_allocated_bytes": 1, "peak_reserved_bytes": 2}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.json", "[]"),
        ("plan.json", '{"phases": 5}'),
        ("config.yaml", "- a\n- b"),
        ("config.yaml", "a: [" * 50),
        ("config.yaml", "model: 5\npreview: [1]\nrecipe: [x]"),
        ("metrics.jsonl", "[]\n{\n5"),
    ],
)
def test_a_damaged_file_beside_a_run_does_not_stop_its_report(
    run: RunFolder, name: str, content: str
) -> None:
    write_text(run.path / name, content)
    page = report.write(run.path).read_text(encoding="utf-8")
    assert "step by step" in page
    if "recipe" not in content:
        assert name in page.partition("<h2>")[0] or "plan.json is damaged" in page


def test_a_damaged_record_is_named(run: RunFolder) -> None:
    write_text(run.chain_file, '{"version": 1, "folders": {"a": 1}}')
    with pytest.raises(ArtifactError, match=r"chain\.json is damaged \(folders: "):
        report.load(run.path)


def validated(run: RunFolder, *values: float) -> str:
    """The first tiles of a run with these validation losses, ten steps apart."""
    rows = [{"step": 10 * index, "loss": 0.5, "val_loss": value} for index, value in enumerate(values)]
    write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    page = report.write(run.path).read_text(encoding="utf-8")
    return page[page.index('<div class="tiles">') : page.index("size of the last model")]


def test_best_and_last_are_named_and_only_the_best_is_green(run: RunFolder) -> None:
    assert 'class="good">-20.0%' in validated(run, 1.0, 0.8) and "best" not in validated(run, 1.0, 0.8)
    tiles = validated(run, 0.586, 0.112, 0.2, 0.278)
    assert "<b>-52.6%</b>" in tiles  # better than before, and far from the best
    assert '<b class="bad">step 10</b>' in tiles
    assert "0.1120 there; 0.2780 at the last step, 30: +148%" in tiles
    assert 'class="bad">+10.0%' in validated(run, 1.0, 0.9, 1.1)
    metrics = report.load(run.path)["training"]["metrics"]
    assert (metrics["best_step"], metrics["best_val_loss"], metrics["last_val_loss"]) == (10, 0.9, 1.1)


def test_every_preview_step_is_there_and_pictures_enlarge(run: RunFolder) -> None:
    for step in range(30, 120, 10):
        folder = run.previews / f"step-{step:06d}"
        folder.mkdir()
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / "00.png")
    page = report.write(run.path).read_text(encoding="utf-8")
    assert [page.count(f"step {step}<") for step in range(0, 120, 10)] == [1] * 12
    pictures = page.count("<img") + page.count('<span class="picture" role="img"')
    assert pictures == page.count('<label class="zoom"><input type="checkbox"') == 12 + 2 + 1
    assert "The 8 steps between" in page


def test_many_large_pictures_are_shown_smaller(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunekit.report.pictures.MOST_BYTES", 1000)
    Image.effect_noise((600, 600), 50).save(run.previews / "step-000010" / "00.png")
    page = report.write(run.path).read_text(encoding="utf-8")
    assert "data:image/jpeg;base64," in page and len(page) < 150_000


def test_a_long_run_makes_no_long_page(tmp_path: Path) -> None:
    """Time follows the steps in a line at most, size has a bound, and no peak is lost."""
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    few = curve.thinned(points)
    assert len(few) <= 4 * curve.BUCKETS and (54_321.0, 9.0) in few
    assert few[0] == points[0] and few[-1] == points[-1]
    assert curve.running_mean([(0, 1.0), (1, 2.0), (2, 6.0)], 2) == [(0, 1.0), (1, 1.5), (2, 4.0)]
    run = RunFolder(tmp_path / "long")
    row = '{{"step": {}, "loss": {}, "seconds": 1.5}}\n'
    write_text(run.metrics, "".join(row.format(step, 1 + 1 / step) for step in range(1, 50_001)))
    began = time.perf_counter()
    page = report.write(run.path)
    assert time.perf_counter() - began < 10
    assert page.stat().st_size < 80_000


def test_a_page_loads_itself_again_while_its_run_goes_on(run: RunFolder) -> None:
    fcntl = pytest.importorskip("fcntl")
    refresh = 'http-equiv="refresh"'
    assert refresh not in report.write(run.path).read_text(encoding="utf-8")
    with run.lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        page = report.write(run.path).read_text(encoding="utf-8")
        assert refresh in page and "Running: as of 20" in page
    report.settle(run.path)
    assert refresh not in (run.path / "report.html").read_text(encoding="utf-8")


def test_how_it_was_made_is_shown_and_no_home_folder(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/secret-name")
    write_text(run.adapter / "README.md", "---\nlicense: openrail++\n---\n")
    write_text(
        run.config,
        "recipe: lora\nseed: 7\nmodel: {family: sd15, source: /home/secret-name/models/base}\n"
        "data:\n  path: /mnt/hidden-disk/cats\n  resolution: 64\n",
    )
    page = report.write(run.path).read_text(encoding="utf-8")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["base"] == ".../base" and facts["licence of the base"] == "openrail++"
    assert {"date", "tunekit", "machine", "with"} <= set(facts) and "python 3" in facts["with"]
    assert "secret-name" not in page and "hidden-disk" not in page and ".../cats" in page
    assert "secret-name" not in (run.path / "report.json").read_text()


def test_final_is_a_folder_with_the_model(run: RunFolder) -> None:
    subject = Artifact.load(run.path / "02-quantize-00000002")
    folder = run.pass_folder(5, "verify", "0" * 8)
    folder.mkdir()
    step = Step("verify", folder.name)
    replace(subject, path=folder, lineage=(*subject.lineage, step)).write()
    assert report.load(run.path)["final"] == "02-quantize-00000002"


def test_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run"):
        report.load(tmp_path / "nowhere")


def test_trials_are_points_and_the_best_are_joined(run: RunFolder):
    trials = [
        {"passes": "nothing", "speedup": 1.0, "psnr_db": 90.0, "front": "*", "kept": "yes"},
        {"passes": "<b>bold</b>", "speedup": 4.0, "psnr_db": 31.0, "front": "*", "kept": "winner"},
        {"passes": "worse", "speedup": 2.0, "psnr_db": 20.0, "front": "", "kept": "no"},
        {"passes": "broken", "speedup": None, "psnr_db": 20.0, "front": "", "kept": "no"},
    ]
    told = {"table": "trials", "across": "speedup", "up": "psnr_db"}
    lineage = Artifact.load(sorted(run.path.glob("0*"))[-1]).lineage
    details = {"trials": trials, "scatter": told}
    add_step(run, 9, "search", lineage, metrics={"trials": 3}, details=details)
    run.write_chain([path.name for path in sorted(run.path.glob("0*"))])
    page = report.write(run.path).read_text(encoding="utf-8")
    assert page.count("<circle") == 1 + 3 and page.count("<polyline") == 2 + 1  # two losses, and the front
    assert "PSNR against speedup" in page and "&lt;b&gt;bold&lt;/b&gt;: 4.00x, 31.0 dB" in page
    assert "<b>bold" not in page
    assert ">taken: 4.00x, 31.0 dB</text>" in page
    assert ">1.00x, 90.0 dB</text>" not in page  # of three points none stands apart
    for wrong in ({"table": "gone"}, {"across": "nobody"}, {"up": 3}, ["no"]):
        details = {"trials": trials, "scatter": {**told, **wrong} if isinstance(wrong, dict) else wrong}
        add_step(run, 10, "search", lineage, metrics={"trials": 3}, details=details)
        run.write_chain([path.name for path in sorted(run.path.glob("[01]*"))[-1:]])
        assert report.write(run.path).read_text(encoding="utf-8").count("<circle") == 1  # of the curve
        for path in run.path.glob("10-*"):
            shutil.rmtree(path)


def test_a_point_far_above_all_others_does_not_flatten_them():
    assert scatter._ceiling([126.0, 40.0, 39.0, 30.0]) == 40.0
    assert scatter._ceiling([44.0, 40.0, 39.0, 30.0]) == 44.0
    assert scatter._ceiling([126.0, 40.0, 39.0]) == 126.0
    assert scatter._ceiling([40.0, 40.0, 40.0, 40.0]) == 40.0
    across, up = Metric("speedup", "speed-up", "x"), Metric("psnr_db", "PSNR", "dB")
    rows = [{"speedup": 1.0 + n, "psnr_db": value} for n, value in enumerate((126.0, 40.0, 39.0, 30.0))]
    svg = scatter.draw(rows, across, up)
    assert svg is not None and ">1.00x, 126.0 dB</text>" in svg and svg.count("<circle") == 4
    heights = [float(height) for height in re.findall(r'cy="([\d.]+)"', svg)]
    assert heights[0] == scatter.TOP and heights[1] - heights[0] < 20
