"""What a pass is, and how a chain of them runs.

A pass turns one artifact into another. It is a frozen class in a file of its own: `kind` is the file's name,
its fields are its YAML keys, `run` fills `context.folder` and returns what it measured::

    class Shrink(Pass):
        '''Makes the model smaller.'''

        kind = "shrink"
        accepts = frozenset({"torch"})

        ratio: float = 0.25
        '''Share that leaves.'''

        def run(self, artifact: Artifact, context: Context) -> Outcome: ...

    PASS = Shrink

A chain is a list of passes. Each step lives in `NN-kind-hash8/`, written aside and renamed when whole. The
hash covers all that the pass reads and nothing else, so a step that is there is found, whatever its number,
and skipped: a killed chain goes on, and a `verify` put between two steps makes neither of them again. A chain
in which an earlier step says otherwise how the model is drawn has a folder of its own, with the same files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator

import tunekit
from tunekit.artifacts import (
    CARD,
    RECORD,
    RUN_SO,
    SAMPLED,
    Artifact,
    RunFolder,
    Step,
    atomic_folder,
    clean_leftovers,
    remove_folder,
)
from tunekit.config import RuntimeConfig, SamplingConfig, Section, validate
from tunekit.errors import ChainError, TunekitError, VerificationFailed, did_you_mean
from tunekit.files import link_file
from tunekit.passes.metrics import Metric, Value, describe_metrics, format_metric
from tunekit.passes.models import Models, in_types
from tunekit.passes.start import Start
from tunekit.progress import console
from tunekit.units import format_seconds

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tunekit.config import AdapterConfig, DataConfig, DreamboothData
    from tunekit.data.calibration import CalibrationSet, Call, Material
    from tunekit.families.family import Dtypes, Pipeline
    from tunekit.runtime import Runtime

Where = Callable[[int, str | None], str]

__all__ = [
    "Context",
    "Metric",
    "Outcome",
    "Pass",
    "Start",
    "check_chain",
    "describe_metrics",
    "distinct_models",
    "format_metric",
    "inherited",
    "parse_chain",
    "run_chain",
]

SAMPLING = frozenset(
    {"steps", "guidance", "guidance_interval", "negative_prompt", "height", "width", "scheduler", "cache"}
)
"""Of what a pass can read: how pictures are drawn."""
EVERYTHING = frozenset({"seed", "prompts", "data", "models", *SAMPLING})
"""What a pass can read: these, "parent" and "first". "models" are all of the chain so far."""
T = TypeVar("T")


def _distinct(items: list[T] | None) -> list[T] | None:
    """Refuses a list that names something twice."""
    twice = [item for item in items or () if (items or []).count(item) > 1]
    if twice:
        raise ValueError(f"names {twice[0]} twice")
    return items


Ladder = Sequence[Sequence[Any]]
"""Chains as in YAML, from the mildest to the boldest."""
DISTINCT = AfterValidator(_distinct)
Distinct = Annotated[list[T], DISTINCT]
"""A list of settings in which nothing stands twice."""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Pass(Section):
    """One step of a chain. The docstring's first line is what `tunekit ls` and the report show."""

    kind: ClassVar[str]
    """Name in YAML; equals the file's stem."""
    accepts: ClassVar[frozenset[str]]
    """Artifact formats it can take, of `records.FORMATS`."""
    produces: ClassVar[str | None] = None
    """Format of the result; None means the format it was given."""
    looks: ClassVar[bool] = False
    """True for a pass that changes nothing: its artifact is the model it was given, and the report shows its
    figures in that model's row."""
    redraws: ClassVar[bool] = False
    """True for a pass that changes how a model is drawn with and nothing else: its artifact is another model,
    in the very files of the one it was given."""
    learns: ClassVar[bool] = False
    """True for a pass that trains, and takes long."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Trait of the model -> why this pass cannot take it; "{giver}" is the pass that gave it."""
    metrics: ClassVar[tuple[Metric, ...]] = ()
    """The figures that it gives."""

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Reads `artifact`, writes the result's files into `context.folder`, returns the figures."""
        raise TypeError(f"{type(self).__name__} does not define run()")

    def gives(self) -> frozenset[str]:
        """Traits that the model has from here on.

        "changed": it computes something else than before, which heal can mend. "packed": its weights are in
        few bits. "fp32", "fp16": what its graphs compute in. Passes of a package may have traits of their
        own.
        """
        return frozenset() if self.looks or self.redraws else frozenset({"changed"})

    def reads(self, context: Context) -> frozenset[str]:
        """What the result depends on, beside the settings and the model that comes in.

        Of `EVERYTHING`, and "parent" and "first" as `Context.reference` has them. What is not named here may
        change, and the step is still found.
        """
        return EVERYTHING

    def formerly(self, format: str) -> dict[str, Any] | None:
        """The settings as the names of folders held them before `reads`; None if they meant something else.

        Args:
            format: of the artifact that comes in.
        """
        return self.model_dump(mode="json")

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """What is wrong with these settings at this place of a chain, or None. Called before anything runs.

        Args:
            format: format of the artifact that will arrive.
            earlier: the passes before this one.
        """
        return None

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """What is wrong with these settings for the model of this chain, or None; called after `problem`.

        Args:
            start: what the chain is given.
            earlier: the passes before this one.
        """
        return None

    def result(self, format: str) -> str:
        """The format of what it makes.

        Args:
            format: of the artifact that comes in.
        """
        return self.produces or format

    @classmethod
    def options(cls, target: str, minutes: float) -> Sequence[Ladder]:
        """What a search may put in this pass's place.

        What the model at hand cannot have (`objection`) is left out there.

        Args:
            target: what the model shall run on, a key of `passes.space.TARGETS`.
            minutes: that the whole search has; a choice that trains takes a part of them at most.
        """
        return ()

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class Context:
    """What a pass may know besides its own fields and the artifact.

    Whoever runs a chain fills the attributes up to `say`; `run_chain` adds the others for each step.

    Attributes:
        run_dir: the run's folder.
        device: torch device that was asked for, e.g. "auto", "cpu", "cuda:0".
        seed: of all that is drawn.
        prompts: what the run cares about, for pictures and calibration; may be empty.
        sampling: how pictures are drawn with models that do not say it themselves.
        data: the pictures the model was trained on, where the run knows them.
        say: shows one line of progress.
        folder: where to write; it is renamed to the step's folder when the pass returns.
        shared_cache: where encoded and drawn pictures are kept; None means beside the run.
        state: where a pass that takes long keeps what it goes on from when it was killed; the folder need not
            be there, and goes when the pass returns.
        family: name of the model family.
        history: the chain's input and the artifact after each earlier step; the last one is the pass's input.
        models: those that were read from disk, and what was recorded with them.
    """

    run_dir: Path
    device: str = "auto"
    seed: int = 0
    prompts: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig | DreamboothData | None = None
    say: Callable[[str], None] = print
    shared_cache: Path | None = None
    folder: Path = Path()
    state: Path = Path()
    family: str = ""
    history: tuple[Artifact, ...] = ()
    models: Models = field(default_factory=Models, compare=False)

    def reference(self, against: str) -> Artifact | None:
        """The model to compare with, or None if the chain has none yet.

        Args:
            against: "parent": the model before the last step that changed it; "first": the chain's first
                whole torch model, i.e. the merged fine-tuned one.
        """
        models = distinct_models(self.history)
        if against == "parent":
            return models[-2] if len(models) > 1 and models[-2].format != "adapter" else None
        whole = [model for model in models if model.format == "torch"]
        return whole[0] if whole and whole[0] is not models[-1] else None

    def later(self, step: Pass) -> list[Artifact]:
        """What steps after this one can want: its input, what that is compared with, the first model."""
        parent = self.reference("parent") if step.looks else None
        return [model for model in (parent, self.reference("first"), self.history[-1]) if model is not None]

    def sampling_of(self, model: Artifact) -> SamplingConfig:
        """How a model is drawn with: as it says itself, else as the run says, else as is usual in its family.

        What is left open is the height and the width, for which the model has its own (`Runtime.sampling`),
        and the scheduler.
        """
        from tunekit import families

        usual = families.get(self.family).facts.sampling.over(SamplingConfig(negative_prompt=""))
        return inherited(model, self.sampling).over(usual)

    def open(self, model: Artifact) -> Pipeline:
        """A whole torch model in float32, read from disk once in a chain.

        It is shared: change a copy of its denoiser, and put that into a pipeline `around` it.
        """
        from tunekit import families

        return self.models.load(families.get(self.family), model.model_source)

    def open_networks(self, model: Artifact, *only: str, dtypes: Dtypes | None = None) -> Pipeline:
        """The same where some networks are needed: of a large model the others have no weights.

        What is not used any more has to be let go before the next one is opened.

        Args:
            only: their names; none gives configurations, tokenizers and scheduler alone.
            dtypes: of weights; None is float32.
        """
        from tunekit import families

        return self.models.networks(families.get(self.family), model.model_source, only, dtypes)

    @contextmanager
    def running(
        self,
        model: Artifact,
        *,
        provider: str | None = None,
        threads: int | None = None,
        tiled: bool = False,
    ) -> Iterator[Runtime]:
        """A model that is ready to run; a torch one is that of `open`.

        Raises:
            DeviceError, MissingPackageError, ModelError: see `open_runtime`.
        """
        from tunekit.runtime import open_runtime

        runtime = open_runtime(
            model,
            family=self.family,
            device=self.device,
            provider=provider,
            threads=threads,
            load=self.models.load if model.format == "torch" else None,
        )
        runtime.tiled = tiled
        try:
            yield runtime
        finally:
            runtime.close()
            if model.format == "torch":
                self.models.done(model)

    @contextmanager
    def examples(
        self,
        model: Artifact,
        *,
        count: int,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        adapter: AdapterConfig | None = None,
    ) -> Iterator[tuple[CalibrationSet, Accelerator]]:
        """Gives the run's pictures, or pictures that a torch model draws itself, and where to compute.

        Args:
            model: its encoders are used, too.
            count: pictures to draw where the run has none.
            precision: of computations.
            adapter: what is trained on them; None is all weights, or nothing.

        Raises:
            ConfigError: the run knows neither pictures nor prompts.
            DeviceError: the device does not answer.
        """
        import torch

        from tunekit import families
        from tunekit.config import MemoryConfig
        from tunekit.data.calibration import gather
        from tunekit.training.run import close_accelerator, open_accelerator

        # After a training over several processes only the main one is left, and must not wait for the others.
        launched = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
        memory = MemoryConfig(device=self.device, precision=precision)
        accelerator = open_accelerator(memory, batch_size=1, adapter=adapter)
        try:
            family = families.get(self.family)
            # Encoders encode in the types that the family's table gives them.
            pipeline = in_types(self.open(model), family.facts, family.facts.dtypes(torch.float32))
            height, width = family.default_size(pipeline)
            sampling = self.sampling_of(model).over(SamplingConfig(height=height, width=width))
            material = self._material(model, sampling, count)
            found = self.models.recorded(
                model,
                ("examples", None if self.data else count, sampling.model_dump_json()),
                lambda: gather(family, pipeline, accelerator, material, self.say),
            )
            yield found, accelerator
        finally:
            close_accelerator(accelerator)
            os.environ.update(launched)

    def calls(
        self, runtime: Runtime, *, count: int, steps: int | None = None, others: bool = False
    ) -> list[Call]:
        """What a model's denoiser is called with while it draws the run's prompts; recorded once in a chain.

        Args:
            count: calls, spread evenly over all that are made.
            steps: most sampling steps; None means as many as the model takes.
            others: of other prompts, as far as the run has more, and of other noise.
        """
        from tunekit.data.calibration import calls

        model = runtime.artifact
        assert model is not None
        sampling = self.sampling_of(model).over(runtime.sampling)
        if steps is not None:
            sampling = sampling.model_copy(update={"steps": min(steps, sampling.steps or steps)})
        material = dataclasses.replace(self._material(model, sampling, count), others=others)
        what = ("calls", count, others, sampling.model_dump_json())
        return self.models.recorded(model, what, lambda: calls(runtime, material))

    def _material(self, model: Artifact, sampling: SamplingConfig, count: int) -> Material:
        from tunekit.data.calibration import Material

        return Material(
            data=self.data,
            prompts=self.prompts,
            count=count,
            sampling=sampling,
            cache=self.cache,
            model_hash=model.hash,
            seed=self.seed,
        )

    @property
    def cache(self) -> Path:
        """Where encoded and drawn pictures are kept: that of training, shared by all runs."""
        named = self.data.cache if self.data else None
        return Path(named).expanduser() if named else self.shared_cache or self.run_dir.parent / ".cache"

    def aside(self, name: str) -> Context:
        """For chains beside this one, in a folder of the run; what is cached is shared."""
        return dataclasses.replace(
            self, run_dir=self.run_dir / name, shared_cache=self.cache, folder=Path(), models=Models()
        )

    @property
    def pictures(self) -> Any:
        """What the run's pictures are, JSON-able: how they are cut, and each one's content and caption."""
        if self.data is None:
            return None
        from tunekit.data.images import scan_data
        from tunekit.data.samples import Indexed

        data = self.data
        settings = data.model_dump(mode="json", exclude={"path", "cache", "streaming", "tolerate"})
        seen = self.models.once("pictures", lambda: scan_data(data).samples)
        if isinstance(seen, Indexed):
            return [settings, seen.digest]
        return [settings, [[sample.content, sample.caption] for sample in seen]]

    def save(self, pipeline: Pipeline, like: Artifact) -> None:
        """Writes a torch pipeline into `folder`, in the floating type that `like` is stored in.

        Raises:
            ModelError: a weight is NaN or infinite, in that type.
        """
        import torch

        from tunekit import families
        from tunekit.families.loading import check_finite
        from tunekit.layers import stored_dtype

        family = families.get(self.family)
        facts, path = family.facts, like.model_path
        dtype = stored_dtype(path / facts.denoiser_name) if path else torch.float32
        pipeline.to("cpu")
        made = in_types(pipeline, facts, facts.drawing_dtypes(dtype))
        check_finite(made, str(like.source))
        family.save(made, self.folder)


