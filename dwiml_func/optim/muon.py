"""Muon: orthogonalized momentum for matrices, and another optimizer for the rest."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from dwiml_func._checks import at_most_three
from dwiml_func.optim._kernel import apply_kernel, check_options, lerp
from dwiml_func.optim.chain import check_optimizer, update_with
from dwiml_func.optim.in_place import separable
from dwiml_func.optim.name_patterns import check_patterns, first_matches
from dwiml_func.types import Grads, Number, Optimizer, OptState, Params

__all__ = ["muon"]


def muon(
    *,
    weight_decay: Number = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
    others: Optimizer | None = None,
    exclude: str | None = None,
) -> Optimizer:
    """Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) for matrices, as `torch.optim.Muon`.

    Args:
        weight_decay: matrices shrink by the factor 1 - lr * weight_decay at each update.
        momentum: decay of the running mean of gradients.
        nesterov: whether to look ahead along the momentum.
        ns_coefficients: coefficients of the Newton-Schulz iteration, x, x^3 and x^5.
        eps: the least norm that a matrix is divided by.
        ns_steps: Newton-Schulz iterations, which run in bfloat16.
        adjust_lr_fn: factor of the learning rate for a matrix of A rows and B columns: sqrt(max(1, A/B)) for None or
            "original", 0.2 sqrt(max(A, B)) for "match_rms_adamw" (Liu et al., 2025, arXiv:2502.16982), which takes
            the learning rate and weight decay of AdamW.
        others: updates the parameters that are not matrices, at the same learning rate:
            `by_name(adamw, {}, lr=0.1)` has a tenth of it.
        exclude: pattern of matrices that `others` updates too, as in `by_name`: embeddings and the output layer.

    Returns:
        An optimizer. Its state is `{"momentum_buffer": ..., "others": ...}`. Updates can be differentiated with
        respect to `lr` and `weight_decay`; derivatives through the gradients have the precision of bfloat16.

    Raises:
        ValueError: a value out of range; at `init`, parameters that are not matrices without `others`, or a complex
            matrix.

    Example:
        >>> from dwiml_func.optim import adamw
        >>> optimizer = muon(others=adamw())
        >>> state = optimizer.init({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
        >>> list(state["momentum_buffer"]), list(state["others"]["exp_avg"])
        (['weight'], ['bias'])
    """
    check_options(weight_decay=weight_decay, momentum=momentum, eps=eps)
    if not 1 <= ns_steps < 100:
        raise ValueError(f"Expected ns_steps of at least 1 and below 100. Received: ns_steps={ns_steps}")
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        raise ValueError(f"Expected adjust_lr_fn 'original', 'match_rms_adamw' or None. Received: {adjust_lr_fn!r}")

    def init(params: Params) -> OptState:
        names = tuple(params)
        if exclude is not None:
            check_patterns((exclude,), names)
        patterns = () if exclude is None else (exclude,)
        excluded = {n for n, match in zip(names, first_matches(patterns, names), strict=True) if match is not None}
        matrices = {name: p for name, p in params.items() if p.dim() == 2 and name not in excluded}
        for name, matrix in matrices.items():
            if matrix.is_complex():
                raise ValueError(f"Expected real matrices for Muon. Received: complex {name}. Name it in exclude.")
        rest = {name: p for name, p in params.items() if name not in matrices}
        if rest and others is None:
            raise ValueError(
                f"Muon updates matrices only. Received: {at_most_three(list(rest), ', ')}. Give muon an optimizer for "
                "them, such as others=adamw()."
            )
        buffers = {name: torch.zeros_like(p) for name, p in matrices.items()}
        rest_state = others.init(rest) if rest and others is not None else {}
        states = {"momentum_buffer": buffers, "others": rest_state}
        return {key: state for key, state in states.items() if state}

    def kernel(run, grads, params, opt_state, lr, step, donate):
        buffers = lerp(run, opt_state["momentum_buffer"], grads, 1 - momentum, reuse=donate)
        directions = lerp(run, grads, buffers, momentum) if nesterov else buffers
        new_params = []
        for param, direction in zip(params, directions, strict=True):
            orthogonal = _orthogonalize(direction, ns_coefficients, eps, ns_steps).to(param.dtype)
            rate = lr * _lr_factor(param, adjust_lr_fn)
            decayed = run("mul", [param], 1 - lr * weight_decay, reuse=donate)
            new_params += run("add", decayed, [orthogonal], alpha=-rate, reuse=True)
        return new_params, {"momentum_buffer": buffers}

    def update(
        grads: Grads,
        opt_state: OptState,
        params: Params,
        *,
        donate: bool = False,
        weight: Number = 1,
        **rates: Any,
    ) -> tuple[dict[str, Tensor], OptState]:
        matrices = {name: params[name] for name in opt_state.get("momentum_buffer", {})}
        new_matrices, new_state = apply_kernel(
            *(kernel, ["momentum_buffer"] if matrices else [], grads, opt_state, matrices, weight_decay),
            donate=donate,
            uses_step=False,
            **rates,
        )
        new_params: dict[str, Tensor] = {**params, **new_matrices}
        result: dict[str, Any] = {**new_state}
        rest = {name: p for name, p in params.items() if name not in matrices}
        if rest and others is not None:
            rest_state = opt_state.get("others", {})
            updated, state = update_with(others, grads, rest_state, rest, donate=donate, weight=weight, **rates)
            new_params.update(updated)
            if state:
                result["others"] = state
        return new_params, result

    def eval_params(opt_state: OptState, params: Params) -> Params:
        assert others is not None
        assert others.eval_params is not None
        rest = {name: p for name, p in params.items() if name not in opt_state.get("momentum_buffer", {})}
        return {**params, **others.eval_params(opt_state.get("others", {}), rest)}

    if others is None:
        return Optimizer(init, separable(update, by="parameter"))
    check_optimizer("in others", others)
    separable(update, others, by="parameter")
    return Optimizer(init, update, eval_params if others.eval_params else None, others.uses_weight)


def _orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], eps: float, num_steps: int) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T, in bfloat16, by Newton-Schulz iterations."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def _lr_factor(matrix: Tensor, adjust_lr_fn: str | None) -> float:
    rows, columns = matrix.shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns)) if columns else 1.0
