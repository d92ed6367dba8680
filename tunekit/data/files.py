"""What lies in a folder of pictures with captions beside them; nothing is left out without a word."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.data.decoding import FOREIGN, SUFFIXES, remedy
from tunekit.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from tunekit.data.index import Source

SHARD = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PICTURE_BYTES = 2**29
CAPTION_BYTES = 2**20
"""Most that is read of one file; what is larger is no picture or caption but a mistake."""
SPLITS = frozenset({"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"})
_RUN = (".lock", "metrics.jsonl", "checkpoints", "previews", "chain.json", "adapter", "model")
"""One of these beside a config.yaml, and the folder is a run's."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with one picture, and what to change.

    Attributes:
        where: the file, or `file:line`, or `file[row]`.
        kind: what problems of its kind share, with the remedy where `fix` is one file's; else it is `what`.
        count: how many of its kind it stands for; one that stands for several is not listed by itself.
    """

    where: str
    what: str
    fix: str
    kind: str = ""
    count: int = 1

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}"


@dataclass(frozen=True)
class Ignored:
    """Something that lies there and is not used.

    Attributes:
        where: of it.
        why: in words for several of its kind: "pictures of another split".
        fix: what uses it.
        count: how many files it stands for.
    """

    where: str
    why: str
    fix: str = ""
    count: int = 1


@dataclass(frozen=True)
class Raw:
    """A picture before anyone looked at it.

    Attributes:
        id: see `Sample.id`.
        file: that it is read from.
        foreign: where it is a picture of a kind that is not known to be readable: what to do if it is not.
    """

    id: str
    where: str
    read: Callable[[], bytes]
    caption: str = ""
    problem: Problem | None = None
    file: Path | None = None
    foreign: str = ""


@dataclass
class Listing:
    """What one source has.

    Attributes:
        notes: what else is to be said of it.
        source: has the pictures, where they are too many for a list; then `raw` is empty.
    """

    raw: list[Raw] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    ignored: list[Ignored] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source: Source | None = None


def shown(path: Path | str) -> str:
    """A path as text that can be printed, whatever bytes its name has."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # from a metadata file, and no name at all
        return str(path).encode("utf-8", "backslashreplace").decode()


