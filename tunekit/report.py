"""A run's lineage, rendered: `report.json` for programs and one self-contained `report.html` for people.

Nothing is measured here: every figure comes from `artifact.json`, `metrics.jsonl` and `previews/` of the run.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunekit.artifacts import Artifact, RunFolder, Step, write_json, write_text
from tunekit.errors import ArtifactError
from tunekit.resources import ASSETS
from tunekit.units import format_bytes, format_count, format_seconds

VERSION = 1
MODEL_KINDS_ASIDE = ("verify", "benchmark")
"""Passes that only look at a model: their figures belong to the row of the model before them."""


def load(run_dir: Path | str) -> dict[str, Any]:
    """The content of `report.json`, read afresh from the run folder.

    Returns:
        `{"version", "training", "steps": [{"kind", "artifact", "seconds", "settings", "metrics"}], "final"}`;
        `training` is None for a run that only optimizes, `final` is a folder name inside the run, or None
        while nothing is finished.

    Raises:
        ArtifactError: no such run, or its files are damaged.
    """
    run = RunFolder(Path(run_dir))
    if not run.path.is_dir():
        raise ArtifactError(f'there is no run "{run.path}"', hint="tunekit ls shows the runs here")
    trained, chain = _lineage(run)
    try:
        final = run.final()
    except ArtifactError:
        final = None
    return {
        "version": VERSION,
        "training": _training(run, trained),
        "steps": [
            {
                "kind": step.kind,
                "artifact": step.artifact,
                "seconds": step.seconds,
                "settings": step.settings,
                "metrics": step.metrics,
            }
            for step in chain
        ],
        "final": final.path.name if final and final.path else None,
    }


def write(run_dir: Path | str) -> Path:
    """Writes `report.json` and `report.html` into the run folder; returns the path of the page.

    Raises:
        ArtifactError: see `load`.
        OutputError: disk full, no permission.
    """
    run = RunFolder(Path(run_dir))
    content = load(run.path)
    write_json(run.path / "report.json", content)
    return write_text(run.path / "report.html", _page(run, content))


# Reading the run -------------------------------------------------------------------------------------------


def _lineage(run: RunFolder) -> tuple[Step | None, list[Step]]:
    """The training step, if there was one, and the steps of the chain."""
    passes = run.passes()
    trained = run.trained()
    steps = list(Artifact.load(passes[-1]).lineage if passes else ())
    names = {path.name for path in passes}
    chain = [step for step in steps if step.artifact in names]
    train = (
        next((step for step in Artifact.load(trained).lineage if step.kind == "train"), None)
        if trained
        else None
    )
    return train, chain


def metrics_rows(run: RunFolder) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; a last line cut off by a kill is left out."""
    rows: list[dict[str, Any]] = []
    if run.metrics.exists():
        for line in run.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _training(run: RunFolder, step: Step | None) -> dict[str, Any] | None:
    rows = metrics_rows(run)
    if step is None and not rows:
        return None
    config = _config(run)
    model = config.get("model") or {}
    training: dict[str, Any] = {
        "recipe": config.get("recipe"),
        "family": model.get("family"),
        "source": model.get("source"),
        "finished": step is not None,
        "steps": max((row["step"] for row in rows), default=0),
        "seconds": step.seconds if step else max((row.get("seconds", 0.0) for row in rows), default=0.0),
        "settings": step.settings if step else {},
        "metrics": dict(step.metrics) if step else {},
    }
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [row["val_loss"] for row in rows if "val_loss" in row]
    if losses:
        training["metrics"].setdefault("loss", sum(losses[-50:]) / len(losses[-50:]))
    if len(held_out) > 1:
        training["metrics"].setdefault("val_loss_first", held_out[0])
        training["metrics"].setdefault("val_loss", held_out[-1])
        training["metrics"]["val_loss_change"] = held_out[-1] / held_out[0] - 1 if held_out[0] else None
    return training


def _config(run: RunFolder) -> dict[str, Any]:
    import yaml

    if not run.config.exists():
        return {}
    return yaml.safe_load(run.config.read_text(encoding="utf-8")) or {}


# The page --------------------------------------------------------------------------------------------------


@dataclass
class _Row:
    """One model of the chain: the step that made it, and every figure that was found about it."""

    step: Step
    looked_at: list[Step] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, Any]:
        """Its own metrics, then those of the passes that looked at it; a later figure wins."""
        merged = dict(self.step.metrics)
        for step in self.looked_at:
            merged.update({name: value for name, value in step.metrics.items() if value is not None})
        return merged

    @property
    def failure(self) -> str | None:
        return next(
            (str(step.details["failure"]) for step in self.looked_at if step.details.get("failure")), None
        )


