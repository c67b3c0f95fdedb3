"""The buffers that the KV caches of a transformed model grow in."""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch import Tensor

from passes.analyse.caches import Growth, new_buffer


class KVBuffers:
    """The buffers behind the caches of a transformed model.

    A cache is a view of the filled front of its buffer. Only the newest returned view grows in
    place, and only if it was not changed. A cache that the loop reset, sliced, copied or restored
    from an earlier step is another tensor, so it gets a new buffer: entries that a tensor can see
    are never overwritten. A buffer lives as long as a view of it.

    Attributes:
        replayed: Whether programs are recorded as CUDA graphs, which cannot write into their
            inputs; then caches are copied as they grow.
        appended: How often a cache grew in place.
        moved: How often one was copied to a new buffer.
    """

    def __init__(self) -> None:
        self.replayed = False
        self.appended = 0
        self.moved = 0
        # By the id of the newest view, for as long as that lives.
        self._newest: dict[int, tuple[weakref.ref[Tensor], Tensor, _Layout]] = {}

    def __len__(self) -> int:
        """How many buffers may grow."""
        return len(self._newest)

    def grown(self, past: Tensor, growth: Growth) -> Tensor:
        """Returns a view that starts with the entries of `past` and has room for the new ones.

        The view is of a buffer that ends with room for what later steps append.
        """
        buffer = self._behind(past)
        if buffer is not None and buffer.shape[growth.dim] >= growth.final(past):
            self.appended += 1
        else:
            buffer = new_buffer(past, growth)
            self.moved += 1
        view = growth.front(buffer, past)
        forget = partial(self._newest.pop, id(view))  # called with the reference
        self._newest[id(view)] = (weakref.ref(view, forget), buffer, _layout(view))
        return view

    def _behind(self, cache: Tensor) -> Tensor | None:
        """Takes the buffer that a cache may grow in, if it has one."""
        known = self._newest.pop(id(cache), None)
        if known is None:
            return None
        view, buffer, layout = known
        if view() is not cache or layout != _layout(cache):
            return None
        frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
        return None if frozen else buffer


_Layout = tuple[object, ...]


def _layout(tensor: Tensor) -> _Layout:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
