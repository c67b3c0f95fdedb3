"""Forwards set on blocks, on the modules inside them and on the model, as patches and hooks do."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
from torch import Tensor, nn

from tests.compose.toy import (
    LABELS,
    Block,
    Toy,
    When,
    assert_prunes,
    at_any_time,
    by_hand,
    transformed,
)
from tests.marks import mostly_slow

SCALE = 0.9


class Holder:
    """Holds what a hook needs, as the registries of hooks do."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)
        self.me = self

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return SCALE * vars(self)["old"](*args, **kwargs)


class Callee:
    def __init__(self, module: nn.Module) -> None:
        self.module, self.old = module, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return SCALE * self.old(*args, **kwargs)


def closure(module: Any) -> Any:
    old = module.forward
    return lambda *a, **k: SCALE * old(*a, **k)


def over_an_object(module: Any) -> Any:
    holder = Holder(old=module.forward)
    return lambda *a, **k: SCALE * vars(holder)["old"](*a, **k)


def over_a_dict(module: Any) -> Any:
    held = {"old": [module.forward]}
    return lambda *a, **k: SCALE * held["old"][0](*a, **k)


def over_the_module(module: Any) -> Any:
    held = [(module,)]
    return lambda *a, **k: SCALE * type(held[0][0]).forward(held[0][0], *a, **k)


def over_a_weak_reference(module: Any) -> Any:
    held: Any = weakref.ref(module)
    return lambda *a, **k: SCALE * type(held()).forward(held(), *a, **k)


def over_a_weak_method(module: Any) -> Any:
    held: Any = weakref.WeakMethod(module.forward)
    return lambda *a, **k: SCALE * held()(*a, **k)


def over_a_proxy(module: Any) -> Any:
    held = Holder(proxy=weakref.proxy(module))
    return lambda *a, **k: SCALE * type(module).forward(vars(held)["proxy"], *a, **k)


def default_argument(module: Any) -> Any:
    def forward(*a: Any, old: Any = module.forward, **k: Any) -> Any:
        return SCALE * old(*a, **k)

    return forward


def a_partial(module: Any) -> Any:
    def forward(old: Any, *a: Any, **k: Any) -> Any:
        return SCALE * old(*a, **k)

    return wraps(module.forward)(partial(forward, module.forward))


def method_of_an_object(module: Any) -> Any:
    return Holder(old=module.forward).run


def calling_the_class(module: Any) -> Any:
    return partial(lambda m, *a, **k: SCALE * type(m).forward(m, *a, **k), module)


def a_method(module: Any) -> Any:
    module.old_forward = module.forward
    return types.MethodType(lambda m, *a, **k: SCALE * m.old_forward(*a, **k), module)


WRAPPERS = (
    closure,
    over_an_object,
    over_a_dict,
    over_the_module,
    over_a_weak_reference,
    over_a_weak_method,
    over_a_proxy,
    default_argument,
    a_partial,
    method_of_an_object,
    calling_the_class,
    a_method,
    Callee,
)
wrappers = pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda wrapper: wrapper.__name__)
some_wrappers = pytest.mark.parametrize(
    "wrapper", mostly_slow(WRAPPERS, quick=4), ids=lambda wrapper: wrapper.__name__
)


def wrapping(wrapper: Callable[[Any], Any], *paths: str) -> Callable[[Any], Any]:
    def edit(model: Any) -> Any:
        for path in paths:
            module = model.get_submodule(path)
            module.forward = wrapper(module)
        return model

    return edit


def reads_its_own_weights(fast: Any, edit: Callable[[Any], Any], **how: Any) -> None:
    """Weights set on the transformed model count, not those of the original."""
    other = Toy(seed=1)
    fast.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert_prunes(fast, by_hand(edit(other), **how))


@wrappers
def test_on_the_model_before_transform(wrapper: Callable[[Any], Any]) -> None:
    edit = wrapping(wrapper, "")
    fast = transformed(edit(Toy()))
    assert_prunes(fast, SCALE * by_hand(Toy()))
    other = Toy(seed=1)
    fast.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert_prunes(fast, SCALE * by_hand(other))


@some_wrappers
def test_on_linear_layers_before_transform(wrapper: Callable[[Any], Any]) -> None:
    edit = wrapping(wrapper, "blocks.0.attn.q", "blocks.1.ffn.up")
    fast = transformed(edit(Toy()))
    assert_prunes(fast, by_hand(edit(Toy())))
    reads_its_own_weights(fast, edit)


@some_wrappers
def test_on_blocks_before_transform(wrapper: Callable[[Any], Any]) -> None:
    fast = transformed(wrapping(wrapper, "blocks.0", "blocks.1")(Toy()))
    around: Callable[[Tensor], Tensor] = lambda x: SCALE * x  # noqa: E731
    assert_prunes(fast, by_hand(Toy(), around=around))
    reads_its_own_weights(fast, lambda model: model, around=around)
    for block in fast.blocks:
        del block.forward  # a patch that is taken back
    assert_prunes(fast, by_hand(Toy(seed=1)))


@at_any_time
@pytest.mark.parametrize("path", ["", "blocks.0.attn.q"])
def test_a_closure_at_any_time(when: When, path: str) -> None:
    edit = wrapping(closure, path)
    want = SCALE * by_hand(Toy()) if path == "" else by_hand(edit(Toy()))
    assert_prunes(when(Toy(), edit), want)


