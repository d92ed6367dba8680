"""Both files say what was trained: to diffusers' own loader, and to a reader that is written out here.

The reader knows the rules of a U-Net's keys and nothing of ours: kohya's tools train SD 1.x and 2.x under the
names of diffusers, and SDXL under those of the network it was published with, whose blocks are numbered
through all levels. Of networks that were published with other layers, see test_published.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tunekit import families
from tunekit.adapters import (
    Deltas,
    Lora,
    load_adapter,
    merge_adapter,
    read_adapter,
    to_kohya,
    to_peft,
)
from tunekit.adapters.delta import changeable, deltas_of, modules_of
from tunekit.adapters.names import Place, places_of, written_layers
from tunekit.config import AdapterConfig, SamplingConfig
from tunekit.diffusion.metrics import relative_error
from tunekit.families import Family
from tunekit.runtime import generate_pixels, torch_runtime

Train = Callable[..., None]
Trained = Callable[[Family, AdapterConfig], Any]
Save = Callable[..., tuple[Path, Path]]
Predict = Callable[[Family, Any], Tensor]
Load = Callable[[Any, Path], None]
State = dict[str, Tensor]
Layer = tuple[str, str]
Updates = dict[Layer, Tensor]
"""Component and module path -> what is added to the weight."""
Everywhere = tuple[dict[str, Path], Updates]

PEFT = "pytorch_lora_weights.safetensors"
FILES = ["peft", "other"]
UNETS = [name for name in families.runnable() if families.get(name).facts.denoiser_name == "unet"]
RANK, ALPHA = 3, 7.0
TOLERANCE = 1e-5
IN_ENCODERS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
]


# What the model says ----------------------------------------------------------------------------------------


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Of a module without an adapter."""
    return {path: m for path, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def in_blocks(module: nn.Module) -> list[str]:
    """The paths of layers that lie in numbered blocks."""
    return [path for path in linear_layers(module) if any(part.isdigit() for part in path.split(".")[:-1])]


def weights(family: Family, pipeline: Any) -> Updates:
    return {
        (component, path): layer.weight.detach().clone()
        for component in family.facts.kohya_prefixes
        for path, layer in linear_layers(getattr(pipeline, component)).items()
    }


def updates_in(family: Family, pipeline: Any) -> Updates:
    """What the adapters in a pipeline add to its weights, as peft itself folds them in."""
    before = weights(family, family.tiny())
    found = {}
    for component in family.facts.kohya_prefixes:
        for path, layer in getattr(pipeline, component).named_modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                found[component, path] = layer.get_base_layer().weight.detach() - before[component, path]
                layer.unmerge()
    return found


def changed(family: Family, pipeline: Any) -> Updates:
    """By how much the weights of a pipeline differ from the base, where they do."""
    before, after = weights(family, family.tiny()), weights(family, pipeline)
    return {
        place: after[place] - before[place]
        for place in before
        if not torch.equal(after[place], before[place])
    }


def largest_difference(found: Updates, wanted: Updates) -> float:
    assert found.keys() == wanted.keys()
    return max(
        float((found[place] - wanted[place]).abs().max() / wanted[place].abs().max()) for place in wanted
    )


# The reader -------------------------------------------------------------------------------------------------


def sgm_places(config: Any) -> dict[str, str]:
    """Parts of the network that SDXL was published with, by its own numbers -> diffusers' names of them."""
    places = {
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    block = 1
    for level, kind in enumerate(config.down_block_types):
        for index in range(config.layers_per_block):
            places[f"input_blocks.{block}.0"] = f"down_blocks.{level}.resnets.{index}"
            if kind.startswith("CrossAttn"):
                places[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{index}"
            block += 1
        if level + 1 < len(config.down_block_types):
            places[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    block = 0
    for level, kind in enumerate(config.up_block_types):
        for index in range(config.layers_per_block + 1):
            parts = [f"up_blocks.{level}.resnets.{index}"]
            if kind.startswith("CrossAttn"):
                parts.append(f"up_blocks.{level}.attentions.{index}")
            for position, part in enumerate(parts):
                places[f"output_blocks.{block}.{position}"] = part
            if index == config.layers_per_block and level + 1 < len(config.up_block_types):
                places[f"output_blocks.{block}.{len(parts)}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
            block += 1
    return places


IN_RESNETS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def kohya_names_of_unet(unet: nn.Module) -> dict[str, str]:
    """Key in a kohya file -> module path in diffusers."""
    if unet.config.addition_embed_type != "text_time":  # type: ignore[union-attr]
        return {"lora_unet_" + path.replace(".", "_"): path for path in linear_layers(unet)}
    return published_names_of_unet(unet)


def published_names_of_unet(unet: nn.Module) -> dict[str, str]:
    """Key in a file of the names that a U-Net was published with -> module path in diffusers."""
    paths = linear_layers(unet)
    names = {}
    for theirs, ours in sgm_places(unet.config).items():
        for path in paths:
            if path != ours and not path.startswith(ours + "."):
                continue
            rest = path.removeprefix(ours).removeprefix(".")
            rest = IN_RESNETS[rest] if ".resnets." in path else rest
            name = f"{theirs}.{rest}".removesuffix(".")
            names["lora_unet_" + name.replace(".", "_")] = path
    return names


def kohya_names_of_encoder(encoder: nn.Module, prefix: str) -> dict[str, str]:
    inside = "text_model." if hasattr(encoder, "text_model") else ""
    return {
        f"{prefix}_text_model_encoder_layers_{i}_{part}".replace(
            ".", "_"
        ): f"{inside}encoder.layers.{i}.{part}"
        for i in range(encoder.config.num_hidden_layers)  # type: ignore[union-attr]
        for part in IN_ENCODERS
    }


def kohya_names(pipeline: Any) -> dict[str, Layer]:
    """Of a diffusers pipeline without adapters."""
    names = {name: ("unet", path) for name, path in kohya_names_of_unet(pipeline.unet).items()}
    encoders = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipeline, name)]
    prefixes = ["lora_te"] if len(encoders) == 1 else ["lora_te1", "lora_te2"]
    for component, prefix in zip(encoders, prefixes, strict=True):
        found = kohya_names_of_encoder(getattr(pipeline, component), prefix)
        names |= {name: (component, path) for name, path in found.items()}
    return names


def added(weight: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor | None) -> Tensor:
    """What an update adds to a weight."""
    update = scale * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(weight.shape)
    if magnitude is None:
        return update
    whole = weight + update
    rows = [1] * (weight.ndim - 1)
    return whole / whole.flatten(1).norm(dim=1).view(-1, *rows) * magnitude.view(-1, *rows) - weight


def read_kohya(file: Path, base: Any) -> Updates:
    state = safetensors.torch.load_file(file)
    names = kohya_names(base)
    found: Updates = {}
    for name in {key.partition(".")[0] for key in state}:
        down, up = state.pop(f"{name}.lora_down.weight"), state.pop(f"{name}.lora_up.weight")
        scale = float(state.pop(f"{name}.alpha")) / len(down)
        component, path = names[name]
        weight = getattr(base, component).get_submodule(path).weight.detach()
        found[component, path] = added(weight, down, up, scale, state.pop(f"{name}.dora_scale", None))
    assert not state
    return found


def read_peft(file: Path, base: Any) -> Updates:
    with safetensors.safe_open(file, framework="pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    state = safetensors.torch.load_file(file)
    found: Updates = {}
    for name in {key.partition(".lora_")[0] for key in state}:
        component, _, path = name.partition(".")
        down, up = state.pop(f"{name}.lora_A.weight"), state.pop(f"{name}.lora_B.weight")
        assert settings[f"{component}.lora_alpha"] == settings[f"{component}.r"] == len(down)
        scale = 1.0  # as readers have it that know no alpha
        assert path in settings[f"{component}.target_modules"]
        weight = getattr(base, component).get_submodule(path).weight.detach()
        found[component, path] = added(
            weight, down, up, scale, state.pop(f"{name}.lora_magnitude_vector", None)
        )
    assert not state
    return found


# What we write ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["lora", "dora"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def everywhere(
    family: Family, kind: str, tmp_path_factory: pytest.TempPathFactory, trained: Trained, save: Save
) -> Everywhere:
    """Both files of an adapter on all of the denoiser, by `FILES`, and what it adds to the weights."""
    targets = list(linear_layers(family.denoiser(family.tiny())))
    config = AdapterConfig(kind=kind, rank=RANK, alpha=ALPHA, targets=targets)
    pipeline = trained(family, config)
    files = save(tmp_path_factory.mktemp(family.name), pipeline, family, config)
    return dict(zip(FILES, files, strict=True)), updates_in(family, pipeline)


def test_every_layer_of_the_denoiser_is_trained_and_written(family: Family, everywhere: Everywhere) -> None:
    files, updates = everywhere
    name = family.facts.denoiser_name
    layers = linear_layers(family.denoiser(family.tiny()))
    assert {path for _, path in updates} == layers.keys()
    assert all(update.abs().max() > 0 for update in updates.values())
    downs = {
        file: sum(
            key.endswith((".lora_A.weight", ".lora_down.weight")) for key in safetensors.torch.load_file(path)
        )
        for file, path in files.items()
    }
    assert downs == {"peft": len(layers), "other": len(written_layers(name, {name: layers}, family))}


@pytest.mark.parametrize("family", UNETS, indirect=True)
@pytest.mark.parametrize("file", FILES)
def test_the_rules_of_the_keys_give_the_same_updates(
    family: Family, everywhere: Everywhere, file: str
) -> None:
    files, updates = everywhere
    read = {"peft": read_peft, "other": read_kohya}[file]
    difference = largest_difference(read(files[file], family.tiny()), updates)
    print(f"{len(updates)} layers, largest difference {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("file", FILES)
def test_diffusers_reads_the_same_updates(
    family: Family, kind: str, everywhere: Everywhere, file: str, load_in_diffusers: Load
) -> None:
    if file == "other":
        if kind == "dora":
            pytest.skip("diffusers leaves the DoRA scale out of such files")
        name = family.facts.denoiser_name
        layers = written_layers(name, {name: linear_layers(family.denoiser(family.tiny()))}, family)
        if any(len(layer.parts) > 1 for layer in layers):
            pytest.skip("diffusers has the sizes of real ones written in: see test_published.py")
    files, updates = everywhere
    pipeline = family.tiny()
    load_in_diffusers(pipeline, files[file])
    by_layer = largest_difference(updates_in(family, pipeline), updates)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    difference = largest_difference(changed(family, pipeline), updates)
    print(f"{len(updates)} layers, largest difference {by_layer:.1e}, {difference:.1e} when folded in")
    assert max(by_layer, difference) <= TOLERANCE


def in_all(family: Family, train: Train, **options: Any) -> Any:
    """A pipeline with an adapter of peft's in every component that may have one."""
    pipeline = family.tiny()
    for seed, component in enumerate(family.facts.kohya_prefixes):
        module = getattr(pipeline, component)
        targets = linear_layers(module) if component == family.facts.denoiser_name else in_blocks(module)
        module.requires_grad_(False)
        module.add_adapter(
            LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), **options), "default"
        )
        train([(name, p) for name, p in module.named_parameters() if p.requires_grad], seed)
    return pipeline


def test_text_encoders_in_kohya_files(
    family: Family, kind: str, tmp_path: Path, train: Train, load_in_diffusers: Load
) -> None:
    pipeline = in_all(family, train, use_dora=kind == "dora")
    parts = {name: getattr(pipeline, name) for name in family.facts.kohya_prefixes}
    deltas: Deltas = {name: deltas_of(part) for name, part in parts.items()}
    state = to_kohya(deltas, {name: modules_of(part) for name, part in parts.items()}, family)
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    updates = updates_in(family, pipeline)
    assert {component for component, _ in updates} == set(parts)
    merged = family.tiny()
    merge_adapter(merged, family, file)
    ours = largest_difference(changed(family, merged), updates)
    print(f"{len(updates)} layers, largest difference {ours:.1e} by ourselves")
    assert ours <= TOLERANCE
    if family.name in UNETS:
        read = largest_difference(read_kohya(file, family.tiny()), updates)
        print(f"by the rules {read:.1e}")
        assert read <= TOLERANCE
    if family.name in UNETS and kind == "lora":
        loaded = family.tiny()
        load_in_diffusers(loaded, file)
        difference = largest_difference(updates_in(family, loaded), updates)
        print(f"in diffusers {difference:.1e}")
        assert difference <= TOLERANCE
    # PEFT's layout needs no header to be read rightly.
    bare, loaded, merged = write(tmp_path / "bare.safetensors", to_peft(deltas)), family.tiny(), family.tiny()
    merge_adapter(merged, family, bare)
    assert largest_difference(changed(family, merged), updates) <= TOLERANCE
    if kind == "lora":  # with transformers 5, diffusers loses the lengths of text encoders
        load_in_diffusers(loaded, bare)
        theirs = {
            place: update
            for place, update in updates.items()
            if place[0] in type(loaded)._lora_loadable_modules
        }
        assert largest_difference(updates_in(family, loaded), theirs) <= TOLERANCE


def test_files_that_diffusers_writes(family: Family, kind: str, tmp_path: Path, train: Train) -> None:
    pipeline = in_all(family, train, use_dora=kind == "dora")
    layers: dict[str, Any] = {}
    written = [name for name in family.facts.kohya_prefixes if name in type(pipeline)._lora_loadable_modules]
    for component in written:
        module = getattr(pipeline, component)
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(module, adapter_name="default")
        layers[f"{component}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    pipeline.save_lora_weights(tmp_path, **layers)
    merged = family.tiny()
    merge_adapter(merged, family, tmp_path)
    updates = {place: update for place, update in updates_in(family, pipeline).items() if place[0] in written}
    difference = largest_difference(changed(family, merged), updates)
    print(f"largest difference {difference:.1e}")
    assert difference <= TOLERANCE


# Names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "adapted"),
    # What kohya's tools say when they begin: "create LoRA for U-Net: 722 modules", and so on.
    [
        ("sd15", {"unet": 192, "text_encoder": 72}),
        ("sd2", {"unet": 192, "text_encoder": 138}),
        ("sdxl", {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}),
    ],
)
def test_names_at_full_size(name: str, adapted: dict[str, int]) -> None:
    family = families.get(name)
    parts = {component: family.facts.component(component).build() for component in adapted}
    assert parts.keys() == family.facts.kohya_prefixes.keys()
    expected: dict[str, Layer] = kohya_names(SimpleNamespace(**parts))
    every: list[str] = []
    for component, part in parts.items():
        prefixes = family.facts.kohya_prefixes[component]
        modules = modules_of(part)
        layers = written_layers(component, {component: modules}, family)
        assert [layer.parts for layer in layers] == [(path,) for path in linear_layers(part)]
        known = {layer.name.replace(".", "_") for layer in family.adapter_names(component, list(modules))}
        every += [f"{prefix}_{name}" for prefix in prefixes for name in known]
        written = {
            f"{prefixes[0]}_{layer.name}".replace(".", "_"): (component, layer.parts[0]) for layer in layers
        }
        wanted = {key: place for key, place in expected.items() if place[0] == component}
        assert wanted.items() <= written.items()
        ends = tuple(f".{end}" for end in (*family.facts.lora_targets, *IN_ENCODERS))
        assert sum(path.endswith(ends) for path in modules) == adapted[component]
    assert len(set(every)) == len(every)  # no name could be two modules


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_names_that_networks_were_published_with_are_read(name: str) -> None:
    """A1111's and ComfyUI's users have them of every family."""
    family = families.get(name)
    unet = family.facts.denoiser.build()
    places = places_of({"unet": changeable(unet)}, family)
    names = published_names_of_unet(unet)
    assert len(names) > 250
    for key, path in names.items():
        place = Place("unet", (path,))
        assert places[key] == places[key.replace("lora_unet", "diffusion_model")] == place


def test_names_of_sdxl() -> None:
    """Some of a file of kohya's, with what they are in diffusers."""
    unet = families.get("sdxl").facts.denoiser.build()
    layers = written_layers("unet", {"unet": modules_of(unet)}, families.get("sdxl"))
    names = {path: layer.name.replace(".", "_") for layer in layers for path in layer.parts}
    for name, path in {
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": (
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj"
        ),
        "middle_block_1_proj_out": "mid_block.attentions.0.proj_out",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_0_skip_connection": "up_blocks.1.resnets.2.conv_shortcut",
        "output_blocks_8_0_emb_layers_1": "up_blocks.2.resnets.2.time_emb_proj",
    }.items():
        assert names[path] == name


def test_names_of_diffusers_are_read_too(family: Family, everywhere: Everywhere, tmp_path: Path) -> None:
    files, updates = everywhere
    state: State = {}
    for path, delta in read_adapter(family.tiny(), family, files["peft"])[family.facts.denoiser_name].items():
        assert isinstance(delta, Lora)
        name = f"lora_unet_{path.replace('.', '_')}"
        state |= {f"{name}.{ending}": tensor for ending, tensor in delta.kohya().items()}
        state[f"{name}.alpha"] = torch.tensor(float(delta.alpha))
    merged = family.tiny()
    merge_adapter(merged, family, write(tmp_path / "a.safetensors", state))
    assert largest_difference(changed(family, merged), updates) <= TOLERANCE


def test_every_spelling_of_text_encoders(family: Family, tmp_path: Path) -> None:
    """Files say `text_model`, which some encoders have lost with transformers 5."""
    base = family.tiny()
    for encoder in family.facts.encoders:
        if not encoder.kohya:
            continue
        modules = linear_layers(getattr(base, encoder.name))
        path, layer = next((path, layer) for path, layer in modules.items() if ".1." in path)
        short = path.removeprefix("text_model.")
        spellings = [f"{encoder.name}.{path}", f"{encoder.name}.text_model.{short}"]
        for prefix in encoder.kohya:
            spellings += [f"{prefix}_{name}".replace(".", "_") for name in (short, f"text_model.{short}")]
        out, inside = layer.weight.shape  # type: ignore[union-attr, misc]
        for name in spellings:
            file = write(tmp_path / "a.safetensors", pair(name, 2, inside, out))
            assert only(read_adapter(base, family, file))[:2] == (encoder.name, path)


# What files of others say -----------------------------------------------------------------------------------

SD15 = families.get("sd15")
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
IN_KOHYA = "lora_unet_" + LAYER.replace(".", "_")


def write(file: Path, state: State, **metadata: str) -> Path:
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    safetensors.torch.save_file(state, file, metadata=metadata or None)
    return file


def pair(name: str, rank: int, inside: int = 32, out: int = 32) -> State:
    """The update of a layer, under its name in either layout."""
    draw = torch.Generator().manual_seed(rank)
    down, up = torch.randn(rank, inside, generator=draw), torch.randn(out, rank, generator=draw)
    ends = ("lora_down", "lora_up") if name.startswith("lora_") else ("lora_A", "lora_B")
    return {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}


def only(deltas: Deltas) -> tuple[str, str, Lora]:
    ((component, updates),) = deltas.items()
    ((path, delta),) = updates.items()
    assert isinstance(delta, Lora)
    return component, path, delta


@pytest.mark.parametrize(("alpha", "expected"), [(None, 6.0), (1.5, 1.5)])
def test_kohya_alpha(tmp_path: Path, alpha: float | None, expected: float) -> None:
    state = pair(IN_KOHYA, 6)
    if alpha is not None:
        state[f"{IN_KOHYA}.alpha"] = torch.tensor(alpha)
    _, path, delta = only(read_adapter(SD15.tiny(), SD15, write(tmp_path / "a.safetensors", state)))
    assert (path, delta.rank, delta.alpha) == (LAYER, 6, expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 6.0),
        ({"lora_alpha": 3}, 3.0),
        ({"lora_alpha": 3, "alpha_pattern": {LAYER: 12}}, 12.0),
        ({"lora_alpha": 3, "alpha_pattern": {"to_q": 5, "to_k": 7}}, 5.0),
        ({"lora_alpha": 3, "use_rslora": True}, 3.0 * 6**0.5),
    ],
)
def test_peft_alpha(tmp_path: Path, settings: dict[str, Any], expected: float) -> None:
    said = json.dumps({f"unet.{key}": value for key, value in settings.items()})
    header = {"lora_adapter_metadata": said} if settings else {}
    file = write(tmp_path / "a.safetensors", pair(f"unet.{LAYER}", 6), **header)
    _, _, delta = only(read_adapter(SD15.tiny(), SD15, file))
    assert delta.alpha == pytest.approx(expected)


