#!/usr/bin/env python3
"""Make the bundled base pipeline ``builtin/emoji-64`` from scratch.

The result is a small but complete Stable Diffusion 1.x pipeline in the diffusers layout that draws
64 x 64 emoji from text.  Everything in it is trained here: the tokenizer, the VAE, the text encoder
and the U-Net.  The pictures come from the npm package ``emoji-datasource-google`` (Noto Emoji by
Google), the captions from the names in that package's ``emoji.json``.

The work is done in six phases, each of which is skipped when its result is already there::

    data -> vae -> text -> unet -> evaluate -> export

    python scripts/pretrain_emoji.py                      # all phases; run it again to go on
    python scripts/pretrain_emoji.py --phase evaluate     # look at a running job's last checkpoint
    python scripts/pretrain_emoji.py --phase export       # ... and write it out as a pipeline

The job may be killed at any moment: checkpoints are written beside the old one, flushed to disk and
renamed, and the same command goes on from the last one.  It runs on a CPU (two cores are enough) or
on a GPU (``--device cuda``).
"""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import itertools
import json
import logging
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LOG = logging.getLogger("pretrain_emoji")
REPO = Path(__file__).resolve().parent.parent

NPM_PACKAGE = "emoji-datasource-google"
NPM_VERSION = "16.0.0"
SKIPPED_CATEGORIES = {"Flags", "Component"}  # 259 flags look alike in 64 px; components are no pictures
IMAGE_SIZE = 64  # px
LATENT_SIZE = 16  # px; the VAE shrinks by 4
LATENT_CHANNELS = 4
MAX_TOKENS = 32  # length of a padded prompt, start and end token included
TEXT_WIDTH = 192
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # as in SD 1.x
TRAIN_TIMESTEPS = 1000
SIZE_LIMIT = 30_000_000  # bytes, the whole exported folder


