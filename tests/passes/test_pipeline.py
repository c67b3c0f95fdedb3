"""The pipeline: its order, what it times, dumps and names, and that it works alone."""
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
import gc
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvar_fx
import passes
from passes import Context, Draft, Dump, PassError, RefusedError, StepProgram
from passes.graph import copy_graph
from passes.refusal import CODES, Refusal
from passes.rewrite.prune import ASKS_NOTHING
from passes.user_frames import error_line, is_users

B, L, C = 2, 6, 4
STREAM = (("item", "args"), ("item", 0))


class Block(nn.Module):
    """A feed-forward branch, then one that flips the tokens and has to stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.flipped = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc(x).tanh()
        return x + self.flipped(x).tanh().flip(1)


class FirstTokens:
    """Operators that keep the first tokens."""

    asks = ASKS_NOTHING
    restores_anew = False

    def select(self, x: Tensor, kept: int) -> Tensor:
        return torch.arange(kept).expand(x.shape[0], kept)

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        return x[:, : index.shape[1]]

    def restore(self, kept: Tensor, index: Tensor, cached: Tensor, *scales: Any) -> Tensor:
        return torch.cat([kept, cached[:, kept.shape[1] :]], 1)


def call_of(block: nn.Module, x: Tensor) -> passes.Call:
    return passes.Call(block.forward, block, (x,), {}, STREAM)


def context_of(block: nn.Module, **given: Any) -> Context:
    call = call_of(block, torch.randn(B, L, C))
    return Context(call=call, real=passes.reference(call), **given)


def pruned_context(block: nn.Module, **given: Any) -> Context:
    captured = {index: torch.zeros(B, L, C) for index in range(2)}
    step = passes.Step(3, (L,), (L,), FirstTokens())
    return context_of(block, step=step, captured=captured, **given)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def run_on(program: StepProgram, context: Context) -> list[Tensor]:
    call = context.call
    inputs = passes.live_inputs(call, program.inputs)
    taken = [context.captured[i] for i in program.features if context.step is not None]
    return program.graph_module(*inputs, *taken)


# -- the pipeline alone -------------------------------------------------------------------------


def test_it_needs_neither_its_user_nor_dynamo_to_be_imported() -> None:
    heavy = ["fastvar_fx", "torch._dynamo", "torch._inductor", "sympy"]
    code = f"import passes, sys; print([m for m in sys.modules if m in {heavy}])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_cache_step_returns_what_branches_add(block: Block) -> None:
    context = context_of(block)
    program = passes.run(context)
    result, first, second = run_on(program, context)
    (x,) = context.call.args
    assert torch.equal(result, block(x))
    assert torch.equal(first, block.fc(x).tanh())
    torch.testing.assert_close(x + first + second, result)
    assert program.features == (0, 1)


def test_a_pruned_step_prunes_what_it_can(block: Block) -> None:
    context = pruned_context(block)
    program = passes.run(context)
    (result,) = run_on(program, context)
    (x,) = context.call.args
    x = x + torch.cat([block.fc(x[:, :3]).tanh(), torch.zeros(B, 3, C)], 1)
    torch.testing.assert_close(result, x + block.flipped(x).tanh().flip(1))
    assert program.prunes == (0,)
    refusal = program.branches[1].refusal
    assert refusal is not None
    assert refusal.code == "FVX012"


class Routed(nn.Module):
    """A feed-forward, then experts that get the tokens a router sends to them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.router = nn.Linear(C, C), nn.Linear(C, 2)
        self.experts = nn.ModuleList(nn.Linear(C, C) for _ in range(2))

    def routed(self, x: Tensor) -> Tensor:
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            out[mine] = expert(x[mine])
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc(x).tanh()
        return x + self.routed(x)


def test_experts_stay_dense_and_the_rest_prunes() -> None:
    torch.manual_seed(0)
    dense, experts = passes.run(pruned_context(Routed().eval())).branches
    assert dense.kept is not None
    assert experts.kept is None
    assert experts.refusal is not None
    assert experts.refusal.code == "FVX010"


def test_each_pass_is_timed(block: Block) -> None:
    seconds = passes.run(pruned_context(block)).seconds
    names = [each.name for each in passes.PIPELINE]
    assert [name for name in seconds if name in names] == names
    assert {"verify_permuted", "prune", "verify_subset"} < seconds.keys()
    assert min(seconds.values()) > 0


