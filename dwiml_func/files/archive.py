"""Files that unpack to far more than they hold, refused before they take memory."""

from __future__ import annotations

import zipfile
from pathlib import Path

__all__ = ["check_archive", "is_bomb"]

_FREE_BYTES = 1 << 26
_MOST_TIMES = 100  # volumes and streamlines shrink to a tenth; gzip can store zeros in a thousandth


def is_bomb(unpacked: int, stored: int) -> bool:
    """Whether a file of `stored` bytes unpacks to so much that no data of this kind would."""
    return unpacked > max(_FREE_BYTES, _MOST_TIMES * stored)


def check_archive(path: str | Path) -> None:
    """Raise ValueError for a zip file that unpacks to more than it holds, which `torch.save` never writes."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:
        return  # torch says what is wrong
    stored = Path(path).stat().st_size
    if unpacked > stored:
        raise ValueError(
            f"Expected a file of torch.save, which is not compressed. Received: {path} of {stored} bytes, which "
            f"unpacks to {unpacked} bytes. Write it again with torch.save(module.state_dict(), ...)."
        )
