"""What a run trusts and what it gives away: no pickle, no code from data, no secrets in files, modes by the umask."""

import ast
import io
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from recipe.skpo import main
from recipe.skpo.errors import ConfigError
from recipe.skpo.output.redaction import hide_secrets, reject_secret_overrides, reject_secrets
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.trainer.state import FILE_NAME, SkpoState, StateError
from tests.conftest import COMMAND

REPOSITORY = Path(__file__).resolve().parents[3]

# ---------------------------------------------------------------- a hostile checkpoint


class Bomb:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


def hostile_files(target: Path) -> dict[str, bytes]:
    """Name to content of state files that would make ``target`` if anything in them were unpickled."""
    meta, archive, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    bomb = np.array([Bomb(target)], dtype=object)
    np.savez(meta, meta=bomb)
    with np.load(REFERENCE, allow_pickle=False) as whole:
        good = {name: whole[name] for name in whole.files}
    np.savez(archive, **{**good, "prompts.values": bomb})
    np.save(array, bomb)
    return {
        "a plain pickle": pickle.dumps(Bomb(target)),
        "an array of objects": array.getvalue(),
        "a pickle as meta": meta.getvalue(),
        "a pickle among the trackers": archive.getvalue(),
    }


REFERENCE = io.BytesIO()


@pytest.mark.parametrize(
    "name", ["a plain pickle", "an array of objects", "a pickle as meta", "a pickle among the trackers"]
)
def test_a_hostile_state_file_is_refused_and_runs_nothing(tmp_path: Path, name: str) -> None:
    state = SkpoState(SkpoSettings(), 64)
    state.observe("a", 1.0, 10)
    global REFERENCE
    REFERENCE = io.BytesIO(state.save(tmp_path).read_bytes())
    target = tmp_path / "made by the pickle"
    (tmp_path / FILE_NAME).write_bytes(hostile_files(target)[name])
    with pytest.raises(StateError, match="cannot be read as SKPO state"):
        state.load(tmp_path)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the bomb works where a pickle is loaded"


# ---------------------------------------------------------------- our own source


