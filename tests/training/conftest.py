"""An accelerator that the next test does not find again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
