"""Two small documents, and an engine for which a question is likely after the sentence that shares most words with it."""

from __future__ import annotations

from typing import Any

from agentops import Document, Runtime, ScriptedEngine, Settings
from agentops.grounding import coverage
from agentops.records import ScoreRequest, content_hash
from agentops.retrieval import Index
from agentops.retrieval.embed import HashEmbedder

TEXTS = {
    "tea.md": ("Brewing", "Green tea is brewed at 80 degrees. Black tea is brewed at 95 degrees. Tea came to Europe by ship."),
    "cups.md": ("Cups", "A cup holds 250 millilitres. Cups are washed by hand."),
}


def likely(request: ScoreRequest) -> list[float]:
    said = request.messages[-1].content
    return [(-0.5 if coverage(choice, said) >= 0.6 else -4.0) * len(choice.split()) for choice in request.choices]


def open_runtime(settings: Settings, answers: Any = (), *, index: Index | None = None, **options: Any) -> Runtime:
    """A runtime that plays `answers` and has the documents in the collection `tea`."""
    engine = ScriptedEngine(answers, **{"scores": likely, **options})
    runtime = Runtime(settings, engine=engine, embedder=HashEmbedder(), index=index)
    documents = [
        Document(source, text, content_hash(text), {"source": source, "heading": heading})
        for source, (heading, text) in TEXTS.items()
    ]
    runtime.index.upsert("tea", documents)
    return runtime