def _page(run: RunFolder, content: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    _, chain = _lineage(run)
    models: list[_Row] = []
    for step in chain:
        if step.kind in MODEL_KINDS_ASIDE and models:
            models[-1].looked_at.append(step)
        elif step.kind not in MODEL_KINDS_ASIDE:
            models.append(_Row(step))
    figures = _figures(models, chain)
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string((ASSETS / "report.html.j2").read_text(encoding="utf-8"))
    curve = _curve(metrics_rows(run))
    return template.render(
        name=run.path.name,
        subtitle=_subtitle(content),
        rendering="auto",
        tiles=_tiles(content, models, figures),
        before_after=_before_after(run),
        plan=_plan(run),
        curve={**curve, "svg": Markup(curve["svg"])} if curve else None,  # noqa: S704 - made here, of numbers
        rows=[_table_row(row, figures) for row in models],
        table_notes=_notes(models, chain),
        versions=_versions(run, chain),
        tables=list(_detail_tables(chain)),
        config=run.config.read_text(encoding="utf-8") if run.config.exists() else "",
        footer="Made by tunekit from the run's artifact.json files. For programs: report.json.",
    )


def _plan(run: RunFolder) -> dict[str, Any] | None:
    """What was planned before the training, and the picture of it."""
    from markupsafe import Markup

    path, picture = run.path / "plan.json", run.path / "plan.svg"
    if not path.is_file() or not picture.is_file():
        return None
    plan = json.loads(path.read_text(encoding="utf-8"))
    words = ", ".join(plan["levers"]) or "nothing had to be saved"
    note = (
        f"On {plan['device']}: {words}; predicted {format_bytes(plan['device_bytes'])} of"
        f" {format_bytes(plan['budget_bytes'])}, most in the phase {plan['peak_phase'].replace('_', ' ')}."
    )
    rows = [_plan_row(name, phase) for name, phase in plan["phases"].items()]
    if plan.get("ran_out"):
        note += f" Memory ran out {len(plan['ran_out'])} times before, and less was planned each time."
    svg = Markup(picture.read_text(encoding="utf-8"))  # noqa: S704 - made by us
    return {"note": note, "svg": svg, "rows": rows}


def _plan_row(name: str, phase: Mapping[str, Any]) -> dict[str, str]:
    """Predicted beside measured, of what tensors hold and of what the allocator took."""
    measured, error = phase.get("measured", {}), phase.get("error", {})
    row = {"phase": name.replace("_", " ")}
    for kind in ("allocated", "reserved"):
        size = measured.get(f"peak_{kind}_bytes")
        row[kind] = format_bytes(phase[f"peak_{kind}_bytes"])
        row[f"{kind}_measured"] = format_bytes(size) if size else "-"
        row[f"{kind}_error"] = f"{error[kind]:+.1%}" if kind in error else "-"
    return row


def _subtitle(content: Mapping[str, Any]) -> str:
    training = content["training"]
    parts = []
    if training:
        took = format_seconds(training["seconds"])
        parts.append(f"{training['recipe']} on {training['source']}, {training['steps']} steps in {took}")
    if content["steps"]:
        parts.append(" -> ".join(step["kind"] for step in content["steps"]))
    return "; then ".join(parts) if parts else "nothing is finished yet"


def _figures(models: Sequence[_Row], chain: Sequence[Step]) -> dict[str, dict[str, Any]]:
    """Figures by model folder; a pass that looked at several models fills the rows of all of them."""
    figures = {row.step.artifact: row.metrics for row in models}
    for step in chain:
        for name, found in (step.details.get("artifacts") or {}).items():
            if name in figures:
                figures[name].update({key: value for key, value in found.items() if value is not None})
    return figures


def _tiles(
    content: Mapping[str, Any], models: Sequence[_Row], figures: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, str]]:
    tiles = []
    training = content["training"]
    change = (training or {}).get("metrics", {}).get("val_loss_change")
    if change is not None:
        first, last = training["metrics"]["val_loss_first"], training["metrics"]["val_loss"]
        tone = "good" if change < 0 else "bad"
        tiles.append(_tile("loss on held-out pictures", f"{change:+.1%}", f"{first:.4f} -> {last:.4f}", tone))
    if models:
        last = figures[models[-1].step.artifact]
        whole = next(
            (figures[row.step.artifact] for row in models if "size_bytes" in figures[row.step.artifact]), {}
        )
        if last.get("size_bytes") and whole.get("size_bytes"):
            ratio = last["size_bytes"] / whole["size_bytes"]
            note = f"{format_bytes(whole['size_bytes'])} -> {format_bytes(last['size_bytes'])}"
            tiles.append(
                _tile("size of the last model", f"{ratio:.2f}x", note, "good" if ratio <= 1 else "bad")
            )
        if last.get("speedup_first") or last.get("speedup"):
            speedup = last.get("speedup_first") or last["speedup"]
            against = "the fine-tuned model in torch fp32" if last.get("speedup_first") else "its parent"
            took = f"{last['picture_ms_p50']:.0f} ms a picture, " if "picture_ms_p50" in last else ""
            note = f"{took}against {against}"
            tiles.append(
                _tile("a picture, faster by", f"{speedup:.2f}x", note, "good" if speedup > 1 else "bad")
            )
        if last.get("psnr_db") is not None:
            note = f"SSIM {last['ssim']:.3f}" if last.get("ssim") is not None else ""
            tiles.append(_tile("fidelity of the last model", f"{last['psnr_db']:.1f} dB", note))
        for row in models:
            if row.failure:
                tiles.append(_tile("threshold missed", row.step.kind, row.failure, "bad"))
    return tiles


