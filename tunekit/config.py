"""Configuration: strict typed sections, and errors that name file, line, key and the nearest valid name."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tunekit import optimizers
from tunekit.errors import ConfigError, TunekitError, did_you_mean
from tunekit.registry import BLUEPRINTS, FAMILIES, load_recipe
from tunekit.units import parse_bytes
from tunekit.yamlfile import REQUIRED, Key, Source, dotted, read

S = TypeVar("S", bound=BaseModel)
CLASS_BATCH = 4
"""Class pictures drawn at once where there is room."""


# Sections --------------------------------------------------------------------------------------------------


class Section(BaseModel):
    """Base of all that is read from YAML: frozen, no unknown keys, a field's docstring describes it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def _refuse(message: str) -> NoReturn:
    """Raised by validators of one field."""
    raise PydanticCustomError("tunekit", "{message}", {"message": message})


def wrong(key: str, message: str) -> NoReturn:
    """Raised by validators over a whole section, so that the message still points at the line of `key`."""
    raise PydanticCustomError("tunekit", "{message}", {"message": message, "key": key})


def changed(section: BaseModel, key: str) -> bool:
    """Whether the user gave `key` a value that is not its default."""
    default = type(section).model_fields[key].get_default(call_default_factory=True, validated_data={})
    return key in section.model_fields_set and getattr(section, key) != default


def no_effect(section: BaseModel, keys: Iterable[str], because: str) -> None:
    """Refuses options that were set but would change nothing."""
    for key in keys:
        if changed(section, key):
            wrong(key, f"has no effect: {because}")


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Multiple = Annotated[int, Field(ge=16, le=4096, multiple_of=8)]


class ModelConfig(Section):
    """The base model."""

    family: str
    """Model family, a file in tunekit/families: sd15."""
    source: str
    """Hub id, folder, single .safetensors file, "builtin/..." or "tiny" (small random weights)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Weight file variant on the hub, such as fp16."""
    allow_pickle: bool = False
    """Accept .bin and .ckpt files (still loaded as weights only)."""

    @field_validator("family")
    @classmethod
    def _known_family(cls, value: str) -> str:
        names = sorted({*FAMILIES.names(), *BLUEPRINTS.names()})
        if value not in names:
            hint = did_you_mean(value, names) or f"known: {', '.join(names)}"
            _refuse(f'there is no family "{value}"; {hint}')
        return value


class _Pictures(Section):
    path: str
    """Folder of pictures, or "builtin/pictures/..."."""
    resolution: Multiple = 512
    """Side of the training pictures, in pixels."""
    crop: Literal["center", "random"] = "center"
    """Which part is kept of a picture that does not fit the resolution."""
    flip: bool = False
    """Mirror half of the pictures, drawn anew in each epoch."""
    cache: str | None = None
    """Folder of the encoded pictures and captions; the default is .cache under `runs`."""


class DataConfig(_Pictures):
    """Captioned pictures."""

    path: str
    """Folder of captioned pictures, a parquet file, a hub id of a data set, or "builtin/pictures/..."."""
    split: str = "train"
    """Split of a `datasets` data set."""
    image_column: str | None = None
    """Column of the pictures, if it cannot be told."""
    caption_column: str | None = None
    """Column of the captions, if it cannot be told."""
    buckets: bool = True
    """Group pictures by aspect ratio; otherwise all are cropped square."""
    caption_prefix: str = ""
    """Put before every caption."""
    caption_dropout: Fraction = 0.1
    """Share of samples trained with an empty caption."""
    validation: str | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Held-out pictures: a path like `path`, or the share of the pictures to hold out."""


class DreamboothData(_Pictures):
    """A few pictures of one subject, and the class it belongs to."""

    path: str
    """Folder of the pictures of the subject."""
    instance_prompt: str
    """Prompt naming the subject by a rare word: "a photo of sks robot"."""
    class_prompt: str | None = None
    """Prompt of the class, "a photo of a robot"; null trains without prior preservation."""
    class_path: str | None = None
    """Folder of class pictures; the base model draws those that are missing. Default: in the run folder."""
    class_pictures: Positive = 50
    """How many class pictures."""
    class_steps: Positive = 30
    """Sampling steps of a class picture."""
    class_guidance: float = Field(5.0, ge=0)
    """Guidance of a class picture."""
    prior_weight: float = Field(1.0, ge=0)
    """Weight of the class pictures' loss."""

    @model_validator(mode="after")
    def _effects(self) -> DreamboothData:
        if self.class_prompt is None:
            keys = ("class_path", "class_pictures", "class_steps", "class_guidance", "prior_weight")
            no_effect(self, keys, "there are no class pictures without class_prompt")
        return self


