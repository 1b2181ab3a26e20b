"""Files into a collection: finds them, cuts them into pieces, and makes the collection agree with what is on disk.

`source` is a file's path relative to the folder it was found through, or its name when the file itself was given. A
piece's id begins with a hash of where that is, so that files of the same name in two places stay two, and no machine's
paths are stored. What is no longer in a folder is removed, and nothing that came from elsewhere. It opens no model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentops.errors import CollectionNotFound, DocumentError
from agentops.records import Document, content_hash
from agentops.retrieval import Index
from agentops.retrieval.parse import SUFFIXES, Parsed, parse, printable
from agentops.text import SENTENCE_GAP

if TYPE_CHECKING:
    from langchain_text_splitters import RecursiveCharacterTextSplitter

Progress = Callable[[float, str], None]
"""Called with the share done, 0 to 1 by size of files, and the source at work."""

_FLUSH_DOCUMENTS = 64
_SEPARATORS = [r"\n\s*\n", SENTENCE_GAP, r"\n", r"\s", r"\S{200}", ""]
"""Where a piece may end, best first: paragraph, sentence, line, word; a word of more than 200 characters anywhere."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A file, or a path that was given, of which nothing could be taken, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What an `ingest` did. `files` were read, `pieces` are the documents they were cut into; `added`, `updated`,
    `unchanged` and `removed` count pieces. `hidden` and `unknown` count names in folders that were passed over: those that
    begin with a dot, and those of no known kind."""

    collection: str
    files: int = 0
    pieces: int = 0
    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    hidden: int = 0
    unknown: int = 0
    problems: tuple[Problem, ...] = ()

    @property
    def failed(self) -> bool:
        """Nothing could be taken although something was there to take."""
        return bool(self.problems) and not self.files


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    mark: str
    source: str
    size: int


@dataclass(slots=True)
class _Found:
    """What walking the given paths gave. `scopes` are marks and beginnings of sources: all that is there is in `files`.
    `replaced` are marks and sources under which a file of `files` may have been stored before. `closed` are marks and
    beginnings of sources of folders that could not be read: what is there is not known."""

    files: dict[Path, _File] = field(default_factory=dict)
    scopes: list[tuple[str, str]] = field(default_factory=list)
    replaced: set[tuple[str, str]] = field(default_factory=set)
    closed: set[tuple[str, str]] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    hidden: int = 0
    unknown: int = 0


def ingest(
    paths: Sequence[Path | str],
    index: Index,
    collection: str,
    *,
    chunk_tokens: int,
    overlap_tokens: int,
    count_tokens: Callable[[str], int],
    progress: Progress | None = None,
) -> IngestReport:
    """Makes `collection` hold the text of all files given or below the folders given, and nothing that has left the folders.

    Pieces have at most `chunk_tokens` tokens as `count_tokens` counts them; neighbours share up to `overlap_tokens`. They
    never cross a heading, nor a page of a PDF. Metadata: source, title, heading ("A > B"), start and end in the parsed
    text, page in a PDF. A file or folder that cannot be read is a `Problem`; what the collection has of it stays, the rest
    goes in.

    Raises:
        CollectionMismatch, RetrievalError: the index refuses; what was stored until then stays.
    """
    known = _known(index, collection)
    found = _walk(paths, {key.partition("-")[0] for keys in known.values() for key in keys})
    splitter = _splitter(chunk_tokens, overlap_tokens, count_tokens)
    batch: list[Document] = []
    kept: set[str] = set()
    problems, counts = found.problems, {"files": 0, "pieces": 0, "added": 0, "updated": 0, "unchanged": 0}
    report = progress or (lambda share, source: None)
    total, done = sum(file.size for file in found.files.values()) or 1, 0

    def flush() -> None:
        change = index.upsert(collection, batch)
        for name in ("added", "updated", "unchanged"):
            counts[name] += getattr(change, name)
        batch.clear()

    for file in found.files.values():
        report(done / total, file.source)
        try:
            documents = _documents(file, parse(file.path), splitter)
        except DocumentError as error:
            problems.append(Problem(_shown(file.path), f"{error}; {error.hint}" if error.hint else str(error)))
            kept.update(key for key in known.get(file.source, []) if key.startswith(file.mark))
            done += file.size
            continue
        counts["files"] += 1
        counts["pieces"] += len(documents)
        kept.update(document.id for document in documents)
        for place, document in enumerate(documents):
            batch.append(document)
            if len(batch) >= _FLUSH_DOCUMENTS:
                flush()
                report((done + file.size * (place + 1) / len(documents)) / total, file.source)
        done += file.size
    if batch:
        flush()
    gone = list(_gone(known, found, kept))
    removed = index.delete(collection, gone).removed if gone else 0
    report(1.0, "")
    return IngestReport(
        collection, **counts, removed=removed, hidden=found.hidden, unknown=found.unknown, problems=tuple(problems)
    )


def make_document(key: str, text: str, metadata: Mapping[str, str | int | float | bool] | None = None) -> Document:
    """A document to upsert by hand, with the hash of its text. `source`, `title` and `heading` in the metadata are searched."""
    return Document(key, text, content_hash(text), dict(metadata or {}))


# -- which files


def _walk(paths: Iterable[Path | str], marks: set[str]) -> _Found:
    """All files to read. `marks` are those that the collection's ids begin with."""
    found = _Found()
    places: list[Path] = []
    for given in paths:
        path = Path(given).expanduser().absolute()
        try:
            places.append(path.resolve(strict=True))
        except (OSError, RuntimeError):
            reason = "a link to nowhere, or to itself" if path.is_symlink() else "no such file or folder"
            found.problems.append(Problem(_shown(given), reason))
    marks = marks | {_mark(place) for place in places if place.is_dir()}
    for place in places:
        root = _root(place if place.is_dir() else place.parent, marks)
        if not place.is_dir():
            _take(place, root, found)
            continue
        root = root or place
        found.scopes.append((_mark(root), "" if root == place else _source(place, root) + "/"))
        found.scopes.extend((_mark(inner), "") for inner in _inner_roots(place, root, marks))
        _walk_folder(place, root, found)
    return found


