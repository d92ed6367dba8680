"""Loading and saving diffusers pipelines, for all families: where weights come from and what is refused.

Whatever is opened is first looked at: configuration files and the headers of weights say, before a weight is
read, whether each network finds all of its tensors and nothing else lies there (`look`). Loading reads just
the tensors that were found so.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tunekit import layers
from tunekit.artifacts import FILES, GRAPHS
from tunekit.diffusion.sampling import is_flow, scheduler_class
from tunekit.errors import MissingPackageError, ModelError, TunekitError, output_errors
from tunekit.families import gguf_files, single_file, weights
from tunekit.families.chat import Chat
from tunekit.families.family import POSITIONS, begin_flow
from tunekit.families.weights import (
    PICKLE_HINT,
    PICKLE_REFUSED,
    PICKLES,
    TEXT_LEVEL,
    Entry,
    read_json,
    variants,
    weight_files,
)
from tunekit.resources import Source

if TYPE_CHECKING:
    from tunekit.families.family import Component, Dtypes, FamilyFacts, Packing, Pipeline

__all__ = [
    "PICKLES",
    "PICKLE_HINT",
    "PICKLE_REFUSED",
    "cast",
    "here",
    "left_out",
    "load_pipeline",
    "look",
    "refuse",
    "save_pipeline",
    "source_files",
    "variant_taken",
    "weight_files",
]

_GRAPHS = {"onnx": "an ONNX graph", "openvino": "an OpenVINO graph"}
MODEL_INDEX = "model_index.json"
GGUF = gguf_files.SUFFIX
BASE = "model.base"
FROM_BASE = "model.base may name a whole model that it is taken from"
LAYER_COUNTS = (
    *("num_hidden_layers", "layers_per_block", "transformer_layers_per_block"),
    *("num_layers", "num_single_layers", "n_layers", "n_refiner_layers"),
)
MAX_TOKENS = 10_000
"""Longest prompt that any text encoder here reads, in tokens."""

Misfits = Callable[[Mapping[str, Any], Mapping[str, Mapping[str, Entry]]], list[str]]
"""(components by name, their tensors by name) -> why the components do not make up a model of the family."""


def load_pipeline(
    source: Source,
    facts: FamilyFacts,
    dtypes: Dtypes = torch.float32,
    *,
    pack: Packing = "",
    fixed: Mapping[str, Any] | None = None,
    misfits: Misfits | None = None,
    only: Collection[str] | None = None,
) -> Pipeline:
    """Load a pipeline from a folder, "builtin/...", a single file or a hub id.

    Each component is read in its own type, tensor by tensor; the whole is never there in another one.

    Args:
        source: what to open, and how.
        facts: the family's.
        dtypes: of the weights, see `Family.load`.
        pack: of the denoiser's linear layers, see `Family.load`.
        fixed: arguments of the pipeline's constructor.
        misfits: see `Misfits`.
        only: networks whose weights are read, see `Family.load`.

    Raises:
        ModelError: see `Family.load`. Of several problems, `parts` lists each.
    """
    import diffusers

    fixed = dict(fixed or {})
    pipeline_class = getattr(diffusers, facts.pipeline_class)
    try:
        path = source.path or _downloaded(source, facts, pipeline_class, fixed)
        rest = source.rest
        base = None
        if rest is not None:
            base = rest.path or _downloaded(rest, facts, pipeline_class, fixed, without_denoiser=True)
        found = _found(path, source, facts, fixed, misfits, base=base)
        refuse(found.problems)
        for part in facts.components:
            network = found.parts.get(part.name)
            if isinstance(network, nn.Module) and (only is None or part.name in only):
                packed: list[str] = []
                if pack and part.role == "denoiser":
                    packed = layers.quantize(network, pack, only=layers.block_linears(network))
                as_stored = packed if pack == "fp8" else ()
                tensors = weights.tensors(found.tensors[part.name], as_stored=as_stored)
                layers.read_weights(network, tensors, _dtype_of(dtypes, part.name))
        with _quiet():
            pipeline = pipeline_class(**found.parts, **{**found.settings, **fixed})
    except TunekitError:
        raise
    # diffusers, transformers, safetensors and the hub raise two dozen kinds; to the user all are one.
    except Exception as error:
        raise ModelError(_reason(error), where=source.name, hint=_hint(source)) from error
    check_finite(pipeline, source.name, only)
    return pipeline


def look(
    source: Source,
    facts: FamilyFacts,
    *,
    fixed: Mapping[str, Any] | None = None,
    misfits: Misfits | None = None,
) -> list[ModelError]:
    """What keeps a source from being loaded, as far as configuration files and headers say it.

    No weight is read and nothing is fetched: of a hub id, nothing is known. Arguments as of `load_pipeline`.
    """
    path = source.path
    if path is None or source.name == "tiny":
        return []
    try:
        base = source.rest.path if source.rest else None
        return _found(path, source, facts, dict(fixed or {}), misfits, base=base, headers=True).problems
    except MissingPackageError:
        raise
    except ModelError as error:
        return list(error.parts) or [error]  # type: ignore[arg-type]
    except Exception as error:
        return [ModelError(_reason(error), where=source.name)]


def refuse(problems: Sequence[ModelError]) -> None:
    """Raises what `look` found: the one problem, or all of them as one whose `parts` they are."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ModelError("\n".join(map(str, problems)), parts=problems)


