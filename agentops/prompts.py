"""Prompts: Markdown files, rendered into messages and named by the hash of their template.

A prompt file is `NAME.md`. Text before the first `## system`, `## user` or `## assistant` heading is for its readers and
is not sent. `{name}` stands for a value; names are plain words, so that nothing in a template can reach into a value
(CVE-2025-65106). `{{` and `}}` are literal braces. This module does not know which model reads the messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from agentops.errors import PromptError
from agentops.records import Message, PromptVersion, Role, content_hash

_TURN = re.compile(r"^##[ \t]+(system|user|assistant)[ \t]*$", re.MULTILINE)
_HOLE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Prompt:
    """A template with its name. Two files of the same content have the same `version`."""

    name: str
    template: str

    @cached_property
    def version(self) -> PromptVersion:
        return PromptVersion(self.name, content_hash(self.template), self.template)

    @cached_property
    def turns(self) -> tuple[tuple[Role, str], ...]:
        """
        Raises:
            PromptError: no turn, or a hole that is not a plain name.
        """
        heads = list(_TURN.finditer(self.template))
        if not heads:
            raise PromptError(
                f"prompt '{self.name}' has no '## system', '## user' or '## assistant' heading",
                hint="put the text that is to be sent under such a heading",
            )
        ends = [head.start() for head in heads[1:]] + [len(self.template)]
        turns = tuple(
            (cast(Role, head[1]), self.template[head.end() : end].strip()) for head, end in zip(heads, ends, strict=True)
        )
        for _, text in turns:
            for hole in _HOLE.finditer(text):
                if hole[1] is not None and not _NAME.fullmatch(hole[1]):
                    raise PromptError(
                        f"prompt '{self.name}': '{hole[0]}' is not a plain name", hint="write {{ and }} for literal braces"
                    )
        return turns

    @property
    def variables(self) -> frozenset[str]:
        return frozenset(hole[1] for _, text in self.turns for hole in _HOLE.finditer(text) if hole[1])

    def render(self, **values: object) -> tuple[Message, ...]:
        """The messages to send. Values are put in as text and never read as templates.

        Raises:
            PromptError: values and variables differ.
        """
        missing, surplus = sorted(self.variables - values.keys()), sorted(values.keys() - self.variables)
        if missing or surplus:
            wrong = [f"no value for {', '.join(missing)}"] * bool(missing) + [f"no place for {', '.join(surplus)}"] * bool(
                surplus
            )
            raise PromptError(
                f"prompt '{self.name}': {'; '.join(wrong)}",
                hint=f"its variables are: {', '.join(sorted(self.variables)) or 'none'}",
            )

        def fill(hole: re.Match[str]) -> str:
            return str(values[hole[1]]) if hole[1] else hole[0][0]

        return tuple(Message(role, _HOLE.sub(fill, text)) for role, text in self.turns)


def read_prompts(folder: Path) -> list[Prompt]:
    """All prompts of a folder.

    Raises:
        PromptError: there is no such folder, none in it, or one that cannot be read.
    """
    library = PromptLibrary(folder)
    if not library.names():
        raise PromptError(f"there are no prompts in {folder}", hint="prompts are files like NAME.md in that folder")
    return [library.get(name) for name in library.names()]


class PromptLibrary:
    """The prompts of one folder, read when first asked for."""

    def __init__(self, folder: Path | None, instead: Mapping[str, Prompt] | None = None) -> None:
        self._folder = folder
        self.instead: Mapping[str, Prompt] = instead or {}
        """Those that stand in the place of the folder's."""
        self._read: dict[str, Prompt] = dict(self.instead)

    def replaced(self, prompts: Iterable[Prompt]) -> PromptLibrary:
        """The same library with these in the place of those of their names.

        Raises:
            PromptError: there is none of that name, or it has other variables.
        """
        instead = {prompt.name: prompt for prompt in prompts}
        for prompt in instead.values():
            before = self.get(prompt.name)
            if before.variables != prompt.variables:
                raise PromptError(
                    f"prompt '{prompt.name}' has other variables than the one whose place it takes",
                    hint=f"its variables must be: {', '.join(sorted(before.variables)) or 'none'}",
                )
        return PromptLibrary(self._folder, instead)

    def names(self) -> list[str]:
        return sorted(file.stem for file in self._folder.glob("*.md")) if self._folder and self._folder.is_dir() else []

    def get(self, name: str) -> Prompt:
        """
        Raises:
            PromptError: no such file, or it cannot be read.
        """
        if name not in self._read:
            if self._folder is None or not _NAME.fullmatch(name.replace("-", "_")):
                raise PromptError(
                    f"no prompt is called '{name}'", hint="prompts are Markdown files beside the graph, in prompts/"
                )
            file = self._folder / f"{name}.md"
            try:
                self._read[name] = Prompt(name, file.read_text(encoding="utf-8"))
            except FileNotFoundError:
                known = ", ".join(self.names()) or "none"
                raise PromptError(f"no prompt is called '{name}'", hint=f"prompts in {self._folder}: {known}") from None
            except (OSError, UnicodeDecodeError) as error:
                raise PromptError(f"prompt file {file} cannot be read: {error}", hint="it must be UTF-8 text") from error
        return self._read[name]
