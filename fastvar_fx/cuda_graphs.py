"""A whole generation recorded as a CUDA graph, and replayed for each image.

A generation launches thousands of small kernels, one after another from Python; a replay launches
them all at once. What is recorded is the work on the GPU, on the memory that it was recorded on: so
inputs are copied into buffers of the recording, weights have to stay where they are, and plain
values, as well as all that the loop does in Python, stay what they were.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.find_blocks import reachable
from fastvar_fx.errors import FastVARError, GraphError, ModelError, user_line
from fastvar_fx.transform import reset, trace
from passes.trace.state import Snapshot, roots

Run = Callable[..., Any]
"""(fast, *inputs) -> what a generation returns: tensors, also in tuples, lists and dicts."""

_SEED: Final = 0x5EED_FA57
"""What the generators are seeded with while recording; no loop is likely to use the same."""

_WAITS: Final = "called a synchronizing CUDA operation"
"""What torch says of an op that waits for the GPU, where that is forbidden."""


def cuda_graph(fast: nn.Module, run: Run, *inputs: Any) -> Recording:
    """Records one generation as a CUDA graph; what comes back replays it with other inputs.

    The run is made twice before, which traces and compiles what was not yet, and a third time to be
    recorded. The model can be used as before, alone or between replays. The recording keeps the
    memory of a whole generation as long as it lives.

    Args:
        fast: A transformed model on one CUDA device, compiled or not.
        run: Runs one generation, (fast, *inputs) -> images. It works on the GPU alone, must not
            wait for it (`.item()`, `.cpu()`, boolean indexing), and seeds no generator.
        *inputs: Examples of what the run takes: tensors on that device, also in tuples, lists and
            dicts. A replay copies other ones of their shape, dtype and device into their place.
            Generators and plain values are part of the recording.

    Raises:
        ModelError: If `fast` is not transformed, or in training mode.
        GraphError: If there is no CUDA device, or the run cannot be recorded: it names the line
            that waits for the GPU, what draws numbers past the recording, or the memory that was
            asked for. The model is then as after any generation.

    Example:
        >>> draw = cuda_graph(fast, lambda m, label: m.infer_fhat(4, label), ones)  # doctest: +SKIP
        >>> images = draw(twos, seed=7)  # doctest: +SKIP
    """
    return Recording(fast, run, inputs, CudaGraph(_device_of(fast)))


class Recording:
    """A recorded generation. A call replays it; `cuda_graph` makes one.

    One replay at a time: all of them run on the same memory.
    """

    def __init__(
        self, fast: nn.Module, run: Run, inputs: tuple[Any, ...], graph: CudaGraph
    ) -> None:
        _check_compiled(fast)
        self._fast = fast
        self._graph = graph
        self._inputs = _Inputs(inputs, graph.device)
        self._generators = _generators(fast, inputs, graph)
        with torch.no_grad():
            self._output, self._state = self._record(run)
        self._weights = _Weights(fast)

    def __call__(self, *inputs: Any, seed: int | None = None) -> Any:
        """Replays the generation and returns a copy of what it drew.

        Args:
            *inputs: As recorded: tensors of the same shapes, dtypes and device, and the same plain
                values.
            seed: Draws as if the device's generator, the model's and those among the inputs had
                just been seeded with it; they are left as they were. None goes on drawing.

        Raises:
            GraphError: If an input does not fit the recording, or weights have been moved or
                replaced since; new values in their place are fine.
            ModelError: If the model is in training mode.
        """
        if self._fast.training:
            raise ModelError(
                f"{type(self._fast).__name__} is in training mode, but was recorded in eval mode; "
                f"call eval() first"
            )
        self._weights.check()
        with torch.no_grad(), _seeded(self._generators, seed):
            self._inputs.fill(inputs)
            self._graph.replay()
            return pytree.tree_map_only(Tensor, torch.clone, self._output)

    def _record(self, run: Run) -> tuple[Any, Snapshot]:
        """Returns the memory that holds the result after a replay, and the state it starts from."""

        def generate(fast: nn.Module = self._fast) -> Any:
            return run(fast, *self._inputs.values)

        try:
            with _seeded(self._generators, _SEED):
                self._graph.warm_up(lambda: trace(self._fast, generate))
            state = Snapshot(roots(self._fast, (), {}))
            with _seeded(self._generators, _SEED), _restored(state):
                self._rehearse(generate)
            # What the loop leaves then lies in the graph's memory, and is not computed yet.
            with _seeded(self._generators, _SEED), _restored(state):
                output = self._capture(generate)
            _check_output(output, self._graph.device)
        except BaseException:
            reset(self._fast)
            raise
        return output, state

    def _rehearse(self, generate: Callable[[], Any]) -> None:
        """Runs what would break a capture, which CUDA does not always recover from."""
        try:
            self._graph.rehearse(generate)
        except RuntimeError as error:
            if _WAITS not in str(error):
                raise
            raise GraphError(
                f"the run waits for the GPU{_at_users_line(error)}, which a CUDA graph cannot: "
                f".item(), .cpu(), print, nonzero, boolean indexing and torch.tensor(..., device=) "
                f"do. Keep the value on the GPU, or work it out before the run or after it"
            ) from error
        if any(generator.initial_seed() != _SEED for generator in self._generators):
            raise GraphError(
                "the run seeds a generator, so that all replays would draw the same; leave its "
                "seed out (None in most loops) and pass seed= to the replay"
            )

    def _capture(self, generate: Callable[[], Any]) -> Any:
        try:
            return self._graph.capture(generate, self._generators)
        except FastVARError:
            raise
        except RuntimeError as error:
            message = _why_not(error)
            traceback.clear_frames(error.__traceback__)  # their tensors hold the graph's memory
            raise GraphError(message) from error


class CudaGraph:
    """The part that needs a GPU: runs of a generation, of which one is captured and replayed.

    Attributes:
        device: Where it runs.
        default_generator: The device's own generator; a graph counts its draws by itself.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            here = "move the model there" if torch.cuda.is_available() else "torch finds none here"
            raise GraphError(
                f"a CUDA graph needs the model on a CUDA device; it is on {device}, and {here}. "
                f"Elsewhere, call the model itself"
            )
        self.device = device
        self.default_generator = torch.cuda.default_generators[device.index]
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, call: Callable[[], Any]) -> None:
        """Runs it for the first time, when libraries set themselves up and code is compiled."""
        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            call()
        current.wait_stream(side)

    def rehearse(self, call: Callable[[], Any]) -> None:
        """Runs it such that an op raises a RuntimeError if it waits for the GPU."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        try:
            self.warm_up(call)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def capture(self, call: Callable[[], Any], generators: Sequence[torch.Generator]) -> Any:
        """Captures what it does on the GPU; its result holds nothing until the first replay.

        Args:
            call: A generation, which has run before.
            generators: What it may draw from.
        """
        for generator in generators:
            if generator is not self.default_generator:
                self._graph.register_generator_state(generator)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        failure: BaseException | None = None
        torch.clear_autocast_cache()  # casts made before would be freed under the graph
        try:
            # The outer context gives the stream back even where the capture cannot be ended. Other
            # threads may go on with calls that are no part of this capture.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
            ):
                try:
                    return call()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            self._graph.reset()
            if failure is None or error is failure:
                raise
            failure.add_note(
                f"CUDA did not end the capture either ({_first_line(error)}): its calls may fail "
                f"in this process from now on; start a new one"
            )
            raise failure from None
        finally:
            torch.clear_autocast_cache()

    def replay(self) -> None:
        """Launches what was captured, on the current stream."""
        self._graph.replay()


class _Inputs:
    """The inputs of a recording: tensors in memory of their own, and plain values."""

    def __init__(self, inputs: tuple[Any, ...], device: torch.device) -> None:
        named, self._spec = pytree.tree_flatten_with_path(inputs)
        self._names = [pytree.keystr(path) for path, _ in named]
        for name, (_, leaf) in zip(self._names, named, strict=True):
            if isinstance(leaf, Tensor) and leaf.device != device:
                raise GraphError(
                    f"input {name} is {_describe(leaf)}, but the generation runs on {device}; move "
                    f"it there. What the loop reads on the host is given as plain values"
                )
        # As normal tensors they can be written to in any mode.
        with torch.inference_mode(False), torch.no_grad():
            self._leaves = [_copied(leaf) for _, leaf in named]

    @property
    def values(self) -> tuple[Any, ...]:
        """What the run is called with, in containers of its own."""
        return tuple(pytree.tree_unflatten(self._leaves, self._spec))

    def fill(self, inputs: tuple[Any, ...]) -> None:
        """Copies other tensors into the place of the recorded ones.

        Raises:
            GraphError: If they are not like the recorded ones; nothing is copied then.
        """
        leaves, spec = pytree.tree_flatten(inputs)
        if spec != self._spec:
            raise GraphError(
                f"recorded with inputs {', '.join(self._names) or '()'}, {self._spec}\n"
                f"found {spec}\nGive inputs of the recorded structure"
            )
        for name, was, now in zip(self._names, self._leaves, leaves, strict=True):
            _check_like(name, was, now)
        for was, now in zip(self._leaves, leaves, strict=True):
            if isinstance(was, Tensor):
                was.copy_(now)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _check_like(name: str, was: Any, now: Any) -> None:
    if isinstance(was, Tensor) and isinstance(now, Tensor):
        if (was.shape, was.dtype, was.device) == (now.shape, now.dtype, now.device):
            return
        hint = "A recording holds for one shape, dtype and device"
    elif not isinstance(was, Tensor) and (now is was or (type(now) is type(was) and now == was)):
        return
    else:
        hint = "Plain values and generators are part of a recording"
    raise GraphError(
        f"input {name} was recorded as {_describe(was)}; found {_describe(now)}. {hint}: give the "
        f"like, or record another with fastvar_fx.cuda_graph"
    )


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"


class _Weights:
    """The memory of all parameters and buffers, which a graph goes on reading."""

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (f"{path}.{name}".removeprefix("."), registry, name, _place(tensor))
            for path, module in reachable(model)
            for registry in (module._parameters, module._buffers)
            for name, tensor in registry.items()
            if tensor is not None
        ]

    def check(self) -> None:
        """Checks that they are where they were.

        Raises:
            GraphError: If not.
        """
        moved = [
            path
            for path, registry, name, was in self._places
            if (tensor := registry.get(name)) is None or _place(tensor) != was
        ]
        if moved:
            others = f" and {len(moved) - 1} others" if len(moved) > 1 else ""
            raise GraphError(
                f"{moved[0]}{others} was moved, cast or replaced since the recording, which reads "
                f"the old memory; record anew with fastvar_fx.cuda_graph. Loading other values in "
                f"place, as load_state_dict does, keeps a recording valid"
            )


def _place(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape


@contextmanager
def _seeded(generators: Sequence[torch.Generator], seed: int | None) -> Iterator[None]:
    """Generators seeded anew, and put back as they were; without a seed they are left alone."""
    if seed is None:
        yield
        return
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def _restored(state: Snapshot) -> Iterator[None]:
    """A run after which the model's attributes are what they were."""
    try:
        yield
    finally:
        state.restore()


