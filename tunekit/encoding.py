"""What one process encodes of a config's pictures and captions, ahead of its training.

    python -m tunekit.encoding          # reads calls from stdin, a JSON line each; see `leases`

    {"do": "settle", "with": ["mine.yaml", ["data.path=photos"], 1]}
    {"do": "open", "with": ["fp32"]}
    {"do": "encode", "with": [0, 64, 96, 0]}
    {"do": "close", "with": []}

Each call has an answer, `{"value": ...}`, or `{"error": {...}}` with what a TunekitError says. The text
encoders and the VAE of the base are opened, nothing else of it. What is encoded, under which keys, is
`data.cache.Encoder`'s, so that the training finds it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from tunekit import hardware, preconditions
from tunekit.config import DataConfig, DreamboothData, Loaded, TrainingRunConfig, load
from tunekit.errors import ConfigError, TunekitError, from_outside
from tunekit.launch import die_with_parent
from tunekit.progress import console
from tunekit.quiet import quiet_libraries, steady_streams

if TYPE_CHECKING:
    from tunekit.data.cache import Encoder, Work
    from tunekit.data.images import Sample, Scan

CALLS = ("settle", "open", "encode", "close")


def training_config(loaded: Loaded) -> TrainingRunConfig:
    """The config, if it is one whose pictures can be encoded.

    Raises:
        ConfigError: it trains nothing.
    """
    config = loaded.config
    data = getattr(config, "data", None)
    if not isinstance(config, TrainingRunConfig) or not isinstance(data, DataConfig | DreamboothData):
        raise ConfigError(
            f"the recipe {config.recipe} trains on no pictures, so there is nothing to encode",
            where=loaded.where("recipe"),
        )
    return config


class Encoding:
    """The part of one process; its answers are JSON."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._lines: list[str] = []
        self._visited: int | None = None
        self._looks = 0

    def settle(self, file: str, overrides: Sequence[str], sharers: int) -> dict[str, Any]:
        """Look at the config, the base and the pictures, and plan how they are encoded on this device.

        Args:
            file: the config.
            overrides: `a.b=c`.
            sharers: processes on this device.

        Raises:
            TunekitError: something is wrong with them, as `tunekit check` would say.
        """
        from tunekit import planning

        loaded = load(file, overrides)
        found = preconditions.look(loaded, checks=preconditions.ENCODING)
        found.check()
        assert found.scan is not None
        self._scan: Scan = found.scan
        self._config = planning.settle_encoding(training_config(loaded), sharers=sharers)
        self._lines += found.notes
        return {"precision": self._config.memory.encode_precision or "fp32"}

    def open(self, precision: str) -> dict[str, Any]:
        """Open what encodes.

        Args:
            precision: of the VAE's arithmetic, the same one everywhere.

        Returns:
            `works`: what there is to encode, in order, [what, units] each; `sees`: a hash that all processes
            must agree on; `lines`: for people.

        Raises:
            TunekitError: the base cannot be opened.
        """
        import torch
        from accelerate import Accelerator

        from tunekit import families
        from tunekit.data.cache import Encoder
        from tunekit.families.loading import source_files
        from tunekit.networks import visiting

        config, memory = self._config, self._config.memory
        family, device = families.get(config.model.family), hardware.probe(config.memory.device)
        facts = family.facts
        only = [facts.vae.name, *(part.name for part in facts.encoders)]
        pipeline = family.load(config.model.opened, facts.dtypes(torch.float32), only=only)
        if device.torch_device.startswith("cuda"):
            torch.cuda.set_device(device.index)
        self._accelerator = Accelerator(cpu=device.kind == "cpu")
        layers, on_host = bool(memory.encode_by_layer), bool(memory.encode_on_host)
        self._encoder: Encoder = Encoder(
            family,
            pipeline,
            cache=config.cache_dir,
            accelerator=self._accelerator,
            captions=partial(visiting, device=self._accelerator.device, layers=layers, on_host=on_host),
            precision=precision,
            files=source_files(config.model.opened, facts),
            say=self._lines.append,
        )
        self._works = self._all()
        for work in self._works:
            work.store.refresh()
        lines, self._lines = self._lines, []
        return {
            "works": [[work.what, work.count] for work in self._works],
            "sees": self._seen(),
            "lines": lines,
        }

    def encode(self, number: int, start: int, stop: int, looks: int) -> dict[str, int]:
        """Encode what is missing of some units.

        Args:
            number: of the work.
            start: the first of them.
            stop: behind the last.
            looks: where it has grown, what processes have left that are gone is looked at first.

        Returns:
            `made`, `there`: how many parts; `bytes` of those that were made.

        Raises:
            TunekitError: see `data.cache.Encoder.dataset`; what was encoded stays.
        """
        work = self._works[number]
        if looks != self._looks:
            self._looks = looks
            for other in self._works:
                other.store.refresh()
        parts = sum(map(len, work.each(start, min(stop, work.count))))
        missing = work.missing(start, stop)
        if missing and self._visited != number:
            self._stack.close()
            hardware.forget()  # what others left on the device
            self._stack.enter_context(work.visit())
            self._visited = number
        size = sum(self._encoder.encode(work, missing, together=True))
        return {"made": len(missing), "there": parts - len(missing), "bytes": size}

    def close(self) -> dict[str, Any]:
        """End the shards.

        Raises:
            OutputError: they cannot be written to; their entries stay.
        """
        self._stack.close()
        self._visited = None
        for work in self._works:
            work.store.close()
        return {}

    def _all(self) -> list[Work]:
        """All that the training will ask for, the pictures first."""
        from tunekit.training.run import sampling_of

        config, scan, encoder = self._config, self._scan, self._encoder
        data: Any = config.data  # type: ignore[attr-defined]  # each training recipe declares its own
        groups: list[tuple[Sequence[Sample], bool]] = [(scan.samples, False), (scan.held_out, True)]
        if isinstance(data, DreamboothData) and data.class_prompt is not None:
            prior = scan.prior[: data.class_pictures]
            groups.append((prior, False))
            if lacking := data.class_pictures - len(prior):
                self._lines.append(f"{lacking} class pictures are drawn, and encoded, by the training")
        works = [
            encoder.pictures(samples, data, seed=config.seed, fixed=fixed)
            for samples, fixed in groups
            if len(samples)
        ]
        captioned = [sample for samples, _ in groups[1:] for sample in samples]
        prompts = ["", *config.preview.prompts, sampling_of(config).negative_prompt or ""]
        own = list(dict.fromkeys([*prompts, *(sample.caption for sample in captioned)]))
        return [*works, encoder.captions(own, scan.samples)]

    def _seen(self) -> str:
        """A hash of the keys of first, last and some parts between, and of how many there are."""
        digest = hashlib.blake2b(digest_size=16)
        for work in self._works:
            digest.update(f"{work.what} {work.count}".encode())
            step = max(1, work.count // 1000)
            for unit in {*range(0, work.count, step), work.count - 1}:
                digest.update("".join(work.keys(unit)).encode())
        return digest.hexdigest()


def answer(share: Encoding, call: dict[str, Any]) -> dict[str, Any]:
    """What a call comes to."""
    try:
        if call["do"] not in CALLS:
            raise TunekitError(f"there is no call {call['do']}")
        return {"value": getattr(share, call["do"])(*call["with"])}
    except Exception as error:
        told = error if isinstance(error, TunekitError) else from_outside(error)
        if told is None:
            traceback.print_exc()
            told = TunekitError(f"{type(error).__name__}: {error}")
        names = ("message", "where", "hint", "key")
        return {"error": {"kind": type(told).__name__, **{name: getattr(told, name) for name in names}}}


def serve(calls: TextIO, answers: TextIO) -> None:
    """Answers calls until there are no more."""
    share = Encoding()
    for line in calls:
        print(json.dumps(answer(share, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    die_with_parent()
    quiet_libraries()
    steady_streams()
    console().quiet = True
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    serve(sys.stdin, own)
