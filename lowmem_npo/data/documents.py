"""The running text of a document: plain text, Markdown, HTML or PDF.

What the page added is taken out again: headers, footers and page numbers that repeat, the line breaks of a page's
width, the hyphens at line ends.
"""

from __future__ import annotations

import codecs
import gzip
import io
import logging
import re
import zlib
from collections import Counter
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from lowmem_npo.errors import UserError, one_line
from lowmem_npo.sizes import counted
from lowmem_npo.sources import DOCUMENT_KINDS, HTML_KINDS

MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
CHARSET = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
UNMARKED = "{name} is {encoding} without a byte order mark, not UTF-8 text; save the file as UTF-8."
CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")
LIGATURES: dict[str, str | int | None] = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}

EDGE = 3  # lines at the top and at the bottom of a page among which headers and footers are looked for
ROMAN = re.compile(r"[ivxlc]{1,7}")
# A line that is nothing but a page's number.
PAGE_NUMBER = re.compile(
    r"[\W_]*(?:(?:page|p\.|pg\.?|seite|s\.|página|pagina|pág\.?|pag\.?|strona|sida|side|страница|стр\.|с\.|第)\s*)?"
    r"(\d{1,4})\s*(?:页|頁|ページ)?(?:\s*(?:/|of|von|de|di|sur|z|из)\s*\d{1,4})?[\W_]*",
    re.IGNORECASE,
)
LIST_ITEM = re.compile(r"\s*(?:[-*+•‣◦–—]\s|\(?\d{1,3}[.)]\s|\(?[a-z][.)]\s|#{1,6}\s|>|\||```|~~~)")
# Chinese and Japanese writing, full-width punctuation included, puts no space between sentences.
UNSPACED = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")
HYPHEN = re.compile(r"(\w+)[-\u2010]\n[ \t]*(\w+)")
ENDINGS = ".!?…:;\"'”’»)"
LARGE, MOST_EXPANSION = 256 * 2**20, 1032  # bytes; of gzip, the most that a byte can become
MIN_WIDTH, MAX_WIDTH = 30, 200  # characters of a line that was broken to fit a page

SKIPPED = {"script", "style", "noscript", "template", "nav", "head", "svg", "form", "button", "select", "iframe"}
BLOCKS = {"p", "div", "section", "article", "main", "header", "footer", "aside", "h1", "h2", "h3", "h4", "h5", "h6",
          "ul", "ol", "dl", "table", "blockquote", "pre", "figure", "hr", "address", "body", "html"}  # fmt: skip
LINES = {"br", "li", "dt", "dd", "tr", "caption", "figcaption", "option"}


@dataclass(frozen=True)
class Document:
    """text: what the document says. notes: remarks on how it was read."""

    text: str
    notes: tuple[str, ...] = ()


def read_document(name: str, path: Path, kind: str) -> Document:
    """The text of the document `path`, called `name` in messages; `kind` is its suffix.

    Raises UserError for a document that is empty, not text, encrypted, or without text (scanned pages).
    """
    if kind == ".pdf":
        document = _running_text(*_pdf_pages(name, path), name)
    else:
        text = _decoded(name, _content(name, path), kind)
        is_html = kind.startswith(HTML_KINDS)
        document = Document(html_text(text)) if is_html else _running_text(_pages(text), (), name)
    if not document.text.strip():
        raise UserError(f"{name} holds no text; give a document with some, or leave it out.")
    return document


# -- files ------------------------------------------------------------------------------------------------------------


def check_expansion(name: str, path: Path) -> None:
    """Raises UserError for a compressed file whose content is so much larger that it was made to fill the memory."""
    if path.suffix.lower() != ".gz" or path.stat().st_size * MOST_EXPANSION <= most_content(path):
        return
    content = 0
    with suppress(OSError, EOFError, zlib.error), gzip.open(path) as file:  # which is said where it is read
        while chunk := file.read(2**20):
            content += len(chunk)
            check_content(name, path, content)