def _generators(
    fast: nn.Module, inputs: tuple[Any, ...], graph: CudaGraph
) -> list[torch.Generator]:
    """Returns the generators on the device that a run can draw from, each once."""
    held = [value for _, module in reachable(fast) for value in vars(module).values()]
    found = [graph.default_generator, *held, *pytree.tree_leaves(inputs)]
    unique = {id(value): value for value in found if isinstance(value, torch.Generator)}
    return [generator for generator in unique.values() if generator.device == graph.device]


def _device_of(fast: nn.Module) -> torch.device:
    Engine.of(fast)
    devices = {parameter.device for parameter in fast.parameters()}
    if len(devices) > 1:
        raise GraphError(
            f"a CUDA graph is of one device; {type(fast).__name__} lies on "
            f"{', '.join(sorted(map(str, devices)))}"
        )
    return devices.pop()


def _check_compiled(fast: nn.Module) -> None:
    if Engine.of(fast).executor.makes_cuda_graphs:
        raise GraphError(
            "the model is compiled with options that make torch.compile record CUDA graphs of its "
            "own, which cannot be recorded in another; compile it without them, or with "
            'mode="max-autotune-no-cudagraphs"'
        )


def _check_output(output: Any, device: torch.device) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if not tensors:
        raise GraphError(
            f"the run returned no tensor but {type(output).__name__}; return what it draws"
        )
    elsewhere = {str(tensor.device) for tensor in tensors if tensor.device != device}
    if elsewhere:
        raise GraphError(
            f"the run returned a tensor on {', '.join(elsewhere)}, which no replay on {device} "
            f"writes to; return it as it is on the GPU, and move what the replay returns"
        )


