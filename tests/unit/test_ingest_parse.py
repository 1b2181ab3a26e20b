"""What is read out of each kind of file, well-formed or not."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentops.errors import DocumentError
from agentops.retrieval.parse import SUFFIXES, Parsed, parse, printable


def parsed(folder: Path, name: str, data: bytes | str) -> Parsed:
    file = folder / name
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return parse(file)


def sections(document: Parsed) -> list[tuple[str, str]]:
    return [(one.heading, document.text[one.start : one.end]) for one in document.sections]


def make_pdf(pages: Sequence[Sequence[str]], title: str = "", password: str = "") -> bytes:
    from pypdf import PdfReader, PdfWriter
    from reportlab.pdfgen.canvas import Canvas  # type: ignore[import-untyped]

    drawn = io.BytesIO()
    canvas = Canvas(drawn, pageCompression=1)
    canvas.setTitle(title)
    for lines in pages:
        for number, line in enumerate(lines):
            canvas.drawString(72, 760 - 16 * number, line)
        canvas.showPage()
    canvas.save()
    if not password:
        return drawn.getvalue()
    writer, locked = PdfWriter(clone_from=PdfReader(drawn)), io.BytesIO()
    writer.encrypt(password, algorithm="RC4-128")
    writer.write(locked)
    return locked.getvalue()


# -- Markdown


def test_markdown_headings_nest_and_end(tmp_path: Path) -> None:
    text = "Before.\n\n# A\n\none\n\n### C\n\ntwo\n\n## B\n\nthree\n\n# D\nfour\n\n# D\nfive\n\nSetext\n------\nsix"
    document = parsed(tmp_path, "x.md", text)
    assert document.title == "A"
    assert sections(document) == [
        ("", "Before."),
        ("A", "one"),
        ("A > C", "two"),
        ("A > B", "three"),
        ("D", "four"),
        ("D", "five"),
        ("D > Setext", "six"),
    ]


def test_markdown_marks_go_and_words_stay(tmp_path: Path) -> None:
    text = (
        "A *b* **c** ~~d~~ `e` [f](http://x.y 'z') ![g](h.png) <i>j</i> &amp; \\*k\\*\nnext  \nbreak\n\n> quoted\n\n"
        "- one\n  - nested\n\n    para\n- two\n\n3. three\n4. four\n\n---\n\n    indented code\n\n<div><p>in html</p></div>\n"
    )
    assert parsed(tmp_path, "x.md", text).text.split("\n\n") == [
        "A b c d `e` f g j & *k*\nnext\nbreak",
        "quoted",
        "- one\n  - nested\n    para\n- two",
        "3. three\n4. four",
        "```\nindented code\n```",
        "in html",
    ]


def test_a_control_character_in_html_inside_markdown_is_no_reason_to_refuse_the_file(tmp_path: Path) -> None:
    text = "plain words\n\n" * 100 + "<div>in \x1b[0m html</div>\n"
    assert parsed(tmp_path, "x.md", text).text.endswith("in \x1b[0m html")


def test_a_heading_inside_code_is_none(tmp_path: Path) -> None:
    document = parsed(tmp_path, "x.md", "# Real\n\n```sh\n# comment\nmake demo\n```\n")
    assert sections(document) == [("Real", "```\n# comment\nmake demo\n```")]


@pytest.mark.parametrize(
    ("text", "title", "body"),
    [
        ("---\ntitle: 'Front'\ntags: [a]\n---\n# Head\n\ntext", "Front", "text"),
        ("---\nauthor: someone\n---\n# Head\n\ntext", "Head", "text"),
        ("---\n\ntext under a rule\n\n---\n", "x", "text under a rule"),
        ("text", "x", "text"),
        ("# Only\n\n## Headings", "Only", "Only\n\nHeadings"),
    ],
)
def test_titles_of_markdown(tmp_path: Path, text: str, title: str, body: str) -> None:
    document = parsed(tmp_path, "x.md", text)
    assert document.title == title
    assert sections(document)[0][1] == body


def test_nested_without_end(tmp_path: Path) -> None:
    reasons: set[str] = set()
    for text in (">" * 20_000 + " x", "- " * 5000 + "x", "[" * 20_000, "*" * 20_000 + "x"):
        try:
            parsed(tmp_path, "x.md", text).text.encode()
        except DocumentError as error:
            reasons.add(str(error))
    assert reasons <= {"it is nested too deeply", "it holds no text"}


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("A title alone\n\nThe text follows.", "A title alone"),
        ("\n\n  A title alone\n\nThe text follows.", "A title alone"),
        ("A sentence is none.\n\nThe text follows.", "x"),
        ("Two lines\nare none\n\nThe text follows.", "x"),
        ("x" * 200 + "\n\nThe text follows.", "x"),
        ("Nothing follows", "x"),
    ],
)
def test_titles_of_plain_text(tmp_path: Path, text: str, title: str) -> None:
    document = parsed(tmp_path, "x.txt", text)
    assert document.title == title
    assert " ".join(document.text.split()) == " ".join(text.split()), "the title stays part of the text"


# -- HTML


def test_html_is_read_as_a_person_would(tmp_path: Path) -> None:
    page = """<!doctype html><html><head><title> The
      page </title><style>p {}</style></head><body><nav>menu</nav><script>code()</script><!-- comment -->
      <h1>Top <em>one</em></h1><p>First   <b>bold</b>
      words.</p><p>Second<br>line.</p><h2>Under</h2>loose text<ul><li>one</li><li><p>two</p></li></ul>
      <pre>  keep
      this</pre><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
      <form><p>in a form &lt;&eacute;&#x1F98A;</p></form></body></html>"""
    document = parsed(tmp_path, "x.html", page)
    assert document.title == "The page"
    assert [heading for heading, _ in sections(document)] == ["Top one", "Top one > Under"]
    assert sections(document)[0][1] == "First bold words.\n\nSecond\nline."
    under = sections(document)[1][1]
    for part in ("loose text", "- one", "two", "```\n  keep\n      this\n```", "| a | b |\n| 1 | 2 |", "in a form <é🦊"):
        assert part in under
    for gone in ("menu", "code()", "comment", "p {}"):
        assert gone not in document.text