@dataclass
class _Found:
    """What a source is made of, before a weight is read.

    Attributes:
        parts: networks without data, scheduler, tokenizers, by name.
        tensors: network -> its tensors by its own names, and where each lies.
        settings: other arguments of the pipeline's constructor.
        problems: why it cannot be loaded.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, Entry]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    problems: list[ModelError] = field(default_factory=list)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """What is raised inside is a problem like others."""
        try:
            yield
        except ModelError as error:
            self.problems.append(error)


def _found(
    path: Path,
    source: Source,
    facts: FamilyFacts,
    fixed: Mapping[str, Any],
    misfits: Misfits | None,
    *,
    base: Path | None = None,
    headers: bool = False,
) -> _Found:
    """Looks at a folder or file. With `headers`, pickles, which have none, are not opened.

    Args:
        base: folder of what `Source.base` names, where it is on this machine.

    Raises:
        ModelError: it is another thing altogether.
    """
    found = _Found()
    with _quiet():
        if path.is_dir():
            _find_in_folder(found, path, source, facts, fixed, base, headers)
        else:
            _find_in_file(found, path, source, facts, fixed, base, headers)
        if misfits is not None and all(part.name in found.parts for part in facts.components):
            reasons = misfits(found.parts, found.tensors)
            found.problems[:0] = [ModelError(reason, where=str(path)) for reason in reasons]
    return found


@dataclass(frozen=True)
class _Folder:
    """A folder in diffusers' layout, and how its weights are read."""

    path: Path
    source: Source

    @cached_property
    def index(self) -> dict[str, Any]:
        return _index(Source(str(self.path)))

    def check_class(self, facts: FamilyFacts) -> None:
        _check_class(self.source.name, pipeline_class_name(Source(str(self.path))), facts)

    def lacks(self, name: str) -> bool:
        """Whether no weights of a component are there."""
        folder, named = self.path / name, self.index.get(name)
        if not folder.is_dir() or named is None or named == [None, None]:
            return True
        return not weight_files(folder, self.source.variant, allow_pickle=True) and not variants(folder)

    def settings(self, facts: FamilyFacts, known: Collection[str]) -> dict[str, Any]:
        """Arguments of the pipeline's constructor that its index has, and that are not known."""
        arguments = set(_arguments(facts)) - set(known)
        return {
            key: value for key, value in self.index.items() if key in arguments and not _names_a_class(value)
        }


def _rest(source: Source, path: Path | None, facts: FamilyFacts) -> _Folder | None:
    """The folder of `Source.base`; None without one, or where it is not on this machine.

    Raises:
        ModelError: it is no folder of the family.
    """
    if source.rest is None or path is None:
        return None
    if not path.is_dir():
        raise ModelError(
            "is one file, and what model.base names is a folder or a hub id of a whole model",
            where=str(path),
            key=BASE,
        )
    folder = _Folder(path, source.rest)
    try:
        folder.check_class(facts)
    except ModelError as error:
        error.key = BASE
        raise
    return folder


def _idle_base(path: Path) -> ModelError:
    return ModelError(
        "model.base has no effect: every component is here already",
        where=str(path),
        hint="leave it out",
        key=BASE,
    )


