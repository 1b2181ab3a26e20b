"""Answers to the questions of ragas' metrics, computed (`evals.verdicts`) instead of asked for.

Claims are sentences and clauses; what a text carries, how likely it makes a claim; what belongs to a topic, how near it is to
it. Each function answers one of ragas' questions, found by the type of its input, with the fields of ragas' answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from agentops.engine import Engine
from agentops.retrieval import Embedder
from evals import verdicts
from evals.judge import Judge, JudgeFailed
from evals.samples import Sample


async def computed(judge: Judge, sample: Sample, given: Any) -> Any:
    """
    Raises:
        JudgeFailed: there is no way to compute that.
        EngineError
    """
    try:
        answer = _ANSWERS[type(given).__name__]
    except KeyError:
        raise JudgeFailed("the model is too small to be asked, and this verdict cannot be computed") from None
    return await answer(judge, sample, given)


def _engine(judge: Judge) -> Engine:
    if judge.engine is None:
        raise JudgeFailed("there is no engine to compute verdicts with")
    return judge.engine


def _embedder(judge: Judge) -> Embedder:
    if judge.embedder is None:
        raise JudgeFailed("there is no embedder to compute verdicts with")
    return judge.embedder


async def _statements(judge: Judge, sample: Sample, given: Any) -> Any:
    return {"statements": verdicts.claims(given.answer)}


async def _claims(judge: Judge, sample: Sample, given: Any) -> Any:
    return {"claims": verdicts.claims(given.response)}


async def _carried(judge: Judge, sample: Sample, given: Any) -> Any:
    found = await verdicts.supports(_engine(judge), given.statements, given.context, sample.question)
    return {"statements": [{"statement": one.claim, "reason": _why(one), "verdict": int(one.verdict)} for one in found]}


async def _recalled(judge: Judge, sample: Sample, given: Any) -> Any:
    parts = verdicts.claims(given.answer)
    found = await verdicts.supports(_engine(judge), parts, given.context, given.question)
    return {"classifications": [{"statement": one.claim, "reason": _why(one), "attributed": int(one.verdict)} for one in found]}


_ANSWERS: dict[str, Callable[[Judge, Sample, Any], Awaitable[Any]]] = {
    "StatementGeneratorInput": _statements,
    "ClaimDecompositionInput": _claims,
    "NLIStatementInput": _carried,
    "ContextRecallInput": _recalled,
}


def _why(one: verdicts.Support) -> str:
    missing = f", no {', '.join(one.missing)}" if one.missing else ""
    return f"lift {one.lift:.2f}, coverage {one.coverage:.2f}{missing}"