def test_files_are_read_without_pickle_and_get_the_umasks_modes() -> None:
    """What ruff's rules S (pyproject.toml) do not know."""
    needed = {"torch.load(": "weights_only=True", "np.load(": "allow_pickle=False"}
    for tree in ("recipe", "data_prep", "reward_fns", "scripts"):
        for path in (REPOSITORY / tree).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert ".chmod(" not in text, path
            for call in (ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
                for name, keyword in needed.items():
                    assert not call.startswith(name) or keyword in call, f"{path}: {call}"


# ---------------------------------------------------------------- secrets

VALUE = "0123456789abcdef0123"


@pytest.mark.parametrize(
    "override",
    [
        f"+ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY={VALUE}",
        f"++ray_kwargs.ray_init.runtime_env.env_vars.HF_TOKEN='{VALUE}'",
        f"+ray_kwargs.ray_init.runtime_env.env_vars={{WANDB_API_KEY:{VALUE}}}",
        f"+ray_kwargs.ray_init.runtime_env={{env_vars:{{OPENAI_API_KEY:'{VALUE}'}}}}",
        f"+reward.custom_reward_function.reward_kwargs.judge_api_key={VALUE}",
        f"+reward.custom_reward_function.reward_kwargs={{password:{VALUE}}}",
        "+x.secret=${oc.env:HOME}",
        f"+trainer.note=see{VALUE}",
        "+x={a:[{hfToken:b}]}",
        "trainer.project_name=hf_" + "a" * 34,
        "trainer.experiment_name=sk-proj-" + "a" * 34,
        f"data.source=https://me:{VALUE}@host/data",
        f"+x.list=[a,sk-{VALUE}]",
    ],
)
def test_a_secret_on_the_command_line_is_refused_before_hydra_writes_it_down(
    monkeypatch, capsys, override: str
) -> None:
    monkeypatch.setenv("SKPO_PLATFORM", "cpu")
    monkeypatch.setenv("SOME_API_KEY", VALUE)
    monkeypatch.setattr(sys, "argv", ["main", "trainer.nnodes=1", override])
    monkeypatch.setattr(main, "run", lambda: pytest.fail("Hydra was called"))
    with pytest.raises(SystemExit) as exit_info:
        main.main()
    message = str(exit_info.value.code)
    assert message.startswith("error: ") and ("looks like a secret" in message or "holds the value of" in message)
    assert "export it" in message
    assert VALUE not in message and len(message.splitlines()) == 1
    assert VALUE not in "".join(capsys.readouterr())


def test_ordinary_overrides_pass() -> None:
    reject_secret_overrides(
        [
            "actor_rollout_ref.rollout.max_num_batched_tokens=4096",
            "budget.tokens=300",
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384",
            "data.train_files=[/a/b.parquet,/c.parquet]",
            "trainer.logger=[console,wandb]",
            "skpo.chat_quote='{segment} {problem}'",
            "~trainer.logger",
            "+x.api_key=null",
            "--cfg",
            "job",
            "not an override",
        ]
    )


@pytest.mark.parametrize("method", ["skpo", "spo", "dapo"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_nothing_in_the_composed_configs_is_taken_for_a_secret(compose_config, platform: str, method: str) -> None:
    reject_secrets(OmegaConf.to_container(compose_config(f"platform={platform}", f"method={method}", "data=gsm8k")))


S = "S3cretS3cret42"
SECRET_NAMES = [
    *("api-key", "hfToken", "authToken", "wandb_key", "private_key", "secret_key", "authorization", "bearer", "pwd"),
    *("passphrase", "tokens", "api_key_1", "HF_TOKEN", "clientSecret", "X-Api-Key", "openaiApiKey"),
]
SECRET_FORMS = [
    *("github_pat_" + "a" * 30, "glpat-" + "a" * 20, "xoxb-" + "1" * 12, "AIza" + "b" * 35, "ASIA" + "A" * 16),
    *("eyJhbGciOiJI.eyJzdWIiOiIx.abc", "-----BEGIN RSA PRIVATE KEY-----", "nvapi-" + "x" * 40, "sk_live_" + "a" * 20),
    *("redis://:pw@host", "https://token@host", "https://host/x?api_key=abc", "Bearer abcdef0123456789abcd"),
    *("mongodb://me:pw@host", "ghp_" + "a" * 36, f"x{VALUE}y"),
]
SECRET_CONFIGS: list[dict[Any, Any]] = [
    *({name: S} for name in SECRET_NAMES),
    *({"note": form} for form in SECRET_FORMS),
    *({"a": [{"note": [form]}]} for form in SECRET_FORMS),
    *({form: 1} for form in SECRET_FORMS),
    *({"password": {"value": S}}, {"token": [S]}, {"servers": [{"auth": {"x": [S]}}]}, {"password": 1234567890}),
]


@pytest.mark.parametrize("config", SECRET_CONFIGS, ids=str)
def test_a_secret_is_refused_in_a_config_and_hidden_in_a_report(config: dict[Any, Any], monkeypatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", VALUE)
    with pytest.raises(ConfigError, match=r": (looks like a secret|holds the value of .* SOME_API_KEY), and .*export"):
        reject_secrets(config)
    shown = str(hide_secrets(config))
    assert "(hidden)" in shown and not any(secret in shown for secret in (S, VALUE, "1234567890", *SECRET_FORMS))


@pytest.mark.parametrize(
    "config",
    [
        *({"budget": {"tokens": 300}}, {"prompt_key": "prompt"}, {"reward_fn_key": "data_source"}, {"token": None}),
        *({"url": "https://host/a@b"}, {"url": "ssh://git@host/x"}, {"key_variable": "OPENAI_API_KEY"}),
        *({"max_num_batched_tokens": 5}, {"stop_tokens": ["</s>"]}, {"eos_token_id": 3}, {"password": ""}),
        *({"name": "glass-half-full-experiment-name"}, {"text": "basic trigonometric-identities"}, {"token": 5}),
    ],
    ids=str,
)
def test_ordinary_settings_are_not_secrets(config: dict[str, Any]) -> None:
    reject_secrets(config)
    assert hide_secrets(config) == config


def test_variables_of_the_environment_get_into_no_file_and_no_output(
    compose_config, model_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A run with keys in its environment, up to the launch; then the report of its folder."""
    from hydra.core.hydra_config import HydraConfig

    from recipe.skpo.output.metrics import MetricsFile
    from recipe.skpo.output.page import write_report

    keys = ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")
    for name in keys:
        monkeypatch.setenv(name, f"{VALUE}{name}")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create(COMMAND))
    launched = []
    for check in ("check_data", "check_model", "check_prompt_lengths", "prepare_data", "prepare_model"):
        monkeypatch.setattr(main, check, lambda config: None)
    monkeypatch.setattr(main, "launch", lambda config, done: launched.append(config))
    for name in ("TENSORBOARD_DIR", "VERL_ENGINE_DEVICE"):
        monkeypatch.setenv(name, "x")
    environment = dict(os.environ)
    config = compose_config("platform=cpu", "data=files")
    config.output_dir, config.trainer.default_local_dir = str(tmp_path / "out"), str(tmp_path / "out/checkpoints")
    config.data.train_files, config.data.val_files = "train.parquet", "val.parquet"
    try:
        main.run.__wrapped__(config)
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
    (config,) = launched
    assert VALUE not in OmegaConf.to_yaml(config), "verl prints it, and Ray gets it as the workers' environment"
    MetricsFile(tmp_path / "out/metrics.jsonl", 0).log({"a": 1.0}, 1)
    write_report(tmp_path / "out")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html"} <= {path.name for path in written}
    assert not [path for path in written if VALUE.encode() in path.read_bytes()]
    assert VALUE not in "".join(capsys.readouterr())


# ---------------------------------------------------------------- modes of files


def write_everything(folder: Path, compose_config) -> None:
    """A file of every kind that a run, a preparation or an analysis writes by itself."""
    from data_prep.schema import Row, write_parquet
    from recipe.skpo.output.files import write_atomic
    from recipe.skpo.output.metrics import MetricsFile
    from recipe.skpo.output.page import write_report
    from recipe.skpo.output.trees import TREE_SCHEMA, TreeStore
    from recipe.skpo.trainer.checkpoints import mark

    out = folder / "out"
    MetricsFile(out / "metrics.jsonl", 0).log({"a": 1.0}, 1)
    SkpoState(SkpoSettings(), 64).save(out / "checkpoints/global_step_1")
    mark(out / "checkpoints", 1)
    empty = {name: None for name in TREE_SCHEMA.names} | {"step": 1}
    TreeStore(out / "trees", 1.0, 0).write(1, [empty])
    write_report(out)
    write_atomic(out / "analysis.json", b"{}")
    row = Row("t", [{"role": "user", "content": "q"}], "1", "none", "train", 0, "q")
    write_parquet([row], folder / "data/train.parquet")


@pytest.mark.parametrize(
    ("umask", "file", "directory"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o027, 0o640, 0o750)]
)
def test_files_have_the_modes_that_the_umask_says(
    tmp_path: Path, compose_config, umask: int, file: int, directory: int
) -> None:
    before = os.umask(umask)
    try:
        write_everything(tmp_path / "run", compose_config)
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*")}
    assert len([path for path in modes if path.is_file()]) >= 7
    assert {str(p): oct(mode) for p, mode in modes.items() if mode != (directory if p.is_dir() else file)} == {}


def test_nothing_is_written_through_a_link_in_a_run_folder(tmp_path: Path) -> None:
    """Someone sends a finished run, whose files are links to files of the reader."""
    from recipe.skpo.output.metrics import keep_lines
    from recipe.skpo.output.page import write_report
    from recipe.skpo.output.summary import summary
    from tests.support.report_run import make_run

    run = make_run(tmp_path / "run", steps=4)
    names = ("sample_trees.txt", "report.html", "metrics.jsonl")
    for name in names:
        (tmp_path / name).write_bytes(before := (run / name).read_bytes() if (run / name).exists() else b"mine")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path / name)
        assert (run / name).read_bytes() == before
    kept = {name: (tmp_path / name).read_bytes() for name in names}
    summary(run)
    write_report(run)
    keep_lines(run / "metrics.jsonl", 2)
    assert {name: (tmp_path / name).read_bytes() for name in names} == kept
    assert not any((run / name).is_symlink() for name in names)
