from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunekit import config as package
from tunekit.config import (
    DataConfig,
    DreamboothData,
    ObjectiveConfig,
    RunConfig,
    SamplingConfig,
    Section,
    TrainingRunConfig,
    all_keys,
    dump_yaml,
    load,
    validate,
    words,
)
from tunekit.config.yaml import config_names
from tunekit.errors import ChainError, ConfigError
from tunekit.registry import PASSES

GOOD = """\
recipe: lora
model: {family: sd15, source: tiny}
data: {path: photos}
train:
  max_steps: 100
  lr: 1e-4
"""


class Lora(TrainingRunConfig):
    data: DataConfig
    """The pictures."""


class Dreambooth(TrainingRunConfig):
    data: DreamboothData
    """The pictures."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    return path


def complaint(*overrides: str, schema: type[RunConfig] = Lora, path: str = "mine.yaml") -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, schema)
    return str(caught.value)


def test_a_good_config(config: Path):
    loaded = load("mine.yaml", ["train.lr=2e-4"], Lora)
    assert loaded.config.train.lr == 2e-4
    assert loaded.config.train.max_steps == 100
    assert loaded.config.adapter.rank == 16
    assert loaded.config.run_dir == Path("runs/mine")
    assert loaded.where("train.max_steps") == "mine.yaml:5"
    assert loaded.where("train.lr") == "command line"
    assert loaded.where("train.batch_size") == "mine.yaml:4"
    assert loaded.where(("nothing",)) == "mine.yaml"


def test_the_name_can_be_given(config: Path):
    assert load("mine.yaml", ["name=other", "runs=elsewhere"], Lora).config.run_dir == Path("elsewhere/other")
    message = complaint("name=../up")
    assert message.startswith("command line: name: must begin with a letter or a digit")
    assert message.endswith('not "../up"')


@pytest.mark.parametrize("name", ["a/b", "..", "-rf", " lead", "trail ", "dot.", "a\nb", "c:", "ü" * 100, ""])
def test_names_that_are_no_folder(config: Path, name: str):
    with pytest.raises(ConfigError, match="name: must be"):
        validate(Lora, {**yaml.safe_load(GOOD.replace("1e-4", "1.0e-4")), "name": name}, str)


def test_a_name_taken_from_the_file_says_so(config: Path):
    config.rename("it's mine.yaml")
    assert complaint(path="it's mine.yaml").endswith(
        """not "it's mine"; it is taken from the file's name: rename the file, or give name=..."""
    )
    config.with_name("it's mine.yaml").rename("mine (1).yaml")
    assert load("mine (1).yaml", [], Lora).config.run_dir == Path("runs/mine (1)")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "train.colour=1",
            "command line: train.colour: unknown key; known here: max_steps, lr, ",
        ),
        ("adapter.rnk=4", 'command line: adapter.rnk: unknown key; did you mean "rank"?'),
        ("modle={}", 'modle: unknown key; did you mean "model"?'),
        ("train.max_steps=many", 'train.max_steps: must be a whole number, not "many"'),
        ("train.max_steps='7'", 'train.max_steps: must be a whole number, not "7"'),
        ("train.max_steps=1.5", "train.max_steps: must be a whole number, not 1.5"),
        ("train.max_steps=true", "train.max_steps: must be a whole number, not true"),
        ("train.max_steps=0", "train.max_steps: must be at least 1, not 0"),
        ("train.lr=-1", "train.lr: must be greater than 0, not -1"),
        ("train.lr=.nan", "train.lr: must be a finite number"),
        ("train.betas=[0.9]", "train.betas[1]: is required"),
        ("train.betas=[0.9, 1.0]", "train.betas[1]: must be less than 1, not 1.0"),
        ("train.schedule=cosin", "train.schedule: must be 'constant', 'linear' or 'cosine', not \"cosin\""),
        ("train.optimizer=adam8bit", 'there is no optimizer "adam8bit"; did you mean "adamw8bit"?'),
        ("train=5", "train: must be a section of keys and values, not 5"),
        ("data.flip=1", "data.flip: must be true or false, not 1"),
        ("data.flip=on", 'data.flip: must be true or false, not "on"'),
        ("data.path=7", "data.path: must be text, not 7"),
        ("data.resolution=100", "data.resolution: must be a multiple of 8, not 100"),
        ("data.resolution=8", "data.resolution: must be at least 16, not 8"),
        ("data.validation=[1]", "data.validation: must be text or a number, not [1]"),
        ("data.validation=1.5", "data.validation: must be text or less than 1, not 1.5"),
        ("data.caption_dropout=2", "data.caption_dropout: must be at most 1, not 2"),
        ("model.family=sd16", 'model.family: there is no family "sd16"; did you mean "sd15"?'),
        ("memory.device=gpu", 'memory.device: there is no device "gpu"; known: auto, cpu, cuda'),
        ("train.keep_best=clip_score", '"clip_score" is not measured while training; what is, is val_loss'),
        (
            "train.keep_best=val_loss",
            "nothing to choose by without data.validation: val_loss is not",
        ),
        ("adapter.targets=[]", "adapter.targets: an empty list adapts nothing"),
        ("preview.prompts=hello", 'preview.prompts: must be a list, not "hello"'),
        ("optimize={}", "optimize: must be a list, not {}"),
    ],
)
def test_wrong_keys_and_values(config: Path, override: str, expected: str):
    message = complaint(override)
    assert expected in message
    assert message.startswith("command line: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.warmup_steps=100"], "train.warmup_steps: the warm-up never ends"),
        (
            ["memory.budget=auto", "memory.gradient_checkpointing=[mid_block]"],
            "memory.gradient_checkpointing: names blocks, and with memory.budget the planner chooses them",
        ),
        (["memory.micro_batch=2"], "memory.micro_batch: must not be larger than train.batch_size (1)"),
        (["preview.every=10"], "preview.every: has no effect: preview.prompts is empty"),
        (["preview.guidance=3"], "preview.guidance: has no effect: preview.prompts is empty"),
        (["preview={prompts: [x], every: 101}"], "preview.every: has no effect: training ends before"),
        (["train.validate_every=10"], "train.validate_every: has no effect: there are no held-out pictures"),
        (
            ["train.validate_every=101", "data.validation=0.1"],
            "train.validate_every: has no effect: training ends",
        ),
        (
            ["train.early_stop=3"],
            "train.early_stop: has no effect: val_loss is not measured without data",
        ),
        (
            ["train.early_stop=3", "data.validation=0.1"],
            "train.early_stop: has no effect: val_loss is not measured without train.validate_every",
        ),
        (
            ["train.early_stop=4", "train.validate_every=20", "data.validation=0.1"],
            "train.early_stop: has no effect: it could end the training at step 100 at the earliest, of 100",
        ),
        (
            ["train.keep_best=true", "data.validation=0.1"],
            "train.keep_best: has no effect: without train.validate_every the last step alone is measured",
        ),
    ],
)
def test_options_without_effect(config: Path, overrides: list[str], expected: str):
    message = complaint(*overrides)
    assert f"command line: {expected}" in message


