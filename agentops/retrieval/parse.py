"""Files to plain text: what a person would read in a Markdown, text, HTML or PDF file, cut where its headings are.

Only reads: nothing in a file is fetched, followed or executed. Knows nothing of pieces, vectors or collections.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from agentops.errors import DocumentError

if TYPE_CHECKING:
    from bs4.element import PageElement, Tag
    from markdown_it.token import Token

MAX_BYTES = 256 << 20
"""Larger files are refused unread."""

_MARKDOWN = frozenset({".md", ".markdown", ".mdown", ".mkd"})
_TITLE_CHARACTERS = 160
_TEXT = frozenset({".txt", ".text", ".rst"})
_HTML = frozenset({".html", ".htm", ".xhtml"})
SUFFIXES = _MARKDOWN | _TEXT | _HTML | {".pdf"}
"""Kinds of files taken from folders. A file that is named itself is read as text when its kind is another."""

_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of `Parsed.text` under one heading ("A > B") and, in a PDF, on one page (from 1; 0 elsewhere)."""

    start: int
    end: int
    heading: str = ""
    page: int = 0


@dataclass(frozen=True, slots=True)
class Parsed:
    """A file's text. Headings are part of `text` but of no section, unless there is nothing else."""

    title: str
    text: str
    sections: tuple[Section, ...]


@dataclass(slots=True)
class _Writer:
    """Collects blocks under headings; blocks are parted by a blank line."""

    parts: list[str] = field(default_factory=list)
    length: int = 0
    path: list[tuple[int, str]] = field(default_factory=list)
    blocks: list[Section] = field(default_factory=list)

    def heading(self, level: int, text: str) -> None:
        if text := " ".join(text.split()):
            self.path = [(above, name) for above, name in self.path if above < level] + [(level, text)]
            self._append(text)

    def block(self, text: str, page: int = 0) -> None:
        if text := text.strip("\n").rstrip():
            start, end = self._append(text)
            self.blocks.append(Section(start, end, " > ".join(name for _, name in self.path), page))

    def _append(self, text: str) -> tuple[int, int]:
        # Lone surrogates: references to characters that are none.
        text = text.encode("utf-8", "replace").decode()
        start = self.length
        self.parts.append(text)
        self.length += len(text) + 2
        return start, start + len(text)

    def parsed(self, title: str) -> Parsed:
        text = "\n\n".join(self.parts)
        sections: list[Section] = []
        for (heading, page), run in groupby(self.blocks, key=lambda block: (block.heading, block.page)):
            # Two sections of the same name may follow each other; between them stands a heading.
            sections += [Section(group[0].start, group[-1].end, heading, page) for group in _contiguous(list(run))]
        if not sections and text.strip():
            sections.append(Section(0, len(text)))
        return Parsed(" ".join(title.encode("utf-8", "replace").decode().split()), text, tuple(sections))


def _contiguous(blocks: list[Section]) -> list[list[Section]]:
    groups = [[blocks[0]]]
    for before, block in pairwise(blocks):
        if block.start == before.end + 2:
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def parse(file: Path) -> Parsed:
    """The text of a file, by its suffix.

    Raises:
        DocumentError: empty, encrypted, damaged, not text, too large, or not readable.
    """
    try:
        if not file.is_file():
            # Opening a pipe or a device may wait for ever.
            raise DocumentError("no such file" if not file.exists() else "not a regular file")
        if file.stat().st_size > MAX_BYTES:
            raise DocumentError(f"larger than {MAX_BYTES >> 20} MiB", hint="split it")
        data = file.read_bytes()
    except OSError as error:
        raise DocumentError(f"cannot be read ({error.strerror or error})") from error
    suffix = file.suffix.lower()
    reader: Callable[[bytes, str], Parsed] = _text
    if suffix == ".pdf" or data.startswith(b"%PDF-"):
        reader = _pdf
    elif suffix in _HTML:
        reader = _html
    elif suffix in _MARKDOWN:
        reader = _markdown
    parsed = reader(data, printable(file.stem))
    if not parsed.text.strip():
        raise DocumentError("it holds no text" + (" (a scan?)" if reader is _pdf and data else ""))
    return parsed


