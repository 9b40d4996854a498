"""The command: what it refuses, what it asks of a sampler, what a kill leaves; a real merge of a tiny checkpoint."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from data_prep.schema import Row, write_parquet
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation import command as evaluate
from recipe.skpo.evaluation import models
from recipe.skpo.evaluation.command import main
from recipe.skpo.evaluation.config import read_config
from recipe.skpo.evaluation.models import find_checkpoint, merged_model
from recipe.skpo.output.run_folder import MARKER
from reward_fns.code_tests import CodeTests
from tests.conftest import move_checkpoints, thinking_run
from tests.unit.analysis.conftest import FakeSampler

REPOSITORY = Path(__file__).resolve().parents[3]
SOURCE = "skpo/arithmetic"
CODE = "livecodebench/code_generation_lite"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder and an environment that the command may set."""
    monkeypatch.setattr(os, "environ", os.environ | {"SKPO_PLATFORM": "cpu", "SKPO_CACHE": "cache"})
    monkeypatch.chdir(tmp_path)


def numbers(out: str = "out") -> list[dict[str, Any]]:
    """The benchmarks' lines of an evaluation's table."""
    return json.loads(Path(out, "table.json").read_text(encoding="utf-8"))["benchmarks"]


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder whose weights nobody computes with."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    save_file({"weight": np.zeros(3, dtype=np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten problems, "0 + 0?" to "9 + 9?"."""
    path = tmp_path / "sums.parquet"
    rows = [
        Row(SOURCE, [{"role": "user", "content": f"{n} + {n}?"}], str(2 * n), "math", "val", n, f"question {n}")
        for n in range(10)
    ]
    write_parquet(rows, path)
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, model: Path, data: Path) -> Callable[..., Any]:
    """Run the command with a fake sampler; right for even numbers, and every third seed gives no answer."""
    from recipe.skpo.evaluation.engine import EngineConfig

    def script(prompt: str, seed: int) -> str:
        number = int(prompt.split(" +")[0].split("\n")[-1])
        return "I wonder" if seed % 3 == 0 else f"#### {2 * number + number % 2}"

    def run(*overrides: str, fail_after: int | None = None) -> tuple[int, list[FakeSampler], list[str]]:
        made: list[FakeSampler] = []
        asked: list[str] = []

        def open_sampler(self: EngineConfig, name: str) -> FakeSampler:
            asked.append(name)
            made.append(FakeSampler(evaluate.load_tokenizer(str(model)), script, fail_after))
            made[-1].engine = self
            return made[-1]

        monkeypatch.setattr(EngineConfig, "open", open_sampler)
        defaults = [f"checkpoint={model}", f"benchmarks=[{data}]", "max_prompt_length=60", "max_response_length=9"]
        return main([*defaults, "engine.prompts_per_call=3", *overrides]), made, asked

    return run


# ---------------------------------------------------------------- results


