from __future__ import annotations

import pytest

from agentops import Message, ScriptedEngine
from agentops.grounding import coverage, lifts, numbers_missing, rarity, relevance
from agentops.retrieval.embed import HashEmbedder


def test_coverage_counts_content_words_by_their_stems() -> None:
    assert coverage("The blocks are shared.", "A shared block.") == 1.0
    assert coverage("blocks fly", "A shared block.") == 0.5
    assert coverage("the of and", "anything") == 1.0


def test_rare_words_weigh_more() -> None:
    weight = rarity(["tea pot", "tea cup", "tea leaf"])
    assert weight("pot") > weight("tea")
    assert coverage("tea pot", "pot", weight) > 0.5 > coverage("tea pot", "tea", weight)


@pytest.mark.parametrize(
    ("claim", "source", "missing"),
    [("8,192 tokens", "8192 tokens", []), ("16 or 32", "16", ["32"]), ("6.0", "6.0 and 60", []), ("none", "5", [])],
)
def test_numbers_are_compared_as_numbers(claim: str, source: str, missing: list[str]) -> None:
    assert numbers_missing(claim, source) == missing


async def test_lift_is_the_gain_over_no_source() -> None:
    engine = ScriptedEngine([], scores=lambda request: [-1.0 if "fact" in request.messages[-1].content else -3.0])
    helped, not_helped = await lifts(
        engine, "word", (Message("user", ""),), [(Message("user", "a fact"),), (Message("user", "chatter"),)]
    )
    assert helped.mean == pytest.approx(2.0)
    assert not_helped.mean == pytest.approx(0.0)


async def test_relevance_ranks_and_keeps_the_shortlist() -> None:
    engine = ScriptedEngine([], scores=lambda request: [-1.0 if "green" in request.messages[-1].content else -4.0])
    texts = ["cups are washed", "green tea is brewed hot", "ships sail"]
    found = await relevance(
        engine, HashEmbedder(), "how is green tea brewed", texts, lambda text: (Message("user", text),), shortlist=2
    )
    assert found[0].index == 1
    assert len(found) == 2
    assert found[0].total > 2 * found[1].total
    assert await relevance(engine, HashEmbedder(), "q", [], lambda text: (Message("user", text),)) == []