# ---------------------------------------------------------------------------------------------------
# Files and checkpoints
# ---------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a crash leaves either the old or the new content, never a part.

    Args:
        path: Where the file shall be. Its folder is made when missing.
        data: The content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` with ``torch.save`` through `write_atomically`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """Reads a checkpoint, or returns None where there is none yet."""
    if not path.exists():
        return None
    return torch.load(path, map_location=device, weights_only=True)


# ---------------------------------------------------------------------------------------------------
# Phase 1: data
# ---------------------------------------------------------------------------------------------------


def find_package(data: Path | None, work: Path) -> Path:
    """Finds the unpacked npm package, getting it with ``npm pack`` when it was not given.

    Args:
        data: ``--data``: a tarball (``.tgz``) of the package, an unpacked folder, or None.
        work: The work folder; the tarball is unpacked to ``work/npm``.

    Returns:
        The folder that holds ``emoji.json`` and ``img/google/64``.
    """
    if data is not None and data.is_dir():
        for folder in (data, data / "package"):
            if (folder / "emoji.json").exists():
                return folder
        raise SystemExit(f"--data {data}: no emoji.json in it; give the unpacked npm package {NPM_PACKAGE}")
    target = work / "npm"
    if (target / "complete").exists():
        return target / "package"
    target.mkdir(parents=True, exist_ok=True)
    if data is None:
        npm = shutil.which("npm")
        if npm is None:
            raise SystemExit(
                f"npm was not found. Install Node.js, or get the tarball of {NPM_PACKAGE} {NPM_VERSION} on "
                f"another machine (npm pack {NPM_PACKAGE}@{NPM_VERSION}) and pass it with --data FILE.tgz"
            )
        subprocess.run([npm, "pack", f"{NPM_PACKAGE}@{NPM_VERSION}"], cwd=target, check=True)
        data = target / f"{NPM_PACKAGE}-{NPM_VERSION}.tgz"
    if not data.exists():
        raise SystemExit(f"--data {data}: no such file or folder")
    with tarfile.open(data) as archive:
        wanted = [
            member
            for member in archive.getmembers()
            if member.name.startswith("package/img/google/64/") or member.name.count("/") == 1
        ]
        archive.extractall(target, members=wanted, filter="data")
    (target / "complete").touch()
    return target / "package"


def clean_caption(text: str) -> str:
    """Turns an emoji name such as ``"FACE WITH COWBOY HAT"`` into a caption.

    Lower case, typographic quotes to plain ones, no doubled blanks.
    """
    text = text.lower().replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"').replace("_", " ")
    return " ".join(text.split())


def read_pictures(package: Path) -> tuple[np.ndarray, list[str]]:
    """Reads all pictures and captions that are trained on.

    Args:
        package: The unpacked npm package.

    Returns:
        Pictures (N, 64, 64, 3), uint8, composited on white, and their N captions, all different.
    """
    entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    entries.sort(key=lambda entry: entry["unified"])
    names = collections.Counter(entry["name"] for entry in entries)
    pictures: list[np.ndarray] = []
    captions: list[str] = []
    for entry in entries:
        if entry["category"] in SKIPPED_CATEGORIES or not entry["has_img_google"]:
            continue
        unique = entry["name"] and names[entry["name"]] == 1  # "MAN IN TUXEDO" names the person, too
        caption = clean_caption(entry["name"] if unique else entry["short_name"])
        with Image.open(package / "img/google/64" / entry["image"]) as image:
            rgba = image.convert("RGBA")
        if rgba.size != (IMAGE_SIZE, IMAGE_SIZE):
            rgba = rgba.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
        white = Image.new("RGBA", rgba.size, "white")
        pictures.append(np.asarray(Image.alpha_composite(white, rgba).convert("RGB")))
        captions.append(caption)
    return np.stack(pictures), captions


def run_data(args: argparse.Namespace) -> None:
    """Phase ``data``: writes ``data/pictures.npy`` and ``data/captions.json``."""
    if (args.work / "data/captions.json").exists():
        return
    pictures, captions = read_pictures(find_package(args.data, args.work))
    buffer = io.BytesIO()
    np.save(buffer, pictures)
    write_atomically(args.work / "data/pictures.npy", buffer.getvalue())
    write_atomically(args.work / "data/captions.json", json.dumps(captions, indent=0).encode())
    LOG.info("data: %d pictures, %d different captions", len(captions), len(set(captions)))


def load_data(work: Path) -> tuple[torch.Tensor, list[str]]:
    """Loads what `run_data` wrote.

    Returns:
        Pictures (N, 3, 64, 64) in [-1, 1], float32, channels last, and N captions.
    """
    pictures = torch.from_numpy(np.load(work / "data/pictures.npy")).permute(0, 3, 1, 2).float()
    captions = json.loads((work / "data/captions.json").read_text())
    return (pictures / 127.5 - 1).contiguous(memory_format=torch.channels_last), captions


# ---------------------------------------------------------------------------------------------------
# Phase 2: VAE
# ---------------------------------------------------------------------------------------------------


def make_vae() -> AutoencoderKL:
    """Makes the untrained VAE: 64 x 64 x 3 to 16 x 16 x 4, about 2.0 million parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 112),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )


def gradient_loss(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the horizontal and vertical pixel differences (keeps edges sharp).

    Args:
        made: Pictures (B, 3, H, W).
        wanted: Pictures of the same shape.
    """
    error = made - wanted
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def step_generator(seed: int, phase: int, step: int) -> torch.Generator:
    """A random generator that depends on the step alone, so a resumed run draws the same numbers."""
    return torch.Generator().manual_seed((seed * 7 + phase) * 10_000_000 + step)


def batch_indices(seed: int, step: int, batch: int, count: int) -> torch.Tensor:
    """Which pictures step ``step`` trains on: every picture once per epoch, in a new order each epoch.

    Returns:
        ``batch`` indices in [0, count), int64.
    """
    per_epoch = count // batch
    order = torch.randperm(count, generator=step_generator(seed, 5, step // per_epoch))
    start = (step % per_epoch) * batch
    return order[start : start + batch]


def schedule(progress: float, step: int, warmup: int, hold: float) -> float:
    """Learning rate factor: linear warm-up, constant until ``hold``, then a cosine down to 0.

    Args:
        progress: Share of the training that is over, 0..1.
        step: Steps done.
        warmup: Steps of warm-up.
        hold: Progress at which the decay begins, 0..1.
    """
    if step < warmup:
        return (step + 1) / warmup
    if progress <= hold:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - hold) / (1 - hold))))


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Shifts and scales the VAE's latents to mean 0 and deviation 1 in each channel.

    Stable Diffusion 1.x has one scaling factor and no shift, so both are folded into the 1 x 1
    convolutions before and after the latents; the decoded pictures stay the same.

    Args:
        vae: The VAE; its weights are changed.
        latents: Means of its latents (N, 4, 16, 16) over the training pictures.
    """
    mean = latents.mean(dim=(0, 2, 3))
    deviation = latents.std(dim=(0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:LATENT_CHANNELS] /= deviation[:, None, None, None]
    before.bias[:LATENT_CHANNELS] = (before.bias[:LATENT_CHANNELS] - mean) / deviation
    before.bias[LATENT_CHANNELS:] -= 2 * deviation.log()  # the other half is log-variances
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= deviation[None, :, None, None]


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Latent means (N, 4, 16, 16), not yet scaled, of pictures (N, 3, 64, 64) in [-1, 1]; float32."""
    parts = [vae.encode(part.to(vae.device)).latent_dist.mean for part in pictures.split(batch)]
    return torch.cat(parts).float()


@torch.no_grad()
def vae_psnr(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 64) -> float:
    """Peak signal-to-noise ratio in dB of decode(encode(picture)), from the mean error of all pictures."""
    total = 0.0
    for part in pictures.split(batch):
        part = part.to(vae.device)
        made = vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        total += ((made - part) / 2).square().mean().item() * len(part)
    return 10 * math.log10(len(pictures) / total)


def run_vae(args: argparse.Namespace) -> None:
    """Phase ``vae``: trains the autoencoder; writes ``vae/`` and the training latents ``latents.pt``."""
    if (args.work / "latents.pt").exists():
        return
    pictures, _ = load_data(args.work)
    torch.manual_seed(args.seed)
    vae = make_vae().to(args.device, memory_format=torch.channels_last)
    if args.device.type == "cpu":
        hasten_group_norms(vae)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=args.vae_lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    state = load_checkpoint(args.work / "vae.ckpt", args.device)
    step, elapsed = 0, 0.0
    if state is not None:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
        LOG.info("vae: going on from step %d", step)
    last_save, losses = time.monotonic(), collections.deque(maxlen=50)
    while (progress := step / args.vae_steps) < 1:
        start = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = args.vae_lr * schedule(progress, step, 100, 0.3)
        chosen = batch_indices(args.seed + 1, step, args.vae_batch, len(pictures))
        wanted = pictures[chosen].to(args.device)
        if step % 2:  # mirrored pictures help the VAE; the U-Net below learns each picture as it is
            wanted = wanted.flip(-1)
        noise_source = step_generator(args.seed, 1, step)
        with torch.autocast(args.device.type, torch.bfloat16):
            posterior = vae.encode(wanted).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=noise_source).to(args.device)
            made = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        loss = (made - wanted).abs().mean() + gradient_loss(made, wanted)
        loss = loss + args.vae_kl * posterior.kl().float().mean() / (LATENT_CHANNELS * LATENT_SIZE**2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        elapsed += time.monotonic() - start
        losses.append(loss.item())
        if step % 50 == 0:
            LOG.info(
                "vae: step %d/%d loss %.4f, %.3f s/step",
                step,
                args.vae_steps,
                np.mean(losses),
                elapsed / step,
            )
        if time.monotonic() - last_save > args.save_every:
            state = {
                "model": vae.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "elapsed": elapsed,
            }
            save_checkpoint(args.work / "vae.ckpt", state)
            last_save = time.monotonic()
    vae.eval()
    whiten_latents(vae, encode(vae, pictures))
    latents = encode(vae, pictures)
    factor = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=factor)
    psnr = vae_psnr(vae, pictures)
    vae.save_pretrained(args.work / "vae")
    figures = {
        "steps": step,
        "seconds": round(elapsed, 1),
        "psnr_db": round(psnr, 2),
        "scaling_factor": factor,
    }
    write_atomically(args.work / "vae.json", json.dumps(figures).encode())
    save_checkpoint(args.work / "latents.pt", {"latents": (latents * factor).cpu()})
    LOG.info("vae: done after %d steps: %s", step, figures)


# ---------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------

START_TOKEN, END_TOKEN, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def byte_alphabet() -> dict[int, str]:
    """The printable letter that stands for each byte in GPT-2's and CLIP's vocabularies, byte to letter."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return letters


def split_words(caption: str) -> list[str]:
    """Splits a lower-case caption the way CLIP does: letters, single digits, runs of other signs."""
    words: list[str] = []
    for part in caption.split():
        kind = ""
        for letter in part:
            this = "letter" if letter.isalpha() else "digit" if letter.isdigit() else "sign"
            if this == kind and this != "digit":
                words[-1] += letter
            else:
                words.append(letter)
            kind = this
    return words


def train_bpe(captions: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair encoding in CLIP's convention (``</w>`` ends a word).

    Args:
        captions: The texts.
        size: Entries of the vocabulary: 512 bytes (within and at the end of a word), ``size - 514``
            merges, and the two special tokens at its end. Any text can be encoded.

    Returns:
        The vocabulary, token to id, and the merges in order.
    """
    letters = byte_alphabet()
    counts: collections.Counter[tuple[str, ...]] = collections.Counter()
    for caption in captions:
        for word in split_words(caption):
            symbols = [letters[byte] for byte in word.encode("utf-8")]
            counts[(*symbols[:-1], symbols[-1] + WORD_END)] += 1
    alphabet = [letters[byte] for byte in sorted(letters, key=lambda byte: ord(letters[byte]))]
    tokens = alphabet + [letter + WORD_END for letter in alphabet]
    merges: list[tuple[str, str]] = []
    while len(tokens) < size - 2:
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for symbols, count in counts.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        if best[0] + best[1] not in tokens:
            tokens.append(best[0] + best[1])
        merged: collections.Counter[tuple[str, ...]] = collections.Counter()
        for symbols, count in counts.items():
            joined: list[str] = []
            for symbol in symbols:
                if joined and (joined[-1], symbol) == best:
                    joined[-1] += symbol
                else:
                    joined.append(symbol)
            merged[tuple(joined)] += count
        counts = merged
    tokens += [START_TOKEN, END_TOKEN]
    return {token: index for index, token in enumerate(tokens)}, merges


def make_tokenizer(captions: list[str], folder: Path, size: int) -> CLIPTokenizer:
    """Trains and saves the tokenizer, or loads it where it is already there.

    Both the slow tokenizer of transformers 4 (vocab.json, merges.txt) and the fast one of transformers
    5 (tokenizer.json) can load the folder.
    """
    if not (folder / "tokenizer.json").exists():
        vocabulary, merges = train_bpe(captions, size)
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        special = {
            "bos_token": START_TOKEN,
            "eos_token": END_TOKEN,
            "unk_token": END_TOKEN,
            "pad_token": END_TOKEN,
        }
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": MAX_TOKENS,
            "do_lower_case": True,
            "errors": "replace",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            **special,
        }
        write_atomically(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False).encode())
        write_atomically(folder / "merges.txt", ("\n".join(lines) + "\n").encode())
        write_atomically(folder / "special_tokens_map.json", json.dumps(special, indent=2).encode())
        write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2).encode())
        fast = CLIPTokenizer.from_pretrained(folder)
        backend = getattr(fast, "backend_tokenizer", None)
        if backend is None:  # transformers 4: the fast class is another one
            from transformers import CLIPTokenizerFast

            backend = CLIPTokenizerFast.from_pretrained(folder).backend_tokenizer
        write_atomically(folder / "tokenizer.json", backend.to_str().encode())
    return CLIPTokenizer.from_pretrained(folder)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Padded token ids (N, MAX_TOKENS), int64, exactly as `StableDiffusionPipeline` makes them."""
    made = tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    return made.input_ids


# ---------------------------------------------------------------------------------------------------
# Phase 3: text encoder
# ---------------------------------------------------------------------------------------------------

REGIONS = 4  # the latents are told in 4 x 4 regions, one per token from position 16 on
TELLING = slice(MAX_TOKENS - REGIONS**2, MAX_TOKENS)
CAPTION_ENDS = (", 3d style", ", flat style", " icon", ", picture", " emoji")
CAPTION_STARTS = ("a photo of ", "a picture of ", "an emoji of ", "a ")


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Makes the untrained text encoder: 3 layers of width 192, 1.7 million parameters."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def vary_caption(caption: str, words: list[str], source: random.Random) -> str:
    """A caption as it is (72 %), or with a start, an end or a foreign word, so that these do no harm.

    Args:
        caption: The caption.
        words: Words to choose the foreign word from.
        source: Where chance comes from.
    """
    chance = source.random()
    if chance < 0.72:
        return caption
    if chance < 0.86:
        return caption + source.choice(CAPTION_ENDS)
    if chance < 0.93:
        return source.choice(CAPTION_STARTS) + caption
    return f"{caption}, {source.choice(words)}"


def region_targets(latents: torch.Tensor) -> torch.Tensor:
    """Cuts latents (N, 4, 16, 16) into 4 x 4 regions: (N, 16, 64), row by row."""
    side = LATENT_SIZE // REGIONS
    parts = latents.reshape(len(latents), LATENT_CHANNELS, REGIONS, side, REGIONS, side)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(len(latents), REGIONS**2, -1)


def run_text(args: argparse.Namespace) -> None:
    """Phase ``text``: trains the text encoder alone to tell what a caption's picture looks like.

    A text encoder that is trained through the U-Net learns very slowly at first.  Here a linear layer
    reads the 16 outputs from position 16 on (mostly padding, which sees the whole caption before it)
    and must predict the latents of the caption's picture, each output one of 16 regions.  The layer is
    thrown away.  This takes minutes; the encoder is then kept as it is while the U-Net is trained.
    Writes ``text.ckpt``.
    """
    path = args.work / "text.ckpt"
    state = load_checkpoint(path, args.device)
    if state is not None and state["step"] >= args.text_steps:
        return
    _, captions = load_data(args.work)
    tokenizer = make_tokenizer(captions, args.work / "tokenizer", args.vocabulary)
    latents = load_checkpoint(args.work / "latents.pt")["latents"].to(args.device)
    targets = region_targets(latents)
    targets = targets - targets.mean(0)
    variance = targets.square().mean()
    torch.manual_seed(args.seed)
    text = make_text_encoder(tokenizer).to(args.device).train()
    text.config._attn_implementation = "eager"
    head = torch.nn.Linear(TEXT_WIDTH, targets.shape[-1]).to(args.device)
    modules = torch.nn.ModuleDict({"text": text, "head": head})
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=args.text_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    step, seconds = 0, 0.0
    if state is not None:
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        LOG.info("text: going on from step %d", step)
    words = sorted({word for caption in captions for word in caption.split()})
    last_save = before = time.monotonic()
    while step < args.text_steps:
        for group in optimizer.param_groups:
            group["lr"] = args.text_lr * schedule(step / args.text_steps, step, 60, 0.2)
        chosen = batch_indices(args.seed + 3, step, args.text_batch, len(captions))
        source = random.Random(args.seed * 1_000_003 + step)
        ids = token_ids(
            tokenizer, [vary_caption(captions[index], words, source) for index in chosen.tolist()]
        )
        with torch.autocast(args.device.type, torch.bfloat16):
            outputs = text(ids.to(args.device))[0][:, TELLING]
        loss = (head(outputs.float()) - targets[chosen.to(args.device)]).square().mean() / variance
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            LOG.info("text: step %d/%d, unexplained share %.3f", step, args.text_steps, loss.item())
        if step == args.text_steps or time.monotonic() - last_save > args.save_every:
            now = time.monotonic()
            seconds, before, last_save = seconds + now - before, now, now
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(path, {**state, "step": step, "seconds": seconds, "unexplained": loss.item()})


def load_text_encoder(work: Path, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder that phase ``text`` has trained, float32."""
    state = load_checkpoint(work / "text.ckpt")
    if state is None:
        raise SystemExit(f"{work / 'text.ckpt'} is not there: run --phase text first")
    text = make_text_encoder(tokenizer)
    weights = {
        name.removeprefix("text."): w for name, w in state["modules"].items() if name.startswith("text.")
    }
    text.load_state_dict(weights)
    return text.eval()


@torch.no_grad()
def tell(text: CLIPTextModel, ids: torch.Tensor, batch: int = 128) -> torch.Tensor:
    """The text encoder's outputs (N, 32, 192) for token ids (N, 32)."""
    return torch.cat([text(part)[0] for part in ids.split(batch)])


# ---------------------------------------------------------------------------------------------------
# Phase 4: U-Net
# ---------------------------------------------------------------------------------------------------


def make_unet() -> UNet2DConditionModel:
    """Makes the untrained U-Net, 11 million parameters.

    The order of the blocks differs from SD 1.x in one thing: the finest level (16 x 16) has no
    attention, the two below it have.  That halves the cost of a step on a CPU.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,  # as in SD 1.x this is the number of heads
        norm_num_groups=32,
    )


def make_scheduler() -> DDIMScheduler:
    """The sampler that is exported; its betas are those of the training."""
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def timestep_plan(
    alphas: torch.Tensor, gamma: float = 5.0, tilt: float = 4.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each timestep is drawn, and the weight of its loss.

    The wanted weight of timestep t is min-SNR-``gamma`` for epsilon prediction, min(snr, gamma) / snr,
    times a factor snr ** -0.5, held between 1 and ``tilt``: with small latents and few pictures it is
    in the strong noise that the caption decides what is drawn, and the loss is smallest there.  Half of
    the weight (its root) goes into the drawing and half into the loss, which keeps the gradient's
    variance low.

    Args:
        alphas: Cumulative products of 1 - beta (T,), float32.
        gamma: Limit of min-SNR weighting.
        tilt: Largest extra factor for strong noise; 1 turns it off.

    Returns:
        Cumulative probabilities (T,) and loss weights (T,) whose mean over drawn timesteps is 1.
    """
    snr = alphas / (1 - alphas)
    wanted = snr.clamp(max=gamma) / snr * snr.rsqrt().clamp(1.0, tilt)
    chance = wanted.sqrt() / wanted.sqrt().sum()
    weight = wanted / chance
    return chance.cumsum(0), weight / (chance * weight).sum()


def hasten_group_norms(module: torch.nn.Module) -> None:
    """Makes group normalisations of channels-last tensors several times faster on a CPU; same results.

    PyTorch's own kernel for channels-last bfloat16 is so slow there (measured with 2.13: 11 ms against
    1.7 ms at (24, 64, 16, 16), forward and backward) that copying to the plain layout and back pays.
    """

    def forward(self: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        made = F.group_norm(x.contiguous(), self.num_groups, self.weight, self.bias, self.eps)
        return made.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else made

    for part in module.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.forward = types.MethodType(forward, part)


class HalfTrainer:
    """AdamW and EMA for a module that computes in bfloat16 while its float32 weights are kept aside.

    Forward and backward pass are two to four times as fast as in float32 on CPUs with bfloat16
    instructions.

    Attributes:
        kept: By name of the buffer and of the parameter, float32: ``master`` weights, their ``average``, and
            AdamW's ``exp_avg`` and ``exp_avg_sq``. It is the part of a checkpoint that is the module's.
    """

    BUFFERS = ("master", "average", "exp_avg", "exp_avg_sq")

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        masters = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.kept = {
            "master": masters,
            "average": {name: w.clone() for name, w in masters.items()},
            "exp_avg": {name: torch.zeros_like(w) for name, w in masters.items()},
            "exp_avg_sq": {name: torch.zeros_like(w) for name, w in masters.items()},
        }
        module.to(torch.bfloat16)
        self.live = list(module.parameters())
        self.weights = [torch.nn.Parameter(w) for w in masters.values()]
        self.optimizer = torch.optim.AdamW(self.weights, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        for name, weight in zip(masters, self.weights, strict=True):
            self.optimizer.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": self.kept["exp_avg"][name],
                "exp_avg_sq": self.kept["exp_avg_sq"][name],
            }

    @torch.no_grad()
    def step(self, lr: float, done: int) -> None:
        """One step with the gradients that the module has now.

        Args:
            lr: Learning rate.
            done: Steps done before this one; the average follows faster in the beginning.
        """
        for weight, live in zip(self.weights, self.live, strict=True):
            weight.grad = live.grad.float()
            live.grad = None
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        average = list(self.kept["average"].values())
        torch._foreach_lerp_(average, list(self.weights), 1 - min(self.decay, (1 + done) / (10 + done)))
        torch._foreach_copy_(self.live, self.weights)

    @torch.no_grad()
    def load(self, kept: dict[str, dict[str, torch.Tensor]], done: int) -> None:
        """Takes over what was ``kept`` in a checkpoint after ``done`` steps."""
        for buffer in self.BUFFERS:
            for name, tensor in self.kept[buffer].items():
                tensor.copy_(kept[buffer][name])
        for state in self.optimizer.state.values():
            state["step"].fill_(done)
        torch._foreach_copy_(self.live, self.weights)


def run_unet(args: argparse.Namespace) -> None:
    """Phase ``unet``: trains the U-Net; checkpoints go to ``unet.ckpt``.

    The learning rate follows progress = max(step / steps, elapsed / deadline), so that it reaches 0
    in time even where the machine is slower than thought.  Both may be changed when resuming.
    """
    device, path = args.device, args.work / "unet.ckpt"
    state = load_checkpoint(path, device)
    if state is not None and progress_of(state["step"], state["elapsed"], args) >= 1:
        return
    torch.manual_seed(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    _, captions = load_data(args.work)
    # The plain layout: PyTorch's group norm is slow on channels-last tensors, which the VAE gave.
    latents = load_checkpoint(args.work / "latents.pt")["latents"].to(device).contiguous()
    ids, empty = token_ids(tokenizer, captions).to(device), token_ids(tokenizer, [""]).to(device)
    alphas = make_scheduler().alphas_cumprod
    chances, weights = timestep_plan(alphas, tilt=args.noise_tilt)
    text = load_text_encoder(args.work, tokenizer).to(device)
    told = tell(text, ids).to(torch.bfloat16)  # the text encoder does not change any more
    told_nothing = tell(text, empty).to(torch.bfloat16)
    unet = make_unet().to(device)
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # same result, and here faster than fused attention
    trainer = HalfTrainer(unet, args.ema)
    step, elapsed = 0, 0.0
    if state is not None:
        trainer.load(state["kept"], state["step"])
        step, elapsed = state["step"], state["elapsed"]
        LOG.info("unet: going on from step %d (%.1f min)", step, elapsed / 60)
        del state
    losses: collections.deque[float] = collections.deque(maxlen=100)
    first, last_save, before = step, time.monotonic(), time.monotonic()
    while True:
        now = time.monotonic()
        elapsed, before, seconds = elapsed + now - before, now, now - before
        progress = progress_of(step, elapsed, args)
        if step % 50 == 0 and losses:
            loss, minutes = float(np.mean(losses)), elapsed / 60
            message = "unet: step %d, progress %.1f %%, loss %.4f, %.3f s/step, %.1f min"
            LOG.info(message, step, 100 * progress, loss, seconds, minutes)
        if progress >= 1 or now - last_save > args.save_every:
            whole = {"kept": trainer.kept, "step": step, "elapsed": elapsed, "batch": args.batch}
            save_checkpoint(path, {**whole, "finished": progress >= 1})
            last_save = now
        if progress >= 1:
            break
        source = step_generator(args.seed, 2, step)
        chosen = batch_indices(args.seed + 2, step, args.batch, len(ids)).to(device)
        noise = torch.randn(args.batch, *latents.shape[1:], generator=source).to(device)
        ranks = (torch.arange(args.batch) + torch.rand(args.batch, generator=source)) / args.batch
        ranks = ranks[torch.randperm(args.batch, generator=source)]  # stratified over the batch
        drop = (torch.rand(args.batch, generator=source) < args.caption_dropout).to(device)
        t = torch.searchsorted(chances, ranks).clamp(max=TRAIN_TIMESTEPS - 1)
        alpha = alphas[t][:, None, None, None].to(device)
        noisy = (alpha.sqrt() * latents[chosen] + (1 - alpha).sqrt() * noise).to(torch.bfloat16)
        prompt = torch.where(drop[:, None, None], told_nothing, told[chosen])
        made = unet(noisy, t.to(device), prompt).sample.float()
        loss = ((made - noise).square().mean(dim=(1, 2, 3)) * weights[t].to(device)).mean()
        loss.backward()
        losses.append(loss.item())
        trainer.step(args.lr * schedule(progress, step - first, args.warmup, args.hold), step)
        step += 1
    LOG.info("unet: done after %d steps in %.0f s", step, elapsed)


def progress_of(step: int, elapsed: float, args: argparse.Namespace) -> float:
    """Share of the U-Net's training that is over: by steps or by the clock, whichever is further.

    Args:
        step: Steps done.
        elapsed: Seconds trained so far; time between two runs does not count.
        args: ``steps`` and ``deadline_minutes``.
    """
    share = step / args.steps
    if args.deadline_minutes:
        share = max(share, elapsed / (60 * args.deadline_minutes))
    return share


def load_pipeline(
    work: Path, dtype: torch.dtype = torch.float32
) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """Builds the pipeline from the work folder: the averaged weights of the last checkpoint.

    Returns:
        The pipeline, and the checkpoint's ``step``, ``elapsed`` (seconds), ``finished`` and ``batch``.
    """
    state = load_checkpoint(work / "unet.ckpt")
    if state is None:
        raise SystemExit(
            f"{work / 'unet.ckpt'} is not there yet: run --phase unet first, or wait for its checkpoint"
        )
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    text, unet = load_text_encoder(work, tokenizer), make_unet()
    unet.load_state_dict({name: state["kept"]["average"][name] for name, _ in unet.named_parameters()})
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(dtype=dtype), {key: state.get(key) for key in ("step", "elapsed", "finished", "batch")}


# ---------------------------------------------------------------------------------------------------
# Phase 5: evaluation
# ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(pipeline: StableDiffusionPipeline, captions: list[str], args: argparse.Namespace) -> np.ndarray:
    """Draws one picture per caption with the pipeline itself.

    Returns:
        Pictures (N, 64, 64, 3), uint8.
    """
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(captions), args.eval_batch):
        made = pipeline(
            prompt=captions[start : start + args.eval_batch],
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            guidance_scale=args.guidance,
            num_inference_steps=args.eval_steps,
            generator=torch.Generator().manual_seed(args.eval_seed + start),
            output_type="np",
        )
        parts.append((made.images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def contact_sheet(
    made: np.ndarray,
    wanted: np.ndarray,
    captions: list[str],
    ranks: list[int],
    columns: int = 8,
    count: int = 72,
) -> Image.Image:
    """Draws generated (left) and true (right) pictures with their caption and the rank of the true one.

    Args:
        made: Generated pictures (N, 64, 64, 3), uint8.
        wanted: The captions' own pictures, same shape.
        captions: N captions.
        ranks: Place of the true picture among the nearest training pictures, from 1.
        columns: Pairs in a row.
        count: Pairs shown.
    """
    width, height = 2 * IMAGE_SIZE + 48, IMAGE_SIZE + 22
    count = min(count, len(made))
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index in range(count):
        left, top = index % columns * width, index // columns * height
        sheet.paste(Image.fromarray(made[index]), (left, top))
        sheet.paste(Image.fromarray(wanted[index]), (left + IMAGE_SIZE + 4, top))
        colour = "green" if ranks[index] <= 5 else "red"
        pen.text((left + 2 * IMAGE_SIZE + 8, top + 20), f"#{ranks[index]}", fill=colour)
        pen.text((left, top + IMAGE_SIZE + 2), captions[index][:28], fill="black")
    return sheet


def run_evaluate(args: argparse.Namespace) -> None:
    """Phase ``evaluate``: how often a prompt is obeyed; writes ``evaluation.json`` and ``sheet.png``.

    ``--eval-count`` captions are chosen with a fixed seed. Each is drawn once, the picture is encoded
    by the VAE, and the training pictures are sorted by the Euclidean distance of their latents to it.
    The top-5 share is the share of captions whose own picture is among the nearest five.
    """
    pipeline, checkpoint = load_pipeline(args.work)
    path = args.work / "evaluation.json"
    if args.phase == "all" and path.exists():
        old = json.loads(path.read_text())
        if (old["steps"], old["captions"]) == (checkpoint["step"], args.eval_count):
            return
    pipeline = pipeline.to(args.device)
    pictures, captions = load_data(args.work)
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(args.eval_seed))
    chosen = order[: args.eval_count].tolist()
    wanted_captions = [captions[index] for index in chosen]
    start = time.monotonic()
    made = draw(pipeline, wanted_captions, args)
    seconds = time.monotonic() - start
    again = torch.from_numpy(made).permute(0, 3, 1, 2).float() / 127.5 - 1
    all_latents = encode(pipeline.vae, pictures).flatten(1)
    distance = torch.cdist(encode(pipeline.vae, again).flatten(1), all_latents).cpu()
    own = distance.gather(1, torch.tensor(chosen)[:, None])
    ranks = (1 + (distance < own).sum(1)).tolist()
    vae_figures = json.loads((args.work / "vae.json").read_text())
    text_figures = load_checkpoint(args.work / "text.ckpt") or {}
    figures = {
        "what": "pretraining of builtin/emoji-64",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "pictures": len(captions),
        "steps": checkpoint["step"],
        "batch": checkpoint["batch"],
        "seconds": round(checkpoint["elapsed"]),
        "finished": checkpoint["finished"],
        "captions": len(chosen),
        "guidance": args.guidance,
        "sampling_steps": args.eval_steps,
        "top5_share": sum(rank <= 5 for rank in ranks) / len(ranks),
        "top1_share": sum(rank == 1 for rank in ranks) / len(ranks),
        "median_rank": float(np.median(ranks)),
        "drawing_seconds": round(seconds, 1),
        "text_steps": text_figures["step"],
        "text_seconds": round(text_figures["seconds"]),
        "text_unexplained": text_figures["unexplained"],
        "vae_psnr_db": vae_figures["psnr_db"],
        "vae_steps": vae_figures["steps"],
        "vae_seconds": vae_figures["seconds"],
        "parameters": {
            key: sum(p.numel() for p in getattr(pipeline, key).parameters())
            for key in ("vae", "text_encoder", "unet")
        },
        "device": device_name(args.device),
        "versions": versions(),
    }
    LOG.info(
        "evaluate: step %d: top-5 share %.1f %%, top-1 %.1f %%, median rank %.0f (%d captions)",
        figures["steps"], 100 * figures["top5_share"], 100 * figures["top1_share"], figures["median_rank"],
        len(chosen),
    )  # fmt: skip
    truth = np.load(args.work / "data/pictures.npy")[chosen]
    buffer = io.BytesIO()
    contact_sheet(made, truth, wanted_captions, ranks).save(buffer, "PNG")
    write_atomically(args.work / "sheet.png", buffer.getvalue())
    write_atomically(args.work / f"sheet-{figures['steps']:06d}.png", buffer.getvalue())
    write_atomically(path, json.dumps(figures, indent=2).encode())


def device_name(device: torch.device) -> str:
    """The processor in words: the GPU's name, or the CPU's and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what computed the figures."""
    import diffusers
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        NPM_PACKAGE: NPM_VERSION,
    }


# ---------------------------------------------------------------------------------------------------
# Phase 6: export
# ---------------------------------------------------------------------------------------------------

MODEL_CARD = """# emoji-64

A small Stable Diffusion 1.x pipeline that draws 64 x 64 emoji from text. It is tunekit's bundled base
(`builtin/emoji-64`): real enough to fine-tune, prune, quantize and export on two CPU cores, small enough
to ship with the code.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("tunekit/assets/emoji-64")
pipeline("red apple", height=64, width=64, guidance_scale=4, num_inference_steps=30).images[0]
```

