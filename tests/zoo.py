"""A zoo of tiny next-scale transformers, written the way public VAR-like code is written.

Nothing in this file knows of pruning. A `BlockSpec` names one choice per style option, `ZooModel`
builds a model of such blocks with its own generation loop, and the strategies at the end draw
specs, schedules and whole test cases for hypothesis. `refusable_models` lists models of which one
branch mixes tokens in a way that pruning must leave alone.

Shapes: B batch, L tokens of the step's (h, w) map, C width, H heads, D head width, M keys,
S tokens of all scales together, T text tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.devices import DEVICE

Scale = tuple[int, int]
Context = tuple[Tensor, Tensor | None]  # text (B, T, X), its additive mask (B, 1, 1, T)
Grids = dict[str, tuple[Tensor, Tensor]]  # "hxw" -> cos, sin of that scale
KV = tuple[Tensor, Tensor]
KVStore = dict[Any, Any]  # a KV cache that the loop owns and passes in

TEXT_WIDTH = 12

# ---------------------------------------------------------------------------------------------
# The options
# ---------------------------------------------------------------------------------------------

CHOICES: dict[str, tuple[Any, ...]] = {
    "block": (
        "pre",  # x + attn(norm(x))
        "post",  # norm(x + attn(x))
        "parallel",  # n = norm(x); x + attn(n) + ffn(n), one add after the other
        "parallel_joint",  # x + (attn(n) + ffn(n)), one add
        "sandwich",  # x + norm(attn(norm(x)))
        "ada_unbind",  # AdaLN, ada_lin(cond).view(-1, 1, 6, C).unbind(2)
        "ada_shared",  # AdaLN, (own (1, 1, 6, C) + shared (B, 1, 6, C)).unbind(2)
        "ada_chunk",  # AdaLN, ada(cond).chunk(6, dim=1)
        "inline",  # attention and FFN code, weights and KV cache in the block itself
        "inline_parallel",  # one linear in, one linear out for attention and FFN together
        "hf",  # past_key_value passed in, (hidden_states, present) returned
    ),
    "width": (16, 24, 32),
    "heads": (2, 4),
    "norm": ("layer", "layer_plain", "rms_manual", "rms"),
    "qkv": (
        "fused_unbind",
        "fused_permute",
        "fused_chunk",
        "split",
        "cat_bias",
        "gqa_repeat",
        "gqa_expand",
    ),
    "qk_norm": ("none", "l2", "l2_scale", "rms"),
    "core": ("sdpa", "matmul", "einsum", "bmm", "baddbmm"),
    "mask": ("none", "float", "heads", "bool"),
    "rope": ("none", "half", "pairs", "stacked_pairs", "complex"),
    "rope_source": ("buffer", "argument"),
    "pos_bias": ("none", "input", "q"),
    "cache": ("none", "attrs", "dict", "list", "tuple", "arg_dict", "arg_shared", "returned"),
    "cross": ("none", "plain", "masked"),
    "text_tokens": (5, 4, 16),
    "ffn": ("gelu", "gelu_tanh", "swiglu", "swiglu_fused", "relu2"),
    "residual": ("add", "add_inplace", "swapped"),
    "layer_scale": ("none", "mul", "mul_"),
    "gate": ("mul", "mul_"),
    "dropout": (False, True),
    "drop_path": (False, True),
    "call": ("positional", "keyword"),
    "between": ("none", "inplace"),  # the loop changes a block's output in place
    "mode": ("no_grad", "inference_mode"),
}

_ADA: dict[str, tuple[Any, ...]] = {
    "layer_scale": ("none",),
    "cache": CHOICES["cache"][:-1],
}
_NO_ADA: dict[str, tuple[Any, ...]] = {"gate": ("mul",), "cache": CHOICES["cache"][:-1]}
_INLINE: dict[str, tuple[Any, ...]] = {
    "rope_source": ("buffer",),
    "pos_bias": ("none",),
    "cross": ("none",),
    "layer_scale": ("none",),
    "gate": ("mul",),
    "drop_path": (False,),
    "mask": ("none", "float", "heads"),
}

# What a kind of block narrows the options to; an option not named keeps all its values.
LIMITS: dict[str, dict[str, tuple[Any, ...]]] = {
    "pre": _NO_ADA,
    "post": _NO_ADA,
    "parallel": _NO_ADA,
    "parallel_joint": _NO_ADA,
    "sandwich": _NO_ADA,
    "ada_unbind": _ADA,
    "ada_shared": _ADA,
    "ada_chunk": _ADA,
    "inline": {
        **_INLINE,
        "qkv": ("fused_chunk",),
        "qk_norm": ("none",),
        "core": ("sdpa", "matmul"),
        "rope": ("none", "half"),
        "cache": ("none", "attrs"),
        "ffn": ("gelu",),
    },
    "inline_parallel": {
        **_INLINE,
        "qkv": ("fused_unbind",),
        "qk_norm": ("rms",),
        "core": ("sdpa",),
        "rope": ("none", "pairs"),
        "cache": ("none", "tuple"),
        "ffn": ("gelu_tanh",),
        "dropout": (False,),
    },
    "hf": {
        **_INLINE,
        "norm": ("rms_manual",),
        "qkv": ("gqa_expand",),
        "qk_norm": ("none",),
        "core": ("matmul",),
        "rope": ("half",),
        "cache": ("returned",),
        "ffn": ("swiglu",),
        "residual": ("add",),
        "dropout": (False,),
        "call": ("keyword",),
    },
}


def conflict(values: Mapping[str, Any]) -> str | None:
    """Why the (possibly partial) option values cannot go together, or None."""
    get = values.get
    for name, value in values.items():
        allowed = LIMITS[get("block", "pre")].get(name, CHOICES[name])
        if "block" in values and value not in allowed:
            return f"{name}={value!r} is not one of {allowed} in a {get('block')!r} block"
    if get("rope_source") == "argument" and get("rope", "pairs") not in ("pairs", "stacked_pairs"):
        return "only the 2-D tables are keyed by scale, so only they can be passed as an argument"
    if "gqa" in get("qkv", "") and get("rope") == "stacked_pairs":
        return "stacking q and k needs as many key heads as query heads"
    if get("rope", "") in ("pairs", "stacked_pairs") and "width" in values and "heads" in values:
        if values["width"] // values["heads"] % 4:
            return "2-D RoPE needs a head width divisible by 4"
    if get("mask") == "bool" and get("core") == "baddbmm":
        return "baddbmm adds its mask, so the mask cannot be boolean"
    if get("cross") == "none" and get("text_tokens", CHOICES["text_tokens"][0]) != 5:
        return "without cross-attention the text length has no meaning"
    return None


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One choice per style option; `CHOICES` lists the values, `LIMITS` what excludes what."""

    block: str = "pre"
    width: int = 16
    heads: int = 2
    norm: str = "layer"
    qkv: str = "fused_unbind"
    qk_norm: str = "none"
    core: str = "sdpa"
    mask: str = "none"
    rope: str = "none"
    rope_source: str = "buffer"
    pos_bias: str = "none"
    cache: str = "attrs"
    cross: str = "none"
    text_tokens: int = 5
    ffn: str = "gelu"
    residual: str = "add"
    layer_scale: str = "none"
    gate: str = "mul"
    dropout: bool = False
    drop_path: bool = False
    call: str = "positional"
    between: str = "none"
    mode: str = "no_grad"

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        for name, value in values.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name}={value!r} is not one of {CHOICES[name]}")
        if reason := conflict(values):
            raise ValueError(reason)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kv_heads(self) -> int:
        return self.heads // 2 if "gqa" in self.qkv else self.heads

    @property
    def layout(self) -> str:
        """Which way q, k and v lie: "blhd" or "bhld"."""
        return "bhld" if self.qkv in ("fused_permute", "fused_chunk", "gqa_expand") else "blhd"

    @property
    def cached(self) -> bool:
        return self.cache != "none"


def complete_spec(
    given: Mapping[str, Any], choose: Callable[[Sequence[Any]], Any] = lambda options: options[0]
) -> BlockSpec:
    """A spec with the `given` options, the others chosen among what goes with those before."""
    values = dict(given)
    for name, options in CHOICES.items():
        if name not in values:
            fitting = [o for o in options if not _dead_end({**values, name: o})]
            if not fitting:
                raise ValueError(f"no value of {name} goes with {values}")
            values[name] = choose(fitting)
    return BlockSpec(**values)


def _dead_end(values: Mapping[str, Any]) -> bool:
    """Whether the values conflict, or leave no RoPE: the only option several others narrow."""
    if conflict(values):
        return True
    return "rope" not in values and all(
        conflict({**values, "rope": rope}) for rope in CHOICES["rope"]
    )


# ---------------------------------------------------------------------------------------------
# Norms, layer scale, drop path
# ---------------------------------------------------------------------------------------------


