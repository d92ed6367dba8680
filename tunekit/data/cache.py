"""Latents and conditioning, encoded once, kept on disk, and handed out as batches.

    encoder = Encoder(family, pipeline, cache=Path("runs/.cache"), accelerator=accelerator)
    dataset = encoder.dataset(scan.samples, config.data, seed=config.seed)
    encoder.release()                       # text encoders and VAE leave memory
    batches = Stream(dataset, objective, Draws(batch_size=4, caption_dropout=0.1))

A latent's file name is a hash of everything it depends on: sample id, pixels, crop and size, and the VAE's
weights. A step or a position is never part of it, so no reshuffle can pair a picture with another one's
caption. What belongs to a picture beside its latent (which part of it was cut out, see `Frame`) follows from
the same sample and cut, and comes with it.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tunekit.config import DataConfig, DreamboothData
from tunekit.data.images import Sample
from tunekit.data.shapes import CROPS, Transform, bucket_for
from tunekit.diffusion.batch import Batch, join, single
from tunekit.diffusion.noise import sample_generator, stable_seed
from tunekit.diffusion.objectives import Chance, Objective
from tunekit.errors import DataError, NonFiniteError
from tunekit.families.family import DTYPES, Conditioning, Family, Frame, as_kept
from tunekit.families.prompts import cuts, tokenizers, told
from tunekit.files import atomic_file, clean_leftovers
from tunekit.kept import Kept
from tunekit.progress import Progress, console

if TYPE_CHECKING:
    from accelerate import Accelerator

VERSION = 1
"""Part of every key; to be raised when what is stored under a key changes its meaning."""
RECENT_BYTES = 256 * 2**20
"""Of the encoded files that were used last, so many bytes stay in memory."""

Visit = Callable[[nn.Module], AbstractContextManager[None]]
"""Within what it gives, a network computes on the device; it is in host memory before and after."""


class Encoder:
    """Encodes pictures and prompts with a pipeline's encoders, each one alone, unless the cache has it.

    One at a time, because in a batch a value depends in its last bits on its neighbours, and a cache that was
    filled in two goes would differ from one filled in one.

    Args:
        family: of the pipeline.
        pipeline: its VAE, then its text encoders visit the accelerator's device, in the types that the
            family's table gives them (an fp16 VAE overflows).
        cache: folder of encoded files; shared by all runs.
        accelerator: processes share the work.
        captions: how each text encoder comes to the device while captions are encoded; by default whole.
        precision: of the VAE's arithmetic, where it is not to be the table's: "bf16".
        measured: gives a context that measures one encoding; `again` for the first of its kind.
        files: component -> files its weights were read from, so that they need not be hashed again.
        say: takes what is encoded, as a line (main process only).
    """

    def __init__(  # noqa: PLR0913 - each is a fact of its own
        self,
        family: Family,
        pipeline: Any,
        *,
        cache: Path,
        accelerator: Accelerator,
        captions: Visit | None = None,
        precision: str = "fp32",
        measured: Callable[..., AbstractContextManager[None]] | None = None,
        files: Mapping[str, Sequence[Path]] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.family = family
        self.captions = captions or self._whole
        self.measured = measured
        self.pipeline = pipeline
        self.cache = cache
        self.accelerator = accelerator
        self.say = say
        for part in (family.facts.vae, *family.facts.encoders_of(pipeline)):
            module = getattr(pipeline, part.name)
            module.to(DTYPES[part.dtype or "fp32"]).eval().requires_grad_(False)
        self.multiple = family.resolution_multiple(pipeline)
        known = files or {}

        def hashed(name: str) -> str:
            return _hash_once(getattr(pipeline, name), known.get(name, ()))

        self._vae = hashed(family.facts.vae.name)
        self._lower = DTYPES[precision] if precision != "fp32" else None
        self._text = _digest(
            *(hashed(part.name) for part in family.facts.encoders_of(pipeline)),
            *(_vocabulary(getattr(pipeline, part.tokenizer)) for part in family.facts.encoders_of(pipeline)),
            *_prompt_options(pipeline),
        )
        self._told: set[str] = set()

    def dataset(
        self, samples: Sequence[Sample], data: DataConfig | DreamboothData, *, seed: int, fixed: bool = False
    ) -> CachedDataset:
        """Encode `samples` and their captions.

        Args:
            samples: what to encode.
            data: reads resolution, buckets, crop and flip.
            seed: for random crops.
            fixed: centre crop, no flip (validation pictures).

        Raises:
            NonFiniteError: a latent is NaN or infinite; names the file.
            DataError: a picture went away since it was looked at.
            OutputError: the cache cannot be written.
        """
        variants = [
            _variants(sample, data, self.multiple, seed=seed, augment=not fixed) for sample in samples
        ]
        files = [
            [self._latent_file(sample, transform, data.resolution) for transform in transforms]
            for sample, transforms in zip(samples, variants, strict=True)
        ]
        jobs = [
            (file, partial(self._encode_picture, sample, transform))
            for sample, transforms, paths in zip(samples, variants, files, strict=True)
            for transform, file in zip(transforms, paths, strict=True)
        ]
        with self._lowered() as vae:
            self._fill(jobs, "picture", [vae], self._whole)
        places = {sample.caption: sample.where for sample in samples}
        captions = self.prompts(["", *(sample.caption for sample in samples)], places)
        frames = [
            [frame_of(sample, transform) for transform in transforms]
            for sample, transforms in zip(samples, variants, strict=True)
        ]
        return CachedDataset(list(samples), frames, files, captions)

    def prompts(self, prompts: Iterable[str], places: Mapping[str, str] | None = None) -> dict[str, Path]:
        """Encode prompts, and say what is cut off of those that are too long; returns the file of each.

        Args:
            places: prompt -> where it stands, for messages.
        """
        prompts = list(dict.fromkeys(prompts))
        self._tell_cuts([prompt for prompt in prompts if prompt not in self._told], places)
        files = {
            prompt: self.cache
            / "conditioning"
            / f"{_digest(VERSION, self.family.name, self._text, prompt)}.safetensors"
            for prompt in prompts
        }
        jobs = [(file, partial(self._encode_prompt, prompt)) for prompt, file in files.items()]
        there = self.family.facts.encoders_of(self.pipeline)
        self._fill(jobs, "caption", [getattr(self.pipeline, part.name) for part in there], self.captions)
        return files

    def _tell_cuts(self, prompts: Sequence[str], places: Mapping[str, str] | None) -> None:
        if not self.accelerator.is_main_process:
            return
        self._told.update(prompts)
        for line in told(cuts(tokenizers(self.family.facts, self.pipeline), prompts), len(prompts), places):
            self.say(line)

    def conditioning(self, prompts: Iterable[str]) -> dict[str, Conditioning]:
        """Conditioning of each prompt, without the batch dimension."""
        return {prompt: _load(file) for prompt, file in self.prompts(prompts).items()}

    def release(self, *, keep_vae: bool = False) -> None:
        """Let the text encoders, and the VAE unless previews need its decoder, leave memory."""
        for part in self.family.facts.encoders:
            setattr(self.pipeline, part.name, None)
        if keep_vae:
            self.pipeline.vae.to("cpu")
        else:
            self.pipeline.vae = None
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _whole(self, module: nn.Module) -> Iterator[None]:
        """A network that is on the device."""
        module.to(self.accelerator.device)
        try:
            yield
        finally:
            module.to("cpu")

    @contextmanager
    def _lowered(self) -> Iterator[nn.Module]:
        """The VAE as it encodes: itself, or a copy in 16 bits; what it decodes later stays as it was."""
        whole = self.pipeline.vae
        if self._lower is not None:
            self.pipeline.vae = copy.deepcopy(whole).to(self._lower)
        try:
            yield self.pipeline.vae
        finally:
            self.pipeline.vae = whole

    def _latent_file(self, sample: Sample, transform: Transform, resolution: int) -> Path:
        key = _digest(
            VERSION,
            self.family.name,
            self._vae,
            sample.id,
            sample.content,
            transform.key(),
            resolution,
            *([str(self._lower)] if self._lower is not None else []),
        )
        return self.cache / "latents" / f"{key}.safetensors"

    def _encode_picture(self, sample: Sample, transform: Transform) -> dict[str, Tensor]:
        try:
            pixels = transform.apply(sample.open())
        except (OSError, ValueError) as error:  # it was whole when the pictures were looked at
            raise DataError(f"cannot be read any more ({error})", where=sample.where) from error
        moments = self.family.encode_image(self.pipeline, pixels[None])[0]
        if not moments.isfinite().all():
            raise NonFiniteError(
                "the VAE turns this picture into NaN or infinity",
                where=sample.where,
                hint="remove the picture, or use a VAE whose weights are sound",
            )
        return {"moments": moments}

    def _encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        conditioning = self.family.encode_prompt(self.pipeline, [prompt])
        for name, value in conditioning.items():
            if not value.isfinite().all():
                raise NonFiniteError(
                    f"the text encoder turns the caption {prompt!r} into NaN or infinity ({name})"
                )
        return {name: value[0] for name, value in as_kept(conditioning).items()}

    def _fill(
        self,
        jobs: Sequence[tuple[Path, Callable[[], dict[str, Tensor]]]],
        what: str,
        modules: Sequence[nn.Module],
        visit: Visit,
    ) -> None:
        """Make the files that are missing, split over the processes, while `modules` visit the device."""
        if self.accelerator.is_main_process:
            for folder in {path.parent for path, _ in jobs}:
                clean_leftovers(folder)
        missing = [(path, make) for path, make in dict(jobs).items() if not is_whole(path)]
        self.accelerator.wait_for_everyone()  # nobody writes before everyone has looked
        if missing and self.accelerator.is_main_process:
            self.say(f"encoding {len(missing)} {what}{'s' if len(missing) > 1 else ''}")
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = missing[rank::processes]
        shown = console() if self.accelerator.is_main_process else Progress(quiet=True)
        with ExitStack() as stack:
            for module in modules if missing else ():
                stack.enter_context(visit(module))
            with shown.phase(f"encoding {what}s", len(missing)) if mine else nullcontext() as phase:
                for done, (path, make) in enumerate(mine, start=1):
                    with self.measured(again=done == 1) if self.measured else nullcontext():
                        tensors = make()
                    save_tensors(path, tensors)
                    if phase:
                        phase.update(min(done * processes, len(missing)))
            self.accelerator.wait_for_everyone()
            for path, make in missing:  # another machine's disk may not be this one's
                if not is_whole(path):
                    save_tensors(path, make())
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


class CachedDataset:
    """Encoded samples on disk; those used last stay in memory.

    Args:
        samples: what was encoded.
        frames: of each sample's variants.
        latents: file of each sample's variants: `moments` [2C, h, w], and what else is kept beside them.
        captions: file of each caption.
    """

    def __init__(
        self,
        samples: list[Sample],
        frames: list[list[Frame]],
        latents: list[list[Path]],
        captions: dict[str, Path],
    ) -> None:
        self.samples = samples
        self.shapes = [variants[0].size for variants in frames]
        """(height, width) in pixels of each sample."""
        self._frames = frames
        self._latents = latents
        self._captions = captions
        self._load = _Recent(RECENT_BYTES)

    def __len__(self) -> int:
        return len(self.samples)

    def variants(self, index: int) -> int:
        """How many crops and flips of a sample are cached."""
        return len(self._latents[index])

    def moments(self, index: int, variant: int = 0) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each [C, h, w], of the scaled latents of one sample."""
        mean, std = self._load(self._latents[index][variant])["moments"].chunk(2)
        return mean, std

    def beside(self, index: int, variant: int = 0) -> dict[str, Tensor]:
        """What is kept beside a latent, without the batch dimension: its frame, and all else in its file."""
        others = self._load(self._latents[index][variant])
        kept = {name: value for name, value in others.items() if name != "moments"}
        return {**kept, "frame": self._frames[index][variant].row}

    def conditioning(self, caption: str) -> Conditioning:
        """Conditioning of a caption of this data set, or of the empty one, without the batch dimension."""
        return self._load(self._captions[caption])

    def batch(
        self, index: int, *, seed: int, epoch: int, objective: Chance, draws: Draws, weight: float = 1.0
    ) -> Batch:
        """One sample with its draws, which depend on (seed, epoch, sample id) and nothing else.

        Args:
            draws: reads caption_dropout and tag.
            weight: of the row.
        """
        name = draws.tag + self.samples[index].id

        def draw(purpose: str) -> torch.Generator:
            return sample_generator(seed, epoch, name, purpose)

        variant = int(torch.randint(self.variants(index), (), generator=draw("variant")))
        mean, std = self.moments(index, variant)
        rows = {
            "latents": mean + std * torch.randn(mean.shape, generator=draw("latent")),
            "noise": objective.noise(draw("noise"), tuple(mean.shape)),
            "timesteps": objective.draw(draw("timestep"), tuple(mean.shape)),
            "weight": torch.tensor(weight),
            **self.beside(index, variant),
        }
        dropped = float(torch.rand((), generator=draw("caption"))) < draws.caption_dropout
        return single(name, rows, self.conditioning("" if dropped else self.samples[index].caption))

    def validation(self, objective: Objective, *, timesteps: int, micro_batch: int) -> Iterator[Batch]:
        """Every sample at `timesteps` evenly spread timesteps, with noise that is always the same."""
        rows = [
            single(
                sample.id,
                {
                    "latents": (mean := self.moments(index)[0]),
                    "noise": torch.randn(
                        mean.shape, generator=sample_generator(0, level, sample.id, "validation")
                    ),
                    "timesteps": torch.tensor(objective.level((level + 0.5) / timesteps)),
                    "weight": torch.tensor(1.0),
                    **self.beside(index),
                },
                self.conditioning(sample.caption),
            )
            for index, sample in enumerate(self.samples)
            for level in range(timesteps)
        ]
        yield from together(rows, micro_batch)


