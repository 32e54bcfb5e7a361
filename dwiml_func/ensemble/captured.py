"""A training step of an ensemble that a CUDA device replays as one graph, see `dwiml_func.compiled.cuda_graphs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dwiml_func.compiled.cuda_graphs import OnCuda, Replays
from dwiml_func.compiled.direct import leaves_of
from dwiml_func.compiled.function import NO_KEY
from dwiml_func.compiled.sums import VectorSums, add_vectors, vector_of
from dwiml_func.core.loss import LossFn
from dwiml_func.core.rng import Key, Stream, fold_in, key_hash, torch_rng
from dwiml_func.ensemble.rng import MemberGenerators
from dwiml_func.ensemble.state import EnsembleState
from dwiml_func.ensemble.step import check_members, ensemble_step, step_members
from dwiml_func.optim.schedules import as_rate
from dwiml_func.optim.transformations import check_clip_norm
from dwiml_func.types import Metrics, Optimizer

__all__ = ["CapturedEnsembleStep", "capture_ensemble_step"]


def capture_ensemble_step(
    *,
    loss_fn: LossFn,
    optimizer: Optimizer | Callable[..., Optimizer],
    clip_grad: float | None = None,
    max_graphs: int = 8,
) -> CapturedEnsembleStep:
    """Make an `ensemble_step` that is captured as a CUDA graph for each combination of shapes, and replayed.

    Args:
        loss_fn, optimizer, clip_grad: as for `ensemble_step`, with its random numbers. The loss may not use its key.
        max_graphs: largest number of graphs; batches of further shapes run without.

    Returns:
        The step. The first two batches of a shape run without a graph, the third is captured; results are bitwise
        identical. An ensemble that the step was given is not to be used again: from a capture on, the step writes into
        its tensors. Where there can be no graph, as on a CPU, it warns once, with the reason.

    Example:
        >>> import torch
        >>> from dwiml_func import init_state, module_loss, sgd, stack_states
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: ((model(x) - 1.0).square().mean(), len(x)))
        >>> step = capture_ensemble_step(loss_fn=loss_fn, optimizer=sgd())
        >>> ensemble = stack_states([init_state(model, sgd(), seed=seed) for seed in range(2)])
        >>> ensemble, metrics = step(ensemble, torch.ones(4, 2), lr=torch.tensor([0.1, 0.2]))
        >>> ensemble.step, metrics["loss"].weight, step.num_cuda_graphs
        (1, tensor([4., 4.], dtype=torch.float64), 0)
    """
    if clip_grad is not None:
        check_clip_norm(clip_grad)
    return CapturedEnsembleStep(
        {"loss_fn": loss_fn, "optimizer": optimizer, "clip_grad": clip_grad}, max_graphs=max_graphs
    )


class CapturedEnsembleStep:
    """A captured step of `capture_ensemble_step`: `step(ensemble, batch, lr=lr)`."""

    def __init__(self, options: dict[str, Any], *, max_graphs: int) -> None:
        self._options = options
        self._generators = GraphGenerators()
        capture = OnCuda(self._generators.on_device)
        self._replays = Replays(self._graph, max_graphs=max_graphs, capture=capture)

    @property
    def num_cuda_graphs(self) -> int:
        """CUDA graphs captured so far."""
        return self._replays.num_graphs

    @property
    def cuda_graphs_reason(self) -> str | None:
        """Why steps run without CUDA graphs; None where they are replayed."""
        return self._replays.reason

    def __call__(
        self, ensemble: EnsembleState, batch: Any, *, lr: float | Tensor, weight_decay: float | Tensor | None = None
    ) -> tuple[EnsembleState, Metrics]:
        """Take one optimizer step with each active member, see `ensemble_step`."""
        rates = {"lr": as_rate(lr)} | ({} if weight_decay is None else {"weight_decay": as_rate(weight_decay)})
        if not self.num_cuda_graphs:
            check_members(ensemble, batch, loss_fn=self._options["loss_fn"], optimizer=self._options["optimizer"])
        rest = {"opt_state": ensemble.opt_state, "members": {"active": ensemble.active, "done": ensemble.done}}
        leaves = leaves_of(batch, (ensemble.params, ensemble.buffers, rest), len(rates))
        numbers = _numbers(ensemble, rates)
        path = (Stream.TRAIN_STEP, ensemble.epoch, ensemble.batch)
        self._generators.start(ensemble.keys, path, numbers.device)
        with torch_rng(fold_in(ensemble.keys[0], *path)):  # nobody else draws meanwhile
            results = self._replays(batch, leaves, numbers)
        if results is None:
            return ensemble_step(ensemble, batch, **self._options, lr=lr, weight_decay=weight_decay)
        params, buffers, rest, names, values = results
        metrics = VectorSums(names, values)
        new = {"params": params, "buffers": buffers, "opt_state": rest["opt_state"], **rest["members"]}
        sums = add_vectors(ensemble.sums, metrics)
        return ensemble.replace(**new, step=ensemble.step + 1, batch=ensemble.batch + 1, sums=sums), metrics

    def _graph(self, batch: Any, params: Any, buffers: Any, rest: Any, numbers: Tensor) -> tuple[Any, ...]:
        """A whole step from tensors to tensors."""
        members, opt_state = rest["members"], rest["opt_state"]
        keys = (Key(0),) * len(members["active"])  # of which nothing is read
        lr, *decay = numbers[1:].reshape(-1, len(keys)).unbind()
        new, metrics = step_members(
            EnsembleState(params=params, buffers=buffers, opt_state=opt_state, keys=keys, **members),
            batch,
            **self._options,
            lr=lr,
            weight_decay=decay[0] if decay else None,
            key=NO_KEY,
            generators=self._generators,
            step=numbers[0],
        )
        values = torch.stack([part for own in metrics.values() for part in map(torch.as_tensor, own)])
        state = {"opt_state": new.opt_state, "members": {"active": new.active, "done": new.done}}
        return new.params, new.buffers, state, tuple(metrics), values


class GraphGenerators(MemberGenerators):
    """Each member's random numbers from generators of its own, whose states a CUDA graph follows.

    While a member draws, they stand in for torch's. They have the seeds, and so the random numbers, of an eager step.
    """

    def __init__(self) -> None:
        super().__init__(())
        self._device = torch.device("cpu")
        self._own: dict[int, list[torch.Generator]] = {}

    def start(self, keys: Sequence[Key], path: Sequence[int], device: torch.device) -> None:
        """Seed them for a step; if some member has drawn before, those of all: none can be made in a capture."""
        if device != self._device:
            self._own.clear()
        self._keys, self._path, self._device = tuple(keys), path, device
        if self._own:
            for member in range(len(keys)):
                self._seed(member)

    def on_device(self) -> list[torch.Generator]:
        """The accelerator's generators of the members, if they draw."""
        return [own[1] for member, own in self._own.items() if member < len(self._keys) and len(own) > 1]

    def are_equal(self) -> bool:
        """Never: equal members too draw from their own."""
        return False

    @contextmanager
    def of(self, *members: int) -> Iterator[None]:
        (member,) = members
        if member not in self._own:
            self._seed(member)
        with ExitStack() as stack:
            for own in self._own[member]:
                stack.enter_context(_standing_in(own))
            yield

    def _seed(self, member: int) -> None:
        if member not in self._own:
            self._own[member] = [torch.Generator(device) for device in dict.fromkeys(("cpu", str(self._device)))]
        for generator in self._own[member]:
            generator.manual_seed(key_hash(fold_in(self._keys[member], *self._path)))


