"""DAPO-Math-17k: competition problems with integer answers, the training set of the paper.

The hub's file is verl's schema already, repeats every prompt about a hundred times (1.79 million rows, some 17,400
prompts), and wraps each problem in fixed sentences. Here the sentences are taken off, so that any template can be put
around the bare problem, and every problem is kept once. An answer that is not an integer is a malformed row.

There is no test split: give the benchmarks that you will report by `--against`, so that their problems are left out.

    python -m data_prep.dapo_math --out DIR [--source FILE] [--against BENCHMARKS] [--template boxed]
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

from data_prep import command
from data_prep.pipeline import Problem, RowError, Source, text_field

HUB = "BytedTsinghua-SIA/DAPO-Math-17k"
_BEFORE = re.compile(
    r"\s*Solve the following math problem step by step\. The last line of your response should be of the form "
    r"Answer: \S+ \(without quotes\) where \S+ is the answer to the problem\.",
)
_AFTER = re.compile(r'Remember to put your answer on its own line after "Answer:"\.?\s*\Z')


def bare_problem(prompt: str) -> str:
    """Take off the fixed sentences around a problem.

    Raises:
        RowError: only one of them is there, or nothing else is.
    """
    before, after = _BEFORE.match(prompt), _AFTER.search(prompt)
    if bool(before) != bool(after):
        raise RowError("the prompt has only one of the two sentences that DAPO puts around a problem")
    problem = prompt[before.end() : after.start()].strip() if before and after else prompt.strip()
    if not problem:
        raise RowError("the prompt holds no problem")
    return problem


def convert(fields: Mapping[str, Any], data_source: str) -> Problem:
    """Convert the fields `prompt` (a chat of one user message) and `reward_model` with `ground_truth`."""
    prompt, reward_model = fields.get("prompt"), fields.get("reward_model")
    if not isinstance(prompt, list) or len(prompt) != 1 or not isinstance(prompt[0], dict):
        raise RowError(f"field 'prompt' is not a chat of one message (found {prompt!r:.60})")
    if not isinstance(reward_model, dict):
        raise RowError(f"field 'reward_model' is missing or not a struct (found {reward_model!r:.60})")
    answer = text_field(reward_model, "ground_truth").replace(",", "")
    if not re.fullmatch(r"[+-]?[0-9]{1,40}", answer):
        raise RowError(f"ground_truth {answer!r:.60} is not an integer")
    return Problem(data_source, bare_problem(text_field(prompt[0], "content")), str(int(answer)))


SOURCE = Source("dapo_math", HUB, HUB, convert, splits={"train": "train"})

if __name__ == "__main__":
    sys.exit(command.main(SOURCE))
