"""Bad input at every border of a training run: one line that names the place and the fix, before any heavy work.

One table.  Every case starts from a run that would be launched and resumed, spoils one thing, and goes through all of
``main.run`` but the launch.  Elsewhere: values of ``skpo.*`` in test_settings.py, combinations of options and methods
in test_compose.py and test_options.py, the command line in test_command_line.py, what data may be in test_data.py.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf, open_dict

from data_prep.schema import Row, write_parquet
from recipe.skpo import main
from recipe.skpo.checks import ACTOR, ROLLOUT
from recipe.skpo.launch import apply_platform
from recipe.skpo.output.run_folder import MARKER
from recipe.skpo.settings import SkpoSettings, TrackerSettings
from recipe.skpo.trainer.checkpoints import DATA_FILE, mark
from recipe.skpo.trainer.state import FILE_NAME, SkpoState
from tests.conftest import COMMAND, write_checkpoint

BATCH = 4


@dataclass
class Run:
    """A run that can be launched; ``folder`` is its own."""

    folder: Path
    config: Any
    train: Path
    model: Path
    checkpoint: Path

    def set(self, path: str, value: Any) -> None:
        with open_dict(self.config):
            OmegaConf.update(self.config, path, value, force_add=True)

    def named(self, text: str) -> str:
        """A text with its {train}, {model}, {checkpoint} and {folder} as paths."""
        return text.format(**{name: value for name, value in vars(self).items() if name != "config"})

    def message(self) -> str:
        """What the command says when it ends by itself; only the launch is left out."""
        with pytest.raises(SystemExit) as exit_info:
            main.run.__wrapped__(self.config)
        message = exit_info.value.code
        assert isinstance(message, str), "a text is printed on stderr, and the exit code is 1"
        assert len(message.splitlines()) == 1
        return message


@pytest.fixture
def run(compose_config, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    from hydra.core.hydra_config import HydraConfig

    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create(COMMAND))
    # They change this process, or start everything.
    monkeypatch.setattr(main, "apply_platform", lambda config: None)
    monkeypatch.setattr(main, "launch", lambda config, done: print("launched"))
    monkeypatch.setattr(main, "report", lambda *arguments, **options: None)
    config = compose_config("platform=cpu", "data=files")
    files = {}
    for role in ("train", "val"):
        files[role] = tmp_path / f"{role}.parquet"
        prompts = [[{"role": "user", "content": f"{role} {n}?"}] for n in range(BATCH + 2)]
        rows = [Row("skpo/arithmetic", prompt, "5", "math", role, n, f"{n}?") for n, prompt in enumerate(prompts)]
        write_parquet(rows, files[role])
        config.data[f"{role}_files"] = str(files[role])
    config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size = BATCH, 2
    config.data.max_prompt_length = 96
    config.output_dir = str(tmp_path / "out")
    config.trainer.default_local_dir = str(tmp_path / "out/checkpoints")
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    config.actor_rollout_ref.model.path = str(model)
    settings = SkpoSettings.from_config(config.skpo)
    checkpoint = write_checkpoint(tmp_path / "out/checkpoints/global_step_3", SkpoState(settings, 64))
    mark(checkpoint.parent, 3)
    return Run(tmp_path, config, files["train"], model, checkpoint)


def test_the_run_that_every_case_spoils_is_launched(run: Run, capsys) -> None:
    main.run.__wrapped__(run.config)
    assert "launched" in capsys.readouterr().out


# ---------------------------------------------------------------- the table

Spoil = Callable[[Run], Any]
CASES: dict[str, tuple[Spoil, str, str]] = {}
"""Name to what is spoilt, how the message begins, and the fix in it."""


def case(name: str, begins: str, fix: str, *spoils: Spoil) -> None:
    assert name not in CASES, name
    CASES[name] = (lambda run: [spoil(run) for spoil in spoils], begins, fix)


def given(path: str, value: Any) -> Spoil:
    return lambda run: run.set(path, run.named(value) if isinstance(value, str) and "{" in value else value)


def gone(pattern: str) -> Spoil:
    return lambda run: [Path(file).unlink() for file in glob(run.named(pattern))]


def cut(file: str, size: int) -> Spoil:
    return lambda run: os.truncate(run.named(file), size)


def text(file: str, content: str) -> Spoil:
    return lambda run: Path(run.named(file)).write_text(content, encoding="utf-8")


def value(path: str, value: Any, begins: str | None = None, fix: str = "must be") -> None:
    """A case of a value in the config."""
    case(f"{path}={value!r}", begins or f"{path}: is {value!r}, must be ", fix, given(path, value))


# ---- config

COUNT, POSITIVE = "a whole number of at least 1", "a number above 0"
for path in (
    *("data.train_batch_size", "data.max_response_length", "trainer.nnodes", "trainer.total_epochs"),
    *(f"{ACTOR}.ppo_mini_batch_size", f"{ACTOR}.ppo_epochs", f"{ROLLOUT}.tensor_model_parallel_size"),
    *("trainer.total_training_steps", "trainer.max_actor_ckpt_to_keep", "platform.num_threads"),
):
    value(path, 0, fix=COUNT)
for wrong in ("many", 2.5, None, True):
    value("data.train_batch_size", wrong, fix=COUNT)
value("data.max_prompt_length", -1, fix=COUNT)
value("trainer.n_gpus_per_node", True, fix=COUNT)
value("platform.kv_cache_gib", 0.5, fix=COUNT)
value(f"{ROLLOUT}.max_model_len", "long", fix=f"{COUNT}, or null")
for wrong in (0.0, float("nan"), "fast"):
    value(f"{ACTOR}.optim.lr", wrong, fix=POSITIVE)
value(f"{ACTOR}.optim.clip_grad", 0, fix=POSITIVE)
value(f"{ACTOR}.optim.weight_decay", -0.1, fix="a number of at least 0")
value(f"{ROLLOUT}.temperature", 0.0, fix=POSITIVE)
value(f"{ROLLOUT}.top_p", 1.5, fix="a number above 0 and at most 1")
value(f"{ROLLOUT}.gpu_memory_utilization", 60, fix="a number above 0 and at most 1")
value("trainer.save_freq", "often", fix="a whole number of at least -1")
value("trainer.test_freq", None, fix="a whole number of at least -1")
value("data.train_max_samples", "all", fix="a whole number of at least -1")
value("data.train_max_samples", 2, "data.train_max_samples: is 2, fewer prompts than data.train_batch_size=4", "raise")
value(f"{ACTOR}.ppo_mini_batch_size", 3, "data.train_batch_size: 4 prompts do not split", "ppo_mini_batch_size=3")
value(f"{ROLLOUT}.name", "sglang", f"{ROLLOUT}.name: is sglang", "must be vllm")
value(
    "trainer.remove_previous_ckpt_in_save", True, "trainer.remove_previous_ckpt_in_save: ", "max_actor_ckpt_to_keep=1"
)
for wrong in ("acc", 3, "", "-"):
    value(
        "trainer.keep_best", wrong, f"trainer.keep_best: is {wrong!r}, must be a metric of validation", "mean@1, with -"
    )
case(
    "best without validation",
    "trainer.keep_best: is set, but trainer.test_freq=-1 means no validation",
    "give trainer.test_freq=<steps>",
    *(given("trainer.keep_best", "val-core/x/acc/mean@1"), given("trainer.test_freq", -1)),
)
value("trainer.stop_after_no_gain", 0, fix=f"{COUNT}, or null")
value("trainer.stop_after_no_gain", 3, "trainer.stop_after_no_gain: is 3 without a metric", "by trainer.keep_best")
value("trainer.default_hdfs_dir", "hdfs://x", "trainer.default_hdfs_dir: is hdfs://x", "must be None")
value("trainer.critic_warmup", 5, fix="must be 0")
value(f"{ACTOR}.checkpoint.async_save", True, fix="must be False")
for which, contents, lacks in (("save", ["model"], "optimizer, extra"), ("load", ["model", "extra"], "optimizer")):
    path = f"{ACTOR}.checkpoint.{which}_contents"
    value(path, contents, f"{path}: lacks {lacks}", "add it")
value(f"{ACTOR}.strategy", "fsdp", f"{ACTOR}.strategy: is fsdp", "use fsdp2")
value("trainer.logger", ["consle"], "trainer.logger: consle is unknown", "known are wandb, ")
value("trainer.logger", ["console", "clearml"], "trainer.logger: clearml needs the package clearml", "install it")
value("trainer.resume_mode", "always", "trainer.resume_mode: is always", "must be auto, disable or resume_path")
for path, secret in (
    ("ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY", "0123456789"),
    ("trainer.project_name", "hf_" + "a" * 30),
):
    value(path, secret, f"{path}: looks like a secret", "export it")
for path, folder in (("output_dir", "{train}/out"), ("trainer.default_local_dir", "{train}")):
    value(path, folder, f"{path}: {folder} cannot be made: {{train}} is a file", "give another folder")

# ---- reward

REWARD = "reward.custom_reward_function"
MINE = f"{REWARD}: compute_score of {{folder}}/mine.py"


def reward(name: str, content: str, begins: str, fix: str, function: str = "compute_score", *more: Spoil) -> None:
    """A case of a reward file with this content; "": there is no file."""
    file = [text("{folder}/mine.py", content)] if content else []
    path = given(f"{REWARD}.path", "{folder}/mine.py"), given(f"{REWARD}.name", function)
    case(f"reward: {name}", begins, fix, *file, *path, *more)


def function(body: str, start: str = "def") -> str:
    """A reward function in verl's documented signature."""
    signature = "compute_score(data_source, solution_str, ground_truth, extra_info=None)"
    return f"import asyncio, decimal, math, time\n{start} {signature}:\n    {body}\n"