def test_a_page_laid_out_by_tables_keeps_its_headings(tmp_path: Path) -> None:
    page = "<table><tr><td>side</td><td><h1>Head</h1><p>body</p><table><tr><td>x</td></tr></table></td></tr></table>"
    assert sections(parsed(tmp_path, "x.htm", page)) == [("", "side"), ("Head", "body\n\n| x |")]


@pytest.mark.parametrize(
    "page",
    [
        "<p>unclosed <b>bold <i>text</p><div><h1>head</p>more",
        "text < 3 and > 2 & &unknown; <",
        "</div></div></p>text<//><!weird><![CDATA[x]]><?php echo 1 ?>text",
        "<p " * 500 + "text",
        "<html><body>" + "<div>" * 3000 + "text",
        "text" + "<p>&#xD800;&#0;&#x110000;" * 3,
        "<table><td>text<tr><li>x",
    ],
)
def test_broken_html_is_read_as_far_as_it_goes(tmp_path: Path, page: str) -> None:
    document = parsed(tmp_path, "x.html", page)
    document.text.encode()
    assert "text" in document.text


def test_a_page_names_its_own_encoding(tmp_path: Path) -> None:
    page = '<meta charset="iso-8859-2"><p>Łódź</p>'
    assert "Łódź" in parsed(tmp_path, "x.html", page.encode("iso-8859-2")).text


# -- PDF


def test_a_pdf_keeps_its_pages(tmp_path: Path) -> None:
    data = make_pdf([["First page has one line."], [], ["Third page."]], title="Report on wings")
    document = parsed(tmp_path, "x.pdf", data)
    assert document.title == "Report on wings"
    assert [(one.page, document.text[one.start : one.end]) for one in document.sections] == [
        (1, "First page has one line."),
        (3, "Third page."),
    ]


def test_wrapped_lines_of_a_pdf_flow_together(tmp_path: Path) -> None:
    lines = ["The lift of a wing depends on the slip-", "stream of the propeller, as is shown in", "the figure.", "Next."]
    assert parsed(tmp_path, "x.pdf", make_pdf([lines])).text == (
        "The lift of a wing depends on the slipstream of the propeller, as is shown in the figure.\nNext."
    )


def test_a_pdf_under_another_name_is_one(tmp_path: Path) -> None:
    assert "hello" in parsed(tmp_path, "x.txt", make_pdf([["hello"]])).text


def test_an_encrypted_pdf_is_said(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="it is encrypted") as caught:
        parsed(tmp_path, "x.pdf", make_pdf([["secret words"]], password="pass"))
    assert "password" in caught.value.hint


