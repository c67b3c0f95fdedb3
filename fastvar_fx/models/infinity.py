"""Infinity: text to image by predicting the bits of every token, scale by scale.

A step predicts the (h, w) token map of its scale at once, d bits per token. The bits are a code of
d values +-1 / sqrt(d); the codes of all scales, each resized to the last map, add up to the latent,
and the latent so far, resized to the next map, is the input of the next step::

    text --attentive pool--> step 0 -->    1 token  --bits, codes--> latent
    latent at  2 x  2    --> step 1 -->    4 tokens --bits, codes--> latent
    ...
    latent at 64 x 64    --> step 12 --> 4096 tokens --bits, codes--> latent

A block is self-attention with 2-D rotary positions over this and all smaller maps (through a cache
of keys and values), cross-attention to the text, and a feed-forward branch. Scale, shift and gamma
of the norms come from the pooled text, by one layer shared by all blocks. The text encoder and the
decoder from latent to pixels are not here: features come in, latents go out.

Letters in shapes: B batch, L tokens, C width, H heads, c = C / H, T text tokens, Ct text width,
d bits per token, K steps.

Source: Infinity, arXiv 2412.04431, section 3.
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

from fastvar_fx.models.cache import KVCache, kv_caching
from fastvar_fx.models.maps import Map, check_maps
from fastvar_fx.models.named import (
    check_heads,
    check_sizes,
    configured,
    draw_weights,
    with_random_weights,
)
from fastvar_fx.models.rope import pair_table, rotate_pairs
from fastvar_fx.models.text import check_text, joined, mask_of
from fastvar_fx.models.var import FFN, AdaLNBeforeHead, SharedAdaLin, sample_top_k_top_p

_MAX_LOG_SCALE = math.log(100)
_NORM_EPS = 1e-6

# --------------------------------------------------------------------------------------------------
# Transformer
# --------------------------------------------------------------------------------------------------


class SelfAttention(KVCache):
    """Multi-head self-attention on unit queries and keys, with rotary positions and a cache.

    Args:
        width: width C in and out.
        heads: number of heads H.
    """

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log())
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        # A key bias shifts all scores of a query alike and softmax drops it: hence fixed at zero.
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Return (B, L, C) for ``x`` (B, L, C) and the table of its positions, (2, L, c / 2)."""
        B, L, C = x.shape
        x = x.to(self.mat_qkv.weight.dtype)
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias)  # (B, L, 3C)
        qkv = qkv.view(B, L, 3, self.heads, -1)  # (B, L, 3, H, c)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 of (B, H, L, c)
        scale = self.scale_mul_1H11.clamp_max(_MAX_LOG_SCALE).exp()
        q = rotate_pairs(F.normalize(q, dim=-1).mul(scale), rope).type_as(v)
        k = rotate_pairs(F.normalize(k, dim=-1), rope).type_as(v)
        k, v = self.with_cached(k, v)
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(B, L, C))
        return projected


