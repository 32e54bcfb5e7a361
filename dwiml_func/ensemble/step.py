"""A training step and a validation step of an ensemble: the loss under `torch.func.vmap`, the rest on stacked tensors.

Members share nothing, so the gradient of the sum of their losses is the gradient of each: one backward pass of
`torch.autograd` over the mapped loss, which costs less than mapping `torch.func.grad`, since it builds no graph of the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from dwiml_func._trees import choose, given
from dwiml_func.core.loss import LossFn
from dwiml_func.core.loss_check import check_loss_fn, check_requires_grad, check_scalar_loss
from dwiml_func.core.metrics import add_metrics
from dwiml_func.core.non_finite import SKIPPED, can_skip, is_bad_step
from dwiml_func.core.rng import Key, Stream, fold_in
from dwiml_func.core.step import loss_metrics
from dwiml_func.ensemble.rng import MemberGenerators, per_member_rng
from dwiml_func.ensemble.state import EnsembleState
from dwiml_func.ensemble.update import broadcast_to, update_members
from dwiml_func.optim.gates import skipped_too_often
from dwiml_func.optim.schedules import as_rate
from dwiml_func.optim.state_check import check_opt_state
from dwiml_func.optim.transformations import check_clip_norm
from dwiml_func.types import Buffers, Grads, Metrics, Optimizer, Params, Sum

__all__ = ["check_members", "ensemble_eval_step", "ensemble_step", "step_members"]


def ensemble_step(
    ensemble: EnsembleState,
    batch: Any,
    *,
    loss_fn: LossFn,
    optimizer: Optimizer | Callable[..., Optimizer],
    lr: float | Tensor,
    weight_decay: float | Tensor | None = None,
    clip_grad: float | None = None,
) -> tuple[EnsembleState, Metrics]:
    """Take one optimizer step with each active member, on the same batch.

    A member's result is that of `train_step` up to rounding: sums run in another order. The model gets the random
    numbers of the member's own key, see `per_member_rng`; a loss that uses its `key` directly gets the first member's.
    A member whose loss or gradient norm is not finite keeps its values and is no longer active; with `skip_not_finite`,
    only after too many such steps in a row. Nothing waits for the device.

    Args:
        ensemble: K members before the step. It is not changed.
        batch: what the loss takes.
        loss_fn: the loss of one member, see `dwiml_func.core.loss`. It runs under `torch.func.vmap`.
        optimizer: an init/update pair; with `weight_decay` a factory of one, such as `dwiml_func.adam`. One that is not
            elementwise, such as a chain, is mapped over members by `torch.func.vmap`.
        lr: learning rate, or (K,) one for each member.
        weight_decay: a number, or (K,) one for each member, given to `optimizer`.
        clip_grad: largest global norm of a member's gradient; None does not clip.

    Returns:
        The members after the step, and the batch's sums as from `train_step`, each (K,) float64; zeros for members
        that took no step.

    Raises:
        ValueError: the loss is not a scalar or depends on no parameter, or a number is out of range.

    Example:
        >>> from dwiml_func import init_state, module_loss, sgd
        >>> from dwiml_func.ensemble import stack_states
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: ((model(x) - 1.0).square().mean(), len(x)))
        >>> ensemble = stack_states([init_state(model, sgd(), seed=seed) for seed in range(2)])
        >>> ensemble, metrics = ensemble_step(
        ...     ensemble, torch.ones(4, 2), loss_fn=loss_fn, optimizer=sgd(), lr=torch.tensor([0.1, 0.0])
        ... )
        >>> ensemble.step, torch.equal(ensemble.params["weight"][1], model.weight), metrics["loss"].weight
        (1, True, tensor([4., 4.], dtype=torch.float64))
    """
    check_members(ensemble, batch, loss_fn=loss_fn, optimizer=optimizer)
    path = (Stream.TRAIN_STEP, ensemble.epoch, ensemble.batch)
    new, metrics = step_members(
        ensemble,
        batch,
        loss_fn=loss_fn,
        optimizer=optimizer,
        lr=as_rate(lr),
        weight_decay=None if weight_decay is None else as_rate(weight_decay),
        clip_grad=clip_grad,
        key=fold_in(ensemble.keys[0], *path),
        generators=MemberGenerators(ensemble.keys, path),
        step=ensemble.step,
    )
    sums = add_metrics(ensemble.sums, metrics)
    return new.replace(step=ensemble.step + 1, batch=ensemble.batch + 1, sums=sums), metrics


def check_members(
    ensemble: EnsembleState, batch: Any, *, loss_fn: LossFn, optimizer: Optimizer | Callable[..., Optimizer]
) -> None:
    """Check what a training step is given, before its first one."""
    if not isinstance(ensemble, EnsembleState):
        raise TypeError(f"Expected an EnsembleState, from stack_states. Received: {type(ensemble).__name__}")
    _check_loss(loss_fn, ensemble, ensemble.params, batch, Stream.TRAIN_STEP)
    check_opt_state(optimizer, ensemble.opt_state, ensemble.params, is_stacked=True)


def step_members(
    ensemble: EnsembleState,
    batch: Any,
    *,
    loss_fn: LossFn,
    optimizer: Optimizer | Callable[..., Optimizer],
    lr: float | Tensor,
    weight_decay: float | Tensor | None,
    clip_grad: float | None,
    key: Key,
    generators: MemberGenerators,
    step: int | Tensor,
) -> tuple[EnsembleState, dict[str, Sum]]:
    """The tensors of the ensemble after a step, and the batch's sums. Nothing is read on an accelerator.

    Numbers, random numbers and the count of steps come from the arguments, never from the ensemble's own.
    """
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in ensemble.params.items()}
    with torch.enable_grad():
        losses, metrics, buffers = _evaluate(
            ensemble, leaves, batch, loss_fn, key=key, generators=generators, is_training=True
        )
        check_requires_grad(losses)
        try:
            tensors = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        except RuntimeError as error:
            if not isinstance(error, CheckpointError) and "checkpointed region" not in str(error):
                raise
            raise ValueError(
                "The model computes activations again in the backward pass (torch.utils.checkpoint), which torch "
                "cannot do for all members of an ensemble at once. Leave it out, or train them one after the other."
            ) from error
    tensors = [tensor if tensor is None else tensor.contiguous() for tensor in tensors]  # a batched product's are not
    grads, norm, clipped_norm = _clipped(dict(zip(leaves, tensors, strict=True)), clip_grad)
    one = torch.ones_like(norm, dtype=torch.float64)
    metrics |= {"unclipped_grad_norm": Sum(norm.double(), one), "grad_norm": Sum(clipped_norm.double(), one)}

    is_good = ~is_bad_step(losses.detach(), norm)
    takes, skips = ensemble.active & is_good, can_skip(ensemble.opt_state)
    if skips:  # a loss alone can be infinite
        grads = {n: g if g is None else choose(is_good, g, torch.full_like(g, torch.nan)) for n, g in grads.items()}
    rates = {"lr": lr, "weight_decay": weight_decay, "step": step}
    params, opt_state = update_members(ensemble, grads, optimizer, weight=metrics["loss"].weight, **rates)
    continues = takes
    if skips:
        continues = ensemble.active & ~torch.func.vmap(skipped_too_often)(opt_state)
    if takes.device.type != "cpu" or not takes.all():  # reading costs nothing on the CPU
        params, buffers = choose(~takes, ensemble.params, params), choose(~takes, ensemble.buffers, buffers)
        opt_state = choose(~(ensemble.active if skips else takes), ensemble.opt_state, opt_state)
        metrics = {name: Sum(*(torch.where(takes, part, 0.0) for part in pair)) for name, pair in metrics.items()}
    counts = takes
    if skips:
        counts = ensemble.active
        metrics[SKIPPED] = Sum((counts & ~is_good).double(), counts.double())
    done = ensemble.done + torch.stack([counts, torch.zeros_like(counts), counts], dim=1)
    new = {"params": params, "buffers": buffers, "opt_state": opt_state, "active": continues, "done": done}
    return ensemble.replace(**new), metrics


def ensemble_eval_step(
    ensemble: EnsembleState, batch: Any, *, loss_fn: LossFn, optimizer: Optimizer | None = None
) -> Metrics:
    """Evaluate one batch with every member, without gradients, in evaluation mode.

    Args:
        ensemble: K members; it is not changed. A model that is stochastic in evaluation gets the random numbers of
            each member's key, `ensemble.epoch` and `ensemble.batch`.
        batch: what the loss takes.
        loss_fn: the loss of one member.
        optimizer: evaluates the parameters that it evaluates with, see `eval_step`.

    Returns:
        The batch's sums as from `eval_step`, each (K,) float64, also of members that have stopped.

    Example:
        >>> from dwiml_func import init_state, module_loss, sgd
        >>> from dwiml_func.ensemble import stack_states
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: ((model(x) * 0.0 + 2.0).mean(), len(x)))
        >>> ensemble = stack_states([init_state(model, sgd(), seed=seed) for seed in range(2)])
        >>> ensemble_eval_step(ensemble, torch.ones(4, 2), loss_fn=loss_fn)["loss"].total
        tensor([8., 8.], dtype=torch.float64)
    """
    params = ensemble.params
    if optimizer is not None and optimizer.eval_params is not None:
        params = torch.func.vmap(optimizer.eval_params)(dict(ensemble.opt_state), dict(params))
    _check_loss(loss_fn, ensemble, params, batch, Stream.VALID_STEP)
    path = (Stream.VALID_STEP, ensemble.epoch, ensemble.batch)
    key, generators = fold_in(ensemble.keys[0], *path), MemberGenerators(ensemble.keys, path)
    with torch.no_grad():
        return _evaluate(ensemble, params, batch, loss_fn, key=key, generators=generators, is_training=False)[1]


def _check_loss(loss_fn: LossFn, ensemble: EnsembleState, params: Params, batch: Any, stream: Stream) -> None:
    """Try the loss with the first member, see `check_loss_fn`."""
    first, own = ({name: leaf[0] for name, leaf in leaves.items()} for leaves in (params, ensemble.buffers))
    key = fold_in(ensemble.keys[0], stream, ensemble.epoch, ensemble.batch)
    check_loss_fn(loss_fn, first, own, batch, key=key, train=stream is Stream.TRAIN_STEP)


def _evaluate(
    ensemble: EnsembleState,
    params: Params,
    batch: Any,
    loss_fn: LossFn,
    *,
    key: Key,
    generators: MemberGenerators,
    is_training: bool,
) -> tuple[Tensor, dict[str, Sum], Buffers]:
    """The losses (K,), the sums (K,) and the buffers of all members after a batch."""
    numbers: dict[str, float] = {}  # weights that are not tensors: vmap returns only tensors

    def one(params: Params, buffers: Buffers, index: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, ...]], Buffers]:
        with per_member_rng(generators, index):
            out = loss_fn(params, buffers, batch, key=key, train=is_training)
        check_scalar_loss(out.loss)
        sums = loss_metrics(out)
        numbers.update({name: own.weight for name, own in sums.items() if not isinstance(own.weight, Tensor)})
        tensors = {name: tuple(part for part in own if isinstance(part, Tensor)) for name, own in sums.items()}
        return out.loss, tensors, {name: buffer.detach() for name, buffer in out.buffers.items()}

    index = torch.arange(len(ensemble), device=ensemble.active.device)
    try:
        losses, tensors, buffers = torch.func.vmap(one)(dict(params), dict(ensemble.buffers), index)
    except (RuntimeError, NotImplementedError) as error:
        raise _explained(error) from error
    weights = {number: torch.full_like(losses, number, dtype=torch.float64) for number in set(numbers.values())}
    sums = {name: Sum(*pair, *([weights[numbers[name]]] if name in numbers else [])) for name, pair in tensors.items()}
    unchanged = {
        name: old for name, old in ensemble.buffers.items() if name in buffers and buffers[name].is_set_to(old)
    }
    return losses, sums, {**buffers, **unchanged}


def _explained(error: Exception) -> Exception:
    """An error of torch's about vmap in terms of the model: which part of it, and what to do."""
    text = str(error)
    if not any(word in text for word in ("vmap", "atching rule", "data-dependent", "functorch", "storage")):
        return error
    part, frame = None, error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        part = type(owner).__name__ if isinstance(owner, torch.nn.Module) else part
        frame = frame.tb_next
    where = "The loss" if part is None else f"The model's {part}"
    return ValueError(
        f"{where} cannot run for all members of an ensemble at once: torch cannot map an operation of it, or its "
        f"random numbers, over members. Use another layer, such as those of dwiml_func.models, or train the members "
        f"one after the other."
    )


def _clipped(grads: Grads, clip_grad: float | None) -> tuple[Grads, Tensor, Tensor]:
    """`clip_grad_norm` of each member: the gradients, the norms (K,) before and after."""
    norms = [torch.linalg.vector_norm(grad.reshape(len(grad), -1), dim=1) for grad in given(grads).values()]
    norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    if clip_grad is None:
        return grads, norm, norm
    check_clip_norm(clip_grad)
    factor = torch.clamp(clip_grad / (norm + 1e-6), max=1.0)
    clipped = {name: grad * broadcast_to(factor, like=grad) for name, grad in given(grads).items()}
    return {**grads, **clipped}, norm, norm * factor
