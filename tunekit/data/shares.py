"""How the processes of a run split work whose results go into a folder: by who sees the same folder.

Several machines may share a disk or have one each, and containers on one machine may have either. Nobody has
to say which it is: each process leaves a file there and looks for those of all others.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tunekit.errors import output_errors

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """This process's share of the work for a folder.

    Attributes:
        index: its place among the processes that see the folder as it does.
        count: how many these are.
        folders: how many folders of that name the run has, on disks of their own.
    """

    index: int = 0
    count: int = 1
    folders: int = 1

    def of(self, work: Sequence[T]) -> Sequence[T]:
        """What this process does of it."""
        return work[self.index :: self.count]

    @property
    def words(self) -> str:
        """What to say of it; "" where there is one folder, as one expects."""
        return f"it is on {self.folders} disks, each of which gets all of it" if self.folders > 1 else ""


def share_of(folder: Path, accelerator: Accelerator) -> Share:
    """Finds out who sees `folder`; all processes call it at once.

    Raises:
        OutputError: it cannot be written.
    """
    if accelerator.num_processes == 1:
        return Share()
    from accelerate.utils import broadcast_object_list, gather_object

    rank, token = accelerator.process_index, [uuid.uuid4().hex]
    broadcast_object_list(token)
    # Names that nobody has asked for before: a network disk may remember that a file was not there.
    files = [folder / f".seen-{token[0]}-{other}" for other in range(accelerator.num_processes)]
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files[rank].touch()
    try:
        accelerator.wait_for_everyone()
        seen = tuple(other for other, file in enumerate(files) if file.exists())
        everyone: list[Any] = gather_object([(rank, seen)])  # and all have looked
    finally:
        with suppress(OSError):
            files[rank].unlink()
    mine = [other for other, known in everyone if known == seen]
    return Share(mine.index(rank), len(mine), len({known for _, known in everyone}))
