"""What the tests of memory share: a small blueprint, and the script that measures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tunekit import families
from tunekit.families.blueprint import Blueprint


@pytest.fixture(scope="session")
def tiny() -> Blueprint:
    return families.blueprint_of("sd15", "tiny")


@pytest.fixture(scope="session")
def script() -> Any:
    """scripts/measure_memory.py, which reads the allocator's own record."""
    path = Path(__file__).resolve().parents[2] / "scripts" / "measure_memory.py"
    spec = importlib.util.spec_from_file_location("measure_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