def _find_in_folder(
    found: _Found,
    path: Path,
    source: Source,
    facts: FamilyFacts,
    fixed: Mapping[str, Any],
    base: Path | None,
    headers: bool,
) -> None:
    folder = _Folder(path, source)
    folder.check_class(facts)
    rest = _rest(source, base, facts)
    networks = [part for part in facts.components if part.role != "scheduler"]
    for part in networks:
        for kind, file in GRAPHS.items():
            if (path / part.name / file).is_file():
                raise ModelError(
                    f"{part.name} is {_GRAPHS[kind]}, and this needs a torch model",
                    where=str(path),
                    hint="give the model that it was exported from",
                )
    if source.variant and not any(source.variant in variants(path / part.name) for part in networks):
        there = sorted({name or "the plain one" for part in networks for name in variants(path / part.name)})
        raise ModelError(
            f'has no weights of the variant "{source.variant}"',
            where=str(path),
            hint=f"there is: {', '.join(there) or 'none'}"
            + ("; model.variant: null reads that" if len(there) == 1 else ""),
        )
    lacking = [part.name for part in networks if folder.lacks(part.name)] if source.base else []
    if source.base and not lacking:
        raise _idle_base(path)
    known = [part for part in networks if rest is not None or part.name not in lacking]
    for part in known:
        place = rest if rest and part.name in lacking else folder
        if part.is_left_out(place.index):
            found.parts |= {part.name: None, part.tokenizer: None}
            continue
        with found.noting():
            _find_network(found, place, part, headers)
    beside = [name for name in lacking if not (path / facts.component(name).tokenizer).is_dir()]
    _find_rest(found, folder, facts, dict.fromkeys(beside, rest))
    found.settings = folder.settings(facts, {*found.parts, *fixed})


def _names_a_class(value: Any) -> bool:
    """Whether an entry of model_index.json names a class, or none; other lists are settings."""
    return isinstance(value, list) and all(item is None or isinstance(item, str) for item in value)


def _arguments(facts: FamilyFacts) -> Collection[str]:
    import diffusers

    return inspect.signature(getattr(diffusers, facts.pipeline_class).__init__).parameters


def _find_network(found: _Found, place: _Folder, part: Component, headers: bool) -> None:
    path, source = place.path, place.source
    folder = path / part.name
    wanted = part.classes.partition(":")[2]
    named = place.index.get(part.name)
    if not folder.is_dir() or named is None or named == [None, None]:
        raise ModelError(f"its component {part.name} is missing", where=str(path), hint=FROM_BASE)
    if not isinstance(named, list) or len(named) != 2 or named[1] != wanted:
        raise ModelError(
            f"{part.name} is {_class_of(named)}, and this family takes a {wanted}",
            where=str(path / MODEL_INDEX),
        )
    config = read_json(folder / "config.json")
    files = weight_files(folder, source.variant, allow_pickle=source.allow_pickle)
    if not files:
        raise _no_weights(folder, on_hub=source.path is None)
    closed = headers and files[0].suffix in PICKLES
    entries = {} if closed else weights.entries(files, allow_pickle=source.allow_pickle)
    network = _built(part, config, str(folder / "config.json"), None if closed else len(entries))
    if layers.has_custom_layers(folder):
        layers.describe_onto(network, folder)
    found.parts[part.name] = network
    if not closed:
        kept, problems = weights.fitted(part.name, network, entries, where=str(folder))
        found.tensors[part.name] = kept
        found.problems += problems


def _class_of(named: Any) -> str:
    return f"a {named[1]}" if isinstance(named, list) and len(named) == 2 else f"said to be {named!r}"


def _no_weights(folder: Path, *, on_hub: bool) -> ModelError:
    pickles = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in PICKLES and file.name.startswith(weights.WEIGHTS)
    ]
    if pickles:
        return ModelError(PICKLE_REFUSED, where=str(pickles[0]), hint=PICKLE_HINT)
    several = sorted(variants(folder) - {""})
    if several:
        return ModelError(
            f"its weights are there in several variants: {', '.join(several)}",
            where=str(folder),
            hint=f"choose one: model.variant={several[0]}, or --variant {several[0]}",
        )
    broken = [file.name for file in sorted(folder.iterdir()) if file.is_symlink() and not file.exists()]
    if broken:
        return ModelError(f"{broken[0]} is a link to a file that is gone", where=str(folder))
    names = " or ".join(f"{stem}.safetensors" for stem in weights.WEIGHTS if stem != "pytorch_model")
    hint = f"looked for {names}; {FROM_BASE}"
    if on_hub:
        hint += "; if the repository has them as fp16 alone: model.variant=fp16, or --variant fp16"
    return ModelError("its weights are missing", where=str(folder), hint=hint)


