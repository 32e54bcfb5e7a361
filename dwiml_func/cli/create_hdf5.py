"""`dwiml-func create-hdf5`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func.cli._output import folders_above
from dwiml_func.cli._parsing import CommandOptions, optional_value
from dwiml_func.data.creation.config import read_groups_config
from dwiml_func.data.creation.create import create_dataset
from dwiml_func.data.creation.files import read_subjects
from dwiml_func.data.resampling import Resampling

__all__ = ["Options", "run"]

_log = logging.getLogger(__name__)
_NUM_NOTES = 10  # warnings, at most


def _read_bool(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(f"Expected True or False. Received: {text!r}.")
    return text == "True"


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Make an HDF5 dataset from a folder of subjects, each a folder with the same NIfTI files and tractograms.

    CONFIG.json names the groups: {"input": {"type": "volume", "files": ["dwi/sh.nii.gz"], "standardization": "all",
    "std_mask": ["masks/wm.nii.gz"]}, "streamlines": {"type": "streamlines", "files": ["bundles/*.trk"]}}. A volume's
    "standardization" is "all", "independent", "per_file" or "none"; spherical harmonics have an "sh_order", and an
    "sh_basis" other than "descoteaux07"; streamlines may have "dps_keys", and "connectivity_matrix" with
    "connectivity_nb_blocs" or "connectivity_labels".

    Example: dwiml-func create-hdf5 subjects config.json data.hdf5 --training-subjs train.txt
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Contains one folder per subject."""
    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG.json")]
    """JSON file that describes the groups."""
    out_hdf5: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT.hdf5")]
    """Output HDF5 file; missing folders are made."""
    training_subjs: Annotated[str | None, tyro.conf.arg(metavar="FILE", aliases=["--training-subjects"])] = None
    """Text file with the training subjects, one per line. None: no subjects."""
    validation_subjs: Annotated[str | None, tyro.conf.arg(metavar="FILE", aliases=["--validation-subjects"])] = None
    """Text file with the validation subjects. None: no subjects."""
    testing_subjs: Annotated[str | None, tyro.conf.arg(metavar="FILE", aliases=["--testing-subjects"])] = None
    """Text file with the testing subjects. None: no subjects."""
    step_size: Annotated[float | None, tyro.conf.arg(metavar="MM")] = None
    """Resample streamlines to this distance between points, in mm. None: points as in the tractograms."""
    nb_points: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Resample streamlines to this number of points. None: points as in the tractograms."""
    compress: Annotated[float | None, optional_value(float, float, "[MM]", alone=0.01)] = None
    """Remove points within this distance of a straight line, in mm; 0.01 without a value. None: points as in the
    tractograms."""
    remove_invalid: bool = False
    """Remove streamlines that leave the volume, have NaN points or have no length; otherwise they are an error."""
    allow_empty: bool = False
    """Pass over tractograms without streamlines, with a warning. Without it or --remove-invalid they are an error."""
    enforce_files_presence: Annotated[
        tyro.conf.FlagConversionOff[bool], optional_value(bool, _read_bool, "[True|False]", alone=True)
    ] = True
    """Fail when a file is missing. False: skip it, with a warning."""
    skip_enforce_files_presence: bool = False
    """The same as --enforce-files-presence False."""
    overwrite: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Replace an existing file."""


def run(options: Options) -> int:
    """Make the dataset."""
    lists = {
        "training": options.training_subjs,
        "validation": options.validation_subjs,
        "testing": options.testing_subjs,
    }
    subsets = {subset: () if path is None else read_subjects(path) for subset, path in lists.items()}
    resampling = Resampling(step_size=options.step_size, nb_points=options.nb_points, compress=options.compress)
    with folders_above(options.out_hdf5) as path:
        notes = create_dataset(
            options.folder,
            read_groups_config(options.config),
            path,
            training=subsets["training"],
            validation=subsets["validation"],
            testing=subsets["testing"],
            resampling=resampling,
            remove_invalid=options.remove_invalid,
            allow_empty=options.allow_empty,
            enforce_files_presence=options.enforce_files_presence and not options.skip_enforce_files_presence,
            overwrite=options.overwrite,
        )
    for line in notes[:_NUM_NOTES]:
        _log.warning("%s.", line)
    if len(notes) > _NUM_NOTES:
        _log.warning("%d more like these.", len(notes) - _NUM_NOTES)
    counts = ", ".join(f"{len(names)} {subset}" for subset, names in subsets.items())
    size = Path(options.out_hdf5).stat().st_size / 1e6
    print(f"{options.out_hdf5}: subjects: {counts}; {size:.1f} MB. To inspect it: dwiml-func info {options.out_hdf5}")
    return 0
