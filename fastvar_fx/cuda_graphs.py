"""A whole generation, recorded as a CUDA graph and replayed for each image.

A generation launches thousands of small kernels one by one from Python; a replay launches all of
them at once. A graph holds the work of the GPU and the addresses of its memory. So a replay copies
its inputs into the recorded ones, weights must keep their memory, and plain values and everything
that the loop does in Python stay as recorded.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.find_blocks import reachable
from fastvar_fx.errors import FastVARError, GraphError, ModelError, user_line
from fastvar_fx.transform import reset, trace
from passes.trace.state import Snapshot, roots
from passes.user_frames import first_line

Run = Callable[..., Any]
"""(fast, *inputs) -> what a generation returns: tensors, also in tuples, lists and dicts."""

_SEED: Final = 0x5EED_FA57
"""Seed of the generators while recording; a loop is unlikely to use the same."""

_WAITS: Final = "called a synchronizing CUDA operation"
"""Torch's message for an op that waits for the GPU while that is an error."""


def cuda_graph(fast: nn.Module, run: Run, *inputs: Any) -> Recording:
    """Records one generation as a CUDA graph and returns what replays it with other inputs.

    The run is called three times: to trace and compile, to check that it does not wait for the GPU,
    and to be recorded. The model can be used as before, also between replays. The recording keeps
    the memory of a whole generation until it is deleted.

    Args:
        fast: A transformed model on one CUDA device, compiled or not.
        run: Runs one generation, (fast, *inputs) -> images. It uses the GPU only, never waits for
            it (`.item()`, `.cpu()`, boolean indexing), and seeds no generator.
        *inputs: Example inputs of the run: tensors on that device, also in tuples, lists and dicts.
            A replay takes others of the same shape, dtype and device. Generators and plain values
            are part of the recording.

    Raises:
        ModelError: If `fast` is not transformed, or in training mode.
        GraphError: If there is no CUDA device, or the run cannot be recorded. The message names the
            line that waits for the GPU, the generator that is not recorded, or the memory that was
            needed. The model can be used as after any generation.

    Example:
        >>> draw = cuda_graph(fast, lambda m, label: m.infer_fhat(4, label), ones)  # doctest: +SKIP
        >>> images = draw(twos, seed=7)  # doctest: +SKIP
    """
    return Recording(fast, run, inputs, CudaGraph(_device_of(fast)))


class Recording:
    """A recorded generation, made by `cuda_graph`. A call replays it.

    All replays use the same memory, so one replay must end before the next begins.
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
        """Replays the generation and returns a copy of its result.

        Args:
            *inputs: Tensors of the recorded shapes, dtypes and device, and the recorded plain
                values.
            seed: Seed of all generators that the run draws from: the device's, the model's and
                those among the inputs. Their states are restored afterwards. With None they
                continue from their states.

        Raises:
            GraphError: If an input does not fit the recording, or weights were moved or replaced
                since; new values in the same memory are fine.
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
        """Returns the memory of a replay's result, and the state that a replay starts from."""

        def generate(fast: nn.Module = self._fast) -> Any:
            return run(fast, *self._inputs.values)

        try:
            with _seeded(self._generators, _SEED):
                self._graph.warm_up(lambda: trace(self._fast, generate))
            state = Snapshot(roots(self._fast, (), {}))
            for attempt in (self._rehearse, self._capture):
                with _seeded(self._generators, _SEED), ExitStack() as after:
                    # The state that a capture leaves is in the graph's memory, not computed yet.
                    after.callback(state.restore)
                    output = attempt(generate)
            _check_output(output, self._graph.device)
        except BaseException:
            reset(self._fast)
            raise
        return output, state

    def _rehearse(self, generate: Callable[[], Any]) -> None:
        """Finds what would break a capture, from which CUDA does not always recover."""
        try:
            self._graph.rehearse(generate)
        except RuntimeError as error:
            if _WAITS not in str(error):
                raise
            raise GraphError(
                f"the run waits for the GPU{_at_users_line(error)}, which a CUDA graph cannot do. "
                f".item(), .cpu(), print, nonzero, boolean indexing and torch.tensor(..., device=) "
                f"wait. Keep the value on the GPU, or compute it before or after the run"
            ) from error
        if any(generator.initial_seed() != _SEED for generator in self._generators):
            raise GraphError(
                "the run seeds a generator, so all replays would draw the same; give the loop no "
                "seed (None in most loops) and pass seed= to the replay"
            )

    def _capture(self, generate: Callable[[], Any]) -> Any:
        try:
            return self._graph.capture(generate, self._generators)
        except FastVARError:
            raise
        except RuntimeError as error:
            message = _why_not(error)
            traceback.clear_frames(error.__traceback__)  # frees tensors in the graph's memory
            raise GraphError(message) from error


