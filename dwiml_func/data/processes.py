"""Work that several processes share: each has its part and sends what it finds."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from dwiml_func.data.workers import process_context

__all__ = ["in_processes", "receive", "started"]

Item = TypeVar("Item")
Found = TypeVar("Found")


@contextmanager
def started(
    work: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], shares: Iterable[Any]
) -> Iterator[list[Any]]:
    """A process for each share, which sends what `work(*arguments, share)` yields, and its pipe, for `receive`.

    No process outlives the block.
    """
    context: Any = process_context(work.__module__)
    processes, pipes = [], []
    try:
        for share in shares:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(sender, work, arguments, share), daemon=True)
            process.start()
            sender.close()  # this process's copy: when the other one ends, the pipe has an end
            processes.append(process)
            pipes.append(receiver)
        yield pipes
    finally:
        for process, pipe in zip(processes, pipes, strict=False):
            pipe.close()
            process.terminate()
            process.join()


def receive(pipe: Connection) -> Any:
    """What a process sends next, None at its end. ValueError where its work raised one, or an OSError; RuntimeError
    where it failed otherwise or was killed."""
    try:
        received = pipe.recv()
    except EOFError:
        raise RuntimeError("A process was killed. Is the memory full? Use fewer processes.") from None
    if isinstance(received, ValueError):
        raise received
    if isinstance(received, str):
        raise RuntimeError(f"A process failed:\n{received}")
    return received


def in_processes(
    work: Callable[..., Iterator[tuple[Item, Found]]],
    arguments: tuple[Any, ...],
    items: Sequence[Item],
    num_processes: int,
    meanwhile: Callable[[], object] = bool,
) -> Iterator[tuple[Item, Found]]:
    """Yield what `work(*arguments, items)` yields: here, or in any order in processes that each have some neighbours.

    There are no more processes than items. `meanwhile` is called once they have started, before anything is yielded.
    Errors of processes are those of `receive`.
    """
    num_processes = min(num_processes, len(items))
    if num_processes < 2:
        meanwhile()
        yield from work(*arguments, items)
        return
    ends = [len(items) * number // num_processes for number in range(num_processes + 1)]
    with started(work, arguments, [items[start:end] for start, end in pairwise(ends)]) as pipes:
        meanwhile()
        left = list(pipes)
        while left:
            for pipe in wait(left):
                assert isinstance(pipe, Connection)
                if (received := receive(pipe)) is None:
                    left.remove(pipe)
                else:
                    yield received


def _send(pipe: Connection, work: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], items: Any) -> None:
    """Of one process: send each result, None at the end, and an error or its text."""
    with suppress(BrokenPipeError, KeyboardInterrupt):  # the reader ended, and reports it
        try:
            for found in work(*arguments, items):
                pipe.send(found)
            pipe.send(None)
        except (BrokenPipeError, KeyboardInterrupt):
            raise
        except (ValueError, OSError, ModuleNotFoundError) as error:  # what a user can repair is no traceback
            pipe.send(ValueError(str(error)))
        except Exception:
            pipe.send(traceback.format_exc())