WHOLE = ["adapter=null", "train.max_grad_norm=null", "memory.optimizer_in_backward=true"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["adapter=null", "memory.optimizer_in_backward=true"],
            "memory.optimizer_in_backward: contradicts train.max_grad_norm: the norm of all gradients",
        ),
        (
            [*WHOLE, "train.batch_size=4", "memory.micro_batch=2"],
            "memory.optimizer_in_backward: contradicts memory.micro_batch: gradients of several forwards",
        ),
        (
            ["train.max_grad_norm=null", "memory.optimizer_in_backward=true"],
            "memory.optimizer_in_backward: saves nothing with an adapter, whose gradients are small",
        ),
        ([*WHOLE, "memory.precision=fp16"], "memory.optimizer_in_backward: does not go with fp16"),
        (["adapter=null", "memory.base_precision=int8"], "memory.base_precision: needs a frozen base"),
        (["adapter=null", "memory.base_precision=nf4"], "memory.base_precision: needs a frozen base"),
        (
            ["adapter=null", "memory.gradient_checkpointing=true", "memory.offload=[mid_block.resnets.1]"],
            "memory.offload: needs a frozen base: all weights are trained with adapter=null",
        ),
        (["adapter=null", "memory={offload: true, budget: auto}"], "memory.offload: needs a frozen base"),
        (
            ["memory.sharding=full", "memory.base_precision=int8"],
            "memory.sharding: splits float weights, and those of memory.base_precision are packed",
        ),
        (["memory={sharding: full, offload: true, budget: auto}"], "memory.sharding: contradicts memory.off"),
        (
            ["adapter=null", "memory.sharding=full", "train.optimizer=adafactor"],
            "memory.sharding: does not go with train.optimizer=adafactor",
        ),
        (
            ["adapter=null", "memory.sharding=full", "memory.precision=fp16"],
            "memory.sharding: does not go with fp16 where all weights are trained",
        ),
        (
            ["memory.gradient_checkpointing=true", "memory.offload=true"],
            "memory.offload: true lets the planner choose the blocks: set memory.budget too, or name them",
        ),
        (["memory.offload=[mid_block.resnets.1]"], "memory.offload: has no effect: no block is checkpointed"),
        (["memory.keep_attention=true"], "memory.keep_attention: has no effect: no block is checkpointed"),
        (
            ["memory.base_precision=int4"],
            "memory.base_precision: must be 'same', 'int8', 'fp8' or 'nf4', not \"int4\"",
        ),
    ],
)
def test_memory_levers_that_contradict_something(config: Path, overrides: list[str], expected: str):
    assert f"command line: {expected}" in complaint(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        WHOLE,
        [*WHOLE, "train.batch_size=4", "memory.micro_batch=4"],
        [*WHOLE, "memory.precision=bf16"],
        ["adapter=null", "memory.base_precision=same"],
        ["adapter=null", "memory.optimizer_in_backward=false", "memory.offload=false"],
        ["memory.sharding=full", "memory.precision=fp16", "train.optimizer=adafactor"],
        ["memory.gradient_checkpointing=true", "memory.offload=[mid_block.resnets.1]"],
        ["memory.gradient_checkpointing=[mid_block.resnets.1]", "memory.keep_attention=true"],
        ["memory={offload: true, budget: auto}"],
    ],
)
def test_memory_levers_that_go_together(config: Path, overrides: list[str]):
    load("mine.yaml", overrides, Lora)