def learned_from(context: Context) -> frozenset[str]:
    """What passes read that learn from examples: the run's pictures, or else those that the model draws."""
    if context.data:
        return frozenset({"seed", "data"})
    return frozenset({"seed", "prompts", *SAMPLING} - {"steps", "negative_prompt"})


NO_EXAMPLES = (
    "learns from pictures, and the run knows neither pictures nor prompts to draw some; give it"
    " `data: {path: ...}`, or `preview: {prompts: [...]}`"
)


def untrainable(optimizer: str, batch_size: int, micro_batch: int | None) -> str | None:
    """What is wrong with settings of passes that train, or None."""
    from tunekit import optimizers
    from tunekit.errors import ConfigError

    if micro_batch is not None and micro_batch > batch_size:
        return f"has a micro_batch larger than its batch_size ({batch_size})"
    try:
        optimizers.find(optimizer)
    except ConfigError as error:
        return error.message
    if absent := optimizers.absent(optimizer):
        return f"cannot run: {absent.message}"
    return None


@dataclass
class Outcome:
    """What a pass found out."""

    metrics: dict[str, Value] = field(default_factory=dict)
    """Figures with the unit in the name: `size_bytes`, `denoiser_ms_p50`, `psnr_db`, `relative_error`."""
    details: dict[str, Any] = field(default_factory=dict)
    """Tables for the report; must be JSON-able."""
    pictures: list[dict[str, Any]] = field(default_factory=list)
    """`{"file", "label", "prompt", "seed"}` each; `file`, under `pictures/`, relative to `context.folder`.
    The report compares all with those of the first label that have the same prompt and seed."""
    format: str | None = None
    """Format of the result where it is not the one the class states."""
    sampling: SamplingConfig | None = None
    """How the result is drawn with, where that is otherwise than its parent: one that learned few steps. The
    step's details keep it, and `tunekit generate` says where other steps are asked for."""
    runtime: RuntimeConfig | None = None
    """How the result is run, where that was measured; of a step that changes no file."""
    failure: str | None = None
    """Set when a threshold was missed: the step is kept with its figures, then the chain stops."""


