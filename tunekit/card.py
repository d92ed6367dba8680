"""The model card beside an artifact: README.md, as the hub shows it and people read it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunekit.artifacts import ADAPTER_FILE, CARD, COMFYUI_ENDINGS, Artifact, Step
from tunekit.errors import ArtifactError
from tunekit.families.family import FamilyFacts
from tunekit.files import write_text
from tunekit.provenance import shown
from tunekit.records import read_bytes
from tunekit.resources import Source

UNKNOWN = "unknown"


def write(artifact: Artifact, facts: FamilyFacts) -> Artifact:
    """Writes the card of an artifact whose record is written. Returns the artifact.

    Nobody's folders are named in it. Of an artifact that points at another's model there is no card.

    Raises:
        OutputError: it cannot be written.
    """
    if artifact.path is not None and artifact.model_path == artifact.path:
        write_text(artifact.path / CARD, text(artifact, facts))
    return artifact


def text(artifact: Artifact, facts: FamilyFacts) -> str:
    """The card."""
    train = next((step for step in artifact.lineage if step.kind == "train"), None)
    settings = train.settings if train else {}
    base = artifact.base or _get(settings, "model", "source")
    title = str(settings.get("name") or (artifact.path.name if artifact.path else facts.title))
    licence = licence_of(base, facts)
    trigger = _get(settings, "data", "instance_prompt")
    head: dict[str, Any] = {"license": licence if licence != UNKNOWN else "other"}
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not base.startswith(("builtin/", ".")):
        head["base_model"] = base
    tags = ["tunekit", "text-to-image"]
    if artifact.format == "adapter":
        tags += ["lora", "diffusers"]
        if trigger:
            head["instance_prompt"] = trigger
    elif artifact.format == "torch":
        tags.append("diffusers")
    else:
        tags.append(artifact.format)
    lines = ["---", f"license: {head.pop('license')}"]
    lines += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {_line(title)}", ""]
    what = "An adapter for" if artifact.format == "adapter" else "A model of the family"
    lines += [f"{what} {facts.title}, made with tunekit.", ""]
    if artifact.format == "adapter":
        lines += [f"- Base: {_code(shown(base)) if base else UNKNOWN}"]
    elif base:
        lines += [f"- Trained from: {_code(shown(base))}"]
    if trigger:
        lines += [f"- Trigger: {_code(trigger)}"]
    lines += ["", "## Use", "", *_use(artifact, facts, base, trigger), ""]
    if train:
        lines += ["## Training", "", *_training(train), ""]
    passes = [step for step in artifact.lineage if step.kind != "train"]
    if passes:
        lines += ["## Afterwards", "", *(f"- {step.kind}: {_settings(step)}" for step in passes), ""]
    lines += ["## Made with", "", *(f"- {name}: {value}" for name, value in artifact.made.items()), ""]
    lines += ["## Licence", "", _licence(licence, base, facts), ""]
    return "\n".join(lines)


def licence_of(base: str | None, facts: FamilyFacts) -> str:
    """The licence of a base as far as it is known: by its model card, or because it is the usual base."""
    if base is None:
        return UNKNOWN
    if base == facts.default_source and facts.licence:
        return facts.licence
    try:
        path = Source.of(base).path
        if path is not None and path.is_dir():
            head = read_bytes(path / CARD)[:10_000].decode("utf-8", "replace")
            found = re.search(r"\A---\n(?:.*\n)*?license:[ ]*[\"']?([\w.+-]+)", head)
            return found[1] if found else UNKNOWN
    except (FileNotFoundError, ArtifactError, OSError, ValueError):
        return UNKNOWN
    return UNKNOWN


def _licence(licence: str, base: str | None, facts: FamilyFacts) -> str:
    if base in (None, "tiny"):
        return "The base has random weights; no licence of others applies."
    if licence != UNKNOWN:
        return f"The base is under {_code(licence)}, whose terms go for this model too."
    usual = f" (the usual base of the family is under {_code(facts.licence)})" if facts.licence else ""
    return f"What the base is under is not known here{usual}: see where it comes from. Its terms go on here."


def _use(artifact: Artifact, facts: FamilyFacts, base: str | None, trigger: str | None) -> list[str]:
    prompt = json.dumps(trigger or "what you want to see", ensure_ascii=False)
    folder = "path/to/this-folder"
    if artifact.format == "adapter":
        there = shown(base) if base else facts.default_source
        here = sorted(path.name for path in (artifact.path or Path()).glob("*.safetensors"))
        comfyui = [name for name in here if name.endswith(COMFYUI_ENDINGS)]
        adapter = f'pipe.load_lora_weights("{folder}", weight_name="{ADAPTER_FILE}")'
        lines = _with_diffusers(facts, json.dumps(there, ensure_ascii=False), [adapter], prompt)
        if comfyui:
            lines += [
                f"With ComfyUI: put {_code(comfyui[0])} into `models/loras` and add a *Load LoRA* node.",
                "",
            ]
    elif artifact.format == "torch":
        lines = _with_diffusers(facts, f'"{folder}"', [], prompt)
    else:
        lines = []
    return [*lines, "With tunekit:", "", "```", f"tunekit generate {folder} --prompt {prompt}", "```"]


def _with_diffusers(facts: FamilyFacts, opened: str, then: list[str], prompt: str) -> list[str]:
    """The few lines that draw a picture there; what is opened and the prompt are quoted already."""
    return [
        "With diffusers:",
        "",
        "```python",
        f"from diffusers import {facts.pipeline_class}",
        "",
        f"pipe = {facts.pipeline_class}.from_pretrained({opened})",
        *then,
        f'pipe({prompt}).images[0].save("picture.png")',
        "```",
        "",
    ]


def _training(step: Step) -> list[str]:
    """What one would ask about it."""
    settings, metrics = step.settings, step.metrics
    told = {
        "recipe": settings.get("recipe"),
        "steps": step.details.get("taken", metrics.get("steps")),
        "batch size": _get(settings, "train", "batch_size"),
        "learning rate": _get(settings, "train", "lr"),
        "resolution": _get(settings, "data", "resolution"),
        "adapter": _get(settings, "adapter", "kind"),
        "rank": _get(settings, "adapter", "rank"),
        "alpha": _get(settings, "adapter", "alpha"),
        "seed": settings.get("seed"),
        "loss on held-out pictures": _validation(metrics),
    }
    return [f"- {name}: {_line(str(value))}" for name, value in told.items() if value is not None]


def _validation(metrics: Mapping[str, Any]) -> str | None:
    first, last = metrics.get("val_loss_first"), metrics.get("val_loss")
    if not isinstance(first, float) or not isinstance(last, float):
        return None
    return f"{last:.4g}, of the untrained model {first:.4g}"


def _settings(step: Step) -> str:
    told = {key: value for key, value in step.settings.items() if value not in (None, [], {}, "", False)}
    return _line(shown(", ".join(f"{key} {value}" for key, value in told.items()))) or "as it comes"


def _get(settings: Mapping[str, Any], section: str, key: str) -> Any:
    found = settings.get(section)
    return found.get(key) if isinstance(found, dict) else None


def _line(value: str) -> str:
    """In one line, and no markup."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(value.split()))


def _code(value: str) -> str:
    """As code, whatever is in it."""
    value = " ".join(value.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", value)), default=0))
    space = " " if "`" in value else ""
    return f"{fence}{space}{value}{space}{fence}"
