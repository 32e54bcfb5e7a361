"""The options of a run that concern its data: what is read, and how batches are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dwiml_func._checks import STRICT, check_number
from dwiml_func.data.augmentation import Augmentation
from dwiml_func.data.hdf5.lazy import parse_bytes
from dwiml_func.data.neighborhood import Neighborhood
from dwiml_func.data.resampling import Resampling, StepRule

__all__ = ["BatchConfig", "DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read from the HDF5 dataset.

    Raises:
        ValueError: a part of the neighbourhood is missing or out of range, or the size of the cache cannot be read.

    Example:
        >>> DataConfig().input_group_name
        'input'
    """

    __pydantic_config__: ClassVar = STRICT

    input_group_name: str = "input"
    """Name of the input volume's group."""
    streamline_group_name: str = "streamlines"
    """Name of the streamlines' group."""
    interpolation: Literal["nearest", "trilinear", "trilinear-corner"] = "trilinear"
    """How the volume is read between voxel centres. "trilinear-corner" is that of dwi_ml, half a voxel off."""
    neighborhood_type: Literal["axes", "grid"] | None = None
    """Points around each point where the volume is read too: on the axes, or on a cubic grid. None: nowhere else."""
    neighborhood_radius: int | None = None
    """How many steps away from the point. axes: 1 reads 7 points, 2 reads 13; grid: 27, 125."""
    neighborhood_resolution: float | None = None
    """Length of a step, in voxels."""
    lazy: bool = False
    """Read streamlines and volumes from the file when a batch needs them. The results are the same."""
    cache_size: str = "2GB"
    """With --lazy: how much memory each process may keep volumes in."""

    def __post_init__(self) -> None:
        parse_bytes(self.cache_size)
        _ = self.neighborhood

    @property
    def neighborhood(self) -> Neighborhood | None:
        """Where around each point the volume is read too."""
        kind, radius, resolution = self.neighborhood_type, self.neighborhood_radius, self.neighborhood_resolution
        if kind is not None and radius is not None and resolution is not None:
            return Neighborhood(type=kind, radius=radius, resolution=resolution)
        if kind is None and radius is None and resolution is None:
            return None
        raise ValueError(
            "neighborhood_type, neighborhood_radius and neighborhood_resolution go together: expected all three or "
            f"none, received {kind}, {radius} and {resolution}."
        )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How streamlines are put into batches.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> BatchConfig().batch_size_training
        100
    """

    __pydantic_config__: ClassVar = STRICT

    batch_size_training: int = 100
    """Size of a training batch."""
    batch_size_validation: int = 100
    """Size of a validation batch. It cannot change the training."""
    batch_size_units: Literal["nb_streamlines", "length_mm"] = "nb_streamlines"
    """What the sizes count: streamlines, or mm of streamlines (10000 is usual)."""
    nb_streamlines_per_chunk: int | None = None
    """With length_mm: streamlines drawn at once while a batch is filled. None: 256."""
    nb_subjects_per_batch: int | None = None
    """Most subjects that share a batch. None: all."""
    cycles: int | None = None
    """Batches drawn from the same subjects before others are chosen. None: until they have no more."""
    max_batches_per_epoch_training: int = 1000
    """Most training batches in an epoch."""
    max_batches_per_epoch_validation: int = 1000
    """Most validation batches in an epoch. It cannot change the training."""
    processes: int = 0
    """Processes that load batches ahead; 0 loads them in a thread of the training process. The results are the same."""
    step_size: float | None = None
    """Resample streamlines to steps of about this size, in mm. None: points as in the dataset."""
    step_rule: StepRule = "nearest"
    """With --step-size: make steps that come closest to it, or longer ones as dwi_ml does, for models to export."""
    nb_points: int | None = None
    """Resample streamlines to this number of points. None: points as in the dataset."""
    compress: float | None = None
    """Remove points that lie within this distance of a straight line, in mm. None: points as in the dataset."""
    noise_gaussian_size_forward: float = 0.0
    """Standard deviation, in voxels, of noise on the points that training gives the model as previous directions."""
    noise_gaussian_size_loss: float = 0.0
    """The same for the points that training takes as targets."""
    split_ratio: float = 0.0
    """Share of the streamlines of each training batch that are split in two."""
    reverse_ratio: float = 0.0
    """Share of the streamlines of each training batch that are reversed."""

    def __post_init__(self) -> None:
        for name in ("batch_size_training", "batch_size_validation"):
            check_number(name, getattr(self, name), at_least=1)
        for name in ("max_batches_per_epoch_training", "max_batches_per_epoch_validation"):
            check_number(name, getattr(self, name), at_least=1)
        check_number("processes", self.processes, at_least=0)
        for name in ("nb_streamlines_per_chunk", "nb_subjects_per_batch", "cycles"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), at_least=1)
        if self.cycles is not None and self.nb_subjects_per_batch is None:
            raise ValueError("cycles: expected nb_subjects_per_batch beside it, received none.")
        _ = self.resampling, self.augmentation

    @property
    def resampling(self) -> Resampling:
        """How streamlines are sampled."""
        return Resampling(
            step_size=self.step_size, nb_points=self.nb_points, compress=self.compress, step_rule=self.step_rule
        )

    @property
    def augmentation(self) -> Augmentation:
        """What is done to training streamlines."""
        return Augmentation(
            noise_gaussian_size_forward=self.noise_gaussian_size_forward,
            noise_gaussian_size_loss=self.noise_gaussian_size_loss,
            split_ratio=self.split_ratio,
            reverse_ratio=self.reverse_ratio,
        )
