"""What a run is told: YAML that keeps its places, strict sections, and the sections by who reads them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunekit.config.adapter import AdapterConfig
    from tunekit.config.data import DataConfig, DreamboothData
    from tunekit.config.memory import (
        CLASS_BATCH,
        Lever,
        Mark,
        MemoryConfig,
        Scale,
        free_on_resume,
        levers,
        marks,
        open_levers,
    )
    from tunekit.config.model import ModelConfig
    from tunekit.config.objective import ObjectiveConfig
    from tunekit.config.run import Chain, RunConfig, TrainingRunConfig
    from tunekit.config.runtime import RuntimeConfig
    from tunekit.config.sampling import CacheConfig, SamplingConfig
    from tunekit.config.schema import (
        BatchSize,
        Count,
        Fraction,
        Loaded,
        Multiple,
        Names,
        PathText,
        SamplingSteps,
        Section,
        Seed,
        Steps,
        Text,
        Word,
        all_keys,
        changed,
        dump_yaml,
        idle,
        load,
        no_effect,
        paths_in,
        recipe_of,
        refuse,
        validate,
        wrong,
    )
    from tunekit.config.train import CHOSEN_BY, TRACKERS, PreviewConfig, TrainConfig
    from tunekit.config.words import known_as
    from tunekit.config.yaml import (
        COMMAND_LINE,
        REQUIRED,
        Document,
        Key,
        config_names,
        dotted,
        find_config,
        parse,
        read,
        shown,
    )

__all__ = [
    "CHOSEN_BY",
    "CLASS_BATCH",
    "COMMAND_LINE",
    "REQUIRED",
    "TRACKERS",
    "AdapterConfig",
    "BatchSize",
    "CacheConfig",
    "Chain",
    "Count",
    "DataConfig",
    "Document",
    "DreamboothData",
    "Fraction",
    "Key",
    "Lever",
    "Loaded",
    "Mark",
    "MemoryConfig",
    "ModelConfig",
    "Multiple",
    "Names",
    "ObjectiveConfig",
    "PathText",
    "PreviewConfig",
    "RunConfig",
    "RuntimeConfig",
    "SamplingConfig",
    "SamplingSteps",
    "Scale",
    "Section",
    "Seed",
    "Steps",
    "Text",
    "TrainConfig",
    "TrainingRunConfig",
    "Word",
    "all_keys",
    "changed",
    "config_names",
    "dotted",
    "dump_yaml",
    "find_config",
    "free_on_resume",
    "idle",
    "known_as",
    "levers",
    "load",
    "marks",
    "no_effect",
    "open_levers",
    "parse",
    "paths_in",
    "read",
    "recipe_of",
    "refuse",
    "shown",
    "validate",
    "wrong",
]

_FILES = (
    "yaml",
    "words",
    "schema",
    "model",
    "data",
    "adapter",
    "objective",
    "runtime",
    "sampling",
    "train",
    "memory",
    "run",
)


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: `tunekit ls` needs `yaml.py` and not pydantic."""
    if name in __all__:
        for file in _FILES:
            found = vars(importlib.import_module(f"{__name__}.{file}"))
            if name in found:
                globals()[name] = found[name]
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