@pytest.mark.parametrize(
    "key", ["prior_weight=0.5", "class_pictures=9", "class_path=x", "class_steps=3", "class_guidance=1"]
)
def test_prior_options_without_a_class(config: Path, key: str):
    data = ["data={path: photos, instance_prompt: a sks cat}", f"data.{key}"]
    assert f"data.{key.partition('=')[0]}: has no effect: there are no class pictures" in complaint(
        *data, schema=Dreambooth
    )
    assert (
        load("mine.yaml", [*data, "data.class_prompt=a cat"], Dreambooth).config.data.class_prompt == "a cat"
    )


def test_the_optimizer_is_auto_unless_named(config: Path):
    assert load("mine.yaml", [], Lora).config.train.optimizer == "auto"
    for name in ("auto", "adamw", "adamw8bit", "paged_adamw8bit", "adafactor"):
        assert load("mine.yaml", [f"train.optimizer={name}"], Lora).config.train.optimizer == name


def test_what_is_learned_is_as_the_base_was_trained_unless_said(config: Path):
    objective = load("mine.yaml", [], Lora).config.objective
    assert objective == ObjectiveConfig()
    assert {name for name, value in objective if value is not None} == {"noise_offset", "loss", "huber_delta"}
    whole = "{prediction: v_prediction, zero_terminal_snr: true, snr_gamma: 5, noise_offset: 0.05}"
    made = load("mine.yaml", [f"objective={whole}"], Lora).config.objective
    assert made.prediction == "v_prediction" and made.zero_terminal_snr and made.noise_offset == 0.05
    flow = load("mine.yaml", ["objective={timesteps: logit_normal, shift: 3, loss: huber}"], Lora)
    assert flow.config.objective.shift == 3.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.huber_delta=0.5", "objective.huber_delta: has no effect: loss is not huber"),
        ("objective.shift=0", "objective.shift: must be greater than 0 or 'resolution', not 0"),
        ("objective.noise_offset=-1", "objective.noise_offset: must be at least 0, not -1"),
        ("objective.snr_gamma=0", "objective.snr_gamma: must be greater than 0, not 0"),
        ("objective.prediction=v", "objective.prediction: must be 'epsilon', 'v_prediction' or 'sample'"),
        ("objective.timesteps=sigmoid", "objective.timesteps: must be 'uniform' or 'logit_normal'"),
        ("objective.loss=l1", "objective.loss: must be 'mse' or 'huber', not \"l1\""),
    ],
)
def test_objectives_that_are_none(config: Path, override: str, expected: str):
    assert f"command line: {expected}" in complaint(override)


