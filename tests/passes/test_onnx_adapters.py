"""Adapters that are put on ONNX graphs: pictures as of the merged model, and nothing left of one behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tunekit import families, workspace
from tunekit.adapters import add_adapter, merge_adapter, save_adapter
from tunekit.adapters.attach import adaptable
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import AdapterConfig, SamplingConfig
from tunekit.diffusion.metrics import psnr_db
from tunekit.errors import AdapterError, ChainError, ConfigError, ModelError
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
from tunekit.passes.onnx_adapters import add_branches, without_branch
from tunekit.runtime import Runtime, generate_pixels, open_runtime, torch_runtime
from tunekit.runtime.swap import KEY, put_adapter, save_onnx_adapter

pytest.importorskip("onnx_ir")
FEW = SamplingConfig(steps=2)


def adapter(family: Any, folder: Path, seed: int, targets: list[str] | str | None = None, **how: Any) -> Path:
    """One that changes every layer it is on."""
    denoiser, draw = family.denoiser(family.tiny()), torch.Generator().manual_seed(seed)
    config = AdapterConfig(**{"rank": 3, "alpha": 2, **how}, targets=targets)  # type: ignore[arg-type]
    for name, parameter in add_adapter(
        denoiser, config, family.facts.lora_targets, presets=family.facts.presets
    ):
        if "magnitude" not in name:
            parameter.data.normal_(0, 0.2, generator=draw)
    save_adapter(folder, denoiser, family, config, name="test", title="test")
    return folder


def drawn(runtime: Runtime) -> torch.Tensor:
    return generate_pixels(runtime, ["a cat"], FEW, seeds=[1])


def branched(family: Any, exported: Path, folder: Path) -> Path:
    """An exported model whose denoiser gets its branches now, as the pass gives them before it writes it."""
    import onnx_ir

    name = family.facts.denoiser_name
    made = shutil.copytree(exported, folder / "model")
    (made / "artifact.json").unlink()
    graph, config = made / name / "model.onnx", made / name / "config.json"
    model = onnx_ir.load(graph)
    facts = family.facts
    paths = adaptable(family.denoiser(family.tiny()), AdapterConfig(), facts.lora_targets, facts.presets)
    add_branches(model, name, paths)
    onnx_ir.save(model, graph)
    noted = {KEY: {"without_effect": without_branch(graph, name, paths)}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **noted}))
    return made


@pytest.mark.each_family
def test_pictures_are_those_of_the_merged_model(
    family: Any,
    tiny_sources: Callable[[str], Path],
    tiny_onnxs: Callable[[str], Path],
    unread: Callable[[Any], frozenset[str]],
    tmp_path: Path,
) -> None:
    a, b = adapter(family, tmp_path / "a", 5), adapter(family, tmp_path / "b", 6, rank=5)
    folder = branched(family, tiny_onnxs(family.name), tmp_path)
    noted = json.loads((folder / family.facts.denoiser_name / "config.json").read_text())[KEY]
    assert set(noted["without_effect"]) <= unread(family)
    runtime = open_runtime(folder, family=family.name, device="cpu")
    base = drawn(runtime)
    found = []
    for one in (a, b, a):
        put_adapter(runtime, one)
        found.append(drawn(runtime))
    pipeline = family.load(str(tiny_sources(family.name)))
    merge_adapter(pipeline, family, a)
    wanted = drawn(torch_runtime(family, pipeline))
    print(f"{family.name}: {psnr_db(found[0], wanted):.0f} dB, from the base {psnr_db(wanted, base):.0f} dB")
    assert psnr_db(found[0], wanted) > 80 > psnr_db(wanted, base)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    put_adapter(runtime, None)
    assert torch.equal(drawn(runtime), base)


# The chain --------------------------------------------------------------------------------------------------

SD15 = families.get("sd15")


def context(folder: Path) -> Context:
    return Context(
        run_dir=folder / "run",
        prompts=("a cat", "a dog"),
        device="cpu",
        sampling=SamplingConfig(steps=4),
        say=lambda line: None,
    )


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "a": adapter(SD15, folder / "a", 5),
        "b": adapter(SD15, folder / "b", 6, rank=5),
        "dora": adapter(SD15, folder / "dora", 7, kind="dora"),
        "wider": adapter(SD15, folder / "wider", 8, "all_linear"),
    }


@pytest.fixture(scope="module")
def exported(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    chain = parse_chain([{"export_onnx": {"adapters": "swappable"}}])
    start = open_artifact(tiny_source, family="sd15")
    return run_chain(chain, start, context(tmp_path_factory.mktemp("swappable")))


def test_programs_that_know_nothing_of_it_draw_with_the_base(exported: Artifact, tiny_onnx: Path) -> None:
    runtime = open_runtime(exported, device="cpu")
    graph: Any = SD15.denoiser(runtime.pipeline)
    assert list(graph.graph.inputs) == ["sample", "timestep", "encoder_hidden_states"]
    assert len(graph.graph.open_inputs) > 50
    wanted = drawn(open_runtime(tiny_onnx, device="cpu"))
    assert psnr_db(drawn(runtime), wanted) > 90
    if pytest.importorskip("openvino"):
        assert psnr_db(drawn(open_runtime(exported, device="cpu", provider="openvino")), wanted) > 80


@pytest.mark.parametrize(
    "how", [{"mode": "dynamic"}, {"samples": 4, "keep": list(SD15.facts.denoiser.sensitive)}]
)
def test_nothing_is_left_behind_after_quantization(
    how: dict[str, Any], exported: Artifact, adapters: dict[str, Path], tmp_path: Path
) -> None:
    made = run_chain(parse_chain([{"quantize": how}]), exported, context(tmp_path))
    stored = onnx.load(Path(made.source, "unet", "model.onnx"), load_external_data=False).graph.initializer
    branches = [tensor for tensor in stored if ".lora_" in tensor.name]
    assert branches and {tensor.data_type for tensor in branches} == {onnx.TensorProto.FLOAT}
    runtime = open_runtime(made, device="cpu")
    base = drawn(runtime)
    found = []
    for name in ("a", "b", "a"):
        put_adapter(runtime, adapters[name])
        found.append(drawn(runtime))
    assert torch.equal(found[0], found[2])
    wanted = drawn(open_runtime(exported, device="cpu", adapter=adapters["a"]))
    assert psnr_db(found[0], wanted) > 20 > psnr_db(found[0], found[1]) > 0
    assert psnr_db(found[0], wanted) > psnr_db(found[0], base) + 5
    put_adapter(runtime, None)
    assert torch.equal(drawn(runtime), base)


def test_onnxruntimes_own_adapters(exported: Artifact, adapters: dict[str, Path], tmp_path: Path) -> None:
    import onnxruntime as ort

    file = tmp_path / "a.onnx_adapter"
    runtime = open_runtime(exported, device="cpu", adapter=adapters["a"])
    wanted = drawn(runtime)
    save_onnx_adapter(runtime, file)
    assert torch.equal(drawn(open_runtime(exported, device="cpu", adapter=file)), wanted)
    graph: Any = SD15.denoiser(runtime.pipeline)
    feeds = {
        name: np.ones([2 if size is None else size for size in shape], kind)
        for name, (kind, shape) in graph.graph.inputs.items()
    }
    feeds["sample"] = np.ones((2, *runtime.latent_shape(64, 64)), np.float32)
    mine = graph.graph.run(feeds)["out_sample"]
    held, options = ort.LoraAdapter(), ort.RunOptions()
    held.Load(str(file))
    options.add_active_adapter(held)
    (theirs,) = graph.graph.session.run(None, feeds, options)
    assert np.array_equal(mine, theirs)
    file.write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="not an adapter of ONNX Runtime, or damaged"):
        put_adapter(runtime, file)


def test_pictures_into_files_at_several_strengths(
    exported: Artifact, adapters: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"device": "cpu", "sampling": FEW, "adapter": str(adapters["a"])}
    paths = list(workspace.draw(exported.source, ["a cat"], scales=[0, 1], out=tmp_path, **options))
    plain = list(workspace.draw(exported.source, ["a cat"], out=tmp_path / "b", device="cpu", sampling=FEW))
    assert [path.name for path in paths] == ["a-cat-0-x0.png", "a-cat-0-x1.png"]

    def pixels(path: Path) -> Any:
        from PIL import Image

        return np.asarray(Image.open(path), int)

    assert abs(pixels(paths[0]) - pixels(plain[0])).max() <= 1
    assert abs(pixels(paths[1]) - pixels(plain[0])).max() > 20


# What it cannot be ------------------------------------------------------------------------------------------


def test_adapters_that_do_not_fit(exported: Artifact, adapters: dict[str, Path], tiny_onnx: Path) -> None:
    runtime = open_runtime(exported, device="cpu", adapter=adapters["a"])
    before = drawn(runtime)
    for name, said in (
        ("dora", "by more than a LoRA"),
        ("wider", r"it changes .*, and the model was not exported for adapters of that layer"),
    ):
        with pytest.raises(AdapterError, match=said) as caught:
            put_adapter(runtime, adapters[name])
        assert str(adapters[name]) in str(caught.value) and "merge" in str(caught.value)
    assert torch.equal(drawn(runtime), before)  # the one that was on it
    for options in ({"provider": "openvino"}, {}):
        source = exported if options else tiny_onnx
        if options:
            pytest.importorskip("openvino")
        with pytest.raises(ConfigError, match="was not exported for adapters") as refused:
            open_runtime(source, device="cpu", adapter=adapters["a"], **options)  # type: ignore[arg-type]
        assert "adapters: swappable" in str(refused.value)


def test_settings_and_orders_that_mean_nothing() -> None:
    with pytest.raises(ChainError, match="adapters is not swappable"):
        parse_chain([{"export_onnx": {"adapter_targets": ["to_q"]}}])
    for later in ({"build_tensorrt": {"devices": ["rtx-4090"]}}, "export_openvino"):
        with pytest.raises(ChainError, match="comes after export_onnx with adapters: swappable"):
            check_chain(parse_chain([{"export_onnx": {"adapters": "swappable"}}, later]), "torch")


def test_a_layer_that_cannot_have_a_branch(tiny_onnx: Path) -> None:
    import onnx_ir

    model = onnx_ir.load(tiny_onnx / "unet" / "model.onnx")
    # Equal weights are one, named after any of their layers.
    norm = next(node.inputs[1].name for node in model.graph if node.op_type == "LayerNormalization")
    with pytest.raises(ModelError, match="cannot be swapped: it is used by a"):
        add_branches(model, "unet", [norm.removeprefix("unet.").removesuffix(".weight")])
