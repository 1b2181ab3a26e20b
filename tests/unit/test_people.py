"""What fits as an answer to an interrupt, and what does not."""

from __future__ import annotations

from typing import Any

import pytest
from langgraph.types import Interrupt as Raised

from agentops.errors import AnswerUnfit
from agentops.people import fitting, read
from agentops.records import Decision, Interrupt

TEXT = Interrupt("i1", "approval", "send it?", "send", "Dear Ada")
CALL = Interrupt(
    "i2",
    "approval",
    "run the tool note?",
    "act",
    {"text": "a"},
    {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"], "additionalProperties": False},
)
NUMBER = Interrupt("i3", "question", "how many?", "ask", None, {"type": "integer", "minimum": 1})
FREE = Interrupt("i4", "question", "your name?", "ask")
PAUSE = Interrupt("i5", "pause", "stopped before send", "send")


@pytest.mark.parametrize(
    ("asked", "answer", "taken"),
    [
        (TEXT, Decision("approve"), {"kind": "approve", "content": None, "reason": ""}),
        (TEXT, True, {"kind": "approve", "content": None, "reason": ""}),
        (TEXT, False, {"kind": "reject", "content": None, "reason": ""}),
        (TEXT, {"kind": "reject", "reason": "rude"}, {"kind": "reject", "content": None, "reason": "rude"}),
        (TEXT, Decision("edit", "Hi"), {"kind": "edit", "content": "Hi", "reason": ""}),
        (TEXT, Decision("edit", '{"is": "text"}'), {"kind": "edit", "content": '{"is": "text"}', "reason": ""}),
        (CALL, Decision("edit", {"text": "b"}), {"kind": "edit", "content": {"text": "b"}, "reason": ""}),
        (CALL, Decision("edit", '{"text": "b"}'), {"kind": "edit", "content": {"text": "b"}, "reason": ""}),
        (CALL, '{"kind": "approve"}', {"kind": "approve", "content": None, "reason": ""}),
        (NUMBER, 3, 3),
        (NUMBER, "3", 3),
        (FREE, "Ada", "Ada"),
        (FREE, "3", "3"),
        (FREE, {"any": ["thing"]}, {"any": ["thing"]}),
        (FREE, Decision("approve"), True),
        (FREE, Decision("reject"), False),
        (FREE, Decision("edit", "mine"), "mine"),
        (PAUSE, None, None),
        (PAUSE, Decision("approve"), None),
    ],
)
def test_an_answer_that_fits_is_taken(asked: Interrupt, answer: Any, taken: Any) -> None:
    fitted = fitting(asked, answer)
    if asked.kind == "approval":
        assert fitted.pop("of").startswith("b2:")
    assert fitted == taken


@pytest.mark.parametrize(
    ("asked", "answer", "said"),
    [
        (TEXT, "yes please", "no decision"),
        (TEXT, {"kind": "maybe"}, "'maybe' is not one of"),
        (TEXT, {"kind": "approve", "extra": 1}, "extra"),
        (TEXT, Decision("edit", {"a": 1}), "another kind"),
        (TEXT, Decision("edit", ""), "empty"),
        (TEXT, Decision("edit"), "another kind"),
        (TEXT, None, "no decision"),
        (CALL, Decision("edit", "not json"), "does not fit"),
        (CALL, Decision("edit", {"text": 1}), "text: 1 is not of type 'string'"),
        (CALL, Decision("edit", {"text": "a", "to": "b"}), "'to' was unexpected"),
        (NUMBER, 0, "less than the minimum"),
        (NUMBER, "many", "not of type 'integer'"),
        (FREE, None, "no answer"),
        (PAUSE, "text", "nothing is asked"),
        (PAUSE, Decision("reject"), "nothing is asked"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(asked: Interrupt, answer: Any, said: str) -> None:
    with pytest.raises(AnswerUnfit, match=said) as refused:
        fitting(asked, answer)
    assert asked.id in str(refused.value)
    assert refused.value.hint


def test_a_schema_that_is_broken_or_points_elsewhere_is_said_and_nothing_is_fetched() -> None:
    for schema in ({"type": "nonsense"}, {"$ref": "http://127.0.0.1:9/schema.json"}):
        with pytest.raises(AnswerUnfit, match="the schema itself is broken"):
            fitting(Interrupt("i", "question", "?", "n", None, schema), 1)


@pytest.mark.parametrize(
    ("value", "question", "content"),
    [
        ("your name?", "your name?", None),
        ({"question": "ok?", "draft": "d"}, "ok?", {"question": "ok?", "draft": "d"}),
        (["a", "b"], "ask asks", ["a", "b"]),
        ({"kind": "approval"}, "ask asks", {"kind": "approval"}),
    ],
)
def test_what_other_peoples_graphs_ask_is_a_question(value: Any, question: str, content: Any) -> None:
    found = read(Raised(value, "i"), "ask")
    assert (found.kind, found.question, found.content) == ("question", question, content)
