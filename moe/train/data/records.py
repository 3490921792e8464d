"""Makes documents of records: of a field with text, of a conversation, or of a prompt and its completion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig
from .document import Document, Piece

#: fields of instruction data
MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"


@dataclass(frozen=True)
class Place:
    """A file or a folder of data that is read as one, and how."""

    path: Path
    #: relative to data.path
    name: str
    config: DataConfig
    #: of its documents, unless they say it themselves
    domain: str
    #: for messages: where a record stands in it, as in "line 7"
    unit: str = "line"

    def at(self, number: int) -> str:
        """Name a record in a message."""
        return f"{str(self.path)!r} {self.unit} {number}"


def columns(place: Place, names: Iterable[str]) -> list[str]:
    """Return those of a file's columns that are needed."""
    wanted = {place.config.text_field, place.config.domain_field, MESSAGES, PROMPT, COMPLETION}
    return [name for name in names if name in wanted]


def document_of(record: Mapping[str, Any], place: Place, number: int, names: Iterable[str]) -> Document:
    """Return the document of a record; ``names`` are all fields that the file has. Raises ValueError without text."""
    config, where = place.config, place.at(number)
    fields = ", ".join(map(repr, names)) or "none"
    label = record.get(config.domain_field)
    labelled = isinstance(label, (str, int)) and label != ""
    if config.domain_by == "field" and not labelled:
        message = f"has no text or number in {where}; name the field that holds the domain, one of: {fields}"
        raise ValueError(f"data.domain_field={config.domain_field!r}: {message}")
    domain = str(label) if labelled and config.domain_by in ("auto", "field") else place.domain
    document = Document(domain, f"{place.name}:{number}")
    text = record.get(config.text_field)
    if isinstance(text, str):
        document.text = text
    elif config.text_field not in record and isinstance(record.get(MESSAGES), list):
        document.messages = _messages(record[MESSAGES], where)
    elif config.text_field not in record and PROMPT in record and COMPLETION in record:
        _fill(document, record[PROMPT], record[COMPLETION], where)
    else:
        problem = f"is a {type(text).__name__}, not a string" if config.text_field in record else "is missing"
        message = f"{problem} in {where}; name the field that holds the text, one of: {fields}"
        raise ValueError(f"data.text_field={config.text_field!r}: {message}")
    return document


def _fill(document: Document, prompt: Any, completion: Any, where: str) -> None:
    """Set a prompt and its completion: two texts, or two lists of messages."""
    if isinstance(prompt, list) and isinstance(completion, list):
        document.messages = _messages([*prompt, *completion], where)
    elif isinstance(prompt, str) and isinstance(completion, str):
        document.pieces = (Piece(prompt, trained=False), Piece(completion))
    else:
        kinds = f"a {type(prompt).__name__} and a {type(completion).__name__}"
        raise ValueError(f"data.path={where}: prompt and completion are {kinds}; write two texts, or two lists")


def _messages(found: list[Any], where: str) -> list[dict[str, Any]]:
    """Check messages, and return them with their content as text."""
    messages = []
    for number, message in enumerate(found, 1):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):  # parts, as of multimodal data
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise ValueError(f"data.path={where}: message {number} needs a 'role' and a 'content', both text")
        messages.append({**message, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"data.path={where}: has no message of role 'assistant', so nothing of it would be trained on")
    return messages


#: reads a file or folder
Reader = Callable[[Place], Iterable[Document]]
