"""Prompts of text encoders that are chat models: what is written around them, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.families import graphs
from tunekit.families.family import MASK, ExportComponent, FamilyFacts, Pipeline, Tokens, read


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
        found = read(self.tokenizer, [self.written(prompt) for prompt in prompts])
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


def tokenize(facts: FamilyFacts, pipeline: Pipeline, prompts: list[str]) -> Tokens:
    """`Family.tokenize` of text encoders that are chat models: ids, and where there is text."""
    found: Tokens = {}
    for part in facts.encoders:
        assert part.chat is not None
        ids, mask = Chat(getattr(pipeline, part.tokenizer), part.chat).read(prompts)
        found |= {part.name: ids, part.name + MASK: mask}
    return found


def states(encoder: Any, ids: Tensor, mask: Tensor | None = None) -> Any:
    """Hidden states of a causal language model by the number of layers behind them: [B, tokens, width].

    Args:
        encoder: the network, or a graph of `Reader`.
        ids: [B, tokens].
        mask: [B, tokens], true where there is text; None where all of it is.
    """
    mask = torch.ones_like(ids) if mask is None else mask.to(ids)
    # Without data, transformers cannot look into a mask of two axes to see whether it may leave it out.
    told = attending(mask) if ids.is_meta else mask
    return encoder(ids, attention_mask=told, output_hidden_states=True, **_spared(encoder)).hidden_states


def attending(mask: Tensor) -> Tensor:
    """[B, 1, tokens, tokens], bool: which tokens (rows) look at which: at text that is not behind them.

    Args:
        mask: [B, tokens], true where there is text.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    return (place <= place[:, None]) & mask.bool()[:, None, None, :]


def _spared(encoder: Any) -> dict[str, Any]:
    """Options that spare what is not read: keys and values for words to come, and the words of all places."""
    causal = getattr(encoder, "lm_head", None) is not None
    return {"use_cache": False, **({"logits_to_keep": 1} if causal else {})}


class Reader(nn.Module):
    """What is exported of a causal language model: token ids and mask to some of its hidden states.

    Args:
        layers: numbers of the states, as in `states`.
    """

    def __init__(self, encoder: nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.layers = tuple(layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """[B, tokens] and [B, tokens] whole numbers, 0 where the mask hides padding."""
        # Of four axes, so that no branch of the export depends on what it hides.
        given: Any = self.encoder(
            input_ids,
            attention_mask=attending(attention_mask),
            output_hidden_states=True,
            **_spared(self.encoder),
        )
        return tuple(given.hidden_states[layer] for layer in self.layers)


def export(
    encoder: Any, layers: Sequence[int], mask: Tensor, *, module: nn.Module | None = None
) -> ExportComponent:
    """The graph of a text encoder that is a chat model.

    Args:
        layers: numbers of the states that it gives, as in `states`.
        mask: [2, tokens], whole numbers: an example of its attention mask.
        module: what is exported in place of a `Reader`.
    """
    inputs = {"input_ids": graphs.token_ids(mask.shape[1]), "attention_mask": mask}
    return ExportComponent(
        name="text_encoder",
        component="text_encoder",
        module=module or Reader(encoder, layers),
        inputs=inputs,
        dynamic=dict.fromkeys(inputs, graphs.TEXT_AXES),
        outputs=[f"hidden_states.{layer}" for layer in layers],  # as Optimum calls them
        config=graphs.model_config(encoder),
    )
