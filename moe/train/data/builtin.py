"""Real text of several kinds that comes with Python and needs no download.

It has five domains with different statistics: source code of the standard library, its disassembled bytecode, English
prose, C headers (if installed) and the Unicode character table. Repeated paragraphs are kept once, so no held-out text
is trained on under another name.
"""

from __future__ import annotations

import ast
import dis
import os
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType

from .sources import Document, by_hash

#: folders with tests, third-party code or data; "encodings" alone is eighty near copies of one table
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "_bundled"}
#: prefixes of the character names that Unicode derives from the code point
BY_RULE = ("CJK UNIFIED", "CJK COMPATIBILITY", "HANGUL SYLLABLE", "TANGUT IDEO", "TANGUT COMP", "NUSHU", "KHITAN")
#: fewest headers that make a domain; some systems without a compiler have only one or two
HEADERS = 20
#: code points per document of the character table
BLOCK = 128
#: shortest paragraph, in characters, that is removed if repeated; shorter ones are common phrases
PARAGRAPH = 60

Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Budget:
    """Tracks how many bytes of each domain may still be read."""

    #: bytes per domain; None: unlimited
    cap: int | None
    spent: dict[str, int] = field(default_factory=dict)
    #: domains of which not everything was read
    cut: set[str] = field(default_factory=set)

    def left(self, domain: str) -> int:
        """Return the bytes of ``domain`` that may still be read."""
        left = (1 << 62) - 1 if self.cap is None else max(self.cap - self.spent.get(domain, 0), 0)
        if not left:
            self.cut.add(domain)
        return left

    def notes(self) -> list[str]:
        """Say which domains the cap has cut."""
        if not self.cut:
            return []
        return [f"data.builtin_bytes_per_domain={self.cap} leaves more text unread of: {', '.join(sorted(self.cut))}"]

    def take(self, document: Document) -> Iterator[Document]:
        """Yield the document, truncated to the rest of its domain's budget; nothing if the budget is used up."""
        whole = (document.text or "").encode("utf-8", errors="replace")
        raw = whole[: self.left(document.domain)]
        if len(raw) < len(whole):
            self.cut.add(document.domain)
        if raw:
            self.spent[document.domain] = self.spent.get(document.domain, 0) + len(raw)
            yield Document(document.domain, document.name, raw.decode("utf-8", errors="ignore"))


class Once:
    """Removes paragraphs that were seen before, ignoring differences in whitespace."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, text: str) -> str:
        kept = []
        for paragraph in text.replace("\r\n", "\n").split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < PARAGRAPH or key not in self._seen:
                kept.append(paragraph)
                self._seen.add(key)
        return "\n\n".join(kept)


def builtin_documents(budget: Budget) -> Iterator[Document]:
    """Yield the built-in text within the budget, in an order that depends only on names."""
    once = Once()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for document in _all(stdlib, budget):
        document.text = once(document.text or "")
        if document.text.strip():
            yield from budget.take(document)


def _all(stdlib: Path, budget: Budget) -> Iterator[Document]:
    yield from _manual(stdlib)
    yield from _modules(stdlib, budget)
    yield from _headers(budget)
    yield from _characters(budget)


def _below(root: Path, suffix: str) -> list[tuple[str, Path]]:
    """Return ``(name relative to root, path)`` of the files below ``root``, sorted by hash, without :data:`SKIPPED`."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED]
        paths = [Path(folder, file) for file in files if file.endswith(suffix)]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(found, key=lambda item: by_hash(item[0]))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _manual(stdlib: Path) -> Iterator[Document]:
    """Yield Python's licence and the pages of its language reference as prose."""
    for name in ("LICENSE.txt", "LICENSE"):
        yield Document("prose", name, _read(stdlib / name))
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics, key=by_hash):
        yield Document("prose", f"topics/{name}", topics[name])


