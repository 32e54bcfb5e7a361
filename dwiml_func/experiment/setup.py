"""From a config to the parts of a run: data, batches, model, optimizer, steps. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from dwiml_func.compiled.gradient import JitGradient
from dwiml_func.compiled.step import jit_step
from dwiml_func.compiled.warmup import WarmUpStep
from dwiml_func.core.batch_source import Batches
from dwiml_func.core.checked_step import checked_step
from dwiml_func.core.epoch import EvalStep
from dwiml_func.core.loss import LossFn, module_loss
from dwiml_func.core.metrics import read_means
from dwiml_func.core.precision import check_bf16, set_matmul_precision
from dwiml_func.core.rates import Step
from dwiml_func.core.report import check_monitor
from dwiml_func.core.rng import Key, Stream, fold_in, torch_rng
from dwiml_func.core.skip_batches import parse_batch, skip_batches
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.core.step import eval_step, train_step
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.distributed.sharding import (
    SINGLE_PROCESS,
    ProcessGroup,
    check_shards,
    sharded_loss,
    sharded_value_and_grad,
)
from dwiml_func.experiment.batches import (
    RunData,
    first_batch,
    make_batches,
    open_data,
    sampled_batch,
    with_padded_lengths,
)
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.model_store import check_memory
from dwiml_func.experiment.optimizers import apply_rules, configured_optimizer
from dwiml_func.experiment.tracking.lag_validation import run_windows, with_window_lag
from dwiml_func.experiment.tracking.phase import with_tracking_phase
from dwiml_func.experiment.training_config import PHASE_METRICS, WINDOW_LAG, TrainingConfig
from dwiml_func.models.autoencoder.autoencoder import Autoencoder, compute_reconstruction_loss
from dwiml_func.models.config import build_model
from dwiml_func.models.learn2track import compute_batch_loss
from dwiml_func.tracking.window_lag import AHEAD_MM, EVERY_MM
from dwiml_func.types import Optimizer

__all__ = ["MAX_GRAPHS", "RunParts", "check_monitored", "make_model", "make_parts", "make_steps", "prepare"]

MAX_GRAPHS = 64
"""CUDA graphs of a training step: 8 lengths, times numbers of streamlines after splitting."""
_AUTOCAST = {"float32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """The parts of a run. They hold no state, so several runs can use them, one after the other.

    `evaluation` gives batches, never augmented, of `data.evaluation`; `valid` is None without validation subjects.
    """

    config: RunConfig
    data: RunData
    model: torch.nn.Module
    optimizer: Optimizer
    loss_fn: LossFn
    train: Batches
    valid: Batches | None
    evaluation: Batches
    step: Step
    eval_step: EvalStep
    process_group: ProcessGroup = SINGLE_PROCESS

    @property
    def nb_features(self) -> int:
        """Number of features of the input volume at a point."""
        return self.data.training.num_features

    @property
    def loop_options(self) -> dict[str, Any]:
        """What the training loop takes of the run; when it ends is apart."""
        training = self.config.training
        return {
            "train": self.train,
            "step": self.step,
            "valid": self.valid,
            "eval_step": self.eval_step if self.valid else None,
            "learning_rate": training.schedule,
            **training.judging,
        }

    def as_new(self) -> RunParts:
        """The parts of a new run, whose config records the lengths of its padded batches."""
        return replace(self, config=with_padded_lengths(self.config, self.data))

    def first_state(self) -> TrainState:
        """A new first state, in memory that no other shares."""
        return init_state(self.model, self.optimizer, seed=self.config.training.rng)


def prepare(config: RunConfig, process_group: ProcessGroup = SINGLE_PROCESS) -> RunParts:
    """Open the data and make the parts of a run.

    FileNotFoundError or ValueError where the dataset is missing, corrupt or lacks what the config asks for, where there
    is no GPU for `use_gpu` or none that has `precision`, or where the processes cannot share the shards evenly.
    """
    check_shards(config.training.num_shards, process_group)
    _device(config.training)
    parts = make_parts(config, open_data(config), process_group)
    check_monitored(parts)
    return parts


def check_monitored(parts: RunParts, *, is_member: bool = False) -> None:
    """Raise ValueError where the run has no metric of the name that it monitors; `loss` is always there."""
    monitor = parts.config.training.monitor
    if monitor == "loss":
        return
    state = parts.first_state()
    if is_member and monitor in PHASE_METRICS:
        raise ValueError(f"monitor: {monitor} is measured in single runs. Received: an ensemble. Monitor the loss.")
    names = {"loss"}
    for batch in islice(parts.evaluation(state.key, 0, 0), 1):
        names |= set(read_means(eval_step(state, batch, loss_fn=parts.loss_fn)))
    if parts.valid is None:
        names |= {"grad_norm", "unclipped_grad_norm"}
    elif monitor in PHASE_METRICS:
        return  # known at the first validation
    elif not parts.config.training.skip_window_lag and hasattr(parts.model, "run_step"):
        if monitor == WINDOW_LAG and run_windows(parts.config, parts.data.validation, parts.model) is None:
            raise ValueError(
                f"monitor: {monitor} needs validation streamlines with even steps, of {EVERY_MM + AHEAD_MM:g} mm or "
                "more. The dataset has none. Monitor the loss, or validate on longer streamlines."
            )
        names.add(WINDOW_LAG)
    check_monitor(monitor, names)


def make_parts(
    config: RunConfig, data: RunData, process_group: ProcessGroup = SINGLE_PROCESS, *, is_member: bool = False
) -> RunParts:
    """Make the parts of a run on data that are open; runs on the same data can share them. Sets torch's precision.

    A member of an ensemble has no window lag of its own: that of all members is measured together.
    """
    set_matmul_precision(config.training.matmul_precision)
    device = _device(config.training)
    model = make_model(config, data.training.num_features, training=data.training).to(device)
    optimizer = configured_optimizer(config.training)
    loss: Any = compute_reconstruction_loss if isinstance(model, Autoencoder) else compute_batch_loss
    loss_fn = module_loss(model, loss, autocast=_AUTOCAST[config.training.precision])
    train, valid, evaluation = make_batches(config, data, device)
    step, evaluate = make_steps(
        config.training, loss_fn, optimizer, process_group, first_batch=partial(first_batch, config, data, device)
    )
    if config.training.skip_batches:
        step = skip_batches(step, map(parse_batch, config.training.skip_batches))
    if config.checkpoints.check_every is not None:
        step = checked_step(step, config.checkpoints.check_every)
    if valid is not None and not is_member:
        tracked: dict[str, Any] = {"config": config, "dataset": data.validation, "model": model, "optimizer": optimizer}
        if not config.training.skip_window_lag:
            valid, evaluate = with_window_lag(valid, evaluate, **tracked)
        if config.training.add_a_tracking_validation_phase:
            valid, evaluate = with_tracking_phase(valid, evaluate, **tracked)
    return RunParts(
        config=config,
        data=data,
        model=model,
        optimizer=optimizer,
        loss_fn=loss_fn,
        train=train,
        valid=valid,
        evaluation=evaluation,
        step=step,
        eval_step=evaluate,
        process_group=process_group,
    )


def make_model(config: RunConfig, nb_features: int, *, training: StreamlineDataset | None = None) -> torch.nn.Module:
    """Make the model, with the initial parameters of the config's seed; frozen ones require no gradient.

    An autoencoder takes the standardisation of coordinates from the subjects in `training`.
    """
    shape: dict[str, Any] = {"nb_features": nb_features, "neighborhood": config.data.neighborhood}
    shape["nb_points"] = config.batches.nb_points
    check_memory(config.model, **shape)
    with torch_rng(fold_in(Key(config.training.rng), Stream.INIT)):
        model = build_model(config.model, **shape)
    if isinstance(model, Autoencoder) and training is not None and training.index.num_total:
        model.standardize(sampled_batch(training, config).points)
    apply_rules(model, config.training)
    return model


def make_steps(
    training: TrainingConfig,
    loss_fn: LossFn,
    optimizer: Optimizer,
    process_group: ProcessGroup = SINGLE_PROCESS,
    *,
    first_batch: Callable[[], Any],
) -> tuple[Step, EvalStep]:
    """Make the training and the validation step. The training step reuses the memory of the states it is given.

    With `compile` the step is compiled for `first_batch()`, a batch or a shard; on a GPU it is captured as CUDA graphs
    instead. With shards, the gradient of a shard is compiled, on a CPU: all processes then run the same code, so any
    number of processes gives bitwise identical results.
    """
    bound: dict[str, Any] = {
        "loss_fn": loss_fn,
        "optimizer": optimizer,
        "clip_grad": training.step_clip_grad,
        "donate": True,
    }
    if training.num_shards == 1:
        evaluate = partial(eval_step, loss_fn=loss_fn, optimizer=optimizer)
        if not training.compile:
            return partial(train_step, **bound), evaluate
        if training.captures:
            return jit_step(**bound, cuda_graphs=True, max_compilations=MAX_GRAPHS), evaluate
        step = jit_step(**bound, dynamic=True)
        return WarmUpStep(step, eager=step.eager, graph=step.graph, first_batch=first_batch), evaluate
    num_threads = 1 if training.use_gpu or training.compile else training.num_threads
    loss = sharded_loss(loss_fn, process_group, num_threads=num_threads)
    evaluate = partial(eval_step, loss_fn=loss, optimizer=optimizer)
    gradient_fn = sharded_value_and_grad(process_group, num_threads=num_threads)
    eager = partial(train_step, **bound, gradient_fn=gradient_fn)
    if not training.compile or training.use_gpu:  # compiled gradients are made of the CPU's recurrent layers
        return eager, evaluate
    gradient = JitGradient(loss_fn, dynamic=True)
    compiled = partial(train_step, **bound, gradient_fn=sharded_value_and_grad(process_group, gradient))

    warm_up = WarmUpStep(
        compiled, eager=eager, graph=gradient.graph, first_batch=lambda: (first_batch(),) * training.num_shards
    )
    return warm_up, evaluate


def _device(training: TrainingConfig) -> torch.device:
    if training.use_gpu and not torch.cuda.is_available():
        raise ValueError("--use-gpu: no CUDA device was found. Leave the option out to train on the CPU.")
    device = torch.device("cuda" if training.use_gpu else "cpu")
    if training.precision == "bf16":
        check_bf16(device)
    return device
