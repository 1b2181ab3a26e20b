"""What is known of the collections on an Elasticsearch server: one small document for each, replaced only as it was read.

A state says which of the stored documents its collection holds; changing the state is what makes a write seen. Knows nothing of
the documents themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from agentops.errors import RetrievalError
from agentops.retrieval import Embedder
from agentops.retrieval.cluster import Cluster, Conflict, Missing
from agentops.retrieval.stored import valid_unicode

LAYOUT = 1
"""Rises when documents are kept in another way, so that an index of old is not taken for one of now."""

_COUNTER = "counter"
_PAGE = 10_000


@dataclass(frozen=True, slots=True)
class State:
    """What is known of a collection, kept as one document that is only ever replaced when it is still as it was read.

    `claimed` is the highest number that a writer has taken; `aborted` are numbers below the generation that never ended;
    `dying` are versions that the generation no longer holds and that are still stored; `removed` is the last generation that
    held less than the one before.
    """

    name: str
    index: str
    embedder: str
    revision: str
    dimensions: int
    documents: int
    generation: int
    claimed: int
    removed: int
    aborted: tuple[int, ...] = ()
    dying: tuple[str, ...] = ()
    dropped: bool = False
    version: tuple[int, int] = field(default=(0, 0), compare=False)
    """Sequence number and primary term by which the server tells whether it was replaced."""

    @staticmethod
    def of(answer: Mapping[str, Any]) -> State:
        kept = dict(answer["_source"])
        kept.update(aborted=tuple(kept["aborted"]), dying=tuple(kept["dying"]))
        return State(**kept, version=(answer["_seq_no"], answer["_primary_term"]))

    def stored(self) -> dict[str, Any]:
        kept = asdict(self)
        del kept["version"]
        return kept

    def visible(self) -> dict[str, Any]:
        """The filter for what the generation holds."""
        hidden: list[dict[str, Any]] = []
        if self.aborted:
            hidden.append({"terms": {"born": list(self.aborted)}})
        if self.dying:
            hidden.append({"ids": {"values": list(self.dying)}})
        return {"bool": {"filter": [{"range": {"born": {"lte": self.generation}}}], "must_not": hidden}}


class States:
    """The states of all collections below a prefix."""

    def __init__(self, cluster: Cluster, prefix: str) -> None:
        self._cluster = cluster
        self._prefix = prefix
        self._index = f"{prefix}-collections"

    def all(self) -> list[State]:
        """Those of all collections, by name, as the last ended write left them."""
        body = {"size": _PAGE, "query": {"exists": {"field": "name"}}, "seq_no_primary_term": True}
        try:
            (answer,) = self._cluster.search([(self._index, body)])
        except Missing:
            return []
        return sorted(map(State.of, answer["hits"]["hits"]), key=lambda state: state.name)

    def read(self, collection: str, *, by: int | None = None) -> State | None:
        """The state at this moment; also that of a collection that is being dropped."""
        try:
            return State.of(self._cluster.ask(lambda client: client.get(index=self._index, id=key_of(collection)), by=by))
        except Missing:
            return None

    def store(self, state: State) -> State:
        """Puts it where the one that it was made from was.

        Raises:
            Conflict: there is another by now.
        """
        return replace(state, version=self._put(key_of(state.name), state.stored(), state.version))

    def create(self, collection: str, embedder: Embedder, mappings: Mapping[str, Any]) -> State:
        """A new, empty collection. Its name is free text and an index's is not: the index is named by a hash, and reached by an
        alias, so that a write to one that was dropped does not make it anew.

        Raises:
            Conflict: somebody else makes it at this moment.
        """
        self._ensure(self._index, {"dynamic": False, "properties": {"name": {"type": "keyword"}}})
        start = self._counted()[0] + 1
        spelled = json.dumps([collection, embedder.revision, embedder.dimensions, LAYOUT])
        alias = f"{self._prefix}-{hashlib.blake2b(spelled.encode(), digest_size=12).hexdigest()}-{start}"
        self._ensure(_behind(alias), mappings, alias)
        state = State(
            name=collection,
            index=alias,
            embedder=embedder.name,
            revision=embedder.revision,
            dimensions=embedder.dimensions,
            documents=0,
            generation=start,
            claimed=start,
            removed=start,
        )
        return replace(state, version=self._put(key_of(collection), state.stored(), None))

    def bury(self, state: State) -> None:
        """Removes all of a collection that is marked as dropped, maybe by a process that died then. The next one of that name
        goes on counting."""
        count, version = self._counted()
        while count <= state.claimed:
            try:
                self._put(_COUNTER, {"generation": state.claimed + 1}, version)
                break
            except Conflict:
                count, version = self._counted()
        with suppress(Missing):
            self._cluster.ask(lambda client: client.indices.delete(index=_behind(state.index)))
        seq, term = state.version
        with suppress(Missing, Conflict):
            self._cluster.ask(
                lambda client: client.delete(
                    index=self._index, id=key_of(state.name), if_seq_no=seq, if_primary_term=term, refresh=True
                )
            )

    def _ensure(self, index: str, mappings: Mapping[str, Any], alias: str | None = None) -> None:
        settings = {"number_of_shards": 1, "auto_expand_replicas": "0-1", "refresh_interval": "-1"}
        aliases: dict[str, Any] = {alias: {}} if alias else {}
        try:
            self._cluster.ask(
                lambda client: client.indices.create(index=index, settings=settings, mappings=mappings, aliases=aliases)
            )
        except RetrievalError as error:
            if "already exists" not in str(error):
                raise

    def _put(self, key: str, document: Mapping[str, Any], version: tuple[int, int] | None) -> tuple[int, int]:
        condition: dict[str, Any] = {"op_type": "create"}
        if version is not None:
            condition = {"if_seq_no": version[0], "if_primary_term": version[1]}
        answer = self._cluster.ask(
            lambda client: client.index(index=self._index, id=key, document=document, refresh=True, **condition)
        )
        return answer["_seq_no"], answer["_primary_term"]

    def _counted(self) -> tuple[int, tuple[int, int] | None]:
        """The highest generation of the collections that were dropped, and the version of that number."""
        try:
            answer = self._cluster.ask(lambda client: client.get(index=self._index, id=_COUNTER))
        except Missing:
            return 0, None
        return answer["_source"]["generation"], (answer["_seq_no"], answer["_primary_term"])


def key_of(text: str) -> str:
    """What an arbitrary text is looked up by."""
    return hashlib.blake2b(valid_unicode(text).encode(), digest_size=16).hexdigest()


def _behind(alias: str) -> str:
    return f"{alias}-documents"
