"""Devices: a table of facts with sources, and `probe()`, the only place that asks torch about the device."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunekit.errors import DeviceError, did_you_mean
from tunekit.units import format_bytes

if TYPE_CHECKING:
    import torch

GIB = 2**30
SHOWN = 0.985
"""Share of its nominal memory that a card shows: 23.68 GiB of 24 on an RTX 4090."""


@dataclass(frozen=True)
class DeviceFacts:
    """A card, as its maker describes it.

    Attributes:
        name: "rtx-3060".
        kind: "cuda", "rocm", "xpu", "mps" or "cpu".
        memory_bytes: memory of the card, less what error correction takes where that is on at first; None
            where it is the machine's own.
        bandwidth_bytes_s: memory bandwidth.
        compute_capability: NVIDIA's, (8, 6); None for others.
        supports_bf16: whether bf16 matrix products run at full speed.
        source: the maker's page or paper.
        half_flops: operations per second of dense 16-bit matrix products with float32 sums. Together with
            float32_flops it only ranks plans on one card.
        float32_flops: operations per second in float32, without the matrix cores.
        has_fused_attention: whether torch has an attention kernel there, backward too, that keeps no score
            matrix.
        lacks: what does not run there, for messages: "bf16", "flash attention" (another fused kernel does),
            "fused attention" (none does), "bitsandbytes", "float8".
    """

    name: str
    title: str
    kind: str
    memory_bytes: int | None
    bandwidth_bytes_s: float | None
    compute_capability: tuple[int, int] | None
    supports_bf16: bool
    source: str
    half_flops: float = 1e12
    float32_flops: float = 0.5e12
    has_fused_attention: bool = True
    lacks: tuple[str, ...] = ()


# NVIDIA's architecture papers call half_flops "Peak FP16 Tensor TFLOPS with FP32 Accumulate". On GeForce that
# is half the rate with FP16 sums: four times float32's on Turing, twice on Ampere, Ada and Blackwell. Checked
# against quotations of the papers: 3090, A6000, 4090, 5090. The other GeForce rows are cores x boost clock x
# that rate.
_TURING = (
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/design-visualization/technologies/turing-architecture/"
    "NVIDIA-Turing-Architecture-Whitepaper.pdf"
)
_PASCAL = "https://images.nvidia.com/content/pdf/tesla/whitepaper/pascal-architecture-whitepaper.pdf"
_VOLTA = "https://images.nvidia.com/content/volta-architecture/pdf/volta-architecture-whitepaper.pdf"
_GEFORCE = "https://www.nvidia.com/en-us/geforce/"
_AMPERE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_ADA_60 = _GEFORCE + "graphics-cards/40-series/rtx-4060-4060ti/"
_BLACKWELL = (
    "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_CENTER = "https://www.nvidia.com/en-us/data-center/"
_AMD = "https://www.amd.com/en/products/graphics/"
_APPLE_M2 = (
    "https://www.apple.com/newsroom/2022/06/apple-unveils-m2-with-breakthrough-performance-and-capabilities/"
)
_INTEL_B580 = (
    "https://www.intel.com/content/www/us/en/products/sku/241598/intel-arc-b580-graphics/specifications.html"
)


def _nvidia(
    name: str,
    title: str,
    gib: float,
    gb_s: int,
    sm: tuple[int, int],
    tflops: tuple[float, float],
    source: str,
) -> DeviceFacts:
    # bf16 and torch's flash attention begin with Ampere. Capabilities: https://developer.nvidia.com/cuda-gpus
    half, full = tflops
    bf16 = sm >= (8, 0)
    return DeviceFacts(
        name,
        title,
        "cuda",
        round(gib * GIB),
        gb_s * 1e9,
        sm,
        bf16,
        source,
        half * 1e12,
        full * 1e12,
        lacks=() if bf16 else ("bf16", "flash attention"),
    )


TABLE: dict[str, DeviceFacts] = {
    facts.name: facts
    for facts in (
        # Pascal has no matrix cores. GeForce multiplies in 16 bits at 1/64 of float32's rate, so that torch
        # computes in float32 there; the P100 has twice that rate. torch for Pascal and Volta: CUDA 12.6.
        _nvidia("gtx-1080-ti", "GeForce GTX 1080 Ti", 11, 484, (6, 1), (11.3, 11.3), _GEFORCE + "10-series/"),
        _nvidia("p100", "Tesla P100 PCIe 16 GB", 16, 732, (6, 0), (18.7, 9.3), _PASCAL),
        _nvidia("v100-16gb", "Tesla V100 SXM2 16 GB", 16, 900, (7, 0), (125, 15.7), _VOLTA),
        _nvidia("v100-32gb", "Tesla V100 SXM2 32 GB", 32, 900, (7, 0), (125, 15.7), _VOLTA),
        _nvidia("rtx-2060-12gb", "GeForce RTX 2060 12 GB", 12, 336, (7, 5), (28.7, 7.2), _TURING),
        _nvidia("rtx-2080-ti", "GeForce RTX 2080 Ti", 11, 616, (7, 5), (53.8, 13.45), _TURING),
        _nvidia("rtx-3060", "GeForce RTX 3060 12 GB", 12, 360, (8, 6), (25.5, 12.7), _AMPERE),
        _nvidia(
            "rtx-3060-ti",
            "GeForce RTX 3060 Ti",
            8,
            448,
            (8, 6),
            (32.4, 16.2),
            _GEFORCE + "graphics-cards/30-series/rtx-3060-3060ti/",
        ),
        _nvidia("rtx-3070", "GeForce RTX 3070", 8, 448, (8, 6), (40.6, 20.3), _AMPERE),
        _nvidia("rtx-3080", "GeForce RTX 3080", 10, 760, (8, 6), (59.5, 29.8), _AMPERE),
        _nvidia(
            "rtx-3080-12gb",
            "GeForce RTX 3080 12 GB",
            12,
            912,
            (8, 6),
            (61.3, 30.6),
            _GEFORCE + "graphics-cards/30-series/rtx-3080-3080ti/",
        ),
        _nvidia("rtx-3090", "GeForce RTX 3090", 24, 936, (8, 6), (71, 35.6), _AMPERE),
        _nvidia("rtx-4060", "GeForce RTX 4060", 8, 272, (8, 9), (30.2, 15.1), _ADA_60),
        _nvidia("rtx-4060-ti", "GeForce RTX 4060 Ti 8 GB", 8, 288, (8, 9), (44.1, 22.1), _ADA_60),
        _nvidia("rtx-4060-ti-16gb", "GeForce RTX 4060 Ti 16 GB", 16, 288, (8, 9), (44.1, 22.1), _ADA),
        _nvidia("rtx-4070", "GeForce RTX 4070", 12, 504, (8, 9), (58.3, 29.1), _ADA),
        _nvidia("rtx-4070-ti", "GeForce RTX 4070 Ti", 12, 504, (8, 9), (80.2, 40.1), _ADA),
        _nvidia("rtx-4080", "GeForce RTX 4080", 16, 717, (8, 9), (97.5, 48.7), _ADA),
        _nvidia("rtx-4090", "GeForce RTX 4090", 24, 1008, (8, 9), (165.2, 82.6), _ADA),
        _nvidia("rtx-5070-ti", "GeForce RTX 5070 Ti", 16, 896, (12, 0), (87.9, 43.9), _BLACKWELL),
        _nvidia("rtx-5090", "GeForce RTX 5090", 32, 1792, (12, 0), (209.5, 104.8), _BLACKWELL),
        # Not GeForce: float32 sums cost nothing there. Datasheets print the sparse rate too, twice these. T4,
        # L4 and L40S come with error correction on, which takes 1/16: nvidia-smi shows 15360, 23034 and 46068
        # MiB.
        _nvidia("rtx-a6000", "RTX A6000", 48, 768, (8, 6), (154.8, 38.7), _AMPERE),
        _nvidia("t4", "Tesla T4", 15, 320, (7, 5), (65, 8.1), _CENTER + "tesla-t4/"),
        _nvidia("l4", "L4", 22.5, 300, (8, 9), (121, 30.3), _CENTER + "l4/"),
        _nvidia("l40s", "L40S", 45, 864, (8, 9), (362, 91.6), _CENTER + "l40s/"),
        _nvidia("a100-40gb", "A100 40 GB", 40, 1555, (8, 0), (312, 19.5), _CENTER + "a100/"),
        _nvidia("a100-80gb", "A100 80 GB PCIe", 80, 1935, (8, 0), (312, 19.5), _CENTER + "a100/"),
        _nvidia("h100", "H100 SXM", 80, 3350, (9, 0), (989, 66.9), _CENTER + "h100/"),
        _nvidia("h200", "H200 SXM", 141, 4800, (9, 0), (989, 66.9), _CENTER + "h200/"),
        # Fused attention on AMD is https://github.com/ROCm/aotriton, with gfx1100, without gfx1030 (W6800).
        # bitsandbytes 0.50 has gfx1100, but gfx1030 only for ROCm 7.14; torch 2.13's wheels are for 7.2:
        # https://huggingface.co/docs/bitsandbytes/main/installation
        # Not checked: operations of the W6800, here those of 60 compute units at 2.32 GHz.
        DeviceFacts(
            "radeon-pro-w6800",
            "Radeon PRO W6800",
            "rocm",
            32 * GIB,
            512e9,
            None,
            False,  # RDNA 2 has no matrix cores
            _AMD + "workstations/radeon-pro/w6800.html",
            35.6e12,
            17.8e12,
            has_fused_attention=False,
            lacks=("bf16", "fused attention", "bitsandbytes"),
        ),
        DeviceFacts(
            "rx-7900-xtx",
            "Radeon RX 7900 XTX",
            "rocm",
            24 * GIB,
            960e9,
            None,
            True,
            _AMD + "desktops/radeon/7000-series/amd-radeon-rx-7900xtx.html",
            122.8e12,
            61.4e12,
        ),
        # Both rates at 2.67 GHz, Intel's graphics clock; its 233 TOPS are int8 at the highest clock. Flash
        # attention is there on Linux, in 16 bit without a mask: https://github.com/pytorch/pytorch/pull/167057
        DeviceFacts(
            "arc-b580", "Arc B580", "xpu", 12 * GIB, 456e9, None, True, _INTEL_B580, 109.4e12, 13.7e12
        ),
        # 16 bit is as fast as float32 on the M1: https://github.com/philipturner/metal-benchmarks
        # Not checked: the M2. No fused attention has a backward: https://github.com/pytorch/pytorch/issues/179294
        # Of bitsandbytes, 0.50 brought nf4; the 8-bit optimizers do not run. 8-bit floats cannot be there:
        # https://github.com/pytorch/pytorch/issues/148420
        DeviceFacts(
            "apple-m2",
            "Apple M2, 24 GB",
            "mps",
            24 * GIB,
            100e9,
            None,
            True,
            _APPLE_M2,
            3.6e12,
            3.6e12,
            has_fused_attention=False,
            lacks=("fused attention", "bitsandbytes", "float8"),
        ),
        # Its operations are a guess: processors differ too much.
        DeviceFacts(
            "cpu",
            "this machine's processor",
            "cpu",
            None,
            None,
            None,
            True,
            "https://pytorch.org/docs/stable/amp.html",
        ),
    )
}


def find(name: str, *, where: str | None = None) -> DeviceFacts:
    """The row of a card.

    Raises:
        DeviceError: for an unknown name, with the nearest one.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    for candidate in (key, f"rtx-{key}", f"gtx-{key}", key.replace("tx", "tx-", 1)):
        if candidate in TABLE:
            return TABLE[candidate]
    hint = did_you_mean(key, TABLE)
    raise DeviceError(
        f'there is no card "{name}" in the table' + (f"; {hint}" if hint else ""),
        where=where,
        hint=f"known: {', '.join(TABLE)}",
    )


