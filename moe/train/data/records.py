"""Makes documents of records: of a field with text, of a conversation, or of a prompt and its completion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig
from .document import Document, Piece

#: fields of instruction data; an answer to a prompt has one of two names
MESSAGES, PROMPT, ANSWERS = "messages", "prompt", ("completion", "response")
#: fields that other programs use for instruction data
FOREIGN = {"instruction", "input", "output", "question", "answer", "conversations", "chosen", "rejected", *ANSWERS}
#: types of values -> what an error calls them
KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}


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
    wanted = {place.config.text_field, place.config.domain_field, MESSAGES, PROMPT, *ANSWERS}
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
    answer = next((name for name in ANSWERS if name in record), None)
    if isinstance(text, str):
        document.text = text
    elif config.text_field in record:
        message = (
            f"is {kind_of(text)}, not a text, in {where}; mend or remove it, or name another field, one of: {fields}"
        )
        raise ValueError(f"data.text_field={config.text_field!r}: {message}")
    elif MESSAGES in record:
        document.messages = _messages(record[MESSAGES], where)
    elif PROMPT in record and answer is not None:
        _fill(document, record[PROMPT], record[answer], answer, where)
    else:
        message = f"is missing in {where}; name the field that holds the text, one of: {fields}"
        if not FOREIGN.isdisjoint(names) or PROMPT in record:
            message += f"; for instruction data, rename fields to {PROMPT!r} and {ANSWERS[0]!r}, or to {MESSAGES!r}"
        raise ValueError(f"data.text_field={config.text_field!r}: {message}")
    return document


def kind_of(value: Any) -> str:
    """Name the type of a value in a record."""
    return KINDS.get(type(value), "an object" if isinstance(value, Mapping) else f"of type {type(value).__name__}")


def _fill(document: Document, prompt: Any, answer: Any, name: str, where: str) -> None:
    """Set a prompt and the answer in field ``name``: two texts, or two lists of messages."""
    if isinstance(prompt, list) and isinstance(answer, list):
        document.messages = _messages([*prompt, *answer], where)
    elif isinstance(prompt, str) and isinstance(answer, str):
        document.pieces = (Piece(prompt, trained=False), Piece(answer))
    else:
        kinds = f"{PROMPT} is {kind_of(prompt)}, and {name} is {kind_of(answer)}"
        raise ValueError(f"data.path={where}: {kinds}; write two texts, or two lists of messages")


def _messages(found: Any, where: str) -> list[dict[str, Any]]:
    """Check messages, and return them with their content as text."""
    if not isinstance(found, list):
        raise ValueError(f"data.path={where}: {MESSAGES} is {kind_of(found)}; write a list of objects")
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
