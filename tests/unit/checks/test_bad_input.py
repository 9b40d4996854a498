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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf, open_dict

from data_prep.schema import Row, write_parquet
from recipe.skpo import main
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
    monkeypatch.setattr(main, "launch", lambda config: print("launched"))
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
"""Name to what is spoilt, how the message begins, the fix in it; {train}, {model}, {checkpoint}, {folder} are paths."""


def case(name: str, begins: str, fix: str) -> Callable[[Spoil], Spoil]:
    def add(spoil: Spoil) -> Spoil:
        assert name not in CASES, name
        CASES[name] = (spoil, begins, fix)
        return spoil

    return add


def value(path: str, given: Any, begins: str | None = None, fix: str = "must be") -> None:
    """A case of a value in the config."""
    case(f"{path}={given!r}", begins or f"{path}: is {given!r}, must be ", fix)(lambda run: run.set(path, given))


# ---- config

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
value("data.train_batch_size", 0, fix="a whole number of at least 1")
value("data.train_batch_size", "many", fix="a whole number of at least 1")
value("data.train_batch_size", 2.5, fix="a whole number of at least 1")
value("data.train_batch_size", None, fix="a whole number of at least 1")
value("data.max_prompt_length", -1, fix="a whole number of at least 1")
value("data.max_response_length", 0, fix="a whole number of at least 1")
value(f"{ACTOR}.ppo_mini_batch_size", 0, fix="a whole number of at least 1")
value(f"{ACTOR}.ppo_mini_batch_size", 3, "data.train_batch_size: 4 prompts do not split", "ppo_mini_batch_size=3")
value(f"{ACTOR}.ppo_epochs", 0, fix="a whole number of at least 1")
value(f"{ACTOR}.optim.lr", 0.0, fix="a number above 0")
value(f"{ACTOR}.optim.lr", float("nan"), fix="a number above 0")
value(f"{ACTOR}.optim.lr", "fast", fix="a number above 0")
value(f"{ACTOR}.optim.weight_decay", -0.1, fix="a number of at least 0")
value(f"{ACTOR}.optim.clip_grad", 0, fix="a number above 0")
value(f"{ROLLOUT}.temperature", 0.0, fix="a number above 0")
value(f"{ROLLOUT}.top_p", 1.5, fix="a number above 0 and at most 1")
value(f"{ROLLOUT}.gpu_memory_utilization", 60, fix="a number above 0 and at most 1")
value(f"{ROLLOUT}.tensor_model_parallel_size", 0, fix="a whole number of at least 1")
value(f"{ROLLOUT}.max_model_len", "long", fix="a whole number of at least 1, or null")
value(f"{ROLLOUT}.name", "sglang", f"{ROLLOUT}.name: is sglang", "must be vllm")
value("trainer.nnodes", 0, fix="a whole number of at least 1")
value("trainer.n_gpus_per_node", True, fix="a whole number of at least 1")
value("trainer.total_epochs", 0, fix="a whole number of at least 1")
value("trainer.total_training_steps", 0, fix="a whole number of at least 1, or null")
value("trainer.save_freq", "often", fix="a whole number of at least -1")
value("trainer.test_freq", None, fix="a whole number of at least -1")
value("trainer.max_actor_ckpt_to_keep", 0, fix="a whole number of at least 1, or null")
value(
    "trainer.remove_previous_ckpt_in_save", True, "trainer.remove_previous_ckpt_in_save: ", "max_actor_ckpt_to_keep=1"
)
value("trainer.default_hdfs_dir", "hdfs://x", "trainer.default_hdfs_dir: is hdfs://x", "must be None")
value("trainer.critic_warmup", 5, fix="must be 0")
value(f"{ACTOR}.checkpoint.async_save", True, f"{ACTOR}.checkpoint.async_save: is True", "must be False")
value(
    f"{ACTOR}.checkpoint.save_contents",
    ["model"],
    f"{ACTOR}.checkpoint.save_contents: lacks optimizer, extra",
    "add it",
)
value(
    f"{ACTOR}.checkpoint.load_contents",
    ["model", "extra"],
    f"{ACTOR}.checkpoint.load_contents: lacks optimizer",
    "add it",
)
value(f"{ACTOR}.strategy", "fsdp", f"{ACTOR}.strategy: is fsdp", "use fsdp2")
value("platform.num_threads", 0, fix="a whole number of at least 1")
value("platform.kv_cache_gib", 0.5, fix="a whole number of at least 1")
value("trainer.logger", ["consle"], "trainer.logger: consle is unknown", "known are wandb, ")
value("trainer.resume_mode", "always", "trainer.resume_mode: is always", "must be auto, disable or resume_path")
value(
    "ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY",
    "0123456789",
    "ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY: looks like a secret",
    "export it",
)
value("trainer.project_name", "hf_" + "a" * 30, "trainer.project_name: looks like a secret", "export it")


