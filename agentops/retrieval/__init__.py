"""Retrieval: remembers documents in collections and finds them again.

`Index` is the protocol; `EmbeddedIndex` keeps everything in local files, `ElasticIndex` on an Elasticsearch server. An index
is given its embedder and knows nothing of models' whereabouts, graphs or the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from agentops.errors import CollectionNotFound, RetrieverUnavailable
from agentops.records import Document, Query, Retrieval


class Embedder(Protocol):
    """Turns texts into unit vectors. `name` and `revision` are pinned to every collection made with it."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def dimensions(self) -> int: ...

    def count_tokens(self, text: str) -> int: ...
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (len(texts), dimensions), rows of length 1."""
        ...


@dataclass(frozen=True, slots=True)
class Collection:
    """What is known of a collection without reading it."""

    name: str
    documents: int
    generation: int
    embedder: str
    dimensions: int


@dataclass(frozen=True, slots=True)
class Change:
    """What an `upsert` or `delete` did, in documents."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0


class Retriever(Protocol):
    """Finds documents. What graphs are given."""

    async def search(self, query: Query) -> Retrieval:
        """
        Raises:
            CollectionNotFound, CollectionMismatch, RetrievalError
        """
        ...


class Index(Retriever, Protocol):
    """A retriever that can also be written. A reader never sees half of a write."""

    def upsert(self, collection: str, documents: Sequence[Document]) -> Change:
        """Stores documents by id, embedding only those whose hash is new. Makes the collection when it is missing."""
        ...

    def delete(self, collection: str, ids: Sequence[str]) -> Change: ...
    def drop(self, collection: str) -> None: ...
    def collections(self) -> list[Collection]: ...
    def sources(self, collection: str) -> dict[str, list[str]]:
        """Document ids by the `source` in their metadata."""
        ...

    def close(self) -> None: ...


class LenientRetriever:
    """A `Retriever` that answers with an empty retrieval, marked by its `error`, where the one it wraps is unavailable."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever

    async def search(self, query: Query) -> Retrieval:
        """
        Raises:
            CollectionNotFound, CollectionMismatch, RetrievalError: as the wrapped one, but for `RetrieverUnavailable`.
        """
        try:
            return await self._retriever.search(query)
        except RetrieverUnavailable as error:
            return Retrieval(query, (), 0, error=str(error))


def collection_not_found(name: str, known: Sequence[str]) -> CollectionNotFound:
    """The error for a collection that is not among the `known` ones."""
    have = "there are: " + ", ".join(known) if known else "there are none yet"
    return CollectionNotFound(
        f"no collection is called '{name}'",
        hint=f"{have}; name one with --collection, or make one: agentops ingest PATH --collection {name}",
    )
