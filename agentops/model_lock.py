"""`model.lock`: the sha256 of the files in a model folder, by which damage and changes are noticed.

Looking changes nothing: a file that is not what the lock says is reported and stays. Names come from what lies in the
folder, never from the lock. It knows nothing of what the files mean.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from agentops.errors import ModelBroken

LOCK_FILE = "model.lock"

_LOCK_BYTES = 1024 * 1024
_SUFFIXES = (".json", ".safetensors", ".jinja")


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 by name of the files that are read when a model is opened, those of folders inside (`1_Pooling/`) included."""
    files = [*folder.iterdir(), *folder.glob("*/config.json")]
    return {
        file.relative_to(folder).as_posix(): file_sha256(file)
        for file in sorted(files)
        if file.suffix in _SUFFIXES and file.is_file()
    }


def file_sha256(file: Path) -> str:
    """In hexadecimal.

    Raises:
        OSError
    """
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_lock(folder: Path) -> Path:
    """Writes the lock of a folder that is whole."""
    file = folder / LOCK_FILE
    file.write_text(json.dumps(file_digests(folder), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return file


def check_lock(folder: Path) -> dict[str, str] | None:
    """The digests of a folder that is as its lock says; None where it has no lock.

    Raises:
        ModelBroken: a file is missing, was changed or was added, or the lock cannot be read.
    """
    lock = folder / LOCK_FILE
    if not lock.exists():
        return None
    locked = _read(lock)
    found = file_digests(folder)
    for name, digest in locked.items():
        if found.get(name) != digest:
            what = "has the wrong checksum" if name in found else "is missing"
            raise ModelBroken(
                f"{folder}: {name} {what} (by {LOCK_FILE})", hint="the folder was changed or is damaged: prepare the model again"
            )
    for name in found:
        # Locks of before do not name what lies in folders inside.
        if name not in locked and "/" not in name:
            raise ModelBroken(
                f"{folder}: {name} is not in {LOCK_FILE}", hint=f"take the file away, or {LOCK_FILE} if you put the file there"
            )
    return found


def _read(lock: Path) -> dict[str, object]:
    try:
        size = lock.stat().st_size
        tree = json.loads(lock.read_text(encoding="utf-8")) if size <= _LOCK_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelBroken(f"{lock} cannot be read as JSON: {error}", hint="prepare or download the model again") from error
    if not isinstance(tree, dict):
        raise ModelBroken(f"{lock} holds no JSON object of a sensible size", hint="prepare or download the model again")
    return tree
