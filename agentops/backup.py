"""Backups: the journal, the record and the checkpoints of a home in one file, taken while runs go on.

The file is a tar, compressed with zstd: `manifest.json` first, then the members, and `checksums.json` last, so that a file
that was cut off is told. The journal is copied before the record: what was acknowledged when the backup began is in one of
the two, and what is in both is stored once. Restoring looks at every byte before anything is put in its place. Collections,
models and files that tools wrote are not in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import zstandard

from agentops.checkpoints import checkpoint_folder
from agentops.errors import RecordError, ThreadBusy, UsageError
from agentops.settings import Settings
from agentops.store import open_store
from agentops.store.opening import HEAD, REVISIONS
from agentops.tracer.journal import SUFFIX, claim

FORMAT = 1
_MANIFEST, _CHECKSUMS = "manifest.json", "checksums.json"
_RECORD = "record.db"
# Nothing else may be in a backup, and so none can reach out of its folder.
_MEMBER = re.compile(r"record\.db|journal/[A-Za-z0-9_.-]+\.seg|threads/[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.db")
_CHUNK = 1 << 20

Tell = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class BackedUp:
    """What is in a backup, and its size in bytes."""

    file: Path
    threads: int
    segments: int
    size: int


def backup(settings: Settings, file: Path, *, now_ns: int, tell: Tell = lambda done, total: None) -> BackedUp:
    """Writes a backup of `settings.paths.home`; `tell` hears how many of its files are done.

    Raises:
        UsageError: there is a file of that name, or a Postgres keeps the record.
        RecordError: nothing is on record, or the file cannot be written; there is none then.
    """
    home = settings.paths.home
    if settings.record.url:
        raise UsageError(
            "the record and the checkpoints are in Postgres, which has its own way to keep them",
            hint="pg_dump --format=custom --file=FILE DATABASE; this home has only what waits in its journal",
        )
    if not (home / _RECORD).is_file() and not (home / "journal").is_dir():
        raise RecordError(f"nothing is on record in {home}", hint="see paths.home in: agentops config")
    if file.exists():
        raise UsageError(f"{file} is there already", hint="name another file")
    # Of a home that has just begun there may be a journal alone.
    open_store(settings).close()
    segments = sorted((home / "journal").glob("*" + SUFFIX))
    part = file.with_name(f".{file.name}.part")
    try:
        with (
            _private(part) as raw,
            zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            writer = _Writer(archive)
            writer.text(_MANIFEST, {"format": FORMAT, "schema": HEAD, "taken_ns": now_ns})
            copied = sum(writer.whole(f"journal/{one.name}", one) for one in segments)
            threads = sorted(checkpoint_folder(settings).glob("*.db"))
            writer.database(_RECORD, home / _RECORD)
            tell(1, len(threads) + 1)
            kept = 0
            for done, thread in enumerate(threads, start=2):
                kept += writer.database(f"threads/{thread.name}", thread)
                tell(done, len(threads) + 1)
            writer.text(_CHECKSUMS, writer.sums)
        part.replace(file)
    except (OSError, sqlite3.Error) as error:
        raise RecordError(
            f"the backup could not be written: {error}", hint="is there room, and may the folder be written?"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return BackedUp(file, kept, copied, file.stat().st_size)


@dataclass(frozen=True, slots=True)
class Restored:
    """Where a backup was put back, when it was taken, and where what was there before is now."""

    home: Path
    taken_ns: int
    threads: int
    before: Path | None


def restore(file: Path, home: Path, *, replace: bool = False, now_ns: int) -> Restored:
    """Puts a backup into a home folder. With `replace`, one that is not empty is moved aside and kept.

    Raises:
        UsageError: the folder is not empty.
        ThreadBusy: a process works in it.
        RecordError: the file is no backup, damaged, cut off, or of a newer version; the folder is as it was.
    """
    occupied = home.is_dir() and any(home.iterdir())
    if occupied and not replace:
        raise UsageError(f"{home} is not empty", hint="give --replace to move it aside, or --into another folder")
    if occupied and (busy := _at_work(home)):
        raise ThreadBusy(f"a process works in {home} ({busy})", hint="end it first: agentops runs --status running")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{home.name}-restoring-", dir=home.parent))
    except OSError as error:
        raise RecordError(f"{home} cannot be made: {error}", hint="name another folder with --into") from error
    try:
        manifest, threads = _unpacked(file, fresh)
        before = None
        if occupied:
            before = home.with_name(f"{home.name}.before-{now_ns}")
            home.rename(before)
        elif home.is_dir():
            home.rmdir()
        fresh.rename(home)
    except (OSError, sqlite3.Error) as error:
        raise RecordError(f"the backup could not be put back: {error}", hint="what was there before is untouched") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Restored(home, int(manifest["taken_ns"]), threads, before)


class _Writer:
    """Puts members into an archive and remembers their checksums."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self.sums: dict[str, str] = {}

    def text(self, name: str, value: Any) -> None:
        data = json.dumps(value).encode()
        self._archive.addfile(_about(name, len(data)), io.BytesIO(data))

    def whole(self, name: str, path: Path) -> bool:
        """A file up to where it ends now; False where it is gone, because the record has taken it."""
        try:
            with path.open("rb") as opened:
                self._add(name, opened, os.fstat(opened.fileno()).st_size)
        except FileNotFoundError:
            return False
        return True

    def database(self, name: str, path: Path) -> bool:
        """A database as it is at one moment; False where it is gone."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy.db"
            try:
                with (
                    closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as source,
                    closing(sqlite3.connect(copy)) as target,
                ):
                    source.backup(target)
            except sqlite3.OperationalError:
                if path.exists():
                    raise
                return False
            return self.whole(name, copy)

    def _add(self, name: str, opened: IO[bytes], size: int) -> None:
        counted = _Counted(opened, size)
        self._archive.addfile(_about(name, size), counted)
        self.sums[name] = counted.digest.hexdigest()


class _Counted:
    """The first bytes of a file, and their checksum when they were read."""

    def __init__(self, opened: IO[bytes], size: int) -> None:
        self._opened, self._left = opened, size
        self.digest = hashlib.blake2b(digest_size=32)

    def read(self, count: int = -1) -> bytes:
        data = self._opened.read(self._left if count < 0 else min(count, self._left))
        self._left -= len(data)
        self.digest.update(data)
        return data


def _about(name: str, size: int) -> tarfile.TarInfo:
    about = tarfile.TarInfo(name)
    about.size, about.mode = size, 0o600
    return about


@contextmanager
def _private(file: Path) -> Iterator[IO[bytes]]:
    """A new file for its owner's eyes only, on the disk when the block ends."""
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as opened:
        yield opened
        opened.flush()
        os.fsync(opened.fileno())


