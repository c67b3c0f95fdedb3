"""Rewriting: PTS before a branch, CTR before its add, everything else as it was."""
# mypy: disable-error-code="no-any-return, no-untyped-call"

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.analyse.branches import Branch, find_branches
from passes.refusal import BranchRefusedError
from passes.rewrite import prune as prune_module
from passes.rewrite.capture_outputs import capture_outputs
from passes.rewrite.prune import ASKS_NOTHING, PrunedGraph, Step, prune
from passes.rewrite.share_selection import share_selection
from passes.rewrite.side_input import SideLayout, take_side
from passes.trace.calls import Call
from passes.trace.capture import BlockProgram, capture
from passes.trace.state import get, roots

assert_expected_inline = pytest.importorskip("expecttest").assert_expected_inline

B, L, C, KEPT = 2, 6, 4, 3


def select(x: Tensor, kept: int) -> Tensor:
    """Another set of tokens per sample, in no order."""
    rows = [[4, 0, 3, 5, 1, 2], [1, 5, 2, 0, 4, 3]]
    return torch.tensor([row[:kept] for row in rows[: x.shape[0]]], dtype=torch.int64)


def take(x: Tensor, index: Tensor) -> Tensor:
    return torch.take_along_dim(x, index.unsqueeze(-1), 1)


def restore(
    kept: Tensor,
    index: Tensor,
    cached: Tensor,
    cached_scale: tuple[int, ...],
    scale: tuple[int, ...],
) -> Tensor:
    full = cached.mean(1, keepdim=True).repeat(1, L, 1)
    return full.scatter(1, index.unsqueeze(-1).expand_as(kept), kept)


class Named:
    """The operators of this file."""

    select = staticmethod(select)
    take = staticmethod(take)
    restore = staticmethod(restore)
    asks = ASKS_NOTHING
    restores_anew = False


STEP = Step(KEPT, (1, 2), (2, 3), Named())


class FFN(nn.Module):
    """A feed-forward branch with a side input per token, and ops before and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.fc1 = nn.Linear(C, 2 * C)
        self.fc2 = nn.Linear(2 * C, C)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        x = x * 2.0
        x = x + self.fc2(torch.relu(self.fc1(self.norm(x)) * side))
        return x.tanh()


def program_of(module: nn.Module, *args: Tensor) -> BlockProgram:
    return capture(Call(type(module).forward.__get__(module), module, args, {}))


def branches_of(program: BlockProgram) -> list[Branch]:
    found = find_branches(program, (("item", "args"), ("item", 0)))
    branches = [branch for branch in found if branch.refusal is None]
    assert len(branches) == len(found)
    return branches


def pruned_of(program: BlockProgram, branches: list[Branch], step: Step = STEP) -> PrunedGraph:
    return prune(program.graph_module, branches, step, feature)


def feature(branch: Branch) -> Tensor:
    example: Tensor = branch.out.meta["val"]
    return example.new_empty(example.shape[0], 2, C)


def run(
    program: BlockProgram, pruned: PrunedGraph, module: nn.Module, *args: Tensor
) -> list[Tensor]:
    origin = roots(module, args, {})
    count = len(pruned.graph_module.graph.find_nodes(op="placeholder")) - len(pruned.inputs)
    live = [get(origin, program.inputs[i]) for i in pruned.inputs]
    cached = [torch.full((B, 2, C), 0.5 + i) for i in range(count)]
    outputs: list[Tensor] = pruned.graph_module(*live, *cached)
    return outputs


def ops(graph_module: GraphModule) -> Counter[str]:
    """How often each op is called, by name."""
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    return Counter(getattr(n.target, "__name__", str(n.target)) for n in nodes)


def listing(graph_module: GraphModule) -> str:
    """The code of a graph, without the lines' clean-up and without module prefixes."""
    code = re.sub(r";  .*| +$", "", graph_module.code.strip(), flags=re.MULTILINE)
    return re.sub(r"torch\.ops\.|\b\w*test_prune_|\bpasses\w*?_(?=take_side|_no_tokens)", "", code)


def ffn() -> FFN:
    torch.manual_seed(0)
    return FFN().eval()


# -- before, expected, must not touch -----------------------------------------------------------