def test_table_results_and_config_are_written(command, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, (sampler,), asked = command()
    out = Path("outputs/evaluation/model")
    assert (code, asked, sampler.closed) == (0, [str(model)], True)
    assert sampler.engine.max_model_len == 69, "room for prompt and response"
    assert [(len(call["prompts"]), call["n"]) for call in sampler.calls] == [(3, 3), (3, 3), (3, 3), (1, 3)]
    assert {limit for call in sampler.calls for limit in call["limits"]} == {9}
    rows = pd.read_parquet(out / "sums/problems.parquet")
    assert rows["question"].tolist() == [f"question {n}" for n in range(10)]
    assert rows["ground_truth"].tolist() == [str(2 * n) for n in range(10)]
    for number, row in enumerate(rows.itertuples()):
        assert (row.k, len(row.responses), len(row.lengths)) == (3, 3, 3)
        columns = (row.responses, row.preds, row.right, row.well_formed, row.lengths, row.cut)
        for response, pred, right, formed, length, cut in zip(*columns, strict=True):
            answered = response.startswith("####")
            assert (right, formed) == (answered and number % 2 == 0, answered)
            assert pred == (response[5:] if answered else "")
            # Byte tokens: the end counts; "I wonder" and "#### 18" have 9 and 8 of them.
            assert (length, cut) == (min(9, len(response) + 1), False)
        assert row.n_right == sum(row.right)
    (line,) = numbers(str(out))
    assert line["avg"] == np.mean(rows["n_right"] / 3)
    assert line["pass_at"]["3"] == np.mean(rows["n_right"] > 0)
    assert 0 < line["avg"] < line["pass_at"]["3"] <= 0.5
    assert line["length"] == np.mean(np.stack(rows["lengths"]))
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "model: plain responses, temperature 0.6, top-p 0.95, at most 9 tokens, seed 1" in table
    assert json.loads((out / "config.json").read_text())["max_response_length"] == 9


def test_programs_get_verdicts_in_the_results_and_in_a_table(command, monkeypatch, capsys) -> None:
    tests = CodeTests("stdin", [["", "4"]]).text()
    rows = [
        Row(CODE, [{"role": "user", "content": f"Print {name}."}], tests, "code", "test", number, name)
        for number, name in enumerate(("four", "five"))
    ]
    write_parquet(rows, Path("cache/benchmarks/livecodebench.parquet"))
    programs = {"passed": "print(4)", "wrong answer": "print(5)", "error": "1/0", "time-out": "while 1: 0"}
    said = [f"```py\n{text}\n```" for text in programs.values()] + ["It is 4."]
    answers = iter(said * 2)
    complete = FakeSampler._complete

    def next_answer(self: FakeSampler, *given: Any) -> Any:
        self.script = lambda prompt, seed: answer
        answer = next(answers)
        return complete(self, *given)

    monkeypatch.setattr(FakeSampler, "_complete", next_answer)
    limits = ["max_response_length=40", "+reward.reward_kwargs.code_seconds=0.5", "output_dir=out"]
    assert command("benchmarks=[livecodebench]", "k.default=5", *limits)[0] == 0
    (line,) = numbers()
    verdicts = [*programs, "no code"]
    assert line["verdicts"] == dict.fromkeys(verdicts, 0.2)
    assert (line["benchmark"], line["k"], line["avg"], line["pass_at"]["5"]) == ("livecodebench", 5, 0.2, 1.0)
    results = pd.read_parquet("out/livecodebench/problems.parquet")
    assert [preds.tolist() for preds in results["preds"]] == [verdicts] * 2
    assert results["well_formed"][0].tolist() == [True] * 4 + [False]
    assert "| livecodebench | 20.00 | 20.00 | 20.00 | 20.00 | 20.00 |" in capsys.readouterr().out


def test_long_responses_are_cut_and_counted(command) -> None:
    command("max_response_length=4", "output_dir=out")
    (line,) = numbers()
    assert (line["cut"], line["avg"], line["well_formed"]) == (1, 0, 0)


def test_killed_and_restarted_gives_the_same_bytes_and_finished_needs_no_model(command) -> None:
    with pytest.raises(KeyboardInterrupt):
        command("output_dir=killed", fail_after=2)
    assert not Path("killed/table.md").exists()
    _, (again,), _ = command("output_dir=killed")
    assert len(again.calls) == 2, "the other two are stored"
    command("output_dir=whole")
    for name in ("table.md", "table.json", "sums/problems.parquet"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()
    before = Path("whole/table.md").read_bytes()
    code, made, _ = command("output_dir=whole", "engine.num_threads=1")
    assert (code, made, Path("whole/table.md").read_bytes()) == (0, [], before)


def test_other_draws_are_not_mixed_in(command, model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("output_dir=out")
    for override in ("temperature=0.7", "top_p=0.9", "seed=2", "k.default=2", "max_response_length=8"):
        assert command("output_dir=out", override)[0] == 1
        name = override.split("=")[0].split(".")[0]
        error = capsys.readouterr().err
        assert f"out/sums/config.json: was made with {name}=" in error and "give another output folder" in error
    tokenizer = evaluate.load_tokenizer(str(model))
    tokenizer.chat_template = f"Now: {tokenizer.chat_template}"
    tokenizer.save_pretrained(model)
    assert command("output_dir=out")[0] == 1
    assert "are of another prompt or sampling, because the data, the tokenizer or an" in capsys.readouterr().err
    save_file({"weight": np.ones(4, dtype=np.float32)}, model / "model.safetensors")
    assert command("output_dir=out")[0] == 1
    assert "was made with weights=" in capsys.readouterr().err
    write_parquet([Row(SOURCE, [{"role": "user", "content": "1 + 1?"}], "2", "math", "val", 0, "q")], data)
    assert command("output_dir=out")[0] == 1
    assert "was made with data=" in capsys.readouterr().err


def test_benchmark_more_and_another_reward_use_the_same_folder(command, data: Path, tmp_path: Path) -> None:
    command("output_dir=out")
    shutil.copy(data, tmp_path / "more.parquet")
    code, (sampler,), _ = command("output_dir=out", f"benchmarks=[{data},{tmp_path}/more.parquet]")
    assert (code, len(sampler.calls)) == (0, 4), "only the new one is drawn"
    assert "mean of benchmarks" in Path("out/table.md").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text("def check(solution_str, ground_truth, **_):\n    return 1.0\n")
    code, made, _ = command(
        "output_dir=out", f"reward.path={tmp_path}/mine.py", "reward.name=check", "reward.reward_kwargs={}"
    )
    assert (code, made) == (0, [])
    (line,) = numbers()
    assert (line["avg"], line["well_formed"]) == (1, None)


def test_benchmarks_by_name_have_their_own_k(command, data: Path) -> None:
    Path("cache/benchmarks").mkdir(parents=True)
    for name in ("aime24", "amc23"):
        shutil.copy(data, f"cache/benchmarks/{name}.parquet")
    code, (sampler,), _ = command("benchmarks=[aime24,amc23]", "output_dir=out")
    assert code == 0
    assert [call["n"] for call in sampler.calls] == [32] * 4 + [3] * 4
    seeds = [seed for call in sampler.calls[:4] for seed in call["seeds"]]
    assert len(set(seeds)) == 10


def test_problem_keeps_its_seed_among_others(command, data: Path) -> None:
    _, (all_ten,), _ = command("output_dir=a")
    rows = pd.read_parquet(data).iloc[4:5]
    rows.to_parquet("one.parquet", index=False)
    _, (one,), _ = command("benchmarks=[one.parquet]", "output_dir=b")
    assert one.calls[0]["seeds"] == all_ten.calls[1]["seeds"][1:2]
    assert one.calls[0]["prompts"] == all_ten.calls[1]["prompts"][1:2]


def test_greedy(command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("temperature=0")[0] == 1
    assert (
        "k.default: is 3, but with temperature=0 all responses are the same; give k.default=1"
        in capsys.readouterr().err
    )
    code, (sampler,), _ = command("temperature=0", "k.default=1")
    assert code == 0
    assert {(call["temperature"], call["top_p"]) for call in sampler.calls} == {(0, 0.95)}
    assert "plain responses, greedy, " in capsys.readouterr().out


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["nope=1"], "Could not override 'nope'."),
        (["+engine.nope=1"], "engine.nope: Key 'nope' not in 'EngineConfig'"),
        (["+nope=1"], "nope: Key 'nope' not in 'EvaluationConfig'"),
        (["k.default=many"], "k.default: Value 'many'"),
        (["k={aime24: 4}", "~k.default"], "k.default: is not set"),
        (["k.default=0"], "k.default: must be >= 1, got 0"),
        (["+k.amc23=0"], "k.amc23: must be >= 1, got 0"),
        (["temperature=-0.1"], "temperature: must be >= 0, got -0.1"),
        (["top_p=0"], "top_p: must be in (0, 1], got 0.0"),
        (["top_p=1.01"], "top_p: must be in (0, 1], got 1.01"),
        (["max_response_length=0"], "max_response_length: must be >= 1, got 0"),
        (["max_prompt_length=0"], "max_prompt_length: must be >= 1, got 0"),
        (["resamples=0"], "resamples: must be >= 1, got 0"),
        (["seed=-1"], "seed: must be >= 0, got -1"),
        (["engine.prompts_per_call=0"], "engine.prompts_per_call: must be >= 1, got 0"),
        (["engine.platform=tpu"], "engine.platform: must be cpu or gpu, got tpu"),
        (["engine.max_model_len=68"], "engine.max_model_len: 68 is below the 69 tokens"),
        (["engine=3"], "Merge error: int is not a subclass of EngineConfig"),
        (["benchmarks=[]"], "benchmarks: is empty; name any of aime24, "),
        (["benchmarks=null"], "benchmarks: is not set; name any of aime24, "),
        (["benchmarks=[swebench]"], "benchmarks: 'swebench' is unknown; known are aime24, "),
        (["benchmarks=[amc23]"], "make it with `python -m data_prep.benchmarks --names amc23 --out cache/benchmarks`"),
        (["benchmarks=[no.parquet]"], "benchmarks: no.parquet does not exist; "),
        (["benchmarks=[sums.parquet,./sums.parquet]"], "./sums.parquet and sums.parquet are both called sums"),
        (["checkpoint=null"], "checkpoint: is not set; give a Hugging Face folder or name, "),
        (["checkpoint=no/such/model"], "checkpoint: no/such/model does not exist; give "),
        (["max_prompt_length=10"], "row 0: the prompt has 25 tokens, max_prompt_length is 10; raise it"),
        (["reward.path=no.py"], "reward: "),
        (["reward.name=nope"], "reward: "),
        (["+reward.reward_kwargs.answer_format=nope"], "answer_format: 'nope' is unknown"),
        (["+reward.reward_kwargs.answer_formt=boxed"], "answer_formt: is unknown; known are answer_format"),
        (["+reward.reward_kwargs.thought_marks=off"], "thought_marks: 'off' is unknown; give auto, none, or"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    command, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    code, made, _ = command(*overrides)
    error = capsys.readouterr().err
    assert (code, made) == (1, [])
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not Path("outputs").exists()


def test_bad_row_is_named(command, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pd.read_parquet(data)
    rows.loc[3, "data_source"] = "nobody/knows"
    rows.to_parquet("bad.parquet", index=False)
    assert command("benchmarks=[bad.parquet]")[0] == 1
    assert "benchmarks: bad: row 3: data_source 'nobody/knows' has no reward here" in capsys.readouterr().err
    rows.drop(columns="id").to_parquet("bad.parquet", index=False)
    assert command("benchmarks=[bad.parquet]")[0] == 1
    assert "error: benchmarks: bad.parquet: missing column(s) id" in capsys.readouterr().err


def test_reward_of_ones_own_gets_what_the_trainer_gives(command, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def check(data_source, solution_str, ground_truth, extra_info, chosen, **_):\n"
        "    assert data_source == 'skpo/arithmetic' and '</s>' not in solution_str\n"
        "    return {'score': 1.0 if extra_info['index'] == chosen else -1.0}\n"
    )
    overrides = ["reward.path=mine.py", "reward.name=check", "+reward.reward_kwargs.chosen=4"]
    assert command(*overrides, "output_dir=out")[0] == 0
    rows = pd.read_parquet("out/sums/problems.parquet")
    assert rows["n_right"].tolist() == [3 * (n == 4) for n in range(10)]
    (tmp_path / "mine.py").write_text("def check(**_):\n    return -1.0\n")
    assert command(*overrides, "output_dir=out")[0] == 0
    assert numbers()[0]["avg"] == 0


def test_truths_may_be_numbers(command, data: Path) -> None:
    rows = pd.read_parquet(data)
    rows["reward_model"] = [{"ground_truth": int(model["ground_truth"])} for model in rows["reward_model"]]
    rows.to_parquet("numbers.parquet", index=False)
    assert command("output_dir=texts")[0] == command("benchmarks=[numbers.parquet]", "output_dir=numbers")[0] == 0
    found = [pd.read_parquet(file) for file in ("texts/sums/problems.parquet", "numbers/numbers/problems.parquet")]
    for column in ("ground_truth", "n_right"):
        assert found[0][column].tolist() == found[1][column].tolist()


def test_files_named_after_a_split_are_called_after_their_folder_too(command, data: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(data, tmp_path / folder / "val.parquet")
    assert command("benchmarks=[a/val.parquet,b/val.parquet]", "output_dir=out")[0] == 0
    assert Path("out/a-val/problems.parquet").exists() and Path("out/b-val/problems.parquet").exists()


def test_platform_is_chosen_before_verl_is_asked(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    seen = []

    def load(_: Any) -> None:
        seen.append(os.environ.get("VERL_PLATFORM"))
        raise ConfigError("far enough")

    monkeypatch.setattr(evaluate, "Reward", load)
    assert command()[0] == 1
    assert seen == ["cpu"]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("def check(text):\n    return 1.0\n", "check of mine.py cannot be called by the keywords data_source, "),
        (
            "def check(**_):\n    return {'score': 0.5, 'acc': 0.5}\n",
            "its acc is 0.5; right responses are counted, so give 0 or 1",
        ),
    ],
)
def test_reward_that_cannot_be_used_is_refused(command, capsys, reward: str, message: str) -> None:
    Path("mine.py").write_text(reward, encoding="utf-8")
    assert command("reward.path=mine.py", "reward.name=check", "reward.reward_kwargs={}")[0] == 1
    assert f"reward: {message}" in capsys.readouterr().err


def test_defaults_are_the_papers_counts_and_the_cpu_configs_sizes(compose_config) -> None:
    config = read_config(["checkpoint=x", "benchmarks=[amc23]", "engine.platform=cpu"])
    assert [config.responses(name) for name in ("aime24", "aime25", "amc23", "mmlu_pro")] == [32, 32, 3, 3]
    assert config.resamples == 10_000
    trained = compose_config("platform=cpu")
    rollout = trained.actor_rollout_ref.rollout
    for name in ("dtype", "max_num_seqs", "max_num_batched_tokens"):
        assert getattr(config.engine, name) == rollout[name]
    assert config.engine.kv_cache_gib == trained.platform.kv_cache_gib
    assert vars(config.reward) == trained.reward.custom_reward_function


# ---------------------------------------------------------------- settings of the run


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_is_evaluated_with_its_own_template_and_reward(
    command, model: Path, tmp_path: Path, capsys, elsewhere: bool
) -> None:
    run = thinking_run(tmp_path / "run", model)
    if elsewhere:
        move_checkpoints(run, tmp_path / "disk")
    code, (sampler,), _ = command(f"checkpoint={run}", "output_dir=out", "max_prompt_length=70")
    assert code == 0
    prompts = [sampler.tokenizer.decode(prompt) for call in sampler.calls for prompt in call["prompts"]]
    assert len(prompts) == 10 and all(prompt.endswith("assistant\n[no]") for prompt in prompts)
    written = json.loads(Path("out/config.json").read_text(encoding="utf-8"))
    assert written["chat_template_kwargs"] == {"enable_thinking": False}
    assert written["reward"]["reward_kwargs"] == {"answer_format": "boxed"}
    capsys.readouterr()
    thinking = "chat_template_kwargs={enable_thinking: true}"
    code, made, _ = command(f"checkpoint={run}", "output_dir=out", "max_prompt_length=70", thinking)
    assert (code, made) == (1, []), "draws of other prompts are not used"
    said = "was made with chat_template_kwargs.enable_thinking=False, now it is True; give another output folder"
    assert said in capsys.readouterr().err


def test_the_arguments_of_the_runs_reward_are_taken_over(command, model: Path, tmp_path: Path) -> None:
    reward = "def check(chosen, extra_info, **_):\n    return float(extra_info['index'] == chosen)\n"
    (tmp_path / "mine.py").write_text(reward)
    run = thinking_run(tmp_path / "run", model, {"path": "mine.py", "name": "check", "reward_kwargs": {"chosen": 4}})
    ours = (f"checkpoint={run}", "reward.path=mine.py", "reward.name=check", "max_prompt_length=70", "output_dir=out")

    def right() -> list[int]:
        return pd.read_parquet("out/sums/problems.parquet").query("n_right > 0").index.tolist()

    assert command(*ours)[0] == 0 and right() == [4]
    assert command(*ours, "+reward.reward_kwargs.chosen=7")[0] == 0 and right() == [7], "what is given goes over it"


def test_a_model_of_no_run_is_asked_as_the_keys_say(command, model: Path, capsys) -> None:
    template = "{{ messages[0]['content'] }}{% if short %} Be short.{% endif %}"
    code, (sampler,), _ = command(f'custom_chat_template="{template}"', "chat_template_kwargs={short: true}")
    assert code == 0 and sampler.tokenizer.decode(sampler.calls[0]["prompts"][0]) == "0 + 0? Be short."


def test_another_reward_than_the_runs_is_said(command, model: Path, tmp_path: Path, capsys) -> None:
    run = thinking_run(tmp_path / "run", model)
    (tmp_path / "mine.py").write_text("def check(**_):\n    return 1.0\n")
    code, _, _ = command(f"checkpoint={run}", "reward.path=mine.py", "reward.name=check", "max_prompt_length=70")
    said = (
        "note: the run was trained with the reward compute_score of pkg://reward_fns, responses are checked with check"
    )
    assert code == 0 and said in capsys.readouterr().out


# ---------------------------------------------------------------- checkpoints


def test_hub_name_is_left_to_the_hub() -> None:
    found = find_checkpoint("Qwen/Qwen2.5-Math-7B")
    assert (found.label, found.model, found.shards) == ("Qwen2.5-Math-7B", "Qwen/Qwen2.5-Math-7B", None)


def test_truncated_and_foreign_folders_are_refused(model: Path, tmp_path: Path) -> None:
    foreign, weights = tmp_path / "foreign", model / "model.safetensors"
    foreign.mkdir()
    for damage, folder, message in (
        (lambda: weights.write_bytes(weights.read_bytes()[:-4]), model, r"model.safetensors is missing or cut off"),
        (weights.unlink, model, "no complete model weights"),
        (lambda: None, foreign, "holds no model; give a Hugging Face folder"),
        (lambda: (foreign / MARKER).write_text("4"), foreign, "names global_step_4, which is not there"),
    ):
        damage()
        with pytest.raises(ConfigError, match=message):
            find_checkpoint(str(folder))


def test_checkpoint_is_found_from_any_of_its_folders(trained: Path) -> None:
    run = trained / "run"
    step = run / "checkpoints/global_step_3"
    found = {find_checkpoint(str(place)) for place in (run, run / "checkpoints", step, step / "actor")}
    (only,) = found
    places = (step / "actor", str(step / "actor/huggingface"))
    assert (only.label, only.shards, only.model) == ("run-global_step_3", *places)


def test_a_checkpoint_is_chosen_by_its_number_or_as_the_best(run_copy: Path) -> None:
    root, metric = run_copy / "checkpoints", "val-core/x/acc/mean@1"
    shutil.copytree(root / "global_step_3", root / "global_step_6")
    (root / "latest_checkpointed_iteration.txt").write_text("6")

    def found(step: str | None, place: Path = run_copy) -> str:
        return find_checkpoint(str(place), step=step).label

    assert (found(None), found("3"), found("6")) == tuple(f"run-global_step_{step}" for step in (6, 3, 6))
    for step, message in (
        ("best", f"step: {run_copy} keeps no best checkpoint, as a run does that is trained with trainer.keep_best"),
        ("4", f"step: {run_copy} has no checkpoint 4; give one of 3, 6"),
        ("last", f"step: {run_copy} has no checkpoint last; give one of 3, 6"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            found(step)
    with pytest.raises(ConfigError, match=r"global_step_3/checkpoints; give the folder of a run$"):
        found("3", root / "global_step_3")
    (run_copy / "config.yaml").write_text(json.dumps({"trainer": {"keep_best": f"-{metric}"}}))
    lines = [{"step": step, metric: value} for step, value in ((0, 0.1), (3, 0.2), (6, 0.3))]
    (run_copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert found("best") == found("best", root) == "run-global_step_3"


def test_checkpoints_elsewhere_are_found_by_their_run(run_copy: Path, model: Path, tmp_path: Path, capsys) -> None:
    disk, metric = tmp_path / "disk", "val-core/x/acc/mean@1"
    (run_copy / "config.yaml").write_text(json.dumps({"trainer": {"keep_best": metric}}))
    move_checkpoints(run_copy, disk)
    (run_copy / "metrics.jsonl").write_text(json.dumps({"step": 3, metric: 0.5}))
    for step in (None, "3", "best"):
        checkpoint = find_checkpoint(str(run_copy), step=step)
        assert checkpoint == find_checkpoint(str(disk / "global_step_3"))
        assert capsys.readouterr().out == f"note: {run_copy} has its checkpoints in {disk}\n"
    shutil.copyfile(run_copy / "config.yaml", model / "config.yaml")
    assert find_checkpoint(str(model)).model == str(model), "merged from a checkpoint of the run"
    shutil.rmtree(disk)
    with pytest.raises(ConfigError, match=f"has no checkpoints in {disk}; give the folder of a run"):
        find_checkpoint(str(run_copy), step="3")


def test_merged_weights_are_the_trained_ones_in_bfloat16(trained: Path, tmp_path: Path, capfd) -> None:
    import torch
    from safetensors.torch import load_file as load_tensors

    checkpoint = find_checkpoint(str(trained / "run"))
    folder = Path(merged_model(checkpoint, tmp_path / "out"))
    assert folder == tmp_path / "merged" / f"run-global_step_3-{checkpoint.identity}"
    assert list(folder.parent.iterdir()) == [folder], "nothing half done is left"
    files = (trained / "reference/model.safetensors", folder / "model.safetensors")
    reference, merged = map(load_tensors, files)
    assert set(reference) == set(merged) and len(merged) > 5
    for name, tensor in reference.items():
        assert tensor.dtype == torch.float32 and merged[name].dtype == torch.bfloat16
        assert torch.equal(tensor.bfloat16(), merged[name])
    assert find_checkpoint(str(folder)).shards is None
    assert evaluate.load_tokenizer(str(folder)).chat_template
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert merged_model(checkpoint, tmp_path / "out") == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp, "it is not merged again"


def test_broken_checkpoints_are_refused(run_copy: Path) -> None:
    actor = run_copy / "checkpoints/global_step_3/actor"
    shard, adapter, sizes = (
        actor / name for name in ("model_world_size_2_rank_1.pt", "lora_train_meta.json", "fsdp_config.json")
    )
    whole = shard.read_bytes()
    for damage, repair, message in (
        (lambda: shard.write_bytes(whole[: len(whole) // 2]), lambda: None, f"{shard.name} is missing or cut short"),
        (shard.unlink, lambda: shard.write_bytes(whole), f"{shard.name} is missing or cut short"),
        (lambda: adapter.write_text("{}"), adapter.unlink, f"{adapter.name} has no rank r and lora_alpha above 0"),
        (lambda: sizes.write_text('{"world'), lambda: sizes.write_text('{"world_size": 2}'), "has no world_size"),
        (lambda: shutil.rmtree(actor / "huggingface"), lambda: None, r"huggingface has no config.json"),
    ):
        damage()
        with pytest.raises(ConfigError, match=message):
            find_checkpoint(str(run_copy))
        repair()


def test_failure_of_the_merger_leaves_nothing(run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        (Path(command[-1]) / "model.safetensors").write_bytes(b"half")
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nKeyError: 'weight'\n")

    monkeypatch.setattr(models.subprocess, "run", fail)
    with pytest.raises(ConfigError, match=r"verl's merger cannot read .* \(KeyError: 'weight'\)"):
        merged_model(find_checkpoint(str(run_copy)), tmp_path / "out")
    assert list((tmp_path / "merged").iterdir()) == []


def test_checkpoint_with_a_whole_model_is_not_merged(run_copy: Path, tmp_path: Path) -> None:
    described = run_copy / "checkpoints/global_step_3/actor/huggingface"
    save_file({"weight": np.zeros(3, dtype=np.float32)}, described / "model.safetensors")
    found = find_checkpoint(str(run_copy))
    assert (found.model, found.shards, found.label) == (str(described), None, "run-global_step_3")
    assert merged_model(found, tmp_path / "out") == str(described)


def test_trained_checkpoint_is_evaluated(
    command, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def merge(checkpoint: Any, beside: Path, run: Any) -> str:
        assert beside.parent == Path("outputs/evaluation")
        return "merged one"

    monkeypatch.setattr(evaluate, "merged_model", merge)
    code, _, asked = command(f"checkpoint={trained / 'run'}")
    assert (code, asked) == (0, ["merged one"])
    assert "note: " not in capsys.readouterr().out
    command(f"checkpoint={trained / 'run'}", "engine.dtype=float32", "output_dir=outputs/evaluation/x")
    assert "note: verl's merger rounds weights to bfloat16, so engine.dtype=float32" in capsys.readouterr().out
