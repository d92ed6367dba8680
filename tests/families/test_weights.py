"""Every tensor that a network needs is there, and nothing else: on every road that weights come by."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunekit import families, layers, workspace
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.diffusion.sampling import sampler
from tunekit.errors import ArtifactError, MissingPackageError, ModelError
from tunekit.families import weights
from tunekit.families.loading import variant_taken
from tunekit.resources import Source

FAMILY = families.get("sd15")
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
KEYS = {
    "unet": "mid_block.resnets.0.conv1.weight",
    "vae": "decoder.conv_in.bias",
    "text_encoder": "text_model.encoder.layers.1.mlp.fc1.weight",
}


@pytest.fixture
def folder(tiny_source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that may be damaged."""
    return shutil.copytree(tiny_source, tmp_path / "model")


def edit(folder: Path, component: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
    file = folder / component / f"{FILES[component]}.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return file


def write(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refused(source: Any, *, pack: Any = "", looked: bool = True, **how: Any) -> str:
    """What loading says; a look at the headers says the same."""
    opened = Source(str(source), **how)
    with pytest.raises(ModelError) as caught:
        FAMILY.load(opened, pack=pack)
    message = str(caught.value)
    if looked:
        found = FAMILY.look(opened)
        assert found and all(problem.message in message for problem in found)
    return message


def rename(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"other.{key}": tensors.pop(key)})


# --- key by key -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", FILES)
def test_a_missing_tensor_is_named(folder: Path, component: str) -> None:
    key = KEYS[component]
    edit(folder, component, lambda tensors: tensors.pop(key))
    message = refused(folder)
    assert component in message and "missing" in message
    assert key.removeprefix("text_model.") in message and str(folder / component) in message


@pytest.mark.parametrize("component", FILES)
def test_a_renamed_tensor_is_named_twice(folder: Path, component: str) -> None:
    key = KEYS[component]
    edit(folder, component, rename(key))
    message = refused(folder)
    assert "missing" in message and f"no layer reads other.{key}" in message and "renamed" in message


def test_an_empty_file_lacks_everything(folder: Path) -> None:
    edit(folder, "vae", lambda tensors: tensors.clear())
    assert "and the weights are 0 tensors" in refused(folder)


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("text_encoder", "num_hidden_layers"),
        ("text_encoder", "max_position_embeddings"),
        ("unet", "layers_per_block"),
        ("vae", "layers_per_block"),
    ],
)
def test_a_number_that_would_be_built_for_ever_is_named(folder: Path, component: str, key: str) -> None:
    write(folder / component / "config.json", lambda config: config.update({key: 10**9}))
    assert f"{key} is 1000000000" in refused(folder)