def distinct_models(history: Iterable[Artifact]) -> list[Artifact]:
    """`history` without the artifacts of passes that only look at a model."""
    models: list[Artifact] = []
    for artifact in history:
        details = artifact.step.details if artifact.step is not None else {}
        redrawn = details.get(SAMPLED) or details.get(RUN_SO)
        if not models or artifact.source != models[-1].source or redrawn:
            models.append(artifact)
    return models


def inherited(parent: Artifact, sampling: SamplingConfig) -> SamplingConfig:
    """How a model is drawn with: what it says itself, over what the run says."""
    return (parent.sampling or SamplingConfig()).over(sampling)


def parse_chain(items: Sequence[Any], where: Where = lambda index, key: "optimize") -> list[Pass]:
    """Reads a chain as it stands in YAML: `[merge, {prune: {ratio: 0.3}}, ...]`.

    Args:
        items: pass names, or mappings of one pass name to its settings.
        where: gives "file:line" of an item, or of a key of its settings.

    Raises:
        ChainError: listing every unknown pass, unknown key and wrong value.
    """
    from tunekit.registry import PASSES

    chain: list[Pass] = []
    listed: list[str] = []
    problems: list[TunekitError] = []

    def refuse(index: int, kind: str, message: str) -> None:
        place, key = where(index, None), f"optimize[{index}]"
        listed.append(f"{place}: {key}{f' ({kind})' if kind else ''}: {message}")
        problems.append(ChainError(message.rstrip("; "), where=place, key=key))

    for index, item in enumerate(items):
        if isinstance(item, str):
            item = {item: {}}
        if not isinstance(item, dict) or len(item) != 1:
            message = f"expected a pass and its settings, such as `prune: {{ratio: 0.3}}`, got {item!r}"
            refuse(index, "", message)
            continue
        ((kind, settings),) = item.items()
        if kind not in PASSES.names():
            refuse(index, "", f"there is no pass {kind!r}; {did_you_mean(str(kind), PASSES.names())}")
            continue
        if settings is not None and not isinstance(settings, dict):
            refuse(index, str(kind), f"settings must be a mapping, got {settings!r}")
            continue
        try:
            chain.append(_validate(PASSES.get(kind), settings or {}, index, where))
        except ChainError as error:
            listed.append(error.message)
            problems += error.parts
    if problems:
        raise ChainError("\n".join(listed), parts=problems)
    return chain


