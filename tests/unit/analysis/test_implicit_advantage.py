"""Values along correct responses: states, numbers, local evaluator."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.skpo.analysis import implicit_advantage
from recipe.skpo.analysis.implicit_advantage import (
    MeasureConfig,
    Response,
    SampleConfig,
    State,
    cut_lengths,
    measure,
    read_responses,
    sample,
    shared_problems,
    state_values,
    states_of,
    summary,
    tabulate,
)
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.problems import Problem
from recipe.skpo.evaluation.sampling import Completion
from recipe.skpo.task.model_files import load_tokenizer
from tests.unit.analysis.conftest import SOURCE, FakeSampler, engine, replace_weights, reward


def problem(number: int = 1) -> Problem:
    text = f"{number} + {number}?"
    return Problem(f"id{number}", SOURCE, ({"role": "user", "content": text},), str(2 * number))


def no_question(_: Any) -> None:
    raise AssertionError("a local evaluator costs nothing, nobody is asked")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(method: str, number: int = 1, response: str | None = None, **changes: Any) -> dict[str, Any]:
    text = response or f"{number} and {number} is {2 * number} .\n#### {2 * number}"
    values = {"method": method, "id": f"id{number}", "data_source": SOURCE, "problem": f"{number} + {number}?"}
    return values | {"answer": str(2 * number), "response": text} | changes


# ---------------------------------------------------------------- states


def test_cuts_are_at_word_ends_and_begin_with_nothing() -> None:
    text = "5 cups + 6 = 11"
    assert [text[:end] for end in cut_lengths(text, 6)] == ["", "5", "5 cups", "5 cups +", "5 cups + 6", "5 cups + 6 ="]
    assert [text[:end] for end in cut_lengths(text, 3)] == ["", "5 cups", "5 cups + 6"]
    assert ["one two"[:end] for end in cut_lengths("one two", 4)] == ["", "", "one", "one"]


def test_marks_numbers_and_commands_are_not_split() -> None:
    text = "so \\frac{1}{2} is 0.5, 1,200 .\n#### 7"
    pieces = ["so", " \\frac", "{", "1", "}{", "2", "}", " is", " 0.5", ",", " 1,200", " .", "\n####", " 7"]
    assert "".join(pieces) == text
    ends = [*cut_lengths(text, len(pieces)), len(text)]
    assert [text[a:b] for a, b in itertools.pairwise(ends)] == pieces


@given(st.text(max_size=60), st.integers(1, 120))
def test_cuts_rise_stay_inside_any_text_and_split_no_word(text: str, positions: int) -> None:
    lengths = cut_lengths(text, positions)
    assert len(lengths) == positions and lengths[0] == 0 and lengths == sorted(lengths)
    assert lengths[-1] < len(text) or not text.split()
    for end in lengths:
        assert not (0 < end < len(text) and text[end - 1].isalnum() and text[end].isalnum())


def test_same_text_of_the_same_problem_is_one_state() -> None:
    first, second = State(problem(1), "1 and", 3), State(problem(1), "1 and", 9)
    assert first.key == second.key
    assert len({first.key, State(problem(2), "1 and", 3).key, State(problem(1), "1 an", 3).key}) == 3
    chat = Problem("id1", SOURCE, ({"role": "user", "content": "Other words"},), "2")
    assert State(chat, "1 and", 3).key != first.key


# ---------------------------------------------------------------- numbers


def test_value_counts_the_partial_response_with_each_continuation() -> None:
    state = State(problem(1), "#### ", 1)
    completions = [Completion((), text, "stop") for text in ("2", "3", "2", "2")]
    assert state_values([state], {state.key: completions}, reward()) == {state.key: 0.5}


def test_advantage_is_the_difference_to_the_mean_over_methods_of_the_same_problem() -> None:
    """Two methods, two problems, one position after the start; by hand."""
    responses = [
        Response("a", problem(1), "a1 x"),
        Response("a", problem(1), "a2 x"),
        Response("a", problem(2), "a3 x"),
        Response("b", problem(1), "b1 x"),
        Response("b", problem(2), "b2 x"),
    ]
    given = {"a1": 1.0, "a2": 0.0, "a3": 0.2, "b1": -0.5, "b2": 0.4}
    values = {}
    for response in responses:
        start, middle = states_of(response, 2)
        values[start.key] = 0.1 if response.problem.id == "id1" else 0.3
        values[middle.key] = given[middle.partial]
    table = tabulate(responses, 2, values).set_index(["method", "position"])
    # Problem 1: a has the mean of its two responses, 0.5, and b -0.5; problem 2: 0.2 and 0.4.
    expected = {
        ("a", 0.5): {
            "value": 0.35,
            "advantage": (0.5 - 0.1) / 2,
            "value_se": np.std([0.5, 0.2], ddof=1) / np.sqrt(2),
            "advantage_se": np.std([0.5, -0.1], ddof=1) / np.sqrt(2),
        },
        ("b", 0.5): {"value": -0.05, "advantage": -(0.5 - 0.1) / 2},
        ("a", 0.0): {"value": 0.2, "advantage": 0.0},
    }
    for place, numbers in expected.items():
        assert table.loc[place, list(numbers)].to_dict() == pytest.approx(numbers)
    assert (table["problems"] == 2).all()


def test_summary_says_in_which_quarter_the_advantage_lies() -> None:
    rows = [("a", i / 8, 0.5, 1.0 if i >= 6 else 0.0, 0.0, 0.0, 3) for i in range(8)]
    columns = ["method", "position", "value", "advantage", "value_se", "advantage_se", "problems"]
    numbers = summary(pd.DataFrame(rows, columns=columns), 7)
    assert numbers["a"]["advantage_by_quarter"] == [0.0, 0.0, 0.0, 1.0]
    assert numbers["a"]["value"] == 0.5 and numbers["problems"] == 3 and numbers["states"] == 7


def test_only_problems_with_a_response_of_every_method_count() -> None:
    responses = [Response("a", problem(n), "x") for n in (1, 2)] + [Response("b", problem(n), "x") for n in (2, 3)]
    assert [(item.method, item.problem.id) for item in shared_problems(responses)] == [("a", "id2"), ("b", "id2")]
    with pytest.raises(ConfigError, match=r"no problem has a correct response of every method \(a, b\)"):
        shared_problems([responses[0], responses[3]])
    with pytest.raises(ConfigError, match="no problem"):
        shared_problems([])


# ---------------------------------------------------------------- prepared files


def test_prepared_file_needs_four_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("a", id=None, data_source=None), row("a", response="#### 3")]
    (response,) = read_responses(write(tmp_path / "r.jsonl", rows), reward(), SOURCE)
    assert response.problem.messages == ({"role": "user", "content": "1 + 1?"},)
    assert len(response.problem.id) == 16 and response.problem.data_source == SOURCE
    assert "1 of 2 responses are not correct" in capsys.readouterr().out
    parquet = tmp_path / "r.parquet"
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "1 + 1?"}]
    pq.write_table(pa.Table.from_pylist([row("a", prompt=chat)]), parquet)
    assert read_responses(parquet, reward())[0].problem.messages == tuple(chat)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"method": "a"}', "row 0: column 'problem' is None"),
        (json.dumps(row("a", answer=7)), "row 0: column 'answer' is 7"),
        (json.dumps(row("a", data_source=None)), "row 0: has no data_source"),
        (json.dumps(row("a", response="")) + "x", "cannot be read"),
        ("[1]", "row 0: is not an object"),
        (json.dumps(row("a", prompt=["x"])), "row 0: column 'prompt'"),
        (json.dumps(row("a", data_source="unknown/source")), "row 0: data_source 'unknown/source' has no reward"),
    ],
)
def test_bad_file_is_named_with_row_and_column(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "r.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"--responses .*r.jsonl: {message}"):
        read_responses(tmp_path / "r.jsonl", reward())


# ---------------------------------------------------------------- sample and measure


def test_sample_keeps_the_first_correct_responses_of_each_method(
    tmp_path: Path, model_folder: Path, problems_file: Path
) -> None:
    tokenizer = load_tokenizer(str(model_folder))

    def script(prompt: str, seed: int) -> str:
        number = int(prompt.split("user\n")[1].split()[0])
        return f"try {seed} #### {2 * number if seed % 2 else 'none'}"

    opened: list[FakeSampler] = []

    def open_sampler(folder: str) -> FakeSampler:
        assert folder == str(model_folder)
        opened.append(FakeSampler(tokenizer, script))
        return opened[-1]

    config = SampleConfig(
        methods={"one": str(model_folder), "two": str(model_folder)},
        data=problems_file,
        engine=engine(),
        problems=3,
        responses=4,
        keep=2,
    )
    (path,) = sample(config, tmp_path / "out", open_sampler)
    responses = read_responses(path, reward())
    assert len(responses) == 2 * 3 * 2
    assert [response.method for response in responses] == ["one"] * 6 + ["two"] * 6
    assert all(reward()(response.problem, response.text).right for response in responses)
    assert len(opened) == 2 and all(sampler.closed for sampler in opened)
    # The methods' draws are independent: same model, other seeds.
    assert {r.text for r in responses if r.method == "one"} != {r.text for r in responses if r.method == "two"}
    sample(config, tmp_path / "out", lambda folder: pytest.fail("everything is stored"))


def test_other_weights_at_the_same_path_are_another_model(
    tmp_path: Path, own_model: Path, model_folder: Path, problems_file: Path
) -> None:
    sampler = FakeSampler(load_tokenizer(str(own_model)), lambda prompt, seed: "#### 2")
    drawing = SampleConfig(
        methods={"one": str(model_folder), "two": str(own_model)}, data=problems_file, engine=engine()
    )
    measuring = measure_config(write(tmp_path / "r.jsonl", [row("a"), row("b")]), own_model)

    def draw() -> None:
        sample(drawing, tmp_path / "drawn", lambda _: sampler)

    def value() -> None:
        measure(measuring, tmp_path / "measured", no_question, lambda _: sampler)

    draw()
    value()
    replace_weights(own_model)
    with pytest.raises(ConfigError, match=r"made with weights.two='\w+', now"):
        draw()
    with pytest.raises(ConfigError, match=r"made with weights.model='\w+', now"):
        value()


def measure_config(path: Path, model: Path, **changes: Any) -> MeasureConfig:
    values: dict[str, Any] = {"responses": (path,), "positions": 5, "samples": 3, "max_tokens": 12}
    return MeasureConfig(**(values | {"model": str(model), "engine": engine()} | changes))


def test_measure_locally_continues_each_state_once(tmp_path: Path, model_folder: Path, capsys) -> None:
    path = write(tmp_path / "r.jsonl", [row("a", n) for n in (1, 2)] + [row("b", n, f"#### {2 * n}") for n in (1, 2)])
    tokenizer = load_tokenizer(str(model_folder))
    # The evaluator knows the answer once the response has begun.
    sampler = FakeSampler(tokenizer, lambda prompt, seed: "" if prompt.endswith("assistant\n") else "\n#### 2")
    config = measure_config(path, model_folder)
    files = measure(config, tmp_path / "out", no_question, lambda folder: sampler)
    written = {f"implicit_advantage.{suffix}" for suffix in ("png", "svg", "json")} | {"by_position.csv", "config.json"}
    assert {file.name for file in files} == written
    prompts = [tokenizer.decode(prompt) for call in sampler.calls for prompt in call["prompts"]]
    assert len(prompts) == len(set(prompts))
    assert prompts[0].endswith("assistant\n") and prompts[1].endswith("assistant\n1")
    table = pd.read_csv(tmp_path / "out/by_position.csv").set_index(["method", "position"])
    assert (table.loc[[("a", 0.0), ("b", 0.0)], "value"] == -1).all()
    # Of the two problems' answers, 2 and 4, the evaluator knows one.
    assert table.loc[("a", 0.2), "value"] == 0.0
    assert (table.groupby("position")["advantage"].sum().abs() < 1e-9).all()
    said = re.search(r"^b +value (\S+)   advantage .*by quarter( +[+-]\d\.\d+){4}$", capsys.readouterr().out, re.M)
    assert said and float(said[1]) == pytest.approx(table.loc["b", "value"].mean(), abs=5e-4)


def test_measure_again_with_more_positions_uses_what_is_stored(tmp_path: Path, model_folder: Path) -> None:
    path = write(tmp_path / "r.jsonl", [row("a"), row("b", response="well , it is #### 2")])
    tokenizer = load_tokenizer(str(model_folder))
    first, second = (FakeSampler(tokenizer, lambda prompt, seed: "#### 2") for _ in range(2))

    def measure_with(sampler: FakeSampler, positions: int, prompts_per_call: int = 1) -> None:
        serving = engine(prompts_per_call=prompts_per_call)
        config = measure_config(path, model_folder, positions=positions, engine=serving)
        measure(config, tmp_path / "out", no_question, lambda _: sampler)

    measure_with(first, 2)
    measure_with(second, 4)
    asked, before = ({tuple(prompt) for call in s.calls for prompt in call["prompts"]} for s in (second, first))
    assert asked and not asked & before
    with pytest.raises(ConfigError, match=r"engine\.prompts_per_call"):
        measure_with(second, 4, prompts_per_call=2)


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["measure", "--responses", "x.jsonl"], "--model, --base-url: give one of them"),
        (["measure", "--responses", "x.jsonl", "--model", "m", "--positions", "0"], "--positions"),
        (["measure", "--responses", "x.jsonl", "--model", "m", "--temperature", "0"], "--temperature"),
        (["measure", "--responses", "x.jsonl", "--model", "m"], "--responses x.jsonl: file not found"),
        (["measure", "--responses", "x", "--base-url", "https://me:secret@host/v1", "--evaluator", "e"], "--base-url"),
        (["measure", "--responses", "x", "--base-url", "ftp://host"], "--base-url: must be like"),
        (["measure", "--responses", "x", "--base-url", "https://host/v1"], "--evaluator: is empty"),
        (
            [
                "measure",
                "--responses",
                "x",
                "--base-url",
                "https://h",
                "--evaluator",
                "e",
                "--custom-chat-template",
                "x",
            ],
            "--custom-chat-template: an endpoint has a template of its own; leave it out",
        ),
        (["sample", "--method", "a=x", "--method", "a=y", "--data", "d"], "--method: a name is there twice"),
        (["sample", "--method", "a=x", "--data", "d", "--keep", "0"], "--keep"),
    ],
)
def test_bad_flags_are_one_line(refusal: Any, arguments: list[str], start: str) -> None:
    message = refusal(implicit_advantage.main, arguments)
    assert message.startswith(start) and "secret" not in message


def test_method_argument_must_have_a_name(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        implicit_advantage.main(["sample", "--method", "folder", "--data", "d", "--out", str(tmp_path)])
