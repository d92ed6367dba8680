"""A model of PyTorch's CUDA caching allocator: what it reserves for a trace, and the least it can do with.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.13): sizes are multiples of 512 bytes;
requests up to 1 MiB come from 2 MiB segments, up to 10 MiB from 20 MiB segments, larger ones from segments
of their own in multiples of 2 MiB; the smallest free block that fits is taken and split where enough is
left; freed blocks join free neighbours; and when the card gives no more, segments that are wholly free go
back to it before the allocator gives up. With expandable segments there is one segment per pool that grows
by pages.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tunekit.memory.trace import ROOM, Event

MIB = 2**20
BLOCK = 512
SMALL = MIB
"""Largest request of the small pool."""
SMALL_SEGMENT = 2 * MIB
MIDDLE = 10 * MIB
MIDDLE_SEGMENT = 20 * MIB
ROUND_LARGE = 2 * MIB
PAGE = {True: 2 * MIB, False: 20 * MIB}
"""Pages of expandable segments, of the small pool and of the large one."""


class OutOfMemory(Exception):
    """The capacity does not suffice."""


@dataclass(slots=True, eq=False)
class _Block:
    start: int
    size: int
    segment: _Segment
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None


@dataclass(slots=True, eq=False)
class _Segment:
    number: int
    size: int
    small: bool


@dataclass
class Allocator:
    """Replays births and deaths.

    Attributes:
        capacity: bytes that the card can give; None for no limit.
        expandable: whether `expandable_segments:True` is set.
        reserved: bytes taken from the card now.
        peak_reserved: the most so far.
    """

    capacity: int | None = None
    expandable: bool = False
    reserved: int = 0
    peak_reserved: int = 0
    _free: dict[bool, list[tuple[int, int, int]]] = field(default_factory=lambda: {True: [], False: []})
    _at: dict[tuple[int, int], _Block] = field(default_factory=dict)
    _segments: int = 0
    _tails: dict[bool, _Block] = field(default_factory=dict)

    def allocate(self, size: int) -> _Block:
        """Takes `size` bytes.

        Raises:
            OutOfMemory: the capacity does not suffice.
        """
        size = max(BLOCK, -(-size // BLOCK) * BLOCK)
        small = size <= SMALL
        block = self._fitting(size, small) or self._fresh(size, small)
        left = block.size - size
        if self.expandable or left >= (BLOCK if small else SMALL + 1):
            self._split(block, size)
        block.free = False
        return block

    def release(self, block: _Block) -> None:
        """Gives a block back; free neighbours become one."""
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._forget(other)
                block = self._join(*((other, block) if other.start < block.start else (block, other)))
        self._remember(block)

    def _fitting(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
        index = bisect_left(pool, (size, -1, -1))
        if index == len(pool):
            return None
        _, segment, start = pool.pop(index)
        return self._at[segment, start]

    def _fresh(self, size: int, small: bool) -> _Block:
        if self.expandable:
            return self._grown(size, small)
        if small:
            wanted = SMALL_SEGMENT
        elif size < MIDDLE:
            wanted = MIDDLE_SEGMENT
        else:
            wanted = -(-size // ROUND_LARGE) * ROUND_LARGE
        self._reserve(wanted)
        self._segments += 1
        return self._placed(_Block(0, wanted, _Segment(self._segments, wanted, small)))

    def _grown(self, size: int, small: bool) -> _Block:
        """The end of the pool's one segment, made long enough."""
        tail = self._tails.get(small)
        if tail is None:
            self._segments += 1
            tail = self._tails[small] = self._placed(_Block(0, 0, _Segment(self._segments, 0, small)))
        elif tail.free:
            self._forget(tail)
        else:
            tail.after = self._placed(_Block(tail.start + tail.size, 0, tail.segment, before=tail))
            tail = self._tails[small] = tail.after
        more = -(-max(0, size - tail.size) // PAGE[small]) * PAGE[small]
        self._reserve(more)
        tail.size += more
        return tail

    def _reserve(self, size: int) -> None:
        if self.capacity is not None and self.reserved + size > self.capacity:
            self._give_back()
            if self.reserved + size > self.capacity:
                raise OutOfMemory
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _give_back(self) -> None:
        """Returns segments that are wholly free to the card."""
        for small in () if self.expandable else (True, False):
            for size, segment, start in list(self._free[small]):
                block = self._at[segment, start]
                if block.before is None and block.after is None:
                    self._forget(block)
                    del self._at[segment, start]
                    self.reserved -= size

    def _placed(self, block: _Block) -> _Block:
        self._at[block.segment.number, block.start] = block
        return block

    def _split(self, block: _Block, size: int) -> None:
        if block.size == size:
            return
        rest = _Block(block.start + size, block.size - size, block.segment, True, block, block.after)
        if rest.after is not None:
            rest.after.before = rest
        elif self._tails.get(block.segment.small) is block:
            self._tails[block.segment.small] = rest
        block.after, block.size = rest, size
        self._placed(rest)
        self._remember(rest)

    def _join(self, left: _Block, right: _Block) -> _Block:
        left.size += right.size
        left.after = right.after
        if right.after is not None:
            right.after.before = left
        elif self._tails.get(left.segment.small) is right:
            self._tails[left.segment.small] = left
        left.free = True
        del self._at[right.segment.number, right.start]
        return left

    def _remember(self, block: _Block) -> None:
        insort(self._free[block.segment.small], (block.size, block.segment.number, block.start))

    def _forget(self, block: _Block) -> None:
        pool = self._free[block.segment.small]
        del pool[bisect_left(pool, (block.size, block.segment.number, block.start))]


def replay(
    events: Iterable[Event], *, capacity: int | None = None, expandable: bool = False
) -> dict[str, int]:
    """Peak reserved bytes of each phase of a trace, in order of appearance.

    Raises:
        OutOfMemory: it does not run in `capacity` bytes.
    """
    allocator = Allocator(capacity, expandable)
    blocks: dict[int, _Block] = {}
    peaks: dict[str, int] = {}
    for event in events:
        if event.size > 0:
            blocks[event.storage] = allocator.allocate(event.size)
        elif event.storage in blocks:
            allocator.release(blocks.pop(event.storage))
        peaks[event.phase] = max(peaks.get(event.phase, 0), allocator.reserved)
    return peaks


def least_capacity(events: Sequence[Event], *, step: int = 16 * MIB) -> int:
    """The least capacity, a multiple of `step` bytes, in which a trace runs, fragments given back and all."""
    live = peak = 0
    for event in events:
        live += event.size
        peak = max(peak, live)
    low, high = peak // step, -(-max(replay(events).values()) // step)
    while low < high:
        middle = (low + high) // 2
        try:
            replay(events, capacity=middle * step)
            high = middle
        except OutOfMemory:
            low = middle + 1
    return high * step


assert ROOM < 0  # the room that operators take has one number: it is given back before the next is taken