def test_a_text_encoder_whose_names_all_differ_is_never_filled_with_random_weights(folder: Path) -> None:
    def other(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors["module." + key] = tensors.pop(key)

    edit(folder, "text_encoder", other)
    message = refused(folder)
    assert message.count("module.") == 3 and "more" in message  # three are named, the others counted


@pytest.mark.parametrize("component", FILES)
def test_a_tensor_that_no_layer_reads_is_named(folder: Path, component: str) -> None:
    edit(folder, component, lambda tensors: tensors.update(extra=torch.zeros(2)))
    assert "no layer reads extra" in refused(folder)


@pytest.mark.parametrize("component", FILES)
def test_another_shape_and_whole_numbers_are_named(folder: Path, component: str) -> None:
    key = KEYS[component]
    edit(folder, component, lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
    assert f"{key} is [" in refused(folder) and "should be" in refused(folder)
    edit(
        folder,
        component,
        lambda tensors: tensors.update({key: torch.ones(FULL[component], dtype=torch.int8)}),
    )
    assert f"{key} holds I8" in refused(folder)


FULL = {
    "unet": FAMILY.tiny().unet.mid_block.resnets[0].conv1.weight.shape,
    "vae": FAMILY.tiny().vae.decoder.conv_in.bias.shape,
    "text_encoder": (64, 32),
}


def test_what_is_known_to_be_harmless_is_accepted(folder: Path) -> None:
    """Counted positions, as all files of 2022 have them, and what belongs to CLIP's other half."""
    extra = {
        "text_model.embeddings.position_ids": torch.arange(48)[None],
        "logit_scale": torch.tensor(4.6),
        "text_projection.weight": torch.zeros(32, 32),
    }
    edit(folder, "text_encoder", lambda tensors: tensors.update(extra))
    loaded = FAMILY.load(str(folder))
    assert torch.equal(
        loaded.text_encoder.state_dict()[next(iter(loaded.text_encoder.state_dict()))],
        next(iter(FAMILY.tiny().text_encoder.state_dict().values())),
    )


def test_a_projection_that_is_needed_is_not_harmless(tmp_path: Path) -> None:
    family = families.get("sdxl")
    family.save(family.tiny(), tmp_path)
    file = tmp_path / "text_encoder_2" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["text_projection.weight"]
    safetensors.torch.save_file(tensors, file)
    (problem,) = family.look(str(tmp_path))
    assert "missing text_projection.weight" in problem.message


def test_attention_of_2022_is_read(folder: Path) -> None:
    """The autoencoder of Stable Diffusion 1.5, as it lies on the hub."""

    def former(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            name = key
            for now, then in weights.FORMER:
                name = name.replace(now, then)
            tensors[name] = tensors.pop(key)

    edit(folder, "vae", former)
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in safetensors.torch.load_file(
        folder / "vae" / "diffusion_pytorch_model.safetensors"
    )
    loaded = FAMILY.load(str(folder)).vae.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in FAMILY.tiny().vae.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.bfloat16])
def test_every_floating_type_is_read(folder: Path, dtype: torch.dtype) -> None:
    def stored(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: value.to(dtype) for key, value in tensors.items()})

    edit(folder, "unet", stored)
    loaded = FAMILY.load(str(folder)).unet.state_dict()
    for key, value in FAMILY.tiny().unet.state_dict().items():
        assert torch.equal(loaded[key], value.to(dtype).float()), key


# --- every road -------------------------------------------------------------------------------------------


def sharded(folder: Path, component: str) -> dict[str, str]:
    """Writes a component's weights in two files; returns which tensor is where."""
    file = folder / component / f"{FILES[component]}.safetensors"
    tensors = safetensors.torch.load_file(file)
    file.unlink()
    where = {}
    for number, keys in enumerate([sorted(tensors)[::2], sorted(tensors)[1::2]], 1):
        name = f"{FILES[component]}-0000{number}-of-00002.safetensors"
        safetensors.torch.save_file({key: tensors[key] for key in keys}, file.with_name(name))
        where.update(dict.fromkeys(keys, name))
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


@pytest.mark.parametrize("component", FILES)
def test_a_tensor_that_a_shard_lacks_is_named(folder: Path, component: str) -> None:
    where = sharded(folder, component)
    FAMILY.load(str(folder))
    key = KEYS[component]
    file = folder / component / where[key]
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: value for name, value in tensors.items() if name != key}, file)
    assert f"missing {key.removeprefix('text_model.')}" in refused(folder).replace("text_model.", "")
    safetensors.torch.save_file({name: torch.zeros(1) for name in where}, file)
    assert " is in " in refused(folder)  # and in the other one


