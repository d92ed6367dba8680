"""A model's way as a strip: its source, the training, each pass, with the command that repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tunekit.artifacts import Step
from tunekit.provenance import shown
from tunekit.report.material import Material, plain_number
from tunekit.units import format_seconds

AGAIN = "again"


def strip(
    material: Material, content: Mapping[str, Any], models: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The nodes of the strip, in order.

    Args:
        material: what was read.
        content: of report.json.
        models: of each model of the chain: `title`, `folder`, `what`, `figures`, `failure`, and `steps`, the
            pass that made it and those that looked at it.

    Returns:
        `{"title", "folder", "what", "figures": [(name, value, tone)], "commands", "failure"}` each.
    """
    training = content["training"]
    source = (training or {}).get("source") or material.text("model", "source")
    nodes = [_node(str(source))] if source else []
    if training:
        metrics = training["metrics"]
        figures = [("steps", str(training["steps"]), "")]
        for name, words in (("val_loss", "held-out loss"), ("parameters", "parameters")):
            value = metrics.get(name)
            if plain_number(value):
                figures.append((words, f"{value:,}" if isinstance(value, int) else f"{value:.4f}", ""))
        figures.append(("took", format_seconds(training["seconds"]), ""))
        node = _node(str(training["recipe"] or "training"), figures=figures)
        node["folder"] = material.trained.path.name if material.trained and material.trained.path else ""
        node["commands"] = [("train", f"{_run(material)} name={shlex.quote(f'{_name(material)}-{AGAIN}')}")]
        nodes.append(node)
    for model in models:
        node = _node(model["title"], what=model["what"], figures=model["figures"])
        node["folder"], node["failure"] = model["folder"], model["failure"] or ""
        node["commands"] = [(step.kind, _repeat(material, step)) for step in model["steps"]]
        nodes.append(node)
    return nodes


def _node(title: str, *, what: str = "", figures: Sequence[tuple[str, str, str]] = ()) -> dict[str, Any]:
    return {
        "title": shown(title), "folder": "", "what": what, "figures": list(figures), "commands": [],
        "failure": "",
    }  # fmt: skip


def _name(material: Material) -> str:
    return material.text("name") or material.run.path.name


def _folder(material: Material) -> str:
    """The run folder as the config names it, from where the run was started; no home folder."""
    runs = material.text("runs") or "runs"
    return f"{runs.rstrip('/')}/{material.run.path.name}"


def _run(material: Material) -> str:
    return f"tunekit run {shlex.quote(f'{_folder(material)}/config.yaml')}"


def _repeat(material: Material, step: Step) -> str:
    """A step that lies in its folder is not run again, so it is moved away; those after it stay."""
    folder = shlex.quote(f"{_folder(material)}/{step.artifact}")
    return f"mv {folder} {folder}.before\n{_run(material)}"