def _built(part: Component, config: Mapping[str, Any] | None, where: str, count: int | None) -> nn.Module:
    """A network without weights, as its configuration says; buffers that no file has are there.

    Args:
        config: None is the table's.
        where: of the configuration, for messages.
        count: tensors that are there for it: whatever has more layers than that is not built.
    """
    from accelerate import init_empty_weights

    made = part.type
    settings = dict(part.config if config is None else config)
    for key in LAYER_COUNTS:
        value = settings.get(key)
        numbers = value if isinstance(value, list | tuple) else [value]
        if count is not None and any(isinstance(number, int) and number > count for number in numbers):
            raise ModelError(f"{key} is {value}, and the weights are {count} tensors", where=where)
    tokens, most = settings.get(POSITIONS), max(MAX_TOKENS, part.config.get(POSITIONS, 0))
    if isinstance(tokens, int) and tokens > most:
        raise ModelError(f"{POSITIONS} is {tokens}; {most} at most", where=where)
    try:
        with init_empty_weights(include_buffers=False):
            if part.classes.startswith("transformers:"):
                network = made(made.config_class.from_dict(settings))
            else:
                network = made.from_config(settings)
    except Exception as error:  # whatever a wrong value leads to in there
        raise ModelError(
            f"does not describe a {made.__name__}: {_reason(error)}",
            where=where,
            hint="it is damaged, or of another model: take it from the original one",
        ) from error
    assert isinstance(network, nn.Module)
    tie = getattr(network, "tie_weights", None)
    if tie is not None:  # T5's embeddings are there twice by name; on the meta device each became its own
        tie()
    return network


def _find_rest(
    found: _Found, folder: _Folder, facts: FamilyFacts, others: Mapping[str, _Folder | None] | None = None
) -> None:
    """Scheduler and tokenizers, which are opened here.

    Args:
        others: text encoders whose tokenizer is in another folder; None where that is not on this machine.
    """
    with found.noting():
        found.parts["scheduler"] = _scheduler(folder.path, folder.index)
    for part in facts.encoders:
        place = (others or {}).get(part.name, folder)
        if place is None or part.is_left_out(place.index):
            continue
        with found.noting():
            tokenizer = _tokenizer(place.path, place.index, part)
            found.parts[part.tokenizer] = tokenizer
            _check_tokenizer(tokenizer, part, found.parts.get(part.name), place.path)


def _scheduler(path: Path, index: Mapping[str, Any]) -> Any:
    named = index.get("scheduler")
    if not isinstance(named, list) or len(named) != 2 or not isinstance(named[1], str):
        raise ModelError(f"scheduler is {_class_of(named)}", where=str(path / MODEL_INDEX))
    file = path / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    try:
        made = scheduler_class(named[1])
    except TunekitError as error:
        raise ModelError(
            f"scheduler: {error.message}", where=str(path / MODEL_INDEX), hint=error.hint
        ) from error
    try:
        scheduler = made.from_config(config)
        trial = copy.deepcopy(scheduler)
        if is_flow(trial):  # some want to be told how far times are shifted
            begin_flow(trial, 2, torch.zeros(()), mu=1.0)
        else:
            trial.set_timesteps(2)
    except Exception as error:  # whatever a wrong value leads to in there
        raise ModelError(f"does not describe a {named[1]}: {_reason(error)}", where=str(file)) from error
    return scheduler


def _tokenizer(path: Path, index: Mapping[str, Any], part: Component) -> Any:
    import transformers

    named = index.get(part.tokenizer)
    name = named[1] if isinstance(named, list) and len(named) == 2 else None
    made = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedTokenizerBase)):
        raise ModelError(
            f"{part.tokenizer} is {_class_of(named)}, which is no tokenizer", where=str(path / MODEL_INDEX)
        )
    folder = path / part.tokenizer
    if not folder.is_dir():
        raise ModelError(f"its component {part.tokenizer} is missing", where=str(path))
    for file in sorted(folder.glob("*.json")):
        read_json(file)
    tokenizer_class: Any = made
    try:
        return tokenizer_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise ModelError(f"cannot be read as a {name}: {_reason(error)}", where=str(folder)) from error


