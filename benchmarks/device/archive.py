"""A directory as one .tar file and back. The same files give the same bytes: sorted names, no times, no owners.

Not compressed: what compresses in a bundle is small, what is large does not, and a tar cannot unpack to more than it is.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from targets.errors import IntegrityError

FOLDER = "bundle"  # what `tar xf` makes, so that nobody's folder is strewn with files
EXECUTABLE = ".pyz"


def write_archive(directory: Path, names: Iterable[str], out_path: Path) -> Path:
    """Write the named files of `directory`; the file is the old one or the whole new one. Returns `out_path`."""
    partial = out_path.with_name(f".{out_path.name}.partial")
    with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(names):
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size = (directory / name).stat().st_size
            entry.mode = 0o755 if name.endswith(EXECUTABLE) else 0o644
            with (directory / name).open("rb") as file:
                archive.addfile(entry, file)
    return partial.replace(out_path)


def extract_archive(path: Path, out_dir: Path) -> Path:
    """Extract into the new folder `out_dir`/bundle and return it. Nothing is written where any member is no plain file
    inside that folder: IntegrityError names it. Owners, and modes but for the program's, are the reader's own."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in list(_checked(path, archive)):
                _write(archive, member, out_dir / member.name)
    except (tarfile.TarError, EOFError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise IntegrityError(
            f"{path} is no whole tar archive: {error}. Copy it again from where it was written."
        ) from None
    return out_dir / FOLDER


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Not by `extractall`: its data filter, which does as much, is missing from Python 3.11.2, and so from Debian 12's boards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    assert source is not None  # a plain file: checked
    with path.open("xb") as file:
        shutil.copyfileobj(source, file)
    if member.name.endswith(EXECUTABLE):
        path.chmod(0o755)


def _checked(path: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members, each of which is a plain file with a name of its own below the folder."""
    seen: set[str] = set()
    for member in archive:
        parts = PurePosixPath(member.name).parts
        inside = len(parts) > 1 and parts[0] == FOLDER and ".." not in parts and "/".join(parts) == member.name
        plain = member.isreg() and not member.issparse()
        if not inside or not plain or member.name in seen:
            why = "leads out of the bundle" if not inside else "is no plain file" if not plain else "stands in it twice"
            raise IntegrityError(
                f"{path}: '{member.name}' {why}. Nothing was extracted; do not use this archive: copy it again."
            )
        seen.add(member.name)
        yield member
