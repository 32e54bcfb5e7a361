"""Saving checkpoints in a thread of its own, while training continues."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from dwiml_func.checkpoint.checkpoint import save
from dwiml_func.checkpoint.digest import state_leaves
from dwiml_func.checkpoint.index import checkpoint_name
from dwiml_func.checkpoint.provenance import environment
from dwiml_func.core.non_finite import check_finite
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState, check_not_donated
from dwiml_func.files.json import to_json_data

__all__ = ["AsyncCheckpointer", "copy_to_host"]

_log = logging.getLogger(__name__)


class AsyncCheckpointer:
    """Saves checkpoints of a run in the background, one after the other.

    The training thread waits only while the state is copied, so a later step may reuse the state's memory. The copy's
    memory is reused by the next one: new memory would take most of that time. An error of a save is raised by the next
    call, and at the end. `data()` gives the fingerprint of the data and is called in the background; the other
    arguments are those of `save`.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        data: Callable[[], Mapping[str, Any]] | None = None,
        keep: int | str | None = 2,
        keep_always: Collection[str] = (),
    ) -> None:
        config = to_json_data(config or {}, "config")  # an error here costs no epoch
        self._options: dict[str, Any] = {"config": config, "keep": keep, "keep_always": tuple(keep_always)}
        self._directory, self._data = directory, data
        self._copy: TrainState | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        state: TrainState,
        history: Sequence[EpochReport] = (),
        *,
        then: Callable[[TrainState], None] | None = None,
    ) -> None:
        """Copy a state and start to save it, after the save before. The state may then be donated to a step.

        `then` is called in the background with the copy, once the checkpoint is on disk. The copy is valid until `then`
        returns: the next save reuses its memory. Raises the error of an earlier save, and NonFiniteError at once for a
        state that `save` refuses because a step was not finite.
        """
        self.wait()
        check_finite(state)
        copied, reports = copy_to_host(state, reuse=self._copy), tuple(history)
        devices = {str(leaf.device) for leaf in state_leaves(state).values()}  # the copy is on the CPU
        self._copy = copied

        def work() -> None:
            try:
                data = self._data() if self._data else None
                facts = {"data": data, "environment": environment(devices), **self._options}
                save(self._directory, copied, reports, **facts)
                _log.debug("Checkpoint %s saved in %s.", checkpoint_name(copied), self._directory)
                if then is not None:
                    then(copied)
            except BaseException as error:
                self._error = error

        # A daemon: a second Ctrl-C must not wait for it, and a save that was cut off leaves no checkpoint behind.
        self._thread = threading.Thread(target=work, name="checkpointer", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being saved; raises the error of a failed save."""
        if self._thread is not None:
            while self._thread.is_alive():  # an endless join may sleep through a signal that comes just before it
                self._thread.join(0.2)
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            return
        try:
            self.wait()
        except BaseException as failure:
            if error is None or kind is GeneratorExit:
                raise
            error.add_note(f"Besides, the last checkpoint could not be saved: {failure}")


def copy_to_host(state: TrainState, *, reuse: TrainState | None = None) -> TrainState:
    """Copy every tensor of a state into memory on the CPU.

    Args:
        state: the run.
        reuse: an earlier copy, which is given up: its memory is written over for every tensor that still has the same
            name, shape and dtype.

    Returns:
        A state that shares no memory with it.

    Raises:
        RuntimeError: the state was donated to a step.

    Example:
        >>> import torch
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> copy_to_host(state).params["weight"].data_ptr() == state.params["weight"].data_ptr()
        False
    """
    check_not_donated(state)
    old = {} if reuse is None else state_leaves(reuse)

    def copy(path: str, part: Any) -> Any:
        if isinstance(part, Tensor):
            return _copy(part.detach(), old.get(path))
        return {name: copy(f"{path}/{name}", inner) for name, inner in part.items()}

    groups = ("params", "buffers", "opt_state")
    return state.replace(**{group: copy(group, getattr(state, group)) for group in groups})


def _copy(tensor: Tensor, into: Tensor | None) -> Tensor:
    if into is not None and _kind(into) == _kind(tensor):
        return into.copy_(tensor)
    return tensor.to("cpu", copy=True)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()
