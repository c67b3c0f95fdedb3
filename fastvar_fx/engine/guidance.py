"""Steps without guidance: what the loop computes of both halves of a batch becomes one.

At these steps each block runs the conditional half and hands its output to both. What follows the
last block may still differ, as a head does that reads the class: its modules get their output for
the conditional half handed to both halves too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvar_fx.errors import RunError
from passes import Half

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
    """

    step: int
    half: Half
    tokens: tuple[int, int]


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


class OneHalf:
    """A hook of modules outside the blocks.

    At steps without guidance it hands their output for the conditional half to both halves.
    """

    def __init__(self, family: Family) -> None:
        self._family = family

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Returns the output, of which both halves are the conditional one."""
        at = self._family.current.generation.unguided
        if at is None:
            return output
        return pytree.tree_map_only(Tensor, lambda value: _one_half(value, at), output)


def _one_half(value: Tensor, at: Unguided) -> Tensor:
    half = at.half
    if value.dim() < 3 or value.shape[0] != half.batch or value.shape[1] not in at.tokens:
        return value
    return value.narrow(0, half.first, half.count).repeat(2, *[1] * (value.dim() - 1))


def hook(fast: nn.Module, family: Family, blocks: Iterable[nn.Module]) -> None:
    """Puts the hook on the modules of a transformed model that are in no block."""
    inside = {part for block in blocks for part in block.modules()}
    one_half = OneHalf(family)
    for module in fast.modules():
        if module not in inside:  # a copy may share its hooks with the original
            object.__setattr__(module, "_forward_hooks", OrderedDict(module._forward_hooks))
            module.register_forward_hook(one_half)
