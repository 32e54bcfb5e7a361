"""Gradients of a batch that is cut into shards, added in a fixed order, whichever process computes which shard.

Floating-point sums depend on their order. The number of shards is therefore an option of the run, not of the machine;
sums over shards run along one binary tree, and each process computes whole branches of it. So the results of 1, 2 or 4
processes are bitwise identical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dwiml_func._checks import check_number
from dwiml_func.core.gradients import AutodiffBackend, ValueAndGrad, value_and_grad
from dwiml_func.core.loss import LossFn, LossOut
from dwiml_func.core.rng import Key, fold_in
from dwiml_func.distributed.threads import ShardThreads
from dwiml_func.types import Buffers, Params

__all__ = ["SINGLE_PROCESS", "ProcessGroup", "check_shards", "sharded_loss", "sharded_value_and_grad"]


class ProcessGroup(Protocol):
    """The processes that train together, each with the same state and the same batches.

    Example:
        >>> SINGLE_PROCESS.rank, SINGLE_PROCESS.size, SINGLE_PROCESS.gather(torch.ones(1))
        (0, 1, [tensor([1.])])
    """

    @property
    def rank(self) -> int:
        """This process's rank, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape and dtype, in the order of ranks."""
        ...


class _SingleProcess:
    rank = 0
    size = 1

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


SINGLE_PROCESS: ProcessGroup = _SingleProcess()
"""The process group of a single process."""


def sharded_value_and_grad(
    process_group: ProcessGroup = SINGLE_PROCESS,
    gradient_fn: ValueAndGrad = value_and_grad,
    *,
    num_threads: int = 1,
) -> ValueAndGrad:
    """`value_and_grad` for batches that are cut into shards.

    Args:
        process_group: the processes that share the work; their number divides that of the shards.
        gradient_fn: evaluates loss and gradients of one shard.
        num_threads: how many threads of each process evaluate shards side by side, each operation on one thread; any
            number gives bitwise identical results, after `torch.set_num_threads(1)`. A model's forward pass that draws
            random numbers waits for those of the other shards; blocks of `torch.utils.checkpoint` that draw some are
            for one thread.

    Returns:
        A function for `train_step(..., gradient_fn=...)`. Its batch is a sequence of shards, None for an empty one; the
        first is not empty. Shard i has the key `fold_in(key, i)`. Gradients and means are those of the whole batch,
        weighted by points; a gradient is None where no shard uses the parameter. Buffers that a model changes come from
        shard 0, as `torch.nn.parallel.DistributedDataParallel` takes those of its first process.

    Raises:
        ValueError: (when called) the number of processes does not divide that of the shards, or no shard has a point.

    Example:
        >>> def loss_fn(params, buffers, batch, *, key, train):
        ...     return LossOut((params["w"] * batch).mean(), len(batch), buffers, {})
        >>> shards = [torch.tensor([1.0]), torch.tensor([2.0, 3.0])]
        >>> out, grads = sharded_value_and_grad()(loss_fn, {"w": torch.ones(())}, {}, shards, key=Key(0))
        >>> out.loss.item(), out.weight.item(), grads["w"].item()
        (2.0, 3.0, 2.0)
    """
    threads = _threads(num_threads)

    def function(
        loss_fn: LossFn,
        params: Params,
        buffers: Buffers,
        batch: Any,
        *,
        key: Key,
        backend: AutodiffBackend | None = None,
    ) -> tuple[LossOut, dict[str, Any]]:
        def evaluate(shard: Any, number: int, is_empty: bool) -> _Part:
            out, grads = gradient_fn(loss_fn, params, buffers, shard, key=fold_in(key, number), backend=backend)
            used = [float(grads[name] is not None) for name in params]
            dense = {n: torch.zeros_like(p) if grads[n] is None else grads[n] for n, p in params.items()}
            return _part(out, buffers, dense, is_empty, used)

        out, total = _over_shards(batch, evaluate, buffers, process_group, threads)
        used = dict(zip(params, total.numbers[-len(params) :].tolist(), strict=True))
        return out, {
            name: grad if used[name] else None
            for dtype, flat in total.gradients.items()
            for name, grad in _unflattened(flat.div_(total.numbers[2].to(dtype)), params, dtype)
        }

    return function


def sharded_loss(loss_fn: LossFn, process_group: ProcessGroup = SINGLE_PROCESS, *, num_threads: int = 1) -> LossFn:
    """A loss function for batches that are cut into shards, e.g. for `eval_step`.

    Args:
        loss_fn: the loss of one shard.
        process_group: the processes that share the work.
        num_threads: as for `sharded_value_and_grad`.

    Returns:
        A loss function whose batch is a sequence of shards, as for `sharded_value_and_grad`.

    Example:
        >>> def loss_fn(params, buffers, batch, *, key, train):
        ...     return LossOut(batch.mean(), len(batch), buffers, {})
        >>> shards = [torch.tensor([1.0]), torch.tensor([2.0, 3.0])]
        >>> sharded_loss(loss_fn)({}, {}, shards, key=Key(0), train=False).loss.item()
        2.0
    """
    threads = _threads(num_threads)

    def function(params: Params, buffers: Buffers, batch: Any, *, key: Key, train: bool) -> LossOut:
        def evaluate(shard: Any, number: int, is_empty: bool) -> _Part:
            out = loss_fn(params, buffers, shard, key=fold_in(key, number), train=train)
            return _part(out, buffers, {}, is_empty)

        return _over_shards(batch, evaluate, buffers, process_group, threads)[0]

    return function


