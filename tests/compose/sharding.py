"""Two processes that shard a model; run by test_sharding.py, which reads what they print."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
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
