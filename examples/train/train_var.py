"""Tokenizes the crops and trains the VAR on the tokens; `train.py tokens` and `train.py var`.

Most steps see the first token maps only, where the composition of a picture is decided; they are
cheap. The other steps see all maps, the last ones through a window: what they add is texture, which
a window shows as well as the whole map.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import checkpoints
import torch
import torch.nn.functional as F
from data import CropSet
from safetensors.torch import save_file
from torch import Tensor, nn
from train_vae import CONFIG, rate

from fastvar_fx.models.var import VAR
from fastvar_fx.models.vqvae import VQVAE

PEAK_RATE = 1.5e-3
DECAY = 0.03
FIRST_MAPS = 7
"""Token maps that most steps see."""
ALL_FROM = 0.6
"""Share of the steps after which all maps are seen."""
WINDOW = 12
"""Side of the window through which larger maps are seen then."""
NO_CLASS = 0.1
"""Share of the images that are shown without their class, for guidance."""


def trained_vae(run: Path) -> VQVAE:
    """Returns the VQ-VAE of a run with its weights rounded to float16, as they are shipped."""
    vae = CONFIG.new_whole_vae()
    state = checkpoints.read(run / "vae.pt", "vae")["model"]
    vae.load_state_dict({key: value.half() for key, value in state.items()})
    return vae.eval().requires_grad_(False)


def tokenize(set_path: Path, run: Path) -> None:
    """Writes the token maps of all crops, and of their mirror images, to `run`."""
    crops, vae = CropSet.load(set_path), trained_vae(run)

    def tokens(images: Tensor) -> Tensor:
        parts = []
        for some in images.split(8):
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
    checkpoints.write(run / "tokens.pt", contents)


def new_var(vae: VQVAE) -> VAR:
    """Returns a VAR to train: random weights, and a classifier that begins indifferent."""
    var = CONFIG.new_var(vae)
    var.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        var.head.weight.mul_(0.05)
    return var


def map_sides() -> Tensor:
    """Returns the side of the token map that each token belongs to, (L,)."""
    return torch.cat([torch.full((side**2,), side) for side in CONFIG.scales])


def seen(maps: int, window: int, generator: torch.Generator) -> Tensor:
    """Returns the tokens of the first maps, the larger ones through a window, rising.

    Args:
        maps: how many maps.
        window: its side.
        generator: source of its places.
    """
    kept, begin = [], 0
    for side in CONFIG.scales[:maps]:
        ids = begin + torch.arange(side**2).view(side, side)
        if side > window:
            top, left = torch.randint(side - window + 1, (2,), generator=generator).tolist()
            ids = ids[top : top + window, left : left + window]
        kept.append(ids.flatten())
        begin += side**2
    return torch.cat(kept)


def inputs(vae: VQVAE, tokens: Tensor) -> Tensor:
    """Returns the teacher-forced inputs of whole token sequences (B, L), (B, L - 1, Cvae)."""
    maps = tokens.long().split([side**2 for side in CONFIG.scales], dim=1)
    return vae.quantize.inputs(maps[:-1], CONFIG.scales)


@torch.no_grad()
def bits(var: VAR, vae: VQVAE, tokens: Tensor, labels: Tensor) -> Tensor:
    """Returns the bits that each token of each image takes, (N, L)."""
    parts = []
    for some, classes in zip(tokens.split(2), labels.split(2), strict=True):
        logits = var(classes, inputs(vae, some))  # (B, L, V)
        parts.append(F.cross_entropy(logits.mT, some.long(), reduction="none") / math.log(2))
    return torch.cat(parts)


def train(run: Path, steps: int, device: str, *, bf16: bool) -> None:
    """Trains until the given step, going on from the checkpoint in `run` if there is one."""
    data = checkpoints.read(run / "tokens.pt", "tokens")
    vae = trained_vae(run).to(device)
    var = new_var(vae).to(device)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(var.parameters(), PEAK_RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    sides = map_sides()
    path, start = run / "var.pt", 0
    if path.exists():
        state = checkpoints.read(path, "var")
        var.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        start = state["step"]
        print(f"going on from step {start}", flush=True)
    said = saved = time.monotonic()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate(step, steps)
        whole = step >= ALL_FROM * steps
        maps, size = (len(CONFIG.scales), 4) if whole else (FIRST_MAPS, 16)
        only = seen(maps, WINDOW if whole else max(CONFIG.scales), generator)
        chosen = torch.randint(len(data["tokens"]), (size,), generator=generator)
        tokens = data["tokens"][chosen].to(device)
        labels = data["labels"][chosen]
        labels = labels.where(torch.rand(size, generator=generator) >= NO_CLASS, CONFIG.num_classes)
        with torch.no_grad():
            x = inputs(vae, tokens)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = var(labels.to(device), x, only.to(device))
        losses = F.cross_entropy(logits.mT, tokens[:, only].long(), reduction="none").mean(0)  # (n,)
        # A map of s x s tokens weighs s, not s^2: composition counts besides texture.
        weights = (1 / sides[only]).to(device)
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(var.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            now = time.monotonic()
            print(f"step {step}: {losses.mean().item() / math.log(2):.3f} bits a token over "
                  f"{maps} maps, {(now - said) / 10:.2f} s a step", flush=True)
            said = now
        if time.monotonic() - saved > 60 or step == steps - 1:
            checkpoints.write(path, {
                "model": var.state_dict(), "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(), "step": step + 1,
            })
            saved = time.monotonic()


def export(run: Path, out: Path) -> None:
    """Writes the parameters of both models in float16 as one safetensors file."""
    vae = trained_vae(run)
    var = CONFIG.new_var(vae)
    var.load_state_dict(checkpoints.read(run / "var.pt", "var")["model"])
    tensors = {
        f"{part}.{name}": parameter.detach().half().contiguous()
        for part, model in (("var", var), ("vae", vae))
        for name, parameter in model.named_parameters()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
