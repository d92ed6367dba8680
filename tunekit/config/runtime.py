"""How a model is run on one machine: a part of artifact.json, which `tune_runtime` writes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunekit.config.schema import Section

Threads = Annotated[int, Field(ge=1, le=4096)]
Optimization = Literal["all", "extended", "basic", "none"]


class RuntimeConfig(Section):
    """How graphs are run, where it was measured; what is null is the runtime's own choice."""

    runtime: str = Field(max_length=200)
    """What ran the model when this was measured: "onnxruntime CPUExecutionProvider"."""
    machine: str = Field(max_length=500)
    """Where; on another machine these settings are not used."""
    threads: Threads | None = None
    """That work on one operation."""
    rows: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Largest batch of the denoiser; with 1, guidance takes two calls of a row and not one of two."""
    optimization: Optimization | None = None
    """How far ONNX Runtime rewrites a graph when it is opened."""
    arena: bool | None = None
    """ONNX Runtime keeps the memory it has used."""
    memory_pattern: bool | None = None
    """ONNX Runtime takes a call's memory at once, as the call before needed it."""
    spinning: bool | None = None
    """Threads of ONNX Runtime that wait for work keep looking for it."""
    pinning: bool | None = None
    """OpenVINO's threads stay on their processors."""

    @property
    def choices(self) -> dict[str, int | str | bool]:
        """What was chosen otherwise than the runtime does."""
        known = self.model_dump(exclude={"runtime", "machine"}, exclude_none=True)
        return dict(known)

    @property
    def words(self) -> str:
        """For people: "2 threads, the pair in two calls"."""
        said = [_said(name, value) for name, value in self.choices.items()]
        return ", ".join(said) or "as it comes"


def _said(name: str, value: int | str | bool) -> str:
    if name == "threads":
        return f"{value} thread{'' if value == 1 else 's'}"
    if name == "rows":
        return f"{value} row{'' if value == 1 else 's'} a call"
    if name == "optimization":
        return f"optimization {value}"
    return f"{'' if value else 'no '}{name.replace('_', ' ')}"
