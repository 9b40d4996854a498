"""The entry of the recipe: what it refuses, that it refuses before anything heavy, and what it prepares.

A few command lines run in processes of their own, side by side, because each of them imports verl; more of them go
through Hydra in this process; and where a config is enough the function that Hydra decorates is called without it.
"""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from recipe.skpo import launch, main
from recipe.skpo.trainer.resume import ResumePlan
from tests.conftest import COMMAND, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[3]

# ---------------------------------------------------------------- the command line

REFUSED = {"skpo.nope=1": "skpo.nope: unknown key; known are group_size, "}
"""Override -> how its message starts; checks/test_command_line.py has many more, in one process."""

# Notes at the end what the process has imported.
MAIN = """\
import os, runpy, sys
os.chdir(sys.argv.pop(1))
try:
    runpy.run_module("recipe.skpo.main", run_name="__main__", alter_sys=True)
finally:
    open("imported", "w").write("\\n".join(sys.modules))
"""

HEAVY = ("verl.trainer.main_ppo", "recipe.skpo.trainer.skpo", "recipe.skpo.rollout.worker", "vllm")
"""Modules that only training needs: what starts Ray, what trains, what loads weights."""


class Run:
    """``python -m recipe.skpo.main`` in a process of its own and an empty folder."""

    def __init__(self, preloaded: Any, folder: Path, *arguments: str) -> None:
        self.folder = folder
        folder.mkdir()
        others = {key: value for key, value in os.environ.items() if not key.startswith(("SKPO_", "VERL_", "HYDRA_"))}
        variables = others | {"PYTHONPATH": str(REPOSITORY), "SKPO_PLATFORM": "cpu"}
        done = preloaded.run(MAIN, str(folder), *arguments, variables=variables)
        self.exit, self.out, self.err = done.returncode, done.stdout, done.stderr
        imported = folder / "imported"
        self.imported = set(imported.read_text().splitlines()) if imported.exists() else set()


