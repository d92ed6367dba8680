"""OpenVINO's own files: layout and names, what they compute, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit import families, install
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.diffusion.metrics import psnr_db, relative_error
from tunekit.errors import ChainError, VerificationFailed
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
from tunekit.passes.export_openvino import MAX_RELATIVE_ERROR
from tunekit.runtime import generate_pixels, open_runtime

openvino = pytest.importorskip("openvino")

PROMPTS = ("a red cat", "the moon")
FEW = SamplingConfig(steps=3)


def run(chain: list[Any], source: Path | Artifact, folder: Path, family: str = "sd15") -> Artifact:
    given = source if isinstance(source, Artifact) else open_artifact(source, family=family)
    context = Context(run_dir=folder, prompts=PROMPTS, sampling=FEW, device="cpu", say=lambda line: None)
    return run_chain(parse_chain(chain), given, context)


def draw(source: Artifact | Path, **options: Any) -> torch.Tensor:
    return generate_pixels(open_runtime(source, device="cpu", **options), PROMPTS, FEW, seeds=[0, 1])


def test_layout_and_names_are_those_that_optimum_intel_expects(
    family: Any, tiny_irs: Callable[[str], Path], tiny_onnxs: Callable[[str], Path]
) -> None:
    """One name for each input and output, in the order of the ONNX graphs: it goes by both."""
    folder, facts = tiny_irs(family.name), family.facts
    artifact = Artifact.load(folder)
    assert artifact.format == "openvino" and artifact.step is not None
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == facts.pipeline_class
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    known = {
        path.relative_to(tiny_onnxs(family.name)).as_posix()
        for path in tiny_onnxs(family.name).rglob("*")
        if path.is_file() and not path.name.startswith("model.onnx")
    }
    parts = family.export_components(family.tiny())
    for part in parts:
        known |= {f"{part.name}/openvino_model.{ending}" for ending in ("xml", "bin")}
        graph = openvino.Core().read_model(folder / part.name / "openvino_model.xml")
        assert [value.names for value in graph.inputs] == [{name} for name in part.inputs]
        assert [value.names for value in graph.outputs] == [{name} for name in part.outputs]
        config = json.loads((folder / part.name / "config.json").read_text())
        assert config["openvino"] == {"precision": "fp32"}
        assert index[part.name] == ["openvino", "Model"]
        assert str(folder.parent) not in (folder / part.name / "openvino_model.xml").read_text()
    assert there == known
    metrics = artifact.step.metrics
    print(family.name, {name: value for name, value in metrics.items() if "error" in name})
    assert {row["component"] for row in artifact.step.details["components"]} == {part.name for part in parts}
    assert 0 < metrics["relative_error"] < MAX_RELATIVE_ERROR["fp32"]  # type: ignore[operator]
    assert metrics["size_bytes"] == artifact.size_bytes


@pytest.fixture(scope="module")
def narrow(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny model, from torch, in bf16; looked at as a chain does."""
    chain = [
        {"export_openvino": {"precision": "bf16"}},
        {"verify": {"pictures": 1, "steps": 2}},
        {"benchmark": {"repeats": 1, "steps": 1, "memory": False}},
    ]
    return run(chain, tiny_source, tmp_path_factory.mktemp("narrow"))


def test_a_torch_model_becomes_one_in_bf16(
    narrow: Artifact, tiny_source: Path, tiny_irs: Callable[[str], Path]
) -> None:
    step = next(step for step in narrow.lineage if step.kind == "export_openvino")
    print(step.metrics)
    assert 1e-4 < step.metrics["relative_error"] < MAX_RELATIVE_ERROR["bf16"]  # type: ignore[operator]
    assert narrow.size_bytes < 0.8 * Artifact.load(tiny_irs("sd15")).size_bytes
    assert not list(Path(narrow.source).glob(".*"))
    runtime = open_runtime(narrow, device="cpu")
    taken = runtime.pipeline.unet.graph.precision
    assert runtime.title == f"openvino {taken} CPU" and taken in ("bf16", "f32")
    drawn, whole = draw(narrow), draw(tiny_source, family="sd15")
    assert psnr_db(drawn, whole) > 25
    assert psnr_db(draw(narrow, dtype="fp32"), whole) > 45  # weights were rounded to 16 bits


def test_it_is_looked_at_like_any_other(narrow: Artifact) -> None:
    verify, benchmark = narrow.lineage[-2:]
    assert verify.metrics["psnr_db"] > 25 and "openvino" in verify.details["runtimes"][0]["runtime"]
    assert benchmark.metrics["denoiser_ms_p50"] > 0 and benchmark.metrics["speedup"] > 0


def test_graphs_in_int8_stay_so(tiny_onnx: Path, tmp_path: Path) -> None:
    chain = [{"quantize": {"mode": "static", "samples": 8}}, "export_openvino"]
    made = run(chain, Artifact.load(tiny_onnx), tmp_path)
    parent = open_artifact(next(tmp_path.glob("*quantize*")))
    print(made.lineage[-1].metrics)
    weights = sum(path.stat().st_size for path in Path(made.source).glob("*/openvino_model.bin"))
    assert weights < 1.1 * sum(path.stat().st_size for path in Path(parent.source).glob("*/model.onnx"))
    assert psnr_db(draw(made), draw(parent)) > 25
    with pytest.raises(ChainError, match="finds a model that is quantized already, by quantize"):
        check_chain(parse_chain([*chain, "quantize_openvino"]), "onnx")