class AdapterConfig(Section):
    """A low-rank adapter, as in PEFT."""

    kind: Literal["lora", "dora"] = "lora"
    """dora also learns the length of each weight column."""
    rank: Positive = 16
    """Rank of the update."""
    alpha: float = Field(16.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapter."""
    targets: list[str] | None = None
    """Names of the modules to adapt, such as to_q; null means the family's own choice."""

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not value:
            _refuse("an empty list adapts nothing; null means the family's own choice")
        return value


class TrainConfig(Section):
    """How it is trained."""

    max_steps: Positive
    """Optimizer steps."""
    lr: float = Field(gt=0)
    """Highest learning rate."""
    batch_size: Positive = 1
    """Samples per optimizer step, over all processes."""
    optimizer: str = "auto"
    """A row of tunekit/optimizers.py: adamw, adamw8bit, paged_adamw8bit or adafactor; auto is adamw, unless
    memory is planned and only another one fits."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the optimizer's moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the optimizer's denominator."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up; linear and cosine end at zero."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from zero."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are clipped to this global norm; null means no clipping."""
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """min-SNR loss weighting; 5 is usual."""
    checkpoint_every: Positive = 200
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept; older ones are removed."""
    validate_every: Positive | None = None
    """Steps between validation losses; needs data.validation."""
    log_every: Positive = 10
    """Steps between console lines and, on a GPU, looks at the losses; metrics.jsonl has every step."""
    trackers: list[Literal["tensorboard"]] = []
    """Further places to log to."""

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        try:
            optimizers.find(value)
        except ConfigError as error:
            _refuse(error.message)
        return value  # "auto" stays: find has adamw for it

    @model_validator(mode="after")
    def _effects(self) -> TrainConfig:
        if self.warmup_steps >= self.max_steps:
            wrong(
                "warmup_steps", f"the warm-up never ends: it must be less than max_steps ({self.max_steps})"
            )
        takes = optimizers.find(self.optimizer).takes
        unused = [key for key in optimizers.SHARED if key not in takes]
        no_effect(self, unused, f"{self.optimizer} does not take it")
        return self


class PreviewConfig(Section):
    """Pictures drawn during and after training."""

    prompts: list[str] = []
    """One picture each."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    every: Positive | None = None
    """Steps between previews; null draws them only at the start and the end."""
    steps: Positive = 30
    """Sampling steps."""
    guidance: float = Field(7.5, ge=0)
    """Classifier-free guidance."""
    seed: int = Field(0, ge=0)
    """Seed of the first picture; the next ones count up."""
    height: Multiple | None = None
    """In pixels; the default is the training resolution."""
    width: Multiple | None = None
    """In pixels; the default is the training resolution."""

    @model_validator(mode="after")
    def _effects(self) -> PreviewConfig:
        if not self.prompts:
            no_effect(
                self, (key for key in type(self).model_fields if key != "prompts"), "preview.prompts is empty"
            )
        return self


class MemoryConfig(Section):
    """What fits where."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the denoiser; trained parameters stay fp32. auto is bf16 where the device has it, fp16 on
    older GPUs, fp32 on the CPU."""
    base_precision: Literal["same", "int8", "nf4"] | None = None
    """Frozen weights of the linear layers in the blocks: same as precision, or packed (nf4 needs
    bitsandbytes). null leaves it to the planner, and is same without one."""
    micro_batch: Positive | None = None
    """Samples per forward on one device; default batch_size / processes. Changes nothing that is learned."""
    gradient_checkpointing: bool | list[str] | None = None
    """Compute activations twice instead of keeping them: of all blocks, or of those named. null leaves it to
    the planner, and is false without one."""
    keep_attention: bool | list[str] | None = None
    """Of the checkpointed blocks, all or those named keep what their attentions returned: a little more
    memory, a little less work. null leaves it to the planner."""
    offload: bool | list[str] | None = None
    """Keep frozen weights of checkpointed blocks in host memory and copy them when they are needed: those
    named, or with true as many as the planner finds necessary. null lets the planner decide whether."""
    optimizer_in_backward: bool | None = None
    """Update each parameter as soon as its gradient is there, so that all gradients are never held. Only
    where all weights are trained, without accumulation and without train.max_grad_norm. null leaves it to
    the planner."""
    encode_on_host: bool | None = None
    """Run the text encoders on the CPU. null lets the planner decide, and is false without one."""
    vae_tiling: bool | None = None
    """Decode previews in tiles, which can show at their seams. null lets the planner decide."""
    class_batch: Positive | None = None
    """Class pictures drawn at once. null leaves it to the planner, and is 4 without one."""
    approximate: Literal["never", "if_needed", "if_faster"] = "if_needed"
    """Whether the planner may choose what changes a little what is learned: packed base weights and 8-bit
    optimizer state. if_needed: only if nothing exact fits."""
    budget: str | None = None
    """Memory to stay within, "8 GiB", or auto for all that is free: then what is not set here is planned
    (tunekit plan). null plans nothing."""
    on_oom: Literal["stop", "replan"] = "stop"
    """When memory runs out in spite of a plan: stop after a checkpoint, or plan again for less memory and go
    on from it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, xpu or mps."""

    @model_validator(mode="after")
    def _one_decides(self) -> MemoryConfig:
        if self.budget is not None:
            for key in ("gradient_checkpointing", "keep_attention", "offload"):
                if isinstance(getattr(self, key), list):
                    wrong(
                        key,
                        "names blocks, and with memory.budget the planner chooses them;"
                        " leave one of the two out",
                    )
            return self
        no_effect(self, ("approximate", "on_oom"), "nothing is planned without memory.budget")
        if not self.gradient_checkpointing:
            because = "no block is checkpointed (memory.gradient_checkpointing)"
            no_effect(self, (key for key in ("keep_attention", "offload") if getattr(self, key)), because)
        if self.offload is True:
            wrong("offload", "true lets the planner choose the blocks: set memory.budget too, or name them")
        return self

    @field_validator("budget")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value not in (None, "auto"):
            try:
                parse_bytes(str(value))
            except ConfigError as error:
                _refuse(f"{error.message}; {error.hint}, or auto")
        return value

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", value):
            _refuse(f'there is no device "{value}"; known: auto, cpu, cuda, cuda:1, xpu, mps')
        return value


class RunConfig(Section):
    """What every recipe's config has."""

    recipe: str
    """Name of a recipe, or the path of a recipe file."""
    name: str = Field("run", pattern=r"^[\w][\w.+=@ -]*$")
    """Folder under `runs`; the default is the config file's name."""
    runs: str = "runs"
    """Folder of all runs."""
    seed: int = Field(0, ge=0)
    """Everything that is drawn at random follows from it."""

    @property
    def run_dir(self) -> Path:
        """Where this run writes."""
        return Path(self.runs).expanduser() / self.name


class TrainingRunConfig(RunConfig):
    """What the training recipes share; each adds its own `data`."""

    model: ModelConfig
    """The base model."""
    adapter: AdapterConfig | None = AdapterConfig()
    """The adapter that is trained; null trains all weights."""
    train: TrainConfig
    """How it is trained."""
    preview: PreviewConfig = PreviewConfig()
    """Pictures drawn during training."""
    memory: MemoryConfig = MemoryConfig()
    """What fits where."""
    optimize: list[dict[str, Any] | str] = []
    """Passes to run after training, in order."""

    @model_validator(mode="after")
    def _effects(self) -> TrainingRunConfig:
        train, memory, preview = self.train, self.memory, self.preview
        validation = getattr(getattr(self, "data", None), "validation", None)
        if train.validate_every is not None and validation is None:
            wrong(
                "train.validate_every",
                "has no effect: there are no held-out pictures without data.validation",
            )
        if memory.class_batch is not None and not getattr(getattr(self, "data", None), "class_prompt", None):
            wrong("memory.class_batch", "has no effect: no class pictures are drawn")
        frozen_only = "needs a frozen base: all weights are trained with adapter=null"
        if self.adapter is None and memory.base_precision in ("int8", "nf4"):
            wrong("memory.base_precision", frozen_only)
        if self.adapter is None and memory.offload:
            wrong("memory.offload", frozen_only)
        if memory.optimizer_in_backward:
            key = "memory.optimizer_in_backward"
            if self.adapter is not None:
                wrong(key, "saves nothing with an adapter, whose gradients are small")
            if train.max_grad_norm is not None:
                wrong(
                    key,
                    "contradicts train.max_grad_norm: the norm of all gradients is known only when all are"
                    " there; set train.max_grad_norm to null, or leave this out",
                )
            if (memory.micro_batch or train.batch_size) < train.batch_size:
                wrong(
                    key,
                    "contradicts memory.micro_batch: gradients of several forwards are summed before they"
                    " are used",
                )
            if memory.precision == "fp16":
                wrong(key, "does not go with fp16, whose gradients are unscaled all at once")
        if memory.micro_batch is not None and memory.micro_batch > train.batch_size:
            wrong("memory.micro_batch", f"must not be larger than train.batch_size ({train.batch_size})")
        if preview.every is not None and preview.every > train.max_steps:
            wrong("preview.every", f"has no effect: training ends before, at step {train.max_steps}")
        if train.validate_every is not None and train.validate_every > train.max_steps:
            wrong("train.validate_every", f"has no effect: training ends before, at step {train.max_steps}")
        return self


# Validation -------------------------------------------------------------------------------------------------


def _section_types(annotation: Any) -> list[type[BaseModel]]:
    """The sections within an annotation such as `AdapterConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list, tuple):
        return [found for part in get_args(annotation) for found in _section_types(part)]
    return []


def _field_names(schema: type[BaseModel], key: Key) -> list[str]:
    """The keys that the section at `key` takes."""
    current = [schema]
    for part in key:
        if isinstance(part, int):
            continue
        current = [
            found
            for model in current
            if part in model.model_fields
            for found in _section_types(model.model_fields[part].annotation)
        ]
    return [name for model in current for name in model.model_fields]


_MESSAGES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "finite_number": "must be a finite number",
    "model_type": "must be a section of keys and values",
    "model_attributes_type": "must be a section of keys and values",
    "dict_type": "must be a section of keys and values",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_pattern_mismatch": "must match {pattern}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "literal_error": "must be {expected}",
}


def _shown_value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _get(tree: Any, key: Key) -> tuple[bool, Any]:
    for part in key:
        keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
        if part not in keys:
            return False, None
        tree = tree[part]
    return True, tree


def _messages(error: ValidationError, schema: type[BaseModel], tree: Any) -> dict[Key, list[str]]:
    """What pydantic found, in our words, by the key in the YAML that each is about."""
    found: dict[Key, list[str]] = {}
    for detail in error.errors(include_url=False):
        kind = detail["type"]
        context = {k: f"{v:g}" if isinstance(v, float) else v for k, v in detail.get("ctx", {}).items()}
        loc: Key = tuple(detail["loc"])
        message = _MESSAGES[kind].format(**context) if kind in _MESSAGES else detail["msg"]
        if kind in {"missing", "extra_forbidden"}:
            key = loc
            if kind == "missing":
                message = "is required"
            else:
                hint = did_you_mean(str(loc[-1]), _field_names(schema, loc[:-1]))
                names = ", ".join(_field_names(schema, loc[:-1]))
                message = f"unknown key; {hint or 'known here: ' + names}"
        elif kind == "tunekit":
            key = (*loc, *str(context["key"]).split(".")) if "key" in context else loc
        else:
            key = loc
            while key and not _get(tree, key)[0]:  # pydantic names the members of a union in the location
                key = key[:-1]
        messages = found.setdefault(key, [])
        if message not in messages:
            messages.append(message)
    return found


def _required(tree: Any, key: Key = ()) -> list[Key]:
    """Keys whose value is `???`."""
    if tree == REQUIRED:
        return [key]
    items: Iterable[tuple[str | int, Any]] = (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    )
    return [found for name, value in items for found in _required(value, (*key, name))]


def _without(tree: Any, keys: set[Key], key: Key = ()) -> Any:
    if isinstance(tree, dict):
        return {
            name: _without(value, keys, (*key, name))
            for name, value in tree.items()
            if (*key, name) not in keys
        }
    if isinstance(tree, list):
        return [_without(v, keys, (*key, i)) for i, v in enumerate(tree)]
    return tree


def _description(schema: type[BaseModel], key: Key) -> str:
    current = [schema]
    description = ""
    for part in key:
        fields = [model.model_fields[str(part)] for model in current if str(part) in model.model_fields]
        description = next((item.description for item in fields if item.description), "")
        current = [found for item in fields for found in _section_types(item.annotation)]
    return f"({description.rstrip('.')})" if description else "on the command line"


def validate(
    schema: type[S],
    tree: dict[str, Any],
    where: Callable[[Key], str],
    *,
    error: type[TunekitError] = ConfigError,
) -> S:
    """Makes a section out of plain values, strictly: 1 is not true, "1" is not a number; lists do for tuples.

    Args:
        where: the place of a key within `tree`; of its section where the key is absent.
        error: class to raise.

    Raises:
        ConfigError: (or `error`) one that lists everything that is wrong, each with place, key and reason.
    """
    unset = _required(tree)
    found: dict[Key, list[str]] = {}
    result: S | None = None
    try:
        # Through JSON: strict about types, yet a list may fill a tuple.
        text = json.dumps(_without(tree, set(unset)), default=str)
        result = schema.model_validate_json(text, strict=True)
    except ValidationError as problem:
        found = _messages(problem, schema, tree)
    for key in unset:
        found[key] = ["is required"]
    if not found and result is not None:
        return result
    lines = []
    for key, messages in found.items():
        message = " or ".join([messages[0], *(text.removeprefix("must be ") for text in messages[1:])])
        present, value = _get(tree, key)
        if message == "is required":
            message += f"; set it here or give {dotted(key)}=... {_description(schema, key)}"
        elif present and message.startswith("must "):
            message += f", not {_shown_value(value)}"
        text = f"{dotted(key) or schema.__name__}: {message}"
        lines.append((where(key), text, error(message, where=where(key), key=dotted(key))))
    lines.sort(key=lambda line: _line_order(line[0]))
    listed = "\n".join(f"{place}: {text}" for place, text, _ in lines)
    raise error(listed, parts=[part for *_, part in lines])


def _line_order(place: str) -> tuple[str, int]:
    file, _, line = place.rpartition(":")
    return (file, int(line)) if line.isdigit() else (place, 0)


# Loading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A validated config and where each of its values came from.

    Attributes:
        config: the validated config.
        source: the values as read, and their places.
    """

    config: Any
    source: Source

    @property
    def path(self) -> Path:
        """The file."""
        return self.source.path

    @property
    def tree(self) -> dict[str, Any]:
        """The merged plain values, before defaults."""
        return dict(self.source.tree)

    def where(self, key: Key | str = ()) -> str:
        """The place of a key ("configs/x.yaml:12"); of the nearest enclosing section where it is absent."""
        return self.source.where(tuple(key.split(".")) if isinstance(key, str) else key)

    def chain_where(self, index: int, key: str | None = None) -> str:
        """The place of item `index` of `optimize:`, or of one key of that pass."""
        parent: Key = ("optimize", index)
        if key is not None:
            item = self.tree.get("optimize", [])[index]
            parent = (*parent, *(item if isinstance(item, dict) else ()), key)
        return self.where(parent)


def load(
    path_or_name: str | Path,
    overrides: Sequence[str] = (),
    schema: type[RunConfig] | None = None,
    *,
    stand_in: str | None = None,
) -> Loaded:
    """Reads and validates a config.

    Args:
        path_or_name: a path, or a name under the ready-made configs ("sd15/lora").
        overrides: `a.b=c` each; the value is YAML.
        schema: the recipe's `Config`; found through `recipe:` if not given.
        stand_in: taken for values that are required and not given, by those who do not need them (a plan
            needs no pictures).

    Raises:
        ConfigError: one that lists everything that is wrong, each with file and line.
    """
    source = read(path_or_name, overrides)
    if stand_in is not None:
        for *path, last in _required(source.tree):
            _get(source.tree, tuple(path))[1][last] = stand_in
    source.tree.setdefault("name", source.path.stem)
    return Loaded(validate(schema or _recipe_schema(source), source.tree, source.where), source)


def load_schema(path_or_name: str | Path, overrides: Sequence[str] = ()) -> type[RunConfig]:
    """The `Config` class of a config's recipe; the config itself may still lack required values."""
    return _recipe_schema(read(path_or_name, overrides))


def _recipe_schema(source: Source) -> type[RunConfig]:
    recipe = source.tree.get("recipe")
    where = source.where(("recipe",))
    if not isinstance(recipe, str) or recipe == REQUIRED:
        message = "recipe: is required: the name of a recipe, such as lora"
        raise ConfigError(message, where=where, key="recipe")
    schema: type[RunConfig] = load_recipe(recipe, where=where).Config
    return schema


def dump_yaml(config: BaseModel) -> str:
    """A config with all its defaults, as YAML that `load` reads back to the same config."""
    tree = config.model_dump(mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)