def _check_tokenizer(tokenizer: Any, part: Component, encoder: Any, path: Path) -> None:
    """Its words must be the encoder's; where it does not say how many it reads, the encoder does."""
    config = getattr(encoder, "config", None)
    most = part.reads({POSITIONS: getattr(config, POSITIONS, None)})
    length = tokenizer.model_max_length
    where = str(path / part.tokenizer)
    if not isinstance(length, int | float) or isinstance(length, bool) or length < 2:
        raise ModelError(f"model_max_length is {length!r}", where=where)
    tokenizer.model_max_length = min(int(length), int(most))
    words = getattr(config, "vocab_size", None)
    if words is not None and len(tokenizer) > words:
        raise ModelError(
            f"knows {len(tokenizer)} tokens, and {part.name} reads {words}",
            where=where,
            hint="tokenizer and text encoder are of two models, or tokens were added without training them",
        )
    try:
        ids = tokenizer(["a"], padding="max_length", max_length=int(tokenizer.model_max_length)).input_ids
        if words is not None and max(ids[0]) >= words:
            raise ValueError(f"token {max(ids[0])} of {words}")
        if part.chat is not None:
            Chat(tokenizer, part.chat).read(["a"])
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot make tokens of a text: {_reason(error)}", where=where) from error


def tokenizers(source: Source, facts: FamilyFacts) -> dict[str, Any]:
    """The tokenizers of a source that is on this machine, by name; none where they cannot be opened."""
    path = source.rest.path if source.rest else source.path
    if source.rest is None and path is not None and path.is_file():
        beside = path.with_suffix("")
        if not (beside / MODEL_INDEX).is_file():
            return {part.tokenizer: single_file.clip_tokenizer(part) for part in facts.encoders}
        path = beside
    if path is None:
        return {}
    found = _Found()
    with _quiet(), found.noting():
        _find_rest(found, _Folder(path, source), facts)
    return {
        part.tokenizer: found.parts[part.tokenizer]
        for part in facts.encoders
        if part.tokenizer in found.parts
    }


def _find_in_file(
    found: _Found,
    path: Path,
    source: Source,
    facts: FamilyFacts,
    fixed: Mapping[str, Any],
    base: Path | None,
    headers: bool,
) -> None:
    """Looks at a single file.

    Configs and tokenizers lie in the folder of its name, or are the usual ones; of a file that has some of
    the networks only, they and the others are those of `Source.base`.
    """
    if not path.is_file():
        raise ModelError("neither a file nor a folder", where=str(path))
    if path.suffix not in (".safetensors", GGUF, *PICKLES):
        raise ModelError(
            "not a weights file", where=str(path), hint="single files end in .safetensors or .gguf"
        )
    if path.suffix in PICKLES and source.allow_pickle and headers:
        return
    entries, problems = weights.scaled(weights.entries([path], allow_pickle=source.allow_pickle), where=path)
    held = single_file.held(entries, facts)
    lacking = [part for part in facts.components if part.role != "scheduler" and part.name not in held]
    if not held or (lacking and (source.base is None or not _is_part(entries, facts))):
        raise _not_of(path, entries, facts)
    if source.base is not None and not lacking:
        raise _idle_base(path)
    rest = _rest(source, base, facts)
    if source.base is not None and rest is None:
        return  # on the hub, and nothing is known of it
    beside = _Folder(path.with_suffix(""), source)
    folder = rest or (beside if (beside.path / MODEL_INDEX).is_file() else None)
    found.problems += problems
    networks: list[tuple[Component, str, nn.Module]] = []
    for part in facts.components:
        if part.name in held:
            file = folder.path / part.name / "config.json" if folder else None
            if rest and file and not file.is_file():
                file = None
            count = sum(name.startswith(held[part.name]) for name in entries)
            with found.noting():
                config = read_json(file) if file else None
                networks.append((part, held[part.name], _built(part, config, str(file or path), count)))
    if found.problems:
        return
    spread, problems = single_file.spread(entries, networks, where=str(path), whole=rest is None)
    found.problems += problems
    for part, _, network in networks:
        found.parts[part.name] = network
        kept, problems = weights.fitted(part.name, network, spread[part.name], where=str(path))
        found.tensors[part.name] = kept
        found.problems += problems
    for problem in found.problems if folder is None else ():
        problem.hint = None
    if found.problems and folder is None:
        found.problems[-1].hint = (
            f"its sizes are taken to be those of {facts.base_title or facts.title}; if they are others, put"
            f" the folders of configs and tokenizers that it was made with into {beside.path}"
        )
    if found.problems and rest is not None:
        found.problems[-1].hint = f"model.base has to be of the same model: {rest.source} has other sizes"
    if rest is not None:
        for part in lacking:
            if part.is_left_out(rest.index):
                found.parts |= {part.name: None, part.tokenizer: None}
                continue
            with found.noting():
                _find_network(found, rest, part, headers)
    row = facts.component("scheduler")
    changes = single_file.schedule(entries, single_file.metadata_of(path))
    if folder is None:
        found.parts["scheduler"] = row.type.from_config({**row.config, **changes})
        for part in facts.encoders:
            found.parts[part.tokenizer] = single_file.clip_tokenizer(part)
        return
    _find_rest(found, folder, facts)
    own = found.parts.get("scheduler")
    if rest is not None:
        found.settings = rest.settings(facts, {*found.parts, *fixed})
        if own is not None and "prediction_type" in own.config and changes:
            found.parts["scheduler"] = type(own).from_config({**own.config, **changes})


