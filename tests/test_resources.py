from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tunekit import resources
from tunekit.artifacts import Artifact

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have folders of their own")


def test_the_cache_is_where_the_system_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert resources.cache_dir() == tmp_path / ".cache" / "tunekit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert resources.cache_dir() == tmp_path / "elsewhere" / "tunekit"
    assert not list(tmp_path.iterdir())  # asking makes nothing


def test_engines_of_onnx_runtime_are_kept_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunekit.runtime import onnx

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(onnx, "ort_providers", lambda: list(onnx.ORT_PROVIDERS.values()))
    model = Artifact(None, None, "onnx", "sd15", "model", recorded_hash="0123456789abcdef0")
    (name, options), *_ = onnx._ort_choice("tensorrt", model, 0)("unet")
    assert name == "TensorrtExecutionProvider"
    kept = tmp_path / "tunekit" / "tensorrt" / "0123456789abcdef"
    assert options["trt_engine_cache_path"] == str(kept / "unet")
    assert options["trt_timing_cache_path"] == str(kept)


def test_plans_are_kept_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunekit import planning
    from tunekit.config import load

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planning.plan_config(load("tiny/lora"), device="rtx-3060")
    assert sorted(path.name for path in resources.cache_dir().iterdir()) == ["plans", "traces"]
