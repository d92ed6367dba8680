"""The page of a report: one file that loads nothing, runs nothing, and sends nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.artifacts import Step
from tunekit.errors import ArtifactError
from tunekit.provenance import shown, shown_yaml
from tunekit.records import PhaseRecord, PlanRecord, read
from tunekit.registry import PASSES
from tunekit.report import scatter, versions
from tunekit.report.curve import draw
from tunekit.report.lineage import strip
from tunekit.report.material import Material, plain_number, tables
from tunekit.report.pictures import BRIGHTEST, COLOURS, Album, drawing
from tunekit.resources import ASSETS
from tunekit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from markupsafe import Markup

    from tunekit.passes.metrics import Metric

REFRESH_SECONDS = 20
"""After which a page loads itself again while its run goes on."""
MOST_STEPS = 60
"""Preview steps that are shown; of more, as many evenly spread."""
MOST_PROMPTS = 8
MOST_LINES = 200
"""Of a table, and of a config in thousands of characters."""
NEAR_BEST = 1.02
"""A validation loss up to so many times the lowest is as good."""


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


def render(material: Material, content: Mapping[str, Any], *, live: bool) -> str:
    """The page.

    Args:
        material: what was read.
        content: of report.json.
        live: loads itself again.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    run, chain = material.run, material.chain
    looking = {kind for kind, cls in PASSES.items() if cls.looks}
    models: list[_Row] = []
    for step in chain:
        if step.kind not in looking:
            models.append(_Row(step))
        elif models:  # its figures belong to the row of the model before it
            models[-1].looked_at.append(step)
    declared = _declared()
    figures = _figures(models, chain, declared)
    columns = [
        metric
        for metric in declared
        if metric.column and any(own.get(metric.name) is not None for own in figures.values())
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string((ASSETS / "report.html.j2").read_text(encoding="utf-8"))
    curve = draw(material.rows)
    album, previews = Album(run.path), _previews(run.previews)
    album.plan(_pictures(previews, chain, run.path))
    config = shown_yaml(material.config_text)
    heads = [*(metric.column for metric in columns), "took"]
    rows = [_table_row(row, figures, columns, declared) for row in models]
    told = [
        {
            "title": row["title"],
            "folder": row["folder"],
            "what": row["what"],
            "figures": [
                (head, cell["text"], cell["tone"])
                for head, cell in zip(heads, row["cells"], strict=True)
                if cell
            ],
            "failure": model.failure,
            "steps": [model.step, *model.looked_at],
        }
        for model, row in zip(models, rows, strict=True)
    ]
    looked = [(row.step, row.looked_at) for row in models]
    return template.render(
        style=style(),
        name=run.path.name,
        subtitle=_subtitle(content),
        refresh=REFRESH_SECONDS if live else 0,
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        trouble=material.trouble,
        tiles=_tiles(content, models, figures, declared),
        facts=_facts(material, content),
        **_before_after(material, album, previews),
        plan=_plan(material),
        curve={
            **curve,
            "svg": Markup(curve["svg"]),  # noqa: S704 - made here, of numbers
            "note": _best(material, content["training"]),
        }
        if curve
        else None,
        strip=strip(material, content, told),
        heads=heads,
        rows=rows,
        table_notes=_notes(models, chain),
        versions=versions.tables(looked, run.path, album, columns),
        scale={"largest": BRIGHTEST, "colours": ", ".join(f"rgb{colour}" for colour in COLOURS)},
        scatters=[{**one, "svg": Markup(one["svg"])} for one in _scatters(chain, declared)],  # noqa: S704
        tables=list(_detail_tables(chain, declared)),
        config=config if len(config) <= MOST_LINES * 1000 else f"{config[: MOST_LINES * 1000]} ...",
        footer="Made by tunekit from the run's artifact.json files. For programs: report.json.",
    )


def style() -> Markup:
    """The style of our pages, light and dark, wide and narrow."""
    from markupsafe import Markup

    return Markup((ASSETS / "page.css").read_text(encoding="utf-8"))  # noqa: S704 - our own file


def _facts(material: Material, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What one needs to make the same again, and what one may do with it."""
    training = content["training"] or {}
    made = dict(training.get("made") or {})
    known = {
        "date": made.pop("date", None),
        "seed": training.get("seed"),
        "base": training.get("source"),
        "licence of the base": material.licence,
        "tunekit": " ".join(filter(None, [made.pop("tunekit", ""), made.pop("git", "")])) or None,
        "machine": made.pop("machine", None),
        "with": ", ".join(f"{name} {version}" for name, version in made.items()) or None,
    }
    return [(name, str(value)) for name, value in known.items() if value is not None]


def _plan(material: Material) -> dict[str, Any] | None:
    """What was planned before the training, and the picture of it."""
    path = material.run.path / "plan.json"
    picture = drawing(material.run.path / "plan.svg", material.run.path)
    try:
        plan = read(path, PlanRecord)
    except FileNotFoundError:
        return None
    except ArtifactError as error:
        return {"note": f"{error.message}; it is not needed.", "picture": None, "rows": []}
    words = ", ".join(plan.levers) or "nothing had to be saved"
    note = (
        f"On {plan.device}: {words}; predicted {format_bytes(plan.device_bytes)} of"
        f" {format_bytes(plan.budget_bytes)}, most in the phase {plan.peak_phase.replace('_', ' ')}."
    )
    if plan.ran_out:
        note += f" Memory ran out {len(plan.ran_out)} times before, and less was planned each time."
    return {
        "note": note,
        "picture": picture,
        "rows": [_plan_row(name, phase) for name, phase in plan.phases.items()],
    }


def _plan_row(name: str, phase: PhaseRecord) -> dict[str, str]:
    """Predicted beside measured, of what tensors hold and of what the allocator took."""
    row = {"phase": name.replace("_", " ")}
    for kind in ("allocated", "reserved"):
        size = getattr(phase.measured, f"peak_{kind}_bytes")
        row[kind] = format_bytes(getattr(phase, f"peak_{kind}_bytes"))
        row[f"{kind}_measured"] = format_bytes(size) if size else "-"
        row[f"{kind}_error"] = f"{phase.error[kind]:+.1%}" if kind in phase.error else "-"
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


def _figures(
    models: Sequence[_Row], chain: Sequence[Step], declared: Sequence[Metric]
) -> dict[str, dict[str, Any]]:
    """Figures by model folder; a pass that looked at several models fills the rows of all of them.

    What has a unit is a number, or is left out.
    """
    figures = {row.step.artifact: row.metrics for row in models}
    for step in chain:
        for name, found in (step.details.get("artifacts") or {}).items():
            if name in figures:
                figures[name].update({key: value for key, value in found.items() if value is not None})
    numbers = {metric.name for metric in declared if metric.unit}
    return {
        model: {name: value for name, value in own.items() if name not in numbers or plain_number(value)}
        for model, own in figures.items()
    }


def _tiles(
    content: Mapping[str, Any],
    models: Sequence[_Row],
    figures: Mapping[str, Mapping[str, Any]],
    declared: Sequence[Metric],
) -> list[dict[str, str]]:
    tiles = _validation_tiles(content["training"]) if content["training"] else []
    if models:
        every = [figures[row.step.artifact] for row in models]
        tiles += _model_tiles(every, declared)
    tiles += [
        _tile("threshold missed", row.step.kind, row.failure or "", "bad") for row in models if row.failure
    ]
    return tiles


def _validation_tiles(training: Mapping[str, Any]) -> list[dict[str, str]]:
    """The held-out loss of what was kept, and of the best and the last step where these differ.

    Green is only what is better than the untrained model and about as good as the best step.
    """
    metrics = training["metrics"]
    change = metrics.get("val_loss_change")
    names = ("val_loss_first", "val_loss", "best_val_loss", "last_val_loss", "best_step", "last_step")
    if change is None or not all(plain_number(metrics.get(name)) for name in names):
        return []
    first, kept, best, last, best_step, last_step = (metrics[name] for name in names)
    tone = "bad" if change >= 0 else "good" if kept <= NEAR_BEST * best else ""
    step = training["taken"] or last_step
    title = "loss on held-out pictures" + (f", step {step}" if best_step != last_step else "")
    tiles = [_tile(title, f"{change:+.1%}", f"{first:.4f} -> {kept:.4f}", tone)]
    if best_step != last_step:
        worse = kept > NEAR_BEST * best
        note = f"{best:.4f} there; {last:.4f} at the last step, {last_step}" + (
            f": {last / best - 1:+.0%}" if best > 0 else ""
        )
        tiles.append(_tile("best on held-out pictures", f"step {best_step}", note, "bad" if worse else ""))
    return tiles


def _best(material: Material, training: Mapping[str, Any]) -> str:
    """Where the best was, what was taken, and whether training ended by itself, in a line."""
    metrics = training["metrics"]
    if not all(plain_number(metrics.get(name)) for name in ("best_val_loss", "best_step", "last_step")):
        return ""
    best, last = metrics["best_step"], metrics["last_step"]
    note = f"Lowest on held-out pictures: {metrics['best_val_loss']:.4f} at step {best}"
    if last != best:
        note += f"; {metrics['last_val_loss']:.4f} at step {last}, the last that was measured"
    note += "."
    if training["taken"]:
        note += f" The result is of step {training['taken']}."
    wanted, patience = material.setting("train", "max_steps"), material.setting("train", "early_stop")
    if training["finished"] and plain_number(wanted) and training["steps"] < wanted and patience:
        note += (
            f" Training ended by itself after step {training['steps']} of {wanted}: {patience} measurements"
            " in a row were not lower (train.early_stop)."
        )
    return note


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
        first = next((found[metric.name] for found in every[:-1] if found.get(metric.name)), None)
        if tile.compared and first is not None:
            note = f"{metric.format(first)} -> {text}"
            value = value / first
            text = f"{value:.2f}x"
        if (
            (tile.compared and first is not None) or metric.unit == "x"
        ) and metric.lower_is_better is not None:
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

    def words(value: Any) -> str:
        if isinstance(value, Mapping):
            return " ".join(f"{key} {words(one)}" for key, one in value.items() if one is not None)
        return ", ".join(map(words, value)) if isinstance(value, list) else str(value)

    shown = [
        f"{key} {words(value)}"
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


def _previews(folder: Path) -> list[tuple[int, Path]]:
    """The folders of previews by their steps, in order."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("step-*")
        if (match := re.fullmatch(r"step-(\d{1,12})", path.name)) and path.is_dir()
    ]
    return sorted(found)


def _pictures(previews: Sequence[tuple[int, Path]], chain: Sequence[Step], root: Path) -> Iterable[Path]:
    """All that the page may show."""
    for _, folder in previews:
        yield from folder.glob("*.png")
    for step in chain:
        for picture in step.pictures:
            yield root / step.artifact / str(picture["file"])


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of them, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _before_after(
    material: Material, album: Album, previews: Sequence[tuple[int, Path]]
) -> dict[str, dict[str, Any] | None]:
    """First and last previews and two between, one of them of the result's step; all others behind them."""
    if not previews:
        return {"before_after": None, "between": None}
    told = _spread(previews, MOST_STEPS)
    first = _spread(told, 4)
    training = material.training()
    taken = training["taken"] if training else None
    result = [item for item in told if item[0] == taken and item not in first]
    if result:
        first = sorted([first[0], *result, *first[2:]])
    names = sorted({file.name for _, folder in told for file in folder.glob("*.png")})[:MOST_PROMPTS]
    prompts = material.prompts
    heads = [shown(prompts[index]) if index < len(prompts) else name for index, name in enumerate(names)]
    note = "" if len(told) == len(previews) else f"{len(told)} of {len(previews)} steps are shown."

    def grid(chosen: Sequence[tuple[int, Path]]) -> dict[str, Any]:
        rows = []
        for step, folder in chosen:
            is_last = folder == previews[-1][1]
            label = "before" if step == 0 else "after" if is_last else "on the way"
            if step == taken and step:
                label = "after" if is_last else "the result"
            elif is_last and taken and taken < step:
                label = "the last step"
            images = [album.show(folder / name) for name in names]
            rows.append({"label": label, "note": f"step {step}", "images": images})
        return {"heads": heads, "rows": rows, "note": note}

    others = [item for item in told if item not in first]
    return {"before_after": grid(first), "between": grid(others) if others else None}


def _scatters(chain: Sequence[Step], declared: Sequence[Metric]) -> Iterable[dict[str, str]]:
    """Of each step that says so, a table of its details as points: `scatter: {table, across, up}`."""
    known = {metric.name: metric for metric in declared}
    for step in chain:
        told = step.details.get("scatter")
        if not isinstance(told, Mapping):
            continue
        across, up = known.get(str(told.get("across"))), known.get(str(told.get("up")))
        rows = dict(tables(step.details)).get(str(told.get("table")))
        if rows and across and up and (svg := scatter.draw(rows, across, up)):
            yield {"title": f"{step.artifact}: {up.title} against {across.title}", "svg": svg}


def _detail_tables(chain: Sequence[Step], declared: Sequence[Metric]) -> Iterable[dict[str, Any]]:
    """Every table of `details` that is a list of flat mappings."""
    for step in chain:
        for name, lines in tables(step.details):
            told = lines[:MOST_LINES]
            keys = list(dict.fromkeys(key for line in told for key in line))[:MOST_LINES]
            metrics = {key: _metric(key, declared) for key in keys}
            bars = {key: _bars(metrics[key], [line.get(key) for line in told]) for key in keys}
            yield {
                "title": f"{step.artifact}: {name.replace('_', ' ')}"
                + (f" ({len(told)} of {len(lines)} lines)" if len(told) < len(lines) else ""),
                "head": [_head(key, metrics[key]) for key in keys],
                "body": [
                    [(_plain(line.get(key), metrics[key]), bars[key](line.get(key))) for key in keys]
                    for line in told
                ],
            }


def _bars(metric: Metric | None, values: Sequence[Any]) -> Callable[[Any], int]:
    """Gives the width of a value's bar, in percent of the column's largest; 0 for none."""
    largest = max((value for value in values if plain_number(value)), default=0)
    if metric is None or not metric.bars or largest <= 0:
        return lambda value: 0
    return lambda value: max(1, round(100 * value / largest)) if plain_number(value) else 0


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
