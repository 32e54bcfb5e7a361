"""Archives of `torch.save`: zip files whose content is as large as they are."""

from __future__ import annotations

import zipfile
from pathlib import Path

__all__ = ["check_archive"]


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
