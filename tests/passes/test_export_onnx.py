"""Torch to ONNX: the layout, the figures, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tunekit import families, hardware, install, layers
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.diffusion.metrics import psnr_db, relative_error
from tunekit.errors import ChainError, TunekitError
from tunekit.passes import models, onnx_graph
from tunekit.passes.base import Context, parse_chain, run_chain
from tunekit.passes.export_onnx import (
    as_tuple,
    check_inputs,
    export_component,
    graph_config,
    graph_error,
)
from tunekit.passes.half import exact_weights, keep_whole
from tunekit.passes.models import in_types
from tunekit.passes.onnx_int8 import Graph
from tunekit.passes.paths import under, unmatched
from tunekit.runtime import GraphModule, generate_pixels, open_runtime

ROOT = Path(__file__).resolve().parents[2]
VAE = {
    "vae_encoder": (["sample"], ["latent_parameters"]),
    "vae_decoder": (["latent_sample"], ["sample"]),
}
SD = {
    "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
    "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
    **VAE,
}
STATES = [f"hidden_states.{index}" for index in range(4)]
TRANSFORMER = {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"}
OTHERS: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionXLPipeline": {
        "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output", *STATES[:3]]),
        "text_encoder_2": (["input_ids"], ["text_embeds", "last_hidden_state", *STATES]),
        "unet": (
            ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"],
            ["out_sample"],
        ),
        **VAE,
    },
}
"""Pipelines for which Optimum has a layout, in the order of its graphs."""
OF_TRANSFORMERS = {
    "StableDiffusion3Pipeline": TRANSFORMER,
    "FluxPipeline": {*TRANSFORMER, "guidance", "img_ids", "txt_ids"},
}
"""Pipelines for which it feeds a transformer by name."""


def axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_layout_and_names_are_those_that_other_programs_expect(
    family: Any, tiny_onnxs: Callable[[str], Path]
) -> None:
    folder, facts = tiny_onnxs(family.name), family.facts
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == facts.pipeline_class
    tiny = family.tiny()
    for encoder in facts.encoders:
        kind = type(getattr(tiny, encoder.tokenizer)).__name__
        assert index[encoder.tokenizer] == ["transformers", kind]
        if kind == "CLIPTokenizer":  # those of transformers 4 know only these two files
            there = {path.name for path in (folder / encoder.tokenizer).iterdir()}
            assert {"vocab.json", "merges.txt"} <= there
    assert (folder / "scheduler" / "scheduler_config.json").is_file()
    said = {part.name: (list(part.inputs), part.outputs) for part in family.export_components(tiny)}
    assert said == OTHERS.get(facts.pipeline_class, said)
    told, _ = said[facts.denoiser_name]
    assert set(told) == OF_TRANSFORMERS.get(facts.pipeline_class, set(told))
    assert {path.parent.name for path in folder.glob("*/model.onnx")} == set(said)
    dynamic = {part.name: part.dynamic for part in family.export_components(tiny)}
    for component, (inputs, outputs) in said.items():
        graph = onnx.load(folder / component / "model.onnx").graph
        assert [value.name for value in graph.input] == inputs
        assert [value.name for value in graph.output] == outputs
        for value in graph.input:
            for dim, axis in dynamic[component].get(value.name, {}).items():
                assert axes(value)[dim] == axis
        assert index[component] == ["diffusers", "OnnxRuntimeModel"]
        assert not graph.value_info, "onnxruntime's quantizer trips over shapes in between"
    graph = onnx.load(folder / facts.denoiser_name / "model.onnx").graph
    assert len(axes(next(value for value in graph.input if value.name == "timestep"))) == 1
    for encoder in facts.encoders:
        text = onnx.load(folder / encoder.name / "model.onnx").graph.input[0]
        assert text.type.tensor_type.elem_type == onnx.TensorProto.INT32
    known = json.loads((folder / "vae_decoder" / "config.json").read_text())
    assert known.get("scaling_factor") == tiny.vae.config.get("scaling_factor")


def test_weights_keep_their_names_so_that_sensitive_layers_are_found(
    family: Any, tiny_onnxs: Callable[[str], Path]
) -> None:
    """What computes in int8 leaves out by these names what loses most."""
    part = family.facts.denoiser
    modules = Graph(tiny_onnxs(family.name) / part.name / "model.onnx").modules(part.name)
    assert unmatched(part.sensitive, modules) is None


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_other_programs_find_what_they_ask_a_unet_for(name: str, tiny_onnxs: Callable[[str], Path]) -> None:
    folder = tiny_onnxs(name)
    unet = {value.name: value for value in onnx.load(folder / "unet" / "model.onnx").graph.input}
    assert axes(unet["sample"]) == ["batch", 4, "height", "width"]
    assert axes(unet["encoder_hidden_states"])[:2] == ["batch", "sequence"]
    config = json.loads((folder / "unet" / "config.json").read_text())
    assert "time_cond_proj_dim" in config and "unbatched_inputs" not in config


def test_the_pipelines_own_settings_stay(tiny_onnxs: Callable[[str], Path]) -> None:
    index = json.loads((tiny_onnxs("sdxl") / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is True and index["image_encoder"] == [None, None]
    assert "safety_checker" not in index
    runtime = open_runtime(tiny_onnxs("sdxl"), device="cpu")
    assert all((value == 0).all() for value in runtime.encode_prompt([""]).values())
    index = json.loads((tiny_onnxs("sd15") / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False


def test_graphs_do_not_tell_about_this_machine(tiny_onnx: Path) -> None:
    for file in tiny_onnx.glob("*/model.onnx"):
        content = file.read_bytes()
        assert str(ROOT).encode() not in content
        assert b"site-packages" not in content


def test_metrics_are_recorded(tiny_onnx: Path) -> None:
    artifact = Artifact.load(tiny_onnx)
    assert artifact.format == "onnx"
    assert artifact.step is not None
    metrics = artifact.step.metrics
    print({name: value for name, value in metrics.items() if "error" in name})
    assert 0 < metrics["relative_error"] <= 1e-4  # type: ignore[operator]
    assert metrics["size_bytes"] == artifact.size_bytes > 1_000_000
    assert metrics["nodes"] == sum(row["nodes"] for row in artifact.step.details["components"]) > 500
    assert {row["component"] for row in artifact.step.details["components"]} == set(SD)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (3, 96, 40), (2, 8, 128)])
def test_components_equal_torch_at_other_sizes(
    family: Any,
    tiny_sources: Callable[[str], Path],
    tiny_onnxs: Callable[[str], Path],
    batch: int,
    height: int,
    width: int,
) -> None:
    torch_side = open_runtime(tiny_sources(family.name), family=family.name, device="cpu")
    onnx_side = open_runtime(tiny_onnxs(family.name), device="cpu")
    texts = ["a red cat", "the moon", ""][:batch]
    encoded, known = (side.encode_prompt(texts) for side in (onnx_side, torch_side))
    told = family.conditioning(known, families.Frame.whole(height, width).rows(batch))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, *torch_side.latent_shape(height, width), generator=generator)
    pixels = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    errors = {
        **{name: relative_error(encoded[name], value) for name, value in known.items()},
        family.facts.denoiser_name: max(
            relative_error(onnx_side.denoise(latents, step, told), torch_side.denoise(latents, step, told))
            for step in (999, 500, 1)
        ),
        "vae_encoder": relative_error(onnx_side.encode_image(pixels), torch_side.encode_image(pixels)),
        "vae_decoder": relative_error(onnx_side.decode(latents), torch_side.decode(latents)),
    }
    print(
        f"{family.name}, {batch} x {height} x {width}:",
        {key: f"{value:.2g}" for key, value in errors.items()},
    )
    assert max(errors.values()) <= 1e-4


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_pictures_equal_torch(tiny_source: Path, tiny_onnx: Path, provider: str) -> None:
    if provider == "openvino":
        pytest.importorskip("openvino")
    sampling = SamplingConfig(steps=12, guidance=6.0, height=48, width=80)
    prompts = ["a red cat", "the moon", "a house"]
    eager, graphs = open_runtime(tiny_source, family="sd15"), open_runtime(tiny_onnx, provider=provider)
    wanted, drawn = (generate_pixels(side, prompts, sampling, seeds=[1, 2, 3]) for side in (eager, graphs))
    psnr = psnr_db(drawn, wanted)
    print(f"{provider}: {psnr:.1f} dB")
    assert psnr >= 60


def test_pruned_in_fp16(tiny_source: Path, tmp_path: Path) -> None:
    """Shapes that differ from the config, and half precision but for what is named, in one export."""
    chain = parse_chain(
        [
            {"prune": {"ratio": 0.3, "importance": "magnitude"}},
            {"export_onnx": {"dtype": "fp16", "keep": ["conv_in", "*.attn2", "text_encoder"]}},
        ]
    )
    source = open_artifact(tiny_source, family="sd15")
    sampling = SamplingConfig(steps=4, height=32, width=32)
    made = run_chain(chain, source, Context(run_dir=tmp_path, prompts=("a cat",), sampling=sampling))
    assert made.path is not None
    assert made.step is not None
    print(made.step.metrics)
    assert 1e-6 < made.step.metrics["relative_error"] < 1e-2  # type: ignore[operator]
    graph = onnx.load(made.path / "unet" / "model.onnx").graph
    large = [tensor for tensor in graph.initializer if np.prod(tensor.dims) > 16]
    whole = {tensor.name for tensor in large if tensor.data_type == onnx.TensorProto.FLOAT}
    assert whole == {tensor.name for tensor in large if ".attn2." in tensor.name or "conv_in." in tensor.name}
    rows = {row["component"]: row for row in made.step.details["components"]}
    assert len(whole) > 4 and {kept.rpartition(".")[2] for kept in rows["unet"]["kept"]} == {
        "conv_in",
        "attn2",
    }
    types = {name: row["dtype"] for name, row in rows.items()}
    assert types == {**dict.fromkeys(SD, "fp16"), "text_encoder": "fp32"}
    full = onnx.load(made.path / "vae_decoder" / "model.onnx").graph
    assert full.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    drawn = generate_pixels(open_runtime(made), ["a cat"], seeds=[1])
    wanted = generate_pixels(open_runtime(next(tmp_path.glob("01-prune-*"))), ["a cat"], seeds=[1])
    assert drawn.shape[-2:] == (32, 32)
    assert psnr_db(drawn, wanted) > 40


def test_what_overflows_stays_in_fp32(tiny_sources: Callable[[str], Path], tmp_path: Path) -> None:
    """SDXL's autoencoder, both graphs of it; of the denoiser, what the family knows to be sensitive."""
    source = open_artifact(tiny_sources("sdxl"), family="sdxl")
    chain = parse_chain([{"export_onnx": {"dtype": "fp16"}}])
    made = run_chain(chain, source, Context(run_dir=tmp_path, say=lambda line: None))
    assert made.step is not None
    rows = {row["component"]: row for row in made.step.details["components"]}
    print({name: f"{row['relative_error']:.2g}" for name, row in rows.items()})
    assert {name for name, row in rows.items() if row["dtype"] == "fp32"} == set(VAE)
    sensitive = families.get("sdxl").facts.denoiser.sensitive
    assert set(rows["unet"]["kept"]) == set(sensitive)
    for name, row in rows.items():
        graph = onnx.load(Path(made.source) / name / "model.onnx").graph
        large = [
            tensor
            for tensor in graph.initializer
            if np.prod(tensor.dims) > 100
            and not tensor.name.startswith(tuple(f"unet.{path}." for path in sensitive))
        ]
        types = {tensor.data_type for tensor in large}
        whole = row["dtype"] == "fp32"
        assert types == {onnx.TensorProto.FLOAT if whole else onnx.TensorProto.FLOAT16}
        assert row["relative_error"] < (1e-4 if whole else 3e-2)
    assert generate_pixels(open_runtime(made, device="cpu"), ["a cat"], seeds=[1]).isfinite().all()


