"""Trains the multi-scale VQ-VAE; `train.py vae` runs it.

The first steps decode the features without quantization. Then the quantizer is used, its codebook
filled with vectors that are to be quantized; later, unused codes are refilled in the same way. Most
steps use small crops, since the network is convolutional; the last ones use whole crops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import loop
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_fx.models import CONFIGS, VAR_256
from fastvar_fx.models.scenes import SIDE, pictures
from fastvar_fx.models.vqvae import VQVAE, Downsample, QuantizedMap, ResBlock, Upsample

CONFIG = CONFIGS["demo"]
PEAK_RATE = 1.5e-3
RESIDUAL = 0.2
"""Initial gain of the last convolution of a residual block."""
UNQUANTIZED = 0.15
"""Share of the steps without the quantizer."""
WHOLE = 0.75
"""Share of the steps after which the crops are whole."""
SETTLED = 0.9
"""Share of the steps after which no code is refilled."""
REFILL_EVERY = 25
COMMITMENT = 0.25
"""Weight of the loss that moves features towards codes, relative to that of the codes; VAR's."""


@dataclass
class Objective:
    """The loss of the VQ-VAE.

    Attributes:
        vae: The model.
        images: Uint8 (N, 3, 256, 256).
        steps: Total number of steps.
        used: Which codes were used since the last refill, bool (V,).
        bf16: Whether encoder and decoder run in bfloat16.
    """

    vae: VQVAE
    images: Tensor
    steps: int
    used: Tensor
    bf16: bool

    def __call__(self, step: int) -> tuple[Tensor, str]:
        """Returns the loss of a step, and a text for the progress line."""
        generator = torch.Generator().manual_seed(step)
        whole = step >= WHOLE * self.steps
        side, size, scales = (SIDE, 2, CONFIG.scales) if whole else (SIDE // 2, 8, VAR_256)
        device = self.used.device
        images = windows(self.images, side, size, generator)
        images = images.to(device, memory_format=torch.channels_last)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)
        with autocast:
            f = self.vae.features(images, scales)
        f_hat, code_loss = self.quantized(step, f.float(), scales, generator)
        with autocast:
            made = self.vae.decoder(self.vae.post_quant_conv(f_hat))
        made = made.float()
        psnr = 10 * math.log10(4 / F.mse_loss(made, images).item())
        words = f"psnr {psnr:.1f} dB, codes {code_loss.item():.4f}, {int(self.used.sum())} in use"
        return picture_loss(made, images) + code_loss, words

    def quantized(
        self, step: int, f: Tensor, scales: tuple[int, ...], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Returns the features for the decoder, with the gradient of `f`, and the codes' loss."""
        since = step - math.ceil(UNQUANTIZED * self.steps)
        if since < 0:
            return f, f.new_zeros(())
        quantize = self.vae.quantize
        maps = list(quantize.quantized(f, scales))
        if since % REFILL_EVERY == 0 and step < SETTLED * self.steps:
            refill(quantize.embedding, ~self.used, maps, generator)
            self.used.zero_()
            maps = list(quantize.quantized(f, scales))
        self.used[torch.cat([token_map.tokens for token_map in maps], 1).flatten()] = True
        return straight_through(f, maps)


@torch.no_grad()
def new_vae() -> VQVAE:
    """Returns a VQ-VAE to train, which initially is close to the identity.

    Outside of residual blocks many convolutions follow each other directly, and random ones would
    blur the picture. They start as the identity, and the residual blocks close to it.
    """
    vae = CONFIG.new_whole_vae()
    vae.init_weights(torch.Generator().manual_seed(0))
    plain = [vae.quant_conv, vae.post_quant_conv, *vae.quantize.quant_resi.qresi_ls]
    for module in vae.modules():
        if isinstance(module, ResBlock):
            module.conv2.weight.mul_(RESIDUAL)
        elif isinstance(module, Upsample | Downsample):
            plain.append(module.conv)
    for convolution in plain:
        nn.init.dirac_(convolution.get_parameter("weight"))
    return vae


def windows(images: Tensor, side: int, size: int, generator: torch.Generator) -> Tensor:
    """Returns random windows of random images, half of them mirrored, float32 in [-1, 1].

    Args:
        images: Uint8 (N, 3, 256, 256).
        side: Side of the windows.
        size: Number of windows.
        generator: Source of the draws, on the CPU.
    """
    chosen = []
    for i in torch.randint(len(images), (size,), generator=generator).tolist():
        top, left = torch.randint(SIDE - side + 1, (2,), generator=generator).tolist()
        window = images[i, :, top : top + side, left : left + side]
        mirrored = torch.rand((), generator=generator) < 0.5
        chosen.append(window.flip(-1) if mirrored else window)
    return torch.stack(chosen).float() / 127.5 - 1


def picture_loss(made: Tensor, images: Tensor) -> Tensor:
    """Returns the distance of two batches of pictures, of their pixels and their gradients."""
    loss = F.l1_loss(made, images) + F.mse_loss(made, images)
    for axis in (-2, -1):
        loss = loss + F.l1_loss(made.diff(dim=axis), images.diff(dim=axis))
    return loss


@torch.no_grad()
def psnr(vae: VQVAE, images: Tensor) -> float:
    """Returns the PSNR in dB of quantized pictures, uint8 (N, 3, 256, 256), mean over pictures."""
    values = []
    for some in torch.split(images, 8):
        maps = vae.quantize.quantized(vae.features(some / 127.5 - 1, CONFIG.scales), CONFIG.scales)
        f_hat = torch.stack([token_map.added for token_map in maps]).sum(0)
        errors = (vae.decode(f_hat) - some / 255).square().mean((1, 2, 3))  # (n,)
        values.append(-10 * errors.log10())
    return torch.cat(values).mean().item()


def straight_through(f: Tensor, maps: list[QuantizedMap]) -> tuple[Tensor, Tensor]:
    """Returns the quantized features, with the gradient of `f`, and the quantizer's loss.

    Args:
        f: Features, (B, Cvae, H, W).
        maps: Their token maps.
    """
    f_hat, loss = torch.zeros_like(f), f.new_zeros(())
    for token_map in maps:
        f_hat = f_hat + token_map.added
        loss = loss + F.mse_loss(f_hat, f.detach())
        loss = loss + COMMITMENT * F.mse_loss(f_hat.detach(), f)
    return f + (f_hat - f).detach(), loss / len(maps)


@torch.no_grad()
def refill(
    codebook: nn.Embedding, unused: Tensor, maps: list[QuantizedMap], generator: torch.Generator
) -> None:
    """Replaces unused codes by vectors that were to be quantized, equally many of each map.

    Args:
        codebook: V codes.
        unused: Which codes are unused, bool (V,).
        maps: A batch's token maps.
        generator: Source of the choice, on the CPU.
    """
    count = int(unused.sum())
    share = math.ceil(count / len(maps))
    drawn = []
    for token_map in maps:
        vectors = token_map.z.transpose(0, 1).flatten(1).T  # (B * h * w, Cvae)
        drawn.append(vectors[torch.randint(len(vectors), (share,), generator=generator)])
    chosen = torch.randperm(share * len(maps), generator=generator)[:count]
    codebook.weight[unused] = torch.cat(drawn)[chosen]


def rendered(path: Path, count: int) -> Tensor:
    """Returns the pictures of seeds 0 to `count` - 1, uint8 (N, 3, 256, 256), kept in a file."""
    if path.exists():
        kept: Tensor = loop.read(path, "vae")["images"]
        if len(kept) == count:
            return kept
    images, _ = pictures(range(count))
    loop.write(path, {"images": images})
    return images


def train(run: Path, steps: int, count: int, device: str, *, bf16: bool) -> None:
    """Trains until the given step, from the checkpoint in `run` on if there is one.

    Args:
        run: Folder of the checkpoints.
        steps: Number of steps in all.
        count: Number of pictures to train on.
        device: Device to train on.
        bf16: Whether encoder and decoder run in bfloat16.
    """
    images = rendered(run / "pictures.pt", count)
    vae = new_vae().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99))
    used = torch.zeros(CONFIG.vocab_size, dtype=torch.bool, device=device)
    objective = Objective(vae, images, steps, used, bf16)
    path = run / "vae.pt"
    loop.train(path, vae, optimizer, {"used": used}, objective, peak_rate=PEAK_RATE, steps=steps)
