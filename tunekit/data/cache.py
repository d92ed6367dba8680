"""Latents and conditioning, encoded once, kept on disk, and handed out as batches.

    encoder = Encoder(family, pipeline, cache=Path("runs/.cache"), accelerator=accelerator)
    dataset = encoder.dataset(scan.samples, config.data, seed=config.seed)
    encoder.release()                       # text encoders and VAE leave memory
    batches = Stream(dataset, objective, Draws(batch_size=4, caption_dropout=0.1))

A latent's key is a hash of everything it depends on: sample id, pixels, crop and size, and the VAE's
weights. A step or a position is never part of it, so no reshuffle can pair a picture with another one's
caption. What belongs to a picture beside its latent (which part of it was cut out, see `Frame`) follows from
the same sample and cut, and comes with it. Under a key lies a file or, of many pictures, an entry of a shard
(`store`).

Of each sample a few bytes are held, its shape among them; what else is known of it is worked out when it is
asked for, so that a million of them take no more memory than their list does.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import json
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tunekit.config import DataConfig, DreamboothData
from tunekit.data.samples import Sample, sizes_of
from tunekit.data.shapes import CROPS, Transform, bucket_for
from tunekit.data.shares import share_of
from tunekit.data.store import Store, Stores, first_of_each, is_whole, pairs_of, save_tensors
from tunekit.diffusion.batch import Batch, join, single
from tunekit.diffusion.noise import sample_generator, stable_seed
from tunekit.diffusion.objectives import Chance, Objective
from tunekit.errors import DataError, NonFiniteError
from tunekit.families.family import DTYPES, Conditioning, Family, Frame, as_kept
from tunekit.families.prompts import Cut, cuts, tokenizers, told
from tunekit.kept import Kept
from tunekit.progress import Progress, console

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "CachedDataset",
    "Captions",
    "Draws",
    "Encoder",
    "Stream",
    "Work",
    "frame_of",
    "is_whole",
    "save_tensors",
    "together",
]

VERSION = 1
"""Part of every key; to be raised when what is stored under a key changes its meaning."""
RECENT_BYTES = 256 * 2**20
"""Of the encoded files that were used last, so many bytes stay in memory."""

TOGETHER = 4096
"""Where more is to be encoded than so much, it goes into shards: see benchmarks/encode.md."""
PARTS = 2 * CROPS
"""Most cuts of a picture."""
_CHUNK = 8192
"""So many samples are looked at together."""
_ENOUGH = 3
"""Prompts that are cut and shown."""

K_contra = TypeVar("K_contra", contravariant=True)
V_co = TypeVar("V_co", covariant=True)
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
        accelerator: processes that see the folder share the work, see `shares`; each disk gets all of it.
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
        self._visit = captions or self._whole
        self.measured = measured
        self.pipeline = pipeline
        self.stores = Stores(self._say_first)
        self._latents = self.stores.of(cache / "latents")
        self._conditioning = self.stores.of(cache / "conditioning")
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
        self._share = share_of(cache, accelerator)
        if accelerator.is_main_process and self._share.words:
            say(f"cache of encoded pictures: {self._share.words}")

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
        cuts = self._cuts(samples, data, seed=seed, fixed=fixed)
        self._fill(self._pictures(cuts))
        self._fill(self.captions([""], samples))
        return CachedDataset(
            samples,
            Lazily(cuts.frames),
            Lazily(lambda index: [self._latents.path(key) for key in cuts.keys(index)]),
            Lazily(lambda prompt: self._conditioning.path(self._prompt_key(prompt))),
            shapes=cuts.shapes,
            load=self.stores.load,
        )

    def prompts(self, prompts: Iterable[str]) -> dict[str, Path]:
        """Encode prompts, and say what is cut off of those that are too long.

        Returns:
            The file of each; `stores` knows where it lies if not there.
        """
        prompts = list(dict.fromkeys(prompts))
        self._fill(self.captions(prompts))
        return {prompt: self._conditioning.path(self._prompt_key(prompt)) for prompt in prompts}

    def pictures(
        self, samples: Sequence[Sample], data: DataConfig | DreamboothData, *, seed: int, fixed: bool = False
    ) -> Work:
        """What `dataset` encodes of pictures; each is a unit, and each of its cuts a part."""
        return self._pictures(self._cuts(samples, data, seed=seed, fixed=fixed))

    def captions(self, prompts: Sequence[str], samples: Sequence[Sample] = ()) -> Work:
        """What is encoded of prompts and the captions of samples; says which are too long."""
        captions = Captions(prompts, samples, self._prompt_key)
        self._tell_cuts(captions)
        there = self.family.facts.encoders_of(self.pipeline)

        @contextmanager
        def visit() -> Iterator[None]:
            with ExitStack() as stack:
                for part in there:
                    stack.enter_context(self._visit(getattr(self.pipeline, part.name)))
                yield

        return Work(
            "caption",
            self._conditioning,
            len(captions),
            lambda start, stop: ([captions.key(unit)] for unit in range(start, stop)),
            lambda unit, part: self._encode_prompt(captions[unit]),
            visit,
        )

    def encode(self, work: Work, places: Iterable[int], *, together: bool) -> Iterator[int]:
        """Encode parts of some work, whose networks visit the device; gives the bytes of each.

        Args:
            places: see `Work.missing`.
            together: into a shard, which is ended by `Store.close`.
        """
        for number, place in enumerate(places):
            unit, part = divmod(place, PARTS)
            with self.measured(again=not number) if self.measured else nullcontext():
                tensors = work.make(unit, part)
            yield work.store.put(work.keys(unit)[part], tensors, together=together)

    def _cuts(
        self, samples: Sequence[Sample], data: DataConfig | DreamboothData, *, seed: int, fixed: bool
    ) -> Cuts:
        return Cuts(samples, data, self.multiple, seed, not fixed, partial(self._latent_key, data.resolution))

    def _pictures(self, cuts: Cuts) -> Work:
        @contextmanager
        def visit() -> Iterator[None]:
            with self._lowered() as vae, self._whole(vae):
                yield

        def make(unit: int, part: int) -> dict[str, Tensor]:
            return self._encode_picture(cuts.sample(unit), cuts.transforms(unit)[part])

        return Work("picture", self._latents, len(cuts.samples), cuts.each, make, visit)

    def _tell_cuts(self, captions: Captions) -> None:
        """Say how many prompts that have not been told of are too long, and which most."""
        if not self.accelerator.is_main_process:
            return
        readers = tokenizers(self.family.facts, self.pipeline)
        remembers = len(captions) <= TOGETHER
        worst: list[Cut] = []
        asked, found, rest = 0, 0, iter(captions)
        while chunk := list(itertools.islice(rest, _CHUNK)):
            chunk = [prompt for prompt in chunk if prompt not in self._told]
            cut = cuts(readers, chunk)
            asked, found = asked + len(chunk), found + len(cut)
            worst = sorted([*worst, *cut], key=lambda one: -one.tokens)[: _ENOUGH + 1]
            if remembers:
                self._told.update(chunk)
        if worst:
            for line in told(worst, asked, captions.places({one.prompt for one in worst}), found):
                self.say(line)

    def conditioning(self, prompts: Iterable[str]) -> dict[str, Conditioning]:
        """Conditioning of each prompt, without the batch dimension."""
        return {prompt: self.stores.load(file) for prompt, file in self.prompts(prompts).items()}

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

    def _say_first(self, line: str) -> None:
        if self.accelerator.is_main_process:
            self.say(line)

    def _prompt_key(self, prompt: str) -> str:
        return _digest(VERSION, self.family.name, self._text, prompt)

    def _latent_key(self, resolution: int, sample: Sample, transform: Transform) -> str:
        return _digest(
            VERSION,
            self.family.name,
            self._vae,
            sample.id,
            sample.content,
            transform.key(),
            resolution,
            *([str(self._lower)] if self._lower is not None else []),
        )

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

    def _fill(self, work: Work) -> None:
        """Encode what is missing, split over the processes, while the networks visit the device."""
        accelerator, store = self.accelerator, work.store
        share = self._share
        if share.index == 0:
            store.tidy()
        store.refresh()
        missing = work.missing()
        accelerator.wait_for_everyone()  # nobody writes before everyone has looked
        if missing and accelerator.is_main_process:
            self.say(f"encoding {len(missing)} {work.what}{'s' if len(missing) > 1 else ''}")
        in_shards = len(missing) > TOGETHER and os.name == "posix"
        with ExitStack() as stack:
            if missing:
                stack.enter_context(work.visit())
            self._encode(work, share.of(missing), share.count, len(missing), in_shards)
            accelerator.wait_for_everyone()
            if missing and share.count > 1:  # what a network disk does not show yet
                store.refresh()
                self._encode(work, work.still(missing), 1, len(missing), in_shards)
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def _encode(self, work: Work, places: Sequence[int], processes: int, total: int, in_shards: bool) -> None:
        """Encode this process's part of what is missing, and show how far all are."""
        if not places:
            return
        shown = console() if self.accelerator.is_main_process else Progress(quiet=True)
        try:
            with shown.phase(f"encoding {work.what}s", total) as phase:
                for done, _ in enumerate(self.encode(work, places, together=in_shards), start=1):
                    phase.update(min(done * processes, total))
        finally:
            work.store.close()


