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


_Free = list[tuple[int, int, int, _Block]]
"""Size, segment's number, start, block; sorted."""


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
    _free: dict[bool, _Free] = field(default_factory=lambda: {True: [], False: []})
    _segments: int = 0
    _tails: dict[bool, _Block] = field(default_factory=dict)

    # Replaying is most of what a plan costs beside its traces, so the usual way through these two is short.

    def allocate(self, size: int) -> _Block:
        """Takes `size` bytes.

        Raises:
            OutOfMemory: the capacity does not suffice.
        """
        size = max(BLOCK, -(-size // BLOCK) * BLOCK)
        small = size <= SMALL
        pool = self._free[small]
        index = bisect_left(pool, (size,))
        block = pool.pop(index)[3] if index < len(pool) else self._fresh(size, small)
        left = block.size - size
        if left and (self.expandable or left >= (BLOCK if small else SMALL + 1)):
            segment, after = block.segment, block.after
            rest = _Block(block.start + size, left, segment, True, block, after)
            if after is not None:
                after.before = rest
            elif self.expandable and self._tails.get(small) is block:
                self._tails[small] = rest
            block.after, block.size = rest, size
            insort(pool, (left, segment.number, rest.start, rest))
        block.free = False
        return block

    def release(self, block: _Block) -> None:
        """Gives a block back; free neighbours become one."""
        block.free = True
        segment = block.segment
        pool = self._free[segment.small]
        before, after = block.before, block.after
        if before is not None and before.free:
            del pool[bisect_left(pool, (before.size, segment.number, before.start))]
            block = self._joined(before, block)
        if after is not None and after.free:
            del pool[bisect_left(pool, (after.size, segment.number, after.start))]
            block = self._joined(block, after)
        insort(pool, (block.size, segment.number, block.start, block))

    def _joined(self, left: _Block, right: _Block) -> _Block:
        left.size += right.size
        after = left.after = right.after
        if after is not None:
            after.before = left
        elif self.expandable and self._tails.get(left.segment.small) is right:
            self._tails[left.segment.small] = left
        return left

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
        return _Block(0, wanted, _Segment(self._segments, wanted, small))

    def _grown(self, size: int, small: bool) -> _Block:
        """The end of the pool's one segment, made long enough."""
        tail, pool = self._tails.get(small), self._free[small]
        if tail is None:
            self._segments += 1
            tail = self._tails[small] = _Block(0, 0, _Segment(self._segments, 0, small))
        elif tail.free:
            del pool[bisect_left(pool, (tail.size, tail.segment.number, tail.start))]
        else:
            tail.after = _Block(tail.start + tail.size, 0, tail.segment, before=tail)
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
            kept: _Free = []
            for item in self._free[small]:
                if item[3].before is None and item[3].after is None:
                    self.reserved -= item[0]
                else:
                    kept.append(item)
            self._free[small][:] = kept  # in place: who asked holds it


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
    for storage, size, phase, _ in events:
        if size > 0:
            blocks[storage] = allocator.allocate(size)
        elif storage in blocks:
            allocator.release(blocks.pop(storage))
        if allocator.reserved > peaks.get(phase, -1):
            peaks[phase] = allocator.reserved
    return peaks


def least_capacity(events: Sequence[Event], *, step: int = 16 * MIB) -> int:
    """The least capacity, a multiple of `step` bytes, in which a trace runs, fragments given back and all."""
    live = peak = 0
    for event in events:
        live += event.size
        peak = max(peak, live)
    moves = [(event.storage, event.size) for event in events]
    low, high = peak // step, -(-max(replay(events).values()) // step)
    while low < high:
        middle = (low + high) // 2
        if _runs(moves, middle * step):
            high = middle
        else:
            low = middle + 1
    return high * step


def _runs(moves: Iterable[tuple[int, int]], capacity: int) -> bool:
    """Whether a trace does in a capacity."""
    allocator = Allocator(capacity)
    allocate, release = allocator.allocate, allocator.release
    blocks: dict[int, _Block] = {}
    try:
        for storage, size in moves:
            if size > 0:
                blocks[storage] = allocate(size)
            elif storage in blocks:
                release(blocks.pop(storage))
    except OutOfMemory:
        return False
    return True


assert ROOM < 0  # the room that operators take has one number: it is given back before the next is taken