@dataclass(frozen=True)
class Draws:
    """How samples are drawn and put together.

    Attributes:
        batch_size: samples per optimizer step over all processes; class pictures come on top of it.
        micro_batch: most rows in one forward; None means no limit.
        caption_dropout: share of samples with an empty caption.
        prior_weight: weight of class pictures' rows.
        tag: put before ids, to tell class pictures from instance pictures of the same file name.
    """

    batch_size: int = 1
    micro_batch: int | None = None
    caption_dropout: float = 0.0
    prior_weight: float = 1.0
    tag: str = ""


CLASS_TAG = "class/"


class Stream:
    """Training batches as a function of the step; answers the loop's `Batches`.

    The stream is one epoch after another; optimizer step k takes the samples at positions k*B to (k+1)*B - 1.
    An epoch is a permutation drawn from (seed, epoch) in which pictures of one shape stand together B at a
    time. Processes and micro-batches only cut the step's samples into pieces.

    Args:
        dataset: training samples (DreamBooth: instance pictures).
        objective: draws the noise and the timesteps.
        draws: how they are put together.
        seed: of the run.
        prior: class pictures; each instance picture is accompanied by one.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        objective: Chance,
        draws: Draws,
        *,
        seed: int = 0,
        prior: CachedDataset | None = None,
    ) -> None:
        self.dataset = dataset
        self.objective = objective
        self.draws = draws
        self.batch_size = draws.batch_size
        self.micro_batch = draws.micro_batch or 2 * draws.batch_size
        self.seed = seed
        self.prior = prior
        self._order = lru_cache(maxsize=4)(self._draw_order)
        self._ahead: tuple[tuple[int, int, int], Future[list[Batch]]] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def step(self, step: int, rank: int, processes: int) -> list[Batch]:
        """This process's micro-batches of a step; the next step's are made meanwhile."""
        wanted = (step, rank, processes)
        if self._ahead is not None and self._ahead[0] == wanted:
            batches = self._ahead[1].result()
        else:
            batches = self._make(*wanted)
        following = (step + 1, rank, processes)
        self._ahead = (following, self._worker.submit(self._make, *following))
        return batches

    def ids(self, step: int) -> list[str]:
        """Ids of all samples of a step, class pictures left out."""
        return [self.dataset.samples[index].id for index, _ in self._positions(self.dataset, "order", step)]

    def _make(self, step: int, rank: int, processes: int) -> list[Batch]:
        sources = [(self.dataset, "order", 1.0, self.draws)]
        if self.prior is not None:
            tagged = replace(self.draws, tag=CLASS_TAG)
            sources.append((self.prior, "prior order", self.draws.prior_weight, tagged))
        rows = [
            (dataset.shapes[index][::-1], dataset, index, epoch, weight, draws)
            for dataset, purpose, weight, draws in sources
            for index, epoch in self._positions(dataset, purpose, step)
        ]
        # By width, then height; stable: the same order however many processes there are.
        rows.sort(key=lambda row: row[0])
        mine = rows[len(rows) * rank // processes : len(rows) * (rank + 1) // processes]
        singles = [
            dataset.batch(
                index, seed=self.seed, epoch=epoch, objective=self.objective, draws=draws, weight=weight
            )
            for _, dataset, index, epoch, weight, draws in mine
        ]
        return list(together(singles, self.micro_batch))

    def _positions(self, dataset: CachedDataset, purpose: str, step: int) -> list[tuple[int, int]]:
        """(index, epoch) of the samples at the stream positions of a step."""
        count = len(dataset)
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [(self._order(dataset, purpose, at // count)[at % count], at // count) for at in positions]

    def _draw_order(self, dataset: CachedDataset, purpose: str, epoch: int) -> list[int]:
        """The permutation of one epoch."""
        generator = torch.Generator().manual_seed(stable_seed(self.seed, epoch, purpose))
        count, size = len(dataset), self.batch_size
        groups: dict[tuple[int, int], list[int]] = {}
        for index in torch.randperm(count, generator=generator).tolist():
            groups.setdefault(dataset.shapes[index], []).append(index)
        whole: list[list[int]] = []
        rest: list[int] = []
        for group in groups.values():
            cut = len(group) // size * size
            whole += [group[at : at + size] for at in range(0, cut, size)]
            rest += group[cut:]
        chunks = [whole[at] for at in torch.randperm(len(whole), generator=generator).tolist()]
        lead = -epoch * count % size  # the last step of the epoch before still takes so many
        return [*rest[:lead], *itertools.chain.from_iterable(chunks), *rest[lead:]]


def together(rows: Sequence[Batch], most: int) -> Iterator[Batch]:
    """Join neighbouring rows of one shape, at most `most` at a time."""
    for _, group in itertools.groupby(rows, key=lambda row: row.latents.shape):
        same = list(group)
        for at in range(0, len(same), most):
            yield join(same[at : at + most])


def frame_of(sample: Sample, transform: Transform) -> Frame:
    """What is cut out of a picture; of a mirrored one, as if it had been mirrored before it was cut."""
    left, top = transform.corner(sample.width, sample.height)
    if transform.flip:
        left = transform.scaled(sample.width, sample.height)[0] - transform.size[0] - left
    width, height = transform.size
    return Frame((sample.height, sample.width), (top, left), (height, width))


class _Recent:
    """Loads files; those used last stay in memory, up to a number of bytes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._files: OrderedDict[Path, dict[str, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, path: Path) -> dict[str, Tensor]:
        with self._lock:
            if path in self._files:
                self._files.move_to_end(path)
                return self._files[path]
        content = _load(path)
        with self._lock:
            if path not in self._files:
                self._files[path] = content
                self.held += _bytes(content)
            while self.held > self.most and len(self._files) > 1:
                self.held -= _bytes(self._files.popitem(last=False)[1])
        return content


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _variants(
    sample: Sample, data: DataConfig | DreamboothData, multiple: int, *, seed: int, augment: bool
) -> list[Transform]:
    """The crops and flips of a picture that are cached, see `Transform`."""
    many = data.buckets if isinstance(data, DataConfig) else False
    size = bucket_for(sample.width, sample.height, data.resolution, multiple, many=many)
    crops = [Transform(size)]
    if augment and data.crop == "random" and sample.width * size[1] != sample.height * size[0]:
        places = [
            torch.rand(2, generator=sample_generator(seed, cut, sample.id, "crop")) for cut in range(CROPS)
        ]
        crops = [Transform(size, float(place[0]), float(place[1])) for place in places]
    flips = (False, True) if augment and data.flip else (False,)
    return [replace(crop, flip=flip) for crop in crops for flip in flips]


def is_whole(path: Path) -> bool:
    """Whether a file of tensors is there, as long as its header says; what was cut or emptied is not."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                return False
            header = json.loads(file.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return bool(ends) and 8 + length + max(ends) == size
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return False


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one file of the cache, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_file(path) as temporary:
        # safetensors' own way into a file has a temporary name that nobody can tell from another process's.
        temporary.write_bytes(
            save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        )


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the cached file cannot be read ({error})", where=str(path), hint="remove it and run again"
        ) from error


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


_PASSING = ("transformers_version", "dtype", "torch_dtype", "architectures")
"""Keys of a model's configuration that change with the library and not with what it computes."""


def _hash_once(module: nn.Module, files: Sequence[Path]) -> str:
    """`_hash_module`, remembered for weights that were read from files which have not changed since."""
    if not files:
        return _hash_module(module)
    seen = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    dtypes = sorted({str(tensor.dtype) for tensor in module.state_dict().values()})
    kept, key = Kept.of("hashes"), _digest(VERSION, seen, dtypes, _described(module))
    known = kept.read(key)
    if isinstance(known, str):
        return known
    made = _hash_module(module)
    kept.write(key, made)
    return made


_HASH_BYTES = 16


def _described(module: nn.Module) -> str:
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)  # type: ignore
    known = {key: value for key, value in config.items() if key[0] != "_" and key not in _PASSING}
    return json.dumps(known, sort_keys=True, default=str)


def _hash_module(module: nn.Module) -> str:
    """Hash of a module's weights and configuration."""
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    digest.update(_described(module).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _prompt_options(pipeline: Any) -> list[Any]:
    """What else of a pipeline says how prompts are encoded; most have none."""
    zeros = getattr(pipeline.config, "force_zeros_for_empty_prompt", None)
    return [] if zeros is None else [zeros]


def _vocabulary(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    known = [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length]
    return _digest(*known, *([template] if template else []))
