"""The index on an Elasticsearch 9 server: `ElasticIndex` finds documents by meaning and by words, as the embedded one does.

Every collection is an index of one shard. A write puts new versions of documents beside the old ones, under the number of its
turn, and then, in one step, makes that number the collection's generation; a reader asks for what its generation holds. So
nobody sees half of a write, whatever dies or meets: what a turn that never ended has left is never shown, and the next writer
clears it away. Words are stemmed here (`analysis.py`) and legs fused here (`fuse.py`), because the server's own ways to do that
need modules and licences that not every server has. It knows nothing of files to ingest, of graphs or of the record.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from agentops.clock import Clock, SystemClock
from agentops.errors import RetrievalError, RetrieverUnavailable
from agentops.records import Document, Hit, Query, Retrieval
from agentops.retrieval import Change, Collection, Embedder, collection_not_found
from agentops.retrieval.analysis import lexical_terms, terms
from agentops.retrieval.cluster import Action, Cluster, Conflict, Missing, open_cluster
from agentops.retrieval.fuse import fuse, rank
from agentops.retrieval.states import LAYOUT, State, States, key_of
from agentops.retrieval.stored import DEPTH, MAX_DEPTH, QUERY_CHARACTERS, Row, check_match, check_name, valid_unicode
from agentops.settings import Settings

T = TypeVar("T")

_EMBED_SLICE = 256
_LOOKUPS = 1000
_PAGE = 10_000
_QUERY_TERMS = 256
_OVERSAMPLE = 2.0
"""Candidates for each vector hit that are scored again in floats: of the ten nearest among 20,000, int8 alone finds 99.3 %
and this all."""
_ABORTED = 256
_TRIES = 50
_DOCUMENT = ["id", "text", "hash", "metadata"]


class _OvertakenError(Exception):
    """Another writer ended first; the work is to be done again on what it left."""


class ElasticIndex:
    """Implements `Index` on a server. The embedder, or what opens it, is asked for when a vector is first needed.

    All methods may be called from any thread, and any number of processes may read and write: of two writers of a collection
    that meet, the later does its work again. Nothing waits longer than `elasticsearch.timeout_s` for the server.
    """

    def __init__(
        self,
        cluster: Cluster,
        embedder: Embedder | Callable[[], Embedder],
        *,
        prefix: str = "agentops",
        clock: Clock | None = None,
    ) -> None:
        self._cluster = cluster
        self._given = embedder
        self._embedder: Embedder | None = None
        self._states = States(cluster, prefix)
        self._clock = clock or SystemClock()
        self._lock = threading.RLock()
        self._turn = threading.Lock()
        self._seen: dict[str, State] = {}
        self._closed = False

    # -- reading

    async def search(self, query: Query) -> Retrieval:
        """Hits best first. In hybrid mode `score` is the fused one, else the leg's own. A query without a word finds nothing.

        Raises:
            CollectionNotFound: the hint lists the collections there are.
            CollectionMismatch: the collection was made with another embedder (not asked for in lexical mode).
            RetrieverUnavailable: the server does not answer, not in time, or refuses the user.
            RetrievalError
        """
        return await asyncio.to_thread(self._search, query)

    def collections(self) -> list[Collection]:
        """All collections by name.

        Raises:
            RetrievalError
        """
        self._check_open()
        return [
            Collection(state.name, state.documents, state.generation, state.embedder, state.dimensions)
            for state in self._states.all()
            if not state.dropped
        ]

    def sources(self, collection: str) -> dict[str, list[str]]:
        """Document ids by `source`, both in order; documents without one are under the empty string.

        Raises:
            CollectionNotFound, RetrievalError
        """
        for _ in range(_TRIES):
            state = self._find(collection)
            found: dict[str, list[str]] = {}
            try:
                for document in self._pages(state):
                    found.setdefault(document["source"], []).append(document["id"])
            except Missing:
                continue
            now = self._find(collection)
            if now.index == state.index and now.removed <= state.generation:
                return {source: sorted(found[source]) for source in sorted(found)}
        raise self._restless(collection)

    # -- writing

    def upsert(self, collection: str, documents: Sequence[Document]) -> Change:
        """Stores documents by id in one step, embedding only texts whose vector the collection has not got.

        A document that is stored already, unchanged in text and metadata, is left alone; when all are, the generation
        does not rise. Of several documents with the same id in one call, the last counts. Makes a missing collection.

        Raises:
            CollectionMismatch: the collection was made with another embedder.
            DocumentError: an id is empty, metadata is not flat, or the text is no valid Unicode. Nothing was stored.
            RetrieverUnavailable: where the server was gone in the middle, all of it was stored or nothing; call it again.
            RetrievalError
        """
        self._check_open()
        check_name(collection)
        rows = {document.id: Row.of(document) for document in documents}
        embedder = self._open_embedder()
        vectors: dict[str, list[float]] = {}

        def work() -> Change:
            state = self._settled(collection) or self._states.create(collection, embedder, _mappings(collection, embedder))
            _check_match(state, embedder)
            present = self._present(state, rows)
            changed = [row for row in rows.values() if row.id not in present or not _same(row, present[row.id])]
            if changed:
                self._embed(state, embedder, changed, vectors)
                self._replace(state, [present[row.id]["_id"] for row in changed if row.id in present], changed, vectors)
            updated = sum(row.id in present for row in changed)
            return Change(added=len(changed) - updated, updated=updated, unchanged=len(rows) - len(changed))

        return self._in_turn(collection, work)

    def delete(self, collection: str, ids: Sequence[str]) -> Change:
        """Removes documents; ids that are not there are passed over.

        Raises:
            CollectionNotFound, RetrievalError
        """

        def work() -> Change:
            state = self._find(collection)
            gone = [stored["_id"] for stored in self._present(state, ids).values()]
            if gone:
                self._replace(state, gone, (), {})
            return Change(removed=len(gone))

        return self._in_turn(collection, work)

    def drop(self, collection: str) -> None:
        """Removes a collection with all its documents.

        Raises:
            CollectionNotFound, RetrievalError
        """

        def work() -> None:
            self._settled(collection)
            state = self._find(collection)
            self._states.bury(self._states.store(replace(state, dropped=True)))

        self._in_turn(collection, work)
        self._seen.pop(collection, None)

    def close(self) -> None:
        """Closes the connections. Closing twice is harmless; any other call afterwards raises RetrievalError."""
        self._closed = True
        self._seen.clear()
        self._cluster.close()

    # -- inside: searching

    def _search(self, query: Query) -> Retrieval:
        text = valid_unicode(query.text[:QUERY_CHARACTERS])
        words = terms(text) if query.mode != "vector" else []
        vector: NDArray[np.float32] | None = None
        embed_ms = 0.0
        state, fresh = self._seen.get(query.collection), False
        if state is None:
            state, fresh = self._find(query.collection), True
        wanted = query.k > 0 and bool(text.strip())
        if wanted and query.mode != "lexical":
            # Opening the embedder may take minutes, and a collection that is not there has no use for it.
            embedder = self._open_embedder()
            if not fresh and not _matches(state, embedder):
                state, fresh = self._find(query.collection), True
            _check_match(state, embedder)
            begun = self._clock.monotonic_ns()
            vector = embedder.embed([text])[0]
            embed_ms = (self._clock.monotonic_ns() - begun) / 1e6
        begun, by = self._clock.monotonic_ns(), self._cluster.deadline()
        while True:
            if vector is not None:
                _check_match(state, self._open_embedder())
            try:
                hits = self._ranked(state, query, vector, words, by) if wanted else ()
                missing = False
            except Missing:
                hits, missing = (), True
            now = self._find(query.collection, by=by)
            # What was removed since may have been missing from what was searched; what was added may be missing from it only
            # where the search began with a state known from before.
            whole = now.index == state.index and now.removed <= state.generation
            if not missing and whole and (fresh or now.generation == state.generation):
                search_ms = (self._clock.monotonic_ns() - begun) / 1e6
                return Retrieval(query, hits, state.generation, embed_ms=embed_ms, search_ms=search_ms)
            if missing and now.index == state.index and fresh:
                raise self._lost(query.collection)
            state, fresh = now, True

    def _ranked(
        self, state: State, query: Query, vector: NDArray[np.float32] | None, words: list[str], by: int
    ) -> tuple[Hit, ...]:
        """Hits at the generation of `state`; both legs are asked in one request."""
        depth = min(max(DEPTH, query.k), MAX_DEPTH)
        common: dict[str, Any] = {"size": depth, "track_total_hits": False, "_source": _DOCUMENT}
        bodies: list[dict[str, Any]] = []
        if vector is not None:
            nearest = {
                "field": "vector",
                "query_vector": vector.tolist(),
                "k": depth,
                "num_candidates": min(2 * depth, MAX_DEPTH),
                "filter": state.visible(),
                "rescore_vector": {"oversample": _OVERSAMPLE},
            }
            bodies.append({**common, "knn": nearest})
        if words:
            counted = Counter(words).most_common(_QUERY_TERMS)
            some = [{"term": {"terms": {"value": word, "boost": float(count)}}} for word, count in counted]
            asked = {"bool": {"should": some, "minimum_should_match": 1, "filter": state.visible()}}
            bodies.append({**common, "query": asked})
        if not bodies:
            return ()
        answers = [answer["hits"]["hits"] for answer in self._cluster.search([(state.index, body) for body in bodies], by=by)]
        documents = {hit["_source"]["id"]: hit["_source"] for hits in answers for hit in hits}
        by_vector = [(hit["_source"]["id"], _cosine(hit["_score"])) for hit in (answers[0] if vector is not None else ())]
        by_words = [(hit["_source"]["id"], float(hit["_score"])) for hit in (answers[-1] if words else ())]
        legs = [rank(by_vector), rank(by_words)]
        if query.mode == "hybrid":
            best = fuse(*legs)[: query.k]
        else:
            best = [(key, place.score) for leg in legs for key, place in leg.items()][: query.k]
        return tuple(
            Hit(_document(documents[key]), score, vector=legs[0].get(key), lexical=legs[1].get(key)) for key, score in best
        )

    # -- inside: writing

    def _in_turn(self, collection: str, work: Callable[[], T]) -> T:
        """Does the work, and does it again for as long as other writers end before it."""
        self._check_open()
        for last in (*(False,) * _TRIES, True):
            try:
                return work()
            except (_OvertakenError, Conflict):
                if last:
                    raise self._restless(collection) from None
            except Missing:
                if last:
                    raise self._lost(collection) from None
        raise AssertionError("the last try returns or raises")

    def _settled(self, collection: str) -> State | None:
        """The state for a writer, who first ends what a process that died began to drop."""
        state = self._states.read(collection)
        if state is not None and state.dropped:
            self._states.bury(state)
            return None
        return state

    def _replace(self, state: State, gone: Sequence[str], rows: Sequence[Row], vectors: Mapping[str, list[float]]) -> None:
        """Stores rows and takes versions out, in one step that raises the generation.

        Raises:
            _OvertakenError, Conflict: another writer has done so since `state` was read.
        """
        with self._turn:  # within one process writers wait, rather than do their work twice
            claimed = self._states.store(replace(state, claimed=state.claimed + 1))
            turn = claimed.claimed
            if rows:
                self._cluster.write([_version(state.index, turn, row, vectors[row.embedded]) for row in rows])
                self._refresh(state.index)
            done = self._commit(claimed, turn, gone, len(rows))
            self._seen[state.name] = done
            # The write is done; where this fails, the next writer tidies up.
            with suppress(RetrieverUnavailable, Conflict, Missing):
                self._tidy(done)

    def _commit(self, claimed: State, turn: int, gone: Sequence[str], added: int) -> State:
        now: State | None = claimed
        while now is not None and (now.index, now.generation, now.dropped) == (claimed.index, claimed.generation, False):
            new = replace(
                now,
                generation=turn,
                removed=turn if gone else now.removed,
                documents=now.documents + added - len(gone),
                # Whoever holds a number between the two has not ended, and finds out when it tries to.
                aborted=(*now.aborted, *range(now.generation + 1, turn))[-_ABORTED:],
                dying=(*now.dying, *gone),
            )
            try:
                return self._states.store(new)
            except Conflict:
                now = self._states.read(claimed.name)
        raise _OvertakenError

    def _tidy(self, state: State) -> None:
        """Removes from the server what no generation shows any more."""
        stale = list(state.dying)
        if state.aborted:
            body = {"size": _PAGE, "query": {"terms": {"born": list(state.aborted)}}, "_source": False}
            (answer,) = self._cluster.search([(state.index, body)])
            stale += [hit["_id"] for hit in answer["hits"]["hits"]]
        if not stale:
            return
        self._cluster.write([({"delete": {"_index": state.index, "_id": key}}, None) for key in stale])
        if state.dying:
            self._refresh(state.index)
            self._seen[state.name] = self._states.store(replace(state, dying=()))

    def _present(self, state: State, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The stored versions that the generation holds of those among the documents that are there, by the documents' ids."""
        found: dict[str, dict[str, Any]] = {}
        for part in _sliced(dict.fromkeys(map(key_of, keys)), _LOOKUPS):
            asked = {"bool": {"filter": [{"terms": {"key": part}}, state.visible()]}}
            body = {"size": len(part), "query": asked, "_source": ["id", "hash", "embedded", "metadata"]}
            (answer,) = self._cluster.search([(state.index, body)])
            found.update({hit["_source"]["id"]: {"_id": hit["_id"], **hit["_source"]} for hit in answer["hits"]["hits"]})
        return found

    def _embed(self, state: State, embedder: Embedder, rows: Sequence[Row], vectors: dict[str, list[float]]) -> None:
        """Fills `vectors`, by hash of the embedded text, taking from the collection those that it has."""
        texts = {row.embedded: row.to_embed for row in rows if row.embedded not in vectors}
        for part in _sliced(texts, _LOOKUPS):
            body = {
                "size": len(part),
                "query": {"terms": {"embedded": part}},
                "collapse": {"field": "embedded"},
                "_source": ["embedded"],
                "fields": ["vector"],
            }
            (answer,) = self._cluster.search([(state.index, body)])
            vectors.update({hit["_source"]["embedded"]: hit["fields"]["vector"] for hit in answer["hits"]["hits"]})
        for part in _sliced((key for key in texts if key not in vectors), _EMBED_SLICE):
            made = embedder.embed([texts[key] for key in part])
            vectors.update(zip(part, made.tolist(), strict=True))

    # -- inside: common

    def _find(self, collection: str, *, by: int | None = None) -> State:
        self._check_open()
        state = self._states.read(collection, by=by)
        if state is None or state.dropped:
            self._seen.pop(collection, None)
            raise collection_not_found(collection, [one.name for one in self.collections()])
        self._seen[collection] = state
        return state

    def _pages(self, state: State) -> Iterator[dict[str, Any]]:
        """Id and source of all documents that the generation holds."""
        opened = self._cluster.ask(lambda client: client.open_point_in_time(index=state.index, keep_alive="1m"))
        point, after = opened["id"], None
        try:
            while True:
                body: dict[str, Any] = {
                    "size": _PAGE,
                    "query": state.visible(),
                    "_source": ["id", "source"],
                    "sort": ["_shard_doc"],
                }
                body["pit"] = {"id": point, "keep_alive": "1m"}
                if after:
                    body["search_after"] = after
                answer = self._cluster.ask(lambda client: client.search(**body))  # noqa: B023
                hits = answer["hits"]["hits"]
                yield from (hit["_source"] for hit in hits)
                if len(hits) < _PAGE:
                    return
                after = hits[-1]["sort"]
        finally:
            with suppress(RetrievalError, Missing):  # else it ends by itself
                self._cluster.ask(lambda client: client.close_point_in_time(id=point))

    def _refresh(self, index: str) -> None:
        answer = self._cluster.ask(lambda client: client.indices.refresh(index=index))
        if answer["_shards"]["failed"]:
            raise RetrieverUnavailable("the server stored documents and cannot show them", hint="its log says more")

    def _open_embedder(self) -> Embedder:
        with self._lock:
            if self._embedder is None:
                self._embedder = self._given() if callable(self._given) else self._given
            return self._embedder

    def _check_open(self) -> None:
        if self._closed:
            raise RetrievalError("the index was closed")

    def _lost(self, collection: str) -> RetrievalError:
        return RetrievalError(
            f"the documents of '{collection}' are no longer on the server",
            hint=f"drop the collection and ingest them again: agentops collections --drop '{collection}'",
        )

    def _restless(self, collection: str) -> RetrieverUnavailable:
        return RetrieverUnavailable(f"'{collection}' is written without end by others", hint="try again later")


