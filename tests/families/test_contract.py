"""What every family promises, tried on its real classes at size `tiny`."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tunekit import families
from tunekit.config import ObjectiveConfig
from tunekit.diffusion.metrics import relative_error
from tunekit.diffusion.objectives import FlowMatching
from tunekit.errors import ConfigError, ModelError
from tunekit.families import Family, Frame
from tunekit.runtime.step_cache import TorchSplit

PROMPTS = ["a red cat", "the moon"]
TINY_BYTES = 20_000_000


@pytest.fixture(scope="module", params=families.runnable())
def family(request: pytest.FixtureRequest) -> Family:
    return families.get(request.param)


@pytest.fixture(scope="module")
def pipeline(family: Family) -> Any:
    return family.load("tiny")


@pytest.fixture(scope="module")
def saved(family: Family, pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(family.name) / "saved"
    family.save(pipeline, folder)
    return str(folder)


def pixels(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def inputs(family: Family, pipeline: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Two rows that differ in all they have, also in what part of which picture they are."""
    height, width = family.default_size(pipeline)
    shape = family.latent_shape(pipeline, height, width)
    noisy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    frames = [Frame.whole(height, width), Frame((300, 200), (4, 0), (height, width))]
    encoded = family.encode_prompt(pipeline, PROMPTS)
    told = family.conditioning(encoded, torch.stack([frame.row for frame in frames]))
    return noisy, torch.tensor([20.0, 700.0]), told


