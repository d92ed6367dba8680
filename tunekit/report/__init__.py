"""A run's lineage, rendered: `report.json` for programs and one self-contained `report.html` for people.

Nothing is measured here: every figure comes from `artifact.json`, `metrics.jsonl` and `previews/` of the run.
What a figure is called and where it is shown, the pass says that gives it (`Pass.metrics`). What a record
names is shown only if it lies in the run folder; home folders and folders of data are not named.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from tunekit.artifacts import RunFolder
from tunekit.errors import ArtifactError, TunekitError
from tunekit.files import write_json, write_text
from tunekit.report.material import Material, gather

VERSION = 1


def load(run_dir: Path | str) -> dict[str, Any]:
    """The content of `report.json`, read afresh from the run folder.

    Returns:
        `{"version", "training", "steps": [{"kind", "artifact", "seconds", "settings", "metrics"}], "final"}`;
        `training` is None for a run that only optimizes, `final` is the folder inside the run that has the
        model, or None while nothing is finished.

    Raises:
        ArtifactError: no such run, or its records are damaged.
    """
    return _content(_gather(run_dir))


def write(run_dir: Path | str, *, live: bool | None = None) -> Path:
    """Writes `report.json` and `report.html` into the run folder; returns the path of the page.

    Args:
        run_dir: the run folder.
        live: the page loads itself again and again, for the run goes on; None finds out whether it does.

    Raises:
        ArtifactError: see `load`.
        OutputError: disk full, no permission.
    """
    from tunekit.report.page import render

    material = _gather(run_dir)
    content = _content(material)
    run = material.run
    write_json(run.path / "report.json", content)
    page = render(material, content, live=run.is_busy() if live is None else live)
    return write_text(run.path / "report.html", page)


def settle(run_dir: Path | str) -> None:
    """Writes the page again, if there is one, once the run goes on no longer. It fails in silence."""
    if (Path(run_dir) / "report.html").is_file():
        with suppress(TunekitError, OSError):
            write(run_dir)


def _gather(run_dir: Path | str) -> Material:
    run = RunFolder(Path(run_dir))
    if not run.path.is_dir():
        raise ArtifactError(f'there is no run "{run.path}"', hint="tunekit ls shows the runs here")
    return gather(run)


def _content(material: Material) -> dict[str, Any]:
    return {
        "version": VERSION,
        "training": material.training(),
        "steps": [
            {
                "kind": step.kind,
                "artifact": step.artifact,
                "seconds": step.seconds,
                "settings": step.settings,
                "metrics": step.metrics,
            }
            for step in material.chain
        ],
        "final": material.final,
    }
