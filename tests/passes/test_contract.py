"""What holds for every pass, today's and tomorrow's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunekit.config import load
from tunekit.errors import ChainError
from tunekit.passes.base import Pass, check_chain, parse_chain
from tunekit.passes.metrics import Metric, declared
from tunekit.records import FORMATS
from tunekit.registry import PASSES
from tunekit.resources import PACKAGE

NAMES = PASSES.names()


def test_all_passes_of_the_road_are_there():
    assert {
        "merge",
        "prune",
        "heal",
        "quantize",
        "export_onnx",
        "build_tensorrt",
        "verify",
        "benchmark",
        "tune_sampler",
    } <= set(NAMES)
    assert not {"base", "prunable", "onnx_int8", "samplers"} & set(NAMES)  # what passes are made of


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_its_file_says(name: str):
    cls = PASSES.get(name)
    assert issubclass(cls, Pass) and cls.kind == name
    assert (PACKAGE / "passes" / f"{name}.py").is_file()
    assert cls.accepts and set(cls.accepts) <= set(FORMATS)
    assert cls.produces is None or cls.produces in FORMATS
    assert not (cls.looks and cls.produces)
    assert cls.run is not Pass.run


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented(name: str):
    cls = PASSES.get(name)
    summary = cls.summary()
    assert summary.endswith(".") and len(summary) < 110
    assert cls.run.__doc__
    undocumented = [field for field, info in cls.model_fields.items() if not info.description]
    assert undocumented == []
    assert cls.model_json_schema()["additionalProperties"] is False


def test_a_figure_means_the_same_wherever_it_is_given():
    known: dict[str, Metric] = {}
    for _, cls in PASSES.items():
        assert cls.metrics
        for metric in cls.metrics:
            assert known.setdefault(metric.name, metric) == metric
    for metric in known.values():
        assert metric.unit not in ("bytes", "dB") or metric.name.endswith(f"_{metric.unit.lower()}")
        assert metric.unit != "ms" or "_ms" in metric.name
        assert not metric.under or known[metric.under].column
        for part in metric.tile.note if metric.tile else ():
            part.format_map(dict.fromkeys(known, ""))
    assert [metric.column for metric in declared() if metric.column] == [
        *("size on disk", "denoiser step p50", "picture p50", "speed-up", "speed-up found", "peak memory"),
        *("rel. error", "PSNR", "SSIM"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_frozen_and_go_through_json(name: str):
    cls = PASSES.get(name)
    required = {field: ["rtx-4090"] for field, info in cls.model_fields.items() if info.is_required()}
    step = cls(**required)
    assert cls.model_validate_json(json.dumps(step.model_dump(mode="json"))) == step
    field = next(iter(cls.model_fields))
    with pytest.raises(ValueError, match="frozen"):
        setattr(step, field, None)


def chain_file(folder: Path, chain: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"recipe: optimize\nmodel: {{family: sd15, source: tiny}}\noptimize:\n{chain}", encoding="utf-8"
    )
    return path


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_key_is_found_with_its_line(name: str, tmp_path: Path):
    known = next(iter(PASSES.get(name).model_fields))
    loaded = load(chain_file(tmp_path, f"  - {name}:\n      {known}s_: 1\n"))
    with pytest.raises(ChainError) as caught:
        parse_chain(loaded.config.optimize, loaded.chain_where)
    message = str(caught.value)
    assert "run.yaml:5" in message and f"optimize[0] ({name})" in message and "unknown key" in message
    assert f'did you mean "{known}"?' in message


@pytest.mark.parametrize("name", NAMES)
def test_a_format_it_does_not_take_is_refused_before_anything_runs(name: str):
    cls = PASSES.get(name)
    step = cls(**{field: ["rtx-4090"] for field, info in cls.model_fields.items() if info.is_required()})
    for given in sorted(set(FORMATS) - set(cls.accepts)):
        with pytest.raises(ChainError, match=rf"optimize\[0\] \({name}\) needs .* but the chain starts with"):
            check_chain([step], given)


def test_the_definitions_need_no_torch():
    code = (
        "import sys; from tunekit.registry import PASSES; "
        "import tunekit.passes.base, tunekit.passes.models; dict(PASSES.items()); "
        "assert not {'torch', 'diffusers', 'onnx', 'onnxruntime'} & set(sys.modules), 'a heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