def read_file(path: Path, most: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: it is none, or larger than `most` bytes, or cannot be read; its text says which.
    """
    check_regular(path)
    # A pipe that has taken the file's place by now must not hold us up.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:  # noqa: PTH123
        found = os.fstat(file.fileno())
        _regular(found)
        if found.st_size > most:
            raise OSError(f"it has {found.st_size:,} bytes, and {most:,} are the most")
        return file.read(most)


def check_regular(path: Path) -> None:
    """Raise an OSError that says what a path is, if it is no regular file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise OSError(f"it is a link to {shown(path.readlink())}, where nothing is") from None
        raise
    _regular(found)


def _regular(found: os.stat_result) -> None:
    kinds = {stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket"}
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"it is a {kinds.get(stat.S_IFMT(found.st_mode), 'folder')}, not a file")


def why_not(error: OSError) -> str:
    """What an OSError says, without the path, which stands beside it."""
    return error.strerror or str(error) or type(error).__name__


def unreadable(path: Path, error: OSError) -> Problem:
    """The problem of a file or folder that cannot be read."""
    return Problem(
        shown(path), f"cannot be read ({why_not(error)})", "make it readable, or remove it", "cannot be read"
    )


# Folders ----------------------------------------------------------------------------------------------------


@dataclass
class Tree:
    """All files below a folder, links followed, hidden ones left out.

    Attributes:
        pictures: by their suffix, in the order of their paths.
        texts: folder -> stem -> file, of .txt files.
        metadata, parquet, shards, others: further files; shards are tar files, compressed ones too.
        problems: folders that cannot be read.
        ignored: what was not gone into, and why.
    """

    root: Path
    pictures: list[Path] = field(default_factory=list)
    texts: dict[Path, dict[str, Path]] = field(default_factory=dict)
    metadata: list[Path] = field(default_factory=list)
    parquet: list[Path] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    ignored: list[Ignored] = field(default_factory=list)

    def id_of(self, file: Path) -> str:
        """A file's path relative to the folder."""
        return file.relative_to(self.root).as_posix()

    def text_of(self, picture: Path) -> Path | None:
        """The text file of a picture's name, be its accents composed (NFC) or not (NFD, as on a Mac)."""
        beside = self.texts.get(picture.parent, {})
        return beside.get(picture.stem) or beside.get(same_name(picture.stem))

    def orphans(self) -> list[Path]:
        """Text files without a picture of their name."""
        used = {self.text_of(picture) for picture in self.pictures}
        return sorted({file for beside in self.texts.values() for file in beside.values()} - used)


def walk(root: Path) -> Tree:
    """Look through a folder. Links to folders are followed, each folder is gone into once."""
    tree = Tree(root)
    waiting, links = [root], list[Path]()
    seen: set[tuple[int, int]] = set()
    while waiting or links:
        # Links last: what can be reached without one has the path that it has always had.
        folder = waiting.pop() if waiting else links.pop(0)
        try:
            found = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            tree.problems.append(unreadable(folder, error))
            continue
        if (found.st_dev, found.st_ino) in seen:
            tree.ignored.append(Ignored(shown(folder), "links to folders that are read anyway"))
            continue
        seen.add((found.st_dev, found.st_ino))
        names = {entry.name for entry in entries}
        if folder != root and "config.yaml" in names and names & {*_RUN}:
            tree.ignored.append(Ignored(shown(folder), "folders of runs, whose pictures tunekit has drawn"))
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                _hidden(tree, path)
            elif _is_dir(entry):
                (links if entry.is_symlink() else waiting).append(path)
            else:
                _file(tree, path)
        links.sort()
    tree.pictures.sort()
    tree.metadata.sort()
    tree.parquet.sort()
    tree.shards.sort()
    return tree


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _file(tree: Tree, path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or suffix in FOREIGN:
        tree.pictures.append(path)
    elif suffix == ".txt":
        beside = tree.texts.setdefault(path.parent, {})
        beside[path.stem] = path
        beside.setdefault(same_name(path.stem), path)
    elif path.name in METADATA:
        tree.metadata.append(path)
    elif suffix == ".parquet":
        tree.parquet.append(path)
    elif path.name.lower().endswith((SHARD, *COMPRESSED)):
        tree.shards.append(path)
    else:
        tree.others.append(path)


def _hidden(tree: Tree, path: Path) -> None:
    """Hidden pictures are worth a word; other hidden files belong to some program."""
    count = 0
    try:
        if path.is_dir():
            count = sum(item.suffix.lower() in SUFFIXES for item in path.iterdir())
        elif not path.name.startswith("._"):  # what a Mac keeps beside a file
            count = path.suffix.lower() in SUFFIXES
    except OSError:
        pass
    if count:
        tree.ignored.append(Ignored(shown(path), "hidden pictures", count=count))


def same_name(name: str) -> str:
    """A name as it is compared: accents composed."""
    return unicodedata.normalize("NFC", name)


def in_split(tree: Tree, split: str) -> Tree:
    """The part of a folder that `data.split` names, where its sub-folders are splits and nothing else.

    Raises:
        DataError: there is none of that name.
    """
    groups = (
        tree.pictures,
        tree.metadata,
        [file for texts in tree.texts.values() for file in texts.values()],
    )
    parts = [file.relative_to(tree.root).parts for group in groups for file in group]
    tops = {found[0] for found in parts if len(found) > 1}
    if not tops or any(len(found) == 1 and _picks(found[0]) for found in parts) or not tops <= SPLITS:
        return tree
    if len(tops) == 1 and (split in tops or split == "train"):
        return tree
    if split not in tops:
        raise no_split(split, tops)
    own = tree.root / split

    def mine(files: Iterable[Path]) -> list[Path]:
        return [file for file in files if file.is_relative_to(own)]

    others = [
        Ignored(
            shown(tree.root / top),
            "pictures of another split",
            f"data.split={top} reads it",
            sum(file.is_relative_to(tree.root / top) for file in tree.pictures),
        )
        for top in sorted(tops - {split})
    ]
    return Tree(
        tree.root,
        mine(tree.pictures),
        {folder: texts for folder, texts in tree.texts.items() if folder.is_relative_to(own)},
        mine(tree.metadata),
        mine(tree.parquet),
        mine(tree.shards),
        mine(tree.others),
        tree.problems,
        [*tree.ignored, *others],
    )


def no_split(split: str, known: Iterable[str]) -> DataError:
    """The error where `data.split` names none of those that are there."""
    there = sorted(known)
    message = f"data.split is {split!r}, and there {'is' if len(there) == 1 else 'are'} {', '.join(there)}"
    return DataError(message, hint=f"set data.split={there[0]}")


def _picks(name: str) -> bool:
    """Whether a file at the top makes a folder one data set: a picture, or a metadata file."""
    return name in METADATA or Path(name).suffix.lower() in {*SUFFIXES, *FOREIGN}


def picture_of(tree: Tree, picture: Path, caption: str = "", problem: Problem | None = None) -> Raw:
    """A picture file of a folder."""
    return Raw(
        tree.id_of(picture),
        shown(picture),
        partial(read_file, picture, PICTURE_BYTES),
        caption,
        problem,
        picture,
        remedy(picture.suffix.lower()),
    )


def captioned(tree: Tree, pictures: Sequence[Path], *, needs_caption: bool) -> list[Raw]:
    """Picture files with the text beside each."""
    found = []
    for picture in pictures:
        caption, problem = _caption(tree, picture) if needs_caption else ("", None)
        found.append(picture_of(tree, picture, caption, problem))
    return found


_NO_CAPTION = "no caption; write what each picture shows into a .txt file of its name"


def _caption(tree: Tree, picture: Path) -> tuple[str, Problem | None]:
    """Text beside a picture."""
    file = tree.text_of(picture)
    if file is None:
        wanted = shown(picture.with_suffix(".txt").name)
        others = (f"{picture.stem}.caption", f"{picture.name}.txt")
        near = [name for name in others if (picture.parent / name).exists()]
        fix = f"rename {shown(near[0])} to {wanted}" if near else f"write what it shows into {wanted}"
        return "", Problem(shown(picture), f"no caption: {wanted} is missing", fix, _NO_CAPTION)
    try:
        data = read_file(file, CAPTION_BYTES)
    except OSError as error:
        return "", unreadable(file, error)
    try:
        text = " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        what = f"not UTF-8 (byte {error.start})"
        return "", Problem(shown(file), what, "save it as UTF-8", "not UTF-8")
    if not text:
        return "", Problem(shown(file), "the caption is empty", "write what the picture shows into it")
    return text, None


def unused(tree: Tree, others: Collection[Path] = (), why: str = "", fix: str = "") -> list[Ignored]:
    """Files of a folder that nobody reads.

    Args:
        others: pictures whose captions do not come from the text beside them.
        why, fix: of those, see `Ignored`.
    """
    found = list(tree.ignored)
    beside = {text for picture in others if (text := tree.text_of(picture)) is not None}
    found += [Ignored(shown(file), why, fix) for file in sorted(beside)]
    found += [Ignored(shown(file), "texts without a picture of their name") for file in tree.orphans()]
    for file in (*tree.others, *tree.parquet, *tree.shards):
        broken = file.is_symlink() and not file.exists()
        found.append(Ignored(shown(file), "links to nothing" if broken else "files of other kinds"))
    return found


# Words ------------------------------------------------------------------------------------------------------

_NAMED = 3


def told(path: str, ignored: Sequence[Ignored], used: int) -> list[str]:
    """How many are used and ignored, and a line for each reason; nothing where nothing is ignored."""
    if not ignored:
        return []
    groups: dict[tuple[str, str], list[Ignored]] = {}
    for item in ignored:
        groups.setdefault((item.why, item.fix), []).append(item)
    lines = [f"{path}: {used:,} used, {sum(item.count for item in ignored):,} ignored:"]
    for (why, fix), items in groups.items():
        names = ", ".join(item.where for item in items[:_NAMED]) + (", ..." if len(items) > _NAMED else "")
        count = sum(item.count for item in items)
        lines.append(f"  {why} ({count:,}): {names}" + (f"; {fix}" if fix else ""))
    return lines


def nearest(place: Path) -> str:
    """What a folder that is not there may have meant."""
    try:
        siblings = [shown(item.name) for item in place.parent.iterdir()]
    except OSError:
        return ""
    return did_you_mean(place.name, siblings)
