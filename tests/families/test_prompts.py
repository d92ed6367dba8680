"""What is cut off of prompts that are too long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunekit import families
from tunekit.families.prompts import Cut, cuts, tokenizers, tokenizers_of, told
from tunekit.resources import Source

WORDS = "a castle on a hill by the sea with ships and birds under a cloudy sky at dusk " * 3
BUILTIN = Source("builtin/emoji-64")


def test_what_lies_behind_the_last_token_is_cut_off() -> None:
    family = families.get("sd15")
    (tokenizer,) = tokenizers_of(family, BUILTIN)
    texts = [WORDS + "red", "a short one", WORDS + "a very blue one", ""]
    found = cuts([tokenizer], texts)
    assert [cut.prompt for cut in found] == [texts[2], texts[0]]  # the longest first
    for cut in found:
        assert cut.limit == tokenizer.model_max_length == 32
        assert cut.tokens == len(tokenizer(cut.prompt).input_ids) > cut.limit
        kept = cut.prompt.removesuffix(cut.lost)
        assert kept != cut.prompt
        read = tokenizer(cut.prompt, truncation=True, max_length=cut.limit).input_ids
        assert tokenizer(kept).input_ids[: cut.limit - 3] == read[:-3]  # the cut may split a word


@pytest.mark.parametrize("length", [30, 31])
def test_the_limit_counts_the_marks_of_begin_and_end(length: int) -> None:
    (tokenizer,) = tokenizers_of(families.get("sd15"), BUILTIN)
    text = "a" + " a" * (length - 1)
    assert len(tokenizer(text).input_ids) == length + 2
    assert [cut.lost for cut in cuts([tokenizer], [text])] == ([] if length == 30 else ["a"])


def test_every_encoder_of_a_family_counts() -> None:
    family = families.get("sdxl")
    found = tokenizers(family.facts, family.tiny())
    assert len(found) == 2
    assert [cut.limit for cut in cuts(found, [WORDS])] == [40]


@pytest.mark.parametrize(("letters", "lost"), [(24, ""), (40, "a" * 12)])
def test_what_one_encoder_leaves_another_may_read(letters: int, lost: str) -> None:
    """CLIP's read 22 tokens of a prompt here, T5 30: one before the word and the end among them."""
    family = families.get("sd3")
    found = cuts(tokenizers(family.facts, family.tiny()), ["a" * letters])
    assert [(cut.limit, cut.lost) for cut in found] == ([(30, lost)] if lost else [])


def test_where_no_tokenizer_is_here_nothing_is_known(tmp_path: Path) -> None:
    assert tokenizers_of(families.get("sd15"), Source("someone/else")) == []
    (tmp_path / "model_index.json").write_text("[]")
    assert tokenizers_of(families.get("sd15"), Source(str(tmp_path))) == []
    assert cuts([], [WORDS]) == []


def test_the_worst_are_told_with_their_places() -> None:
    assert told([], 5) == []
    found = [Cut(f"{index}" * 50, 90 - index, 77, "the end") for index in range(5)]
    lines = told(found, 1000, {found[0].prompt: "photos/00.txt"})
    assert "5 of 1,000" in lines[0]
    assert "77 tokens" in lines[0]
    assert lines[1] == "  photos/00.txt: 90 tokens, cut off: 'the end'"
    assert lines[2].startswith("  11111")
    assert len(lines) == 5
