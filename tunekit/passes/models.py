"""The models of a chain in memory: each is read from disk once, and what it sees is recorded once."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

    from tunekit.artifacts import Artifact
    from tunekit.families.family import Dtypes, Family, FamilyFacts, Pipeline
    from tunekit.resources import Source

T = TypeVar("T")
LARGE = 2_000_000_000
"""Bytes of weights in files from which a pass that needs a network at a time is not given the others."""


class Models:
    """Whole torch models that were read from disk, and what was recorded with them.

    They are shared, so nobody changes one: a step that wants another denoiser makes a copy of it and a
    pipeline around that (`around`). A step may move them to a device; they come back when it ends.
    """

    def __init__(self) -> None:
        self._pipelines: dict[Source, Pipeline] = {}
        self._recorded: dict[str, dict[Hashable, Any]] = {}
        self._later: dict[Source, str] = {}
        self._once: dict[str, Any] = {}

    def load(self, family: Family, source: Source, dtypes: Dtypes | None = None) -> Pipeline:
        """The shared model, in float32; in other types, a copy of the parts that differ.

        Raises:
            ModelError: see `Family.load`.
        """
        if source not in self._pipelines:
            pipeline = family.load(source)
            for part in family.facts.components:
                network = getattr(pipeline, part.name)
                if part.role != "scheduler" and network is not None:
                    network.requires_grad_(False)
            self._pipelines[source] = pipeline
        shared = self._pipelines[source]
        return shared if dtypes is None else in_types(shared, family.facts, dtypes)

    def networks(
        self,
        family: Family,
        source: Source,
        only: Collection[str],
        dtypes: Dtypes | None = None,
    ) -> Pipeline:
        """A model of which some networks are needed: the shared one, or of a large one a pipeline of its own.

        The others are without weights then, and the shared one goes: whoever wants it reads it again.

        Raises:
            ModelError: see `Family.load`.
        """
        import torch

        from tunekit.families.loading import stored_bytes

        size = stored_bytes(source, family.facts)
        if size is not None and size < LARGE:
            shared = self.load(family, source)
            return shared if dtypes is None else in_types(shared, family.facts, dtypes, only)
        self._pipelines.pop(source, None)
        _tidy()
        return family.load(source, dtypes or torch.float32, only=only)

    def recorded(self, model: Artifact, what: Hashable, make: Callable[[], T]) -> T:
        """What was recorded of a model under the name `what`; made where it is not there."""
        known = self._recorded.setdefault(model.hash, {})
        if what not in known:
            known[what] = make()
        found: T = known[what]
        return found

    def once(self, what: str, make: Callable[[], T]) -> T:
        """What belongs to the chain and to no model of it; made where it is not there."""
        if what not in self._once:
            self._once[what] = make()
        found: T = self._once[what]
        return found

    def begin(self, later: Iterable[Artifact]) -> None:
        """Before a step: which of the models that are there now a later step can want."""
        self._later = {model.model_source: model.hash for model in later if model.format != "adapter"}

    def done(self, model: Artifact) -> None:
        """After one use: the model goes back to the CPU or, where no later step can want it, away."""
        self._put_back(model.model_source)
        _tidy()

    def end(self) -> None:
        """After a step: all go back to the CPU or away, and so does what was recorded with them."""
        for source in list(self._pipelines):
            self._put_back(source)
        wanted = set(self._later.values())
        self._recorded = {name: known for name, known in self._recorded.items() if name in wanted}
        _tidy()

    def _put_back(self, source: Source) -> None:
        if source in self._pipelines:
            if source in self._later:
                self._pipelines[source].to("cpu")
            else:
                del self._pipelines[source]


def around(pipeline: Pipeline, networks: Mapping[str, nn.Module]) -> Pipeline:
    """A pipeline with some networks of its own, by name, that shares everything else with `pipeline`."""
    made = copy.copy(pipeline)
    for name, network in networks.items():
        setattr(made, name, network)
    return made


def in_types(
    pipeline: Pipeline, facts: FamilyFacts, dtypes: Dtypes, only: Collection[str] | None = None
) -> Pipeline:
    """A pipeline whose networks have these types: its own where they have them already, else copies.

    Args:
        only: networks that are to have them; None is all.
    """
    import torch

    copies = {}
    for part in facts.components:
        if only is not None and part.name not in only:
            continue
        network = getattr(pipeline, part.name)
        wanted = dtypes if isinstance(dtypes, torch.dtype) else dtypes.get(part.name, torch.float32)
        if part.role != "scheduler" and network is not None and network.dtype != wanted:
            copies[part.name] = copy.deepcopy(network).to(wanted)
    return around(pipeline, copies) if copies else pipeline


def _tidy() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
