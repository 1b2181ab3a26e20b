"""`agentops demo`: the main job from beginning to end, on the project's own documentation."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from agentops.errors import UsageError

COLLECTION = "agentops-docs"
_PROBE_S = 3.0
QUESTIONS = (
    "How many positions does a block of the KV cache hold?",
    "What status does a run have when its process died?",
    "Which Kafka topic receives the traces?",
)
"""Two whose answers are in the documentation, and one whose answer is not."""
METRICS = ("citations_support", "faithfulness", "hallucination", "latency_ms", "tokens")


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Catalogue name, local folder or hub id.")] = None,
) -> None:
    """Ask three questions about the documentation. Prepares the model, reads the pages, and shows how an answer came about."""
    from agentops.cli.documents import ingest
    from agentops.cli.evaluate import evaluate
    from agentops.cli.models import prepare
    from agentops.cli.progress import stages
    from agentops.cli.record import show
    from agentops.cli.replay import replay
    from agentops.cli.run import follow
    from agentops.runtime import Runtime
    from agentops.settings import load_settings

    retriever = _retriever()
    settings = load_settings({"model.name": model, "retrieval.retriever": retriever})
    started = time.monotonic()
    _head("1. The model and the embedder")
    for name in (settings.model.name, settings.retrieval.embedder):
        prepare(name)
    _head("2. The documents")
    ingest([str(docs_folder())], collection=COLLECTION, retriever=retriever)
    runs = []
    with stages(settings.model.name) as progress, Runtime(settings, progress=progress) as runtime:
        for number, question in enumerate(QUESTIONS, 3):
            _head(f"{number}. {question}")
            runs.append(follow(runtime.stream("rag", question, collection=COLLECTION)))
    _head(f"{len(QUESTIONS) + 3}. How the first answer came about")
    sys.stderr.flush()
    show(runs[0].run_id)
    _head(f"{len(QUESTIONS) + 4}. The same run again, with no model")
    sys.stderr.flush()
    replay(runs[0].run_id)
    _head(f"{len(QUESTIONS) + 5}. The three answers, scored")
    sys.stderr.flush()
    evaluate([run.run_id for run in runs], metrics=list(METRICS), quiet=True)
    _head("Where to go next")
    where = " --retriever elasticsearch" if retriever == "elasticsearch" else ""
    print(
        f"""  source .venv/bin/activate                            (in a checkout)
  agentops run rag "your question" -c {COLLECTION}{where}    ask something else
  agentops run assistant "What is 17 * 23?"            use tools; agentops graphs lists the others
  agentops ingest PATH -c mine                         read documents of your own
  agentops runs; agentops show last --messages         what is on record
  agentops tui                                         the screens: runs, traces, experiments
  agentops replay last                                 a run again, with no model
  agentops eval last                                   a run scored
  agentops doctor                                      what this machine has"""
    )
    print(f"\n{time.monotonic() - started:.0f} s in all", file=sys.stderr)


def _retriever() -> str:
    """What the settings say; where they say nothing, a server that answers at the configured address, else the embedded index."""
    from dataclasses import replace

    from agentops.errors import RetrievalError, UsageError
    from agentops.parts import open_index
    from agentops.settings import load_settings

    settings = load_settings({"retrieval.retriever": None})
    if settings.source("retrieval.retriever") != "default":
        return settings.retrieval.retriever
    wanted = load_settings({"retrieval.retriever": "elasticsearch"})
    url = wanted.elasticsearch.url
    try:
        index = open_index(replace(wanted, elasticsearch=replace(wanted.elasticsearch, timeout_s=_PROBE_S)))
        try:
            index.collections()
        finally:
            index.close()
    except (RetrievalError, UsageError):
        print(f"documents: in the embedded index; no Elasticsearch answers at {url}", file=sys.stderr)
        return "embedded"
    print(f"documents: on the Elasticsearch server at {url}", file=sys.stderr)
    return "elasticsearch"


def docs_folder() -> Path:
    """The documentation: packaged in an installed wheel, beside the packages in a checkout.

    Raises:
        UsageError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "docs", package.parent / "docs"):
        if folder.is_dir():
            return folder
    raise UsageError("the documentation is not installed", hint="install the package again from its wheel or a full checkout")


def _head(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stderr.isatty() else f"\n{text}", file=sys.stderr, flush=True)
