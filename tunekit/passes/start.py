"""What a chain starts from, as far as it is known before anything is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.errors import TunekitError
from tunekit.resources import Source

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact
    from tunekit.families import Sizes

CUSTOM_LAYERS = "tunekit_layers.json"


@dataclass(frozen=True)
class Start:
    """The model that a chain is given.

    Attributes:
        format: of the artifact.
        family: name; "" where it is not known.
        source: of the model, or of an adapter's base; None where it is not known.
        traits: what the model has already -> who gave it; see `Pass.gives`.
        based: False for an adapter that does not name its base.
        examples: whether the run knows pictures, or prompts to draw some.
    """

    format: str
    family: str = ""
    source: Source | None = None
    traits: Mapping[str, str] = field(default_factory=dict)
    based: bool = True
    examples: bool = True

    @classmethod
    def of(cls, artifact: Artifact, *, family: str = "", examples: bool = True) -> Start:
        """An artifact that is there; its record and its files say what was done with it."""
        based = artifact.format != "adapter" or artifact.base is not None
        source = artifact.model_source if based else None
        folder = source.path if source else None
        said = {} if folder is None else _traits_of_files(folder)
        return cls(
            artifact.format,
            family or artifact.family,
            source,
            {**said, **_traits_of_record(artifact)},
            based,
            examples,
        )

    @classmethod
    def trained(cls, format: str, family: str, base: Source) -> Start:
        """What a training will leave, on a base whose files say what it is; its pictures are known."""
        path = base.path
        packed = _traits_of_files(path) if path and path.is_dir() and format == "adapter" else {}
        return cls(format, family, base, packed)

    @cached_property
    def sizes(self) -> Sizes | None:
        """Of the networks, where they can be read without opening the model."""
        if not self.family or self.source is None or (self.source.name != "tiny" and not self.source.path):
            return None
        from tunekit import families

        try:
            found = families.sizes_of(self.family, self.source)
        except TunekitError:  # whoever opens it will say more
            return None
        return None if found.assumed else found

    @cached_property
    def modules(self) -> frozenset[str]:
        """Paths of all modules of the denoiser; empty where they cannot be told without opening the model."""
        try:
            denoiser = self._denoiser()
        except (TunekitError, OSError, ValueError, TypeError, AttributeError, KeyError):
            return frozenset()  # whoever opens it will say more
        return frozenset(name for name, _ in denoiser.named_modules() if name) if denoiser else frozenset()

    @cached_property
    def layouts(self) -> frozenset[str] | None:
        """Names of published smaller layouts of its denoiser; None where that cannot be told yet."""
        from tunekit import families

        try:
            denoiser = self._denoiser()
            family = families.get(self.family) if denoiser is not None else None
            return None if family is None else frozenset(family.layouts(denoiser))
        except (TunekitError, OSError, ValueError, TypeError, AttributeError, KeyError):
            return None  # whoever opens it will say more

    def _denoiser(self) -> Any:
        """The denoiser on the meta device."""
        if not self.family or self.source is None:
            return None
        from tunekit import families
        from tunekit.families.sizes import with_config

        part, path = families.planned(self.family).facts.denoiser, self.source.path
        if path is None:  # "tiny", or on the hub: the usual base is known without asking
            sizes = families.sizes_of(self.family, self.source)
            return None if sizes.assumed else sizes.component(part.name).build()
        file = path / part.name / "config.json"
        if not file.is_file():
            return None
        return with_config(part, json.loads(file.read_text(encoding="utf-8"))).build()


def _traits_of_record(artifact: Artifact) -> dict[str, str]:
    """What the passes in an artifact's lineage gave."""
    from pydantic import ValidationError

    from tunekit.registry import PASSES

    found: dict[str, str] = {}
    for step in artifact.lineage:
        if step.kind not in PASSES.names():
            continue
        cls = PASSES.get(step.kind)
        try:
            made = cls.model_validate(step.settings)
        except ValidationError:  # of another version
            made = cls.model_construct(**step.settings)
        found |= dict.fromkeys(made.gives(), step.kind)
    return found


def _traits_of_files(folder: Path) -> dict[str, str]:
    """What a model's files say by themselves: that its weights are in few bits, and how it computes."""
    found: dict[str, str] = {}
    for name in ("*/config.json", f"*/{CUSTOM_LAYERS}"):
        for file in sorted(folder.glob(name)):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if not isinstance(content, dict):
                continue
            noted = content.get("quantization")
            if content.get("quantized") or isinstance(noted, dict):
                found["packed"] = "quantize"
            if isinstance(noted, dict) and (
                noted.get("mode") == "dynamic" or noted.get("activations") == "uint8"
            ):
                found["uint8"] = "quantize"
    return found
