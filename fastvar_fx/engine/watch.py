"""Notices whole generations that pass without a pruned step, where the schedule has some."""

from __future__ import annotations

from typing import NoReturn

from fastvar_fx.errors import RunError
from fastvar_fx.schedule import Schedule


class Watch:
    """The token counts of the generations that ended without a pruned step."""

    def __init__(self, schedule: Schedule, pruned_steps: tuple[int, ...]) -> None:
        self._wanted = [schedule.length(step) for step in pruned_steps]
        self._known = {schedule.length(step) for step in range(schedule.steps)}
        self._structure = {schedule.length(step) for step in range(schedule.cache_step)}
        self._cached = schedule.length(schedule.cache_step)
        self._current: list[int] = []
        self._ended: list[list[int]] = []
        self._raised = False
        self._pruned = False

    def pruned(self) -> None:
        """Notes a pruned step: all lengths of this generation are then known to be the loop's."""
        self._pruned = True
        if self._current or self._ended or self._raised:
            self._known.update(self._current, *self._ended)
            self._current, self._ended, self._raised = [], [], False

    def cut_off(self) -> None:
        """Notes that the generation was ended by hand."""
        self._current = []

    def saw(self, tokens: int) -> None:
        """Notes a dense call or the cache step.

        A length that comes back means that another generation began.

        Raises:
            RunError: If generations end without a pruned step. If their lengths are not the
                schedule's, at the end of the first one and during those after it; else after three
                equal ones at the very first, because they may have been cut off.
        """
        if self._current and tokens == self._current[-1]:
            return
        if tokens not in self._current:
            self._current.append(tokens)
            if self._raised and self._strays(self._current):
                self._raise(self._current)
            return
        ended = self._current
        self._ended, self._current = [*self._ended[-2:], ended], [tokens]
        a, *others = self._ended
        alike = len(others) == 2 and others == [a, a] and not self._pruned
        if self._strays(ended) or ((alike or self._raised) and not self._captured(ended)):
            self._raise(ended)

    def _raise(self, seen: list[int]) -> NoReturn:
        self._current, self._ended, self._raised = [], [], True
        raise RunError(
            f"the schedule prunes steps of {self._wanted} tokens, but a generation had none: its "
            f"blocks saw {seen} tokens. Give the schedule that the loop runs"
        )

    def _strays(self, seen: list[int]) -> bool:
        """Whether a generation of these lengths does not run the schedule."""
        strange = [length for length in self._drawn(seen) if length not in self._known]
        return len(strange) >= (1 if self._captured(seen) else 2)

    def _captured(self, seen: list[int]) -> bool:
        """Whether a generation came to the cache step; it may have been cut off after that."""
        drawn = self._drawn(seen)
        return drawn[0] in self._structure and self._cached in drawn

    def _drawn(self, seen: list[int]) -> list[int]:
        """What comes from the first structure step on; source tokens come before."""
        begun = [i for i, length in enumerate(seen) if length in self._structure]
        return seen[begun[0] :] if begun else seen
