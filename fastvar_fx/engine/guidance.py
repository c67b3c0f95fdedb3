"""Steps without guidance: what the loop computes of both halves of a batch becomes one.

At these steps each block runs the conditional half and hands its output to both. What follows the
last block may still differ, as a head does that reads the class: its modules get their output for
the conditional half handed to both halves too. Blocks return (2B, L, C); a head may return its rows
along any dim, which is found by running it on the conditional half alone, as both halves.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvar_fx.errors import RunError, raise_to_compiler
from passes import Call, Half
from passes.trace.calls import undone
from passes.verify import check_translation, largest_difference

if TYPE_CHECKING:
    from fastvar_fx.engine.call import BlockCall
    from fastvar_fx.engine.family import Family
    from fastvar_fx.engine.prefix import Around

_ROUNDING: Final = 1 / 64
"""Largest difference of two equal maps, relative to the largest value, in any dtype."""


WITHOUT_GUIDANCE: Final = (
    "A loop without guidance, or with a call of the blocks for each half, takes a schedule without "
    "guidance_until: it can leave out the unconditional rows or calls at late steps by itself"
)
"""What to do where a batch has no two halves."""


class Unguided(NamedTuple):
    """A step without guidance.

    Attributes:
        step: Its index.
        half: The conditional rows of the batch.
        tokens: The token counts of its map, and of all that blocks get.
        width: The width C of the token map.
    """

    step: int
    half: Half
    tokens: tuple[int, int]
    width: int


def check_halves(call: BlockCall, at: Unguided, around: Around) -> None:
    """Checks that both halves of a batch hold the same token map, as guidance has it.

    On a GPU it is checked without waiting for it: a failure is an error of the device.

    Raises:
        RunError: If they differ: there is no guidance.
    """
    before, after = around
    tokens = call.x[:, before : call.tokens - after]
    one, other = tokens.chunk(2)
    difference, largest = (one - other).abs().amax(), one.abs().amax()
    alike = difference <= _ROUNDING * largest
    message = (
        f"{call.site.name} at step {at.step}: guidance_until takes the first and the second half "
        f"of the batch of {len(call.x)} for the same images with and without condition, but they "
        f"hold different token maps. {WITHOUT_GUIDANCE}"
    )
    if not call.x.is_cpu or call.compiling:
        torch._assert_async(alike, message)
    elif not alike:
        raise RunError(message)


class Layout(NamedTuple):
    """Where a tensor has the rows of the batch.

    Attributes:
        dim: A dim as long as the batch, or a multiple of it.
        inner: Whether the entries of each row lie apart, as in (L * B, C).
    """

    dim: int
    inner: bool = False


_BATCH_FIRST: Final = Layout(0)


class OneHalf:
    """A hook of a module outside the blocks.

    At steps without guidance it hands the module's output for the conditional half to both halves.
    """

    def __init__(self, family: Family, name: str, *, runs_blocks: bool) -> None:
        """Makes a hook.

        Args:
            family: The engines of the model.
            name: The path of the module.
            runs_blocks: Whether it runs blocks, and so cannot be run once more.
        """
        self._family = family
        self._name = name
        self._runs_blocks = runs_blocks
        self._known: dict[Any, Sequence[Layout | None]] = {}

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Returns the output, of which both halves are the conditional one."""
        at = self._family.current.generation.unguided
        if at is None:
            return output
        leaves, spec = pytree.tree_flatten(output)
        layouts: Sequence[Layout | None] = [_usual_layout(leaf, at) for leaf in leaves]
        if any(_is_uncertain(leaf, at) for leaf in leaves) and not self._runs_blocks:
            layouts = self._layouts(module, args, kwargs, leaves, at) or layouts
        halves = [
            leaf if layout is None else _hand_over(leaf.clone(), layout, at.half)
            for leaf, layout in zip(leaves, layouts, strict=True)
        ]
        return pytree.tree_unflatten(halves, spec)

    def _layouts(
        self, module: nn.Module, args: Any, kwargs: Any, leaves: Sequence[Any], at: Unguided
    ) -> Sequence[Layout | None]:
        """Returns where outputs have the rows of the batch; nothing if it reads no token map.

        Raises:
            RunError: If an output differs by row, but along which dim is unknown.
        """
        read = list(filter(_is_tensor, pytree.tree_leaves((args, kwargs))))
        if not any(_is_map(tensor, at) for tensor in read):
            return ()
        form = (at.half.batch, *(tuple(x.shape) for x in (*read, *filter(_is_tensor, leaves))))
        if form in self._known:
            return self._known[form]
        if torch.compiler.is_compiling():
            raise_to_compiler(
                f"along which dim outputs of {self._name} have the rows of the batch is unknown; "
                f"run fastvar_fx.trace(model, run) with these shapes before torch.compile"
            )
        made, certain = _made_of_one_half(Call(module.forward, module, args, kwargs), at)
        found = [_usual_layout(leaf, at) for leaf in leaves]
        for place, leaf in enumerate(leaves):
            if _is_uncertain(leaf, at):
                found[place], sure = self._found(leaf, made[place], at) if made else (None, True)
                certain = certain and sure
        if certain:
            self._known[form] = found
        return found

    def _found(self, output: Tensor, wanted: Tensor, at: Unguided) -> tuple[Layout | None, bool]:
        """Returns where an output has the rows, and whether it is the only place that it may be."""
        handed = {None: output} | {
            layout: _hand_over(output.clone(), layout, at.half)
            for layout in _possible_layouts(output.shape, at.half.batch)
        }
        off = {layout: largest_difference(each, wanted) for layout, each in handed.items()}
        best = min(off, key=lambda layout: off[layout])
        if check_translation([handed[best]], [wanted]) is not None:
            raise RunError(
                f"{self._name} returns {tuple(output.shape)} at step {at.step}, which has no "
                f"guidance, and its output for the conditional half of the batch of "
                f"{at.half.batch} is to be handed to both halves. It depends on the condition, but "
                f"along which dim it has the rows of the batch is unknown. Return (2B, L, ...) "
                f"from it, or leave guidance_until out of the schedule"
            )
        return best, list(off.values()).count(off[best]) == 1


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _usual_layout(value: Any, at: Unguided) -> Layout | None:
    """Returns the layout of a value that has the shape (2B, L, ...)."""
    batch = at.half.batch
    usual = _is_tensor(value) and value.dim() >= 3 and value.shape[0] == batch
    return _BATCH_FIRST if usual and value.shape[1] in at.tokens else None


