"""The same pictures whatever runs the model, and one clear line where it cannot run."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tunekit import families, install, workspace
from tunekit.adapters import add_adapter, at_strength, save_adapter
from tunekit.artifacts import Artifact, open_artifact
from tunekit.cli.drawing import strengths_of
from tunekit.config import AdapterConfig, SamplingConfig
from tunekit.diffusion.metrics import psnr_db, relative_error
from tunekit.diffusion.sampling import initial_latents
from tunekit.errors import (
    ArtifactError,
    ConfigError,
    DeviceError,
    MissingPackageError,
    ModelError,
    NonFiniteError,
    OutputError,
    TunekitError,
)
from tunekit.resources import Source
from tunekit.runtime import (
    GraphModule,
    Runtime,
    base,
    generate,
    generate_pixels,
    open_runtime,
    remarks,
    to_images,
    torch_runtime,
)
from tunekit.runtime.graph import graph_pipeline
from tunekit.runtime.tiles import decode_in_tiles

FAMILY = families.get("sd15")
PROMPTS = ["a red cat", "the moon"]
FEW = SamplingConfig(steps=3, guidance=4.0, negative_prompt="blue")
SEEDS = [3, 4]
CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def eager(tiny_source: Path) -> Runtime:
    return open_runtime(tiny_source, **CPU)


@pytest.fixture(scope="module")
def expected(eager: Runtime) -> Tensor:
    return generate_pixels(eager, PROMPTS, FEW, seeds=SEEDS)


@pytest.fixture(scope="module", params=families.runnable())
def each(request: pytest.FixtureRequest, tiny_sources: Callable[[str], Path]) -> Runtime:
    """The tiny model of each family, in torch."""
    return open_runtime(tiny_sources(request.param), family=request.param, **CPU)


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def graphs(request: pytest.FixtureRequest, each: Runtime) -> Runtime:
    """Its graphs; OpenVINO's files are made of the ONNX ones."""
    made = request.getfixturevalue({"onnx": "tiny_onnxs", "openvino": "tiny_irs"}[request.param])
    return open_runtime(made(each.family.name), **CPU)


def trained(seed: int = 0) -> Any:
    """A tiny denoiser with an adapter that does something."""
    pipeline = FAMILY.tiny()
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in add_adapter(pipeline.unet, ADAPTER, FAMILY.facts.lora_targets):
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=draw)
    return pipeline