def _matches(state: State, embedder: Embedder) -> bool:
    return (state.revision, state.dimensions) == (embedder.revision, embedder.dimensions)


def _check_match(state: State, embedder: Embedder) -> None:
    check_match(state.name, state.embedder, state.revision, state.dimensions, embedder)


def open_index(settings: Settings, embedder: Embedder | Callable[[], Embedder], clock: Clock | None = None) -> ElasticIndex:
    """The index on the server that the settings name; it is not asked anything until it is used.

    Raises:
        SettingsError: address or prefix cannot be right, or a password would go to an address from elsewhere.
    """
    return ElasticIndex(open_cluster(settings, clock), embedder, prefix=settings.elasticsearch.prefix, clock=clock)


def _mappings(collection: str, embedder: Embedder) -> dict[str, Any]:
    kept = {"type": "keyword", "index": False, "doc_values": False}
    return {
        "dynamic": "strict",
        "_meta": {"collection": collection, "layout": LAYOUT},
        # Read back by nobody, and as long as the text.
        "_source": {"excludes": ["terms"]},
        "properties": {
            "id": kept,
            "source": kept,
            "text": kept,
            "metadata": kept,
            "hash": kept,
            "key": {"type": "keyword"},
            "embedded": {"type": "keyword"},
            "born": {"type": "long"},
            "terms": {"type": "text", "analyzer": "whitespace", "index_options": "freqs"},
            "vector": {
                "type": "dense_vector",
                "dims": embedder.dimensions,
                "index": True,
                "similarity": "dot_product",
                # Said, because the default for 384 dimensions and more, bbq_hnsw, misses a quarter of the nearest.
                "index_options": {"type": "int8_hnsw"},
            },
        },
    }


def _version(index: str, turn: int, row: Row, vector: list[float]) -> Action:
    """A version of a document; its id is the same however often it is sent."""
    document = Document(row.id, row.text, row.hash, json.loads(row.metadata))
    key = key_of(row.id)
    kept = {
        "id": row.id,
        "source": row.source,
        "text": row.text,
        "metadata": row.metadata,
        "hash": row.hash,
        "key": key,
        "embedded": row.embedded,
        "born": turn,
        "terms": " ".join(lexical_terms(document)),
        "vector": vector,
    }
    return {"index": {"_index": index, "_id": f"{key}-{turn}"}}, kept


def _same(row: Row, stored: Mapping[str, Any]) -> bool:
    return (row.hash, row.embedded, row.metadata) == (stored["hash"], stored["embedded"], stored["metadata"])


def _document(stored: Mapping[str, Any]) -> Document:
    return Document(stored["id"], stored["text"], stored["hash"], json.loads(stored["metadata"]))


def _cosine(score: float) -> float:
    """The server gives (1 + cosine) / 2, for scores must not be negative."""
    return 2.0 * float(score) - 1.0


def _sliced(items: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(items)
    while part := list(itertools.islice(rest, size)):
        yield part