def test_the_former_name_of_min_snr_is_read(config: Path):
    """And its place is told where it is wrong."""
    config.write_text(GOOD + "  snr_gamma: 5\n")
    loaded = load("mine.yaml", [], Lora)
    assert loaded.config.objective.snr_gamma == 5.0
    assert loaded.where("objective.snr_gamma") == "mine.yaml:7"
    assert load("mine.yaml", ["train.snr_gamma=3"], Lora).config.objective.snr_gamma == 3.0
    assert "train.snr_gamma: is the former name of objective.snr_gamma, which is set too" in complaint(
        "objective.snr_gamma=4"
    )
    config.write_text(GOOD + "  snr_gamma: much\n")
    assert complaint() == 'mine.yaml:7: objective.snr_gamma: must be a number, not "much"'
    config.write_text(GOOD + "  snr_gamma: null\n")
    assert load("mine.yaml", [], Lora).config.objective.snr_gamma is None


def test_previews_take_what_pictures_are_drawn_with(config: Path):
    text = "{prompts: [a fox], steps: 4, scheduler: {class: EulerDiscreteScheduler, use_karras_sigmas: true}}"
    preview = load("mine.yaml", [f"preview={text}"], Lora).config.preview
    assert preview.sampling == SamplingConfig(
        steps=4, scheduler={"class": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    )
    assert type(preview.sampling) is SamplingConfig
    for key in ("steps=4", "negative_prompt=blurry", "scheduler={class: X}", "height=64", "seed=3"):
        assert f"preview.{key.partition('=')[0]}: has no effect: preview.prompts is empty" in complaint(
            f"preview.{key}"
        )


def test_what_is_left_open_is_taken_from_another():
    """The run, then the artifact, then the family: none of them has to say all."""
    run = SamplingConfig(steps=4, negative_prompt="")
    artifact = SamplingConfig(steps=8, guidance=3.0, negative_prompt="blurry", scheduler={"class": "X"})
    whole = run.over(artifact).over(SamplingConfig(height=64, guidance=7.5))
    assert whole == SamplingConfig(
        steps=4, guidance=3.0, negative_prompt="", height=64, scheduler={"class": "X"}
    )
    assert run.over(None) is run


@pytest.mark.parametrize("key", ["betas=[0.8, 0.9]", "eps=1e-6"])
def test_options_the_optimizer_does_not_take(config: Path, key: str):
    expected = f"train.{key.partition('=')[0]}: has no effect: adafactor does not take it"
    assert f"command line: {expected}" in complaint("train.optimizer=adafactor", f"train.{key}")
    load("mine.yaml", ["train.optimizer=adafactor", "train.weight_decay=0.1"], Lora)
    load("mine.yaml", ["train.optimizer=adamw8bit", f"train.{key}"], Lora)
    load("mine.yaml", [f"train.{key}"], Lora)


def test_a_default_written_out_is_no_error(config: Path):
    loaded = load("mine.yaml", ["preview.guidance=null", "preview.seed=0"], Lora)
    assert loaded.config.preview.guidance is None
    load("mine.yaml", ["objective.loss=mse", "objective.huber_delta=0.1"], Lora)
    load("mine.yaml", ["train.optimizer=adafactor", "train.betas=[0.9, 0.999]"], Lora)


def sections(schema: type[Section]) -> set[type[Section]]:
    from tunekit.config.schema import _section_types

    found = {schema}
    for item in schema.model_fields.values():
        for child in _section_types(item.annotation):
            found |= sections(child)  # type: ignore[arg-type]
    return found


HUGE = 10**28


def refusals(schema: type[Section], key: str, value: Any) -> list[str]:
    """What is wrong with one key of a section that holds nothing else."""
    with contextlib.suppress(ConfigError):
        validate(schema, {key: value}, str)
        return []
    with pytest.raises(ConfigError) as caught:
        validate(schema, {key: value}, str)
    return [part.message for part in caught.value.parts if part.key.startswith(key)]


@pytest.mark.parametrize(
    "schema",
    [
        *sorted(sections(Lora) | sections(Dreambooth), key=lambda it: it.__name__),
        *dict(PASSES.items()).values(),
    ],
    ids=lambda schema: schema.__name__,
)
def test_every_number_has_a_top(schema: type[Section]):
    """1e28 steps never end, and a rank of 1e28 overflows: no number is taken whatever its size."""
    values = (HUGE, 1e30, -HUGE, [HUGE] * 2, [HUGE] * 3)  # the last two for pairs and ranges
    numbers = [
        (key, value) for key in schema.model_fields for value in values if not refusals(schema, key, value)
    ]
    assert numbers == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (f"preview.seed={2**64}", "preview.seed: must be less than 9223372036854775808"),
        (f"train.max_steps={HUGE}", "train.max_steps: must be at most 10000000, not 1000000"),
        ("train.lr=1e30", "train.lr: must be at most 100, not 1e+30"),
        ("data.path=''", 'data.path: must not be empty, not ""'),
        ("model.source=' '", "model.source: must not be empty"),
        ("runs=" + "x" * 300, "runs: is too long: a path takes 4000 bytes, and a name in it 255"),
        ("adapter.targets=['']", "adapter.targets[0]: must not be empty"),
        ("memory.budget='0'", 'memory.budget: "0" leaves no memory at all; write it as'),
        ("memory.budget=0 GiB", 'memory.budget: "0 GiB" leaves no memory at all'),
        ("memory.budget=" + "9" * 90 + " TiB", "is a size that no memory has"),
        ("memory.device=cuda:9999", 'there is no device "cuda:9999"'),
        ("optimize=[" + "merge," * 101 + "]", "optimize: must have at most 100 items"),
        ("preview={prompts: [a], scheduler: {x: .inf}}", "preview.scheduler.x: must be a finite number"),
        ("model.revision=main", "model.revision: has no effect: model.source is tiny"),
    ],
)
def test_values_without_bounds(config: Path, override: str, expected: str):
    assert f"command line: {expected}" in complaint(override) or expected in complaint(override)


