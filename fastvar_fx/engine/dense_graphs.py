"""Traced graphs of dense calls, for forwards that `torch.compile` cannot take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import passes
from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.program import Match, Program, StaysDense
from fastvar_fx.engine.structure import Structure
from passes.refusal import RefusedError

_MOST: Final = 64
"""Structures of a block, and programs of each, that are kept."""


@dataclass
class _Known:
    """The programs of one block, which hold while it is built as it was."""

    structure: Structure
    programs: list[Program | StaysDense] = field(default_factory=list)


class DenseGraphs:
    """Programs of dense calls, made once for equal blocks.

    A forward may compute positions with NumPy, which Dynamo turns into tensors; a trace keeps the
    numbers.
    """

    def __init__(self) -> None:
        self._made: list[tuple[passes.Fingerprint, passes.StepProgram]] = []
        self._known: dict[str, list[_Known]] = {}

    def program_for(self, call: BlockCall) -> Match | None:
        """Returns a program that holds for a call, and its inputs; None if there is none."""
        structure = Structure.of_block(call.block)
        found = self._known.setdefault(call.site.name, [])
        known = next((each for each in found if each.structure == structure), None)
        if known is None:
            known = _Known(structure)  # an edited block, or one with other state
            found.insert(0, known)
            del found[_MOST:]
        for program in known.programs:
            inputs = program.inputs_of(call)
            if inputs is not None:
                return program, inputs
        made = self._program(call)
        if made is None:
            return None
        known.programs.insert(0, made)
        del known.programs[_MOST:]
        return made, made.inputs(call)

    def _program(self, call: BlockCall) -> Program | StaysDense | None:
        """Returns a new program for a call; None if it cannot be traced."""
        try:
            made = self._made_for(call.as_captured())
        except (RefusedError, passes.LeakedTensorError):
            return None
        return Program(made, call, None)

    def _made_for(self, call: passes.Call) -> passes.StepProgram:
        made = self._equal(call)
        if made is None:
            real = passes.reference(call)  # after it, weights may have another dtype
            made = self._equal(call)
        if made is None:
            made = passes.run(passes.Context(call=call, real=real), passes.TRANSLATION)
            self._made.append((passes.fingerprint(call), made))
        return made

    def _equal(self, call: passes.Call) -> passes.StepProgram | None:
        """Returns the program of an equal call, for the places of this one."""
        mark = passes.fingerprint(call)
        equal = ((other, made) for other, made in self._made if other == mark)
        return next((made.moved(other, mark) for other, made in equal), None)
