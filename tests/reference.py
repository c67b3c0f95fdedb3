"""FastVAR for the zoo, edited in by hand: plain eager code that shares no line with the blocks.

Every block of `tests.zoo` is expressed once more here, from its weights, with an explicit
`index` (B, n) of the tokens it computes. A step that is not pruned uses the index of all tokens.
Where the blocks differ in how they write a thing (fused or split, bmm or SDPA), this file has one
way: q, k and v are (B, n, H, D), attention is a loop over heads, tables and masks are gathered.

`reference_generate` runs a whole generation and reports what it did.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import zoo
from tests.zoo import Scale

Branch = Callable[[Tensor, Tensor], Tensor]  # (kept tokens (B, n, C), index (B, n)) -> (B, n, C)
Ratios = float | Sequence[Mapping[str, float]]  # of one step: one for all, or by block and branch
Select = Callable[[Tensor, int], Tensor]  # (stream (B, L, C), kept) -> index (B, kept)

# ---------------------------------------------------------------------------------------------
# The two operators
# ---------------------------------------------------------------------------------------------


def pivotal_scores(x: Tensor) -> Tensor:
    """Squared distance of every token (B, L, C) from the mean token, (B, L)."""
    return (x - x.mean(dim=1, keepdim=True)).square().sum(dim=2)


def pivotal_indices(x: Tensor, kept: int) -> Tensor:
    """The `kept` tokens of x (B, L, C) with the highest scores, ascending, (B, kept) int64."""
    return pivotal_scores(x).topk(kept, dim=1).indices.sort(dim=1).values


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x (B, L, C) at the tokens index (B, n), (B, n, C)."""
    return torch.stack([sample[rows] for sample, rows in zip(x, index, strict=True)])


def restore(
    cached: Tensor, scale_c: Scale, scale: Scale, kept_out: Tensor, index: Tensor
) -> Tensor:
    """The captured output resized to `scale`, the kept tokens' outputs written over it.

    Args:
        cached: the branch's output at the captured step, (B, h_c * w_c, C).
        scale_c: (h_c, w_c).
        scale: (h, w) of this step.
        kept_out: the branch's output on the kept tokens, (B, n, C).
        index: their places, (B, n).

    Returns:
        (B, h * w, C).
    """
    B, _, C = cached.shape
    lattice = cached.reshape(B, *scale_c, C).permute(0, 3, 1, 2)
    full = F.interpolate(lattice, size=scale, mode="area").permute(0, 2, 3, 1).reshape(B, -1, C)
    return full.scatter(1, index.unsqueeze(2).expand(-1, -1, C), kept_out)


# ---------------------------------------------------------------------------------------------
# What is pruned, what is captured
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pruner:
    """PTS -> branch -> CTR around the branches of one generation."""

    scales: Sequence[Scale]
    ratios: Sequence[Ratios]
    cache_step: int
    layers: Collection[int]
    branches: Collection[str]
    refused: Collection[tuple[int, str]]
    select: Select
    step: int = 0
    captured: dict[tuple[int, str], Tensor] = dataclasses.field(default_factory=dict)
    kept: dict[tuple[int, int, str], Tensor] = dataclasses.field(default_factory=dict)
    margin: float = math.inf

    def ratio(self, layer: int, name: str) -> float:
        """The fraction of tokens that this branch drops at this step."""
        chosen = layer in self.layers and name in self.branches
        first = len(self.scales) - len(self.ratios)
        if not chosen or (layer, name) in self.refused or self.step < first:
            return 0.0
        ratio = self.ratios[self.step - first]
        return ratio if isinstance(ratio, float) else ratio[layer][name]

    def run(self, layer: int, name: str, x: Tensor, branch: Branch) -> Tensor:
        """The branch's contribution (B, L, C) for the residual stream x (B, L, C)."""
        B, L, C = x.shape
        ratio = self.ratio(layer, name)
        if ratio == 0:
            out = branch(x, torch.arange(L, device=x.device).expand(B, L))
            if self.step == self.cache_step:
                self.captured[layer, name] = out
            return out
        kept = L - int(L * ratio)
        index = self.select(x, kept)
        self.kept[self.step, layer, name] = index
        self.note_margin(x, kept)
        kept_out = branch(take_tokens(x, index), index) if kept else x.new_empty(B, 0, C)
        cached = self.captured[layer, name]
        scale_c = self.scales[self.cache_step]
        return restore(cached, scale_c, self.scales[self.step], kept_out, index)

    def note_margin(self, x: Tensor, kept: int) -> None:
        """Remembers how close the last kept and the first dropped token ever were."""
        scores = pivotal_scores(x).sort(dim=1, descending=True).values
        if 0 < kept < scores.shape[1]:
            gap = (scores[:, kept - 1] - scores[:, kept]) / scores[:, 0]
            self.margin = min(self.margin, float(gap.min()))


