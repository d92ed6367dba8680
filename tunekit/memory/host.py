"""The memory of the host: what reading the base takes, and what waits there in the other phases.

A base is read network by network, each in the type that it computes in. Its files are mapped, one shard at a
time, and count as memory while they are; where the weights become another type, or are packed, a shard is
there beside what is made of it. diffusers reads the networks in an order of its own, which differs between
processes, so the largest shard is taken to come last; only a packed denoiser is always read first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tunekit.families.family import DTYPES
from tunekit.memory.job import ENCODERS, VAE, WEIGHTS, Job, bytes_of
from tunekit.memory.levers import Levers, as_held
from tunekit.memory.phases import tensors
from tunekit.memory.stored import Stored
from tunekit.memory.trace import WORKSPACE

FILES = "files being read"
SHARD = 10 * 10**9
"""Bytes of a shard at most, as diffusers writes them."""
CATEGORIES = {"denoiser": WEIGHTS, "vae": VAE, "text_encoder": ENCODERS}


@dataclass(frozen=True)
class Base:
    """The networks of a base as a run holds them, in bytes.

    Attributes:
        own: network -> what it takes once it is read.
        reading: network -> the shard that is there beside it while it is read; none if it is the network.
        checking: room of looking for weights that are not finite, in the largest tensor.
        made: what all take in float32, if they are not read but made so; else 0.
        packed: the denoiser, where it is packed while it is read, before the others; else "".
        roles: network -> category in a ledger.
    """

    own: dict[str, int]
    reading: dict[str, int]
    checking: int
    made: int
    packed: str
    roles: dict[str, str]

    def load(self) -> tuple[int, dict[str, int]]:
        """The most bytes while it is read, and what they are."""
        if self.made:
            return self.made, {WEIGHTS: self.made}
        others = [size for name, size in self.reading.items() if name != self.packed]
        moments = [
            {**self._ledger(self.own), WORKSPACE: self.checking},
            {**self._ledger(self.own), FILES: max(others, default=0)},
        ]
        if self.packed:
            alone = self._ledger({self.packed: self.own[self.packed]})
            moments.append({**alone, FILES: self.reading[self.packed]})
        ledger = max(moments, key=lambda moment: sum(moment.values()))
        return sum(ledger.values()), {name: size for name, size in ledger.items() if size}

    def of(self, category: str) -> int:
        """What the networks of a category take."""
        return sum(size for name, size in self.own.items() if self.roles[name] == category)

    def _ledger(self, networks: Mapping[str, int]) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, size in networks.items():
            found[self.roles[name]] = found.get(self.roles[name], 0) + size
        return found


def base_of(job: Job, levers: Levers) -> Base:
    """A job's base as `levers` have it read."""
    dtypes = job.sizes.family.facts.dtypes(job.held)
    roles = {part.name: CATEGORIES[part.role] for part in job.sizes.networks}
    packed = job.sizes.denoiser.name if levers.base_precision != "same" and job.packs else ""
    base = Base({}, {}, 0, 0, packed, roles)
    for part in job.sizes.networks:
        network, dtype = part.build(), dtypes[part.name]
        whole = bytes_of(*network.parameters())
        if part.name == packed:
            as_held(network, job.adapter, levers)
        else:
            network.to(dtype)
        held = tensors(network)
        base.own[part.name] = bytes_of(*held)
        # torch.isfinite has the absolute values, and three masks; of floats of 8 bits, two sets of bytes.
        rooms = [
            t.numel() * (t.element_size() + 3 if t.itemsize > 1 else 2) for t in held if t.is_floating_point()
        ]
        base = replace(base, checking=max(base.checking, *rooms))
        known = job.stored.get(part.name, Stored(None))
        if known.dtype is None:
            base = replace(base, made=base.made + whole)
        elif part.name == packed or DTYPES.get(known.dtype) != dtype:
            itemsize = DTYPES[known.dtype].itemsize if known.dtype in DTYPES else 1
            base.reading[part.name] = known.largest or min(SHARD, whole * itemsize // 4)
    return base


@dataclass(frozen=True)
class Waiting:
    """What a run has in the host's memory while it trains, in bytes.

    Attributes:
        weights: those that visit the device.
        paged: optimizer state.
        saving: what writing the result takes.
    """

    weights: int
    paged: int
    saving: int


def on_host(base: Base, waiting: Waiting, *, previews: bool, captions: bool) -> dict[str, int]:
    """Bytes of the host's memory at most in each phase, where the device has a memory of its own.

    Args:
        previews: whether the autoencoder waits there between them.
        captions: whether text encoders stay there.
    """
    whole, vae, encoders = sum(base.own.values()), base.of(VAE), base.of(ENCODERS)
    stays = waiting.weights + waiting.paged
    training = stays + (vae if previews else 0)
    return {
        "load": base.load()[0],
        "class_pictures": whole,
        "encode": whole if captions else whole - min(vae, encoders),
        "first_step": training,
        "step": training,
        "preview": stays,
        "save": training + waiting.saving,
    }
