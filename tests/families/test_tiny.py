"""The small tokenizers and encoders that families build their tiny pipelines from."""

from __future__ import annotations

from pathlib import Path

import torch

from tunekit.families import tiny


def test_t5_reads_cuts_and_pads_like_the_real_one(tmp_path: Path):
    tokenizer = tiny.t5_tokenizer(max_length=12)

    ids = tokenizer(["a dog", "", "longer than twelve"], padding="max_length", max_length=12, truncation=True)

    assert tokenizer.decode(ids.input_ids[0], skip_special_tokens=True) == "a dog"
    assert ids.input_ids[1] == [1] + [0] * 11, "the end, then padding"
    assert [len(row) for row in ids.input_ids] == [12] * 3 and ids.input_ids[2][-1] == 1
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("a dog, and é").input_ids == tokenizer("a dog, and é").input_ids
    assert again.model_max_length == 12


def test_t5_is_drawn_from_its_seed_and_is_read_back(tmp_path: Path):
    tokenizer = tiny.t5_tokenizer(max_length=12)
    first, second, other = (tiny.t5_text_encoder(tokenizer, width=16, seed=seed) for seed in (0, 0, 1))
    ids = torch.tensor([[3, 68, 1, 0]])

    first.save_pretrained(tmp_path)
    with torch.no_grad():
        states = first(ids)[0]
        assert torch.equal(states, second(ids)[0]) and not torch.equal(states, other(ids)[0])
        assert torch.equal(states, type(first).from_pretrained(tmp_path)(ids)[0])
    assert states.shape == (1, 4, 16) and 0.1 < states.std() < 10