def test_one_branch() -> None:
    program = program_of(ffn(), torch.randn(B, L, C), torch.randn(L, 1))
    before = str(program.graph_module.graph), program.graph_module.code
    assert_expected_inline(
        listing(program.graph_module),
        """\
def forward(self, arg0_1, arg1_1, arg2_1, arg3_1, arg4_1, arg5_1, arg6_1, arg7_1):
    mul = aten.mul.Tensor(arg6_1, 2.0)
    layer_norm = aten.layer_norm.default(mul, [4], arg0_1, arg1_1)
    linear = aten.linear.default(layer_norm, arg2_1, arg3_1)
    mul_1 = aten.mul.Tensor(linear, arg7_1)
    relu = aten.relu.default(mul_1)
    linear_1 = aten.linear.default(relu, arg4_1, arg5_1)
    add = aten.add.Tensor(mul, linear_1)
    tanh = aten.tanh.default(add)
    return [tanh]""",
    )
    pruned = pruned_of(program, branches_of(program))
    assert_expected_inline(
        listing(pruned.graph_module),
        """\
def forward(self, arg0_1, arg1_1, arg2_1, arg3_1, arg4_1, arg5_1, arg6_1, arg7_1, captured_0):
    mul = aten.mul.Tensor(arg6_1, 2.0)
    select = select(mul, 3)
    take = take(mul, select)
    layer_norm_default = aten.layer_norm.default(take, [4], arg0_1, arg1_1)
    linear_default = aten.linear.default(layer_norm_default, arg2_1, arg3_1)
    take_side = take_side(arg7_1, select, (None, None, None), ((1, 6, 0),), 0, (2, -1, -1))
    mul_tensor = aten.mul.Tensor(linear_default, take_side)
    relu_default = aten.relu.default(mul_tensor)
    linear_default_1 = aten.linear.default(relu_default, arg4_1, arg5_1)
    restore = restore(linear_default_1, select, captured_0, (1, 2), (2, 3))
    add = aten.add.Tensor(mul, restore)
    tanh = aten.tanh.default(add)
    return [tanh]""",
    )
    assert (str(program.graph_module.graph), program.graph_module.code) == before
    assert pruned.inputs == tuple(range(len(program.inputs)))
    was, now = ops(program.graph_module), ops(pruned.graph_module)
    assert not was.keys() & {"select", "take", "take_side", "restore"}
    assert now - was == Counter(select=1, take=1, take_side=1, restore=1)
    assert not was - now


def test_no_kept_token_leaves_only_the_restoration() -> None:
    program = program_of(ffn(), torch.randn(B, L, C), torch.randn(L, 1))
    pruned = pruned_of(program, branches_of(program), Step(0, (1, 2), (2, 3), Named()))
    assert_expected_inline(
        listing(pruned.graph_module),
        """\
def forward(self, arg6_1, captured_0):
    mul = aten.mul.Tensor(arg6_1, 2.0)
    slice_tensor = aten.slice.Tensor(captured_0, 1, 0, 0)
    _no_tokens = _no_tokens(captured_0)
    restore = restore(slice_tensor, _no_tokens, captured_0, (1, 2), (2, 3))
    add = aten.add.Tensor(mul, restore)
    tanh = aten.tanh.default(add)
    return [tanh]""",
    )
    assert [program.inputs[i][-1] for i in pruned.inputs] == [("item", 0)]