def test_ranks_and_alphas_may_differ_by_layer(tmp_path: Path, predict: Predict) -> None:
    state: State = {}
    for name, rank, alpha in ((IN_KOHYA, 2, 1.0), (IN_KOHYA.replace("to_q", "to_k"), 4, 8.0)):
        state |= {**pair(name, rank), f"{name}.alpha": torch.tensor(alpha)}
    file = write(tmp_path / "a.safetensors", state)
    loaded, merged = SD15.tiny(), SD15.tiny()
    load_adapter(loaded, SD15, file)
    assert merge_adapter(merged, SD15, file) == 2
    assert relative_error(predict(SD15, loaded), predict(SD15, merged)) < 1e-5
    modules = {"unet": modules_of(SD15.tiny().unet)}
    assert to_kohya(read_adapter(SD15.tiny(), SD15, file), modules, SD15).keys() == state.keys()


def test_shapes_in_kohya_files(tmp_path: Path, trained: Trained, save: Save) -> None:
    config = AdapterConfig(kind="dora", rank=4, alpha=10.0, targets=["to_q", "conv1"])
    _, file = save(tmp_path, trained(SD15, config), SD15, config)
    state = safetensors.torch.load_file(file)
    assert state[f"{IN_KOHYA}.lora_down.weight"].shape == (4, 32)
    assert state[f"{IN_KOHYA}.lora_up.weight"].shape == (32, 4)
    assert state[f"{IN_KOHYA}.dora_scale"].shape == (32, 1)
    assert state[f"{IN_KOHYA}.alpha"].shape == () and state[f"{IN_KOHYA}.alpha"] == 10
    convolution = "lora_unet_mid_block_resnets_0_conv1"
    assert state[f"{convolution}.lora_down.weight"].shape == (4, 64, 3, 3)
    assert state[f"{convolution}.lora_up.weight"].shape == (64, 4, 1, 1)
    assert state[f"{convolution}.dora_scale"].shape == (64, 1, 1, 1)


# Pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", UNETS, indirect=True)
@pytest.mark.parametrize("file", ["folder", *FILES])
def test_plain_diffusers_draws_the_same(
    family: Family, kind: str, everywhere: Everywhere, file: str, load_in_diffusers: Load
) -> None:
    """Pipelines of transformers draw other sizes by default: of those, see the next test."""
    if kind == "dora" and file == "other":
        pytest.skip("diffusers leaves the DoRA scale out of such files")
    files, _ = everywhere
    source = files["peft"].parent if file == "folder" else files[file]
    sampling = SamplingConfig(steps=2, guidance=3.0)

    def ours(pipeline: Any) -> Tensor:
        return generate_pixels(torch_runtime(family, pipeline), ["a cat"], sampling, seeds=[5])

    loaded, pipeline = family.tiny(), family.tiny()
    load_adapter(loaded, family, source)
    load_in_diffusers(pipeline, source)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a cat",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    difference = float((ours(loaded) - theirs).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference <= TOLERANCE
    assert (theirs - ours(family.tiny())).abs().max() > 0.1


def test_a_network_with_what_diffusers_loaded_says_the_same(
    family: Family, kind: str, everywhere: Everywhere, load_in_diffusers: Load, predict: Predict
) -> None:
    files, _ = everywhere
    loaded, pipeline = family.tiny(), family.tiny()
    load_adapter(loaded, family, files["other"])
    load_in_diffusers(pipeline, files["peft"])
    assert relative_error(predict(family, loaded), predict(family, pipeline)) <= TOLERANCE
