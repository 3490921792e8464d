"""Tokenizers: text to ids and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...config import require

#: names that vocabularies use for the end-of-document token, most common first
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


#: ids that a vocabulary can have
LARGEST_VOCABULARY = 1 << 30


class Tokenizer(Protocol):
    """The interface that the trainer needs from a tokenizer."""

    #: number of ids; every id is in ``[0, vocab_size)``
    vocab_size: int
    #: id that separates two documents
    end_of_document: int

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of ``text``, shape ``(T,)``, without adding special tokens."""

    def decode(self, ids: np.ndarray, skip_special: bool = False) -> str:
        """Return the text of ``ids``, without end-of-document ids; ``skip_special`` leaves out all special tokens."""


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return uint16 if it can hold every id, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ByteTokenizer:
    """A tokenizer with one id per UTF-8 byte, and one for the end of a document."""

    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the ids of ``text``. A lone surrogate, which UTF-8 cannot encode, becomes ``?``."""
        raw = text if isinstance(text, bytes) else text.encode("utf-8", errors="replace")
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: np.ndarray, skip_special: bool = False) -> str:
        """Return the text of ``ids``. Bytes that are not UTF-8 become U+FFFD, so the result can always be printed."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A Hugging Face ``tokenizer.json``, loaded with the ``tokenizers`` library."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            message = "needs the package tokenizers; run 'pip install tokenizers', or use 'bytes'"
            raise ValueError(f"data.tokenizer={str(path)!r}: {message}") from None
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            reason = " ".join(str(error).split())
            message = f"cannot be read as a Hugging Face tokenizer.json ({reason}); save it again, or use 'bytes'"
            raise ValueError(f"data.tokenizer={str(path)!r}: {message}") from None
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        # ids may have gaps, so the size is the largest id + 1, not the number of entries
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        ends = (*END_OF_DOCUMENT, special_token(path.with_name("tokenizer_config.json"), "eos_token"))
        known = [vocabulary[token] for token in ends if token in vocabulary]
        self.end_of_document = known[0] if known else self.vocab_size
        self.vocab_size = max(self.vocab_size, self.end_of_document + 1)
        remedy = f"has an id of {self.vocab_size - 1}, more than any vocabulary needs; save it again with smaller ids"
        require(self.vocab_size <= LARGEST_VOCABULARY, "data.tokenizer", str(path), remedy)

    def encode(self, text: str) -> np.ndarray:
        clean = text.encode("utf-8", errors="replace").decode("utf-8")
        ids = self._backend.encode(clean, add_special_tokens=False).ids
        return np.asarray(ids, dtype=id_dtype(self.vocab_size))

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of ``text`` with the special tokens that the tokenizer itself adds to a text."""
        clean = text.encode("utf-8", errors="replace").decode("utf-8")
        return [int(i) for i in self._backend.encode(clean, add_special_tokens=True).ids]

    def id_of(self, token: str) -> int | None:
        """Return the id of a token; None if there is no such token."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def decode(self, ids: np.ndarray, skip_special: bool = False) -> str:
        kept = [int(i) for i in ids if i != self.end_of_document]
        return str(self._backend.decode(kept, skip_special_tokens=skip_special))


def special_token(file: Path, name: str) -> str:
    """Return a special token that a ``tokenizer_config.json`` names, such as "eos_token"; empty if it names none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else ""


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer: ``"bytes"``, or the path of a Hugging Face ``tokenizer.json`` or of its folder.

    Raises ``ValueError`` if the file does not exist or cannot be read, or if package ``tokenizers`` is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    require(path.is_file(), "data.tokenizer", str(path), "no such file; use 'bytes' or a path to a tokenizer.json")
    return HuggingFaceTokenizer(path)
