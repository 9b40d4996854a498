"""Benchmarks to validate with, one parquet file each; `BENCHMARKS` lists them.

`--source` is a file for one benchmark, or a folder with `<name>.jsonl` (.json, .parquet, .csv) files; without it, each
comes from its place on the hub. A folder is taken for those that it has, unless `--names` asks for others.

Problems that are in more than one benchmark are kept and counted: each benchmark is reported as it is.

    python -m data_prep.benchmarks --out DIR [--names aime24 math500 ...] [--source FILE_OR_FOLDER] [--template boxed]
"""

import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from data_prep import code, command, gsm8k
from data_prep.leakage import normalised
from data_prep.math import boxed_problem, whole
from data_prep.pipeline import Collected, Problem, RowError, Source, read_split, sample, text_field, write_problems
from data_prep.reading import SUFFIXES
from data_prep.schema import DataError
from reward_fns.near_answer import with_tolerance

LETTERS = "ABCDEFGHIJ"


def integer_problem(fields: Mapping[str, Any], data_source: str) -> Problem:
    """Convert the fields `problem` and `answer`; the answer is an integer ("033" counts as 33)."""
    answer = fields.get("answer")
    text = whole(answer) if isinstance(answer, int | float) else text_field(fields, "answer").replace(",", "")
    try:
        value = int(text)
    except ValueError as error:
        raise RowError(f"field 'answer' is not an integer (found {text!r:.60})") from error
    return Problem(data_source, text_field(fields, "problem", "question"), str(value))


def olympiad_problem(fields: Mapping[str, Any], data_source: str) -> Problem | None:
    """Convert the fields `question`, `context`, `final_answer` (a list), `error` (a tolerance of the number, or none).

    Returns:
        None for images, other subjects and languages, proofs.
    """
    kind = {"subject": "Math", "language": "English", "modality": "Text-only", "question_type": "Open-ended"}
    if any(fields.get(name) not in (None, value) for name, value in kind.items()):
        return None
    if any(fields.get(f"image_{number}") for number in range(1, 10)):
        return None
    answers = fields.get("final_answer")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise RowError(f"field 'final_answer' is not a list of strings (found {answers!r:.60})")
    context = fields.get("context")
    question = text_field(fields, "question")
    answer = ", ".join(answer.strip().strip("$").strip() for answer in answers)
    if fields.get("error"):
        try:
            answer = with_tolerance(answer, str(fields["error"]).strip())
        except ValueError as error:
            raise RowError(f"field 'error': {error}") from error
    return Problem(
        data_source,
        f"{context.strip()}\n\n{question}" if isinstance(context, str) and context.strip() else question,
        answer,
    )


def choice_problem(fields: Mapping[str, Any], data_source: str) -> Problem:
    """Convert the fields `question`, `options` (at most ten) and `answer` (a letter); the question gets the options."""
    options, letter = fields.get("options"), text_field(fields, "answer")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise RowError(f"field 'options' is not a list of strings (found {options!r:.60})")
    if len(options) > len(LETTERS) or letter not in tuple(LETTERS[: len(options)]):
        raise RowError(f"answer {letter!r:.20} is not a letter of {len(options)} options")
    if fields.get("answer_index") not in (None, LETTERS.index(letter)):
        raise RowError(f"answer {letter!r} and answer_index {fields['answer_index']!r} disagree")
    listed = "\n".join(f"({LETTERS[number]}) {option.strip()}" for number, option in enumerate(options))
    return Problem(data_source, f"{text_field(fields, 'question')}\n{listed}", letter, ability="multiple choice")


def gpqa_problem(fields: Mapping[str, Any], data_source: str) -> Problem:
    """Convert the fields `Question`, `Correct Answer` and `Incorrect Answer 1` to 3; the question draws their order."""
    question, right = text_field(fields, "Question"), text_field(fields, "Correct Answer")
    options = [right, *(text_field(fields, f"Incorrect Answer {number}") for number in (1, 2, 3))]
    if len(set(options)) < len(options):
        raise RowError("the right answer is among the wrong ones, or two of those are the same")
    random.Random(question).shuffle(options)
    answer = LETTERS[options.index(right)]
    return choice_problem({"question": question, "options": options, "answer": answer}, data_source)


_TARGET = re.compile(r"\(([A-Z])\)")
_OPTION = re.compile(r"^\(([A-Z])\) ", re.MULTILINE)


def bbh_problem(fields: Mapping[str, Any], data_source: str) -> Problem | None:
    """Convert the fields `input`, which ends with its options, and `target`, "(B)".

    Returns:
        None for tasks without options, or with more than ten.
    """
    question, target = text_field(fields, "input"), _TARGET.fullmatch(text_field(fields, "target"))
    listed = _OPTION.findall(question.rpartition("Options:")[2])
    if target is None or len(listed) > len(LETTERS):
        return None
    if target[1] not in listed:
        raise RowError(f"field 'target' is {target[0]}, not one of the options {', '.join(listed) or '(none)'}")
    return Problem(data_source, question, target[1], ability="multiple choice")


TEST = {"test": "test"}
TEST_IN_TRAIN = {"test": "train"}
"""On the hub, some benchmarks are one split called train."""