def _why_not(error: RuntimeError) -> str:
    """Returns why a run could not be captured, and what to do."""
    if isinstance(error, torch.OutOfMemoryError):
        asked = str(error).partition(" Including")[0]
        reason = (
            f"no memory for the recording{_at_users_line(error)}: {asked} A recording takes what a "
            f"whole generation does, apart from all other memory. Delete other recordings, or "
            f"record a smaller batch. Its memory was freed, and the model runs without it"
        )
    elif "CUDAGenerator" in str(error) or "CUDA generator" in str(error):
        reason = (
            f"the run makes or seeds a generator, or draws from one that is neither the device's, "
            f"an attribute of the model's modules, nor an input{_at_users_line(error)}: "
            f"{_first_line(error)}\nLeave the loop's seed out (None in most loops) and pass seed= "
            f"to the replay"
        )
    else:
        reason = (
            f"the run could not be recorded{_at_users_line(error)}: {_first_line(error)}\nA CUDA "
            f"graph takes nothing but work on its GPU; do the rest before the run or after it"
        )
    return "\n".join([reason, *getattr(error, "__notes__", ())])


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _at_users_line(error: BaseException) -> str:
    """Returns where the innermost line of the model's or the user's code is, if there is one."""
    line = user_line(error)
    return f" at {line}" if line else ""