@pytest.fixture(scope="module")
def runs(preloaded, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    arguments = {"--cfg job": ("--cfg", "job"), **{override: (override,) for override in REFUSED}}
    with ThreadPoolExecutor(max_workers=2) as pool:
        started = [
            pool.submit(Run, preloaded, folder / str(number), *words) for number, words in enumerate(arguments.values())
        ]
        return dict(zip(arguments, [run.result() for run in started], strict=True))


def test_cfg_job_prints_the_composed_config(runs) -> None:
    run = runs["--cfg job"]
    assert run.exit == 0, run.err
    printed = OmegaConf.create(run.out)
    assert printed.skpo.group_size == 8 and printed.algorithm.adv_estimator == "skpo"
    assert OmegaConf.select(printed, "actor_rollout_ref.rollout.n") == 9, "resolvers are there"
    assert printed.trainer.device == "cpu"


@pytest.mark.parametrize("override", REFUSED)
def test_a_bad_override_gives_one_line_and_a_non_zero_exit(runs, override: str) -> None:
    run = runs[override]
    assert run.exit not in (0, None)
    assert len(run.err.splitlines()) == 1, run.err
    assert run.err.startswith(f"error: {REFUSED[override]}")
    assert run.out == ""
    assert not (run.folder / "outputs").exists(), "a refused command leaves nothing"


@pytest.mark.parametrize("override", ["--cfg job", *REFUSED])
def test_nothing_heavy_is_imported_before_the_config_is_right(runs, override: str) -> None:
    run = runs[override]
    assert "recipe.skpo.settings" in run.imported, f"the list of imports is missing: exit {run.exit}, {run.err}"
    assert run.imported.isdisjoint(HEAVY)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the steps that were taken; those that would change this process or start something do nothing."""
    taken: list[str] = []

    def watch(name: str, real=None):
        def step(*arguments, **options):
            taken.append(name)
            return real(*arguments, **options) if real else None

        monkeypatch.setattr(main, name, step)

    for name in (
        "check_config",
        "check_reward",
        "check_data",
        "check_prompt_lengths",
        "plan_resume",
        "prepare_data",
        "prepare_model",
    ):
        watch(name, getattr(main, name))
    for name in ("apply_platform", "launch", "summary", "write_report"):
        watch(name)
    return taken


# ---------------------------------------------------------------- what run() does in which order


@pytest.fixture
def config(compose_config, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create(COMMAND))
    config = compose_config("platform=cpu", "data=files")
    config.output_dir = str(tmp_path / "out")
    config.trainer.default_local_dir = str(tmp_path / "out" / "checkpoints")
    config.actor_rollout_ref.model.path = str(model_folder)
    return config


def good_files(config, tmp_path: Path) -> None:
    from data_prep.schema import Row, write_parquet

    for role in ("train", "val"):
        rows = [
            Row("skpo/arithmetic", [{"role": "user", "content": f"{n}?"}], "5", "math", role, n, f"{n}?")
            for n in range(config.data.train_batch_size)
        ]
        write_parquet(rows, tmp_path / f"{role}.parquet")
        config.data[f"{role}_files"] = str(tmp_path / f"{role}.parquet")


def test_a_run_checks_then_launches_then_reports(config, steps, tmp_path: Path) -> None:
    good_files(config, tmp_path)
    main.run.__wrapped__(config)
    assert steps.index("check_config") < steps.index("apply_platform") < steps.index("check_data")
    # A reward may import verl, which settles on a platform then.
    assert steps.index("apply_platform") < steps.index("check_reward") < steps.index("prepare_data")
    assert steps.index("check_data") < steps.index("prepare_model") < steps.index("check_prompt_lengths")
    assert steps[-4:] == ["plan_resume", "launch", "summary", "write_report"]
    saved = OmegaConf.load(tmp_path / "out" / "config.yaml")
    assert saved.skpo == config.skpo and saved.data.train_files == str(tmp_path / "train.parquet")


def test_a_report_that_fails_does_not_fail_the_run(config, steps, tmp_path: Path, monkeypatch, caplog, capsys) -> None:
    good_files(config, tmp_path)

    def fails(folder: Path) -> Path:
        raise ZeroDivisionError("no page today")

    monkeypatch.setattr(main, "summary", lambda folder, minutes: "the summary")
    monkeypatch.setattr(main, "write_report", fails)
    main.run.__wrapped__(config)
    assert "the summary" in capsys.readouterr().out
    (record,) = [record for record in caplog.records if record.name == main.__name__]
    assert "no page today" in str(record.exc_info) and str(tmp_path / "out") in record.getMessage()


def test_a_finished_run_is_reported_again(config, steps, tmp_path: Path, monkeypatch, capsys) -> None:
    good_files(config, tmp_path)
    monkeypatch.setattr(main, "plan_resume", lambda *arguments: ResumePlan(limit="trainer.total_training_steps"))
    monkeypatch.setattr(main, "write_report", lambda folder: folder / "report.html")
    main.run.__wrapped__(config)
    assert "launch" not in steps and "summary" in steps
    assert f"report       {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out


def test_spo_is_checked_and_launched_with_its_larger_batch(compose_config, config, steps, tmp_path: Path) -> None:
    HydraConfig.get().runtime.choices.method = "spo"
    spo = compose_config("platform=cpu", "data=files", "method=spo", "skpo.group_size=2")
    spo.output_dir, spo.trainer.default_local_dir = config.output_dir, config.trainer.default_local_dir
    spo.actor_rollout_ref.model.path = config.actor_rollout_ref.model.path
    good_files(spo, tmp_path)
    assert "rows are fewer than data.train_batch_size=16" in refused(spo), "8 prompts times 2"
    steps.clear()
    spo.data.train_batch_size, spo.actor_rollout_ref.actor.ppo_mini_batch_size = 4, 2
    main.run.__wrapped__(spo)
    assert steps[-3:] == ["launch", "summary", "write_report"]
    saved = OmegaConf.load(tmp_path / "out" / "config.yaml")
    assert (saved.data.train_batch_size, saved.actor_rollout_ref.rollout.n) == (8, 1)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("steps", "or trainer.total_training_steps=<more than 3> to continue it"),
        ("tokens", "or budget.tokens=<more than 700> to continue it"),
    ],
)
def test_a_finished_run_is_not_launched_again(config, steps, tmp_path: Path, capsys, budget: str, said: str) -> None:
    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.trainer.state import SkpoState

    good_files(config, tmp_path)
    folder = Path(config.trainer.default_local_dir)
    state = SkpoState(SkpoSettings(), 64)
    state.tokens_generated = 700
    write_checkpoint(folder / "global_step_3", state)
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    config.budget.match, config.trainer.total_training_steps = budget, 3 if budget == "steps" else 1_000_000
    config.budget.tokens = 700 if budget == "tokens" else None
    main.run.__wrapped__(config)
    assert "launch" not in steps and steps[-2:] == ["summary", "write_report"]
    assert said in capsys.readouterr().out


def refused(config) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main.run.__wrapped__(config)
    message = exit_info.value.code
    assert isinstance(message, str) and message.startswith("error: "), "a string is printed on stderr, with exit code 1"
    assert len(message.splitlines()) == 1
    return message


# ---------------------------------------------------------------- its parts


@pytest.mark.parametrize(
    ("script", "platform"),
    [
        (None, "cpu"),
        ("echo 81559", "gpu"),
        ("echo 'No devices found.'", "cpu"),
        ("echo 81559; exit 9", "cpu"),
    ],
    ids=["no driver", "a GPU", "no GPU", "a broken driver"],
)
def test_the_platform_is_what_the_driver_says(tmp_path: Path, monkeypatch, script: str | None, platform: str) -> None:
    if script is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main.detect_platform() == platform


def test_warnings_are_seen_where_vllm_is_imported(monkeypatch, capsys) -> None:
    for ours in map(logging.getLogger, ("recipe.skpo", "reward_fns")):
        for name in ("handlers", "propagate", "level"):
            monkeypatch.setattr(ours, name, getattr(ours, name))
    monkeypatch.setenv("SKPO_CONSOLE", "full")
    launch.configure_logging()
    # What importing vLLM's server does (model_hosting_container_standards/logging_config.py).
    monkeypatch.setattr(logging.root, "level", logging.ERROR)
    logging.getLogger("recipe.skpo.trainer.base").warning("failures in step 3")
    logging.getLogger("elsewhere").warning("silent")
    written = capsys.readouterr().err
    assert written.startswith("WARNING:") and written.endswith(":failures in step 3\n") and written.count("\n") == 1


@pytest.mark.parametrize(
    ("installed", "given", "used"),
    [(False, None, "sdpa"), (True, None, None), (False, "flash_attention_3", "flash_attention_3")],
)
def test_attention_follows_what_is_installed(
    compose_config, monkeypatch, installed: bool, given: str | None, used: str | None
) -> None:
    monkeypatch.setenv("TENSORBOARD_DIR", "elsewhere")
    monkeypatch.setattr(launch, "flash_attention_installed", lambda: installed)
    extra = [f"+actor_rollout_ref.model.override_config.attn_implementation={given}"] if given else []
    config = compose_config("platform=gpu", "packed_attention=none", *extra)
    launch.apply_platform(config)
    assert config.actor_rollout_ref.model.override_config.get("attn_implementation") == used
    assert config.ray_kwargs.ray_init.runtime_env.env_vars == {
        "SKPO_CONSOLE": "short",
        "TENSORBOARD_DIR": "elsewhere",
        "PYTHONUTF8": "1",
    }


@pytest.mark.parametrize("given", [None, "mine", "[mine, yours]"])
@pytest.mark.parametrize(
    ("overrides", "device", "library"),
    [
        (["platform=gpu"], "packed", "recipe.skpo.engine.fsdp"),
        (["platform=cpu"], "shared_prefix", "recipe.skpo.engine.dense"),
    ],
)
def test_the_engine_reaches_every_worker(compose_config, monkeypatch, given, overrides, device, library) -> None:
    monkeypatch.setenv("TENSORBOARD_DIR", "elsewhere")
    for name in ("VERL_ENGINE_DEVICE", "SKPO_PACKED_ATTENTION", "SKPO_SHARE_PREFIXES"):
        monkeypatch.setenv(name, "before")
    extra = [f"actor_rollout_ref.model.external_lib={given}"] if given else []
    config = compose_config(*overrides, *extra)
    launch.apply_platform(config)
    libraries = list(config.actor_rollout_ref.model.external_lib)
    mine = [] if given is None else given.strip("[]").split(", ")
    added = ["recipe.skpo.trainer.weight_sync_registration", "recipe.skpo.engine.backends"]
    offloading = ["recipe.skpo.cpu.offloading"] if overrides == ["platform=cpu"] else []
    assert libraries == [*mine, *added, *offloading, library]
    variables = config.ray_kwargs.ray_init.runtime_env.env_vars
    for name, value in {"VERL_ENGINE_DEVICE": device, "SKPO_SHARE_PREFIXES": "1"}.items():
        assert variables[name] == os.environ[name] == value


@pytest.mark.parametrize(
    ("model", "makers"), [("smollm2_135m", ("arithmetic", "smollm2")), ("tiny", ("steps", "tiny"))]
)
def test_embedded_data_and_model_are_made_once(compose_config, tmp_path: Path, monkeypatch, model, makers) -> None:
    made = []
    for module in makers:
        monkeypatch.setattr(f"data_prep.{module}.prepare", made.append)
    config = compose_config("platform=cpu", f"model={model}", f"data.embedded={tmp_path}")
    main.prepare_data(config)
    main.prepare_model(config)
    assert made == [tmp_path, Path(config.actor_rollout_ref.model.path)]
    for name in ("train", "val"):
        (tmp_path / f"{name}.parquet").touch()
    main.prepare_data(config)
    assert len(made) == 2


def test_a_data_set_is_made_once_from_the_files_given(compose_config, tmp_path: Path, monkeypatch) -> None:
    from recipe.skpo.checks.data import check_data

    for split, numbers in {"train": range(10), "test": range(10, 50)}.items():
        rows = (json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) for n in numbers)
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    monkeypatch.setenv("SKPO_CACHE", str(tmp_path / "cache"))
    config = compose_config("data=gsm8k", f"data.source={tmp_path}", f"+trainer.note={tmp_path}")
    main.prepare_data(config)
    check_data(config)
    val = Path(config.data.val_files)
    assert len(pq.read_table(val)) == 32 and val.parent.parent == tmp_path / "cache"
    before = val.stat().st_mtime_ns
    main.prepare_data(config)
    assert val.stat().st_mtime_ns == before
    config.data.train_files = config.data.val_files = "my.parquet"
    val.unlink()
    main.prepare_data(config)
    assert not val.exists(), "nobody requested it"


def test_rows_of_ones_own_are_made_once_for_each_content_and_choice(
    compose_config, tmp_path: Path, monkeypatch
) -> None:
    from recipe.skpo.checks.data import check_data

    source = tmp_path / "my.jsonl"
    keys = ("data.prompt=question", "data.answer=result", "data.check=number")
    monkeypatch.setenv("SKPO_CACHE", str(tmp_path / "cache"))

    def made(*more: str) -> Path:
        written = f"+trainer.note={source.stat().st_mtime_ns}"  # equal overrides are composed once in the tests
        config = compose_config("data=mine", f"data.source={source}", *keys, "data.train_batch_size=4", written, *more)
        main.prepare_data(config)
        check_data(config)
        return Path(config.data.train_files)

    def write(count: int) -> None:
        source.write_text("".join(json.dumps({"question": f"{n}?", "result": n}) + "\n" for n in range(count)))

    write(40)
    first = made()
    before = first.stat().st_mtime_ns
    assert made() == first and first.stat().st_mtime_ns == before and len(pq.read_table(first)) == 38
    others = [made(choice) for choice in ("data.split=0.5", "data.system=x", "data.check=math", "data.prepare.seed=2")]
    write(60)
    others.append(made())
    assert len(pq.read_table(others[-1])) == 57, "a changed file is not read from the cache"
    write(40)
    assert made() == first and len({first, *others}) == 6


def test_nothing_is_made_for_ones_own_files_and_model(config, monkeypatch) -> None:
    for module in ("arithmetic", "smollm2"):
        monkeypatch.setattr(f"data_prep.{module}.prepare", lambda folder: pytest.fail("nothing was to be made"))
    main.prepare_data(config)
    main.prepare_model(config)
    # Neither is a missing file or model of one's own replaced by an embedded one.
    with open_dict(config):
        config.data.embedded, config.embedded_model = "elsewhere", "elsewhere"
    config.data.train_files = "mine.parquet"
    config.actor_rollout_ref.model.path = "org/model"
    main.prepare_data(config)
    main.prepare_model(config)
