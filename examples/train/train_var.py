"""Tokenizes the crops and trains the VAR on the tokens; `train.py tokens` and `train.py var`.

Most steps use only the first token maps, which decide the composition of a picture and are cheap.
The other steps use all maps, of the large ones only a window: these add texture, which a window
shows as well as the whole map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import loop
import torch
import torch.nn.functional as F
from data import CropSet
from safetensors.torch import save_file
from torch import Tensor
from train_vae import CONFIG

from fastvar_fx.models.var import VAR
from fastvar_fx.models.vqvae import VQVAE

PEAK_RATE = 1.5e-3
DECAY = 0.03
LOUDER = 6
"""Factor on the initial weights for code vectors, which here have about a third of unit size."""
FIRST_MAPS = 7
"""Number of token maps that most steps use."""
ALL_FROM = 0.55
"""Share of the steps after which all maps are used."""
WINDOW = 13
"""Side of the window that is used of larger maps."""
NO_CLASS = 0.1
"""Share of the images whose class is dropped, for guidance."""


def trained_vae(run: Path) -> VQVAE:
    """Returns the VQ-VAE of a run with its weights rounded to float16, as they are packaged."""
    vae = CONFIG.new_whole_vae()
    state = loop.read(run / "vae.pt", "vae")["model"]
    vae.load_state_dict({key: value.half() for key, value in state.items()})
    return vae.eval().requires_grad_(False)


def tokenize(set_path: Path, run: Path) -> None:
    """Writes the token maps of all crops, and of their mirror images, to `run`."""
    crops, vae = CropSet.load(set_path), trained_vae(run)

    def tokens(images: Tensor) -> Tensor:
        parts = []
        for some in torch.split(images, 8):
            maps = vae.encode(some.float() / 127.5 - 1, CONFIG.scales)
            parts.append(torch.cat(maps, 1).short())
            print(f"{len(parts) * 8} of {len(images)}", flush=True)
        return torch.cat(parts)

    contents = {
        "tokens": torch.cat((tokens(crops.images), tokens(crops.images.flip(-1)))),
        "labels": crops.labels.repeat(2),
        "held_out": tokens(crops.held_out),
        "held_out_labels": crops.held_out_labels,
    }
    loop.write(run / "tokens.pt", contents)


@torch.no_grad()
def new_var(vae: VQVAE) -> VAR:
    """Returns a VAR to train, whose input depends more on the picture so far than on positions.

    The classifier starts nearly uniform.
    """
    var = VAR(vae, CONFIG)
    var.init_weights(torch.Generator().manual_seed(0))
    var.word_embed.weight.mul_(LOUDER)
    var.pos_1LC.div_(LOUDER)
    var.head.weight.div_(20)
    return var


def map_sides() -> Tensor:
    """Returns the side of the token map that each token belongs to, (L,)."""
    return torch.cat([torch.full((side**2,), side) for side in CONFIG.scales])


def seen(maps: int, generator: torch.Generator) -> Tensor:
    """Returns the tokens of the first maps, of the larger ones a window, int64, ascending.

    Args:
        maps: Number of maps.
        generator: Source of the windows' positions, on the CPU.
    """
    kept, begin = [], 0
    for side in CONFIG.scales[:maps]:
        ids = begin + torch.arange(side**2).view(side, side)
        if side > WINDOW:
            top, left = torch.randint(side - WINDOW + 1, (2,), generator=generator).tolist()
            ids = ids[top : top + WINDOW, left : left + WINDOW]
        kept.append(ids.flatten())
        begin += side**2
    return torch.cat(kept)


def inputs(vae: VQVAE, tokens: Tensor) -> Tensor:
    """Returns the teacher-forced inputs of whole token sequences (B, L), (B, L - 1, Cvae)."""
    maps = torch.split(tokens.long(), [side**2 for side in CONFIG.scales], dim=1)
    return vae.quantize.inputs(maps[:-1], CONFIG.scales)


@torch.no_grad()
def bits(var: VAR, vae: VQVAE, tokens: Tensor, labels: Tensor) -> Tensor:
    """Returns the bits of each token of each image, (N, L)."""
    parts = []
    for some, classes in zip(torch.split(tokens, 2), torch.split(labels, 2), strict=True):
        logits = var(classes, inputs(vae, some))  # (B, L, V)
        parts.append(F.cross_entropy(logits.mT, some.long(), reduction="none") / math.log(2))
    return torch.cat(parts)


@dataclass
class Objective:
    """The loss of the VAR.

    Attributes:
        var: The model.
        vae: The VQ-VAE of the tokens.
        tokens: Tokens of all images, int16 (N, L).
        labels: int64 (N,).
        steps: Total number of steps.
        bf16: Whether the VAR runs in bfloat16.
    """

    var: VAR
    vae: VQVAE
    tokens: Tensor
    labels: Tensor
    steps: int
    bf16: bool

    def __call__(self, step: int) -> tuple[Tensor, str]:
        """Returns the loss of a step, and a text for the progress line."""
        generator = torch.Generator().manual_seed(step)
        device = self.var.lvl_1L.device
        whole = step >= ALL_FROM * self.steps
        maps, size = (len(CONFIG.scales), 2) if whole else (FIRST_MAPS, 8)
        only = seen(maps, generator).to(device)
        chosen = torch.randint(len(self.tokens), (size,), generator=generator)
        tokens = self.tokens[chosen].to(device).long()
        nameless = torch.rand(size, generator=generator) < NO_CLASS
        labels = self.labels[chosen].masked_fill(nameless, CONFIG.num_classes).to(device)
        x = inputs(self.vae, tokens)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.var(labels, x, only)
        losses = F.cross_entropy(logits.mT, tokens[:, only], reduction="none").mean(0)  # (n,)
        # A map of s x s tokens has weight s, not s^2, so that composition counts besides texture.
        weights = 1 / map_sides()[only.cpu()].to(device)
        loss = (losses * weights).sum() / weights.sum()
        return loss, f"{losses.mean().item() / math.log(2):.3f} bits a token in {maps} maps"


def train(run: Path, steps: int, device: str, *, bf16: bool) -> None:
    """Trains until the given step, from the checkpoint in `run` on if there is one."""
    data = loop.read(run / "tokens.pt", "tokens")
    vae = trained_vae(run).to(device)
    var = new_var(vae).to(device)
    optimizer = torch.optim.AdamW(var.parameters(), betas=(0.9, 0.95), weight_decay=DECAY)
    objective = Objective(var, vae, data["tokens"], data["labels"], steps, bf16)
    path = run / "var.pt"
    loop.train(path, var, optimizer, {}, objective, peak_rate=PEAK_RATE, steps=steps)


def measure(run: Path) -> None:
    """Prints the bits per token of held-out crops, and of as many of those trained on."""
    data = loop.read(run / "tokens.pt", "tokens")
    vae = trained_vae(run)
    var = trained_var(run, vae)
    count = len(data["held_out"])
    spread = torch.linspace(0, len(data["tokens"]) - 1, count).long()
    parts = {
        "held out": (data["held_out"], data["held_out_labels"]),
        "trained on": (data["tokens"][spread], data["labels"][spread]),
    }
    for name, (tokens, labels) in parts.items():
        taken = bits(var, vae, tokens, labels).mean(0)  # (L,)
        maps = torch.split(taken, [side**2 for side in CONFIG.scales])
        sides = zip(CONFIG.scales, maps, strict=True)
        print(
            f"{name}, {count} crops: {taken.mean():.3f} bits a token; by side of the map:",
            ", ".join(f"{side}: {part.mean():.2f}" for side, part in sides),
        )


def trained_var(run: Path, vae: VQVAE) -> VAR:
    """Returns the VAR of a run with its weights rounded to float16, as they are packaged."""
    var = VAR(vae, CONFIG)
    state = loop.read(run / "var.pt", "var")["model"]
    var.load_state_dict({key: value.half() for key, value in state.items()})
    return var.eval().requires_grad_(False)


def export(run: Path, out: Path) -> None:
    """Writes the parameters of both models in float16 as one safetensors file."""
    vae = trained_vae(run)
    var = trained_var(run, vae)
    tensors = {
        f"{part}.{name}": parameter.half().contiguous()
        for part, model in (("var", var), ("vae", vae))
        for name, parameter in model.named_parameters()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
