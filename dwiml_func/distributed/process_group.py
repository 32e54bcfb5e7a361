"""The process group of a run that `torchrun` started, over torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from dwiml_func.distributed.sharding import SINGLE_PROCESS, ProcessGroup

__all__ = ["ProcessLostError", "join_process_group", "rank_in", "rank_zero_first"]

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=10)  # for a process that hangs; one that dies closes its connections at once


class ProcessLostError(RuntimeError):
    """Another process of the run has ended, so this one cannot continue.

    Example:
        >>> raise ProcessLostError("gone")
        Traceback (most recent call last):
        ...
        dwiml_func.distributed.process_group.ProcessLostError: gone
    """


@contextmanager
def join_process_group(device: str = "cpu", *, environment: Mapping[str, str] = os.environ) -> Iterator[ProcessGroup]:
    """Join the other processes that `torchrun` started, while the block runs.

    Args:
        device: "cpu" (over gloo) or "cuda" (over NCCL too, each process on the device of its local rank).
        environment: `torchrun`'s variables: RANK, WORLD_SIZE, LOCAL_RANK and the address.

    Yields:
        The process group; SINGLE_PROCESS if `torchrun` did not start this process.

    Raises:
        ProcessLostError: another process cannot be reached, or, within the block, has ended.

    Example:
        >>> with join_process_group(environment={}) as process_group:
        ...     process_group.size
        1
    """
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE_PROCESS
        return
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(int(environment.get("LOCAL_RANK", "0")))
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        if environment.get("GROUP_WORLD_SIZE", "1") == "1":
            # On one machine torchrun keeps its store over restarts, with the addresses of processes that have ended.
            store = dist.PrefixStore(f"attempt_{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except RuntimeError as error:
        raise ProcessLostError(
            f"This process could not join the others of this run: {str(error).splitlines()[0]}. See what they printed, "
            "then start them again."
        ) from error
    try:
        yield _Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def rank_in(environment: Mapping[str, str] = os.environ) -> int:
    """This process's rank among those that `torchrun` started; 0 if it started none."""
    return int(environment.get("RANK", "0"))


def rank_zero_first(process_group: ProcessGroup, function: Callable[[], T]) -> T:
    """Call a function in the first process, which may write what the others read, then in the others; wait for all."""
    if process_group.rank > 0:
        process_group.gather(torch.zeros(1))  # the first process has called it
    result = function()
    if process_group.rank == 0:
        process_group.gather(torch.zeros(1))
    process_group.gather(torch.zeros(1))  # all processes have
    return result


class _Group:
    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def gather(self, tensor: Tensor) -> list[Tensor]:
        import torch.distributed as dist

        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            dist.all_gather(gathered, tensor.contiguous())
        except RuntimeError as error:
            raise ProcessLostError(
                f"Another of the {self.size} processes of this run has ended or does not answer. See what it printed, "
                "then resume from the last checkpoint, with any number of processes that divides the number of shards."
            ) from error
        return gathered