ADAPTER = AdapterConfig(rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def adapter(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter artifact on the tiny base, inside a run folder."""
    folder = tmp_path_factory.mktemp("runs") / "style" / "adapter"
    save_adapter(folder, trained().unet, FAMILY, ADAPTER, name="style", title="Style")
    Artifact(
        path=folder,
        model_path=folder,
        format="adapter",
        family="sd15",
        source=str(folder),
        base=str(tiny_source),
    ).write()
    return folder


# --- torch ------------------------------------------------------------------------------------------------


def test_a_folder_draws_what_diffusers_draws(each: Runtime) -> None:
    each.pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(type(each.pipeline).__call__).parameters
    options: dict[str, Any] = {"height": 64, "width": 64}  # some draw 1024 px whatever their parts say
    told: dict[str, Any] = {}
    if "max_sequence_length" in known:
        longest = getattr(each.pipeline, each.family.facts.encoders[-1].tokenizer).model_max_length
        told["max_sequence_length"] = longest
    if "text_encoder_out_layers" in known:
        layers = each.pipeline.text_encoder.config.num_hidden_layers
        told["text_encoder_out_layers"] = (layers // 4, layers // 2, 3 * layers // 4)
    if "negative_prompt" in known:
        options["negative_prompt"] = ["blue"] * 2
    else:
        options["negative_prompt_embeds"] = each.pipeline.encode_prompt(["blue"] * 2, **told)[0]
    wanted = each.pipeline(
        prompt=list(PROMPTS),
        **options,
        **told,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
    ).images
    largest = float((generate_pixels(each, PROMPTS, FEW, seeds=SEEDS) - wanted).abs().max())
    print(f"{each.family.name}: {largest:.1e}")
    assert largest <= 1e-5
    assert each.title == "torch fp32 cpu"


def test_a_picture_does_not_depend_on_its_batch(eager: Runtime, expected: Tensor) -> None:
    alone = generate_pixels(eager, PROMPTS, FEW, seeds=SEEDS, batch=1)
    assert (alone - expected).abs().max() < 1e-4
    swapped = generate_pixels(eager, PROMPTS[::-1], FEW, seeds=SEEDS[::-1]).flip(0)
    assert (swapped - expected).abs().max() < 1e-4


def test_pictures_are_the_rounded_pixels(eager: Runtime, expected: Tensor) -> None:
    pictures = generate(eager, PROMPTS, FEW, seeds=SEEDS)
    assert all(isinstance(picture, Image.Image) and picture.size == (64, 64) for picture in pictures)
    values = np.stack([np.asarray(picture, np.float32) / 255 for picture in pictures])
    assert np.abs(values - expected.permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 255 + 1e-6
    assert np.asarray(to_images(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1))[0]).tolist() == [
        [[0, 128, 255]]
    ]


def test_one_prompt_with_many_seeds_and_one_seed_with_many_prompts(eager: Runtime, expected: Tensor) -> None:
    assert torch.allclose(generate_pixels(eager, PROMPTS[:1], FEW, seeds=SEEDS)[0], expected[0], atol=1e-4)
    many = generate_pixels(eager, PROMPTS, FEW, seeds=[3])
    assert torch.allclose(many[0], expected[0], atol=1e-4) and many.shape == expected.shape
    with pytest.raises(ConfigError, match="2 prompts and 3 seeds"):
        generate(eager, PROMPTS, seeds=[1, 2, 3])
    with pytest.raises(ConfigError, match="nothing to draw"):
        generate(eager, PROMPTS, seeds=[])


def test_other_sizes(eager: Runtime) -> None:
    def draw(**size: int) -> Image.Image:
        return generate(eager, ["a"], SamplingConfig(steps=1, **size), seeds=[0])[0]

    assert draw(height=40, width=72).size == (72, 40)
    with pytest.raises(ConfigError, match="multiple of"):
        eager.latent_shape(44, 64)


@pytest.mark.parametrize("kind", ["torch", "onnx", "openvino"])
def test_a_prompt_is_encoded_once_for_all_its_pictures(
    kind: str,
    tiny_source: Path,
    tiny_onnx: Path,
    tiny_irs: Callable[[str], Path],
    expected: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {"torch": lambda: tiny_source, "onnx": lambda: tiny_onnx, "openvino": lambda: tiny_irs("sd15")}
    runtime = open_runtime(places[kind](), family="sd15", **CPU)
    encode, asked = runtime.family.encode_prompt, []

    def counted(pipeline: Any, prompts: list[str]) -> Any:
        asked.append(list(prompts))
        return encode(pipeline, prompts)

    monkeypatch.setattr(type(runtime.family), "encode_prompt", lambda self, *given: counted(*given))
    drawn = generate_pixels(runtime, PROMPTS[:1], FEW, seeds=[SEEDS[0], 8], batch=1)
    assert asked == [PROMPTS[:1], ["blue"]]
    again = generate_pixels(runtime, PROMPTS, FEW, seeds=SEEDS)
    assert asked[2:] == [PROMPTS[1:]]
    assert psnr_db(again, expected) > 70 and psnr_db(drawn[0], expected[0]) > 70
    runtime.forget_prompts()
    alone = generate_pixels(runtime, PROMPTS[:1], FEW, seeds=[8])
    assert torch.equal(alone[0], drawn[1]) and len(asked) == 5
    monkeypatch.setattr(base, "KEPT_BYTES", 1)
    generate_pixels(runtime, PROMPTS[:1], SamplingConfig(steps=1), seeds=[3])
    assert not runtime._encoded, "what is kept is bounded"


def test_progress(eager: Runtime) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        eager,
        ["a"],
        SamplingConfig(steps=2, guidance=1.0),
        seeds=[0],
        on_step=lambda done, of, latents: seen.append((done, of)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]  # PNDM asks once more than it has steps


@pytest.mark.parametrize(("dtype", "least"), [("bf16", 25), ("fp16", 40)])
def test_narrower_types(tiny_source: Path, expected: Tensor, dtype: str, least: float) -> None:
    runtime = open_runtime(tiny_source, dtype=dtype, **CPU)
    assert runtime.title == f"torch {dtype} cpu"
    conditioning = runtime.encode_prompt(["a"])["encoder_hidden_states"]
    assert conditioning.dtype == torch.float32
    assert psnr_db(generate_pixels(runtime, PROMPTS, FEW, seeds=SEEDS), expected) > least


def test_threads_are_set_before_each_use(tiny_source: Path) -> None:
    before = torch.get_num_threads()
    try:
        one, two = (open_runtime(tiny_source, threads=count, **CPU) for count in (1, 2))
        for runtime, count in ((one, 1), (two, 2), (one, 1)):
            runtime.encode_prompt(["a"])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


def test_images_are_encoded(eager: Runtime) -> None:
    picture = torch.zeros(1, 3, 64, 64)
    assert torch.equal(eager.encode_image(picture), FAMILY.encode_image(eager.pipeline, picture))


# --- adapters ---------------------------------------------------------------------------------------------


def test_an_adapter_a_run_and_a_base_with_an_adapter_draw_alike(
    adapter: Path, tiny_source: Path, expected: Tensor
) -> None:
    wanted = generate_pixels(torch_runtime(FAMILY, trained()), PROMPTS, FEW, seeds=SEEDS)
    assert psnr_db(wanted, expected) < 40  # the adapter shows
    for source, options in (
        (adapter, {}),
        (adapter.parent, {}),
        (tiny_source, {"adapter": adapter}),
        (tiny_source, {"adapter": adapter / "style.kohya.safetensors"}),
    ):
        drawn = generate_pixels(open_runtime(source, **options, **CPU), PROMPTS, FEW, seeds=SEEDS)
        assert torch.allclose(drawn, wanted, rtol=0, atol=1e-5)  # alpha / rank is in the file's weights


def test_an_adapter_that_names_no_base(adapter: Path) -> None:
    with pytest.raises(ArtifactError, match="without the base"):
        open_runtime(adapter / "style.kohya.safetensors", **CPU)


def test_two_adapters(adapter: Path) -> None:
    with pytest.raises(ConfigError, match="two adapters"):
        open_runtime(adapter, adapter=adapter, **CPU)


@pytest.mark.parametrize("version", [1, 2])
def test_the_base_is_opened_as_it_was_for_training(
    version: int, adapter: Path, tiny_source: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_source, tmp_path / "base")
    for file in base.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".half.safetensors"))
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    record = json.loads((copy / "artifact.json").read_text())
    step = {"kind": "train", "artifact": "adapter", "settings": {"model": {"variant": "half"}}}
    record |= {"version": version, "base": str(base)}
    record |= {"lineage": [step]} if version == 1 else {"opened": {"variant": "half"}}
    (copy / "artifact.json").write_text(json.dumps(record))
    assert open_runtime(copy, **CPU).title == "torch fp32 cpu"


# --- graphs -----------------------------------------------------------------------------------------------


def test_graphs_draw_what_torch_draws(graphs: Runtime, each: Runtime) -> None:
    drawn, wanted = (generate_pixels(side, PROMPTS, FEW, seeds=SEEDS) for side in (graphs, each))
    print(f"{each.family.name}, {graphs.title}: {psnr_db(drawn, wanted):.1f} dB")
    assert psnr_db(drawn, wanted) >= 60
    assert graphs.title in ("onnxruntime CPUExecutionProvider", "openvino f32 CPU")


def test_each_component_agrees_with_torch(graphs: Runtime, each: Runtime) -> None:
    encoded = graphs.encode_prompt(PROMPTS)
    size = SamplingConfig(height=48, width=80)
    for name, value in each.encode_prompt(PROMPTS).items():
        assert relative_error(encoded[name], value) <= 1e-4
    told = each.conditioning(PROMPTS, size)
    latents = initial_latents([0, 1], graphs.latent_shape(48, 80))
    for timestep in (torch.tensor(10), torch.tensor([7, 900]), torch.tensor([33.5, 33.5])):
        found, wanted = (r.denoise(latents, timestep, told) for r in (graphs, each))
        assert relative_error(found, wanted) <= 1e-4
    assert relative_error(graphs.decode(latents), each.decode(latents)) <= 1e-4
    picture = torch.rand(1, 3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert relative_error(graphs.encode_image(picture), each.encode_image(picture)) <= 1e-4


def test_graphs_know_their_sizes(graphs: Runtime, each: Runtime) -> None:
    assert graphs.default_size == each.default_size
    assert graphs.latent_shape(64, 32) == each.latent_shape(64, 32)
    assert type(graphs.scheduler) is type(each.scheduler)
    assert graphs.sampling == each.sampling
    assert graphs.size(SamplingConfig(width=32)) == (64, 32)


def test_threads_reach_onnxruntime(tiny_onnx: Path) -> None:
    runtime = open_runtime(tiny_onnx, threads=1, **CPU)
    options = runtime.pipeline.unet.graph.session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)


def test_threads_and_precision_reach_openvino(tiny_onnx: Path, expected: Tensor) -> None:
    pytest.importorskip("openvino")
    runtime = open_runtime(tiny_onnx, provider="openvino", dtype="bf16", threads=1, **CPU)
    compiled = runtime.pipeline.unet.graph.compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert runtime.title == "openvino bf16 CPU"
    assert psnr_db(generate_pixels(runtime, PROMPTS, FEW, seeds=SEEDS), expected) > 20


def test_a_closed_runtime_has_let_go(tiny_onnx: Path) -> None:
    runtime = open_runtime(tiny_onnx, **CPU)
    runtime.close()
    assert runtime.pipeline is None


def test_a_batch_larger_than_a_graph_takes_is_split() -> None:
    class Doubler:
        inputs = {"sample": (np.dtype(np.float16), [None, 2]), "timestep": (np.dtype(np.int64), [1])}
        max_rows = 2
        unbatched: frozenset[str] = frozenset()

        def __init__(self) -> None:
            self.rows: list[int] = []

        def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
            assert feeds["sample"].dtype == np.float16 and feeds["timestep"].shape == (1,)
            self.rows.append(len(feeds["sample"]))
            return {"out": 2 * feeds["sample"] + feeds["timestep"].astype(np.float16)}

    graph = Doubler()
    module = GraphModule(graph, {})
    rows = torch.arange(10.0).view(5, 2)
    assert torch.equal(module(rows, torch.full((5,), 3)).out, 2 * rows + 3)
    assert graph.rows == [2, 2, 1]
    times = torch.arange(5)
    assert torch.equal(module(rows, timestep=times, return_dict=False)[0], 2 * rows + times[:, None])
    assert graph.rows[3:] == [1] * 5
    with pytest.raises(ModelError, match="the graph takes sample, timestep; it is given sample"):
        module(rows)


# --- folders of others ------------------------------------------------------------------------------------


def copied(source: Path, target: Path) -> Path:
    """A copy of an ONNX folder without its record."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("artifact.json", "pictures"))
    return target


def test_a_scalar_timestep_as_optimum_exports_it(tiny_onnx: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    folder = copied(tiny_onnx, tmp_path / "scalar")
    file = folder / "unet" / "model.onnx"
    model = onnx.load(file)
    time = next(value for value in model.graph.input if value.name == "timestep")
    del time.type.tensor_type.shape.dim[:]
    for node in model.graph.node:
        node.input[:] = ["timestep_row" if name == "timestep" else name for name in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one"))
    model.graph.node.insert(0, onnx.helper.make_node("Reshape", ["timestep", "one"], ["timestep_row"]))
    onnx.save(model, file)
    wanted = generate_pixels(open_runtime(tiny_onnx, **CPU), PROMPTS, FEW, seeds=SEEDS)
    for provider in ("cpu", "openvino"):
        if provider == "openvino":
            pytest.importorskip("openvino")
        runtime = open_runtime(folder, provider=provider, **CPU)
        assert runtime.pipeline.unet.graph.inputs["timestep"][1] == []
        assert psnr_db(generate_pixels(runtime, PROMPTS, FEW, seeds=SEEDS), wanted) > 60
    latents = initial_latents([0, 1], runtime.latent_shape(64, 64))
    told = runtime.conditioning(PROMPTS, FEW)
    apart = runtime.denoise(latents, torch.tensor([900.0, 10.0]), told)  # one time per row
    alone = runtime.denoise(latents[1:], 10.0, {key: value[1:] for key, value in told.items()})
    assert torch.allclose(apart[1:], alone, atol=1e-4)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("scheduler", "its scheduler is missing"),
        ("tokenizer", "its tokenizer is missing"),
        ("vae_decoder", "its component vae_decoder is missing"),
        ("model_index.json", "neither a run"),
    ],
)
def test_a_folder_that_lacks_a_part(gone: str, words: str, tiny_onnx: Path, tmp_path: Path) -> None:
    folder = copied(tiny_onnx, tmp_path / "lacking")
    path = folder / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    message = why(ArtifactError, folder)
    assert words in message and str(folder) in message


class Nothing:
    """A graph that takes anything and gives nothing."""

    inputs: dict[str, Any] = {}
    max_rows = None
    unbatched: frozenset[str] = frozenset()

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        return {}


def test_whatever_stands_in_the_folders_files_is_read_or_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    """Other shapes of JSON, other values, cut and empty files: our error, or a pipeline."""
    hypothesis = pytest.importorskip("hypothesis")
    draw = hypothesis.strategies
    whole = copied(tiny_onnx, tmp_path / "whole")
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.json"))
    values = draw.one_of(
        draw.none(), draw.booleans(), draw.integers(-3, 10**7), draw.floats(), draw.text(max_size=5),
        draw.lists(draw.integers(), max_size=2), draw.just({"a": None}),
    )  # fmt: skip
    outcomes = set()

    @hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @hypothesis.given(draw.data())
    def check(data: Any) -> None:
        file = whole / data.draw(draw.sampled_from(files))
        before = file.read_bytes()
        content = json.loads(before)
        change = data.draw(draw.sampled_from(["value", "key", "cut", "other", "gone"]))
        if change in ("value", "key") and content:
            key = data.draw(draw.sampled_from(sorted(content)))
            content[key] = data.draw(values)
            if change == "key":
                del content[key]
            file.write_text(json.dumps(content))
        elif change == "cut":
            file.write_bytes(before[: data.draw(draw.integers(0, len(before)))])
        elif change == "gone":
            file.unlink()
        else:
            file.write_text(json.dumps(data.draw(values)))
        try:
            pipeline = graph_pipeline(whole, FAMILY, lambda path: Nothing())
            FAMILY.tokenize(pipeline, ["a cat"])
            outcomes.add("read")
        except TunekitError:
            outcomes.add("refused")
        finally:
            file.write_bytes(before)

    check()
    assert outcomes == {"read", "refused"}


def test_a_graph_that_gives_other_things_says_so() -> None:
    class Odd(Nothing):
        inputs = {"input_ids": (np.dtype(np.int64), [None, None])}

        def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
            return {"output_0": np.zeros((1, 2), np.float32)}

    said = GraphModule(Odd(), {}, "text_encoder")(torch.zeros(1, 2))
    with pytest.raises(ModelError, match="the text_encoder gives output_0; needed is last_hidden_state"):
        _ = said.last_hidden_state
    assert getattr(said, "text_embeds", None) is None


def test_a_graph_gives_some_hidden_states_by_their_numbers() -> None:
    class Some(Nothing):
        inputs = {"input_ids": (np.dtype(np.int64), [None, None])}

        def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
            return {f"hidden_states.{number}": np.full((1, 2), number, np.float32) for number in (9, 18)}

    said = GraphModule(Some(), {}, "text_encoder")(torch.zeros(1, 2), use_cache=False, logits_to_keep=1)
    assert said.hidden_states[18].tolist() == [[18.0, 18.0]]
    with pytest.raises(ModelError, match="gives the hidden states 9, 18; needed is 27"):
        _ = said.hidden_states[27]


def test_an_encoder_that_masks_its_padding_draws_as_in_torch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from tunekit.passes.export_onnx import check_inputs, export_component
    from tunekit.runtime.onnx import OrtGraph

    pipeline = FAMILY.tiny()
    pipeline.text_encoder.config.use_attention_mask = True
    part = FAMILY.export_components(pipeline)[0]
    assert list(check_inputs(part)) == ["input_ids", "attention_mask"]
    export_component(part, tmp_path / "text_encoder")
    graph = OrtGraph(tmp_path / "text_encoder" / "model.onnx", [("CPUExecutionProvider", {})], 1)
    onnx_side = SimpleNamespace(
        tokenizer=pipeline.tokenizer, text_encoder=GraphModule(graph, part.config, "text_encoder")
    )
    wanted, found = (
        FAMILY.encode_prompt(side, PROMPTS)["encoder_hidden_states"] for side in (pipeline, onnx_side)
    )
    assert relative_error(found, wanted) < 1e-4


# --- what is not finite, not read, without effect ---------------------------------------------------------


def test_a_picture_that_is_no_number_is_an_error_on_every_runtime(tiny_onnx: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pipeline = FAMILY.tiny()
    pipeline.vae.decoder.conv_out.weight.data *= 3e38
    folder = copied(tiny_onnx, tmp_path / "overflowing")
    model = onnx.load(folder / "vae_decoder" / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith("conv_out.weight"):
            values = onnx.numpy_helper.to_array(tensor) * np.float32(3e38)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, folder / "vae_decoder" / "model.onnx")
    runtimes = [torch_runtime(FAMILY, pipeline), open_runtime(folder, **CPU)]
    if importlib.util.find_spec("openvino"):
        runtimes.append(open_runtime(folder, provider="openvino", **CPU))
    for runtime in runtimes:
        with pytest.raises(NonFiniteError, match="the VAE decoder makes them of latents that are finite"):
            generate(runtime, PROMPTS, FEW, seeds=SEEDS)
    broken = FAMILY.tiny()
    broken.unet.conv_out.bias.data[:] = torch.nan
    with pytest.raises(NonFiniteError, match="the denoiser gives them in step 1 of"):
        generate(torch_runtime(FAMILY, broken), PROMPTS, FEW, seeds=SEEDS)

    from tunekit.passes.export_onnx import _overflow

    assert "dtype: fp32" in (_overflow(FAMILY, folder) or "")
    assert _overflow(FAMILY, tiny_onnx) is None


def test_tiles_are_decoded_alike_on_every_runtime(tiny_source: Path, tiny_onnx: Path) -> None:
    pictures = []
    for source in (tiny_source, tiny_onnx):
        runtime = open_runtime(source, **CPU)
        latents = initial_latents([0], runtime.latent_shape(128, 160))
        whole = runtime.decode(latents)
        runtime.tiled = True
        tiled = runtime.decode(latents)
        assert tiled.shape == whole.shape == (1, 3, 128, 160)
        assert psnr_db(tiled, whole) > 20
        small = initial_latents([0], runtime.latent_shape(64, 64))
        assert torch.equal(runtime.decode(small), FAMILY.decode(runtime.pipeline, small))
        pictures.append(tiled)
    assert (pictures[0] - pictures[1]).abs().max() < 1e-3


def test_a_ramp_loses_no_pixel() -> None:
    latents = torch.randn(1, 1, 13, 9, generator=torch.Generator().manual_seed(0))
    twice = decode_in_tiles(
        lambda part: part.repeat_interleave(2, 2).repeat_interleave(2, 3), latents, (8, 4)
    )
    assert torch.allclose(twice, latents.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-6)


def test_what_has_no_effect_is_said(eager: Runtime, tiny_onnx: Path) -> None:
    long = " ".join(["cat"] * 60) + " with a hat"
    for runtime in (eager, open_runtime(tiny_onnx, **CPU)):
        assert remarks(runtime, PROMPTS, FEW) == []
        (line,) = remarks(runtime, [long, long], FEW)
        assert "longer than the text encoder reads" in line and line.endswith('with a hat"')
        kept = runtime.unread(long)
        read = long[: len(long) - len(kept)].strip()
        assert runtime.unread(read) == "" and (read + kept).replace(" ", "") == long.replace(" ", "")
    (line,) = remarks(eager, PROMPTS, SamplingConfig(guidance=1, negative_prompt="blue"))
    assert "no effect with guidance 1" in line


def test_nothing_tells_of_this_machine(tmp_path: Path) -> None:
    code = "import tunekit.runtime, onnxruntime\ntry:\n import openvino\nexcept ImportError: pass"
    hidden = {key: value for key, value in os.environ.items() if key not in ("XDG_CACHE_HOME",)}
    subprocess.run(
        [sys.executable, "-c", code], env={**hidden, "HOME": str(tmp_path)}, check=True, timeout=120
    )
    assert [path.name for path in tmp_path.rglob("*") if "onnx" in str(path) or "openvino" in str(path)] == []


# --- what cannot be ---------------------------------------------------------------------------------------


def why(error: type[TunekitError], source: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        open_runtime(source, **{**CPU, **options})
    return str(caught.value)


def test_options_without_effect(tiny_source: Path, tiny_onnx: Path, adapter: Path) -> None:
    assert "no effect on a torch model" in why(ConfigError, tiny_source, provider="cpu")
    assert "its precision is in the file" in why(ConfigError, tiny_onnx, dtype="bf16")
    assert "was not exported for adapters" in why(ConfigError, tiny_onnx, adapter=adapter)
    assert "fp32, bf16, fp16" in why(ConfigError, tiny_source, dtype="float16")
    assert 'did you mean "openvino"' in why(ConfigError, tiny_onnx, provider="openvin")


@pytest.mark.parametrize(
    ("provider", "package"),
    [
        *(("cuda", "[gpu]"), ("tensorrt", "[gpu]"), ("directml", "onnxruntime-directml (Windows)")),
        *(("migraphx", "onnxruntime-migraphx (an AMD card"), ("rocm", "onnxruntime-rocm (an AMD card")),
        ("coreml", "onnxruntime has it on macOS alone"),
    ],
)
def test_a_provider_that_is_not_installed(tiny_onnx: Path, provider: str, package: str) -> None:
    import onnxruntime

    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("onnxruntime-gpu is installed")
    message = why(DeviceError, tiny_onnx, provider=provider)
    assert "ExecutionProvider here; it has" in message and package in message


def test_a_missing_component(tiny_onnx: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_onnx, tmp_path / "model")
    (folder / "artifact.json").unlink()  # which would say that it is not as it was written
    shutil.rmtree(folder / "vae_encoder")
    runtime = open_runtime(folder, family="sd15", **CPU)
    with pytest.raises(ModelError, match="no vae_encoder"):
        runtime.encode_image(torch.zeros(1, 3, 64, 64))
    shutil.rmtree(folder / "unet")
    assert "unet is missing" in why(ArtifactError, folder, family="sd15")


def test_openvino_files_run_in_openvino_alone(tiny_irs: Callable[[str], Path], adapter: Path) -> None:
    folder = tiny_irs("sd15")
    assert "OpenVINO runs its own files" in why(ConfigError, folder, provider="openvino")
    assert "no effect on a model in openvino" in why(ConfigError, folder, adapter=adapter)
    message = why(DeviceError, folder, device="xpu:3")  # OpenVINO is asked, not torch
    assert "OpenVINO finds no device GPU.3" in message and "it finds CPU" in message
    assert 'there is no device "gpu"' in why(DeviceError, folder, device="gpu")
    runtime = open_runtime(folder, dtype="bf16", threads=1, **CPU)
    compiled = runtime.pipeline.unet.graph.compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    with pytest.raises(ModelError, match="unet is an OpenVINO graph, and this needs a torch model"):
        FAMILY.load(Source(str(folder)))


def test_openvino_files_that_are_damaged(tiny_irs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_irs("sd15"), tmp_path / "model")
    xml, weights = (folder / "unet" / f"openvino_model.{ending}" for ending in ("xml", "bin"))
    whole = weights.read_bytes()
    weights.write_bytes(bytes(reversed(whole)))
    assert "unet/openvino_model.bin does not hold what was written" in why(ArtifactError, folder)
    (folder / "artifact.json").unlink()  # without it, nobody knows what was written
    opened = open_artifact(folder, family="sd15")
    assert opened.format == "openvino"
    weights.write_bytes(whole[: len(whole) // 2])
    message = why(ModelError, opened)
    assert "OpenVINO cannot load it" in message and str(xml) in message and "Exception from" not in message
    weights.unlink()
    assert "openvino_model.bin is missing" in why(ModelError, opened)
    weights.write_bytes(whole)
    graph = xml.read_text()
    xml.write_text(graph.replace('version="opset1"', 'version="opset99"').replace('value="20', 'value="29'))
    message = why(ModelError, opened)
    assert "written by OpenVINO 29" in message and "install the newer one" in message
    xml.write_text(graph.replace('version="11"', 'version="12"', 1).replace("<layers>", "<nodes>", 1))
    assert "it is IR 12, and OpenVINO" in why(ModelError, opened)
    xml.write_text("not a graph")
    assert str(xml) in why(ModelError, opened)
    xml.write_text(graph)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"openvino": {"precision": "int3"}}))
    assert 'it says precision "int3"' in why(ModelError, opened)


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_a_damaged_graph(tiny_onnx: Path, tmp_path: Path, provider: str) -> None:
    if provider == "openvino":
        pytest.importorskip("openvino")
    folder = shutil.copytree(tiny_onnx, tmp_path / "model")
    (folder / "artifact.json").unlink()  # which would say that it is not as it was written
    (folder / "unet" / "model.onnx").write_bytes(b"not a graph")
    message = why(ModelError, folder, provider=provider, family="sd15")
    assert str(folder / "unet" / "model.onnx") in message and "cannot load" in message


def test_tiny_needs_a_family() -> None:
    assert "sd15" in why(ModelError, "tiny")
    assert open_runtime("tiny", family="sd15", **CPU).default_size == (64, 64)


def test_nothing_there(tmp_path: Path) -> None:
    assert "nowhere" in why(TunekitError, tmp_path / "nowhere")


@pytest.fixture
def engines(tmp_path: Path, tiny_source: Path) -> Artifact:
    """An artifact of engines for a card that nobody has."""
    folder = tmp_path / "engines"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "sm00.engine").write_bytes(b"engine")
    return Artifact(path=folder, model_path=folder, format="tensorrt", family="sd15", source=str(folder))


def test_engines_without_a_card(engines: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = why(DeviceError, engines)
    assert "NVIDIA RTX" in message and message.count("\n") == 1
    assert "no effect" in why(ConfigError, engines, provider="cpu")
    assert "no effect" in why(ConfigError, engines, dtype="fp16")


@pytest.mark.parametrize(("package", "extra"), [("openvino", "openvino"), ("tensorrt_rtx", "tensorrt")])
def test_a_missing_package(
    tiny_onnx: Path, engines: Artifact, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    source, options = (tiny_onnx, {"provider": package}) if package == "openvino" else (engines, {})
    message = why(MissingPackageError, source, **options)
    assert install.with_extra(extra) in message and "\n" not in message


def test_an_engine_takes_as_many_rows_as_its_inputs_with_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of positions is as long as there are tokens, and says nothing about rows."""
    from contextlib import nullcontext

    from tunekit.runtime import tensorrt

    profile = {"sample": [(1, 5, 3), (2, 5, 3), (8, 5, 3)], "positions": [(5, 3)] * 3}

    class Engine:
        num_io_tensors = 3

        def __getattr__(self, name: str) -> Any:
            names = ["sample", "positions", "out"]
            return {
                "get_tensor_name": lambda index: names[index],
                "get_tensor_mode": lambda name: "out" if name == "out" else "in",
                "get_tensor_dtype": lambda name: np.float32,
                "get_tensor_shape": lambda name: (-1, 5, 3) if name != "positions" else (-1, 3),
                "get_tensor_profile_shape": lambda name, index: profile[name],
                "create_execution_context": lambda: "a context",
            }[name]

    runtime = SimpleNamespace(deserialize_cuda_engine=lambda content: Engine())
    package = SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None}),
        Runtime=lambda log: runtime,
        TensorIOMode=SimpleNamespace(INPUT="in"),
        nptype=lambda kind: kind,
    )
    monkeypatch.setattr(tensorrt, "require", lambda *names, **options: package)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    file = tmp_path / "sm89.engine"
    file.write_bytes(b"engine")
    assert tensorrt.EngineGraph(file, torch.device("cpu")).max_rows == 5  # nobody told it better
    (tmp_path / "config.json").write_text('{"unbatched_inputs": ["positions"]}')
    graph = tensorrt.EngineGraph(file, torch.device("cpu"))
    assert graph.max_rows == 8 and graph.unbatched == {"positions"}


def test_engines_for_another_card(engines: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "GeForce RTX 4090")
    monkeypatch.setattr("tunekit.hardware.probe", lambda name: SimpleNamespace(torch_device="cuda:0"))
    message = why(DeviceError, engines, device="auto")
    assert "engines are for sm00" in message and "RTX 4090 needs sm89" in message


# --- into files -------------------------------------------------------------------------------------------


def facts(path: Path) -> dict[Any, Any]:
    """What a picture says of itself."""
    with Image.open(path) as picture:
        return dict(picture.info)


def test_strengths_of_an_adapter_side_by_side(adapter: Path, tiny_source: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"sampling": SamplingConfig(steps=2), **CPU}
    options: dict[str, Any] = {"scales": [0, 0.5, 1], "grid": True, "out": tmp_path, "seed": 3, **few}
    paths = list(workspace.draw(str(adapter), ["a cat", "a dog"], **options))
    assert [path.name for path in paths] == [
        *(f"a-{animal}-3-x{scale}.png" for scale in ("0", "0.5", "1") for animal in ("cat", "dog")),
        "grid-3.png",
    ]
    images = {path.name: np.asarray(Image.open(path), np.float32) for path in paths}
    plain = list(workspace.draw(str(tiny_source), ["a cat"], out=tmp_path / "base", seed=3, **few))
    assert np.abs(images["a-cat-3-x0.png"] - np.asarray(Image.open(plain[0]), np.float32)).max() <= 1
    full = list(workspace.draw(str(adapter), ["a cat"], out=tmp_path / "full", seed=3, **few))
    assert np.abs(images["a-cat-3-x1.png"] - np.asarray(Image.open(full[0]), np.float32)).max() <= 1
    assert len({images[f"a-cat-3-x{scale}.png"].tobytes() for scale in ("0", "0.5", "1")}) == 3
    grid = images["grid-3.png"]
    assert grid.shape == (16 + 2 * 68 - 4, 3 * 68 - 4, 3)
    assert np.array_equal(grid[16:80, 68:132], images["a-cat-3-x0.5.png"])
    assert facts(paths[1])["scale"] == "0"
    assert facts(paths[-1])["columns"] == "scale: 0, 0.5, 1"
    (only,) = workspace.draw(str(adapter), ["a cat"], **{**options, "out": tmp_path / "one.png"})
    assert only.name == "one.png" and not (tmp_path / ".one.png").exists()
    with pytest.raises(ConfigError, match="no adapter that could be scaled"):
        list(workspace.draw(str(tiny_source), ["a cat"], scales=[0.5], **few))
    with pytest.raises(ConfigError, match="2 pictures do not go into one file"):
        list(workspace.draw(str(adapter), ["a cat"], scales=[0, 1], out=tmp_path / "two.png", **few))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_half_the_strength_is_half_the_difference(kind: str) -> None:
    unet = FAMILY.tiny().unet
    layer_name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    before = unet.get_submodule(layer_name).weight.detach().clone()
    for _, parameter in add_adapter(unet, AdapterConfig(kind=kind, rank=2, alpha=3), ["to_q"]):
        parameter.data += 0.1
    layer = unet.get_submodule(layer_name)
    rows = torch.randn(5, before.shape[1], generator=torch.Generator().manual_seed(0))
    pipeline = SimpleNamespace(unet=unet)
    with torch.no_grad():
        base, whole = rows @ before.T, layer(rows)
        for strength in (0, 0.5, 2):
            with at_strength(pipeline, FAMILY, strength):
                assert torch.allclose(layer(rows), base + strength * (whole - base), atol=1e-5)
        assert torch.equal(layer(rows), whole)


def test_a_negative_prompt_without_effect_is_not_written(tiny_source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    sampling = SamplingConfig(steps=1, guidance=1, negative_prompt="blue")
    (path,) = workspace.draw(str(tiny_source), ["a cat"], sampling, out=tmp_path, say=said.append, **CPU)
    assert facts(path)["negative_prompt"] == ""
    assert len(said) == 1 and "negative prompt has no effect" in said[0]


def test_a_full_disk_leaves_no_empty_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match="no space left"):
        workspace._save_png(tmp_path / "out" / "a.png", Image.new("RGB", (8, 8)), {})
    assert list((tmp_path / "out").iterdir()) == []


def test_scales_are_numbers_with_commas() -> None:
    assert strengths_of(None, "--scale") == [] and strengths_of("0, 0.5,1,0.5", "--scale") == [0, 0.5, 1]
    for text in ("", "0;1", "nan", "0,,1", "1e9", "inf"):
        with pytest.raises(ConfigError, match="no strength of an adapter"):
            strengths_of(text, "--scale")
