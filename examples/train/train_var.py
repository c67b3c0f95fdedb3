"""Tokenizes the crops and trains the VAR on the tokens; `train.py tokens` and `train.py var`.

The first steps use only the first token maps, which decide the composition of a picture and are
cheap. The last steps use all maps, of the large ones only a window: these add texture, which a
window shows as well as the whole map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import loop
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_vae import CONFIG, psnr

from fastvar_fx.errors import ModelError
from fastvar_fx.models import scenes
from fastvar_fx.models.var import VAR
from fastvar_fx.models.vqvae import VQVAE

PEAK_RATE = 1.5e-3
DECAY = 0.03
LOUDER = 6
"""Factor on the initial weights for code vectors, which here have about a third of unit size."""
STAGES = ((0.4, 5, 64), (0.65, 7, 12), (1.0, 10, 4))
"""Until which share of the steps: number of token maps, pictures in a step."""
VAE, START = "vae.pt", "start.pt"
"""Files with the VQ-VAE, and with the weights that the VAR starts with, if not with random ones."""
SHARD = 256
"""Seeds in a file of tokens."""
MEASURED = 64
"""Pictures on which the VQ-VAE is measured."""
WINDOW = 13
"""Side of the window that is used of larger maps."""
WRONG = 0.04
"""Share of the tokens that the inputs have from another image, for drawn tokens may be wrong."""
NO_CLASS = 0.1
"""Share of the images whose class is dropped, for guidance."""


def trained_vae(run: Path) -> VQVAE:
    """Returns the VQ-VAE of a run with its weights rounded to float16, as they are packaged."""
    vae = CONFIG.new_whole_vae()
    state = loop.read(run / VAE, "vae")["model"]
    vae.load_state_dict({key: value.half() for key, value in state.items()})
    return vae.eval().requires_grad_(False)


def tokenize(run: Path, count: int) -> None:
    """Writes the token maps of `count` pictures, of their mirror images, and of held-out pictures.

    A file has those of `SHARD` seeds in a row and is named by the first; files that are there stay.
    """
    vae = trained_vae(run)
    firsts = [scenes.HELD_OUT, *range(0, count, SHARD)]
    for first in firsts:
        path = run / "tokens" / f"{first:016d}.pt"
        if path.exists():
            continue
        images, labels = scenes.pictures(range(first, first + SHARD))
        both = torch.cat((images, images.flip(-1)))
        tokens = torch.cat([_encoded(vae, some) for some in torch.split(both, 8)])
        loop.write(path, {"tokens": tokens, "labels": labels.repeat(2)})
        print(path, flush=True)


def _encoded(vae: VQVAE, images: Tensor) -> Tensor:
    """Returns the tokens of uint8 pictures, int16 (N, L)."""
    return torch.cat(vae.encode(images.float() / 127.5 - 1, CONFIG.scales), 1).short()


@dataclass(frozen=True)
class TokenSet:
    """Token maps of pictures and their classes.

    Attributes:
        tokens: Int16 (N, L).
        labels: int64 (N,).
    """

    tokens: Tensor
    labels: Tensor

    @classmethod
    def load(cls, run: Path, *, held_out: bool) -> TokenSet:
        """Reads what `tokenize` wrote.

        Raises:
            SystemExit: If there is nothing, or a file is damaged.
        """
        files = sorted((run / "tokens").glob("*.pt"))
        chosen = [file for file in files if (int(file.stem) >= scenes.HELD_OUT) is held_out]
        if not chosen:
            raise SystemExit(
                f"there are no tokens in {run / 'tokens'}; run `train.py tokens` first"
            )
        parts = [loop.read(file, "tokens") for file in chosen]
        return cls(*(torch.cat([part[name] for part in parts]) for name in ("tokens", "labels")))


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


def inputs(vae: VQVAE, tokens: Tensor, maps: int = len(CONFIG.scales)) -> Tensor:
    """Returns the teacher-forced inputs of whole token sequences.

    Args:
        vae: The VQ-VAE of the tokens.
        tokens: int (B, L).
        maps: Number of maps whose inputs are made; those of the others are zeros.

    Returns:
        Inputs of all maps but the first, (B, L - 1, Cvae).
    """
    sizes = [side**2 for side in CONFIG.scales]
    before = torch.split(tokens.long(), sizes, dim=1)[: maps - 1]
    made = vae.quantize.inputs(before, CONFIG.scales)
    return F.pad(made, (0, 0, 0, sum(sizes) - 1 - made.shape[1]))


@torch.no_grad()
def bits(var: VAR, vae: VQVAE, tokens: Tensor, labels: Tensor) -> Tensor:
    """Returns the bits of each token of each image, (N, L)."""
    parts = []
    for some, classes in zip(torch.split(tokens, 2), torch.split(labels, 2), strict=True):
        logits = var(classes, inputs(vae, some))  # (B, L, V)
        parts.append(F.cross_entropy(logits.mT, some.long(), reduction="none") / math.log(2))
    return torch.cat(parts)


def frequency_bits(tokens: Tensor, trained_on: Tensor) -> Tensor:
    """Returns the bits of each token by how frequent it is in its map, (N, L).

    Args:
        tokens: int (N, L).
        trained_on: Tokens whose frequencies count, int (M, L).
    """
    sizes = [side**2 for side in CONFIG.scales]
    parts = []
    maps = zip(torch.split(trained_on, sizes, 1), torch.split(tokens, sizes, 1), strict=True)
    for known, asked in maps:
        counts = torch.bincount(known.flatten().long(), minlength=CONFIG.vocab_size) + 1
        parts.append(-(counts / counts.sum()).log2()[asked.long()])
    return torch.cat(parts, 1)


@dataclass
class Objective:
    """The loss of the VAR.

    Attributes:
        var: The model.
        vae: The VQ-VAE of the tokens.
        data: Tokens and classes of all pictures.
        steps: Total number of steps.
        bf16: Whether the VAR runs in bfloat16.
    """

    var: VAR
    vae: VQVAE
    data: TokenSet
    steps: int
    bf16: bool

    def __call__(self, step: int) -> tuple[Tensor, str]:
        """Returns the loss of a step, and a text for the progress line."""
        generator = torch.Generator().manual_seed(step)
        maps, size = _stage(step / self.steps)
        device = self.var.lvl_1L.device
        only = seen(maps, generator).to(device)
        chosen = torch.randint(len(self.data.tokens), (size,), generator=generator)
        tokens = self.data.tokens[chosen].to(device).long()
        nameless = torch.rand(size, generator=generator) < NO_CLASS
        labels = self.data.labels[chosen].masked_fill(nameless, CONFIG.num_classes).to(device)
        wrong = (torch.rand(tokens.shape, generator=generator) < WRONG).to(device)
        x = inputs(self.vae, tokens.roll(1, 0).where(wrong, tokens), maps)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16), _matrix_products():
            logits = self.var(labels, x, only)
        losses = F.cross_entropy(logits.mT, tokens[:, only], reduction="none").mean(0)  # (n,)
        # A map of s x s tokens has weight s, not s^2, so that composition counts besides texture.
        weights = 1 / map_sides()[only.cpu()].to(device)
        loss = (losses * weights).sum() / weights.sum()
        return loss, f"{losses.mean().item() / math.log(2):.3f} bits a token in {maps} maps"


def _stage(progress: float) -> tuple[int, int]:
    """Returns the number of maps and of pictures of a step; first the composition, then texture."""
    return next((maps, size) for until, maps, size in STAGES if progress < until)


@contextmanager
def _matrix_products() -> Iterator[None]:
    """Runs attention as plain matrix products in the block.

    On a CPU the backward pass of the fused kernels takes several times as long.
    """
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def train(run: Path, steps: int, device: str, *, bf16: bool, compiled: bool) -> None:
    """Trains until the given step, from the checkpoint in `run` on if there is one."""
    data = TokenSet.load(run, held_out=False)
    vae = trained_vae(run).to(device)
    var = new_var(vae).to(device)
    if (run / START).exists():
        var.load_state_dict(loop.read(run / START, "start")["model"])
    for block in var.blocks if compiled else ():
        block.compile()
    optimizer = torch.optim.AdamW(var.parameters(), betas=(0.9, 0.95), weight_decay=DECAY)
    objective = Objective(var, vae, data, steps, bf16)
    path = run / "var.pt"
    loop.train(path, var, optimizer, {}, objective, peak_rate=PEAK_RATE, steps=steps)


def measure(run: Path) -> None:
    """Prints the PSNR of the VQ-VAE, and bits per token of pictures held out and trained on."""
    vae = trained_vae(run)
    images, _ = scenes.pictures(range(scenes.HELD_OUT, scenes.HELD_OUT + MEASURED))
    print(f"VQ-VAE, held out, {MEASURED} pictures: {psnr(vae, images):.2f} dB")
    var = trained_var(run, vae)
    held_out, known = (TokenSet.load(run, held_out=held) for held in (True, False))
    spread = torch.linspace(0, len(known.tokens) - 1, len(held_out.tokens)).long()
    seen_before = TokenSet(known.tokens[spread], known.labels[spread])
    rows = {
        "held out": bits(var, vae, held_out.tokens, held_out.labels),
        "trained on": bits(var, vae, seen_before.tokens, seen_before.labels),
        "held out, by frequency": frequency_bits(held_out.tokens, known.tokens),
    }
    for name, taken in rows.items():
        maps = torch.split(taken.mean(0), [side**2 for side in CONFIG.scales])
        sides = zip(CONFIG.scales, maps, strict=True)
        print(
            f"{name}, {len(taken)} pictures: {taken.mean():.3f} bits a token; by side of the map:",
            ", ".join(f"{side}: {part.mean():.2f}" for side, part in sides),
        )


def start(weights: Path, run: Path) -> None:
    """Writes what a training needs that starts with exported weights; see `export`.

    Raises:
        SystemExit: If the weights cannot be read, or are those of another model.
    """
    try:
        flat = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"{weights} has no weights that can be read: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {"vae": {}, "var": {}}
    for name, tensor in flat.items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = tensor.float()
    vae = CONFIG.new_whole_vae()
    var = VAR(vae, CONFIG)
    _fill(vae, parts["vae"], weights)
    _fill(var, parts["var"], weights)
    loop.write(run / VAE, {"model": vae.state_dict()})
    loop.write(run / START, {"model": var.state_dict()})


def _fill(model: nn.Module, state: dict[str, Tensor], weights: Path) -> None:
    """Loads all parameters of a model; its buffers have fixed values, which are not exported."""
    wrong = f"{weights} has weights of another model; export them again"
    try:
        missing, unknown = model.load_state_dict(state, strict=False)
    except (RuntimeError, ModelError) as error:
        raise SystemExit(f"{wrong} ({error})") from error
    if unknown or set(missing) & set(dict(model.named_parameters())):
        raise SystemExit(wrong)


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
