"""Redaction: what is taken out of every text before it is recorded, by `record.redact`. It knows texts, not events.

A rule is the name of a built-in kind, a regular expression, `module:callable`, or `presidio`. What it finds is replaced by a
mark: `[email]`, `[phone]`, ... A rule that fails lets nothing through: the text as a whole becomes `[redaction failed]`, and that
is counted. Built-in patterns have bounded repeats only and take time in proportion to the text; for a user's own the time is
limited.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import ipaddress
import logging
import re
import threading
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from agentops.errors import SettingsError
from agentops.settings import Settings
from agentops.tracer.journal import home_id

log = logging.getLogger("agentops.tracer")

Rule = Callable[[str], tuple[str, int]]
"""Gives the text with marks, and how many it has made."""

FAILED = "[redaction failed]"
LONGEST = 4_000
"""No built-in kind finds anything longer: so much beside a cut has to be looked at too."""
_REMEMBERED_CHARACTERS = 4_000
_PROBE_S = 0.25
_PATIENCE_S = 0.5
_PATIENCE_S_PER_CHARACTER = 1e-6
_TRIES = 3


class Redactor:
    """The rules of a process, in their order. Safe to use from many threads."""

    def __init__(self, rules: Sequence[Rule], *, secrets: bool = False, salt: bytes = b"") -> None:
        self.secrets = secrets
        """Whether what is kept under a name like `password` is one, whatever it looks like."""
        self._rules = rules
        self._salt = salt
        # Every step records much of what the one before did.
        self._remembered = functools.lru_cache(maxsize=4_096)(self._redacted)

    def redacted(self, text: str) -> tuple[str, int]:
        """The text with marks, and how many were made. What a rule raises is raised."""
        return self._remembered(text) if len(text) <= _REMEMBERED_CHARACTERS else self._redacted(text)

    def _redacted(self, text: str) -> tuple[str, int]:
        marks = 0
        for rule in self._rules:
            text, found = rule(text)
            marks += found
        return text, marks

    def pseudonym(self, name: str, sweep: Sweep) -> str:
        """A user's name; one that is redacted with a hash that only this home makes, so that a user's runs stay together."""
        if (redacted := sweep.text(name)) == name:
            return name
        return f"{redacted} {_digest(name, self._salt)}"


class Sweep:
    """One pass over the texts of a value. Counts the marks made, and the texts that were left out because a rule failed."""

    __slots__ = ("faults", "marks", "redactor")

    def __init__(self, redactor: Redactor) -> None:
        self.redactor = redactor
        self.marks = 0
        self.faults = 0

    def text(self, text: str) -> str:
        try:
            made, marks = self.redactor.redacted(text)
        except Exception as error:
            # Not its words: the text may be among them.
            log.debug("a text was left out of the record: redacting it raised %s", type(error).__name__)
            self.faults += 1
            return FAILED
        self.marks += marks
        return made

    def number(self, number: int) -> int | str:
        """A whole number, or a mark where its digits are a card's."""
        digits = str(number)
        return number if len(digits) < 9 or (made := self.text(digits)) == digits else made

    def under(self, name: str, text: str) -> str:
        """A text that is kept under a name."""
        if self.redactor.secrets and text and _SECRET_NAME.fullmatch(name):
            self.marks += 1
            return "[key]"
        return self.text(text)


@functools.cache
def _load(names: tuple[str, ...], home: Path) -> Redactor:
    kinds = [kind for kind in _KINDS if kind in names]
    rules = [_KINDS[kind] for kind in kinds] + [_rule(name) for name in names if name not in _KINDS]
    return Redactor(rules, secrets="key" in names, salt=home_id(home).encode())


def is_pseudonym(known: str, name: str, journal: Path) -> bool:
    """Whether a user is `known` by what a name became here, by whatever rules it was redacted."""
    return (journal / "home").is_file() and known.endswith(f" {_digest(name, home_id(journal).encode())}")


def _digest(name: str, salt: bytes) -> str:
    return hashlib.blake2b(name.encode(errors="replace"), digest_size=8, key=salt).hexdigest()


def load_redactor(settings: Settings) -> Redactor | None:
    """The rules of `record.redact`; None where there are none. The journal's folder must be there.

    Raises:
        SettingsError: a rule is none, cannot be loaded, or takes too long.
    """
    if not settings.record.redact:
        return None
    try:
        return _load(settings.record.redact, settings.paths.home / "journal")
    except SettingsError as error:
        raise SettingsError(f"{settings.source('record.redact')}: record.redact: {error}", hint=error.hint) from error


