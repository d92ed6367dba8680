"""Steps that take the middle of the denoiser from an earlier step: the same on every runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tunekit.config import CacheConfig, SamplingConfig
from tunekit.diffusion.metrics import psnr_db
from tunekit.errors import ConfigError, ModelError
from tunekit.runtime import Runtime, generate_pixels, open_runtime
from tunekit.runtime.step_cache import Node, StepCache, cut, needed

SIX = SamplingConfig(steps=6, guidance=3)
CACHED = SIX.model_copy(update={"cache": CacheConfig(interval=3, order=1)})


class Noted:
    """A denoiser whose middle gives the time of its step, for each row."""

    def __init__(self) -> None:
        self.said: list[tuple[str, float]] = []

    def whole(self, call: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        rows = call()
        self.said.append(("whole", float(self.time)))
        return rows, [torch.full((len(rows), 1), float(self.time))]

    def outer(self, given: Sequence[Tensor], call: Callable[[], Tensor]) -> Tensor:
        assert len(given[0]) == len(call())
        self.said.append(("outer", float(given[0][-1])))
        return call()

    def run(self, config: CacheConfig, steps: Sequence[tuple[float, int]]) -> list[tuple[str, float]]:
        denoiser = StepCache(lambda rows, times, told: rows, self, config)
        for self.time, rows in steps:
            denoiser(torch.zeros(rows, 1), torch.full((rows,), self.time), {})
        return self.said


def test_which_steps_are_whole_and_what_the_others_take() -> None:
    steps = [(900.0, 2), (700.0, 2), (600.0, 2), (500.0, 2), (400.0, 2)]
    assert Noted().run(CacheConfig(interval=3), steps) == [
        *(("whole", 900.0), ("outer", 900.0), ("outer", 900.0)),
        *(("whole", 500.0), ("outer", 500.0)),
    ]
    # A straight line through 900 and 500 is right at every time.
    assert Noted().run(CacheConfig(interval=3, order=1), steps)[-1] == ("outer", 400.0)
    ends = [(900.0, 2), (700.0, 1), (600.0, 1), (500.0, 1)]
    assert [kind for kind, _ in Noted().run(CacheConfig(interval=2), ends)] == [
        *("whole", "outer", "whole", "outer"),
    ]
    begins = [(900.0, 1), (700.0, 2), (600.0, 2), (500.0, 2)]
    assert [kind for kind, _ in Noted().run(CacheConfig(interval=4, order=1), begins)] == [
        *("whole", "whole", "outer", "outer"),
    ]
    # The step before knew fewer rows, so there is no line for all of them.
    begins = [(900.0, 1), (700.0, 2), (600.0, 2)]
    assert Noted().run(CacheConfig(interval=4, order=1), begins)[-1] == ("outer", 700.0)


def test_where_a_graph_is_cut() -> None:
    nodes = [
        Node(["sample", "w"], ["a"]),
        Node(["time"], ["t"]),
        Node(["a", "t"], ["skip"]),
        Node(["packed", "scale"], ["unpacked"]),  # a weight of the middle, in few bits
        Node(["skip", "unpacked"], ["down"]),
        Node(["down", "t"], ["mid"]),
        Node(["mid", "last"], ["up"]),
        Node(["up", "skip"], ["join"]),
        Node(["join", "t", "w"], ["out"]),
    ]
    constants = {"w", "packed", "scale", "last"}
    assert cut(nodes, constants, {"packed", "last"}) == ["up"]
    assert cut(nodes, constants, {"packed"}) == ["down"]
    assert cut(nodes, constants, set()) == []
    shaped = [*nodes[:7], Node(["mid"], ["size"], is_shape=True), Node(["up", "size"], ["out"])]
    assert cut(shaped, constants, {"packed", "last"}) == ["mid", "up"]  # and not the size
    biased = [
        *nodes[:7],
        Node(["bias", "up"], ["b"]),
        Node(["up", "b"], ["sum"]),
        Node(["sum", "skip"], ["join"]),
    ]
    assert cut(biased, {*constants, "bias"}, {"packed", "last", "bias"}) == ["sum"]
    assert needed(nodes, ["out"], ["up"]) == [0, 1, 2, 7, 8]


def test_a_middle_that_gives_other_rows_than_it_is_given() -> None:
    split = SimpleNamespace(whole=lambda call: (call(), [torch.zeros(1, 4)]))
    denoiser = StepCache(lambda rows, times, told: rows, split, CacheConfig(interval=2))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="gives 1 for 2 rows"):
        denoiser(torch.zeros(2, 1), torch.zeros(2), {})


@pytest.fixture(scope="module")
def eager(tiny_source: Path) -> Runtime:
    return open_runtime(tiny_source, device="cpu", dtype="fp32")


def draw(runtime: Runtime, sampling: SamplingConfig) -> Tensor:
    return generate_pixels(runtime, ["a cat", "the moon"], sampling, seeds=[1, 2])


def test_torch_and_graphs_draw_the_same(
    eager: Runtime, tiny_onnx: Path, tiny_irs: Callable[[str], Path]
) -> None:
    early = CACHED.model_copy(update={"guidance_interval": (0.0, 0.5)})
    expected = [draw(eager, sampling) for sampling in (SIX, CACHED, early)]
    assert 20 < psnr_db(expected[1], expected[0]) < 90
    for folder, options in ((tiny_onnx, {}), (tiny_onnx, {"provider": "openvino"}), (tiny_irs("sd15"), {})):
        runtime = open_runtime(folder, device="cpu", **options)  # type: ignore[arg-type]
        for sampling, wanted in zip((CACHED, early, SIX), (*expected[1:], expected[0]), strict=True):
            assert psnr_db(draw(runtime, sampling), wanted) > 70, runtime.title
        runtime.close()


def test_a_picture_does_not_depend_on_its_batch(eager: Runtime) -> None:
    alone = generate_pixels(eager, ["the moon"], CACHED, seeds=[2])
    assert psnr_db(draw(eager, CACHED)[1:], alone) > 90


def test_a_graph_that_does_not_name_its_middle(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = open_runtime(tiny_onnx, device="cpu")
    found = runtime.family.middle(runtime.pipeline.unet)
    other = SimpleNamespace(paths=("elsewhere.0",))
    with pytest.raises(ModelError, match=r"no weight begins with unet\.elsewhere\.0\.") as caught:
        runtime.take_apart(runtime, other)
    assert "export_onnx, which keeps the names" in str(caught.value)
    assert found.paths[-1] == "up_blocks.1.attentions.0"
    monkeypatch.setattr(runtime, "take_apart", None)
    with pytest.raises(ConfigError, match="steps cannot be cached with onnxruntime CPUExecutionProvider"):
        runtime.denoiser(CACHED)