for name, content, said in (
    ("no file", "", "FileNotFoundError"),
    ("no such function", "def other(): pass\n", "AttributeError"),
    ("broken python", "x = 1\ndef compute_score(:\n", "SyntaxError: invalid syntax, line 2)"),
    ("raises when it is imported", "1 / 0\n", "ZeroDivisionError: division by zero)"),
    ("imports what is not there", "import nowhere\n", "ModuleNotFoundError: No module named 'nowhere')"),
):
    reward(name, content, f"{MINE} cannot be loaded ({said}", "pkg://module")
reward(
    "not a function", "VALUE = 3\n", f"{REWARD}: VALUE of {{folder}}/mine.py is a int, not a function", "in it", "VALUE"
)

# What verl calls it with, by keyword.
KEYWORDS = f"{MINE} cannot be called by the keywords data_source, solution_str, ground_truth, extra_info"
for name, signature, said in (
    ("no extra_info", "data_source, solution_str, ground_truth", "got an unexpected keyword argument 'extra_info'"),
    ("positional only", "data_source, solution_str, ground_truth, extra_info, /", "'data_source' parameter is posi"),
    ("other names", "source, response, truth, **kwargs", "missing a required argument: 'source'"),
    ("one argument more", "data_source, solution_str, ground_truth, extra_info, tokenizer", "missing a required arg"),
    ("a method's self", "self, data_source, solution_str, ground_truth, extra_info=None", "missing a required arg"),
    ("trl's", "prompts, completions, **kwargs", "missing a required argument: 'prompts'"),
    ("only positions", "*args", "got an unexpected keyword argument 'data_source'"),
):
    content = f"def compute_score({signature}): return 1.0\n"
    reward(f"signature: {name}", content, f"{KEYWORDS} ({said}", "pkg://module")

