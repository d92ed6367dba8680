from __future__ import annotations

import numpy as np
import pytest

from tunekit import hardware
from tunekit.errors import DeviceError
from tunekit.hardware import TABLE, find, peak_memory, probe


@pytest.mark.parametrize("facts", TABLE.values(), ids=list(TABLE))
def test_rows_are_whole(facts: hardware.DeviceFacts):
    assert facts.source.startswith("https://")
    assert facts.kind in {"cuda", "rocm", "xpu", "mps", "cpu"}
    assert (facts.compute_capability is not None) == (facts.kind == "cuda")
    if facts.kind != "cpu":
        assert facts.memory_bytes and facts.memory_bytes >= 10 * hardware.GIB
        assert facts.bandwidth_bytes_s and 5e10 < facts.bandwidth_bytes_s < 1e13
    if facts.compute_capability:
        assert facts.supports_bf16 == (facts.compute_capability >= (8, 0))


@pytest.mark.parametrize(
    ("text", "name"),
    [("rtx-4090", "rtx-4090"), ("RTX 4090", "rtx-4090"), ("4090", "rtx-4090"), ("rtx3060", "rtx-3060")],
)
def test_find(text: str, name: str):
    assert find(text).name == name


def test_find_unknown():
    with pytest.raises(
        DeviceError, match='there is no card "rtx-4091" in the table; did you mean "rtx-4090"'
    ):
        find("rtx-4091")


def test_probe_cpu():
    device = probe("cpu")
    assert (device.kind, device.torch_device) == ("cpu", "cpu")
    assert 0 < device.free_bytes <= device.total_bytes
    assert device.title


def test_probe_takes_the_best_there_is():
    import torch

    assert (probe().kind == "cpu") == (
        not torch.cuda.is_available() and not torch.backends.mps.is_available()
    )


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("cdua", 'there is no device "cdua"; did you mean "cuda"'),
        ("cpu:1", "is not there"),
        ("cuda:99", "is not there"),
        ("cuda:x", "there is no device"),
    ],
)
def test_probe_refuses(requested: str, message: str):
    with pytest.raises(DeviceError, match=message):
        probe(requested)


def test_container_limit_counts(monkeypatch: pytest.MonkeyPatch):
    limits = {"/sys/fs/cgroup/memory.max": 2**20, "/sys/fs/cgroup/memory.current": 2**18}
    monkeypatch.setattr(hardware, "_read_int", limits.get)
    device = probe("cpu")
    assert (device.total_bytes, device.free_bytes) == (2**20, 2**20 - 2**18)


def test_peak_memory_sees_what_was_freed_again():
    size = 64 * 2**20
    with peak_memory() as peak:
        block = np.ones(size, dtype=np.uint8)
        assert int(block[:: 2**20].sum()) == 64
        import time

        time.sleep(0.05)
        del block
    assert peak.what == "resident"
    assert size <= peak.peak_bytes - peak.start_bytes + 2**20 < 2 * size
    assert peak.reserved_bytes is None


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    import torch

    with peak_memory("cuda:0") as peak:
        block = torch.ones(2**26, dtype=torch.uint8, device="cuda:0")
        del block
    assert peak.what == "allocated"
    assert peak.peak_bytes - peak.start_bytes == 2**26
    assert peak.reserved_bytes >= peak.peak_bytes


@pytest.mark.gpu
def test_probe_gpu():
    device = probe()
    assert device.kind in {"cuda", "rocm"}
    assert 0 < device.free_bytes <= device.total_bytes