def most_content(path: Path) -> int:
    """Bytes that the content of a compressed file may have."""
    return max(LARGE, 100 * path.stat().st_size)


def check_content(name: str, path: Path, content: int) -> None:
    """The same for a file that has been seen to hold at least `content` bytes."""
    if content > (most := most_content(path)):
        times = most // path.stat().st_size
        raise UserError(f"{name} holds more than {times:,} times its size, as no text does; unpack it, if meant.")


def _content(name: str, path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        reason = one_line(error)
        raise UserError(f"{name} cannot be read ({reason}); check the file.") from error


def marked_encoding(content: bytes) -> str | None:
    """What the byte order mark at its beginning says, if there is one."""
    return next((encoding for mark, encoding in MARKS if content.startswith(mark)), None)


def unmarked_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32, if this is the beginning of text in it without a byte order mark: bytes with NULs among them,
    which in no other encoding are text."""
    if b"\0" not in content or marked_encoding(content):
        return None
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        text = content.decode(encoding, errors="ignore")
        if text and not CONTROL.search(text) and ("\n" in text or text.isascii()):
            return encoding[:6].upper()
    return None


def decoded_lines(content: bytes, encoding: str, error: UnicodeDecodeError) -> int:
    """The line (from 1) at which decoding `content` ended in `error`; not that of its bytes: in UTF-16 a letter may
    have the byte of a line feed."""
    return len(re.findall(r"\r\n?|\n", content[: error.start].decode(encoding, errors="ignore"))) + 1


def _decoded(name: str, content: bytes, kind: str) -> str:
    """The text of a file: UTF-8, or what its byte order mark or its <meta charset> says."""
    encoding = marked_encoding(content)
    if encoding is None and kind.startswith(HTML_KINDS) and (declared := CHARSET.search(content[:4096])):
        encoding = declared[1].decode("ascii")
        # As browsers do: pages that call themselves Latin-1 are written in Windows' superset of it.
        encoding = {"iso-8859-1": "windows-1252", "latin1": "windows-1252"}.get(encoding.lower(), encoding)
    if encoding is None and (unmarked := unmarked_encoding(content[:4096])):
        raise UserError(UNMARKED.format(name=name, encoding=unmarked))
    encoding = encoding or "utf-8"
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except LookupError as error:
        raise UserError(f"{name} says that it is written in {encoding}, which is unknown; save it as UTF-8.") from error
    except UnicodeDecodeError as error:
        if marked_encoding(content) is None and CONTROL.search(content[:4096].decode("latin-1")):
            raise UserError(f"{name} is not a text file; give one of the kinds {', '.join(DOCUMENT_KINDS)}.") from error
        line = decoded_lines(content, encoding, error)
        what = encoding.upper() if encoding.startswith("utf") else encoding
        raise UserError(f"{name}, line {line} is not {what} text; save the file as UTF-8.") from error
    if CONTROL.search(text[:4096]):
        raise UserError(f"{name} is not a text file; give one of the kinds {', '.join(DOCUMENT_KINDS)}.")
    return re.sub(r"\r\n?|\u2028|\u2029", "\n", text)


def _pdf_pages(name: str, path: Path) -> tuple[list[str], tuple[str, ...]]:
    """The text of each page, and a note where some have none."""
    try:
        import pypdf
    except ImportError as error:
        raise UserError(f"{name} needs a package that reads PDF: pip install 'lowmem-npo[documents]'.") from error
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # repairs that nobody can act on
    try:
        reader = pypdf.PdfReader(io.BytesIO(path.read_bytes()))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UserError(f"{name} is encrypted; save a copy without a password.")
        pages = [page.extract_text() for page in reader.pages]
    except UserError:
        raise
    except pypdf.errors.DependencyError as error:
        raise UserError(f"{name} is encrypted; save a copy without a password.") from error
    except Exception as error:  # pypdf raises what a broken file makes it raise
        reason = one_line(error) or type(error).__name__
        raise UserError(f"{name} cannot be read as pdf ({reason}); check the file.") from error
    pages = [page.translate(str.maketrans(LIGATURES)) for page in pages]
    empty = sum(not page.strip() for page in pages)
    if empty == len(pages):
        raise UserError(
            f"{name} has no text on its {counted(len(pages), 'page')}, which are probably scanned; recognise the text "
            "first (OCR), for example with ocrmypdf."
        )
    notes = (f"{name}: no text on {empty} of {len(pages)} pages (pictures, or scanned)",) if empty else ()
    return [re.sub(r"[ \t\xa0]+", " ", page) for page in pages], notes


class _Text(HTMLParser):
    """Collects what a page says: without scripts, styles, navigation and forms."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.skipping: list[str] = []  # elements that are open and not read
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        if self.skipping:
            if tag in SKIPPED:
                self.skipping.append(tag)
            elif tag == "body":  # a head that was never closed
                self.skipping.clear()
            return
        if tag in SKIPPED:
            self.skipping.append(tag)
        self._break(tag)
        self.verbatim += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        if not self.skipping:
            self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.skipping:
            while self.skipping.pop() != tag:
                pass
        elif not self.skipping:
            if tag in BLOCKS:
                self._break(tag)
            self.verbatim = max(0, self.verbatim - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            text = data if self.verbatim else re.sub(r"\s+", " ", data)
            begins_line = self.pieces and self.pieces[-1].endswith(("\n", "\t", " "))
            self.pieces.append(text.lstrip(" ") if begins_line and not self.verbatim else text)

    def _break(self, tag: str) -> None:
        if tag in BLOCKS:
            self.pieces.append("\n\n")
        elif tag in LINES:
            self.pieces.append("\n")
        elif tag in ("td", "th") and self.pieces and not self.pieces[-1].endswith("\n"):
            self.pieces.append("\t")


def html_text(page: str) -> str:
    """What an HTML page says, a paragraph to a paragraph."""
    parser = _Text()
    # A tag or comment that does not end is text; looking for its end, the parser would read the rest for each.
    whole = page.rfind(">") + 1
    parser.feed(page[:whole] + page[whole:].replace("<", "&lt;"))
    parser.close()
    return _tidy("".join(parser.pieces).replace("\xad", ""))


# -- pages ------------------------------------------------------------------------------------------------------------


def _pages(text: str) -> list[str]:
    """A text file's pages: what form feeds divide, else what lines divide that count pages, else all of it."""
    if "\f" in text.strip("\f\n "):
        return text.split("\f")
    lines = text.split("\n")
    numbered = [(at, int(match[1])) for at, line in enumerate(lines) if (match := PAGE_NUMBER.fullmatch(line.strip()))]
    counting = [at for (at, number), (_, after) in zip(numbered, numbered[1:], strict=False) if after == number + 1]
    if len(counting) < 2 or len(counting) < len(numbered) - 2:
        return [text]
    ends = [0, *(at + 1 for at, _ in numbered), len(lines)]
    return ["\n".join(lines[begin:end]) for begin, end in zip(ends, ends[1:], strict=False) if begin < end]


def _running_text(pages: Sequence[str], notes: tuple[str, ...], name: str) -> Document:
    lines = [page.replace("\xad\n", "").replace("\xad", "").split("\n") for page in pages]
    lines, dropped = _without_edges(lines)
    if dropped:
        edges = counted(dropped, "repeated header or footer line")
        notes = (*notes, f"{name}: {edges} left out, page numbers included")
    filled = ["\n".join(page).strip("\n") for page in lines if any(line.strip() for line in page)]
    return Document(_tidy(_unwrapped("\n".join(filled))), notes)


def _without_edges(pages: list[list[str]]) -> tuple[list[list[str]], int]:
    """The pages without the lines at their tops and bottoms that repeat, whatever numbers are in them; how many."""
    if len(pages) < 2:
        return pages, 0
    edges = [[(at, _likeness(page[at])) for at in _edge(page)] for page in pages]
    seen = Counter(key for edge in edges for key in {key for _, key in edge})
    enough = 2 if len(pages) <= 4 else 3
    dropped = [{at for at, key in edge if seen[key] >= enough} for edge in edges]
    kept = [[line for at, line in enumerate(page) if at not in drop] for page, drop in zip(pages, dropped, strict=True)]
    return kept, sum(map(len, dropped))


def _edge(page: list[str]) -> list[int]:
    filled = [at for at, line in enumerate(page) if line.strip()]
    return sorted({*filled[:EDGE], *filled[-EDGE:]})


def _likeness(line: str) -> str:
    words = " ".join(line.casefold().split())
    return "#" if ROMAN.fullmatch(words.strip("-–— .[]()")) else re.sub(r"\d+", "#", words)


# -- lines ------------------------------------------------------------------------------------------------------------


def _unwrapped(text: str) -> str:
    """The text with the lines joined that were broken only because the page ended there."""
    lines = text.split("\n")
    lengths = sorted(len(line.rstrip()) for line in lines if line.strip())
    if not lengths:
        return text
    width = lengths[len(lengths) * 9 // 10]
    capitals = sum(line.lstrip()[:1].isupper() for line in lines if line.strip())
    if not MIN_WIDTH <= width <= MAX_WIDTH or (len(lengths) > 2 and capitals > 0.8 * len(lengths)):
        return text  # one line a paragraph; or verses, lists, names
    compounds = set(re.findall(r"\w+-\w+", text.casefold()))
    joined, verbatim = [lines[0]], lines[0].lstrip().startswith(("```", "~~~"))
    for before, line in zip(lines, lines[1:], strict=False):
        fence = line.lstrip().startswith(("```", "~~~"))
        if not (verbatim or fence) and _continues(before, line, width):
            joined[-1] = _join(joined[-1], line, compounds)
        else:
            joined.append(line)
        verbatim ^= fence
    return "\n".join(joined)


def _continues(before: str, line: str, width: int) -> bool:
    """Whether `line` goes on with the paragraph of the line `before`: its first word would not have fitted there."""
    if not before.strip() or not line.strip() or LIST_ITEM.match(line) or before.lstrip().startswith(("#", "|")):
        return False
    if len(line) - len(line.lstrip()) >= 2 > len(before) - len(before.lstrip()):  # indented: a new paragraph
        return False
    if HYPHEN.search(f"{before.rstrip()}\n{line}") and line.lstrip()[:1].islower():
        return True
    before = before.rstrip()
    if line.lstrip()[0].islower() and before[-1] not in ENDINGS and len(before) > 0.5 * width:
        return True
    first = 1 if UNSPACED.match(line.lstrip()) else len(line.split()[0]) + 1
    return len(before) + first > 0.85 * width


def _join(before: str, line: str, compounds: Container[str]) -> str:
    """Both lines as one. A word that was divided at the line's end is whole again, unless it is among the `compounds`
    that are written with a hyphen elsewhere, or its second part begins with a capital or a digit."""
    before, line = before.rstrip(), line.lstrip()
    if divided := re.search(r"(\w+)[-\u2010]$", before):
        rest = re.match(r"\w+", line)
        compound = rest is None or not (rest[0][0].islower() and divided[1][-1].isalpha())
        compound = compound or f"{divided[1]}-{rest and rest[0]}".casefold() in compounds
        return before + line if compound else before[:-1] + line
    space = "" if UNSPACED.match(before[-1:]) and UNSPACED.match(line) else " "
    return before + space + line


def _tidy(text: str) -> str:
    """No space at the ends of lines, no more than one empty line."""
    text = re.sub(r"(?<![ \t\xa0])[ \t\xa0]+\n", "\n", text.replace("\f", "\n"))
    text = re.sub(r"\n[ \t]+(?=\n)", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