# -- kinds


def _kind(mark: str, pattern: str, likely: str = "", proven: Callable[[str], int] = len) -> Rule:
    """A built-in kind. `likely` is a class of characters of which a text needs one; `proven` says how much of what was found is
    meant, 0 for nothing."""
    found, hint = re.compile(pattern), re.compile(f"[{likely}]") if likely else None
    made = f"[{mark}]"

    def rule(text: str) -> tuple[str, int]:
        if hint is not None and hint.search(text) is None:
            return text, 0
        parts, at, look, marks = list[str](), 0, 0, 0
        while (match := found.search(text, look)) is not None:
            if length := proven(match[0]):
                parts += [text[at : match.start()], made]
                at = look = match.start() + length
                marks += 1
            else:
                # What is meant may begin behind something that looks like it.
                look = match.start() + 1
        return "".join(parts) + text[at:], marks

    return rule


def _card(text: str) -> int:
    """By Luhn's sum. Other digits may come after it."""
    ends = [place for place in range(len(text), 12, -1) if text[place - 1].isdigit() and not text[place : place + 1].isdigit()]
    for end in ends:
        digits = [int(one) for one in text[:end] if one.isdigit()]
        doubled = sum(sum(divmod(2 * one, 10)) for one in digits[-2::-2])
        if len(digits) >= 13 and (sum(digits[-1::-2]) + doubled) % 10 == 0:
            return end
    return 0


def _iban(text: str) -> int:
    """Words may come after it that look like more of it."""
    for length in range(len(text), 14, -1):
        plain = text[:length].replace(" ", "")
        if (
            text[length - 1] != " "
            and len(plain) >= 15
            and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1
        ):
            return length
    return 0


def _address(text: str) -> int:
    for length in (len(text), len(text) - 1):
        try:
            ipaddress.ip_address(text[:length])
        except ValueError:
            continue
        return length if any(one.isdigit() for one in text) else 0
    return 0


_KEY = "|".join(
    (
        r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[^-]{0,3900}(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?",
        r"(?<![A-Za-z0-9])(?:sk|pk|rk)[-_](?:[A-Za-z0-9]{1,10}[-_]){0,3}[A-Za-z0-9_-]{16,300}",
        r"(?<![A-Za-z0-9])(?:gh[opusr]_|github_pat_|glpat-|hf_|npm_|pypi-|dop_v1_|shpat_)[A-Za-z0-9_-]{20,300}",
        r"(?<![A-Za-z0-9])xox[a-z]-[A-Za-z0-9-]{10,300}",
        r"(?<![A-Za-z0-9])(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])",
        r"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}",
        r"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{8,1000}\.[A-Za-z0-9_-]{8,2000}\.[A-Za-z0-9_-]{0,900}",
        r"(?<=[Bb]earer )[A-Za-z0-9._~+/-]{16,3900}={0,2}",
        r"(?i:(?<=password=)|(?<=api_key=)|(?<=apikey=)|(?<=secret=)|(?<=token=))[^\s&\"',;]{6,300}",
    )
)
_SECRET_NAME = re.compile(
    r"(?i)(?:.{1,60}[_-])?(?:password|passwd|passphrase|secret|api[_-]?key|(?:access|refresh|auth)[_-]?token|authorization"
    r"|private[_-]?key)"
)
_CARD_GROUPS = r"(?:[2-6]\d{3}(?:[ -]\d{4}){3}(?:[ -]\d{3})?|3\d{3}[ -]\d{6}[ -]\d{4,5}|[2-6]\d{12,18})"
_CARD = rf"(?<![\w.])(?<!\d-){_CARD_GROUPS}(?!-?\d)(?![A-Za-z_])"
_DIGITS = r"(?<![\d+])\+[1-9](?:[\s().\-/]{0,2}\d){6,14}(?!-?\d)(?![A-Za-z_])"
_PHONE = "|".join(
    (
        _DIGITS,
        r"(?<![\w+-])00[1-9](?:[\s().\-/]{0,2}\d){6,14}(?!-?\w)",
        r"(?<![\w.+-])\(?0[1-9]\d{1,4}\)?[\s/-]{1,2}\d{3,8}(?:[\s-]\d{2,8}){0,3}(?!-?\w)",
        r"(?<![\w.+-])0[1-9](?:[\s.-]\d{2}){4}(?!-?\w)",
        r"(?<![\w.+-])0[1-9]\d{8,13}(?!-?\w)",
        r"(?<![\w.+-])(?:1[\s.-])?(?:\(\d{3}\)\s?|\d{3}[\s.-])\d{3}[\s.-]\d{4}(?!-?\w)",
    )
)
# In an order in which none takes a part of what the next looks for: a key may hold digits like a card's, a card those of a phone.
_KINDS: dict[str, Rule] = {
    "key": _kind("key", _KEY),
    "email": _kind("email", r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}(?:@|%40)(?:[\w-]{1,63}\.){1,10}[\w-]{2,63}", "@%"),
    "iban": _kind(
        "iban", r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])", "0-9", _iban
    ),
    "card": _kind("card", _CARD, "0-9", _card),
    "ip": _kind(
        "ip",
        r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\.?\w)"
        r"|(?<![\w:])(?=[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{3,39}(?:(?<=:)\d{1,3}(?:\.\d{1,3}){3})?(?!\w)",
        ".:",
        _address,
    ),
    "phone": _kind("phone", _PHONE, "0-9"),
}


