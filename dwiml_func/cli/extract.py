"""`dwiml-func extract`."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from dwiml_func.cli._connectivity import write_nifti
from dwiml_func.cli._output import check_new_file, folders_above
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.data.hdf5.grid import read_grid
from dwiml_func.data.hdf5.layout import named_subject, read_volume
from dwiml_func.data.hdf5.problems import open_hdf5, present, raise_first, scalar
from dwiml_func.data.hdf5.subject import SubjectStreamlines, read_subject_streamlines
from dwiml_func.data.tractogram_writers import FORMATS, new_tractogram
from dwiml_func.files.atomic import atomic_write

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Write a group of a dataset's subject as a file of its own: a volume as NIfTI, streamlines as TRK, TCK or TRX.
    TRK and TRX hold their data per streamline too, as float32, and "bundle_ids" where the dataset has bundles.

    Example: dwiml-func extract data.hdf5 sub_5 streamlines sub_5.trk
    """

    hdf5_file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="HDF5_FILE")]
    """The dataset."""
    subject: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUBJECT")]
    """The subject."""
    group: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="GROUP")]
    """The name of its group."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.nii.gz|.trk|.tck|.trx|.npy")]
    """The file to write; missing folders are made."""
    save_connectivity: bool = False
    """Of a group of streamlines: write its connectivity matrix, as .npy."""
    overwrite: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Replace an existing file."""


def run(options: Options) -> int:
    """Write the file."""
    check_new_file(options.out, overwrite=options.overwrite)
    path, name = Path(options.hdf5_file), options.group
    with open_hdf5(path) as file:
        subject: Any = named_subject(file, options.subject)
        group: Any = subject.get(name, {})
        kind = scalar(group.attrs.get("type")) if name in subject else None
        if kind not in ("volume", "streamlines"):
            received = "no such group" if name not in subject else f"a group of type {kind!r}"
            raise ValueError(
                f"{path}: Expected a volume or streamlines among {present(subject)} of {options.subject!r}. "
                f"Received: {received}, {name!r}."
            )
        if options.save_connectivity:
            _check_ending(options.out, (".npy",), f"the connectivity matrix of {name!r}")
            if kind == "volume" or "connectivity_matrix" not in group:
                raise ValueError(f"save_connectivity: the group {name!r} has no connectivity matrix. Leave it out.")
            buffer = io.BytesIO()
            np.save(buffer, group["connectivity_matrix"][()])
            with folders_above(options.out) as out:
                atomic_write(out, buffer.getvalue())
        elif kind == "volume":
            _check_ending(options.out, (".nii", ".nii.gz"), f"the volume {name!r}")
            values = raise_first(read_volume(group), path)
            grid = raise_first(read_grid(group, values.shape[:3]), path)
            write_nifti(options.out, values[..., 0] if values.shape[3] == 1 else values, grid)
    if kind == "streamlines" and not options.save_connectivity:
        _check_ending(options.out, tuple(FORMATS), f"the streamlines {name!r}")
        found = read_subject_streamlines(path, options.subject, name)
        tables = {} if options.out.lower().endswith(".tck") else _tables(found)
        writing = {"columns": {key: values.shape[1] for key, values in tables.items()}, "overwrite": options.overwrite}
        with folders_above(options.out) as out, new_tractogram(out, found.grid, **writing) as lines:
            lines.write(found.streamlines.points.numpy(), found.streamlines.offsets.numpy(), tables)
    print(options.out)
    return 0


def _tables(found: SubjectStreamlines) -> dict[str, NDArray]:
    """Data per streamline under names that a file in a TRX archive can have."""
    tables = {} if found.bundles is None else {"bundle_ids": found.bundles.ids[:, None]}
    for key, values in found.tables.items():
        if values.ndim != 2 or len(values) != len(found.streamlines) or values.dtype.kind not in "biuf":
            raise ValueError(
                f"data per streamline {key!r}: expected numbers of shape ({len(found.streamlines)}, values). Received: "
                f"{values.dtype} of shape {values.shape}."
            )
        tables[key.replace("/", "_").replace(".", "_")] = values
    return tables


def _check_ending(out: str, endings: tuple[str, ...], what: str) -> None:
    if not out.lower().endswith(endings):
        raise ValueError(f"Expected a file {' or '.join(endings)} for {what}. Received: {out}.")
