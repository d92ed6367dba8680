"""The model of the caching allocator keeps the rules of the real one."""

from __future__ import annotations

import itertools
import random

import pytest

from tunekit.memory.allocator import MIB, Allocator, OutOfMemory, least_capacity, replay
from tunekit.memory.trace import Event


def events(*sizes: tuple[int, int]) -> list[Event]:
    return [Event(storage, size, "step", 0) for storage, size in sizes]


@pytest.mark.parametrize(
    ("size", "reserved"),
    [(1, 2), (MIB, 2), (MIB + 1, 20), (10 * MIB - 512, 20), (10 * MIB, 10), (11 * MIB + 5, 12)],
)
def test_segments(size: int, reserved: int) -> None:
    allocator = Allocator()
    allocator.allocate(size)
    assert allocator.reserved == reserved * MIB


def test_small_and_large_requests_do_not_share_segments() -> None:
    allocator = Allocator()
    allocator.release(allocator.allocate(20 * MIB))
    allocator.allocate(1000)
    assert allocator.reserved == 22 * MIB


def test_the_smallest_block_that_fits_is_taken_and_split() -> None:
    allocator = Allocator()
    blocks = [allocator.allocate(size * MIB) for size in (30, 14, 40)]
    for block in blocks:
        allocator.release(block)
    taken = allocator.allocate(12 * MIB)
    assert (taken.segment.size, taken.size) == (14 * MIB, 12 * MIB)
    again = allocator.allocate(2 * MIB)
    assert again.segment is taken.segment
    assert allocator.reserved == 84 * MIB


def test_a_remainder_of_a_large_block_below_a_mebibyte_stays_with_it() -> None:
    allocator = Allocator()
    allocator.release(allocator.allocate(12 * MIB))
    assert allocator.allocate(11 * MIB + 512).size == 12 * MIB


def test_free_neighbours_join() -> None:
    allocator = Allocator()
    parts = [allocator.allocate(4 * MIB) for _ in range(5)]
    assert allocator.reserved == 20 * MIB
    for block in parts:
        allocator.release(block)
    allocator.allocate(20 * MIB - 512)
    assert allocator.reserved == 20 * MIB


def test_free_segments_go_back_before_it_gives_up() -> None:
    allocator = Allocator(capacity=50 * MIB)
    allocator.release(allocator.allocate(30 * MIB))
    allocator.allocate(40 * MIB)
    assert allocator.reserved == 40 * MIB
    with pytest.raises(OutOfMemory):
        allocator.allocate(20 * MIB)


def test_expandable_segments_have_no_holes_between_sizes() -> None:
    trace = events((0, 30 * MIB), (0, -30 * MIB), (1, 40 * MIB), (1, -40 * MIB), (2, 60 * MIB))
    assert replay(trace) == {"step": 130 * MIB}
    assert replay(trace, expandable=True) == {"step": 60 * MIB}


def test_least_capacity() -> None:
    trace = events((0, 30 * MIB), (0, -30 * MIB), (1, 40 * MIB))
    assert least_capacity(trace, step=MIB) == 40 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_any_sequence_keeps_its_books(expandable: bool) -> None:
    draw = random.Random(3)
    allocator = Allocator(expandable=expandable)
    live = {}
    for number in range(3000):
        if live and draw.random() < 0.48:
            allocator.release(live.pop(draw.choice(list(live))))
        else:
            live[number] = allocator.allocate(int(2 ** draw.uniform(5, 25)))
        spans = sorted((block.segment.number, block.start, block.size) for block in live.values())
        assert all(a[0] != b[0] or a[1] + a[2] <= b[1] for a, b in itertools.pairwise(spans))
    assert sum(block.size for block in live.values()) <= allocator.reserved <= allocator.peak_reserved
    for block in live.values():
        allocator.release(block)
    assert sum(size for pool in allocator._free.values() for size, *_ in pool) == allocator.reserved
