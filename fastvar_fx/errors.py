"""The errors that users meet. Every message says what was asked, what was found, what to do."""

from __future__ import annotations


class FastVARError(Exception):
    """Base of all errors of this package."""


class ArgumentError(FastVARError, ValueError):
    """An argument that is unknown, out of its range, or does not fit the others."""


class ScheduleError(FastVARError, ValueError):
    """A schedule that contradicts itself, or cannot be read."""


class ModelError(FastVARError, ValueError):
    """A model that cannot be loaded or transformed: no blocks, training mode, transformed twice."""


class RunError(FastVARError, RuntimeError):
    """A generation that does not follow the schedule."""


class CaptureMismatchError(RunError):
    """Captured features that do not fit the live call: another batch, dtype or device."""


class CompileError(FastVARError, RuntimeError):
    """A program or a block's forward that torch.compile cannot compile."""


class GraphError(FastVARError, RuntimeError):
    """A generation that no CUDA graph can record, or a replay that does not fit the recording."""


class NothingPrunedError(FastVARError, RuntimeError):
    """A schedule that prunes, and a model or run in which nothing could be."""
