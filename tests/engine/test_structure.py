"""A program is not used for a block or a call that is built in another way than it was made for."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from enum import Enum
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.engine.structure import Structure
from tests.by_hand import Pruner
from tests.marks import mostly_slow

SIDES = (1, 2, 3, 4)
SCHEDULE = Schedule(SIDES, (0.5, 0.5))
WIDTH = 8


def maps(batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, side * side, WIDTH, generator=generator) for side in SIDES]


# --- edits of blocks between two generations ----------------------------------------------------


class Block(nn.Module):
    """A feed-forward with everything that users edit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 16),
            nn.Linear(16, WIDTH),
        )
        self.twin = nn.Linear(16, WIDTH)
        self.twin.weight = self.down.weight
        self.more = nn.ModuleList()
        self.active: list[str] = []
        self.settings = {"scale": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        for extra in self.more:
            h = h + extra(h)
        y = self.down(F.gelu(self.up(h))) + self.twin(F.gelu(self.up(h)))
        for _ in self.active:
            y = 2 * y
        bonus = getattr(self, "bonus", None)
        out: Tensor = x + y * self.settings["scale"] + (0 if bonus is None else bonus)
        return out


class Net(nn.Module):
    blocks: Any

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def generate(self) -> list[Tensor]:
        drawn = []
        for x in maps():
            for block in self.blocks:
                x = block(x)
            drawn.append(x)
        return drawn


def fresh_linear(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(inputs, outputs)


def untie(block: Any) -> None:
    block.twin.weight = nn.Parameter(block.down.weight + 1)


def patch_forward(block: Any) -> None:
    block.up.forward = lambda x: F.linear(x, block.up.weight) + 1


def hook(block: Any) -> None:
    block.up.register_forward_hook(lambda module, args, out: 2 * out)


EDITS: dict[str, Callable[[Any], object]] = {
    "a layer replaced": lambda b: setattr(b, "up", fresh_linear(WIDTH, 16)),
    "a layer added": lambda b: b.more.append(fresh_linear(WIDTH, WIDTH)),
    "a hook added": hook,
    "a hook before added": lambda b: b.up.register_forward_pre_hook(lambda m, args: (3 * args[0],)),
    "a forward patched": patch_forward,
    "a bias removed": lambda b: setattr(b.down, "bias", None),
    "a setting of a torch layer": lambda b: setattr(b.norm, "eps", 1.0),
    "a list that grows": lambda b: b.active.append("lora"),
    "a value in a dict": lambda b: b.settings.update(scale=3.0),
    "an attribute added": lambda b: setattr(b, "bonus", torch.ones(WIDTH)),
    "weights untied": untie,
    "a parametrization": lambda b: parametrizations.weight_norm(b.up),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edited_block_runs_as_edited(edit: Callable[[Any], object]) -> None:
    fast = fastvar_fx.transform(Net().eval(), SCHEDULE)
    before = fast.generate()
    edited = fastvar_fx.transform(Net().eval(), SCHEDULE)
    for net in (fast, edited):
        edit(net.blocks[1])
    want = edited.generate()
    if edit is not EDITS["a parametrization"]:
        assert not torch.equal(want[-1], before[-1])
    assert all(map(torch.equal, fast.generate(), want))
    assert all(row.kept < row.tokens for row in fastvar_fx.explain(fast).rows if row.step > 1)


def test_an_edit_undone_finds_the_first_programs_again() -> None:
    fast = fastvar_fx.transform(Net().eval(), SCHEDULE)
    want = fast.generate()
    programs = {row.program for row in fastvar_fx.explain(fast).rows}
    handle = fast.blocks[0].up.register_forward_hook(lambda module, args, out: 2 * out)
    assert not torch.equal(fast.generate()[-1], want[-1])
    handle.remove()
    assert all(map(torch.equal, fast.generate(), want))
    assert {row.program for row in fastvar_fx.explain(fast).rows} == programs


def test_a_parameter_that_goes_away_leaves_the_block_pruned() -> None:
    net = Net().eval()
    prune.l1_unstructured(net.blocks[0].up, "weight", 0.5)  # type: ignore[no-untyped-call]
    fast = fastvar_fx.transform(net, SCHEDULE)
    want = fast.generate()
    prune.remove(fast.blocks[0].up, "weight")  # type: ignore[no-untyped-call]
    assert all(map(torch.equal, fast.generate(), want))
    assert all(row.kept < row.tokens for row in fastvar_fx.explain(fast).rows if row.step > 1)


def test_a_parametrization_removed_and_weights_changed() -> None:
    net = Net().eval()
    parametrizations.weight_norm(net.blocks[0].up)
    fast = fastvar_fx.transform(net, SCHEDULE)
    fast.generate()
    up: Any = fast.blocks[0].up
    parametrize.remove_parametrizations(up, "weight")
    up.weight.data.mul_(2)
    plain = Net().eval()
    plain.load_state_dict(fast.state_dict())
    want = fastvar_fx.transform(plain, SCHEDULE).generate()
    for got, expected in zip(fast.generate(), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_structure_of_a_block_is_the_same_after_a_generation() -> None:
    fast = fastvar_fx.transform(Net().eval(), SCHEDULE)
    fast.generate()
    before = Structure.of_block(fast.blocks[0])
    seconds = fastvar_fx.explain(fast).trace_seconds
    fast.generate()
    assert Structure.of_block(fast.blocks[0]) == before
    assert fastvar_fx.explain(fast).trace_seconds == seconds


class Kind(Enum):
    DOUBLE = 2
    TRIPLE = 3


class Options(dict[str, Any]):
    """A dict with attributes."""


class Switched(nn.Module):
    """A feed-forward that reads what is neither a tensor nor a plain value."""

    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.act: Any = torch.tanh
        self.after: Any = partial(torch.mul, other=1.0)
        self.flags = {"on"}
        self.table = np.ones(2)
        self.times = range(1)
        self.kind = Kind.DOUBLE
        self.config = SimpleNamespace(act=torch.sin, kind=self.kind)
        self.parsed = Namespace(scale=1.0)
        self.options = Options()
        self.options.scale = 1.0  # type: ignore[attr-defined]
        self.layers = {"out": nn.Linear(WIDTH, WIDTH)}

    def scaled(self, y: Tensor) -> Tensor:
        y = y * float(self.table[0]) * self.gain
        return y * int(self.kind.value * self.config.kind.value)

    def branch(self, x: Tensor) -> Tensor:
        y = self.down(self.after(self.act(self.up(x))))
        y = self.layers["out"](self.config.act(y)) * (2 if "on" in self.flags else 1)
        for _ in self.times:
            y = 0.9 * y
        options: Any = self.options
        out: Tensor = self.scaled(y) * self.parsed.scale * options.scale
        return out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def patched(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: 2 * function(*args)


SWITCHES: dict[str, Callable[[Any, pytest.MonkeyPatch], object]] = {
    "a function": lambda b, _: setattr(b, "act", torch.relu),
    "a partial": lambda b, _: setattr(b, "after", partial(torch.mul, other=2.0)),
    "a bound method": lambda b, _: setattr(b, "scaled", patched(b.scaled)),
    "a set": lambda b, _: b.flags.clear(),
    "an array changed in place": lambda b, _: b.table.fill(3.0),
    "a range": lambda b, _: setattr(b, "times", range(4)),
    "one of two places of an object": lambda b, _: setattr(b, "kind", Kind.TRIPLE),
    "a function in an object": lambda b, _: setattr(b.config, "act", torch.relu),
    "parsed options": lambda b, _: setattr(b.parsed, "scale", 3.0),
    "an attribute of a dict": lambda b, _: setattr(b.options, "scale", 3.0),
    "a module in a dict": lambda b, _: b.layers.update(out=fresh_linear(WIDTH, WIDTH)),
    "an attribute of the class": lambda _, patch: patch.setattr(Switched, "gain", 2.0),
    "a method of the class": lambda _, patch: patch.setattr(
        Switched, "scaled", patched(Switched.scaled)
    ),
    "a forward of a class of torch": lambda _, patch: patch.setattr(
        nn.Linear, "forward", patched(nn.Linear.forward)
    ),
    "a hook on all modules": lambda _, patch: patch.setitem(
        torch.nn.modules.module._global_forward_hooks,
        -1,
        lambda module, args, out: 2 * out if isinstance(module, nn.Linear) else None,
    ),
}


def by_hand(branch: Callable[[Tensor], Tensor], pruner: Pruner) -> Tensor:
    out = torch.empty(0)
    for x in maps():
        out = x + pruner.run("ffn", x, lambda tokens, index: branch(tokens))
    return out


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_what_a_block_reads_besides_tensors_and_numbers(
    switch: Callable[[Any, pytest.MonkeyPatch], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block: Any = fastvar_fx.transform(nn.ModuleList([Switched()]).eval(), SCHEDULE, blocks="0")[0]
    before = [block(x) for x in maps()][-1]
    switch(block, monkeypatch)
    got = [block(x) for x in maps()][-1]
    assert not torch.equal(got, before)
    torch.testing.assert_close(got, by_hand(block.branch, Pruner(SCHEDULE)))


def test_a_patched_forward_of_the_blocks_class_is_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast = fastvar_fx.transform(Net().eval(), SCHEDULE)
    fast.generate()
    monkeypatch.setattr(Block, "forward", patched(Block.forward))
    want = fastvar_fx.transform(Net().eval(), SCHEDULE).generate()
    assert all(map(torch.equal, fast.generate(), want))
    assert all(map(torch.equal, copy.deepcopy(fast).generate(), want))


class Constant(nn.Module):
    """A feed-forward that makes a tensor of the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc(x) * torch.full((WIDTH,), 0.3)
        return out


def test_a_program_holds_for_its_default_dtype() -> None:
    block = fastvar_fx.transform(nn.ModuleList([Constant()]).eval(), SCHEDULE, blocks="0")[0]
    drawn = maps()
    assert [block(x).dtype for x in drawn] == [torch.float32] * len(SIDES)
    torch.set_default_dtype(torch.float64)
    try:
        assert [block(x).dtype for x in drawn] == [torch.float64] * len(SIDES)
    finally:
        torch.set_default_dtype(torch.float32)


# --- arguments ----------------------------------------------------------------------------------


class Cache:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


ONE, TWO = torch.ones(2, 1, WIDTH), torch.full((2, 1, WIDTH), 2.0)

ARGUMENTS: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
    "a size of a tensor that is not read": (
        lambda c: c.shape[1],
        torch.ones(2, 3),
        torch.ones(2, 5),
    ),
    "a dtype of one": (lambda c: c.dtype.itemsize, torch.ones(2), torch.ones(2).double()),
    "None in place of one": (lambda c: 1 if c is None else 3, torch.ones(2), None),
    "a function": (lambda c: c(2.0), abs, lambda value: value * value),
    "a set": (len, {1}, {1, 2}),
    "a range": (len, range(1), range(2)),
    "a slice": (lambda c: c.stop, slice(1), slice(2)),
    "a fraction": (float, Fraction(1, 2), Fraction(1, 3)),
    "an array": (lambda c: float(c.sum()), np.ones(2), np.ones(4)),
    "a key that is optional": (lambda c: c.get("mask", 1.0), {"a": ONE}, {"a": ONE, "mask": TWO}),
    "a list that is longer": (lambda c: sum(c), [ONE], [ONE, TWO]),
    "an attribute": (lambda c: getattr(c, "mask", 1.0), Cache(a=ONE), Cache(a=ONE, mask=TWO)),
    "two tensors, then one twice": (lambda c: c[0] - c[1], (ONE, TWO), (ONE, ONE)),
    "one tensor twice, then two": (lambda c: c[0] - c[1], (ONE, ONE), (ONE, TWO)),
    "which of two is one of three": (
        lambda c: c[0] + 2 * c[1] + 4 * c[2],
        [ONE, ONE, TWO],
        [ONE, TWO, TWO],
    ),
    "a dict inside a tuple": (lambda c: len(c[0]), ({},), ({"a": 1},)),
    "None at the end of many": (
        lambda c: 1 if c[-1] is None else 3,
        [ONE] * 70,
        [*[ONE] * 69, None],
    ),
    "a type among many numbers": (
        lambda c: 2.0 if isinstance(c[-1], bool) else 3.0,
        [1] * 70,
        [*[1] * 69, True],
    ),
}


class Conditioned(nn.Module):
    factor: Callable[[Any], Any]

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor, condition: Any) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(x))) * type(self).factor(condition)
        return out


class Calls(nn.Module):
    def __init__(self, factor: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = type("Conditioned", (Conditioned,), {"factor": staticmethod(factor)})
        self.blocks = nn.ModuleList([kind()])

    def generate(self, *conditions: Any) -> list[Tensor]:
        drawn: list[Tensor] = []
        for x in maps():
            drawn = [self.blocks[0](x, condition) for condition in conditions]
        return drawn


@pytest.mark.parametrize(
    ("factor", "first", "second"), mostly_slow(ARGUMENTS.values(), quick=9), ids=ARGUMENTS.keys()
)
def test_another_structure_of_arguments_has_its_own_program(
    factor: Callable[[Any], Any], first: Any, second: Any
) -> None:
    def fast() -> Calls:
        return fastvar_fx.transform(Calls(factor).eval(), SCHEDULE)

    one = fast()
    (want,) = fast().generate(second)
    one.generate(first)
    assert torch.equal(one.generate(second)[0], want)
    (other,) = fast().generate(first)
    assert not torch.equal(other, want)
    # Also within one generation, as two calls of a step for guidance.
    both = fast().generate(first, second)
    assert torch.equal(both[0], other)
    assert torch.equal(both[1], want)


# --- refusals -----------------------------------------------------------------------------------


class Branching(nn.Module):
    """Reads a value on the host, which cannot be traced, unless it is switched off."""

    on = True

    def forward(self, x: Tensor) -> Tensor:
        return -x if self.on and float(x.abs().max()) > 1e9 else x


def branching() -> Net:
    net = Net().eval()
    for block in net.blocks:
        block.norm = nn.Sequential(block.norm, Branching())
    return net


@pytest.mark.slow
def test_strict_is_strict_in_every_generation() -> None:
    fast = fastvar_fx.transform(branching(), SCHEDULE)
    for _ in range(3):
        with pytest.raises(fastvar_fx.NothingPrunedError, match="FVX001"):
            fast.generate()


@pytest.mark.slow
def test_a_refusal_ends_with_its_cause() -> None:
    fast = fastvar_fx.transform(branching(), SCHEDULE, strict=False)
    fast.generate()
    off = branching()
    for net in (fast, off):
        for block in net.blocks:
            vars(block.norm[1])["on"] = False
    want = fastvar_fx.transform(off, SCHEDULE).generate()
    assert all(map(torch.equal, fast.generate(), want))
    assert all(row.kept < row.tokens for row in fastvar_fx.explain(fast).rows if row.step > 1)


def test_a_block_that_is_replaced_is_an_error() -> None:
    fast = fastvar_fx.transform(Net().eval(), SCHEDULE)
    fast.generate()
    own, fast.blocks[1] = fast.blocks[1], Block().eval()
    for run in (Net.generate, lambda fast: [fast.blocks[0](x) for x in maps()]):
        with pytest.raises(fastvar_fx.RunError, match=r"blocks\.1 is a Block that was put there"):
            fastvar_fx.trace(fast, run)
    with pytest.raises(fastvar_fx.RunError, match="transform that"):
        fast.generate()
    fast.blocks[1] = nn.Sequential(own)  # a wrapper
    want = fastvar_fx.transform(Net().eval(), SCHEDULE).generate()
    assert all(map(torch.equal, fast.generate(), want))
    del fast.blocks[1]
    assert fast.generate()[0].shape == (2, 1, WIDTH)


def test_a_replaced_block_is_a_warning_without_strict(caplog: pytest.LogCaptureFixture) -> None:
    fast = fastvar_fx.transform(Net().eval(), SCHEDULE, strict=False)
    fast.blocks[1] = Block().eval()
    fast.generate()
    assert "nothing prunes it" in caplog.text


def test_hooks_of_the_block_itself_need_no_other_program() -> None:
    fast = fastvar_fx.transform(Net().eval(), SCHEDULE)
    fast.generate()
    seconds, met = fastvar_fx.explain(fast).trace_seconds, list[int]()
    fast.blocks[0].register_forward_pre_hook(lambda module, args: met.append(args[0].shape[1]))
    fast.generate()
    assert met == [side * side for side in SIDES]
    assert fastvar_fx.explain(fast).trace_seconds == seconds