def instead(block: Any) -> Any:
    """A forward that does not call the one of the class, but keeps it, to be taken back."""
    block.original_forward = block.forward

    def forward(x: Tensor, cond: Tensor, cache: Any = None) -> Tensor:
        x = x + block.attn(block.norm(x) + cond[:, None], cache)
        out: Tensor = x + 2 * block.ffn(block.ffn_norm(x))
        return out

    return forward


def a_partial_instead(block: Any) -> Any:
    def forward(block: Any, x: Tensor, cond: Tensor, cache: Any = None) -> Tensor:
        x = x + block.attn(block.norm(x) + cond[:, None], cache)
        out: Tensor = x + 2 * block.ffn(block.ffn_norm(x))
        return out

    return partial(forward, block)


def doubled(model: Toy) -> Toy:
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda module, args, out: 2 * out)
    return model


@pytest.mark.parametrize("patch", [instead, a_partial_instead])
def test_a_forward_instead_of_the_class_s_prunes(patch: Callable[[Any], Any]) -> None:
    fast = transformed(wrapping(patch, "blocks.0", "blocks.1")(Toy()))
    assert_prunes(fast, by_hand(doubled(Toy())))
    reads_its_own_weights(fast, doubled)


@at_any_time
@pytest.mark.parametrize("patch", [instead, a_partial_instead])
def test_such_a_forward_prunes_at_any_time(when: When, patch: Callable[[Any], Any]) -> None:
    fast = when(Toy(), wrapping(patch, "blocks.0", "blocks.1"))
    assert_prunes(fast, by_hand(doubled(Toy())))
    wrapping(closure, "blocks.0", "blocks.1")(fast)
    assert_prunes(fast, by_hand(doubled(Toy()), around=lambda x: SCALE * x))
    for block in fast.blocks:
        del block.forward
    assert_prunes(fast, by_hand(Toy()))


def test_a_forward_that_is_put_back() -> None:
    fast = transformed(Toy())
    edit = wrapping(instead, "blocks.0", "blocks.1")
    edit(fast)
    assert_prunes(fast, by_hand(doubled(Toy())))
    for block in fast.blocks:
        block.forward = block.original_forward
    assert_prunes(fast, by_hand(Toy()))


def test_a_copy_keeps_a_forward_that_the_original_gives_back() -> None:
    fast = wrapping(a_partial_instead, "blocks.0", "blocks.1")(transformed(Toy()))
    fast(LABELS)
    copied = copy.deepcopy(fast)
    for block in fast.blocks:
        del block.forward
    assert_prunes(fast, by_hand(Toy()))
    assert_prunes(copied, by_hand(doubled(Toy())))


def test_a_partial_forward_is_deep_copied() -> None:
    fast = transformed(wrapping(a_partial_instead, "blocks.0", "blocks.1")(Toy()))
    fast(LABELS)
    copied = copy.deepcopy(fast)
    for parameter in fast.parameters():
        parameter.zero_()
    assert_prunes(copied, by_hand(doubled(Toy())))


def test_the_first_call_finds_out_without_effects() -> None:
    calls: list[int] = []

    def patch(block: Any) -> Any:
        forward = instead(block)

        def counting(x: Tensor, *args: Any) -> Tensor:
            block.count = getattr(block, "count", 0) + 1
            calls.append(x.shape[1])
            out: Tensor = forward(x, *args)
            return out

        return counting

    model = wrapping(patch, "blocks.0", "blocks.1")(Toy())
    fast = transformed(model)
    steps = fast.steps(LABELS)
    next(steps)
    assert calls == [1] * 4  # each block once to find out, and once
    assert [block.count for block in fast.blocks] == [1, 1]
    assert fast.blocks[0].attn.keys.shape[2] == 1


def test_what_leads_to_no_part_of_the_model_is_shared() -> None:
    seen: list[Tensor] = []
    model: Any = Toy()

    def record(module: nn.Module, args: Any, out: Tensor) -> None:
        seen.append(out)

    def forward(x: Tensor, old: Any = model.head.forward, seen: Any = seen) -> Tensor:
        seen.append(x)
        out: Tensor = old(x)
        return out

    model.head.register_forward_hook(record)
    model.head.forward = forward
    model.act = record
    fast: Any = transformed(model)
    assert fast.act is record
    fast(LABELS)
    assert len(seen) == 10


def test_objects_that_hold_each_other_lead_into_the_copy() -> None:
    model: Any = Toy()
    registry, hook = Holder(module=model), Holder()
    registry.hooks, hook.registry = {"h": hook}, registry  # type: ignore[attr-defined]
    model.registry = registry
    fast: Any = transformed(model)
    assert fast.registry.module is fast
    assert fast.registry.hooks["h"].registry is fast.registry
    assert fast.registry.hooks["h"].me is fast.registry.hooks["h"]
    assert model.registry.hooks["h"].registry is registry


def test_functions_that_share_a_variable_share_it_in_the_copy() -> None:
    model: Any = Toy()
    current: Any = model.head

    def read() -> Any:
        return current

    def write(value: Any) -> None:
        nonlocal current
        current = value

    model.read, model.write = read, write
    fast: Any = transformed(model)
    assert fast.read() is fast.head
    fast.write(3)
    assert fast.read() == 3
    assert model.read() is model.head


def test_an_error_of_a_patched_forward_is_the_user_s() -> None:
    model = Toy()

    def forward(*_: Any) -> Any:
        raise ZeroDivisionError

    model.blocks[0].forward = forward
    fast = transformed(model)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fast(LABELS)
    assert isinstance(model.blocks[0], Block)
