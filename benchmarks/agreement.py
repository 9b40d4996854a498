"""Compare our reward with verl's own scorers on the same outputs: a table by kind of output, with examples of errors.

The outputs are made from the golds of a data file (parquet of `data_prep`, or MATH-500's jsonl): the answer boxed as it
is, boxed in another notation, boxed and wrong (`perturbations`), on a line "Answer: ...", after "####". The right
verdict is known for each output. An answer in none of the forms counts as wrong.

    python -m benchmarks.agreement FILE [--wrong 2000] [--seed 1] [--examples 1]
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import math_verify
import pandas as pd
import pyarrow.parquet as pq
import sympy

from benchmarks.perturbations import perturbed
from data_prep.untrusted import parse_json
from recipe.skpo.output.console import markdown_table
from reward_fns import NUMBER_SOURCES, compute_score, judge


@dataclass(frozen=True)
class Output:
    """A response with its ground truth, whether it is right, and how it was made."""

    text: str
    truth: str
    right: bool
    kind: str


@dataclass(frozen=True)
class Gold:
    """A ground truth; `solution` is the worked one, "" if the file has none."""

    data_source: str
    answer: str
    solution: str


def rewritten(answer: str) -> Iterator[tuple[str, str]]:
    """Yield other notations of the same answer with their names; none if a rewrite is not certain."""
    plain = re.fullmatch(r"-?[0-9]+", answer)
    if "\\frac" in answer:
        yield "dfrac", answer.replace("\\frac", "\\dfrac")
    fraction = re.fullmatch(r"(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}", answer)
    if fraction:
        yield "slash fraction", f"{fraction[1]}{fraction[2]}/{fraction[3]}"
        if 10**6 % int(fraction[3]) == 0:
            yield "decimal", f"{fraction[1]}{int(fraction[2]) / int(fraction[3])}"
    if plain:
        yield "decimal", f"{answer}.0"
        yield "unit", f"{answer} \\text{{ units}}"
        yield "equation", f"x = {answer}"
        if abs(int(answer)) >= 1000:
            yield "thousands", f"{int(answer):,}"
    if plain or fraction:
        yield "dollars", f"${answer}$"
    if re.fullmatch(r"-?[0-9]+(, ?-?[0-9]+)+", answer) and not re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+", answer):
        yield "other order", ",".join(reversed(re.split(r", ?", answer)))
    if answer.startswith(("(", "[")) and answer.endswith((")", "]")):
        yield "left right", f"\\left{answer[:-1]}\\right{answer[-1]}"
    text = re.fullmatch(r"\\text\{([a-zA-Z ]+)\}", answer)
    if text:
        yield "bare text", text[1]
    if "\\circ" in answer:
        yield "no degree sign", re.sub(r"\^\{?\\circ\}?", "", answer)
    for other in sorted(rearranged(answer)):
        yield "algebra", other


def rearranged(answer: str) -> set[str]:
    """Return a gold with a variable as sympy writes it: expanded, factored, over one denominator, in partial fractions.

    math-verify parses the gold, so that our own misreadings cannot hide; it ignores the case of letters.
    """
    if re.search(r"[A-Z]|\\(?:text|mbox|in)|[a-z]{4}", re.sub(r"\\[a-z]*frac|\\sqrt|\\left|\\right", "", answer)):
        return set()
    parsed = math_verify.parse(f"${answer}$", parsing_timeout=None)
    value = parsed[0] if parsed else None
    written = value.args if isinstance(value, sympy.Eq) else (value,)
    sides = [side for side in written if isinstance(side, sympy.Expr)]
    if len(sides) < len(written) or not any(side.free_symbols for side in sides):
        return set()
    texts = set()
    for rewrite in (sympy.expand, sympy.factor, sympy.together, sympy.apart):
        try:
            texts.add("=".join(sympy.latex(rewrite(side.doit())) for side in sides))
        except (NotImplementedError, sympy.PolynomialError):
            continue  # partial fractions of more than one variable
    return texts


def read_golds(file: Path) -> list[Gold]:
    """Read the golds of a parquet file of `data_prep`, or of a jsonl file with `answer` and `solution`."""
    if file.suffix == ".parquet":
        table = pq.read_table(file, columns=["data_source", "reward_model"]).to_pylist()
        return [Gold(row["data_source"], row["reward_model"]["ground_truth"], "") for row in table]
    rows = [parse_json(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [Gold("HuggingFaceH4/MATH-500", str(row["answer"]), row.get("solution", "")) for row in rows]


def make_outputs(golds: Sequence[Gold], wrong: int, seed: int) -> list[Output]:
    """Return right outputs in several forms of every gold, and `wrong` wrong ones."""
    outputs: list[Output] = []
    for gold in golds:
        if gold.solution:
            outputs.append(Output(gold.solution, gold.answer, True, "gold solution"))
        outputs.append(Output(f"Thus \\boxed{{{gold.answer}}}.", gold.answer, True, "boxed"))
        outputs += [
            Output(f"Thus \\boxed{{{other}}}.", gold.answer, True, f"boxed: {name}")
            for name, other in rewritten(gold.answer)
        ]
        outputs.append(Output(f"So it is.\nAnswer: {gold.answer}", gold.answer, True, "answer line"))
        outputs.append(Output(f"So it is.\n#### {gold.answer}", gold.answer, True, "after ####"))
        outputs.append(
            Output(f"We try \\boxed{{{gold.answer}}}. No: \\boxed{{77777}}.", gold.answer, False, "two boxes")
        )
        outputs.append(Output(f"It is {gold.answer}", gold.answer, False, "no form"))
    for truth, answer, kind in perturbed([gold.answer for gold in golds], wrong, seed):
        outputs.append(Output(f"Thus \\boxed{{{answer}}}.", truth, False, f"wrong: {kind}"))
    return outputs


def scorers(data_source: str) -> dict[str, Callable[[Output], bool]]:
    """Return the scorers by name: ours first, then verl's own for such answers."""
    from verl.utils.reward_score import gsm8k, math_dapo, math_reward, math_verify

    ours = {"ours": lambda output: bool(compute_score(data_source, output.text, output.truth)["acc"])}
    if data_source in NUMBER_SOURCES:
        return ours | {
            "gsm8k": lambda output: gsm8k.compute_score(output.text, output.truth) > 0,
            "gsm8k flexible": lambda output: gsm8k.compute_score(output.text, output.truth, method="flexible") > 0,
        }

    def dapo(output: Output) -> bool:
        result: Any = math_dapo.compute_score(output.text, output.truth)  # annotated as a float, which it is not
        return bool(result["acc"])

    return ours | {
        "math_reward": lambda output: math_reward.compute_score(output.text, output.truth) > 0,
        "math_verify": lambda output: math_verify.compute_score(output.text, output.truth) > 0,
        "math_dapo": dapo,
    }


