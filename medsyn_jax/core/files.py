"""Writing of files: whole or not at all, with one line for a full disk."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medsyn_jax.core.errors import UserError

_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# TensorStore, array_record and safetensors raise errors of their own with one of these texts.
_TEXTS = (*(f"os_error_code='{code}'" for code in _CODES), *map(os.strerror, _CODES))


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path that replaces `path` at the end of the block, unless the block raises.

    Readers see the old file or the new one, never a part of it. A killed process leaves
    `.<name>.<process>.tmp` behind. The folder of `path` is made. Raises UserError for a full disk.
    """
    with full_disk_is_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` at the end of the block, unless the block raises.

    A killed process leaves `.<name>.<process>.tmp` behind. Raises UserError if there is anything
    at `path` but an empty folder, or if the disk is full.
    """
    path = path.absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: is there already and is not overwritten: name another folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk_is_user_error(path):
            temporary.mkdir(parents=True)
            yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def full_disk_is_user_error(path: Path | str) -> Iterator[None]:
    """Raise UserError where the block fails for want of space to write `path`."""
    try:
        yield
    except Exception as e:
        coded = isinstance(e, OSError) and e.errno in _CODES
        if coded or any(text in str(e) for text in _TEXTS):
            raise UserError(
                f"disk full: {path}: free some space and run the same command again; "
                "everything that was complete has been kept"
            ) from e
        raise


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a text in UTF-8; UserError for a full disk."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