class Convolved(nn.Module):
    """A convolution cannot run on no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.mT).mT


def test_ops_that_fail_on_no_token_are_not_emitted_for_none() -> None:
    program = program_of(Convolved(), torch.randn(B, L, C))
    pruned = pruned_of(program, branches_of(program), Step(0, (1, 2), (2, 3), Named()))
    assert "conv1d.default" not in ops(pruned.graph_module)


def test_nothing_to_prune_changes_nothing() -> None:
    program = program_of(ffn(), torch.randn(B, L, C), torch.randn(L, 1))
    pruned = pruned_of(program, [])
    assert pruned.graph_module.code == program.graph_module.code


def test_new_nodes_say_what_they_are_for() -> None:
    program = program_of(ffn(), torch.randn(B, L, C), torch.randn(L, 1))
    pruned = pruned_of(program, branches_of(program))
    marked = [n for n in pruned.graph_module.graph.nodes if "branch" in n.meta.get("fastvar", {})]
    assert {n.meta["fastvar"]["branch"] for n in marked} == {0}
    assert {n.meta["fastvar"]["kept"] for n in marked} == {KEPT}
    computed = [n for n in marked if n.target is not take_side]
    assert all("test_prune.py" in str(n.stack_trace) for n in computed)
    (captured,) = (n for n in pruned.graph_module.graph.nodes if n.name == "captured_0")
    assert captured.meta["fastvar"] == {"input": "captured ffn"}


# -- what it computes ---------------------------------------------------------------------------


def by_hand(module: FFN, x: Tensor, side: Tensor) -> Tensor:
    """The block with its branch on each sample's kept tokens; `side` is (B or 1, L, ...)."""
    x = x * 2.0
    index = select(x, KEPT)
    full = torch.full_like(x, 0.5)
    for i in range(B):
        kept = x[i, index[i]]
        own = side[i % side.shape[0], index[i]]
        full[i, index[i]] = module.fc2(torch.relu(module.fc1(module.norm(kept)) * own))
    return (x + full).tanh()


@pytest.mark.parametrize("shape", [(L, 1), (1, L, 1), (B, L, 1), (B, L, 2 * C), (L, 2 * C)])
def test_side_inputs_are_gathered_per_sample(shape: tuple[int, ...]) -> None:
    module, x, side = ffn(), torch.randn(B, L, C), torch.randn(shape)
    program = program_of(module, x, side)
    pruned = pruned_of(program, branches_of(program))
    (made,) = run(program, pruned, module, x, side)
    expected = by_hand(module, x, side if side.dim() == 3 else side.unsqueeze(0))
    torch.testing.assert_close(made, expected)


def test_slicing_a_side_input_to_the_kept_length_would_be_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check above can fail: the bug planted here gives the right shapes and another image."""

    def sliced(side: Tensor, index: Tensor, *layout: object) -> Tensor:
        return side[: index.shape[1]]

    module, x, side = ffn(), torch.randn(B, L, C), torch.randn(L, 1)
    program = program_of(module, x, side)
    monkeypatch.setattr(prune_module, "take_side", sliced)
    pruned = pruned_of(program, branches_of(program))
    (made,) = run(program, pruned, module, x, side)
    expected = by_hand(module, x, side.unsqueeze(0))
    assert made.shape == expected.shape
    assert not torch.allclose(made, expected, atol=1e-3)


class Two(nn.Module):
    """Attention with a cache as state, then a feed-forward branch."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(C, C)
        self.fc = nn.Linear(C, C)
        self.past = torch.randn(B, 2, C)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        self.past = torch.cat([self.past, q], dim=1)
        x = x + nn.functional.scaled_dot_product_attention(q, self.past, self.past)
        return x + self.fc(x)


def two() -> Two:
    torch.manual_seed(0)
    return Two().eval()


def test_each_branch_ranks_the_trunk_it_reads() -> None:
    module, x = two(), torch.randn(B, L, C)
    program = program_of(module, x)
    first, second = branches_of(program)
    pruned = pruned_of(program, [first, second])
    selects = pruned.graph_module.graph.find_nodes(op="call_function", target=select)
    assert [node.args[0].op for node in selects] == ["placeholder", "call_function"]
    assert ops(pruned.graph_module)["restore"] == 2


@pytest.mark.parametrize(("which", "dense"), [([0], "linear_1"), ([1], "linear")])
def test_other_branches_stay_dense(which: list[int], dense: str) -> None:
    program = program_of(two(), torch.randn(B, L, C))
    found = branches_of(program)
    pruned = pruned_of(program, [found[i] for i in which])
    shapes = [
        tuple(node.meta["val"].shape)
        for node in pruned.graph_module.graph.nodes
        if node.target is torch.ops.aten.linear.default
    ]
    assert sorted(shapes) == [(B, KEPT, C), (B, L, C)]
    assert shapes[which[0]] == (B, KEPT, C)
    assert dense in {node.name for node in program.graph_module.graph.nodes}


