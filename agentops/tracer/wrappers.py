"""Wrappers that record what an engine, a retriever and an embedder are asked and answer, wherever in a graph they are called.

They add nothing else: outside a run the call passes through, and an error of the wrapped object reaches the caller as it is.
One that belongs to a `run` records there what is called where no run is found, in threads that a node has started by itself.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

from agentops.records import Delta, Footprint, Generation, ModelInfo, Query, Request, Retrieval, ScoreRequest, Scores, SpanStatus
from agentops.tracer.trace import RunTrace, Span, locate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from agentops.engine import Engine
    from agentops.retrieval import Embedder, Retriever


class TracedEngine:
    """An `Engine` that records a generation span for each call of the engine it wraps."""

    def __init__(self, engine: Engine, run: RunTrace | None = None) -> None:
        self._engine = engine
        self._run = run

    def within(self, run: RunTrace) -> TracedEngine:
        return TracedEngine(self._engine, run)

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    async def stream(self, request: Request) -> AsyncIterator[Delta | Generation]:
        place = _place(self._run)
        events = self._engine.stream(_in_turn(request, place))
        try:
            if place is None:
                async for event in events:
                    yield event
                return
            run, parent, notes = place
            run.admit(parent)
            call = _open(run, parent, "generate", request, self._engine.info, notes)
            chunks: list[str] = []
            try:
                async for event in events:
                    if isinstance(event, Generation):
                        _close_generation(run, call, event, chunks)
                    elif call.row["status"] == "open":
                        chunks.append(event.text)
                        run.token(event.text, call)
                    yield event
            except BaseException as error:
                # A reader who leaves is another thing than a run that is cancelled, and a replay tells them apart.
                call.set(partial=chunks, left=isinstance(error, GeneratorExit))
                run.close(call, error=error)
                raise
            run.close(call, error="the engine ended its stream without an answer")
        finally:
            close: Callable[[], Awaitable[None]] | None = getattr(events, "aclose", None)
            if close is not None:
                await close()

    async def score(self, request: ScoreRequest) -> Scores:
        place = _place(self._run)
        if place is None:
            return await self._engine.score(request)
        run, parent, notes = place
        run.admit(parent)
        call = _open(run, parent, "score", request, self._engine.info, notes)
        try:
            scores = await self._engine.score(_in_turn(request, place))
        except BaseException as error:
            run.close(call, error=error)
            raise
        table = [{"text": choice.text, "mean": choice.mean, "total": choice.total} for choice in scores.choices]
        _keep_result(run, call, scores)
        run.close(call, output=table, usage=scores.usage, timing=scores.timing, model=scores.model)
        return scores

    async def close(self) -> None:
        await self._engine.close()


_Place = tuple[RunTrace, str, dict[str, Any]]
_Asked = TypeVar("_Asked", Request, ScoreRequest)


def _in_turn(request: _Asked, place: _Place | None) -> _Asked:
    """The request as one of its run's thread, where it does not say another."""
    return request if place is None or request.thread else replace(request, thread=place[0].thread_id)


_SHAPING = ("min_p", "repetition_penalty", "presence_penalty", "logit_bias", "stop_tokens", "top_logprobs", "n")
PARAMETERS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", *_SHAPING)
_PLAIN = Request()


