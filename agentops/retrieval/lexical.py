"""Ranking by words: a tantivy index of one collection, derived from the catalogue and thrown away when in doubt.

It is given terms, not text (`analysis.py`), and query terms are looked up, never parsed. Each commit carries the
catalogue's generation that it stands for, so that a reader knows whether the two agree.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tantivy

_HEAP_BYTES = 32_000_000
_QUERY_TERMS = 256
_MARK = 1


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_unsigned_field("seq", indexed=True, fast=True)
    builder.add_unsigned_field("mark", indexed=True)
    builder.add_unsigned_field("generation", fast=True)
    builder.add_text_field("terms", tokenizer_name="whitespace", index_option="freq")
    return builder.build()


class LexicalError(Exception):
    """The index cannot be read or written; it should be built anew."""


@contextmanager
def _guarded() -> Iterator[None]:
    """Turns whatever tantivy raises into `LexicalError`; a panic of it is no `Exception`."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, SystemError) as error:
        raise LexicalError(str(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise LexicalError(str(error)) from error


class LexicalIndex:
    """The words of one collection in `folder`. Reading is safe from any thread and process; writing is for one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._schema = _schema()
        self._lock = threading.Lock()
        self._index: tantivy.Index | None = None
        self._seen: tuple[int, tantivy.Searcher] | None = None

    def at(self, generation: int) -> tantivy.Searcher | None:
        """A searcher over exactly that generation, or None when the index on disk stands elsewhere or cannot be read."""
        with self._lock:
            if self._seen is None or self._seen[0] != generation:
                try:
                    self._seen = self._look()
                except LexicalError:
                    self._seen = None
            return self._seen[1] if self._seen is not None and self._seen[0] == generation else None

    def generation(self) -> int:
        """The generation on disk; -1 when there is none or it cannot be read."""
        with self._lock:
            try:
                self._seen = self._look()
            except LexicalError:
                self._seen = None
            return -1 if self._seen is None else self._seen[0]

    def apply(self, generation: int, added: Iterable[tuple[int, Sequence[str]]], removed: Sequence[int]) -> None:
        """Takes rows in and out and stands for `generation` from now on, all in one commit.

        Raises:
            LexicalError
        """
        with _guarded():
            self._folder.mkdir(parents=True, exist_ok=True)
            writer = tantivy.Index(self._schema, path=str(self._folder)).writer(_HEAP_BYTES, 1)
            term = tantivy.Query.term_query
            # delete_documents_by_term takes a number for a signed one and then finds nothing in an unsigned field.
            writer.delete_documents_by_query(term(self._schema, "mark", _MARK, "basic"))
            for seq in removed:
                writer.delete_documents_by_query(term(self._schema, "seq", seq, "basic"))
            for seq, terms in added:
                document = tantivy.Document()
                document.add_unsigned("seq", seq)
                document.add_text("terms", " ".join(terms))
                writer.add_document(document)
            mark = tantivy.Document()
            mark.add_unsigned("mark", _MARK)
            mark.add_unsigned("generation", generation)
            writer.add_document(mark)
            writer.commit()
            writer.wait_merging_threads()

    def search(self, searcher: tantivy.Searcher, terms: Sequence[str], limit: int) -> list[tuple[int, float]]:
        """The `seq` and BM25 score of the best `limit` rows that have any of the terms.

        Raises:
            LexicalError
        """
        counted = Counter(terms).most_common(_QUERY_TERMS)
        if not counted:
            return []
        query = tantivy.Query
        with _guarded():
            parts = [
                (tantivy.Occur.Should, query.boost_query(query.term_query(self._schema, "terms", term, "freq"), float(count)))
                for term, count in counted
            ]
            hits = searcher.search(query.boolean_query(parts), limit, count=False).hits
            rows = searcher.fast_field_values("seq", [address for _, address in hits])
            return [(int(seq), float(score)) for (score, _), seq in zip(hits, rows, strict=True) if seq is not None]

    def clear(self) -> None:
        """Removes everything on disk. Searchers in use keep what they have open."""
        with self._lock:
            self._index = self._seen = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def _look(self) -> tuple[int, tantivy.Searcher]:
        with _guarded():
            if self._index is None:
                if not (self._folder / "meta.json").exists():
                    raise LexicalError("nothing there")
                self._index = tantivy.Index(self._schema, path=str(self._folder))
                self._index.config_reader("manual")
            try:
                self._index.reload()
            except ValueError:
                # The folder may have been built anew under the handle.
                self._index = None
                raise
            searcher = self._index.searcher()
            marks = searcher.search(tantivy.Query.term_query(self._schema, "mark", _MARK, "basic"), 1, count=False).hits
            if not marks:
                raise LexicalError("no generation")
            (generation,) = searcher.fast_field_values("generation", [marks[0][1]])
            return int(generation or 0), searcher