## What is in it

| part | class | parameters |
| --- | --- | --- |
| U-Net, channels 64/128/192, attention at 8 x 8 and 4 x 4 | `UNet2DConditionModel` | {unet:.2f} M |
| VAE, 4x downscale, 4 latent channels | `AutoencoderKL` | {vae:.2f} M |
| text encoder, 3 layers of width 192, 32 tokens | `CLIPTextModel` | {text:.2f} M |
| tokenizer, {vocabulary} entries | `CLIPTokenizer` | |

float16 safetensors; epsilon prediction, scaled-linear betas 0.00085 to 0.012, DDIM.

## How it was made

`scripts/pretrain_emoji.py` trained all parts from scratch on {pictures} pictures of the npm package
`emoji-datasource-google` {npm} (Noto Emoji in 64 px, composited on white, without flags and
components); the captions are the emoji's names in lower case.

* VAE: L1 and gradient loss. Its latents are shifted and scaled to mean 0 and deviation 1 in every channel,
  so its scaling factor is close to 1.
* Text encoder: {text_steps} steps in which its last 16 outputs learned to tell the latents of the caption's
  picture, region by region ({unexplained:.0%} of their variance remained unexplained); then kept.
* U-Net: {steps} steps of batch {batch} on {device}; min-SNR weighting with more weight on strong noise, 10 %
  caption dropout, EMA.