def _tile(label: str, value: str, note: str, tone: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "tone": tone}


def _table_row(row: _Row, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    metrics = figures[row.step.artifact]
    largest = {
        name: max((values[name] for values in figures.values() if values.get(name)), default=0)
        for name in ("size_bytes", "denoiser_ms_p50", "picture_ms_p50", "peak_memory_bytes")
    }

    def cell(name: str, text: str | None, note: str = "", tone: str = "") -> dict[str, Any] | None:
        if text is None:
            return None
        bar = max(1, round(100 * metrics[name] / largest[name])) if largest.get(name) else 0
        return {"text": text, "note": note, "tone": tone, "bar": bar}

    def show(name: str, form: str) -> str | None:
        value = metrics.get(name)
        return None if value is None else form.format(value)

    speed = metrics.get("speedup")
    slower = bool(metrics.get("slower"))
    seconds = row.step.seconds + sum(step.seconds for step in row.looked_at)
    size = metrics.get("size_bytes")
    memory = metrics.get("peak_memory_bytes")
    return {
        "title": row.step.kind,
        "folder": row.step.artifact,
        "what": _what(row.step),
        "cells": [
            cell("size_bytes", format_bytes(size) if size else None, _parameters(metrics)),
            cell(
                "denoiser_ms_p50",
                show("denoiser_ms_p50", "{:.1f} ms"),
                show("denoiser_ms_p95", "p95 {:.1f}") or "",
            ),
            cell(
                "picture_ms_p50",
                show("picture_ms_p50", "{:.0f} ms"),
                show("picture_ms_p95", "p95 {:.0f}") or "",
            ),
            cell(
                "speedup",
                None if speed is None else f"{speed:.2f}x" + (" slower" if slower else ""),
                show("speedup_first", "{:.2f}x of fine-tuned") or "",
                "bad" if slower else "good" if speed and speed > 1 else "",
            ),
            cell("peak_memory_bytes", format_bytes(memory) if memory else None),
            cell("relative_error", show("relative_error", "{:.2g}")),
            cell("psnr_db", show("psnr_db", "{:.1f} dB"), tone="bad" if row.failure else ""),
            cell("ssim", show("ssim", "{:.4f}")),
            cell("seconds", format_seconds(seconds)),
        ],
    }


def _parameters(metrics: Mapping[str, Any]) -> str:
    count = metrics.get("parameters")
    return f"{format_count(count)} parameters" if count else ""


def _what(step: Step) -> str:
    """The settings that say something, in a line."""
    shown = [
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in step.settings.items()
        if value not in (None, [], {}, "", False)
    ]
    return "; ".join(shown[:5])


def _notes(models: Sequence[_Row], chain: Sequence[Step]) -> list[str]:
    notes = [
        "Latency and memory are measured in one run, the model and its parent in turns; speed-up is against "
        "the parent. A row's fidelity is measured against the reference that its verify step names."
    ]
    for row in models:
        if row.failure:
            notes.append(f"{row.step.artifact}: {row.failure}")
    for step in chain:
        note = step.details.get("note")
        if isinstance(note, str):
            notes.append(f"{step.kind}: {note}")
    return notes


def _picture(path: Path) -> str | None:
    if not path.is_file():
        return None
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _before_after(run: RunFolder) -> dict[str, Any] | None:
    """First and last previews, and up to two between."""
    folders = sorted(path for path in run.previews.glob("step-*") if path.is_dir())
    if not folders:
        return None
    prompts = (_config(run).get("preview") or {}).get("prompts") or []
    middle = [folders[len(folders) * part // 3] for part in (1, 2)] if len(folders) > 3 else folders[1:-1]
    chosen = list(dict.fromkeys([folders[0], *middle, folders[-1]]))
    names = sorted({file.name for folder in chosen for file in folder.glob("*.png")})[:8]
    rows = []
    for folder in chosen:
        step = int(folder.name.removeprefix("step-"))
        label = "before" if step == 0 else "after" if folder == folders[-1] else "on the way"
        rows.append(
            {"label": label, "note": f"step {step}", "images": [_picture(folder / name) for name in names]}
        )
    heads = [prompts[index] if index < len(prompts) else name for index, name in enumerate(names)]
    return {"heads": heads, "rows": rows, "note": ""}


def _versions(run: RunFolder, chain: Sequence[Step]) -> dict[str, Any] | None:
    """The pictures of all verify steps: one row per version, one column per prompt and seed."""
    columns: dict[tuple[str, int], None] = {}
    rows: dict[str, dict[tuple[str, int], str | None]] = {}
    notes: dict[str, str] = {}
    for step in chain:
        for picture in step.pictures:
            key = (str(picture.get("prompt", "")), int(picture.get("seed", 0)))
            columns.setdefault(key)
            row = rows.setdefault(str(picture["label"]), {})
            row.setdefault(key, _picture(run.path / step.artifact / picture["file"]))
        if step.pictures and step.metrics.get("psnr_db") is not None:
            label = str(step.pictures[-1]["label"])
            notes[label] = f"{step.metrics['psnr_db']:.1f} dB to its reference"
    if not rows:
        return None
    keys = list(columns)[:8]
    return {
        "note": "Same prompts and seeds in every row.",
        "heads": [f"{prompt} (seed {seed})" for prompt, seed in keys],
        "rows": [
            {"label": label, "note": notes.get(label, ""), "images": [images.get(key) for key in keys]}
            for label, images in rows.items()
        ],
    }


def _detail_tables(chain: Sequence[Step]) -> Iterable[dict[str, Any]]:
    """Every table of `details` that is a list of flat mappings."""
    for step in chain:
        for name, value in step.details.items():
            if not (isinstance(value, list) and value and all(isinstance(line, dict) for line in value)):
                continue
            head = list(dict.fromkeys(key for line in value for key in line))
            body = [[_plain(line.get(key)) for key in head] for line in value]
            yield {"title": f"{step.artifact}: {name.replace('_', ' ')}", "head": head, "body": body}


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    return "" if value is None else str(value)


# The curve -------------------------------------------------------------------------------------------------


def _curve(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Loss over steps as an inline SVG: the running mean of the training loss, and the held-out loss."""
    training = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None and row["step"] > 0]
    held_out = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    if len(training) < 2:
        return None
    window = max(1, len(training) // 30)
    smooth = []
    for index, (step, _) in enumerate(training):
        part = training[max(0, index - window + 1) : index + 1]
        smooth.append((step, sum(loss for _, loss in part) / len(part)))
    lines = [{"label": f"training loss (mean of {window} steps)", "colour": "#2f6fde", "points": smooth}]
    if len(held_out) > 1:
        lines.append({"label": "loss on held-out pictures", "colour": "#d9730d", "points": held_out})
    every = [point for line in lines for point in line["points"]]
    low, high = min(loss for _, loss in every), max(loss for _, loss in every)
    last = max(step for step, _ in every)
    margin = (high - low) * 0.08 or 0.01
    low, high = max(low - margin, min(low, 0.0)), high + margin  # a loss is not below zero
    width, height, left, bottom = 1000, 260, 58, 26

    def at(step: float, loss: float) -> tuple[float, float]:
        return left + (width - left - 12) * step / last, 8 + (height - bottom - 8) * (high - loss) / (
            high - low
        )

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss over steps">']
    for tick in range(5):
        loss = low + (high - low) * tick / 4
        y = at(0, loss)[1]
        parts.append(f'<line x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884" />')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:.3f}</text>')
        step = round(last * tick / 4)
        parts.append(f'<text x="{at(step, low)[0]:.1f}" y="{height - 8}" text-anchor="middle">{step}</text>')
    for line in lines:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line["points"]))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{line["colour"]}" stroke-width="2" />')
    parts.append("</svg>")
    return {"svg": "".join(parts), "lines": lines}
