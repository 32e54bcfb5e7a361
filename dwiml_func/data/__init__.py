"""Data path: from an HDF5 dataset to flat batches of streamlines with their inputs."""

from dwiml_func.data.augmentation import Augmentation
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import DatasetIndex, StreamlineDataset
from dwiml_func.data.hdf5.read import open_dataset, read_subsets
from dwiml_func.data.interpolation import interpolate
from dwiml_func.data.loader import BatchRequest, LoaderSpec, epoch_batches, load_batch
from dwiml_func.data.neighborhood import Neighborhood, interpolate_neighborhood
from dwiml_func.data.prefetch import Prefetched
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.sampler import EpochPlan, SamplerSpec, sample_epoch
from dwiml_func.data.streamlines import Streamlines, directions, input_offsets, previous_directions

__all__ = [
    "Augmentation",
    "BatchRequest",
    "DatasetIndex",
    "EpochPlan",
    "LoaderSpec",
    "Neighborhood",
    "Prefetched",
    "Resampling",
    "SamplerSpec",
    "StreamlineBatch",
    "StreamlineDataset",
    "Streamlines",
    "directions",
    "epoch_batches",
    "input_offsets",
    "interpolate",
    "interpolate_neighborhood",
    "load_batch",
    "open_dataset",
    "previous_directions",
    "read_subsets",
    "sample_epoch",
]
