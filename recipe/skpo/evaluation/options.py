"""Options of the analyses' commands: one record holds a command's flags, their defaults, help and bounds."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from data_prep.untrusted import UntrustedError, parse_json
from recipe.skpo.errors import ConfigError
from recipe.skpo.task.run_settings import Chat, RunSettings, run_settings
from reward_fns import OUR_REWARD
from reward_fns.forms import OLD_FORMATS, AnswerFormat
from reward_fns.thoughts import read_marks

Record = TypeVar("Record")


def require(holds: bool, message: str) -> None:
    """Raise ConfigError unless ``holds``."""
    if not holds:
        raise ConfigError(message)


# ---------------------------------------------------------------- a record as flags


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    least: float | None = None,
    choices: tuple[str, ...] = (),
    flag: str = "",
    factory: Any = MISSING,
) -> Any:
    """Declare a field of a record as an option.

    Args:
        default: its default; without one and without ``factory`` the flag is required.
        help: one line about it.
        least: smallest value allowed, of each number in a tuple.
        choices: values allowed.
        flag: its name on the command line; the field's name if empty.
        factory: makes the default when the record is made.
    """
    metadata = {"help": help, "least": least, "choices": choices, "flag": flag}
    return field(default=default, default_factory=factory, metadata=metadata)


def _options(record: type) -> Iterator[Field[Any]]:
    return (item for item in fields(record) if "help" in item.metadata)


def _flag(item: Field[Any]) -> str:
    return f"--{item.metadata['flag'] or item.name}".replace("_", "-")


def _reader(kind: Any) -> Callable[[str], Any]:
    """Convert the text of a flag to a field's type; numbers of a tuple are separated by commas."""
    parts = [part for part in get_args(kind) if part not in (NoneType, Ellipsis)]

    def values(text: str) -> tuple[Any, ...]:
        try:
            return tuple(parts[0](part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers separated by commas") from None

    return values if get_origin(kind) is tuple else parts[0] if parts else kind


def add_flags(parser: argparse.ArgumentParser, record: type, title: str = "") -> None:
    """Add a flag for every option of a record, in a group if there is a title."""
    group = parser.add_argument_group(title) if title else parser
    kinds = get_type_hints(record)
    for item in _options(record):
        default, text = None if item.default is MISSING else item.default, item.metadata["help"]
        if default not in (None, "", ()):
            shown = default if isinstance(default, tuple) else (default,)
            texts = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown)
            text += f" (default {','.join(texts)})"
        group.add_argument(
            _flag(item),
            dest=item.name,
            type=_reader(kinds[item.name]),
            default=default,
            required=item.default is MISSING and item.default_factory is MISSING,
            choices=item.metadata["choices"] or None,
            help=text,
        )


def read_flags(record: type[Record], flags: argparse.Namespace, **others: Any) -> Record:
    """Make a record from parsed flags and its other fields.

    Raises:
        ConfigError: an option is out of bounds.
    """
    given = {item.name: getattr(flags, item.name) for item in _options(record)}
    return record(**{name: value for name, value in given.items() if value is not None}, **others)


def check_options(record: Any, name: Callable[[Field[Any]], str] = _flag) -> None:
    """Check a record's options, each called ``name(option)`` in a message.

    Raises:
        ConfigError: naming the first one that is out of bounds.
    """
    for item in _options(type(record)):
        value, least, choices = getattr(record, item.name), item.metadata["least"], item.metadata["choices"]
        values = value if isinstance(value, tuple) else (value,)
        holds = least is None or (bool(values) and all(number >= least for number in values))
        require(holds, f"{name(item)}: must be >= {least}, got {value}")
        require(not choices or value in choices, f"{name(item)}: must be {' or '.join(choices)}, got {value}")


# ---------------------------------------------------------------- how a model is asked


@dataclass(frozen=True)
class RewardFunction:
    """The reward: a function of ``pkg://<module>`` or a Python file, as the trainer's ``custom_reward_function``."""

    path: str
    name: str
    reward_kwargs: dict[str, Any]


@dataclass(frozen=True)
class ModelSettings:
    """How a model is asked and judged.

    Attributes:
        chat: its chat template and the options of it.
        answer_format: in which its answers count (``reward_fns.forms``).
        thought_marks: what encloses a thought (``reward_fns.thoughts``).
    """

    chat: Chat = field(default_factory=Chat)
    answer_format: str = "any"
    thought_marks: str | tuple[str, ...] = "auto"

    @property
    def reward(self) -> RewardFunction:
        """This recipe's reward function with these options."""
        marks = self.thought_marks if isinstance(self.thought_marks, str) else list(self.thought_marks)
        kwargs = {"answer_format": self.answer_format, "thought_marks": marks}
        return RewardFunction(OUR_REWARD, "compute_score", kwargs)


JUDGING = ("asked.answer_format", "asked.thought_marks")
"""What may differ when an interrupted analysis resumes: no draw depends on it."""


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``ModelSettings``; the run that the model belongs to gives their defaults."""
    group = parser.add_argument_group("prompts and rewards (default: those of the model's run, if it has one)")
    group.add_argument(
        "--chat-template-kwargs", type=_mapping, metavar="JSON", help='such as {"enable_thinking": false}'
    )
    group.add_argument("--custom-chat-template", metavar="TEXT", help="Jinja template instead of the tokenizer's")
    group.add_argument(
        "--answer-format",
        type=lambda name: OLD_FORMATS.get(name, name),
        choices=get_args(AnswerFormat),
        help="form in which answers count (else any)",
    )
    group.add_argument(
        "--thought-marks", type=_marks, metavar="MARKS", help="auto, none, or opening and closing mark as OPEN,CLOSE"
    )


def chat_of(run: RunSettings | None, template: str | None, kwargs: dict[str, Any] | None) -> Chat:
    """Return the given chat template and options; those that are None are the run's."""
    chat = run.chat if run is not None else Chat()
    return Chat(
        chat.custom_chat_template if template is None else template,
        chat.chat_template_kwargs if kwargs is None else kwargs,
    )


def model_settings(flags: argparse.Namespace, model: str) -> ModelSettings:
    """Complete parsed flags by the run that a model belongs to.

    Raises:
        ConfigError: the run's config cannot be read.
    """
    run = run_settings(model)
    reward = run.reward_kwargs if run is not None and run.reward_path == OUR_REWARD else {}
    marks = flags.thought_marks or reward.get("thought_marks") or "auto"
    return ModelSettings(
        chat_of(run, flags.custom_chat_template, flags.chat_template_kwargs),
        flags.answer_format or reward.get("answer_format") or "any",
        marks if isinstance(marks, str) else tuple(marks),
    )


def _mapping(text: str) -> dict[str, Any]:
    try:
        read = parse_json(text)
    except UntrustedError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None
    if not isinstance(read, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return read


def _marks(text: str) -> str | tuple[str, ...]:
    marks = tuple(text.split(",")) if "," in text else text
    try:
        read_marks(marks)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, none or two different marks OPEN,CLOSE") from None
    return marks
