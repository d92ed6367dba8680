"""Where files lie: the recipes, configs, model and pictures that come with tunekit, and its cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tunekit.errors import ModelError, did_you_mean

PACKAGE = Path(__file__).resolve().parent
ASSETS = PACKAGE / "assets"


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and how it is opened.

    Attributes:
        name: folder, hub id, single weights file, "builtin/..." or "tiny".
        revision: branch, tag or commit of a hub id.
        variant: of the weight files, such as "fp16".
        allow_pickle: open .bin and .ckpt files, and then nothing in them but weights.
        base: folder or hub id that the other components come from, where `name` has some of them only.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    allow_pickle: bool = False
    base: str | None = None

    @classmethod
    def of(cls, source: Source | str | Path) -> Source:
        """The source itself, or one that is a name alone."""
        return source if isinstance(source, Source) else cls(str(source))

    @property
    def is_special(self) -> bool:
        """Whether the name alone does not open it."""
        return replace(self, name="") != Source("")

    @property
    def rest(self) -> Source | None:
        """Where the components come from that are not in the source itself; None where nothing is said."""
        return replace(self, name=self.base, base=None) if self.base is not None else None

    @property
    def idle(self) -> list[str]:
        """What was asked for and has no effect on a source that is on this machine, with the reason."""
        if self.rest is not None:
            return self.rest.idle  # it is what has revisions and variants
        path = self.path
        if path is None:
            return []
        found = []
        if self.revision is not None:
            found.append(f"revision={self.revision} has no effect: {self.name} is not on the hub, but here")
        if self.variant is not None and not path.is_dir():
            found.append(f"variant={self.variant} has no effect: {self.name} is no folder with several")
        return found

    @property
    def path(self) -> Path | None:
        """The folder or file, if it is on this machine."""
        path = resolve_path(self.name)
        return path if path.exists() else None

    def __str__(self) -> str:
        return self.name


def _shipped(name: str) -> Path:
    """The folder inside an installed wheel (`_recipes`), or its original in a checkout (`../recipes`)."""
    packed = PACKAGE / f"_{name}"
    return packed if packed.is_dir() else PACKAGE.parent / name


def recipes_dir() -> Path:
    """The folder of the recipes."""
    return _shipped("recipes")


def configs_dir() -> Path:
    """The folder of the ready-made configs."""
    return _shipped("configs")


def sweeps_dir() -> Path:
    """The folder of the ready-made sweeps."""
    return _shipped("sweeps")


def sweep_names() -> list[str]:
    """The ready-made sweeps, as `tunekit sweep` takes them: "rank"."""
    return sorted(path.stem for path in sweeps_dir().glob("*.yaml"))


def builtin_names() -> list[str]:
    """The bundled models and picture folders, as "builtin/..." names."""
    # A model is a folder with model_index.json; `pictures/` holds one folder per set.
    folders = [path.parent for path in ASSETS.glob("*/model_index.json")]
    folders += [path for path in ASSETS.glob("pictures/*") if path.is_dir()]
    return sorted(f"builtin/{path.relative_to(ASSETS).as_posix()}" for path in folders)


def builtin(source: str) -> Path | None:
    """Resolves a "builtin/..." name; None for any other text.

    Raises:
        ModelError: when nothing of that name is bundled.
    """
    if not source.startswith("builtin/"):
        return None
    path = (ASSETS / source.removeprefix("builtin/")).resolve()
    if path.exists() and path != ASSETS and path.is_relative_to(ASSETS):
        return path
    names = builtin_names()
    hint = did_you_mean(source, names) or f"bundled: {', '.join(names) or 'nothing'}"
    raise ModelError(f'nothing is bundled under the name "{source}"', hint=hint)


def cache_dir() -> Path | None:
    """Where plans, traces and engines are kept between calls: `tunekit` in the user's cache folder.

    None for a user without a home. It need not be there, nor be a place that can be written.
    """
    from platformdirs import user_cache_path

    try:
        path = user_cache_path("tunekit", appauthor=False)
    except RuntimeError:  # older versions leave "~" as it is instead
        return None
    return path if path.is_absolute() else None


def expand(text: str | Path) -> Path:
    """A path as the user wrote it, with `~` expanded where there is such a home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def resolve_path(text: str) -> Path:
    """A path as the user wrote it (`~` expanded), or the place of a "builtin/..." name."""
    return builtin(text) or expand(text)