_NOT_IN_NAMES = {
    *("geforce", "tesla", "gb", "sxm", "sxm2", "pcie", "processor"),
    *("6", "8", "10", "11", "12", "16", "24", "32", "40", "80"),
}
"""Words by which the table tells cards apart and drivers do not, or not always."""


def resembling(device: Device) -> DeviceFacts | None:
    """The card of the table that a device is, by the words of its name, then its memory; None if none is."""

    def words(title: str) -> set[str]:
        return set(re.findall(r"[a-z0-9]+", title.lower())) - _NOT_IN_NAMES

    there = words(device.title)
    found = [card for card in TABLE.values() if words(card.title) and words(card.title) <= there]

    def nearness(card: DeviceFacts) -> tuple[int, int]:
        return len(words(card.title)), -abs((card.memory_bytes or 0) - device.total_bytes)

    return max(found, key=nearness, default=None)


@dataclass(frozen=True)
class Device:
    """The device a run is on.

    Attributes:
        kind: "cuda", "rocm", "xpu", "mps" or "cpu".
        torch_device: what torch calls it, "cuda:0" (also for ROCm).
        total_bytes: memory of the device, or of this container.
        free_bytes: what this process may still take of it now.
        note: why that is less than the card has, in a few words; "" where little is missing.
    """

    kind: str
    index: int
    torch_device: str
    title: str
    total_bytes: int
    free_bytes: int
    supports_bf16: bool
    note: str = ""