for name, body, said in (
    ("None", "pass", "None, which is not a finite number"),
    ("text", "return '1.0'", "'1.0', which is not a finite number"),
    ("NaN", "return math.nan", "nan, which is not a finite number"),
    ("infinity", "return {'score': -math.inf}", "-inf, which is not a finite number"),
    ("a tuple", "return 1.0, {}", "(1.0, {{}}), which is not a finite number"),
    ("a list of one", "return [1.0]", "[1.0], which is not a finite number"),
    ("a vector", "import torch; return torch.zeros(2)", "tensor([0., 0.]), which is not a finite number"),
    ("a complex number", "return 1 + 0j", "(1+0j), which is not a finite number"),
    ("a huge number", "return 10**400", "1000"),
    ("a record without score", "return {'reward': 1.0}", "a record without 'score'"),
    ("a score that is None", "return {'score': None}", "None, which is not a finite number"),
    ("a coroutine", "return asyncio.sleep(0)", "a coroutine; define it by `async def`"),
    ("text later", "await asyncio.sleep(0); return 'x'", "'x'"),
):
    content = function(body, "async def" if "await" in body else "def")
    fix = "return a number, or a dict with the number as 'score'"
    reward(f"returns {name}", content, f"{MINE}: it returned {said}", fix)

ON = "for {train} (row 0) and an empty response"
for name, body, said in (
    ("on an empty response", "return float(solution_str)", "(ValueError: could not convert string to float: '')"),
    ("on what extra_info lacks", "return extra_info['level']", "(KeyError: 'level')"),
    ("on a text as ground truth", "return ground_truth + 1", "(TypeError: can only concatenate str"),
    ("by leaving", "raise SystemExit(3)", "(SystemExit: 3)"),
    ("with an empty message", "raise RuntimeError", "(RuntimeError: )"),
):
    reward(f"fails {name}", function(body), f"{MINE} fails {ON} {said}", "mend it")
for score, body in (("2", "2"), ("-1.5", "{'score': -1.5, 'acc': 0}"), ("100", "decimal.Decimal(100)")):
    bounded = f"{MINE} returns {score} {ON}, and method=skpo needs rewards within [-1, 1]"
    fix = "scale it, or choose a method without a tracker (method=grpo)"
    reward(f"out of bounds: {score}", function(f"return {body}"), bounded, fix)
