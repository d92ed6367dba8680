"""Networks that judge pictures as people do: LPIPS between two, and CLIP between one and its prompt."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunekit.errors import ModelError

SMALLEST = 32
"""Pixels of a side that AlexNet can look at."""
CONVOLUTIONS = (
    (3, 64, 11, 4, 2),
    (64, 192, 5, 1, 2),
    (192, 384, 3, 1, 1),
    (384, 256, 3, 1, 1),
    (256, 256, 3, 1, 1),
)
"""Of AlexNet (Krizhevsky 2014, arXiv:1404.5997), as torchvision has it: channels, kernel, stride, padding."""
PLACES = (0, 3, 6, 8, 10)
"""Where these stand in torchvision's `features`."""
POOLED = (1, 2)
"""Before which of them pictures are halved."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of pixels in [-1, 1], to what ImageNet's networks take."""


class Lpips(nn.Module):
    """How different two pictures look to people (Zhang et al. 2018, arXiv:1801.03924), by AlexNet; 0: equal.

    Args:
        weights: of AlexNet, as torchvision publishes them: a .pth file or safetensors.
        heads: the learned weights of its channels, as torchmetrics has them in `lpips_models/alex.pth`.

    Raises:
        ModelError: a file holds something else, or is damaged.
    """

    def __init__(self, weights: Path, heads: Path) -> None:
        super().__init__()
        own = _tensors(weights)
        self.convolutions = nn.ModuleList(nn.Conv2d(*sizes) for sizes in CONVOLUTIONS)
        try:
            for place, layer in zip(PLACES, self.convolutions, strict=True):
                names = {"weight": f"features.{place}.weight", "bias": f"features.{place}.bias"}
                layer.load_state_dict({name: own[key] for name, key in names.items()})
        except (KeyError, RuntimeError) as error:
            raise ModelError("holds no AlexNet of torchvision", where=str(weights)) from error
        found = _tensors(heads)
        self.heads = [found[f"lin{index}.model.1.weight"].float() for index in range(len(CONVOLUTIONS))]
        self.eval().requires_grad_(False)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """What each layer sees of pixels [B, 3, H, W] in [0, 1], each place scaled to length 1."""
        shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        state, found = (2 * pixels.float() - 1 - shift) / scale, []
        for index, layer in enumerate(self.convolutions):
            if index in POOLED:
                state = F.max_pool2d(state, 3, 2)
            state = F.relu(layer(state))
            found.append(state / (state.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found

    def forward(self, value: Tensor, reference: Tensor) -> Tensor:
        """The distance of each picture from its reference; [B, 3, H, W] in [0, 1] to [B].

        Raises:
            ModelError: pictures that are smaller than `SMALLEST`.
        """
        if min(value.shape[-2:]) < SMALLEST:
            raise ModelError(f"LPIPS needs pictures of {SMALLEST} x {SMALLEST} pixels or more")
        total = torch.zeros(len(value))
        for a, b, head in zip(self.features(value), self.features(reference), self.heads, strict=True):
            total += F.conv2d((a - b).square(), head).mean((1, 2, 3))
        return total


class ClipScore:
    """How well pictures show their prompts: the cosine between the two in CLIP (arXiv:2103.00020), -1 to 1.

    Args:
        folder: a CLIP of transformers: config.json, weights, tokenizer, preprocessor_config.json.

    Raises:
        ModelError: it cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        try:
            self.model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            said = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
            self.mean, self.std = (
                torch.tensor(said[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std")
            )
        except Exception as error:  # whatever the library makes of foreign files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"no CLIP that can be opened: {reason}", where=str(folder)) from error
        self.model.eval().requires_grad_(False)
        self.side = int(self.model.config.vision_config.image_size)
        self.tokens = int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score of each picture [B, 3, H, W] in [0, 1] for its prompt; [B]."""
        read = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        )
        seen = self.model(
            input_ids=read.input_ids, attention_mask=read.attention_mask, pixel_values=self._prepared(pixels)
        )
        return F.cosine_similarity(seen.image_embeds.float(), seen.text_embeds.float())

    def _prepared(self, pixels: Tensor) -> Tensor:
        """As CLIP takes pictures: the shorter side to its own, the middle of the longer one, normalized."""
        height, width = pixels.shape[-2:]
        factor = self.side / min(height, width)
        size = max(self.side, int(height * factor)), max(self.side, int(width * factor))
        made = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        made = made[..., top : top + self.side, left : left + self.side]
        return (made - self.mean) / self.std


def _tensors(file: Path) -> Mapping[str, Tensor]:
    """Tensors by name out of a file, which is read as nothing else."""
    named = re.search(r"-([0-9a-f]{8})\.pth$", file.name)  # torchvision's names say what they hold
    try:
        if named:
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if not found.startswith(named[1]):
                raise ModelError(
                    "does not hold what its name says: it is damaged, or not whole", where=str(file)
                )
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except Exception as error:  # pickle raises anything
        raise ModelError("holds something else than weights, or is damaged", where=str(file)) from error
    if not isinstance(content, dict):
        raise ModelError("holds something else than tensors by name", where=str(file))
    return content