def printable(name: str) -> str:
    """A file's name as valid Unicode; bytes that are none are written as `\\xNN`, so that two names stay two."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def decode(data: bytes) -> str:
    """Text of bytes: by their byte order mark, else UTF-8, else Windows-1252. Line ends become `\\n`.

    Raises:
        DocumentError: the bytes are not text.
    """
    encodings = next(((encoding,) for mark, encoding in _MARKS if data.startswith(mark)), ("utf-8", "cp1252"))
    for encoding in encodings:
        try:
            text = data.decode(encoding).removeprefix("\ufeff")
        except UnicodeDecodeError:
            continue
        controls = len(re.findall(r"[\x00-\x08\x0e-\x1f\x7f]", text))
        if "\0" in text or controls > len(text) / 200:
            break
        return text.replace("\r\n", "\n").replace("\r", "\n")
    raise DocumentError("it is not text")


def _text(data: bytes, name: str) -> Parsed:
    """A first line that stands alone and does not end like a sentence is the title; it stays part of the text."""
    writer, blocks = _Writer(), re.split(r"\n[ \t]*\n", decode(data).strip("\n"))
    for block in blocks:
        writer.block(block)
    first = blocks[0].strip()
    titled = (
        len(blocks) > 1
        and "\n" not in first
        and len(first) <= _TITLE_CHARACTERS
        and not first.endswith((".", "!", "?", ":", ";"))
    )
    return writer.parsed(first if titled and first else name)


# -- Markdown


def _markdown(data: bytes, name: str) -> Parsed:
    from markdown_it import MarkdownIt

    text, title = _front_matter(decode(data))
    writer = _Writer()
    try:
        tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    except RecursionError:
        raise DocumentError("it is nested too deeply") from None
    first = _walk_markdown(tokens, writer)
    return writer.parsed(title or first or name)


def _front_matter(text: str) -> tuple[str, str]:
    """The text behind a leading YAML block, and the title that it gives."""
    found = re.match(r"---[ \t]*\n(.*?\n)(?:---|\.\.\.)[ \t]*(?:\n|$)", text, re.DOTALL)
    if not found or not re.search(r"^[\w-]+:", found.group(1), re.MULTILINE):
        return text, ""
    title = re.search(r"^title:[ \t]*(.+)$", found.group(1), re.MULTILINE)
    return text[found.end() :], title.group(1).strip().strip("\"'") if title else ""


def _walk_markdown(tokens: list[Token], writer: _Writer) -> str:
    """Writes all blocks; returns the first heading of the highest level used first."""
    title, loose = "", ""
    marks: list[int] = []
    cells: list[str] = []
    for place, token in enumerate(tokens):
        kind = token.type
        if kind in ("bullet_list_open", "ordered_list_open"):
            marks.append(int(token.attrs.get("start", 1)) if kind.startswith("ordered") else 0)
        elif kind in ("bullet_list_close", "ordered_list_close"):
            marks.pop()
            if not marks:
                writer.block(loose)
                loose = ""
        elif kind == "list_item_open":
            number, depth = marks[-1], "  " * (len(marks) - 1)
            loose += f"\n{depth}{f'{number}.' if number else '-'} "
            marks[-1] += number > 0
        elif kind == "tr_open":
            cells = []
        elif kind == "tr_close":
            loose += f"\n{_row(cells)}" if any(cells) else ""
        elif kind == "table_close":
            if not marks:
                writer.block(loose)
                loose = ""
        elif kind == "inline":
            opened = tokens[place - 1]
            text = _inline(token)
            if opened.type == "heading_open":
                title = title or " ".join(text.split())
                writer.heading(int(opened.tag[1:]), text)
            elif opened.type in ("th_open", "td_open"):
                cells.append(text)
            elif marks:
                loose += text if loose.endswith(" ") else f"\n{'  ' * len(marks)}{text}"
            else:
                writer.block(text)
        elif kind in ("fence", "code_block", "html_block"):
            text = _page(token.content, "").text if kind == "html_block" else _fenced(token.content)
            if marks:
                loose += f"\n{text}"
            else:
                writer.block(text)
    return title


def _inline(token: Token) -> str:
    pieces = []
    for child in token.children or []:
        if child.type in ("softbreak", "hardbreak"):
            pieces.append("\n")
        elif child.type == "image":
            pieces.append(_inline(child))
        elif child.type == "code_inline":
            pieces.append(f"`{child.content}`")
        elif child.type != "html_inline":
            pieces.append(child.content)
    return "".join(pieces)


# -- HTML

_UNREAD = ["script", "style", "template", "noscript", "nav", "svg", "iframe", "button", "head", "title"]
_BLOCK_TAGS = (
    "address article aside blockquote body caption dd details div dl dt fieldset figcaption figure footer form header hr html "
    "li main ol p section summary table tbody td tfoot th thead ul"
)
_BLOCKS = frozenset(_BLOCK_TAGS.split())
_HEADINGS = ["h1", "h2", "h3", "h4", "h5", "h6"]


def _html(data: bytes, name: str) -> Parsed:
    from bs4.dammit import UnicodeDammit

    text = decode(data)
    if not data.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        # A page may name its encoding itself.
        text = UnicodeDammit(data, ["utf-8"], is_html=True).unicode_markup or text
    return _page(text, name)


def _page(text: str, name: str) -> Parsed:
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup

    writer = _Writer()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            soup = BeautifulSoup(text, "html.parser")
        title = " ".join(soup.title.get_text().split()) if soup.title else ""
        for unread in soup.find_all(_UNREAD):
            unread.decompose()
        first = _walk_html(soup, writer)
    except (RecursionError, ParserRejectedMarkup) as error:
        raise DocumentError(f"it is no HTML that can be read ({type(error).__name__})") from None
    return writer.parsed(title or first or name)


def _walk_html(soup: Tag, writer: _Writer) -> str:
    """Writes all blocks; returns the first heading."""
    from bs4.element import NavigableString, Tag

    pieces: list[str] = []

    def close() -> None:
        lines = (" ".join(line.split()) for line in "".join(pieces).split("\n"))
        text = "\n".join(line for line in lines if line)
        writer.block("" if text == "-" else text)
        pieces.clear()

    first = ""
    # A stack of our own: pages nest deeper than the interpreter likes. None closes a block.
    stack: list[PageElement | None] = [soup]
    while stack:
        node = stack.pop()
        if node is None:
            close()
        elif type(node) is NavigableString:
            pieces.append(re.sub(r"\s+", " ", node))
        elif not isinstance(node, Tag):
            continue
        elif node.name in _HEADINGS:
            close()
            words = " ".join(node.get_text(" ").split())
            first = first or words
            writer.heading(int(node.name[1]), words)
        elif node.name == "pre":
            close()
            writer.block(_fenced(node.get_text()))
        elif node.name == "tr" and not node.find(["table", "p", "div", *_HEADINGS]):
            pieces.append("\n" + _row([cell.get_text(" ") for cell in node.find_all(["td", "th"])]) + "\n")
        elif node.name == "br":
            pieces.append("\n")
        else:
            if node.name in _BLOCKS:
                close()
                stack.append(None)
                pieces.extend(["- "] if node.name == "li" else [])
            stack.extend(reversed(node.contents))
    close()
    return first


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |"


def _fenced(code: str) -> str:
    return f"```\n{code.strip(chr(10)).rstrip()}\n```" if code.strip() else ""


# -- PDF


def _pdf(data: bytes, name: str) -> Parsed:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    writer, title = _Writer(), ""
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError("it is encrypted", hint="save a copy without a password")
        title = str((reader.metadata.title if reader.metadata else "") or "").strip()
        for number, page in enumerate(reader.pages, 1):
            for block in re.split(r"\n\s*\n", _unwrapped(page.extract_text() or "")):
                writer.block(block, page=number)
    except DocumentError:
        raise
    except DependencyError:
        raise DocumentError("it is encrypted with AES", hint="install the package 'cryptography', or save a plain copy") from None
    except Exception as error:  # on damaged files the library fails in any way
        raise DocumentError(f"it is damaged ({type(error).__name__}: {error})") from error
    return writer.parsed(title if title.isprintable() and title else name)


def _unwrapped(text: str) -> str:
    """Lines of a page joined where they were only wrapped: hyphens at line ends go, full lines flow into the next."""
    text = text.replace("\0", "")
    text = re.sub(r"(?<=[a-z])[-\u00ad]\n(?=[a-z])", "", text)
    lines = [line.strip() for line in text.splitlines()]
    full = 0.6 * max(map(len, lines), default=0)
    out = ""
    for line, before in zip(lines, ["", *lines], strict=False):
        out += (" " if line and before and len(before) >= full else "\n") + line
    return out.strip("\n")
