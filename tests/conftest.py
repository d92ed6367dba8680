"""What all tests share: no network, no chatter, a tiny model on disk, and pictures."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Before anything imports a library that reads them; subprocesses inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Commands that the tests start read tunekit as it was compiled for the first of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# What is kept between runs (traces and plans above all) is kept for all tests, not beside the user's own.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _home = tempfile.TemporaryDirectory(prefix="tunekit-tests-")
    os.environ["XDG_CACHE_HOME"] = _home.name

ROOT = Path(__file__).resolve().parent.parent


LONG = [
    "passes/test_export_onnx.py",
    "recipes/test_families.py",
    "test_cli.py",
    "recipes/test_planned.py",
    "test_documents.py",
    "recipes/test_lora.py",
    "recipes/test_kept.py",
    "memory/test_trace.py",
    "memory/test_planner.py",
    "interop/test_optimum.py",
    "passes/test_build_tensorrt.py",
    "test_runtime.py",
    "passes/test_export_openvino.py",
    "passes/test_quantize.py",
    "passes/test_tune_sampler.py",
    "passes/test_search.py",
    "passes/test_distill.py",
    "passes/test_heal.py",
    "passes/test_models.py",
    "test_planning.py",
    "memory/test_levers.py",
    "passes/test_base.py",
    "families/test_against_peft.py",
    "passes/test_merge.py",
    "memory/test_job.py",
]
"""Files that take more than half a minute come first, so that no process is left alone at the end: one that
traces the graphs of all families, then some that need none, then those that find them."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """`each_family` is slow but for a family of each kind; long files come first, if tests are shared out.

    The marks are there before `-m` chooses, and the order is made after pytest has put tests with the same
    parameters together. Tests marked `gpu` are skipped where there is none; torch is asked only if there are
    such tests.
    """
    if long := [item for item in items if item.get_closest_marker("each_family")]:
        from tunekit import families

        kinds = {families.get(name).facts.denoiser_name: name for name in reversed(families.runnable())}
        for item in long:
            if not set(kinds.values()) & set(_parameters(item)):
                item.add_marker(pytest.mark.slow)
    yield
    if "PYTEST_XDIST_WORKER" in os.environ:
        rank = {ROOT / "tests" / name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: rank.get(item.path, len(rank)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


def _parameters(item: pytest.Item) -> list[Any]:
    """What a test was given: a family by its name among them."""
    given = getattr(item, "callspec", None)
    return [value for value in given.params.values() if isinstance(value, str)] if given else []


def pytest_collection_finish() -> None:
    """What nearly every file imports is loaded before the first test, whose time it is not."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        for name in ("tunekit.adapters", "diffusers.models", "onnxscript", "transformers.modeling_utils"):
            with suppress(ImportError):
                importlib.import_module(name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What is there before a test stays to the end: the garbage collector need not go through it again.

    Libraries, and what tracing leaves in the caches of sympy and torch, are millions of objects after a
    while, and a chain of passes collects garbage several times: seconds each.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], AbstractContextManager[Path]]:
    """`with once("models") as folder:` what is made in there, one process of the test run makes for all."""

    @contextmanager
    def hold(name: str) -> Iterator[Path]:
        fcntl = pytest.importorskip("fcntl")
        own = tmp_path_factory.getbasetemp()
        folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared" / name
        folder.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder

    return hold


@pytest.fixture(scope="session", autouse=True)
def traced_by_one(once: Callable[[str], AbstractContextManager[Path]]) -> Iterator[None]:
    """What one process traces, no other traces at the same time: it waits and finds the graph."""
    from tunekit.passes import onnx_graph

    real = onnx_graph.graph_of

    def graph_of(component: Any, opset: int) -> Any:
        with once(f"graph-{component.name}"):
            return real(component, opset)

    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("fcntl"):
            patch.setattr(onnx_graph, "graph_of", graph_of)
        yield


@pytest.fixture(scope="session")
def tiny_sources(once: Callable[[str], AbstractContextManager[Path]]) -> Callable[[str], Path]:
    """`tiny_sources("sdxl")`: a tiny pipeline with random weights, as diffusers saves it. Only to be read."""
    from tunekit import families
    from tunekit.artifacts import atomic_folder

    @cache
    def make(name: str) -> Path:
        family = families.get(name)
        with once(f"tiny-{name}") as shared:
            folder = shared / name
            if not folder.exists():
                with atomic_folder(folder) as made:
                    family.save(family.tiny(), made)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_onnxs(
    tiny_sources: Callable[[str], Path], once: Callable[[str], AbstractContextManager[Path]]
) -> Callable[[str], Path]:
    """`tiny_onnxs("sdxl")`: that pipeline as an fp32 ONNX artifact; it takes a while. Only to be read."""
    from tunekit.artifacts import open_artifact
    from tunekit.passes.base import Context, run_chain
    from tunekit.passes.export_onnx import ExportOnnx

    @cache
    def make(name: str) -> Path:
        source = open_artifact(tiny_sources(name), family=name)
        with once(f"onnx-{name}") as folder:
            made = run_chain([ExportOnnx()], source, Context(run_dir=folder, say=lambda line: None))
        assert made.path is not None
        return made.path

    return make


