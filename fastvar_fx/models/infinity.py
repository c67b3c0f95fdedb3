"""Infinity: text to image by predicting the bits of every token, scale by scale.

A step predicts the (h, w) token map of its scale at once, d bits per token. The bits are a code of
d values +-1 / sqrt(d); the codes of all scales, each resized to the last map, add up to the latent,
and the latent so far, resized to the next map, is the input of the next step:

    text --attentive pool--> step 0 -->    1 token  --bits, codes--> latent
    latent at  2 x  2    --> step 1 -->    4 tokens --bits, codes--> latent
    ...
    latent at 64 x 64    --> step 12 --> 4096 tokens --bits, codes--> latent

A block is self-attention with 2-D rotary positions over this and all smaller maps (through a cache
of keys and values), cross-attention to the text, and a feed-forward branch. Scale, shift and gamma
of the norms come from the pooled text, by one layer shared by all blocks. The text encoder and the
decoder from latent to pixels are not here: the input is text features, the output latents.

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

from fastvar_fx.errors import ArgumentError
from fastvar_fx.models.cache import KVCache, kv_caching
from fastvar_fx.models.configs import (
    check_heads,
    check_sizes,
    configured,
    draw_weights,
    with_random_weights,
)
from fastvar_fx.models.layers import FFN, MAX_LOG_SCALE, AdaLNBeforeHead, SharedAdaLin
from fastvar_fx.models.maps import Map, check_maps
from fastvar_fx.models.rope import pair_table, rotate_pairs
from fastvar_fx.models.sampling import sample_top_k_top_p
from fastvar_fx.models.text import AttentivePool, CrossAttention, check_text, joined, mask_of

_NORM_EPS = 1e-6

# --------------------------------------------------------------------------------------------------
# Transformer
# --------------------------------------------------------------------------------------------------


class SelfAttention(KVCache):
    """Multi-head self-attention on unit queries and keys, with rotary positions and a cache.

    Args:
        width: Width C in and out.
        heads: Number of heads H.
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
        """Returns (B, L, C) for `x` (B, L, C) and the table of its positions, (2, L, c / 2)."""
        B, L, C = x.shape
        x = x.to(self.mat_qkv.weight.dtype)
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias)  # (B, L, 3C)
        qkv = qkv.view(B, L, 3, self.heads, -1)  # (B, L, 3, H, c)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 of (B, H, L, c)
        scale = self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
        q = rotate_pairs(F.normalize(q, dim=-1).mul(scale), rope).type_as(v)
        k = rotate_pairs(F.normalize(k, dim=-1), rope).type_as(v)
        k, v = self.with_cached(k, v)
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(B, L, C))
        return projected


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward branch, each with a residual add.

    The residual stream stays in float32 (float64 in a float64 model), whatever the branches run in.

    Args:
        width: Width C.
        heads: Number of heads H.

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
        """Returns the residual stream after the three branches, (B, L, C).

        Args:
            x: Residual stream, (B, L, C).
            ada: The shared AdaLN values, (B, 1, 6, C).
            text: Projected text, (B, T, C).
            mask: Which text tokens there are, bool (B, 1, 1, T).
            rope: Table of the step's positions, (2, L, c / 2).
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
        depth: Number of blocks.
        width: Width C.
        heads: Number of heads H; C / H is a multiple of 4.
        bits: Channels of the latent.
        patch: Side of the square of latent pixels that make a token; a token has
            d = bits * patch^2 bits.
        text_width: Width Ct of the text features.
        text_length: Most text tokens T of a prompt.
        levels: Most steps K of a generation.

    Raises:
        TypeError: If a size is not an int.
        ArgumentError: If a size is below 1, or heads do not divide their width.
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
    checkpoints hold the blocks in chunks, `block_chunks.i.module.j`; here they are `blocks.n`.
    `load_state_dict` takes both.

    Generation keeps keys and values on the attention modules: one call at a time per model.

    Args:
        config: The sizes.

    Example:
        >>> from fastvar_fx.models.maps import template
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
        """Returns latents, (B, bits, patch * h, patch * w) with (h, w) the last scale.

        Args:
            text: Features of the prompts, (B, T, Ct).
            scales: (h, w) of the K token maps, the first (1, 1); `maps.template` has the trained.
            text_mask: bool (B, T), True where the prompt has a token; None for everywhere.
            negative: Features of negative prompts, (B, Tn, Ct); None for the learned ones of no
                prompt.
            negative_mask: bool (B, Tn).
            g_seed: Seed of the draws; None uses torch's global generator of the device.
            cfg: Guidance, at least 0, for all steps or one per step; where it is 1 at every step,
                the batch inside is B, else 2B.
            tau: Temperature of the logits, above 0, for all steps or one per step.
            top_k: 1 takes the likelier value of every bit, 0 or 2 draws it.
            top_p: Draw among the values that together reach this probability, in [0, 1].
            finest: (h, w) of the map that rotary positions are counted on; None for the last of
                `scales`. Trained is the last of `template(h_div_w)`.
            trunk_scale: Number of steps to run; the latent of the steps before is returned.

        Raises:
            ArgumentError: If a prompt, a scale or a number per step does not fit.

        Source: Infinity, arXiv 2412.04431, algorithm 2; guidance as in the official code.
        """
        check_maps(scales, most=self.config.levels)
        guidance, temperature = _per_step("cfg", cfg, scales), _per_step("tau", tau, scales)
        B, device, guided = text.shape[0], text.device, any(strength != 1 for strength in guidance)
        text, mask = self._prompts(text, text_mask)
        if guided:
            text, mask = self._with_negative(text, mask, negative, negative_mask)
        mask = mask[:, None, None]  # (2B, 1, 1, T)
        cond, ada, text = self._conditions(text, mask)  # (2B, C), (2B, 1, 6, C), (2B, T, C)
        head_dim = self.config.width // self.config.heads
        ropes = [pair_table(scale, finest or scales[-1], head_dim, device) for scale in scales]
        generator = None if g_seed is None else torch.Generator(device).manual_seed(g_seed)
        size = [side * self.config.patch for side in scales[-1]]
        latent = cond.new_zeros(B, self.config.bits, *size)
        x = cond.unsqueeze(1) + self.pos_start.to(cond.dtype)  # (2B, 1, C)

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
                codes = self._codes(bits, scales[step]).to(latent.dtype)
                latent = latent + F.interpolate(codes, size=size, mode="bilinear")
                if step + 1 < len(scales):
                    x = self._embed(latent, scales[step + 1]).to(latent.dtype)  # (B, L, C)
                    x = x.repeat(cond.shape[0] // B, 1, 1)  # (2B, L, C)
        return latent

    def get_logits(self, x: Tensor, cond: Tensor) -> Tensor:
        """Returns logits of each bit being 0 and 1, (B, L, 2d), in the stream's type.

        Args:
            x: Residual stream after the last block, (B, L, C).
            cond: Pooled text, (B, C).
        """
        dtype = self.head.weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.head(self.head_nm(x.to(dtype), cond.to(dtype)))
        return logits.to(x.dtype)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fills all parameters and buffers with values for which every branch contributes.

        As `draw_weights`, but attention starts at scale 4, a block's gammas lie near
        1 / sqrt(depth), AdaLN varies little with the text, and logits are large enough that most
        bits have a likelier value.

        Args:
            generator: Source of the values, on the device of the parameters.
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
        """Loads what `state_dict` gave, or an official checkpoint with its block chunks.

        Args:
            state_dict: Tensors by name.
            strict: Whether missing and unexpected keys are errors.
            assign: Keep the given tensors instead of copying their values.

        Raises:
            RuntimeError: If keys or shapes do not fit.
        """
        return super().load_state_dict(_without_chunks(state_dict), strict=strict, assign=assign)

    def _prompts(
        self, text: Tensor, mask: Tensor | None, batch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns checked features of prompts (B, T, Ct) and their mask, bool (B, T)."""
        config = self.config
        check_text(text, config.text_width, config.text_length, mask=mask, batch=batch)
        return text.to(self.cfg_uncond.dtype), mask_of(text, mask)

    def _with_negative(
        self, text: Tensor, mask: Tensor, negative: Tensor | None, negative_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns features and mask of prompts and negative prompts as one batch, 2B."""
        if negative is None:
            negative, negative_mask = self.cfg_uncond[: text.shape[1]].expand_as(text), mask
        negative, negative_mask = self._prompts(negative, negative_mask, len(text))
        return joined((text, negative), (mask, negative_mask))

    def _conditions(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the pooled text (B, C), AdaLN values (B, 1, 6, C) and projected text (B, T, C).

        The first two are in the type of the residual stream, float32 or float64.
        """
        text = self.text_norm(text)
        pooled = self.text_proj_for_sos["ca"](text, mask)
        with torch.autocast(text.device.type, enabled=False):
            ada = self.shared_ada_lin(pooled.to(text.dtype))
        stream = torch.promote_types(text.dtype, torch.float32)
        return pooled.to(stream), ada.to(stream), self.text_proj_for_ca(text)

    def _codes(self, bits: Tensor, scale: Map) -> Tensor:
        """Returns the codes of a token map's bits (B, L * d), (B, bits, patch * h, patch * w)."""
        values = (2 * bits - 1) / math.sqrt(self.config.bits)
        codes = values.view(len(bits), *scale, -1).permute(0, 3, 1, 2)  # (B, d, h, w)
        return F.pixel_shuffle(codes, self.config.patch)

    def _embed(self, latent: Tensor, scale: Map) -> Tensor:
        """Returns the input of a step, (B, L, C): the latent so far at the size of its map."""
        size = [side * self.config.patch for side in scale]
        resized = F.interpolate(latent, size=size, mode="bilinear")
        tokens = F.pixel_unshuffle(resized, self.config.patch).flatten(2).mT  # (B, L, d)
        embedded: Tensor = self.word_embed(tokens.to(self.word_embed.weight.dtype))
        return embedded


def _per_step(name: str, value: float | Sequence[float], scales: Sequence[Map]) -> list[float]:
    """Returns one number per step."""
    values = [float(value)] * len(scales) if isinstance(value, (int, float)) else list(value)
    if len(values) != len(scales):
        raise ArgumentError(
            f"{name} is one number for all steps or one per scale, {len(scales)} here; found "
            f"{len(values)}"
        )
    return values


def _without_chunks(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict with `block_chunks.i.module.j` renamed to `blocks.n`."""
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
"""The published models by name, and `tiny` for tests and demonstrations."""


def build(name: str, *, seed: int = 0, **overrides: Any) -> Infinity:
    """Returns a named model with random weights, in eval mode, without gradients, on the CPU.

    Args:
        name: A key of `CONFIGS`.
        seed: Seed of the weights.
        **overrides: Fields of `InfinityConfig` in place of the named model's.

    Raises:
        TypeError: If an override is no field of `InfinityConfig`, or a size is not an int.
        ArgumentError: If `name` is unknown, or the sizes do not fit each other.

    Example:
        >>> len(build("tiny", depth=2).blocks)
        2
    """
    config = configured(CONFIGS, name, overrides)
    return with_random_weights(lambda: Infinity(config), Infinity.init_weights, seed)