def test_each_pass_that_changes_the_graph_is_dumped_once(block: Block, tmp_path: Path) -> None:
    passes.run(pruned_context(block, dump=Dump(tmp_path, "block")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block.0_capture.py", "block.1_prune.py"]
    before, after = ((tmp_path / f"block.{n}.py").read_text() for n in ("0_capture", "1_prune"))
    assert "select" not in before
    assert "select" in after


# -- passes of one's own, and passes that fail --------------------------------------------------


class Broken:
    name = "broken"

    def run(self, context: Context, draft: Draft) -> Draft:
        raise KeyError("no such node")


class Unordered:
    """Moves the first op behind the last one, which reads it."""

    name = "unordered"

    def run(self, context: Context, draft: Draft) -> Draft:
        graph, _ = copy_graph(draft.graph_module.graph)
        first = next(node for node in graph.nodes if node.op == "call_function")
        graph.output_node().prepend(first)
        return replace(draft, graph_module=torch.fx.GraphModule(draft.graph_module, graph))


@pytest.mark.parametrize("bug", [Broken(), Unordered()])
def test_a_pass_that_fails_is_named(block: Block, bug: Any) -> None:
    pipeline = (*passes.PIPELINE[:2], bug, *passes.PIPELINE[2:])
    with pytest.raises(
        PassError, match=rf"pass {bug.name} failed on a Block: \w+Error: "
    ) as caught:
        passes.run(context_of(block), pipeline)
    assert caught.value.name == bug.name
    assert caught.value.__cause__ is not None


def test_a_pass_in_the_wrong_order_is_named(block: Block) -> None:
    with pytest.raises(PassError, match="pass find_branches failed"):
        passes.run(context_of(block), passes.PIPELINE[1:])


class Doubles:
    """A rewrite that changes what the block computes."""

    name = "doubles"

    def run(self, context: Context, draft: Draft) -> Draft:
        graph, _ = copy_graph(draft.graph_module.graph)
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
            node.target = torch.ops.aten.sin.default
        return replace(draft, graph_module=torch.fx.GraphModule(draft.graph_module, graph))


def test_a_wrong_rewrite_before_the_check_is_refused(block: Block) -> None:
    capture, *rest = passes.PIPELINE
    with pytest.raises(RefusedError, match="FVX002"):
        passes.run(context_of(block), (capture, Doubles(), *rest))


def test_a_mismatch_of_dtypes_names_the_fast_path_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(C, 2, 2 * C, batch_first=True, norm_first=True).eval()
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RefusedError, match=r"float32, the block returns .* bfloat16") as caught,
    ):
        passes.run(context_of(layer))
    assert caught.value.refusal.code == "FVX002"
    assert "set_fastpath_enabled(False)" in caught.value.refusal.hint


def test_a_mismatch_of_random_numbers_names_the_line_that_draws_them() -> None:
    class Noisy(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.1 * self.fc(torch.rand_like(x))

    with pytest.raises(RefusedError, match="FVX002") as caught:
        passes.run(context_of(Noisy()))
    refusal = caught.value.refusal
    assert "it draws random numbers" in refusal.reason
    assert refusal.op == "aten.rand_like.default"
    assert refusal.where.partition(".py:")[0].endswith("test_pipeline")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def draw(self) -> Tensor:
        for side in (2, 3, 4):
            x = torch.ones(1, side * side, C)
            for block in self.blocks:
                x = block(x)
        return x


@pytest.mark.parametrize("strict", [True, False])
def test_under_strict_a_bug_raises(
    strict: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(passes.run, "__defaults__", ((*passes.PIPELINE, Broken()),))
    net = Net().eval()
    schedule = fastvar_fx.Schedule(((2, 2), (3, 3), (4, 4)), (0.5,))
    fast = fastvar_fx.transform(net, schedule, blocks="blocks", strict=strict)
    if strict:
        with pytest.raises(PassError, match="pass broken failed on a Block: KeyError"):
            fast.draw()
        return
    assert torch.equal(fast.draw(), net.draw())
    refusals = [row.refusal for row in fastvar_fx.explain(fast).refusals]
    assert {refusal.code for refusal in refusals if refusal is not None} == {"FVX020"}
    assert "no such node" in caplog.text


# -- refusals -----------------------------------------------------------------------------------


def refused(block: Block) -> Refusal:
    draft = Draft()
    for each in passes.PIPELINE[:2]:
        draft = each.run(context_of(block), draft)
    (found,) = [branch.refusal for branch in draft.found if branch.refusal is not None]
    assert found.node in draft.graph_module.graph.nodes
    return found


def test_a_refusal_is_false_and_knows_its_node_while_the_graph_lives(block: Block) -> None:
    refusal = refused(block)
    assert not refusal
    gc.collect()
    assert refusal.node is None, "a report keeps no graph alive"
    assert refusal.op == "aten.flip.default"
    assert refusal.nearest == "2 of the branch's 3 ops keep the token axis"
    assert f"Nearest: {refusal.nearest}. Hint: {CODES['FVX012'].hint}." in str(refusal)


def test_a_refusal_is_copied_and_written_as_text(block: Block) -> None:
    refusal = refused(block)
    assert copy.deepcopy(refusal) == pickle.loads(pickle.dumps(refusal)) == refusal
    texts = refusal.as_dict()
    assert texts.keys() == {"code", "reason", "op", "where", "advice", "nearest", "title", "hint"}
    assert all(isinstance(text, str) for text in texts.values())


def test_every_code_has_a_title_and_a_hint() -> None:
    assert all(re.fullmatch(r"FVX0\d\d", code) for code in CODES)
    assert all(code.title and code.hint for code in CODES.values())


class NoBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.tanh()


def test_a_block_without_a_branch_names_the_nearest_add() -> None:
    with pytest.raises(RefusedError, match="FVX004") as caught:
        passes.run(context_of(NoBranch()))
    line = NoBranch.forward.__code__.co_firstlineno + 1
    assert caught.value.refusal.nearest == (
        f"aten.add.Tensor at {__file__}:{line}, to which no matrix product or attention contributes"
    )


# -- the user's line ----------------------------------------------------------------------------


def test_the_users_line_is_the_innermost_that_is_no_librarys() -> None:
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(2, 3)(torch.ones(1, 4))
    line = caught.value.__traceback__
    assert line is not None
    assert error_line(caught.value) == f"{__file__}:{line.tb_lineno}"
    assert error_line(caught.value, lambda module: is_users(module) and module != __name__) == ""
