"""Files and folders put in place whole: whatever happens, the old one or the new one is there, and
on the disk.

They have the mode that the umask gives, as every program's files have; what is replaced keeps the
mode that it had.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place."""
    temporary = beside(path)
    try:
        write(temporary)
        _sync(temporary)
        _keep_mode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_folder(path: Path, write: Callable[[Path], object], *, keep_others: bool = False) -> None:
    """Let `write` fill a new folder, then put it in place of what is there.

    On Linux old and new are exchanged in one step. Where the system can't, there is a moment in
    which the old one lies under another name.

    Args:
        keep_others: what else is in the old folder stays, as links to the same files.
    """
    new = beside(path)
    new.mkdir()
    try:
        write(new)
        for each in sorted(new.rglob("*"), reverse=True):
            _sync(each)
            _keep_mode(path / each.relative_to(new), each)
        _keep_mode(path, new)
        others = []
        if keep_others and path.is_dir():
            others = [each for each in path.iterdir() if not (new / each.name).exists()]
        for each in others:
            if not each.is_dir() or each.is_symlink():
                _link(each, new / each.name)
        _sync(new)
        old = _put(new, path)
        for each in others:
            if each.name not in os.listdir(path):
                os.rename(old / each.name, each)
    finally:
        for left in (new, _aside(new)):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
    _sync(path)
    _sync(path.parent)


def beside(path: Path) -> Path:
    """A name in the same folder for what is not whole yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _put(new: Path, path: Path) -> Path:
    """Put `new` where `path` is; returns where the old one is now."""
    if not path.exists():
        os.rename(new, path)
        return new
    if _exchange(new, path):
        return new
    old = _aside(new)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    return old


def _aside(new: Path) -> Path:
    return new.with_name(f"{new.name}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step, where the system can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(
        renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0
    )


def _keep_mode(old: Path, new: Path) -> None:
    """What is replaced keeps the mode that it had: a server that could read it still can."""
    if old.exists() and old.is_dir() == new.is_dir():
        new.chmod(stat.S_IMODE(old.stat().st_mode))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