def test_state_grows_by_the_kept_tokens() -> None:
    module, x = two(), torch.randn(B, L, C)
    past = module.past
    program = program_of(module, x)
    assert module.past is past
    pruned = pruned_of(program, branches_of(program))
    result, grown = run(program, pruned, module, x)
    assert result.shape == (B, L, C)
    kept = take(x, select(x, KEPT))
    torch.testing.assert_close(grown, torch.cat([past, module.q(kept)], dim=1))


def test_state_is_still_written_when_no_token_is_kept() -> None:
    module, x = two(), torch.randn(B, L, C)
    program = program_of(module, x)
    pruned = pruned_of(program, branches_of(program), Step(0, (1, 2), (2, 3), Named()))
    result, grown = run(program, pruned, module, x)
    torch.testing.assert_close(result, x + 0.5 + 1.5)
    torch.testing.assert_close(grown, module.past)


def test_a_dense_form_is_kept_where_something_else_needs_it() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(C)
            self.a = nn.Linear(C, C)
            self.b = nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return x + self.a(h) + self.b(h)

    module, x = Shared(), torch.randn(B, L, C)
    program = program_of(module, x)
    first, second = branches_of(program)
    both = ops(pruned_of(program, [first, second]).graph_module)
    assert both["layer_norm.default"] == 2
    alone = pruned_of(program, [second])
    assert ops(alone.graph_module)["layer_norm.default"] == 2
    (made,) = run(program, alone, module, x)
    index = select(x, KEPT)
    full = torch.full_like(x, 0.5)
    full.scatter_(1, index.unsqueeze(-1).expand(B, KEPT, C), module.b(module.norm(take(x, index))))
    torch.testing.assert_close(made, x + module.a(module.norm(x)) + full)


class Overwrites(nn.Module):
    """Adds the trunk into its branch's output, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(x).add_(x)
        return result


def test_in_place_adds_keep_their_meaning() -> None:
    torch.manual_seed(0)
    module, x = Overwrites(), torch.randn(B, L, C)
    before = x.clone()
    program = program_of(module, x)
    pruned = pruned_of(program, branches_of(program))
    (made,) = run(program, pruned, module, x)
    index = select(x, KEPT)
    full = torch.full_like(x, 0.5)
    full.scatter_(1, index.unsqueeze(-1).expand(B, KEPT, C), module.fc(take(x, index)))
    torch.testing.assert_close(made, x + full)
    assert torch.equal(x, before)
    assert ops(pruned.graph_module)["add_.Tensor"] == 1


def test_an_op_that_does_not_run_on_the_kept_tokens() -> None:
    module, x = ffn(), torch.randn(B, L, C)
    program = program_of(module, x, torch.randn(L, 1))

    class Wrong(Named):
        @staticmethod
        def take(x: Tensor, index: Tensor) -> Tensor:
            return x[:, : index.shape[1] + 1]

    with pytest.raises(BranchRefusedError, match="FVX018") as caught:
        prune(program.graph_module, branches_of(program), replace(STEP, operators=Wrong()), feature)
    assert caught.value.branch == 0


# -- features -----------------------------------------------------------------------------------


def test_features_are_added_to_the_outputs() -> None:
    module, x = two(), torch.randn(B, L, C)
    program = program_of(module, x)
    before = program.graph_module.code
    features = capture_outputs(program.graph_module, branches_of(program))
    assert program.graph_module.code == before
    assert ops(features) == ops(program.graph_module)
    origin = roots(module, (x,), {})
    live = [get(origin, path) for path in program.inputs]
    plain, full = program.graph_module(*live), features(*live)
    assert len(full) == len(plain) + 2
    assert all(map(torch.equal, plain, full))
    attention, second = full[2:]
    torch.testing.assert_close(x + attention + second, full[0])
    torch.testing.assert_close(second, module.fc(x + attention))


def test_features_that_the_add_overwrites_are_cloned() -> None:
    module, x = Overwrites(), torch.randn(B, L, C)
    program = program_of(module, x)
    features = capture_outputs(program.graph_module, branches_of(program))
    assert_expected_inline(
        listing(features),
        """\
