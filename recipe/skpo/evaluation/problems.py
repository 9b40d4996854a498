"""Problems of a data file, their tokens under a model's chat template, and the reward of a response to them."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_prep.schema import DataError, check_parquet
from data_prep.untrusted import one_line
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.options import RewardFunction, require
from recipe.skpo.isolation.child import PROMPT_SECONDS, Place, Stopped, in_child
from recipe.skpo.task.prompts import problem_tokens
from recipe.skpo.task.rewards import RewardCall, RewardError
from recipe.skpo.task.thoughts import ThoughtReader, configured_marks
from reward_fns import OUR_REWARD


@dataclass(frozen=True)
class Problem:
    """One row of a data file.

    Attributes:
        id: stable id.
        data_source: chooses the answer check.
        messages: the chat, dictionaries of role and content.
        ground_truth: the answer.
        extra_info: as in the file, for the reward.
    """

    id: str
    data_source: str
    messages: tuple[dict[str, str], ...]
    ground_truth: Any
    extra_info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The last message, which asks the question."""
        return self.messages[-1]["content"]

    @property
    def chat(self) -> str:
        """The messages as JSON text, by which equal prompts are found."""
        return json.dumps(self.messages)


def read_problems(path: Path, option: str, count: int | None = None, prompt_key: str = "prompt") -> list[Problem]:
    """Read the first ``count`` problems of a parquet file (``data_prep.schema``); None reads all.

    Raises:
        DataError: naming file, row or column, and the fix; ``option`` is what named the file.
    """
    try:
        check_parquet(path, role="val", prompt_key=prompt_key)
    except DataError as error:
        raise DataError(str(error).replace("data.val_files:", option, 1)) from None
    columns = {"id", "data_source", prompt_key, "reward_model", "extra_info"} & set(pq.read_schema(path).names)
    table = pq.read_table(path, columns=sorted(columns))
    return [
        Problem(
            row["id"],
            row["data_source"],
            tuple({"role": message["role"], "content": message["content"]} for message in row[prompt_key]),
            row["reward_model"]["ground_truth"],
            dict(row.get("extra_info") or {}),
        )
        for row in table.slice(0, count).to_pylist()
    ]


# ---------------------------------------------------------------- tokens


def prompts_of(problems: Sequence[Problem], tokenizer: Any, where: str) -> list[tuple[int, ...]]:
    """Tokenise the chats of a file's problems with the model's template.

    A template is a program, so that this happens in a child process whose time and memory are bounded.

    Raises:
        DataError: naming the row that the template fails on; ``where`` is option and file.
    """

    def tokens(place: Place) -> list[list[int]]:
        made = []
        for number, problem in enumerate(problems):
            place.move(f"row {number}", PROMPT_SECONDS)
            made.append(problem_tokens(tokenizer, problem.messages))
        return made

    try:
        return [tuple(ids) for ids in in_child(tokens, ())]
    except Stopped as error:
        raise DataError(
            f"{where}: {error.at}: the model's chat template or tokenizer {error}; take a model whose origin you trust"
        ) from None
    except RuntimeError as error:
        raise DataError(
            f"{where}: the model's chat template fails ({one_line(error)}); change the prompts' roles, or take another "
            f"model"
        ) from None


# ---------------------------------------------------------------- rewards


@dataclass(frozen=True)
class Checked:
    """What the reward says of a response.

    Attributes:
        score: the reward itself.
        right: whether the response is right.
        pred: the extracted answer, "" if there is none.
        well_formed: whether an answer was found; None if the reward does not say.
    """

    score: float
    right: bool
    pred: str
    well_formed: bool | None


class Reward:
    """The reward function, called as the trainer does; ``marks`` enclose a thought (``ThoughtReader``).

    Raises:
        ConfigError: no such module, file or function, or it does not take the arguments.
    """

    def __init__(self, function: RewardFunction) -> None:
        try:
            self._call = RewardCall(function.path, function.name, function.reward_kwargs)
            self._call.check_signature()
        except RewardError as error:
            raise ConfigError(f"reward: {error}") from None
        self.marks = configured_marks(function.path, function.reward_kwargs)
        # Programs run in processes of their own. A function of somebody else may not bear threads.
        self.threads = len(os.sched_getaffinity(0)) if function.path == OUR_REWARD else 1

    def __call__(self, problem: Problem, response: str, extra_info: Mapping[str, Any] | None = None) -> Checked:
        """Check a response, a text without special tokens, with ``extra_info`` or else the problem's.

        A result without ``acc`` is right if its score is positive.
        """
        info = problem.extra_info if extra_info is None else extra_info
        try:
            verdict = self._call(problem.data_source, response, problem.ground_truth, info)
        except RewardError as error:
            raise ConfigError(f"reward: {self._call.label}: {error}, for problem {problem.id}") from None
        record = verdict.record
        accuracy = record["acc"] if record.get("acc") is not None else float(verdict.score > 0)
        require(accuracy in (0, 1), f"reward: its acc is {accuracy}; right responses are counted, so give 0 or 1")
        pred, formed = record.get("pred"), record.get("well_formed")
        return Checked(
            verdict.score,
            bool(accuracy),
            "" if pred is None else str(pred),
            None if formed is None else bool(formed),
        )

    def check_truths(self, problems: Sequence[Problem], where: str) -> None:
        """Check that every answer can be checked, before anything is drawn.

        Raises:
            DataError: naming the row and what the reward says.
            ConfigError: the reward function fails on what it is given.
        """
        for row, problem in enumerate(problems):
            try:
                self(problem, "")
            except ValueError as error:
                raise DataError(f"{where}: row {row}: {error}") from None
            except (TypeError, KeyError, AttributeError) as error:
                raise ConfigError(
                    f"reward: {self._call.label} fails on row {row} of {where} ({type(error).__name__}: {error})"
                ) from None


class Judge:
    """A reward and the tokenizer of the model whose responses it checks."""

    def __init__(self, reward: Reward, tokenizer: Any) -> None:
        self.reward, self._tokenizer = reward, tokenizer
        self._thoughts = ThoughtReader(tokenizer, reward.marks)

    def __call__(self, problem: Problem, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> tuple[str, Checked]:
        """Decode a response as the trainer's reward sees it, without special tokens, and check it."""
        text, extra_info = self._decoded(problem, prompt_ids, response_ids)
        return text, self.reward(problem, text, extra_info)

    def many(self, asked: Iterable[tuple[Problem, Sequence[int], Sequence[int]]]) -> Iterator[tuple[str, Checked]]:
        """Call for many responses, several at a time; yields in their order."""
        decoded = [(problem, *self._decoded(problem, *ids)) for problem, *ids in asked]
        with ThreadPoolExecutor(self.reward.threads) as threads:
            yield from threads.map(lambda response: (response[1], self.reward(*response)), decoded)

    def _decoded(self, problem: Problem, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> tuple[str, Any]:
        text = str(self._tokenizer.decode(list(response_ids), skip_special_tokens=True))
        return text, self._thoughts.extra_info(problem.extra_info, prompt_ids, response_ids)
