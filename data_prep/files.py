"""Your own rows: json, jsonl, csv or parquet with a prompt and its answer in each row.

A prompt is text, or a list of {role, content} messages (in csv as JSON) that ends with the user's. An answer is text or
a number that `--check` reads; of `code` it is the tests as JSON text (`reward_fns.code_tests`). `none` is for a reward
function of your own. A file, or a folder or hub name with the split `train` alone, is split by `--split`; `val.*`,
`validation.*` or `test.*` of a folder is taken for validation.

    python -m data_prep.files --source FILE --prompt COLUMN --answer COLUMN --check number --out DIR
"""

import re
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from data_prep import command
from data_prep.math import whole
from data_prep.pipeline import Chat, Problem, RowError, Source, text_field
from data_prep.prompts import load_prompt_template
from data_prep.reading import has_split
from data_prep.schema import DataError
from data_prep.training import TrainingData, prepare_training
from data_prep.untrusted import UntrustedError, parse_json
from reward_fns import route

CHECKS = ("number", "math", "choice", "code", "none")
"""Each selects its answer check in `reward_fns` through the data source ``own/<check>``; `none` selects nothing."""

TEMPLATE = "plain"
VALIDATION = ("val", "validation", "test")
"""Names of a folder's split that validates, the first that is there."""

_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


def source(data: TrainingData) -> Source:
    """Return how the rows of `data` are read.

    Raises:
        DataError: an option is missing or unknown.
    """
    for name in ("source", "prompt", "answer", "check"):
        if getattr(data, name) in (None, ""):
            raise DataError(
                f"--{name} (data.{name}): is not set; --source is your file, --prompt and --answer its keys"
            )
    if data.check not in CHECKS:
        raise DataError(
            f"--check {data.check} (data.check): is unknown; known are {', '.join(CHECKS)}: with none, a reward "
            f"function of your own checks"
        )
    if data.val_benchmark is not None:
        raise DataError(
            f"data.val_benchmark: {data.val_benchmark} is asked in another form than your rows are; write its file "
            f"with `python -m data_prep.benchmarks` and give that by data.val_files"
        )
    prompt, answer, check = str(data.prompt), str(data.answer), str(data.check)
    template = load_prompt_template(data.template or TEMPLATE)
    opening = [{"role": "system", "content": str(data.system)}] if data.system else []

    def convert(fields: Mapping[str, Any], data_source: str) -> Problem:
        messages = read_chat(fields, prompt)
        if messages is None:
            question = text_field(fields, prompt)
            messages = template.prompt(question)
        elif data.template:
            raise RowError(f"field {prompt!r} is a list of messages, and --template is for text; leave --template out")
        else:
            question = "\n\n".join(message["content"] for message in messages if message["role"] != "system")
        if opening and any(message["role"] == "system" for message in messages):
            raise RowError(f"field {prompt!r} or the template has a system message already; leave --system out")
        truth = read_answer(fields, answer, data_source if check != "none" else None)
        return Problem(data_source, question, truth, check, (*opening, *messages))

    validation = validation_split(data)
    splits = {"train": "train"} | ({"test": validation} if validation else {})
    return Source("mine", str(data.source), f"own/{check}", convert, TEMPLATE, splits)


def validation_split(data: TrainingData) -> str | None:
    """Return the source's name of the split that validates, None if it has none."""
    place = str(data.val_source or data.source)
    return next((name for name in VALIDATION if has_split(place, name)), "test" if data.val_source else None)


def read_chat(fields: Mapping[str, Any], key: str) -> Chat | None:
    """Return the messages of a field, None if it holds anything but a list of them.

    Raises:
        RowError: naming the key and the first message that is not {role, content}.
    """
    value = fields.get(key)
    if isinstance(value, str) and _MESSAGES.match(value):
        try:
            value = parse_json(value)
        except UntrustedError as error:
            raise RowError(f"field {key!r} begins as a list of messages, but {error}") from error
    if not isinstance(value, list):
        return None
    chat: Chat = []
    for number, message in enumerate(value, start=1):
        place = f"field {key!r}: message {number}"
        if not isinstance(message, dict):
            raise RowError(f"{place} is not {{role, content}} (found {message!r:.60})")
        try:
            chat.append({name: text_field(message, name) for name in ("role", "content")})
        except RowError as error:
            raise RowError(f"{place}: {error}") from error
        others = [name for name, held in message.items() if held is not None and name not in ("role", "content")]
        if others:
            raise RowError(f"{place} has {others[0]!r}, and only role and content can be trained on")
    if not chat or chat[-1]["role"] != "user":
        found = f"by {chat[-1]['role']!r:.60}" if chat else "missing"
        raise RowError(f"field {key!r}: the last message is {found}, must be by 'user', whom the model answers")
    return chat


def read_answer(fields: Mapping[str, Any], key: str, data_source: str | None) -> str:
    """Return the answer as text that the check of `data_source` can compare; None takes any.

    Raises:
        RowError: naming the key and what the check says.
    """
    value = fields.get(key)
    if not isinstance(value, int | float | Decimal):
        text = text_field(fields, key)
    try:
        if isinstance(value, int | float | Decimal):
            text = whole(value)
        if data_source is not None:
            route(data_source)("", text, "any")
    except ValueError as error:
        raise RowError(f"field {key!r}: {error}") from error
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = command.parser("files", "Your own rows as parquet files for training.")
    options.add_argument("--prompt", metavar="COLUMN", required=True, help="key of the prompt: text or messages")
    options.add_argument("--answer", metavar="COLUMN", required=True, help="key of the right answer")
    options.add_argument("--check", required=True, help=f"how answers are compared: {', '.join(CHECKS)}")
    options.add_argument("--system", metavar="TEXT", help="system message in front of every prompt")
    options.add_argument("--val-source", help="file, folder or hub name with the rows to validate with")
    options.add_argument(
        "--split", type=float, help="share of the rows to train on (default 0.95, unless others are given)"
    )
    given = vars(options.parse_args(argv))
    out, limit = given.pop("out"), given.pop("limit")
    data = TrainingData("mine", train_rows=limit, val_rows=limit, **given)
    return command.run(lambda: prepare_training(out, data))


if __name__ == "__main__":
    sys.exit(main())
