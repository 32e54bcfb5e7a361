"""The processes of a run that `torchrun` started, over torch.distributed."""

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

_TIMEOUT = timedelta(minutes=10)  # for one that hangs; one that dies closes its connections, which shows at once


class ProcessLostError(RuntimeError):
    """Another process of the run has ended, so that this one cannot go on.

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
        environment: where `torchrun` says which process this is: RANK, WORLD_SIZE, LOCAL_RANK and the address.

    Yields:
        The processes; one alone where `torchrun` did not start this one.

    Raises:
        ProcessLostError: in the block, at an exchange: another process has ended.

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
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield _Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def rank_in(environment: Mapping[str, str] = os.environ) -> int:
    """This process's number among those that `torchrun` started.

    Args:
        environment: where `torchrun` says so.

    Returns:
        The number, from 0; 0 where `torchrun` did not start it.

    Example:
        >>> rank_in({}), rank_in({"RANK": "3"})
        (0, 3)
    """
    return int(environment.get("RANK", "0"))


def rank_zero_first(process_group: ProcessGroup, function: Callable[[], T]) -> T:
    """Call a function in the first process, which may write what the others read, and then in the others.

    Args:
        process_group: the processes.
        function: what to call.

    Returns:
        What the function returned in this process, once it has returned in all.

    Raises:
        ProcessLostError: another process has ended.

    Example:
        >>> rank_zero_first(SINGLE_PROCESS, lambda: 3)
        3
    """
    if process_group.rank > 0:
        process_group.gather(torch.zeros(1))  # the first has called it
    result = function()
    if process_group.rank == 0:
        process_group.gather(torch.zeros(1))
    process_group.gather(torch.zeros(1))  # all have
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
                f"Another of the {self.size} processes of this run has ended, or does not answer. The last checkpoint "
                "stands: see what that process printed, then resume with any number of processes that divides the "
                "number of shards."
            ) from error
        return gathered