@case("a logger that is not installed", "trainer.logger: clearml needs the package clearml", "install it")
def _(run: Run) -> None:
    run.set("trainer.logger", ["console", "clearml"])


@case("output_dir below a file", "output_dir: {folder}/train.parquet/out cannot be made", "give another folder")
def _(run: Run) -> None:
    run.set("output_dir", f"{run.train}/out")


@case(
    "checkpoints in a file", "trainer.default_local_dir: {folder}/train.parquet cannot be made", "give another folder"
)
def _(run: Run) -> None:
    run.set("trainer.default_local_dir", str(run.train))


REWARD = "reward.custom_reward_function"


def reward(name: str, text: str | None, reason: str, function: str = "compute_score") -> None:
    """A case of a reward file with this content; None: there is no file."""

    def spoil(run: Run) -> None:
        file = run.folder / "mine.py"
        if text is not None:
            file.write_text(text)
        run.set(f"{REWARD}.path", str(file))
        run.set(f"{REWARD}.name", function)

    begins = f"{REWARD}: {function} of {{folder}}/mine.py {'' if reason.startswith('cannot') else 'cannot be loaded ('}"
    case(f"reward: {name}", begins + reason, "pkg://module")(spoil)


reward("no file", None, "FileNotFoundError")
reward("no such function", "def other(): pass\n", "AttributeError")
reward("broken python", "x = 1\ndef compute_score(:\n", "SyntaxError: invalid syntax, line 2)")
reward("raises when it is imported", "1 / 0\n", "ZeroDivisionError: division by zero)")
reward("imports what is not there", "import nowhere\n", "ModuleNotFoundError: No module named 'nowhere')")

# What verl calls it with, by keyword.
CANNOT_BE_CALLED = "cannot be called by the keywords data_source, solution_str, ground_truth, extra_info"
for name, signature, said in (
    ("no extra_info", "data_source, solution_str, ground_truth", "got an unexpected keyword argument 'extra_info'"),
    ("positional only", "data_source, solution_str, ground_truth, extra_info, /", "'data_source' parameter is posi"),
    ("other names", "source, response, truth, **kwargs", "missing a required argument: 'source'"),
    ("one argument more", "data_source, solution_str, ground_truth, extra_info, tokenizer", "missing a required arg"),
    ("a method's self", "self, data_source, solution_str, ground_truth, extra_info=None", "missing a required arg"),
    ("trl's", "prompts, completions, **kwargs", "missing a required argument: 'prompts'"),
    ("only positions", "*args", "got an unexpected keyword argument 'data_source'"),
):
    reward(f"signature: {name}", f"def compute_score({signature}): return 1.0\n", f"{CANNOT_BE_CALLED} ({said}")


@case("reward: not a function", f"{REWARD}: VALUE of {{folder}}/mine.py is a int, not a function", "a function in it")
def _(run: Run) -> None:
    (run.folder / "mine.py").write_text("VALUE = 3\n")
    run.set(f"{REWARD}.path", f"{run.folder}/mine.py")
    run.set(f"{REWARD}.name", "VALUE")


def own_reward(run: Run, body: str, start: str = "def") -> None:
    """Give the run a reward function in verl's documented signature."""
    signature = "compute_score(data_source, solution_str, ground_truth, extra_info=None)"
    text = f"import asyncio, decimal, math, time\n{start} {signature}:\n    {body}\n"
    (run.folder / "mine.py").write_text(text)
    run.set(f"{REWARD}.path", f"{run.folder}/mine.py")


