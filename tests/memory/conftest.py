"""What the tests of memory share: small sizes."""

from __future__ import annotations

import pytest

from tunekit import families
from tunekit.families import Sizes
from tunekit.kept import Kept


@pytest.fixture(scope="session")
def tiny() -> Sizes:
    return families.sizes_of("sd15", "tiny")


@pytest.fixture(scope="session")
def traces() -> Kept:
    """Where the command keeps its traces too: one job is traced once in a run of the tests."""
    return Kept.of("traces")