def test_a_long_list_of_mistakes_is_cut(config: Path):
    config.write_text(GOOD + "".join(f"key{index}: 1\n" for index in range(3000)))
    with pytest.raises(ConfigError) as caught:
        load("mine.yaml", [], Lora)
    assert str(caught.value).splitlines()[-1] == "and 2980 more"
    assert len(str(caught.value).splitlines()) == 21
    assert len(caught.value.parts) == 3000


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=1", 'did you mean "lr"?'),
        ("learning_rate=1", 'did you mean "train.lr"?'),
        ("max_steps=1", 'did you mean "train.max_steps"?'),
        ("train.rank=1", 'did you mean "adapter.rank"?'),
        ("train.network_dim=1", 'did you mean "adapter.rank"?'),
        ("train_batch_size=1", 'did you mean "train.batch_size"?'),
        ("train.Train-Batch-Size=1", 'did you mean "batch_size"?'),
        ("train.num_train_epochs=1", "give train.max_steps: epochs x pictures"),
        ("pretrained_model_name_or_path=x", 'did you mean "model.source"?'),
        ("model.mixed_precision=bf16", 'did you mean "memory.precision"?'),
        ("output_dir=x", 'did you mean "runs"?'),
        ("train.gradient_acumulation=1", "known here: "),
        ("train.gradient_accumulation_steps=4", "train.batch_size is the whole batch"),
        ("train.min_snr_gamma=5", 'did you mean "objective.snr_gamma"?'),
        ("memory.gradient_checkpoint=true", 'did you mean "gradient_checkpointing"?'),
        ("train.gradient_checkpoint=true", 'did you mean "memory.gradient_checkpointing"?'),
    ],
)
def test_words_of_other_trainers_and_other_sections_are_known(config: Path, override: str, expected: str):
    assert f"unknown key; {expected}" in complaint(override)


