"""Prompts of text encoders that are chat models: what is written around them, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Chat:
    """A tokenizer with a chat template: a prompt is what a user says, and the answer is about to begin.

    Attributes:
        tokenizer: whose template it is.
        thinking: whether the model may think before it answers; otherwise an empty thought is written.
    """

    tokenizer: Any
    thinking: bool

    @property
    def limit(self) -> int:
        """How many tokens are read, those of the template among them."""
        return int(self.tokenizer.model_max_length)

    def written(self, prompt: str) -> str:
        """The whole text that is read for a prompt."""
        made: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.thinking,
        )
        return made

    def read(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids [B, limit], int64, padded or cut; and where there is text, [B, limit], bool."""
        found = self.tokenizer(
            [self.written(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.limit,
            truncation=True,
            return_tensors="pt",
        )
        return found.input_ids, found.attention_mask.bool()

    def lost(self, prompt: str) -> tuple[int, str]:
        """How many tokens the whole text has, and what is not read of it: of the prompt, if it is cut."""
        whole = self.written(prompt)
        found = self.tokenizer(whole, truncation=False, verbose=False)
        count = len(found.input_ids)
        if count <= self.limit:
            return count, ""
        behind = str(self.tokenizer.decode(found.input_ids[self.limit :]))
        mark = "\N{REPLACEMENT CHARACTER}"
        return count, behind.removesuffix(self.written(mark).partition(mark)[2]) or behind
