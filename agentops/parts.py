"""The parts that settings name, opened: engine, embedder, index. A model that is not there yet is prepared first.

Only this module knows which back-end serves which part. It loads no LangGraph, so that verbs without a graph start fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from agentops.retrieval import Embedder, Index
from agentops.settings import Settings

if TYPE_CHECKING:
    from agentops.engine.fetch import Progress
    from agentops.engine.local import LocalEngine


def open_engine(settings: Settings, progress: Progress | None = None) -> LocalEngine:
    """
    Raises:
        ModelError
    """
    from agentops.engine.local import open_engine as open_local
    from agentops.engine.models import prepare

    folder = prepare(settings.model.name, settings, progress)
    if progress:
        progress("load", 0, 0)
    engine = open_local(folder, settings, settings.model.name)
    if progress:
        progress("load", 1, 1)
    return engine


def open_embedder(settings: Settings, progress: Progress | None = None) -> Embedder:
    """
    Raises:
        ModelError
    """
    from agentops.engine.models import prepare
    from agentops.engine.workers import cores
    from agentops.retrieval.embed import open_embedder as open_encoder

    return open_encoder(prepare(settings.retrieval.embedder, settings, progress), settings.engine.threads or cores())


def open_index(settings: Settings, embedder: Embedder | Callable[[], Embedder] | None = None) -> Index:
    """The index that `retrieval.retriever` names: below the settings' home, or on the server of `elasticsearch.url`. Its embedder
    is opened, and its server asked, when they are first needed.

    Raises:
        SettingsError: the address cannot be right, or a password would go to an address from elsewhere.
    """
    if settings.retrieval.retriever == "elasticsearch":
        from agentops.retrieval.elastic import open_index as open_elastic

        return open_elastic(settings, embedder or (lambda: open_embedder(settings)))
    from agentops.retrieval.embedded import open_index as open_embedded

    return open_embedded(settings.paths.home / "index", embedder or (lambda: open_embedder(settings)))