MINE = f"{REWARD}: compute_score of {{folder}}/mine.py"
NOT_A_REWARD = "return a number, or a dict with the number as 'score'"
ON = "{train} (row 0) and an empty response"
for name, body, said in (
    ("None", "pass", "it returned None, which is not a finite number"),
    ("text", "return '1.0'", "it returned '1.0', which is not a finite number"),
    ("NaN", "return math.nan", "it returned nan, which is not a finite number"),
    ("infinity", "return {'score': -math.inf}", "it returned -inf, which is not a finite number"),
    ("a tuple", "return 1.0, {}", "it returned (1.0, {{}}), which is not a finite number"),
    ("a list of one", "return [1.0]", "it returned [1.0], which is not a finite number"),
    ("a vector", "import torch; return torch.zeros(2)", "it returned tensor([0., 0.]), which is not a finite number"),
    ("a complex number", "return 1 + 0j", "it returned (1+0j), which is not a finite number"),
    ("a huge number", "return 10**400", "it returned 1000"),
    ("a record without score", "return {'reward': 1.0}", "it returned a record without 'score'"),
    ("a score that is None", "return {'score': None}", "it returned None, which is not a finite number"),
    ("a coroutine", "return asyncio.sleep(0)", "it returned a coroutine; define it by `async def`"),
):
    case(f"reward returns {name}", f"{MINE}: {said}", NOT_A_REWARD)(lambda run, body=body: own_reward(run, body))
case("async reward returns text", f"{MINE}: it returned 'x'", NOT_A_REWARD)(
    lambda run: own_reward(run, "await asyncio.sleep(0); return 'x'", "async def")
)
for name, body, said in (
    ("on an empty response", "return float(solution_str)", "(ValueError: could not convert string to float: '')"),
    ("on what extra_info lacks", "return extra_info['level']", "(KeyError: 'level')"),
    ("on a text as ground truth", "return ground_truth + 1", "(TypeError: can only concatenate str"),
    ("by leaving", "raise SystemExit(3)", "(SystemExit: 3)"),
    ("with an empty message", "raise RuntimeError", "(RuntimeError: )"),
):
    case(f"reward fails {name}", f"{MINE} fails for {ON} {said}", "mend it")(
        lambda run, body=body: own_reward(run, body)
    )


@case("reward: hangs", f"{MINE} has not returned after 0.2 s for {ON}", "put a bound on what it waits for")
def _(run: Run) -> None:
    run.set("skpo.prompt_timeout_s", 0.2)
    own_reward(run, "time.sleep(60)")


for name, body in (
    ("2", "return 2"),
    ("-1.5", "return {'score': -1.5, 'acc': 0}"),
    ("100", "return decimal.Decimal(100)"),
):
    case(
        f"reward out of bounds: {name}",
        f"{MINE} returns {name} for {ON}, and method=skpo needs rewards within [-1, 1]",
        "scale it, or choose a method without a tracker (method=grpo)",
    )(lambda run, body=body: own_reward(run, body))


@case("reward: overlong punishment with trackers", "reward.reward_kwargs.overlong_buffer_cfg.enable: is true", "dapo")
def _(run: Run) -> None:
    run.set("reward.reward_manager.name", "dapo")
    run.set("reward.reward_kwargs", {"max_resp_len": 64, "overlong_buffer_cfg": {"enable": True, "len": 8}})


value("reward.reward_manager.name", "naif", "reward.reward_manager: naif cannot be loaded (", "naive or dapo")
value(
    f"{REWARD}.reward_kwargs",
    {"answr_format": "boxed"},
    f"{REWARD}.reward_kwargs.answr_format: is unknown",
    "answer_format",
)
value(f"{REWARD}.reward_kwargs", None, f"{REWARD}.reward_kwargs: is None, must be a record", "leave it out")
value(
    f"{REWARD}.reward_kwargs",
    "boxed",
    f"{REWARD}.reward_kwargs: is 'boxed', must be a group of keys",
    f"give {REWARD}.",
)
value(
    f"{REWARD}.reward_kwargs",
    {"ground_truth": "5"},
    f"{REWARD}: compute_score of pkg://reward_fns: reward_kwargs has ground_truth, which verl gives by itself",
    "takes data_source",
)


@case("reward: no module", f"{REWARD}: compute_score of pkg://not_here cannot be loaded", "pkg://module")
def _(run: Run) -> None:
    run.set(f"{REWARD}.path", "pkg://not_here")


value(f"{REWARD}.path", None, f"{REWARD}.path: is not set", "pkg://reward_fns")

# ---- parquet


def column(name: str, column: str, change: Callable[[list], list] | None, begins: str, fix: str) -> None:
    """A case of a training file with one column changed, or without it."""

    def spoil(run: Run) -> None:
        table = pq.read_table(run.train)
        index = table.column_names.index(column)
        values = table.column(column).to_pylist()
        table = table.remove_column(index)
        if change is not None:
            table = table.add_column(index, column, pa.array(change(values)))
        pq.write_table(table, run.train)

    case(f"parquet: {name}", begins, fix)(spoil)


