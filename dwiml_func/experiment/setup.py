"""The steps of a run: compiled or not, on whole batches or on shards.

From a config to the parts of a run: data, model, steps. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from dwiml_func import optim
from dwiml_func.compiled.gradient import JitGradient
from dwiml_func.compiled.step import jit_step
from dwiml_func.compiled.warmup import WarmUpStep
from dwiml_func.core.autocast import check_bf16
from dwiml_func.core.loop import Batches
from dwiml_func.core.loss import LossFn, module_loss
from dwiml_func.core.rng import Key, Stream, fold_in, torch_rng
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.core.step import eval_step, train_step
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.loader import LoaderSpec, epoch_batches
from dwiml_func.data.neighborhood import check_cubic_voxels
from dwiml_func.data.prefetch import Prefetched, SizedBatches
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.sampler import SamplerSpec
from dwiml_func.data.shards import ShardedBatch, cut_batch
from dwiml_func.distributed.sharding import (
    SINGLE_PROCESS,
    ProcessGroup,
    check_shards,
    sharded_loss,
    sharded_value_and_grad,
)
from dwiml_func.experiment.config import BatchConfig, RunConfig, TrainingConfig
from dwiml_func.experiment.model_store import check_memory
from dwiml_func.models.config import build_model, check_getter_for_compressed
from dwiml_func.models.learn2track import compute_batch_loss
from dwiml_func.optim._foreach import Number
from dwiml_func.types import Metrics, Optimizer

__all__ = [
    "RunParts",
    "check_usable",
    "loader_spec",
    "make_eval_step",
    "make_optimizer",
    "make_step",
    "prepare",
    "with_seed",
]


def make_step(
    *,
    loss_fn: LossFn,
    optimizer: Optimizer,
    clip_grad: float | None,
    num_shards: int,
    process_group: ProcessGroup,
    compile_for: Callable[[], Any] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The training step, which takes over the memory of the states that it is given.

    Of a sharded step the gradient of a shard is compiled, and the sums and the optimizer are as without compilation. In
    each process it is compiled for the same shard, so that all have the same code and any number gives the same bits.

    Args:
        loss_fn, optimizer, clip_grad: as for `train_step`.
        num_shards: parts of a batch; above 1 the step takes batches that are cut.
        process_group: the processes that share the shards.
        compile_for: gives a batch, or a shard of one, to compile for; None does not compile.

    Returns:
        `step(state, batch, lr=lr)`.

    Example:
        >>> state, metrics = make_step(**parts)(state, batch, lr=0.001)  # doctest: +SKIP
    """
    parts: dict[str, Any] = {"loss_fn": loss_fn, "optimizer": optimizer, "clip_grad": clip_grad, "donate": True}
    if num_shards == 1:
        if compile_for is None:
            return partial(train_step, **parts)
        step = jit_step(**parts, dynamic=True)
        return WarmUpStep(step, eager=step.eager, graph=step.graph, first_batch=compile_for)
    eager = partial(train_step, **parts, gradient_fn=sharded_value_and_grad(process_group))
    if compile_for is None:
        return eager
    gradient = JitGradient(loss_fn, dynamic=True)
    compiled = partial(train_step, **parts, gradient_fn=sharded_value_and_grad(process_group, gradient))
    return WarmUpStep(compiled, eager=eager, graph=gradient.graph, first_batch=lambda: (compile_for(),) * num_shards)


def make_eval_step(
    loss_fn: LossFn, *, num_shards: int, process_group: ProcessGroup
) -> Callable[[TrainState, Any], Metrics]:
    """The validation step.

    Args:
        loss_fn, num_shards, process_group: as for `make_step`.

    Returns:
        `eval_step(state, batch)`.

    Example:
        >>> evaluate = make_eval_step(loss_fn, num_shards=1, process_group=SINGLE_PROCESS)  # doctest: +SKIP
    """
    return partial(eval_step, loss_fn=loss_fn if num_shards == 1 else sharded_loss(loss_fn, process_group))


