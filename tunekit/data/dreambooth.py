"""Class pictures for prior preservation, drawn by the base model before training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.artifacts import clean_leftovers
from tunekit.config import CLASS_BATCH, DreamboothData, ModelConfig, SamplingConfig
from tunekit.data.files import walk
from tunekit.data.images import Sample, Scan, scan_data
from tunekit.data.shares import share_of
from tunekit.diffusion.noise import stable_seed
from tunekit.errors import output_errors
from tunekit.files import atomic_file
from tunekit.resources import resolve_path

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

GROUP = CLASS_BATCH
"""Class pictures drawn together; fixed, so that none depends on which others were there already."""

_DRAWN = "drawn-"

Draw = Callable[..., "list[Image.Image]"]
"""`draw(seeds=[1, 2])` gives one picture of the class per seed."""


def class_folder(data: DreamboothData, run_dir: Path, *, model: ModelConfig, seed: int) -> Path:
    """Where they are: `data.class_path`, or a folder in the run named after everything they depend on."""
    if data.class_path is not None:
        return resolve_path(data.class_path)
    drawn = (
        data.class_prompt,
        data.class_steps,
        data.class_guidance,
        data.resolution,
        model.model_dump(),
        seed,
    )
    return run_dir / f"class-{hashlib.blake2b(json.dumps(drawn).encode(), digest_size=4).hexdigest()}"


def class_sampling(data: DreamboothData) -> SamplingConfig:
    """How class pictures are drawn."""
    side = data.resolution
    return SamplingConfig(
        steps=data.class_steps, guidance=data.class_guidance, height=side, width=side, negative_prompt=""
    )


def class_pictures(
    data: DreamboothData,
    folder: Path,
    drawing: Callable[[], Draw],
    *,
    seed: int,
    accelerator: Accelerator,
    say: Callable[[str], None] = print,
) -> list[Sample]:
    """The class pictures, those that are missing drawn first.

    Args:
        data: reads class_prompt and class_pictures.
        folder: see `class_folder`.
        drawing: gets the base model ready to draw; called only if pictures are missing.
        seed: of the run; the seed of each picture follows from it.
        accelerator: processes that see the folder share the work, see `shares`; each disk gets all of it,
            from the same seeds.
        say: takes progress lines (main process only).

    Raises:
        DataError: something is wrong with the pictures found.
        OutputError: a picture cannot be written.
    """
    found: list[Sample] = []
    if folder.is_dir() and walk(folder).pictures:
        there = _scan(data, folder)
        there.check()
        found = own_pictures(there.samples)
    accelerator.wait_for_everyone()  # nobody writes before everyone has counted
    wanted = [folder / f"{_DRAWN}{index:04d}.png" for index in range(data.class_pictures - len(found))]
    groups = _missing(wanted)
    share = share_of(folder, accelerator)
    draw: Draw | None = None

    def fill(mine: list[int], of: int) -> Draw | None:
        """Draw groups of pictures."""
        drawer = draw
        for done, group in enumerate(mine, start=1):
            drawer = drawer or drawing()
            indices = range(group * GROUP, min(len(wanted), (group + 1) * GROUP))
            drawn = drawer(seeds=[stable_seed(seed, "class picture", index) for index in indices])
            for index, picture in zip(indices, drawn, strict=True):
                _write(wanted[index], picture)
            if accelerator.is_main_process:
                say(f"class pictures: {min(done * of * GROUP, len(wanted))}/{len(wanted)}")
        return drawer

    if groups and accelerator.is_main_process:
        say(f"drawing {sum(not path.exists() for path in wanted)} class pictures of {data.class_prompt!r}")
        if share.words:
            say(f"folder of class pictures: {share.words}")
    if groups and share.index == 0:
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        clean_leftovers(folder)
    accelerator.wait_for_everyone()
    draw = fill(list(share.of(groups)), share.count)
    accelerator.wait_for_everyone()
    if share.index == 0:  # what a network disk did not show, or what had been missing elsewhere only
        fill(_missing(wanted), 1)
    accelerator.wait_for_everyone()
    scan = _scan(data, folder)
    scan.check()
    return list(scan.samples[: data.class_pictures])


def _missing(wanted: list[Path]) -> list[int]:
    """The groups in which a picture is missing on this disk."""
    return sorted({index // GROUP for index, path in enumerate(wanted) if not path.exists()})


def _scan(data: DreamboothData, folder: Path) -> Scan:
    found = data.model_copy(
        update={"path": str(folder), "instance_prompt": data.class_prompt, "class_path": None}
    )
    return scan_data(found)


def own_pictures(samples: Sequence[Sample]) -> list[Sample]:
    """Those of the class pictures in a folder that were not drawn into it."""
    return [sample for sample in samples if not Path(sample.id).name.startswith(_DRAWN)]


def _write(path: Path, picture: Image.Image) -> None:
    with atomic_file(path) as temporary:
        picture.save(temporary, format="PNG")