for role in ("train", "val"):
    for nothing in (None, [], ""):
        value(f"data.{role}_files", nothing, f"data.{role}_files: is not set; name a parquet file", "data=<name>")
value("data.train_batch_size", 8, "data.train_files: 6 rows are fewer than data.train_batch_size=8", "")
value("data.prompt_key", "question", "data.train_files: {train}: missing column(s) question", "")
TRAIN, WRITE = "data.train_files: {train}: ", "python -m data_prep."
column("no column id", "id", None, TRAIN + "missing column(s) id", WRITE)
column("no column prompt", "prompt", None, TRAIN + "missing column(s) prompt", WRITE)
column("ids are numbers", "id", lambda ids: list(range(len(ids))), TRAIN + "row 0: column 'id'", WRITE)
column("an empty id", "id", lambda ids: [*ids[:2], "", *ids[3:]], TRAIN + "row 2: column 'id'", WRITE)
column("no data source", "data_source", lambda old: [*old[:-1], None], TRAIN + "row 5: column 'data_source'", WRITE)
column("prompts are text", "prompt", lambda old: ["2 + 2?"] * len(old), TRAIN + "row 0: column 'prompt'", WRITE)
column(
    "a prompt without messages", "prompt", lambda old: [*old[:3], [], *old[4:]], TRAIN + "row 3: column 'prompt'", WRITE
)
column(
    "a message without a role",
    "prompt",
    lambda old: [*old[:-1], [{"role": None, "content": "2 + 2?"}]],
    TRAIN + "row 5: column 'prompt'",
    WRITE,
)
column(
    "no ground truth", "reward_model", lambda old: [{"ground_truth": None}] * len(old), TRAIN + "row 0: column", WRITE
)
column("an id twice", "id", lambda ids: [ids[0], ids[0], *ids[2:]], TRAIN + "rows 0 and 1: same id", "drop one")
column(
    "a data source without a reward",
    "data_source",
    lambda old: [*old[:2], "mine", *old[3:]],
    TRAIN + "row 2: data_source 'mine' has no reward here",
    "set reward.custom_reward_function.path",
)
EXTRA = TRAIN + "column 'extra_info' is "
column("extra_info is text", "extra_info", lambda old: ["{}"] * len(old), EXTRA + "string", "make it a struct")
column("extra_info is a list", "extra_info", lambda old: [[1]] * len(old), EXTRA + "list<", "make it a struct")
for kind, bad in (
    ("an escape sequence", "aime\x1b]0;x\x07"),
    ("a line break", "aime24\n  held-out 1.000"),
    ("a return", "aime24\r"),
    ("a mark of direction", "aime\u202e42"),
    ("a line separator", "aime\u2028"),
    ("a byte of the C1 set", "aime\x9b2J"),
):
    for name in ("id", "data_source"):
        column(
            f"{kind} in {name}",
            name,
            lambda old, bad=bad: [*old[:4], bad, *old[5:]],
            TRAIN + f"row 4: column '{name}' is not text that can be printed (found 'aime",
            WRITE,
        )


def truth(name: str, source: str, truth: Any, said: str, row: int = 3) -> None:
    """A case of one ground truth that the reward of this source cannot check answers to."""

    def spoil(run: Run) -> None:
        table = pq.read_table(run.train)
        models = [{"ground_truth": good} for good in TRUTHS[source]]
        models[row] = {"ground_truth": truth}
        for name, values in (("data_source", [source] * len(models)), ("reward_model", models)):
            index = table.column_names.index(name)
            table = table.set_column(index, name, pa.array(values))
        pq.write_table(table, run.train)

    case(f"truth: {name}", TRAIN + f"row {row}: ground_truth {said}", "")(spoil)


MATH, CHOICE, GSM8K = "HuggingFaceH4/MATH-500", "TIGER-Lab/MMLU-Pro", "openai/gsm8k"
TRUTHS = {MATH: ["5"] * (BATCH + 2), CHOICE: ["C"] * (BATCH + 2), GSM8K: ["5"] * (BATCH + 2)}
truth("words for a number", GSM8K, "five", "'five' is not a number")
truth("a fraction for gsm8k", GSM8K, "1/2", "'1/2' is not a number")
truth("blanks for gsm8k", GSM8K, "  ", "'  ' is not a number")
truth("the whole solution for gsm8k", GSM8K, "2+3=5\n#### 5", "'2+3=5")
truth("two letters", CHOICE, "AD", "'AD' is no")
truth("a small letter", CHOICE, "c", "'c' is no")
truth("a letter that is not an option", CHOICE, "Z", "'Z' is no")
truth("blanks for math", MATH, " \t", "' ")
truth("a solution for math", MATH, "x" * 401, "'xxx")
TRUTHS |= {"skpo/arithmetic": [["5"]] * (BATCH + 2)}
truth("a list", "skpo/arithmetic", ["6"], "['6'] is a list", row=0)


