"""What cards offer."""

from __future__ import annotations

from tunekit import hardware
from tunekit.memory.room import room_of
from tunekit.memory.trace import CUDA


def test_a_card_offers_less_than_its_nominal_memory() -> None:
    card = room_of(hardware.find("rtx-3060"))
    assert 11.5 * 2**30 < card.total < 12 * 2**30
    assert card.target == CUDA
    assert card.needed(10 * 2**30) > 10.9 * 2**30
    assert room_of(hardware.find("t4")).target.attention == "efficient"
    assert room_of(hardware.find("radeon-pro-w6800")).target.attention == "math"
    assert room_of(hardware.find("rtx-4090"), budget=8 * 2**30).total == 8 * 2**30


def test_every_card_has_what_planning_reads() -> None:
    for facts in hardware.TABLE.values():
        assert facts.half_flops >= facts.float32_flops > 0, facts.name
        assert facts.source.startswith("https://")
        assert facts.supports_bf16 or facts.lacks