@pytest.mark.parametrize("component", FILES)
def test_an_index_that_names_a_pickle_is_refused_and_nothing_is_run(
    folder: Path, component: str, tmp_path: Path
) -> None:
    where, trace = sharded(folder, component), tmp_path / "trace"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    last = sorted(set(where.values()))[-1]
    pickle = folder / component / "shard.bin"
    torch.save({"conv_in.weight": Trap()}, pickle)
    index = folder / component / f"{FILES[component]}.safetensors.index.json"
    write(
        index,
        lambda content: content["weight_map"].update(
            {key: "shard.bin" for key in where if where[key] == last}
        ),
    )
    message = refused(folder)
    assert str(index) in message and "shard.bin" in message and "any program" in message
    refused(folder, allow_pickle=True, looked=False)
    shutil.copy(pickle, folder / component / last)  # called .safetensors, and a pickle all the same
    write(index, lambda content: content["weight_map"].update(where))
    assert "cannot be read as safetensors" in refused(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "not a file beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "not there"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ("[]", "settings by name"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_damaged_index_of_shards(folder: Path, content: str, words: str) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    assert words in refused(folder)


def test_packed_and_own_models_are_compared_too(folder: Path, tmp_path: Path) -> None:
    edit(folder, "unet", lambda tensors: tensors.pop("mid_block.attentions.0.proj_in.weight"))
    assert "missing mid_block.attentions.0.proj_in.weight" in refused(folder, pack="int8")
    pipeline = FAMILY.tiny()
    layers.quantize(pipeline.unet, "int8")
    FAMILY.save(pipeline, tmp_path / "packed")
    edit(tmp_path / "packed", "unet", lambda tensors: tensors.pop("conv_out.scale"))
    assert "missing conv_out.scale" in refused(tmp_path / "packed")
    (tmp_path / "packed" / "unet" / layers.FILE).write_text('{"version": 1, "shapes": []}')
    assert layers.FILE in refused(tmp_path / "packed")


def test_an_allowed_pickle_is_compared_too(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    file.unlink()
    torch.save(tensors, folder / "text_encoder" / "pytorch_model.bin")
    FAMILY.load(Source(str(folder), allow_pickle=True))
    tensors.pop(KEYS["text_encoder"])
    torch.save(tensors, folder / "text_encoder" / "pytorch_model.bin")
    assert "missing" in refused(folder, allow_pickle=True, looked=False)


# --- folders as they are found ----------------------------------------------------------------------------


def in_variant(folder: Path, *names: str) -> None:
    for file in list(folder.glob("*/*.safetensors")):
        for name in names:
            shutil.copy(file, file.with_suffix(f".{name}.safetensors"))
        file.unlink()


def test_a_folder_of_one_variant_is_read_and_said(folder: Path) -> None:
    assert variant_taken(Source(str(folder)), FAMILY.facts) is None
    in_variant(folder, "fp16")
    loaded = FAMILY.load(str(folder))
    assert torch.equal(loaded.unet.conv_in.weight, FAMILY.tiny().unet.conv_in.weight)
    assert variant_taken(Source(str(folder)), FAMILY.facts) == "fp16"


def test_of_several_variants_one_has_to_be_named(folder: Path) -> None:
    in_variant(folder, "fp16", "bf16")
    message = refused(folder)
    assert "several variants: bf16, fp16" in message and "--variant" in message
    FAMILY.load(Source(str(folder), variant="fp16"))
    assert "there is: bf16, fp16" in refused(folder, variant="fp8")


def test_the_variant_is_named_where_pictures_are_drawn(folder: Path, tmp_path: Path) -> None:
    in_variant(folder, "fp16", "bf16")
    with pytest.raises(ModelError, match="several variants"):
        workspace.generate(str(folder), "a", device="cpu", steps=1)
    (picture,) = workspace.generate(str(folder), "a", device="cpu", steps=1, variant="fp16")
    assert picture.size == (64, 64)
    (path,) = workspace.draw(
        str(folder), ["a"], SamplingConfig(steps=1), out=tmp_path / "out", variant="bf16", device="cpu"
    )
    assert path.is_file()
    onnx = Artifact(None, None, "onnx", "sd15", "model")
    with pytest.raises(ArtifactError, match="no effect on a model in onnx"):
        onnx.in_variant("fp16")
    assert onnx.in_variant(None) is onnx


def as_class(folder: Path, name: str) -> None:
    write(folder / "model_index.json", lambda index: index.update(_class_name=name))


@pytest.mark.parametrize("name", FAMILY.facts.pipeline_classes[1:4])
def test_other_pipelines_of_the_family_are_read(folder: Path, name: str, tmp_path: Path) -> None:
    as_class(folder, name)
    assert families.detect(folder) == "sd15"
    loaded = FAMILY.load(str(folder))
    assert type(loaded).__name__ == "StableDiffusionPipeline"
    FAMILY.save(loaded, tmp_path / "again")
    assert '"StableDiffusionPipeline"' in (tmp_path / "again" / "model_index.json").read_text()


def with_unet(folder: Path, **config: Any) -> None:
    from diffusers import UNet2DConditionModel

    own = {key: value for key, value in FAMILY.tiny().unet.config.items() if not key.startswith("_")}
    UNet2DConditionModel(**{**own, **config}).save_pretrained(folder / "unet")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"in_channels": 9}, "9 channels: it is an inpainting model"),
        ({"in_channels": 8}, "edits pictures"),
        ({"time_cond_proj_dim": 8}, "latent consistency"),
        ({"cross_attention_dim": 48}, "text of width 48, and the text encoders give 32"),
        ({"out_channels": 8}, "gives 8 channels"),
        ({"num_class_embeds": 8}, "num_class_embeds"),
    ],
)
def test_components_that_make_no_model_of_the_family(folder: Path, config: Any, words: str) -> None:
    with_unet(folder, **config)
    assert words in refused(folder)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet", "sample_size", 16.5),
        ("unet", "sample_size", [16]),
        ("unet", "sample_size", None),
        ("vae", "scaling_factor", 0),
        ("vae", "scaling_factor", float("nan")),
        ("vae", "shift_factor", "x"),
    ],
)
def test_a_size_or_a_scale_that_is_no_number(folder: Path, file: str, key: str, value: Any) -> None:
    write(folder / file / "config.json", lambda config: config.update({key: value}))
    assert key in refused(folder)