@case("parquet: cut off", TRAIN + "cannot be read as parquet", WRITE)
def _(run: Run) -> None:
    os.truncate(run.train, run.train.stat().st_size // 2)


@case("parquet: empty file", TRAIN + "cannot be read as parquet", WRITE)
def _(run: Run) -> None:
    run.train.write_bytes(b"")


@case("parquet: a folder", TRAIN + "is a folder", "name the .parquet file in it")
def _(run: Run) -> None:
    run.train.unlink()
    run.train.mkdir()


@case("parquet: no rows", TRAIN + "has no rows", WRITE)
def _(run: Run) -> None:
    pq.write_table(pq.read_table(run.train).slice(0, 0), run.train)


@case("parquet: no file", "data.val_files: {folder}/none.parquet: file not found", WRITE)
def _(run: Run) -> None:
    run.set("data.val_files", f"{run.folder}/none.parquet")


@case("parquet: an id in two files", "{folder}/again.parquet: id ", "ids must be unique over all of data.train_files")
def _(run: Run) -> None:
    shutil.copy(run.train, run.folder / "again.parquet")
    run.set("data.train_files", [str(run.train), f"{run.folder}/again.parquet"])


@case("parquet: a file twice", TRAIN + "is named twice", "leave one of the two out")
def _(run: Run) -> None:
    run.set("data.train_files", [str(run.train), str(run.train)])


@case("parquet: a file twice by a link", "data.val_files: {folder}/link.parquet: is named twice (as {train})", "leave")
def _(run: Run) -> None:
    (run.folder / "link.parquet").symlink_to(run.train)
    run.set("data.val_files", [str(run.train), f"{run.folder}/link.parquet"])


def renamed(name: str, begins: str) -> None:
    """A case of a training file under a name that verl's reader takes for something else."""

    def spoil(run: Run) -> None:
        (run.folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(run.train, run.folder / name)
        run.set("data.train_files", f"{run.folder}/{name}")

    case(f"parquet: called {name}", f"data.train_files: {{folder}}/{name}: {begins}", "rename it")(spoil)


for name in ("train[v2].parquet", "train*.parquet", "train?.parquet", "[run]/train.parquet", "a::b.parquet"):
    renamed(name, "has '")
for name in ("train.parq", "train.PARQUET", "train", "train.parquet.bak", "train.jsonl", "train.pq"):
    renamed(name, "does not end in .parquet, by which verl tells how to read it")


def joined(name: str, differing: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """A case of a second training file whose schema verl's reader cannot join with the first."""

    def spoil(run: Run) -> None:
        table = pq.read_table(run.train)
        ids = pa.array([f"other{n}" for n in range(table.num_rows)])
        table = table.set_column(table.column_names.index("id"), "id", ids)
        pq.write_table(change(table), run.folder / "other.parquet")
        run.set("data.train_files", [str(run.train), f"{run.folder}/other.parquet"])

    begins = f"data.train_files: {{folder}}/other.parquet: cannot be joined with {{train}}: column '{differing}' is "
    case(f"parquet: two files, {name}", begins, "write both with the same types")(spoil)


def replaced(column: str, change: Callable[[list], Any]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(
        table.column_names.index(column), column, change(table.column(column).to_pylist())
    )


def changed_field(column: str, field: str, change: Callable[[Any], Any]) -> Callable[[pa.Table], pa.Table]:
    return replaced(column, lambda old: pa.array([{**value, field: change(value[field])} for value in old]))


joined("an index that is a text", "extra_info", changed_field("extra_info", "index", str))
joined("truths that are numbers", "reward_model", changed_field("reward_model", "ground_truth", int))
joined("large texts of polars", "id", replaced("id", lambda old: pa.array(old, pa.large_string())))
joined("text views", "data_source", replaced("data_source", lambda old: pa.array(old, pa.string_view())))
joined(
    "large lists",
    "prompt",
    lambda table: table.set_column(
        2, "prompt", table.column("prompt").cast(pa.large_list(table.schema.field("prompt").type.value_type))
    ),
)
joined("a level that is a float", "extra_info", changed_field("extra_info", "index", float))


@case("parquet: two columns of one name", TRAIN + "verl's reader refuses it (ArrowInvalid", "write_parquet")
def _(run: Run) -> None:
    table = pq.read_table(run.train)
    pq.write_table(table.append_column("ability", table.column("ability")), run.train)


def extra(name: str, values: Callable[[int], list], begins: str, fix: str) -> None:
    """A case of a training file with one column more."""

    def spoil(run: Run) -> None:
        table = pq.read_table(run.train)
        pq.write_table(table.append_column(name, pa.array(values(table.num_rows))), run.train)

    case(f"parquet: a column {name}", TRAIN + begins, fix)(spoil)


for name in ("__rollout_n__", "__do_sample__", "validate", "global_steps"):
    extra(name, lambda n: [1] * n, f"has a column '{name}': verl ", "rename or remove it")
extra("skpo_seed", lambda n: [1] * n, "has a column 'skpo_seed', and names that begin with skpo_ are ours", "rename it")
for name in ("images", "videos", "audios"):
    extra(name, lambda n: [[]] * (n - 1) + [["a.png"]], f"column '{name}' holds {name}", "remove it")
extra("agent_name", lambda n: ["tool_agent"] * n, "column 'agent_name' has 'tool_agent'", "method=grpo")


@case("parquet: a name of a row's own where rows are sent whole", TRAIN + "has a column 'responses'", "rename it")
def _(run: Run) -> None:
    text = "from verl.utils.dataset.rl_dataset import RLHFDataset\nclass Mine(RLHFDataset): pass\n"
    (run.folder / "dataset.py").write_text(text, encoding="utf-8")
    run.set("data.custom_cls", {"path": f"{run.folder}/dataset.py", "name": "Mine"})
    table = pq.read_table(run.train)
    pq.write_table(table.append_column("responses", pa.array(["5"] * table.num_rows)), run.train)


def compressed(name: str, change: Callable[[int], tuple[str, pa.Array]], begins: str) -> None:
    """A case of a small file that would fill the memory."""

    def spoil(run: Run) -> None:
        table = pq.read_table(run.train)
        column, values = change(table.num_rows)
        pq.write_table(table.set_column(table.column_names.index(column), column, values), run.train)

    case(f"parquet: {name}", TRAIN + begins, "")(spoil)


def one_long_text(rows: int) -> pa.Array:
    long = "x" * 1_000_001
    return pa.DictionaryArray.from_arrays(pa.array([0] * (rows - 1) + [1], pa.int32()), pa.array(["aime24", long]))


compressed(
    "a long text in a dictionary", lambda n: ("data_source", one_long_text(n)), "row 5: column 'data_source' has a text"
)
compressed(
    "a long text in a message",
    lambda n: (
        "prompt",
        pa.ListArray.from_arrays(
            pa.array(range(n + 1), pa.int32()),
            pa.StructArray.from_arrays([pa.array(["user"] * n), one_long_text(n)], names=["role", "content"]),
        ),
    ),
    "row 5: column 'prompt' has a text of 1000001 bytes, at most 1000000 are read",
)


value("data.train_max_samples", 2, "data.train_max_samples: is 2, fewer prompts than data.train_batch_size=4", "raise")
value("data.train_max_samples", "all", fix="a whole number of at least -1")


def custom_class(name: str, text: str, begins: str, fix: str) -> None:
    """A case of a data set class of the user's own."""

    def spoil(run: Run) -> None:
        (run.folder / "dataset.py").write_text(text)
        run.set("data.custom_cls.path", f"{run.folder}/dataset.py")
        run.set("data.custom_cls.name", "Mine")

    case(f"data.custom_cls: {name}", f"data.custom_cls: Mine of {{folder}}/dataset.py {begins}", fix)(spoil)


CLASS = "from torch.utils.data import Dataset\nclass Mine({}): pass\n"
custom_class("without a table", CLASS.format("Dataset"), "has no `dataframe`", "skpo.curriculum.enable=false")
custom_class("not a data set", CLASS.format("dict"), "cannot be loaded (TypeError: The custom", "a torch Dataset in it")
custom_class("another name", "class Other: pass\n", "cannot be loaded (AttributeError", "a torch Dataset in it")
custom_class("broken", "import nowhere\n", "cannot be loaded (ModuleNotFoundError", "a torch Dataset in it")


@case("parquet: a prompt is too long", "{train}: row 0: the prompt has ", "data.filter_overlong_prompts=true")
def _(run: Run) -> None:
    run.set("data.max_prompt_length", 20)


@case(
    "parquet: all prompts are too long", "data.train_files: 0 prompts of at most", "raise the first or lower the second"
)
def _(run: Run) -> None:
    run.set("data.max_prompt_length", 20)
    run.set("data.filter_overlong_prompts", True)


# ---- model folder

MODEL = "actor_rollout_ref.model.path: "


@case("model: not there", MODEL + "{folder}/none cannot be read as a model", "give a folder with a whole checkpoint")
def _(run: Run) -> None:
    run.set("actor_rollout_ref.model.path", f"{run.folder}/none")


@case("model: a file", MODEL + "{model}/config.json is a file", "give the folder")
def _(run: Run) -> None:
    run.set("actor_rollout_ref.model.path", f"{run.model}/config.json")


value("actor_rollout_ref.model.path", None, MODEL + "is not set", "model=<name>")


@case("model: no config.json", MODEL + "{model} holds no config.json", "give the folder of a Hugging Face checkpoint")
def _(run: Run) -> None:
    (run.model / "config.json").unlink()


@case("model: config.json is no JSON", MODEL + "{model} cannot be read as a model", "whole checkpoint")
def _(run: Run) -> None:
    (run.model / "config.json").write_text('{"model_type": "lla')


def described(run: Run, **changes: Any) -> None:
    file = run.model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@case("model: unknown architecture", MODEL + "{model} cannot be read as a model", "whole checkpoint")
def _(run: Run) -> None:
    described(run, model_type="not_a_model")


@case("model: foreign architecture", MODEL + "{model} is a t5, which is not a causal ", "give one that is")
def _(run: Run) -> None:
    (run.model / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')


@case("model: short context", "actor_rollout_ref.rollout.max_model_len: is ", "set max_model_len=64")
def _(run: Run) -> None:
    described(run, max_position_embeddings=64)


@case("model: no tokenizer", MODEL + "no tokenizer can be loaded from {model}", "")
def _(run: Run) -> None:
    for file in run.model.glob("tokenizer*"):
        file.unlink()


@case("model: broken tokenizer", MODEL + "no tokenizer can be loaded from {model}", "")
def _(run: Run) -> None:
    os.truncate(run.model / "tokenizer.json", 100)


@case("model: no chat template", MODEL + "the tokenizer of {model} has no chat template", "custom_chat_template")
def _(run: Run) -> None:
    (run.model / "chat_template.jinja").unlink()


@case("model: broken chat template", "{train}: row 0: the model's chat template fails", "custom_chat_template")
def _(run: Run) -> None:
    (run.model / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}")


@case(
    "model: a template that refuses a role",
    "{train}: row 0: the model's chat template fails",
    "change the prompt's roles",
)
def _(run: Run) -> None:
    run.set("actor_rollout_ref.model.custom_chat_template", "{{ raise_exception('no users here') }}")


@case("model: weights cut off", MODEL + "{model}/model.safetensors is missing or cut off", "download the model again")
def _(run: Run) -> None:
    os.truncate(run.model / "model.safetensors", 60)


@case("model: no weights", MODEL + "{model} holds no weights", "give the folder of a whole checkpoint")
def _(run: Run) -> None:
    (run.model / "model.safetensors").unlink()


@case(
    "model: a shard is missing", MODEL + "{model}/model-2.safetensors is missing or cut off", "download the model again"
)
def _(run: Run) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (run.model / "model.safetensors.index.json").write_text(json.dumps(index))


@case("model: broken index", MODEL + "{model}/model.safetensors.index.json is not an index", "download the model again")
def _(run: Run) -> None:
    (run.model / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


# ---- checkpoint folder

STATE = f"{{checkpoint}}/{FILE_NAME}: "
CANNOT = "{checkpoint}: cannot be resumed from: "
AGAIN = "with trainer.resume_mode=disable"


@case("checkpoint: no state", f"{{checkpoint}}: holds no {FILE_NAME}", AGAIN)
def _(run: Run) -> None:
    (run.checkpoint / FILE_NAME).unlink()


@case("checkpoint: state cut off", STATE + "cannot be read as SKPO state", "trainer.resume_from_path")
def _(run: Run) -> None:
    os.truncate(run.checkpoint / FILE_NAME, 300)


@case("checkpoint: a foreign npz", STATE + "cannot be read as SKPO state", "trainer.resume_from_path")
def _(run: Run) -> None:
    with (run.checkpoint / FILE_NAME).open("wb") as file:
        np.savez(file, weights=np.zeros(3))


@case("checkpoint: a pickle", STATE + "cannot be read as SKPO state", "trainer.resume_from_path")
def _(run: Run) -> None:
    (run.checkpoint / FILE_NAME).write_bytes(pickle.dumps({"values": [1, 2, 3]}))


def other_settings(run: Run, **changes: Any) -> None:
    settings = SkpoSettings(**({"group_size": run.config.skpo.group_size} | changes))
    SkpoState(settings, 64).save(run.checkpoint)


@case("checkpoint: another group size", STATE + "was saved with group_size=5, this run has 8", "use the same value")
def _(run: Run) -> None:
    other_settings(run, group_size=5)


@case("checkpoint: another drift", STATE + "was saved with drift=nats, this run has kl_steps", "use the same value")
def _(run: Run) -> None:
    other_settings(run, tracker=TrackerSettings(drift="nats"))


@case("checkpoint: no data.pt", CANNOT + f"{DATA_FILE} is missing or cut off", AGAIN)
def _(run: Run) -> None:
    (run.checkpoint / DATA_FILE).unlink()


@case("checkpoint: data.pt cut off", CANNOT + f"{DATA_FILE} is missing or cut off", AGAIN)
def _(run: Run) -> None:
    os.truncate(run.checkpoint / DATA_FILE, 100)


@case("checkpoint: no optimizer", CANNOT + "actor/optim_world_size_1_rank_0.pt is missing or cut off", AGAIN)
def _(run: Run) -> None:
    (run.checkpoint / "actor/optim_world_size_1_rank_0.pt").unlink()


@case("checkpoint: weights cut off", CANNOT + "actor/model_world_size_1_rank_0.pt is missing or cut off", AGAIN)
def _(run: Run) -> None:
    os.truncate(run.checkpoint / "actor/model_world_size_1_rank_0.pt", 100)


@case("checkpoint: no actor", CANNOT + "actor/model_world_size_1_rank_0.pt is missing or cut off", AGAIN)
def _(run: Run) -> None:
    shutil.rmtree(run.checkpoint / "actor")


@case("checkpoint: other ranks", CANNOT + "actor/ was saved by 2 rank(s), this run has 1 (trainer.nnodes * ", AGAIN)
def _(run: Run) -> None:
    shutil.rmtree(run.checkpoint / "actor")
    write_checkpoint(run.checkpoint, SkpoState(SkpoSettings(), 64), ranks=2)


@case("checkpoint: an older one is whole", CANNOT + DATA_FILE, "resume from {folder}/out/checkpoints/global_step_2 by")
def _(run: Run) -> None:
    write_checkpoint(run.checkpoint.parent / "global_step_2")
    (run.checkpoint / DATA_FILE).unlink()


@case(
    "checkpoint: garbage in the marker",
    f"{{folder}}/out/checkpoints/{MARKER}: holds 'three' and no step",
    "write the number",
)
def _(run: Run) -> None:
    (run.checkpoint.parent / MARKER).write_text("three")


@case(
    "checkpoint: the marked one is gone",
    f"{{folder}}/out/checkpoints/{MARKER}: names global_step_3",
    "remove it to start again",
)
def _(run: Run) -> None:
    shutil.rmtree(run.checkpoint)


def resume_from(run: Run, path: Path) -> None:
    run.set("trainer.resume_mode", "resume_path")
    run.set("trainer.resume_from_path", str(path))


@case("checkpoint: another folder", "trainer.resume_from_path: {model} is not a folder named global_step_<N>", "")
def _(run: Run) -> None:
    resume_from(run, run.model)


@case(
    "checkpoint: its actor folder",
    "trainer.resume_from_path: {checkpoint}/actor is not a folder named global_step_<N>",
    "",
)
def _(run: Run) -> None:
    resume_from(run, run.checkpoint / "actor")


@case(
    "checkpoint: a file", "trainer.resume_from_path: {folder}/global_step_9 is not a folder named global_step_<N>", ""
)
def _(run: Run) -> None:
    (run.folder / "global_step_9").write_text("")
    resume_from(run, run.folder / "global_step_9")


@pytest.mark.parametrize("name", CASES)
def test_bad_input(run: Run, capsys, name: str) -> None:
    spoil, begins, fix = CASES[name]
    spoil(run)
    places = {name: str(getattr(run, name)) for name in ("train", "model", "checkpoint", "folder")}
    message = run.message()
    assert message.startswith(f"error: {begins.format(**places) if '{' in begins else begins}")
    assert (fix.format(**places) if "{" in fix else fix) in message
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