def forward(self, arg0_1, arg1_1, arg2_1):
    linear = aten.linear.default(arg2_1, arg0_1, arg1_1)
    clone_default = aten.clone.default(linear)
    add_ = aten.add_.Tensor(linear, arg2_1)
    return [add_, clone_default]""",
    )
    assert ops(features) - ops(program.graph_module) == {"clone.default": 1}
    origin = roots(module, (x,), {})
    result, feature = features(*(get(origin, path) for path in program.inputs))
    torch.testing.assert_close(feature, module.fc(x))
    torch.testing.assert_close(result, x + feature)


def test_no_branches_no_features() -> None:
    program = program_of(ffn(), torch.randn(B, L, C), torch.randn(L, 1))
    assert capture_outputs(program.graph_module, []).code == program.graph_module.code


# -- gathering side inputs ----------------------------------------------------------------------


def test_side_layout() -> None:
    (branch,) = branches_of(program_of(ffn(), torch.randn(B, L, C), torch.randn(L, 1)))
    axes = branch.axes[branch.out]
    assert isinstance(axes, tuple)
    layout = SideLayout.of((L, 1), axes, KEPT)
    assert layout == ((None, None, None), ((1, L, 0),), 0, (B, -1, -1))
    side, index = torch.randn(L, 1), select(torch.empty(B, L, C), KEPT)
    gathered = take_side(side, index, *layout)
    assert torch.equal(gathered, torch.stack([side[row] for row in index]))


def test_keys_before_and_behind_the_tokens_stay() -> None:
    side = torch.arange(2 + L + 1.0)
    index = select(torch.empty(B, L, C), KEPT)
    gathered = take_side(side, index, (None, None), ((1, L, 1),), 0, (B, -1))
    assert gathered.tolist() == [[0, 1, 6, 2, 5, 8], [0, 1, 3, 7, 4, 8]]


def test_a_restored_output_of_its_own_is_added_into() -> None:
    class Fresh(Named):
        restores_anew = True

    module, x, side = ffn(), torch.randn(B, L, C), torch.randn(L, 1)
    program = program_of(module, x, side)
    branches = branches_of(program)
    plain = prune(program.graph_module, branches, STEP, feature)
    fresh = prune(program.graph_module, branches, replace(STEP, operators=Fresh()), feature)
    assert ops(fresh.graph_module)["add_.Tensor"] == 1
    assert ops(plain.graph_module)["add_.Tensor"] == 0
    (a, *_), (b, *_) = (run(program, made, module, x, side) for made in (plain, fresh))
    assert torch.equal(a, b)


@pytest.mark.parametrize("nested", [False, True])
def test_a_selection_that_is_given_and_taken(nested: bool) -> None:
    class Nested:
        asks, restores_anew = ASKS_NOTHING, False
        select = staticmethod(lambda x, kept: (select(x, kept), (x.mean(1), x[:, 0])))
        take = staticmethod(lambda x, selection: take(x, selection[0]))
        restore = staticmethod(lambda kept, selection, *rest: restore(kept, selection[0], *rest))

    module, x, side = ffn(), torch.randn(B, L, C), torch.randn(L, 1)
    program = program_of(module, x, side)
    step = replace(STEP, operators=Nested() if nested else Named(), selects_once=True)
    pruned = pruned_of(program, branches_of(program), step)
    given, taken = (
        replace(
            pruned, graph_module=share_selection(pruned.graph_module, replace(step, selection=s))
        )
        for s in ("given", "taken")
    )
    made, *rest = run(program, pruned, module, x, side)
    count = 3 if nested else 1
    same, *others = run(program, given, module, x, side)
    assert torch.equal(same, made)
    assert len(others) == len(rest) + count
    assert torch.equal(others[len(rest)], select(x, KEPT))
    assert not taken.graph_module.graph.find_nodes(op="call_function", target=step.operators.select)
    live = [get(roots(module, (x, side), {}), program.inputs[i]) for i in pruned.inputs]
    index = torch.tensor([[5, 4, 3], [0, 1, 2]])[:, :KEPT]
    selection = [index, x.mean(1), x[:, 0]][:count]
    out, *_ = taken.graph_module(*live, torch.full((B, 2, C), 0.5), *selection)

    class Fixed(Named):
        select = staticmethod(lambda x, kept: index)

    hand = pruned_of(program, branches_of(program), replace(STEP, operators=Fixed()))
    assert torch.equal(out, run(program, hand, module, x, side)[0])