# -- rules of users


def _rule(name: str) -> Rule:
    if name == "presidio":
        return _presidio()
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return _called(name)
    if re.fullmatch(r"[A-Za-z_]+", name):
        near = get_close_matches(name, [*_KINDS, "presidio"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(_KINDS)}, presidio, module:callable, or a pattern"
        raise SettingsError(f"'{name}' is no kind of text; the word itself is the pattern ({name})", hint=hint)
    return _pattern(name)


# What makes patterns with nested repeats try every way to divide a text, where they match all but its end.
_PROBES = tuple(one * 3_000 + "\0" for one in ("a", "A", "0", " ", "-", ".", "a ", "0 ", "a.", "0-", "a1", "x@"))


def _pattern(text: str) -> Rule:
    """A regular expression. Its mark is the name of the group that matched, else `redacted`."""
    # Python's own cannot be stopped.
    import regex  # type: ignore[import-untyped]

    try:
        found = regex.compile(text)
    except regex.error as error:
        raise SettingsError(f"{text!r} is no regular expression: {error}", hint="see the syntax of Python's re module") from error
    try:
        for probe in _PROBES:
            found.sub("", probe, timeout=_PROBE_S)
    except TimeoutError:
        raise SettingsError(
            f"the pattern {text!r} takes far too long on some texts", hint="avoid repeats within repeats, as in (a+)+"
        ) from None
    if found.search("") is not None:
        raise SettingsError(f"the pattern {text!r} matches nothing at all, everywhere", hint="let it match one character or more")
    slow, lock = 0, threading.Lock()

    def rule(value: str) -> tuple[str, int]:
        nonlocal slow
        if slow >= _TRIES:
            raise TimeoutError
        try:
            made, marks = found.subn(
                lambda match: f"[{match.lastgroup or 'redacted'}]",
                value,
                timeout=_PATIENCE_S + _PATIENCE_S_PER_CHARACTER * len(value),
            )
        except TimeoutError:
            with lock:
                slow += 1
            if slow == _TRIES:
                log.warning("the pattern %r takes too long; every text that it should look at is left out from now on", text)
            raise
        return str(made), int(marks)

    return rule


def _called(name: str) -> Rule:
    """A callable that is given a text and gives one. That it has changed something counts as one mark."""
    module, _, attribute = name.partition(":")
    try:
        redact: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"'{name}' cannot be imported: {error}", hint="install the module, or put its folder into PYTHONPATH"
        ) from error
    if not callable(redact):
        raise SettingsError(f"'{name}' cannot be called", hint="name a function that takes a text and returns one")

    def rule(text: str) -> tuple[str, int]:
        made = redact(text)
        if not isinstance(made, str):
            raise TypeError(f"{name} returned a {type(made).__name__}")
        return made, int(made != text)

    return rule


def _presidio() -> Rule:
    """Presidio's analyzer for English with its own defaults; loading it takes seconds."""
    try:
        analyzer = importlib.import_module("presidio_analyzer").AnalyzerEngine()
    except ImportError as error:
        raise SettingsError(
            "presidio is not installed", hint="pip install presidio-analyzer, and the model of spaCy that it asks for"
        ) from error

    def rule(text: str) -> tuple[str, int]:
        found = sorted(analyzer.analyze(text=text, language="en"), key=lambda one: (one.start, -one.end))
        parts, at, marks = list[str](), 0, 0
        for one in found:
            if one.end <= at:
                continue
            # Of two that overlap the later one has no mark of its own.
            if one.start >= at:
                parts += [text[at : one.start], f"[{one.entity_type.lower()}]"]
                marks += 1
            at = one.end
        return "".join(parts) + text[at:], marks

    return rule