def test_blocks_of_a_network_in_fp16_stay_in_float32(family: Any) -> None:
    """What the family knows to be sensitive, and a list of blocks: nearer to floats, or as near."""
    exact = family.tiny()
    name, sensitive = family.facts.denoiser_name, list(family.facts.denoiser.sensitive)
    blocks = next(
        path
        for path, module in family.denoiser(exact).named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(list(module.parameters())) > 3
    )
    (whole,) = (part for part in family.export_components(exact) if part.name == name)
    inputs, errors = check_inputs(whole), []
    with torch.no_grad():
        (expected,) = as_tuple(whole.module(*inputs.values()))
    for keep in ([], [*sensitive, blocks]):
        half = in_types(exact, family.facts, family.facts.drawing_dtypes(torch.float16))
        (part,) = (part for part in family.export_components(half) if part.name == name)
        denoiser = family.denoiser(half)
        kept = keep_whole(denoiser, exact_weights(family.denoiser(exact), keep), keep)
        (again,) = (one for one in family.export_components(half) if one.name == name)
        weights = dict(denoiser.named_parameters())
        wholes = {key for key, value in weights.items() if value.dtype == torch.float32}
        assert wholes == {key for key in weights if under(key, keep, weights)} and len(wholes) <= len(weights)
        assert bool(kept) == bool(keep) == bool(wholes)
        given = {key: value.to(part.inputs[key].dtype) for key, value in inputs.items()}
        with torch.no_grad():
            (made,) = as_tuple(again.module(*given.values()))
        assert made.dtype == torch.float16
        errors.append(relative_error(made.float(), expected))
    print(f"{family.name}: {errors[0]:.2g} in fp16, {errors[1]:.2g} with {', '.join(kept)} in float32")
    assert errors[1] < 1.1 * errors[0]


