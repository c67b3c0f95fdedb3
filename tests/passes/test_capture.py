"""Capture: a call becomes a graph that holds no tensor, and the module stays as it was."""
# mypy: disable-error-code="no-any-return, no-untyped-call"

import copy
import functools
import gc
import sys
import types
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import passes
from passes import Call, Context, Fingerprint, LeakedTensorError, fingerprint, reference
from passes.graph import placeholder_of
from passes.refusal import RefusedError
from passes.trace.calls import live_inputs
from passes.trace.capture import BlockProgram, capture
from passes.trace.state import Path, Snapshot, get, is_container, roots, show

B, L, C = 2, 4, 6


def forward_of(module: nn.Module) -> Callable[..., Any]:
    bound: Callable[..., Any] = types.MethodType(type(module).forward, module)
    return bound


def captured(module: nn.Module, *args: Any, **kwargs: Any) -> BlockProgram:
    return capture(Call(forward_of(module), module, args, kwargs))


def names(program: BlockProgram) -> list[str]:
    return [show(path[1:]) for path in program.inputs]


def no_constants(program: BlockProgram) -> bool:
    graph_module = program.graph_module
    held = [v for v in vars(graph_module).values() if isinstance(v, Tensor)]
    held += [*graph_module.parameters(), *graph_module.buffers()]
    return not held and not graph_module.graph.find_nodes(op="get_attr")


def fakes_reachable_from(*objects: object) -> list[FakeTensor]:
    """Walks everything that Python objects hold, except what modules and classes hold."""
    seen: set[int] = set()
    stack: list[object] = list(objects)
    found: list[FakeTensor] = []
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (type, types.ModuleType, types.FrameType)):
            continue
        seen.add(id(value))
        if isinstance(value, FakeTensor):
            found.append(value)
            continue
        if isinstance(value, types.FunctionType):
            stack += [cell.cell_contents for cell in value.__closure__ or ()]
            continue
        stack += gc.get_referents(value)
    return found


