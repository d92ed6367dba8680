"""A training run: its folder and lock, its processes, its plan, and what comes before and after the loop.

with open_run(config, loaded) as run:     # chain and pictures checked, memory decided, folder held
if run.begin():                       # there is something left to train
fine_tune(config, run)
run.optimize()                        # the passes, and the report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tunekit import __version__, families, hardware, planning, preconditions, ranks
from tunekit.adapters import Delta, adapter_file, read_adapter, start_from
from tunekit.artifacts import (
    RECORD,
    Artifact,
    RunFolder,
    Step,
    clean_leftovers,
    write_json,
    write_text,
)
from tunekit.config import CLASS_BATCH, Loaded, SamplingConfig, TrainingRunConfig, dump_yaml
from tunekit.data.cache import Encoder, Stream
from tunekit.data.dreambooth import own_pictures
from tunekit.data.images import Sample, Scan
from tunekit.diffusion.judges import Judges
from tunekit.diffusion.objectives import Objective, configured
from tunekit.errors import (
    AdapterError,
    ArtifactError,
    ConfigError,
    DataError,
    DeviceError,
    ModelError,
    TunekitError,
)
from tunekit.families.family import DTYPES, Conditioning, Family, FamilyFacts, Pipeline
from tunekit.families.loading import here, left_out, source_files, variant_taken
from tunekit.memory.levers import Fitted, Levers, fit
from tunekit.memory.measure import Meter
from tunekit.memory.picture import draw
from tunekit.memory.plan import Plan
from tunekit.memory.sharding import local
from tunekit.networks import visiting
from tunekit.passes.base import Context, Pass, run_chain
from tunekit.progress import console
from tunekit.records import PlanRecord, read_plain
from tunekit.report import settle as settle_report
from tunekit.report import write as write_report
from tunekit.resources import Source
from tunekit.runtime import Runtime, sample_pixels, to_images
from tunekit.tasks import Task
from tunekit.training.boards import Boards, Told
from tunekit.training.checkpoint import (
    BASE,
    CLASS,
    DATA,
    INITIAL,
    MASKS,
    STEPS,
    Checkpoints,
    compare_identities,
    flatten,
    identity,
    only_writer,
    pictures_hash,
    weights_hash,
)
from tunekit.training.evaluation import Previewer
from tunekit.training.loop import Hooks, Result, ends_early, no_better, train
from tunekit.training.pictures import changes, keep
from tunekit.training.results import Results
from tunekit.training.run import (
    Processes,
    build_optimizer,
    close_accelerator,
    on_main,
    open_accelerator,
    sampling_of,
)
from tunekit.training.tracking import Tracker
from tunekit.units import format_bytes, format_count

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image


@dataclass(frozen=True)
class Base:
    """The base model, opened for training."""

    family: Family
    pipeline: Pipeline
    objective: Objective


@dataclass
class Run:
    """One run: its folder, its processes, and where its lines go.

    Attributes:
        config: with nothing under `memory:` left open.
        given: as it was given.
        folder: where it writes.
        accelerator: its device and processes.
        main: whether this is the process that writes; it is asked for after the accelerator is gone, too.
        meter: measures what was planned, phase by phase.
        scan: its pictures.
        chain: the passes that follow.
        plan: None where nothing was planned.
    """

    config: TrainingRunConfig
    given: TrainingRunConfig
    folder: RunFolder
    accelerator: Accelerator
    main: bool
    meter: Meter
    scan: Scan
    chain: Sequence[Pass]
    plan: Plan | None = None
    learns: bool = False
    """Whether it is training now, so that memory which runs out is the plan's fault."""
    prompts: dict[str, Conditioning] = field(default_factory=dict)
    """Conditioning of the previews' prompts, without the batch dimension."""
    initial: Callable[[nn.Module], None] | None = None
    """Gives the new adapter the values that training starts from; None leaves those that were drawn."""
    _known: dict[str, str | None] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """Show a line on the main process."""
        if self.main:
            console().say(line)

    @cached_property
    def family(self) -> Family:
        """Of the base."""
        return families.get(self.config.model.family)

    @property
    def identity(self) -> dict[str, Any]:
        """What is learned, see `checkpoint.identity`."""
        groups = self._pictures
        known = {CLASS: pictures_hash(groups[CLASS])} if CLASS in groups else {}
        return identity(self.config, self.scan.samples, {**self._known, **known})

    @cached_property
    def _pictures(self) -> dict[str, Sequence[Sample]]:
        """What the run learns from, by key of its identity; of the class, what it has not drawn itself."""
        found: dict[str, Sequence[Sample]] = {DATA: self.scan.samples}
        if getattr(self._data, "class_prompt", None) is not None:
            found[CLASS] = own_pictures(self.scan.prior)[: self._data.class_pictures]
        return found

    @cached_property
    def _changes(self) -> dict[str, str]:
        return changes(self.folder.path, self._pictures)

    def _know(self) -> None:
        """Look at the weights that the run starts from; those of the hub may be here only once loaded."""
        config, facts = self.config, self.family.facts
        init = config.adapter.init if config.adapter else None

        def look() -> dict[str, str | None]:
            with console().phase("reading the base's weights"):
                known = {BASE: weights_hash(weights_of(config.model.opened, facts))}
            return {**known, INITIAL: weights_hash([initial_file(init)]) if init else None}

        self._known = on_main(self.accelerator, look)

    def _compare_weights(self) -> None:
        """Hold the weights that another machine has read against those of the first one.

        Raises:
            ModelError: on the machine that has others.
        """
        if self.main or not self.accelerator.is_local_main_process:
            return
        source = self.config.model.opened
        if weights_hash(weights_of(source, self.family.facts)) != self._known[BASE]:
            raise ModelError(
                "the weights here are others than those on the machine of rank 0",
                where=str(source.name),
                hint="copy them from there, or name one revision: model.revision",
            )

    @cached_property
    def sampling(self) -> SamplingConfig:
        """How the run's pictures are drawn: as it says, else as its base says, else as the family does."""
        return sampling_of(self.config)

    @property
    def _data(self) -> Any:
        return self.config.data  # type: ignore[attr-defined]  # each training recipe declares its own

    @property
    def cache(self) -> Path:
        """Where encoded pictures are kept."""
        return self.config.cache_dir

    # Before -------------------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Whether there is something to train; writes config.yaml and plan.json once they fit what is there.

        Raises:
            ResumeError: what is there was made by another configuration; names the keys.
        """
        self.say(self._opening())
        self._know()

        def look() -> tuple[Path | None, Step | None, Mapping[str, Any] | None]:
            trained = self.folder.trained()
            step = Artifact.load(trained).step if trained else None
            details = step.details if step else None
            if trained and details and "identity" in details:
                compare_identities(details["identity"], self.identity, trained, self._changes)
            return trained, step, self._checkpoints.check()

        # The others may not see the folder.
        trained, step, begun = on_main(self.accelerator, look)
        if self.main:
            write_text(self.folder.config, dump_yaml(self.given))
            keep(self.folder.path, self._pictures)
            if self.plan is not None:
                self._write_plan(self.plan)
        if step and (finished := self._finished(step)):
            self.say(f"training is finished ({finished}): {trained}")
            self._choose_again(step)
            self.accelerator.wait_for_everyone()
            return False
        if begun is not None:
            self._say_what_changed(begun)
        self.learns = True
        return True

    def _finished(self, step: Step) -> str | None:
        """How far a training came that is at its end, as the config is now; None if there is more to do."""
        train, done, best = self.config.train, int(step.details.get("step", 0)), step.metrics.get("best_step")
        if done >= train.max_steps:
            return f"{done} steps"
        best_step = int(best) if isinstance(best, int | float) else 0
        if done and ends_early(done, best_step, patience=train.early_stop, every=train.validate_every):
            return f"by itself after {done} of {train.max_steps} steps, {no_better(best_step)}"
        return None

    def _choose_again(self, step: Step) -> None:
        """Of a finished training, what `train.final` says now."""
        if not self.main or not self.config.keeps_best or step.details.get("final") == self.config.final:
            return
        if (self.folder.adapters / "last" / RECORD).is_file():
            self._results.choose(Artifact.load(self.folder.adapter).lineage[-1])
        elif self.config.adapter is None and "final" in step.details:
            self.say(
                f"{self.folder.model} stays the {step.details['final']}, of step {step.details['taken']}:"
                " of all weights one set is kept, and train.final is asked at the end of the training"
            )

    def _opening(self) -> str:
        """`20 pictures, batch 4, 1,500 steps = 300 epochs, writes to runs/mine`."""
        train, count = self.config.train, len(self.scan.samples)
        epochs = train.max_steps * train.batch_size / max(count, 1)
        shown = format_count(round(epochs)) if epochs >= 10 else f"{epochs:.2g}"
        held = f" ({len(self.scan.held_out)} more held out)" if self.scan.held_out else ""
        return (
            f"{format_count(count)} picture{'s' if count != 1 else ''}{held}, batch {train.batch_size},"
            f" {format_count(train.max_steps)} steps = {shown} epoch{'s' if shown != '1' else ''},"
            f" writes to {self.folder.path}"
        )

    def _say_what_changed(self, begun: Mapping[str, Any]) -> None:
        """What a run that is continued has else than when it was begun, without being another one for it."""
        train, adapter = self.config.train, self.config.adapter
        before = begun.get(STEPS)
        if before is not None and before != train.max_steps and train.schedule != "constant":
            self.say(
                f"train.max_steps was {before:,} and is {train.max_steps:,}: steps that were made keep their"
                f" learning rates, those to come follow the {train.schedule} schedule of the new length"
            )
        if adapter is not None and adapter.dropout and MASKS not in begun:
            self.say(
                "this run was begun when masks of adapter.dropout depended on how a step is cut; from here on"
                " they belong to the samples"
            )

    def _write_plan(self, plan: Plan) -> None:
        self.meter.active = True
        file = self.folder.path / "plan.json"
        content = plan.as_json()
        if file.is_file():  # what went wrong in this run's earlier lives stays known
            try:
                before = read_plain(file, PlanRecord)
                content |= {key: before[key] for key in ("ran_out",) if key in before}
            except ArtifactError as error:  # a file beside the run, which goes on without
                self.say(f"plan: {error.message}; it is written anew")
        write_json(file, content)
        write_text(self.folder.path / "plan.svg", draw(plan))
        self.say(
            f"plan: {plan.words}; needs {format_bytes(plan.device_bytes)} of"
            f" {format_bytes(plan.budget_bytes)} (most in the phase {plan.peak_phase}),"
            f" step time x{plan.relative_step_time:.2f}"
        )
        if plan.approximates:
            self.say(f"plan: {' and '.join(plan.approximates)}: changes a little what is learned")

    def load(self) -> Base:
        """Open the base, each network in the type that it computes in while it is trained."""
        config, memory, family = self.config, self.config.memory, self.family
        if variant := variant_taken(config.model.opened, family.facts):
            self.say(f"base: its weights are there as {variant} alone, so these are read")
        for line in left_out(config.model.opened, family.facts):
            self.say(f"base: {line}")
        trained = torch.float32 if config.adapter is None else DTYPES[memory.precision]
        pack = memory.base_precision if memory.base_precision in ("int8", "fp8", "nf4") else ""
        with self.meter.phase("load"), console().phase("loading the base"):
            pipeline = family.load(config.model.opened, family.facts.dtypes(trained), pack=pack)
        pipeline.scheduler = configured(pipeline.scheduler, config.objective)
        self._know()
        self._compare_weights()
        if config.adapter is not None and config.adapter.init is not None:
            given = _initial(pipeline, family, config.adapter.init)
            self.initial = partial(start_from, given=given, source=config.adapter.init)
        self._watch(pipeline)
        return Base(family, pipeline, family.objective(pipeline, config.objective))

    @contextmanager
    def encoding(self, base: Base) -> Iterator[Encoder]:
        """Gives what encodes pictures and captions; afterwards its networks have left memory."""
        config = self.config
        encoder = Encoder(
            base.family,
            base.pipeline,
            cache=self.cache,
            accelerator=self.accelerator,
            captions=self._visits,
            precision=config.memory.encode_precision or "fp32",
            measured=partial(self.meter.phase, "encode"),
            files=source_files(config.model.opened, base.family.facts),
            say=self.say,
        )
        yield encoder
        negative = self.sampling.negative_prompt or ""
        self.prompts = encoder.conditioning([*config.preview.prompts, negative])
        encoder.release(keep_vae=bool(config.preview.prompts))

    def _visits(self, encoder: nn.Module) -> AbstractContextManager[None]:
        """A text encoder while it encodes: on the device, there layer by layer, or on the CPU."""
        memory, device = self.config.memory, self.accelerator.device
        layers, on_host = bool(memory.encode_by_layer), bool(memory.encode_on_host)
        return visiting(encoder, device, layers=layers, on_host=on_host)

    def drawing(self, base: Base, prompt: str, sampling: SamplingConfig) -> Callable[..., list[Image]]:
        """Gives a function that draws pictures of `prompt` with the base; `seeds=[1, 2]` gives two.

        The text encoders visit the device first and alone, since one prompt is all they are for; behind them
        the denoiser and the VAE stay there.
        """
        family, pipeline, device = base.family, base.pipeline, self.accelerator.device
        memory, facts = self.config.memory, base.family.facts
        denoiser = family.denoiser(pipeline)
        runtime = Runtime(family, pipeline, f"torch {device}", device=device, dtype=cast(Any, denoiser).dtype)
        whole = sampling.over(runtime.sampling)
        encoders = [getattr(pipeline, part.name) for part in facts.encoders_of(pipeline)]
        with self.meter.phase("class_pictures"), ExitStack() as stack:
            for encoder in encoders:
                stack.enter_context(self._visits(encoder))
            told = runtime.conditioning([prompt], whole)
            guided = runtime.guided(1, whole)
        hardware.forget()  # what the encoders held
        denoiser.to(device)
        pipeline.vae.to(device)
        batch = memory.class_batch or CLASS_BATCH

        def drawn(*, seeds: Sequence[int]) -> list[Image]:
            pictures: list[Image] = []
            for start in range(0, len(seeds), batch):
                part = seeds[start : start + batch]
                with (
                    self.meter.phase("class_pictures", again=True),
                    console().phase("drawing class pictures"),
                ):
                    pixels = sample_pixels(
                        runtime,
                        repeated(told, len(part)),
                        guided and guided._replace(negative=repeated(guided.negative, len(part))),
                        whole,
                        seeds=part,
                    )
                pictures += to_images(pixels)
            return pictures

        return drawn

    # The loop -----------------------------------------------------------------------------------------------

    def fit(self, base: Base) -> Fitted:
        """Put the denoiser on the device as it is trained, with its adapter and the memory levers.

        Raises:
            ConfigError, AdapterError, MissingPackageError: see `levers.fit`.
        """
        return fit(
            base.family.denoiser(base.pipeline),
            self.config.adapter,
            base.family.facts,
            Levers.of(self.config.memory),
            device=self.accelerator.device,
            seed=self.config.seed,
            initial=self.initial,
        )

    def train(
        self,
        base: Base,
        task: Task,
        batches: Stream,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    ) -> None:
        """Train, preview, keep checkpoints, and save what was learned."""
        config, accelerator, fitted = self.config, self.accelerator, task.fitted
        optimizer = build_optimizer(config.train, fitted, accelerator.device)
        self._watch(base.pipeline, fitted, optimizer)
        boards = self._boards
        hooks = Hooks(
            seed=config.seed,
            meter=self.meter,
            tracker=Tracker(
                self.folder.metrics,
                boards=boards,
                say=self.say,
                look=partial(write_report, self.folder.path),
            ),
            checkpoints=self._checkpoints,
            evaluate=evaluate,
            preview=self._previewer(base, boards),
            preview_every=config.preview.every,
            keep=partial(self._keep, base),
            keep_best=config.keeps_best,
            patience=config.train.early_stop,
        )
        result = train(accelerator, task, optimizer, batches, config.train, hooks)
        with console().phase("saving what was learned"):
            self._save(base, fitted, result)

    @property
    def _checkpoints(self) -> Checkpoints:
        kept = self.config.train.keep_checkpoints
        return Checkpoints(self.folder.checkpoints, self.identity, kept, self._changes)

    def _watch(
        self, pipeline: Pipeline, fitted: Fitted | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Tell the meter what is in memory from now on."""
        self.meter.there = partial(_in_memory, pipeline, fitted, optimizer)

    @cached_property
    def _boards(self) -> Boards | None:
        """Further places that are told of the run, on the main process."""
        config, plan = self.config, self.plan
        if not config.train.trackers or not self.main:
            return None
        told = Told(
            config.name,
            self.folder.path,
            config.model_dump(mode="json"),
            plan.as_json() if plan else None,
            plan.words if plan else "",
        )
        return Boards(config.train.trackers, told, self.say)

    def _previewer(
        self, base: Base, boards: Boards | None
    ) -> Callable[[nn.Module, int], Mapping[str, float]] | None:
        config = self.config
        if not config.preview.prompts:
            return None
        judges = Judges.of_previews(config.preview.clip_model)
        previewer = Previewer(
            base.family,
            base.pipeline,
            config.preview,
            self.sampling,
            self.prompts,
            self.folder.previews,
            self.meter,
            tiled=bool(config.memory.vae_tiling),
            judges=judges if judges.clip else None,
            writes=self.main,
        )
        if boards is None:
            return previewer

        def preview(model: nn.Module, step: int) -> Mapping[str, float]:
            figures = previewer(model, step)
            boards.pictures(previewer.files(step), step)
            return figures

        return preview

    @property
    def _results(self) -> Results:
        return Results(
            self.config,
            self.folder,
            self.family,
            self.identity,
            self.sampling,
            self._data,
            len(self.scan.samples),
            self.say,
        )

    def _keep(self, base: Base, name: str, step: int, figures: Mapping[str, float]) -> None:
        """Write what is learned as it is after `step`, on the main process."""
        kept = self.folder.adapters / name if self.config.adapter else self.folder.best
        with console().phase(f"saving {kept.relative_to(self.folder.path)}"):
            self._results.keep(base.pipeline, name, step, figures)

    def _save(self, base: Base, fitted: Fitted, result: Result) -> None:
        """Write what was trained, and what saving took; where the best is kept, take it or the last."""
        if not self.main and not fitted.shards:
            return
        results = self._results
        with ranks.saving(), self.meter.phase("save"), fitted.whole():
            if not self.main:
                return
            learned = dict(base.family.denoiser(base.pipeline).named_parameters())
            count = sum(learned[name].numel() for name in fitted.parameters)
            step = results.save(base.pipeline, result, parameters=count)
        if self.meter.active:
            self.meter.write(self.folder.path / "plan.json")
        if self.config.keeps_best and self.config.adapter:
            results.choose(step)

    # After --------------------------------------------------------------------------------------------------

    def optimize(self) -> None:
        """Run the passes on what was trained, and write the report, after each of them too.

        The processes part here; the main one goes on as an ordinary single one.

        Raises:
            VerificationFailed: a step missed its thresholds.
        """
        self.learns = False
        close_accelerator(self.accelerator)
        trained = self.folder.trained()
        if not self.main or trained is None:
            return
        config, path = self.config, self.folder.path
        write_report(path)
        context = Context(
            run_dir=path,
            device=config.memory.device,
            seed=config.seed,
            prompts=tuple(config.preview.prompts),
            sampling=self.sampling,
            data=self._data,
            say=self.say,
        )
        run_chain(self.chain, Artifact.load(trained), context, after_step=lambda _: write_report(path))
        self.say(f"report: {path / 'report.html'}")


