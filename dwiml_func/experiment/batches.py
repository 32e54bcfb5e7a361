"""The data of a run and its batches: opened, planned, loaded ahead, cut into shards and moved to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dwiml_func.core.batch_source import Batches
from dwiml_func.core.rng import Key, Stream, fold_in
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.device_data import DeviceData, copy_to_device, device_bytes, make_on_device, plan_batch
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.loader import BatchRequest, LoaderSpec, epoch_batches, load_batch
from dwiml_func.data.neighborhood import check_cubic_voxels
from dwiml_func.data.padding import padded_lengths, with_fixed_shape, with_padded_length
from dwiml_func.data.prefetch import MovedAhead, Prefetched, SizedBatches
from dwiml_func.data.resampling import Resampling, steps_for
from dwiml_func.data.sampler import SamplerSpec
from dwiml_func.data.shards import cut_batch
from dwiml_func.experiment.config import RunConfig
from dwiml_func.files.fingerprint import size_and_time
from dwiml_func.models.config import check_getter_for_compressed

__all__ = [
    "RunData",
    "check_usable",
    "first_batch",
    "loader_spec",
    "make_batches",
    "open_data",
    "sampled_batch",
    "whole_batches",
    "with_padded_lengths",
]

_MOST_SAMPLED = 1000
_MOST_OF_FREE = 0.5  # how much of a device's free memory the data may take


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """The subjects of a run; those of the validation may be none. `read` has size and time of the file then.

    `on_device` has the copies on devices that batches are made from, for all who use these data.
    """

    training: StreamlineDataset
    validation: StreamlineDataset
    read: Mapping[str, int] = field(default_factory=dict)
    on_device: dict[Any, dict[StreamlineDataset, DeviceData]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def linked(self) -> tuple[Path, ...]:
        """The other files from which the dataset takes values."""
        return tuple(sorted({*self.training.linked, *self.validation.linked}))

    @property
    def evaluation(self) -> StreamlineDataset:
        """The subjects on which a finished model is judged: the validation subjects, else the training subjects."""
        return self.validation if self.validation.index.num_total else self.training


def open_data(config: RunConfig) -> RunData:
    """Open the training and the validation subjects; ValueError where the model cannot use them."""
    options = config.data
    path = Path(config.hdf5_file)
    read = size_and_time(path.stat()) if path.is_file() else {}
    subsets = {
        subset: open_dataset(
            config.hdf5_file,
            subset,
            input_group_name=options.input_group_name,
            streamline_group_name=options.streamline_group_name,
            lazy=options.lazy,
            cache_size=options.cache_size,
        )
        for subset in ("training", "validation")
    }
    for dataset in subsets.values():
        check_usable(dataset, config)
    return RunData(training=subsets["training"], validation=subsets["validation"], read=read)


def make_batches(config: RunConfig, data: RunData, device: torch.device) -> tuple[Batches, Batches | None, Batches]:
    """Make the sources of training, validation and evaluation batches; of the validation None without its subjects."""
    num_shards, num_workers = config.training.num_shards, config.batches.processes
    sampler = config.batches.sampler("validation")
    prepare, copies = _preparation(config, data), _copies_on_device(config, data, device)

    def load(num_shards: int, **plan: Any) -> SizedBatches[Any]:
        spec, copy = plan["loader_spec"], copies.get(plan["dataset"])
        if copy is None:
            batches: SizedBatches[Any] = epoch_batches(**plan, num_workers=num_workers)
        else:  # plans are made too fast to need workers
            batches = epoch_batches(**plan, load=partial(plan_batch, data=copy, spec=spec))
        if num_shards > 1:
            batches = _Map(partial(cut_batch, num_shards=num_shards), batches)
        if prepare is not None:
            batches = _Map(prepare, batches)
        if device.type == "cuda":
            batches = _Map(lambda batch: batch.pin_memory(), batches)
        if num_workers == 0 or copy is not None:
            batches = Prefetched(batches)
        if copy is None and device.type == "cpu":
            return batches

        def move(batch: Any) -> Any:
            batch = batch.to(device, non_blocking=True)
            return batch if copy is None else make_on_device(batch, data=copy, spec=spec)

        return MovedAhead(batches, move, device)

    def train(key: Key, epoch: int, start_batch: int) -> SizedBatches[Any]:
        return load(num_shards, **_training_plan(config, data, key), epoch=epoch, start_batch=start_batch)

    def evaluation(key: Key, epoch: int, start_batch: int, *, num_shards: int = 1) -> SizedBatches[Any]:
        # The same plan at every epoch: a capped validation then sees the same streamlines, and losses compare.
        parts = {"dataset": data.evaluation, "sampler_spec": sampler, "loader_spec": loader_spec(config)}
        key = fold_in(_data_key(config, key), Stream.VALID_PLAN)
        return load(num_shards, **parts, key=key, epoch=0, start_batch=start_batch)

    has_validation = data.evaluation is data.validation
    return train, partial(evaluation, num_shards=num_shards) if has_validation else None, evaluation


def first_batch(config: RunConfig, data: RunData, device: torch.device) -> StreamlineBatch:
    """The first batch of the run, or its first shard."""
    plan = _training_plan(config, data, Key(config.training.rng))
    batch = next(iter(epoch_batches(**plan, epoch=0)))
    if config.training.num_shards > 1:
        batch = cut_batch(batch, config.training.num_shards)[0]
        assert batch is not None  # of the shards only the last can be empty
    prepare = _preparation(config, data)
    return (batch if prepare is None else prepare(batch)).to(device)


def with_padded_lengths(config: RunConfig, data: RunData) -> RunConfig:
    """The config of a new run, with the lengths to which it pads its batches, if it does."""
    if not config.training.pads or config.padded_lengths is not None:
        return config
    lengths = padded_lengths((data.training, data.validation), config.batches.resampling)
    return replace(config, padded_lengths=lengths)


def _preparation(config: RunConfig, data: RunData) -> Callable[[Any], Any] | None:
    """What is added to batches while they are on the host; None for nothing."""
    lengths = with_padded_lengths(config, data).padded_lengths  # runs of earlier versions have not recorded them
    if not config.training.pads or lengths is None:
        return None
    prepare = partial(with_padded_length, lengths=lengths, max_len=config.model.max_len)
    if config.training.captures and config.model.model != "autoencoder":  # whose batches have few shapes anyway
        return lambda batch: with_fixed_shape(prepare(batch))
    return prepare


def sampled_batch(dataset: StreamlineDataset, config: RunConfig) -> StreamlineBatch:
    """At most 1,000 streamlines at even distances in the dataset's order, not augmented."""
    total = dataset.index.num_total
    ids = np.linspace(0, total - 1, min(total, _MOST_SAMPLED)).astype(np.int64)
    return load_batch(BatchRequest(ids, None, 0, 0), dataset=dataset, spec=loader_spec(config))


