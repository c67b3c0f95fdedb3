"""Trains the multi-scale VQ-VAE; `train.py vae` runs it.

At first the features go to the decoder as they are. Then the quantizer comes in, its codebook
filled with vectors that it is asked to quantize; later, codes that have gone unused are refilled
likewise. Most steps see small crops, for the network is convolutional; the last see whole ones.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import checkpoints
import torch
import torch.nn.functional as F
from data import SIDE, CropSet
from torch import Tensor, nn

from fastvar_fx.models.var import CONFIGS, VAR_256
from fastvar_fx.models.vqvae import VQVAE, QuantizedMap

CONFIG = CONFIGS["demo"]
PEAK_RATE = 1.5e-3
WARM_UP = 50
UNQUANTIZED = 0.15
"""Share of the steps before the quantizer comes in."""
WHOLE = 0.75
"""Share of the steps after which the crops are whole."""
COMMITMENT = 0.25
"""Weight of the pull of the features towards their codes, against that of the codes; as VAR's."""
REFILL_EVERY = 25


def rate(step: int, steps: int) -> float:
    """Returns the learning rate's share of its peak: linear warm-up, then a cosine to zero."""
    return min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def batch_of(images: Tensor, side: int, size: int, generator: torch.Generator) -> Tensor:
    """Returns random windows of random images, half of them mirrored, float32 in [-1, 1].

    Args:
        images: uint8 (N, 3, 256, 256).
        side: of the windows.
        size: how many.
        generator: source of the draws, on the CPU.
    """
    chosen = []
    for i in torch.randint(len(images), (size,), generator=generator).tolist():
        top, left = torch.randint(SIDE - side + 1, (2,), generator=generator).tolist()
        window = images[i, :, top : top + side, left : left + side]
        mirrored = torch.rand((), generator=generator) < 0.5
        chosen.append(window.flip(-1) if mirrored else window)
    return torch.stack(chosen).float() / 127.5 - 1


def picture_loss(made: Tensor, images: Tensor) -> Tensor:
    """Returns how far two batches of pictures are apart: their pixels, and their slopes."""
    loss = F.l1_loss(made, images) + F.mse_loss(made, images)
    for axis in (-2, -1):
        loss = loss + F.l1_loss(made.diff(dim=axis), images.diff(dim=axis))
    return loss


def quantize(f: Tensor, maps: list[QuantizedMap]) -> tuple[Tensor, Tensor]:
    """Returns the quantized features, with the gradient of `f`, and the quantizer's loss.

    Args:
        f: features, (B, Cvae, H, W).
        maps: their token maps.
    """
    f_hat = torch.zeros_like(f)
    loss = f.new_zeros(())
    for token_map in maps:
        f_hat = f_hat + token_map.added
        loss = loss + F.mse_loss(f_hat, f.detach())
        loss = loss + COMMITMENT * F.mse_loss(f_hat.detach(), f)
    return f + (f_hat - f).detach(), loss / len(maps)


@torch.no_grad()
def refill(codebook: nn.Embedding, unused: Tensor, maps: list[QuantizedMap]) -> None:
    """Replaces unused codes by vectors of the maps, drawn alike from each map.

    Args:
        codebook: V codes.
        unused: which of them, bool (V,).
        maps: a batch's token maps.
    """
    count = int(unused.sum())
    maps = [token_map for token_map in maps if token_map.tokens.numel() > 0]
    share = math.ceil(count / len(maps))
    drawn = []
    for token_map in maps:
        vectors = token_map.z.transpose(0, 1).flatten(1).T  # (B * h * w, Cvae)
        drawn.append(vectors[torch.randint(len(vectors), (share,))])
    vectors = torch.cat(drawn)
    codebook.weight[unused] = vectors[torch.randperm(len(vectors))[:count]]


def train(set_path: Path, run: Path, steps: int, device: str, *, bf16: bool) -> None:
    """Trains until the given step, going on from the checkpoint in `run` if there is one."""
    crops = CropSet.load(set_path)
    vae = CONFIG.new_whole_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), PEAK_RATE, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    used = torch.zeros(CONFIG.vocab_size, dtype=torch.bool, device=device)
    start = 0
    path = run / "vae.pt"
    if path.exists():
        state = checkpoints.read(path, "vae")
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        used, start = state["used"].to(device), state["step"]
        print(f"going on from step {start}", flush=True)
    said = saved = time.monotonic()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate(step, steps)
        whole = step >= WHOLE * steps
        side, size, scales = (SIDE, 1, CONFIG.scales) if whole else (SIDE // 2, 4, VAR_256)
        images = batch_of(crops.images, side, size, generator)
        images = images.to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            f = vae.features(images, scales)
        f = f.float()
        f_hat, code_loss = f, f.new_zeros(())
        first = math.ceil(UNQUANTIZED * steps)
        if step >= first:
            maps = list(vae.quantize.quantized(f, scales))
            if step == first:
                refill(vae.quantize.embedding, ~used, maps)
                maps = list(vae.quantize.quantized(f, scales))
            f_hat, code_loss = quantize(f, maps)
            used[torch.cat([token_map.tokens for token_map in maps], 1).flatten()] = True
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            made = vae.decoder(vae.post_quant_conv(f_hat))
        loss = picture_loss(made.float(), images)
        optimizer.zero_grad()
        (loss + code_loss).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step > first and step % REFILL_EVERY == 0:
            live = int(used.sum())
            if step < 0.9 * steps and live < len(used):
                refill(vae.quantize.embedding, ~used, maps)
            used.zero_()
        if step % 50 == 0:
            now = time.monotonic()
            psnr = 20 * math.log10(2) - 10 * math.log10(F.mse_loss(made.float(), images).item())
            print(f"step {step}: loss {loss.item():.4f}, codes {code_loss.item():.4f}, used {int(used.sum())}, "
                  f"psnr {psnr:.1f} dB, {(now - said) / 50:.2f} s a step", flush=True)
            said = now
        if time.monotonic() - saved > 60 or step == steps - 1:
            checkpoints.write(path, {
                "model": vae.state_dict(), "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(), "used": used, "step": step + 1,
            })
            saved = time.monotonic()
