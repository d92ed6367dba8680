"""Adapter files as they are found: each is proven by what it adds to the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tunekit import families
from tunekit.adapters import Full, layouts, load_adapter, merge_adapter, read_adapter
from tunekit.adapters.delta import adapted, changeable
from tunekit.artifacts import open_artifact
from tunekit.diffusion.metrics import relative_error
from tunekit.errors import AdapterError, ArtifactError
from tunekit.families import Family

Train = Callable[..., None]
Predict = Callable[[Family, Any], Tensor]
State = dict[str, Tensor]
Updates = dict[tuple[str, str], Tensor]

SD15 = families.get("sd15")
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYER = f"{BLOCK}.to_q"
SGM = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
IN_KOHYA = "lora_unet_" + LAYER.replace(".", "_")
ENCODER = "text_model.encoder.layers.0.self_attn"
PROJECTION = "down_blocks.0.attentions.0.proj_in"  # a 1x1 convolution
CONVOLUTION = "mid_block.resnets.0.conv1"
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def base() -> Any:
    """A pipeline that nothing here changes."""
    return SD15.tiny()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def write(folder: Path, state: State, **header: str) -> Path:
    file = folder / "a.safetensors"
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    safetensors.torch.save_file(state, file, metadata=header or None)
    return file


def weight_of(base: Any, component: str, path: str) -> Tensor:
    network = getattr(base, component)
    layers = changeable(network)
    found: Any = layers[path if path in layers else path.removeprefix("text_model.")]
    return found.weight.detach()


def added(base: Any, source: Path) -> Updates:
    """What a file adds to the weights of a base."""
    return {
        (component, path.removeprefix("text_model.")): delta.apply(weight_of(base, component, path))
        - weight_of(base, component, path)
        for component, updates in read_adapter(base, SD15, source).items()
        for path, delta in updates.items()
    }


def one(base: Any, source: Path) -> Tensor:
    ((_, update),) = added(base, source).items()
    return update


def close(found: Tensor, wanted: Tensor) -> bool:
    return relative_error(found, wanted) < TOLERANCE


def refused(base: Any, source: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter(base, SD15, source)
    message = str(caught.value)
    assert str(source) in message or source.parent.name in message
    return message


# Names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("down", "place"),
    [
        (f"lora_unet_{SGM.replace('.', '_')}.lora_down.weight", ("unet", LAYER)),
        (f"diffusion_model.{SGM}.lora_A.weight", ("unet", LAYER)),
        (f"diffusion_model.{SGM}.lora_down.weight", ("unet", LAYER)),
        (f"model.diffusion_model.{SGM}.lora_A.weight", ("unet", LAYER)),
        (f"lycoris_{LAYER.replace('.', '_')}.lora_down.weight", ("unet", LAYER)),
        (f"unet.{BLOCK}.processor.to_q_lora.down.weight", ("unet", LAYER)),
        (f"{BLOCK}.processor.to_out_lora.down.weight", ("unet", f"{BLOCK}.to_out.0")),
        (f"unet.{LAYER}.lora_linear_layer.down.weight", ("unet", LAYER)),
        (f"unet.{BLOCK}.to_out.0.lora.down.weight", ("unet", f"{BLOCK}.to_out.0")),
        (f"base_model.model.{LAYER}.lora_A.weight", ("unet", LAYER)),
        (f"base_model.model.unet.{LAYER}.lora_A.style.weight", ("unet", LAYER)),
        (f"{LAYER}.lora_A.default.weight", ("unet", LAYER)),
        (f"unet._orig_mod.{LAYER}.lora_A.weight", ("unet", LAYER)),
        (f"text_encoder.{ENCODER}.q_proj.lora_linear_layer.down.weight", ("text_encoder", "q_proj")),
        (f"text_encoder.{ENCODER}.to_out_lora.down.weight", ("text_encoder", "out_proj")),
        (f"base_model.model.{ENCODER}.q_proj.lora_A.weight", ("text_encoder", "q_proj")),
        (f"lora_te1_{ENCODER.replace('.', '_')}_q_proj.lora_down.weight", ("text_encoder", "q_proj")),
    ],
)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_every_spelling(
    base: Any, tmp_path: Path, down: str, place: tuple[str, str], alpha: float | None
) -> None:
    up = down.replace("lora_down", "lora_up").replace("lora_A", "lora_B").replace(".down.", ".up.")
    state = {down: drawn(4, 32), up: drawn(32, 4)}
    if alpha is not None:
        for ending in (".lora_down", "_lora.down", ".lora_linear_layer", ".lora.down", ".lora_A"):
            if ending in down:
                state[down.partition(ending)[0] + ".alpha"] = torch.tensor(alpha)
    ((found, update),) = added(base, write(tmp_path, state)).items()
    component, path = place
    assert found == (component, path if component == "unet" else f"encoder.layers.0.self_attn.{path}")
    assert close(update, (alpha or 4) / 4 * state[up] @ state[down])


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_folder_that_peft_saved(base: Any, tmp_path: Path, train: Train, use_dora: bool) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["to_q", "to_k", "conv1", "proj_in"],
        alpha_pattern={"to_k": 3, r".*attn2\.to_(q|v)": 7},
        use_dora=use_dora,
    )
    model = get_peft_model(SD15.tiny().unet, config)
    train([(name, p) for name, p in model.named_parameters() if p.requires_grad])
    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") for key in state)
    before = {path: layer.weight.detach().clone() for path, layer in changeable(base.unet).items()}
    model.merge_adapter()
    wanted = {
        ("unet", path): layer.weight.detach() - before[path]
        for path, layer in changeable(model.base_model.model).items()
        if not torch.equal(layer.weight, before[path])
    }
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        found = added(base, source)
        assert found.keys() == wanted.keys() and len(found) > 15
        assert all(close(found[place], wanted[place]) for place in wanted)

    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text())
    write(bare, {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()})
    assert all(close(update, wanted[place]) for place, update in added(base, bare).items())


# Strength ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patterns",
    [
        {r"down_blocks\.0.*": 3, "to_q": 5},  # the first that matches
        {"to_q": 5, r"down_blocks\.0.*": 3},
        {"to_q|to_k": 5, "attn2.to_k": 9},
        {r"^down_blocks\.\d+\.attentions\.0\..*attn[12]\.to_v": 2},
        {"attn1": 2},  # nothing ends so
        {LAYER: 12, "^" + LAYER.replace("to_q", "to_k"): 13, "o_v": 3},
        {r".*\.to_out\.0": 1.5, "0": 40},
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_mean_what_peft_makes_of_them(
    base: Any, tmp_path: Path, patterns: dict[str, float], rslora: bool
) -> None:
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    settings = {"r": 4, "lora_alpha": 10, "alpha_pattern": patterns, "use_rslora": rslora}
    unet = SD15.tiny().unet
    unet.add_adapter(LoraConfig(**settings, target_modules=targets), "default")
    scales = {path: layer.scaling["default"] for path, layer in adapted(unet)}
    state = {}
    for path in scales:
        out, inside = weight_of(base, "unet", path).shape
        state |= {f"unet.{path}.lora_A.weight": drawn(4, inside)}
        state |= {f"unet.{path}.lora_B.weight": drawn(out, 4)}
    said = json.dumps({f"unet.{key}": value for key, value in settings.items()})
    file = write(tmp_path, state, lora_adapter_metadata=said)
    found = {path: delta.alpha / delta.rank for path, delta in read_adapter(base, SD15, file)["unet"].items()}
    assert found == pytest.approx(scales)


def test_a_pattern_that_never_ends(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "TIME", 0.05)
    state = {f"unet.{LAYER}.lora_A.weight": drawn(4, 32), f"unet.{LAYER}.lora_B.weight": drawn(32, 4)}
    for pattern in (r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\3\4[A-Z]\5", "(to_q"):
        said = json.dumps({"unet.alpha_pattern": {pattern: 2}})
        assert "cannot be matched" in refused(base, write(tmp_path, state, lora_adapter_metadata=said))


def test_alpha_of_zero_is_the_rank_and_said(
    base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kohya's tools mean it so: "if alpha == 0 or None, alpha is rank"."""
    state = {f"{IN_KOHYA}.lora_down.weight": drawn(4, 32), f"{IN_KOHYA}.lora_up.weight": drawn(32, 4)}
    file = write(tmp_path, {**state, f"{IN_KOHYA}.alpha": torch.tensor(0.0)})
    wanted = state[f"{IN_KOHYA}.lora_up.weight"] @ state[f"{IN_KOHYA}.lora_down.weight"]
    assert close(one(base, file), wanted)
    assert "warning: alpha is 0 in 1 modules" in capsys.readouterr().err