def _at_work(home: Path) -> str:
    """The name of a journal segment whose process lives."""
    for segment in (home / "journal").glob("*" + SUFFIX):
        if (held := claim(segment)) is None:
            if segment.exists():
                return segment.name
        else:
            os.close(held)
    return ""


def _unpacked(file: Path, folder: Path) -> tuple[dict[str, Any], int]:
    """Everything in a backup, checked; returns its manifest and the number of threads."""

    def broken(why: str) -> RecordError:
        return RecordError(f"{file} cannot be restored: {why}", hint="nothing was changed; take another backup")

    found: dict[str, str] = {}
    manifest: dict[str, Any] = {}
    sums: dict[str, str] | None = None
    try:
        with (
            file.open("rb") as raw,
            zstandard.ZstdDecompressor().stream_reader(raw) as unpacked,
            tarfile.open(fileobj=unpacked, mode="r|") as archive,
        ):
            for member in archive:
                opened = archive.extractfile(member) if member.isreg() else None
                if opened is None:
                    raise broken(f"{member.name[:80]!r} is no file")
                if member.name in (_MANIFEST, _CHECKSUMS):
                    value = json.loads(opened.read(64 << 20))
                    if member.name == _CHECKSUMS:
                        sums = value
                        break
                    manifest = value
                    _check_version(manifest, broken)
                elif not manifest:
                    raise broken("it is no backup of this program")
                elif not _MEMBER.fullmatch(member.name):
                    raise broken(f"{member.name[:80]!r} is nothing that a backup has")
                else:
                    found[member.name] = _put(opened, folder / member.name)
    except FileNotFoundError:
        raise RecordError(f"there is no file {file}") from None
    except (zstandard.ZstdError, tarfile.TarError, ValueError, EOFError) as error:
        raise broken(f"it is damaged or no backup ({error})") from error
    if sums is None:
        raise broken("it was cut off")
    if found != sums or _RECORD not in found:
        raise broken("its checksums do not fit")
    return manifest, sum(name.startswith("threads/") for name in found)


def _check_version(manifest: Any, broken: Callable[[str], RecordError]) -> None:
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise broken("it is no backup of this program")
    if manifest["format"] > FORMAT or manifest.get("schema") not in REVISIONS:
        newer = broken("a newer version of this program wrote it")
        newer.hint = "upgrade agentops-runtime"
        raise newer


def _put(opened: IO[bytes], file: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    file.parent.mkdir(0o700, parents=True, exist_ok=True)
    with _private(file) as target:
        while data := opened.read(_CHUNK):
            digest.update(data)
            target.write(data)
    return digest.hexdigest()