def formats(start: str, passes: Iterable[Pass]) -> list[str]:
    """The formats of the models of a chain: what it starts from, then one for each pass that changes it."""
    found = [start]
    for step in passes:
        if not step.looks:
            found.append(step.result(found[-1]))
    return found


def check_chain(
    passes: Sequence[Pass], start: Start | str, where: Where = lambda index, key: "optimize"
) -> str:
    """Checks order and settings before anything runs; returns the format the chain ends with.

    Args:
        start: what the chain is given, or its format alone.

    Raises:
        ChainError: naming the first step that cannot take what comes to it, or cannot end well.
    """
    start = Start(start) if isinstance(start, str) else start
    current = start.format
    for index, step in enumerate(passes):
        if current not in step.accepts:
            giver = "the step before it gives" if index else "the chain starts with"
            needs = " or ".join(_WORDS[accepted] for accepted in sorted(step.accepts))
            raise ChainError(
                f"optimize[{index}] ({step.kind}) needs {needs} but {giver} {current}",
                where=where(index, None),
                hint=_order_hint(step, current),
                key=f"optimize[{index}]",
            )
        earlier = passes[:index]
        trouble = (
            _refusal(step, start, earlier) or step.problem(current, earlier) or step.objection(start, earlier)
        )
        if trouble:
            message = f"optimize[{index}] ({step.kind}) {trouble}"
            raise ChainError(message, where=where(index, None), key=f"optimize[{index}]")
        current = step.result(current)
    return current


