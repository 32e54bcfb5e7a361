"""What a model tracks in: a subject's volume and masks, from a dataset or from NIfTI files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dwiml_func.data.creation.config import Standardization
from dwiml_func.data.creation.files import SingleFile
from dwiml_func.data.creation.volumes import load_volume
from dwiml_func.data.grid import Grid, grid_difference, orientation_of, shear_of
from dwiml_func.data.hdf5.grid import read_grid
from dwiml_func.data.hdf5.layout import group_of, named_subject, read_volume
from dwiml_func.data.hdf5.problems import open_hdf5, raise_first, to_python
from dwiml_func.experiment.model_store import LoadedModel
from dwiml_func.experiment.training_facts import TRAINED_ON, check_same_kind, volume_facts

__all__ = ["TrackingInput", "read_dataset_input", "read_nifti_input"]

_log = logging.getLogger(__name__)


class TrackingInput(NamedTuple):
    """A volume (X, Y, Z, F) on its grid, and masks (X, Y, Z), float32; `source` names it in errors."""

    volume: Tensor
    grid: Grid
    seeding_mask: Tensor | None
    tracking_mask: Tensor | None
    source: str

    @property
    def voxel_sizes(self) -> tuple[float, float, float]:
        """mm along the three axes."""
        x, y, z = np.linalg.norm(self.grid.affine[:3, :3], axis=0).tolist()
        return x, y, z


def read_dataset_input(
    path: str,
    subject: str,
    model: LoadedModel,
    *,
    input_group: str,
    seeding_group: str | None = None,
    tracking_group: str | None = None,
) -> TrackingInput:
    """Read a subject of an HDF5 dataset; ValueError where it is missing or the model cannot read its volume."""
    with open_hdf5(Path(path)) as file:
        parent = named_subject(file, subject)
        group = raise_first(group_of(parent, input_group, "volume"), path)
        volume = raise_first(read_volume(group), path)
        grid = raise_first(read_grid(group, volume.shape[:3]), path)
        attributes = {name: to_python(value) for name, value in group.attrs.items()}

        def mask(name: str | None) -> Tensor | None:
            if name is None:
                return None
            group = raise_first(group_of(parent, name, "volume"), path)
            values = raise_first(read_volume(group), path)
            difference = grid_difference(raise_first(read_grid(group, values.shape[:3]), path), grid)
            return _mask(values, f"{path}: subject {subject!r}, group {name!r}", difference)

        masks = mask(seeding_group), mask(tracking_group)
    source = f"{path}: subject {subject!r}, group {input_group!r}"
    found = TrackingInput(torch.from_numpy(volume), grid, *masks, source)
    _check_fits(found, model, attributes)
    return found


def read_nifti_input(
    files: Sequence[str],
    model: LoadedModel,
    *,
    seeding_mask: str | None = None,
    tracking_mask: str | None = None,
    standardization: Standardization | None = None,
    std_masks: Sequence[str] = (),
) -> TrackingInput:
    """Read NIfTI files; `standardization` None is that of the model's training, where it is recorded."""
    recorded = model.facts.get(TRAINED_ON, {}).get("standardization")
    kind: Standardization = standardization or recorded or "none"
    for file in (*files, seeding_mask, tracking_mask, *std_masks):
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(f"The file does not exist: {file}.")
    sources = [SingleFile.at(file) for file in files]
    masks = [SingleFile.at(file) for file in std_masks] if kind != "none" else []
    volume = load_volume(sources, standardization=kind, masks=masks)

    def mask(file: str | None) -> Tensor | None:
        if file is None:
            return None
        found = load_volume([SingleFile.at(file)])
        return _mask(found.data, file, grid_difference(found.grid, volume.grid))

    found = TrackingInput(
        torch.from_numpy(volume.data), volume.grid, mask(seeding_mask), mask(tracking_mask), ", ".join(files)
    )
    _check_fits(found, model, {})
    return found


def _mask(values: np.ndarray, source: str, difference: str | None) -> Tensor:
    if values.shape[3] != 1:
        raise ValueError(f"{source}: expected a mask with one value a voxel. Received: {values.shape[3]}.")
    if difference is not None:
        raise ValueError(f"{source}: {difference}, as the input volume has.")
    return torch.from_numpy(values[..., 0])


def _check_fits(found: TrackingInput, model: LoadedModel, attributes: Mapping[str, Any]) -> None:
    expected, received = model.module.nb_features, found.volume.shape[3]
    if received != expected:
        raise ValueError(
            f"{found.source}: expected a volume with {expected} features, as the model's. Received: {received}. "
            "Track in the kind of volume that it was trained on."
        )
    facts = volume_facts(attributes) | {"orientation": orientation_of(found.grid.affine)}
    check_same_kind(model.facts.get(TRAINED_ON, {}), facts, found.voxel_sizes, source=found.source)
    if (fault := shear_of(found.grid)) is not None:
        _log.warning("%s: %s.", found.source, fault)