## Measured

Of {captions} captions (fixed seed, guidance {guidance:g}, {sampling} steps) the share whose own picture is
among the five training pictures nearest to the drawn one, by distance of VAE latents: **{top5:.1%}**
(nearest: {top1:.1%}). By chance it would be {chance:.1%}. VAE reconstruction: {psnr:.1f} dB PSNR.

## Limits

{verdict} It knows the names of emoji and little else: other texts give a mixture of related emoji at
best. It does not generalise and is no model for making pictures in earnest. The
training pictures are memorised on purpose, so the licence of the pictures applies; see LICENSE and NOTICE.
"""

NOTICE = f"""builtin/emoji-64

The weights in this folder were trained on, and can reproduce, pictures of Noto Emoji.

Noto Emoji images: Copyright Google LLC, Apache License 2.0 (see LICENSE),
https://github.com/googlefonts/noto-emoji. They were taken from the npm package {NPM_PACKAGE} {NPM_VERSION}
(Noto Emoji v2.048), Copyright (c) 2013 Cal Henderson, MIT License (code and data, e.g. the names that are
the captions), https://github.com/iamcal/emoji-data.

Changes: the pictures were composited on white, and a generative model was fitted to them.
"""


def name_text_weights(path: Path) -> None:
    """Gives the text encoder's weights the names of SD 1.x files, ``text_model.`` in front.

    transformers 4 needs the prefix, transformers 5 takes it off when loading but does not write it.
    """
    weights = load_file(path)
    named = {
        name if name.startswith("text_model.") else f"text_model.{name}": w for name, w in weights.items()
    }
    save_file(named, path, metadata={"format": "pt"})


def verdict(share: float) -> str:
    """What the top-5 share means, in words for the model card."""
    if share >= 0.6:
        return "Most captions that it was trained on are drawn recognisably."
    return "It is **not trained far enough**: most prompts are not obeyed yet; train on with the same script."


def run_export(args: argparse.Namespace) -> None:
    """Phase ``export``: writes the pipeline as float16 to ``--output``, with model card and notice."""
    evaluation = args.work / "evaluation.json"
    if not evaluation.exists():
        raise SystemExit(
            f"{evaluation} is not there: run --phase evaluate first; its figures go into the card"
        )
    figures = json.loads(evaluation.read_text())
    pipeline, checkpoint = load_pipeline(args.work, torch.float16)
    if checkpoint["step"] != figures["steps"]:
        LOG.warning(
            "export: step %d is exported, but step %d was evaluated", checkpoint["step"], figures["steps"]
        )
    fresh = args.output.with_name(args.output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    shutil.rmtree(fresh / "tokenizer")
    shutil.copytree(args.work / "tokenizer", fresh / "tokenizer")
    name_text_weights(fresh / "text_encoder/model.safetensors")
    for path in fresh.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for path in fresh.rglob("*.json"):  # no paths of this machine in the configurations
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sizes = figures["parameters"]
    card = MODEL_CARD.format(
        unet=sizes["unet"] / 1e6, vae=sizes["vae"] / 1e6, text=sizes["text_encoder"] / 1e6,
        vocabulary=len(pipeline.tokenizer), pictures=figures["pictures"], npm=NPM_VERSION,
        verdict=verdict(figures["top5_share"]), steps=figures["steps"],
        text_steps=figures["text_steps"], unexplained=figures["text_unexplained"],
        batch=figures["batch"], device=figures["device"],
        captions=figures["captions"], guidance=figures["guidance"], sampling=figures["sampling_steps"],
        top5=figures["top5_share"], top1=figures["top1_share"], chance=5 / figures["pictures"],
        psnr=figures["vae_psnr_db"],
    )  # fmt: skip
    (fresh / "README.md").write_text(card, encoding="utf-8")
    (fresh / "NOTICE").write_text(NOTICE, encoding="utf-8")
    licence = args.output / "LICENSE"
    if licence.exists():
        shutil.copy(licence, fresh / "LICENSE")
    total = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
    if total > SIZE_LIMIT:
        raise SystemExit(f"export: {total} bytes in {fresh} are more than {SIZE_LIMIT}: make a part smaller")
    old = args.output.with_name(args.output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if args.output.exists():
        args.output.rename(old)
    fresh.rename(args.output)
    shutil.rmtree(old, ignore_errors=True)
    LOG.info("export: %s, %d bytes", args.output, total)
    figures["exported_bytes"] = total
    if checkpoint["finished"] or args.phase == "export":
        write_atomically(args.report, (json.dumps(figures, indent=2) + "\n").encode())


# ---------------------------------------------------------------------------------------------------

PHASES = {
    "data": run_data,
    "vae": run_vae,
    "text": run_text,
    "unet": run_unet,
    "evaluate": run_evaluate,
    "export": run_export,
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work", type=Path, default=REPO / ".cache/pretrain-emoji", help="folder for checkpoints"
    )
    parser.add_argument(
        "--data", type=Path, help=f"tarball or folder of {NPM_PACKAGE}, if npm is not to get it"
    )
    parser.add_argument(
        "--output", type=Path, default=REPO / "tunekit/assets/emoji-64", help="exported pipeline"
    )
    parser.add_argument(
        "--report", type=Path, default=REPO / "benchmarks/pretrain_emoji.json", help="final figures"
    )
    parser.add_argument("--phase", choices=["all", *PHASES], default="all", help="one phase alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save-every", type=float, default=300, metavar="SECONDS", help="time between checkpoints"
    )
    group = parser.add_argument_group("VAE")
    group.add_argument("--vae-steps", type=int, default=2000)
    group.add_argument("--vae-batch", type=int, default=16)
    group.add_argument("--vae-lr", type=float, default=2e-3)
    group.add_argument("--vae-kl", type=float, default=1e-4, help="weight of the KL term, per latent value")
    group = parser.add_argument_group("text encoder")
    group.add_argument("--text-steps", type=int, default=4000)
    group.add_argument("--text-batch", type=int, default=128)
    group.add_argument("--text-lr", type=float, default=2.5e-3)
    group = parser.add_argument_group("U-Net")
    group.add_argument("--steps", type=int, default=20000, help="horizon of the learning rate's decay")
    group.add_argument(
        "--deadline-minutes", type=float, help="end after this time of training, the decay hastened to fit"
    )
    group.add_argument("--batch", type=int, default=32)
    group.add_argument("--lr", type=float, default=1e-3)
    group.add_argument("--warmup", type=int, default=200, metavar="STEPS")
    group.add_argument(
        "--hold", type=float, default=0.3, help="share of the training before the decay begins"
    )
    group.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights")
    group.add_argument("--caption-dropout", type=float, default=0.1)
    group.add_argument(
        "--noise-tilt", type=float, default=4.0, help="largest extra weight of strong noise; 1: none"
    )
    group.add_argument("--vocabulary", type=int, default=1792, help="size of the tokenizer's vocabulary")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-count", type=int, default=200, help="captions drawn")
    group.add_argument("--eval-batch", type=int, default=40)
    group.add_argument("--eval-steps", type=int, default=30)
    group.add_argument("--eval-seed", type=int, default=1234)
    group.add_argument("--guidance", type=float, default=4.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs one phase, or all of them in order."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for name, run in PHASES.items():
        if args.phase in ("all", name):
            run(args)


if __name__ == "__main__":
    main()
