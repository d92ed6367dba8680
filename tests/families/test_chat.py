"""Prompts of text encoders that are chat models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tunekit.families import sizes, tiny, weights
from tunekit.families.chat import Chat, export, states
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


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_states_are_those_of_the_text_alone(causal: bool) -> None:
    """Of a short prompt beside a long one, of the module that is exported, and of shapes without data."""
    tokenizer = tiny.qwen_tokenizer(56)
    encoder = tiny.qwen3(tokenizer, width=24, layers=3, causal=causal)
    ids, mask = Chat(tokenizer, thinking=False).read(["a cat", "the moon over a wall"])
    both = states(encoder, ids, mask)
    assert len(both) == 4
    count = int(mask[0].sum())
    alone = states(encoder, ids[:1, :count])
    graph = export(encoder, [1, 2], mask.int())
    exported = graph.module(ids.int(), mask.int())
    assert graph.outputs == ["hidden_states.1", "hidden_states.2"]
    for number, given in zip((1, 2), exported, strict=True):
        torch.testing.assert_close(both[number][:1, :count], alone[number], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(given, both[number], atol=1e-6, rtol=1e-5)
    planned = states(copy.deepcopy(encoder).to("meta"), ids.to("meta"))
    assert [state.shape for state in planned] == [state.shape for state in both]