def _modules(stdlib: Path, budget: Budget) -> Iterator[Document]:
    """Yield each module's docstrings as prose, and its code as source or (every third module) as bytecode."""
    for name, path in _below(stdlib, ".py"):
        if name.startswith("_sysconfigdata"):
            continue
        domain = "bytecode" if by_hash(name)[-1] % 3 == 0 else "python"
        if not budget.left("python") and not budget.left("bytecode"):
            return
        if not budget.left(domain):
            continue
        source = _read(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
                listing = _disassemble(tree, name) if domain == "bytecode" else ""
        except (SyntaxError, ValueError, RecursionError):
            continue
        prose, code = _without_docstrings(source, tree)
        yield Document("prose", f"docstrings/{name}", prose)
        yield Document(domain, f"{domain}/{name}", listing or code)


def _without_docstrings(source: str, tree: ast.Module) -> tuple[str, str]:
    """Return the docstrings of a module, and its source without them."""
    lines = source.encode().split(b"\n")
    prose = []
    documented = (node for node in _blocks(tree) if isinstance(node, Documented))
    found = [node for node in documented if ast.get_docstring(node, clean=False)]
    # from the end backwards, so that the line numbers of earlier docstrings stay valid
    for node in sorted(found, key=lambda node: -node.body[0].lineno):
        prose.append(ast.get_docstring(node) or "")
        string = node.body[0]
        first, last = string.lineno - 1, (string.end_lineno or string.lineno) - 1
        before, after = lines[first][: string.col_offset], lines[last][string.end_col_offset :]
        alone = not before.strip() and not after.strip() and len(node.body) > 1
        lines[first : last + 1] = [] if alone else [before + b"pass" + after]
    return "\n\n".join(reversed(prose)), b"\n".join(lines).decode()


def _blocks(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield a module and its statements at all depths, without their expressions, which take most of the time."""
    pending: list[ast.AST] = [tree]
    for node in pending:
        yield node
        for inner in ("body", "orelse", "finalbody", "handlers", "cases"):
            pending += getattr(node, inner, ())


def _disassemble(tree: ast.Module, name: str) -> str:
    """Return one paragraph per code object: a line with its name, then one line per instruction."""
    # optimize=2 removes docstrings
    pending: list[CodeType] = [compile(tree, name, "exec", dont_inherit=True, optimize=2)]
    blocks = []
    while pending:
        code = pending.pop()
        pending += reversed([constant for constant in code.co_consts if isinstance(constant, CodeType)])
        lines = [f"{code.co_name}({', '.join(code.co_varnames[: code.co_argcount])}):"]
        for step in dis.get_instructions(code):
            lines.append(f"{step.offset:5} {step.opname} {_operand(step)}".rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _operand(step: dis.Instruction) -> str:
    """Return an instruction's operand as text that is the same in every process: no addresses, sets sorted."""
    value = step.argval
    if isinstance(value, CodeType):
        return f"<code {value.co_name}>"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(repr, value))) + "}"
    return step.argrepr


def _headers(budget: Budget) -> Iterator[Document]:
    include = Path(sysconfig.get_paths()["include"])
    headers = _below(include, ".h")
    for name, path in headers if len(headers) >= HEADERS else ():
        if not budget.left("c"):
            return
        yield Document("c", f"include/{name}", _read(path))


def _characters(budget: Budget) -> Iterator[Document]:
    """Yield the Unicode character table: code point, character, category and name."""
    for start in sorted(range(0, 0x30000, BLOCK), key=lambda start: by_hash(f"U+{start:04X}")):
        if not budget.left("unicode"):
            return
        lines = []
        for character in map(chr, range(start, start + BLOCK)):
            name = unicodedata.name(character, "")
            if name and not name.startswith(BY_RULE):
                lines.append(f"{ord(character):04X} {character} {unicodedata.category(character)} {name}")
        yield Document("unicode", f"U+{start:04X}", "\n".join(lines))
