"""Keys and values of earlier token maps, kept on the attention modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class KVCache(nn.Module):
    """An attention module that keeps the keys and values of its calls while caching is on.

    A call appends its own to those of the calls before, so the tokens of a step see all earlier
    maps without a mask.
    """

    cached_k: Tensor | None
    cached_v: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        """Switches the cache on or off, and empties it."""
        self.caching = enable
        self.cached_k = None
        self.cached_v = None

    def with_cached(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns all keys and values to attend to, 2 of (B, H, L so far, c), and keeps them.

        Args:
            k: Keys of this call, (B, H, L, c).
            v: Values of this call, (B, H, L, c).
        """
        if self.caching:
            if self.cached_k is not None and self.cached_v is not None:
                k = torch.cat((self.cached_k, k), dim=2)
                v = torch.cat((self.cached_v, v), dim=2)
            self.cached_k, self.cached_v = k, v
        return k, v


@contextmanager
def kv_caching(model: nn.Module) -> Iterator[None]:
    """Switches the caches of a model's attention modules on, and off again; both empty them."""
    caches = [module for module in model.modules() if isinstance(module, KVCache)]
    for cache in caches:
        cache.kv_caching(True)
    try:
        yield
    finally:
        for cache in caches:
            cache.kv_caching(False)
