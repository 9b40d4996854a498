"""Skip, continue or ignore a segment: requests, groups and numbers, with a sampler that has no model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data_prep.schema import Row, write_parquet
from recipe.skpo.analysis import shortcut
from recipe.skpo.analysis.shortcut import (
    Group,
    Plan,
    ShortcutConfig,
    canonical,
    run,
    split_position,
    summary,
    tabulate,
    take_segment,
)
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation import problems
from recipe.skpo.evaluation.engine import EngineConfig
from recipe.skpo.evaluation.problems import prompts_of, read_problems
from recipe.skpo.evaluation.sampling import Completion, read_completions
from recipe.skpo.method.segments import skip_prompt
from recipe.skpo.task.model_files import load_tokenizer
from tests.conftest import thinking_run
from tests.unit.analysis.conftest import FakeSampler, engine, replace_weights


def answer(prompt: str, seed: int) -> str:
    """Counts up to the seed's last digit, so that length and answer vary."""
    return "step " * (seed % 3 + 1) + f"#### {seed % 4}"


def config(model: Path, data: Path, **changes: Any) -> ShortcutConfig:
    values: dict[str, Any] = {"model": str(model), "data": data, "engine": engine(), "problems": 3, "group_size": 4}
    return ShortcutConfig(**(values | {"positions": 2, "max_tokens": 40} | changes))


def plain(lengths: Sequence[int], deviations: Sequence[float] | None = None) -> list[Completion]:
    deviations = deviations or [1.0] * len(lengths)
    return [
        Completion(tuple(range(10 * i, 10 * i + n)), "", "stop", (-d,) * n)
        for i, (n, d) in enumerate(zip(lengths, deviations, strict=True))
    ]


# ---------------------------------------------------------------- segments


def test_paper_setting_is_the_default() -> None:
    setting = config(Path("m"), Path("d"), positions=6, group_size=8)
    assert setting.shares == pytest.approx([1 / 6, 7 / 30, 3 / 10, 11 / 30, 13 / 30, 1 / 2])


def test_segment_is_taken_as_in_training_at_a_share_of_the_mean_length() -> None:
    """Median deviation, cut at the split; one that ended before it gives the first half of what it wrote."""
    assert split_position(0.5, plain([4, 9])) == 3 and split_position(1 / 6, plain([2, 2])) == 1
    assert take_segment(plain([6, 6, 6], [0.1, 0.9, 0.5]), 4).token_ids == (20, 21, 22, 23)
    assert take_segment(plain([4]), 4).token_ids == (0, 1)
    unfinished = [Completion((5, 6, 7, 8), "", "length", (-1.0,) * 4)]
    assert take_segment(unfinished, 4).token_ids == (5, 6, 7, 8)


# ---------------------------------------------------------------- prompts


@pytest.fixture
def plan_of(model_folder: Path, problems_file: Path) -> Any:
    def make(folder: Path = model_folder, **changes: Any) -> tuple[Plan, list[Any]]:
        setting, tokenizer = config(folder, problems_file, modes=shortcut.MODES, **changes), load_tokenizer(str(folder))
        problems = read_problems(problems_file, "--data", setting.problems)
        return Plan(setting, tokenizer, problems, prompts_of(problems, tokenizer, "--data")), problems

    return make


def test_each_mode_puts_the_segment_where_it_belongs(plan_of: Any, bos_model_folder: Path) -> None:
    plan, problems = plan_of(bos_model_folder)
    completions = {f"{p.id}/unconditional": plain([12, 12, 12, 12]) for p in problems}
    # Ids of the plain responses are byte tokens of the tokenizer, so that they decode.
    planned = plan.conditional(completions)
    requests = [*plan.plain(), *(item.request for item in planned)]
    assert len({request.key for request in requests}) == len(requests) == 3 + 3 * 2 * 3
    seeds = {request.seed + index for request in requests for index in range(4)}
    assert len(seeds) == 4 * len(requests)
    bos = plan.tokenizer.bos_token_id
    problem_ids = dict(zip([p.id for p in problems], [list(r.prompt_ids) for r in plan.plain()], strict=True))
    for item in planned:
        question, s = problem_ids[item.problem.id], list(item.segment.token_ids)
        prompt = list(item.request.prompt_ids)
        assert len(s) == item.split
        if item.mode == "skip":
            assert prompt == skip_prompt(s, question, bos) and prompt[0] == bos
            assert item.request.max_tokens == 40
        elif item.mode == "continual":
            assert prompt == question + s
            assert item.request.max_tokens == 40 - len(s)
        else:
            text, quoted = (plan.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, s))
            assert -1 < text.find(quoted) < text.find(item.problem.text)


