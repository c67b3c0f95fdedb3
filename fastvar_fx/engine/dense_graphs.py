"""Traced graphs of dense calls, for forwards that `torch.compile` cannot take."""

from __future__ import annotations

from dataclasses import dataclass, field

import passes
from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.program import Match, Program
from fastvar_fx.engine.structure import Structure
from passes.refusal import RefusedError


@dataclass
class _Known:
    """The programs of one block, which hold while it is built as it was."""

    structure: Structure
    programs: list[Program] = field(default_factory=list)


class DenseGraphs:
    """Programs of dense calls, made once for equal blocks.

    A forward may compute positions with NumPy, which Dynamo turns into tensors; a trace keeps the
    numbers.
    """

    def __init__(self) -> None:
        self._made: list[tuple[passes.Fingerprint, passes.StepProgram]] = []
        self._known: dict[str, _Known] = {}

    def program_for(self, call: BlockCall) -> Match | None:
        """Returns a program that holds for a call, and its inputs; None if it cannot be traced."""
        structure = Structure.of_block(call.block)
        known = self._known.get(call.site.name)
        if known is None or known.structure != structure:
            known = self._known[call.site.name] = _Known(structure)
        for program in known.programs:
            inputs = program.inputs_of(call)
            if inputs is not None:
                return program, inputs
        try:
            made = self._made_for(call.as_captured())
        except (RefusedError, passes.LeakedTensorError):
            return None
        program = Program(made, call, None)
        known.programs.append(program)
        return program, program.inputs(call)

    def _made_for(self, call: passes.Call) -> passes.StepProgram:
        mark = passes.fingerprint(call)
        for other, made in self._made:
            if other == mark:
                return made.moved(other, mark)
        context = passes.Context(call=call, real=passes.reference(call))
        made = passes.run(context, passes.TRANSLATION)
        self._made.append((mark, made))
        return made
