"""One call of a transformed block: read once, then passed to all that handle it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastvar_fx.engine.guidance import Unguided
from fastvar_fx.engine.structure import Structure
from fastvar_fx.engine.token_map import find_token_map, naming_leaks
from fastvar_fx.engine.track import Captured, Storages, storages
from passes import Call, RowDim
from passes.trace.state import Path, Roots, roots

if TYPE_CHECKING:
    from fastvar_fx.engine.program import Match

Forward = Callable[..., Any]
"""A block's own forward, as a function of the block and the call's arguments."""
Form = tuple[int, tuple[str, ...]]
"""How a call is written: the number of positional arguments and the names of the others."""
TokenMaps = dict[Forward, dict[Form, Path]]
"""Where calls have their token maps, by the forward and the form of the call."""


class BlockSite:
    """A transformed block: where it is in the model, and its programs.

    Attributes:
        layer: Its index among the blocks.
        name: Its module path in the model.
        forward: Its own forward.
        prunes: Whether the schedule prunes it.
        programs: Its programs by step; they hold while the block is built as it was.
        paths: Where the token map is, by the forms of calls met so far.
        row_dims: Which dims of its inputs range over the batch, as far as they were looked for.
    """

    def __init__(
        self, layer: int, name: str, forward: Forward, maps: TokenMaps, *, prunes: bool
    ) -> None:
        self.layer = layer
        self.name = name
        self.forward = forward
        self.prunes = prunes
        self.programs: dict[int, list[Any]] = {}
        self._structure: Structure | None = None
        self.paths = maps.setdefault(forward, {})
        self.row_dims: dict[Path, RowDim] = {}

    def use_forward(self, forward: Forward) -> None:
        """Replaces the forward, whose arguments may be other ones."""
        self.forward = forward
        self.paths = {}
        self.programs.clear()
        self.row_dims.clear()

    def check_structure(self, block: nn.Module) -> None:
        """Drops the programs if the block is built in another way than at the last check."""
        structure = Structure.of_block(block)
        if self._structure != structure:
            self.programs.clear()
            self.row_dims.clear()
            self._structure = structure

    def find_path(
        self, form: Form, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Path:
        """Finds out where the (B, L, C) token map is in calls of this form."""
        run = partial(self.forward, block)
        with naming_leaks(self.name):
            path = self.paths[form] = find_token_map(run, block, args, kwargs)
        return path


class BlockCall:
    """One call of a transformed block.

    Attributes:
        site: The block's place in the model.
        block: The live block.
        args: Positional arguments.
        kwargs: Keyword arguments.
        form: How the call is written.
        path: Where the token map is among the arguments.
        x: The token map (B, L, C).
        tokens: Its token count L.
        selection: What another block has selected for this step; None to select anew.
        unguided: The step that it runs without guidance; None for one with guidance.
        compiling: Whether `torch.compile` traces the call: then nothing may be noted or made.
        matched: What `match` found.
    """

    def __init__(
        self,
        site: BlockSite,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        compiling: bool = False,
    ) -> None:
        self.site = site
        self.block = block
        self.args = args
        self.kwargs = kwargs
        self.form: Form = (len(args), tuple(kwargs))
        path = site.paths.get(self.form) or site.find_path(self.form, block, args, kwargs)
        self.path = path
        (_, root), (_, key) = path
        self.x: Tensor = args[key] if root == "args" else kwargs[key]
        self.tokens: int = self.x.shape[1]
        self.selection: Sequence[Tensor] | None = None
        self.unguided: Unguided | None = None
        self.compiling = compiling
        self.matched: Match | None = None
        self._reads: Storages | None = None

    def match(self, step: int) -> Match | None:
        """Returns the program of a step that holds for this call, and its inputs, if there is one.

        Args:
            step: The step that the call is at; one call is at one step.
        """
        if self.matched is None:
            for program in self.site.programs.get(step, ()):
                inputs = program.inputs_of(self)
                if inputs is not None:
                    self.matched = (program, inputs)
                    break
        return self.matched

    def reads(self) -> Storages:
        """Returns the memory of the arguments besides the token map, as they were at first."""
        if self._reads is None:
            self._reads = storages((self.args, self.kwargs), self.x)
        return self._reads

    def roots(self) -> Roots:
        """Returns what paths start from."""
        return roots(self.block, self.args, self.kwargs)

    def as_captured(self) -> Call:
        """Returns the call as the compiler takes it."""
        run = partial(self.site.forward, self.block)
        return Call(run, self.block, self.args, self.kwargs, self.path)

    def left(self, captured: Captured) -> Captured:
        """Returns what the call needs of captured outputs, which may be of the whole batch."""
        if self.unguided is None:
            return captured
        rows, batch = RowDim(0).rows(self.unguided.half), len(self.x)
        return {i: rows.of(x) if len(x) == batch else x for i, x in captured.items()}