hangs, soon = f"{MINE} has not returned after 0.2 s {ON}", given("skpo.prompt_timeout_s", 0.2)
reward("hangs", function("time.sleep(60)"), hangs, "put a bound on what it waits for", "compute_score", soon)
case(
    "reward: overlong punishment with trackers",
    "reward.reward_kwargs.overlong_buffer_cfg.enable: is true",
    "dapo",
    given("reward.reward_manager.name", "dapo"),
    given("reward.reward_kwargs", {"max_resp_len": 64, "overlong_buffer_cfg": {"enable": True, "len": 8}}),
)
value("reward.reward_manager.name", "naif", "reward.reward_manager: naif cannot be loaded (", "naive or dapo")
value(f"{REWARD}.path", None, f"{REWARD}.path: is not set", "pkg://reward_fns")
NO_MODULE = f"{REWARD}: compute_score of pkg://not_here cannot be loaded"
value(f"{REWARD}.path", "pkg://not_here", NO_MODULE, "pkg://module")
for kwargs, said, fix in (
    ({"answr_format": "boxed"}, f"{REWARD}.reward_kwargs.answr_format: is unknown", "answer_format"),
    (None, f"{REWARD}.reward_kwargs: is None, must be a record", "leave it out"),
    ("boxed", f"{REWARD}.reward_kwargs: is 'boxed', must be a group of keys", f"give {REWARD}."),
    (
        {"ground_truth": "5"},
        f"{REWARD}: compute_score of pkg://reward_fns: reward_kwargs has ground_truth, which",
        "takes",
    ),
):
    value(f"{REWARD}.reward_kwargs", kwargs, said, fix)

# ---- parquet

TRAIN, WRITE = "data.train_files: {train}: ", "python -m data_prep."
Change = Callable[[pa.Table], pa.Table]


def written(change: Change, file: str = "{train}") -> Spoil:
    """Write the training file, changed, here."""

    def spoil(run: Run) -> None:
        Path(run.named(file)).parent.mkdir(exist_ok=True)
        pq.write_table(change(pq.read_table(run.train)), run.named(file))

    return spoil


def column(name: str, values: Callable[[list], Any]) -> Change:
    """Change the values of a column; one that is not there is added, from a list of nulls."""

    def change(table: pa.Table) -> pa.Table:
        there = name in table.column_names
        made = values(table[name].to_pylist() if there else [None] * table.num_rows)
        made = made if isinstance(made, pa.Array) else pa.array(made)
        return (
            table.set_column(table.column_names.index(name), name, made) if there else table.append_column(name, made)
        )

    return change


def row(number: int, item: Any) -> Callable[[list], list]:
    return lambda old: [*old[:number], item, *old[number + 1 :]]


def parquet(name: str, change: Change, begins: str, fix: str = WRITE) -> None:
    """A case of a changed training file."""
    case(f"parquet: {name}", TRAIN + begins, fix, written(change))


for role, nothing in product(("train", "val"), (None, [], "")):
    value(f"data.{role}_files", nothing, f"data.{role}_files: is not set; name a parquet file", "data=<name>")
value("data.train_batch_size", 8, "data.train_files: 6 rows are fewer than data.train_batch_size=8", "")
value("data.prompt_key", "question", "data.train_files: {train}: missing column(s) question", "")
for name in ("id", "prompt"):
    parquet(f"no column {name}", lambda table, name=name: table.drop_columns([name]), f"missing column(s) {name}")
for name, of, values, place in (
    ("ids are numbers", "id", lambda old: list(range(len(old))), "row 0"),
    ("an empty id", "id", row(2, ""), "row 2"),
    ("no data source", "data_source", row(5, None), "row 5"),
    ("prompts are text", "prompt", lambda old: ["2 + 2?"] * len(old), "row 0"),
    ("a prompt without messages", "prompt", row(3, []), "row 3"),
    ("a message without a role", "prompt", row(5, [{"role": None, "content": "2 + 2?"}]), "row 5"),
    ("no ground truth", "reward_model", lambda old: [{"ground_truth": None}] * len(old), "row 0"),
):
    parquet(name, column(of, values), f"{place}: column '{of}")
parquet("an id twice", column("id", lambda ids: [ids[0], ids[0], *ids[2:]]), "rows 0 and 1: same id", "drop one")
NO_REWARD = "row 2: data_source 'mine' has no reward here"
parquet("a source without reward", column("data_source", row(2, "mine")), NO_REWARD, f"set {REWARD}.path")
for item, kind in (("{}", "string"), ([1], "list<")):
    extra = column("extra_info", lambda old, item=item: [item] * len(old))
    parquet(f"extra_info is a {kind}", extra, f"column 'extra_info' is {kind}", "make it a struct")