def test_a_schedule_that_cannot_be_made(folder: Path) -> None:
    config = folder / "scheduler" / "scheduler_config.json"
    write(config, lambda content: content.update(timestep_spacing=9))
    assert "does not describe a PNDMScheduler" in refused(folder)


def test_a_vae_of_another_kind(folder: Path) -> None:
    write(folder / "model_index.json", lambda index: index.update(vae=["diffusers", "AutoencoderTiny"]))
    assert "vae is a AutoencoderTiny, and this family takes a AutoencoderKL" in refused(folder)
    write(folder / "model_index.json", lambda index: index.update(vae=["diffusers", "AutoencoderKL"]))
    write(folder / "vae" / "config.json", lambda config: config.update(latents_mean=[0.0] * 4))
    assert "latents_mean" in refused(folder)


def test_a_scheduler_for_flow_matching_is_named(folder: Path) -> None:
    name = "FlowMatchEulerDiscreteScheduler"
    write(folder / "model_index.json", lambda index: index.update(scheduler=["diffusers", name]))
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": name, "shift": 3.0})
    )
    message = refused(folder)
    assert name in message and "flow matching" in message


def test_a_scheduler_that_needs_a_package_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    class LMSDiscreteScheduler:
        _backends = ("torch", "no-such-scipy")

    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", LMSDiscreteScheduler)
    write(
        folder / "model_index.json",
        lambda index: index.update(scheduler=["diffusers", "LMSDiscreteScheduler"]),
    )
    message = refused(folder)
    assert "LMSDiscreteScheduler needs the package no-such-scipy" in message and "pip install" in message
    write(folder / "model_index.json", lambda index: index.update(scheduler=["diffusers", "NoSuchScheduler"]))
    assert 'no scheduler "NoSuchScheduler"' in refused(folder)
    with pytest.raises(MissingPackageError, match="no-such-scipy"):
        sampler(FAMILY.tiny().scheduler, SamplingConfig(scheduler={"class": "LMSDiscreteScheduler"}))


