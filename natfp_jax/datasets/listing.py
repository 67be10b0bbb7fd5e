"""The files that a user's data is read from, and what data made from them is named after."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

__all__ = ["below", "digest"]


def below(path: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Name, relative to the folder `path`, → file: each below it that ends in one of `suffixes`, in their order."""
    files = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file())
    return {file.relative_to(path).as_posix(): file for file in files}


def digest(files: Mapping[str, Path], *settings: str) -> str:
    """32 hexadecimal digits that change with a setting and with a file's name, size or time of change."""
    listing = list(settings)
    for name, file in files.items():
        status = file.stat()
        listing.append(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")
    return hashlib.sha256("\n".join(listing).encode(errors="surrogateescape")).hexdigest()[:32]