for kind, bad in (
    ("an escape sequence", "aime\x1b]0;x\x07"),
    ("a line break", "aime24\n  held-out 1.000"),
    ("a return", "aime24\r"),
    ("a mark of direction", "aime\u202e42"),
    ("a line separator", "aime\u2028"),
    ("a byte of the C1 set", "aime\x9b2J"),
):
    for name in ("id", "data_source"):
        said = f"row 4: column '{name}' is not text that can be printed (found 'aime"
        parquet(f"{kind} in {name}", column(name, row(4, bad)), said)

MATH, CHOICE, GSM8K, OURS = "HuggingFaceH4/MATH-500", "TIGER-Lab/MMLU-Pro", "openai/gsm8k", "skpo/arithmetic"
for name, source, good, wrong, said in (
    ("words for a number", GSM8K, "5", "five", "'five' is not a number"),
    ("a fraction for gsm8k", GSM8K, "5", "1/2", "'1/2' is not a number"),
    ("blanks for gsm8k", GSM8K, "5", "  ", "'  ' is not a number"),
    ("the whole solution for gsm8k", GSM8K, "5", "2+3=5\n#### 5", "'2+3=5"),
    ("two letters", CHOICE, "C", "AD", "'AD' is no"),
    ("a small letter", CHOICE, "C", "c", "'c' is no"),
    ("a letter that is not an option", CHOICE, "C", "Z", "'Z' is no"),
    ("blanks for math", MATH, "5", " \t", "' "),
    ("a solution for math", MATH, "5", "x" * 401, "'xxx"),
    ("a list", OURS, ["5"], ["6"], "['5'] is a list"),
):
    place = 0 if source == OURS else 3
    sources = column("data_source", lambda old, source=source: [source] * len(old))
    truths = column(
        "reward_model",
        lambda old, good=good, wrong=wrong: row(3, {"ground_truth": wrong})([{"ground_truth": good}] * len(old)),
    )
    case(f"truth: {name}", f"{TRAIN}row {place}: ground_truth {said}", "", written(sources), written(truths))

case("parquet: cut off", TRAIN + "cannot be read as parquet", WRITE, cut("{train}", 2000))
case("parquet: empty file", TRAIN + "cannot be read as parquet", WRITE, cut("{train}", 0))
folder = (gone("{train}"), lambda run: run.train.mkdir())
case("parquet: a folder", TRAIN + "is a folder", "name the .parquet file in it", *folder)
parquet("no rows", lambda table: table.slice(0, 0), "has no rows")
value("data.val_files", "{folder}/none.parquet", "data.val_files: {folder}/none.parquet: file not found", WRITE)


def files(role: str, *names: str) -> Spoil:
    return lambda run: run.set(f"data.{role}_files", [run.named(name) for name in names])


again, unique = "{folder}/again.parquet", "ids must be unique over all of data.train_files"
copy = written(lambda table: table, again)
case("parquet: an id in two files", f"{again}: id ", unique, copy, files("train", "{train}", again))
case(
    "parquet: a file twice", TRAIN + "is named twice", "leave one of the two out", files("train", "{train}", "{train}")
)
link = "{folder}/link.parquet"
case(
    "parquet: a file twice by a link",
    f"data.val_files: {link}: is named twice (as {{train}})",
    "leave",
    lambda run: Path(run.named(link)).symlink_to(run.train),
    files("val", "{train}", link),
)
for name in (
    *("train[v2].parquet", "train*.parquet", "train?.parquet", "[run]/train.parquet", "a::b.parquet"),
    *("train.parq", "train.PARQUET", "train", "train.parquet.bak", "train.pq"),
):
    file = f"{{folder}}/{name}"
    said = "has '" if name.endswith(".parquet") else "does not end in .parquet, by which verl tells how to read it"
    called = written(lambda table: table, file), given("data.train_files", file)
    case(f"parquet: called {name}", f"data.train_files: {file}: {said}", "rename it", *called)
for kind in ("jsonl", "json", "csv"):
    file = f"{{folder}}/my.{kind}"
    said = (
        f"data.train_files: {file}: is {kind}, not parquet; convert it with `python -m data_prep.files --source {file}"
    )
    case(f"parquet: {kind}", said, "or train on it by data=mine", text(file, ""), given("data.train_files", file))


def field(name: str, part: str, change: Callable[[Any], Any]) -> Change:
    return column(name, lambda old: [{**value, part: change(value[part])} for value in old])


