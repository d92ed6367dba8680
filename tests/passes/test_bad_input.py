"""What goes wrong in the middle: each is one clear line, and leaves nothing that looks like a model."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from tunekit import families, workspace
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import DataConfig, SamplingConfig
from tunekit.errors import (
    ArtifactError,
    ChainError,
    ModelError,
    NonFiniteError,
    OutputError,
    TunekitError,
    VerificationFailed,
)
from tunekit.passes import export_onnx, quantize_onnx
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
from tunekit.runtime import generate, open_runtime

PROMPTS = ("a cat", "a dog", "a house", "a tree")


def run(
    chain: Sequence[Any], source: Path | Artifact, folder: Path, said: list[str] | None = None
) -> Artifact:
    lines = said if said is not None else []
    start = source if isinstance(source, Artifact) else open_artifact(source, family="sd15")
    context = Context(
        run_dir=folder / "run",
        prompts=PROMPTS,
        device="cpu",
        sampling=SamplingConfig(steps=2, guidance=2),
        say=lines.append,
    )
    return run_chain(parse_chain(chain), start, context)


def clear(error: TunekitError) -> str:
    """The message, which is one line, and perhaps another that says what to change."""
    text = str(error)
    assert len(text.splitlines()) <= 2 and (error.where or error.hint), text
    return text


def made(folder: Path) -> list[str]:
    """Passes whose folders are there, hidden ones too."""
    return sorted(path.name for path in (folder / "run").glob("*") if path.is_dir())


# A runtime that answers and computes something else ---------------------------------------------------------


def test_what_was_found_wrong_is_not_taken_for_a_model(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is kept for the figures, and opens as a model nowhere."""
    monkeypatch.setattr(export_onnx, "graph_error", lambda path, inputs, expected: 0.7)
    with pytest.raises(VerificationFailed, match=r"in onnxruntime differs from torch by 0\.7 of its size"):
        run(["export_onnx"], tiny_source, tmp_path)
    (folder,) = (tmp_path / "run").glob("01-export_onnx-*")
    assert Artifact.load(folder).lineage[-1].metrics["relative_error"] == 0.7  # what the report shows
    for source in (folder, tmp_path / "run"):
        for use in (open_artifact, open_runtime, lambda path: next(workspace.draw(str(path), ["a"]))):
            with pytest.raises(ArtifactError, match="export_onnx ended with a failure") as caught:
                use(source)
            assert str(folder) in clear(caught.value)


# Ranges that were measured on other calls -------------------------------------------------------------------


def test_ranges_that_do_not_hold(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = quantize_onnx._apart

    def blank(calls: Any, count: int) -> Any:
        tested, seen = real(calls, count)
        return tested, [
            (latents * 0, time * 0, {key: value * 0 for key, value in told.items()})
            for latents, time, told in seen
        ]

    monkeypatch.setattr(quantize_onnx, "_apart", blank)
    with pytest.raises(ArtifactError, match=r"measured on 4 calls of the unet do not hold") as caught:
        run([{"quantize": {"samples": 4}}], Artifact.load(tiny_onnx), tmp_path)
    assert "samples" in clear(caught.value) and "preview.prompts" in str(caught.value)
    assert made(tmp_path) == []


@pytest.mark.slow
def test_ranges_of_prompts_without_sense(tmp_path: Path) -> None:
    """A real model, whose first prompts are not what it was trained to draw."""
    said: list[str] = []
    context = Context(
        run_dir=tmp_path,
        prompts=("qwx zzv", "0 0 0", "lorem ipsum dolor", "!!!!"),
        data=DataConfig(path="builtin/pictures/style", resolution=64),
        device="cpu",
        say=said.append,
    )
    keep = list(families.get("sd15").facts.denoiser.sensitive)
    chain = parse_chain(["export_onnx", {"quantize": {"samples": 4, "keep": keep}}])
    made = run_chain(chain, open_artifact("builtin/emoji-64", family="sd15"), context)
    (line,) = (line for line in said if "do not hold for others" in line)
    assert "measured on 4 calls of the unet" in line and "preview.prompts" in line
    assert made.lineage[-1].details["note"] in line


# Weights beside a graph -------------------------------------------------------------------------------------


@pytest.fixture
def outside(tiny_onnx: Path, tmp_path: Path) -> Path:
    """A folder of another program, whose U-Net has its weights in a file beside it."""
    folder = shutil.copytree(tiny_onnx, tmp_path / "model")
    (folder / "artifact.json").unlink()
    graph = folder / "unet" / "model.onnx"
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="weights.bin", size_threshold=64)
    return folder


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_weights_that_were_cut(outside: Path, provider: str) -> None:
    if provider == "openvino":
        pytest.importorskip("openvino")
    weights = outside / "unet" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-4000])
    with pytest.raises(ModelError) as caught:
        open_runtime(outside, family="sd15", device="cpu", provider=provider)
    assert str(outside / "unet") in clear(caught.value)
    weights.unlink()
    with pytest.raises(ModelError) as caught:
        open_runtime(outside, family="sd15", device="cpu", provider=provider)
    assert str(outside / "unet") in clear(caught.value)


