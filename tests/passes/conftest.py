"""What the tests of passes share: families, and adapters that do something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunekit import families
from tunekit.artifacts import Artifact, Step
from tunekit.config import AdapterConfig


@pytest.fixture(scope="session", params=families.runnable())
def family(request: pytest.FixtureRequest) -> Any:
    """Each family that runs."""
    return families.get(request.param)


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Artifact]:
    """`make_adapter(family, folder, base, **settings)`: one that changes every layer it is on."""
    import torch

    from tunekit.adapters import add_adapter, save_adapter

    def make(family: Any, folder: Path, base: str | None, **config: Any) -> Artifact:
        settings = AdapterConfig(rank=4, alpha=2, **config)
        denoiser = family.denoiser(family.tiny())
        generator = torch.Generator().manual_seed(5)
        for name, parameter in add_adapter(denoiser, settings, family.facts.lora_targets):
            if "magnitude" not in name:
                parameter.data.normal_(0, 0.2, generator=generator)
        save_adapter(folder, denoiser, family, settings, name="test", title="test", base_source=None)
        step = Step(kind="train", artifact=folder.name)
        made = Artifact(folder, folder, "adapter", family.name, str(folder), lineage=(step,), base=base)
        return made.write()

    return make
