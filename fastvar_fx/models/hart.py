"""HART: text to image by predicting codebook entries scale by scale, in Llama-style blocks.

The text features are the tokens of step 0, and its last token predicts the first, 1 x 1, map. From
then on a step predicts the (h, w) token map of its scale at once, as in VAR; its input is the image
so far, area-averaged to the size of its map:

    300 text tokens  --> step 0  -->    1 token  --> f_hat
    f_hat at  2 x  2 --> step 1  -->    4 tokens --> f_hat
    ...
    f_hat at 64 x 64 --> step 13 --> 4096 tokens --> f_hat

A block is self-attention with rotary positions, over all earlier tokens through a cache of keys and
values, and a SwiGLU feed-forward branch, both behind RMS norms. The text encoder, the decoder from
`f_hat` to pixels and the diffusion head that refines the last map are not here: the input
is text features, the output is `f_hat`, and the last map is drawn like the others.

Letters in shapes: B batch, L tokens, C width, H heads, c = C / H, T text tokens, Ct text width,
V codebook entries, Cvae code vector width, K steps.

Source: HART, arXiv 2410.10812, sections 3.1 and 3.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_fx import schedule
from fastvar_fx.errors import ArgumentError
from fastvar_fx.models.cache import KVCache, kv_caching
from fastvar_fx.models.configs import (
    check_heads,
    check_sizes,
    configured,
    draw_weights,
    with_random_weights,
)
from fastvar_fx.models.maps import Map, check_maps
from fastvar_fx.models.rope import half_table, rotate_halves, text_table
from fastvar_fx.models.sampling import sample_top_k_top_p
from fastvar_fx.models.text import check_text
from fastvar_fx.models.vqvae import PhiBank

HART_1024: tuple[Map, ...] = tuple((side, side) for side in schedule.HART_1024)
"""The 14 token maps of a 1024 x 1024 image."""

_NORM_EPS = 1e-6

# --------------------------------------------------------------------------------------------------
# Transformer
# --------------------------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """An RMS norm that works in the type of its input.

    Args:
        width: Number of features.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` over its root mean square, times the weight."""
        y: Tensor = F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return y


class SelfAttention(KVCache):
    """Multi-head self-attention with rotary positions and a cache of keys and values.

    Args:
        width: Width C in and out.
        heads: Number of heads H.
    """

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = 0.25 / math.sqrt(width // heads)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        # A key bias shifts all scores of a query alike and softmax drops it: hence fixed at zero.
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Returns (B, L, C) for `x` (B, L, C) and the table of its positions, (2, B, 1, L, c)."""
        B, L, C = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv_proj.weight, bias).view(B, L, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 of (B, H, L, c)
        q, k = rotate_halves(q, rope).type_as(v), rotate_halves(k, rope).type_as(v)
        k, v = self.with_cached(k, v)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(B, L, C))
        return projected


class MLP(nn.Module):
    """A SwiGLU feed-forward branch.

    Args:
        width: Width C in and out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = math.ceil(8 * width // 3 / 256) * 256
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, L, C) for `x` (B, L, C)."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    """Self-attention and feed-forward branch behind one RMS norm, each with a residual add.

    Args:
        width: Width C.
        heads: Number of heads H.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ffn = MLP(width)
        self.ln_wo_grad = RMSNorm(width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Returns the residual stream after both branches, (B, L, C).

        Args:
            x: Residual stream, (B, L, C).
            rope: Table of the tokens' positions, (2, B, 1, L, c).
        """
        x = x + self.attn(self.ln_wo_grad(x), rope)
        y: Tensor = x + self.ffn(self.ln_wo_grad(x))
        return y


class LevelEmbedding(nn.Module):
    """An embedding of the step's index: a layer of sinusoids, then two linear layers.

    Args:
        width: Width C.
        frequencies: Number of sinusoids, even.
    """

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.frequencies = frequencies

    def forward(self, step: int) -> Tensor:
        """Returns the embedding of a step, (C,)."""
        weight = self.get_parameter("mlp.0.weight")
        rising = torch.arange(0, self.frequencies, 2, device=weight.device) / self.frequencies
        angles = step * 1e4**-rising
        embedded: Tensor = self.mlp(torch.cat((angles.cos(), angles.sin())).to(weight.dtype))
        return embedded


class HeadNorm(nn.Module):
    """The RMS norm before the classifier, with scale and shift from the text.

    Args:
        width: Width C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_wo_grad = RMSNorm(width)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, pooled: Tensor) -> Tensor:
        """Returns (B, L, C) for `x` (B, L, C) and the pooled text (B, C)."""
        scale, shift = self.ada_lin(pooled).unsqueeze(1).chunk(2, dim=-1)  # 2 of (B, 1, C)
        y: Tensor = self.ln_wo_grad(x).mul(scale.add(1)).add(shift)
        return y


class Quantizer(nn.Module):
    """The codebook, and what a drawn map does to the image so far.

    Args:
        vocab_size: Codebook entries V.
        channels: Code vector width Cvae.
    """

    def __init__(self, vocab_size: int, channels: int) -> None:
        super().__init__()
        self.quant_resi = PhiBank(channels)
        self.embedding = nn.Embedding(vocab_size, channels)

    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor, patch_nums: Sequence[Map]
    ) -> tuple[Tensor, Tensor]:
        """Returns the image with one more map, (B, Cvae, H, W), and it at the next map's size.

        The last map is added as it is, the others after upsampling and a convolution of the
        `PhiBank`. After the last, both results are the image.

        Args:
            si: Step, 0 to `SN` - 1.
            SN: Number of steps K, at least 2.
            f_hat: The image so far, (B, Cvae, H, W).
            h_BChw: Code vectors of the step's map, (B, Cvae, h, w).
            patch_nums: (h, w) of the K maps.
        """
        if si == SN - 1:
            f_hat = f_hat + h_BChw
            return f_hat, f_hat
        upsampled = F.interpolate(h_BChw, size=patch_nums[-1], mode="bicubic")
        f_hat = f_hat + self.quant_resi(upsampled, si / (SN - 1))
        return f_hat, F.interpolate(f_hat, size=patch_nums[si + 1], mode="area")


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class HARTConfig:
    """Sizes of a HART.

    Attributes:
        depth: Number of blocks.
        width: Width C.
        heads: Number of heads H; C / H is a multiple of 4.
        text_width: Width Ct of the text features.
        text_length: Most text tokens T of a prompt.
        vocab_size: Codebook entries V.
        z_channels: Code vector width Cvae.

    Raises:
        TypeError: If a size is not an int.
        ArgumentError: If a size is below 1, or the heads do not fit the width.
    """

    depth: int
    width: int
    heads: int
    text_width: int = 1536
    text_length: int = 300
    vocab_size: int = 4096
    z_channels: int = 32

    def __post_init__(self) -> None:
        check_sizes(**dataclasses.asdict(self))
        check_heads(self.width, self.heads, multiple_of=4)


class HART(nn.Module):
    """Text-conditional next-scale image generator, from text features to `f_hat`.

    Parameters have the names and shapes of the official model's transformer. Its checkpoint holds
    more, and the quantizer's are in that of its tokenizer, so load it with `strict=False`: only
    `quantizer.*` may be missing, and only `diffloss.*`, `decoder_norm.weight` and the buffers
    `lvl_1L` and `attn_bias_for_masking` left over.

    Generation keeps keys and values on the attention modules: one call at a time per model.

    Args:
        config: The sizes.

    Example:
        >>> model = build("tiny")
        >>> text = torch.randn(2, 5, model.config.text_width)
        >>> model.autoregressive_infer_cfg(text, HART_1024[:6], g_seed=0).shape
        torch.Size([2, 8, 7, 7])

    Source: HART, arXiv 2410.10812.
    """

    def __init__(self, config: HARTConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer = Quantizer(config.vocab_size, config.z_channels)
        self.context_norm = RMSNorm(config.text_width)
        self.context_embed = nn.Linear(config.text_width, config.width)
        self.word_embed = nn.Linear(config.z_channels, config.width)
        self.lvl_embed = LevelEmbedding(config.width)
        self.blocks = nn.ModuleList(
            [Block(config.width, config.heads) for _ in range(config.depth)]
        )
        self.head_nm = HeadNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size)

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        text: Tensor,
        scales: Sequence[Map] = HART_1024,
        *,
        positions: Tensor | None = None,
        negative: Tensor | None = None,
        g_seed: int | None = None,
        cfg: float = 4.5,
        top_k: int = 0,
        top_p: float = 0.0,
    ) -> Tensor:
        """Returns the feature maps that HART's decoder turns into images, (B, Cvae, H, W).

        Guidance runs each image twice, with its text and without: the batch inside is 2B.

        Args:
            text: Features of the prompts, padding included: all their tokens are attended to,
                (B, T, Ct).
            scales: (h, w) of the K >= 2 token maps, the first (1, 1); the last is that of the
                result.
            positions: Positions of the text tokens, (B, T); None counts them from 0.
            negative: Features of negative prompts, (B, T, Ct); None for zeros, as trained.
            g_seed: Seed of the draws; None uses torch's global generator of the device.
            cfg: Guidance strength, at least 0; step s takes the share s / (K - 1) of it, the last
                step no more than the one before, as in the official code.
            top_k: Draw among the k likeliest entries, 0 for all; the official code takes 600.
            top_p: Draw among the likeliest entries that reach this probability, 0 for all.

        Raises:
            ArgumentError: If a prompt or a scale does not fit.

        Source: HART, arXiv 2410.10812, section 3.2; guidance as in the official code.
        """
        check_text(text, self.config.text_width, self.config.text_length)
        check_maps(scales)
        B, T, _ = text.shape
        negative = torch.zeros_like(text) if negative is None else negative
        if positions is None:
            positions = torch.arange(T, device=text.device).expand(B, T)
        if negative.shape != text.shape or positions.shape != text.shape[:2]:
            raise ArgumentError(
                f"negative prompts and positions have the length of the text; found negative "
                f"{tuple(negative.shape)}, positions {tuple(positions.shape)} and text "
                f"{tuple(text.shape)}. Pad them to one length, as the text encoder does"
            )
        places = torch.cat((positions, torch.zeros_like(positions)))  # (2B, T)
        ropes = self._ropes(places, scales)
        generator = None if g_seed is None else torch.Generator(text.device).manual_seed(g_seed)
        prompts = torch.cat((text, negative)).to(self.context_embed.weight.dtype)
        context: Tensor = self.context_embed(self.context_norm(prompts))  # (2B, T, C)
        pooled = context.amax(dim=1)  # (2B, C)
        stream = torch.promote_types(prompts.dtype, torch.float32)
        size = (B, self.config.z_channels, *scales[-1])
        f_hat = torch.zeros(size, dtype=stream, device=text.device)
        x, last = context, len(scales) - 1

        with kv_caching(self):
            for step, scale in enumerate(scales):
                x = x + self.lvl_embed(step)
                for block in self.blocks:
                    x = block(x, ropes[step])
                logits = self.get_logits(x if step else x[:, -1:], pooled)  # (2B, h * w, V)
                t = cfg * (min(step, last - 1) / last)
                logits = (1 + t) * logits[:B] - t * logits[B:]  # (B, h * w, V)
                drawn = sample_top_k_top_p(logits, top_k, top_p, generator)  # (B, h * w)
                codes = self.quantizer.embedding(drawn).mT.reshape(B, -1, *scale)  # (B, Cvae, h, w)
                f_hat, image = self.quantizer.get_next_autoregressive_input(
                    step, len(scales), f_hat, codes, scales
                )
                tokens = image.flatten(2).mT.to(prompts.dtype)  # (B, L, Cvae)
                x = self.word_embed(tokens).repeat(2, 1, 1)  # (2B, L, C)
        return f_hat

    def get_logits(self, x: Tensor, pooled: Tensor) -> Tensor:
        """Returns float32 logits, (B, L, V), float64 in a float64 model.

        Args:
            x: Residual stream after the last block, (B, L, C).
            pooled: Pooled text, (B, C).
        """
        dtype = self.head.weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.head(self.head_nm(x.to(dtype), pooled.to(dtype)))
        return logits.to(torch.promote_types(dtype, torch.float32))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fills all parameters and buffers with values for which every branch contributes.

        As `draw_weights`, but queries and keys are twice as large, and the output layers of the
        branches are smaller the deeper the model.

        Args:
            generator: Source of the values, on the device of the parameters.
        """
        draw_weights(self, generator)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.qkv_proj.weight.mul_(2)
                module.proj.weight.div_(math.sqrt(self.config.depth))
            elif isinstance(module, MLP):
                module.down_proj.weight.mul_(2 / math.sqrt(self.config.depth))

    def _ropes(self, places: Tensor, scales: Sequence[Map]) -> list[Tensor]:
        """Returns the rotary table of every step, for text positions (2B, T)."""
        head_dim = self.config.width // self.config.heads
        maps = [half_table(scale, scales[-1], head_dim, places[:, -1]) for scale in scales[1:]]
        return [text_table(places, head_dim), *maps]


CONFIGS: Mapping[str, HARTConfig] = MappingProxyType(
    {
        "0.7b": HARTConfig(depth=24, width=1536, heads=24),
        "tiny": HARTConfig(
            depth=4, width=64, heads=2, text_width=48, text_length=30, vocab_size=256, z_channels=8
        ),
    }
)
"""The published model by name, and `tiny` for tests and demonstrations."""


def build(name: str, *, seed: int = 0, **overrides: Any) -> HART:
    """Returns a named model with random weights, in eval mode, without gradients, on the CPU.

    Args:
        name: A key of `CONFIGS`.
        seed: Seed of the weights.
        **overrides: Fields of `HARTConfig` in place of the named model's.

    Raises:
        TypeError: If an override is no field of `HARTConfig`, or a size is not an int.
        ArgumentError: If `name` is unknown, or the sizes do not fit each other.

    Example:
        >>> len(build("tiny", depth=2).blocks)
        2
    """
    config = configured(CONFIGS, name, overrides)
    return with_random_weights(lambda: HART(config), HART.init_weights, seed)