def test_a_pdf_encrypted_with_aes_is_said(tmp_path: Path) -> None:
    def text(length: int) -> str:
        return f"<{'ab' * length}>"

    locked = "<< /Filter /Standard /V 5 /R 6 /Length 256 /P -1 /StmF /StdCF /StrF /StdCF"
    locked += " /CF << /StdCF << /CFM /AESV3 /Length 32 /AuthEvent /DocOpen >> >>"
    locked += f" /O {text(48)} /U {text(48)} /OE {text(32)} /UE {text(32)} /Perms {text(16)} >>"
    bodies = ["<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [] /Count 0 >>", locked]
    data, offsets = "%PDF-2.0\n", []
    for number, body in enumerate(bodies, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n"
    start = len(data)
    data += "xref\n0 4\n0000000000 65535 f \n" + "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    data += f"trailer\n<< /Size 4 /Root 1 0 R /Encrypt 3 0 R /ID [{text(16)} {text(16)}] >>\nstartxref\n{start}\n%%EOF\n"
    with pytest.raises(DocumentError, match="it is encrypted"):
        parsed(tmp_path, "x.pdf", data)


def test_a_pdf_without_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"no text \(a scan"):
        parsed(tmp_path, "x.pdf", make_pdf([[], []]))


def test_damaged_pdfs_are_said_and_never_crash(tmp_path: Path) -> None:
    whole = make_pdf([["some words on a page"], ["and another"]])
    random.seed(4)
    outcomes: set[str] = set()
    for turn in range(30):
        data = bytearray(whole[: random.randrange(len(whole))] if turn % 2 else whole)
        for _ in range(random.randrange(1, 30)):
            data[random.randrange(len(data))] = random.randrange(256) if data else 0
        try:
            outcomes.add(parsed(tmp_path, "x.pdf", bytes(data)).text)
        except DocumentError as error:
            outcomes.add(str(error).partition(" (")[0])
    assert "it is damaged" in outcomes or "it holds no text" in outcomes


# -- text and bytes


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("naïve 東京 🦊".encode(), "naïve 東京 🦊"),
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        ("sixteen é".encode("utf-16"), "sixteen é"),
        ("big endian é".encode("utf-16-be").join([b"\xfe\xff", b""]), "big endian é"),
        ("thirty-two é".encode("utf-32"), "thirty-two é"),
        ("old “quotes” – naïve".encode("cp1252"), "old “quotes” – naïve"),
        (b"dos\r\nlines\r\rmac", "dos\nlines\n\nmac"),
        (b"a form\x0cfeed and a \x1b[1mcolour\x1b[0m in a long enough text " + b"word " * 100, None),
    ],
)
def test_encodings(tmp_path: Path, data: bytes, text: str | None) -> None:
    found = parsed(tmp_path, "x.txt", data).text
    assert found == text if text is not None else found


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no text"),
        (b" \n\t\r\n ", "no text"),
        (b"\xef\xbb\xbf", "no text"),
        (b"\0" * 50, "not text"),
        (b"text with \0 in it", "not text"),
        (b"\x7fELF\x02\x01\x01" + bytes(range(256)), "not text"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not text"),
        (b"PK\x03\x04\x14\0\0\0", "not text"),
        (b"\xff\xfeodd", "not text"),
        (b"\x01\x02\x03\x04" * 20, "not text"),
    ],
)
@pytest.mark.parametrize("name", ["x.md", "x.txt", "x.html"])
def test_what_is_no_text_is_said(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason):
        parsed(tmp_path, name, data)


def test_things_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "x.md").mkdir()
    with pytest.raises(DocumentError, match="not a regular file"):
        parse(tmp_path / "x.md")
    with pytest.raises(DocumentError, match="no such file"):
        parse(tmp_path / "nowhere.md")
    with pytest.raises(DocumentError):
        parse(Path("/dev/zero"))


def test_names_become_printable_and_stay_different() -> None:
    assert printable("naïve.md") == "naïve.md"
    assert printable("\udcff.md") == "\\xff.md"
    assert printable("\udcff.md") != printable("\udcfe.md")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace")),
    kind=st.sampled_from(sorted(SUFFIXES)),
)
def test_any_bytes_are_text_or_a_document_error(tmp_path: Path, data: bytes, kind: str) -> None:
    try:
        document = parsed(tmp_path, f"x{kind}", data)
    except DocumentError:
        return
    document.text.encode()
    assert document.sections
    ends = 0
    for section in document.sections:
        assert ends <= section.start < section.end <= len(document.text)
        ends = section.end


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.sampled_from(
            ["# a\n", "## b\n", "text ", "- x\n", "\n", "\n\n", "> ", "```\n", "| a | b |\n|--|--|\n", "<p>", "*", "`", "1. "]
        ),
        max_size=25,
    )
)
def test_any_markdown_gives_ordered_sections(tmp_path: Path, parts: list[str]) -> None:
    text = "".join(parts)
    try:
        document = parsed(tmp_path, "x.md", text)
    except DocumentError:
        return
    ends = 0
    for section in document.sections:
        assert ends <= section.start < section.end <= len(document.text)
        ends = section.end
    if "text" in text and "<p>" not in text:
        assert "text" in document.text