def _refusal(step: Pass, start: Start, earlier: Sequence[Pass]) -> str | None:
    """Why a pass cannot take what the passes of this chain, or of an earlier one, give: its first trait."""
    givers = {**start.traits, **{trait: other.kind for other in earlier for trait in other.gives()}}
    for trait, why in step.refuses.items():
        if trait in givers:
            return why.format(giver=givers[trait])
    return None


def run_chain(
    passes: Sequence[Pass],
    artifact: Artifact,
    context: Context,
    after_step: Callable[[Artifact], object] | None = None,
) -> Artifact:
    """Runs the chain in `context.run_dir` and returns the last artifact. Steps that are there are skipped.

    Args:
        artifact: what the chain starts from.
        context: what all steps share.
        after_step: called with the artifact after each step, a failing one too (the report is written here).

    Raises:
        ChainError: the order is wrong; nothing has run.
        VerificationFailed: a step missed its thresholds; its folder and figures are there.
    """
    known = bool(context.data or context.prompts)
    check_chain(passes, Start.of(artifact, examples=known))
    run = RunFolder(context.run_dir)
    run.path.mkdir(parents=True, exist_ok=True)
    clean_leftovers(run.path)
    history = [artifact]
    for index, step in enumerate(passes, start=1):
        label, is_last = f"{index:02d} {step.kind}", index == len(passes)
        now = dataclasses.replace(
            context,
            family=artifact.family,
            history=tuple(history),
            say=lambda line, label=label: context.say(f"{label}: {line}"),  # type: ignore[misc]
        )
        there = _made(run, step, now)
        if there is not None:
            result = there
            context.say(f"{label}: already there ({result.path.name if result.path else ''})")
        else:
            folder = run.pass_folder(index, step.kind, _key(step, now))
            context.say(f"{label} ...")
            now.models.begin(() if is_last else now.later(step))
            try:
                with console().phase(label):
                    result = _run_step(step, now, folder)
            finally:
                now.models.end()
            made = result.lineage[-1]
            context.say(f"{label}: {format_seconds(made.seconds)}, {describe_metrics(made.metrics)}")
        history.append(result)
        run.write_chain(list(dict.fromkeys(item.path.name for item in history[1:] if item.path)))
        if after_step:
            after_step(result)
        failure = result.lineage[-1].details.get("failure")
        if failure:
            raise VerificationFailed(
                f"optimize[{index - 1}] ({step.kind}): {failure}",
                where=str(result.path),
                hint="its folder and the report hold the figures; loosen it or change an earlier step",
            )
    return history[-1]


