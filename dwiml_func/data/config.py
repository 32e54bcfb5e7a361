"""The options of a run that concern its data: what is read, and how batches are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dwiml_func._checks import STRICT, check_number
from dwiml_func.data.augmentation import Augmentation
from dwiml_func.data.hdf5.cache_size import parse_bytes
from dwiml_func.data.interpolation import Interpolation
from dwiml_func.data.neighborhood import Neighborhood, NeighborhoodType
from dwiml_func.data.resampling import Resampling, StepRule
from dwiml_func.data.sampler import BatchUnits, SamplerSpec

__all__ = ["BatchConfig", "DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read from the HDF5 dataset. Options are checked by what they make: the neighbourhood, the cache size."""

    __pydantic_config__: ClassVar = STRICT

    input_group_name: str = "input"
    """Name of the input volume's group."""
    streamline_group_name: str = "streamlines"
    """Name of the streamlines' group."""
    interpolation: Interpolation = "trilinear"
    """How the volume is read between voxel centres. "trilinear-corner" is that of dwi_ml, half a voxel off."""
    neighborhood_type: NeighborhoodType | None = None
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
    """How streamlines are put into batches. Options are checked by the specs that they make."""

    __pydantic_config__: ClassVar = STRICT

    batch_size_training: int = 100
    """Size of a training batch."""
    batch_size_validation: int = 100
    """Size of a validation batch. It cannot change the training."""
    batch_size_units: BatchUnits = "nb_streamlines"
    """What the sizes count: streamlines, or mm of streamlines (10000 is usual)."""
    nb_streamlines_per_chunk: int | None = None
    """With length_mm: streamlines sampled at once while a batch is filled. None: 256."""
    nb_subjects_per_batch: int | None = None
    """Most subjects that share a batch. None: all."""
    cycles: int | None = None
    """Batches from the same subjects before others are chosen. None: until they have no more."""
    max_batches_per_epoch_training: int = 1000
    """Most training batches in an epoch."""
    max_batches_per_epoch_validation: int = 1000
    """Most validation batches in an epoch. It cannot change the training."""
    processes: int = 0
    """Processes that load batches ahead; 0 loads them in a thread of the training process. The results are the same."""
    step_size: float | None = None
    """Resample streamlines to steps of about this size, in mm. None: points as stored in the file."""
    step_rule: StepRule = "nearest"
    """With --step-size: make steps that come closest to it, or longer ones as dwi_ml does, for models to export."""
    nb_points: int | None = None
    """Resample streamlines to this number of points. None: points as stored in the file."""
    compress: float | None = None
    """Remove points that lie within this distance of a straight line, in mm. None: points as stored in the file."""
    noise_gaussian_size_forward: float = 0.0
    """Standard deviation, in voxels (in mm where voxels are not cubes), of noise on the points that training gives the
    model as previous directions."""
    noise_gaussian_size_loss: float = 0.0
    """The same for the points that training takes as targets."""
    split_ratio: float = 0.0
    """Share of the streamlines of each training batch that are split in two."""
    reverse_ratio: float = 0.0
    """Share of the streamlines of each training batch that are reversed."""

    def __post_init__(self) -> None:
        check_number("processes", self.processes, at_least=0)
        _ = self.resampling, self.augmentation, self.sampler("training"), self.sampler("validation")

    def sampler(self, phase: Literal["training", "validation"]) -> SamplerSpec:
        """How an epoch of training or validation is cut into batches."""
        try:
            return SamplerSpec(
                batch_size=getattr(self, f"batch_size_{phase}"),
                max_batches=getattr(self, f"max_batches_per_epoch_{phase}"),
                batch_size_units=self.batch_size_units,
                nb_streamlines_per_chunk=self.nb_streamlines_per_chunk,
                nb_subjects_per_batch=self.nb_subjects_per_batch,
                cycles=self.cycles,
            )
        except ValueError as error:
            raise ValueError(f"{phase} batches: {error}") from None

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