def settings(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def weights(pipeline: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
        for key, tensor in part.state_dict().items()
    }


def test_its_name_is_its_file(family: Family) -> None:
    assert type(family).__module__ == f"tunekit.families.{family.name}"
    assert families.get(family.name) is family


def test_what_it_saves_it_finds_nothing_wrong_with(family: Family, saved: str) -> None:
    assert family.look(saved) == [] and family.look("tiny") == []
    assert family.look("somebody/on-the-hub") == []  # nothing is fetched


def test_facts_name_things_that_exist(family: Family, pipeline: Any) -> None:
    import diffusers

    facts = family.facts
    assert type(pipeline) is getattr(diffusers, facts.pipeline_class)
    assert getattr(pipeline, facts.denoiser_name) is family.denoiser(pipeline)
    assert facts.denoiser_name in facts.kohya_prefixes
    assert facts.encoders and all(prefixes for prefixes in facts.kohya_prefixes.values())
    for part in facts.components:
        assert getattr(pipeline, part.name) is not None
        if part.tokenizer:
            assert getattr(pipeline, part.tokenizer).model_max_length <= part.tokens
        if part.role != "scheduler":
            assert type(getattr(pipeline, part.name)) is part.type
        assert len(part.kohya) == len(set(part.kohya))
    assert set(facts.kohya_prefixes) <= {part.name for part in facts.components}
    prefixes = [prefix for part in facts.components for prefix in part.kohya]
    assert len(prefixes) == len(set(prefixes))
    networks = {name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert {part.name for part in facts.components if part.role != "scheduler"} == networks
    assert facts.default_source.count("/") == 1
    assert facts.ss_base_model_version and facts.modelspec_architecture and facts.title


@torch.no_grad()
def test_its_middle_can_be_taken_from_another_step(family: Family, pipeline: Any) -> None:
    """From the same step it is the same prediction, although nothing of the middle runs."""
    denoiser, (noisy, times, told) = family.denoiser(pipeline), inputs(family, pipeline)
    middle = family.middle(denoiser)
    assert middle is not None
    inside = [p.numel() for path in middle.paths for p in denoiser.get_submodule(path).parameters()]
    assert sum(inside) < sum(p.numel() for p in denoiser.parameters())

    def call() -> Tensor:
        return family.denoise(denoiser, noisy, times, told)

    split, expected = TorchSplit(denoiser, middle), call()
    prediction, given = split.whole(call)
    assert torch.equal(prediction, expected) and all(len(one) == len(noisy) for one in given)
    ran = []
    inner = [next(denoiser.get_submodule(path).children()) for path in middle.paths]
    hooks = [
        part.register_forward_hook(lambda *_: ran.append(1)) for module in inner for part in module.modules()
    ]
    again = split.outer(given, call)
    assert not ran and torch.allclose(again, expected, atol=1e-5, rtol=1e-4)
    other = split.outer([one * 0 for one in given], call)
    assert not torch.allclose(other, expected, atol=1e-3)
    assert torch.equal(call(), expected) and ran
    for hook in hooks:
        hook.remove()


def test_tiny_is_small_and_a_function_of_its_seed(family: Family, pipeline: Any) -> None:
    state = torch.random.get_rng_state()
    again, other = family.tiny(0), family.tiny(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    own = weights(pipeline)
    assert sum(t.numel() * t.element_size() for t in own.values()) < TINY_BYTES
    assert all(torch.equal(tensor, own[key]) for key, tensor in weights(again).items())
    assert any(not torch.equal(tensor, own[key]) for key, tensor in weights(other).items())


def test_everything_is_in_eval_mode(pipeline: Any) -> None:
    assert not any(part.training for part in pipeline.components.values() if hasattr(part, "training"))


def test_sensitive_parts_and_inputs_exist(family: Family, pipeline: Any) -> None:
    """What loses most in few bits is a part of the network; what keeps its type, an input of it."""
    inputs = {graph.name: set(graph.inputs) for graph in family.export_components(pipeline)}
    name = family.facts.denoiser_name
    inputs[name] |= set(inspect.signature(type(family.denoiser(pipeline)).forward).parameters)
    for part in family.facts.components:
        for path in part.sensitive:
            assert getattr(pipeline, part.name).get_submodule(path) is not None
        assert set(part.keeps) <= inputs.get(part.name, set())
    assert family.facts.denoiser.sensitive and family.facts.denoiser.keeps


def test_each_part_has_a_type_of_its_own(family: Family) -> None:
    """The VAE stays float32 while the denoiser computes in 16 bits, and text encoders have what they need."""
    wanted = family.facts.dtypes(torch.bfloat16)
    made = family.load("tiny", wanted)
    assert wanted[family.facts.denoiser_name] == torch.bfloat16 and wanted["vae"] == torch.float32
    for part in family.facts.components:
        if part.role != "scheduler":
            assert {t.dtype for t in getattr(made, part.name).parameters()} == {wanted[part.name]}, part.name
    half = family.facts.drawing_dtypes(torch.float16)
    assert {name for name, kind in half.items() if kind == torch.float32} == set(family.facts.overflowing)


def test_sizes_are_those_of_the_pipeline(family: Family, pipeline: Any, saved: str) -> None:
    """Planning sees the shapes that encoding and denoising will have, without a weight."""
    sizes = [families.sizes_of(family.name, source) for source in ("tiny", saved)]
    height, width = family.default_size(pipeline)
    encoded = {
        key: (tuple(value.shape), value.dtype)
        for key, value in family.encode_prompt(pipeline, PROMPTS).items()
    }
    for found in sizes:
        assert not found.assumed
        assert {k: (tuple(v.shape), v.dtype) for k, v in found.encoded(2).items()} == encoded
        assert found.latents(3, height, width).shape == (3, *family.latent_shape(pipeline, height, width))
        stand_in = found.pipeline()
        for part in found.networks:
            network = getattr(stand_in, part.name)
            assert {k: v.shape for k, v in network.state_dict().items()} == {
                k: v.shape for k, v in getattr(pipeline, part.name).state_dict().items()
            }
            assert all(value.is_meta for value in network.parameters())
        assert family.objective(stand_in).num_train_timesteps == 1000


def test_save_and_load_change_nothing(family: Family, pipeline: Any, saved: str) -> None:
    assert families.detect(saved) == family.name
    loaded = family.load(saved)
    own, read = weights(pipeline), weights(loaded)
    assert own.keys() == read.keys()
    assert all(torch.equal(tensor, own[key]) for key, tensor in read.items())
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert settings(loaded.scheduler) == settings(pipeline.scheduler)
    before, after = family.encode_prompt(pipeline, PROMPTS), family.encode_prompt(loaded, PROMPTS)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_come_in_the_dtype_asked_for(family: Family, saved: str, dtype: torch.dtype) -> None:
    kinds = {t.dtype for t in weights(family.load(saved, dtype)).values() if t.is_floating_point()}
    assert kinds == {dtype}


def test_conditioning_is_batched_along_dim_0(family: Family, pipeline: Any) -> None:
    both = family.encode_prompt(pipeline, PROMPTS)
    one = family.encode_prompt(pipeline, PROMPTS[1:])
    for key, tensor in both.items():
        assert len(tensor) == 2
        assert torch.isfinite(tensor).all()
        torch.testing.assert_close(tensor[1:], one[key])
    assert any(relative_error(tensor[0], tensor[1]) > 0.01 for tensor in both.values())


def test_a_prompt_longer_than_the_tokenizer_takes_is_cut(family: Family, pipeline: Any) -> None:
    short, long = family.encode_prompt(pipeline, ["a"]), family.encode_prompt(pipeline, ["a very " * 200])
    assert {k: t.shape for k, t in short.items()} == {k: t.shape for k, t in long.items()}


def test_latents_have_the_shape_that_was_said(family: Family, pipeline: Any) -> None:
    multiple = family.resolution_multiple(pipeline)
    height, width = 4 * multiple, 5 * multiple
    channels, h, w = family.latent_shape(pipeline, height, width)
    moments = family.encode_image(pipeline, pixels(2, height, width))
    assert moments.shape == (2, 2 * channels, h, w)
    assert moments.dtype == torch.float32
    assert torch.isfinite(moments).all()
    assert (moments[:, channels:] > 0).all()
    decoded = family.decode(pipeline, moments[:, :channels])
    assert decoded.shape == (2, 3, height, width)
    assert decoded.dtype == torch.float32
    assert decoded.min() >= 0 and decoded.max() <= 1
    assert decoded.std() > 0.05


def test_other_sizes_are_refused_with_the_nearest(family: Family, pipeline: Any) -> None:
    multiple = family.resolution_multiple(pipeline)
    for size in (4 * multiple + 1, 0, -multiple):
        with pytest.raises(ConfigError, match=f"multiple of {multiple}"):
            family.latent_shape(pipeline, 4 * multiple, size)


def test_latents_are_scaled_as_the_pipeline_does(family: Family, pipeline: Any) -> None:
    """`decode` undoes the scale of `encode_image`: the VAE's decoder sees what its encoder gave."""
    picture = pixels(1, *family.default_size(pipeline))
    mean, std = family.encode_image(pipeline, picture).chunk(2, dim=1)
    film = next(p for p in pipeline.vae.parameters() if p.ndim > 1).ndim == 5  # a picture is one frame
    raw = pipeline.vae.encode(picture.unsqueeze(2) if film else picture).latent_dist
    for share in (
        0.0,
        1.0,
    ):  # drawn from the scaled posterior, it is what would be drawn of the encoder's own
        drawn = pipeline.vae.decode(raw.mean + share * raw.std).sample
        expected = ((drawn.squeeze(2) if film else drawn) / 2 + 0.5).clamp(0, 1)
        found = family.decode(pipeline, mean + share * std)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_denoiser_listens_to_everything(family: Family, pipeline: Any) -> None:
    noisy, timestep, conditioning = inputs(family, pipeline)
    denoiser = family.denoiser(pipeline)
    prediction = family.denoise(denoiser, noisy, timestep, conditioning)
    assert prediction.shape == noisy.shape
    assert torch.isfinite(prediction).all()

    swapped = {key: tensor.flip(0) for key, tensor in conditioning.items()}
    for other in (
        family.denoise(denoiser, noisy.flip(0), timestep, conditioning),
        family.denoise(denoiser, noisy, timestep.flip(0), conditioning),
        family.denoise(denoiser, noisy, timestep, swapped),
    ):
        assert relative_error(other, prediction) > 1e-3
    second = {key: tensor[1:] for key, tensor in conditioning.items()}
    alone = family.denoise(denoiser, noisy[1:], timestep[1:], second)
    torch.testing.assert_close(alone, prediction[1:], atol=1e-5, rtol=1e-4)


def learns_by_flow(family: Family, pipeline: Any) -> bool:
    return isinstance(family.objective(pipeline), FlowMatching)


def test_the_objective_belongs_to_the_scheduler(family: Family, pipeline: Any) -> None:
    noisy, timestep, _ = inputs(family, pipeline)
    config = pipeline.scheduler.config
    if learns_by_flow(family, pipeline):
        with pytest.raises(ConfigError, match="snr_gamma has no effect"):
            family.objective(pipeline, ObjectiveConfig(snr_gamma=5.0))
        objective = family.objective(pipeline, ObjectiveConfig(noise_offset=0.1))
    else:
        objective = family.objective(pipeline, ObjectiveConfig(snr_gamma=5.0))
        assert objective.prediction_type == config.prediction_type  # type: ignore[attr-defined]
        weight = objective.sample(noisy, noisy, timestep).weight
        assert not torch.equal(weight, family.objective(pipeline).sample(noisy, noisy, timestep).weight)
    assert objective.num_train_timesteps == config.num_train_timesteps
    again, times, target, _ = objective.sample(noisy, noisy, timestep)
    assert again.shape == target.shape == noisy.shape and torch.equal(times, timestep)
    assert family.objective(pipeline).sample(noisy, noisy, timestep).weight.tolist() == [1.0, 1.0]


DISCRETE = (
    ("DDPMScheduler", {}),
    ("PNDMScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
)
OF_FLOW = (
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
)


@pytest.mark.parametrize("kind", [DISCRETE, OF_FLOW], ids=["discrete", "flow"])
def test_a_scheduler_of_the_other_kind_is_refused(family: Family, pipeline: Any, kind: Any) -> None:
    """Its noise levels are those of another model: training on them would teach noise."""
    import diffusers

    own = OF_FLOW if learns_by_flow(family, pipeline) else DISCRETE
    for name, settings in kind:
        there = SimpleNamespace(**{**pipeline.components, "scheduler": getattr(diffusers, name)(**settings)})
        if kind is own:
            assert family.objective(there).num_train_timesteps == 1000
        else:
            with pytest.raises(ModelError, match=f"its scheduler is {name}"):
                family.objective(there)


def test_blocks_are_parts_of_the_denoiser(family: Family, pipeline: Any) -> None:
    denoiser = family.denoiser(pipeline)
    blocks = family.blocks(denoiser)
    assert len(blocks) > 1
    assert all(denoiser.get_submodule(path) is block for path, block in blocks)
    real = family.facts.denoiser.build()
    inside = sum(p.numel() for _, block in family.blocks(real) for p in block.parameters())
    assert inside > 0.5 * sum(p.numel() for p in real.parameters())


def test_blocks_are_in_the_order_they_run(family: Family, pipeline: Any) -> None:
    denoiser = family.denoiser(pipeline)
    ran: list[str] = []
    handles = [
        block.register_forward_hook(lambda *_, path=path: ran.append(path))
        for path, block in family.blocks(denoiser)
    ]
    with torch.no_grad():
        family.denoise(denoiser, *inputs(family, pipeline))
    for handle in handles:
        handle.remove()
    assert ran == [path for path, _ in family.blocks(denoiser)]


@torch.no_grad()
def test_every_block_gives_the_pictures_state(family: Family, pipeline: Any) -> None:
    denoiser = family.denoiser(pipeline)
    states: dict[str, Any] = {}
    handles = [
        block.register_forward_hook(
            lambda module, args, output, path=path: states.update({path: family.picture_state(output)})
        )
        for path, block in family.blocks(denoiser)
    ]
    noisy, timestep, known = inputs(family, pipeline)
    plain = family.denoise(denoiser, noisy, timestep, known)
    before = dict(states)
    moved = family.denoise(denoiser, noisy + 0.5, timestep, known)
    for handle in handles:
        handle.remove()
    assert not torch.equal(plain, moved)
    for path, state in before.items():
        assert isinstance(state, Tensor) and len(state) == 2, path
        assert not torch.equal(state, states[path]), f"{path}: does not depend on the picture"


def test_module_names_of_kohya_files_are_unique(family: Family, pipeline: Any) -> None:
    for name, prefixes in family.facts.kohya_prefixes.items():
        network = getattr(pipeline, name)
        paths = [
            path
            for path, module in network.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        ]
        assert prefixes
        owners: dict[str, tuple[str, ...]] = {}
        written: set[str] = set()
        for layer in family.adapter_names(name, paths):
            assert set(layer.parts) <= set(paths)
            assert owners.setdefault(layer.name.replace(".", "_"), layer.parts) == layer.parts
            if written.isdisjoint(layer.parts):  # else a name that is only read
                written.update(layer.parts)
        assert written == set(paths)


def test_every_lora_target_names_layers(family: Family, pipeline: Any) -> None:
    paths = [
        path
        for path, module in family.denoiser(pipeline).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    assert family.facts.lora_targets
    for target in family.facts.lora_targets:
        assert any(path.endswith("." + target) for path in paths), target


@torch.no_grad()
def test_export_components_run_at_other_sizes(family: Family, pipeline: Any) -> None:
    components = family.export_components(pipeline)
    assert family.facts.denoiser_name in {component.name for component in components}
    for component in components:
        json.dumps(component.config)
        assert component.config["_class_name" if "_class_name" in component.config else "model_type"]
        assert component.dynamic.keys() <= component.inputs.keys()
        sizes = {
            axis: component.multiples.get(axis, 1) * count
            for axis, count in {"batch": 3, "height": 4, "width": 6, "sequence": 7, "tokens": 5}.items()
        }
        feeds = []
        for name, example in component.inputs.items():
            axes = component.dynamic.get(name, {})
            shape = [
                sum(sizes[axis] for axis in axes[dim].split("+")) if dim in axes else size
                for dim, size in enumerate(example.shape)
            ]
            feeds.append(torch.ones(shape, dtype=example.dtype))
        for values in (component.inputs.values(), feeds):
            outputs = component.module(*values)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            assert len(outputs) == len(component.outputs)
            rows = max(
                len(value)
                for name, value in zip(component.inputs, values, strict=True)
                if component.dynamic.get(name, {}).get(0) == "batch"
            )
            assert all(torch.isfinite(o).all() and len(o) == rows for o in outputs)


@torch.no_grad()
def test_export_components_compute_what_the_family_computes(family: Family, pipeline: Any) -> None:
    components = {component.name: component for component in family.export_components(pipeline)}
    noisy, timestep, conditioning = inputs(family, pipeline)
    denoiser = components[family.facts.denoiser_name]

    class StandIn:
        """Called as the family calls its network, and fed as a graph is: by name, with one time for all."""

        config = family.denoiser(pipeline).config

        def __call__(self, return_dict: bool = False, **given: Any) -> tuple[Tensor]:
            feeds: dict[str, Tensor] = {}
            for name, value in given.items():
                feeds |= value if isinstance(value, dict) else {name: value}
            feeds["timestep"] = feeds["timestep"][:1]
            assert feeds.keys() == denoiser.inputs.keys()
            return (denoiser.module(*(feeds[name] for name in denoiser.inputs)),)

    together: Any = StandIn()
    prediction = family.denoise(together, noisy, timestep[:1].expand(2), conditioning)
    expected = family.denoise(family.denoiser(pipeline), noisy, timestep[:1].expand(2), conditioning)
    torch.testing.assert_close(prediction, expected)
