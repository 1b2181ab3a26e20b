"""The verbs of documents: `ingest` reads files into a collection, `search` finds in it, `collections` lists and drops."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentops.cli.run import EsUrl, Retriever
from agentops.errors import DocumentError, UsageError

if TYPE_CHECKING:
    from agentops.records import Hit, Leg, Retrieval
    from agentops.retrieval import Embedder, Index
    from agentops.retrieval.ingest import IngestReport, Progress
    from agentops.settings import Settings

_MODES = ("hybrid", "vector", "lexical")
_SNIPPET_CHARACTERS = 240
_PROBLEMS = 20


def register(app: typer.Typer) -> None:
    app.command()(ingest)
    app.command()(search)
    app.command()(collections)


def ingest(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Files, or folders with Markdown, text, HTML and PDF files.")
    ],
    collection: Annotated[
        str | None, typer.Option("--collection", "-c", help="Collection to fill. Default: the setting retrieval.collection.")
    ] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Size of a piece in the embedder's tokens.")] = None,
    overlap_tokens: Annotated[int | None, typer.Option(help="Tokens that neighbouring pieces share.")] = None,
    embedder: Annotated[str | None, typer.Option(help="Embedding model: a catalogue name or a local folder.")] = None,
    retriever: Retriever = None,
    es_url: EsUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read documents into a collection. What has left the folders given is taken out.

    What did not change is not embedded again. A file that cannot be read is listed, the others go in; the exit code is 1
    when none could be read.
    """
    import logging

    from agentops.cli.render import clean
    from agentops.retrieval.ingest import ingest as ingest_paths

    # What it finds wrong with a file is in the list of problems.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    settings = _settings(
        {
            "retrieval.collection": collection,
            "retrieval.chunk_tokens": chunk_tokens,
            "retrieval.overlap_tokens": overlap_tokens,
            "retrieval.embedder": embedder,
            **_place(retriever, es_url),
        }
    )
    if settings.retrieval.overlap_tokens >= settings.retrieval.chunk_tokens:
        raise UsageError("neighbouring pieces cannot share more than a whole piece", hint="lower --overlap-tokens")
    missing = [path for path in paths if not os.path.lexists(Path(path).expanduser())]
    if len(missing) == len(paths):
        raise UsageError(f"no such file or folder: {clean(', '.join(missing))}", hint="nothing was read")
    encoder = _embedder(settings)
    with _index(settings, encoder) as index, _progress() as progress:
        report = ingest_paths(
            list(paths),
            index,
            settings.retrieval.collection,
            chunk_tokens=settings.retrieval.chunk_tokens,
            overlap_tokens=settings.retrieval.overlap_tokens,
            count_tokens=encoder.count_tokens,
            progress=progress,
        )
    _print_report(report, as_json)
    if not (report.files or report.problems or report.removed):
        raise DocumentError(f"there is nothing to read in {', '.join(paths)}", hint="Markdown, text, HTML and PDF files are read")
    if report.failed:
        raise DocumentError(f"none of {len(report.problems)} could be read", hint="each is listed above with its reason")