def check_shards(num_shards: int, process_group: ProcessGroup) -> None:
    """Raise a ValueError unless the number of processes divides that of the shards."""
    if num_shards < 1 or num_shards % process_group.size:
        fitting = [size for size in range(1, num_shards + 1) if num_shards % size == 0]
        raise ValueError(
            f"{process_group.size} processes cannot share {num_shards} shards a batch evenly. Expected "
            f"{', '.join(map(str, fitting)) or 'no number'} of processes, or another num_shards."
        )


class _Part(NamedTuple):
    """Sums over some shards, which are added along the tree."""

    gradients: dict[torch.dtype, Tensor]  # flat, of the total loss: means times weights
    # (1 + 2 M + P,) float64: whether buffers changed; totals and weights of loss and auxiliary metrics; how many shards
    # use each parameter
    numbers: Tensor
    names: tuple[str, ...]  # of the auxiliary metrics
    buffers: Buffers  # of the first shard


def _part(
    out: LossOut, buffers: Buffers, grads: Mapping[str, Tensor], is_empty: bool, used: Sequence[float] = ()
) -> _Part:
    pairs = [mean if isinstance(mean, tuple) else (mean, out.weight) for mean in (out.loss, *out.aux.values())]
    like = out.loss.detach()
    means = torch.stack([mean.detach().to(torch.float64) for mean, _ in pairs])
    weights = torch.stack([torch.as_tensor(weight, dtype=torch.float64, device=like.device) for _, weight in pairs])
    changed = any(not torch.equal(buffers[name], new) for name, new in out.buffers.items())
    if is_empty:
        weights, changed = torch.zeros_like(weights), False
    totals = torch.where(weights > 0, means * weights, 0.0)  # a mean over nothing is NaN
    numbers = torch.stack([totals, weights], dim=1).flatten()
    numbers = torch.cat([numbers.new_tensor([float(changed)]), numbers, numbers.new_tensor(used)])
    dtypes = dict.fromkeys(grad.dtype for grad in grads.values())
    flat = {dtype: torch.cat([g.flatten() for g in grads.values() if g.dtype == dtype]) for dtype in dtypes}
    for dtype, gradient in flat.items():
        gradient.mul_(weights[0].to(dtype)).masked_fill_(weights[0] == 0, 0.0)
    return _Part(flat, numbers, tuple(out.aux), out.buffers)


def _over_shards(
    batch: Sequence[Any],
    evaluate: Callable[[Any, int, bool], _Part],
    buffers: Buffers,
    process_group: ProcessGroup,
    threads: ShardThreads | None,
) -> tuple[LossOut, _Part]:
    """Evaluate this process's shards, exchange the sums, and add them up."""
    check_shards(len(batch), process_group)
    block = len(batch) // process_group.size
    branch = block & -block  # shards in a whole branch of the tree: the largest power of two that divides `block`
    first = process_group.rank * block

    def evaluated(number: int) -> _Part:
        # An empty shard is the first one without weight, so that all processes know the names of the metrics.
        is_empty = batch[number] is None
        return evaluate(batch[0] if is_empty else batch[number], number, is_empty)

    parts = [partial(evaluated, number) for number in range(first, first + block)]
    if threads is not None:
        parts = [partial(_itself, part) for part in threads.run(parts)]
    branches = [_tree(parts[start : start + branch]) for start in range(0, block, branch)]
    gathered = _exchange(branches, process_group)
    total = _tree([partial(_itself, part) for part in gathered])
    changed, loss, weight, *rest = total.numbers
    if not float(weight) > 0:
        raise ValueError("Expected a batch with at least one point. Received: shards without any.")
    if float(changed) > 0:
        buffers = {name: process_group.gather(tensor)[0] for name, tensor in branches[0].buffers.items()}
    aux = {name: (rest[2 * i] / rest[2 * i + 1], rest[2 * i + 1]) for i, name in enumerate(total.names)}
    return LossOut(loss / weight, weight, buffers, aux), total


def _itself(part: _Part) -> _Part:
    return part


def _threads(number: int) -> ShardThreads | None:
    check_number("num_threads", number, at_least=1)
    return ShardThreads(number) if number > 1 else None


def _exchange(branches: Sequence[_Part], process_group: ProcessGroup) -> list[_Part]:
    """The sums of all branches of all processes, in the order of shards."""
    if process_group.size == 1:
        return list(branches)
    numbers = torch.cat(process_group.gather(torch.stack([part.numbers for part in branches])))
    flats = {
        dtype: torch.cat(process_group.gather(torch.stack([part.gradients[dtype] for part in branches])))
        for dtype in branches[0].gradients
    }
    like = branches[0]
    return [
        like._replace(numbers=row, gradients={dtype: flat[index] for dtype, flat in flats.items()})
        for index, row in enumerate(numbers)
    ]


def _tree(leaves: Sequence[Callable[[], _Part]]) -> _Part:
    """The sum of the leaves' results: of neighbours in pairs, then of neighbouring pairs, and so on."""
    if len(leaves) == 1:
        return leaves[0]()
    middle = 1 << (len(leaves) - 1).bit_length() - 1  # a whole branch to the left, the rest to the right
    left, right = _tree(leaves[:middle]), _tree(leaves[middle:])
    for dtype, flat in left.gradients.items():
        flat.add_(right.gradients[dtype])
    return left._replace(numbers=left.numbers + right.numbers)


def _unflattened(flat: Tensor, params: Params, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    like = {name: tensor for name, tensor in params.items() if tensor.dtype == dtype}
    pieces = flat.split([tensor.numel() for tensor in like.values()])
    return [(name, piece.view(tensor.shape)) for (name, tensor), piece in zip(like.items(), pieces, strict=True)]
