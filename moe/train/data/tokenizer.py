"""Tokenizers: text to ids and back."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...config import require
from .chat import Chat, Template, plain
from .document import Piece

#: names that vocabularies use for the end-of-document token, most common first
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
#: ids that a vocabulary can have
LARGEST_VOCABULARY = 1 << 30
#: characters that are encoded at a time, if the tokenizer allows it
PIECE = 1 << 17
#: where a text may be cut: between a letter, and a space with a letter after it
CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
#: regular expressions of pre-tokenizers that always cut there, whatever stands around: no alternative has a letter
#: followed by a space, and none looks behind. Those of GPT-2, GPT-4 and Llama 3, Qwen, and DeepSeek-V3
SAFE_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class Tokenizer(Protocol):
    """The interface that the trainer needs from a tokenizer."""

    #: number of ids; every id is in ``[0, vocab_size)``
    vocab_size: int
    #: id that separates two documents
    end_of_document: int
    #: changes if the ids of a text, or the text of a conversation, change
    identity: str

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of ``text``, shape ``(T,)``, without adding special tokens, or finding some in it."""

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text, and uint8, 1 for each id that is trained on: those that end in such a piece."""

    def conversation(self, messages: list[dict[str, Any]], where: str) -> tuple[Piece, ...]:
        """Return the text of a conversation; ``where`` is its place, for errors."""

    def decode(self, ids: np.ndarray, skip_special: bool = False) -> str:
        """Return the text of ``ids``, without end-of-document ids; ``skip_special`` leaves out all special tokens."""


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return uint16 if it can hold every id, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ByteTokenizer:
    """A tokenizer with one id per UTF-8 byte, and one for the end of a document."""

    vocab_size = 257
    end_of_document = 256
    identity = "bytes"

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the ids of ``text``. A lone surrogate, which UTF-8 cannot encode, becomes ``?``."""
        raw = text if isinstance(text, bytes) else text.encode("utf-8", errors="replace")
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint16)

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        parts = [self.encode(piece.text) for piece in pieces]
        masks = [np.full(len(ids), piece.trained, np.uint8) for ids, piece in zip(parts, pieces, strict=True)]
        return np.concatenate([np.empty(0, np.uint16), *parts]), np.concatenate([np.empty(0, np.uint8), *masks])

    def conversation(self, messages: list[dict[str, Any]], where: str) -> tuple[Piece, ...]:
        return plain(messages, where)

    def decode(self, ids: np.ndarray, skip_special: bool = False) -> str:
        """Return the text of ``ids``. Bytes that are not UTF-8 become U+FFFD, so the result can always be printed."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A Hugging Face ``tokenizer.json``, loaded with the ``tokenizers`` library.

    ``end_of_document`` names the token that ends a document. By default, that is ``eos_token`` of the
    ``tokenizer_config.json`` next to the file, or a token of a common name.
    """

    def __init__(self, path: Path, end_of_document: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            message = "needs the package tokenizers; run 'pip install tokenizers', or use 'bytes'"
            raise ValueError(f"data.tokenizer={str(path)!r}: {message}") from None
        try:
            raw = path.read_bytes()
            self._backend = Backend.from_buffer(raw)
        except Exception as error:  # the library raises a bare Exception
            reason = " ".join(str(error).split())
            message = f"cannot be read as a Hugging Face tokenizer.json ({reason}); save it again, or use 'bytes'"
            raise ValueError(f"data.tokenizer={str(path)!r}: {message}") from None
        # a text has the same ids whenever it is read, and all of them
        self._backend.no_truncation()
        self._backend.no_padding()
        if getattr(self._backend.model, "dropout", None) is not None:
            self._backend.model.dropout = None
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        # ids may have gaps, so the size is the largest id + 1, not the number of entries
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        remedy = f"has an id of {self.vocab_size - 1}, more than any vocabulary needs; save it again with smaller ids"
        require(self.vocab_size <= LARGEST_VOCABULARY, "data.tokenizer", str(path), remedy)
        settings = path.with_name("tokenizer_config.json")
        self.end_of_document = _end_of_document(path, settings, vocabulary, end_of_document)
        added = self._backend.get_added_tokens_decoder().values()
        self._special = [token.content for token in added if token.special]
        self._chat, template = _chat(settings)
        self._cuts = _may_cut(json.loads(raw))
        content = hashlib.sha256(raw + template.encode() + str(self.end_of_document).encode())
        self.identity = content.hexdigest()

    def encode(self, text: str) -> np.ndarray:
        parts = [np.asarray(self._encode(part).ids, id_dtype(self.vocab_size)) for part in self._parts(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _parts(self, text: str) -> Iterator[str]:
        """Cut a long text where that does not change its ids; the library needs much memory for each of them."""
        start = 0
        while self._cuts and len(text) - start > 2 * PIECE:
            cut = CUT.search(text, start + PIECE)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:] if start else text

    def _encode(self, text: str, control: bool = False) -> Any:
        """Encode a text; special tokens that are spelled out in it become control ids only under ``control``."""
        clean = text.encode("utf-8", errors="replace").decode("utf-8")
        self._backend.encode_special_tokens = not control
        return self._backend.encode(clean, add_special_tokens=False)

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        plain_text = [piece.text for piece in pieces if not piece.control]
        spelled = any(special in text for special in self._special for text in plain_text)
        # together, so that the ids are those of the whole text, unless that would turn text into control ids
        apart = spelled and len(plain_text) < len(pieces)
        ids, mask = [np.empty(0, id_dtype(self.vocab_size))], [np.empty(0, np.uint8)]
        for group in [[piece] for piece in pieces] if apart else [list(pieces)]:
            found = self._encode("".join(piece.text for piece in group), any(piece.control for piece in group))
            trained = np.concatenate([np.full(len(p.text), p.trained, np.uint8) for p in group] or [mask[0]])
            last = np.array([max(stop - 1, 0) for _, stop in found.offsets], np.int64)
            ids.append(np.asarray(found.ids, ids[0].dtype))
            mask.append(trained[np.minimum(last, len(trained) - 1)] if len(last) else mask[0])
        return np.concatenate(ids), np.concatenate(mask)

    def conversation(self, messages: list[dict[str, Any]], where: str) -> tuple[Piece, ...]:
        return self._chat(messages, where)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of ``text`` with the special tokens that the tokenizer itself adds, and those in the text."""
        clean = text.encode("utf-8", errors="replace").decode("utf-8")
        self._backend.encode_special_tokens = False
        return [int(i) for i in self._backend.encode(clean, add_special_tokens=True).ids]

    def id_of(self, token: str) -> int | None:
        """Return the id of a token; None if there is no such token."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def decode(self, ids: np.ndarray, skip_special: bool = False) -> str:
        kept = [int(i) for i in ids if i != self.end_of_document]
        return str(self._backend.decode(kept, skip_special_tokens=skip_special))


def _end_of_document(path: Path, settings: Path, vocabulary: dict[str, int], asked: str | None) -> int:
    """Return the id of the token that ends a document. Raises ValueError if it is not known."""
    if asked is not None:
        remedy = f"is not a token of {str(path)!r}; give one of its tokens"
        require(asked in vocabulary, "data.end_of_document", asked, remedy)
        return vocabulary[asked]
    configured = special_token(settings, "eos_token")
    known = [vocabulary[token] for token in (configured, *END_OF_DOCUMENT) if token in vocabulary]
    if known:
        return known[0]
    what = (
        f"its tokenizer_config.json names {configured!r}, which it does not have" if configured else "no file says it"
    )
    raise ValueError(
        f"data.tokenizer={str(path)!r}: which token ends a document is unknown ({what}); set data.end_of_document to "
        "one of its tokens"
    )


def _chat(settings: Path) -> tuple[Chat, str]:
    """Return how a tokenizer writes conversations, and the source of its template; a plain form if it has none."""
    source, tokens = "", {name: special_token(settings, name) for name in ("bos_token", "eos_token")}
    file = settings.with_name("chat_template.jinja")
    try:
        source = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"data.tokenizer={str(file)!r}: is not UTF-8 text; save it again") from None
    except OSError:
        found = _read_json(settings).get("chat_template")
        if isinstance(found, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default")
        source = found if isinstance(found, str) else ""
    if not source:
        return plain, ""
    try:
        return Template(source, tokens), source
    except ImportError:
        return plain, ""
    except Exception as error:  # a template can fail in any way
        reason = " ".join(str(error).split())
        raise ValueError(f"data.tokenizer={str(settings)!r}: its chat template is wrong ({reason}); mend it") from None


def _may_cut(spec: dict[str, Any]) -> bool:
    """Return whether a text that is cut at :data:`CUT` has the same ids as the whole.

    That is known if the tokenizer cuts there itself before it merges bytes, and nothing that it does before, such as
    finding added tokens, reaches across.
    """
    if spec["model"].get("type") != "BPE" or (spec.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        return False
    for token in spec.get("added_tokens") or ():
        wide = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
        if not token.get("special") and (wide or re.search(r"\w\s|\s\w", token["content"])):
            return False
    first = spec.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", ()) if first.get("type") == "Sequence" else [first]
    cuts = False
    for step in steps:
        if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            cuts = cuts or bool(step.get("use_regex", True))
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            if step.get("pattern", {}).get("Regex") not in SAFE_PATTERNS:
                return False
            cuts = cuts or "\\p{L}" in step["pattern"]["Regex"]
        elif step.get("type") != "Digits":
            return False
    return cuts


def _read_json(file: Path) -> dict[str, Any]:
    """Return the content of a file; empty if there is none. Raises ValueError if it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except (ValueError, RecursionError):
        found = None
    require(isinstance(found, dict), "data.tokenizer", str(file), "is not a JSON object; save it again, or remove it")
    return dict(found)


def special_token(file: Path, name: str) -> str:
    """Return a special token that a ``tokenizer_config.json`` names, such as "eos_token"; empty if it names none.

    Raises ValueError if the file is damaged.
    """
    found = _read_json(file).get(name)
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else ""


def load_tokenizer(name: str, end_of_document: str | None = None) -> Tokenizer:
    """Load a tokenizer: ``"bytes"``, or the path of a Hugging Face ``tokenizer.json`` or of its folder.

    ``end_of_document`` names the token that ends a document; None: the one that the tokenizer's files name. Raises
    ``ValueError`` if a file does not exist or cannot be read, if there is no such token, or if package ``tokenizers``
    is not installed.
    """
    if name == "bytes":
        remedy = "the tokenizer 'bytes' ends documents with an id of its own; leave it out"
        require(end_of_document is None, "data.end_of_document", end_of_document, remedy)
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    require(path.is_file(), "data.tokenizer", str(path), "no such file; use 'bytes' or a path to a tokenizer.json")
    return HuggingFaceTokenizer(path, end_of_document)
