"""The documentation is run: every command, every Python snippet, every link, every table that repeats what the code says.

Commands of a page run in order, in a copy of what a reader of that page has before him: a folder with the project's
documents, and a fresh home. A block under `<!-- flags only -->` needs something from outside or takes minutes: its
programs, verbs and flags are checked and it is not run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from agentops.settings import Settings, describe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
AGENTOPS = Path(sys.executable).with_name("agentops")
OUTSIDE = {"apt-get", "source", "sudo", "git", "cd"}
"""Programs of the reader's system that are named but not checked."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    flags_only: bool

    def commands(self) -> list[str]:
        """What follows a `$ ` prompt, continued lines joined; everything else is output."""
        return [line[2:] for line in re.sub(r"\\\n\s*", "", self.text).splitlines() if line.startswith("$ ")]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"(?m)(^<!-- flags only -->\n+)?^```(\w*)\n(.*?)^```$", text, re.DOTALL):
        yield Block(page, text[: match.start(2)].count("\n") + 1, match[2], match[3], bool(match[1]))


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def help_of(*verb: str) -> str:
    done = subprocess.run([AGENTOPS, *verb, "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0, f"agentops {' '.join(verb)}: {done.stderr}"
    return done.stdout


def verbs(*group: str) -> list[str]:
    """Names under `Commands:` of the help."""
    _, _, listed = help_of(*group).partition("\nCommands:\n")
    return re.findall(r"(?m)^  ([a-z][a-z-]*)", listed)


def test_a_block_is_read_as_it_is_shown(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n\n```console\n$ one --two \\\n    three\nprinted\n$ four\n```\n\n<!-- flags only -->\n```console\n$ five\n```\n",
        encoding="utf-8",
    )
    first, second = blocks(page)
    assert [shlex.split(command) for command in first.commands()] == [["one", "--two", "three"], ["four"]]
    assert (first.line, first.flags_only, second.flags_only) == (3, False, True)


@pytest.mark.model
@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_command_runs(
    page: Path, tmp_path: Path, environment: dict[str, str], model_folder: Path, embedder_folder: Path
) -> None:
    here = tmp_path / "reader"
    here.mkdir()
    for name in ("docs", "README.md", "graphs", "tests/e2e"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, here / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, here / name)
    for block in blocks(page):
        if block.language == "python" and "# mine.py" in block.text:
            (here / "mine.py").write_text(block.text, encoding="utf-8")
        if block.flags_only or block.language not in ("console", "bash"):
            continue
        assert block.commands(), f"{names(page)}:{block.line}: a block of commands without a prompt"
        for command in block.commands():
            done = subprocess.run(
                ["bash", "-c", command],
                capture_output=True,
                text=True,
                cwd=here,
                env=environment,
                timeout=300,
                stdin=subprocess.DEVNULL,
            )
            assert done.returncode == 0, f"{names(page)}:{block.line}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_flags_of_commands_that_are_not_run(page: Path) -> None:
    for block in blocks(page):
        for command in block.commands() if block.flags_only else []:
            check_flags(command, f"{names(page)}:{block.line}")


def check_flags(command: str, where: str) -> None:
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program = Path(words[0]).name
    if program == "agentops":
        verb = [words[1]]
        while verb[-1] in verbs(*verb[:-1]) and len(words) > len(verb) + 1 and verbs(*verb):
            verb.append(words[len(verb) + 1])
        assert verb[-1] in verbs(*verb[:-1]), f"{where}: there is no 'agentops {' '.join(verb)}'"
        for flag in (word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", help_of(*verb)), (
                f"{where}: 'agentops {' '.join(verb)}' has no {flag}"
            )
    elif program == "make":
        done = subprocess.run([*words, "-n"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, f"{where}: {command}: {done.stderr}"
    elif program in ("pip", "uv", "python", "python3"):
        module = ["-m", "pip"] if program == "pip" else []
        assert "install" not in words or re.search(r"agentops-runtime|-r requirements/|\.\[", command), f"{where}: {command}"
        for path in re.findall(r"-r (\S+)", command):
            assert (ROOT / path).is_file(), f"{where}: {path} does not exist"
        assert not module or subprocess.run([sys.executable, *module, words[1], "--help"], capture_output=True).returncode == 0
    else:
        assert program in OUTSIDE, f"{where}: cannot check '{program}'"


def test_a_wrong_flag_is_noticed() -> None:
    with pytest.raises(AssertionError, match="has no --jason"):
        check_flags("agentops config --jason", "here")
    with pytest.raises(AssertionError, match="no 'agentops confid'"):
        check_flags("agentops confid", "here")
    with pytest.raises(AssertionError, match="No rule to make target"):
        check_flags("make dmeo", "here")


@pytest.mark.model
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.language == "python" for block in blocks(page))], ids=names)
def test_every_python_snippet_runs(
    page: Path, tmp_path: Path, environment: dict[str, str], model_folder: Path, embedder_folder: Path
) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for block in blocks(page):
        if block.language != "python":
            continue
        named = re.match(r"# (\w+\.py)\n", block.text)
        script = tmp_path / (named[1] if named else "snippet.py")
        script.write_text(block.text, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
        )
        assert done.returncode == 0, f"{names(page)}:{block.line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        for line in re.findall(r"print\(.*\)  # (.+)", block.text):
            assert line in done.stdout, f"{names(page)}:{block.line}: printed {done.stdout!r}, not {line!r}"


def test_every_verb_is_documented_and_every_documented_verb_exists() -> None:
    documented = set(re.findall(r"(?m)^#{2,3} agentops ([a-z -]+)$", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")))
    there = set()
    for verb in verbs():
        below = verbs(verb)
        there |= {f"{verb} {name}" for name in below} if below else {verb}
    assert documented == there


def test_every_option_is_documented_under_its_verb() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for match in re.finditer(r"(?ms)^#{2,3} agentops ([a-z -]+)\n(.*?)(?=^#{2,3} |\Z)", page):
        options = set(re.findall(r"(?m)^  (?:-\w, )?(--[a-z][a-z-]*)", help_of(*match[1].split()))) - {"--help"}
        documented = set(re.findall(r"`(?:-\w, )?(--[a-z][a-z-]*)", match[2]))
        assert documented == options, f"agentops {match[1]}"


def test_the_table_of_settings_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| `([a-z_.]+)` \| (?:`(.*?)`)? ?\| (.+) \|$", page)
    assert [key for key, _, _ in rows] == list(describe())
    for key, shown, about in rows:
        value = Settings().get(key)
        assert about == describe()[key]
        if not isinstance(value, Path):
            assert shown == (str(value).lower() if isinstance(value, bool) else str(value or "" if value != 0 else value)), key


def test_everything_in_the_readmes_tree_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"(?s)```text\n(agentops/.*?)```", readme)
    folders: list[str] = []
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        depth = indent // 2
        folders = [*folders[:depth], name] if name.endswith("/") else folders[:depth]
        path = "".join(folders) if name.endswith("/") else "".join(folders) + name
        assert len(line.split()) > 1, f"{path} has no description"
        assert (ROOT / path).exists(), f"{path} is in the README's tree and not in the project"
    shown = set(re.findall(r"(?m)^  (\w+(?:\.py|/))", tree.partition("\ngraphs/")[0]))
    real = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "agentops").iterdir()
        if not path.name.startswith("_") and (path.is_dir() or path.suffix == ".py")
    }
    assert shown == real


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=names)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path) if path else page
        assert goal.exists(), f"{names(page)}: {target}"
        assert not anchor or anchor in anchors(goal), f"{names(page)}: {target}"


def test_the_changelog_knows_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_target_of_make_has_a_help_line() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (listed,) = re.findall(r"(?m)^\.PHONY: (.+)$", text)
    shown = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for target in listed.split():
        assert re.search(rf"(?m)^  make {target} +\S", shown), target