def test_weights_that_are_no_numbers(outside: Path) -> None:
    weights = outside / "unet" / "weights.bin"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    runtime = open_runtime(outside, family="sd15", device="cpu", provider="cpu")
    with pytest.raises(NonFiniteError, match="the denoiser gives them in step 1 of 1"):
        generate(runtime, ["a"], SamplingConfig(steps=1), seeds=[0])


def test_weights_of_an_artifact_are_known(tiny_onnx: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_onnx, tmp_path / "model")
    graph = folder / "unet" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"unet/model\.onnx does not hold what was written") as caught:
        open_runtime(folder)
    clear(caught.value)


# A disk that gets full --------------------------------------------------------------------------------------


@contextmanager
def disk_of(bytes: int) -> Iterator[None]:
    """Files get no larger than this, whoever writes them."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize(
    ("chain", "is_graph"),
    [
        ([{"quantize": {"scheme": "int8"}}], False),
        ([{"export_onnx": {"external_data_threshold": 0}}], False),
        (["export_onnx"], False),
        ([{"quantize": {"mode": "weight_only"}}], True),
        (["export_openvino"], True),
    ],
    ids=["safetensors", "external data", "onnx", "quantized onnx", "openvino"],
)
def test_a_full_disk_in_the_middle_of_a_pass(
    chain: list[Any], is_graph: bool, tiny_source: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    if chain == ["export_openvino"]:
        pytest.importorskip("openvino")
    source = Artifact.load(tiny_onnx) if is_graph else open_artifact(tiny_source, family="sd15")
    with disk_of(60_000), pytest.raises(OutputError, match="could not write") as caught:
        run(chain, source, tmp_path)
    assert str(tmp_path) in clear(caught.value)
    assert made(tmp_path) == []
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / "run")


# Steps that a student was not made for ----------------------------------------------------------------------


def test_a_student_in_other_steps(tiny_source: Path, tmp_path: Path) -> None:
    tuned = {"tune_sampler": {"steps": 2, "samplers": ["ddim"], "pictures": 1}}
    said: list[str] = []
    last = run([tuned, {"verify": {"steps": 3, "pictures": 1}}], tiny_source, tmp_path, said)
    line = "tune_sampler made this model for 2 sampling steps, and 3 are asked for"
    assert any(line in text for text in said)
    assert line in last.lineage[-1].details["note"]


# A search that nothing satisfies ----------------------------------------------------------------------------


def test_a_budget_that_nothing_meets(tiny_source: Path, tmp_path: Path) -> None:
    search = {
        "keep": {"psnr": 149, "ssim": 0.5},
        "minimize": "size",
        "target": "cpu",
        "passes": [{"quantize": [{"mode": "weight_only"}]}],
        "pictures": 2,
    }
    with pytest.raises(ChainError, match=r"none of 2 trials keeps PSNR 149.0 dB and SSIM 0.5000") as caught:
        run([{"search": search}], tiny_source, tmp_path)
    text = clear(caught.value)
    assert "nearest came" in text and "lower what must be kept" in text
    assert made(tmp_path) == ["search"]  # the trials, of which another search makes none twice
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / "run")


# Targets and engines that are not here ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "package"),
    [
        (["export_onnx"], "onnxruntime"),
        ([{"search": {"target": "cpu"}}], "onnxruntime"),
        ([{"search": {"target": "openvino"}}], "openvino"),
        (["export_openvino"], "openvino"),
        (["export_onnx", {"build_tensorrt": {"devices": ["rtx-4090"]}}], "tensorrt_rtx"),
    ],
)
def test_a_target_that_is_not_installed(
    chain: list[Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else real(name)
    )
    with pytest.raises(ChainError, match=f'needs the package "{package}": .*install') as caught:
        check_chain(parse_chain(chain), "torch")
    assert len(str(caught.value).splitlines()) == 1 and "optimize[" in str(caught.value)


def test_an_engine_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    from tunekit.runtime import tensorrt

    package = SimpleNamespace(
        __version__="1.9.0",
        Logger=type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None}),
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda content: None),
    )
    monkeypatch.setattr(tensorrt, "require", lambda *names, **options: package)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce RTX 4090")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "sm89.engine").write_bytes(b"engine")
    (tmp_path / "engines.json").write_text('{"tensorrt_rtx": "1.7.1.116"}')
    with pytest.raises(
        ModelError, match=r"1\.9\.0 cannot open it on .* it was built with 1\.7\.1\.116"
    ) as caught:
        tensorrt.EngineGraph(tmp_path / "unet" / "sm89.engine", torch.device("cpu"))
    assert "build them again" in clear(caught.value)
