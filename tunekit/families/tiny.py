"""Small random components, from which a family builds its `tiny` pipeline. No download, the same for a seed.

`tiny` is a size, not a family: the classes, the layout and every shape rule are those of the real model.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from tunekit.diffusion.noise import stable_seed

START, END = "<|startoftext|>", "<|endoftext|>"
M = TypeVar("M", bound=nn.Module)


def clip_tokenizer(max_length: int) -> Any:
    """Build a CLIP tokenizer that knows the 256 bytes and no merges: about one token per character.

    It goes through files, the one way that transformers 4 and 5 share.
    """
    from transformers import CLIPTokenizer

    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), START, END]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, **special}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)


def clip_text_encoder(
    tokenizer: Any,
    *,
    width: int,
    layers: int = 2,
    heads: int = 2,
    seed: int = 0,
    act: str = "quick_gelu",
    projection: int | None = None,
    name: str = "text_encoder",
) -> Any:
    """Build a small CLIPTextModel for `tokenizer`; with `projection`, one that gives a pooled embedding.

    Args:
        name: of the component; its weights are drawn from it and `seed`.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=act,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return randomized(lambda: kind(config), seed, name)


def randomized(build: Callable[[], M], seed: int, name: str) -> M:
    """Build a module and draw its weights from (seed, name), leaving the global random state alone.

    Matrices get variance 1/fan_in, so that signals neither die nor grow.
    """
    with torch.random.fork_rng(
        devices=[]
    ):  # the constructors draw too, and the biases stay as they drew them
        torch.manual_seed(stable_seed(seed, name))
        module = build()
    generator = torch.Generator().manual_seed(stable_seed(seed, name))
    for _, parameter in sorted(module.named_parameters()):
        if parameter.ndim > 1:
            with torch.no_grad():
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
    return module.eval()


def byte_letters() -> list[str]:
    """Return the printable letter that byte-level BPE writes for each byte value (GPT-2's table)."""
    visible = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))  # first and last of each range that stands for itself
    printable = {byte for first, last in visible for byte in range(ord(first), ord(last) + 1)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
