from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tunekit import hardware
from tunekit.errors import DeviceError
from tunekit.hardware import GIB, TABLE, amd_has_bf16, find, peak_memory, probe, usable_bytes, why_less


@pytest.mark.parametrize("facts", TABLE.values(), ids=list(TABLE))
def test_rows_are_whole(facts: hardware.DeviceFacts):
    assert facts.source.startswith("https://")
    assert facts.kind in {"cuda", "rocm", "xpu", "mps", "cpu"}
    assert (facts.compute_capability is not None) == (facts.kind == "cuda")
    if facts.kind != "cpu":
        assert facts.memory_bytes and facts.memory_bytes >= 8 * hardware.GIB
        assert facts.bandwidth_bytes_s and 5e10 < facts.bandwidth_bytes_s < 1e13
    if facts.compute_capability:
        assert facts.supports_bf16 == (facts.compute_capability >= (8, 0))
    assert set(facts.lacks) <= {"bf16", "flash attention", "fused attention", "bitsandbytes", "float8"}
    assert ("bf16" in facts.lacks) == (not facts.supports_bf16)
    assert ("fused attention" in facts.lacks) == (not facts.has_fused_attention)


def test_a_device_without_8_bit_floats_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch):
    """As MPS, where torch refuses to bring such a tensor."""
    import torch

    device = probe("cpu")
    assert hardware.without_packing(device, "fp8") is None
    real = torch.Tensor.to

    def without(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if self.dtype == torch.float8_e4m3fn:
            raise TypeError("Trying to convert Float8_e4m3fn to the MPS backend")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", without)
    assert hardware.without_packing(device, "int8") is None
    error = hardware.without_packing(device, "fp8")
    assert error is not None and error.key == "memory.base_precision"
    assert "does not have on cpu" in error.message and error.hint == "use int8, which takes as much memory"
    assert "\n" not in error.message


@pytest.mark.parametrize("facts", [facts for facts in TABLE.values() if "GeForce" in facts.title])
def test_geforce_halves_float32_sums(facts: hardware.DeviceFacts):
    """The rate with FP16 sums, or the sparse one, would be twice that."""
    times = {(6, 1): 1, (7, 5): 4}.get(facts.compute_capability or (0, 0), 2)
    assert facts.half_flops == pytest.approx(times * facts.float32_flops, rel=0.01)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("rtx3060", "rtx-3060"),
        ("1080 Ti", "gtx-1080-ti"),
        ("GTX1080-Ti", "gtx-1080-ti"),
        ("3080", "rtx-3080"),
    ],
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


@pytest.mark.parametrize(
    ("free", "fraction", "reserved", "usable"),
    [
        (23, 1.0, 0, 23),
        (20, 1.0, 3, 20),  # what is ours already is not free
        (23, 0.5, 0, 12),
        (20, 0.5, 3, 9),
        (5, 0.5, 0, 5),  # others leave less than the cap
        (10, 0.5, 13, 0),  # capped after it took more
    ],
)
def test_usable_bytes(free: int, fraction: float, reserved: int, usable: int):
    assert usable_bytes(free * GIB, 24 * GIB, fraction, reserved * GIB) == usable * GIB


@pytest.mark.parametrize(
    ("name", "free", "fraction", "reserved", "note"),
    [
        ("NVIDIA GeForce RTX 4090", 24, 1.0, 0, ""),
        ("NVIDIA GeForce RTX 4090", 21.7, 1.0, 0, ""),  # a desktop
        ("NVIDIA GeForce RTX 4090", 12.8, 1.0, 0, "other programs hold 11.2 GiB of 24.0 GiB"),
        ("NVIDIA GeForce RTX 4090", 12.8, 1.0, 11, ""),  # it is this process
        ("NVIDIA GeForce RTX 4090", 24, 0.49998, 0, "capped at 50 % of the card by the process"),
        ("NVIDIA GeForce RTX 4090", 24, 0.9999, 0, ""),
        ("NVIDIA A30 MIG 4g.24gb", 24, 1.0, 0, "a MIG slice"),
        (
            "NVIDIA A30 MIG 4g.24gb",
            6,
            0.25,
            0,
            "a MIG slice; capped at 25 % of the card by the process; "
            "other programs hold 18.0 GiB of 24.0 GiB",
        ),
    ],
)
def test_why_less(name: str, free: float, fraction: float, reserved: int, note: str):
    assert why_less(name, round(free * GIB), 24 * GIB, fraction, reserved * GIB) == note