BENCHMARKS = {
    source.name: source
    for source in (
        Source("aime24", "HuggingFaceH4/aime_2024", "aime24", integer_problem, splits=TEST_IN_TRAIN),
        Source("aime25", "yentinglin/aime_2025", "aime25", integer_problem, splits=TEST_IN_TRAIN),
        Source("amc23", "math-ai/amc23", "amc23", boxed_problem, splits=TEST),
        Source("math500", "HuggingFaceH4/MATH-500", "HuggingFaceH4/MATH-500", boxed_problem, splits=TEST),
        Source("minerva_math", "math-ai/minervamath", "minerva_math", boxed_problem, splits=TEST),
        Source(
            "olympiadbench",
            "Hothan/OlympiadBench",
            "olympiadbench",
            olympiad_problem,
            splits=TEST_IN_TRAIN,
            hub_config="OE_TO_maths_en_COMP",
        ),
        Source("mmlu_pro", "TIGER-Lab/MMLU-Pro", "TIGER-Lab/MMLU-Pro", choice_problem, "choice", splits=TEST),
        Source(
            "gpqa",
            "Idavidrein/gpqa",
            "Idavidrein/gpqa",
            gpqa_problem,
            "choice",
            splits=TEST_IN_TRAIN,
            hub_config="gpqa_diamond",
        ),
        Source("bbh", "lukaemon/bbh", "lukaemon/bbh", bbh_problem, "choice", splits=TEST),
        *(
            Source(name, hub, hub, convert, code.TEMPLATE, splits=TEST)
            for name, hub, convert in (
                ("livecodebench", "livecodebench/code_generation_lite", code.livecodebench_problem),
                ("humaneval", "openai/openai_humaneval", code.humaneval_problem),
                ("humaneval_plus", "evalplus/humanevalplus", code.humaneval_problem),
                ("mbpp", "google-research-datasets/mbpp", code.mbpp_problem),
                ("mbpp_plus", "evalplus/mbppplus", code.mbpp_problem),
            )
        ),
        replace(gsm8k.SOURCE, splits=TEST),
    )
}


def benchmark(name: str) -> Source:
    """Return one of `BENCHMARKS`.

    Raises:
        DataError: for another name.
    """
    if name not in BENCHMARKS:
        raise DataError(f"benchmark {name!r} is unknown; known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def places(source: str | None, names: Sequence[str] | None) -> dict[str, str | None]:
    """Find where each benchmark is read from (None: its place on the hub).

    Raises:
        DataError: one cannot be found.
    """
    chosen = [benchmark(name).name for name in names or BENCHMARKS]
    if source is None:
        return dict.fromkeys(chosen)
    if not Path(source).is_dir():
        if len(chosen) != 1:
            raise DataError(f"--source {source}: is not a folder; say with --names which one benchmark it is")
        return {chosen[0]: source}
    found: dict[str, str | None] = {}
    for name in chosen:
        files = [str(path) for suffix in SUFFIXES if (path := Path(source) / f"{name}{suffix}").is_file()]
        if len(files) > 1:
            raise DataError(f"{source}: {name} is there in several formats; keep one of {', '.join(files)}")
        if files:
            found[name] = files[0]
        elif names:
            raise DataError(f"{source}: has no {name}.jsonl, .json, .parquet or .csv")
    if not found:
        raise DataError(f"{source}: has no file named after a benchmark ({', '.join(BENCHMARKS)})")
    return found


def prepare(
    out: Path,
    *,
    names: Sequence[str] | None = None,
    source: str | None = None,
    limit: int | None = None,
    template: str | None = None,
    seed: int = 1,
    skip_bad: bool = False,
    from_date: str | None = None,
    until_date: str | None = None,
) -> dict[str, Path]:
    """Write ``out/<name>.parquet`` for each benchmark and return the paths by name.

    The arguments are the options of the command.
    """
    window = code.within(from_date, until_date)
    found = places(source, names)
    if (from_date or until_date) and "livecodebench" not in found:
        raise DataError("--from-date, --until-date: are for livecodebench, which is not among the benchmarks; name it")
    sources = BENCHMARKS | {"livecodebench": replace(BENCHMARKS["livecodebench"], convert=window)}
    collected = {name: read_split(sources[name], place, "test", skip_bad=skip_bad) for name, place in found.items()}
    for problems in collected.values():
        problems.problems = sample(problems.problems, limit, seed)
    paths = {name: out / f"{name}.parquet" for name in collected}
    for choice in dict.fromkeys(template or BENCHMARKS[name].template for name in collected):
        chosen = [name for name in collected if (template or BENCHMARKS[name].template) == choice]
        write_problems({paths[name]: ("test", collected[name]) for name in chosen}, choice)
    _report_shared(collected)
    return paths


def _report_shared(collected: Mapping[str, Collected]) -> None:
    texts = {name: {normalised(problem.question) for problem in split.problems} for name, split in collected.items()}
    for (name, here), (other, there) in combinations(texts.items(), 2):
        if here & there:
            print(f"note: {len(here & there)} problems are in {name} and in {other}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = command.parser("benchmarks", "Benchmarks as parquet files for validation.")
    options.add_argument("--names", nargs="+", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    code.add_dates(options)
    options.add_argument("--split", choices=["test"], default="test", help="a benchmark has no other")
    given = vars(options.parse_args(argv))
    del given["split"]
    return command.run(lambda: prepare(given.pop("out"), **given))


if __name__ == "__main__":
    sys.exit(main())