def weights_of(source: Source, facts: FamilyFacts) -> list[Path]:
    """The files on this machine that hold a base's weights; none while a base of the hub is not here yet."""
    path = here(source)
    if path is None:
        return []
    listed = source_files(replace(source, name=str(path)), facts).values()
    files = [file for files in listed for file in files]
    return list(dict.fromkeys([path, *files])) if path.is_file() else files


def initial_file(source: str) -> Path:
    """The file of an adapter to start from; of a run, its trained adapter."""
    run = RunFolder(Path(source).expanduser())
    return adapter_file(run.adapter if (run.adapter / RECORD).is_file() else source)


def _initial(pipeline: Pipeline, family: Family, source: str) -> dict[str, Delta]:
    """Read the adapter that training starts from, by module path of the denoiser.

    Raises:
        AdapterError: unreadable, or for more than the denoiser.
    """
    read = read_adapter(pipeline, family, initial_file(source))
    others = sorted(read.keys() - {family.facts.denoiser_name})
    if others:
        raise AdapterError(
            f"it adapts the {', '.join(others)} too, which is not trained here",
            where=source,
            hint="start from an adapter of the denoiser alone, or merge this one into the base first",
            key="adapter.init",
        )
    return dict(read[family.facts.denoiser_name])


def repeated(conditioning: Conditioning, count: int) -> Conditioning:
    """The conditioning of one prompt, for each of `count` pictures."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in conditioning.items()}


def _in_memory(
    pipeline: Pipeline, fitted: Fitted | None, optimizer: torch.optim.Optimizer | None
) -> Iterator[torch.Tensor]:
    host = {id(tensor) for tensor in fitted.host.tensors} if fitted and fitted.host else set()
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            yield from (local(t) for t in (*module.parameters(), *module.buffers()) if id(t) not in host)
    if fitted:
        yield from fitted.parameters.values()
    for state in optimizer.state.values() if optimizer else ():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


@contextmanager
def open_run(config: TrainingRunConfig, loaded: Loaded) -> Iterator[Run]:
    """Check, decide, and hold the run folder for as long as the run lives.

    Whatever can be known to be wrong (`preconditions`) is said before anything has started; memory is decided
    before anything is loaded, once for all processes.

    Raises:
        TunekitError: one of the preconditions is not met.
        DeviceError, ConfigError, DoesNotFit: see `open_accelerator` and `planning.settle`.
        ArtifactError: another process is writing to this run.
        OutputError: the folder cannot be written.
        OutOfMemory: while it trained; its `replan` says whether to start again at once.
    """
    company = ranks.meet()
    nodes = [member.node for member in company.members] if company else [""]
    rank = company.rank if company else 0
    found = preconditions.look(
        loaded,
        processes=len(nodes),
        local=1,  # each asks for its own device
        first=nodes[rank] == nodes[0],
        progress=console() if rank == 0 else None,
    )
    _agree(found, company)
    assert found.scan is not None
    console().doing("planning memory")
    settled, plan = planning.settle(config, Processes.of(config.memory.device))
    accelerator = open_accelerator(settled.memory, settled.train.batch_size, settled.adapter)
    meter = Meter(accelerator.device, active=False)
    folder, main = RunFolder(config.run_dir), bool(accelerator.is_main_process)
    run = Run(settled, config, folder, accelerator, main, meter, found.scan, found.chain, plan)
    for line in found.notes:
        run.say(line)
    if config.memory.sharding == "full" and accelerator.num_processes == 1:
        run.say("memory.sharding: one process has all of the weights")
    with _held(run):
        try:
            yield run
        except Exception as error:
            if not run.learns:
                raise
            short = planning.ran_out(settled, error)
            if short is None:
                raise
            if short.replan:  # in this process, with another accelerator
                close_accelerator(accelerator)
            raise short.with_traceback(None) from None


_PLACES = ("runs", "data.path", "data.validation", "data.class_path", "data.cache")
"""Keys that may say something else on each machine: what lies there is compared."""


def _agree(found: preconditions.Found, company: ranks.Company | None) -> None:
    """Raises what is wrong on any process on all of them; they have one config and the same pictures.

    Raises:
        TunekitError: a precondition that is not met on one of them.
        DeviceError: other versions on one of them.
        ConfigError, DataError: another config, or other pictures.
    """
    if company is None:
        found.check()
        return
    wrong: TunekitError | None = None
    facts: dict[str, Any] = {}
    try:
        found.check()
        scan, config = found.scan, flatten(found.config.model_dump(mode="json"))
        assert scan is not None
        facts = {
            "versions": {"tunekit": __version__, "torch": torch.__version__},
            "config": {key: value for key, value in config.items() if key not in _PLACES},
            "pictures": [
                [len(group), pictures_hash(group)]
                for group in (scan.samples, scan.held_out, own_pictures(scan.prior))
            ],
        }
    except TunekitError as error:
        wrong = error
    first, *others = company.agree(wrong, facts)
    for member, other in zip(company.members[1:], others, strict=True):
        who = f"rank {member.rank} on {member.name}"
        for name, version in first["versions"].items():
            if other["versions"][name] != version:
                raise DeviceError(
                    f"{who} has {name} {other['versions'][name]}, and rank 0 has {version}",
                    hint="install the same versions on all machines",
                )
        keys = {*first["config"], *other["config"]}
        changed = sorted(k for k in keys if first["config"].get(k) != other["config"].get(k))
        if changed:
            key = changed[0]
            there, here = (json.dumps(side["config"].get(key)) for side in (other, first))
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ConfigError(
                f"{who} has another config than rank 0: {key} is {there} there, and {here} here{more}",
                hint="start all processes with the same config and overrides",
            )
        for name, ours, theirs in zip(_GROUPS, first["pictures"], other["pictures"], strict=True):
            if ours != theirs:
                count = f"{theirs[0]} there, and {ours[0]} here" if ours[0] != theirs[0] else "as many"
                raise DataError(
                    f"{who} sees other {name} or captions than rank 0: {count}",
                    where=found.loaded.where("data"),
                    hint="copy the same files to all machines, or put them on a disk that all see",
                )


_GROUPS = ("pictures", "held-out pictures", "class pictures")


@contextmanager
def _held(run: Run) -> Iterator[None]:
    """The run folder, locked by the main process; the others wait until it is."""
    if not run.main:
        run.accelerator.wait_for_everyone()
        yield
        return
    try:
        with only_writer(run.folder.path, run.say):
            for folder in (run.folder.path, run.cache):
                clean_leftovers(folder, deep=True)
            run.accelerator.wait_for_everyone()
            yield
    finally:
        settle_report(run.folder.path)