def _is_uncertain(value: Any, at: Unguided) -> bool:
    """Whether the shape of a value does not tell the dim of the rows of the batch."""
    if not _is_tensor(value):
        return False
    return _usual_layout(value, at) is None or value.shape[1] == at.half.batch


def _is_map(value: Tensor, at: Unguided) -> bool:
    """Whether a value is a token map of the whole batch."""
    shape, batch = value.shape, at.half.batch
    if value.numel() in [batch * count * at.width for count in at.tokens]:
        return True
    if len(shape) < 3 or shape[0] != batch:
        return False
    sides = (math.prod(shape[1:-1]), math.prod(shape[2:]) if len(shape) > 3 else 0)
    return not {shape[1], *sides}.isdisjoint(at.tokens)


def _row_dim(value: Tensor, at: Unguided) -> int | None:
    """Returns the first dim of a value that is as long as the batch, or as all its tokens."""
    batch = at.half.batch
    sizes = (batch, *(batch * count for count in at.tokens))
    return next((dim for dim, size in enumerate(value.shape) if size in sizes), None)


def _possible_layouts(shape: torch.Size, batch: int) -> Iterator[Layout]:
    for dim, size in enumerate(shape):
        if size and size % batch == 0:
            yield Layout(dim)
            if size > batch:
                yield Layout(dim, inner=True)


def _hand_over(value: Tensor, layout: Layout, half: Half) -> Tensor:
    """Overwrites the rows of a value that are dropped with those that are left."""
    sizes = (-1, half.batch) if layout.inner else (half.batch, -1)
    rows, dim = torch.unflatten(value, layout.dim, sizes), layout.dim + layout.inner
    dropped = half.dropped
    kept = rows.narrow(dim, half.first, half.count)
    rows.narrow(dim, dropped.first, dropped.count).copy_(kept)
    return value


def _made_of_one_half(call: Call, at: Unguided) -> tuple[list[Any], bool]:
    """Runs a call in which both halves of all that it reads are the conditional one.

    Returns:
        What it returns, or nothing if these halves are alike already; and whether they differ, or
        never do because it reads token maps alone.
    """
    fixed = {id(tensor) for tensor in (*call.module.parameters(), *call.module.buffers())}
    alike = only_maps = True
    with torch.no_grad(), undone(call) as trial:
        for path, tensor in trial.snapshot.tensors.items():
            dim = _row_dim(tensor, at)
            if dim is None or id(tensor) in fixed:
                continue
            copy = _hand_over(trial.copy_of(path, tensor), Layout(dim), at.half)
            alike = alike and torch.equal(copy, tensor)
            only_maps = only_maps and _is_map(tensor, at)
        made = [] if alike else pytree.tree_leaves(trial.run())
    return made, only_maps or not alike


def hook(fast: nn.Module, family: Family, blocks: Iterable[nn.Module]) -> None:
    """Puts the hook on the modules of a transformed model that are in no block."""
    inside = {part for block in blocks for part in block.modules()}
    for name, module in fast.named_modules():
        if module in inside:
            continue
        for hooks in ("_forward_hooks", "_forward_hooks_with_kwargs"):
            # A copy may share its hooks with the original.
            object.__setattr__(module, hooks, OrderedDict(getattr(module, hooks)))
        runs_blocks = not inside.isdisjoint(module.modules())
        one_half = OneHalf(family, name or type(fast).__name__, runs_blocks=runs_blocks)
        module.register_forward_hook(one_half, with_kwargs=True)