def large_lists(table: pa.Table) -> pa.Table:
    kind = pa.large_list(table.schema.field("prompt").type.value_type)
    return table.set_column(2, "prompt", table["prompt"].cast(kind))


# A second training file whose schema verl's reader cannot join with the first.
for name, differing, change in (
    ("an index that is a text", "extra_info", field("extra_info", "index", str)),
    ("a level that is a float", "extra_info", field("extra_info", "index", float)),
    ("truths that are numbers", "reward_model", field("reward_model", "ground_truth", int)),
    ("large texts of polars", "id", column("id", lambda old: pa.array(old, pa.large_string()))),
    ("text views", "data_source", column("data_source", lambda old: pa.array(old, pa.string_view()))),
    ("large lists", "prompt", large_lists),
):
    other, renamed = "{folder}/other.parquet", column("id", lambda ids: [f"other{id_}" for id_ in ids])
    said = f"data.train_files: {other}: cannot be joined with {{train}}: column '{differing}' is "
    second = written(lambda table, change=change, renamed=renamed: change(renamed(table)), other)
    case(
        f"parquet: two files, {name}", said, "write both with the same types", second, files("train", "{train}", other)
    )

parquet(
    "two columns of one name",
    lambda table: table.append_column("ability", table["ability"]),
    "verl's reader refuses it (ArrowInvalid",
    "write_parquet",
)
for name, item, said, fix in (
    *((name, 1, f"has a column '{name}': verl ", "rename or remove it") for name in ("__rollout_n__", "__do_sample__")),
    *((name, 1, f"has a column '{name}': verl ", "rename or remove it") for name in ("validate", "global_steps")),
    ("skpo_seed", 1, "has a column 'skpo_seed', and names that begin with skpo_ are ours", "rename it"),
    ("agent_name", "tool_agent", "column 'agent_name' has 'tool_agent'", "method=grpo"),
):
    parquet(f"a column {name}", column(name, lambda old, item=item: [item] * len(old)), said, fix)
for name in ("images", "videos", "audios"):
    in_one_row = column(name, lambda old: [[]] * (len(old) - 1) + [["a.png"]])
    parquet(f"a column {name}", in_one_row, f"column '{name}' holds {name}", "remove it")

DATASET = "from {} as Base\nclass Mine(Base): pass\n"
MY_CLASS = (given("data.custom_cls.path", "{folder}/dataset.py"), given("data.custom_cls.name", "Mine"))
case(
    "parquet: a name of a row's own where rows are sent whole",
    TRAIN + "has a column 'responses'",
    "rename it",
    text("{folder}/dataset.py", DATASET.format("verl.utils.dataset.rl_dataset import RLHFDataset")),
    written(column("responses", lambda old: ["5"] * len(old))),
    *MY_CLASS,
)
for name, content, said, fix in (
    (
        "without a table",
        DATASET.format("torch.utils.data import Dataset"),
        "has no `dataframe`",
        "curriculum.enable=false",
    ),
    ("not a data set", "class Mine(dict): pass\n", "cannot be loaded (TypeError: The custom", "a torch Dataset in it"),
    ("another name", "class Other: pass\n", "cannot be loaded (AttributeError", "a torch Dataset in it"),
    ("broken", "import nowhere\n", "cannot be loaded (ModuleNotFoundError", "a torch Dataset in it"),
):
    begins = f"data.custom_cls: Mine of {{folder}}/dataset.py {said}"
    case(f"data.custom_cls: {name}", begins, fix, text("{folder}/dataset.py", content), *MY_CLASS)


def one_long_text(rows: int) -> pa.Array:
    """A small file that would fill the memory."""
    texts = pa.array(["aime24", "x" * 1_000_001])
    return pa.DictionaryArray.from_arrays(pa.array([0] * (rows - 1) + [1], pa.int32()), texts)


def one_long_message(rows: int) -> pa.Array:
    message = pa.StructArray.from_arrays([pa.array(["user"] * rows), one_long_text(rows)], names=["role", "content"])
    return pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), message)


for name, long in (("data_source", one_long_text), ("prompt", one_long_message)):
    compressed = column(name, lambda old, long=long: long(len(old)))
    said = f"row 5: column '{name}' has a text of 1000001 bytes, at most 1000000 are read"
    parquet(f"a long text in a dictionary in {name}", compressed, said, "")

short = given("data.max_prompt_length", 20)
case("parquet: a long prompt", "{train}: row 0: the prompt has ", "data.filter_overlong_prompts=true", short)
ALL_LONG, filtered = "data.train_files: 0 prompts of at most", given("data.filter_overlong_prompts", True)
case("parquet: all prompts are too long", ALL_LONG, "raise the first or lower the second", short, filtered)

