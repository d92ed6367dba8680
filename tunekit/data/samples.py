"""A picture with its caption, and many of them of which not all are in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tunekit.data.decoding import decode


@dataclass(frozen=True)
class Sample:
    """One picture with its caption. The pixels are read again when needed, never kept."""

    id: str
    """What draws and cache keys use: it follows from the source, never from a position in it. A path relative
    to the data folder, the name of a member of a shard, or what a row says (`Indexed`)."""
    caption: str
    width: int
    """After EXIF orientation."""
    height: int
    content: str
    """Hash of the decoded RGB pixels; in rows and shards, not decoded to be listed, of the bytes."""
    where: str
    """For messages: the file, or `path[row]`, or `shard.tar:member`."""
    read: Callable[[], bytes] = field(repr=False, compare=False)

    def open(self) -> Image.Image:
        """The upright RGB picture."""
        return decode(self.read())


class Indexed(Sequence[Sample]):
    """Samples on disk, in the order of their source; in memory are 16 bytes of each, and no object.

    `samples[i]` and iteration make `Sample`s that nobody keeps. Threads may share one, and it can be pickled:
    another process, or a machine that sees the same files, opens the same.
    """

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Indexed: ...
    @abstractmethod
    def __getitem__(self, index: int | slice) -> Sample | Indexed: ...

    @property
    @abstractmethod
    def sizes(self) -> NDArray[np.int32]:
        """[n, 2]: width and height of each in pixels, upright."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Hash of all ids, contents and captions, in their order; which file holds which does not matter."""

    @abstractmethod
    def take(self, positions: NDArray[np.int64]) -> Indexed:
        """Those at some positions, in that order."""

    @abstractmethod
    def contents(self) -> NDArray[np.uint64]:
        """[n, 2]: the hash of the bytes of each."""

    @abstractmethod
    def ranks(self) -> NDArray[np.uint64]:
        """[n, 2]: the first 16 bytes of the hash of each id, by which pictures are held out."""

    @abstractmethod
    def hashes(self) -> dict[str, list[str]]:
        """File -> hash of its contents, hash of its captions."""


def sizes_of(samples: Sequence[Sample]) -> NDArray[np.int32]:
    """[n, 2]: width and height of each in pixels, upright."""
    if isinstance(samples, Indexed):
        return samples.sizes
    return np.array([(sample.width, sample.height) for sample in samples], np.int32).reshape(-1, 2)