def usable_bytes(free: int, total: int, fraction: float, reserved: int) -> int:
    """What a process may still take of a card.

    Args:
        free: what nobody holds.
        total: memory of the card.
        fraction: share of `total` that the process may hold in all.
        reserved: what its allocator holds already.
    """
    return max(0, min(free, int(fraction * total) - reserved))


def why_less(name: str, free: int, total: int, fraction: float = 1.0, reserved: int = 0) -> str:
    """Why a process gets less than a card has, in a few words; "" where little is missing.

    Args:
        name: what the driver calls the card; "MIG" in it is a slice of one.
        free: see `usable_bytes`, as for the rest.
    """
    reasons = []
    if "MIG" in name:
        reasons.append("a MIG slice")
    percent = round(fraction * 100)
    if percent < 100:
        reasons.append(f"capped at {percent} % of the card by the process")
    others = total - free - reserved
    if others > total / 10:  # below are the context of the process itself and a desktop
        reasons.append(f"other programs hold {format_bytes(others)} of {format_bytes(total)}")
    return "; ".join(reasons)


def amd_has_bf16(arch: str) -> bool:
    """Whether an AMD chip, "gfx1030", multiplies matrices in bf16; torch says yes of every one.

    In data centers that came with gfx908, elsewhere with gfx11 (RDNA 3).
    """
    return not arch.startswith(("gfx8", "gfx900", "gfx902", "gfx906", "gfx90c", "gfx10"))