# ---------------------------------------------------------------------------------------------
# Layers, from their weights
# ---------------------------------------------------------------------------------------------


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def norm(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, (zoo.ManualRMSNorm, nn.RMSNorm)):
        assert isinstance(layer.weight, Tensor)
        return rms(x, layer.weight)
    assert isinstance(layer, nn.LayerNorm)
    x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + layer.eps).sqrt()
    return x * layer.weight + layer.bias if layer.elementwise_affine else x


def layer_scale(layer: nn.Module, x: Tensor) -> Tensor:
    return x * layer.gamma if isinstance(layer, zoo.LayerScale) else x


def gelu(x: Tensor, tanh: bool) -> Tensor:
    if tanh:
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def feed_forward(ffn: nn.Module, x: Tensor) -> Tensor:
    if isinstance(ffn, zoo.GeluFFN):
        tanh = ffn.act.approximate == "tanh"
        return linear(ffn.fc2, gelu(linear(ffn.fc1, x), tanh))
    if isinstance(ffn, zoo.SwiGLU):
        return linear(ffn.fc2, silu(linear(ffn.fcg, x)) * linear(ffn.fc1, x))
    if isinstance(ffn, zoo.FusedSwiGLU):
        hidden = linear(ffn.w12, x)
        half = hidden.shape[-1] // 2
        return linear(ffn.w3, silu(hidden[..., :half]) * hidden[..., half:])
    assert isinstance(ffn, zoo.SquaredReLU)
    return linear(ffn.fc2, linear(ffn.fc1, x).clamp(min=0) ** 2)


def split_heads(x: Tensor, D: int) -> Tensor:
    """(B, n, H*D) as (B, n, H, D)."""
    return x.reshape(*x.shape[:-1], -1, D)


def project(qkv: nn.Module, x: Tensor, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, n, H, D), k and v (B, n, G, D) of the tokens x (B, n, C)."""
    if isinstance(qkv, zoo.SplitLinears):
        parts = [linear(m, x) for m in (qkv.to_q, qkv.to_k, qkv.to_v)]
    elif isinstance(qkv, zoo.GroupedQuery):
        parts = [linear(m, x) for m in (qkv.wq, qkv.wk, qkv.wv)]
    elif isinstance(qkv, zoo.CatBias):
        q, k, v = (x @ qkv.mat_qkv.weight.T).chunk(3, dim=-1)
        parts = [q + qkv.q_bias, k, v + qkv.v_bias]
    else:
        assert isinstance(qkv, (zoo.FusedUnbind, zoo.FusedPermute, zoo.FusedChunk))
        parts = list(linear(qkv.qkv, x).chunk(3, dim=-1))
    q, k, v = (split_heads(part, D) for part in parts)
    return q, k, v


def normalise_qk(layer: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer, zoo.NoQKNorm):
        return q, k
    if isinstance(layer, zoo.RMSQKNorm):
        return norm(layer.q_norm, q), norm(layer.k_norm, k)
    q = q / q.norm(dim=-1, keepdim=True)
    k = k / k.norm(dim=-1, keepdim=True)
    if isinstance(layer, zoo.ScaledL2QKNorm):
        q = q * layer.scale_mul.flatten().exp()[:, None]  # (H, 1)
    return q, k


def rotate(kind: str, x: Tensor, angles: Tensor) -> Tensor:
    """x (B, n, H, D) turned by its tokens' angles (B, n, D/2)."""
    cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)  # (B, n, 1, D/2)
    half = x.shape[-1] // 2
    if kind == "half":
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    first, second = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = first * cos - second * sin
    out[..., 1::2] = second * cos + first * sin
    return out


# ---------------------------------------------------------------------------------------------
# Attention on chosen tokens
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class KeyValues:
    """A block's KV cache: kept tokens only, and where in the whole sequence each one stands."""

    k: Tensor  # (B, M, G, D)
    v: Tensor
    positions: Tensor  # (B, M)

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        self.k, self.v = torch.cat((self.k, k), 1), torch.cat((self.v, v), 1)
        self.positions = torch.cat((self.positions, positions), 1)