class TextAttention(nn.Module):
    """What both attentions to the text share: keys and values of it, and the output layer.

    Args:
        width: width C of the output.
        text_width: width of the text features.
        heads: number of heads H.
    """

    zero_k_bias: Tensor

    def __init__(self, width: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mat_kv = nn.Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def attend(self, q: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Return (B, L, C) for queries (B, H, L, c), text (B, T, .) and its mask (B, 1, 1, T)."""
        bias = torch.cat((self.zero_k_bias, self.v_bias))
        kv = F.linear(text, self.mat_kv.weight, bias)  # (B, T, 2C)
        kv = kv.view(*text.shape[:2], 2, self.heads, -1)  # (B, T, 2, H, c)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # 2 of (B, H, T, c)
        out = F.scaled_dot_product_attention(q.type_as(k), k, v, attn_mask=mask)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))  # (B, H, L, c) -> (B, L, C)
        return projected


class CrossAttention(TextAttention):
    """Attention of the tokens to the text; see :class:`TextAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, width, heads)
        self.mat_q = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Return (B, L, C) for ``x`` (B, L, C), text (B, T, C) and its mask (B, 1, 1, T)."""
        q = self.mat_q(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # (B, H, L, c)
        return self.attend(q, text, mask)


class AttentivePool(TextAttention):
    """Attention of one learned query to the text; see :class:`TextAttention`."""

    def __init__(self, width: int, text_width: int, heads: int) -> None:
        super().__init__(width, text_width, heads)
        self.mat_q = nn.Parameter(torch.randn(1, heads, width // heads))

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """Return the pooled text, (B, C), for text (B, T, Ct) and its mask (B, 1, 1, T)."""
        q = self.mat_q.unsqueeze(2).expand(text.shape[0], -1, -1, -1)  # (B, H, 1, c)
        return self.attend(q, text, mask).squeeze(1)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward branch, each with a residual add.

    The residual stream stays in float32 (float64 in a float64 model), whatever the branches run in.

    Args:
        width: width C.
        heads: number of heads H.

    Source: Infinity, arXiv 2412.04431, section 3.2, with one AdaLN layer shared by all blocks.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.sa = SelfAttention(width, heads)
        self.ca = CrossAttention(width, heads)
        self.ffn = FFN(width, 4 * width)
        self.ln_wo_grad = nn.LayerNorm(width, eps=_NORM_EPS, elementwise_affine=False)
        self.ca_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)

    def forward(self, x: Tensor, ada: Tensor, text: Tensor, mask: Tensor, rope: Tensor) -> Tensor:
        """Return the residual stream after the three branches, (B, L, C).

        Args:
            x: residual stream, (B, L, C).
            ada: the shared AdaLN values, (B, 1, 6, C).
            text: projected text, (B, T, C).
            mask: which text tokens there are, bool (B, 1, 1, T).
            rope: table of the step's positions, (2, L, c / 2).
        """
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (self.ada_gss + ada).unbind(2)
        h = self.ln_wo_grad(x).mul(scale1.add(1)).add(shift1)
        x = x + self.sa(h, rope).mul(gamma1)
        x = x + self.ca(self.ca_norm(x.to(self.ca_norm.weight.dtype)), text, mask)
        h = self.ln_wo_grad(x).mul(scale2.add(1)).add(shift2)
        y: Tensor = x + self.ffn(h.to(self.ffn.fc1.weight.dtype)).mul(gamma2)
        return y


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfinityConfig:
    """Sizes of an Infinity.

    Attributes:
        depth: number of blocks.
        width: width C.
        heads: number of heads H; C / H is a multiple of 4.
        bits: channels of the latent.
        patch: side of the square of latent pixels that make a token; a token has
            d = bits * patch^2 bits.
        text_width: width Ct of the text features.
        text_length: most text tokens T of a prompt.
        levels: most steps K of a generation.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, or heads do not divide their width.
    """

    depth: int
    width: int
    heads: int
    bits: int = 32
    patch: int = 1
    text_width: int = 2048
    text_length: int = 512
    levels: int = 15

    def __post_init__(self) -> None:
        check_sizes(**dataclasses.asdict(self))
        check_heads(self.width, self.heads, multiple_of=4)
        check_heads(self.width, self.pool_heads)

    @property
    def pool_heads(self) -> int:
        """Heads of the attentive pool: one per 128 text features."""
        return max(1, self.text_width // 128)


class Infinity(nn.Module):
    """Text-conditional next-scale image generator, from text features to a latent.

    Parameters and buffers have the names and shapes of the official model, except that its
    checkpoints hold the blocks in chunks, ``block_chunks.i.module.j``; here they are ``blocks.n``,
    and :meth:`load_state_dict` takes both.

    Generation keeps keys and values on the attention modules: one call at a time per model.

    Args:
        config: the sizes.

    Example:
        >>> model = build("tiny")
        >>> text = torch.randn(2, 5, model.config.text_width)
        >>> model.autoregressive_infer_cfg(text, template(1.0, "0.06M"), g_seed=0).shape
        torch.Size([2, 8, 16, 16])

    Source: Infinity, arXiv 2412.04431.
    """

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        width, token_bits = config.width, config.bits * config.patch**2
        self.cfg_uncond = nn.Parameter(torch.randn(config.text_length, config.text_width))
        self.text_norm = nn.RMSNorm(config.text_width, eps=_NORM_EPS)
        pool = AttentivePool(width, config.text_width, config.pool_heads)
        self.text_proj_for_sos = nn.ModuleDict({"ca": pool})
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(config.text_width, width),
            nn.GELU(approximate="tanh"),
            nn.Linear(width, width),
        )
        self.pos_start = nn.Parameter(torch.randn(1, 1, width))
        self.lvl_embed = nn.Embedding(config.levels, width)
        self.word_embed = nn.Linear(token_bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), SharedAdaLin(width))
        self.blocks = nn.ModuleList([Block(width, config.heads) for _ in range(config.depth)])
        self.head_nm = AdaLNBeforeHead(width, _NORM_EPS)
        self.head = nn.Linear(width, 2 * token_bits)

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        text: Tensor,
        scales: Sequence[Map],
        *,
        text_mask: Tensor | None = None,
        negative: Tensor | None = None,
        negative_mask: Tensor | None = None,
        g_seed: int | None = None,
        cfg: float | Sequence[float] = 4.0,
        tau: float | Sequence[float] = 0.5,
        top_k: int = 0,
        top_p: float = 0.0,
        finest: Map | None = None,
        trunk_scale: int = 1000,
    ) -> Tensor:
        """Return latents, (B, bits, patch * h, patch * w) with (h, w) the last scale.

        Args:
            text: features of the prompts, (B, T, Ct).
            scales: (h, w) of the K token maps, the first (1, 1); ``maps.template`` has the trained.
            text_mask: bool (B, T), True where the prompt has a token; None for everywhere.
            negative: features of negative prompts, (B, Tn, Ct); None for the learned ones of no
                prompt.
            negative_mask: bool (B, Tn).
            g_seed: seed of the draws; None uses torch's global generator of the device.
            cfg: guidance, at least 0, for all steps or one per step; where it is 1 at every step,
                the batch inside is B, else 2B.
            tau: temperature of the logits, above 0, for all steps or one per step.
            top_k: 1 takes the likelier value of every bit, 0 or 2 draws it.
            top_p: draw among the values that together reach this probability, in [0, 1].
            finest: (h, w) of the map that rotary positions are counted on; None for the last of
                ``scales``. trained: the last of ``template(h_div_w)``.
            trunk_scale: number of steps to run; the latent of the steps before is returned.

        Raises:
            ValueError: a prompt, a scale or a number per step does not fit.

        Source: Infinity, arXiv 2412.04431, algorithm 2; guidance as in the official code.
        """
        width, length = self.config.text_width, self.config.text_length
        check_text(text, width, length, mask=text_mask)
        check_maps(scales, most=self.config.levels)
        guidance, temperature = (_per_step(name, value, len(scales))
                                 for name, value in (("cfg", cfg), ("tau", tau)))  # fmt: skip
        B, device = text.shape[0], text.device
        mask = mask_of(text, text_mask)
        guided = any(strength != 1 for strength in guidance)
        if guided and negative is None:
            null = self.cfg_uncond[: text.shape[1]].to(text).expand_as(text)
            text, mask = torch.cat((text, null)), mask.repeat(2, 1)
        elif guided and negative is not None:
            check_text(negative, width, length, mask=negative_mask, batch=B)
            text, mask = joined((text, negative), (mask, mask_of(negative, negative_mask)))
        text, mask = self.text_norm(text.to(self.text_norm.weight.dtype)), mask[:, None, None]
        stream = torch.promote_types(self.pos_start.dtype, torch.float32)
        cond = self.text_proj_for_sos["ca"](text, mask).to(stream)  # (2B, C)
        text = self.text_proj_for_ca(text)  # (2B, T, C)
        with torch.autocast(device.type, enabled=False):
            ada = self.shared_ada_lin(cond.to(self.pos_start.dtype)).to(stream)  # (2B, 1, 6, C)
        head_dim = self.config.width // self.config.heads
        ropes = [pair_table(scale, finest or scales[-1], head_dim, device) for scale in scales]
        generator = None if g_seed is None else torch.Generator(device).manual_seed(g_seed)
        size = [side * self.config.patch for side in scales[-1]]
        latent = torch.zeros(B, self.config.bits, *size, dtype=stream, device=device)
        x = cond.unsqueeze(1) + self.pos_start  # (2B, 1, C)

        with kv_caching(self):
            for step in range(min(len(scales), trunk_scale)):
                x = x + self.lvl_embed.weight[step]
                for block in self.blocks:
                    x = block(x, ada, text, mask, ropes[step])
                logits = self.get_logits(x, cond) / temperature[step]  # (2B, L, 2d)
                if guided:
                    t = guidance[step]
                    logits = t * logits[:B] + (1 - t) * logits[B:]  # (B, L, 2d)
                pairs = logits.reshape(B, -1, 2)  # (B, L * d, 2)
                bits = sample_top_k_top_p(pairs, top_k, top_p, generator)  # (B, L * d)
                codes = self._codes(bits, scales[step]).to(stream)
                latent = latent + F.interpolate(codes, size=size, mode="bilinear")
                if step + 1 < len(scales):
                    x = self._embed(latent, scales[step + 1]).to(stream)  # (B, L, C)
                    x = x.repeat(cond.shape[0] // B, 1, 1)  # (2B, L, C)
        return latent

    def get_logits(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return logits of each bit being 0 and 1, (B, L, 2d), in the stream's type.

        Args:
            x: residual stream after the last block, (B, L, C).
            cond: pooled text, (B, C).
        """
        dtype = self.head.weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.head(self.head_nm(x.to(dtype), cond.to(dtype)))
        return logits.to(x.dtype)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fill all parameters and buffers with values that keep every branch alive.

        As :func:`~fastvar_fx.models.named.draw_weights`, but attention starts at scale 4, a block's
        gammas lie near 1 / sqrt(depth), AdaLN varies little with the text, and logits are large
        enough that most bits have a likelier value.

        Args:
            generator: source of the values, on the device of the parameters.
        """
        draw_weights(self, generator)
        self.head.weight.mul_(2)
        self.get_parameter("shared_ada_lin.1.weight").mul_(0.2)
        self.get_parameter("head_nm.ada_lin.1.weight").mul_(0.2)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.scale_mul_1H11.fill_(math.log(4.0))
            elif isinstance(module, Block):
                module.ada_gss.mul_(0.2)
                module.ada_gss[:, :, :2] += 1 / math.sqrt(self.config.depth)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load what :meth:`state_dict` gave, or an official checkpoint with its block chunks.

        Args:
            state_dict: tensors by name.
            strict: whether missing and unexpected keys are errors.
            assign: keep the given tensors instead of copying their values.

        Raises:
            RuntimeError: keys or shapes do not fit.
        """
        return super().load_state_dict(_without_chunks(state_dict), strict=strict, assign=assign)

    def _codes(self, bits: Tensor, scale: Map) -> Tensor:
        """Return the codes of a token map's bits (B, L * d), (B, bits, patch * h, patch * w)."""
        values = (2 * bits - 1) / math.sqrt(self.config.bits)
        codes = values.view(len(bits), *scale, -1).permute(0, 3, 1, 2)  # (B, d, h, w)
        return F.pixel_shuffle(codes, self.config.patch)

    def _embed(self, latent: Tensor, scale: Map) -> Tensor:
        """Return the input of a step, (B, L, C): the latent so far at the size of its map."""
        size = [side * self.config.patch for side in scale]
        resized = F.interpolate(latent, size=size, mode="bilinear")
        tokens = F.pixel_unshuffle(resized, self.config.patch).flatten(2).mT  # (B, L, d)
        embedded: Tensor = self.word_embed(tokens.to(self.word_embed.weight.dtype))
        return embedded


def _per_step(name: str, value: float | Sequence[float], steps: int) -> list[float]:
    """Return one number per step."""
    values = [float(value)] * steps if isinstance(value, (int, float)) else list(value)
    if len(values) != steps:
        raise ValueError(
            f"asked: {len(values)} values of {name}\nfound: {steps} scales\n"
            f"do: give one number per scale, or one for all"
        )
    return values


def _without_chunks(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with ``block_chunks.i.module.j`` renamed to ``blocks.n``."""
    chunked = {key: key.split(".") for key in state if key.startswith("block_chunks.")}
    places = sorted({(int(parts[1]), int(parts[3])) for parts in chunked.values()})
    number = {place: n for n, place in enumerate(places)}

    def renamed(key: str) -> str:
        if key not in chunked:
            return key
        _, chunk, _, place, *rest = chunked[key]
        return ".".join(["blocks", str(number[int(chunk), int(place)]), *rest])

    return {renamed(key): value for key, value in state.items()}


CONFIGS: Mapping[str, InfinityConfig] = MappingProxyType(
    {
        "2b": InfinityConfig(depth=32, width=2048, heads=16),
        "8b": InfinityConfig(depth=40, width=3584, heads=28, bits=14, patch=2),
        "tiny": InfinityConfig(depth=4, width=64, heads=2, bits=8, text_width=64, text_length=32),
    }
)
"""The published models by name, and ``tiny`` for tests and demonstrations."""


def build(name: str, *, seed: int = 0, **overrides: Any) -> Infinity:
    """Return a named model with random weights, in eval mode, without gradients, on the CPU.

    Args:
        name: a key of ``CONFIGS``.
        seed: seed of the weights.
        **overrides: fields of :class:`InfinityConfig` in place of the named model's.

    Raises:
        TypeError: an override is no field of :class:`InfinityConfig`, or a size is not an int.
        ValueError: ``name`` is unknown, or the sizes do not fit each other.

    Example:
        >>> len(build("tiny", depth=2).blocks)
        2
    """
    config = configured(CONFIGS, name, overrides)
    return with_random_weights(lambda: Infinity(config), Infinity.init_weights, seed)