def search(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What to look for, in plain words.")],
    collection: Annotated[
        str | None, typer.Option("--collection", "-c", help="Collection to search. Default: the setting retrieval.collection.")
    ] = None,
    k: Annotated[int | None, typer.Option("-k", "--k", help="How many results at most.")] = None,
    mode: Annotated[
        str, typer.Option(help="hybrid: by meaning and by words.  vector: by meaning.  lexical: by words.")
    ] = "hybrid",
    embedder: Annotated[str | None, typer.Option(help="Embedding model: a catalogue name or a local folder.")] = None,
    retriever: Retriever = None,
    es_url: EsUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a question finds in a collection. No model is asked."""
    from agentops.records import Query
    from agentops.sync import run_sync

    if mode not in _MODES:
        raise UsageError(f"no search has the mode '{mode}'", hint="one of: " + ", ".join(_MODES))
    if not query.strip():
        raise UsageError("the query is empty", hint='as in: agentops search "how are the legs fused?"')
    settings = _settings(
        {
            "retrieval.collection": collection,
            "retrieval.k": k,
            "retrieval.embedder": embedder,
            **_place(retriever, es_url),
        }
    )
    asked = Query(query, settings.retrieval.collection, settings.retrieval.k, mode)  # type: ignore[arg-type]
    with _index(settings) as index:
        found = run_sync(index.search(asked))
    if as_json:
        print(json.dumps(_retrieval_json(found), indent=2))
    elif found.hits:
        for place, hit in enumerate(found.hits, 1):
            _print_hit(place, hit)
    else:
        print("nothing found")


def collections(
    drop: Annotated[str | None, typer.Option(metavar="NAME", help="Remove this collection with all its documents.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before removing.")] = False,
    retriever: Retriever = None,
    es_url: EsUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the collections, or remove one."""
    from agentops.cli.render import clean

    with _index(_settings(_place(retriever, es_url))) as index:
        if drop is not None:
            index.sources(drop)  # a missing one is said before anything is asked
            if not yes:
                if not sys.stdin.isatty():
                    raise UsageError("removing a collection needs a yes", hint=f"agentops collections --drop {drop} --yes")
                typer.confirm(f"remove '{clean(drop)}' with all its documents?", abort=True, err=True)
            index.drop(drop)
            print(f"removed '{clean(drop)}'", file=sys.stderr)
        found = index.collections()
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
    elif found:
        rows = [("collection", "documents", "embedder", "dimensions", "generation")]
        rows += [(clean(o.name), f"{o.documents:,}", clean(o.embedder), str(o.dimensions), str(o.generation)) for o in found]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [
                cell.ljust(width) if i in (0, 2) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            print("  ".join(cells).rstrip())
    elif drop is None:
        print("no collections yet; make one with: agentops ingest PATH --collection NAME")


def _place(retriever: str | None, es_url: str | None) -> dict[str, Any]:
    return {"retrieval.retriever": retriever, "elasticsearch.url": es_url}


def _settings(flags: dict[str, Any]) -> Settings:
    from agentops.settings import load_settings

    return load_settings(flags)


def _embedder(settings: Settings) -> Embedder:
    from agentops.cli.progress import stages
    from agentops.parts import open_embedder

    with stages(settings.retrieval.embedder) as progress:
        return open_embedder(settings, progress)


@contextmanager
def _index(settings: Settings, embedder: Embedder | None = None) -> Iterator[Index]:
    from agentops.parts import open_index

    index = open_index(settings, embedder or (lambda: _embedder(settings)))
    try:
        yield index
    finally:
        index.close()


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar on standard error that appears when the work takes longer than a moment; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from agentops.cli.render import one_line

    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.fields[source]}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0, source="")
        yield lambda share, source: bar.update(task, completed=share, source=one_line(source, 60))


def _print_report(report: IngestReport, as_json: bool) -> None:
    from agentops.cli.render import one_line

    for problem in report.problems[:_PROBLEMS]:
        print(f"not read: {one_line(problem.path, 200)}: {one_line(problem.reason, 200)}", file=sys.stderr)
    if len(report.problems) > _PROBLEMS:
        print(f"not read: {len(report.problems) - _PROBLEMS:,} more; --json names them all", file=sys.stderr)
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
        return
    if report.files or not report.problems:
        changes = [
            f"{count:,} {name}"
            for name in ("added", "updated", "unchanged", "removed")
            if (count := getattr(report, name)) or name == "added"
        ]
        print(f"{report.collection}: {_counted(report.files, 'file')}, {_counted(report.pieces, 'piece')} ({', '.join(changes)})")
    passed = [f"{report.hidden:,} hidden"] * bool(report.hidden) + [f"{report.unknown:,} of another kind"] * bool(report.unknown)
    if passed:
        print(f"passed over: {', '.join(passed)}", file=sys.stderr)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _print_hit(place: int, hit: Hit) -> None:
    from agentops.cli.render import one_line

    meta = hit.document.metadata
    where = str(meta.get("source") or hit.document.id)
    where += f", page {meta['page']}" if "page" in meta else ""
    heading = str(meta.get("heading") or meta.get("title") or "")
    legs = ", ".join(
        f"{name} #{leg.rank} {leg.score:.{digits}f}"
        for name, leg, digits in (("vector", hit.vector, 3), ("lexical", hit.lexical, 1))
        if leg is not None
    )
    print(f"{place}. {one_line(where + (f' > {heading}' if heading else ''), 200)}")
    print(f"   {hit.score:.4f} ({legs})")
    print(f"   {one_line(hit.document.text, _SNIPPET_CHARACTERS)}")


def _retrieval_json(found: Retrieval) -> dict[str, Any]:
    def leg(one: Leg | None) -> dict[str, Any] | None:
        return None if one is None else {"rank": one.rank, "score": one.score}

    return {
        "query": found.query.text,
        "collection": found.query.collection,
        "mode": found.query.mode,
        "generation": found.generation,
        "embed_ms": round(found.embed_ms, 3),
        "search_ms": round(found.search_ms, 3),
        "hits": [
            {
                "rank": place,
                "score": hit.score,
                "vector": leg(hit.vector),
                "lexical": leg(hit.lexical),
                "id": hit.document.id,
                "hash": hit.document.hash,
                "text": hit.document.text,
                "metadata": dict(hit.document.metadata),
            }
            for place, hit in enumerate(found.hits, 1)
        ],
    }
