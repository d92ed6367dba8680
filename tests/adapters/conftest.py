"""What the tests of adapters share: adapters that were trained, their files, and what they do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunekit import families
from tunekit.adapters import add_adapter, save_adapter
from tunekit.config import AdapterConfig
from tunekit.families import Family, Frame

Trained = Callable[[Family, AdapterConfig], Any]
Save = Callable[..., tuple[Path, Path]]
Predict = Callable[[Family, Any], Tensor]


@pytest.fixture(scope="session", params=families.runnable())
def family(request: pytest.FixtureRequest) -> Family:
    return families.get(request.param)


@pytest.fixture(scope="session")
def train() -> Callable[..., None]:
    """`train(parameters)` moves every parameter, as training would."""

    def move(parameters: list[tuple[str, torch.nn.Parameter]], seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in parameters:
                if "magnitude" in name:
                    parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=draw))
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))

    return move


@pytest.fixture(scope="session")
def trained(train: Callable[..., None]) -> Trained:
    """`trained(family, config)` is a tiny pipeline whose denoiser has an adapter that does something."""

    def make(family: Family, config: AdapterConfig) -> Any:
        pipeline = family.tiny()
        train(add_adapter(family.denoiser(pipeline), config, family.facts.lora_targets))
        family.denoiser(pipeline).eval()
        return pipeline

    return make


@pytest.fixture(scope="session")
def save() -> Save:
    """`save(folder, pipeline, family, config)` writes both files of the denoiser's adapter."""

    def write(
        folder: Path, pipeline: Any, family: Family, config: AdapterConfig, **options: Any
    ) -> tuple[Path, Path]:
        options = {"name": "style", "title": "A style", **options}
        return save_adapter(folder, family.denoiser(pipeline), family, config, **options)

    return write


@pytest.fixture(scope="session")
def predict() -> Predict:
    """`predict(family, pipeline)` is what the denoiser says of two noisy pictures and prompts."""

    def say(family: Family, pipeline: Any) -> Tensor:
        multiple = family.resolution_multiple(pipeline)
        size = 8 * multiple, 8 * multiple
        shape = family.latent_shape(pipeline, *size)
        noisy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        told = family.conditioning(family.encode_prompt(pipeline, ["a", "b"]), Frame.whole(*size).rows(2))
        return family.denoise(family.denoiser(pipeline), noisy, torch.tensor([9.0, 800.0]), told)

    return say


@pytest.fixture(scope="session")
def load_in_diffusers() -> Callable[[Any, Path], None]:
    """`load_in_diffusers(pipeline, file or folder)` as the version of diffusers that is here does it."""
    import diffusers

    def load(pipeline: Any, adapter: Path) -> None:
        if diffusers.__version__ >= "0.42":
            pipeline.load_lora_weights(str(adapter))
        else:  # asks for the name when there is no network
            file = adapter / "pytorch_lora_weights.safetensors" if adapter.is_dir() else adapter
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name)

    return load
