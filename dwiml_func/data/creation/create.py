"""Make a dataset: from a folder of subjects with NIfTI files and tractograms to one HDF5 file.

The folder, the config and the layout of the file are those of scil-vital/dwi_ml (its `docs/for_users/hdf5.rst`): one
folder a subject, the same files in each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwiml_func._checks import one_line
from dwiml_func.data.creation.config import GroupsConfig, StreamlineGroup, VolumeGroup
from dwiml_func.data.creation.connectivity import load_connectivity, write_connectivity
from dwiml_func.data.creation.files import GroupFiles, check_subjects, find_files
from dwiml_func.data.creation.tractograms import Tractogram, load_streamlines
from dwiml_func.data.creation.volumes import load_volume
from dwiml_func.data.grid import Grid, orientation_difference, shear_of
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.spherical_harmonics import harmonics_fault

if TYPE_CHECKING:
    import h5py

__all__ = ["create_dataset"]

_INPUT_GROUP = "input"  # what models take as input by default


def create_dataset(
    folder: str | os.PathLike[str],
    groups: GroupsConfig,
    out: str | os.PathLike[str],
    *,
    training: Sequence[str] = (),
    validation: Sequence[str] = (),
    testing: Sequence[str] = (),
    resampling: Resampling | None = None,
    remove_invalid: bool = False,
    allow_empty: bool = False,
    enforce_files_presence: bool = True,
    overwrite: bool = False,
    date: str | None = None,
) -> tuple[str, ...]:
    """Write a dataset from one folder a subject; returns what was left out, a line each.

    All files are looked up before the first is read, one subject at a time is in memory, and the file appears whole or
    not at all. A progress bar runs when standard error is a terminal. `remove_invalid` removes streamlines that leave
    the volume, are corrupt or have no length; `allow_empty` passes over tractograms without streamlines; without
    `enforce_files_presence`, missing files are skipped. `date` is text for the file's `data_and_time`, by default the
    time now. Errors name subject, group and file.
    """
    from tqdm import tqdm

    from dwiml_func.data.hdf5.write import new_dataset  # h5py and nibabel: once the arguments make sense

    folder = Path(folder)
    resampling = resampling or Resampling()
    subsets = {"training": training, "validation": validation, "testing": testing}
    subjects = check_subjects(folder, subsets)
    notes: list[str] = []
    files: dict[str, dict[str, GroupFiles]] = {}
    for subject in subjects:
        files[subject], missing = find_files(folder, subject, groups, enforce_presence=enforce_files_presence)
        notes += [f"{line}. It is skipped" for line in missing]

    options: Any = {"resampling": resampling, "remove_invalid": remove_invalid, "allow_empty": allow_empty}
    load = partial(load_streamlines, **options, note=notes.append)
    where = "before the first subject"
    try:
        with new_dataset(
            out,
            **subsets,
            groups_config={name: _plain(group) for name, group in groups.items()},
            date=date or datetime.now().strftime("%d %B %Y %X"),
            resampling=resampling,
            overwrite=overwrite,
        ) as file:
            num_features: dict[str, tuple[int, str]] = {}
            first: tuple[str, Grid] | None = None
            for subject in tqdm(subjects, desc="Creating", unit="subject", disable=None):
                where = f"at subject {subject!r}"
                parent = file.create_group(subject)
                grid = _write_volumes(parent, subject, groups, files[subject], num_features)
                grid = _write_streamlines(parent, groups, files[subject], grid, load)
                if grid is not None:
                    first = first or (subject, grid)
                    notes += [] if (fault := shear_of(grid)) is None else [f"subject {subject!r}: {fault}"]
                    difference = orientation_difference(grid, first[1])
                    if difference is not None:
                        raise ValueError(
                            f"subject {subject!r}: {difference}, as subject {first[0]!r} has. Reorient all volumes and "
                            "streamlines alike: models learn directions along the voxel axes"
                        )
                file.flush()  # a full disk shows here, with the subject's name
    except OSError as error:
        if isinstance(error, FileNotFoundError | FileExistsError | IsADirectoryError | PermissionError):
            raise
        text = f"{out}: cannot be written, {where} ({one_line(error)}). No file was left. Is the disk full?"
        raise OSError(text) from error
    return tuple(notes)


def _plain(group: VolumeGroup | StreamlineGroup) -> dict[str, object]:
    """A group as it would stand in the JSON file, without the options that it leaves out."""
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(group).items()}
    return {name: value for name, value in options.items() if value not in (None, [])}


def _write_volumes(
    parent: h5py.Group,
    subject: str,
    groups: GroupsConfig,
    files: dict[str, GroupFiles],
    num_features: dict[str, tuple[int, str]],
) -> Grid | None:
    """Write a subject's volume groups, and return the grid that they share."""
    from dwiml_func.data.hdf5.write import write_volume

    grid = None
    for name, group in groups.items():
        if not isinstance(group, VolumeGroup) or name not in files:
            continue
        volume = load_volume(
            files[name].files,
            standardization=group.standardization,
            masks=files[name].masks if group.standardization != "none" else (),
            expected=grid,
            forbid_masks=group.standardization != "none" or name == _INPUT_GROUP,
        )
        grid = grid or volume.grid
        features, first = num_features.setdefault(name, (volume.data.shape[3], subject))
        if volume.data.shape[3] != features:
            raise ValueError(
                f"{files[name].files[-1]}: {volume.data.shape[3]} features in the group, but subject {first!r} has "
                f"{features}. Expected the same number for all subjects"
            )
        undo = {"standardization_mean": volume.mean, "standardization_std": volume.std}
        attributes = {key: value for key, value in undo.items() if value is not None} | group.harmonics
        if fault := harmonics_fault(attributes, features):
            raise ValueError(f"{files[name].files[-1]}: {fault}")
        write_volume(parent, name, volume.data, volume.grid.affine, attributes=attributes)
    return grid


def _write_streamlines(
    parent: h5py.Group,
    groups: GroupsConfig,
    files: dict[str, GroupFiles],
    grid: Grid | None,
    load: Callable[..., Tractogram],
) -> Grid | None:
    """Write a subject's streamline groups, and return the grid of all its groups."""
    from dwiml_func.data.hdf5.write import write_streamlines

    for name, group in groups.items():
        if isinstance(group, VolumeGroup) or name not in files:
            continue
        lines = load(files[name].files, expected=grid, dps_keys=group.dps_keys)
        assert lines.grid is not None
        grid = grid or lines.grid
        connectivity = load_connectivity(group, files[name], lines.grid)
        write_streamlines(
            parent,
            name,
            lines.points,
            lines.offsets,
            affine=lines.grid.affine,
            dimensions=lines.grid.shape,
            data_per_streamline=lines.per_streamline,
            bundles=lines.bundles,
        )
        if connectivity is not None:
            write_connectivity(parent[name], connectivity)  # type: ignore[arg-type]
    return grid
