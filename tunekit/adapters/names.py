"""What the keys of adapter files say: which module, and which tensor of its update.

Every program spells them in its own way; whatever the spelling, a key becomes a module's name with
underscores for dots, and a field of an update.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from tunekit.adapters.delta import KINDS, modules_of, weight_shape
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
    for field in ("down", "up"):  # diffusers before it used peft, and XLabs, whose names end with a number
        yield field, rf"(?:[._]lora|\.lora_linear_layer|(?<=_lora\d))\.{field}\.weight"
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
        prefixes = [*family.facts.kohya_prefixes[component], component, f"lora_{component}"]
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


def made_for(header: Mapping[str, str]) -> FamilyFacts | None:
    """The family that a file's header names, as modelspec and kohya's tools do; the first says more."""
    base, architecture = header.get("ss_base_model_version", ""), header.get("modelspec.architecture", "")
    every: list[FamilyFacts] = [family.facts for _, family in FAMILIES.items()]
    for facts in every:
        if architecture == f"{facts.modelspec_architecture}/lora":
            return facts
    return next((facts for facts in every if base.startswith(facts.ss_base_model_version)), None)


def looks_like(shapes: Mapping[str, tuple[int, ...]], here: FamilyFacts) -> str:
    """What a file looks like that does not fit `here`: the title of a family, or of several, or "".

    It is the one whose layers, at the sizes of its usual base, have the names and the shapes of most keys;
    nothing is said where no other has more of them than the model at hand.
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        if said := read_key(key):
            layers.setdefault(plain(said.module), {})[said.field] = shape
    scores = {}
    for name, family in FAMILIES.items():
        sizes = _usual_sizes(name)
        named = [key for key in layers if key in sizes]
        fitting = sum(_fits(layers[key], sizes[key]) for key in named)
        scores[family.facts.title] = (fitting, len(named))
    best = max(scores.values())
    if best > max(scores.get(here.title, (0, 0)), (0, 0)):
        return " or ".join(title for title, score in scores.items() if score == best)
    for _, family in FAMILIES.items():
        facts = family.facts
        marks = facts.adapter_marks
        if facts is not here and best == (0, 0) and marks and any(re.search(marks, key) for key in shapes):
            return str(facts.title)
    return ""


@cache
def _usual_sizes(name: str) -> dict[str, tuple[int, ...]]:
    """A family's layers by every name that they have in files -> the shape of their weights, usually."""
    family = FAMILIES.get(name)
    if not hasattr(family, "adapter_names"):  # it can be planned only
        return {}
    parts = family.facts.kohya_prefixes
    try:
        modules = {part: modules_of(family.facts.component(part).build()) for part in parts}
    except AttributeError:  # diffusers is of a version before the family
        return {}
    sizes = {}
    for key, place in places_of(modules, family).items():
        shapes = [weight_shape(modules[place.component][path]) for path in place.parts]
        sizes[key] = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return sizes


def _fits(found: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]) -> bool:
    """Whether what a file has of a layer is an update of such a weight."""
    down, up = found.get("down"), found.get("up")
    return (down is None or len(down) < 2 or down[1:2] == weight[1:2]) and (
        up is None or up[:1] == weight[:1]
    )