def _is_part(names: Collection[str], facts: FamilyFacts) -> bool:
    """Whether a single file with some networks of a family is not a whole model of another one."""
    kind = single_file.what_is(names)
    return facts.title in kind or kind == single_file.UNET


def _not_of(path: Path, names: Collection[str], facts: FamilyFacts) -> ModelError:
    """What a single file is that is not a whole model of the family."""
    networks = [part for part in facts.components if part.role != "scheduler"]
    held = single_file.held(names, facts)
    if held and _is_part(names, facts):
        lacking = [part.name for part in networks if part.name not in held]
        return ModelError(
            f"holds {_listed(list(held))} alone, without {_listed(lacking)}",
            where=str(path),
            hint="model.base says where they come from: a folder or hub id of the whole model, such as"
            f" {facts.default_source}; for generate, --base",
        )
    kind = single_file.what_is(names)
    if not kind and path.suffix == GGUF:
        said = gguf_files.header(path).settings.get(gguf_files.ARCHITECTURE)
        kind = f'a model that says "{said}" of itself'
    if "adapter" in kind:
        hint = "give the base that it was made for as the source, and this as its adapter"
    elif kind == single_file.OWN:
        hint = (
            "such weights are read from a folder of the whole model: put them there as"
            f" {facts.denoiser_name}/diffusion_pytorch_model.safetensors"
        )
    else:
        hint = "" if kind else f"its tensors: {', '.join(list(names)[:2]) or 'none'}, ..."
    text = f"is {kind or 'not a model that is known here'}, and this needs {facts.title}"
    return ModelError(text, where=str(path), hint=hint)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _downloaded(
    source: Source,
    facts: FamilyFacts,
    pipeline_class: Any,
    fixed: Mapping[str, Any],
    *,
    without_denoiser: bool = False,
) -> Path:
    """The folder on this machine of a hub id, fetched where it is not there yet."""
    _check_hub_id(source.name)
    _check_class(source.name, pipeline_class_name(source), facts)
    absent = {name: None for name, value in fixed.items() if value is None}
    with _quiet():
        if without_denoiser:  # its configuration, but not its weights
            from huggingface_hub import hf_hub_download

            absent[facts.denoiser_name] = None
            hf_hub_download(source.name, f"{facts.denoiser_name}/config.json", revision=source.revision)
        return Path(
            pipeline_class.download(
                source.name,
                revision=source.revision,
                variant=source.variant,
                use_safetensors=None if source.allow_pickle else True,
                **absent,
            )
        )


def cast(pipeline: Pipeline, facts: FamilyFacts, dtypes: Dtypes) -> Pipeline:
    """Give each network of a pipeline that is there its type, one after the other."""
    for part in facts.components:
        network = getattr(pipeline, part.name, None)
        if isinstance(network, nn.Module):
            network.to(_dtype_of(dtypes, part.name))
    return pipeline


def _dtype_of(dtypes: Dtypes, name: str) -> torch.dtype:
    return dtypes if isinstance(dtypes, torch.dtype) else dtypes.get(name, torch.float32)