@dataclass(frozen=True)
class Work:
    """What may have to be encoded, of one kind: so many units, each with a few parts.

    Attributes:
        what: "picture" or "caption".
        store: where it is kept.
        count: units.
        each: start, stop -> the keys of the parts of each unit.
        make: encodes a part of a unit.
        visit: within what it gives, the networks for it are on the device.
    """

    what: str
    store: Store
    count: int
    each: Callable[[int, int], Iterable[Sequence[str]]]
    make: Callable[[int, int], dict[str, Tensor]]
    visit: Callable[[], AbstractContextManager[None]]

    def keys(self, unit: int) -> Sequence[str]:
        """Of the parts of a unit."""
        (keys,) = self.each(unit, unit + 1)
        return keys

    def missing(self, start: int = 0, stop: int | None = None) -> array[int]:
        """Places, unit x PARTS + part, of what the store has not, in the units from `start` to `stop`."""
        found = array("q")
        end = self.count if stop is None else min(stop, self.count)
        for begin in range(start, end, _CHUNK):
            places = {
                key: unit * PARTS + part
                for unit, keys in enumerate(self.each(begin, min(begin + _CHUNK, end)), start=begin)
                for part, key in enumerate(keys)
            }
            found.extend(self._absent(places))
        return found

    def still(self, places: Sequence[int]) -> array[int]:
        """Those of some places that the store has not."""
        found = array("q")
        for begin in range(0, len(places), _CHUNK):
            chunk = places[begin : begin + _CHUNK]
            found.extend(self._absent({self.keys(at // PARTS)[at % PARTS]: at for at in chunk}))
        return found

    def _absent(self, places: Mapping[str, int]) -> list[int]:
        absent = self.store.absent(list(places))
        return [place for place, away in zip(places.values(), absent, strict=True) if away]


class Cuts:
    """How samples are cut, and the keys of what is cut: worked out when it is asked for.

    Args:
        samples: of a source.
        data: reads resolution, buckets, crop and flip.
        multiple: that sizes in pixels are divisible by.
        seed: of random crops.
        augment: whether there are any.
        key: of a sample and how it is cut.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        data: DataConfig | DreamboothData,
        multiple: int,
        seed: int,
        augment: bool,
        key: Callable[[Sample, Transform], str],
    ) -> None:
        self.samples = samples
        # One that is drawn is asked for several times in a row.
        self.sample = lru_cache(maxsize=1024)(samples.__getitem__)
        self.transforms = lru_cache(maxsize=1024)(lambda index: self._transforms(self.sample(index)))
        self.keys = lru_cache(maxsize=1024)(lambda index: self._keys(self.sample(index)))
        self._data, self._seed, self._augment, self._key = data, seed, augment, key
        many = data.buckets if isinstance(data, DataConfig) else False
        self._size = lru_cache(maxsize=2**16)(
            partial(bucket_for, resolution=data.resolution, multiple=multiple, many=many)
        )

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of each sample."""
        sizes, numbers = np.unique(sizes_of(self.samples), axis=0, return_inverse=True)
        shapes = [self._size(width, height)[::-1] for width, height in sizes.tolist()]
        return [shapes[number] for number in numbers.ravel().tolist()]

    def frames(self, index: int) -> list[Frame]:
        """What is cut out of a sample."""
        return [frame_of(self.sample(index), transform) for transform in self.transforms(index)]

    def each(self, start: int, stop: int) -> Iterator[list[str]]:
        """The keys of the latents of some samples."""
        return map(self._keys, self.samples[start:stop])

    def _keys(self, sample: Sample) -> list[str]:
        return [self._key(sample, transform) for transform in self._transforms(sample)]

    def _transforms(self, sample: Sample) -> list[Transform]:
        """The crops and flips of a picture that are cached, see `Transform`."""
        data = self._data
        size = self._size(sample.width, sample.height)
        crops = [Transform(size)]
        if self._augment and data.crop == "random" and sample.width * size[1] != sample.height * size[0]:
            generators = (sample_generator(self._seed, cut, sample.id, "crop") for cut in range(CROPS))
            places = [torch.rand(2, generator=generator) for generator in generators]
            crops = [Transform(size, float(place[0]), float(place[1])) for place in places]
        flips = (False, True) if self._augment and data.flip else (False,)
        return [replace(crop, flip=flip) for crop in crops for flip in flips]


class Captions(Sequence[str]):
    """Prompts, and the captions of samples, each once, in the order in which they come first.

    Args:
        prompts: come first.
        samples: whose captions follow.
        key: of a prompt, 32 hex digits.
    """

    def __init__(self, prompts: Sequence[str], samples: Sequence[Sample], key: Callable[[str], str]) -> None:
        self._prompts, self._samples = prompts, samples
        keys = bytearray()
        for prompt in itertools.chain(prompts, (sample.caption for sample in samples)):
            keys += bytes.fromhex(key(prompt))
        pairs = pairs_of(keys)
        self._places = np.sort(first_of_each(pairs[:, 0], pairs[:, 1]))
        self._pairs = pairs[self._places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, unit: Any) -> Any:
        place = int(self._places[unit])
        count = len(self._prompts)
        return self._prompts[place] if place < count else self._samples[place - count].caption

    def __iter__(self) -> Iterator[str]:
        places = iter(self._places)
        wanted = next(places, None)
        captions = (sample.caption for sample in self._samples)
        for place, prompt in enumerate(itertools.chain(self._prompts, captions)):
            if place == wanted:
                yield prompt
                wanted = next(places, None)

    def key(self, unit: int) -> str:
        """Of a prompt."""
        high, low = self._pairs[unit]
        return f"{int(high):016x}{int(low):016x}"

    def places(self, prompts: set[str]) -> dict[str, str]:
        """Where some of them stand, for messages."""
        return {sample.caption: sample.where for sample in self._samples if sample.caption in prompts}


class Lookup(Protocol[K_contra, V_co]):
    """What has a value for a key."""

    def __getitem__(self, key: K_contra, /) -> V_co:
        """The value."""
        ...


class Lazily(Generic[K_contra, V_co]):
    """Values that are worked out when they are asked for."""

    def __init__(self, make: Callable[[K_contra], V_co]) -> None:
        self._make = make

    def __getitem__(self, key: K_contra, /) -> V_co:
        return self._make(key)


class CachedDataset:
    """Encoded samples on disk; those used last stay in memory.

    Args:
        samples: what was encoded.
        frames: of each sample's variants.
        latents: file of each sample's variants: `moments` [2C, h, w], and what else is kept beside them.
        captions: file of each caption.
        shapes: (height, width) in pixels of each sample, if that is known.
        load: reads a file, or what stands for it.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        frames: Lookup[int, Sequence[Frame]],
        latents: Lookup[int, Sequence[Path]],
        captions: Lookup[str, Path],
        *,
        shapes: Sequence[tuple[int, int]] | None = None,
        load: Callable[[Path], dict[str, Tensor]] | None = None,
    ) -> None:
        self.samples = samples
        self.shapes = [frames[index][0].size for index in range(len(samples))] if shapes is None else shapes
        """(height, width) in pixels of each sample."""
        self._frames = frames
        self._latents = latents
        self._captions = captions
        self._load = _Recent(RECENT_BYTES, load)

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
        sample = self.samples[index]
        name = draws.tag + sample.id

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
        return single(name, rows, self.conditioning("" if dropped else sample.caption))

    def validation(self, objective: Objective, *, timesteps: int, micro_batch: int) -> Iterator[Batch]:
        """Every sample at `timesteps` evenly spread timesteps, with noise that is always the same."""
        rows = (
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
        )
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

    def forwards(self, step: int, processes: int) -> int:
        """Most micro-batches that a process has of a step; nothing is read for it."""
        shapes = [row[0] for row in self._rows(step)]
        most = 0
        for rank in range(processes):
            mine = shapes[_share(len(shapes), rank, processes)]
            counts = (len(list(same)) for _, same in itertools.groupby(mine))
            most = max(most, sum(-(-count // self.micro_batch) for count in counts))
        return most

    def ids(self, step: int) -> list[str]:
        """Ids of all samples of a step, class pictures left out."""
        return [self.dataset.samples[index].id for index, _ in self._positions(self.dataset, "order", step)]

    def _rows(self, step: int) -> list[_Row]:
        """What is drawn for each sample of a step."""
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
        return rows

    def _make(self, step: int, rank: int, processes: int) -> list[Batch]:
        rows = self._rows(step)
        mine = rows[_share(len(rows), rank, processes)]
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

    def _draw_order(self, dataset: CachedDataset, purpose: str, epoch: int) -> Sequence[int]:
        """The permutation of one epoch."""
        generator = torch.Generator().manual_seed(stable_seed(self.seed, epoch, purpose))
        count, size = len(dataset), self.batch_size
        order = torch.randperm(count, generator=generator).numpy()
        numbers: dict[tuple[int, int], int] = {}
        kinds = np.fromiter(
            (numbers.setdefault(shape, len(numbers)) for shape in dataset.shapes), np.int32, count
        )[order]
        present, first = np.unique(kinds, return_index=True)
        groups = [order[kinds == kind] for kind in present[np.argsort(first)]]  # as they come in the order
        cuts = [len(group) // size * size for group in groups]
        whole = np.concatenate(
            [group[:cut].reshape(-1, size) for group, cut in zip(groups, cuts, strict=True)]
        )
        rest = np.concatenate([group[cut:] for group, cut in zip(groups, cuts, strict=True)])
        chunks = whole[torch.randperm(len(whole), generator=generator).numpy()].ravel()
        lead = -epoch * count % size  # the last step of the epoch before still takes so many
        return array("q", np.concatenate([rest[:lead], chunks, rest[lead:]]).astype(np.int64).tobytes())


_Row = tuple[tuple[int, int], CachedDataset, int, int, float, Draws]
"""(width, height) of the latent or picture, what it is of, index, epoch, weight, how it is drawn."""


def _share(count: int, rank: int, processes: int) -> slice:
    """What of so many rows is a process's."""
    return slice(count * rank // processes, count * (rank + 1) // processes)


def together(rows: Iterable[Batch], most: int) -> Iterator[Batch]:
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

    def __init__(self, most: int, load: Callable[[Path], dict[str, Tensor]] | None = None) -> None:
        self.most = most
        self._read = load or Stores().load
        self.held = 0
        self._files: OrderedDict[Path, dict[str, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, path: Path) -> dict[str, Tensor]:
        with self._lock:
            if path in self._files:
                self._files.move_to_end(path)
                return self._files[path]
        content = self._read(path)
        with self._lock:
            if path not in self._files:
                self._files[path] = content
                self.held += _bytes(content)
            while self.held > self.most and len(self._files) > 1:
                self.held -= _bytes(self._files.popitem(last=False)[1])
        return content


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


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