def _root(folder: Path, marks: set[str]) -> Path | None:
    """The outermost of the folder and those above it that was ingested: what is below belongs to it, and only to it."""
    return next((above for above in reversed([folder, *folder.parents]) if _mark(above) in marks), None)


def _inner_roots(folder: Path, root: Path, marks: set[str]) -> Iterator[Path]:
    """Folders below that were ingested by themselves before: from now on their files belong to `root`."""
    if marks - {_mark(root)}:
        for inner, names, _ in os.walk(folder):
            names[:] = [name for name in names if not name.startswith(".")]
            if Path(inner) != root and _mark(Path(inner)) in marks:
                yield Path(inner)


def _walk_folder(folder: Path, root: Path, found: _Found) -> None:
    def refused(error: OSError) -> None:
        refusing = Path(error.filename or folder)
        found.problems.append(Problem(_shown(refusing), f"cannot be read ({error.strerror or error})"))
        found.closed.add((_mark(root), "" if refusing == root else _source(refusing, root) + "/"))

    # Linked folders are not entered: they may lead out of the folder, or back into it.
    for inner, names, files in os.walk(folder, onerror=refused):
        visible = sorted(name for name in names if not name.startswith("."))
        found.hidden += len(names) - len(visible)
        names[:] = [name for name in visible if not (Path(inner) / name).is_symlink()]
        found.unknown += len(visible) - len(names)
        for name in sorted(files):
            if name.startswith("."):
                found.hidden += 1
            elif Path(name).suffix.lower() not in SUFFIXES:
                found.unknown += 1
            else:
                _take(Path(inner) / name, root, found)


def _take(path: Path, root: Path | None, found: _Found) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        size = 0  # reading it will say what is wrong
    alone = _mark(path.parent, "file"), printable(path.name)
    if root is None:
        file = _File(path, *alone, size)
    else:
        file = _File(path, _mark(root), _source(path, root), size)
        # It may have been given by itself before.
        found.replaced.add(alone)
    found.files.setdefault(path, file)


def _source(path: Path, root: Path) -> str:
    return printable(path.relative_to(root).as_posix())


def _shown(path: Path | str) -> str:
    return printable(os.fspath(path))


def _mark(place: Path, kind: str = "folder") -> str:
    return hashlib.blake2b(os.fsencode(place) + b"\0" + kind.encode(), digest_size=6).hexdigest()


# -- what the collection has


def _known(index: Index, collection: str) -> dict[str, list[str]]:
    try:
        return index.sources(collection)
    except CollectionNotFound:
        return {}


def _gone(known: Mapping[str, Sequence[str]], found: _Found, kept: set[str]) -> Iterator[str]:
    """Ids of pieces that the files read do not have any more, and of files that are not there any more."""
    read = found.replaced | {(file.mark, file.source) for file in found.files.values()}
    folders: dict[str, list[str]] = {}
    for mark, prefix in found.scopes:
        folders.setdefault(mark, []).append(prefix)
    for source, keys in known.items():
        for key in keys:
            mark = key.partition("-")[0]
            ours = (mark, source) in read or source.startswith(tuple(folders.get(mark, ())))
            unseen = any(mark == closed and source.startswith(prefix) for closed, prefix in found.closed)
            if ours and not unseen and key not in kept:
                yield key


# -- pieces


def _splitter(chunk_tokens: int, overlap_tokens: int, count_tokens: Callable[[str], int]) -> RecursiveCharacterTextSplitter:
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    return RecursiveCharacterTextSplitter(
        separators=_SEPARATORS,
        is_separator_regex=True,
        keep_separator="end",
        chunk_size=chunk_tokens,
        chunk_overlap=min(overlap_tokens, chunk_tokens // 2),
        length_function=count_tokens,
        strip_whitespace=True,
    )


def _documents(file: _File, parsed: Parsed, splitter: RecursiveCharacterTextSplitter) -> list[Document]:
    documents: list[Document] = []
    for section in parsed.sections:
        text = parsed.text[section.start : section.end]
        before = 0
        for piece in splitter.split_text(text):
            # Pieces overlap, so the next begins behind the beginning of the last, not behind its end.
            at = text.find(piece, before)
            before = at + 1
            start = section.start + at
            metadata: dict[str, Any] = {"source": file.source, "title": parsed.title}
            metadata |= {"heading": section.heading} if section.heading else {}
            metadata |= {"start": start, "end": start + len(piece)}
            metadata |= {"page": section.page} if section.page else {}
            place = f"{file.source}\0{len(documents)}".encode()
            key = f"{file.mark}-{hashlib.blake2b(place, digest_size=10).hexdigest()}"
            documents.append(make_document(key, piece, metadata))
    return documents
