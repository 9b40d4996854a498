"""Multiple choice with up to ten options, A to J (MMLU-Pro): the letter is the answer.

Read from wherever `forms` finds the final answer: "C", "(C)", "C.", "C) because", "\\text{(C)}", "option C". Without
such an answer a last line that is nothing but a letter counts in the format `any`.
"""

import re

from reward_fns.forms import answer_text

_WRAPPING = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)(?![a-zA-Z])|\\[()\[\]]|[{}$*]")
_LETTER = re.compile(r"\s*(?:(?:option|choice)\s+)?\(?([A-J])(?:[).:,]|\s*$|\s+[-–—(]|\s+because\b)")
_ALONE = re.compile(r"[\s*]*\(?([A-J])\)?[.\s*]*")


def check(text: str, ground_truth: str, answer_format: str = "any") -> tuple[str, bool]:
    """The letter ("" if none) and whether it is the right one.

    Raises ValueError if `ground_truth` is no letter from A to J, which is a fault of the data.
    """
    truth = ground_truth.strip()
    if not re.fullmatch("[A-J]", truth):
        raise ValueError(f"ground_truth {ground_truth!r} is no option; write a letter from A to J")
    answer = answer_text(text, answer_format)[:200]
    match = _LETTER.match(_WRAPPING.sub("", answer))
    if match is None and not answer and answer_format == "any":
        match = _ALONE.fullmatch(text.rstrip().rpartition("\n")[2][-40:])
    pred = match[1] if match else ""
    return pred, pred == truth
