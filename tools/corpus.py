"""`python -m tools.corpus DST`: build the training text from books and manuals in Debian packages.

DST gets train.txt, heldout.txt and SOURCES.md, a table of the packages with their versions. Only
sources in the public domain or under a permissive licence are among them. The same versions always
give the same bytes. It needs apt-get and dpkg-deb, and a network.
"""

import argparse
import fnmatch
import gzip
import hashlib
import html
import re
import subprocess
import sys
import tempfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from qwen35.cli import Parser, output_folder, run
from qwen35.errors import InputError
from weights.storage import write_whole

SEPARATOR = "<|endoftext|>"
PART = 24_000  # characters; longer documents are cut, so that the held-out share can be exact
CAP = 12_000_000
HELD_BOOK, HELD_MANUAL = 0.0056, 0.0035  # shares of a source that are held out


@dataclass(frozen=True)
class Source:
    """One package, the files to read from it, and how many characters of it to keep at most (cap).

    files: glob patterns, separated by spaces. reader: a key of READERS.
    """

    package: str
    licence: str
    files: str = "*.html"
    reader: str = "html"
    cap: int = CAP

    @property
    def book(self) -> bool:
        """True for books. More of them is held out, and `Filter` does not count their opening
        words."""
        return self.reader in ("text", "rdata", "osis", "layout")


SAWYER = "*/klauspost/compress/testdata/Mark*.txt"
SWORD = "*/sword/modules/*zz"
RDATA = "*/data/Rdata.rdb"
PD, BSD, APACHE = "public domain", "BSD-3-clause", "Apache-2.0"
SOURCES = (
    Source("r-cran-janeaustenr", "MIT; novels public domain", RDATA, "rdata"),
    Source("r-cran-tokenizers", "MIT; Moby Dick public domain", RDATA, "rdata"),
    Source("golang-github-klauspost-compress-dev", "BSD; novel public domain", SAWYER, "text"),
    Source("golang-1.19-src", "BSD; Opticks public domain", "*/src/testdata/Isaac*.txt", "text"),
    Source("sword-comm-tdavid", PD, SWORD, "osis", 7_000_000),
    Source("sword-comm-mhcc", PD, SWORD, "osis"),
    Source("sword-comm-scofield", PD, SWORD, "osis"),
    Source("sword-text-kjv", PD, SWORD, "osis"),
    Source("sword-text-web", PD, SWORD, "osis"),
    Source("display-dhammapada", PD, "*/dhammapada-[ae][ln]*.txt", "text"),
    Source("dict-devil", PD, "*.dict.dz", "text"),
    Source("dict-jargon", PD, "*.dict.dz", "text"),
    Source("cfi-en", PD, "*.htm", "layout"),
    Source("wordnet-base", "WordNet (MIT-like)", "*/wordnet/data.*", "wordnet", 5_000_000),
    Source("sqlite3-doc", PD),
    Source("docutils-doc", "public domain; BSD-2-clause"),
    Source("postgresql-doc-15", "PostgreSQL"),
    Source("python3.11-doc", "PSF-2"),
    Source("python-django-doc", BSD),
    Source("rust-doc", "MIT or Apache-2.0", "*/rust-doc/html/[!cas]*.html */cargo/*.html"),
    Source("apache2-doc", APACHE, "*/manual/en/*.html"),
    Source("libapache2-mod-perl2-doc", APACHE),
    Source("tomcat10-docs", APACHE),
    Source("perl-doc", "Artistic or GPL-1+", "*.pod", "pod"),
    Source("erlang-doc", APACHE),
    Source("zsh-doc", "MIT-like (zsh)"),
    Source("twisted-doc", "MIT"),
    Source("ghc-doc", BSD, "*/users_guide/*.html"),
    Source("libboost1.81-doc", "BSL-1.0"),
    Source("llvm-16-doc", "Apache-2.0 with LLVM exceptions"),
    Source("cmake-doc", BSD),
    Source("sphinx-doc", "BSD-2-clause"),
    Source("ntpsec-doc", "NTP and BSD"),
    Source("varnish-doc", "BSD-2-clause"),
    Source("python-pytest-doc", "MIT"),
    Source("python-sqlalchemy-doc", "MIT"),
    Source("python-sklearn-doc", BSD),
    Source("python-scipy-doc", BSD),
    Source("python-pandas-doc", BSD, "*/user_guide/*.html */getting_started/*.html */whatsnew/*"),
    Source("python-statsmodels-doc", BSD),
    Source("python-astropy-doc", BSD),
    Source("python-sympy-doc", BSD),
    Source("dpdk-doc", BSD, "*/guides/*.html"),
)  # fmt: skip
SKIP = re.compile(
    r"genindex|/_modules/|/_sources/|print\.html|changelog|copying|licen[cs]e|contributors|/src/"
    r"|py-modindex|search\.html|releaselog|/api/|/javadoc/|/gapi/|toc\.html|/generated/"
    r"|/cookbook\.html|/embedded-book/",  # these two hold CC-BY-SA text
    re.IGNORECASE,
)
WORDS = (
    "the of and to in a is that it for as was with be by on not he his but at are this have from or"
    " had an they which you were their we will can has been if all there so one what when who no"
    " more would them her she my me your our him than its only into then some do up these out any"
    " may use used using does also such must each should other how new i thou thy shall unto said"
)
COMMON = frozenset(WORDS.split())
CHAPTER = re.compile(r"(CHAPTER|Chapter|VOLUME|LETTER|BOOK|THE (FIRST|SECOND) BOOK)\b.{0,50}$")
QUOTES = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"',
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2026": "...", "\u2010": "-", "\u2011": "-",
    "\u2013": "-", "\u2014": " -- ", "\u2015": " -- ", "\u2212": "-", "\u00b6": "", "\u00ad": "",
    "\u200b": "", "\ufeff": "", "\ufb01": "fi", "\ufb02": "fl", "`": "'", "\uf0c1": "",
})  # fmt: skip


