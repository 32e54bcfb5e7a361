"""The config of a new dataset: which files of a subject become which group, read strictly from JSON.

The keys are those of scil-vital/dwi_ml (its `docs/for_users/hdf5.rst`): group name -> `type`, `files`, and what belongs
to the type.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, TypeAdapter, ValidationError

from dwiml_func._checks import STRICT, at_most_three, problem_text
from dwiml_func.data.spherical_harmonics import HARMONICS
from dwiml_func.files.json import parse_json, read_config_file
from dwiml_func.files.paths import missing_text

__all__ = [
    "GroupsConfig",
    "Standardization",
    "StreamlineGroup",
    "VolumeGroup",
    "check_groups_config",
    "read_groups_config",
]

Standardization = Literal["all", "independent", "per_file", "none"]
"""Which values share a mean and a standard deviation: the whole group's, each feature's, each file's, or none."""


def _as_list(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _as_three(value: object) -> object:
    """20, [20] and [20, 20, 20] mean the same."""
    values = tuple(value) if isinstance(value, list) else (value,)
    return values * 3 if len(values) == 1 else values


_Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
_Blocs = Annotated[tuple[int, int, int], BeforeValidator(_as_three)]


@dataclass(frozen=True, kw_only=True)
class VolumeGroup:
    """A volume: NIfTI files, joined along their features. The union of `std_mask` says what is measured.

    Features that are coefficients of spherical harmonics have an even `sh_order`, a basis of dipy's, `sh_legacy` for
    dipy's legacy definition of that basis, and `sh_of` for what they describe.
    """

    __pydantic_config__: ClassVar = STRICT

    type: Literal["volume"] = "volume"
    files: _Names
    standardization: Standardization = "none"
    std_mask: _Names = ()
    sh_order: int | None = None
    sh_basis: Literal["descoteaux07", "tournier07"] | None = None
    sh_legacy: bool | None = None
    sh_of: Literal["signal", "fodf"] | None = None

    def __post_init__(self) -> None:
        _check_files(self.files)
        if self.sh_order is None and self.harmonics:
            raise ValueError(f"{', '.join(self.harmonics)}: require sh_order, received none")
        if self.sh_order is not None and (self.sh_order < 0 or self.sh_order % 2):
            raise ValueError(f"sh_order: expected an even number of at least 0, received {self.sh_order}")

    @property
    def harmonics(self) -> dict[str, Any]:
        """The attributes that say which spherical harmonics the features are; none where they are others."""
        values = {name: getattr(self, name) for name in HARMONICS}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class StreamlineGroup:
    """Streamlines: TRK, TCK or TRX files, one after the other; with a connectivity matrix of blocs or of labels."""

    __pydantic_config__: ClassVar = STRICT

    type: Literal["streamlines"] = "streamlines"
    files: _Names
    dps_keys: _Names = ()
    connectivity_matrix: str | None = None
    connectivity_nb_blocs: _Blocs | None = None
    connectivity_labels: str | None = None

    def __post_init__(self) -> None:
        _check_files(self.files)
        for key in self.dps_keys:
            if any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
                raise ValueError(
                    f"dps_keys: {key!r}: expected a name that is no path of '.' or '..', no empty part, no zero byte"
                )
            if any(other.startswith(f"{key}/") for other in self.dps_keys):
                raise ValueError(f"dps_keys: {key!r} and {key}/...: HDF5 cannot keep both. Rename one")
        if self.connectivity_nb_blocs is not None and min(self.connectivity_nb_blocs) < 1:
            raise ValueError(f"connectivity_nb_blocs: expected at least 1, received {self.connectivity_nb_blocs}")
        received = [
            name for name in ("connectivity_nb_blocs", "connectivity_labels") if getattr(self, name) is not None
        ]
        if self.connectivity_matrix is None and received:
            raise ValueError(f"{received[0]}: requires connectivity_matrix, received none")
        if self.connectivity_matrix is not None and len(received) != 1:
            raise ValueError(
                "connectivity_matrix: requires connectivity_nb_blocs or connectivity_labels, received "
                + ("both" if received else "neither")
            )


GroupsConfig = Mapping[str, VolumeGroup | StreamlineGroup]
"""Group name -> group, in the order of the file."""

_ADAPTER = TypeAdapter(dict[str, Annotated[VolumeGroup | StreamlineGroup, Discriminator("type")]])


def read_groups_config(path: str | os.PathLike[str]) -> GroupsConfig:
    """Read a JSON config file; the error names the first three wrong keys."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The config file {missing_text(path)}")
    content = parse_json(read_config_file(path, source=str(path)), source=str(path))
    return check_groups_config(content, source=str(path))


def check_groups_config(content: object, *, source: str = "config") -> GroupsConfig:
    """Check JSON data: group name -> keys. `source` names it in errors."""
    try:
        groups = _ADAPTER.validate_json(json.dumps(content))  # strict about Python data means: dataclasses only
    except ValidationError as error:
        raise ValueError(f"{source}: {at_most_three(list(map(_describe, error.errors())))}") from None
    if not groups:
        raise ValueError(f"{source}: expected at least one group, received none")
    for name in groups:
        if not name or "/" in name or "\0" in name or name in (".", ".."):
            raise ValueError(
                f"{source}: group {name!r}: expected a name without '/' and zero bytes, as HDF5 takes it for a path"
            )
    return groups


def _check_files(files: tuple[str, ...]) -> None:
    if not files or not all(files):
        raise ValueError("files: expected at least one file, received none")
    for name in files:
        if ".." in PurePath(name).parts or PurePath(name).is_absolute():  # all subjects would get the same data
            raise ValueError(f"files: {name!r}: expected a path below each subject's folder")


def _describe(problem: Mapping[str, Any]) -> str:
    """One problem in words: group, key, what was expected, what was received."""
    location = [str(part) for part in problem["loc"]]
    keys = location[2:]  # after the group's name comes the type by which pydantic chose
    where = f"group {location[0]!r}: " if location else ""
    kind = problem["type"]
    if kind == "union_tag_not_found":
        return f"{where}type: expected 'volume' or 'streamlines', received none"
    if kind == "union_tag_invalid":
        return f"{where}type: expected 'volume' or 'streamlines', received {problem['ctx']['tag']!r}"
    if kind in ("missing", "missing_argument"):
        return f"{where}{'.'.join(keys)}: expected, but missing"
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = VolumeGroup if location[1] == "volume" else StreamlineGroup
        known = ", ".join(field.name for field in fields(owner))
        return f"{where}unknown key {keys[-1]!r}. Known: {known}"
    return where + problem_text({**problem, "loc": keys})
