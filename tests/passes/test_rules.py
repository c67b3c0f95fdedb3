"""Axis algebra and axis rules: what each op does to axes, and what a pruned op computes."""
# mypy: disable-error-code="no-any-return, no-untyped-call"

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.analyse.axes import (
    Axes,
    AxesError,
    Dim,
    Factor,
    Tag,
    broadcast,
    dim_size,
    meets_tokens,
    plain_dim,
    regroup,
    shape_of,
    stream_axes,
    token_dims,
)
from passes.analyse.branches import Branch, find_branches
from passes.refusal import BranchRefusedError
from passes.rewrite.prune import ASKS_NOTHING, Step, prune
from passes.trace.calls import Call
from passes.trace.capture import BlockProgram, capture
from passes.trace.state import get, roots

N = 8  # samples, tokens and features: labels must tell them apart, sizes cannot
KEPT = 5
HEADS, HEAD = 2, 4
PAST = 3

F64 = torch.float64
Function = Callable[..., Tensor]


# -- axis algebra -------------------------------------------------------------------------------

B: Dim = (Factor(N, Tag.BATCH),)
T: Dim = (Factor(N, Tag.TOKEN),)
C: Dim = (Factor(N),)


def test_stream_axes_are_labelled_by_place_not_size() -> None:
    assert stream_axes((N, N, N)) == (B, T, C)
    assert stream_axes((1, N, 1)) == ((), T, ())


def test_sizes_with_fewer_tokens() -> None:
    keys = Factor(PAST + N + 1, Tag.TOKEN, before=PAST, after=1)
    assert keys.tokens == N
    assert keys.kept_size(KEPT) == PAST + KEPT + 1
    axes: Axes = (B, (*C, keys), ())
    assert shape_of(axes) == [N, N * (PAST + N + 1), 1]
    assert shape_of(axes, KEPT) == [N, N * (PAST + KEPT + 1), 1]
    assert token_dims(axes) == [1]
    assert dim_size((), 0) == 1


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((N, N, HEADS, HEAD), (B, T, (Factor(HEADS),), (Factor(HEAD),))),
        ((N * N, N), ((*B, *T), C)),
        ((N, N * N), (B, (*T, *C))),
        ((N * N * N,), ((*B, *T, *C),)),
        ((N, 1, N, N), (B, (), T, C)),
        ((N, N * HEADS, HEAD), (B, (*T, Factor(HEADS)), (Factor(HEAD),))),
    ],
)
def test_regroup(shape: tuple[int, ...], expected: Axes) -> None:
    axes = regroup((B, T, C), shape)
    assert axes == expected
    assert shape_of(axes) == list(shape)
    assert regroup(axes, (N, N, N)) == (B, T, C)