def test_every_word_leads_to_a_key_that_there_is():
    known = {*all_keys(Lora), *all_keys(Dreambooth)}
    assert {key for key in words.KEYS.values() if key not in known} == set()
    named = {key for text in words.REMARKS.values() for key in re.findall(r"\b[a-z]+\.[a-z_]+", text)}
    assert {key for key in named if key.partition(".")[0] in known} <= known


@pytest.mark.parametrize(
    ("text", "overrides", "idle"),
    [
        ("preview: {prompts: [a], every: 50}", ["train.max_steps=20"], "preview.every"),
        ("preview: {prompts: [a], every: 50, steps: 3}", ["preview.prompts=[]"], "preview.steps"),
        ("memory: {budget: auto, on_oom: replan}", ["memory.budget=null"], "memory.on_oom"),
        ("objective: {loss: huber, huber_delta: 0.5}", ["objective.loss=mse"], "objective.huber_delta"),
    ],
)
def test_what_an_override_makes_idle_is_left_out_and_said(
    config: Path, text: str, overrides: list[str], idle: str
):
    config.write_text(GOOD + text + "\n")
    loaded = load("mine.yaml", overrides, Lora)
    (said,) = (text for text in loaded.warnings if text.startswith(f"mine.yaml:7: {idle}: has no effect: "))
    assert said.endswith(" (by the command line); left out")
    section, _, key = idle.partition(".")
    value = getattr(getattr(loaded.config, section), key)
    assert value == type(getattr(loaded.config, section)).model_fields[key].default
    assert load("mine.yaml", [], Lora).warnings == ()


def test_what_is_idle_anyway_is_refused(config: Path):
    config.write_text(GOOD + "objective: {huber_delta: 0.5}\n")
    assert "mine.yaml:7: objective.huber_delta: has no effect" in complaint("seed=3")
    config.write_text(GOOD.replace("path: photos", "path: ???") + "objective: {huber_delta: 0.5}\n")
    assert "mine.yaml:7: objective.huber_delta: has no effect" in complaint("data.path=x")
    config.write_text(GOOD)
    assert "command line: objective.huber_delta: has no effect" in complaint("objective.huber_delta=0.5")
    config.write_text(GOOD.replace("path: photos", "path: ???") + "preview: {prompts: [a], every: 50}\n")
    assert len(load("mine.yaml", ["data.path=x", "train.max_steps=9"], Lora).warnings) == 1


def test_required_values(config: Path):
    config.write_text(GOOD.replace("path: photos", "path: ???").replace("  lr: 1e-4\n", ""))
    lines = complaint().splitlines()
    assert lines[0].startswith(
        "mine.yaml:3: data.path: is required; set it here or give data.path=... (Folder of"
    )
    assert lines[1].startswith("mine.yaml:4: train.lr: is required; set it here or give train.lr=...")
    assert len(lines) == 2
    assert load("mine.yaml", ["data.path=x", "train.lr=1"], Lora).config.data.path == "x"


def test_everything_wrong_is_listed_at_once_in_order(config: Path):
    config.write_text(
        GOOD.replace("1e-4", "fast").replace("tiny}", "tiny, colour: red}").replace("100", "-1")
    )
    lines = complaint("seed=-1").splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["command line", "seed"],
        ["mine.yaml:2", "model.colour"],
        ["mine.yaml:5", "train.max_steps"],
        ["mine.yaml:6", "train.lr"],
    ]