def _run_step(step: Pass, context: Context, final: Path) -> Artifact:
    parent = context.history[-1]
    started = time.perf_counter()
    state = final.with_name(f".{step.kind}-{final.name.rpartition('-')[2]}.state")
    with atomic_folder(final) as folder:
        outcome = step.run(parent, dataclasses.replace(context, folder=folder, state=state))
        seconds = time.perf_counter() - started
        lost: list[str] = []
        details = _finite(dict(outcome.details), "", [])
        figures = _finite(dict(outcome.metrics), "", lost)
        if outcome.sampling is not None:
            details[SAMPLED] = outcome.sampling.model_dump(mode="json", exclude_none=True)
        if outcome.runtime is not None:
            details[RUN_SO] = outcome.runtime.model_dump(mode="json", exclude_none=True)
        kept = step.looks or step.redraws  # the files are those of the model that came in
        failure = outcome.failure
        if lost and "not finite" not in (failure or ""):
            failure = "; ".join(filter(None, [f"{', '.join(lost)}: not finite", failure]))
        if failure:
            details["failure"] = failure
        result = Artifact(
            path=folder,
            model_path=parent.model_path if kept else folder,
            source=parent.source if kept else str(folder),
            format=outcome.format or step.result(parent.format),
            family=parent.family,
            base=parent.base if kept else None,
            opened=parent.opened if kept else None,  # what was written here is plain
            sampling=(outcome.sampling or SamplingConfig()).over(inherited(parent, context.sampling)),
            runtime=outcome.runtime or (parent.runtime if kept else None),  # of other graphs it says nothing
            recorded_hash=parent.hash if kept else None,
        )
        metrics: dict[str, Value] = figures
        if not step.looks:
            metrics.setdefault("size_bytes", result.size_bytes)
        record = Step(
            kind=step.kind,
            artifact=final.name,
            settings=step.model_dump(mode="json"),
            seconds=round(seconds, 3),
            metrics=metrics,
            parent_hash=parent.hash,
            details=details,
            pictures=outcome.pictures,
        )
        written = dataclasses.replace(result, lineage=(*parent.lineage, record)).write()
        if written.family:
            from tunekit import card, families

            card.write(written, families.get(written.family).facts)
    if state.exists():
        remove_folder(state)
    return Artifact.load(final)


