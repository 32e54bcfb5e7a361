"""`dwiml-func create-hdf5`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func.cli._output import folders_above
from dwiml_func.cli._parsing import parse
from dwiml_func.data.creation.config import read_groups_config
from dwiml_func.data.creation.create import create_dataset
from dwiml_func.data.creation.files import read_subjects
from dwiml_func.data.resampling import Resampling

__all__ = ["CreateHdf5Options", "run"]

_WITHOUT_VALUE = {"--enforce-files-presence": "True", "--compress": "0.01"}  # what an option means that stands alone
_SUBJECTS = {
    "Subjects": ("training_subjs", "validation_subjs", "testing_subjs"),
    "Streamlines": ("step_size", "nb_points", "compress", "remove_invalid"),
    "Files": ("enforce_files_presence", "skip_enforce_files_presence", "overwrite"),
}
_NUM_NOTES = 10  # lines about what was left out, at most


@dataclass(frozen=True, kw_only=True)
class CreateHdf5Options:
    """Make an HDF5 dataset of a folder of subjects, each a folder with the same NIfTI files and tractograms.

    CONFIG.json names the groups: {"input": {"type": "volume", "files": ["dwi/sh.nii.gz"], "standardization": "all",
    "std_mask": ["masks/wm.nii.gz"]}, "streamlines": {"type": "streamlines", "files": ["bundles/*.trk"]}}. A volume's
    "standardization" is "all", "independent", "per_file" or "none"; streamlines may have "dps_keys", and
    "connectivity_matrix" with "connectivity_nb_blocs" or "connectivity_labels".

    Example: dwiml-func create-hdf5 subjects config.json data.hdf5 --training-subjs train.txt
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Holds one folder a subject."""
    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG.json")]
    """The groups to make, in JSON."""
    out_hdf5: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT.hdf5")]
    """Where the dataset shall appear; folders above it are made."""
    training_subjs: Annotated[str | None, tyro.conf.arg(metavar="FILE", aliases=["--training-subjects"])] = None
    """Text file with the training subjects, one a line. None: no subjects."""
    validation_subjs: Annotated[str | None, tyro.conf.arg(metavar="FILE", aliases=["--validation-subjects"])] = None
    """Text file with the validation subjects. None: no subjects."""
    testing_subjs: Annotated[str | None, tyro.conf.arg(metavar="FILE", aliases=["--testing-subjects"])] = None
    """Text file with the testing subjects. None: no subjects."""
    step_size: Annotated[float | None, tyro.conf.arg(metavar="MM")] = None
    """Resample streamlines to this distance between points, in mm. None: points as in the tractograms."""
    nb_points: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Resample streamlines to this number of points. None: points as in the tractograms."""
    compress: Annotated[float | None, tyro.conf.arg(metavar="MM")] = None
    """Leave out points that lie within this distance of a straight line, in mm; alone it means 0.01. None: points as in
    the tractograms."""
    remove_invalid: bool = False
    """Leave out streamlines that leave the volume, have NaN points or have no length; otherwise they are an error."""
    enforce_files_presence: tyro.conf.FlagConversionOff[bool] = True
    """Fail when a file is missing. False: pass over it, and say so."""
    skip_enforce_files_presence: bool = False
    """The same as --enforce-files-presence False."""
    overwrite: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Replace an existing file."""


def run(arguments: Sequence[str], program: str) -> int:
    """Run the command.

    Args:
        arguments: the command line.
        program: the program's name in messages.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        ValueError, OSError: something is wrong with the arguments or the files; nothing was written.

    Example:
        >>> run(["subjects", "config.json", "data.hdf5"], "dwiml-func create-hdf5")  # doctest: +SKIP
    """
    options = parse(CreateHdf5Options, _with_values(arguments), program, subjects=_SUBJECTS)
    lists = {
        "training": options.training_subjs,
        "validation": options.validation_subjs,
        "testing": options.testing_subjs,
    }
    subsets = {subset: () if path is None else read_subjects(path) for subset, path in lists.items()}
    resampling = Resampling(step_size=options.step_size, nb_points=options.nb_points, compress=options.compress)
    try:
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
                enforce_files_presence=options.enforce_files_presence and not options.skip_enforce_files_presence,
                overwrite=options.overwrite,
            )
    except KeyboardInterrupt:
        print(f"{program}: interrupted. No file was written.", file=sys.stderr)
        return 130
    for line in notes[:_NUM_NOTES]:
        print(f"{program}: {line}.", file=sys.stderr)
    if len(notes) > _NUM_NOTES:
        print(f"{program}: and {len(notes) - _NUM_NOTES} more of this kind.", file=sys.stderr)
    counts = ", ".join(f"{len(names)} {subset}" for subset, names in subsets.items())
    size = Path(options.out_hdf5).stat().st_size / 1e6
    print(f"{options.out_hdf5}: subjects: {counts}; {size:.1f} MB. To look at it: dwiml-func info {options.out_hdf5}")
    return 0


def _with_values(arguments: Sequence[str]) -> list[str]:
    """Give its value to an option that stands alone."""
    result: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        result.append(argument)
        value = _WITHOUT_VALUE.get(argument.replace("_", "-"))
        if value is not None and not _is_value(following):
            result.append(value)
    return result


def _is_value(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("True", "False")
    return True
