r"""Prompt templates: yaml files with the chat around a problem.

A template is ``messages: [{role, content}, ...]`` with ``{question}`` exactly once; nothing else in it is replaced, so
that ``\boxed{}`` needs no escaping. A name ("boxed") means the file of that name in ``data_prep/templates``; a path
(anything with a suffix or a folder) is the user's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.schema import DataError
from data_prep.untrusted import UntrustedError, one_line, read_yaml

FOLDER = Path(__file__).parent / "templates"
QUESTION = "{question}"


@dataclass(frozen=True)
class PromptTemplate:
    """The chat that asks a question."""

    messages: tuple[Mapping[str, str], ...]

    def prompt(self, question: str) -> list[dict[str, str]]:
        """Return the messages with the question filled in."""
        return [
            {"role": message["role"], "content": message["content"].replace(QUESTION, question)}
            for message in self.messages
        ]


def read_template(path: Path) -> dict[str, Any]:
    """Read a template file.

    Raises:
        DataError: it cannot be read or is not a mapping.
    """
    try:
        content = read_yaml(path)
    except (OSError, UntrustedError) as error:
        raise DataError(f"{path}: cannot be read as a template ({one_line(error)}); see {FOLDER.name}/") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a mapping; copy a file of data_prep/{FOLDER.name} and change that")
    return content


def read_messages(path: Path, content: Mapping[str, Any], like: str) -> PromptTemplate:
    """Check the key ``messages`` of a template; ``like`` names a file that has it right.

    Raises:
        DataError: it is not a list of {role, content}, or does not hold the question exactly once.
    """
    messages = content.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(value, str) for value in message.values())
        for message in messages
    ):
        raise DataError(f"{path}: key 'messages' is not a list of {{role, content}}; write it as in {like}")
    if sum(message["content"].count(QUESTION) for message in messages) != 1:
        raise DataError(f"{path}: key 'messages' needs {QUESTION} exactly once; write it in the last message")
    return PromptTemplate(tuple(messages))


def load_prompt_template(name: str) -> PromptTemplate:
    """Read a template by name or by path.

    Raises:
        DataError: no such template, unreadable, or not of the form above.
    """
    path = FOLDER / f"{name}.yaml" if Path(name).name == name and not Path(name).suffix else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem != "arithmetic"))
        raise DataError(f"--template {name}: no such template; known are {known}, or give the path of a yaml file")
    content = read_template(path)
    if set(content) != {"messages"}:
        raise DataError(f"{path}: needs the one key 'messages'; copy {FOLDER.name}/boxed.yaml and change that")
    return read_messages(path, content, "boxed.yaml")
