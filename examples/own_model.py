"""Accelerates a VAR variant that the package does not know, without a change to its code.

    python examples/own_model.py

The model has parallel attention and feed-forward branches, rotary positions from a table, grouped
queries, RMS norms, and keys and values in a dict that the loop owns. It draws maps of 1 x 1 to
24 x 36 tokens.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx

SCALES = ((1, 1), (2, 3), (4, 6), (8, 12), (12, 18), (16, 24), (24, 36))
WIDTH, HEADS, GROUPS, DEPTH = 512, 8, 2, 6
HEAD = WIDTH // HEADS


class ParallelBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * GROUPS * HEAD)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.gate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor, angles: Tensor, cache: dict[str, Tensor]) -> Tensor:
        B, L, _ = x.shape
        y = self.norm(x)
        q = self.q(y).view(B, L, HEADS, HEAD).transpose(1, 2)  # (B, H, L, c)
        k, v = self.kv(y).view(B, L, 2, GROUPS, HEAD).permute(2, 0, 3, 1, 4)  # (B, G, L, c) each
        q, k = rotate(q, angles), rotate(k, angles)
        if "k" in cache:
            k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
        cache["k"], cache["v"] = k, v
        attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).reshape(B, L, WIDTH))
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Variant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.layers = nn.ModuleList(ParallelBlock() for _ in range(DEPTH))
        self.to_map = nn.Linear(WIDTH, WIDTH)

    def draw(self, batch: int) -> Tensor:
        """Returns the last map (B, h, w, C)."""
        x = self.start.expand(batch, 1, -1)
        caches: list[dict[str, Tensor]] = [{} for _ in self.layers]
        for step, (h, w) in enumerate(SCALES):
            place = torch.arange(h * w)[:, None] / (h * w)
            angles = place * torch.logspace(0, 3, HEAD // 2)  # (L, c/2)
            for layer, cache in zip(self.layers, caches, strict=True):
                x = layer(x, angles, cache)
            image = self.to_map(x).transpose(1, 2).unflatten(2, (h, w))
            if step + 1 < len(SCALES):
                x = F.interpolate(image, SCALES[step + 1], mode="bicubic").flatten(2).mT
        last: Tensor = image.movedim(1, -1)
        return last


def seconds(model: Variant) -> float:
    begun = time.perf_counter()
    model.draw(1)
    return time.perf_counter() - begun


def main() -> None:
    torch.manual_seed(0)
    model = Variant().eval()
    schedule = fastvar_fx.Schedule(SCALES, ratios=(0.5, 0.75))
    fast = fastvar_fx.transform(model, schedule)
    print(fastvar_fx.trace(fast, lambda m: m.draw(1)))
    model.draw(1)
    dense, pruned = zip(*((seconds(model), seconds(fast)) for _ in range(5)), strict=True)
    a, b = sorted(dense)[2], sorted(pruned)[2]
    print(f"one image: dense {a:.2f} s, pruned {b:.2f} s, {a / b:.2f}x (medians of 5)")


if __name__ == "__main__":
    with torch.no_grad():
        main()