def test_the_hub_s_own_layout_of_links(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        shutil.copy(file, blobs / str(number))
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert FAMILY.look(str(snapshot)) == []
    assert torch.equal(FAMILY.load(str(snapshot)).unet.conv_in.weight, FAMILY.tiny().unet.conv_in.weight)
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").resolve().unlink()
    assert "is a link to a file that is gone" in refused(snapshot)


def test_a_tokenizer_that_does_not_say_its_length(folder: Path) -> None:
    write(folder / "tokenizer" / "tokenizer_config.json", lambda config: config.pop("model_max_length"))
    assert FAMILY.load(str(folder)).tokenizer.model_max_length == 48


@pytest.mark.parametrize("source", ["models/typo.safetensors", "models/typo.ckpt", "a/b.png"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket", lambda *_, **__: pytest.fail("the network was tried"))
    assert "no such file" in refused(source, looked=False)
    with pytest.raises(ArtifactError, match="there is no"):
        open_artifact(source)


# --- check says what run says -----------------------------------------------------------------------------


def checked(tmp_path: Path, source: Path, *more: str) -> workspace.Examination:
    pictures = f"data.path={tmp_path / 'none'}"
    base = [f"model.source={source}", "model.variant=null"]
    return workspace.check("sd15/lora", [*base, pictures, f"runs={tmp_path}", *more])


def test_check_looks_at_the_base(folder: Path, tmp_path: Path, tiny_sources: Callable[[str], Path]) -> None:
    def said(source: Path) -> list[str]:
        return [row.message for row in checked(tmp_path, source).problems if row.key == "model.source"]

    assert said(folder) == []
    in_variant(folder, "fp16")
    assert "read as fp16" in str(checked(tmp_path, folder).facts["model"]) and said(folder) == []
    edit_file = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    tensors = safetensors.torch.load_file(edit_file)
    tensors.pop("conv_in.bias")
    safetensors.torch.save_file(tensors, edit_file)
    assert "missing conv_in.bias" in said(folder)[0]
    (error,) = [e for e in checked(tmp_path, folder).errors if e.key == "model.source"]
    assert error.where == str(folder / "unet")
    with_unet(folder, in_channels=9)
    shutil.copytree(tiny_sources("sd15") / "vae", folder / "vae", dirs_exist_ok=True)
    assert "inpainting" in said(folder)[0]
    assert "StableDiffusionXLPipeline" in said(tiny_sources("sdxl"))[0]
    lora = tmp_path / "adapter.safetensors"
    safetensors.torch.save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, lora)
    assert "a LoRA: an adapter" in said(lora)[0]


# --- whatever the files say -------------------------------------------------------------------------------

JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
CONFIGS = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)
QUIET = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def fuzzed(tmp_path: Path) -> Path:
    """A place for a folder, used again and again."""
    return tmp_path / "model"


def named(folder: Path) -> list[ModelError]:
    found = FAMILY.look(str(folder))
    assert all(type(problem) is ModelError and problem.where for problem in found)
    return found


@QUIET
@given(data=st.data())
def test_any_value_in_any_config_is_read_or_named(
    tiny_source: Path, tmp_path_factory: Any, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_source, folder, copy_function=os.link)
    file = folder / data.draw(st.sampled_from(CONFIGS))
    content = json.loads(file.read_text())
    if data.draw(st.integers(0, 3)) == 0:
        content = data.draw(JSONS)
    else:
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(JSONS)
    file.unlink()
    file.write_text(json.dumps(content))
    if not named(folder):
        FAMILY.encode_prompt(FAMILY.load(str(folder)), ["a"])


@QUIET
@given(data=st.data())
def test_any_header_of_weights_is_read_or_named(tiny_source: Path, fuzzed: Path, data: Any) -> None:
    folder = fuzzed
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_source, folder, copy_function=os.link)
    component = data.draw(st.sampled_from(sorted(FILES)))
    file = folder / component / f"{FILES[component]}.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    way = data.draw(st.sampled_from(["rename", "dtype", "shape", "any", "cut", "bytes"]))
    if way == "rename":
        header[data.draw(st.text(max_size=8))] = header.pop(name)
    elif way == "dtype":
        header[name]["dtype"] = data.draw(st.sampled_from(["I32", "F64", "BOOL", "F8_E4M3", "XX", 3]))
    elif way == "shape":
        header[name]["shape"] = list(reversed(header[name]["shape"]))
    elif way == "any":
        header[name] = data.draw(JSONS)
    written = json.dumps(header).encode()
    raw = len(written).to_bytes(8, "little") + written + body
    if way == "cut":
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    if way == "bytes":
        at = data.draw(st.integers(0, min(len(raw), 2000)))
        raw = raw[:at] + data.draw(st.binary(max_size=8)) + raw[at:]
    file.unlink()
    file.write_bytes(raw)
    if not named(folder):
        with suppress(ModelError):  # the values may be no numbers any more
            FAMILY.load(str(folder))
