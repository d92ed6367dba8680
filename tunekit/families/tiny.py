"""Small random components, from which a family builds its `tiny` pipeline. No download, the same for a seed.

`tiny` is a size, not a family: the classes, the layout and every shape rule are those of the real model.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from tunekit.diffusion.noise import stable_seed

START, END = "<|startoftext|>", "<|endoftext|>"
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
"""How Qwen3 is spoken to: turns by role. Where it shall not think first, an empty thought is written."""
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


def t5_tokenizer(max_length: int) -> Any:
    """Build a T5 tokenizer of the printable ASCII letters: one token per letter, one more before each word.

    Args:
        max_length: the longest prompt in tokens, the closing one among them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    end, space = "</s>", "\N{LOWER ONE EIGHTH BLOCK}"
    pieces = [("<pad>", 0.0), (end, 0.0), ("<unk>", 0.0), (space, -2.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((chr(i), -3.0) for i in range(33, 127))], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(space, "always")]
    )
    tokenizer.decoder = decoders.Metaspace(space, "always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, 1)]
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder, "tokenizer.json")))
        special = {"eos_token": end, "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
        config = {"tokenizer_class": "T5Tokenizer", "model_max_length": max_length, **special}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return T5TokenizerFast.from_pretrained(folder)


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


def qwen3_vl(
    tokenizer: Any, *, width: int, layers: int = 2, seed: int = 0, name: str = "text_encoder"
) -> Any:
    """Build a small Qwen3VLModel for `tokenizer`, of 4 heads on 2 keys, with eyes of one layer.

    Args:
        width: of its states.
        name: of the component; its weights are drawn from it and `seed`.
    """
    from transformers import Qwen3VLConfig, Qwen3VLModel

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1]},
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "patch_size": 2,
            "num_position_embeddings": 4,
            "out_hidden_size": width,
            "deepstack_visual_indexes": [],
        },
        tie_word_embeddings=True,
    )
    return randomized(lambda: Qwen3VLModel(config), seed, name)


def t5_text_encoder(
    tokenizer: Any,
    *,
    width: int,
    layers: int = 2,
    heads: int = 2,
    seed: int = 0,
    name: str = "text_encoder_2",
) -> Any:
    """Build a small T5EncoderModel for `tokenizer`, of the kind (gated GELU) that image models read with.

    Args:
        name: of the component; its weights are drawn from it and `seed`.
    """
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return randomized(lambda: T5EncoderModel(config), seed, name)


def qwen_tokenizer(max_length: int, words: Collection[str] = ()) -> Any:
    """Build a tokenizer of Qwen's kind, with its chat template, that knows the 256 bytes and no merges.

    A prompt of n bytes and a template around it are n + 19 tokens, n + 27 without thinking.

    Args:
        words: that are one token each.
    """
    from transformers import Qwen2TokenizerFast

    special = [END, TURN, TURN_END]
    words = [*byte_letters(), *special, "<think>", "</think>", *words]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        config = {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": max_length,
            "padding_side": "right",
            "eos_token": TURN_END,
            "pad_token": END,
            "unk_token": None,
            "added_tokens_decoder": {
                str(words.index(word)): {
                    "content": word,
                    "special": word in special,
                    **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
                }
                for word in words[256:]
            },
            "chat_template": CHAT,
        }
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return Qwen2TokenizerFast.from_pretrained(folder)


def qwen3(
    tokenizer: Any,
    *,
    width: int,
    layers: int = 2,
    seed: int = 0,
    causal: bool = False,
    name: str = "text_encoder",
) -> Any:
    """Build a small Qwen3Model for `tokenizer`, of 4 heads on 2 keys; with `causal`, a Qwen3ForCausalLM.

    Args:
        width: of its states; its heads are together wider, as those of the real one.
        name: of the component; its weights are drawn from it and `seed`.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        use_cache=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = Qwen3ForCausalLM if causal else Qwen3Model
    return randomized(lambda: kind(config), seed, name)


def autoencoder(channels: int, seed: int, **config: Any) -> Any:
    """Build a small AutoencoderKL of 4 pixels per latent, without the convolutions of Stable Diffusion 1.

    Args:
        channels: of the latents.
        config: what is different.
    """
    from diffusers import AutoencoderKL

    usual: dict[str, Any] = {
        "sample_size": 64,
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "latent_channels": channels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.75,
        "shift_factor": 0.125,
    }
    return randomized(lambda: AutoencoderKL(**{**usual, **config}), seed, "vae")


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
