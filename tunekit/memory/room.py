"""What a device offers to a run: bytes, how its kernels allocate, and how fast they are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from tunekit.hardware import SHOWN, DeviceFacts
from tunekit.memory.costs import Row
from tunekit.memory.trace import CPU, CUDA, Target

GIB = 2**30
CONTEXT = round(0.45 * GIB)
"""What a CUDA context and its libraries hold outside the allocator, where it cannot be measured."""
HEADROOM_SHARE, HEADROOM = 0.04, round(0.1 * GIB)
"""Kept free above the prediction."""
EFFICIENCY, BANDWIDTH_EFFICIENCY, LAUNCH_SECONDS = 0.45, 0.8, 4e-6
"""Of the roofline: share of the peak arithmetic and bandwidth that kernels reach, and the least they take."""
DISPATCH_SECONDS = 1.8e-5
"""What an operator costs more in a unit that keeps its attention: each passes through Python, twice.
`dispatch_seconds` of scripts/measure_memory.py gives this on an idle machine, a little more on a busy one."""
HOST_LINK = 12e9
"""Bytes per second from page-locked host memory: PCIe 3 with 16 lanes, PCIe 4 with 8."""

DEVICE_LINK = 20e9
"""Bytes per second that a process sends to the next one: PCIe 4 with 16 lanes. NVLink has some ten times as
much, a network of 100 Gbit/s half."""


@dataclass(frozen=True)
class Speed:
    """A device's roofline.

    Attributes:
        half: operations per second of 16-bit matrix products with float32 sums.
        full: of float32.
        bandwidth: bytes per second.
    """

    half: float
    full: float
    bandwidth: float

    def seconds(self, rows: Collection[Row]) -> float:
        """Predicted time of operators; only ratios of such times are worth something."""
        total = 0.0
        for _, _, flops, traffic, half, times in rows:
            arithmetic = flops / (EFFICIENCY * (self.half if half else self.full))
            moving = traffic / (BANDWIDTH_EFFICIENCY * self.bandwidth)
            total += times * (max(arithmetic, moving) + LAUNCH_SECONDS)
        return total


@dataclass(frozen=True)
class Room:
    """What a device offers to one run.

    Attributes:
        title: for people.
        total: bytes that may be used, the context included.
        context: bytes that are used beside torch's allocator.
        target: how kernels there allocate.
        speed: its roofline.
        lacks: what does not run there, see `DeviceFacts.lacks`.
        host_bytes: free memory of the host, for weights that stay there; None if it is not known.
        has_host: whether the host has a memory of its own.
        why_less: why `total` is less than the device has.
    """

    title: str
    total: int
    context: int
    target: Target
    speed: Speed
    lacks: tuple[str, ...] = ()
    host_bytes: int | None = None
    has_host: bool = True
    why_less: str = ""

    def needed(self, least: int) -> int:
        """Bytes of the device for an allocator that needs `least`, with headroom."""
        if self.context == 0:
            return least
        return least + self.context + round(least * HEADROOM_SHARE) + HEADROOM

    @property
    def budget(self) -> int:
        """Bytes for tensors at most, if nothing were lost to fragments."""
        if self.context == 0:
            return self.total
        return max(0, round((self.total - self.context - HEADROOM) / (1 + HEADROOM_SHARE)))


def room_of(facts: DeviceFacts, *, budget: int | None = None, real: bool = False) -> Room:
    """A card of the table, empty, or as much of it as `budget` bytes.

    A card shows a little less than its nominal memory (23.68 GiB of 24 on an RTX 4090).

    Args:
        real: `budget` is what a device offers, not a wish.
    """
    own = round((facts.memory_bytes or 0) * SHOWN)
    speed = Speed(facts.half_flops, facts.float32_flops, facts.bandwidth_bytes_s or 50e9)
    if facts.kind == "cpu":
        return Room(facts.title, budget or own, 0, CPU, speed, has_host=False)
    attention = CUDA.attention
    if facts.kind == "cuda" and (facts.compute_capability or (8, 0)) < (8, 0):
        attention = "efficient"  # flash attention began with Ampere
    elif not facts.has_fused_attention:
        attention = "math"
    total = budget if budget and (real or not own) else min(budget or own, own)
    target = replace(CUDA, attention=attention)
    has_host = facts.kind != "mps"  # one memory for both
    return Room(facts.title, total, CONTEXT, target, speed, facts.lacks, has_host=has_host)
