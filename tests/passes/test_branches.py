"""Residual branches: which are found, what they are called, and that looking edits nothing."""
# mypy: disable-error-code="no-any-return, no-untyped-call"

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.analyse.branches import (
    KINDS,
    Branch,
    counts_flops,
    find_branches,
)
from passes.graph import op_name
from passes.refusal import RefusedError
from passes.trace.calls import Call
from passes.trace.capture import BlockProgram, capture
from tests.devices import DEVICE

B, L, C = 2, 6, 8

Body = Callable[["Block", Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return result


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(C, C)
        self.kv = nn.Linear(C, C)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        keys = self.kv(text)
        scores = (self.q(x) @ keys.mT).softmax(-1)
        return scores @ keys


class Block(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(C)
        self.norm2 = nn.LayerNorm(C)
        self.norm3 = nn.LayerNorm(C)
        self.norm4 = nn.LayerNorm(C)
        self.attn = Attention()
        self.cross = Cross()
        self.ffn = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))
        self.embed = nn.Linear(C, C)
        self.gamma = nn.Parameter(torch.randn(C))
        self.text = nn.Buffer(torch.randn(1, 5, C))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def program_of(body: Body, x: Tensor | None = None) -> BlockProgram:
    torch.manual_seed(0)
    block = Block(body).to(DEVICE).eval()
    x = torch.randn(B, L, C, device=DEVICE) if x is None else x
    with torch.no_grad():
        return capture(Call(type(block).forward.__get__(block), block, (x,), {}))


def find(program: BlockProgram) -> list[Branch]:
    return find_branches(program, (("item", "args"), ("item", 0)))


def refusal_of(body: Body, x: Tensor | None = None) -> str:
    program = program_of(body, x)
    with pytest.raises(RefusedError) as caught:
        find(program)
    return f"{caught.value.refusal.code} {caught.value.refusal.reason}"


# -- bodies -------------------------------------------------------------------------------------


def pre_norm(m: Block, x: Tensor) -> Tensor:
    x = x + m.attn(m.norm1(x))
    return x + m.ffn(m.norm2(x))


def with_cross(m: Block, x: Tensor) -> Tensor:
    x = x + m.attn(m.norm1(x))
    x = x + m.cross(m.norm2(x), m.text)
    return x + m.ffn(m.norm3(x))


def post_norm(m: Block, x: Tensor) -> Tensor:
    x = m.norm1(x + m.attn(x))
    return m.norm2(x + m.ffn(x))


def sandwich(m: Block, x: Tensor) -> Tensor:
    x = x + m.norm2(m.attn(m.norm1(x)))
    return x + m.norm4(m.ffn(m.norm3(x)))


def parallel(m: Block, x: Tensor) -> Tensor:
    h = m.norm1(x)
    return x + m.attn(m.norm2(h)) + m.ffn(m.norm3(x))


def swapped(m: Block, x: Tensor) -> Tensor:
    x = m.attn(m.norm1(x)) + x
    return m.ffn(m.norm2(x)) + x


def in_place(m: Block, x: Tensor) -> Tensor:
    x = x.clone()
    x += m.attn(m.norm1(x))
    return x.add_(m.ffn(m.norm2(x)))


def in_place_into_branch(m: Block, x: Tensor) -> Tensor:
    x = m.attn(m.norm1(x)).add_(x)
    return m.ffn(m.norm2(x)).add_(x)


def scaled(m: Block, x: Tensor) -> Tensor:
    x = torch.add(x, m.attn(m.norm1(x)), alpha=0.5)
    return x + m.ffn(m.norm2(x)) * m.gamma


def subtracted(m: Block, x: Tensor) -> Tensor:
    return x - m.attn(m.norm1(x)) - m.ffn(m.norm2(x))


def projected(m: Block, x: Tensor) -> Tensor:
    x = m.embed(x)
    x = x + m.attn(m.norm1(x))
    return x + m.ffn(m.norm2(x))


def casts_between(m: Block, x: Tensor) -> Tensor:
    x = x.double().float() + m.attn(m.norm1(x))
    x = x.clone().contiguous()
    return (x.to(torch.float64) + m.ffn(m.norm2(x)).double()).float()


def residual_dropout(m: Block, x: Tensor) -> Tensor:
    x = x + F.dropout(m.attn(m.norm1(x)), 0.1, training=False)
    return x + m.ffn(m.norm2(x))


def lora(m: Block, x: Tensor) -> Tensor:
    h = m.norm1(x)
    x = x + (m.attn(h) + m.attn.proj(h))
    h = m.norm2(x)
    return x + (m.ffn(h) + m.ffn[2](m.ffn[0](h)))


def nested(m: Block, x: Tensor) -> Tensor:
    x = x + m.attn(m.norm1(x))
    h = m.norm2(x)
    return x + (h + m.ffn(h))


def gated(m: Block, x: Tensor) -> Tensor:
    x = x + m.attn(m.norm1(x))
    gate = m.embed(x).sigmoid()
    return (1 - gate) * x + gate * m.ffn(m.norm2(x))


def long_skip_first(m: Block, x: Tensor) -> Tensor:
    y = x + m.attn(m.norm1(x))
    return x + (y + m.ffn(m.norm2(y)))


def names(found: list[Branch]) -> list[tuple[str, str]]:
    return [(branch.kind, branch.name) for branch in found]


@pytest.mark.parametrize(
    "body",
    [
        pre_norm,
        post_norm,
        sandwich,
        parallel,
        swapped,
        in_place,
        in_place_into_branch,
        scaled,
        subtracted,
        projected,
        casts_between,
        residual_dropout,
        lora,
        nested,
        gated,
        long_skip_first,
    ],
)
def test_attention_and_ffn_are_found(body: Body) -> None:
    program = program_of(body)
    before = str(program.graph_module.graph), program.graph_module.code
    metas = [dict(node.meta) for node in program.graph_module.graph.nodes]
    found = find(program)
    assert names(found) == [("attention", "attn"), ("ffn", "ffn")]
    assert all(branch.refusal is None for branch in found)
    assert [branch.index for branch in found] == [0, 1]
    assert (str(program.graph_module.graph), program.graph_module.code) == before
    assert [dict(node.meta) for node in program.graph_module.graph.nodes] == metas


@pytest.mark.parametrize("body", [pre_norm, post_norm, sandwich, parallel, swapped, in_place])
def test_a_branch_is_what_lies_between_trunk_and_add(body: Body) -> None:
    found = find(program_of(body))
    for branch in found:
        assert branch.refusal is None
        assert branch.out in branch.region
        assert branch.add is not None
        assert branch.out in branch.add.all_input_nodes
        assert branch.add not in branch.region
        assert op_name(branch.add) == "aten::add"
        assert not set(branch.entries) & set(branch.region)
        assert set(branch.axes) >= set(branch.region) | set(branch.entries)
        order = list(branch.add.graph.nodes)
        assert sorted(branch.region, key=order.index) == list(branch.region)
    attention, ffn = (set(branch.region) for branch in found)
    products = [n for n in found[0].out.graph.nodes if counts_flops(n)]
    assert {n for n in products if n in attention | ffn} == set(products)
    assert not {n for n in attention & ffn if counts_flops(n)}


def test_cross_attention_is_told_by_its_keys() -> None:
    found = find(program_of(with_cross))
    assert [branch.kind for branch in found] == ["attention", "cross_attention", "ffn"]
    assert {branch.kind for branch in found} == set(KINDS)
    assert [branch.name for branch in found] == ["attn", "cross.q", "ffn"]


def test_attention_may_be_written_without_softmax() -> None:
    def written_out(m: Block, x: Tensor) -> Tensor:
        weights = (m.cross.q(x) @ m.cross.kv(m.text).mT).exp()
        shares = weights / weights.sum(-1, keepdim=True)
        x = x + shares @ m.cross.kv(m.text)
        h = m.norm1(x)
        return x + m.embed((h @ h.mT).relu() @ h)

    found = find(program_of(written_out))
    assert [branch.kind for branch in found] == ["cross_attention", "attention"]
    assert all(branch.refusal is None for branch in found)


def test_what_changes_the_stream_itself_is_listed_and_stays_dense() -> None:
    def scaled_stream(m: Block, x: Tensor) -> Tensor:
        x = x * m.ffn(m.norm1(x)).sigmoid()
        x = x + m.attn(m.norm2(x))
        return torch.cat([x[..., :4], x[..., 4:] + m.embed(x)[..., 4:]], -1)

    found = find(program_of(scaled_stream))
    assert names(found) == [("attention", "attn"), ("ffn", "ffn"), ("ffn", "embed")]
    assert [branch.index for branch in found] == [0, 1, 2]
    assert found[0].refusal is None
    for branch, op in zip(found[1:], ("aten.mul", "aten.cat"), strict=True):
        assert branch.refusal is not None
        assert (branch.add, branch.refusal.code) == (None, "FVX025")
        assert op in branch.refusal.reason
        assert branch.refusal.where.partition(".py:")[0].endswith("test_branches")


def test_a_branch_whose_output_also_scales_the_stream_stays_dense() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        added = m.attn(m.norm1(x))
        return (x + added) * m.norm2(added)

    (found,) = find(program_of(body))
    assert found.refusal is not None
    assert found.refusal.code == "FVX014"


def test_entries_are_the_trunk_values_a_branch_reads() -> None:
    first, second = find(program_of(pre_norm))
    assert first.refusal is None
    assert second.refusal is None
    assert [entry.op for entry in first.entries] == ["placeholder"]
    assert second.entries == (first.add,)


def test_parallel_branches_read_the_same_trunk_value() -> None:
    first, second = find(program_of(parallel))
    assert first.refusal is None
    assert second.refusal is None
    assert first.entries == second.entries
    assert second.add is not None
    assert second.add.args[0] is first.add


def test_a_branch_of_many_paths_is_named_by_its_kind() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        return x + m.ffn(m.embed(x))

    (found,) = find(program_of(body))
    assert names([found]) == [("ffn", "ffn")]

    def mixed(m: Block, x: Tensor) -> Tensor:
        return x + m.embed(m.attn(x))

    assert names(find(program_of(mixed))) == [("attention", "attention")]


def test_additions_without_real_work_are_part_of_the_trunk() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        x = x + m.text[:, :1]
        x = x + m.attn(x)
        return x + m.norm1(x).sigmoid()

    assert names(find(program_of(body))) == [("attention", "attn")]


def test_work_of_another_shape_that_is_added_stays_in_the_trunk() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        x = x + m.attn(m.norm1(x))
        x = m.cross(m.norm2(x), m.text)[0] + x
        return x + m.ffn(m.norm3(x))

    *found, other = find(program_of(body))
    assert names(found) == [("attention", "attn"), ("ffn", "ffn")]
    assert [branch.refusal for branch in found] == [None, None]
    assert other.refusal is not None
    assert other.refusal.code == "FVX025"


def test_a_long_skip_is_no_branch_of_its_own() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        y = x + m.attn(m.norm1(x))
        return y + m.ffn(m.norm2(y)) + x

    assert names(find(program_of(body))) == [("attention", "attn"), ("ffn", "ffn")]


def test_a_refused_branch_keeps_its_place_beside_the_others() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        x = x + m.attn(m.norm1(x)).cumsum(1)
        return x + m.ffn(m.norm2(x))

    first, second = find(program_of(body))
    assert first.refusal is not None
    assert first.refusal.code == "FVX013"
    assert names([first, second]) == [("attention", "attn"), ("ffn", "ffn")]
    assert second.refusal is None


def test_a_value_that_another_value_of_the_block_needs() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(C, C)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.fc(x)
            return x + h, h

    block = Leaky().to(DEVICE)
    x = torch.randn(B, L, C, device=DEVICE)
    program = capture(Call(Leaky.forward.__get__(block), block, (x,), {}))
    (found,) = find(program)
    assert found.refusal is not None
    assert found.refusal.code == "FVX014"
    assert found.refusal.reason == "the block returns it"


def test_returned_keys_and_values_are_fine() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(C, C)

        def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
            q = self.q(x)
            keys = torch.cat([past, q], dim=1)
            return x + F.scaled_dot_product_attention(q, keys, keys), keys

    block = Cached().to(DEVICE)
    args = (torch.randn(B, L, C, device=DEVICE), torch.randn(B, 4, C, device=DEVICE))
    (found,) = find(capture(Call(Cached.forward.__get__(block), block, args, {})))
    assert found.refusal is None
    assert found.kind == "attention"


def test_state_belongs_to_the_branch_it_is_made_from() -> None:
    class Stateful(nn.Module):
        k: Tensor | None = None

        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(C, C)
            self.ffn = nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            self.k = q.clone() if self.k is None else torch.cat([self.k, q], dim=1)
            x = x + F.scaled_dot_product_attention(q, self.k, self.k)
            self.last = q.sin()
            return x + self.ffn(x)

    block = Stateful().to(DEVICE)
    x = torch.ones(B, L, C, device=DEVICE)
    first, second = find(capture(Call(Stateful.forward.__get__(block), block, (x,), {})))
    assert first.refusal is None
    assert second.refusal is None
    assert {op_name(node) for node in first.region} >= {"aten::sin", "aten::clone"}
    assert [op_name(node) for node in second.region] == ["aten::linear"]


# -- what holds no branch -----------------------------------------------------------------------


def only_norm(m: Block, x: Tensor) -> Tensor:
    return m.norm1(x)


def only_weak_adds(m: Block, x: Tensor) -> Tensor:
    return x + m.norm1(x) + m.text[:, :1]


@pytest.mark.parametrize("body", [only_norm, only_weak_adds])
def test_no_branch(body: Body) -> None:
    assert refusal_of(body).startswith("FVX004 its result is not a sum")


def no_stream(m: Block, x: Tensor) -> Tensor:
    return m.attn(x)


def other_shape(m: Block, x: Tensor) -> Tensor:
    return (x + m.attn(x))[:, :3]


def pooled(m: Block, x: Tensor) -> Tensor:
    return x.mean(1) + m.embed(x.mean(1))


def from_outside(m: Block, x: Tensor) -> Tensor:
    return m.text.expand(B, 5, C) + x.sum()


@pytest.mark.parametrize("body", [no_stream, other_shape, pooled, from_outside])
def test_no_stream(body: Body) -> None:
    assert refusal_of(body).startswith("FVX003 no result of shape (2, 6, 8)")


def test_a_trunk_in_another_layout() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        h = x.reshape(B * L, C)
        return (h + m.ffn(h)).view(B, L, C)

    (found,) = find(program_of(body))
    assert found.refusal is not None
    assert found.refusal.code == "FVX003"
    assert "not as (B, L, C)" in found.refusal.reason


def test_many_branches_behind_a_projection_are_found_in_one_pass() -> None:
    """A whole transformer as one block; asking each add for its trunk anew would take forever."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(C, C)
            self.layers = nn.ModuleList(nn.Linear(C, C) for _ in range(64))

        def forward(self, x: Tensor) -> Tensor:
            x = self.proj(x)
            for layer in self.layers:
                x = x + layer(x)
            return x

    stack = Stack().to(DEVICE)
    program = capture(Call(stack.forward, stack, (torch.randn(B, L, C, device=DEVICE),), {}))
    assert len(find(program)) == 64
