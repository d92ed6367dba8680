"""The lines that install what is missing: they have to be right where they are read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunekit import doctor, install
from tunekit.install import Card, read_nvidia, torch_for, torch_trouble

RTX = Card("nvidia", "NVIDIA GeForce RTX 3060", 581, (8, 6))
INDEX = "--index-url https://download.pytorch.org/whl"


def installed(monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None) -> None:
    """Makes tunekit what pip installed under another name, from `origin` (PEP 610) or an index."""
    text = None if origin is None else json.dumps(origin)
    known = SimpleNamespace(metadata={"Name": "other"}, requires=["torch"], read_text=lambda file: text)
    monkeypatch.setattr(install, "distribution", lambda: known)
    monkeypatch.setattr(install, "checkout", lambda: None)
    monkeypatch.setattr(install, "pip", lambda verb="install": f"pip {verb}")


def test_a_checkout_names_its_folder() -> None:
    folder = install.checkout()
    assert folder is not None
    assert (folder / "tunekit" / "install.py").is_file()
    assert install.with_extra("quant").endswith(f' -e "{folder}[quant]"')
    assert install.newer() == f'git -C "{folder}" pull'


@pytest.mark.parametrize(
    ("origin", "named"),
    [
        (None, '"other[onnx]"'),
        (
            {"url": "https://example.org/t.git", "vcs_info": {"vcs": "git", "requested_revision": "v1"}},
            '"other[onnx] @ git+https://example.org/t.git@v1"',
        ),
        ({"url": "file:///home/me/t.whl", "archive_info": {}}, '"other[onnx] @ file:///home/me/t.whl"'),
        ({"url": "file:///home/me/t", "dir_info": {}}, '"other[onnx] @ file:///home/me/t"'),
        ({}, '"other[onnx]"'),
    ],
)
def test_the_line_follows_from_where_it_came(
    monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None, named: str
) -> None:
    installed(monkeypatch, origin)
    bare = named.replace("[onnx]", "")
    assert install.with_extra("onnx") == f"pip install {named}"
    assert install.again() == f"pip install {bare}"
    assert install.newer() == f"pip install --upgrade {bare}"


def test_no_message_names_a_package_of_somebody_else() -> None:
    """The name on an index is in pyproject.toml alone."""
    for file in (install.HOME / "tunekit").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "install tunekit" not in text, file
        assert "tunekit[" not in text, file


def test_the_environment_that_runs_is_the_one_that_is_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(install.shutil, "which", lambda name: str(tmp_path / name))
    assert install.pip() == "pip install"
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/pip")
    assert install.pip("uninstall") == f"{python} -m pip uninstall"
    monkeypatch.setattr(sys, "executable", "/my environment/python")
    assert install.pip() == '"/my environment/python" -m pip install'
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    assert install.pip() == 'uv pip install --python "/my environment/python"'


@pytest.mark.parametrize(
    ("card", "installed", "build"),
    [
        (RTX, "2.13.0+cpu", f'install "torch==2.13.0+cu130" {INDEX}/cu130'),
        (Card("nvidia", "Tesla T4", 550, (7, 5)), "2.13.0", '"torch==2.13.0+cu126"'),
        (Card("nvidia", "GeForce GTX 1080 Ti", 590, (6, 1)), "2.13.0", '"torch==2.13.0+cu126"'),
        (Card("nvidia", "Tesla V100", 590, (7, 0)), "2.13.0", '"torch==2.13.0+cu126"'),
        (Card("nvidia", "GeForce RTX 5090", 570, (12, 0)), "2.13.0+cpu", '"torch==2.13.0+cu130"'),
        (Card("nvidia", "an NVIDIA card"), None, f"install torch {INDEX}/cu130"),
        (RTX, "2.7.1+cpu", f"install --upgrade torch {INDEX}/cu130"),
        (Card("amd", "gfx1100"), "2.13.0", '"torch==2.13.0+rocm7.2"'),
    ],
)
def test_which_torch_for_which_card(card: Card, installed: str | None, build: str) -> None:
    _, line = torch_for([card], installed, system="linux")
    assert build in line


def test_apple_and_processors_take_the_usual_torch() -> None:
    assert torch_for([], "2.13.0", system="darwin")[1].endswith("install torch")
    assert torch_for([], None, system="linux")[1].endswith("install torch")


def test_cards_are_read_as_the_driver_prints_them() -> None:
    text = "NVIDIA GeForce RTX 3060, 550.54.15, 8.6\nTesla P100, 470.1, [N/A]\n\nNo devices were found\n"
    assert read_nvidia(text) == [
        Card("nvidia", "NVIDIA GeForce RTX 3060", 550, (8, 6)),
        Card("nvidia", "Tesla P100", 470, None),
    ]


def test_a_torch_that_leaves_a_card_idle_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    why, line = torch_trouble([RTX], "2.13.0+cpu", None)
    assert why == (
        "torch 2.13.0+cpu is built without GPUs, beside NVIDIA GeForce RTX 3060;"
        " what runs there is the build for CUDA 13.0"
    )
    assert "cu130" in line
    why, _ = torch_trouble([RTX], "2.13.0", "CUDA 13.0")
    assert "is built for CUDA 13.0 and does not reach NVIDIA GeForce RTX 3060" in why
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert torch_trouble([RTX], "2.13.0", "CUDA 13.0")[1] == "unset CUDA_VISIBLE_DEVICES"


def test_the_doctor_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {"device": "cpu", "title": "a processor", "total_bytes": 1, "free_bytes": 1, "bf16": True}
    monkeypatch.setattr(doctor, "_devices", lambda: [cpu])
    monkeypatch.setattr(install, "cards", lambda: [RTX])
    told = [item for item in doctor.examine()["missing"] if "RTX 3060" in item["what"]]
    assert len(told) == 1
    assert told[0]["install"].startswith(install.pip())
    monkeypatch.setattr(doctor, "_devices", lambda: [{**cpu, "device": "cuda:0"}, cpu])
    assert not [item for item in doctor.examine()["missing"] if "RTX 3060" in item["what"]]