def whole_batches(dataset: StreamlineDataset, config: RunConfig, *, batch_size: int) -> SizedBatches[StreamlineBatch]:
    """All streamlines of a dataset, read and resampled as for a training, not augmented; ValueError if it has none."""
    if dataset.index.num_total == 0:
        raise ValueError(f"{dataset.path} has no streamlines of {dataset.subset} subjects to evaluate on.")
    sampler = SamplerSpec(batch_size=batch_size, max_batches=None)
    return Prefetched(epoch_batches(dataset, sampler, loader_spec(config), key=Key(0), epoch=0))


def loader_spec(config: RunConfig) -> LoaderSpec:
    """How to make batches that are not augmented, for validation and evaluation."""
    return LoaderSpec(
        interpolation=config.data.interpolation,
        neighborhood=config.data.neighborhood,
        resampling=config.batches.resampling,
        add_eos=config.model.add_eos,
        streamlines_only=config.model.model == "autoencoder",
    )


def check_usable(dataset: StreamlineDataset, config: RunConfig) -> None:
    """Raise ValueError for a dataset that the model cannot use.

    A neighbourhood requires cubic voxels; batches in mm require lengths; some direction getters cannot use compressed
    streamlines.
    """
    if config.batches.batch_size_units == "length_mm" and dataset.index.num_total and dataset.index.lengths_mm is None:
        raise ValueError(
            f"{dataset.path}: batches in length_mm need the lengths of the {dataset.subset} streamlines "
            "(euclidean_lengths), and there are none. Create the dataset again, or count batches in nb_streamlines"
        )
    if config.batches.step_size is not None and dataset.index.lengths_mm is not None:
        steps_for(dataset.index.lengths_mm, config.batches.step_size)
    if config.data.neighborhood is not None:
        check_cubic_voxels(dataset.voxel_sizes, dataset.index.subjects)
    if dataset.resampling.compress is not None and config.batches.resampling == Resampling():
        check_getter_for_compressed(config.model.dg_key, f"{dataset.path} was compressed when it was made")


def _copies_on_device(config: RunConfig, data: RunData, device: torch.device) -> dict[StreamlineDataset, DeviceData]:
    """The copies in the device's memory by dataset, shared by members; none where batches are made on the host."""
    spec, choice = loader_spec(config), config.training.device_data
    if choice == "off" or (choice == "auto" and (device.type == "cpu" or config.data.lazy)):
        return {}
    if spec.streamlines_only and config.batches.split_ratio > 0:  # the halves are resampled in each batch
        if choice == "on":
            raise ValueError("device_data: expected auto or off for an autoencoder with a split_ratio, received on.")
        return {}
    known = (str(device), spec.resampling, spec.streamlines_only)
    if known not in data.on_device:
        datasets = [dataset for dataset in (data.training, data.validation) if dataset.index.num_total]
        num_bytes, free = sum(map(device_bytes, datasets)), _free_bytes(device)
        if num_bytes > _MOST_OF_FREE * free:
            if choice == "on":
                raise ValueError(
                    f"device_data: the data take {num_bytes / 1e9:.3g} GB, more than half of the "
                    f"{free / 1e9:.3g} GB that are free on {device}. Use auto or off."
                )
            return {}
        data.on_device[known] = {each: copy_to_device(each, spec, device) for each in datasets}
    return data.on_device[known]


def _free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def _training_plan(config: RunConfig, data: RunData, key: Key) -> dict[str, Any]:
    """The arguments of `epoch_batches` for training batches, except the position in the run."""
    key = _data_key(config, key)
    return {
        "dataset": data.training,
        "sampler_spec": config.batches.sampler("training"),
        "loader_spec": replace(loader_spec(config), augmentation=config.batches.augmentation),
        "key": fold_in(key, Stream.TRAIN_PLAN),
        "augment_key": fold_in(key, Stream.TRAIN_AUGMENT),
    }


def _data_key(config: RunConfig, key: Key) -> Key:
    return key if config.training.data_rng is None else Key(config.training.data_rng)


class _Map:
    """The results of a function on each batch; they can be counted."""

    def __init__(self, function: Callable[[Any], Any], batches: SizedBatches[Any]) -> None:
        self._function = function
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return map(self._function, self._batches)