# ---- model folder

PATH, TEMPLATE = "actor_rollout_ref.model.path", "actor_rollout_ref.model.custom_chat_template"
CONFIG, WEIGHTS, INDEX = (
    f"{{model}}/{n}" for n in ("config.json", "model.safetensors", "model.safetensors.index.json")
)
SHARDS = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
WHOLE_CHECKPOINT, TEMPLATE_FAILS = "whole checkpoint", "{train}: row 0: the model's chat template fails"


def described(**changes: Any) -> Spoil:
    def spoil(run: Run) -> None:
        file = run.model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


UNREADABLE, NO_TOKENIZER = "{model} cannot be read as a model", "no tokenizer can be loaded from {model}"
for name, spoil, said, fix in (
    ("not there", given(PATH, "{folder}/none"), "{folder}/none cannot be read as a model", WHOLE_CHECKPOINT),
    ("a file", given(PATH, CONFIG), f"{CONFIG} is a file", "give the folder"),
    ("none", given(PATH, None), "is not set", "model=<name>"),
    ("no config.json", gone(CONFIG), "{model} holds no config.json", "give the folder of a Hugging Face checkpoint"),
    ("broken config.json", text(CONFIG, '{"model_type": "lla'), UNREADABLE, WHOLE_CHECKPOINT),
    ("unknown", described(model_type="not_a_model"), UNREADABLE, WHOLE_CHECKPOINT),
    ("foreign", text(CONFIG, '{"model_type": "t5"}'), "{model} is a t5, which is not a causal ", "give one that is"),
    ("no tokenizer", gone("{model}/tokenizer*"), NO_TOKENIZER, ""),
    ("broken tokenizer", cut("{model}/tokenizer.json", 100), NO_TOKENIZER, ""),
    ("no template", gone("{model}/*.jinja"), "the tokenizer of {model} has no chat template", "custom_chat_template"),
    ("no weights", gone(WEIGHTS), "{model} holds no weights", "give the folder of a whole checkpoint"),
    ("weights cut off", cut(WEIGHTS, 60), f"{WEIGHTS} is missing or cut off", "download the model again"),
    ("a shard is missing", text(INDEX, SHARDS), "{model}/model-2.safetensors is missing", "download the model again"),
    ("broken index", text(INDEX, '{"weight_map": ["a"]}'), f"{INDEX} is not an index", "download the model again"),
):
    case(f"model: {name}", f"{PATH}: {said}", fix, spoil)
SHORT = "actor_rollout_ref.rollout.max_model_len: is "
case("model: short context", SHORT, "set max_model_len=64", described(max_position_embeddings=64))
endless = text("{model}/chat_template.jinja", "{% for message in messages %}{{ message['content'] }}")
case("model: broken chat template", TEMPLATE_FAILS, TEMPLATE, endless)
refusing = text("{model}/chat_template.jinja", "{{ raise_exception('no users here') }}")
case("model: a template that refuses a role", TEMPLATE_FAILS, "change the prompt's roles", refusing)

# ---- checkpoint folder

STATE, PICKLE = f"{{checkpoint}}/{FILE_NAME}", pickle.dumps({"values": [1, 2, 3]})
CANNOT, AGAIN = "{checkpoint}: cannot be resumed from: ", "with trainer.resume_mode=disable"
ACTOR_FILE = "{{checkpoint}}/actor/{}_world_size_1_rank_0.pt"


def other_settings(**changes: Any) -> Spoil:
    """State of a run with other settings."""
    return lambda run: SkpoState(SkpoSettings(**({"group_size": run.config.skpo.group_size} | changes)), 64).save(
        run.checkpoint
    )


def removed(folder: str) -> Spoil:
    return lambda run: shutil.rmtree(run.named(folder))


def foreign_npz(run: Run) -> None:
    with open(run.named(STATE), "wb") as file:
        np.savez(file, weights=np.zeros(3))


for name, spoil in (
    ("state cut off", cut(STATE, 300)),
    ("a foreign npz", foreign_npz),
    ("a pickle", lambda run: Path(run.named(STATE)).write_bytes(PICKLE)),
):
    case(f"checkpoint: {name}", f"{STATE}: cannot be read as SKPO state", "trainer.resume_from_path", spoil)
case("checkpoint: no state", f"{{checkpoint}}: holds no {FILE_NAME}", AGAIN, gone(STATE))
for changed, said in (
    ({"group_size": 5}, "group_size=5, this run has 8"),
    ({"tracker": TrackerSettings(drift="nats")}, "drift=nats, this run has kl_steps"),
):
    begins = f"{STATE}: was saved with {said}"
    case(f"checkpoint: another {said}", begins, "use the same value", other_settings(**changed))