@contextmanager
def _standing_in(own: torch.Generator) -> Iterator[None]:
    """Let torch draw from a generator in place of its own for that device."""
    if own.device.type == "cpu":
        default = torch.default_generator
        before = default.get_state()
        default.set_state(own.get_state())
        try:
            yield
        finally:
            own.set_state(default.get_state())
            default.set_state(before)
        return
    default = torch.cuda.default_generators[own.device.index]
    before = default.graphsafe_get_state()
    default.graphsafe_set_state(own)  # the state, not a copy of it: a captured graph uses it too
    try:
        yield
    finally:
        default.graphsafe_set_state(before)


def _numbers(ensemble: EnsembleState, rates: Mapping[str, float | Tensor]) -> Tensor:
    """The step, and each rate for each member, in double precision on the ensemble's device."""
    device, parts = ensemble.active.device, [vector_of(ensemble.active.device, ensemble.step)]
    for name, rate in rates.items():
        if isinstance(rate, Tensor) and rate.shape not in ((), ensemble.active.shape):
            shape = tuple(rate.shape)
            raise ValueError(f"{name}: expected a number, or ({len(ensemble)},) one for each member. Received: {shape}")
        each = rate.detach() if isinstance(rate, Tensor) else vector_of(device, rate)
        parts.append(each.to(device, torch.float64, non_blocking=True).expand(len(ensemble)))
    return torch.cat(parts)