@pytest.mark.parametrize("shape", [(N, 2, 4, N), (2, 4, N, N), (N, 2, N * 4), (N // 2, 2 * N, N)])
def test_regroup_never_splits_tokens_or_samples(shape: tuple[int, ...]) -> None:
    with pytest.raises(AxesError):
        regroup((B, T, C), shape)


def test_broadcast_aligns_from_the_right() -> None:
    assert broadcast([(B, T, C), (T, ())]) == (B, T, C)
    assert broadcast([(T, ()), (B, (), C)]) == (B, T, C)
    assert broadcast([((), ()), ((),)]) == ((), ())


@pytest.mark.parametrize(
    "axes",
    [
        (C, C),
        (T, T),
        ((Factor(N, Tag.TOKEN, before=PAST),), C),
        ((*T, Factor(1)), T),
    ],
)
def test_broadcast_refuses_tokens_that_meet_something_else(axes: Axes) -> None:
    with pytest.raises(AxesError, match="axis"):
        broadcast([(T, C), axes])


def test_meets_tokens() -> None:
    axes: Axes = (B, T, C)
    assert meets_tokens((N, 1), axes)
    assert meets_tokens((1, N, N), axes)
    assert not meets_tokens((N,), axes)
    assert not meets_tokens((N, 1, N), axes)
    assert plain_dim(1) == ()


# -- what a pruned op computes ------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A tensor argument of a branch; `tokens` and `batch` are its dims that range over those."""

    shape: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    batch: int | None = None
    past: int = 0
    boolean: bool = False

    def make(self, batch: int) -> Tensor:
        shape = [batch if d == self.batch else s for d, s in enumerate(self.shape)]
        value = torch.randn(shape, dtype=F64)
        return value > 0 if self.boolean else value

    def at(self, value: Tensor, sample: int, index: Tensor) -> Tensor:
        """What one sample's kept tokens see of it, by hand."""
        if self.batch is not None:
            value = value.narrow(self.batch, sample, 1)
        for dim in self.tokens:
            past = value.shape[dim] - N
            keys = torch.cat([torch.arange(past), past + index])
            value = value.index_select(dim, keys)
        return value


class Host(nn.Module):
    """x + function(fc(x), sides): one residual branch of real work around the op under test."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.fc = nn.Linear(N, N)
        self.wide = nn.Linear(N, 3 * N)
        self.out = nn.Linear(N, N)
        self.conv1 = nn.Conv1d(N, N, 1)
        self.conv2 = nn.Conv2d(N, N, 1)
        self.conv3 = nn.Conv1d(N, N, 3, padding=1)
        self.layer_norm = nn.LayerNorm(N)
        self.rms_norm = nn.RMSNorm(N)
        self.group_norm = nn.GroupNorm(2, N)
        self.batch_norm = nn.BatchNorm1d(N)
        self.per_head = nn.Parameter(torch.randn(HEADS, HEAD, HEAD))
        self.buffer = nn.Buffer(torch.zeros(N, N, N))
        self.function = function

    def branch(self, x: Tensor, *sides: Tensor) -> Tensor:
        return self.function(self, self.fc(x), *sides)

    def forward(self, x: Tensor, *sides: Tensor) -> Tensor:
        return x + self.branch(x, *sides)


class Chosen:
    """Operators that keep given tokens, another set in another order per sample."""

    asks = ASKS_NOTHING
    restores_anew = False

    def __init__(self, index: Tensor) -> None:
        self.index = index

    def select(self, x: Tensor, kept: int) -> Tensor:
        assert x.dim() == 3
        return self.index[: x.shape[0], :kept]

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.stack([x[i, index[i]] for i in range(x.shape[0])])

    def restore(
        self,
        kept: Tensor,
        index: Tensor,
        cached: Tensor,
        cached_scale: tuple[int, ...],
        scale: tuple[int, ...],
    ) -> Tensor:
        tokens = math.prod(scale)
        full = cached.new_zeros(cached.shape[0], tokens, cached.shape[2])
        return full.scatter(1, index.unsqueeze(-1).expand_as(kept), kept)


def host_of(function: Function) -> Host:
    torch.manual_seed(0)
    return Host(function).double().eval()


def captured(host: nn.Module, x: Tensor, sides: list[Tensor]) -> BlockProgram:
    with torch.no_grad():
        return capture(Call(type(host).forward.__get__(host), host, (x, *sides), {}))


def found_in(program: BlockProgram) -> Branch:
    (found,) = find_branches(program, (("item", "args"), ("item", 0)))
    return found


def run_pruned(
    host: nn.Module, program: BlockProgram, branch: Branch, inputs: list[Tensor], index: Tensor
) -> list[Tensor]:
    """Runs the rewritten graph; restoration puts zeros where no token was kept."""
    kept = index.shape[1]
    step = Step(kept, (1, 1), (2, N // 2), Chosen(index))
    example = branch.out.meta["val"]
    pruned = prune(
        program.graph_module,
        [branch],
        step,
        lambda b: b.out.meta["val"].new_empty(example.shape[0], 1, N),
    )
    origin = roots(host, tuple(inputs), {})
    live = [get(origin, program.inputs[i]) for i in pruned.inputs]
    cached = torch.zeros(inputs[0].shape[0], 1, N, dtype=F64)
    with torch.no_grad():
        results: list[Tensor] = pruned.graph_module(*live, cached)
    return results


def indices(batch: int, kept: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + kept)
    rows = [torch.randperm(N, generator=generator)[:kept] for _ in range(batch)]
    return torch.stack(rows)


def assert_prunes(function: Function, sides: tuple[Side, ...], batch: int, kept: int) -> None:
    """The pruned branch on kept tokens is the function on each sample's kept tokens alone."""
    host = host_of(function)
    x = torch.randn(batch, N, N, dtype=F64)
    values = [side.make(batch) for side in sides]
    program = captured(host, x, values)
    branch = found_in(program)
    assert branch.refusal is None, str(branch.refusal)
    index = indices(batch, kept)
    (result,) = run_pruned(host, program, branch, [x, *values], index)
    expected = x.clone()
    for i in range(batch):
        own = [side.at(v, i, index[i]) for side, v in zip(sides, values, strict=True)]
        with torch.no_grad():
            expected[i, index[i]] += host.branch(x[i : i + 1, index[i]], *own)[0]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


# Functions below take the host, then (B, L, C), then their sides; they read sizes off their
# operand, so that the same function says by hand what it does to the kept tokens.


def heads_of(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, HEAD).transpose(1, 2)  # (B, H, L, D)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], N)


def reshape_collision(m: Host, h: Tensor) -> Tensor:
    b, length, _ = h.shape
    h = h.reshape(b * length, N).view(b, length * HEADS, HEAD)
    h = h * torch.arange(1, HEAD + 1, dtype=F64)
    return h.view(-1, length, N)


def view_minus_one(m: Host, h: Tensor) -> Tensor:
    b, length, _ = h.shape
    h = h.view(b, -1, HEADS, HEAD)
    return h.tanh().reshape(b, length, -1)


def flatten_unflatten(m: Host, h: Tensor) -> Tensor:
    b, length, _ = h.shape
    h = m.out(h.flatten(0, 1)).unflatten(0, (b, length))
    return h.unflatten(-1, (HEADS, HEAD)).flatten(2)


def view_as_inside(m: Host, h: Tensor) -> Tensor:
    return h.reshape(-1, N).sin().view_as(h) + h.flatten(1).reshape_as(h)


def permutes(m: Host, h: Tensor) -> Tensor:
    h = h.permute(2, 0, 1).mT.transpose(0, 1)  # C B L -> C L B -> L C B
    h = h.movedim(-1, 0).swapaxes(1, 2).swapdims(0, 1)  # B L C -> B C L -> C B L
    return h.cos().permute(1, -1, 0).contiguous()


def transposed_linear(m: Host, h: Tensor) -> Tensor:
    return (m.out.weight @ h.mT).mT


def squeezes(m: Host, h: Tensor) -> Tensor:
    h = h.unsqueeze(2).unsqueeze(0)
    return h.sigmoid().squeeze(0).squeeze(2)


def expands(m: Host, h: Tensor) -> Tensor:
    b, length, _ = h.shape
    wide = h.unsqueeze(2).expand(b, length, 3, N)
    same = h[:, :, None].expand(-1, -1, 3, -1)
    return (wide * torch.tensor([1.0, 2.0, 4.0], dtype=F64)[:, None] + same).sum(2)


def expand_to_inside(m: Host, h: Tensor) -> Tensor:
    return h[..., :1].expand_as(h) * h


def repeats(m: Host, h: Tensor) -> Tensor:
    h = h.repeat(1, 1, 2) * torch.arange(2 * N, dtype=F64)
    return h[..., :N] + h[..., N:]


def repeats_tokens(m: Host, h: Tensor) -> Tensor:
    b, length, _ = h.shape
    return h.repeat(1, 2, 1).view(b, 2, length, N).cumsum(1)[:, 1]


def interleaves(m: Host, h: Tensor) -> Tensor:
    b, length, _ = h.shape
    h = h.repeat_interleave(3, dim=1).view(b, length, 3, N)
    h = h[:, :, 1]
    return h * h.repeat_interleave(2, 2).unflatten(-1, (N, 2))[..., 1]


def grouped_heads(m: Host, h: Tensor) -> Tensor:
    q = heads_of(h)
    k = q[:, :1].repeat_interleave(HEADS, dim=1)
    v = q[:, 1:].expand(-1, HEADS, -1, -1)
    return joined(F.scaled_dot_product_attention(q, k, v))


def selects(m: Host, h: Tensor) -> Tensor:
    return h * h[:, :, 3].unsqueeze(-1) + h.select(-1, 0)[:, :, None]


def slices(m: Host, h: Tensor) -> Tensor:
    even, odd = h[..., ::2], h[:, :, 1::2]
    return torch.stack([-odd, even], dim=-1).flatten(-2) + h[:, :, :][:, : h.shape[1]]


def narrows(m: Host, h: Tensor) -> Tensor:
    return torch.cat([h.narrow(-1, 4, 4), h.narrow(2, 0, 4)], dim=-1)


def splits(m: Host, h: Tensor) -> Tensor:
    q, k, v = m.wide(h).chunk(3, dim=-1)
    a, b = q.split(HEAD, dim=-1)
    c, d = k.split([2, 6], dim=2)
    e, f = v.tensor_split(2, dim=-1)
    return torch.cat([a * e, b + f], -1) + torch.cat([d, c], -1)


def unbinds(m: Host, h: Tensor) -> Tensor:
    b, length, _ = h.shape
    q, k, v = m.wide(h).view(b, length, 3, N).unbind(2)
    x, y, z = m.wide(h).view(b, length, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
    return q * k + v + joined(x * y - z)


def stacks(m: Host, h: Tensor) -> Tensor:
    stacked = torch.stack([h, h.sin(), h.cos()])  # 3 B L C
    return stacked.prod(0) + torch.stack([h, 2 * h], dim=2).sum(2)


def cats_features(m: Host, h: Tensor) -> Tensor:
    h = torch.cat([h, h.exp()], dim=-1)
    return h[..., 4:12]


def sdpa(m: Host, h: Tensor) -> Tensor:
    q, k, v = (heads_of(t) for t in m.wide(h).chunk(3, -1))
    return joined(F.scaled_dot_product_attention(q, k, v, scale=0.3))


def sdpa_over_heads(m: Host, h: Tensor) -> Tensor:
    x = h.unflatten(-1, (HEADS, HEAD))
    return F.scaled_dot_product_attention(x, x, x).flatten(2)


def sdpa_masked(m: Host, h: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (heads_of(t) for t in m.wide(h).chunk(3, -1))
    return joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def sdpa_cached(m: Host, h: Tensor, past: Tensor) -> Tensor:
    q, k, v = (heads_of(t) for t in m.wide(h).chunk(3, -1))
    k, v = torch.cat([past, k], dim=2), torch.cat((past * 2, v), dim=2)
    return joined(F.scaled_dot_product_attention(q, k, v))


def sdpa_cached_masked(m: Host, h: Tensor, past: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (heads_of(t) for t in m.wide(h).chunk(3, -1))
    k, v = torch.cat([past, k], dim=2), torch.cat([past * 2, v], dim=2)
    return joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def cache_behind(m: Host, h: Tensor, past: Tensor) -> Tensor:
    q = heads_of(h)
    k = torch.cat([q, past], dim=2)
    return joined((q @ k.mT).softmax(-1) @ k)


def window_of_cache(m: Host, h: Tensor, past: Tensor) -> Tensor:
    q = heads_of(h)
    k = torch.cat([past, q], dim=2)[:, :, 1:]
    k = k[:, :, -(q.shape[2] + 1) :]
    return joined((q @ k.mT).softmax(-1) @ k)


def past_dropped_again(m: Host, h: Tensor, past: Tensor) -> Tensor:
    return h * torch.cat([past, h], dim=1)[:, 1:]


def cross(m: Host, h: Tensor, text: Tensor) -> Tensor:
    return joined(F.scaled_dot_product_attention(heads_of(h), text, 2 * text))


def einsum_attention(m: Host, h: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, HEAD)) for t in m.wide(h).chunk(3, -1))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(dim=-1)
    return torch.einsum("bhij,bjhd -> bihd", weights, v).flatten(2)


def einsum_weights(m: Host, h: Tensor) -> Tensor:
    x = h.unflatten(-1, (HEADS, HEAD))
    return torch.einsum("blhd,hde->blhe", x, m.per_head).flatten(2)


def einsum_transposed(m: Host, h: Tensor) -> Tensor:
    return torch.einsum("oc,lbc->blo", m.out.weight, torch.einsum("blc->lbc", h))


def einsum_side(m: Host, h: Tensor, side: Tensor) -> Tensor:
    return torch.einsum("blc,lc->blc", h, side)


def einsum_linear_attention(m: Host, h: Tensor) -> Tensor:
    state = torch.einsum("blc,bld->bcd", h.exp(), h)
    return torch.einsum("blc,bcd->bld", h, state)


def bmm_merged(m: Host, h: Tensor) -> Tensor:
    b, length, _ = h.shape
    q, k, v = (heads_of(t).reshape(b * HEADS, length, HEAD) for t in m.wide(h).chunk(3, -1))
    scores = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
    return joined(torch.bmm(scores, v).view(b, HEADS, length, HEAD))


def baddbmm_masked(m: Host, h: Tensor, mask: Tensor) -> Tensor:
    b, length, _ = h.shape
    q = heads_of(h).reshape(b * HEADS, length, HEAD)
    merged = mask.expand(b, HEADS, length, length).reshape(-1, length, length)
    scores = torch.baddbmm(merged, q, q.mT, beta=0.5, alpha=2.0).softmax(-1)
    return joined((scores @ q).view(b, HEADS, length, HEAD))


def matmul_attention(m: Host, h: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (heads_of(t) for t in m.wide(h).chunk(3, -1))
    scores = q.mul(0.5).matmul(k.transpose(-2, -1)) + mask
    scores = scores - scores.amax(-1, keepdim=True)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return joined(weights @ v)


def matmul_vector(m: Host, h: Tensor) -> Tensor:
    return h * (h @ m.out.bias).unsqueeze(-1)


def matmul_per_token(m: Host, h: Tensor, side: Tensor) -> Tensor:
    return (h.unsqueeze(2) @ side).squeeze(2)


def addmm_merged(m: Host, h: Tensor) -> Tensor:
    return torch.addmm(m.out.bias, h.flatten(0, 1), m.out.weight.T).view(h.shape)


def addmm_side(m: Host, h: Tensor, side: Tensor) -> Tensor:
    return torch.addmm(side.flatten(0, 1), h.flatten(0, 1), m.out.weight.T).view(h.shape)


def conv1d(m: Host, h: Tensor) -> Tensor:
    return m.conv1(h.transpose(1, 2)).transpose(1, 2)


def conv2d(m: Host, h: Tensor) -> Tensor:
    return m.conv2(h.mT.unsqueeze(-1)).squeeze(-1).mT


def conv_over_features(m: Host, h: Tensor) -> Tensor:
    x = h.reshape(-1, HEADS, HEAD).repeat(1, 4, 1)
    return m.conv3(x)[:, :HEADS].reshape(h.shape)


def norms(m: Host, h: Tensor) -> Tensor:
    h = F.layer_norm(m.layer_norm(h), (N,)) + m.rms_norm(h)
    return F.layer_norm(h.unflatten(-1, (HEADS, HEAD)), (HEAD,)).flatten(2)


def manual_rms(m: Host, h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) + F.normalize(h, dim=-1)


def statistics(m: Host, h: Tensor) -> Tensor:
    var, mean = torch.var_mean(h, dim=-1, keepdim=True)
    top, at = h.max(dim=-1, keepdim=True)
    top = top * at - h.amin(2, keepdim=True)
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True) + h.norm(dim=2)[..., None]
    return (h - mean) / (var + 1).sqrt() * top + norm + h.logsumexp(-1, keepdim=True)


def reduces_heads(m: Host, h: Tensor) -> Tensor:
    x = h.unflatten(-1, (HEADS, HEAD))
    return x.sum(2).repeat(1, 1, 2) + x.mean((-1, -2))[..., None] + x.argmax(-1).sum(-1)[..., None]


def group_norm(m: Host, h: Tensor) -> Tensor:
    return m.group_norm(h.reshape(-1, N)).view(h.shape)


def batch_norm(m: Host, h: Tensor) -> Tensor:
    return m.batch_norm(h.transpose(1, 2)).transpose(1, 2) + m.batch_norm(h.view(-1, N)).view_as(h)


def glu(m: Host, h: Tensor) -> Tensor:
    return F.glu(torch.cat([h, m.out(h)], -1), dim=-1)


def pointwise(m: Host, h: Tensor) -> Tensor:
    h = F.silu(h) + F.gelu(h, approximate="tanh") * F.relu(h) - F.softplus(h) + F.elu(h)
    h = torch.maximum(h, h.sin()) + torch.lerp(h, h.cos(), 0.3) + torch.addcmul(h, h, h, value=2.0)
    return h.clamp(-4, 4).square().nan_to_num() + F.hardswish(h) + torch.atan2(h, h.exp())


def in_place(m: Host, h: Tensor) -> Tensor:
    h = h.clone().mul_(2.0).add_(1.0)
    h.copy_(h.sin()).clamp_(-0.5, 0.5)
    return F.relu(h, inplace=True)


def casts(m: Host, h: Tensor) -> Tensor:
    return h.float().to(torch.bfloat16).type_as(h).to(h) + h.double() + h.detach()


def features_order(m: Host, h: Tensor) -> Tensor:
    best, at = h.topk(3, dim=-1)
    ordered, order = h.sort(-1)
    return h.flip(-1).roll(2, dims=-1) + best[..., 1:2] * at[..., :1] + ordered * order


def features_scan(m: Host, h: Tensor) -> Tensor:
    highest, at = h.cummax(-1)
    return h.cumsum(-1).softmax(-1).log_softmax(2) + highest * at


def pads(m: Host, h: Tensor) -> Tensor:
    return F.pad(h, (2, 1))[..., 2 : N + 2] + F.pad(h[..., 2:], (1, 1), value=3.0)


def dropout_off(m: Host, h: Tensor) -> Tensor:
    return F.dropout(h, 0.5, training=False)


def dropout_at_rate_0(m: Host, h: Tensor) -> Tensor:
    h = F.dropout(F.alpha_dropout(h, 0.0, True), 0.0) + torch.native_dropout(h, 0.0, True)[0]
    return F.dropout(F.feature_alpha_dropout(F.dropout1d(h, 0.0), 0.0, True) * 2, 0.0, inplace=True)


def parts_of_numbers(m: Host, h: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(h)
    return torch.ldexp(mantissa * 2, exponent)


def ranks(m: Host, h: Tensor) -> Tensor:
    lowest, highest = h.aminmax(dim=-1, keepdim=True)
    middle = h.median(-1, keepdim=True).values + h.kthvalue(2, -1, keepdim=True)[0]
    return (h - lowest) / (highest - lowest) + middle * h.round().mode(-1, keepdim=True).indices


def makes(m: Host, h: Tensor) -> Tensor:
    return h + torch.zeros_like(h) + torch.ones_like(h[..., :1]) + torch.full_like(h, 2.0)


def where_mask(m: Host, h: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, h, -h)


def fill_mask(m: Host, h: Tensor, mask: Tensor) -> Tensor:
    return h.masked_fill(mask, 7.0)


def fill_inside_mask(m: Host, h: Tensor) -> Tensor:
    return h.masked_fill(h[..., :1] > 0, 0.0) + torch.where(h > 1, 1.0, h)


def multiplied(m: Host, h: Tensor, side: Tensor) -> Tensor:
    return h * side + side


def heads_times(m: Host, h: Tensor, side: Tensor) -> Tensor:
    return joined(heads_of(h) * side)


def token_first(m: Host, h: Tensor, side: Tensor) -> Tensor:
    return (h.transpose(0, 1) * side).transpose(0, 1)


def merged_rows(m: Host, h: Tensor, side: Tensor) -> Tensor:
    return (h.flatten(0, 1) * side.flatten(0, 1)).view(h.shape)


def scores_bias(m: Host, h: Tensor, bias: Tensor) -> Tensor:
    q = heads_of(h)
    return joined(((q @ q.mT) + bias).softmax(-1) @ q)


def cat_side(m: Host, h: Tensor, side: Tensor) -> Tensor:
    return torch.cat([side, h], dim=-1)[..., HEAD : HEAD + N]


def stack_side(m: Host, h: Tensor, side: Tensor) -> Tensor:
    return torch.stack([h, side.expand_as(h)], dim=-1).amax(-1)


def rope_complex(m: Host, h: Tensor, table: Tensor) -> Tensor:
    x = torch.view_as_complex(heads_of(h).contiguous().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(x * torch.polar(torch.ones_like(table), table)).flatten(3)
    return joined(turned)


def rope_halves(m: Host, h: Tensor, table: Tensor) -> Tensor:
    x = heads_of(h)
    a, b = x.chunk(2, dim=-1)
    return joined(x * table.cos() + torch.cat([-b, a], -1) * table.sin())


def positions(m: Host, h: Tensor, table: Tensor) -> Tensor:
    return h + F.embedding(torch.arange(table.shape[0]), table)


TABLE = Side((N, HEAD), tokens=(0,))
REWRITES: list[tuple[Function, tuple[Side, ...]]] = [
    (reshape_collision, ()),
    (view_minus_one, ()),
    (flatten_unflatten, ()),
    (view_as_inside, ()),
    (permutes, ()),
    (transposed_linear, ()),
    (squeezes, ()),
    (expands, ()),
    (expand_to_inside, ()),
    (repeats, ()),
    (repeats_tokens, ()),
    (interleaves, ()),
    (grouped_heads, ()),
    (selects, ()),
    (slices, ()),
    (narrows, ()),
    (splits, ()),
    (unbinds, ()),
    (stacks, ()),
    (cats_features, ()),
    (sdpa, ()),
    (sdpa_over_heads, ()),
    (sdpa_masked, (Side((N, N), tokens=(0, 1)),)),
    (sdpa_masked, (Side((N, 1, N, N), tokens=(2, 3), batch=0),)),
    (sdpa_masked, (Side((1, HEADS, 1, N), tokens=(3,), boolean=True),)),
    (sdpa_cached, (Side((N, HEADS, PAST, HEAD), batch=0),)),
    (
        sdpa_cached_masked,
        (
            Side((N, HEADS, PAST, HEAD), batch=0),
            Side((1, 1, N, PAST + N), tokens=(2, 3)),
        ),
    ),
    (cache_behind, (Side((N, HEADS, PAST, HEAD), batch=0),)),
    (window_of_cache, (Side((N, HEADS, PAST, HEAD), batch=0),)),
    (past_dropped_again, (Side((N, 1, N), batch=0),)),
    (cross, (Side((N, HEADS, N, HEAD), batch=0),)),
    (einsum_attention, ()),
    (einsum_weights, ()),
    (einsum_transposed, ()),
    (einsum_linear_attention, ()),
    (bmm_merged, ()),
    (baddbmm_masked, (Side((N, HEADS, N, N), tokens=(2, 3), batch=0),)),
    (matmul_attention, (Side((1, HEADS, N, N), tokens=(2, 3)),)),
    (matmul_vector, ()),
    (matmul_per_token, (Side((N, N, N), tokens=(0,)),)),
    (addmm_merged, ()),
    (addmm_side, (Side((N, N, N), tokens=(1,), batch=0),)),
    (conv1d, ()),
    (conv2d, ()),
    (conv_over_features, ()),
    (norms, ()),
    (manual_rms, ()),
    (statistics, ()),
    (reduces_heads, ()),
    (group_norm, ()),
    (batch_norm, ()),
    (glu, ()),
    (pointwise, ()),
    (in_place, ()),
    (casts, ()),
    (features_order, ()),
    (features_scan, ()),
    (pads, ()),
    (dropout_off, ()),
    (dropout_at_rate_0, ()),
    (parts_of_numbers, ()),
    (ranks, ()),
    (makes, ()),
    (where_mask, (Side((N, N, 1), tokens=(1,), batch=0, boolean=True),)),
    (where_mask, (Side((N, 1), tokens=(0,), boolean=True),)),
    (fill_mask, (Side((1, N, N), tokens=(1,), boolean=True),)),
    (fill_inside_mask, ()),
    (multiplied, (Side((N,)),)),
    (multiplied, (Side((N, 1), tokens=(0,)),)),
    (multiplied, (Side((N, N), tokens=(0,)),)),
    (multiplied, (Side((1, N, N), tokens=(1,)),)),
    (multiplied, (Side((N, 1, N), batch=0),)),
    (multiplied, (Side((N, N, N), tokens=(1,), batch=0),)),
    (heads_times, (TABLE,)),
    (heads_times, (Side((HEADS, N, 1), tokens=(1,)),)),
    (heads_times, (Side((N, 1, N, HEAD), tokens=(2,), batch=0),)),
    (merged_rows, (Side((N, N, 1), tokens=(1,), batch=0),)),
    (merged_rows, (Side((N, N, N), tokens=(1,), batch=0),)),
    (scores_bias, (Side((HEADS, N, N), tokens=(1, 2)),)),
    (scores_bias, (Side((N, 1, 1, N), tokens=(3,), batch=0),)),
    (scores_bias, (Side((N, 1), tokens=(0,)),)),
    (cat_side, (Side((N, N, HEAD), tokens=(1,), batch=0),)),
    (stack_side, (Side((1, N, N), tokens=(1,)),)),
    (rope_complex, (Side((N, HEAD // 2), tokens=(0,)),)),
    (rope_halves, (TABLE,)),
    (rope_halves, (Side((1, 1, N, HEAD), tokens=(2,)),)),
    (positions, (Side((N, N), tokens=(0,)),)),
]


def _name(value: object) -> str | None:
    if isinstance(value, tuple):
        return "-".join("x".join(map(str, side.shape)) for side in value) or "alone"
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("batch", [1, N])
@pytest.mark.parametrize(("function", "sides"), REWRITES, ids=_name)
def test_pruned_op_is_the_op_on_the_kept_tokens(
    function: Function, sides: tuple[Side, ...], batch: int
) -> None:
    assert_prunes(function, sides, batch, KEPT)


# -- what is refused ----------------------------------------------------------------------------


def lattice(m: Host, h: Tensor) -> Tensor:
    return h.view(h.shape[0], 2, 4, N).sin().flatten(1, 2)


def halves_of_tokens(m: Host, h: Tensor) -> Tensor:
    return h.reshape(h.shape[0], 4, 2 * N).reshape(h.shape)


def unflattened_tokens(m: Host, h: Tensor) -> Tensor:
    return h.unflatten(1, (2, 4)).flatten(1, 2)


def transposed_result(m: Host, h: Tensor) -> Tensor:
    return h.transpose(1, 2)


def first_half(m: Host, h: Tensor) -> Tensor:
    return torch.cat([h[:, :4], -h[:, 4:]], dim=1)


def narrowed_tokens(m: Host, h: Tensor) -> Tensor:
    return h * h.narrow(1, 2, 1)


def one_token(m: Host, h: Tensor) -> Tensor:
    return h * h[:, :1]


def selected_token(m: Host, h: Tensor) -> Tensor:
    return h * h[:, 0].unsqueeze(1)


def every_other(m: Host, h: Tensor) -> Tensor:
    return h * h[:, ::2].repeat_interleave(2, dim=1)


def rolled(m: Host, h: Tensor) -> Tensor:
    return h.roll(1, dims=1)


def flipped(m: Host, h: Tensor) -> Tensor:
    return h * h.flip(1)


def shifted_by_cat(m: Host, h: Tensor) -> Tensor:
    return h * torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)


def padded_tokens(m: Host, h: Tensor) -> Tensor:
    return F.pad(h, (0, 0, 1, 0))[:, 1:]


def chunked_tokens(m: Host, h: Tensor) -> Tensor:
    return torch.cat(h.chunk(2, dim=1)[::-1], dim=1)


def split_tokens(m: Host, h: Tensor) -> Tensor:
    a, b = h.split([3, 5], dim=1)
    return torch.cat([a, b], dim=1)


def unbound_tokens(m: Host, h: Tensor) -> Tensor:
    return torch.stack(h.unbind(1), dim=1)


def tokens_twice(m: Host, h: Tensor) -> Tensor:
    k = torch.cat([h, h], dim=1)
    return (h @ k.mT).softmax(-1) @ k


def sorted_tokens(m: Host, h: Tensor) -> Tensor:
    values, order = h.sort(dim=1)
    return values + order


def glu_tokens(m: Host, h: Tensor) -> Tensor:
    return F.glu(torch.cat([h, h], -1).transpose(1, 2), dim=2).repeat(1, 1, 2)[:, :N].mT


def complex_tokens(m: Host, h: Tensor) -> Tensor:
    x = h.transpose(1, 2).unflatten(2, (4, 2)).contiguous()
    return torch.view_as_real(torch.view_as_complex(x)).flatten(2).transpose(1, 2)


def causal(m: Host, h: Tensor) -> Tensor:
    q = heads_of(h)
    return joined(F.scaled_dot_product_attention(q, q, q, is_causal=True))


def cumsum_tokens(m: Host, h: Tensor) -> Tensor:
    return h.cumsum(1)


def softmax_tokens(m: Host, h: Tensor) -> Tensor:
    return h.softmax(1)


def mean_token(m: Host, h: Tensor) -> Tensor:
    return h - h.mean(1, keepdim=True)


def largest(m: Host, h: Tensor) -> Tensor:
    return h / h.abs().max()


def total_norm(m: Host, h: Tensor) -> Tensor:
    return h / h.norm()


def norm_over_map(m: Host, h: Tensor) -> Tensor:
    return F.layer_norm(h, (N, N))


def norm_over_tokens(m: Host, h: Tensor) -> Tensor:
    return m.layer_norm(h.mT).mT


def group_norm_of_map(m: Host, h: Tensor) -> Tensor:
    return m.group_norm(h.mT).mT


def instance_norm(m: Host, h: Tensor) -> Tensor:
    return F.instance_norm(h.mT).mT


def batch_norm_per_token(m: Host, h: Tensor) -> Tensor:
    return m.batch_norm(h)


def mixes_tokens(m: Host, h: Tensor) -> Tensor:
    return m.out(h.transpose(1, 2)).transpose(1, 2)


def mixes_by_matmul(m: Host, h: Tensor) -> Tensor:
    return m.out.weight @ h


def mixes_by_einsum(m: Host, h: Tensor) -> Tensor:
    return torch.einsum("ml,blc->bmc", m.out.weight, h)


def sums_by_einsum(m: Host, h: Tensor) -> Tensor:
    return h * torch.einsum("blc->bc", h).unsqueeze(1)


def implicit_einsum(m: Host, h: Tensor) -> Tensor:
    return torch.einsum("...c,oc->...o", h, m.out.weight)


def conv_kernel_3(m: Host, h: Tensor) -> Tensor:
    return m.conv3(h.mT).mT


def conv_tokens_as_channels(m: Host, h: Tensor) -> Tensor:
    return m.conv1(h)


def random_dropout(m: Host, h: Tensor) -> Tensor:
    return F.dropout(h, 0.5, training=True)


def where_true(m: Host, h: Tensor) -> Tensor:
    return h + torch.where(h > 0)[0].sum()


def random_noise(m: Host, h: Tensor) -> Tensor:
    return h * torch.randn_like(h)


def pooled_queries(m: Host, h: Tensor, query: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, h, h)


def values_from_outside(m: Host, h: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h, h, value)


def attends_over_features(m: Host, h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h.mT, h.mT, h.mT).mT


def tokens_meet_features(m: Host, h: Tensor) -> Tensor:
    return h * h.mT


def shifted_by_past(m: Host, h: Tensor, past: Tensor) -> Tensor:
    return h * torch.cat([past, h], dim=1)[:, :-1]


def mean_sample(m: Host, h: Tensor) -> Tensor:
    return h - h.mean(0, keepdim=True)


def softmax_samples(m: Host, h: Tensor) -> Tensor:
    return h.softmax(0)


def guided(m: Host, h: Tensor) -> Tensor:
    cond, uncond = h.chunk(2)
    return torch.cat([cond, uncond * 2])


def flipped_samples(m: Host, h: Tensor) -> Tensor:
    return h.flip(0)


def mixes_samples(m: Host, h: Tensor) -> Tensor:
    return m.out(h.permute(1, 2, 0)).permute(2, 0, 1)


def largest_token(m: Host, h: Tensor) -> Tensor:
    return h * h.softmax(-1).argmax(dim=1, keepdim=True)


def repeated_tokens(m: Host, h: Tensor) -> Tensor:
    return h.repeat(1, 2, 1)[:, :N]


def repeated_samples(m: Host, h: Tensor) -> Tensor:
    return h.repeat(2, 1, 1)[:N]


def rolled_flat(m: Host, h: Tensor) -> Tensor:
    return h.roll(1)


def causal_product(m: Host, h: Tensor) -> Tensor:
    return (h @ h.mT).tril() @ h


def diagonal(m: Host, h: Tensor) -> Tensor:
    return h * (h @ h.mT).diagonal(dim1=1, dim2=2).unsqueeze(-1)


def gathered(m: Host, h: Tensor) -> Tensor:
    return h.index_select(1, torch.arange(N - 1, -1, -1))


def looked_up(m: Host, h: Tensor) -> Tensor:
    return h * F.embedding(h[..., 0].abs().long().clamp(0, 1), m.out.weight)


def inverse(m: Host, h: Tensor) -> Tensor:
    return torch.linalg.solve(h @ h.mT + torch.eye(N), h)


def strided(m: Host, h: Tensor) -> Tensor:
    return torch.as_strided(h, h.shape, h.stride())


def reshape_like_outside(m: Host, h: Tensor, like: Tensor) -> Tensor:
    return h.flatten(1).view_as(like)


def bits(m: Host, h: Tensor) -> Tensor:
    return h * h.view(torch.int64).bitwise_and(1)


def fast_weights(m: Host, h: Tensor) -> Tensor:
    return F.linear(h, h[0])


def scales_buffer(m: Host, h: Tensor) -> Tensor:
    m.buffer.mul_(2.0)
    return h * m.buffer[: h.shape[0]].mul_(h)


def sent_to_experts(m: Host, h: Tensor) -> Tensor:
    tokens = h.flatten(0, 1)
    out = torch.zeros(len(tokens), N, dtype=F64)
    return out.index_add_(0, torch.arange(len(tokens)), tokens).view_as(h)


PAST_TOKENS = Side((N, 1, N), batch=0)
REFUSALS: list[tuple[Function, tuple[Side, ...], str, str]] = [
    (lattice, (), "FVX011", "splits the token axis of 8"),
    (halves_of_tokens, (), "FVX011", "splits the token axis"),
    (unflattened_tokens, (), "FVX011", "splits the token axis"),
    (transposed_result, (), "FVX011", "not laid out as"),
    (first_half, (), "FVX012", "slices"),
    (narrowed_tokens, (), "FVX012", "slices"),
    (one_token, (), "FVX012", "slices"),
    (selected_token, (), "FVX012", "selects one position of the token axis"),
    (every_other, (), "FVX012", "slices"),
    (rolled, (), "FVX012", "rolls"),
    (flipped, (), "FVX012", "flips"),
    (shifted_by_cat, (), "FVX012", "slices"),
    (padded_tokens, (), "FVX012", "pads"),
    (chunked_tokens, (), "FVX012", "splits"),
    (split_tokens, (), "FVX012", "splits"),
    (unbound_tokens, (), "FVX012", "splits"),
    (tokens_twice, (), "FVX012", "joins the tokens with themselves"),
    (sorted_tokens, (), "FVX012", "orders"),
    (glu_tokens, (), "FVX012", "halves"),
    (complex_tokens, (), "FVX011", "splits the token axis"),
    (causal, (), "FVX012", "causal"),
    (cumsum_tokens, (), "FVX013", "scans over the tokens"),
    (softmax_tokens, (), "FVX013", "reduces over the tokens"),
    (mean_token, (), "FVX013", "reduces over the tokens"),
    (largest, (), "FVX013", "reduces over"),
    (total_norm, (), "FVX013", "reduces over"),
    (norm_over_map, (), "FVX013", "normalizes over the tokens"),
    (norm_over_tokens, (), "FVX013", "normalizes over the tokens"),
    (group_norm_of_map, (), "FVX013", "normalizes over the tokens"),
    (instance_norm, (), "FVX013", "normalizes over the tokens"),
    (batch_norm_per_token, (), "FVX013", "parameters per token"),
    (mixes_tokens, (), "FVX013", "fixed length"),
    (mixes_by_matmul, (), "FVX013", "fixed length"),
    (mixes_by_einsum, (), "FVX013", "fixed length"),
    (sums_by_einsum, (), "FVX013", "reduces over the tokens"),
    (implicit_einsum, (), "FVX010", "ellipsis"),
    (conv_kernel_3, (), "FVX013", "kernel of (3,)"),
    (conv_tokens_as_channels, (), "FVX013", "fixed length"),
    (random_dropout, (), "FVX013", "dropout is active"),
    (where_true, (), "FVX010", "it lists where a value is true"),
    (random_noise, (), "FVX013", "random numbers"),
    (pooled_queries, (Side((N, N, N), batch=0),), "FVX013", "queries that are not tokens"),
    (values_from_outside, (Side((N, N, N), batch=0),), "FVX013", "not the same tokens"),
    (attends_over_features, (), "FVX013", "as if it were features"),
    (tokens_meet_features, (), "FVX012", "meets another axis"),
    (shifted_by_past, (PAST_TOKENS,), "FVX012", "slices the token axis"),
    (mean_sample, (), "FVX013", "samples of the batch"),
    (softmax_samples, (), "FVX013", "samples of the batch"),
    (guided, (), "FVX013", "splits the batch axis"),
    (flipped_samples, (), "FVX013", "flips the batch axis"),
    (mixes_samples, (), "FVX013", "samples of the batch"),
    (largest_token, (), "FVX013", "reduces over the tokens"),
    (repeated_tokens, (), "FVX012", "slices the token axis"),
    (repeated_samples, (), "FVX013", "slices the batch axis"),
    (rolled_flat, (), "FVX013", "rolls the batch axis"),
    (causal_product, (), "FVX010", "no axis rule"),
    (diagonal, (), "FVX010", "no axis rule"),
    (gathered, (), "FVX010", "no axis rule"),
    (looked_up, (), "FVX010", ""),
    (inverse, (), "FVX010", ""),
    (strided, (), "FVX010", "no axis rule"),
    (reshape_like_outside, (Side((N, N, N)),), "FVX010", "shape from a value outside"),
    (bits, (), "FVX010", "bits"),
    (fast_weights, (), "FVX013", "selects one position of the batch axis"),
    (scales_buffer, (), "FVX015", "overwrites a value from outside"),
    (sent_to_experts, (), "FVX015", "fills a tensor of aten.zeros"),
]


@pytest.mark.parametrize(("function", "sides", "code", "reason"), REFUSALS, ids=_name)
def test_refused_op(function: Function, sides: tuple[Side, ...], code: str, reason: str) -> None:
    host = host_of(function)
    x = torch.randn(N, N, N, dtype=F64)
    found = found_in(captured(host, x, [side.make(N) for side in sides]))
    assert found.refusal is not None
    assert found.refusal.code == code, str(found.refusal)
    assert reason in found.refusal.reason, str(found.refusal)
    assert found.refusal.op.startswith("aten.")
    assert found.refusal.where.partition(".py:")[0].endswith("test_rules")


def test_side_without_a_sample_axis_where_the_op_has_none_to_give() -> None:
    side = Side((N, N), tokens=(0,))
    assert_prunes(einsum_side, (side,), 1, KEPT)
    with pytest.raises(BranchRefusedError) as caught:
        assert_prunes(einsum_side, (side,), N, KEPT)
    refusal = caught.value.refusal
    assert (refusal.code, refusal.op) == ("FVX018", "aten.einsum.default")
    assert "per-token values that all samples share" in refusal.reason
    assert caught.value.branch == 0


def test_a_hint_names_a_missing_rule_only_where_a_rule_is_missing() -> None:
    def hint(function: Function) -> str:
        found = found_in(captured(host_of(function), torch.randn(N, N, N, dtype=F64), []))
        assert found.refusal is not None
        return found.refusal.hint

    assert "axis_rule" in hint(diagonal)
    assert "axis_rule" not in hint(implicit_einsum)
    assert "switch it off" in hint(random_dropout)
    assert "weight each expert's output per token" in hint(sent_to_experts)


@pytest.mark.parametrize("kept", [1, 2, N])
@pytest.mark.parametrize(
    "function", [sdpa, bmm_merged, conv1d, view_minus_one, squeezes], ids=_name
)
def test_any_count_of_kept_tokens(function: Function, kept: int) -> None:
    assert_prunes(function, (), 3, kept)


@pytest.mark.parametrize(
    "side", [Side((N, 1, N), tokens=(0,)), Side((N, N, 1), tokens=(0,), batch=1)]
)
def test_token_first_layout_of_one_sample(side: Side) -> None:
    assert_prunes(token_first, (side,), 1, KEPT)


@pytest.mark.parametrize(
    "function", [tokens_meet_features, norm_over_tokens, conv_tokens_as_channels], ids=_name
)
def test_labels_decide_not_sizes(function: Function) -> None:
    """The same ops on another axis of the same size are fine."""

    def aligned(m: Host, h: Tensor) -> Tensor:
        return function(m, h.mT).mT if function is not tokens_meet_features else h * h.mT.mT

    assert_prunes(aligned, (), N, KEPT)