_AUTOCAST = {"float32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """All parts of a run, made from its config.

    Args:
        config: the run's config.
        state: the first state.
        train: training batches, for `train_and_validate`.
        valid: validation batches; None where the dataset has no validation subjects.
        evaluation: batches, never augmented, to judge a finished model on: of the validation subjects or, where there
            are none, of the training subjects.
        step: `train_step` with loss, optimizer and clipping bound, or a compiled step.
        eval_step: `eval_step` with the loss bound.
        loss_fn: the loss.
        nb_features: features of the input volume at a point.
        training_set: the training subjects.
        validation_set: the validation subjects, possibly none.
        evaluation_set: those of `evaluation`.
        process_group: the processes that train together.

    Example:
        >>> state, metrics = setup.step(setup.state, batch, lr=0.001)  # doctest: +SKIP
    """

    config: RunConfig
    state: TrainState
    train: Batches
    valid: Batches | None
    evaluation: Batches
    step: Callable[..., tuple[TrainState, Metrics]]
    eval_step: Callable[[TrainState, Any], Metrics]
    loss_fn: LossFn
    nb_features: int
    training_set: StreamlineDataset
    validation_set: StreamlineDataset
    evaluation_set: StreamlineDataset
    process_group: ProcessGroup = SINGLE_PROCESS


def prepare(config: RunConfig, process_group: ProcessGroup = SINGLE_PROCESS) -> RunParts:
    """Open the data and build the model, the optimizer and the steps of a run. Nothing is written.

    Args:
        config: the run's config.
        process_group: the processes that train together, see `dwiml_func.distributed.process_group`.

    Returns:
        The parts.

    Raises:
        FileNotFoundError, ValueError: the dataset is missing, corrupt or lacks what the config asks for, or there is no
            GPU for `use_gpu` or none that has `precision`, or the processes cannot share the shards evenly.

    Example:
        >>> setup = prepare(RunConfig(hdf5_file="data.hdf5"))  # doctest: +SKIP
    """
    device = _device(config.training)
    check_shards(config.training.num_shards, process_group)
    groups = {
        "input_group_name": config.data.input_group_name,
        "streamline_group_name": config.data.streamline_group_name,
    }
    storage = {"lazy": config.data.lazy, "cache_size": config.data.cache_size}
    training_set = open_dataset(config.hdf5_file, "training", **groups, **storage)
    validation_set = open_dataset(config.hdf5_file, "validation", **groups, **storage)
    check_usable(training_set, config)
    check_usable(validation_set, config)
    validation_loader = loader_spec(config)
    training_loader = replace(validation_loader, augmentation=config.batches.augmentation)
    model = _new_model(config, training_set.num_features)
    loss_fn = module_loss(model, compute_batch_loss, autocast=_AUTOCAST[config.training.precision])
    optimizer = make_optimizer(config.training)
    data_rng = config.training.data_rng
    training_sampler = _sampler_spec(
        config.batches, config.batches.batch_size_training, config.batches.max_batches_per_epoch_training
    )
    validation_sampler = _sampler_spec(
        config.batches, config.batches.batch_size_validation, config.batches.max_batches_per_epoch_validation
    )
    load = partial(_load, num_workers=config.batches.processes, device=device)
    num_shards = config.training.num_shards

    def train(key: Key, epoch: int, start_batch: int) -> Any:
        key = key if data_rng is None else Key(data_rng)
        plan, augment = fold_in(key, Stream.TRAIN_PLAN), fold_in(key, Stream.TRAIN_AUGMENT)
        parts = (training_set, training_sampler, training_loader)
        return load(*parts, key=plan, augment_key=augment, epoch=epoch, start_batch=start_batch, num_shards=num_shards)

    evaluation_set = validation_set if validation_set.index.num_total else training_set

    def evaluation(key: Key, epoch: int, start_batch: int, num_shards: int = 1) -> Any:
        # The same plan at every epoch: a capped validation then sees the same streamlines, and losses compare.
        parts = (evaluation_set, validation_sampler, validation_loader)
        plan = fold_in(key if data_rng is None else Key(data_rng), Stream.VALID_PLAN)
        return load(*parts, key=plan, epoch=0, start_batch=start_batch, num_shards=num_shards)

    def first_batch() -> StreamlineBatch:
        """Of the run, or the first shard of it."""
        key = Key(config.training.rng if data_rng is None else data_rng)
        plan, augment = fold_in(key, Stream.TRAIN_PLAN), fold_in(key, Stream.TRAIN_AUGMENT)
        parts = (training_set, training_sampler, training_loader)
        batches = epoch_batches(*parts, key=plan, augment_key=augment, epoch=0, start_batch=0, num_workers=0)
        batch = next(iter(batches))
        return (cut_batch(batch, num_shards)[0] or batch if num_shards > 1 else batch).to(device)

    step = make_step(
        loss_fn=loss_fn,
        optimizer=optimizer,
        clip_grad=config.training.clip_grad,
        num_shards=num_shards,
        process_group=process_group,
        compile_for=first_batch if config.training.compile else None,
    )
    return RunParts(
        config=config,
        state=init_state(model.to(device), optimizer, seed=config.training.rng),
        train=train,
        valid=partial(evaluation, num_shards=num_shards) if evaluation_set is validation_set else None,
        evaluation=evaluation,
        step=step,
        eval_step=make_eval_step(loss_fn, num_shards=num_shards, process_group=process_group),
        loss_fn=loss_fn,
        nb_features=training_set.num_features,
        training_set=training_set,
        validation_set=validation_set,
        evaluation_set=evaluation_set,
        process_group=process_group,
    )


def make_optimizer(training: TrainingConfig, *, weight_decay: Number | None = None) -> optim.Optimizer:
    """The optimizer that a config asks for.

    Args:
        training: the training's options.
        weight_decay: replaces that of the options, also with a tensor. None: as they say.

    Returns:
        The optimizer.

    Example:
        >>> sorted(make_optimizer(TrainingConfig()).init({}))
        ['exp_avg', 'exp_avg_sq']
    """
    makers = {"Adam": optim.adam, "AdamW": optim.adamw, "RAdam": optim.radam, "SGD": optim.sgd}
    return makers[training.optimizer](weight_decay=training.weight_decay if weight_decay is None else weight_decay)


def with_seed(setup: RunParts, config: RunConfig) -> RunParts:
    """The parts of another run on the same data, with the same model: its first state is that of its own seed.

    Args:
        setup: the parts of a run.
        config: that of the other, which differs in training options alone.

    Returns:
        Parts that share the data.

    Example:
        >>> with_seed(setup, config).state  # doctest: +SKIP
    """
    model = _new_model(config, setup.nb_features).to(_device(config.training))
    optimizer = make_optimizer(config.training)
    return replace(setup, config=config, state=init_state(model, optimizer, seed=config.training.rng))


def loader_spec(config: RunConfig) -> LoaderSpec:
    """How batches are made that are not augmented: for validation and evaluation.

    Args:
        config: the run's config.

    Returns:
        The spec.

    Example:
        >>> loader_spec(RunConfig(hdf5_file="data.hdf5")).interpolation
        'trilinear'
    """
    return LoaderSpec(
        interpolation=config.data.interpolation,
        neighborhood=config.data.neighborhood,
        resampling=config.batches.resampling,
        add_eos=config.model.add_eos,
    )


def check_usable(dataset: StreamlineDataset, config: RunConfig) -> None:
    """Refuse a dataset that the model cannot use.

    Args:
        dataset: what was opened.
        config: the run's config.

    Raises:
        ValueError: its voxels are not cubes and there is a neighbourhood; or it was made of compressed streamlines,
            which the direction getter cannot use.

    Example:
        >>> check_usable(dataset, config)  # doctest: +SKIP
    """
    if config.data.neighborhood is not None:
        check_cubic_voxels(dataset.voxel_sizes, dataset.index.subjects)
    if dataset.resampling.compress is not None and config.batches.resampling == Resampling():
        check_getter_for_compressed(config.model.dg_key, f"{dataset.path} was compressed when it was made")


def _sampler_spec(batches: BatchConfig, batch_size: int, max_batches: int) -> SamplerSpec:
    return SamplerSpec(
        batch_size=batch_size,
        max_batches=max_batches,
        batch_size_units=batches.batch_size_units,
        nb_streamlines_per_chunk=batches.nb_streamlines_per_chunk,
        nb_subjects_per_batch=batches.nb_subjects_per_batch,
        cycles=batches.cycles,
    )


def _load(*parts: Any, num_workers: int, device: torch.device, num_shards: int, **place: Any) -> Any:
    """The batches of an epoch, made ahead of the training, cut into shards and moved to its device."""
    loader = epoch_batches(*parts, num_workers=num_workers, **place)
    batches = loader if num_workers > 0 else Prefetched(loader)
    if num_shards > 1:
        batches = _Each(partial(cut_batch, num_shards=num_shards), batches)
    return batches if device.type == "cpu" else _Each(lambda batch: batch.to(device, non_blocking=True), batches)


class _Each:
    """What a function makes of each batch; they can be counted."""

    def __init__(self, function: Callable[[Any], Any], batches: SizedBatches[Any]) -> None:
        self._function = function
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[StreamlineBatch | ShardedBatch]:
        return map(self._function, self._batches)


def _device(training: TrainingConfig) -> torch.device:
    if training.use_gpu and not torch.cuda.is_available():
        raise ValueError("--use-gpu: no CUDA device was found. Leave the option out to train on the CPU.")
    device = torch.device("cuda" if training.use_gpu else "cpu")
    if training.precision == "bf16":
        check_bf16(device)
    return device


def _new_model(config: RunConfig, nb_features: int) -> torch.nn.Module:
    shape = {"nb_features": nb_features, "neighborhood": config.data.neighborhood}
    check_memory(config.model, **shape)
    with torch_rng(fold_in(Key(config.training.rng), Stream.INIT)):
        return build_model(config.model, **shape)
