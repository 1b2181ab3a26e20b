"""What every back-end keeps of a document, and what it refuses: one place, so that all of them keep and refuse the same.

It knows no back-end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from agentops.errors import CollectionMismatch, DocumentError, RetrievalError
from agentops.records import Document, content_hash
from agentops.retrieval import Embedder
from agentops.retrieval.analysis import embedding_text

DEPTH = 100
"""Places of each leg that take part in the fusion, at least."""

MAX_DEPTH = 10_000
QUERY_CHARACTERS = 100_000
NAME_CHARACTERS = 128


@dataclass(frozen=True, slots=True)
class Row:
    """A document as it is stored: `metadata` is JSON, `embedded` the hash of the text that is embedded."""

    id: str
    source: str
    text: str
    metadata: str
    hash: str
    embedded: str
    to_embed: str

    @staticmethod
    def of(document: Document) -> Row:
        """
        Raises:
            DocumentError: an id is empty, metadata is not flat, or the text is no valid Unicode.
        """

        def refused(what: str) -> DocumentError:
            return DocumentError(f"document {document.id!r}: {what}", hint="mend the document; nothing was stored")

        if not document.id:
            raise refused("its id is empty")
        for key, value in document.metadata.items():
            if not isinstance(key, str) or not isinstance(value, str | int | float | bool):
                raise refused(f"metadata {key!r} must be a string, a number or a truth value")
        try:
            metadata = json.dumps(dict(document.metadata), sort_keys=True, ensure_ascii=False, allow_nan=False)
            "".join((document.id, document.text, document.hash, metadata)).encode()
        except UnicodeEncodeError:
            raise refused("it holds characters that are no valid Unicode (lone surrogates)") from None
        except ValueError:
            raise refused("metadata holds a number that is not finite") from None
        to_embed = embedding_text(document)
        source = str(document.metadata.get("source", ""))
        return Row(document.id, source, document.text, metadata, document.hash, content_hash(to_embed), to_embed)


def check_name(collection: str) -> None:
    """
    Raises:
        RetrievalError
    """
    if not collection.strip() or len(collection) > NAME_CHARACTERS or not collection.isprintable():
        raise RetrievalError(
            f"{collection!r} cannot be a collection's name", hint=f"use 1 to {NAME_CHARACTERS} printable characters"
        )


def check_match(collection: str, name: str, revision: str, dimensions: int, embedder: Embedder) -> None:
    """
    Raises:
        CollectionMismatch: the collection's vectors come from another embedder than this.
    """
    if (revision, dimensions) != (embedder.revision, embedder.dimensions):
        raise CollectionMismatch(
            f"collection '{collection}' was made with the embedder {name} ({revision}), "
            f"this is {embedder.name} ({embedder.revision})",
            hint="search with that embedder, or drop the collection and ingest the documents again",
        )


def valid_unicode(text: str) -> str:
    """The text with lone surrogates, which no library below takes, as question marks."""
    return text.encode("utf-8", "replace").decode()
