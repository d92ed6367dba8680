"""What the keys of adapter files say: which module, and which tensor of its update.

Every program spells them in its own way; whatever the spelling, a key becomes a module's name with
underscores for dots, and a field of an update.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunekit.adapters.delta import KINDS
from tunekit.families import FAMILIES

if TYPE_CHECKING:
    from torch import nn

    from tunekit.families.family import Family, FamilyFacts, Published

Modules = Mapping[str, Mapping[str, "nn.Module"]]
"""Component -> module path -> layer that can be changed; all of them, see `changeable`."""


@dataclass(frozen=True)
class Place:
    """What a name stands for: a module of the model, or several whose rows are one layer in the file.

    Attributes:
        component: of the pipeline.
        parts: paths of the modules, in the order of the layer's rows.
        swapped: the two halves of its rows stand in the other order there.
    """

    component: str
    parts: tuple[str, ...]
    swapped: bool = False

    def __str__(self) -> str:
        first, *others = self.parts
        return ", ".join([f"{self.component}.{first}", *(path.rpartition(".")[2] for path in others)])

    @property
    def whole(self) -> bool:
        """Whether it is one module as it stands here."""
        return len(self.parts) == 1 and not self.swapped


@dataclass(frozen=True)
class Key:
    """What a key says.

    Attributes:
        module: as the file spells it.
        field: of an update: "down", "up", "magnitude"; "mid", of a Tucker decomposition; "alpha"; "weight"
            and "bias", of whole differences; "up_bias", which is scaled as the update is.
        label: the adapter's name, where it stands in the key.
    """

    module: str
    field: str
    label: str


def _spellings() -> Iterator[tuple[str, str]]:
    """Of each field, the ends of its keys as regular expressions."""
    for kind in KINDS.values():
        for field, ending in kind.peft_names.items():  # an adapter's name may stand within it
            stem = re.escape(ending.removesuffix(".weight"))
            yield field, rf"\.{stem}(?:\.(?P<label>(?!weight$|bias$)[^.]+))?(?:\.weight)?"
        for field, ending in kind.kohya_names.items():
            yield field, rf"\.{re.escape(ending)}"
    for field, word in (("down", "down"), ("up", "up")):  # diffusers before it used peft
        yield field, rf"(?:[._]lora|\.lora_linear_layer)\.{word}\.weight"
    yield "magnitude", r"\.dora_scale"
    yield "mid", r"\.lora_mid\.weight"
    yield "alpha", r"(?:_lora|\.lora|\.lora_linear_layer)?\.alpha"
    yield "weight", r"\.(?:diff|w_norm)"
    yield "bias", r"\.(?:diff_b|b_norm)"
    yield "up_bias", r"\.(?:lora_up|lora_B(?:\.(?P<label>[^.]+))?)\.bias"


_ENDINGS = tuple(
    (field, re.compile(rf"(?P<module>.+?){ending}")) for field, ending in dict.fromkeys(_spellings())
)


def read_key(key: str) -> Key | None:
    """Take a key apart; None if it is not of an update."""
    for field, ending in _ENDINGS:
        if found := ending.fullmatch(key):
            return Key(found["module"], field, found.groupdict().get("label") or "")
    return None


def plain(module: str) -> str:
    """A module's name without what a program wraps around it, with underscores for dots."""
    name = module.replace("_orig_mod.", "").removeprefix("base_model.model.").replace(".processor.", ".")
    return name.replace(".", "_")


def places_of(modules: Modules, family: Family) -> dict[str, Place]:
    """Every name that a layer may have in a file, as `plain` gives it -> what it is."""
    encoders = [part.name for part in family.facts.encoders if part.name in modules]
    places: dict[str, Place] = {}
    for component, paths in modules.items():
        prefixes = [*family.facts.kohya_prefixes[component], component]
        if component == family.facts.denoiser_name:
            prefixes += ["diffusion_model", "model_diffusion_model", "lycoris_unet", "lycoris", ""]
        elif encoders == [component]:
            prefixes.append("")
        for place, names in _spellings_of(component, paths, family):
            for prefix in prefixes:
                for name in names:
                    places.setdefault(f"{prefix}_{name}".replace(".", "_").lstrip("_"), place)
    return places


def _spellings_of(
    component: str, modules: Mapping[str, nn.Module], family: Family
) -> Iterator[tuple[Place, set[str]]]:
    """The names of layers: those that the family says, then the paths of the modules themselves."""
    for layer in family.adapter_names(component, list(modules)):
        yield Place(component, layer.parts, layer.swapped), {layer.name}
    for path in modules:
        short = path.removeprefix("text_model.")  # transformers 5 dropped this level, which files name
        spellings = {path, short, f"text_model.{short}"}
        for now, former in _FORMER:
            spellings |= {name.removesuffix(now) + former for name in spellings if name.endswith(now)}
        yield Place(component, (path,)), spellings


def written_layers(component: str, modules: Modules, family: Family) -> list[Published]:
    """The layers that a component's updates are written as, for other programs: each module is in one."""
    layers, taken = [], set[str]()
    for layer in family.adapter_names(component, list(modules.get(component, ()))):
        if taken.isdisjoint(layer.parts):
            layers.append(layer)
            taken.update(layer.parts)
    return layers


_FORMER = (
    (".to_out.0", ".to_out"),
    (".q_proj", ".to_q"),
    (".k_proj", ".to_k"),
    (".v_proj", ".to_v"),
    (".out_proj", ".to_out"),
)
"""Ends of modules, and what diffusers wrote for them in 2023."""

# What is not for this model ---------------------------------------------------------------------------------

_TRANSFORMER = r"(lora_|lycoris_)?transformer[._]|diffusion_model\.(layers|blocks)\."
_TEXT_WIDTH = re.compile(r".*attn2[._]to_[kv]$")


def made_for(header: Mapping[str, str]) -> FamilyFacts | None:
    """The family that a file's header names, as kohya's tools and modelspec do."""
    base, architecture = header.get("ss_base_model_version", ""), header.get("modelspec.architecture")
    for _, family in FAMILIES.items():
        facts: FamilyFacts = family.facts
        if (
            base.startswith(facts.ss_base_model_version)
            or architecture == f"{facts.modelspec_architecture}/lora"
        ):
            return facts
    return None


def looks_like(shapes: Mapping[str, tuple[int, ...]], here: FamilyFacts) -> str:
    """What keys and shapes that do not fit `here` look like: a model's name for people, or "".

    The width of the text that a U-Net's attention reads tells Stable Diffusion 1, 2 and XL apart.
    """
    widths: dict[int, FamilyFacts] = {}
    for _, family in FAMILIES.items():
        facts: FamilyFacts = family.facts
        if width := facts.denoiser.config.get("cross_attention_dim"):
            widths[width] = facts
    for key, shape in shapes.items():
        said = read_key(key)
        if said and said.field == "down" and _TEXT_WIDTH.match(said.module) and len(shape) > 1:
            other = widths.get(shape[1])
            if other is not None and other is not here:
                return other.title
    for _, family in FAMILIES.items():
        facts = family.facts
        marks = facts.adapter_marks
        if facts is not here and marks and any(re.search(marks, key) for key in shapes):
            return str(facts.title)
    if any(re.match(_TRANSFORMER, key) for key in shapes):
        return "a transformer's, and not a U-Net's"
    return ""
