"""What the tests of memory share: a small blueprint."""

from __future__ import annotations

import pytest
from tunekit.families.blueprint import Blueprint

from tunekit import families


@pytest.fixture(scope="session")
def tiny() -> Blueprint:
    return families.blueprint_of("sd15", "tiny")
