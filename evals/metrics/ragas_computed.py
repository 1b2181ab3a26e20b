"""Answers to the questions of ragas' metrics, computed instead of asked for.

Claims are sentences and clauses; whether a text carries one is measured by `evals.support`; what belongs to a topic, by how near
it is to it. Each function answers one of ragas' questions, found by the type of its input, with the fields of ragas'
answer. What a text deserves under a rubric cannot be computed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from agentops.engine import Engine
from agentops.retrieval import Embedder
from evals import verdicts
from evals.judge import Judge, JudgeFailed
from evals.metrics import Unscored
from evals.samples import Sample
from evals.support import supports

USEFUL = -0.3
"""A context is useful when the log-odds of its best carried claim and its cosine with the question are this much together. So
a question's own text is told from another's with balanced accuracy .97 (HaluEval); from -0.75 to 1 the bound hardly matters."""


async def computed(judge: Judge, sample: Sample, given: Any) -> Any:
    """
    Raises:
        JudgeFailed: there is no way to compute that.
        Unscored: what the verdict would be about claims nothing.
        EngineError
    """
    answer = _ANSWERS.get(type(given).__name__)
    if answer is None:
        raise JudgeFailed("it must be one that can be asked; name a server in judge.url and its model in judge.model")
    return await answer(judge, sample, given)


async def _statements(judge: Judge, sample: Sample, given: Any) -> Any:
    return {"statements": verdicts.claims(given.answer)}


async def _claims(judge: Judge, sample: Sample, given: Any) -> Any:
    found = verdicts.claims(given.response)
    if not found and not any(verdicts.claims(text) for text in (sample.answer, sample.reference.answer or "")):
        # Neither answer nor reference says anything: a refusal where one was expected is not wrong.
        raise Unscored("no claims")
    return {"claims": found}


async def _carried(judge: Judge, sample: Sample, given: Any) -> Any:
    found = await supports(_engine(judge), given.statements, given.context, sample.question)
    return {"statements": [{"statement": one.claim, "reason": one.why, "verdict": int(one.log_odds > 0)} for one in found]}


async def _recalled(judge: Judge, sample: Sample, given: Any) -> Any:
    parts = verdicts.claims(given.answer)
    found = await supports(_engine(judge), parts, given.context, given.question)
    return {
        "classifications": [{"statement": one.claim, "reason": one.why, "attributed": int(one.log_odds > 0)} for one in found]
    }


async def _useful(judge: Judge, sample: Sample, given: Any) -> Any:
    """A context was useful when it is about the question and carries something that the answer says."""
    parts = verdicts.claims(given.answer)
    if not parts:
        raise Unscored("no claims")
    found = await supports(_engine(judge), parts, given.context, given.question)
    best = max(found, key=lambda one: one.log_odds)
    ((near,),) = await verdicts.similarity(_embedder(judge), [given.question], [given.context])
    useful = best.log_odds + near >= USEFUL
    return {"reason": f"{best.why}, cosine {near:.2f}", "verdict": int(useful)}


async def _asked_back(judge: Judge, sample: Sample, given: Any) -> Any:
    """The question that an answer is to: the answer itself, which lies near it where it is one."""
    return {"question": given.response, "noncommittal": int(verdicts.is_evasive(given.response))}


async def _topics(judge: Judge, sample: Sample, given: Any) -> Any:
    return {"topics": [asked for asked, _ in _turns(sample)]}


async def _refused(judge: Judge, sample: Sample, given: Any) -> Any:
    replies = [reply for asked, reply in _turns(sample) if asked == given.topic]
    return {"refused_to_answer": all(not reply.strip() or verdicts.is_evasive(reply) for reply in replies)}


async def _classified(judge: Judge, sample: Sample, given: Any) -> Any:
    return {"classifications": await verdicts.on_topic(_embedder(judge), given.topics, given.reference_topics)}


async def _outcome(judge: Judge, sample: Sample, given: Any) -> Any:
    """Where it ended is all that was said and found on the way, but for refusals."""
    said = [message.content for message in sample.messages if message.role in ("assistant", "tool")] or [sample.answer]
    kept = [text for text in said if text.strip() and not verdicts.is_evasive(text)]
    return {"user_goal": _turns(sample)[0][0], "end_state": "\n".join(kept) or said[-1]}


async def _reached(judge: Judge, sample: Sample, given: Any) -> Any:
    """What was wanted was reached when the end says all of it."""
    parts = verdicts.claims(given.desired_outcome) or [given.desired_outcome]
    found = await supports(_engine(judge), parts, given.arrived_outcome)
    reached = all(one.log_odds > 0 for one in found) and not verdicts.is_evasive(given.arrived_outcome)
    return {"reason": "; ".join(one.why for one in found), "verdict": "1" if reached else "0"}


_ANSWERS: dict[str, Callable[[Judge, Sample, Any], Awaitable[Any]]] = {
    "StatementGeneratorInput": _statements,
    "ClaimDecompositionInput": _claims,
    "NLIStatementInput": _carried,
    "ContextRecallInput": _recalled,
    "ContextPrecisionInput": _useful,
    "AnswerRelevanceInput": _asked_back,
    "TopicExtractionInput": _topics,
    "TopicRefusedInput": _refused,
    "TopicClassificationInput": _classified,
    "WorkflowInput": _outcome,
    "CompareOutcomeInput": _reached,
}


def _turns(sample: Sample) -> list[tuple[str, str]]:
    """What was asked, with all that was replied to it."""
    return list(_paired(sample)) or [(sample.question, sample.answer)]


def _paired(sample: Sample) -> Iterator[tuple[str, str]]:
    asked, replies = "", list[str]()
    for message in sample.messages:
        if message.role == "user":
            if asked:
                yield asked, " ".join(replies)
            asked, replies = message.content, []
        elif message.role == "assistant":
            replies.append(message.content)
    if asked:
        yield asked, " ".join(replies)


def _engine(judge: Judge) -> Engine:
    if judge.engine is None:
        raise JudgeFailed("there is no engine to compute verdicts with")
    return judge.engine


def _embedder(judge: Judge) -> Embedder:
    if judge.embedder is None:
        raise JudgeFailed("there is no embedder to compute verdicts with")
    return judge.embedder
