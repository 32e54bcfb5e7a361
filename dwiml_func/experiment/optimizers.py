"""The optimizers of the command line: by name, with rules for groups of parameters, averages and accumulation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from dwiml_func._checks import truncated_repr
from dwiml_func.optim import (
    accumulate,
    adam,
    adamw,
    by_name,
    chain,
    clip_by_global_norm,
    ema,
    lion,
    muon,
    nadam,
    radam,
    rmsprop,
    schedule_free_adamw,
    schedule_free_sgd,
    sgd,
    skip_not_finite,
)
from dwiml_func.optim.name_patterns import check_patterns, first_matches
from dwiml_func.types import Number, Optimizer

if TYPE_CHECKING:
    from dwiml_func.experiment.training_config import TrainingConfig

__all__ = ["OPTIMIZERS", "OptimizerName", "apply_rules", "configured_optimizer", "parse_rules"]


def muon_and_adamw(
    *,
    weight_decay: Number = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
    exclude: str | None = None,
) -> Optimizer:
    """Muon for matrices and AdamW for the rest, with one learning rate and weight decay that suit both."""
    return muon(
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        ns_steps=ns_steps,
        adjust_lr_fn=adjust_lr_fn,
        others=adamw(weight_decay=weight_decay),
        exclude=exclude,
    )


OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "Adam": adam,
    "AdamW": adamw,
    "RAdam": radam,
    "SGD": sgd,
    "RMSprop": rmsprop,
    "NAdam": nadam,
    "Lion": lion,
    "Muon": muon_and_adamw,
    "ScheduleFreeAdamW": schedule_free_adamw,
    "ScheduleFreeSGD": schedule_free_sgd,
}
"""By name on the command line: functions of keyword options, `weight_decay` among them. To add one, add a line."""

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]
"""The names of optimizers on the command line."""


def configured_optimizer(training: TrainingConfig, *, weight_decay: Number | None = None) -> Optimizer:
    """Make the optimizer; a `weight_decay`, also a tensor, replaces that of the config.

    What the rules freeze is no parameter of a run, see `apply_rules`. Accumulation precedes clipping, and batches that
    are skipped are not accumulated.
    """
    make = OPTIMIZERS[training.optimizer]
    options: dict[str, Any] = {"weight_decay": training.weight_decay if weight_decay is None else weight_decay}
    if training.momentum is not None:
        if "momentum" not in inspect.signature(make).parameters:
            able = [name for name, each in OPTIMIZERS.items() if "momentum" in inspect.signature(each).parameters]
            raise ValueError(
                f"momentum: expected one of the optimizers {', '.join(able)}, received {training.optimizer}."
            )
        options["momentum"] = training.momentum
    groups = {
        pattern: own for pattern, own in parse_rules(training.rule, training.optimizer).items() if own is not None
    }
    optimizer = by_name(make, groups, **options) if groups else make(**options)
    if training.ema is not None:
        optimizer = ema(optimizer, training.ema)
    links = []
    if training.skip_not_finite is not None:
        links.append(skip_not_finite(training.skip_not_finite))
    if training.accumulate > 1:
        links.append(accumulate(training.accumulate))
        if training.clip_grad is not None:
            links.append(clip_by_global_norm(training.clip_grad))
    return chain(*links, optimizer) if links else optimizer


def parse_rules(rules: Sequence[str], optimizer: str) -> dict[str, dict[str, Any] | None]:
    """Read rules `PATTERN: NAME=VALUE, ...` or `PATTERN: frozen`: options by pattern, None for frozen parameters."""
    parsed: dict[str, dict[str, Any] | None] = {}
    for rule in rules:
        pattern, _, text = (part.strip() for part in rule.partition(":"))
        if not pattern or not text:
            raise ValueError(
                f"rule: expected 'PATTERN: NAME=VALUE, ...' or 'PATTERN: frozen', received {truncated_repr(rule)}."
            )
        if pattern in parsed:
            raise ValueError(f"rule: expected one rule for {pattern!r}, with all its options. Received: two.")
        parsed[pattern] = None if text == "frozen" else _parse_options(pattern, text, optimizer)
    return parsed


def _parse_options(pattern: str, text: str, optimizer: str) -> dict[str, Any]:
    known = {
        name: str if parameter.default is None else type(parameter.default)
        for name, parameter in inspect.signature(OPTIMIZERS[optimizer]).parameters.items()
    } | {"lr": float}
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = name.replace("-", "_")
        if name not in known or not equals:
            raise ValueError(
                f"rule {pattern!r}: expected NAME=VALUE with one of {', '.join(sorted(known))}, or frozen alone, "
                f"received {part.strip()!r} for {optimizer}."
            )
        if name in options:
            raise ValueError(f"rule {pattern!r}: expected {name} once, received it twice.")
        try:
            options[name] = _READERS[known[name]](value)
        except (ValueError, KeyError):
            raise ValueError(
                f"rule {pattern!r}: expected a {_KINDS[known[name]]} for {name}, received {value!r}."
            ) from None
    return options


_READERS: dict[type, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
    str: str,
}
_KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def apply_rules(model: torch.nn.Module, training: TrainingConfig) -> None:
    """Freeze what the rules freeze; ValueError for a rule that takes no parameter, or if none is left to train."""
    rules = parse_rules(training.rule, training.optimizer)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    try:
        check_patterns(rules, trained)
    except ValueError as error:
        raise ValueError(f"rule: {error}") from None
    matches = dict(zip(trained, first_matches(tuple(rules), tuple(trained)), strict=True))
    for number, (pattern, options) in enumerate(rules.items()):
        own = [name for name, match in matches.items() if match == number]
        if not own:
            raise ValueError(
                f"rule: expected a parameter for {pattern!r}. Received: only parameters that earlier rules match. "
                "The first rule that matches counts: give narrower patterns first."
            )
        if options is None:
            for name in own:
                trained.pop(name).requires_grad_(False)
    if not trained:
        raise ValueError("rule: expected a parameter to train. Received: rules that freeze all of them.")
    if rules:  # the optimizer checks its own patterns, such as those of Muon's exclude
        configured_optimizer(training).init({name: param.detach().to("meta") for name, param in trained.items()})