@dataclasses.dataclass
class Step:
    """What a block is told at one step."""

    layer: int
    scale: Scale
    start: int  # tokens of all earlier steps
    cond: Tensor  # (B, C), or (B, 1, 6, C) where the model shares its AdaLN
    context: zoo.Context
    angles: Tensor | None  # (S, D/2)
    mask: Tensor | None  # (1, 1 or H, S, S), over the whole sequence
    caches: list[KeyValues | None]
    cached: bool
    rope: str

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.angles is None else rotate(self.rope, x, self.angles[positions])

    def keys(self, k: Tensor, v: Tensor, positions: Tensor) -> KeyValues:
        """All keys and values that the step's queries attend to; appends where there is a cache."""
        new = KeyValues(k, v, positions)
        if not self.cached:
            return new
        cache = self.caches[self.layer]
        if cache is None:
            self.caches[self.layer] = cache = new
        else:
            cache.append(k, v, positions)
        return cache

    def mask_rows(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """The mask at query positions (B, n) and key positions (B, M), (B, 1 or H, n, M)."""
        if self.mask is None:
            return None
        mask = self.mask[0]  # (1 or H, S, S)
        rows = [mask[:, q][:, :, k] for q, k in zip(queries, keys, strict=True)]
        return torch.stack(rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
        """Rotated q and k (B, n, ., D) at `positions` (B, n), and v; (B, n, C)."""
        kv = self.keys(k, v, positions)
        return attention(q, kv.k, kv.v, scale, self.mask_rows(positions, kv.positions))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """q (B, n, H, D) over k, v (B, M, G, D), G dividing H, mask (B, 1 or H, n, M); (B, n, C)."""
    group = q.shape[2] // k.shape[2]
    heads = []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // group].mT * scale  # (B, n, M)
        if mask is not None:
            of_head = mask[:, head if mask.shape[1] > 1 else 0]
            if of_head.dtype == torch.bool:
                of_head = torch.where(of_head, 0.0, -torch.inf).to(scores)
            scores = scores + of_head
        heads.append(torch.softmax(scores, dim=-1) @ v[:, :, head // group])
    return torch.cat(heads, dim=-1)


def self_attention(attn: zoo.Attention, step: Step, x: Tensor, index: Tensor) -> Tensor:
    """Self-attention of the tokens x (B, n, C) that stand at index (B, n) of this step's map."""
    C = x.shape[-1]
    D = C // attn.heads
    positions = step.start + index
    if attn.pos_bias == "input":
        x = x + attn.pos_table[0, positions]
    q, k, v = project(attn.qkv, x, D)
    if attn.pos_bias == "q":
        q = q + split_heads(attn.pos_table[0, positions], D)
    q, k = normalise_qk(attn.qk_norm, q, k)
    q, k = step.rotate(q, positions), step.rotate(k, positions)
    scale = D**-0.5
    if isinstance(attn.qk_norm, zoo.ScaledL2QKNorm):
        scale = 1.0
    elif isinstance(attn.qk_norm, zoo.L2QKNorm):
        scale = 3.0
    return linear(attn.proj, step.attend(q, k, v, positions, scale))


def cross_attention(cross: zoo.CrossAttention, step: Step, x: Tensor) -> Tensor:
    """Attention of the tokens x (B, n, C) to the text."""
    text, mask = step.context
    C = x.shape[-1]
    D = C // cross.heads
    q = split_heads(linear(cross.to_q, x), D)
    k, v = (split_heads(part, D) for part in linear(cross.to_kv, text).chunk(2, dim=-1))
    rows = None if mask is None else mask.expand(-1, 1, x.shape[1], -1)  # (B, 1, n, T)
    return linear(cross.proj, attention(q, k, v, D**-0.5, rows))


# ---------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------


def pre_norm_block(block: zoo.PreNormBlock, step: Step, pruner: Pruner, x: Tensor) -> Tensor:
    cross = block.cross

    def attend(t: Tensor, index: Tensor) -> Tensor:
        n = norm(block.norm1, t)
        return layer_scale(block.ls1, self_attention(block.attn, step, n, index))

    def read_text(t: Tensor, index: Tensor) -> Tensor:
        assert cross is not None
        return cross_attention(cross, step, norm(block.norm_cross, t))

    def feed(t: Tensor, index: Tensor) -> Tensor:
        return layer_scale(block.ls2, feed_forward(block.ffn, norm(block.norm2, t)))

    x = x + pruner.run(step.layer, "attention", x, attend)
    if cross is not None:
        x = x + pruner.run(step.layer, "cross", x, read_text)
    return x + pruner.run(step.layer, "ffn", x, feed)


def post_norm_block(block: zoo.PostNormBlock, step: Step, pruner: Pruner, x: Tensor) -> Tensor:
    cross = block.cross

    def attend(t: Tensor, index: Tensor) -> Tensor:
        return layer_scale(block.ls1, self_attention(block.attn, step, t, index))

    def read_text(t: Tensor, index: Tensor) -> Tensor:
        assert cross is not None
        return cross_attention(cross, step, t)

    def feed(t: Tensor, index: Tensor) -> Tensor:
        return layer_scale(block.ls2, feed_forward(block.ffn, t))

    x = norm(block.norm1, x + pruner.run(step.layer, "attention", x, attend))
    if cross is not None:
        x = norm(block.norm_cross, x + pruner.run(step.layer, "cross", x, read_text))
    return norm(block.norm2, x + pruner.run(step.layer, "ffn", x, feed))


def parallel_block(block: zoo.PreNormBlock, step: Step, pruner: Pruner, x: Tensor) -> Tensor:
    """Both parallel kinds: the branches share x, so their sum is the sum of what they restore."""
    cross = block.cross

    def attend(t: Tensor, index: Tensor) -> Tensor:
        n = norm(block.norm1, t)
        return layer_scale(block.ls1, self_attention(block.attn, step, n, index))

    def read_text(t: Tensor, index: Tensor) -> Tensor:
        assert cross is not None
        return cross_attention(cross, step, norm(block.norm1, t))

    def feed(t: Tensor, index: Tensor) -> Tensor:
        return layer_scale(block.ls2, feed_forward(block.ffn, norm(block.norm1, t)))

    out = x + pruner.run(step.layer, "attention", x, attend)
    if cross is not None:
        out = out + pruner.run(step.layer, "cross", x, read_text)
    return out + pruner.run(step.layer, "ffn", x, feed)


def sandwich_block(block: zoo.SandwichBlock, step: Step, pruner: Pruner, x: Tensor) -> Tensor:
    cross = block.cross

    def attend(t: Tensor, index: Tensor) -> Tensor:
        inner = self_attention(block.attn, step, norm(block.norm1, t), index)
        return layer_scale(block.ls1, norm(block.post1, inner))

    def read_text(t: Tensor, index: Tensor) -> Tensor:
        assert cross is not None
        inner = cross_attention(cross, step, norm(block.norm_cross, t))
        return norm(block.post_cross, inner)

    def feed(t: Tensor, index: Tensor) -> Tensor:
        inner = feed_forward(block.ffn, norm(block.norm2, t))
        return layer_scale(block.ls2, norm(block.post2, inner))

    x = x + pruner.run(step.layer, "attention", x, attend)
    if cross is not None:
        x = x + pruner.run(step.layer, "cross", x, read_text)
    return x + pruner.run(step.layer, "ffn", x, feed)


def ada_block(block: zoo.AdaUnbindBlock, step: Step, pruner: Pruner, x: Tensor) -> Tensor:
    C, cross = x.shape[-1], block.cross
    if isinstance(block, zoo.AdaSharedBlock):
        six = (block.ada_gss + step.cond)[:, 0]  # (B, 6, C)
    else:
        lin = block.ada_lin[1]
        assert isinstance(lin, nn.Linear)
        six = linear(lin, silu(step.cond)).reshape(-1, 6, C)
    parts = [six[:, i : i + 1] for i in range(6)]  # each (B, 1, C)
    if isinstance(block, zoo.AdaChunkBlock):
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
    else:
        gate1, gate2, scale1, scale2, shift1, shift2 = parts

    def attend(t: Tensor, index: Tensor) -> Tensor:
        n = norm(block.norm1, t) * (1 + scale1) + shift1
        return self_attention(block.attn, step, n, index) * gate1

    def read_text(t: Tensor, index: Tensor) -> Tensor:
        assert cross is not None
        return cross_attention(cross, step, norm(block.norm_cross, t))

    def feed(t: Tensor, index: Tensor) -> Tensor:
        return feed_forward(block.ffn, norm(block.norm2, t) * (1 + scale2) + shift2) * gate2

    x = x + pruner.run(step.layer, "attention", x, attend)
    if cross is not None:
        x = x + pruner.run(step.layer, "cross", x, read_text)
    return x + pruner.run(step.layer, "ffn", x, feed)


def inline_block(block: zoo.InlineBlock, step: Step, pruner: Pruner, x: Tensor) -> Tensor:
    D = x.shape[-1] // block.heads

    def attend(t: Tensor, index: Tensor) -> Tensor:
        positions = step.start + index
        parts = linear(block.c_attn, norm(block.ln_1, t)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, D) for part in parts)
        q, k = step.rotate(q, positions), step.rotate(k, positions)
        return linear(block.c_proj, step.attend(q, k, v, positions, D**-0.5))

    def feed(t: Tensor, index: Tensor) -> Tensor:
        return linear(block.fc2, gelu(linear(block.fc1, norm(block.ln_2, t)), tanh=False))

    x = x + pruner.run(step.layer, "attention", x, attend)
    return x + pruner.run(step.layer, "ffn", x, feed)


def inline_parallel_block(
    block: zoo.InlineParallelBlock, step: Step, pruner: Pruner, x: Tensor
) -> Tensor:
    """The one branch holds the attention and the FFN; it goes by the name "attention"."""
    C = x.shape[-1]
    D = C // block.heads
    shift, scale, gate = linear(block.modulation, silu(step.cond)).unsqueeze(1).chunk(3, dim=-1)

    def both(t: Tensor, index: Tensor) -> Tensor:
        positions = step.start + index
        hidden = linear(block.linear1, norm(block.pre_norm, t) * (1 + scale) + shift)
        q, k, v = (split_heads(hidden[..., i * C : (i + 1) * C], D) for i in range(3))
        q, k = norm(block.q_norm, q), norm(block.k_norm, k)
        q, k = step.rotate(q, positions), step.rotate(k, positions)
        attended = step.attend(q, k, v, positions, D**-0.5)
        joined = torch.cat((attended, gelu(hidden[..., 3 * C :], tanh=True)), dim=-1)
        return linear(block.linear2, joined) * gate

    return x + pruner.run(step.layer, "attention", x, both)


def hf_block(block: zoo.HFBlock, step: Step, pruner: Pruner, x: Tensor) -> Tensor:
    D = block.head_dim

    def attend(t: Tensor, index: Tensor) -> Tensor:
        positions = step.start + index
        n = norm(block.input_layernorm, t)
        projections = (block.q_proj, block.k_proj, block.v_proj)
        q, k, v = (split_heads(linear(m, n), D) for m in projections)
        q, k = step.rotate(q, positions), step.rotate(k, positions)
        return linear(block.o_proj, step.attend(q, k, v, positions, D**-0.5))

    def feed(t: Tensor, index: Tensor) -> Tensor:
        n = norm(block.post_attention_layernorm, t)
        return linear(block.down_proj, silu(linear(block.gate_proj, n)) * linear(block.up_proj, n))

    x = x + pruner.run(step.layer, "attention", x, attend)
    return x + pruner.run(step.layer, "ffn", x, feed)


def odd_block(
    block: zoo.OddFFNBlock | zoo.OddAttentionBlock, step: Step, pruner: Pruner, x: Tensor
) -> Tensor:
    """A block with a branch that is always dense: the module itself runs on the whole map."""
    h, w = step.scale
    if isinstance(block, zoo.OddAttentionBlock):
        x = x + block.odd(norm(block.norm1, x), h, w)
        return x + pruner.run(
            step.layer, "ffn", x, lambda t, _: feed_forward(block.ffn, norm(block.norm2, t))
        )

    def attend(t: Tensor, index: Tensor) -> Tensor:
        return self_attention(block.attn, step, norm(block.norm1, t), index)

    x = x + pruner.run(step.layer, "attention", x, attend)
    branch: Tensor = block.odd(norm(block.norm2, x), h, w)
    return x + branch


def run_block(block: nn.Module, step: Step, pruner: Pruner, x: Tensor) -> Tensor:
    if isinstance(block, (zoo.OddFFNBlock, zoo.OddAttentionBlock)):
        return odd_block(block, step, pruner, x)
    if isinstance(block, zoo.InlineBlock):
        return inline_block(block, step, pruner, x)
    if isinstance(block, zoo.InlineParallelBlock):
        return inline_parallel_block(block, step, pruner, x)
    if isinstance(block, zoo.HFBlock):
        return hf_block(block, step, pruner, x)
    if isinstance(block, zoo.AdaUnbindBlock):
        return ada_block(block, step, pruner, x)
    if isinstance(block, zoo.SandwichBlock):
        return sandwich_block(block, step, pruner, x)
    if isinstance(block, (zoo.ParallelBlock, zoo.JointParallelBlock)):
        return parallel_block(block, step, pruner, x)
    if isinstance(block, zoo.PostNormBlock):
        return post_norm_block(block, step, pruner, x)
    assert type(block) is zoo.PreNormBlock
    return pre_norm_block(block, step, pruner, x)


# ---------------------------------------------------------------------------------------------
# A whole generation
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReferenceRun:
    """What a generation gave and did."""

    hidden: Tensor  # (B, S, C), as ZooModel.generate returns it
    kv_lengths: list[int]  # per block, at the end; 0 where there is no cache
    kept: dict[tuple[int, int, str], Tensor]  # (step, block, branch) -> index (B, kept)
    margin: float  # smallest gap between a kept and a dropped score, relative to the highest


@torch.no_grad()
def reference_generate(
    model: zoo.ZooModel,
    batch: int,
    seed: int,
    scales: Sequence[Scale],
    ratios: Sequence[Ratios],
    cache_step: int | None = None,
    layers: Collection[int] | None = None,
    *,
    branches: Collection[str] = ("attention", "cross", "ffn"),
    refused: Collection[tuple[int, str]] = (),
    first: int = 0,
    select: Select = pivotal_indices,
) -> ReferenceRun:
    """A generation of the zoo model with FastVAR edited into its blocks by hand.

    Args:
        model: read only; its KV caches are not touched.
        batch: number of samples.
        seed: as for `ZooModel.generate`.
        scales: (h, w) of each of the K steps.
        ratios: pruning ratios of the last N steps, 0..1: one, or of each block one by branch.
        cache_step: the step whose outputs are captured, K - N - 1 by default.
        layers: the blocks to prune, all by default.
        branches: the branches to prune.
        refused: (block, branch) pairs to leave dense.
        first: number of the first sample.
        select: what picks the kept tokens.
    """
    assert list(scales) == list(model.scales)
    if cache_step is None:
        cache_step = len(scales) - len(ratios) - 1
    assert 0 <= cache_step < len(scales) - len(ratios)
    spec, blocks = model.spec, list(model.blocks)
    layers = range(len(blocks)) if layers is None else layers
    pruner = Pruner(scales, ratios, cache_step, layers, branches, refused, select)
    inputs = model.draw_inputs(batch, seed, first)
    cond = inputs.cond
    if model.shared_ada is not None:
        cond = linear(model.shared_ada, silu(cond)).reshape(batch, 1, 6, spec.width)
    angles = None
    if spec.rope != "none":
        angles = zoo.rotary_angles(spec, scales).to(cond)
    caches: list[KeyValues | None] = [None for _ in blocks]
    mask = model.attn_bias if spec.mask != "none" else None

    hidden: list[Tensor] = []
    start = 0
    for number, (h, w) in enumerate(scales):
        if number == 0:
            tokens = inputs.start.repeat(1, h * w, 1)
        else:
            last = hidden[-1]
            last = last - last.mean(dim=-1, keepdim=True)
            last = last / (last.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
            image = linear(model.head, last).reshape(batch, *scales[number - 1], -1)
            image = F.interpolate(image.permute(0, 3, 1, 2), size=(h, w), mode="bilinear")
            tokens = image.permute(0, 2, 3, 1).reshape(batch, h * w, -1)
        x = tokens + model.pos_embed[:, start : start + h * w] + model.level_embed[number]
        pruner.step = number
        for layer, block in enumerate(blocks):
            step = Step(
                layer=layer,
                scale=(h, w),
                start=start,
                cond=cond,
                context=inputs.context,
                angles=angles,
                mask=mask,
                caches=caches,
                cached=spec.cached,
                rope=spec.rope,
            )
            x = run_block(block, step, pruner, x)
            if spec.between == "inplace":
                x = 0.9 * x + model.level_embed[number]
        hidden.append(x)
        start += h * w
    lengths = [0 if cache is None else cache.k.shape[1] for cache in caches]
    return ReferenceRun(torch.cat(hidden, dim=1), lengths, pruner.kept, pruner.margin)


def reference_of(case: zoo.Case, model: zoo.ZooModel) -> ReferenceRun:
    """The reference for one drawn case."""
    drawn = case.schedule
    return reference_generate(
        model, case.batch, case.seed, drawn.scales, drawn.ratios, drawn.cache_step, case.layers
    )