def test_continual_response_is_the_segment_and_what_follows(plan_of: Any) -> None:
    plan, problems = plan_of()
    ids = plan.tokenizer("#### ", add_special_tokens=False)["input_ids"]
    two = plan.tokenizer("2", add_special_tokens=False)["input_ids"]
    group = plan.group(problems[1], [Completion(tuple(two), "2", "stop")], "continual", 0, 3, ids)
    assert group.answers == ("2",) and group.rewards == (1.0,)
    assert group.lengths == (len(ids) + 1,)


# ---------------------------------------------------------------- numbers


def make_group(mode: str = "skip", position: int | None = 0, **changes: Any) -> Group:
    values = {"answers": ("1", "2", "", ""), "rewards": (1.0, -1.0, -1.0, -1.0), "lengths": (1, 2, 3, 6)}
    return Group("p", mode, position, 3, **(values | changes))


def test_measures_of_a_group() -> None:
    expected = {"distinct": 3.0, "all_equal": 0.0, "length": 3.0, "accuracy": 0.25, "well_formed": 0.5}
    assert make_group().measures() == expected
    assert [make_group(rewards=(reward,) * 4).measures()["all_equal"] for reward in (1.0, -1.0)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("texts", "one"),
    [(("5", "5.0", "+5", " 5 "), "5"), (("100",), "100"), (("0.50",), "0.5"), (("-0",), "0")]
    + [((text,), text) for text in ("\\boxed{x}", "sNaN", "inf", "")],
)
def test_same_number_written_differently_is_one_answer(texts: tuple[str, ...], one: str) -> None:
    assert {canonical(text) for text in texts} == {one}


def test_means_and_standard_errors_over_problems() -> None:
    groups = [
        make_group("unconditional", None, lengths=(2, 2, 2, 2)),
        make_group("unconditional", None, lengths=(4, 4, 4, 4)),
        make_group(lengths=(1, 1, 1, 1)),
        make_group(lengths=(5, 5, 5, 5)),
        make_group(position=1, lengths=(6, 6, 6, 6)),
    ]
    rows, means = tabulate(groups, [0.2, 0.5])
    assert len(rows) == 5
    by = means.set_index(["mode", "share"])
    assert by.loc[("skip", 0.2), "length"] == 3.0
    assert by.loc[("skip", 0.2), "length_se"] == pytest.approx(np.std([1, 5], ddof=1) / np.sqrt(2))
    assert by.loc[("skip", 0.2), "problems"] == 2 and by.loc[("skip", 0.5), "problems"] == 1
    plain_row = means[means["mode"] == "unconditional"].iloc[0]
    assert np.isnan(plain_row["share"]) and plain_row["length"] == 3.0
    numbers = summary(rows)
    assert numbers["skip"]["length"] == 4.0 and numbers["skip"]["length_share"] == pytest.approx(4 / 3)


# ---------------------------------------------------------------- the command


def test_run_draws_writes_and_a_second_run_draws_nothing(
    tmp_path: Path, model_folder: Path, problems_file: Path
) -> None:
    setting = config(model_folder, problems_file)
    sampler = FakeSampler(load_tokenizer(str(model_folder)), answer)
    files = run(setting, tmp_path / "out", lambda: sampler)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["engine"]["dtype"] == "bfloat16" and written["data"] == str(problems_file)
    names = {"shortcut.png", "shortcut.svg", "shortcut.json", "means.csv", "groups.csv", "config.json"}
    assert {path.name for path in files} == names
    assert sampler.closed
    assert {(call["n"], call["temperature"], call["top_p"]) for call in sampler.calls} == {(4, 1.0, 1.0)}
    groups = pd.read_csv(tmp_path / "out/groups.csv")
    drawn = read_completions(tmp_path / "out/draws.jsonl")
    for _, group in groups.iterrows():
        position = "" if np.isnan(group["share"]) else f"/{setting.shares.index(group['share'])}"
        new = np.mean([len(item.token_ids) for item in drawn[f"{group['problem']}/{group['mode']}{position}"]])
        # A continual response begins with the segment; the others are what was drawn.
        before = group["length"] - new
        assert before > 0 if group["mode"] == "continual" else before == 0
    assert groups["mode"].value_counts().to_dict() == {"unconditional": 3, "continual": 6, "skip": 6}
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names}
    run(setting, tmp_path / "out", lambda: pytest.fail("everything is stored"))
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in names}