HIDDEN_TAGS = "pre nav table script style select button svg footer aside math"
INLINE_TAGS = (
    "a abbr acronym b bdi big br cite code del dfn em font i img ins kbd mark q s samp small span"
    " strike strong sub sup tt u var wbr"
)


class Page(HTMLParser):
    """Collects the headings and paragraphs of a page. Code, tables and menus are left out."""

    SKIPPED = frozenset(HIDDEN_TAGS.split())
    INLINE = frozenset(INLINE_TAGS.split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[tuple[bool, str]] = []
        self.text: list[str] = []
        self.kind = ""
        self.hidden: list[str] = []

    def flush(self, kind: str = "") -> None:
        """End the current block and begin one of the given kind: "h", "p", or "" for text that is
        dropped."""
        text = "".join(self.text)
        if text.strip():
            self.blocks.append((self.kind == "h", text))
        self.text, self.kind = [], kind

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self.hidden.append(tag)
        if tag in self.INLINE:
            self.text.append(" " if tag == "br" else "")
        elif tag in ("p", "li", "dd", "blockquote"):
            self.flush("p")
        else:
            self.flush("h" if tag in ("h1", "h2", "h3", "h4") else "")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.hidden:
            del self.hidden[self.hidden.index(tag) :]
        if tag not in self.INLINE:
            self.flush()

    def handle_data(self, data: str) -> None:
        if self.kind and not self.hidden:
            self.text.append(data)


Blocks = Iterable[tuple[bool, str]]


def read_html(data: bytes) -> Iterator[Blocks]:
    """One document for a page."""
    page = Page()
    page.feed(data.decode("utf-8", "replace"))
    page.close()
    page.flush()
    yield page.blocks


def read_layout(data: bytes) -> Iterator[Blocks]:
    """An old page with its text in layout tables. Two line breaks separate its paragraphs."""
    data = re.sub(rb"(?i)</?(font|table|tr|td|i|b)\b[^>]*>", b"", data)
    return read_html(re.sub(rb"(?i)<br>(\s|&nbsp;)*<br>", b"<p>", data))


def read_text(data: bytes) -> Iterator[Blocks]:
    """A plain text, as one document per chapter. Indented tables are left out."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    text = re.split(r"End of (?:the )?Project Gutenberg|\*\*\* ?END OF", text)[0]
    blocks: list[tuple[bool, str]] = []
    for block in re.split(r"\n\s*\n", re.sub(r"\b_|_\b", "", text)):
        if CHAPTER.match(block.strip()):
            yield blocks
            blocks = [(True, block)]
        elif len(re.findall(r"\S {3,}\S", block)) < 3:
            blocks.append((False, block))
    yield blocks


def streams(data: bytes) -> Iterator[bytes]:
    """Every zlib stream in a file, found by its header, so that the index files are not needed."""
    end = 0
    for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", data):
        unpack = zlib.decompressobj()
        if match.start() >= end:
            try:
                out = unpack.decompress(data[match.start() :])
            except zlib.error:
                continue
            if unpack.eof:
                end = len(data) - len(unpack.unused_data)
                yield out


def read_rdata(data: bytes) -> Iterator[Blocks]:
    """The strings of R objects, read as the lines of a text."""
    for stream in streams(data):
        lines, at = [], 0
        mark = re.compile(rb"\x00(?:\x04\x00|\x00\x80)\x09")
        while found := mark.search(stream, at):
            size = int.from_bytes(stream[found.end() : found.end() + 4], "big")
            at = found.end() + 4 + size
            lines.append(stream[found.end() + 4 : at])
        yield from read_text(b"\n".join(lines))


PARAGRAPH = re.compile(
    r'<(?:div|milestone)[^>]*"(?:x-p|x-extra-p|paragraph|section)"[^>]*>|<lb/>'
    r"|</?(?:lg|item|list|row|chapter)\b[^>]*>"
)

FOREIGN = re.compile(r"\\nd |\((Greek|Hebrew) - [^)]*\)|[\u0370-\u05ff\u1f00-\u1fff]+")


def read_osis(data: bytes) -> Iterator[Blocks]:
    """A SWORD module: OSIS mark-up in zlib blocks. Each block is a book or a chapter."""
    for stream in streams(data):
        text = stream.decode("utf-8", "replace").replace("\n", " ")
        text = re.sub(r"<note\b((?!<note).)*?</note>", "", text)
        text = re.sub(r"<(title|table)\b.*?</\1>", "\n", text)
        text = re.sub(r'<hi type="bold">Verses? [\d, -]+\.?</hi>', "", text)
        text = re.sub(r"<hi[^>]*>\(See Scofield.*?</hi>", "", text)
        text = FOREIGN.sub("", text)
        text = re.sub(r"<[^>]*>", "", PARAGRAPH.sub("\n", text.replace("<l ", " <l ")))
        yield [(False, line) for line in re.split(r"[\n\0]", html.unescape(text))]


POD_CODE = re.compile(r"[A-WYZ]<(?:[^<>|]*\|)?([^<>]*)>|X<[^<>]*>")


def read_pod(data: bytes) -> Iterator[Blocks]:
    """Perl's documentation format: its headings, and the paragraphs that are not indented."""
    blocks = []
    text = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", data.decode("utf-8", "replace"), flags=re.DOTALL)
    for block in re.split(r"\n\s*\n", text.replace("E<gt>", ">").replace("E<lt>", "<")):
        while (less := POD_CODE.sub(r"\1", block)) != block:
            block = less
        if head := re.match(r"=head\d\s+(.*)", block):
            blocks.append((True, head[1].capitalize()))
        elif block[:1] not in ("=", " ", "\t"):
            blocks.append((False, block))
    yield blocks


def read_wordnet(data: bytes) -> Iterator[Blocks]:
    """The definitions of a dictionary, each after its word."""
    blocks = []
    for line in data.decode("utf-8", "replace").splitlines():
        entry, _, gloss = line.partition(" | ")
        word = entry.split(" ")[4].replace("_", " ") if gloss else ""
        if gloss and not line.startswith(" "):
            blocks.append((False, f"{word[:1].upper()}{word[1:]}: {gloss.strip()}."))
    yield blocks


READERS = {"html": read_html, "text": read_text, "rdata": read_rdata, "osis": read_osis,
           "layout": read_layout, "pod": read_pod, "wordnet": read_wordnet}  # fmt: skip
BOILERPLATE = re.compile(
    r"gutenberg|copyright (\(c\)|©|\d)|all rights reserved|licen[cs]ed under|etext"
    r"|warrant(y|ies) of|see the documentation for|this page was|permission is hereby",
    re.IGNORECASE,
)
CODEY = re.compile(r"\w[._]\w|[a-z][A-Z]|\(\)|::|\d[a-z]")
ODD = re.compile(r"""[^\w\s.,;:'"!?()[\]-]|_""")


def tidy(text: str, book: bool) -> str:
    """One line of plain text: composed letters, straight quotes, single spaces."""
    text = unicodedata.normalize("NFC", text).translate(QUOTES)
    if book:
        text = re.sub(r"\s*--+\s*", " -- ", re.sub(r"[{}]|(?<=[.?!]) \d+$", "", text))
    text = re.sub(r"\s+([,;])", r"\1", " ".join(text.split())).lstrip(".,; ")
    return text.removeprefix("-- ").removesuffix(" --")


def is_prose(text: str, share: float) -> bool:
    """Whether a line reads like English sentences. share: the fraction of words in COMMON."""
    size, words = len(text), text.split()
    if size < 60 or len(words) < 10 or text[-1] not in ".!?:\")']" or max(text) > "\u024f":
        return False
    if not (text[0].isalnum() or text[0] in "\"'([") or BOILERPLATE.search(text):
        return False
    letters = sum(map(str.isalpha, text))
    if letters < 0.7 * size or len(ODD.findall(text)) > 0.012 * size:
        return False
    if len(CODEY.findall(text)) > 0.07 * len(words) or max(map(len, words)) > 45:
        return False
    common = sum(word.strip("\"'(),.;:!?").lower() in COMMON for word in words)
    return common >= share * len(words)


def is_heading(text: str) -> bool:
    """Whether a line can stand above prose as its title."""
    return bool(re.fullmatch(r"[A-Z][\w ,':?!.-]{3,79}", text)) and not CODEY.search(text)


def clean(blocks: Blocks, book: bool) -> list[str]:
    """The prose paragraphs of a document. A heading is kept only where prose follows it."""
    out: list[str] = []
    heading = broken = ""
    for is_head, raw in blocks:
        text = f"{broken} {tidy(raw, book)}".strip()
        broken = ""
        if is_head:
            text = re.sub(r"^(Chapter )?[\dA-Z]+(\.\d+)*\.\s+", "", text)
            heading = text if is_heading(text) else ""
        elif is_prose(text, 0.2 if book else 0.3):
            out += [heading, text] if heading else [text]
            heading = ""
        elif book and 40 < len(text) < 4000 and (text[-1].islower() or text[-1] in ",;"):
            broken = text  # a verse or a line of speech that continues in the next block
    return out


def cut(name: str, paragraphs: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Cut a document into pieces of about PART characters, so that none is a large share of the
    text. Pieces of at most 200 characters are dropped."""
    piece: list[str] = []
    size = count = 0
    for text in paragraphs:
        if size > PART and len(text) > 60:
            yield f"{name}#{count}", piece
            piece, size, count = [], 0, count + 1
        piece.append(text)
        size += len(text)
    if size > 200:
        yield f"{name}#{count}", piece


Documents = list[tuple[str, list[str]]]


def unpack(source: Source, folder: Path) -> str:
    """Download a package and unpack it into `folder`/tree. Returns its version. InputError, with the
    package and the program's last line, if one of the two programs fails."""

    def output(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise InputError(f"{source.package}: {' '.join(command[:2])}: {lines[-1]}")
        return done.stdout

    output("apt-get", "download", "-q", source.package)
    (package,) = (file.name for file in folder.glob("*.deb"))
    output("dpkg-deb", "-x", package, "tree")
    return output("dpkg-deb", "-f", package, "Version").strip()


def extract(source: Source) -> tuple[str, Documents]:
    """The version of a package and its cleaned documents, in the order of their names."""
    documents: Documents = []
    with tempfile.TemporaryDirectory() as name:
        version = unpack(source, Path(name))
        tree = Path(name) / "tree"
        paths = {path.relative_to(tree).as_posix(): path for path in tree.rglob("*")}
        for short, path in sorted(paths.items()):
            wanted = any(fnmatch.fnmatch(short, glob) for glob in source.files.split())
            skip = not source.book and SKIP.search(short)
            if not wanted or skip or path.is_symlink() or not path.is_file():
                continue
            data = path.read_bytes()
            data = gzip.decompress(data) if short.endswith((".gz", ".dz")) else data
            for number, blocks in enumerate(READERS[source.reader](data)):
                part = f"{source.package}/{short}:{number}"
                documents += cut(part, clean(blocks, source.book))
    return version, documents


class Filter:
    """Remembers every paragraph of the corpus, and how often each opening (40 characters)
    occurs."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self.openings: Counter[str] = Counter()

    def fresh(self, text: str, book: bool) -> bool:
        """Whether a paragraph is new. Manuals may use the same opening 20 times; more looks like a
        template."""
        if len(text) < 60 and text[-1] not in '.!?:"':
            return True
        plain = normal(text)
        key = hashlib.sha256(plain.encode()).digest()[:12]
        self.openings[plain[:40]] += not book
        if key in self.seen or self.openings[plain[:40]] > 20:
            return False
        self.seen.add(key)
        return True

    def apply(self, documents: Documents, book: bool) -> Documents:
        """The documents with only their fresh paragraphs, without headings that lose their
        prose."""
        out = []
        for name, paragraphs in documents:
            kept = [text for text in paragraphs if self.fresh(text, book)]
            after = [*kept, ""][1:]
            kept = [a for a, b in zip(kept, after, strict=False) if len(a) >= 60 or len(b) >= 60]
            if sum(map(len, kept)) > 200:
                out.append((name, kept))
        return out


def pick(documents: Documents, budget: float) -> set[str]:
    """Names of documents of at most `budget` characters together, chosen in the order of their
    hashes."""
    chosen: set[str] = set()
    for name, paragraphs in sorted(documents, key=lambda d: hashlib.sha256(d[0].encode()).digest()):
        size = sum(len(text) + 2 for text in paragraphs)
        if size <= budget:
            chosen.add(name)
            budget -= size
    return chosen


def normal(text: str) -> str:
    """The form in which two paragraphs are compared."""
    return " ".join(text.lower().split())


def unshared(held: list[str], train: list[str]) -> list[str]:
    """The held-out documents without the lines, mostly headings, that training also has."""
    known = {normal(line) for text in train for line in text.split("\n\n")}
    kept = ([x for x in text.split("\n\n") if normal(x) not in known] for text in held)
    return ["\n\n".join(lines) for lines in kept if lines]


def build(target: Path) -> None:
    """Write the two texts and the table of sources."""
    target.mkdir(parents=True, exist_ok=True)
    seen, texts = Filter(), {"train": [], "heldout": []}
    table = ["| package | version | licence | characters |", "|---|---|---|---|"]
    with ProcessPoolExecutor() as pool:
        for source, (version, raw) in zip(SOURCES, pool.map(extract, SOURCES), strict=True):
            documents = seen.apply(raw, source.book)
            names = pick(documents, source.cap)
            documents = [document for document in documents if document[0] in names]
            size = sum(len(text) + 2 for _, paragraphs in documents for text in paragraphs)
            held = pick(documents, size * (HELD_BOOK if source.book else HELD_MANUAL))
            for name, paragraphs in documents:
                texts["heldout" if name in held else "train"].append("\n\n".join(paragraphs))
            table.append(f"| {source.package} | {version} | {source.licence} | {size} |")
            print(f"{source.package}: {size} characters, {len(held)} held out", file=sys.stderr)
    texts["heldout"] = unshared(texts["heldout"], texts["train"])
    for kind, parts in texts.items():
        text = f"\n{SEPARATOR}\n".join(parts) + "\n"
        write_whole(target / f"{kind}.txt", text)
    write_whole(target / "SOURCES.md", "\n".join(table) + "\n")


def build_parser() -> Parser:
    parser = Parser("python -m tools.corpus", __doc__ or "", computes=False)
    parser.add_argument("dst", type=output_folder, metavar="DST", help="the folder to write to")
    return parser


def main(args: argparse.Namespace) -> int:
    build(args.dst)
    return 0


if __name__ == "__main__":
    run(build_parser(), main)