@pytest.mark.parametrize("alpha", [torch.tensor(-8.0), torch.tensor(float("nan")), torch.ones(2)])
def test_an_alpha_that_is_none(base: Any, tmp_path: Path, alpha: Tensor) -> None:
    state = {f"{IN_KOHYA}.lora_down.weight": drawn(4, 32), f"{IN_KOHYA}.lora_up.weight": drawn(32, 4)}
    assert f"{IN_KOHYA}.alpha" in refused(base, write(tmp_path, {**state, f"{IN_KOHYA}.alpha": alpha}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('{"unet.lora_alpha": NaN}', "lora_alpha is NaN"),
        ('{"unet.lora_alpha": -8}', "lora_alpha is -8: it must be a number above 0"),
        ('{"unet.lora_alpha": 0}', "lora_alpha is 0"),
        ('{"unet.lora_alpha": "1e3"}', 'lora_alpha is "1e3"'),
        ('{"unet.lora_alpha": null}', "lora_alpha is null"),
        ('{"unet.lora_alpha": true}', "lora_alpha is true"),
        ('{"unet.lora_alpha": [8]}', r"lora_alpha is [8]"),
        (f'{{"unet.lora_alpha": 1{"0" * 400}}}', "lora_alpha is 1000"),
        ('{"unet.alpha_pattern": {"to_q": -1}}', 'alpha_pattern: "to_q" is -1'),
        ('{"unet.alpha_pattern": ["to_q"]}', "must hold figures by module"),
        ('{"unet.use_rslora": "yes"}', "use_rslora is 'yes'"),
        ('{"unet.peft_type": "LOHA"}', 'peft_type is "LOHA"'),
        ('{"unet.init_lora_weights": "pissa_niter_4"}', "changed the base too"),
        ('{"unet.use_dora": true}', "its settings say DoRA, and 1 modules"),
        ("[]", "holds no settings by name"),
        ('"text"', "holds no settings by name"),
        ("null", "holds no settings by name"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (f'{{"unet.lora_alpha": {"1" * 5000}}}', "is not JSON"),
    ],
)
def test_settings_that_are_none(base: Any, tmp_path: Path, settings: str, words: str) -> None:
    state = {f"unet.{LAYER}.lora_A.weight": drawn(4, 32), f"unet.{LAYER}.lora_B.weight": drawn(32, 4)}
    assert words in refused(base, write(tmp_path, state, lora_adapter_metadata=settings))


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b'{"lora_alpha": "8"}', b" " * 1_000_001])
def test_an_adapter_config_that_is_none(base: Any, tmp_path: Path, content: bytes) -> None:
    write(tmp_path, {f"{LAYER}.lora_A.weight": drawn(4, 32), f"{LAYER}.lora_B.weight": drawn(32, 4)})
    (tmp_path / "adapter_config.json").write_bytes(content)
    refused(base, tmp_path)