class ManualRMSNorm(nn.Module):
    """LLaMA's RMSNorm, spelled out."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * self.weight


def build_norm(spec: BlockSpec) -> nn.Module:
    C = spec.width
    if spec.norm == "rms_manual":
        return ManualRMSNorm(C)
    if spec.norm == "rms":
        return nn.RMSNorm(C, eps=1e-6)
    return nn.LayerNorm(C, eps=1e-6, elementwise_affine=spec.norm == "layer")


class LayerScale(nn.Module):
    def __init__(self, dim: int, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


def build_layer_scale(spec: BlockSpec) -> nn.Module:
    if spec.layer_scale == "none":
        return nn.Identity()
    return LayerScale(spec.width, inplace=spec.layer_scale == "mul_")


class DropPath(nn.Module):
    """Stochastic depth per sample; nothing in eval mode."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0], 1, 1)).bernoulli_(1 - self.drop_prob)
        return x * keep.div_(1 - self.drop_prob)


def build_drop_path(spec: BlockSpec) -> nn.Module:
    return DropPath(0.1) if spec.drop_path else nn.Identity()


# ---------------------------------------------------------------------------------------------
# Residual adds
# ---------------------------------------------------------------------------------------------


def add(x: Tensor, branch: Tensor) -> Tensor:
    return x + branch


def add_inplace(x: Tensor, branch: Tensor) -> Tensor:
    x += branch
    return x


def add_swapped(x: Tensor, branch: Tensor) -> Tensor:
    return branch + x


ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": add,
    "add_inplace": add_inplace,
    "swapped": add_swapped,
}

# ---------------------------------------------------------------------------------------------
# q, k, v projections
# ---------------------------------------------------------------------------------------------


class FusedUnbind(nn.Module):
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.heads, self.head_width = spec.heads, spec.head_width
        self.qkv = nn.Linear(spec.width, 3 * spec.width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, L, _ = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, self.head_width).unbind(dim=2)
        return q, k, v  # (B, L, H, D)


class FusedPermute(nn.Module):
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, L, C = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1], qkv[2]  # (B, H, L, D)