def source_files(source: Source, facts: FamilyFacts) -> dict[str, tuple[Path, ...]]:
    """Component -> the files on this machine that its weights were read from, as far as that is known.

    What a hub id of `Source.base` stands for is known once it is here.
    """
    folder, rest = source.path, source.rest
    if folder is None or (folder.is_file() and rest is None):
        return {}

    def found(place: Path, part: Component) -> tuple[Path, ...]:
        return weight_files(place / part.name, source.variant, allow_pickle=source.allow_pickle)

    if rest is None:
        return {part.name: found(folder, part) for part in facts.components}
    held: Collection[str]
    own: dict[str, tuple[Path, ...]]
    if folder.is_file():
        entries = weights.entries([folder], allow_pickle=source.allow_pickle)
        held = single_file.held(entries, facts)
        own = dict.fromkeys(held, (folder,)) if len(held) == 1 else {}
    else:
        place = _Folder(folder, source)
        held = [part.name for part in facts.components if not place.lacks(part.name)]
        own = {part.name: found(folder, part) for part in facts.components if part.name in held}
    base = here(rest)
    others = [part for part in facts.components if part.name not in held] if base else []
    return own | {part.name: found(base, part) for part in others if base}


def stored_bytes(source: Source, facts: FamilyFacts) -> int | None:
    """Bytes of the files that a model's weights lie in; None where they are not on this machine."""
    if source.name == "tiny":
        return 0
    path = here(source)
    if path is None:
        return None
    if path.is_file() and source.rest is None:
        return path.stat().st_size
    found = source_files(replace(source, name=str(path)), facts)
    return sum(file.stat().st_size for file in {file for files in found.values() for file in files})


def here(source: Source) -> Path | None:
    """The folder or file of a source on this machine; of a hub id, where it has been fetched to."""
    path = source.path
    if path is None and source.name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        index = try_to_load_from_cache(source.name, MODEL_INDEX, revision=source.revision)
        path = Path(index).parent if isinstance(index, str) else None
    return path


def variant_taken(source: Source, facts: FamilyFacts) -> str | None:
    """The variant of a folder's weights that is read though none was named: no plain ones are there."""
    source = source.rest or source
    folder = source.path
    if source.variant or folder is None or not folder.is_dir():
        return None
    there = [variants(folder / part.name) for part in facts.components if part.role != "scheduler"]
    only = {next(iter(names)) for names in there if len(names) == 1} - {""}
    return ", ".join(sorted(only)) or None


def left_out(source: Source, facts: FamilyFacts) -> list[str]:
    """What a single file has that is not read, for people; nothing of a damaged one."""
    path = source.path
    if path is None or not path.is_file() or path.suffix in PICKLES:
        return []
    try:
        names = weights.entries([path])
    except ModelError:
        return []
    averages = [name for name in names if single_file.AVERAGE.match(name)]
    lines = []
    if averages:
        lines.append(f"{len(averages)} tensors are a second average of the weights (EMA), and are not read")
    if source.base is not None:
        held = single_file.held(names, facts)
        others = [name for name in names if single_file.OTHERS.match(name)]
        unread = {name.partition(".")[0] for name in others if not name.startswith(tuple(held.values()))}
        if unread and "" not in held.values():
            lines.append(f"{', '.join(sorted(unread))}: not read, as model.base has them in their place")
    return lines


def save_pipeline(pipeline: Pipeline, folder: Path, facts: FamilyFacts) -> None:
    """Write the pipeline in diffusers' layout without the path it was loaded from."""
    with output_errors(folder), _quiet():
        folder.mkdir(parents=True, exist_ok=True)
        for name, component in components(pipeline).items():
            if name == facts.denoiser_name and layers.describe(component) is not None:
                layers.save_denoiser(component, folder / name)
            elif name.startswith("tokenizer"):
                save_tokenizer(component, folder / name)
            else:
                component.save_pretrained(folder / name)
        for encoder in facts.encoders:
            portable_encoder(folder / encoder.name)
        pipeline.save_config(folder)
        for file in [folder / MODEL_INDEX, *folder.glob("*/*config.json")]:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("_name_or_path", None) is not None:
                file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer that transformers 4 and 5 and other programs read.

    transformers 5 writes only tokenizer.json; `CLIPTokenizer` of transformers 4 needs vocab.json and
    merges.txt.
    """
    with output_errors(folder):
        tokenizer.save_pretrained(folder)
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        model = content.get("model", {})
        if model.get("type") != "BPE" or (folder / "merges.txt").is_file():
            return
        vocabulary = {
            **model["vocab"],
            **{token["content"]: token["id"] for token in content["added_tokens"]},
        }
        ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
        (folder / "vocab.json").write_text(json.dumps(ordered, ensure_ascii=False), encoding="utf-8")
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def portable_encoder(folder: Path) -> None:
    """Give a saved CLIP text encoder the weight names that all programs read.

    transformers 5 writes `encoder.layers...` for what every other program calls
    `text_model.encoder.layers...`. It reads both; transformers 4 reads the latter only, and silently takes
    random weights for the former.
    """
    file = folder / "model.safetensors"
    if file.is_file() and _lacks_level(file):
        tensors = safetensors.torch.load_file(file)
        renamed = {TEXT_LEVEL + key: tensor for key, tensor in tensors.items()}
        safetensors.torch.save_file(renamed, file, metadata={"format": "pt"})


def _lacks_level(file: Path) -> bool:
    with safe_open(file, framework="pt") as opened:
        return any(key.startswith("embeddings.token_embedding.") for key in opened.keys())  # noqa: SIM118


def components(pipeline: Pipeline) -> dict[str, Any]:
    """Return the pipeline's parts that have files of their own, by name."""
    return {k: v for k, v in pipeline.components.items() if hasattr(v, "save_pretrained")}