class CudaGraph:
    """The part of a recording that needs a GPU: it captures a generation and replays it.

    Attributes:
        device: The CUDA device.
        default_generator: The device's default generator, which graphs register by themselves.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            here = "move the model there" if torch.cuda.is_available() else "torch finds none here"
            raise GraphError(
                f"a CUDA graph needs the model on a CUDA device; it is on {device}, and {here}. "
                f"On other devices, call the model itself"
            )
        self.device = device
        self.default_generator = torch.cuda.default_generators[device.index]
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, call: Callable[[], Any]) -> None:
        """Runs it for the first time, in which libraries are set up and code is compiled."""
        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            call()
        current.wait_stream(side)

    def rehearse(self, call: Callable[[], Any]) -> None:
        """Runs it so that an op that waits for the GPU raises a RuntimeError."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        try:
            self.warm_up(call)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def capture(self, call: Callable[[], Any], generators: Sequence[torch.Generator]) -> Any:
        """Captures its work on the GPU; the returned tensors hold no values before a replay.

        Args:
            call: A generation that has run before.
            generators: The generators that it may draw from.
        """
        for generator in generators:
            if generator is not self.default_generator:
                self._graph.register_generator_state(generator)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        failure: BaseException | None = None
        torch.clear_autocast_cache()  # casts made before would be freed under the graph
        try:
            # The outer context restores the stream even if the capture cannot be ended. Other
            # threads may make calls that are not part of this capture.
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
                f"CUDA could not end the capture either ({first_line(error)}): CUDA calls of this "
                f"process may fail from now on; start a new process"
            )
            raise failure from None
        finally:
            torch.clear_autocast_cache()

    def replay(self) -> None:
        """Launches the captured work on the current stream."""
        self._graph.replay()


class _Inputs:
    """The inputs of a recording: copies of tensors, and plain values."""

    def __init__(self, inputs: tuple[Any, ...], device: torch.device) -> None:
        leaves, self._spec = pytree.tree_flatten_with_path(inputs)
        self._named = {pytree.keystr(path): leaf for path, leaf in leaves}
        for name, leaf in self._named.items():
            if isinstance(leaf, Tensor) and leaf.device != device:
                raise GraphError(
                    f"input {name} is {_describe(leaf)}, but the generation runs on {device}; move "
                    f"it there. Give values that the loop reads on the host as plain values"
                )
        # Inference tensors could not be written to outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._named = pytree.tree_map_only(Tensor, torch.clone, self._named)

    @property
    def values(self) -> tuple[Any, ...]:
        """The arguments of the run, in new containers."""
        return tuple(pytree.tree_unflatten(self._named.values(), self._spec))

    def fill(self, inputs: tuple[Any, ...]) -> None:
        """Copies other tensors into the recorded ones.

        Raises:
            GraphError: If they do not fit the recorded ones; then nothing is copied.
        """
        leaves, spec = pytree.tree_flatten(inputs)
        if spec != self._spec:
            raise GraphError(
                f"recorded with inputs {', '.join(self._named) or '()'}, {self._spec}\n"
                f"found {spec}\nGive inputs of the recorded structure"
            )
        for (name, was), now in zip(self._named.items(), leaves, strict=True):
            _check_like(name, was, now)
        for was, now in zip(self._named.values(), leaves, strict=True):
            if isinstance(was, Tensor):
                was.copy_(now)


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
        f"same, or make another recording with fastvar_fx.cuda_graph"
    )


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"


