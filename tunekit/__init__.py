"""From a handful of pictures to a small, fast, verified diffusion model.

What the command does, from Python; here with a tiny model of random weights:

>>> import tunekit
>>> tunekit.load("tiny/lora", ["train.lr=2e-3"]).config.train.lr
0.002
>>> plan, = tunekit.plan("tiny/lora", device="rtx-3060")
>>> plan.fits
True
>>> adapter = tunekit.run("tiny/lora", "name=first", "preview.steps=1")
>>> adapter.format, adapter.family, adapter.base, adapter.path.as_posix()
('adapter', 'sd15', 'tiny', 'runs/first/adapter')
>>> pictures = tunekit.generate(adapter, ["a red fox", "a blue bird"], seeds=[7, 8], steps=2)
>>> [picture.size for picture in pictures]
[(32, 32), (32, 32)]
>>> plain, = tunekit.generate("tiny", "a red fox", family="sd15", seeds=7, steps=2)
>>> plain == pictures[0]
False
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact, open_artifact
    from tunekit.config.schema import load
    from tunekit.passes.base import Pass
    from tunekit.runtime.open import open_runtime
    from tunekit.workspace import generate, plan, run

__version__ = "0.1.0"
__all__ = [
    "Artifact",
    "Pass",
    "__version__",
    "generate",
    "load",
    "open_artifact",
    "open_runtime",
    "plan",
    "run",
]

_HOMES = {
    "Artifact": "tunekit.artifacts",
    "Pass": "tunekit.passes.base",
    "generate": "tunekit.workspace",
    "load": "tunekit.config.schema",
    "open_artifact": "tunekit.artifacts",
    "open_runtime": "tunekit.runtime.open",
    "plan": "tunekit.workspace",
    "run": "tunekit.workspace",
}
"""Where each name is defined. Imported when it is asked for: `import tunekit` itself takes no time."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