def asked(request: Request | ScoreRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is recorded of a request: what the model is given, and the parameters that are not at "none"."""
    given: dict[str, Any] = {"text": request.text} if request.text is not None else {"messages": list(request.messages)}
    if isinstance(request, ScoreRequest):
        return {**given, "choices": list(request.choices)}, {}
    if request.constraint is not None:
        given["constraint"] = asdict(request.constraint)
    plain = {name: getattr(_PLAIN, name) for name in _SHAPING}
    named = {name: getattr(request, name) for name in PARAMETERS}
    return given, {name: value for name, value in named.items() if value not in (None, ()) and value != plain.get(name)}


def _place(run: RunTrace | None) -> _Place | None:
    if run is not None:
        return run.place()
    return None if (found := locate()) is None else (found[0], found[1], {})


def _open(run: RunTrace, parent: str, name: str, request: Request | ScoreRequest, info: ModelInfo, notes: dict[str, Any]) -> Span:
    given, parameters = asked(request)
    attributes = {**notes, "revision": info.revision, "device": info.device, "quantization": info.quantization, **parameters}
    return run.open("generation", name, parent=parent, input=given, attributes=attributes, model=info.name)


def _keep_result(run: RunTrace, call: Span, result: Generation | Scores) -> None:
    """Everything that the engine said, tokens and their probabilities among it: what a replay answers with."""
    held = {name: value for name in Footprint.__slots__ if (value := getattr(result.footprint, name))}
    call.set(device=result.device, result=run.keep(result, of=call), **held)


def _close_generation(run: RunTrace, call: Span, answer: Generation, chunks: Sequence[str]) -> None:
    call.set(finish_reason=answer.finish_reason, chunks=len(chunks))
    if "".join(chunks) == answer.text:
        call.set(pieces=[len(chunk) for chunk in chunks])
    _keep_result(run, call, answer)
    status: SpanStatus = "cancelled" if answer.finish_reason == "cancelled" else "ok"
    run.close(call, status=status, output=answer.text, usage=answer.usage, timing=answer.timing, model=answer.model)


class TracedRetriever:
    """A `Retriever` that records a retrieval span, with every hit, for each search of the one it wraps."""

    def __init__(self, retriever: Retriever, run: RunTrace | None = None) -> None:
        self._retriever = retriever
        self._run = run

    def within(self, run: RunTrace) -> TracedRetriever:
        return TracedRetriever(self._retriever, run)

    async def search(self, query: Query) -> Retrieval:
        place = _place(self._run)
        if place is None:
            return await self._retriever.search(query)
        run, parent, notes = place
        attributes = {**notes, "collection": query.collection, "k": query.k, "mode": query.mode}
        call = run.open("retrieval", "search", parent=parent, input=query.text, attributes=attributes)
        try:
            found = await self._retriever.search(query)
        except (asyncio.CancelledError, Exception) as error:
            run.close(call, error=error)
            raise
        call.set(hits=len(found.hits), generation=found.generation, embed_ms=found.embed_ms, search_ms=found.search_ms)
        run.close(call, output=[_hit(hit) for hit in found.hits], error=found.error or None)
        return found


class TracedEmbedder:
    """An `Embedder` that records an embedding span for each call of the one it wraps. Each vector is kept once."""

    def __init__(self, embedder: Embedder, run: RunTrace | None = None) -> None:
        self._embedder = embedder
        self._run = run

    def within(self, run: RunTrace) -> TracedEmbedder:
        return TracedEmbedder(self._embedder, run)

    @property
    def name(self) -> str:
        return self._embedder.name

    @property
    def revision(self) -> str:
        return self._embedder.revision

    @property
    def dimensions(self) -> int:
        return self._embedder.dimensions

    def count_tokens(self, text: str) -> int:
        return self._embedder.count_tokens(text)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        place = _place(self._run)
        if place is None:
            return self._embedder.embed(texts)
        run, parent, notes = place
        attributes = {**notes, "embedder": self.name, "texts": len(texts)}
        call = run.open("embedding", "embed", parent=parent, input=list(texts), attributes=attributes)
        try:
            vectors = self._embedder.embed(texts)
        except BaseException as error:
            run.close(call, error=error)
            raise
        call.set(dimensions=int(vectors.shape[1]))
        run.close(call, output=[run.keep(base64.b64encode(vector.tobytes()).decode(), redact=False) for vector in vectors])
        return vectors


def _hit(hit: Any) -> dict[str, Any]:
    document = hit.document
    shown: dict[str, Any] = {"id": document.id, "source": document.metadata.get("source"), "score": hit.score}
    for leg in ("vector", "lexical"):
        if (placed := getattr(hit, leg)) is not None:
            shown[leg] = {"rank": placed.rank, "score": placed.score}
    return {**shown, "hash": document.hash, "metadata": dict(document.metadata), "text": document.text}
