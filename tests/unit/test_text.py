"""Where text is cut into sentences, and where it is not."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentops.text import split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        (" \n\n\t ", []),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Wrapped\nover  two\nlines. Next.", ["Wrapped over two lines.", "Next."]),
        ("Dr. Smith and J. Doe met Prof. Li, i.e. three people. They left.", 2),
        ("It costs 3.14 euros, e.g. in Python 3.11. It runs.", ["It costs 3.14 euros, e.g. in Python 3.11.", "It runs."]),
        ("See Fig. 3 and No. 5 (eq. (2)). Done.", ["See Fig. 3 and No. 5 (eq. (2)).", "Done."]),
        ("The answer is no. Then stop.", ["The answer is no.", "Then stop."]),
        ("Shown by Ting et al. The U.S. paid. End.", ["Shown by Ting et al. The U.S. paid.", "End."]),
        ('He said "Stop!" Then he left. (Really.) Yes.', ['He said "Stop!"', "Then he left.", "(Really.)", "Yes."]),
        ("the wing . the flow is steady .  next one .", ["the wing .", "the flow is steady .", "next one ."]),
        ("今日は。良い天気！はい", ["今日は。", "良い天気！", "はい"]),
        ("Wait ... what? Fine… Good.", ["Wait ... what?", "Fine…", "Good."]),
        ("Call file.py:attr or a.b.c now. OK.", ["Call file.py:attr or a.b.c now.", "OK."]),
    ],
)
def test_sentences(text: str, sentences: list[str] | int) -> None:
    found = split_sentences(text)
    if isinstance(sentences, int):
        assert len(found) == sentences
    else:
        assert found == sentences


def test_lists_headings_and_tables_do_not_melt_together() -> None:
    text = "# A heading\nIntroduction\n- first item\n- second item\n  goes on. And on\n1. one\n2) two\n\n"
    text += "| a | b |\n| 1 | 2 |\nTail\n====\nend"
    assert split_sentences(text) == [
        "A heading",
        "Introduction",
        "first item",
        "second item goes on.",
        "And on",
        "one",
        "two",
        "| a | b |",
        "| 1 | 2 |",
        "Tail",
        "end",
    ]


def test_a_fenced_block_stays_whole() -> None:
    text = "Run it:\n```python\nprint(1). Then\nprint(2)\n```\nDone."
    assert split_sentences(text) == ["Run it:", "print(1). Then\nprint(2)", "Done."]
    assert split_sentences("```\nnever closed. Really.") == ["never closed.", "Really."]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab AB.!?\n-#|1`e,g\"')。é"), max_size=80))
def test_no_word_is_lost_and_order_is_kept(text: str) -> None:
    def letters(part: str) -> str:
        return re.sub(r"[^a-zA-Zé]", "", part)

    unfenced = re.sub(r"(?m)^\s*```.*$", "", text)
    unmarked = re.sub(r"(?m)^\s*\(?[a-z][.)]\s+(?=\S)", "", unfenced)
    found = letters("".join(split_sentences(text)))
    assert found in (letters(unfenced), letters(unmarked))


def test_megabytes_take_no_time_worth_mentioning() -> None:
    begun = time.process_time()
    assert len(split_sentences("This is one of very many sentences, e.g. a short one. " * 20_000)) == 20_000
    split_sentences("." * 1_000_000)
    split_sentences(" " * 500_000 + "x")
    assert time.process_time() - begun < 10