@pytest.fixture(scope="session")
def tiny_irs(
    tiny_onnxs: Callable[[str], Path], once: Callable[[str], AbstractContextManager[Path]]
) -> Callable[[str], Path]:
    """`tiny_irs("sdxl")`: that ONNX artifact as one of OpenVINO, in fp32. Only to be read."""
    pytest.importorskip("openvino")
    from tunekit.artifacts import Artifact
    from tunekit.passes.base import Context, run_chain
    from tunekit.passes.export_openvino import ExportOpenvino

    @cache
    def make(name: str) -> Path:
        source = Artifact.load(tiny_onnxs(name))
        with once(f"openvino-{name}") as folder:
            made = run_chain([ExportOpenvino()], source, Context(run_dir=folder, say=lambda line: None))
        assert made.path is not None
        return made.path

    return make


@pytest.fixture(scope="session")
def tiny_source(tiny_sources: Callable[[str], Path]) -> Path:
    """The tiny SD 1.x pipeline."""
    return tiny_sources("sd15")


@pytest.fixture(scope="session")
def tiny_onnx(tiny_onnxs: Callable[[str], Path]) -> Path:
    """The tiny SD 1.x pipeline as an ONNX artifact."""
    return tiny_onnxs("sd15")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of a few thousand weights."""
    import json

    import torch
    from transformers import CLIPConfig, CLIPModel

    from tunekit.families.tiny import clip_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer(max_length=77)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**shared, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**shared, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="session")
def fill() -> Callable[..., Path]:
    """`fill(folder, a="1", sub__b="2")` writes these texts to the files `a` and `sub/b` in it."""

    def write(folder: Path, **files: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return folder

    return write


@pytest.fixture(scope="session")
def make_pictures() -> Callable[..., Path]:
    """`make_pictures(folder, count=4, size=(64, 64), captions=True)` fills a folder."""
    import numpy as np
    from PIL import Image

    def make(
        folder: Path,
        count: int = 4,
        size: tuple[int, int] = (64, 64),
        *,
        captions: bool = True,
        seed: int = 0,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        width, height = size
        draw = np.random.default_rng(seed)
        y, x = np.mgrid[0:height, 0:width]
        for index in range(count):
            color, other = draw.integers(0, 256, (2, 3))
            radius = draw.uniform(0.2, 0.45) * min(size)
            inside = (x - width / 2) ** 2 + (y - height / 2) ** 2 < radius**2
            pixels = np.where(inside[..., None], color, other).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:02d}.png")
            if captions:
                (folder / f"{index:02d}.txt").write_text(f"a disc number {index}", encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, make_pictures: Callable[..., Path]) -> Path:
    """Four captioned 64 x 64 pictures. Do not write into it."""
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def tunekit_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`tunekit_command("ls", cwd=...)` runs the command in a process of its own and returns what it said."""

    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **options.pop("env", {})}  # type: ignore[dict-item]
        command = [sys.executable, "-m", "tunekit", *map(str, arguments)]
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            command,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            **{"timeout": 300, **options},
        )

    return run


@pytest.fixture(scope="session")
def unread() -> Callable[[Any], frozenset[str]]:
    """`unread(family)` is the layers of its tiny denoiser that change no prediction.

    What the last block of some networks computes of the text is left behind; diffusers and peft put an
    adapter on it all the same.
    """

    @cache
    def layers(family: Any) -> frozenset[str]:
        import torch

        from tunekit.families import Frame

        pipeline = family.tiny()
        denoiser, size = family.denoiser(pipeline), family.default_size(pipeline)
        noisy = torch.randn(1, *family.latent_shape(pipeline, *size))
        told = family.conditioning(family.encode_prompt(pipeline, ["a"]), Frame.whole(*size).rows(1))
        family.denoise(denoiser, noisy, torch.tensor([500.0]), told).square().sum().backward()
        return frozenset(
            name.removesuffix(".weight")
            for name, parameter in denoiser.named_parameters()
            if parameter.grad is None or not parameter.grad.any()
        )

    return layers


@pytest.fixture(scope="session")
def script() -> Any:
    """scripts/measure_memory.py, which reads the allocator's own record."""
    path = Path(__file__).resolve().parents[1] / "scripts" / "measure_memory.py"
    spec = importlib.util.spec_from_file_location("measure_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`shell("queue", "list")` is what the command says, in this process."""
    from tunekit import cli

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["tunekit", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        assert (left.value.code or 0) == code, said
        return str(said.out + said.err)

    return run
