"""Continues text with a trained model: ``python -m equimoe.launch.generate --run-dir runs/quickstart --prompt "The"``.

A single continuation appears on the terminal while it is generated. Several prompts give one line of JSON each, in the
order of the prompts: {"prompt": ..., "text": ...}.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C loses nothing, and needs no traceback

import numpy as np

from ..moe.checkpoint.ranks import gather
from ..moe.observe.printable import printable
from ..moe.serve import Sampling, generate
from ..moe.train.data import Tokenizer
from . import env, loaded
from .usage import Parser, a_path


@env.command
def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with 64 for a wrong option, 66 for an unreadable file, 67 for a damaged checkpoint."""
    given = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(given)
    with loaded.this_rank() as process:
        if arguments.batch < 1:
            raise ValueError(f"--batch={arguments.batch}: must be at least 1")
        sampling = _sampling(arguments)
        source = loaded.find(arguments.run_dir)
        tokenizer = loaded.tokenizer_of(source, arguments.tokenizer, arguments.end_of_document)
        prompts = read_prompts(arguments.prompt, arguments.prompts)
        marks = loaded.marks(source, tokenizer)
        ids = [marks.prompt(prompt) for prompt in prompts]
        longest = max(map(len, ids)) + sampling.max_tokens
        experts = source.weights.architecture.moe.num_experts
        with loaded.ranks(process, arguments, experts, "equimoe.launch.generate", given) as mesh:
            dtype = loaded.DTYPES[arguments.dtype]
            model = loaded.build(source, mesh, process.device, max(longest, source.seq_len), dtype)
            trained = source.data.get("seq_len")
            if process.rank == 0 and trained is not None and longest > trained:
                note = f"texts of up to {longest} tokens are longer than those of the training, {trained}"
                print(f"note: {note}", file=sys.stderr, flush=True)
            dp = loaded.readers(mesh)
            stream = Stream(prompts[0], tokenizer) if len(prompts) == 1 and process.rank == 0 else None
            shown = (lambda _, token: stream.add(token)) if stream is not None else (lambda *_: None)
            end = loaded.end_of(source, tokenizer)
            settings = {"stop": marks.stops, "end": end, "dp": dp, "batch": arguments.batch}
            texts = generate(model, ids, sampling, **settings, on_token=shown)
            everywhere = {number: text for part in gather(texts) for number, text in part.items()}
            if stream is not None:
                stream.end()
            elif process.rank == 0:
                for number, prompt in enumerate(prompts):
                    text = tokenizer.decode(np.array(everywhere[number]), skip_special=True)
                    print(as_json({"prompt": prompt, "text": text}))


def _sampling(arguments: argparse.Namespace) -> Sampling:
    try:
        return Sampling(arguments.max_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    except ValueError as error:  # it names the field, such as max_tokens
        name, _, rest = str(error).partition("=")
        raise ValueError(f"--{name.replace('_', '-')}={rest}") from None


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Return the prompts of the command line, then those of a file: one per line, or a field of each JSON record."""
    prompts = list(given)
    if file is not None:
        try:
            lines = [line.removesuffix("\r") for line in file.read_text(encoding="utf-8-sig").split("\n")]
        except UnicodeDecodeError:
            raise ValueError(f"--prompts={file}: is not UTF-8 text; convert it") from None
        except OSError as error:
            text = f"--prompts={file}: cannot be read ({error.strerror}); give a file of text"
            raise env.Refused(env.DATA, text) from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                prompts.append(_prompt(line, file, number) if file.suffix == ".jsonl" else line)
    if not prompts:
        raise ValueError("--prompt: is missing; give a text, or a file of texts with --prompts")
    return prompts


def _prompt(line: str, file: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    found = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(found, str):
        raise ValueError(f'--prompts={file}: line {number} is not a JSON object with a text in field "prompt"')
    return found


class Stream:
    """Prints a text while it grows."""

    def __init__(self, prompt: str, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.shown = tokenizer, 0
        self.ids: list[int] = []
        self._print(prompt)

    def add(self, token: int) -> None:
        """Print what has become certain with another token: the rest may be the first bytes of a character."""
        self.ids.append(token)
        text = self._text()
        certain = len(text.rstrip("\ufffd"))
        if certain > self.shown:
            self._print(text[self.shown : certain])
            self.shown = certain

    def end(self) -> None:
        """Print the rest and end the line."""
        self._print(self._text()[self.shown :] + "\n")

    def _text(self) -> str:
        return self.tokenizer.decode(np.array(self.ids), skip_special=True)

    def _print(self, text: str) -> None:
        safe = "".join(letter if letter in "\n\t" else printable(letter) for letter in text)
        if not _prints_unicode():
            safe = safe.encode("ascii", "backslashreplace").decode()
        print(safe, end="", flush=True)


def as_json(record: dict[str, str]) -> str:
    """Return a line of JSON without characters that control a terminal."""
    text = json.dumps(record, ensure_ascii=not _prints_unicode())
    return "".join(letter if printable(letter) == letter else json.dumps(letter)[1:-1] for letter in text)


def _prints_unicode() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def _parser() -> argparse.ArgumentParser:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="python -m equimoe.launch.generate", description=f"{summary.split(':')[0]}. {' '.join(more.split())}"
    )
    loaded.add_options(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable")
    parser.add_argument("--prompts", type=a_path, metavar="FILE", help=_PROMPTS)
    defaults = Sampling()
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens, help="new tokens; default %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="0: the most likely tokens; default %(default)s"
    )
    parser.add_argument("--top-p", type=float, default=defaults.top_p, help=_TOP_P)
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="prompts that a rank continues together; default 8")
    return parser


_PROMPTS = 'file with one prompt per line, or .jsonl with a field "prompt"'
_TOP_P = "sample from the smallest set of tokens that has this probability; default %(default)s"


if __name__ == "__main__":
    main()