# Shapes -----------------------------------------------------------------------------------------------------


def test_convolutions_as_matrices_and_matrices_as_convolutions(base: Any, tmp_path: Path) -> None:
    name = f"lora_unet_{PROJECTION.replace('.', '_')}"
    down, up = drawn(4, 32), drawn(32, 4)
    file = write(tmp_path, {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    assert close(one(base, file), (up @ down)[..., None, None])
    state = {f"{IN_KOHYA}.lora_down.weight": down[..., None, None]}
    file = write(tmp_path, {**state, f"{IN_KOHYA}.lora_up.weight": up[..., None, None]})
    assert close(one(base, file), up @ down)
    wide = {f"{IN_KOHYA}.lora_down.weight": drawn(4, 32, 3, 3)}
    file = write(tmp_path, {**wide, f"{IN_KOHYA}.lora_up.weight": up})
    assert "[4, 32, 3, 3], this model needs [4, 32]" in refused(base, file)


def test_tucker(base: Any, tmp_path: Path) -> None:
    name = f"lora_unet_{CONVOLUTION.replace('.', '_')}"
    down, mid, up = drawn(6, 64, 1, 1), drawn(4, 6, 3, 3), drawn(64, 4, 1, 1)
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    file = write(tmp_path, {**state, f"{name}.alpha": torch.tensor(3.0)})
    picture = drawn(1, 64, 8, 8)
    through = torch.nn.functional.conv2d(picture, down)  # as LyCORIS runs it
    through = torch.nn.functional.conv2d(torch.nn.functional.conv2d(through, mid, padding=1), up)
    found = torch.nn.functional.conv2d(picture, one(base, file), padding=1)
    assert relative_error(found, 3 / 6 * through) < 1e-5
    assert "do not fit together" in refused(
        base, write(tmp_path, {**state, f"{name}.lora_mid.weight": drawn(4, 5, 3, 3)})
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_types_of_few_bits(base: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    down, up = drawn(4, 32).to(dtype), drawn(32, 4).to(dtype)
    file = write(
        tmp_path,
        {
            f"{IN_KOHYA}.lora_down.weight": down,
            f"{IN_KOHYA}.lora_up.weight": up,
            f"{IN_KOHYA}.alpha": torch.tensor(2).to(dtype),
        },
    )
    assert close(one(base, file), 0.5 * up.float() @ down.float())
    loaded = SD15.tiny()
    load_adapter(loaded, SD15, file)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_are_floats(base: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        f"{IN_KOHYA}.lora_down.weight": torch.ones(4, 32, dtype=dtype),
        f"{IN_KOHYA}.lora_up.weight": drawn(32, 4),
        f"{IN_KOHYA}.alpha": torch.tensor(8),  # a figure may be a whole one
    }
    message = refused(base, write(tmp_path, state))
    assert str(dtype).removeprefix("torch.") in message and "weights are floats" in message


def test_what_overflows(base: Any, tmp_path: Path) -> None:
    state = {f"{IN_KOHYA}.lora_down.weight": drawn(4, 32) * 1e30, f"{IN_KOHYA}.lora_up.weight": drawn(32, 4)}
    up = state.pop(f"{IN_KOHYA}.lora_up.weight")
    assert "overflows" in refused(base, write(tmp_path, {**state, f"{IN_KOHYA}.lora_up.weight": up * 1e30}))


# DoRA -------------------------------------------------------------------------------------------------------


def scaled(weight: Tensor, update: Tensor, lengths: Tensor, axis: int) -> Tensor:
    """What DoRA adds, with the norms of rows (0) or columns (1)."""
    whole = (weight + update).double()
    others = [i for i in range(weight.ndim) if i != axis]
    norms = whole.square().sum(dim=others, keepdim=True).sqrt()
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return (whole / norms * lengths.double().view(shape) - weight).float()


@pytest.mark.parametrize(
    ("ending", "shape", "path", "axis"),
    [
        ("dora_scale", (32, 1), LAYER, 0),
        ("dora_scale", (1, 32), LAYER, 1),
        ("dora_scale", (64, 1, 1, 1), CONVOLUTION, 0),
        ("dora_scale", (1, 64, 1, 1), CONVOLUTION, 1),
        ("lora_magnitude_vector", (32,), LAYER, 0),
        ("lora_magnitude_vector.weight", (1, 32), LAYER, 1),
        ("lora_magnitude_vector.default.weight", (32, 1), LAYER, 0),
        ("lora_magnitude_vector", (1, 64, 1, 1), CONVOLUTION, 0),  # peft's way to say rows
    ],
)
def test_the_axis_of_lengths(
    base: Any, tmp_path: Path, predict: Predict, ending: str, shape: tuple[int, ...], path: str, axis: int
) -> None:
    """The layers are square, so that nothing but the shape tells."""
    weight = weight_of(base, "unet", path)
    down, up, lengths = drawn(4, *weight.shape[1:]), drawn(weight.shape[0], 4), drawn(*shape).abs() + 1
    up = up.view(-1, 4, *[1] * (weight.ndim - 2))
    name = f"lora_unet_{path.replace('.', '_')}" if ending == "dora_scale" else f"unet.{path}"
    ends = ("lora_down", "lora_up") if ending == "dora_scale" else ("lora_A", "lora_B")
    file = write(
        tmp_path,
        {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up, f"{name}.{ending}": lengths},
    )
    update = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    assert close(one(base, file), scaled(weight, update, lengths, axis))
    loaded, merged = SD15.tiny(), SD15.tiny()
    load_adapter(loaded, SD15, file)
    merge_adapter(merged, SD15, file)
    assert relative_error(predict(SD15, loaded), predict(SD15, merged)) < 1e-5


def test_lora_beside_dora(base: Any, tmp_path: Path, predict: Predict) -> None:
    state: State = {}
    wanted: Updates = {}
    for index, part in enumerate(("to_q", "to_k", "to_v")):
        name, path = IN_KOHYA.replace("to_q", part), LAYER.replace("to_q", part)
        down, up, lengths = drawn(4, 32, seed=index), drawn(32, 4, seed=index), drawn(32, 1).abs() + 1
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        state[f"{name}.alpha"] = torch.tensor(2.0)
        wanted["unet", path] = 0.5 * up @ down
        if part == "to_k":
            state[f"{name}.dora_scale"] = lengths
            wanted["unet", path] = scaled(
                weight_of(base, "unet", path), wanted["unet", path], lengths.flatten(), 0
            )
    file = write(tmp_path, state)
    found = added(base, file)
    assert found.keys() == wanted.keys()
    assert all(close(found[place], wanted[place]) for place in wanted)
    loaded, merged = SD15.tiny(), SD15.tiny()
    load_adapter(loaded, SD15, file)
    merge_adapter(merged, SD15, file)
    assert relative_error(predict(SD15, loaded), predict(SD15, merged)) < 1e-5


# More than an update ----------------------------------------------------------------------------------------


def test_differences_of_biases_norms_and_whole_weights(base: Any, tmp_path: Path) -> None:
    convolution, norm = "mid_block.resnets.0.conv2", "mid_block.resnets.0.norm1"
    names = {path: f"lora_unet_{path.replace('.', '_')}" for path in (CONVOLUTION, convolution, norm)}
    down, up = drawn(4, 64, 3, 3), drawn(64, 4, 1, 1)
    state = {
        f"{names[CONVOLUTION]}.lora_down.weight": down,
        f"{names[CONVOLUTION]}.lora_up.weight": up,
        f"{names[CONVOLUTION]}.diff_b": drawn(64, seed=1),
        f"{names[convolution]}.diff": drawn(64, 64, 3, 3),
        f"{names[norm]}.w_norm": drawn(64, seed=2),
        f"{names[norm]}.b_norm": drawn(64, seed=3),
    }
    file = write(tmp_path, state)
    wanted = {
        f"{CONVOLUTION}.weight": (up.flatten(1) @ down.flatten(1)).view(64, 64, 3, 3),
        f"{CONVOLUTION}.bias": state[f"{names[CONVOLUTION]}.diff_b"],
        f"{convolution}.weight": state[f"{names[convolution]}.diff"],
        f"{norm}.weight": state[f"{names[norm]}.w_norm"],
        f"{norm}.bias": state[f"{names[norm]}.b_norm"],
    }
    assert isinstance(read_adapter(base, SD15, file)["unet"][norm], Full)
    before = base.unet.state_dict()
    merged, loaded = SD15.tiny(), SD15.tiny()
    assert merge_adapter(merged, SD15, file) == 3
    after = merged.unet.state_dict()
    changed = {key for key in before if not torch.equal(after[key], before[key])}
    assert changed == wanted.keys()
    assert all(relative_error(after[key] - before[key], wanted[key]) < 1e-5 for key in changed)
    load_adapter(loaded, SD15, file)
    for key, tensor in loaded.unet.state_dict().items():
        key = key.replace(".base_layer", "")
        if key in wanted and key != f"{CONVOLUTION}.weight":
            assert torch.equal(tensor, after[key])


def test_a_bias_where_there_is_none(base: Any, tmp_path: Path) -> None:
    state = {f"{IN_KOHYA}.lora_down.weight": drawn(4, 32), f"{IN_KOHYA}.lora_up.weight": drawn(32, 4)}
    assert "has no bias" in refused(base, write(tmp_path, {**state, f"{IN_KOHYA}.diff_b": drawn(32)}))
    one(base, write(tmp_path, {**state, f"{IN_KOHYA}.diff_b": torch.zeros(32)}))


@pytest.mark.parametrize(
    "extra",
    ["bundle_emb.style.string_to_param.*", "text_model.embeddings.position_ids", "made_by"],
)
def test_what_is_no_part_of_the_model_is_left_out_and_named(
    base: Any, tmp_path: Path, extra: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"{IN_KOHYA}.lora_down.weight": drawn(4, 32), f"{IN_KOHYA}.lora_up.weight": drawn(32, 4)}
    one(base, write(tmp_path, {**state, extra: drawn(2, 32)}))
    said = capsys.readouterr().err
    assert extra in said and ("textual inversion" in said) == extra.startswith("bundle")


# What cannot be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        (f"{IN_KOHYA}.hada_w1_a", (32, 4), "a LoHa adapter"),
        (f"{IN_KOHYA}.lokr_w1", (4, 4), "a LoKr adapter"),
        (f"{LAYER}.oft_R.weight", (4, 4), "an OFT adapter"),
        ("ip_adapter.1.to_k_ip.weight", (32, 32), "an IP-Adapter"),
        ("emb_params", (4, 32), "a textual inversion"),
        ("<cat>", (1, 768), "a textual inversion"),
        ("control_model.input_hint_block.0.weight", (4, 4), "a ControlNet"),
        ("unet.conv_in.weight", (32, 4, 3, 3), "unet.conv_in.weight"),
        (f"unet.{LAYER}.modules_to_save.weight", (32, 32), "modules_to_save"),
    ],
)
def test_other_methods_are_named(
    base: Any, tmp_path: Path, key: str, shape: tuple[int, ...], words: str
) -> None:
    beside = {f"{IN_KOHYA}.alpha": torch.tensor(1.0)} if key.startswith(IN_KOHYA) else {}
    assert words in refused(base, write(tmp_path, {key: drawn(*shape), **beside}))
    lora = {f"{IN_KOHYA}.lora_down.weight": drawn(4, 32), f"{IN_KOHYA}.lora_up.weight": drawn(32, 4)}
    if "textual" not in words:
        assert words in refused(base, write(tmp_path, {**lora, key: drawn(*shape)}))
    if words.startswith("a"):
        with pytest.raises(ArtifactError, match=words):  # and no model that would be looked for elsewhere
            open_artifact(write(tmp_path, {key: drawn(*shape)}))


@pytest.mark.parametrize(
    ("module", "shape", "title"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", (640, 2048), "Stable Diffusion XL"),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc1", (5120, 1280), "Stable Diffusion XL"),
        ("lora_unet_input_blocks_8_1_transformer_blocks_0_attn2_to_k", (1280, 1024), "Stable Diffusion 2"),
        ("lora_unet_double_blocks_0_img_attn_qkv", (9216, 3072), "FLUX.1"),
        ("transformer.single_transformer_blocks.0.attn.to_q", (3072, 3072), "FLUX.1"),
        (LAYER.replace("attn1.to_q", "attn2.to_k"), (320, 1024), "Stable Diffusion 2"),  # by its shape alone
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", (4608, 1536), "Stable Diffusion 3"),
    ],
)
def test_other_models_are_named(
    base: Any, tmp_path: Path, module: str, shape: tuple[int, int], title: str
) -> None:
    """By names and sizes; several, where what the file has is in several."""
    ends = ("lora_down", "lora_up") if module.startswith("lora") else ("lora_A", "lora_B")
    out, inside = shape
    state = {f"{module}.{ends[0]}.weight": drawn(4, inside), f"{module}.{ends[1]}.weight": drawn(out, 4)}
    message = refused(base, write(tmp_path, state))
    assert module in message and title in message.partition("looks like")[2]


def test_keys_that_contradict(base: Any, tmp_path: Path) -> None:
    pair = {f"{IN_KOHYA}.lora_down.weight": drawn(4, 32), f"{IN_KOHYA}.lora_up.weight": drawn(32, 4)}
    other = {f"unet.{LAYER}.lora_A.weight": drawn(4, 32), f"unet.{LAYER}.lora_B.weight": drawn(32, 4)}
    assert "the same tensor" in refused(base, write(tmp_path, {**pair, **other}))
    two = {
        f"{LAYER}.lora_{part}.{label}.weight": drawn(32, 32) for part in "AB" for label in ("one", "other")
    }
    assert "several adapters: one, other" in refused(base, write(tmp_path, two))
    assert "whole difference" in refused(base, write(tmp_path, {**pair, f"{IN_KOHYA}.diff": drawn(32, 32)}))
    empty = {f"{IN_KOHYA}.lora_down.weight": drawn(0, 32), f"{IN_KOHYA}.lora_up.weight": drawn(32, 0)}
    assert "no matrix" in refused(base, write(tmp_path, empty))
    assert "has no lora_A" in refused(base, write(tmp_path, {f"{IN_KOHYA}.alpha": torch.tensor(1.0)}))
    assert "it holds nothing" in refused(base, write(tmp_path, {}))
