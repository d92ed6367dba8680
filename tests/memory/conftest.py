"""What the tests of memory share: small sizes."""

from __future__ import annotations

import pytest

from tunekit import families
from tunekit.families import Sizes


@pytest.fixture(scope="session")
def tiny() -> Sizes:
    return families.sizes_of("sd15", "tiny")