def _finite(value: Any, name: str, lost: list[str]) -> Any:
    """`value` with None for numbers that are not finite, which no JSON has; their names go into `lost`."""
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(name)
        return None
    if isinstance(value, Mapping):
        return {key: _finite(part, str(key), lost) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part, name, lost) for part in value]
    return value


# Names of steps --------------------------------------------------------------------------------------------


def _made(run: RunFolder, step: Pass, context: Context) -> Artifact | None:
    """This step as it is there, whatever its number; None if it is not."""
    key, said = _key(step, context), _said(context.history[-1])
    apart = _hashed([key, said])
    found = [
        Artifact.load(record.parent)
        for name in (apart, key, _former_key(step, context))
        for record in sorted(run.path.glob(f"*-{step.kind}-{name}/{RECORD}") if name else ())
        if re.fullmatch(r"\d+", record.parent.name.partition("-")[0])
    ]
    for one in found:
        if _said(one, before=True) == said:
            return _up_to_date(one, step, context)
    return _beside(found[0], apart, step, context) if found else None


def _said(model: Artifact, *, before: bool = False) -> dict[str, Any]:
    """What the steps of a model, or those before its last, say about how it is drawn."""
    said: dict[str, Any] = {}
    for step in model.lineage[:-1] if before else model.lineage:
        said |= step.details.get(SAMPLED) or {}
    return said


def _beside(found: Artifact, name: str, step: Pass, context: Context) -> Artifact:
    """The files of a step once more, as links, for a chain that draws otherwise."""
    from tunekit import card, families

    assert found.path is not None
    number, kind, _ = found.path.name.split("-")
    final = found.path.with_name(f"{number}-{kind}-{name}")
    with atomic_folder(final) as folder:
        for path in sorted(path for path in found.path.rglob("*") if path.is_file()):
            if path.parent != found.path or path.name not in (RECORD, CARD):
                link_file(path, folder / path.relative_to(found.path))
        own = found.model_path == found.path
        linked = dataclasses.replace(
            found,
            path=folder,
            model_path=folder if own else found.model_path,
            source=str(folder) if own else found.source,
            lineage=(*found.lineage[:-1], dataclasses.replace(found.lineage[-1], artifact=final.name)),
        )
        written = _up_to_date(linked, step, context)
        if written.family:
            card.write(written, families.get(written.family).facts)
    return Artifact.load(final)


def _up_to_date(found: Artifact, step: Pass, context: Context) -> Artifact:
    """A step that is there: how the run draws its model, and what was done before, may be otherwise now."""
    parent, own = context.history[-1], found.lineage[-1]
    changes: dict[str, Any] = {}
    if _made_by(parent.lineage) != _made_by(found.lineage[:-1]):
        changes["lineage"] = (*parent.lineage, own)
    if not step.reads(context) >= SAMPLING:
        said = SamplingConfig.model_validate(own.details.get(SAMPLED) or {})
        sampling = said.over(inherited(parent, context.sampling))
        if found.sampling != sampling:
            changes["sampling"] = sampling
    return dataclasses.replace(found, **changes).write() if changes else found


