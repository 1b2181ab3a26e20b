"""The index in local files: `EmbeddedIndex` finds documents by meaning and by words, in this process, with no service.

Documents and vectors live in the catalogue, which is the truth; the words in a lexical index derived from it. All vectors
are scanned, as bytes, and the best are scored again from the stored floats: quick up to a million documents, and nothing
to build. Memory holds the bytes, one matrix a collection. It knows nothing of files to ingest, of graphs or of the record.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numkong
import numpy as np
from numpy.typing import NDArray

from agentops.clock import Clock, SystemClock
from agentops.errors import RetrievalError
from agentops.records import Document, Hit, Query, Retrieval
from agentops.retrieval import Change, Collection, Embedder, collection_not_found
from agentops.retrieval.analysis import lexical_terms, terms
from agentops.retrieval.catalog import Catalog
from agentops.retrieval.fuse import fuse, rank
from agentops.retrieval.lexical import LexicalError, LexicalIndex
from agentops.retrieval.stored import DEPTH, MAX_DEPTH, QUERY_CHARACTERS, Row, check_match, check_name, valid_unicode

_EMBED_SLICE = 256
_LOAD_ROWS = 8192
_SPARE = 100
"""Rows beyond the depth that are scored in floats, for what the rounding to bytes misplaces."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """All vectors of a collection at one generation, each scaled to -127..127: `rows[i]` belongs to the document `seqs[i]`."""

    generation: int
    seqs: NDArray[np.int64]
    rows: NDArray[np.int8]


class EmbeddedIndex:
    """Implements `Index` in `folder`. The embedder, or what opens it, is asked for when a vector is first needed.

    All methods may be called from any thread; several processes may share the folder: one writes at a time, readers see
    the state before or after a write. Killed at any moment, it holds the state before or after the write it was in.
    """

    def __init__(
        self,
        folder: Path,
        embedder: Embedder | Callable[[], Embedder],
        *,
        lock_timeout_s: float = 30.0,
        clock: Clock | None = None,
    ) -> None:
        self._folder = folder
        self._given = embedder
        self._embedder: Embedder | None = None
        self._clock = clock or SystemClock()
        self._catalog = Catalog(folder, lock_timeout_s)
        self._lock = threading.RLock()
        self._matrices: dict[int, _Matrix] = {}
        self._lexical: dict[int, LexicalIndex] = {}
        self._closed = False

    # -- reading

    async def search(self, query: Query) -> Retrieval:
        """Hits best first. In hybrid mode `score` is the fused one, else the leg's own. A query without a word finds nothing.

        Raises:
            CollectionNotFound: the hint lists the collections there are.
            CollectionMismatch: the collection was made with another embedder (not asked for in lexical mode).
            RetrievalError: the index is damaged, locked or closed.
        """
        return await asyncio.to_thread(self._search, query)

    def collections(self) -> list[Collection]:
        """All collections by name."""
        self._check_open()
        with self._catalog.reading() as db:
            rows = db.execute(
                "SELECT c.*, (SELECT count(*) FROM document d WHERE d.collection = c.number) AS documents"
                " FROM collection c ORDER BY name"
            ).fetchall()
        return [
            Collection(
                name=row["name"],
                documents=row["documents"],
                generation=row["generation"],
                embedder=row["embedder"],
                dimensions=row["dimensions"],
            )
            for row in rows
        ]

    def sources(self, collection: str) -> dict[str, list[str]]:
        """Document ids by `source`, both in order; documents without one are under the empty string.

        Raises:
            CollectionNotFound
        """
        found: dict[str, list[str]] = {}
        with self._reading(collection) as (db, row):
            listing = "SELECT source, id FROM document WHERE collection = ? ORDER BY source, id"
            for source, key in db.execute(listing, (row["number"],)):
                found.setdefault(source, []).append(key)
        return found

    # -- writing

    def upsert(self, collection: str, documents: Sequence[Document]) -> Change:
        """Stores documents by id in one transaction, embedding only texts whose vector the collection has not got.

        A document that is stored already, unchanged in text and metadata, is left alone; when all are, the generation
        does not rise. Of several documents with the same id in one call, the last counts. Makes a missing collection.

        Raises:
            CollectionMismatch: the collection was made with another embedder.
            DocumentError: an id is empty, metadata is not flat, or the text is no valid Unicode. Nothing was stored.
            RetrievalError
        """
        self._check_open()
        check_name(collection)
        rows = {document.id: Row.of(document) for document in documents}
        embedder = self._open_embedder()
        vectors = self._vectors(collection, embedder, rows.values())
        added = updated = unchanged = 0
        with self._catalog.turn():
            with self._catalog.writing() as db:
                number = self._make(db, collection, embedder)
                present = {key: old for key in rows if (old := _stored(db, number, key)) is not None}
                changed: list[Row] = []
                for key, row in rows.items():
                    if key not in present:
                        added += 1
                    elif _same(row, present[key]):
                        unchanged += 1
                        continue
                    else:
                        updated += 1
                    changed.append(row)
                if changed:
                    generation = _rise(db, number)
                    _remove(db, number, generation, [present[row.id]["seq"] for row in changed if row.id in present])
                    for row in changed:
                        seq = db.execute(
                            "INSERT INTO document (collection, id, source, text, metadata, hash, embedded, generation)"
                            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                            (number, row.id, row.source, row.text, row.metadata, row.hash, row.embedded, generation),
                        ).lastrowid
                        db.execute("INSERT INTO vector VALUES (?, ?)", (seq, vectors[row.embedded]))
            self._follow(number)
        return Change(added=added, updated=updated, unchanged=unchanged)

    def delete(self, collection: str, ids: Sequence[str]) -> Change:
        """Removes documents; ids that are not there are passed over.

        Raises:
            CollectionNotFound, RetrievalError
        """
        with self._reading(collection):
            pass  # a missing one is not worth a turn, nor a folder made
        with self._catalog.turn():
            with self._catalog.writing() as db:
                number = self._find(db, collection)["number"]
                seqs = [row["seq"] for key in dict.fromkeys(ids) if (row := _stored(db, number, key)) is not None]
                if seqs:
                    _remove(db, number, _rise(db, number), seqs)
            self._follow(number)
        return Change(removed=len(seqs))

    def drop(self, collection: str) -> None:
        """Removes a collection with all its documents.

        Raises:
            CollectionNotFound, RetrievalError
        """
        with self._reading(collection):
            pass  # a missing one is not worth a turn, nor a folder made
        with self._catalog.turn():
            with self._catalog.writing() as db:
                number = self._find(db, collection)["number"]
                db.execute("DELETE FROM collection WHERE number = ?", (number,))
                left = {str(other) for (other,) in db.execute("SELECT number FROM collection")}
            self._words(number).clear()
            with self._lock:
                self._lexical.pop(number, None)
                self._matrices.pop(number, None)
            # Also what a process killed between these two steps has left behind.
            for folder in (self._folder / "lexical").glob("*"):
                if folder.name not in left:
                    shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Frees the memory held. Closing twice is harmless; any other call afterwards raises RetrievalError."""
        with self._lock:
            self._closed = True
            self._matrices.clear()
            self._lexical.clear()

    # -- inside: searching

    def _search(self, query: Query) -> Retrieval:
        self._check_open()
        text = valid_unicode(query.text[:QUERY_CHARACTERS])
        words = terms(text) if query.mode != "vector" else []
        vector: NDArray[np.float32] | None = None
        embed_ms = 0.0
        begun = self._clock.monotonic_ns()
        wanted = query.k > 0 and bool(text.strip())
        if wanted and query.mode != "lexical":
            with self._reading(query.collection) as (_, row):
                pass  # writers wait for whoever reads, and opening the embedder may take minutes
            self._check_match(row, self._open_embedder())
            begun = self._clock.monotonic_ns()
            vector = self._open_embedder().embed([text])[0]
            embed_ms = (self._clock.monotonic_ns() - begun) / 1e6
            begun = self._clock.monotonic_ns()
        for _ in range(5):
            with self._reading(query.collection) as (db, row):
                if not wanted:
                    return Retrieval(query, (), row["generation"])
                if vector is not None:
                    self._check_match(row, self._open_embedder())
                broken = False
                try:
                    hits = self._ranked(db, row, query, vector, words)
                except LexicalError:
                    hits, broken = None, True
            if hits is not None:
                search_ms = (self._clock.monotonic_ns() - begun) / 1e6
                return Retrieval(query, hits, row["generation"], embed_ms=embed_ms, search_ms=search_ms)
            # A writer is between its two commits, or died there.
            with self._catalog.turn():
                if broken:
                    self._words(row["number"]).clear()
                self._follow(row["number"])
        raise RetrievalError(f"the words of '{query.collection}' cannot be read", hint=f"remove {self._folder / 'lexical'}")

    def _ranked(
        self, db: sqlite3.Connection, row: sqlite3.Row, query: Query, vector: NDArray[np.float32] | None, words: list[str]
    ) -> tuple[Hit, ...] | None:
        """Hits at the generation of the open transaction; None when the lexical index does not stand there.

        Raises:
            LexicalError: it stands there and cannot be read.
        """
        number, generation, depth = row["number"], row["generation"], min(max(DEPTH, query.k), MAX_DEPTH)
        by_vector: list[tuple[int, float]] = []
        by_words: list[tuple[int, float]] = []
        if words:
            lexical = self._words(number)
            searcher = lexical.at(generation)
            if searcher is None:
                return None
            by_words = lexical.search(searcher, words, depth)
        if vector is not None:
            by_vector = _nearest(db, self._matrix(db, number, generation, row["dimensions"]), vector, depth)
        seqs = list({seq for seq, _ in by_vector + by_words})
        listing = "SELECT seq, id FROM document WHERE seq IN (SELECT value FROM json_each(?))"
        ids: dict[int, str] = dict(db.execute(listing, (json.dumps(seqs),)).fetchall())
        legs = [rank([(ids[seq], score) for seq, score in found]) for found in (by_vector, by_words)]
        if query.mode == "hybrid":
            best = fuse(*legs)[: query.k]
        else:
            best = [(key, place.score) for leg in legs for key, place in leg.items()][: query.k]
        return tuple(
            Hit(_document(stored), score, vector=legs[0].get(key), lexical=legs[1].get(key))
            for key, score in best
            if (stored := _stored(db, number, key)) is not None
        )

    def _matrix(self, db: sqlite3.Connection, number: int, generation: int, dimensions: int) -> _Matrix:
        with self._lock:
            matrix = self._matrices.get(number)
            if matrix is None or matrix.generation != generation:
                listing = (
                    "SELECT v.seq, v.value FROM document d JOIN vector v ON v.seq = d.seq WHERE d.collection = ? ORDER BY v.seq"
                )
                cursor = db.execute(listing, (number,))
                seqs, rows = [np.empty(0, np.int64)], [np.empty((0, dimensions), np.int8)]
                while part := cursor.fetchmany(_LOAD_ROWS):
                    seqs.append(np.fromiter((seq for seq, _ in part), np.int64, len(part)))
                    rows.append(_as_bytes(_as_floats([value for _, value in part])))
                matrix = _Matrix(generation, np.concatenate(seqs), np.concatenate(rows))
                self._matrices[number] = matrix
            return matrix

    # -- inside: writing

    def _vectors(self, collection: str, embedder: Embedder, rows: Iterable[Row]) -> dict[str, bytes]:
        """Vectors by hash of the embedded text, taken from the collection where it has them. Holds no lock: embedding is slow."""
        texts = {row.embedded: row.to_embed for row in rows}
        vectors: dict[str, bytes] = {}
        with self._catalog.reading() as db:
            row = db.execute("SELECT * FROM collection WHERE name = ?", (collection,)).fetchone()
            if row is not None:
                self._check_match(row, embedder)
                known = (
                    "SELECT d.embedded, v.value FROM document d JOIN vector v ON v.seq = d.seq"
                    " WHERE d.collection = ? AND d.embedded IN (SELECT value FROM json_each(?))"
                )
                vectors.update(db.execute(known, (row["number"], json.dumps(list(texts)))).fetchall())
        missing = [key for key in texts if key not in vectors]
        for at in range(0, len(missing), _EMBED_SLICE):
            part = missing[at : at + _EMBED_SLICE]
            found = embedder.embed([texts[key] for key in part]).astype("<f4")
            vectors.update(zip(part, (vector.tobytes() for vector in found), strict=True))
        return vectors

    def _make(self, db: sqlite3.Connection, collection: str, embedder: Embedder) -> int:
        row = db.execute("SELECT * FROM collection WHERE name = ?", (collection,)).fetchone()
        if row is not None:
            self._check_match(row, embedder)
            return int(row["number"])
        number = db.execute(
            "INSERT INTO collection (name, embedder, revision, dimensions, generation, followed) VALUES (?, ?, ?, ?, 0, 0)",
            (collection, embedder.name, embedder.revision, embedder.dimensions),
        ).lastrowid
        assert number is not None
        # Words under a new number belong to another catalogue, which was taken away.
        self._words(number).clear()
        _rise(db, number)
        return number

    def _follow(self, number: int) -> None:
        """Brings the lexical index to the catalogue's generation. To be called in one's turn to write."""
        lexical = self._words(number)
        for last in (False, True):
            try:
                with self._catalog.reading() as db:
                    row = db.execute("SELECT * FROM collection WHERE number = ?", (number,)).fetchone()
                    reached = lexical.generation()
                    if row is None or reached == row["generation"]:
                        return
                    if not row["followed"] <= reached < row["generation"]:
                        lexical.clear()
                        reached = -1
                    new = db.execute("SELECT * FROM document WHERE collection = ? AND generation > ?", (number, reached))
                    gone = db.execute("SELECT seq FROM removed WHERE collection = ? AND generation > ?", (number, reached))
                    added = ((entry["seq"], lexical_terms(_document(entry))) for entry in new)
                    lexical.apply(row["generation"], added, [seq for (seq,) in gone])
                break
            except LexicalError as error:
                lexical.clear()
                if last:
                    raise RetrievalError(
                        f"the documents are stored, but their words could not be indexed: {error}",
                        hint=f"check that {self._folder} can be written and its disk has space, then search again",
                    ) from error
        with self._catalog.writing() as db:
            db.execute("UPDATE collection SET followed = ? WHERE number = ?", (row["generation"], number))
            db.execute("DELETE FROM removed WHERE collection = ? AND generation <= ?", (number, row["generation"]))

    # -- inside: common

    def _words(self, number: int) -> LexicalIndex:
        with self._lock:
            if number not in self._lexical:
                self._lexical[number] = LexicalIndex(self._folder / "lexical" / str(number))
            return self._lexical[number]

    def _open_embedder(self) -> Embedder:
        with self._lock:
            if self._embedder is None:
                self._embedder = self._given() if callable(self._given) else self._given
            return self._embedder

    @contextmanager
    def _reading(self, collection: str) -> Iterator[tuple[sqlite3.Connection, sqlite3.Row]]:
        """An open transaction and the collection's row in it."""
        self._check_open()
        with self._catalog.reading() as db:
            yield db, self._find(db, collection)

    def _find(self, db: sqlite3.Connection, collection: str) -> sqlite3.Row:
        row: sqlite3.Row | None = db.execute("SELECT * FROM collection WHERE name = ?", (valid_unicode(collection),)).fetchone()
        if row is None:
            raise collection_not_found(collection, [name for (name,) in db.execute("SELECT name FROM collection ORDER BY name")])
        return row

    def _check_match(self, row: sqlite3.Row, embedder: Embedder) -> None:
        check_match(row["name"], row["embedder"], row["revision"], row["dimensions"], embedder)

    def _check_open(self) -> None:
        if self._closed:
            raise RetrievalError("the index was closed")


