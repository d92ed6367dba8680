"""A run's lineage, rendered: `report.json` for programs and one self-contained `report.html` for people.

Nothing is measured here: every figure comes from `artifact.json`, `metrics.jsonl` and `previews/` of the run.
What a figure is called and where it is shown, the pass says that gives it (`Pass.metrics`).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.artifacts import Artifact, RunFolder, Step, write_json, write_text
from tunekit.errors import ArtifactError
from tunekit.registry import PASSES
from tunekit.resources import ASSETS
from tunekit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from tunekit.passes.metrics import Metric

VERSION = 1


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
    def failed(self) -> Step | None:
        """The step that found a threshold missed."""
        return next((step for step in self.looked_at if step.details.get("failure")), None)

    @property
    def failure(self) -> str | None:
        return str(self.failed.details["failure"]) if self.failed else None


def _declared() -> list[Metric]:
    """What passes measure, in the order it is shown."""
    found: dict[str, Metric] = {metric.name: metric for _, cls in PASSES.items() for metric in cls.metrics}
    return sorted(found.values(), key=lambda metric: metric.rank)


def _page(run: RunFolder, content: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    _, chain = _lineage(run)
    looking = {kind for kind, cls in PASSES.items() if cls.looks}
    models: list[_Row] = []
    for step in chain:
        if step.kind not in looking:
            models.append(_Row(step))
        elif models:  # its figures belong to the row of the model before it
            models[-1].looked_at.append(step)
    figures, declared = _figures(models, chain), _declared()
    columns = [metric for metric in declared if metric.column]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string((ASSETS / "report.html.j2").read_text(encoding="utf-8"))
    curve = _curve(metrics_rows(run))
    return template.render(
        name=run.path.name,
        subtitle=_subtitle(content),
        rendering="auto",
        tiles=_tiles(content, models, figures, declared),
        before_after=_before_after(run),
        plan=_plan(run),
        curve={**curve, "svg": Markup(curve["svg"])} if curve else None,  # noqa: S704 - made here, of numbers
        heads=[*(metric.column for metric in columns), "took"],
        rows=[_table_row(row, figures, columns, declared) for row in models],
        table_notes=_notes(models, chain),
        versions=_versions(run, chain, columns),
        tables=list(_detail_tables(chain, declared)),
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
    content: Mapping[str, Any],
    models: Sequence[_Row],
    figures: Mapping[str, Mapping[str, Any]],
    declared: Sequence[Metric],
) -> list[dict[str, str]]:
    tiles = []
    training = content["training"]
    change = (training or {}).get("metrics", {}).get("val_loss_change")
    if change is not None:
        first, last = training["metrics"]["val_loss_first"], training["metrics"]["val_loss"]
        tone = "good" if change < 0 else "bad"
        tiles.append(_tile("loss on held-out pictures", f"{change:+.1%}", f"{first:.4f} -> {last:.4f}", tone))
    if models:
        every = [figures[row.step.artifact] for row in models]
        tiles += _model_tiles(every, declared)
    tiles += [_tile("threshold missed", row.step.kind, row.failure, "bad") for row in models if row.failure]
    return tiles


def _model_tiles(every: Sequence[Mapping[str, Any]], declared: Sequence[Metric]) -> list[dict[str, str]]:
    """Tiles of the last model.

    Args:
        every: figures of each model, in order.
    """
    last = every[-1]
    texts = {
        metric.name: metric.format(last[metric.name])
        for metric in declared
        if last.get(metric.name) is not None
    }
    tiles: dict[str, dict[str, str]] = {}
    for metric in declared:
        tile = metric.tile
        if tile is None or metric.name not in texts or tile.title in tiles:
            continue
        value, text, tone = last[metric.name], texts[metric.name], ""
        notes = [part for part in tile.note if all(name in texts for name in re.findall(r"{(\w+)}", part))]
        note = ", ".join(part.format_map(texts) for part in notes)
        if tile.compared:
            first = next(found[metric.name] for found in every if found.get(metric.name))
            note = f"{metric.format(first)} -> {text}"
            value = value / first
            text = f"{value:.2f}x"
        if (tile.compared or metric.unit == "x") and metric.lower_is_better is not None:
            tone = "good" if (value <= 1 if metric.lower_is_better else value > 1) else "bad"
        tiles[tile.title] = _tile(tile.title, text, note, tone)
    return list(tiles.values())


def _tile(label: str, value: str, note: str, tone: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "tone": tone}


def _table_row(
    row: _Row,
    figures: Mapping[str, Mapping[str, Any]],
    columns: Sequence[Metric],
    declared: Sequence[Metric],
) -> dict[str, Any]:
    missed = row.failed.metrics if row.failed else {}
    seconds = row.step.seconds + sum(step.seconds for step in row.looked_at)
    return {
        "title": row.step.kind,
        "folder": row.step.artifact,
        "what": _what(row.step),
        "cells": [
            *(
                _cell(metric, row.step.artifact, figures, declared, bad=metric.name in missed)
                for metric in columns
            ),
            {"text": format_seconds(seconds), "note": "", "tone": "", "bar": 0},
        ],
    }


def _cell(
    metric: Metric,
    model: str,
    figures: Mapping[str, Mapping[str, Any]],
    declared: Sequence[Metric],
    *,
    bad: bool,
) -> dict[str, Any] | None:
    """One figure of a model; what stands under it; and a bar beside those of other models."""
    own = figures[model]
    value = own.get(metric.name)
    if value is None:
        return None
    text, notes = metric.format(value), []
    is_better = (
        metric.unit == "x" and metric.lower_is_better is not None and (value > 1) != metric.lower_is_better
    )
    for other in declared:
        found = own.get(other.name)
        if other.under != metric.name or found is None or found is False:
            continue
        if found is True:
            text, bad = f"{text} {other.title}", True
        else:
            notes.append(other.small.format(other.format(found)))
    bar = 0
    if metric.unit in ("bytes", "ms"):
        largest = max(found[metric.name] for found in figures.values() if found.get(metric.name))
        bar = max(1, round(100 * value / largest))
    tone = "bad" if bad else "good" if is_better else ""
    return {"text": text, "note": ", ".join(notes), "tone": tone, "bar": bar}


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


def _versions(run: RunFolder, chain: Sequence[Step], columns: Sequence[Metric]) -> dict[str, Any] | None:
    """The pictures of all verify steps: one row per version, one column per prompt and seed."""
    heads: dict[tuple[str, int], None] = {}
    rows: dict[str, dict[tuple[str, int], str | None]] = {}
    notes: dict[str, str] = {}
    for step in chain:
        for picture in step.pictures:
            key = (str(picture.get("prompt", "")), int(picture.get("seed", 0)))
            heads.setdefault(key)
            row = rows.setdefault(str(picture["label"]), {})
            row.setdefault(key, _picture(run.path / step.artifact / picture["file"]))
        found = [
            f"{metric.column} {metric.format(step.metrics[metric.name])}"
            for metric in columns
            if step.metrics.get(metric.name) is not None
        ]
        if step.pictures and found:
            notes[str(step.pictures[-1]["label"])] = f"to its reference: {', '.join(found)}"
    if not rows:
        return None
    keys = list(heads)[:8]
    return {
        "note": "Same prompts and seeds in every row.",
        "heads": [f"{prompt} (seed {seed})" for prompt, seed in keys],
        "rows": [
            {"label": label, "note": notes.get(label, ""), "images": [images.get(key) for key in keys]}
            for label, images in rows.items()
        ],
    }


def _detail_tables(chain: Sequence[Step], declared: Sequence[Metric]) -> Iterable[dict[str, Any]]:
    """Every table of `details` that is a list of flat mappings."""
    for step in chain:
        for name, value in step.details.items():
            if not (isinstance(value, list) and value and all(isinstance(line, dict) for line in value)):
                continue
            keys = list(dict.fromkeys(key for line in value for key in line))
            metrics = {key: _metric(key, declared) for key in keys}
            yield {
                "title": f"{step.artifact}: {name.replace('_', ' ')}",
                "head": [_head(key, metrics[key]) for key in keys],
                "body": [[_plain(line.get(key), metrics[key]) for key in keys] for line in value],
            }


def _metric(name: str, declared: Sequence[Metric]) -> Metric | None:
    covering = (metric for metric in declared if metric.covers(name))
    return max(covering, key=lambda metric: len(metric.name), default=None)


def _head(name: str, metric: Metric | None) -> str:
    return (metric.title + name.removeprefix(metric.name) if metric else name).replace("_", " ")


def _plain(value: Any, metric: Metric | None) -> str:
    if value is None:
        return ""
    if metric and not isinstance(value, list):
        return metric.format(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


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