@pytest.mark.parametrize(
    ("arch", "bf16"),
    [
        ("gfx906:sramecc+:xnack-", False),
        ("gfx90a:sramecc+:xnack-", True),
        ("gfx942", True),
        ("gfx1030", False),
        ("gfx1100", True),
        ("gfx1201", True),
    ],
)
def test_amd_has_bf16(arch: str, bf16: bool):
    assert amd_has_bf16(arch) is bf16


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """Gives torch a card of 24 GiB, 22 of them free, where this process has reserved 1."""
    import torch

    def make(fraction: float | None = 1.0, hip: str | None = None, **properties: object) -> None:
        facts = {"name": "a card", "major": 8, "gcnArchName": "", **properties}

        def share(index: int) -> float:
            if fraction is None:
                raise RuntimeError("does not yet support getMemoryFraction")
            return fraction

        monkeypatch.setattr(torch.version, "hip", hip)
        for name, answer in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_properties": lambda index: SimpleNamespace(**facts),
            "mem_get_info": lambda index: (22 * GIB, 24 * GIB),
            "memory_reserved": lambda index: GIB,
            "get_per_process_memory_fraction": share,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    return make


@pytest.mark.parametrize(
    ("fraction", "free", "note"),
    [(1.0, 22, ""), (None, 22, ""), (0.5, 11, "capped at 50 % of the card by the process")],
)
def test_probe_counts_a_cap(card, fraction: float | None, free: int, note: str):
    card(fraction)
    device = probe("cuda")
    assert (device.total_bytes, device.free_bytes, device.note) == (24 * GIB, free * GIB, note)


@pytest.mark.parametrize(
    ("kind", "made", "bf16"),
    [
        ("cuda", {"major": 7}, False),
        ("cuda", {"major": 12}, True),
        ("rocm", {"hip": "7.2", "major": 10, "gcnArchName": "gfx1030"}, False),
        ("rocm", {"hip": "7.2", "major": 11, "gcnArchName": "gfx1100"}, True),
    ],
)
def test_probe_knows_bf16(card, kind: str, made: dict[str, object], bf16: bool):
    card(**made)
    device = probe("cuda:0")
    assert (device.kind, device.supports_bf16) == (kind, bf16)


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


@pytest.mark.gpu
def test_probe_gpu_sees_its_cap():
    import torch

    torch.cuda.set_per_process_memory_fraction(0.25, 0)
    try:
        device = probe("cuda:0")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert device.free_bytes <= device.total_bytes / 4
    assert "capped at 25 %" in device.note


@pytest.mark.parametrize(
    ("title", "gib", "card"),
    [
        ("NVIDIA GeForce RTX 3060", 12, "rtx-3060"),
        ("NVIDIA GeForce RTX 4070 Ti", 12, "rtx-4070-ti"),
        ("NVIDIA GeForce RTX 4070", 12, "rtx-4070"),
        ("NVIDIA L40S", 45, "l40s"),
        ("NVIDIA L4", 23, "l4"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 80, "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", 79, "h100"),
        ("AMD Radeon RX 7900 XTX", 24, "rx-7900-xtx"),
        ("Intel(R) Arc(TM) B580 Graphics", 12, "arc-b580"),
        ("NVIDIA GeForce GTX 1650", 4, None),
        ("NVIDIA GeForce GTX 1080 Ti", 11, "gtx-1080-ti"),
        ("Tesla P100-PCIE-16GB", 16, "p100"),
        ("Tesla V100-SXM2-16GB", 16, "v100-16gb"),
        ("Tesla V100-SXM2-32GB", 32, "v100-32gb"),
        ("NVIDIA GeForce RTX 3080", 10, "rtx-3080"),
        ("NVIDIA GeForce RTX 3080", 12, "rtx-3080-12gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 8, "rtx-4060-ti"),
        ("NVIDIA GeForce RTX 4060 Ti", 16, "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4060", 8, "rtx-4060"),
        ("Intel(R) Xeon(R) Processor", 24, None),
    ],
)
def test_cards_are_recognized_by_what_torch_calls_them(title: str, gib: int, card: str | None) -> None:
    device = hardware.Device("cuda", 0, "cuda:0", title, gib * 2**30, gib * 2**30, True)
    found = hardware.resembling(device)
    assert (found.name if found else None) == card
