"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _configs(incomplete: str) -> list[str]:
    """For completion: ready-made configs, files and folders."""
    from tunekit.config import config_names

    here = Path(incomplete).parent
    near = [path.as_posix() + "/" * path.is_dir() for path in sorted(here.glob("*")) if path.is_dir()]
    near += [path.as_posix() for pattern in ("*.yaml", "*.yml") for path in sorted(here.glob(pattern))]
    return [name for name in [*near, *config_names()] if name.startswith(incomplete)]


Config = Annotated[
    str,
    typer.Argument(
        help="YAML file, or the name of a ready-made config (tunekit ls)", autocompletion=_configs
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="a.b=c ...", help="values that replace the config's")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Steps = Annotated[int | None, typer.Option(min=1, help="sampling steps; default: the model's own")]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="classifier-free guidance; default: the model's own")
]
Side = Annotated[int | None, typer.Option(help="pixels; default: the model's own")]
Runs = Annotated[Path, typer.Option("--runs", help="folder of all runs")]
ModelBase = Annotated[
    str | None,
    typer.Option(help="folder or hub id with what a single file of a transformer or U-Net alone lacks"),
]
Variant = Annotated[
    str | None, typer.Option(help="of the weight files of a folder or a hub id, such as fp16")
]
AtOnce = Annotated[
    str,
    typer.Option(
        metavar="N|auto", help="runs at once on each device; auto: as many as their plans allow in memory"
    ),
]
Devices = Annotated[
    str | None, typer.Option(metavar="D,D,...", help="cpu, cuda:0, ...; default: all cards, or the CPU")
]
Cluster = Annotated[
    str | None,
    typer.Option(metavar="auto|HOST:PORT", help="Ray cluster to run on; auto starts one if none runs"),
]


def not_both(cluster: str | None, devices: str | None) -> None:
    """Refuses `--devices` beside `--cluster`.

    Raises:
        ConfigError: both are given.
    """
    from tunekit.errors import ConfigError

    if cluster is not None and devices is not None:
        raise ConfigError(
            "--devices has no effect with --cluster, whose nodes have devices of their own",
            where="command line",
            hint="leave one out",
        )


def at_once_of(text: str) -> int | None:
    """The value of `--at-once`; None for auto.

    Raises:
        ConfigError: it is neither.
    """
    from tunekit.errors import ConfigError

    if text == "auto":
        return None
    if text.isdigit() and 1 <= int(text) <= 1000:
        return int(text)
    raise ConfigError(f'"{text}" is neither a number from 1 to 1000 nor auto', where="--at-once")


def names_of(text: str | None) -> list[str]:
    """The parts of a list with commas."""
    return [name for name in (text or "").split(",") if name]
