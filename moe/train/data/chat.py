"""Turns conversations into pieces of text, of which the assistant's are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .document import Piece

#: messages of a conversation -> its pieces; also gets where the conversation stands, for errors
Chat = Callable[[list[dict[str, Any]], str], tuple[Piece, ...]]


def plain(messages: list[dict[str, Any]], where: str) -> tuple[Piece, ...]:
    """Write ``Role: content`` for each message, with an empty line between two."""
    pieces = []
    for number, message in enumerate(messages):
        answer = message["role"] == "assistant"
        gap = "\n\n" if number + 1 < len(messages) else ""
        pieces.append(Piece(f"{message['role'].capitalize()}: ", trained=False))
        pieces.append(Piece(message["content"] + gap, trained=answer))
    return tuple(pieces)


class Template:
    """A chat template of Hugging Face, which writes a conversation with the model's own special tokens.

    What the template adds because a message of the assistant follows is not trained on; the rest of the message is.
    """

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        def as_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, **how)

        class Generation(Extension):
            """The block ``generation`` of transformers, which marks answers and writes what is in it."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        extensions = [loopcontrols, Generation]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = as_json  # Jinja's own escapes characters of HTML, that of transformers does not
        self._template = environment.from_string(source)
        self._tokens = tokens

    def __call__(self, messages: list[dict[str, Any]], where: str) -> tuple[Piece, ...]:
        try:
            whole = self._write(messages, False)
            pieces: list[Piece] = []
            done = ""
            for number, message in enumerate(messages):
                # some templates cannot write a conversation that begins with a system message alone
                if message["role"] == "system" and number + 1 < len(messages):
                    continue
                answer = message["role"] == "assistant"
                if answer:
                    before = self._write(messages[:number], True)
                    pieces += self._between(done, before, whole, messages[:number], False)
                    done = before
                after = self._write(messages[: number + 1], False)
                pieces += self._between(done, after, whole, messages[: number + 1], answer)
                done = after
            return (*pieces, *self._between(done, whole, whole, messages, False))
        except Exception as error:  # a template can fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"data.path={where!r}: the tokenizer's chat template cannot write this conversation ({reason}); mend "
                "the conversation, or remove the template from tokenizer_config.json for a plain form"
            ) from None

    def _write(self, messages: list[dict[str, Any]], answer_follows: bool) -> str:
        return self._template.render(messages=messages, add_generation_prompt=answer_follows, **self._tokens)

    def _between(self, start: str, stop: str, whole: str, messages: list[dict[str, Any]], trained: bool) -> list[Piece]:
        """Return the pieces between two beginnings of the conversation's text, with contents apart from the rest."""
        if not (stop.startswith(start) and whole.startswith(stop)):
            raise ValueError("it writes a message differently when others follow")
        text, pieces = stop[len(start) :], []
        for message in messages:
            content = message["content"].strip()
            at = text.find(content) if content else -1
            if at >= 0:
                pieces += [Piece(text[:at], trained, control=True), Piece(content, trained)]
                text = text[at + len(content) :]
        return [piece for piece in (*pieces, Piece(text, trained, control=True)) if piece.text]
