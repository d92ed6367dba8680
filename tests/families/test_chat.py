"""Prompts of text encoders that are chat models."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from tunekit.families import sizes, tiny, weights
from tunekit.families.chat import Chat
from tunekit.families.prompts import cuts

BEFORE, BEHIND = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(("thinking", "thought"), [(True, ""), (False, THOUGHT)])
def test_a_prompt_is_what_a_user_says(thinking: bool, thought: str) -> None:
    tokenizer = tiny.qwen_tokenizer(56)
    chat = Chat(tokenizer, thinking)
    assert chat.written("a cat") == f"{BEFORE}a cat{BEHIND}{thought}"
    ids, mask = chat.read(["a cat", "the moon"])
    assert ids.shape == mask.shape == (2, 56) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    for row, prompt in enumerate(("a cat", "the moon")):
        assert tokenizer.decode(ids[row][mask[row]]) == chat.written(prompt)
        assert set(ids[row][~mask[row]].tolist()) == {tokenizer.pad_token_id}


def test_what_is_cut_of_a_prompt_in_its_template() -> None:
    chat = Chat(tiny.qwen_tokenizer(56), thinking=True)
    fits = 56 - 19
    assert cuts([chat], ["a" * fits]) == []
    (cut,) = cuts([chat], ["a" * fits, "a" * (fits + 20) + " and b"])
    assert (cut.tokens, cut.limit, cut.lost) == (56 + 26, 56, "a" * 7 + " and b")
    (edge,) = cuts([chat], ["a" * (fits + 1)])
    assert (edge.tokens, edge.lost) == (57, "\n")  # of the template


@pytest.mark.parametrize(("size", "billions"), [("4B", 4.022), ("8B", 8.191)])
def test_the_rows_are_of_the_published_sizes(size: str, billions: float) -> None:
    row = sizes.qwen3("text_encoder", size, thinking=True, causal=True)
    network = row.build()
    assert round(sum(p.numel() for p in network.parameters()) / 1e9, 3) == billions
    assert sizes.with_config(row, {"max_position_embeddings": 40960}).tokens == 512
    assert sizes.with_config(row, {"max_position_embeddings": 56}).tokens == 56


@pytest.mark.parametrize("level", ["", "model."])
@pytest.mark.parametrize("causal", [True, False])
def test_weights_are_found_below_the_head_or_above(tmp_path: Path, level: str, causal: bool) -> None:
    """Language models are published as they predict words, and read without that."""
    network = tiny.qwen3(tiny.qwen_tokenizer(56), width=24, causal=causal)
    inner = network.model if causal else network
    file = tmp_path / "model.safetensors"
    stored = {level + name: tensor for name, tensor in inner.state_dict().items()}
    safetensors.torch.save_file(stored, file)
    kept, problems = weights.fitted("text_encoder", network, weights.entries([file]), where="")
    if causal and not level:
        assert problems
    else:
        assert problems == [] and len(kept) == len(stored)