def open_index(folder: Path, embedder: Embedder | Callable[[], Embedder]) -> EmbeddedIndex:
    """The index in `folder`; nothing is read or made until it is used."""
    return EmbeddedIndex(folder, embedder)


def _same(row: Row, stored: sqlite3.Row) -> bool:
    return (row.hash, row.embedded, row.metadata) == (stored["hash"], stored["embedded"], stored["metadata"])


def _as_floats(values: Sequence[bytes]) -> NDArray[np.float32]:
    return np.frombuffer(b"".join(values), "<f4").reshape(len(values), -1).astype(np.float32, copy=False)


def _as_bytes(rows: NDArray[np.float32]) -> NDArray[np.int8]:
    peaks = np.abs(rows).max(axis=1, keepdims=True)
    scaled: NDArray[np.int8] = np.rint(rows * (127.0 / np.maximum(peaks, 1e-12))).astype(np.int8)
    return scaled


def _nearest(db: sqlite3.Connection, matrix: _Matrix, vector: NDArray[np.float32], depth: int) -> list[tuple[int, float]]:
    """The `seq` and cosine of the rows nearest to `vector`, at most `depth`, best first."""
    places = np.arange(len(matrix.seqs))
    candidates = depth + _SPARE
    if len(places) > candidates:
        distances = np.asarray(numkong.cdist(_as_bytes(vector[None]), matrix.rows, "angular"))[0]
        places = np.argpartition(distances, candidates)[:candidates]
    if not len(places):
        return []
    listing = "SELECT seq, value FROM vector WHERE seq IN (SELECT value FROM json_each(?))"
    stored = db.execute(listing, (json.dumps(matrix.seqs[places].tolist()),)).fetchall()
    scores = _as_floats([value for _, value in stored]) @ vector
    best = np.argsort(-scores, kind="stable")[:depth]
    return [(int(stored[place][0]), float(scores[place])) for place in best]


def _rise(db: sqlite3.Connection, number: int) -> int:
    (generation,) = db.execute("UPDATE counter SET generation = generation + 1 RETURNING generation").fetchall()[0]
    db.execute("UPDATE collection SET generation = ? WHERE number = ?", (generation, number))
    return int(generation)


def _remove(db: sqlite3.Connection, number: int, generation: int, seqs: Sequence[int]) -> None:
    db.executemany("INSERT INTO removed VALUES (?, ?, ?)", ((seq, number, generation) for seq in seqs))
    db.executemany("DELETE FROM document WHERE seq = ?", ((seq,) for seq in seqs))


def _stored(db: sqlite3.Connection, number: int, key: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM document WHERE collection = ? AND id = ?", (number, valid_unicode(key))
    ).fetchone()
    return row


def _document(row: sqlite3.Row) -> Document:
    return Document(row["id"], row["text"], row["hash"], json.loads(row["metadata"]))
