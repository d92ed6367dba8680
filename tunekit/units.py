"""Bytes, seconds and counts, as people write and read them."""

from __future__ import annotations

import re

from tunekit.errors import ConfigError

_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTES = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Reads "12 GiB", "500MB", "1.5G" or a number of bytes; KB, MB, GB count in 1000s, all else in 1024s.

    Raises:
        ConfigError: when `text` is not a size, or over 1 PiB.
    """
    match = _BYTES.fullmatch(str(text))
    if not match or (match[3] and not match[2]):
        raise ConfigError(
            f'"{text}" is not a size', hint='write it as "12 GiB", "500 MB" or a number of bytes'
        )
    size = _size(match, str(text))
    if size > 2**50:
        raise ConfigError(f'"{text}" is a size that no memory has', hint='write it as "12 GiB" or "500 MB"')
    return round(size)


def parse_budget(text: str) -> int:
    """Reads the memory to stay within.

    Raises:
        ConfigError: when `text` is not a size, or none at all.
    """
    size = parse_bytes(text)
    if size == 0:
        raise ConfigError(f'"{text}" leaves no memory at all', hint='write it as "12 GiB"')
    return size


def _size(match: re.Match[str], text: str) -> float:
    number, prefix = float(match[1]), match[2].lower()
    decimal = prefix and not match[3] and text.strip().lower().endswith("b")
    return number * (_DECIMAL if decimal else _BINARY)[prefix]


def format_bytes(count: float) -> str:
    """1288490189 -> "1.2 GiB"."""
    sign, size = ("-" if count < 0 else ""), abs(count)
    if size < 1024:
        return f"{sign}{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1023.95:
            return f"{sign}{size:.1f} {unit}"
    return f"{sign}{size / 1024:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """0.0042 -> "4.2 ms", 12.34 -> "12.3 s", 200 -> "3 min 20 s", 7260 -> "2 h 1 min"."""
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    whole = round(seconds / 60)
    return f"{whole // 60} h {whole % 60} min"


def format_count(count: float) -> str:
    """1234 -> "1,234", 11_300_000 -> "11.3M"."""
    if abs(count) < 100_000:
        return f"{count:,.0f}"
    for limit, unit in ((1e6, "k"), (1e9, "M"), (1e12, "B")):
        if abs(count) < limit * 0.9995:
            return f"{count / (limit / 1000):.1f}{unit}"
    return f"{count / 1e12:.1f}T"