def test_empty_file(config: Path):
    config.write_text("")
    assert complaint(schema=RunConfig).startswith("mine.yaml: recipe: is required")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("recipe: lorra", 'mine.yaml:1: there is no recipe "lorra"; did you mean "lora"?'),
        ("seed: 1", "mine.yaml: recipe: is required"),
        ("recipe: ???", "mine.yaml:1: recipe: is required"),
        ("recipe: [a]", "mine.yaml:1: recipe: is required"),
    ],
)
def test_the_recipe_gives_the_schema(config: Path, text: str, expected: str):
    config.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load("mine.yaml")
    assert str(caught.value).startswith(expected)


def test_sections_are_frozen(config: Path):
    loaded = load("mine.yaml", [], Lora)
    with pytest.raises(ValueError, match="frozen"):
        loaded.config.train.lr = 1.0


def test_chain_places(config: Path):
    config.write_text(GOOD + "optimize:\n  - merge\n  - prune:\n      ratio: 0.3\n")
    loaded = load("mine.yaml", ["optimize.1.prune.method=x"], Lora)
    assert loaded.chain_where(0) == "mine.yaml:8"
    assert loaded.chain_where(1) == "mine.yaml:9"
    assert loaded.chain_where(1, "ratio") == "mine.yaml:10"
    assert loaded.chain_where(1, "method") == "command line"
    assert loaded.chain_where(0, "absent") == "mine.yaml:8"


@pytest.mark.parametrize(
    ("schema", "overrides"),
    [
        (
            Lora,
            [
                "optimize=[merge, {prune: {ratio: 0.3}}]",
                "adapter=null",
                "train.lr=1e-12",
                "preview.prompts=['a: b', ünï]",
            ],
        ),
        (Dreambooth, ["data={path: x, instance_prompt: y}"]),
    ],
)
def test_the_dump_loads_to_the_same_config(
    config: Path, tmp_path: Path, schema: type[RunConfig], overrides: list[str]
):
    before = load("mine.yaml", overrides, schema).config
    (tmp_path / "config.yaml").write_text(dump_yaml(before), encoding="utf-8")
    after = load("config.yaml", [], schema).config
    assert after == before
    assert list(yaml.safe_load(dump_yaml(before))) == list(schema.model_fields)


@pytest.mark.parametrize(
    "schema", sorted(sections(Lora) | sections(Dreambooth), key=lambda item: item.__name__)
)
def test_every_key_says_what_it_is(schema: type[Section]):
    missing = [name for name, item in schema.model_fields.items() if not item.description]
    assert not missing
    assert schema.model_json_schema()


def test_the_package_gives_every_public_name():
    given = {name for name in package.__all__ if getattr(package, name) is not None}
    files = [path.stem for path in Path(package.__file__).parent.glob("[!_]*.py")]
    public = {
        name
        for file in files
        for name, value in vars(importlib.import_module(f"tunekit.config.{file}")).items()
        if inspect.isroutine(value) or inspect.isclass(value)
        if value.__module__ == f"tunekit.config.{file}" and not name.startswith("_")
    }
    assert public - given == set()
    assert sorted(package._FILES) == sorted(files)
    with pytest.raises(AttributeError, match="no attribute 'Lorra'"):
        package.Lorra  # noqa: B018


class Small(Section):
    size: int
    """How many."""
    pair: tuple[int, int] = (1, 2)
    """Two."""


def test_validate_for_other_sections():
    assert validate(Small, {"size": 1, "pair": [3, 4]}, str) == Small(size=1, pair=(3, 4))
    tree: dict[str, Any] = {"size": "1", "sise": 2}
    with pytest.raises(ChainError) as caught:
        validate(Small, tree, lambda key: f"line {key}", error=ChainError)
    assert str(caught.value).splitlines() == [
        "line ('sise',): sise: unknown key; did you mean \"size\"?",
        "line ('size',): size: must be a whole number, not \"1\"",
    ]


@pytest.mark.parametrize("name", config_names())
def test_ready_made_configs_are_valid_but_for_what_the_user_must_give(name: str):
    problems = []
    try:
        assert load(name).config.recipe
    except ConfigError as error:
        problems = [line for line in str(error).splitlines() if ": is required; set it here" not in line]
    assert not problems
