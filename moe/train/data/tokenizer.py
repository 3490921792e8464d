"""Text to ids and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...config import require

#: what vocabularies call the end of a document, the likeliest first
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer."""

    #: number of ids; each id lies in ``[0, vocab_size)``
    vocab_size: int
    #: the id that stands between two documents
    end_of_document: int

    def encode(self, text: str) -> np.ndarray:
        """The ids of ``text``, shape ``(T,)``, without any special token added."""

    def decode(self, ids: np.ndarray) -> str:
        """The text of ``ids``; end-of-document ids give nothing."""


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ByteTokenizer:
    """One id per UTF-8 byte, and one more for the end of a document."""

    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """Bytes are taken as they are; a lone surrogate, which UTF-8 cannot hold, becomes ``?``."""
        raw = text if isinstance(text, bytes) else text.encode("utf-8", errors="replace")
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: np.ndarray) -> str:
        """A model can write bytes that are not UTF-8; they come out as U+FFFD, so the result can be printed."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A ``tokenizer.json``, through the ``tokenizers`` library."""

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
        # ids may have gaps, so the largest one counts, not how many there are
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        known = [vocabulary[token] for token in END_OF_DOCUMENT if token in vocabulary]
        self.end_of_document = known[0] if known else self.vocab_size
        self.vocab_size = max(self.vocab_size, self.end_of_document + 1)

    def encode(self, text: str) -> np.ndarray:
        clean = text.encode("utf-8", errors="replace").decode("utf-8")
        ids = self._backend.encode(clean, add_special_tokens=False).ids
        return np.asarray(ids, dtype=id_dtype(self.vocab_size))

    def decode(self, ids: np.ndarray) -> str:
        kept = [int(i) for i in ids if i != self.end_of_document]
        return str(self._backend.decode(kept, skip_special_tokens=False))


def load_tokenizer(name: str) -> Tokenizer:
    """``"bytes"``, or the path of a Hugging Face ``tokenizer.json`` or of the folder that holds it.

    Raises ``ValueError`` when there is no such file, when it cannot be read, or when the package
    ``tokenizers`` is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    require(path.is_file(), "data.tokenizer", str(path), "no such file; use 'bytes' or a path to a tokenizer.json")
    return HuggingFaceTokenizer(path)
