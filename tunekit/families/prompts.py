"""What no text encoder reads of a prompt: whatever lies behind the last token of all is cut off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tunekit.families import loading
from tunekit.families.chat import Chat
from tunekit.families.family import Family, FamilyFacts
from tunekit.resources import Source

_SHOWN = 3


@dataclass(frozen=True)
class Cut:
    """A prompt that is longer than what is read of it.

    Attributes:
        tokens: of the whole prompt, what stands before and behind it among them.
        limit: how many are read.
        lost: the text that is not read.
    """

    prompt: str
    tokens: int
    limit: int
    lost: str


def cuts(tokenizers: Sequence[Any], prompts: Iterable[str]) -> list[Cut]:
    """Which prompts are cut, the longest first.

    What CLIP leaves of a long prompt T5 may read, in families that have both: then nothing is lost.

    Args:
        tokenizers: of the text encoders, or `Chat`s; the one that reads most of a prompt tells of it.
    """
    found = []
    for prompt in dict.fromkeys(prompts):
        each = [_cut(tokenizer, prompt) for tokenizer in tokenizers]
        cut = [one for one in each if one is not None]
        if cut and len(cut) == len(each):
            found.append(min(cut, key=lambda one: len(one.lost)))
    return sorted(found, key=lambda cut: -cut.tokens)


def _cut(tokenizer: Any, prompt: str) -> Cut | None:
    """What one text encoder does not read; None if it reads all."""
    if isinstance(tokenizer, Chat):
        count, lost = tokenizer.lost(prompt)
        return Cut(prompt, count, tokenizer.limit, lost) if lost else None
    limit = tokenizer.model_max_length
    if len(prompt.encode()) + 2 <= limit:  # a token is a byte or more
        return None
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    return Cut(prompt, len(ids), limit, _lost(tokenizer, prompt, ids)) if len(ids) > limit else None


def _lost(tokenizer: Any, prompt: str, ids: Sequence[int]) -> str:
    """What is behind the tokens that are read; the last of those is the mark of the end."""
    kept = tokenizer.model_max_length - 1
    if getattr(tokenizer, "is_fast", False):
        spans = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True).offset_mapping
        return prompt[spans[kept][0] :]
    return str(tokenizer.decode(ids[kept:-1]))


def tokenizers(facts: FamilyFacts, pipeline: Any) -> list[Any]:
    """Of a pipeline, or of whatever has its tokenizers as attributes: what reads a prompt."""
    found = [(part, getattr(pipeline, part.tokenizer, None)) for part in facts.encoders if part.tokenizer]
    return [
        tokenizer if part.chat is None else Chat(tokenizer, part.chat)
        for part, tokenizer in found
        if tokenizer is not None
    ]


def tokenizers_of(family: Family, source: Source) -> list[Any]:
    """Of a source that is on this machine, or "tiny"; none where it is not, or they cannot be opened."""
    if source.name == "tiny":
        return tokenizers(family.facts, family.tiny())
    return tokenizers(family.facts, SimpleNamespace(**loading.tokenizers(source, family.facts)))


def told(
    found: Sequence[Cut], of: int, places: Mapping[str, str] | None = None, count: int | None = None
) -> list[str]:
    """Lines for people: how many are cut, the worst, and what is cut off.

    Args:
        found: those that are cut, or the worst of them.
        of: how many prompts there are.
        places: prompt -> where it stands.
        count: how many are cut, where `found` are not all.
    """
    if not found:
        return []
    limit, count = found[0].limit, count or len(found)
    lines = [
        f"{count:,} of {of:,} prompts and captions {'is' if count == 1 else 'are'} longer than the"
        f" {limit} tokens that the text encoder reads; the rest is cut off:"
    ]
    for cut in found[:_SHOWN]:
        place = (places or {}).get(cut.prompt) or _short(cut.prompt, 40)
        lines.append(f"  {place}: {cut.tokens} tokens, cut off: {_short(cut.lost, 100)!r}")
    if len(found) > _SHOWN:
        lines.append("  ...; put what matters first")
    return lines


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