def run(program: BlockProgram, module: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    origin = roots(module, args, kwargs)
    inputs = [get(origin, path) for path in program.inputs]
    outputs: list[Tensor] = program.graph_module(*inputs)
    return outputs


def assert_reproduces(module: nn.Module, *args: Any, **kwargs: Any) -> BlockProgram:
    """The graph gives what the call gives, and replaying its writes leaves what the call leaves."""
    results, written = reference(Call(forward_of(module), module, args, kwargs))
    program = captured(module, *args, **kwargs)
    outputs = run(program, module, *args, **kwargs)
    assert len(outputs) == len(results) + len(written)
    for made, expected in zip(outputs, [*results, *written], strict=True):
        assert made.dtype == expected.dtype
        assert torch.equal(made, expected)
    return program


def replay(program: BlockProgram, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Runs the graph and sets what it wrote, as a runtime does around it."""
    origin = roots(module, args, kwargs)
    outputs = run(program, module, *args, **kwargs)[program.result_count :]
    left = iter(outputs)
    for write in program.writes:
        value = write.value and write.value.make(left, functools.partial(get, origin))
        write.apply(get(origin, write.path), value)
    assert not list(left)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)
        self.table = nn.Buffer(torch.randn(L, C))
        self.unread = nn.Buffer(torch.randn(3))
        self.extra = torch.randn(C)
        self.tables: dict[str, Any] = {"a": torch.randn(C), "b": [torch.randn(C), torch.randn(C)]}
        self.pair = (torch.randn(C), 3.0)

    def forward(self, x: Tensor, scale: float, *, shift: Tensor) -> Tensor:
        x = self.fc(x) * scale + shift + self.table + self.extra
        return x + self.tables["b"][1] + self.pair[0]


# -- inputs -------------------------------------------------------------------------------------


def test_everything_read_is_an_input_and_nothing_else() -> None:
    module = Plain()
    x, shift = torch.randn(B, L, C), torch.randn(C)
    program = assert_reproduces(module, x, 2.0, shift=shift)
    assert set(names(program)) == {
        "fc.weight",
        "fc.bias",
        "table",
        "extra",
        "tables['b'][1]",
        "pair[0]",
        "[0]",
        "['shift']",
    }
    assert no_constants(program)
    assert len(program.graph_module.graph.find_nodes(op="placeholder")) == len(program.inputs)
    assert not program.writes
    assert program.result_count == 1


def test_placeholders_by_path() -> None:
    program = captured(Plain(), torch.randn(B, L, C), 2.0, shift=torch.randn(C))
    stream = placeholder_of(program, (("item", "args"), ("item", 0)))
    assert stream is not None
    assert stream.meta["val"].shape == (B, L, C)
    assert stream.meta["fastvar"] == {"input": "[0]", "root": "args"}
    assert placeholder_of(program, (("item", "module"), ("attr", "unread"))) is None


def test_new_values_of_inputs_need_no_new_capture() -> None:
    module = Plain()
    x, shift = torch.randn(B, L, C), torch.randn(C)
    program = captured(module, x, 2.0, shift=shift)
    module.fc.weight.mul_(2.0)
    module.extra = torch.randn(C)
    x = x + 1
    (made,) = run(program, module, x, 2.0, shift=shift)
    assert torch.equal(made, module(x, 2.0, shift=shift))


def test_shared_tensors_are_one_input() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(C, C, bias=False)
            self.b = nn.Linear(C, C, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(x))
            return result

    assert names(assert_reproduces(Tied(), torch.randn(B, L, C))) == ["a.weight", "[0]"]


def test_results_keep_their_structure() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any], None]:
            return x + 1, {"twice": 2 * x, "name": "n", "count": 3}, None

    program = assert_reproduces(Many(), torch.randn(B, L, C))
    assert program.result.leaves == (..., ..., "n", 3, None)
    assert program.result_count == 2


def test_data_of_a_parameter_is_the_parameter() -> None:
    class Data(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.fc.weight.data, self.fc.bias)

    program = assert_reproduces(Data(), torch.randn(B, L, C))
    assert set(names(program)) == {"fc.weight", "fc.bias", "[0]"}
    assert not program.graph_module.graph.find_nodes(op="get_attr")


def test_what_nobody_takes_is_dropped() -> None:
    """Assigning to `.data` asks whether two tensors are of a kind: Dynamo cannot trace that."""

    class Converts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(C))

        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data.to(x)
            return x * self.weight.max(0)[0]

    program = assert_reproduces(Converts(), torch.randn(B, L, C))
    calls = program.graph_module.graph.nodes
    assert [n.name for n in calls if n.op == "call_function"] == ["max_1", "getitem", "mul"]


def test_hooks_do_not_fire() -> None:
    module = Plain()
    fired: list[str] = []
    module.register_forward_hook(lambda *_: fired.append("hook"))
    captured(module, torch.randn(B, L, C), 2.0, shift=torch.randn(C))
    assert not fired


# -- writes -------------------------------------------------------------------------------------


class Holder:
    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.count = 0


class Writes(nn.Module):
    """Writes new state in one of many ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)
        self.how = how
        self.k: Tensor | None = torch.randn(B, 3, C)
        self.store: dict[str, Any] = {"k": torch.randn(B, 3, C), "layers": [{"v": None}]}
        self.layers: list[Any] = [torch.randn(B, 3, C), None]
        self.pair = (torch.randn(B, 3, C), 1)
        self.holder = Holder()
        self.register_buffer("buffered", None)

    def forward(self, x: Tensor, cache: dict[str, Any]) -> Tensor:
        h = self.fc(x)
        getattr(self, f"_{self.how}")(h, cache)
        return x + h

    def _attribute(self, h: Tensor, cache: dict[str, Any]) -> None:
        assert self.k is not None
        self.k = torch.cat([self.k, h], dim=1)

    def _new_attribute(self, h: Tensor, cache: dict[str, Any]) -> None:
        self.fresh = h * 2

    def _buffer(self, h: Tensor, cache: dict[str, Any]) -> None:
        self.buffered = h * 3

    def _deleted(self, h: Tensor, cache: dict[str, Any]) -> None:
        del self.k
        self.store.pop("k")

    def _plain_value(self, h: Tensor, cache: dict[str, Any]) -> None:
        self.k = None
        self.count = 7

    def _dict(self, h: Tensor, cache: dict[str, Any]) -> None:
        self.store["k"] = torch.cat([self.store["k"], h], dim=1)
        self.store["new"] = h + 1

    def _list(self, h: Tensor, cache: dict[str, Any]) -> None:
        self.layers[1] = h
        self.layers.append(h * 2)

    def _tuple(self, h: Tensor, cache: dict[str, Any]) -> None:
        self.pair = (torch.cat([self.pair[0], h], dim=1), 2)

    def _nested(self, h: Tensor, cache: dict[str, Any]) -> None:
        self.store["layers"][0]["v"] = h

    def _object(self, h: Tensor, cache: dict[str, Any]) -> None:
        self.holder.k = h
        self.holder.count += 1

    def _argument(self, h: Tensor, cache: dict[str, Any]) -> None:
        cache["k"] = h if cache.get("k") is None else torch.cat([cache["k"], h], dim=1)
        cache.setdefault("inner", {})["v"] = h.sin()

    def _structure(self, h: Tensor, cache: dict[str, Any]) -> None:
        self.store["both"] = {"k": h, "v": [h + 1, (h + 2, "x")]}


HOWS = [
    "attribute",
    "new_attribute",
    "buffer",
    "deleted",
    "plain_value",
    "dict",
    "list",
    "tuple",
    "nested",
    "object",
    "argument",
    "structure",
]


def contents(module: Writes) -> dict[str, Any]:
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
    own["holder"] = dict(vars(module.holder))
    own["buffered"] = module.buffered
    return own


def assert_same(a: Any, b: Any, identical: bool = False) -> None:
    """Equal structure and values; `identical` asks for the same tensors."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a is b if identical else torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], identical)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right, identical)
    else:
        assert a == b


def shallow(value: Any) -> Any:
    """Copies containers, not tensors."""
    if isinstance(value, dict):
        return {k: shallow(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(shallow, value))
    return value


def writing(how: str) -> Writes:
    torch.manual_seed(0)
    return Writes(how)


@pytest.mark.parametrize("how", HOWS)
def test_state_is_written_by_replay_as_by_the_call(how: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(B, L, C)
    cache: dict[str, Any] = {"k": torch.randn(B, 2, C)}
    module, live, live_cache = writing(how), writing(how), shallow(cache)
    state = dict(contents(module)), shallow(contents(module)), shallow(cache)
    program = assert_reproduces(module, x, cache)
    assert_same(contents(module), state[1], identical=True)
    assert all(contents(module)[k] is v for k, v in state[0].items() if k != "holder")
    assert_same(cache, state[2], identical=True)
    assert no_constants(program)
    assert program.writes
    live(x, live_cache)
    replay(program, module, x, cache)
    assert_same(contents(module), contents(live))
    assert_same(cache, live_cache)


def test_a_list_that_shrinks_is_refused() -> None:
    class Shrinks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [torch.zeros(1), torch.zeros(1)]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layers.pop()

    module = Shrinks()
    with pytest.raises(RefusedError, match="the call removed entries of the list layers"):
        captured(module, torch.randn(B, L, C))
    assert len(module.layers) == 2


class Record(list[Tensor]):
    """A list with attributes."""

    calls = 0


def test_attributes_of_a_list_are_written_by_replay() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor, record: Record) -> Tensor:
            record.append(x.sin())
            record.calls += 1
            return x * record.calls

    module, x, record, live = Counts(), torch.randn(B, L, C), Record(), Record()
    program = assert_reproduces(module, x, record)
    assert not record
    assert not vars(record)
    replay(program, module, x, record)
    module(x, live)
    assert_same(list(record), list(live))
    assert record.calls == live.calls == 1


@pytest.mark.parametrize("holder", [{1}, np.ones(2), np.ones(()), array("d", [1.0])])
def test_a_set_or_an_array_that_changes_is_refused_and_put_back(holder: Any) -> None:
    class Changes(nn.Module):
        def forward(self, x: Tensor, holder: Any) -> Tensor:
            if isinstance(holder, set):
                holder.add(len(holder) + 1)
            else:
                holder[... if isinstance(holder, np.ndarray) else slice(None)] *= 2
            return x + 1

    module, before = Changes(), copy.copy(holder)
    with pytest.raises(RefusedError, match=f"the call changed the {type(holder).__name__}"):
        captured(module, torch.randn(B, L, C), holder)
    assert np.array_equal(list(holder), list(before)) if np.ndim(before) else holder == before


def test_stored_objects_are_refused() -> None:
    class Stores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = Holder()
            return x + 1

    module = Stores()
    with pytest.raises(RefusedError, match="stored an object of Holder in kept"):
        captured(module, torch.randn(B, L, C))
    assert "kept" not in vars(module)


# -- nothing is left behind ---------------------------------------------------------------------


def test_a_forward_that_raises_half_way_leaves_no_trace() -> None:
    class Raises(Writes):
        def forward(self, x: Tensor, cache: dict[str, Any]) -> Tensor:
            h = self.fc(x)
            for how in sorted(HOWS, key="deleted".__eq__):
                getattr(self, f"_{how}")(h, cache)
            raise KeyError("no such thing")

    torch.manual_seed(0)
    module, cache, x = Raises("all"), {"k": torch.randn(B, 2, C)}, torch.randn(B, L, C)
    weights = dict(module.named_parameters())
    state = shallow(contents(module)), shallow(cache)
    for attempt in (
        captured,
        lambda *args: fingerprint(Call(forward_of(module), module, args[1:], {})),
    ):
        with pytest.raises(RefusedError, match=r"FVX001.*KeyError.*no such thing") as caught:
            attempt(module, x, cache)
        assert "test_capture.py:" in caught.value.refusal.where
    with pytest.raises(KeyError):
        reference(Call(forward_of(module), module, (x, cache), {}))
    assert_same(contents(module), state[0], identical=True)
    assert_same(cache, state[1], identical=True)
    assert dict(module.named_parameters()) == weights
    del caught
    assert not fakes_reachable_from(module, cache)


@pytest.mark.parametrize("how", HOWS)
def test_no_fake_tensor_is_left(how: str) -> None:
    module, cache, x = writing(how), {"k": torch.randn(B, 2, C)}, torch.randn(B, L, C)
    captured(module, x, cache)
    fingerprint(Call(forward_of(module), module, (x, cache), {}))
    assert not fakes_reachable_from(module, cache, x)


def test_the_scan_for_fake_tensors_finds_one() -> None:
    module = writing("attribute")
    fake = captured(Plain(), torch.randn(B, L, C), 1.0, shift=torch.randn(C))
    module.store["layers"][0]["v"] = next(iter(fake.graph_module.graph.nodes)).meta["val"]
    assert fakes_reachable_from(module)


def test_gradients_are_untouched() -> None:
    module = Plain()
    module.fc.weight.grad = torch.ones(C, C)
    captured(module, torch.randn(B, L, C), 2.0, shift=torch.randn(C))
    assert torch.equal(module.fc.weight.grad, torch.ones(C, C))
    assert module.fc.weight.requires_grad


@functools.lru_cache
def angles(length: int, width: int) -> Tensor:
    return torch.arange(float(length)).unsqueeze(1) * torch.ones(width)


class CachedHelper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x * angles(x.shape[1], C).cos())


def test_tensors_in_an_lru_cache_are_real() -> None:
    angles.cache_clear()
    module, x = CachedHelper(), torch.randn(B, L, C)
    stream: Path = (("item", "args"), ("item", 0))
    try:
        call = Call(forward_of(module), module, (x,), {}, stream)
        program = passes.run(Context(call=call, real=reference(call)))
        assert angles.cache_info().currsize == 1
        held = angles(L, C)
        assert type(held) is Tensor
        expected = module(x)
        inputs = live_inputs(call, program.inputs)
        torch.testing.assert_close(program.graph_module(*inputs)[0], expected)
    finally:
        angles.cache_clear()


class Pair:
    """A helper's result that is no container of Python's."""

    def __init__(self, table: Tensor) -> None:
        self.parts = {"cos": table.cos(), "sin": table.sin()}


HELPERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda table: table * 2,
    "tuple": lambda table: (table.cos(), table.sin()),
    "object": Pair,
    "key only": lambda table: table.shape[0],
    "method": lambda table: functools.partial(torch.add, table),
}


@functools.lru_cache
def unrelated(length: int) -> Tensor:
    return torch.ones(length)


class Memoised(nn.Module):
    """Calls a helper that is memoised by tensor, so that each stand-in makes an entry."""

    def __init__(self, helper: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.table = torch.randn(C)
        self.memo = [functools.lru_cache(helper)]

    def forward(self, x: Tensor) -> Tensor:
        self.memo[0](self.table)
        return x + self.table


@pytest.mark.parametrize("helper", HELPERS.values(), ids=HELPERS)
@pytest.mark.parametrize("trace", [captured, lambda *args: print_of(*args)])
def test_only_memos_that_hold_a_stand_in_are_cleared(
    helper: Callable[[Tensor], Any], trace: Callable[..., Any]
) -> None:
    module, x = Memoised(helper), torch.randn(B, L, C)
    (memo,) = module.memo
    unrelated(3)
    held = unrelated.cache_info().currsize
    module(x)
    assert memo.cache_info().currsize == 1
    made = trace(module, x)
    assert memo.cache_info().currsize == 0, "it held a stand-in"
    assert unrelated.cache_info().currsize == held
    module(x)
    assert not fakes_reachable_from(module)
    del made


@pytest.mark.parametrize("trace", [captured, lambda *args: print_of(*args)])
def test_a_memo_filled_by_a_call_that_fails_keeps_no_stand_in(trace: Callable[..., Any]) -> None:
    class Fails(Memoised):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError(super().forward(x).shape)

    module = Fails(HELPERS["tensor"])
    with pytest.raises(RefusedError, match="FVX001"):
        trace(module, torch.randn(B, L, C))
    assert module.memo[0].cache_info().currsize == 0


def test_objects_of_a_package_that_says_so_are_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = types.ModuleType("some_runtime")
    attached = type("Attached", (Holder,), {"__module__": "some_runtime.engine"})()
    attached.k = torch.randn(C)
    monkeypatch.setitem(sys.modules, "some_runtime", runtime)
    assert is_container(attached)
    runtime.__not_state__ = True  # type: ignore[attr-defined]
    assert not is_container(attached)
    module = Plain()
    module.attached = attached
    assert not any("attached" in str(path) for path in Snapshot(roots(module, (), {})).tensors)


def test_a_stand_in_that_stays_elsewhere_is_an_error() -> None:
    held: list[Tensor] = []

    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            held.append(x * 2)
            return x

    with pytest.raises(LeakedTensorError, match=r"keeps a tensor of shape \(2, 4, 6\).*in a list"):
        print_of(Keeps(), torch.randn(B, L, C))


# -- refusals -----------------------------------------------------------------------------------


def test_control_flow_on_values_is_refused_with_the_users_line() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum().item() > 0:
                return x
            return -x

    with pytest.raises(RefusedError) as caught:
        captured(Branches(), torch.randn(B, L, C))
    refusal = caught.value.refusal
    assert refusal.code == "FVX001"
    first = Branches.forward.__code__.co_firstlineno
    assert refusal.where == f"{__file__}:{first + 1}"
    assert "control flow" in refusal.hint


def test_a_truth_value_is_refused_too() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool((x > 0).all()) else -x

    with pytest.raises(RefusedError, match="FVX001"):
        captured(Branches(), torch.randn(B, L, C))


def test_writes_in_place_into_state_stay_in_place() -> None:
    class Fills(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filled = torch.zeros(B, 2 * L, C)

        def forward(self, x: Tensor) -> Tensor:
            self.filled[:, :L] = x
            return x + 1

    module, x = Fills(), torch.randn(B, L, C)
    program = captured(module, x)
    assert not module.filled.any()
    run(program, module, x)
    assert torch.equal(module.filled[:, :L], x)
    assert not module.filled[:, L:].any()


# -- fingerprints -------------------------------------------------------------------------------


class Settings(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(C, settings.pop("width", C))
        self.gain = settings.pop("gain", 0.5)
        self.shift = settings.pop("shift", 1)
        self.activation = settings.pop("activation", F.gelu)
        self.index = settings.pop("index", 0)
        self.drop = settings.pop("drop", 0.1)
        self.eager = settings.pop("eager", False)
        assert not settings

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        h = self.activation(self.fc(x)) * self.gain
        h = F.dropout(h, self.drop, self.training).roll(self.shift, -1)
        if self.eager:
            h = h.clone()
        return x + h.sum(-1, keepdim=True)


def print_of(module: nn.Module, *args: Any) -> Fingerprint:
    args = args or (torch.randn(B, L, C),)
    return fingerprint(Call(forward_of(module), module, args, {}))


def test_equal_blocks_have_equal_fingerprints() -> None:
    first = print_of(Settings().eval())
    assert print_of(Settings().eval()) == first
    assert hash(print_of(Settings().eval())) == hash(first)


@pytest.mark.parametrize(
    "settings", [{"index": 3}, {"drop": 0.3}, {"index": 5, "drop": 0.0}], ids=str
)
def test_what_the_forward_does_not_use_makes_no_difference(settings: dict[str, Any]) -> None:
    assert print_of(Settings(**settings).eval()) == print_of(Settings().eval())


@pytest.mark.parametrize(
    "settings",
    [
        {"gain": 0.25},
        {"shift": 2},
        {"width": 7},
        {"activation": F.relu},
        {"activation": functools.partial(F.gelu, approximate="tanh")},
        {"eager": True},
    ],
    ids=["gain", "shift", "width", "activation", "partial-activation", "eager"],
)
def test_what_the_forward_uses_makes_a_difference(settings: dict[str, Any]) -> None:
    assert print_of(Settings(**settings).eval()) != print_of(Settings().eval())


def test_inputs_make_a_difference() -> None:
    module = Settings().eval()
    first = print_of(module)
    assert print_of(module, torch.randn(B, L + 1, C)) != first
    assert print_of(module, torch.randn(B + 1, L, C)) != first
    assert print_of(module.double(), torch.randn(B, L, C).double()) != first


def test_reading_another_place_makes_a_difference() -> None:
    class Reads(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.a, self.b = torch.randn(C), torch.randn(C)
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = x + getattr(self, self.name)
            return result

    assert print_of(Reads("a")) != print_of(Reads("b"))


@pytest.mark.parametrize("how", HOWS)
def test_what_is_written_makes_a_difference(how: str) -> None:
    cache = {"k": torch.randn(B, 2, C)}
    x = torch.randn(B, L, C)
    prints = {other: print_of(writing(other), x, shallow(cache)) for other in HOWS}
    assert print_of(writing(how), x, cache) == prints.pop(how)
    again = print_of(writing(how), x, cache)
    assert all(again != other for other in prints.values())