def _fraction(backend: Any, index: int) -> float:
    """The share of a card that this process may hold, as a call or PYTORCH_ALLOC_CONF set it."""
    try:
        return float(backend.get_per_process_memory_fraction(index))
    except (AttributeError, RuntimeError):  # an older torch; an allocator of another make
        return 1.0


def _read_int(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
        return int(text)
    except (OSError, ValueError):  # absent, or "max"
        return None


def machine_memory() -> tuple[int, int]:
    """Total and free bytes, of the container where one limits them."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    limit = _read_int("/sys/fs/cgroup/memory.max")
    used = _read_int("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None and limit < total:
        total, free = limit, max(0, min(free, limit - used))
    return total, free


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> str:
    """This machine as far as timings depend on it: "AMD EPYC 7B13, 8 processors"."""
    count = processors()
    return f"{_processor()}, {count} processor{'' if count == 1 else 's'}"


def best_precision(kind: str, supports_bf16: bool) -> Literal["fp32", "bf16", "fp16"]:
    """What `auto` is on a device: the narrowest arithmetic that it is good at."""
    if kind in ("cpu", "mps"):
        return "fp32"
    return "bf16" if supports_bf16 else "fp16"


def seen_alone(names: Sequence[str]) -> dict[str, str]:
    """What a process finds in its environment so that of all cards it sees some: "cuda:0", or none: "cpu".

    What this process sees of them itself is minded.
    """
    kind = names[0].partition(":")[0]
    variable = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}.get(kind)
    if kind == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    if variable is None:
        return {}
    visible = [name for name in os.environ.get(variable, "").split(",") if name]
    own = [int(name.partition(":")[2]) for name in names]
    return {variable: ",".join(visible[index] if index < len(visible) else str(index) for index in own)}


def probe(requested: str = "auto") -> Device:
    """Finds the device.

    Args:
        requested: "auto" (the best there is; one each where several processes run), "cpu", "cuda", "cuda:1",
            "xpu" or "mps".

    Raises:
        DeviceError: unknown, or not there.
    """
    import torch

    xpu = getattr(torch, "xpu", None)
    kind, _, number = requested.partition(":")
    known = ("auto", "cpu", "cuda", "xpu", "mps")
    if kind not in known or (number and not number.isdigit()):
        hint = did_you_mean(kind, known) or f"known: {', '.join(known)}, cuda:1"
        raise DeviceError(f'there is no device "{requested}"; {hint}')
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "xpu": xpu.device_count() if xpu is not None and xpu.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if kind == "auto":
        kind = next(name for name, count in counts.items() if count)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    index = int(number) if number else local_rank if kind in {"cuda", "xpu"} else 0
    if index >= counts[kind]:
        found = f"{counts[kind]} found" if counts[kind] else "torch finds none"
        raise DeviceError(
            f'the device "{requested}" is not there ({found})',
            hint="see what answers: tunekit doctor; or set memory.device=cpu",
        )
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        real = "rocm" if torch.version.hip else "cuda"
        # torch.cuda.is_bf16_supported asks the current device, not this one.
        bf16 = amd_has_bf16(properties.gcnArchName) if real == "rocm" else properties.major >= 8
        held = (_fraction(torch.cuda, index), torch.cuda.memory_reserved(index))
        note = why_less(properties.name, free, total, *held)
        usable = usable_bytes(free, total, *held)
        return Device(real, index, f"cuda:{index}", properties.name, total, usable, bf16, note)
    if kind == "xpu" and xpu is not None:
        properties = xpu.get_device_properties(index)
        held = (_fraction(xpu, index), xpu.memory_reserved(index))
        try:
            free, total = xpu.mem_get_info(index)
        except (AttributeError, RuntimeError):  # some drivers do not know
            total = int(properties.total_memory)
            free = total - held[1]
        note = why_less(properties.name, free, total, *held)
        usable = usable_bytes(free, total, *held)
        return Device("xpu", index, f"xpu:{index}", properties.name, total, usable, True, note)
    total, free = machine_memory()
    if kind == "mps":
        total = int(torch.mps.recommended_max_memory())  # Metal lets a process have no more
        usable = usable_bytes(free, total, 1.0, torch.mps.driver_allocated_memory())
        return Device("mps", 0, "mps", "Apple GPU", total, usable, True)
    return Device("cpu", 0, "cpu", _processor(), total, free, True)


def without_precision(device: Device, precision: str) -> DeviceError | None:
    """What is to be said where a device cannot train in a precision that was asked for; else None."""
    if precision != "fp16" or device.torch_device.startswith(("cuda", "xpu")):
        return None
    return DeviceError(
        f"memory.precision=fp16 needs a GPU, and this run is on {device.torch_device}",
        hint="use memory.precision=bf16, which has the range of fp32, or fp32",
        key="memory.precision",
    )


def without_packing(device: Device, base_precision: str | None) -> DeviceError | None:
    """What is to be said where a device cannot hold a base as it was asked for; else None."""
    if base_precision != "fp8":
        return None
    import torch

    try:
        torch.ones(1).to(torch.float8_e4m3fn).to(device.torch_device).float()
    except (RuntimeError, TypeError, NotImplementedError):
        return DeviceError(
            f"memory.base_precision=fp8 needs 8-bit floats, which torch {torch.__version__} does not have on"
            f" {device.torch_device}",
            hint="use int8, which takes as much memory",
            key="memory.base_precision",
        )
    return None


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device multiplies floats of 8 bits: of NVIDIA's, compute capability 8.9 and later."""
    import torch

    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def forget() -> None:
    """Gives memory that torch keeps for later back to the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class PeakMemory:
    """Filled in when the block of `peak_memory` ends.

    Attributes:
        what: "allocated" (torch's tensors on a GPU) or "resident" (memory of the process).
        start_bytes: before the block.
        peak_bytes: largest within it.
        reserved_bytes: largest amount the GPU allocator held; None on a CPU.
    """

    what: str
    start_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int | None = None


@contextmanager
def peak_memory(device: str = "cpu", *, every: float = 0.005) -> Iterator[PeakMemory]:
    """Measures the peak memory of a block.

    On a GPU torch counts exactly; elsewhere a thread reads the resident set every `every` seconds, so that a
    shorter peak can be missed.
    """
    kind = device.partition(":")[0]
    if kind in {"cuda", "xpu"}:
        import torch

        backend = torch.cuda if kind == "cuda" else torch.xpu
        backend.synchronize()
        backend.reset_peak_memory_stats()
        result = PeakMemory("allocated", backend.memory_allocated())
        yield result
        backend.synchronize()
        result.peak_bytes = backend.max_memory_allocated()
        result.reserved_bytes = backend.max_memory_reserved()
        return
    import psutil

    process = psutil.Process()
    result = PeakMemory("resident", process.memory_info().rss)
    result.peak_bytes = result.start_bytes
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(every):
            result.peak_bytes = max(result.peak_bytes, process.memory_info().rss)

    thread = threading.Thread(target=sample, name="peak-memory", daemon=True)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()
        result.peak_bytes = max(result.peak_bytes, process.memory_info().rss)
