"""Which subjects and which files a dataset is made from: everything is looked up before anything is read."""

from __future__ import annotations

import codecs
import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dwiml_func.data.creation.config import GroupsConfig, VolumeGroup
from dwiml_func.files.paths import missing_text, other_spelling

__all__ = ["GroupFiles", "SingleFile", "Source", "check_subjects", "find_files", "read_subjects"]


class Source(NamedTuple):
    """A file with its subject and group, as errors name it."""

    subject: str
    group: str
    path: Path

    def __str__(self) -> str:
        return f"subject {self.subject!r}, group {self.group!r}, file {self.path}"


class SingleFile(Source):
    """A file that belongs to no subject."""

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> SingleFile:
        """The file at a path."""
        return cls("", "", Path(path))

    def __str__(self) -> str:
        return str(self.path)


class GroupFiles(NamedTuple):
    """The files of one group of one subject; masks are of volumes, matrix and labels of streamlines."""

    files: tuple[Source, ...]
    masks: tuple[Source, ...] = ()
    matrix: Source | None = None
    labels: Source | None = None


def read_subjects(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read a list of subjects: a text file, one subject a line; empty lines are ignored.

    The text is UTF-8, or UTF-16 with its byte order mark, as Windows editors write it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The list of subjects {missing_text(path)}")
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        lines = content.decode(encoding).splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected a list of subjects, one a line. Received bytes that are no UTF-8") from None
    if any("\0" in line for line in lines):
        raise ValueError(f"{path}: expected a list of subjects in UTF-8. Received zero bytes. Save it as UTF-8")
    return tuple(line.strip() for line in lines if line.strip())


def check_subjects(folder: Path, subsets: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """All subjects, each of which must be in one subset and have a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder of subjects {missing_text(folder)}")
    subset_of: dict[str, str] = {}
    folders: dict[Path, str] = {}
    for subset, names in subsets.items():
        for name in names:
            if subset_of.get(name) == subset:
                raise ValueError(f"Subject {name!r} is listed twice in the {subset} subset. Remove one of them")
            if name in subset_of:
                raise ValueError(
                    f"Subject {name!r} is in two subsets, {subset_of[name]} and {subset}. Expected each subject in one"
                )
            if "/" in name or name in (".", ".."):
                raise ValueError(f"Subject {name!r} of the {subset} subset: expected the name of a folder in {folder}")
            subset_of[name] = subset
            first = folders.setdefault((folder / name).resolve(), name)
            if first != name:
                raise ValueError(f"Subjects {first!r} and {name!r} are one folder. Expected each subject once")
    if not subset_of:
        raise ValueError(f"No subjects: the {', '.join(subsets)} subsets are all empty. List at least one subject")
    missing = [name for name in subset_of if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(subset_of)} subjects have no folder in {folder}: {', '.join(map(repr, missing))}"
            + other_spelling(missing, os.listdir(folder))
        )
    return tuple(subset_of)


def find_files(
    folder: Path, subject: str, groups: GroupsConfig, *, enforce_presence: bool = True
) -> tuple[dict[str, GroupFiles], list[str]]:
    """Find the files of a subject: group -> files, and one line for every missing file.

    Patterns are paths below the subject's folder; `**` is any number of folders, none included. An unpacked TRX is a
    folder. With `enforce_presence` a missing file is an error; otherwise the file, and a group left without any, is
    skipped.
    """
    missing: list[str] = []

    def matching(group: str, patterns: Sequence[str]) -> tuple[Source, ...]:
        found: list[Source] = []
        for pattern in patterns:
            path = folder / subject / pattern
            if _is_file(path):
                matches = [path]
            else:
                has_magic = glob.has_magic(pattern)
                names = glob.glob(pattern, root_dir=folder / subject, recursive=True) if has_magic else []
                matches = [folder / subject / name for name in sorted(set(names))]
            for match in (path, *matches):
                if match.is_symlink() and not match.exists():
                    missing.append(f"{Source(subject, group, match)}: the file {missing_text(match)}")
                    break
            else:
                matches = [match for match in matches if _is_file(match)]
                if not matches:
                    reason = "no file matches" if glob.has_magic(pattern) else "the file does not exist"
                    missing.append(f"{Source(subject, group, path)}: {reason}")
            found += [Source(subject, group, match) for match in matches if _is_file(match)]
        files: dict[object, Source] = {}
        for source in found:
            status = source.path.stat()
            first = files.setdefault((status.st_dev, status.st_ino), source)
            if first is not source:
                also = "" if first.path == source.path else f" It is the same as {first.path}."
                raise ValueError(f"{source}: two entries of the config give this file.{also} Expected each file once")
        return tuple(found)

    def one(group: str, name: str | None) -> Source | None:
        found = () if name is None else matching(group, [name])
        if len(found) > 1:
            raise ValueError(f"{found[1]}: {name!r} also gives {found[0].path}. Expected one file")
        return found[0] if found else None

    result: dict[str, GroupFiles] = {}
    for name, group in groups.items():
        files = matching(name, group.files)
        if isinstance(group, VolumeGroup):
            found = GroupFiles(files, masks=matching(name, group.std_mask))
        else:
            matrix, labels = one(name, group.connectivity_matrix), one(name, group.connectivity_labels)
            found = GroupFiles(files, matrix=matrix, labels=labels)
        if files:
            result[name] = found
    if missing and enforce_presence:
        more = f" (and {len(missing) - 1} more files of this subject are missing)" if len(missing) > 1 else ""
        raise FileNotFoundError(missing[0] + more)
    return result, missing


def _is_file(path: Path) -> bool:
    return path.is_file() or (path.suffix.lower() == ".trx" and path.is_dir())