def test_killed_run_resumes_and_ends_the_same(tmp_path: Path, model_folder: Path, problems_file: Path) -> None:
    setting, tokenizer = config(model_folder, problems_file), load_tokenizer(str(model_folder))
    killed, again, whole = (FakeSampler(tokenizer, answer, fail_after) for fail_after in (2, None, None))
    with pytest.raises(KeyboardInterrupt):
        run(setting, tmp_path / "killed", lambda: killed)
    run(setting, tmp_path / "killed", lambda: again)
    run(setting, tmp_path / "whole", lambda: whole)
    assert killed.closed and len(again.calls) == len(whole.calls) - 2
    for name in ("shortcut.json", "groups.csv", "means.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_weights_at_the_same_path_are_another_model(tmp_path: Path, own_model: Path, problems_file: Path) -> None:
    sampler = FakeSampler(load_tokenizer(str(own_model)), answer)
    run(config(own_model, problems_file), tmp_path / "out", lambda: sampler)
    replace_weights(own_model)
    with pytest.raises(
        ConfigError, match=r"made with weights.model='\w+', now it is '\w+'; give another output folder"
    ):
        run(config(own_model, problems_file), tmp_path / "out", lambda: sampler)


def test_another_config_does_not_mix_with_stored_draws(tmp_path: Path, model_folder: Path, problems_file: Path) -> None:
    sampler = FakeSampler(load_tokenizer(str(model_folder)), answer)

    def run_with(**changes: Any) -> None:
        run(config(model_folder, problems_file, **changes), tmp_path, lambda: sampler)

    run_with()
    with pytest.raises(ConfigError, match=r"made with temperature=1.0, now it is 0.5; give another output folder"):
        run_with(temperature=0.5)
    with pytest.raises(ConfigError, match=r"engine.dtype"):
        run_with(engine=engine(dtype="float32"))
    run_with(engine=engine(num_threads=4))  # threads and memory change no draw that is stored


@pytest.fixture
def refused(refusal: Any, model_folder: Path, problems_file: Path) -> Any:
    def run(*arguments: str, data: Path = problems_file) -> str:
        given = ["--model", str(model_folder), "--data", str(data), "--platform", "cpu"]
        return refusal(shortcut.main, [*given, *arguments])

    return run


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["--modes", "skip"], "--modes: unconditional is missing"),
        (["--modes", "unconditional,jump"], "--modes: jump is none of"),
        (["--temperature", "0"], "--temperature"),
        (["--group-size", "1"], "--group-size"),
        (["--split-high", "1"], "--split-low"),
        (["--top-p", "0"], "--top-p"),
        (["--positions", "0"], "--positions"),
        (["--max-tokens", "1"], "--max-tokens"),
        (["--max-model-len", "50"], "--max-model-len: 50 is below"),
    ],
)
def test_bad_input_is_one_line(refused: Any, arguments: list[str], start: str) -> None:
    assert refused(*arguments).startswith(start)


def test_bad_data_are_one_line(refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(data=tmp_path / "nothing.parquet").startswith("--data ")
    bad = tmp_path / "bad.parquet"
    write_parquet([Row("skpo/arithmetic", [{"role": "user", "content": "?"}], "seven", "math", "val", 0, "?")], bad)
    assert f"--data {bad}: row 0: ground_truth 'seven' is not a number" in refused(data=bad)
    monkeypatch.setattr(problems, "PROMPT_SECONDS", 0.5)
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    never_ends = refused("--custom-chat-template", template)
    assert ": row 0: the model's chat template or tokenizer" in never_ends


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--thought-marks", "off"],
            "--thought-marks: 'off' is not auto, none or two different marks OPEN,CLOSE",
        ),
        (["--thought-marks", "<a>,<a>"], "--thought-marks: '<a>,<a>' is not auto"),
        (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs: '[1]' is not a JSON object"),
        (["--platform", "tpu"], "--platform: invalid choice: 'tpu'"),
        (["--problems", "x"], "--problems: invalid int value: 'x'"),
        (["--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_a_flag_that_cannot_be_read_is_refused_in_one_line(arguments: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        shortcut.main(["--model", "m", "--data", "d", "--out", "o", *arguments])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1) and error.startswith(f"error: {said}")


def test_thought_marks_of_the_command_and_of_the_run_are_obeyed(
    tmp_path: Path, model_folder: Path, problems_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers stand inside <r>...</r>, so with these marks nothing is answered."""
    tokenizer = load_tokenizer(str(model_folder))
    monkeypatch.setattr(EngineConfig, "open", lambda *_: FakeSampler(tokenizer, lambda *_: "<r>#### 2</r> so"))
    ours = {"path": "pkg://reward_fns", "name": "compute_score", "reward_kwargs": {"thought_marks": ["<r>", "</r>"]}}
    run_model = thinking_run(tmp_path / "run", model_folder, ours) / "checkpoints/global_step_3/actor/huggingface"

    def well_formed(name: str, model: Path, *more: str) -> float:
        out = tmp_path / name
        given = ["--model", str(model), "--data", str(problems_file), "--out", str(out), "--group-size", "2"]
        assert shortcut.main([*given, "--problems", "1", "--positions", "1", "--platform", "cpu", *more]) == 0
        return float(pd.read_csv(out / "groups.csv")["well_formed"].mean())

    assert well_formed("known", model_folder) > 0
    assert well_formed("flag", model_folder, "--thought-marks", "<r>,</r>") == 0
    assert well_formed("run", run_model) == 0
    assert well_formed("over", run_model, "--thought-marks", "none") > 0