MODEL_FILE, OPTIMIZER_FILE = ACTOR_FILE.format("model"), ACTOR_FILE.format("optim")
for name, spoil, file in (
    ("no data.pt", gone(f"{{checkpoint}}/{DATA_FILE}"), DATA_FILE),
    ("data.pt cut off", cut(f"{{checkpoint}}/{DATA_FILE}", 100), DATA_FILE),
    ("no optimizer", gone(OPTIMIZER_FILE), "actor/optim_world_size_1_rank_0.pt"),
    ("weights cut off", cut(MODEL_FILE, 100), "actor/model_world_size_1_rank_0.pt"),
    ("no actor", removed("{checkpoint}/actor"), "actor/model_world_size_1_rank_0.pt"),
):
    case(f"checkpoint: {name}", f"{CANNOT}{file} is missing or cut off", AGAIN, spoil)
case(
    "checkpoint: other ranks",
    CANNOT + "actor/ was saved by 2 rank(s), this run has 1 (trainer.nnodes * ",
    AGAIN,
    removed("{checkpoint}/actor"),
    lambda run: write_checkpoint(run.checkpoint, SkpoState(SkpoSettings(), 64), ranks=2),
)
case(
    "checkpoint: an older one is whole",
    CANNOT + DATA_FILE,
    "resume from {folder}/out/checkpoints/global_step_2 by",
    lambda run: write_checkpoint(run.checkpoint.parent / "global_step_2"),
    gone(f"{{checkpoint}}/{DATA_FILE}"),
)
MARKED = f"{{folder}}/out/checkpoints/{MARKER}"
case(
    "checkpoint: garbage in the marker",
    f"{MARKED}: holds 'three' and no step",
    "write the number",
    text(MARKED, "three"),
)
GONE = f"{MARKED}: names global_step_3"
case("checkpoint: the marked one is gone", GONE, "remove it to start again", removed("{checkpoint}"))
for path in ("{model}", "{checkpoint}/actor", "{folder}/global_step_9"):
    begins = f"trainer.resume_from_path: {path} is not a folder named global_step_<N>"
    spoils = given("trainer.resume_mode", "resume_path"), given("trainer.resume_from_path", path)
    case(f"checkpoint: resume from {path}", begins, "", text("{folder}/global_step_9", "a file"), *spoils)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(run: Run, capsys, name: str) -> None:
    spoil, begins, fix = CASES[name]
    spoil(run)
    message = run.message()
    assert message.startswith(f"error: {run.named(begins)}")
    assert run.named(fix) in message
    assert "launched" not in capsys.readouterr().out
    assert not (run.folder / "out/config.yaml").exists()


# ---------------------------------------------------------------- the environment


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("SKPO_PLATFORM", "tpu", "SKPO_PLATFORM: is 'tpu' in the environment, must be cpu or gpu"),
        ("SKPO_PLATFORM", "", "SKPO_PLATFORM: is '' in the environment, must be cpu or gpu"),
        ("SKPO_NUM_THREADS", "two", "SKPO_NUM_THREADS: is 'two' in the environment, must be a whole number above 0"),
        ("SKPO_NUM_THREADS", "0", "SKPO_NUM_THREADS: is '0' in the environment, must be a whole number above 0"),
        ("SKPO_NUM_THREADS", "-2", "SKPO_NUM_THREADS: is '-2' in the environment, must be a whole number above 0"),
        ("SKPO_CACHE", __file__, f"SKPO_CACHE: {__file__} is a file; set it to a folder"),
        ("TENSORBOARD_DIR", __file__, f"TENSORBOARD_DIR: {__file__} is a file; set it to a folder"),
    ],
)
def test_a_bad_variable_of_the_environment(monkeypatch, name: str, given: str, said: str) -> None:
    monkeypatch.setenv("SKPO_PLATFORM", "cpu")
    monkeypatch.setenv(name, given)
    monkeypatch.setattr("sys.argv", ["main"])
    monkeypatch.setattr(main, "run", lambda: pytest.fail("Hydra was called"))
    with pytest.raises(SystemExit) as exit_info:
        main.main()
    assert str(exit_info.value.code).startswith(f"error: {said}")
    assert len(str(exit_info.value.code).splitlines()) == 1


def test_another_platform_of_verl_in_the_environment(run: Run, monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("VERL_PLATFORM", "nvidia")
    with pytest.raises(RuntimeError, match=r"^VERL_PLATFORM=nvidia is set .* unset VERL_PLATFORM or choose the same"):
        apply_platform(run.config)