def check_finite(pipeline: Pipeline, source: str, only: Collection[str] | None = None) -> None:
    """Raise ModelError naming the first tensor, of all networks or of some, that holds NaN or infinity."""
    for name, component in components(pipeline).items():
        if isinstance(component, nn.Module) and (only is None or name in only):
            for key, tensor in component.state_dict().items():
                if tensor.is_floating_point() and not _finite(tensor):
                    raise ModelError(
                        f"{name}: tensor {key} holds NaN or infinity",
                        where=source,
                        hint="the file is damaged, or its training diverged: use another version of it",
                    )


def _finite(tensor: Tensor) -> bool:
    if tensor.dtype == layers.FP8:  # torch does not ask these; they have no infinity, and NaN of either sign
        return not bool((tensor.view(torch.uint8) & 127).eq(127).any())
    return bool(torch.isfinite(tensor).all())


def pipeline_class_name(source: Source) -> str:
    """Read `_class_name` from the model_index.json of a folder, "builtin/..." or hub id.

    Raises:
        ModelError: there is none.
    """
    name = _index(source).get("_class_name")
    if not isinstance(name, str):
        raise ModelError(f"{MODEL_INDEX} names no pipeline class (_class_name)", where=source.name)
    return name


def component_configs(source: Source, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Read the config.json of some components of a folder or a hub id, as far as they can be read."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        with suppress(Exception):  # diffusers and the hub raise many kinds; an absent file is no error here
            if source.path is not None:
                text = (source.path / name / "config.json").read_text(encoding="utf-8")
            else:
                from huggingface_hub import hf_hub_download

                file = hf_hub_download(source.name, f"{name}/config.json", revision=source.revision)
                text = Path(file).read_text(encoding="utf-8")
            found[name] = dict(json.loads(text))
    return found


def _index(source: Source) -> dict[str, Any]:
    path = source.path
    if path is not None and path.is_dir():
        index = path / MODEL_INDEX
        if not index.is_file():
            raise ModelError(
                f"not a pipeline folder: it has no {MODEL_INDEX}",
                where=source.name,
                hint="give the folder that a diffusers pipeline was saved to",
            )
        return read_json(index)
    _check_hub_id(source.name)
    from diffusers import DiffusionPipeline

    try:
        content = DiffusionPipeline.load_config(source.name, revision=source.revision)
    except Exception as error:
        raise ModelError(
            f"its {MODEL_INDEX} cannot be read from the Hugging Face hub: {_reason(error)}",
            where=source.name,
            hint=_hint(source),
        ) from error
    return dict(content) if isinstance(content, dict) else {}


def _check_class(source: str, name: str, facts: FamilyFacts) -> None:
    if name not in facts.pipeline_classes:
        raise ModelError(
            f"holds a {name}, which is not {facts.title}",
            where=source,
            hint=f"this family loads {', '.join(facts.pipeline_classes)}; name the family of the source",
        )


def _check_hub_id(source: str) -> None:
    if source.endswith(FILES) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise ModelError(
            "no such file or folder",
            where=source,
            hint='a source is a folder, a .safetensors file, a hub id "owner/name", "builtin/..." or "tiny"',
        )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _hint(source: Source) -> str | None:
    if source.path is not None:
        return None
    return f'no folder "{source.name}" is here either; without a network, give a folder or "builtin/emoji-64"'


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers: one per component says nothing to the user."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