def test_what_shall_stay_in_float32_must_be_there(tiny_source: Path, tmp_path: Path) -> None:
    wrong = [{"export_onnx": {"dtype": "fp16", "keep": ["up_blockz"]}}]
    with pytest.raises(ChainError, match=r'has a wrong keep: "up_blockz" names nothing: .*"up_blocks"'):
        run_chain(parse_chain(wrong), open_artifact(tiny_source, family="sd15"), Context(run_dir=tmp_path))
    with pytest.raises(TunekitError, match=r"keep.*dtype is fp32"):
        parse_chain([{"export_onnx": {"keep": ["conv_in"]}}])


class Positioned(torch.nn.Module):
    """Rows of tokens, and a table of positions that is the same for all rows."""

    def forward(self, sample: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return sample + positions.sin()


@pytest.mark.parametrize("provider", ["onnxruntime", "openvino"])
def test_positions_are_not_cut_like_rows(provider: str, tmp_path: Path) -> None:
    if provider == "openvino":
        pytest.importorskip("openvino")
    generator = torch.Generator().manual_seed(0)
    sample, positions = (torch.randn(*shape, generator=generator) for shape in ((2, 6, 3), (6, 3)))
    component = families.ExportComponent(
        name="unet",
        component="unet",
        module=Positioned(),
        inputs={"sample": sample, "positions": positions, "timestep": torch.zeros(1)},
        dynamic={"sample": {0: "batch", 1: "tokens"}, "positions": {0: "tokens"}},
        outputs=["out"],
        config={"a": 1},
    )
    config = graph_config(component)
    assert config == {"a": 1, "unbatched_inputs": ["positions"]}  # a timestep is one row for all
    exported = replace(component, inputs={"sample": sample, "positions": positions})
    export_component(exported, tmp_path / "unet")
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "unet" / "model.onnx"
    graph: Any
    if provider == "openvino":
        from tunekit.runtime.openvino import OpenVinoGraph

        graph = OpenVinoGraph(file, "CPU", torch.float32, 1)
    else:
        from tunekit.runtime.onnx import OrtGraph

        graph = OrtGraph(file, [("CPUExecutionProvider", {})], 1)
    graph.max_rows = 2
    rows, table = torch.randn(3, 4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    made = GraphModule(graph, config)(rows, table, return_dict=False)[0]
    assert torch.allclose(made, rows + table.sin(), atol=1e-6)


def test_a_graph_is_traced_once_for_each_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights find the kept graph, and are written as if it had been traced for them."""
    from tunekit.passes import onnx_graph

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pipeline = families.get("sd15").tiny()
    traced = []
    real = onnx_graph._trace
    monkeypatch.setattr(onnx_graph, "_trace", lambda *args: traced.append(args) or real(*args))

    def export(name: str) -> bytes:
        component = families.get("sd15").export_components(pipeline)[0]
        export_component(component, tmp_path / name)
        inputs = check_inputs(component)
        with torch.no_grad():
            assert (
                graph_error(tmp_path / name / "model.onnx", inputs, component.module(*inputs.values()))
                <= 1e-4
            )
        return (tmp_path / name / "model.onnx").read_bytes()

    first = export("first")
    with torch.no_grad():
        for parameter in pipeline.text_encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    second = export("second")
    assert len(traced) == 1
    assert first != second
    (graph,) = (tmp_path / "cache" / "tunekit" / "graphs").iterdir()
    graph.write_text(graph.read_text()[:-100])
    assert export("damaged") == second
    assert len(traced) == 2
    for layer in pipeline.text_encoder.modules():  # equal weights, otherwise put together
        if hasattr(layer, "num_heads"):
            layer.num_heads, layer.head_dim = 2 * layer.num_heads, layer.head_dim // 2
    export("more heads")
    assert len(traced) == 3
    monkeypatch.setattr("tunekit.kept.cache_dir", lambda: None)
    export("not kept")
    assert len(traced) == 4


def test_weights_above_the_threshold_go_beside_the_graph(tmp_path: Path) -> None:
    family = families.get("sd15")
    component = family.export_components(family.tiny())[0]
    inputs = check_inputs(component)
    with torch.no_grad():
        expected = component.module(*inputs.values())
    folder = tmp_path / "large"
    export_component(component, folder, external_data_threshold=1000)
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx_data"}
    assert not onnx.load(folder / "model.onnx", load_external_data=False).graph.value_info
    assert (folder / "model.onnx_data").stat().st_size > 100_000
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    assert graph_error(moved / "model.onnx", inputs, expected) <= 1e-4
    # The check itself must be able to fail.
    assert graph_error(moved / "model.onnx", inputs, tuple(x * 1.01 for x in expected)) > 1e-3
    assert np.isnan(graph_error(moved / "model.onnx", inputs, tuple(x * float("nan") for x in expected)))


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ChainError, match=r"optimize\[1\] \(export_onnx\).*put quantize behind it"):
        run_chain(
            parse_chain(["quantize", "export_onnx"]),
            open_artifact("tiny", family="sd15"),
            Context(run_dir=tmp_path),
        )
    family = families.get("sd15")
    pipeline = family.tiny()
    layers.quantize(family.denoiser(pipeline), "int8")
    family.save(pipeline, tmp_path / "packed")
    source = open_artifact(tmp_path / "packed", family="sd15")
    with pytest.raises(ChainError, match="whose packed weights it would unpack"):
        run_chain(parse_chain(["export_onnx"]), source, Context(run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ChainError) as raised:
        run_chain(
            parse_chain(["export_onnx"]), open_artifact("tiny", family="sd15"), Context(run_dir=tmp_path)
        )
    line = install.with_extra("onnx")
    assert f'(export_onnx) needs the package "onnxscript": {line}' in str(raised.value)


STRUCTURES = """
import sys
from tunekit import families
from tunekit.passes.onnx_graph import _structure
family = families.get("sd15")
for part in family.export_components(family.load(sys.argv[1])):
    print(part.name, _structure(part, 20))
"""


def test_a_graph_is_known_again_in_another_process(tiny_source: Path) -> None:
    """Where sets of strings have another order."""
    command = [sys.executable, "-c", STRUCTURES, str(tiny_source)]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    family = families.get("sd15")
    parts = family.export_components(family.load(str(tiny_source)))
    here = [f"{part.name} {onnx_graph._structure(part, 20)}" for part in parts]
    assert done.stdout.splitlines() == here and "None" not in done.stdout


@pytest.mark.each_family
def test_of_a_large_model_one_network_at_a_time_has_weights_and_the_graphs_are_the_same(
    family: Any,
    tiny_sources: Callable[[str], Path],
    tiny_onnxs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[set[str]] = []
    load = type(family).load

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        pipeline = load(self, *arguments, **options)
        networks = {part.name: getattr(pipeline, part.name) for part in self.facts.components[:-1]}
        parts = {name: network for name, network in networks.items() if isinstance(network, torch.nn.Module)}
        alive.append({name for name, part in parts.items() if not next(part.parameters()).is_meta})
        return pipeline

    monkeypatch.setattr(type(family), "load", watched)
    monkeypatch.setattr(models, "LARGE", 0)
    source = open_artifact(tiny_sources(family.name), family=family.name)
    context = Context(run_dir=tmp_path, say=lambda line: None)
    made = run_chain(parse_chain(["export_onnx"]), source, context).path
    assert made is not None
    assert alive[0] == set() and all(len(names) == 1 for names in alive[1:]), alive
    assert set().union(*alive) >= {family.facts.denoiser_name, "vae"}
    whole = tiny_onnxs(family.name)
    files = {str(file.relative_to(whole)) for folder in whole.iterdir() for file in folder.glob("*")}
    assert len(files) > 8
    assert [name for name in sorted(files) if (made / name).read_bytes() != (whole / name).read_bytes()] == []
    assert (made / "model_index.json").read_bytes() == (whole / "model_index.json").read_bytes()


def test_graphs_that_memory_is_short_for_are_open_one_at_a_time_and_draw_the_same(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn() -> tuple[torch.Tensor, list[Any]]:
        runtime = open_runtime(tiny_onnx, device="cpu", provider="cpu")
        pipeline = runtime.pipeline
        pixels = generate_pixels(runtime, ["a cat"], SamplingConfig(steps=2), seeds=[1, 2], batch=1)
        return pixels, [pipeline.text_encoder.graph, pipeline.unet.graph, pipeline.vae.decoder.graph]

    wanted, graphs = drawn()
    assert all(graph._session is not None for graph in graphs)
    monkeypatch.setattr(hardware, "machine_memory", lambda: (1 << 30, 1))
    found, graphs = drawn()
    assert [graph._session is not None for graph in graphs] == [False, False, True]
    assert torch.equal(found, wanted)
