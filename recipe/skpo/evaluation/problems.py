"""Problems of a data file as the analyses need them: chat, answer, and the reward of a response to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.hub import quiet_hub
from data_prep.schema import DataError, check_parquet
from data_prep.untrusted import one_line
from recipe.skpo.evaluation.output import AnalysisError, require
from recipe.skpo.task.run_settings import Chat
from reward_fns import compute_score


@dataclass(frozen=True)
class Problem:
    """One row of a data file.

    Attributes:
        id: stable id.
        data_source: chooses the answer check.
        messages: the chat, dictionaries of role and content.
        answer: ground truth.
        answer_format: in which answers count (``reward_fns.forms``).
    """

    id: str
    data_source: str
    messages: tuple[dict[str, str], ...]
    answer: str
    answer_format: str = "any"

    @property
    def text(self) -> str:
        """The last message, which asks the question."""
        return self.messages[-1]["content"]

    def check(self, response: str, extra_info: dict[str, Any] | None = None) -> "Checked":
        """Reward and answer of a response; ``extra_info`` as ``ThoughtReader`` gives it."""
        result = compute_score(self.data_source, response, self.answer, extra_info, self.answer_format)
        return Checked(float(result["score"]), canonical(str(result["pred"])))


@dataclass(frozen=True)
class Checked:
    """A response's reward, -1 or +1, and its extracted answer, "" where there is none."""

    reward: float
    answer: str


def canonical(answer: str) -> str:
    """Answers that are the same number become the same text: 5, 5.0 and +5 are "5"."""
    stripped = answer.strip()
    try:
        number = Decimal(stripped)
    except InvalidOperation:
        return stripped
    # "NaN" and "Infinity" are decimals too, but words here.
    return format(number.normalize() + 0, "f") if number.is_finite() else stripped


def read_problems(path: Path, count: int | None = None, answer_format: str = "any") -> list[Problem]:
    """The first ``count`` problems of a parquet file (``data_prep.schema``); None takes all.

    Raises:
        AnalysisError: naming file, row or column, and the fix.
    """
    try:
        table = check_parquet(path, role="val")
    except DataError as error:
        raise AnalysisError(str(error).replace("data.val_files:", "--data", 1)) from None
    rows = table.slice(0, count).to_pylist()
    problems = [
        Problem(
            row["id"],
            row["data_source"],
            tuple({"role": message["role"], "content": message["content"]} for message in row["prompt"]),
            str(row["reward_model"]["ground_truth"]),
            answer_format,
        )
        for row in rows
    ]
    check_answers(problems, f"--data {path}")
    return problems


def check_answers(problems: Sequence[Problem], where: str) -> None:
    """See that every problem's answer can be checked, before anything is drawn.

    Raises:
        AnalysisError: naming the row and what its reward function says.
    """
    for row, problem in enumerate(problems):
        try:
            problem.check("")
        except ValueError as error:
            raise AnalysisError(f"{where}: row {row}: {error}") from None


def load_tokenizer(model: str, chat: Chat | None = None) -> Any:
    """The tokenizer of a Hugging Face folder or name.

    Args:
        model: folder or name.
        chat: template and options that ``apply_chat_template`` is to use; None is the tokenizer's own template.

    Raises:
        AnalysisError: none can be loaded, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_hub():
            tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise AnalysisError(
            f"{model}: no tokenizer can be loaded ({one_line(error)}); name a Hugging Face folder"
        ) from None
    if chat is not None:
        tokenizer.chat_template = chat.custom_chat_template or tokenizer.chat_template
        # So that every prompt gets them, whoever builds it.
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **chat.chat_template_kwargs)
    require(
        bool(tokenizer.chat_template),
        f"{model}: its tokenizer has no chat template; name an instruct model, or give a custom chat template",
    )
    return tokenizer