def _made_by(lineage: Sequence[Step]) -> list[tuple[str, str]]:
    return [(step.kind, step.artifact) for step in lineage]


def _key(step: Pass, context: Context) -> str:
    """Of all that a result depends on: a changed prompt must not find yesterday's pictures."""
    reads, models = step.reads(context), distinct_models(context.history)
    read: dict[str, Artifact | None] = {}
    for name in ("parent", "first"):
        if name in reads:
            read[name] = context.reference(name)
    if "models" in reads:
        read |= {str(index): model for index, model in enumerate(models[:-1])}
    seen = {"own": models[-1], **{name: model for name, model in read.items() if model}}
    drawn = sorted(reads & SAMPLING)
    shared: dict[str, Any] = {
        "models": {name: model.hash for name, model in seen.items()},
        "sampling": {
            name: {
                key: value if key != "cache" else value.model_dump()
                for key in drawn
                # what not every version knew is named where it is set
                if (value := getattr(sampling, key)) is not None or key not in ("guidance_interval", "cache")
            }
            for name, model in seen.items()
            if drawn and (sampling := context.sampling_of(model))
        },
    }
    if drawn and any(model.runtime for model in seen.values()):
        shared["runtime"] = {name: str(model.runtime) for name, model in seen.items()}
    if "seed" in reads:
        shared["seed"] = context.seed
    if "prompts" in reads:
        shared["prompts"] = list(context.prompts)
    if "data" in reads:
        shared["data"] = context.pictures
    return _hashed([step.kind, step.model_dump(mode="json"), shared, tunekit.__version__])


def _former_key(step: Pass, context: Context) -> str | None:
    """As steps were named that were made when each held all of the run's settings."""
    models = distinct_models(context.history)
    settings = step.formerly(context.history[-1].format)
    if settings is None:
        return None
    drawn = [context.sampling_of(model) for model in models]
    own = drawn[-1]
    shared: list[Any] = [
        context.seed,
        list(context.prompts),
        own.negative_prompt,
        own.steps,
        own.guidance,
        own.height,
        own.width,
        context.data.model_dump(mode="json") if context.data else None,
    ]
    if own.scheduler or any(other != own for other in drawn):
        shared.append([sampling.model_dump(mode="json", exclude={"cache"}) for sampling in drawn])
    hashes = [model.hash for model in models]
    return _hashed([step.kind, settings, hashes, shared, tunekit.__version__])


def _hashed(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]


def _validate(cls: type[Pass], settings: dict[str, Any], index: int, where: Where) -> Pass:
    label, own = f": optimize[{index}] ({cls.kind})", f"optimize[{index}].{cls.kind}"

    def place(key: tuple[str | int, ...]) -> str:
        return where(index, str(key[0]) if key else None) + label

    try:
        return validate(cls, settings, place, error=ChainError)
    except ChainError as error:
        for part in error.parts:  # their place and key in the config, not in the pass
            part.where = (part.where or "").removesuffix(label)
            part.key = f"{own}.{part.key}" if part.key else own
        raise


_WORDS = {
    "adapter": "an adapter",
    "torch": "a torch model",
    "onnx": "an onnx model",
    "openvino": "an openvino model",
    "tensorrt": "a tensorrt model",
}


def _order_hint(step: Pass, given: str) -> str | None:
    from tunekit.registry import PASSES

    if given == "adapter":
        return "put `merge: {}` before it"
    if step.accepts == {"adapter"}:
        return f"this model is whole, there is nothing to {step.kind}: leave the step out"
    if (own := f"{step.kind}_{given}") in PASSES.names():
        return f"for a model in {given} that is {own}"
    for wanted in ("onnx", "openvino"):
        if given in ("torch", "onnx") and wanted in step.accepts:
            return f"put `export_{wanted}: {{}}` before it"
    if "torch" in step.accepts:
        return "move it before the export"
    return None
