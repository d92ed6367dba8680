"""Random numbers that belong to a sample, not to a process.

The noise, timestep, caption dropout and crop of a sample are drawn from a generator made of
`(seed, epoch, sample id, purpose)`. So the same sample sees the same draw on one GPU or eight, in any
micro-batch, before and after a resume, and two purposes never share a stream.
"""

from __future__ import annotations

import hashlib
import json

import torch


def stable_seed(*parts: int | str) -> int:
    """Hash `parts` to a seed in [0, 2**63) that is the same in every process and Python version."""
    text = json.dumps(
        parts, ensure_ascii=True, separators=(",", ":")
    )  # unambiguous: ("a", "b") is not ("ab",)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def sample_generator(seed: int, epoch: int, sample_id: str, purpose: str) -> torch.Generator:
    """Return the CPU generator of one sample for one purpose ("noise", "timestep", "crop" ...).

    Always on the CPU: CUDA generators give other numbers than the CPU's for the same seed.
    """
    return torch.Generator().manual_seed(stable_seed(seed, epoch, sample_id, purpose))
