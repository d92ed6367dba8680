"""What is fastest is found, kept where all read it, and used on the machine that it was measured on alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunekit import hardware
from tunekit.artifacts import Artifact
from tunekit.config import RuntimeConfig, SamplingConfig
from tunekit.errors import ChainError, ConfigError
from tunekit.passes import tune_runtime
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
from tunekit.runtime import generate_pixels, open_runtime, remarks

TWO = SamplingConfig(steps=2, guidance=3)
Speed = Callable[[RuntimeConfig | None], float]


def run(chain: list[Any], artifact: Artifact, folder: Path) -> tuple[Artifact, list[str]]:
    said: list[str] = []
    context = Context(run_dir=folder, device="cpu", prompts=("a cat",), sampling=TWO, say=said.append)
    return run_chain(parse_chain(chain), artifact, context), said


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Speed], None]:
    """Calls and pictures that take as long as is said."""

    def tell(speed: Speed) -> None:
        real, clock = tune_runtime._Pair.call, [0.0]

        def call(pair: Any, runtime: Any) -> tuple[float, Any]:
            return speed(runtime.settings), real(pair, runtime)[1]

        def drawn(runtime: Any, *args: Any, **options: Any) -> Any:
            clock[0] += speed(runtime.settings)
            return generate_pixels(runtime, *args, **options)

        monkeypatch.setattr(tune_runtime._Pair, "call", call)
        monkeypatch.setattr("tunekit.runtime.generate_pixels", drawn)
        monkeypatch.setattr(tune_runtime.time, "perf_counter", lambda: clock[0])

    return tell


def slow_unless(**wanted: object) -> Speed:
    """10 ms, and a fifth less for each setting that is so."""

    def speed(settings: RuntimeConfig | None) -> float:
        right = [key for key, value in wanted.items() if settings and getattr(settings, key) == value]
        return 10 * 0.8 ** len(right)

    return speed


def test_the_fastest_is_kept_and_used_here_alone(
    tiny_onnx: Path, tmp_path: Path, timed: Callable[[Speed], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Artifact.load(tiny_onnx)
    timed(slow_unless(threads=1, rows=1, arena=False))
    chain: list[Any] = [{"tune_runtime": {"threads": [1], "rounds": 4, "pictures": 1}}]
    chain.append({"verify": {"pictures": 1, "providers": ["cpu"]}})
    last, said = run(chain, start, tmp_path)
    tuned, verified = last.lineage[-2:]
    chosen = last.runtime
    assert chosen is not None and chosen.choices == {"threads": 1, "rows": 1, "arena": False}
    assert any("1 thread, 1 row a call, no arena; a picture 1.95x as fast, 1" in line for line in said)
    assert tuned.metrics["runtime_speedup"] == pytest.approx(1 / 0.8**3)
    assert [row["settings"] for row in tuned.details["tried"] if row["taken"]] == [chosen.words]
    assert verified.metrics["psnr_db"] > 100 and last.source == start.source and last.hash == start.hash

    runtime = open_runtime(last, device="cpu")
    unet = runtime.pipeline.unet.graph
    assert runtime.settings == chosen and runtime.threads == 1 and unet.max_rows == 1
    assert unet.session.get_session_options().intra_op_num_threads == 1
    assert not unet.session.get_session_options().enable_cpu_mem_arena
    assert runtime.pipeline.vae.decoder.graph.max_rows is None
    assert not any("measured" in line for line in remarks(runtime, ["a cat"], TWO))
    assert open_runtime(last, device="cpu", threads=2).threads == 2  # who asks is heard

    monkeypatch.setattr(hardware, "machine", lambda: "another")
    elsewhere = open_runtime(last, device="cpu")
    assert elsewhere.settings is None and elsewhere.pipeline.unet.graph.max_rows is None
    assert any(
        "(1 thread, 1 row a call, no arena) were measured with onnxruntime CPUExecutionProvider" in line
        for line in remarks(elsewhere, ["a cat"], TWO)
    )


def test_what_is_not_clearly_faster_or_not_the_same_is_left(
    tiny_onnx: Path, tmp_path: Path, timed: Callable[[Speed], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Artifact.load(tiny_onnx)
    timed(lambda settings: 10.0 if not settings or not settings.choices else 9.8)
    last, said = run([{"tune_runtime": {"threads": [1], "rounds": 4, "pictures": 1}}], start, tmp_path)
    assert last.runtime is not None and not last.runtime.choices
    assert any("nothing beats its own settings by 3%" in line for line in said)

    timed(slow_unless(threads=1))
    real = tune_runtime._Pair.call

    def other(pair: Any, runtime: Any) -> tuple[float, Any]:
        took, made = real(pair, runtime)
        return took, made * 1.01 if runtime.settings and runtime.settings.threads else made

    monkeypatch.setattr(tune_runtime._Pair, "call", other)
    last, said = run([{"tune_runtime": {"threads": [1], "rounds": 5, "pictures": 1}}], start, tmp_path)
    assert last.runtime is not None and not last.runtime.choices
    assert any("1.25x, but it computes something else (relative error 0.01)" in line for line in said)


def test_openvino_has_settings_too(
    tiny_irs: Callable[[str], Path], tmp_path: Path, timed: Callable[[Speed], None]
) -> None:
    start = Artifact.load(tiny_irs("sd15"))
    timed(slow_unless(threads=1, rows=1, pinning=True))
    last, _ = run([{"tune_runtime": {"threads": [1], "rounds": 4, "pictures": 1}}], start, tmp_path)
    assert last.runtime is not None and last.runtime.runtime == "openvino f32 CPU"
    assert last.runtime.choices == {"threads": 1, "rows": 1, "pinning": True}
    runtime = open_runtime(last, device="cpu")
    graph = runtime.pipeline.unet.graph
    assert graph.max_rows == 1 and graph.compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_bad_input(tiny_source: Path) -> None:
    for settings, format, message in (
        ({"threads": [9999]}, "onnx", "has threads 9999 to try, and this machine has 1 to"),
        ({"provider": "cpu"}, "openvino", "provider, which has no effect on a model in openvino"),
        ({}, "torch", "needs an onnx model or an openvino model but the chain starts with torch"),
    ):
        with pytest.raises(ChainError, match=message):
            check_chain(parse_chain([{"tune_runtime": settings}]), format)
    torch = open_runtime(tiny_source, device="cpu")
    with pytest.raises(ConfigError, match="torch fp32 cpu has no settings to choose"):
        torch.with_settings(RuntimeConfig(runtime="x", machine="y"))