def compare(golds: Sequence[Gold], wrong: int, seed: int, examples: int) -> str:
    """Return the tables as Markdown text."""
    outputs = make_outputs(golds, wrong, seed)
    judges = scorers(golds[0].data_source)
    verdicts = pd.DataFrame([{name: judge(output) for name, judge in judges.items()} for output in outputs])
    made = pd.DataFrame(outputs)
    correct = verdicts.eq(made["right"], axis=0)
    rows, errors = [], []
    for kind, group in made.groupby("kind"):
        shares = correct.loc[group.index].mean()
        right = "yes" if group["right"].all() else "no"
        rows.append([str(kind), right, str(len(group)), *map("{:.3f}".format, shares)])
        for name in sorted(judges):
            for output in group[~correct.loc[group.index, name]].head(examples).itertuples():
                errors.append(f"- {name}, {kind}: truth `{output.truth}`, output `{output.text[-90:]!r}`")
    agreement = verdicts.drop(columns="ours").eq(verdicts["ours"], axis=0).mean()
    agreed = ", ".join(f"{name} {share:.3f}" for name, share in agreement.items())
    summary = f"\nAgreement with ours on all {len(outputs)} outputs: {agreed}"
    return "\n".join([markdown_table(["output", "right?", "count", *judges], rows, numbers=True), summary, *errors])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description="Our reward beside verl's.")
    options.add_argument("file", type=Path, help="parquet of data_prep, or jsonl with answer and solution")
    options.add_argument("--wrong", type=int, default=2000, help="perturbed answers (default %(default)s)")
    options.add_argument("--seed", type=int, default=1, help="of the perturbations (default %(default)s)")
    options.add_argument("--examples", type=int, default=1, help="errors shown per kind and scorer")
    given = options.parse_args(argv)
    try:
        print(compare(read_golds(given.file), given.wrong, given.seed, given.examples))
    finally:
        judge.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