def test_times_and_positions_are_fp32_whatever_is_computed_in(
    family: Any, tiny_irs: Callable[[str], Path], tiny_onnxs: Callable[[str], Path]
) -> None:
    """Rounded, the latest times alone put random denoisers off by 0.15 to 0.57."""
    from tunekit.runtime.openvino import OpenVinoGraph

    name = family.facts.denoiser_name
    (part,) = (part for part in family.export_components(family.tiny()) if part.name == name)
    random = torch.Generator().manual_seed(0)
    given = {
        key: torch.randn(value.shape, generator=random)
        if value.ndim > 2 and value.is_floating_point()
        else value
        for key, value in part.inputs.items()
    }
    graph = OpenVinoGraph(tiny_irs(family.name) / name / "openvino_model.xml", "CPU", torch.bfloat16, None)
    exact = OpenVinoGraph(tiny_irs(family.name) / name / "openvino_model.xml", "CPU", torch.float32, None)
    late = 999.0 if float(part.inputs["timestep"].max()) > 1 else 0.999
    feeds = {
        key: value.numpy()
        for key, value in (given | {"timestep": part.inputs["timestep"] * 0 + late}).items()
    }
    errors = [relative_error(*(torch.from_numpy(one.run(feeds)[part.outputs[0]]) for one in (graph, exact)))]
    if family.name == "sd15":  # an ONNX file is given the same
        other = OpenVinoGraph(tiny_onnxs(family.name) / name / "model.onnx", "CPU", torch.bfloat16, None)
        errors.append(
            relative_error(*(torch.from_numpy(one.run(feeds)[part.outputs[0]]) for one in (other, exact)))
        )
    print(family.name, errors)
    assert max(errors) < 0.03
    assert not rounded_angles(graph.compiled.get_runtime_model())


def rounded_angles(model: Any) -> list[str]:
    """What leads to a sine or cosine and is computed in 16 bits."""

    def told(op: Any, key: str) -> str:
        return str(op.get_rt_info()[key].astype(str))

    ways = [op for op in model.get_ops() if told(op, "layerType") == "Math"]
    found, seen = [], set()
    while ways:
        op = ways.pop()
        if op.get_friendly_name() in seen or told(op, "layerType") in ("FullyConnected", "MatMul", "Const"):
            continue
        seen.add(op.get_friendly_name())
        if told(op, "outputPrecisions") in ("bf16", "f16"):
            found.append(f"{told(op, 'layerType')} {told(op, 'originalLayersNames')}")
        ways += [op.input_value(port).get_node() for port in range(op.get_input_size())]
    return found


def test_a_component_that_overflows_computes_in_fp32(
    tiny_onnxs: Callable[[str], Path], tmp_path: Path
) -> None:
    name = next(name for name in families.runnable() if families.get(name).facts.overflowing)
    made = run([{"export_openvino": {"precision": "fp16"}}], Artifact.load(tiny_onnxs(name)), tmp_path)
    noted = {
        file.parent.name: json.loads(file.read_text())["openvino"]["precision"]
        for file in Path(made.source).glob("*/config.json")
    }
    overflowing = families.get(name).facts.overflowing
    whole = {part for part in noted if part.partition("_")[0] in overflowing or part in overflowing}
    assert {part for part, precision in noted.items() if precision == "fp32"} == whole
    assert whole and noted[families.get(name).facts.denoiser_name] == "fp16"


def test_what_computes_garbage_stops_the_chain(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunekit.runtime.openvino import OpenVinoGraph

    right = OpenVinoGraph.run

    def wrong(self: OpenVinoGraph, feeds: Any) -> Any:
        made = right(self, feeds)
        return (
            {name: value[..., ::-1].copy() for name, value in made.items()} if "out_sample" in made else made
        )

    monkeypatch.setattr(OpenVinoGraph, "run", wrong)
    with pytest.raises(VerificationFailed, match="unet in OpenVINO differs from its parent by"):
        run(["export_openvino", "benchmark"], Artifact.load(tiny_onnx), tmp_path)
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir() if path.is_dir()] == ["01"]


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(chain: list[Any], start: str = "torch") -> str:
        with pytest.raises(ChainError) as caught:
            check_chain(parse_chain(chain), start)
        return str(caught.value)

    assert "whose packed weights it would unpack" in refused(["quantize", "export_openvino"])
    assert "merge" in refused(["export_openvino"], "adapter")
    message = refused(["export_openvino", "quantize"])
    assert "needs an onnx model or a torch model but the step before it gives openvino" in message
    assert "quantize_openvino" in message
    assert "no effect on a model in openvino" in refused(
        ["export_openvino", {"verify": {"providers": ["cpu"]}}]
    )
    monkeypatch.setitem(sys.modules, "openvino", None)
    for chain in (["export_openvino"], ["export_onnx", "export_openvino"]):
        assert f'needs the package "openvino": {install.with_extra("openvino")}' in refused(chain)
    assert "(provider openvino)" in refused(["benchmark"], "openvino")