class _Weights:
    """The memory of all parameters and buffers, which replays read."""

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (f"{path}.{name}".removeprefix("."), registry, name, _place(tensor))
            for path, module in reachable(model)
            for registry in (module._parameters, module._buffers)
            for name, tensor in registry.items()
            if tensor is not None
        ]

    def check(self) -> None:
        """Checks that they are in the recorded memory.

        Raises:
            GraphError: If one is not.
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
                f"the old memory; record again with fastvar_fx.cuda_graph. Loading other values in "
                f"place, as load_state_dict does, keeps a recording valid"
            )


def _place(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape


@contextmanager
def _seeded(generators: Sequence[torch.Generator], seed: int | None) -> Iterator[None]:
    """Seeds generators and restores their states afterwards; does nothing without a seed."""
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


def _generators(
    fast: nn.Module, inputs: tuple[Any, ...], graph: CudaGraph
) -> list[torch.Generator]:
    """Returns the generators on the device that a run may draw from, each once."""
    held = [value for _, module in reachable(fast) for value in vars(module).values()]
    found = [graph.default_generator, *held, *pytree.tree_leaves(inputs)]
    unique = {id(value): value for value in found if isinstance(value, torch.Generator)}
    return [generator for generator in unique.values() if generator.device == graph.device]


def _device_of(fast: nn.Module) -> torch.device:
    Engine.of(fast)
    devices = {parameter.device for parameter in fast.parameters()}
    if len(devices) > 1:
        raise GraphError(
            f"a CUDA graph needs the model on one device; {type(fast).__name__} is on "
            f"{', '.join(sorted(map(str, devices)))}"
        )
    return devices.pop()


def _check_compiled(fast: nn.Module) -> None:
    if Engine.of(fast).executor.makes_cuda_graphs:
        raise GraphError(
            "the model is compiled with options that make torch.compile record CUDA graphs of its "
            "own, and a CUDA graph cannot hold another; compile it without these options, or with "
            'mode="max-autotune-no-cudagraphs"'
        )


def _check_output(output: Any, device: torch.device) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if not tensors:
        raise GraphError(
            f"the run returned no tensor but {type(output).__name__}; return the images"
        )
    elsewhere = {str(tensor.device) for tensor in tensors if tensor.device != device}
    if elsewhere:
        raise GraphError(
            f"the run returned a tensor on {', '.join(elsewhere)}, to which a replay on {device} "
            f"cannot write; return the tensor on the GPU, and move what the replay returns"
        )


def _why_not(error: RuntimeError) -> str:
    """Returns why a run could not be captured and what to do."""
    if isinstance(error, torch.OutOfMemoryError):
        asked = str(error).partition(" Including")[0]
        reason = (
            f"no memory for the recording{_at_users_line(error)}: {asked} A recording needs the "
            f"memory of a whole generation, and shares it with nothing. Delete other recordings, "
            f"or record a smaller batch. Its memory was freed; the model can be used without it"
        )
    elif "CUDAGenerator" in str(error) or "CUDA generator" in str(error):
        reason = (
            f"the run makes or seeds a generator, or draws from one that is neither the device's, "
            f"an attribute of the model's modules, nor an input{_at_users_line(error)}: "
            f"{first_line(error)}\nGive the loop no seed (None in most loops) and pass seed= to "
            f"the replay"
        )
    else:
        reason = (
            f"the run could not be recorded{_at_users_line(error)}: {first_line(error)}\nA CUDA "
            f"graph holds work on its GPU only; do everything else before or after the run"
        )
    return "\n".join([reason, *getattr(error, "__notes__", ())])


def _at_users_line(error: BaseException) -> str:
    """Returns the place of the innermost line of the model's or the user's code, if any."""
    line = user_line(error)
    return f" at {line}" if line else ""