class FusedChunk(nn.Module):
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, L, C = x.size()
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.view(B, L, self.heads, C // self.heads).transpose(1, 2)
        k = k.view(B, L, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, L, self.heads, C // self.heads).transpose(1, 2)
        return q, k, v  # (B, H, L, D)


class SplitLinears(nn.Module):
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.head_width = spec.head_width
        self.to_q = nn.Linear(spec.width, spec.width)
        self.to_k = nn.Linear(spec.width, spec.width, bias=False)
        self.to_v = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        shape = (x.size(0), -1, q.size(-1) // self.head_width, self.head_width)
        return q.view(shape), k.view(shape), v.view(shape)  # (B, L, H, D)


class CatBias(nn.Module):
    """VAR's projection: no bias on k, so the bias is put together at every call."""

    zero_k_bias: Tensor

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        C = spec.width
        self.heads, self.head_width = spec.heads, spec.head_width
        self.mat_qkv = nn.Linear(C, 3 * C, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("zero_k_bias", torch.zeros(C))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, L, _ = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(input=x, weight=self.mat_qkv.weight, bias=bias)
        q, k, v = qkv.view(B, L, 3, self.heads, self.head_width).unbind(dim=2)
        return q, k, v  # (B, L, H, D)


class GroupedQuery(nn.Module):
    """Fewer key and value heads; `transposed` gives (B, H, L, D) instead of (B, L, H, D)."""

    def __init__(self, spec: BlockSpec, transposed: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = spec.heads, spec.kv_heads, spec.head_width
        self.transposed = transposed
        self.wq = nn.Linear(spec.width, self.heads * self.head_width, bias=False)
        self.wk = nn.Linear(spec.width, self.kv_heads * self.head_width, bias=False)
        self.wv = nn.Linear(spec.width, self.kv_heads * self.head_width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, L, _ = x.shape
        q = self.wq(x).view(B, L, self.heads, self.head_width)
        k = self.wk(x).view(B, L, self.kv_heads, self.head_width)
        v = self.wv(x).view(B, L, self.kv_heads, self.head_width)
        if self.transposed:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return q, k, v


def build_qkv(spec: BlockSpec) -> nn.Module:
    if spec.qkv in ("gqa_repeat", "gqa_expand"):
        return GroupedQuery(spec, transposed=spec.qkv == "gqa_expand")
    classes: dict[str, Callable[[BlockSpec], nn.Module]] = {
        "fused_unbind": FusedUnbind,
        "fused_permute": FusedPermute,
        "fused_chunk": FusedChunk,
        "split": SplitLinears,
        "cat_bias": CatBias,
    }
    return classes[spec.qkv](spec)


# ---------------------------------------------------------------------------------------------
# q and k norms
# ---------------------------------------------------------------------------------------------


class NoQKNorm(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> KV:
        return q, k


class L2QKNorm(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> KV:
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1)


class ScaledL2QKNorm(nn.Module):
    """VAR's cosine attention: a learned temperature per head, kept as a logarithm."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        shape = (1, 1, spec.heads, 1) if spec.layout == "blhd" else (1, spec.heads, 1, 1)
        self.scale_mul = nn.Parameter(torch.full(shape, 4.0).log())
        self.max_scale_mul = math.log(100)

    def forward(self, q: Tensor, k: Tensor) -> KV:
        scale_mul = self.scale_mul.clamp_max(self.max_scale_mul).exp()
        q = F.normalize(q, dim=-1).mul(scale_mul)
        k = F.normalize(k, dim=-1)
        return q, k


class RMSQKNorm(nn.Module):
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.q_norm = nn.RMSNorm(spec.head_width, eps=1e-6)
        self.k_norm = ManualRMSNorm(spec.head_width)

    def forward(self, q: Tensor, k: Tensor) -> KV:
        return self.q_norm(q), self.k_norm(k)


def build_qk_norm(spec: BlockSpec) -> nn.Module:
    if spec.qk_norm == "l2":
        return L2QKNorm()
    if spec.qk_norm == "l2_scale":
        return ScaledL2QKNorm(spec)
    return RMSQKNorm(spec) if spec.qk_norm == "rms" else NoQKNorm()


def softmax_scale(spec: BlockSpec) -> float:
    if spec.qk_norm in ("l2", "l2_scale"):
        return 3.0 if spec.qk_norm == "l2" else 1.0
    return 1 / math.sqrt(spec.head_width)


# ---------------------------------------------------------------------------------------------
# RoPE
# ---------------------------------------------------------------------------------------------


def rotary_angles(spec: BlockSpec, scales: Sequence[Scale]) -> Tensor:
    """Angles (S, D/2), float64: by position in the sequence, or by (row, column) of the map."""
    D = spec.head_width
    if spec.rope in ("half", "complex"):
        frequency = 30.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)  # (D/2,)
        positions = torch.arange(sum(h * w for h, w in scales), dtype=torch.float64)
        return torch.outer(positions, frequency)
    frequency = 30.0 ** -(torch.arange(0, D, 4, dtype=torch.float64) / D)  # (D/4,)
    tables = []
    for h, w in scales:
        rows = torch.outer(torch.arange(h, dtype=torch.float64) * (8 / h), frequency)
        columns = torch.outer(torch.arange(w, dtype=torch.float64) * (8 / w), frequency)
        grid = (rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1))
        tables.append(torch.cat(grid, dim=-1).flatten(0, 1))  # (h*w, D/2)
    return torch.cat(tables)


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


class NoRotary(nn.Module):
    def forward(self, q: Tensor, k: Tensor, start: int, scale: Scale, grids: Grids | None) -> KV:
        return q, k


class RotateHalf(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, angles: Tensor, layout: str) -> None:
        super().__init__()
        self.layout = layout
        table = torch.cat((angles, angles), dim=-1)  # (S, D)
        self.register_buffer("cos", table.cos(), persistent=False)
        self.register_buffer("sin", table.sin(), persistent=False)

    def forward(self, q: Tensor, k: Tensor, start: int, scale: Scale, grids: Grids | None) -> KV:
        if self.layout == "blhd":
            L = q.shape[1]
            cos = self.cos[None, start : start + L, None, :]  # (1, L, 1, D)
            sin = self.sin[None, start : start + L, None, :]
        else:
            L = q.shape[2]
            cos, sin = self.cos[start : start + L], self.sin[start : start + L]  # (L, D)
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Pairs(nn.Module):
    """2-D RoPE on interleaved pairs; tables are a buffer, or come in keyed by scale."""

    cos: Tensor
    sin: Tensor

    def __init__(self, angles: Tensor, layout: str) -> None:
        super().__init__()
        self.token_dim = 1 if layout == "blhd" else 2
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def tables(self, L: int, start: int, scale: Scale, grids: Grids | None) -> KV:
        if grids is not None:
            cos, sin = grids[f"{scale[0]}x{scale[1]}"]  # (L, D/2)
        else:
            cos, sin = self.cos[start : start + L], self.sin[start : start + L]
        if self.token_dim == 1:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (L, 1, D/2)
        return cos, sin

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.reshape(*x.shape[:-1], -1, 2)  # (..., D/2, 2)
        even, odd = x[..., 0], x[..., 1]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def forward(self, q: Tensor, k: Tensor, start: int, scale: Scale, grids: Grids | None) -> KV:
        cos, sin = self.tables(q.shape[self.token_dim], start, scale, grids)
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin)


class StackedPairs(Pairs):
    """Infinity's form: q and k are rotated together, stacked on a new first axis."""

    def forward(self, q: Tensor, k: Tensor, start: int, scale: Scale, grids: Grids | None) -> KV:
        cos, sin = self.tables(q.shape[self.token_dim], start, scale, grids)
        qk = torch.stack((q, k), dim=0)  # (2, B, H, L, D) or (2, B, L, H, D)
        qk = self.rotate(qk, cos, sin)
        q, k = qk.unbind(dim=0)
        return q, k


class ComplexRotary(nn.Module):
    freqs_cis: Tensor

    def __init__(self, angles: Tensor, layout: str) -> None:
        super().__init__()
        self.token_dim = 1 if layout == "blhd" else 2
        freqs_cis = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("freqs_cis", freqs_cis, persistent=False)

    def rotate(self, x: Tensor, freqs: Tensor) -> Tensor:
        x_ = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        shape = [s if i in (self.token_dim, 3) else 1 for i, s in enumerate(x_.shape)]
        return torch.view_as_real(x_ * freqs.view(*shape)).flatten(3)

    def forward(self, q: Tensor, k: Tensor, start: int, scale: Scale, grids: Grids | None) -> KV:
        freqs = self.freqs_cis[start : start + q.shape[self.token_dim]]  # (L, D/2)
        return self.rotate(q, freqs), self.rotate(k, freqs)


def build_rotary(spec: BlockSpec, scales: Sequence[Scale], dtype: torch.dtype) -> nn.Module:
    classes: dict[str, Callable[[Tensor, str], nn.Module]] = {
        "half": RotateHalf,
        "pairs": Pairs,
        "stacked_pairs": StackedPairs,
        "complex": ComplexRotary,
    }
    if spec.rope == "none":
        return NoRotary()
    return classes[spec.rope](rotary_angles(spec, scales).to(dtype), spec.layout)


# ---------------------------------------------------------------------------------------------
# KV caches
# ---------------------------------------------------------------------------------------------


class NoCache(nn.Module):
    """Attends to the current map only."""

    def reset(self) -> None:
        pass

    def length(self, store: KVStore | None) -> int:
        return 0

    def forward(self, k: Tensor, v: Tensor, store: KVStore | None) -> KV:
        return k, v


class AttrCache(NoCache):
    """VAR's: two attributes that are None until the first step has run."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.cached_k: Tensor | None = None
        self.cached_v: Tensor | None = None

    def reset(self) -> None:
        self.cached_k, self.cached_v = None, None

    def length(self, store: KVStore | None) -> int:
        return 0 if self.cached_k is None else self.cached_k.shape[self.dim]

    def forward(self, k: Tensor, v: Tensor, store: KVStore | None) -> KV:
        if self.cached_k is None or self.cached_v is None:
            self.cached_k, self.cached_v = k, v
        else:
            k = self.cached_k = torch.cat((self.cached_k, k), dim=self.dim)
            v = self.cached_v = torch.cat((self.cached_v, v), dim=self.dim)
        return k, v


class DictCache(NoCache):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.past: dict[str, Tensor] = {}

    def reset(self) -> None:
        self.past = {}

    def length(self, store: KVStore | None) -> int:
        return self.past["k"].shape[self.dim] if self.past else 0

    def forward(self, k: Tensor, v: Tensor, store: KVStore | None) -> KV:
        if "k" in self.past:
            k = torch.cat([self.past["k"], k], dim=self.dim)
            v = torch.cat([self.past["v"], v], dim=self.dim)
        self.past["k"], self.past["v"] = k, v
        return k, v


class ListCache(NoCache):
    """A list changed in place, as [k, v]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.kv: list[Tensor] = []

    def reset(self) -> None:
        self.kv.clear()

    def length(self, store: KVStore | None) -> int:
        return self.kv[0].shape[self.dim] if self.kv else 0

    def forward(self, k: Tensor, v: Tensor, store: KVStore | None) -> KV:
        if len(self.kv) == 0:
            self.kv.extend((k, v))
        else:
            self.kv[0] = torch.cat((self.kv[0], k), dim=self.dim)
            self.kv[1] = torch.cat((self.kv[1], v), dim=self.dim)
        return self.kv[0], self.kv[1]


class TupleCache(NoCache):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.past: KV | None = None

    def reset(self) -> None:
        self.past = None

    def length(self, store: KVStore | None) -> int:
        return 0 if self.past is None else self.past[0].shape[self.dim]

    def forward(self, k: Tensor, v: Tensor, store: KVStore | None) -> KV:
        if self.past is not None:
            past_k, past_v = self.past
            k, v = torch.cat((past_k, k), dim=self.dim), torch.cat((past_v, v), dim=self.dim)
        self.past = (k, v)
        return k, v


class ArgDictCache(NoCache):
    """The loop passes each block its own dict, {"k": ..., "v": ...}, empty at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def length(self, store: KVStore | None) -> int:
        return int(store["k"].shape[self.dim]) if store else 0

    def forward(self, k: Tensor, v: Tensor, store: KVStore | None) -> KV:
        assert store is not None
        if store:
            k = torch.cat((store["k"], k), dim=self.dim)
            v = torch.cat((store["v"], v), dim=self.dim)
        store.update(k=k, v=v)
        return k, v


class ArgSharedCache(NoCache):
    """The loop passes one dict to all blocks: layer number -> (k, v)."""

    def __init__(self, dim: int, layer: int) -> None:
        super().__init__()
        self.dim, self.layer = dim, layer

    def length(self, store: KVStore | None) -> int:
        return int(store[self.layer][0].shape[self.dim]) if store else 0

    def forward(self, k: Tensor, v: Tensor, store: KVStore | None) -> KV:
        assert store is not None
        if (past := store.get(self.layer)) is not None:
            k = torch.cat((past[0], k), dim=self.dim)
            v = torch.cat((past[1], v), dim=self.dim)
        store[self.layer] = (k, v)
        return k, v


def build_cache(spec: BlockSpec, layer: int) -> NoCache:
    dim = 1 if spec.layout == "blhd" else 2
    if spec.cache == "none":
        return NoCache()
    if spec.cache == "arg_shared":
        return ArgSharedCache(dim, layer)
    classes: dict[str, Callable[[int], NoCache]] = {
        "attrs": AttrCache,
        "dict": DictCache,
        "list": ListCache,
        "tuple": TupleCache,
        "arg_dict": ArgDictCache,
    }
    return classes[spec.cache](dim)


# ---------------------------------------------------------------------------------------------
# Attention proper: q (B, L, H, D) or (B, H, L, D) in, (B, L, C) out
# ---------------------------------------------------------------------------------------------


def repeat_kv(x: Tensor, repeats: int, layout: str) -> Tensor:
    """Key or value heads repeated to the number of query heads."""
    if repeats == 1:
        return x
    if layout == "blhd":
        return torch.repeat_interleave(x, repeats, dim=2)
    B, G, M, D = x.shape
    return x[:, :, None].expand(B, G, repeats, M, D).reshape(B, G * repeats, M, D)


def masked(scores: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return scores
    if bias.dtype == torch.bool:
        return scores.masked_fill(~bias, float("-inf"))
    return scores + bias


class SDPACore(nn.Module):
    def __init__(self, scale: float, layout: str) -> None:
        super().__init__()
        self.scale, self.layout = scale, layout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if self.layout == "blhd":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        B, H, L, D = q.shape
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return out.transpose(1, 2).reshape(B, L, H * D)


class MatmulCore(SDPACore):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if self.layout == "blhd":
            q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
        B, H, L, D = q.shape
        attn = q.mul(self.scale) @ k.transpose(-2, -1)  # (B, H, L, M)
        attn = masked(attn, bias).softmax(dim=-1)
        return (attn @ v).permute(0, 2, 1, 3).contiguous().view(B, L, H * D)


class EinsumCore(SDPACore):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if self.layout == "blhd":
            scores = torch.einsum("bihd,bjhd->bhij", q, k) * self.scale
            attn = F.softmax(masked(scores, bias), dim=-1)
            out = torch.einsum("bhij,bjhd->bihd", attn, v)
        else:
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
            attn = F.softmax(masked(scores, bias), dim=-1)
            out = torch.einsum("bhij,bhjd->bihd", attn, v)
        return out.flatten(2)


class BmmCore(SDPACore):
    """Batch and heads merged, one bmm each way; the mask is added on the unmerged scores."""

    def merge(self, x: Tensor) -> Tensor:
        if self.layout == "blhd":
            x = x.transpose(1, 2)
        return x.reshape(x.shape[0] * x.shape[1], x.shape[2], x.shape[3])  # (B*H, L, D)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        B, H = q.shape[0], q.shape[2 if self.layout == "blhd" else 1]
        q, k, v = self.merge(q), self.merge(k), self.merge(v)
        L, M = q.shape[1], k.shape[1]
        scores = torch.bmm(q * self.scale, k.transpose(1, 2))
        if bias is not None:
            scores = masked(scores.view(B, H, L, M), bias).view(B * H, L, M)
        out = torch.bmm(torch.softmax(scores, dim=-1), v)
        return out.view(B, H, L, -1).transpose(1, 2).reshape(B, L, -1)


class BaddbmmCore(BmmCore):
    """Diffusers' form: the mask, or an uninitialised tensor nobody reads, is baddbmm's first."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        B, H = q.shape[0], q.shape[2 if self.layout == "blhd" else 1]
        q, k, v = self.merge(q), self.merge(k), self.merge(v)
        L, M, D = q.shape[1], k.shape[1], q.shape[2]
        if bias is None:
            base, beta = torch.empty(B * H, L, M, dtype=q.dtype, device=q.device), 0
        else:
            base, beta = bias.expand(B, H, L, M).reshape(B * H, L, M), 1
        scores = torch.baddbmm(base, q, k.transpose(-1, -2), beta=beta, alpha=self.scale)
        out = torch.bmm(scores.softmax(dim=-1), v)
        return out.reshape(B, H, L, D).permute(0, 2, 1, 3).reshape(B, L, H * D)


def build_core(spec: BlockSpec, scale: float) -> nn.Module:
    classes: dict[str, Callable[[float, str], nn.Module]] = {
        "sdpa": SDPACore,
        "matmul": MatmulCore,
        "einsum": EinsumCore,
        "bmm": BmmCore,
        "baddbmm": BaddbmmCore,
    }
    return classes[spec.core](scale, spec.layout)


class Attention(nn.Module):
    """Self-attention put together from the parts the spec names."""

    def __init__(
        self, spec: BlockSpec, scales: Sequence[Scale], layer: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        C, S = spec.width, sum(h * w for h, w in scales)
        self.heads, self.repeats = spec.heads, spec.heads // spec.kv_heads
        self.layout, self.pos_bias = spec.layout, spec.pos_bias
        self.qkv = build_qkv(spec)
        if spec.pos_bias != "none":
            self.pos_table = nn.Parameter(torch.zeros(1, S, C))
        self.qk_norm = build_qk_norm(spec)
        self.rotary = build_rotary(spec, scales, dtype)
        self.kv = build_cache(spec, layer)
        self.core = build_core(spec, softmax_scale(spec))
        self.proj = nn.Linear(C, C)
        self.proj_drop = nn.Dropout(0.1) if spec.dropout else nn.Identity()

    def forward(
        self,
        x: Tensor,
        start: int,
        scale: Scale,
        grids: Grids | None = None,
        bias: Tensor | None = None,
        store: KVStore | None = None,
    ) -> Tensor:
        _, L, C = x.shape
        if self.pos_bias == "input":
            x = x + self.pos_table[:, start : start + L]
        q, k, v = self.qkv(x)
        if self.pos_bias == "q":
            pos = self.pos_table[:, start : start + L].view(1, L, self.heads, C // self.heads)
            q = q + (pos if self.layout == "blhd" else pos.transpose(1, 2))
        q, k = self.qk_norm(q, k)
        q, k = self.rotary(q, k, start, scale, grids)
        k, v = self.kv(k, v, store)
        k = repeat_kv(k, self.repeats, self.layout)
        v = repeat_kv(v, self.repeats, self.layout)
        out: Tensor = self.proj_drop(self.proj(self.core(q, k, v, bias)))
        return out


class CrossAttention(nn.Module):
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        C = spec.width
        self.heads, self.layout = spec.heads, spec.layout
        self.to_q = nn.Linear(C, C)
        self.to_kv = nn.Linear(TEXT_WIDTH, 2 * C, bias=False)
        self.core = build_core(spec, spec.head_width**-0.5)
        self.proj = nn.Linear(C, C)
        self.proj_drop = nn.Dropout(0.1) if spec.dropout else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        text, text_mask = context
        B, L, C = x.shape
        q = self.to_q(x).view(B, L, self.heads, -1)
        k, v = self.to_kv(text).view(B, text.shape[1], 2, self.heads, C // self.heads).unbind(2)
        if self.layout == "bhld":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out: Tensor = self.proj_drop(self.proj(self.core(q, k, v, text_mask)))
        return out


def build_cross(spec: BlockSpec) -> CrossAttention | None:
    return None if spec.cross == "none" else CrossAttention(spec)


# ---------------------------------------------------------------------------------------------
# Feed-forward networks
# ---------------------------------------------------------------------------------------------


class GeluFFN(nn.Module):
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        C = spec.width
        self.fc1 = nn.Linear(C, 2 * C)
        self.act = nn.GELU(approximate="tanh" if spec.ffn == "gelu_tanh" else "none")
        self.fc2 = nn.Linear(2 * C, C)
        self.drop = nn.Dropout(0.1) if spec.dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.act(self.fc1(x))))
        return out


class SwiGLU(nn.Module):
    """Infinity's: the gate's silu and the product are in place."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        C = spec.width
        self.fcg = nn.Linear(C, 2 * C, bias=False)
        self.fc1 = nn.Linear(C, 2 * C, bias=False)
        self.fc2 = nn.Linear(2 * C, C, bias=False)
        self.drop = nn.Dropout(0.1, inplace=True) if spec.dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(F.silu(self.fcg(x), inplace=True).mul_(self.fc1(x))))
        return out


class FusedSwiGLU(nn.Module):
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        C = spec.width
        self.w12 = nn.Linear(C, 4 * C)
        self.w3 = nn.Linear(2 * C, C)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(self.act(gate) * value)
        return out


class SquaredReLU(nn.Module):
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        C = spec.width
        self.fc1 = nn.Linear(C, 2 * C)
        self.fc2 = nn.Linear(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = F.relu(x, inplace=True).square()
        out: Tensor = self.fc2(x)
        return out


def build_ffn(spec: BlockSpec) -> nn.Module:
    classes: dict[str, Callable[[BlockSpec], nn.Module]] = {
        "gelu": GeluFFN,
        "gelu_tanh": GeluFFN,
        "swiglu": SwiGLU,
        "swiglu_fused": FusedSwiGLU,
        "relu2": SquaredReLU,
    }
    return classes[spec.ffn](spec)


# ---------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------


class PreNormBlock(nn.Module):
    """x + attn(norm(x)), x + cross(norm(x)), x + ffn(norm(x))."""

    def __init__(
        self, spec: BlockSpec, scales: Sequence[Scale], layer: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.attn = Attention(spec, scales, layer, dtype)
        self.cross = build_cross(spec)
        self.ffn = build_ffn(spec)
        self.norm1, self.norm2 = build_norm(spec), build_norm(spec)
        self.norm_cross = nn.Identity() if self.cross is None else build_norm(spec)
        self.ls1, self.ls2 = build_layer_scale(spec), build_layer_scale(spec)
        self.drop_path = build_drop_path(spec)
        self.add = ADDS[spec.residual]

    @property
    def kv(self) -> NoCache:
        return self.attn.kv

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        context: Context,
        start: int,
        scale: Scale,
        grids: Grids | None = None,
        bias: Tensor | None = None,
        store: KVStore | None = None,
    ) -> Tensor:
        branch = self.attn(self.norm1(x), start, scale, grids, bias, store)
        x = self.add(x, self.drop_path(self.ls1(branch)))
        if self.cross is not None:
            x = self.add(x, self.cross(self.norm_cross(x), context))
        return self.add(x, self.drop_path(self.ls2(self.ffn(self.norm2(x)))))


class PostNormBlock(PreNormBlock):
    """norm(x + attn(x)), and so on."""

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        context: Context,
        start: int,
        scale: Scale,
        grids: Grids | None = None,
        bias: Tensor | None = None,
        store: KVStore | None = None,
    ) -> Tensor:
        branch = self.attn(x, start, scale, grids=grids, bias=bias, store=store)
        x = self.norm1(self.add(x, self.drop_path(self.ls1(branch))))
        if self.cross is not None:
            x = self.norm_cross(self.add(x, self.cross(x, context)))
        out: Tensor = self.norm2(self.add(x, self.drop_path(self.ls2(self.ffn(x)))))
        return out


class ParallelBlock(PreNormBlock):
    """All branches read one norm of the block's input, and are added one after the other."""

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        context: Context,
        start: int,
        scale: Scale,
        grids: Grids | None = None,
        bias: Tensor | None = None,
        store: KVStore | None = None,
    ) -> Tensor:
        n = self.norm1(x)
        x = self.add(x, self.drop_path(self.ls1(self.attn(n, start, scale, grids, bias, store))))
        if self.cross is not None:
            x = self.add(x, self.cross(n, context))
        return self.add(x, self.drop_path(self.ls2(self.ffn(n))))


class JointParallelBlock(PreNormBlock):
    """All branches read one norm of the block's input, and their sum is added."""

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        context: Context,
        start: int,
        scale: Scale,
        grids: Grids | None = None,
        bias: Tensor | None = None,
        store: KVStore | None = None,
    ) -> Tensor:
        n = self.norm1(x)
        branch = self.ls1(self.attn(n, start, scale, grids, bias, store)) + self.ls2(self.ffn(n))
        if self.cross is not None:
            branch = branch + self.cross(n, context)
        return self.add(x, self.drop_path(branch))


class SandwichBlock(PreNormBlock):
    """x + norm(attn(norm(x))): each branch's output is normalised too."""

    def __init__(
        self, spec: BlockSpec, scales: Sequence[Scale], layer: int, dtype: torch.dtype
    ) -> None:
        super().__init__(spec, scales, layer, dtype)
        self.post1, self.post2 = build_norm(spec), build_norm(spec)
        self.post_cross = nn.Identity() if self.cross is None else build_norm(spec)

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        context: Context,
        start: int,
        scale: Scale,
        grids: Grids | None = None,
        bias: Tensor | None = None,
        store: KVStore | None = None,
    ) -> Tensor:
        branch = self.post1(self.attn(self.norm1(x), start, scale, grids, bias, store))
        x = self.add(x, self.drop_path(self.ls1(branch)))
        if self.cross is not None:
            x = self.add(x, self.post_cross(self.cross(self.norm_cross(x), context)))
        return self.add(x, self.drop_path(self.ls2(self.post2(self.ffn(self.norm2(x))))))


class AdaUnbindBlock(PreNormBlock):
    """VAR's AdaLN block: scale, shift and gate from the condition, unbound on axis 2."""

    def __init__(
        self, spec: BlockSpec, scales: Sequence[Scale], layer: int, dtype: torch.dtype
    ) -> None:
        super().__init__(spec, scales, layer, dtype)
        self.width = spec.width
        self.gate_inplace = spec.gate == "mul_"
        self.build_modulation()

    def build_modulation(self) -> None:
        lin = nn.Linear(self.width, 6 * self.width)
        self.ada_lin = nn.Sequential(nn.SiLU(inplace=False), lin)

    def modulation(self, cond: Tensor) -> tuple[Tensor, ...]:
        """gamma1, gamma2, scale1, scale2, shift1, shift2, each (B, 1, C)."""
        six: tuple[Tensor, ...] = self.ada_lin(cond).view(-1, 1, 6, self.width).unbind(2)
        return six

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        context: Context,
        start: int,
        scale: Scale,
        grids: Grids | None = None,
        bias: Tensor | None = None,
        store: KVStore | None = None,
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation(cond)
        n = self.norm1(x).mul(scale1.add(1)).add_(shift1)
        branch = self.attn(n, start, scale, grids, bias, store)
        branch = branch.mul_(gamma1) if self.gate_inplace else branch.mul(gamma1)
        x = self.add(x, self.drop_path(branch))
        if self.cross is not None:
            x = self.add(x, self.cross(self.norm_cross(x), context))
        branch = self.ffn(self.norm2(x).mul(scale2.add(1)).add_(shift2))
        branch = branch.mul_(gamma2) if self.gate_inplace else branch.mul(gamma2)
        return self.add(x, self.drop_path(branch))


class AdaSharedBlock(AdaUnbindBlock):
    """Infinity's shared AdaLN: the loop computes (B, 1, 6, C) once, the block adds its own."""

    def build_modulation(self) -> None:
        self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, self.width))

    def modulation(self, cond: Tensor) -> tuple[Tensor, ...]:
        return (self.ada_gss + cond).unbind(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class AdaChunkBlock(AdaUnbindBlock):
    """DiT's AdaLN block: the six parts are (B, C) chunks, unsqueezed where they are used."""

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        context: Context,
        start: int,
        scale: Scale,
        grids: Grids | None = None,
        bias: Tensor | None = None,
        store: KVStore | None = None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada_lin(cond).chunk(6, dim=1)
        branch = self.attn(
            modulate(self.norm1(x), shift1, scale1), start, scale, grids, bias, store
        )
        branch = branch.mul_(gate1.unsqueeze(1)) if self.gate_inplace else gate1[:, None] * branch
        x = self.add(x, self.drop_path(branch))
        if self.cross is not None:
            x = self.add(x, self.cross(self.norm_cross(x), context))
        branch = self.ffn(modulate(self.norm2(x), shift2, scale2))
        branch = branch.mul_(gate2.unsqueeze(1)) if self.gate_inplace else gate2[:, None] * branch
        return self.add(x, self.drop_path(branch))


class InlineBlock(nn.Module):
    """A GPT-like block with everything in its own forward: weights, KV cache, masks, RoPE."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, spec: BlockSpec, scales: Sequence[Scale], layer: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        C = spec.width
        self.heads, self.manual, self.rope = spec.heads, spec.core == "matmul", spec.rope == "half"
        self.ln_1, self.ln_2 = build_norm(spec), build_norm(spec)
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc1, self.fc2 = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.resid_drop = nn.Dropout(0.1 if spec.dropout else 0.0)
        self.add = ADDS[spec.residual]
        self.use_cache = spec.cached
        self.cached_k: Tensor | None = None
        self.cached_v: Tensor | None = None
        if self.rope:
            angles = rotary_angles(spec, scales).to(dtype)
            self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)  # (S, D)
            self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        context: Context,
        start: int,
        scale: Scale,
        grids: Grids | None = None,
        bias: Tensor | None = None,
        store: KVStore | None = None,
    ) -> Tensor:
        B, L, C = x.size()
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q = q.view(B, L, self.heads, C // self.heads).transpose(1, 2)  # (B, H, L, D)
        k = k.view(B, L, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, L, self.heads, C // self.heads).transpose(1, 2)
        if self.rope:
            cos = self.cos[start : start + L][None, None]  # (1, 1, L, D)
            sin = self.sin[start : start + L][None, None]
            q = (q * cos) + (rotate_half(q) * sin)
            k = (k * cos) + (rotate_half(k) * sin)
        if self.use_cache:
            if self.cached_k is not None and self.cached_v is not None:
                k = torch.cat((self.cached_k, k), dim=2)
                v = torch.cat((self.cached_v, v), dim=2)
            self.cached_k, self.cached_v = k, v
        if self.manual:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            if bias is not None:
                att += bias
            y = F.softmax(att, dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = y.transpose(1, 2).contiguous().view(B, L, C)
        x = self.add(x, self.resid_drop(self.c_proj(y)))
        return self.add(x, self.resid_drop(self.fc2(F.gelu(self.fc1(self.ln_2(x))))))


class InlineParallelBlock(nn.Module):
    """One linear makes q, k, v and the FFN's hidden, one linear takes both back (as in Flux)."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, spec: BlockSpec, scales: Sequence[Scale], layer: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        C = spec.width
        self.heads, self.rope = spec.heads, spec.rope == "pairs"
        self.pre_norm = build_norm(spec)
        self.modulation = nn.Linear(C, 3 * C)
        self.linear1 = nn.Linear(C, 3 * C + 2 * C)
        self.linear2 = nn.Linear(C + 2 * C, C)
        self.q_norm = ManualRMSNorm(spec.head_width)
        self.k_norm = ManualRMSNorm(spec.head_width)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.add = ADDS[spec.residual]
        self.use_cache = spec.cached
        self.past: KV | None = None
        if self.rope:
            angles = rotary_angles(spec, scales).to(dtype)
            self.register_buffer("cos", angles.cos(), persistent=False)  # (S, D/2)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: Tensor, start: int) -> Tensor:
        L = x.shape[2]
        cos, sin = self.cos[start : start + L], self.sin[start : start + L]
        x = torch.unflatten(x, -1, (-1, 2))  # (B, H, L, D/2, 2)
        x1, x2 = x.unbind(-1)
        return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(3)

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        context: Context,
        start: int,
        scale: Scale,
        grids: Grids | None = None,
        bias: Tensor | None = None,
        store: KVStore | None = None,
    ) -> Tensor:
        B, L, C = x.shape
        shift, mul, gate = self.modulation(F.silu(cond))[:, None, :].chunk(3, dim=-1)
        x_mod = (1 + mul) * self.pre_norm(x) + shift
        qkv, mlp = torch.split(self.linear1(x_mod), [3 * C, 2 * C], dim=-1)
        qkv = qkv.reshape(B, L, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, L, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = self.rotate(q, start), self.rotate(k, start)
        if self.use_cache:
            if self.past is not None:
                k = torch.cat((self.past[0], k), dim=2)
                v = torch.cat((self.past[1], v), dim=2)
            self.past = (k, v)
        attn = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        attn = attn.transpose(1, 2).reshape(B, L, C)
        output = self.linear2(torch.cat((attn, self.mlp_act(mlp)), 2))
        return self.add(x, gate * output)


class HFBlock(nn.Module):
    """A decoder layer in the transformers library's style: the KV cache goes in and comes out."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, spec: BlockSpec, scales: Sequence[Scale], layer: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        C, D = spec.width, spec.head_width
        self.num_heads, self.num_key_value_heads, self.head_dim = spec.heads, spec.kv_heads, D
        self.input_layernorm, self.post_attention_layernorm = build_norm(spec), build_norm(spec)
        self.q_proj = nn.Linear(C, self.num_heads * D, bias=False)
        self.k_proj = nn.Linear(C, self.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, self.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(self.num_heads * D, C, bias=False)
        self.gate_proj = nn.Linear(C, 2 * C, bias=False)
        self.up_proj = nn.Linear(C, 2 * C, bias=False)
        self.down_proj = nn.Linear(2 * C, C, bias=False)
        angles = rotary_angles(spec, scales).to(dtype)
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache_position: int = 0,
        past_key_value: KV | None = None,
    ) -> tuple[Tensor, KV]:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        bsz, q_len, _ = hidden_states.size()
        query = self.q_proj(hidden_states).view(bsz, q_len, self.num_heads, self.head_dim)
        key = self.k_proj(hidden_states).view(bsz, q_len, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(bsz, q_len, -1, self.head_dim).transpose(1, 2)
        query = query.transpose(1, 2)
        cos = self.cos[None, cache_position : cache_position + q_len].unsqueeze(1)
        sin = self.sin[None, cache_position : cache_position + q_len].unsqueeze(1)
        query = (query * cos) + (rotate_half(query) * sin)
        key = (key * cos) + (rotate_half(key) * sin)
        if past_key_value is not None:
            key = torch.cat([past_key_value[0], key], dim=2)
            value = torch.cat([past_key_value[1], value], dim=2)
        present = (key, value)
        groups = self.num_heads // self.num_key_value_heads
        key, value = repeat_kv(key, groups, "bhld"), repeat_kv(value, groups, "bhld")
        weights = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.head_dim)
        if attention_mask is not None:
            weights = weights + attention_mask
        weights = nn.functional.softmax(weights, dim=-1, dtype=query.dtype)
        attn_output = torch.matmul(weights, value).transpose(1, 2).contiguous()
        attn_output = attn_output.reshape(bsz, q_len, self.num_heads * self.head_dim)
        hidden_states = residual + self.o_proj(attn_output)

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        hidden_states = residual + self.down_proj(hidden_states)
        return hidden_states, present


BlockClass = Callable[[BlockSpec, Sequence[Scale], int, torch.dtype], nn.Module]

BLOCKS: dict[str, BlockClass] = {
    "pre": PreNormBlock,
    "post": PostNormBlock,
    "parallel": ParallelBlock,
    "parallel_joint": JointParallelBlock,
    "sandwich": SandwichBlock,
    "ada_unbind": AdaUnbindBlock,
    "ada_shared": AdaSharedBlock,
    "ada_chunk": AdaChunkBlock,
    "inline": InlineBlock,
    "inline_parallel": InlineParallelBlock,
    "hf": HFBlock,
}

# ---------------------------------------------------------------------------------------------
# The model and its loop
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What one generation starts from; sample i's values do not depend on the batch."""

    start: Tensor  # (B, 1, C)
    cond: Tensor  # (B, C)
    context: Context


def randomise(module: nn.Module, seed: int) -> None:
    """Fills every parameter: matrices keep the variance, gains are about 1, the rest small."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "scale_mul":
            value = math.log(4.0) + 0.2 * noise
        elif leaf == "gamma" or (leaf == "weight" and p.dim() == 1):
            value = 1 + 0.2 * noise
        elif leaf == "weight":
            value = noise / math.sqrt(p[0].numel())
        elif leaf in ("pos_embed", "pos_table", "level_embed", "ada_gss"):
            value = 0.5 * noise
        else:
            value = 0.2 * noise
        with torch.no_grad():
            p.copy_(value)


class ZooModel(nn.Module):
    """A next-scale generator without sampling: each step's map is the next step's input.

    Args:
        spec: how its blocks and its loop are written.
        depth: number of blocks.
        scales: the (h, w) of every step.
        dtype: float64 by default, so that no two implementations disagree on a token's rank.
        weight_seed: of the random weights.
        block: builds a block, in place of the class that `spec.block` names.
    """

    attn_bias: Tensor
    block_list: list[nn.Module]

    def __init__(
        self,
        spec: BlockSpec,
        depth: int,
        scales: Sequence[Scale],
        dtype: torch.dtype = torch.float64,
        weight_seed: int = 0,
        block: BlockClass | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.scales = spec, [(int(h), int(w)) for h, w in scales]
        C, S = spec.width, sum(h * w for h, w in self.scales)
        make = block or BLOCKS[spec.block]
        self.blocks = nn.ModuleList(make(spec, self.scales, i, dtype) for i in range(depth))
        self.pos_embed = nn.Parameter(torch.zeros(1, S, C))
        self.level_embed = nn.Parameter(torch.zeros(len(self.scales), C))
        self.shared_ada = nn.Linear(C, 6 * C) if spec.block == "ada_shared" else None
        self.final_norm = nn.LayerNorm(C, elementwise_affine=False)
        self.head = nn.Linear(C, C)
        randomise(self, weight_seed)
        if spec.mask != "none":
            self.register_buffer("attn_bias", self.build_mask(S, weight_seed), persistent=False)
        self.kv_store: list[KVStore] = []
        self.past: list[KV | None] = []
        for t in (*self.parameters(), *self.buffers()):
            if t.is_floating_point():  # self.to(dtype) would make complex tables real
                t.data = t.data.to(dtype)
        self.to(DEVICE).eval()

    def build_mask(self, S: int, seed: int) -> Tensor:
        """(1, 1 or H, S, S), additive or boolean; every token may attend to itself."""
        heads = self.spec.heads if self.spec.mask == "heads" else 1
        generator = torch.Generator().manual_seed(seed + 1)
        noise = torch.randn((1, heads, S, S), generator=generator, dtype=torch.float64)
        if self.spec.mask != "bool":
            return noise
        return (noise > -0.3) | torch.eye(S, dtype=torch.bool)

    def draw_inputs(self, batch: int, seed: int, first: int = 0) -> Inputs:
        """Samples `first` to `first + batch` of the seed's endless row of samples."""
        C, T = self.spec.width, self.spec.text_tokens
        starts, conds, texts, masks = [], [], [], []
        for sample in range(first, first + batch):
            generator = torch.Generator().manual_seed(1000 * seed + sample)
            draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
            starts.append(draw((1, C)))
            conds.append(draw((C,)))
            texts.append(draw((T, TEXT_WIDTH)))
            length = int(torch.randint(1, T + 1, (), generator=generator))
            masks.append(torch.where(torch.arange(T) < length, 0.0, -1e4)[None, None])
        to = functools.partial(torch.Tensor.to, dtype=self.head.weight.dtype)
        start, cond, text, mask = (
            to(torch.stack(rows)).to(self.head.weight.device)
            for rows in (starts, conds, texts, masks)
        )
        return Inputs(start, cond, (text, mask if self.spec.cross == "masked" else None))

    def reset_cache(self) -> None:
        """Empties every KV cache, wherever it is kept."""
        shared: KVStore = {}
        own = self.spec.cache == "arg_dict"
        self.kv_store = [{} if own else shared for _ in self.blocks]
        self.past = [None for _ in self.blocks]
        for block in self.blocks:
            if isinstance(block, PreNormBlock):
                block.kv.reset()
            elif isinstance(block, InlineBlock):
                block.cached_k = block.cached_v = None
            elif isinstance(block, InlineParallelBlock):
                block.past = None

    def kv_lengths(self) -> list[int]:
        """Tokens in each block's KV cache now; 0 where there is none."""
        lengths = []
        for i, block in enumerate(self.blocks):
            if isinstance(block, PreNormBlock):
                lengths.append(block.kv.length(self.kv_store[i] if self.kv_store else None))
                continue
            if isinstance(block, InlineBlock):
                k = block.cached_k
            else:
                past = block.past if isinstance(block, InlineParallelBlock) else self.past[i]
                k = None if past is None else past[0]
            lengths.append(0 if k is None else k.shape[2])
        return lengths

    def rope_grids(self) -> Grids | None:
        """Tables of every scale, keyed "hxw", where the loop is what passes them in."""
        if self.spec.rope_source != "argument":
            return None
        like = self.head.weight
        grids: Grids = {}
        for h, w in self.scales:
            angles = rotary_angles(self.spec, [(h, w)]).to(like)
            grids[f"{h}x{w}"] = (angles.cos(), angles.sin())
        return grids

    def run_block(
        self,
        layer: int,
        x: Tensor,
        cond: Tensor,
        context: Context,
        start: int,
        scale: Scale,
        grids: Grids | None,
        bias: Tensor | None,
    ) -> Tensor:
        block = self.blocks[layer]
        store = self.kv_store[layer] if self.spec.cache.startswith("arg") else None
        if self.spec.block == "hf":
            x, self.past[layer] = block(
                hidden_states=x,
                attention_mask=bias,
                cache_position=start,
                past_key_value=self.past[layer],
            )
        elif self.spec.call == "keyword":
            x = block(
                x=x,
                cond=cond,
                context=context,
                start=start,
                scale=scale,
                grids=grids,
                bias=bias,
                store=store,
            )
        else:
            x = block(x, cond, context, start, scale, grids, bias, store)
        return x

    def generate(self, batch: int, seed: int, keep_cache: bool = False, first: int = 0) -> Tensor:
        """The last block's output of every step, (B, S, C).

        Args:
            batch: number of samples.
            seed: of the start token, the condition and the text.
            keep_cache: leave the KV caches filled for `kv_lengths`.
            first: number of the first sample, so that one sample of a batch can be run alone.
        """
        guard = torch.inference_mode if self.spec.mode == "inference_mode" else torch.no_grad
        with guard():
            return self._generate(batch, seed, keep_cache, first)

    def _generate(self, batch: int, seed: int, keep_cache: bool, first: int) -> Tensor:
        inputs = self.draw_inputs(batch, seed, first)
        cond = inputs.cond
        if self.shared_ada is not None:
            cond = self.shared_ada(F.silu(cond)).view(-1, 1, 6, self.spec.width)
        grids = self.rope_grids()
        self.reset_cache()
        h, w = self.scales[0]
        tokens = inputs.start.expand(-1, h * w, -1)
        start = 0
        hidden = []
        for step, (h, w) in enumerate(self.scales):
            L = h * w
            x = tokens + self.pos_embed[:, start : start + L] + self.level_embed[step]
            bias = None
            if self.spec.mask != "none":
                first_key = 0 if self.spec.cached else start
                bias = self.attn_bias[:, :, start : start + L, first_key : start + L]
            for layer in range(len(self.blocks)):
                x = self.run_block(layer, x, cond, inputs.context, start, (h, w), grids, bias)
                if self.spec.between == "inplace":
                    x.mul_(0.9).add_(self.level_embed[step])
            hidden.append(x)
            start += L
            if step + 1 < len(self.scales):
                image = self.head(self.final_norm(x)).transpose(1, 2).reshape(batch, -1, h, w)
                image = F.interpolate(image, size=self.scales[step + 1], mode="bilinear")
                tokens = image.flatten(2).transpose(1, 2)  # (B, L of the next step, C)
        if not keep_cache:
            self.reset_cache()
        return torch.cat(hidden, dim=1)


def split_steps(hidden: Tensor, scales: Sequence[Scale]) -> list[Tensor]:
    """The output of `generate`, (B, S, C), as one (B, L, C) per step."""
    return list(torch.split(hidden, [h * w for h, w in scales], dim=1))


# ---------------------------------------------------------------------------------------------
# Models with a branch that cannot be pruned
# ---------------------------------------------------------------------------------------------


class OddFFN(nn.Module):
    """A GELU FFN with a `mix` over tokens before its last linear."""

    def __init__(self, width: int, scales: Sequence[Scale]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.build(width, scales)

    def build(self, width: int, scales: Sequence[Scale]) -> None:
        """Parameters of the mix."""

    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = F.gelu(self.mix(self.fc1(x), h, w))
        out: Tensor = self.fc2(x)
        return out


class Conv2dFFN(OddFFN):
    def build(self, width: int, scales: Sequence[Scale]) -> None:
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        B, _, C = x.shape
        x = self.dwconv(x.transpose(1, 2).reshape(B, C, h, w))  # REFUSED: fvx-conv2d
        return x.flatten(2).transpose(1, 2)


class Conv1dFFN(OddFFN):
    def build(self, width: int, scales: Sequence[Scale]) -> None:
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        out: Tensor = self.conv(x.transpose(1, 2)).transpose(1, 2)  # REFUSED: fvx-conv1d
        return out


class TokenShiftFFN(OddFFN):
    def build(self, width: int, scales: Sequence[Scale]) -> None:
        self.mu = nn.Parameter(torch.zeros(width))

    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        shifted = F.pad(x[:, :-1], (0, 0, 1, 0))  # REFUSED: fvx-shift
        return x + self.mu * (shifted - x)


class CumsumFFN(OddFFN):
    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        return x + 0.1 * torch.cumsum(x, dim=1)  # REFUSED: fvx-cumsum


class TokenMLPFFN(OddFFN):
    """MLP-Mixer's token mixing, with one matrix per map size."""

    def build(self, width: int, scales: Sequence[Scale]) -> None:
        self.token_mlp = nn.ModuleDict({str(h * w): nn.Linear(h * w, h * w) for h, w in scales})

    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        mlp = self.token_mlp[str(h * w)]
        out: Tensor = x + mlp(x.transpose(1, 2)).transpose(1, 2)  # REFUSED: fvx-tokenmlp
        return out


class MeanFFN(OddFFN):
    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        return x - 0.5 * x.mean(dim=1, keepdim=True)  # REFUSED: fvx-mean


class ItemFFN(OddFFN):
    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        return x * (4.0 / x.abs().max().item())  # REFUSED: fvx-item


class RollFFN(OddFFN):
    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        return x + 0.5 * torch.roll(x, shifts=1, dims=1)  # REFUSED: fvx-roll


class FlipFFN(OddFFN):
    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        return x + 0.5 * x.flip(1)  # REFUSED: fvx-flip


class GroupNormFFN(OddFFN):
    def build(self, width: int, scales: Sequence[Scale]) -> None:
        self.gn = nn.GroupNorm(4, width)

    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        out: Tensor = self.gn(x.transpose(1, 2)).transpose(1, 2)  # REFUSED: fvx-groupnorm
        return out


class TokenSoftmaxFFN(OddFFN):
    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        return x * x.softmax(dim=1)  # REFUSED: fvx-softmax


class GlobalNormFFN(OddFFN):
    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x)  # REFUSED: fvx-globalnorm
        return 8.0 * x / length


class FirstTokenFFN(OddFFN):
    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        return x * torch.sigmoid(x[:, :1])  # REFUSED: fvx-firsttoken


class TokenPairsFFN(OddFFN):
    """Neighbouring tokens are mixed in pairs, by a view that splits the token axis."""

    def build(self, width: int, scales: Sequence[Scale]) -> None:
        self.pair = nn.Linear(2 * width, 2 * width)

    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        B, L, C = x.shape
        out: Tensor = self.pair(x.reshape(B, L // 2, 2 * C))  # REFUSED: fvx-pairs
        return out.reshape(B, L, C)


class PermuteFFN(OddFFN):
    """Tokens are put in an order that a buffer holds, one buffer per map size."""

    def build(self, width: int, scales: Sequence[Scale]) -> None:
        for L in (h * w for h, w in scales):
            self.register_buffer(f"order_{L}", torch.arange(L).roll(L // 2))

    def mix(self, x: Tensor, h: int, w: int) -> Tensor:
        order = self.get_buffer(f"order_{h * w}")
        return x + 0.5 * x[:, order]  # REFUSED: fvx-permute


class PooledKVAttention(nn.Module):
    """PVT's attention: keys and values come from the map, average-pooled by two."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        B, L, C = x.shape
        q = self.to_q(x).view(B, L, self.heads, -1).transpose(1, 2)
        pooled = F.avg_pool2d(x.transpose(1, 2).reshape(B, C, h, w), 2)  # REFUSED: fvx-pooledkv
        pooled = pooled.flatten(2).transpose(1, 2)  # (B, L/4, C)
        kv = self.to_kv(pooled).view(B, -1, 2, self.heads, C // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.proj(out.transpose(1, 2).reshape(B, L, C))
        return result


class OddFFNBlock(PreNormBlock):
    """Ordinary attention, a feed-forward branch that reads the map's (h, w)."""

    odd: OddFFN

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        context: Context,
        start: int,
        scale: Scale,
        grids: Grids | None = None,
        bias: Tensor | None = None,
        store: KVStore | None = None,
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), start, scale, grids, bias, store)
        branch: Tensor = self.odd(self.norm2(x), scale[0], scale[1])
        return x + branch


class OddAttentionBlock(PreNormBlock):
    """An attention branch that reads the map's (h, w), an ordinary feed-forward branch."""

    odd: PooledKVAttention

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        context: Context,
        start: int,
        scale: Scale,
        grids: Grids | None = None,
        bias: Tensor | None = None,
        store: KVStore | None = None,
    ) -> Tensor:
        x = x + self.odd(self.norm1(x), scale[0], scale[1])
        branch: Tensor = self.ffn(self.norm2(x))
        return x + branch


ODD_FFNS: dict[str, type[OddFFN]] = {
    "conv2d": Conv2dFFN,
    "conv1d": Conv1dFFN,
    "shift": TokenShiftFFN,
    "cumsum": CumsumFFN,
    "tokenmlp": TokenMLPFFN,
    "mean": MeanFFN,
    "item": ItemFFN,
    "roll": RollFFN,
    "flip": FlipFFN,
    "groupnorm": GroupNormFFN,
    "softmax": TokenSoftmaxFFN,
    "globalnorm": GlobalNormFFN,
    "firsttoken": FirstTokenFFN,
    "pairs": TokenPairsFFN,
    "permute": PermuteFFN,
}

REFUSABLE_SCALES: tuple[Scale, ...] = ((2, 2), (2, 4), (4, 4), (4, 6))
REFUSABLE_SPEC = BlockSpec(rope="half", core="sdpa", cache="attrs")


@dataclasses.dataclass(frozen=True)
class Refusable:
    """A model of two blocks; only `branch` of block `layer` mixes tokens beyond attention."""

    name: str
    model: ZooModel
    branch: str  # "attention" or "ffn"
    marker: str  # stands in a comment on the line at fault
    layer: int = 1

    @property
    def odd(self) -> nn.Module:
        """The module at fault."""
        block = self.model.blocks[self.layer]
        assert isinstance(block, (OddFFNBlock, OddAttentionBlock))
        return block.odd

    def line(self) -> tuple[Path, int]:
        """File and line number (from 1) of the line at fault."""
        return marker_line(self.marker)


def marker_line(marker: str) -> tuple[Path, int]:
    """File and line number of the one line of this module that ends in `# REFUSED: marker`."""
    path = Path(inspect.getsourcefile(OddFFN) or __file__)
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [n for n, line in enumerate(lines, 1) if line.endswith(f"# REFUSED: {marker}")]
    assert len(found) == 1, f"{marker} stands on lines {found}"
    return path, found[0]


def _odd_block(
    name: str, spec: BlockSpec, scales: Sequence[Scale], layer: int, dtype: torch.dtype
) -> nn.Module:
    if layer == 0:
        return PreNormBlock(spec, scales, layer, dtype)
    if name == "pooledkv":
        pooled = OddAttentionBlock(spec, scales, layer, dtype)
        pooled.odd = PooledKVAttention(spec.width, spec.heads)
        del pooled.attn.qkv, pooled.attn.proj
        return pooled
    block = OddFFNBlock(spec, scales, layer, dtype)
    block.odd = ODD_FFNS[name](spec.width, scales)
    del block.ffn
    return block


def refusable_models(dtype: torch.dtype = torch.float64) -> list[Refusable]:
    """One small model per way to mix tokens that pruning must refuse."""
    models = []
    for name in (*ODD_FFNS, "pooledkv"):
        block = functools.partial(_odd_block, name)
        model = ZooModel(REFUSABLE_SPEC, 2, REFUSABLE_SCALES, dtype=dtype, block=block)
        branch = "attention" if name == "pooledkv" else "ffn"
        models.append(Refusable(name, model, branch, f"fvx-{name}"))
    return models


# ---------------------------------------------------------------------------------------------
# Strategies
# ---------------------------------------------------------------------------------------------

# Token counts on purpose equal to widths (16, 24, 32), head widths (4, 8), heads and batches.
SCALE_POOL: tuple[Scale, ...] = (
    (1, 1),
    (1, 2),
    (1, 3),
    (2, 2),
    (2, 3),
    (4, 2),
    (3, 3),
    (2, 6),
    (3, 5),
    (4, 4),
    (4, 6),
    (5, 5),
    (8, 4),
    (6, 6),
    (6, 8),
)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A schedule: K scales, the ratios of the last N steps, the step that is captured."""

    scales: tuple[Scale, ...]
    ratios: tuple[float, ...]
    cache_step: int

    @property
    def texture_start(self) -> int:
        """The first step that has a ratio, K - N."""
        return len(self.scales) - len(self.ratios)


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything one comparison needs."""

    spec: BlockSpec
    depth: int
    schedule: Drawn
    batch: int
    seed: int
    layers: tuple[int, ...] | None = None  # the blocks to prune; None is all of them

    def model(self, dtype: torch.dtype = torch.float64) -> ZooModel:
        return ZooModel(self.spec, self.depth, self.schedule.scales, dtype, weight_seed=self.seed)


def block_specs(**pinned: Any) -> st.SearchStrategy[BlockSpec]:
    """Specs with the `pinned` options, e.g. block_specs(cache="none", core="sdpa")."""

    @st.composite
    def draw_spec(draw: st.DrawFn) -> BlockSpec:
        return complete_spec(pinned, lambda options: draw(st.sampled_from(options)))

    return draw_spec()


RATIOS = st.one_of(
    st.sampled_from((0.5, 0.4, 0.75, 1.0, 0.9, 0.25, 0.0)),
    st.integers(1, 99).map(lambda percent: percent / 100),
)


@st.composite
def schedules(draw: st.DrawFn, max_pruned: int = 3, repeats: bool = True) -> Drawn:
    """Schedules of 3 to 6 steps; from the capture on, no token count occurs twice.

    Args:
        draw: given by hypothesis.
        max_pruned: the most ratios drawn, each in 0..1 and at least one above 0.
        repeats: whether a scale before the captured step may occur twice.
    """
    ratios = draw(st.lists(RATIOS, min_size=1, max_size=max_pruned).filter(any))
    # The pool has one scale per token count, in increasing order.
    size = draw(st.integers(len(ratios) + 1, 5))
    scales = sorted(
        draw(st.lists(st.sampled_from(SCALE_POOL), min_size=size, max_size=size, unique=True)),
        key=SCALE_POOL.index,
    )
    scales = [draw(st.sampled_from(((h, w), (w, h)))) for h, w in scales]
    first_ratio = len(scales) - len(ratios)
    # Two tokens are equally far from their mean: rounding alone would say which one is kept.
    assume(all(h * w != 2 for h, w in scales[first_ratio:]))
    cache_step = draw(st.sampled_from(range(first_ratio - 1, -1, -1)))
    if repeats and cache_step > 0 and draw(st.booleans()):
        scales.insert(0, scales[0])
        cache_step += 1
    return Drawn(tuple(scales), tuple(ratios), cache_step)


def mask_outlives_keys(spec: BlockSpec, schedule: Drawn) -> bool:
    """Whether a step's mask has columns for keys that an earlier step has pruned.

    The loop builds its mask for all tokens before the step. Where an earlier step appended its
    kept tokens only, the mask has to be gathered by the kept tokens of every earlier step.
    """
    pruned = [step for step, ratio in enumerate(schedule.ratios) if ratio > 0]
    return spec.mask != "none" and spec.cached and pruned[0] + 1 < len(schedule.ratios)


@st.composite
def cases(
    draw: st.DrawFn,
    /,
    max_depth: int = 2,
    stale_masks: bool = False,
    some_layers: bool = False,
    **pinned: Any,
) -> Case:
    """Whole test cases; `stale_masks` also draws those of `mask_outlives_keys`.

    Args:
        draw: given by hypothesis.
        max_depth: the most blocks.
        stale_masks: whether masks may have columns for keys an earlier step has pruned.
        some_layers: whether to draw the blocks to prune, too.
        pinned: options of the spec.
    """
    spec = draw(block_specs(**pinned))
    one = spec.mask != "none" and spec.cached and not stale_masks
    schedule = draw(schedules(max_pruned=1) if one else schedules())
    depth = draw(st.integers(1, max_depth))
    layers = None
    if some_layers:
        numbers = st.sampled_from(range(depth))
        layers = tuple(sorted(draw(st.sets(numbers, min_size=1))))
    batch = draw(st.sampled_from((2, 1, 3, 4)))
    return Case(spec, depth, schedule, batch, draw(st.integers(0, 50)), layers)


def examples(thorough: int, quick: int | None = None, long: int | None = None) -> settings:
    """Settings of a property test of whole models, whose examples depend on the profile.

    Args:
        thorough: With `--hypothesis-profile thorough`, which CI runs.
        quick: With no profile; None for a third.
        long: With `--hypothesis-profile long`, for a change of the engine; None for `thorough`.
    """
    counts = {"thorough": thorough, "long": long or thorough}
    profile = settings.get_current_profile_name()
    return settings(max_examples=counts.get(profile, quick or thorough // 3))
