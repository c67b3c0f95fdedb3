"""The processes of a run: this one alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from fastvar_fx.errors import RunError

_LONGEST: Final = timedelta(days=30)
"""How long a process waits for the slowest one; torchrun ends all of them when one fails."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: Its number among all.
        world: How many there are.
        local_rank: Its number among those of its machine.
        local_world: How many its machine has.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def of_machine(self) -> range:
        """The ranks of this machine."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world)

    def share(self, batches: list[int], rank: int) -> list[int]:
        """Returns which of the batches a rank draws."""
        return batches[rank :: self.world]

    def from_first(self, values: Tensor) -> Tensor:
        """Returns on the CPU the values that the process of rank 0 has; the others give room."""
        if self.world == 1:
            return values
        values = values.to(_device())
        with _lost_process(self.rank):
            dist.broadcast(values, src=0)
            return values.cpu()

    def wait(self) -> None:
        """Waits until every process is here."""
        if self.world > 1:
            with _lost_process(self.rank):
                dist.barrier(device_ids=[self.local_rank] if _on_gpu() else None)


@contextmanager
def joined() -> Iterator[Processes]:
    """Joins the processes of torchrun, if it started this one: nccl on GPUs, else gloo.

    Raises:
        RunError: If another process ended early, when this one waits for it.
    """
    if "LOCAL_WORLD_SIZE" not in os.environ:
        yield Processes()
        return
    local_rank, local_world = (int(os.environ[f"LOCAL_{name}"]) for name in ("RANK", "WORLD_SIZE"))
    if _on_gpu():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if _on_gpu() else "gloo", timeout=_LONGEST)
    yield Processes(dist.get_rank(), dist.get_world_size(), local_rank, local_world)
    dist.destroy_process_group()  # not after an error: it could wait for a process that ended


@contextmanager
def _lost_process(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's for a lost connection
        raise RunError(
            f"rank {rank} waited for the other processes, but one of them ended: "
            f"{str(error).splitlines()[0]}. Its own message says why; run the same command again "
            f"to go on"
        ) from error


def _on_gpu() -> bool:
    return torch.cuda.is_available()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else torch.device("cpu")
