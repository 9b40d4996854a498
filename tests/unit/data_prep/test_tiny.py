"""The task of ``model=tiny`` and its pretraining: right answers, nothing shared between the splits, equal weights."""

import dataclasses
import random
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import arithmetic, steps, tiny
from recipe.skpo.method.segments import skip_prompt, split_bounds
from recipe.skpo.task.prompts import automatic_bos, problem_tokens
from reward_fns import compute_score

SMALL = tiny.Settings(documents=320, batch=16, width=64, feed_forward=64, layers=1)
OPERATION = re.compile(r"(\d+)([+-])(\d+)=(\d+)")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The rows of the task, by split."""
    paths = steps.prepare(tmp_path_factory.mktemp("steps"))
    return {split: pq.read_table(path).to_pylist() for split, path in paths.items()}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.build_tokenizer()


def questions(prompts: list[str]) -> set[str]:
    return {prompt.partition("<|user|>")[2].removesuffix("<|assistant|>") for prompt in prompts}


# ---------------------------------------------------------------- the task


def test_the_answers_are_right(rows) -> None:
    assert {split: len(found) for split, found in rows.items()} == {"train": 2048, "val": 256}
    for row in [*rows["train"], *rows["val"]]:
        first, *others = re.findall(r"[+-]?\d+", row["extra_info"]["question"])
        assert row["prompt"] == [{"role": "user", "content": row["extra_info"]["question"]}]
        assert row["reward_model"]["ground_truth"] == str(sum(map(int, [first, *others])))
        assert len(others) == steps.TERMS - 1


def test_a_written_solution_is_right_line_by_line_and_rewarded() -> None:
    for expression in islice(steps.draw("pretraining", random.Random(3)), 200):
        totals = expression.totals()
        solution, wrong = (
            steps.solution(numbers, expression) for numbers in (totals, tiny.mistaken(totals, random.Random(4)))
        )
        lines = [tuple(match) for match in OPERATION.findall(solution)]
        assert len(lines) == steps.TERMS - 1
        for before, sign, operand, after in lines:
            assert int(after) == int(before) + int(sign + operand)
        scores = [
            compute_score(steps.DATA_SOURCE, text, str(totals[-1]), answer_format="any")["score"]
            for text in (solution, wrong)
        ]
        assert scores == [1.0, -1.0]


@pytest.mark.parametrize("seed", [1, 2])
def test_train_val_and_pretraining_share_no_problem(seed: int, tmp_path: Path) -> None:
    paths = steps.prepare(tmp_path, train=3000, val=600, seed=seed)
    asked = {
        split: {info["question"] for info in pq.read_table(path)["extra_info"].to_pylist()}
        for split, path in paths.items()
    }
    learned = questions([prompt for prompt, _ in islice(tiny.documents(tiny.Settings(seed=seed)), 20_000)])
    assert len(asked["train"]) == 3000 and len(asked["val"]) == 600 and len(learned) > 15_000
    assert not asked["train"] & asked["val"] and not (asked["train"] | asked["val"]) & learned


def test_an_impossible_number_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exist = arithmetic.count_expressions(steps.TERMS, steps.TERMS) / 16
    assert exist * 0.9 > steps.MOST_ROWS, "the last draws would not end"
    rows = f"must be 1 to {steps.MOST_ROWS}, since about 30,000 problems exist"
    for module, option, number, said in (
        (steps, "--val", 0, rows),
        (steps, "--train", steps.MOST_ROWS + 1, rows),
        (tiny, "--documents", -1, "must be 0, or 64 or more"),
        (tiny, "--documents", 63, "must be 0, or 64 or more"),
    ):
        assert module.main(["--out", str(tmp_path / "out"), option, str(number)]) == 1
        assert capsys.readouterr().err == f"error: {option} {number}: {said}\n"
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- tokenizer


@given(st.text())
def test_every_text_comes_back(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    if not any(token in text for token in tiny.SPECIAL_TOKENS):
        assert len(ids) == len(text.encode())


def test_the_chat_template_opens_the_models_turn_after_one_bos(tokenizer) -> None:
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
    ]
    ids = problem_tokens(tokenizer, chat)
    assert tokenizer.decode(ids) == "<s><|system|>S<|user|>1<|assistant|>2</s><|user|>3<|assistant|>"
    assert len(ids) == 11 and automatic_bos(tokenizer) == ids[0] == tokenizer.bos_token_id


# ---------------------------------------------------------------- pretraining


def test_the_documents_have_skip_prompts_as_the_recipe_builds_them(tokenizer) -> None:
    settings, with_segment, wrong = tiny.Settings(), 0, 0
    for prompt, solution in islice(tiny.documents(settings), 2000):
        segment, _, rest = prompt.removeprefix("<s>").partition("<|user|>")
        problem = [{"role": "user", "content": rest.removesuffix("<|assistant|>")}]
        ids = tokenizer(prompt).input_ids
        assert ids == skip_prompt(
            tokenizer(segment).input_ids, problem_tokens(tokenizer, problem), automatic_bos(tokenizer)
        )
        first, last = split_bounds(len(tokenizer(solution).input_ids))
        if segment:
            with_segment += 1
            wrong += not solution.startswith(segment)
            assert first <= len(segment) <= last
    assert with_segment / 2000 == pytest.approx(settings.skip_share, abs=0.04)
    # A wrong total may come behind the segment.
    assert 0.1 < wrong / with_segment < settings.wrong_share


def test_the_model_learns_the_solutions_alone(tokenizer) -> None:
    ids, targets = tiny.encode(tokenizer, [("<s><|user|>1+2<|assistant|>", "3</s>"), ("<s>", "45</s>")])
    assert [tokenizer.decode(row) for row in ids.tolist()] == [
        "<s><|user|>1+2<|assistant|>3</s>",
        "<s>45</s>" + "<pad>" * 4,
    ]
    learned = [[token for token in row if token != -100] for row in targets.tolist()]
    assert [tokenizer.decode(row) for row in learned] == ["3</s>", "45</s>"]
    assert ((targets == ids) | (targets == -100)).all()


def test_equal_settings_make_equal_models_and_leave_the_callers_torch_alone(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = torch.get_rng_state(), torch.get_num_threads()
    folders = {
        "first": SMALL,
        "second": SMALL,
        "other seed": dataclasses.replace(SMALL, seed=2),
        "untrained": dataclasses.replace(SMALL, documents=0),
    }
    bytes_of = {}
    for name, settings in folders.items():
        tiny.prepare(tmp_path / name, settings)
        bytes_of[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert bytes_of["first"] == bytes_of["second"]
    assert len(set(bytes_of.values())) == 3
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]

    losses = []
    for name in ("untrained", "first"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        ids, targets = tiny.encode(tokenizer, list(islice(tiny.documents(tiny.Settings(seed=9)), 64)))
        losses.append(model(input_ids=ids, labels=targets).loss.item())
    assert losses[1] < losses[0] - 0.2
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_other_settings_have_another_folder() -> None:
    changed = [
        dataclasses.replace(tiny.Settings(), **{field.name: getattr(tiny.Settings(), field.name) + 1})
        for field in dataclasses.fields(tiny.Settings)
    ]
    assert len({tiny.folder_name(settings) for settings in (None, *changed)}) == len(changed) + 1
    assert tiny.folder_name() == tiny.folder_name(tiny.Settings())
