"""Sampling, grammars and text that appears piece by piece."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_model import write_tiny_model

from agentops.engine.checkpoint import open_checkpoint
from agentops.engine.sampler import Sampler, log_probabilities
from agentops.engine.template import ChatTemplate
from agentops.engine.tokenizer import ChatTokenizer
from agentops.errors import ConstraintInvalid, ModelBroken
from agentops.records import Constraint, Message, Request


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(open_checkpoint(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")))


def sampler(*, seed: int = 0, prompt: Sequence[int] = (), **asked: Any) -> Sampler:
    return Sampler(Request(**asked), prompt=prompt, generator=np.random.default_rng(seed))


LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def shares(drawn: Sampler, draws: int = 4000) -> list[float]:
    counts = np.bincount([drawn.choose(LOGITS).token for _ in range(draws)], minlength=4)
    return [float(count) / draws for count in counts]


def test_greedy_takes_the_likeliest_and_tells_its_logarithm() -> None:
    chosen = sampler().choose(LOGITS)
    assert (chosen.token, chosen.over, chosen.top) == (0, False, ())
    assert chosen.logprob == pytest.approx(np.log(0.5), abs=1e-6)


def test_the_likeliest_tokens_are_told_with_the_models_own_logarithms() -> None:
    chosen = sampler(temperature=2.0, top_logprobs=3, logit_bias={3: 50.0}).choose(LOGITS)
    assert chosen.token == 3
    assert chosen.logprob == pytest.approx(np.log(0.05), abs=1e-6)
    assert [token for token, _ in chosen.top] == [0, 1, 2]
    assert [logprob for _, logprob in chosen.top] == pytest.approx(np.log([0.5, 0.3, 0.15]), abs=1e-6)
    assert [token for token, _ in sampler(top_logprobs=9).choose(np.zeros(4, np.float32)).top] == [0, 1, 2, 3]


def test_penalties_are_for_what_was_said_and_repetition_for_what_was_read_too() -> None:
    logits = np.array([4.0, 3.0, -1.0, -1.5], np.float32)
    repeated = sampler(repetition_penalty=2.0, prompt=[0])
    assert [repeated.choose(logits).token for _ in range(2)] == [1, 0]  # 4 / 2 < 3, then 4 / 2 > 3 / 2
    assert sampler(repetition_penalty=2.0, prompt=[2]).choose(logits[2:4].repeat(2)).token == 0
    negative = np.array([-1.0, -1.5], np.float32)
    assert sampler(repetition_penalty=2.0, prompt=[0]).choose(negative).token == 1  # -1 * 2 < -1.5
    present = sampler(presence_penalty=2.0, prompt=[0])
    assert [present.choose(logits).token for _ in range(3)] == [0, 1, 0]
    assert sampler(presence_penalty=0.5).choose(logits).token == 0


def test_a_bias_is_added() -> None:
    assert sampler(logit_bias={2: 1.3}).choose(LOGITS).token == 2
    assert shares(sampler(temperature=1.0, logit_bias={0: -100.0})) == pytest.approx([0, 0.6, 0.3, 0.1], abs=0.04)


def test_min_p_cuts_what_is_much_less_likely_than_the_likeliest() -> None:
    assert shares(sampler(temperature=1.0, min_p=0.2)) == pytest.approx(np.array([0.5, 0.3, 0.15, 0]) / 0.95, abs=0.04)
    assert shares(sampler(temperature=1.0, min_p=1.0)) == [1, 0, 0, 0]
    assert shares(sampler(temperature=1.0, min_p=0.2, top_k=2, top_p=0.5)) == [1, 0, 0, 0]


def test_drawing_follows_the_shares() -> None:
    assert shares(sampler(temperature=1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    assert shares(sampler(temperature=0.5)) == pytest.approx(np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, abs=0.04)


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert shares(sampler(temperature=1.0, top_k=2)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert shares(sampler(temperature=1.0, top_p=0.75)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert shares(sampler(temperature=1.0, top_p=0.4)) == [1, 0, 0, 0]
    assert shares(sampler(temperature=1.0, top_p=0.81))[3] == 0


def test_a_seed_fixes_the_draws() -> None:
    def draw(seed: int) -> list[int]:
        drawn = sampler(temperature=1.0, seed=seed)
        return [drawn.choose(LOGITS).token for _ in range(30)]

    assert draw(5) == draw(5) != draw(6)


def test_log_probabilities_of_rows() -> None:
    found = log_probabilities(np.stack([LOGITS, LOGITS + 100]), np.array([1, 3]))
    assert found == pytest.approx(np.log([0.3, 0.05]), abs=1e-4)


def write(tokenizer: ChatTokenizer, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], str, bool]:
    writer = tokenizer.writer(tokenizer.encode("the"), stop)
    pieces = []
    for token in tokenizer.encode_more(text):
        pieces.append(writer.add(token))
        if writer.stopped:
            break
    pieces.append(writer.finish())
    assert "".join(pieces) == writer.text
    return pieces, writer.text, writer.stopped


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
@hypothesis_settings(max_examples=200, deadline=None)
def test_pieces_never_split_a_character_and_add_up(tokenizer: ChatTokenizer, text: str) -> None:
    pieces, whole, _ = write(tokenizer, text)
    assert whole == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_dropped(tokenizer: ChatTokenizer) -> None:
    writer = tokenizer.writer([], ())
    for token in tokenizer.encode_more("ok 😀")[:-1]:
        writer.add(token)
    writer.finish()
    assert writer.text.strip() == "ok"


@given(
    text=st.text("abc \n", max_size=30),
    stop=st.lists(st.text("abc \n", min_size=1, max_size=4), min_size=1, max_size=3),
)
@hypothesis_settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string(tokenizer: ChatTokenizer, text: str, stop: list[str]) -> None:
    _, whole, stopped = write(tokenizer, text, tuple(stop))
    found = [text.index(end) for end in stop if end in text]
    assert stopped == bool(found)
    if not found:
        assert whole == text
    else:
        assert text.startswith(whole)
        assert not any(end in whole for end in stop)
        assert any(text.startswith(end, len(whole)) for end in stop)


@pytest.mark.parametrize(
    ("constraint", "fits", "fails"),
    [
        (Constraint("choice", ["yes", "no", 'a "b"\nc\\']), ["yes", "no", 'a "b"\nc\\'], ["maybe", "ye", "yess"]),
        (Constraint("choice", ("ja", "ja doch")), ["ja", "ja doch"], ["doch"]),
        (Constraint("regex", "[a-c]{2}|näin"), ["ab", "näin"], ["a", "abc", "zz"]),
        (Constraint("json_schema", {"enum": ["x", 1]}), ['"x"', "1"], ["x", "2"]),
        (
            Constraint("json_schema", {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}),
            ["[]", "[true, false]"],
            ["[true,false]", "[true, true, true]", "[ ]"],
        ),
        (Constraint("lark", 'start: "(" start ")" | "x"'), ["x", "((x))"], ["(x", "()", "x)"]),
    ],
    ids=str,
)
def test_a_grammar_lets_through_what_fits_and_nothing_else(
    tokenizer: ChatTokenizer, constraint: Constraint, fits: list[str], fails: list[str]
) -> None:
    def passes(text: str) -> bool:
        grammar = tokenizer.compile(constraint)
        over = False
        for token in [*tokenizer.encode_more(text), min(tokenizer.eos)]:
            if over:
                return token in tokenizer.eos
            if not grammar.allowed(384)[token]:
                return False
            over = grammar.accept(token)
        return True

    assert [passes(text) for text in fits] == [True] * len(fits)
    assert [passes(text) for text in fails] == [False] * len(fails)


def test_a_conversation_is_cut_from_its_oldest_end(tokenizer: ChatTokenizer) -> None:
    turns = [Message("system", "yes"), Message("user", "one two three " * 20), Message("user", "the lazy dog " * 20)]
    whole = tokenizer.encode_chat(turns)
    assert tokenizer.trim_chat(turns, len(whole)) == whole
    assert tokenizer.trim_chat(turns, len(whole) - 1) == tokenizer.encode_chat([turns[0], turns[2]])
    cut = tokenizer.trim_chat(turns, 40)
    assert cut is not None
    assert 30 < len(cut) <= 40
    assert cut[:8] == tokenizer.encode_chat(turns)[:8]
    assert tokenizer.trim_chat(turns[:1], 3) is None


@pytest.mark.parametrize("text", ["😀" * 20, "東京の天気" * 8, "a😀" * 10])
def test_a_last_turn_of_many_byte_characters_is_cut_between_them(tokenizer: ChatTokenizer, text: str) -> None:
    turns = [Message("user", text)]
    whole = tokenizer.encode_chat(turns)
    for less in (1, 2, 3, 7):
        cut = tokenizer.trim_chat(turns, len(whole) - less)
        assert cut is not None
        assert len(whole) - less - 4 <= len(cut) <= len(whole) - less
        assert text.endswith(tokenizer._tokenizer.decode(cut).removeprefix("user\n").partition("\n")[0])
    assert tokenizer.cut_front("😀", 1) == ""


def test_a_trimmed_conversation_begins_with_a_user(tokenizer: ChatTokenizer) -> None:
    long = "one two three " * 10
    turns = [Message("system", "yes"), *[Message("user", "x"), Message("assistant", long), Message("tool", long)] * 3]
    turns.append(Message("user", "last"))
    whole = tokenizer.encode_chat(turns)
    assert tokenizer.trim_chat(turns, len(whole) - 1) == tokenizer.encode_chat([turns[0], *turns[4:]])
    assert tokenizer.trim_chat(turns, 60) == tokenizer.encode_chat([turns[0], turns[-1]])
    answered = [Message("user", long), Message("assistant", "yes"), Message("tool", "no")]
    assert tokenizer.trim_chat(answered, 40) == tokenizer.encode_chat(answered[1:])


def test_half_a_surrogate_pair_is_a_character_that_cannot_be_read(tokenizer: ChatTokenizer) -> None:
    broken, read = "a\ud83db\ude00 \ud83d\ude00", "a\ufffdb\ufffd 😀"
    assert tokenizer.encode(broken) == tokenizer.encode(read)
    assert tokenizer.encode_more(broken) == tokenizer.encode_more(read)
    assert tokenizer.encode_chat([Message("user", broken)]) == tokenizer.encode_chat([Message("user", read)])
    assert tokenizer.cut_front(broken, 0) in read
    assert write(tokenizer, "abc", ("\ud83d", "c"))[1] == "ab"
    for constraint in (Constraint("choice", [broken]), Constraint("regex", broken), Constraint("json_schema", {"const": broken})):
        with pytest.raises(ConstraintInvalid):
            tokenizer.compile(constraint)


@pytest.mark.parametrize("prompt", ["what 東京"[:6], "the \ufffd"])
def test_a_prompt_that_ends_inside_a_character_is_not_given_out(tokenizer: ChatTokenizer, prompt: str) -> None:
    before = tokenizer.encode(prompt)
    if "\ufffd" not in prompt:
        before = before[:-1]
    writer = tokenizer.writer(before, ())
    given = "".join(writer.add(token) for token in tokenizer.encode_more("yes no"))
    assert given.replace("\ufffd", "") == "yes no"


def test_the_end_of_a_text_keeps_the_first_token_that_the_model_wants(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    plain = ChatTokenizer(open_checkpoint(folder))
    ids = plain.encode("the lazy dog")
    assert plain.trim_text(ids, 3) == ids[-3:]
    described = json.loads((folder / "tokenizer.json").read_text())
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))
    wanting = ChatTokenizer(open_checkpoint(folder))
    ids = wanting.encode("the lazy dog")
    assert wanting.trim_text(ids, 3) == [1, *ids[-2:]]
    assert wanting.trim_text(ids, 1) == [1]


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}x{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in [1] recursive %}{{ loop([1, 2, 3]) }}{% endfor %}",
        "{% for m in messages %}{{ m.content * 999999999 }}{% endfor %}",
        "{% for m in messages %}{% for n in range(9999) %}{{ m.content * 9999 }}{% endfor %}{% endfor %}",
        "{% set n = messages | length + 9 %}{{ n ** (n ** 9) }}",
        "{{ lipsum(99999) }}",
        "{{ ([1] | slice(999999999) | list) }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(ModelBroken, match="chat template"):
        ChatTemplate(text, "tiny").render([Message("user", "hello")])
    assert time.monotonic() - started < 3


def test_a_template_may_look_at_a_long_conversation() -> None:
    text = (
        "{% for m in messages %}{% if loop.first or loop.previtem.role != m.role %}{{ m.role ~ ' ' * 2 }}{% endif %}"
        "{{ m.content | trim }}{% if loop.last %}{{ loop.length }}{% endif %}{% endfor %}"
    )
    turns = [Message("user", "u" * 3000), Message("assistant", " a ")] * 1000
    for _ in range(2):
        assert ChatTemplate(text, "tiny").render(turns) == ("user  " + "u" * 3000 + "assistant  a") * 1000 + "2000"


def test_a_token_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    described = json.loads((folder / "tokenizer.json").read_text())
    for number in range(384):
        described["added_tokens"].append({**described["added_tokens"][0], "id": 384 + number, "content": f"<|more{number}|>"})
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ModelBroken, match="the model knows 384 tokens"):
        ChatTokenizer(open_checkpoint(folder))
