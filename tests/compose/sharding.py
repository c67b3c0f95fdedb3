"""Two processes that shard a model; run by test_sharding.py, which reads what they print."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from fastvar_fx import ModelError, NothingPrunedError
from tests.compose.toy import LABELS, Toy, assert_prunes, by_hand, transformed

PROCESSES = 2


def sharded(model: Any) -> Any:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "draw")
    return model


def parallel(model: Any, mesh: Any) -> Any:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block.ffn, mesh, plan)
    return model


class Guided(Toy):
    """Draws with guidance: its batch is the conditional half, then the other one."""

    def __init__(self, guidance: type[Guidance]) -> None:
        super().__init__()
        self.add_module("head", guidance(self.head))

    def forward(self, labels: Tensor) -> Tensor:
        return super().forward(torch.cat([labels, torch.zeros_like(labels)]))


class Guidance(nn.Module):
    """What the loop goes on with, after each step, from both halves."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        conditional, other = self.both(self.head(x))
        guided: Tensor = 1.5 * conditional - 0.5 * other
        return guided.repeat(len(x) // len(guided), 1, 1)

    def both(self, made: Tensor) -> Any:
        return made.chunk(2)


class ApartGuidance(Guidance):
    """The same where each process runs one half."""

    def both(self, made: Tensor) -> Any:
        halves = [torch.empty_like(made) for _ in range(PROCESSES)]
        dist.all_gather(halves, made.contiguous())
        return halves


class ApartGuided(Guided):
    def forward(self, labels: Tensor) -> Tensor:
        half = labels if dist.get_rank() == 0 else torch.zeros_like(labels)
        return Toy.forward(self, half)


def check_guidance() -> None:
    """Each process draws one half of the batch, pruned; both go on with the same pictures."""
    want = transformed(Guided(Guidance))(LABELS)[: len(LABELS)]
    dense = Guided(Guidance)(LABELS)[: len(LABELS)]
    got = transformed(ApartGuided(ApartGuidance))(LABELS)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, dense, atol=1e-2)


def message_of(error: type[Exception], call: Any) -> str:
    try:
        call()
    except error as raised:
        return str(raised)
    raise AssertionError(f"no {error.__name__}")


def check(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    want = by_hand(Toy())

    assert_prunes(sharded(transformed(Toy())), want)
    fast = transformed(Toy())
    fast(LABELS)
    assert_prunes(sharded(fast), want)

    check_guidance()

    for before in (lambda: sharded(Toy()), lambda: parallel(Toy(), mesh)):
        told = message_of(ModelError, lambda before=before: transformed(before()))
        assert "DTensors" in told, told
        assert "transform the whole model first, then fully_shard" in told, told

    fast = parallel(transformed(Toy()), mesh)
    for _ in range(2):
        told = message_of(NothingPrunedError, lambda: fast(LABELS))
        assert "ffn.up.weight is a DTensor" in told, told
    fast = parallel(transformed(Toy(), strict=False), mesh)
    torch.testing.assert_close(fast(LABELS), Toy()(LABELS), rtol=0, atol=1e-4)
    print("right", flush=True)
    dist.destroy_process_group()


spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]

if __name__ == "__main__":
    spawn(check, (int(sys.argv[1]),), PROCESSES)
