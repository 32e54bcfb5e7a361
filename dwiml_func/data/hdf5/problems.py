"""Problems of an HDF5 dataset: found by generators, raised by the reader, listed by `dwiml-func info`.

A check is a generator: it yields the problems of one piece of the file and returns what it read. `raise_first` raises
the first problem; `collect` keeps all of them.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np

from dwiml_func._checks import one_line
from dwiml_func.files.archive import is_bomb
from dwiml_func.files.paths import missing_text

if TYPE_CHECKING:
    import h5py  # at run time only once a file is opened: `import dwiml_func.data` stays light

__all__ = [
    "Checked",
    "Problem",
    "attribute_of",
    "collect",
    "corrupt_file",
    "dataset_of",
    "location",
    "open_hdf5",
    "present",
    "raise_first",
    "scalar",
    "source_files",
    "to_python",
]


class Problem(NamedTuple):
    """What is wrong with a dataset, and where; an empty location is the whole file."""

    location: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.location}: {self.sentence}" if self.location else self.sentence


T = TypeVar("T")
Checked = Generator[Problem, None, T | None]
"""Yields problems and returns what was read; None where a problem made that impossible."""


def raise_first(checked: Checked[T], path: Path | str) -> T:
    """Return what was read; raise the first problem as a ValueError that names the file."""
    try:
        problem = next(checked)
    except StopIteration as end:
        return cast(T, end.value)
    raise ValueError(f"{path}: {problem}")


def collect(checked: Checked[T], problems: list[Problem]) -> T | None:
    """Return what was read; append all problems to a list."""
    while True:
        try:
            problems.append(next(checked))
        except StopIteration as end:
            return end.value


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading; any error of h5py about it becomes one line that names the file."""
    import h5py

    if not path.exists():
        raise FileNotFoundError(f"The HDF5 file {missing_text(path)}")
    if not path.is_file():
        raise ValueError(f"Expected an HDF5 file. Received: {path}, which is not a file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        if "unable to lock file" in str(error):
            raise OSError(_lock_text(path, error)) from error
        if not h5py.is_hdf5(path):
            text = f"Expected an HDF5 file. Received: {path}, which is not one ({one_line(error)})"
            raise ValueError(text) from error
        raise corrupt_file(path, error) from error


def _lock_text(path: Path, error: Exception) -> str:
    if getattr(error, "errno", None) in (errno.EAGAIN, errno.EACCES):
        return f"The HDF5 file is in use: another program has it open for writing: {path}. Close it there, or wait"
    reason = one_line(error)
    return f"The HDF5 file cannot be locked: {path} ({reason}). Set HDF5_USE_FILE_LOCKING=FALSE where locks do not work"


def corrupt_file(path: Path | str, error: Exception | str) -> ValueError:
    """The error of a file that HDF5 cannot read."""
    return ValueError(f"The HDF5 file is truncated or corrupt: {path} ({one_line(error)}). Copy or create it again")


def location(group: h5py.Group) -> str:
    """Subject and group, as messages name them."""
    subject, _, name = str(group.name).strip("/").partition("/")
    return f"subject {subject!r}, group {name!r}"


def to_python(value: object) -> object:
    """An attribute as plain Python, or as an array of numbers."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray) and value.dtype.kind in "SOU":
        return [to_python(element) for element in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def scalar(value: object) -> object:
    """An attribute of one value as plain Python, also where it was written as an array of one (MATLAB does)."""
    value = to_python(value)
    if isinstance(value, np.ndarray) and value.size == 1:
        return value.item()
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def dataset_of(group: h5py.Group, name: str, kinds: str) -> Checked[h5py.Dataset]:
    """A dataset of numbers, not read. `kinds` are numpy's: f float, i and u integers."""
    import h5py

    link: Any = group.get(name, getlink=True)
    is_link = isinstance(link, h5py.SoftLink | h5py.ExternalLink)
    try:
        dataset: Any = group.get(name)
    except (KeyError, OSError, RuntimeError):  # links in a circle
        if not is_link:
            raise
        dataset = None
    if not isinstance(dataset, h5py.Dataset):
        fault = f"no dataset {name!r}. Present: {present(group)}"
        if is_link:
            to = f"{getattr(link, 'filename', '')} {link.path}".strip()
            fault = f"dataset {name!r} is a broken link, to {to}"
        yield Problem(location(group), fault)
        return None
    if dataset.shape is None:
        yield Problem(location(group), f"dataset {name!r} is empty: it has no shape")
        return None
    if dataset.dtype.kind not in kinds:
        expected = "numbers" if "f" in kinds else "integers"
        yield Problem(location(group), f"dataset {name!r} is of dtype {dataset.dtype}. Expected {expected}")
        return None
    fault = _unwritten(dataset) or _too_large(dataset)
    if fault is not None:
        yield Problem(location(group), f"dataset {name!r} of shape {dataset.shape} {fault}")
        return None
    return dataset


def _unwritten(dataset: Any) -> str | None:
    """What HDF5 would fill with zeros because nobody has written it, in words; None where all was written."""
    if dataset.size == 0:
        return None
    if dataset.is_virtual:
        sources = dataset.virtual_sources()
        mapped = sum(source.vspace.get_select_npoints() for source in sources)
        if mapped < dataset.size:
            return f"is virtual, and its sources have {mapped} of its {dataset.size} values"
        for name, path in dict.fromkeys((source.dset_name, source.file_name) for source in sources):
            fault = _source_fault(dataset, path, name)
            if fault is not None:
                return f"is virtual, and its source {fault}"
        return None
    if dataset.external is not None:
        for name, offset, size in dataset.external:
            file = Path(name)  # HDF5 takes it from the working directory
            if size < 1 << 62 and (not file.is_file() or file.stat().st_size < offset + size):
                return f"lies in {file}, which does not hold its {size} bytes"
        return None
    if dataset.chunks is not None:
        expected = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        stored = dataset.id.get_num_chunks()
        return None if stored >= expected else f"has {stored} of its {expected} chunks: the others were never written"
    stored = dataset.id.get_storage_size()
    if dataset.nbytes > stored:  # a corrupt shape could make reading it endless
        return f"has {stored} of its {dataset.nbytes} bytes: the others were never written"
    return None


def _source_fault(dataset: Any, path: str, name: str) -> str | None:
    """Why a virtual dataset would have zeros for what it takes from a dataset of another file, or of its own."""
    import h5py

    found = dataset.file.filename if path == "." else _source_file(dataset, path)
    if found is None:
        return f"{path} does not exist"
    with h5py.File(found, "r") as file:
        source: Any = file.get(name)
        if not isinstance(source, h5py.Dataset) or source == dataset:
            return f"{path} has no dataset {name!r} of its own"
        fault = None if source.is_virtual else _unwritten(source)
        return None if fault is None else f"{name!r} in {path} {fault}"


def source_files(dataset: Any) -> list[Path]:
    """The other files in which a virtual or an external dataset has its values."""
    names = [source.file_name for source in dataset.virtual_sources()] if dataset.is_virtual else []
    files = [_source_file(dataset, name) or Path(name) for name in names if name != "."]
    return files + [Path(name) for name, _, _ in dataset.external or ()]  # from the working directory


def _source_file(dataset: Any, name: str) -> Path | None:
    paths = (Path(dataset.file.filename).parent / name, Path(name))  # as HDF5 looks for it
    return next((path for path in paths if path.is_file()), None)


def _too_large(dataset: Any) -> str | None:
    """Data of many more bytes than the files that hold them, in words."""
    files = {Path(dataset.file.filename), *filter(Path.is_file, source_files(dataset))}
    stored = sum(file.stat().st_size for file in files)
    if not is_bomb(dataset.nbytes, stored):
        return None
    return f"unpacks to {dataset.nbytes} bytes, from {stored} bytes on disk. Store it without compression"


def attribute_of(group: h5py.Group, name: str) -> Checked[object]:
    """An attribute as plain Python, or as an array of numbers."""
    if name in group.attrs:
        return to_python(group.attrs[name])
    yield Problem(location(group), f"no attribute {name!r}. Present: {present(group.attrs)}")


def present(members: Iterable[object]) -> str:
    """Names for people; a corrupt name that is no text comes as bytes."""
    return ", ".join(map(str, members)) or "none"
