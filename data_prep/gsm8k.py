"""GSM8K: 7,473 grade-school word problems for training, 1,319 for testing.

A solution ends in "#### number"; that number, without thousands commas, is the ground truth.

    python -m data_prep.gsm8k --out DIR [--source FOLDER] [--split train|test] [--template gsm8k]
"""

import sys
from collections.abc import Mapping
from typing import Any

from data_prep import command
from data_prep.pipeline import Problem, RowError, Source, text_field
from reward_fns import numeric_answer


def convert(fields: Mapping[str, Any], data_source: str) -> Problem:
    """Convert the fields `question` and `answer` (the worked solution)."""
    answer = numeric_answer.extract(text_field(fields, "answer"))
    if not answer:
        raise RowError("field 'answer' does not end in '#### number'")
    return Problem(data_source, text_field(fields, "question"), answer)


SOURCE = Source("gsm8k", "openai/gsm8k", "openai/gsm8k", convert, template="gsm8k", hub_config="main")

if __name__ == "__main__":
    sys.exit(command.main(SOURCE))
