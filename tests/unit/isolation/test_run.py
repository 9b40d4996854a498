"""A run is kept apart from the command's side: environment, config, cluster, and what is left in the end."""

import os
import tempfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipe.skpo.isolation import folder as folders
from recipe.skpo.isolation.run import IsolationError, choose_cluster, isolated

OURS = (folders.VARIABLE, "RAY_TMPDIR", "TMPDIR", "VLLM_RPC_BASE_PATH", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def make_config(compose_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in (*OURS, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    # What others left in /tmp is none of a test's business.
    monkeypatch.setattr(folders, "sweep", lambda bases: [])

    def make(*overrides: str, platform: str = "cpu"):
        config = compose_config(f"platform={platform}", "data=files", *overrides)
        config.output_dir = str(tmp_path / "out")
        choose_cluster(config.ray_kwargs.ray_init)
        return config

    return make


def modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_run_has_a_ray_a_token_and_a_folder_of_its_own(make_config, monkeypatch, platform: str) -> None:
    config = make_config(platform=platform)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_root")
    before, umask = dict(os.environ), os.umask(0)
    try:
        with isolated(config) as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{folder}/torchinductor"
            assert modes(folder) == {"lock": 0o600, "ray_token": 0o600}
            for name in (folders.VARIABLE, "RAY_TMPDIR", "TMPDIR", "VLLM_RPC_BASE_PATH"):
                assert os.environ[name] == str(folder)
            assert len(Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_bytes()) == 64
    finally:
        os.umask(umask)
    assert not folder.exists() and dict(os.environ) == before


def test_every_process_learns_of_it_by_the_config(make_config) -> None:
    config = make_config("+ray_kwargs.ray_init.runtime_env.env_vars.MINE=x")
    with isolated(config) as folder:
        runtime_env = config.ray_kwargs.ray_init.runtime_env
        assert runtime_env.worker_process_setup_hook == "recipe.skpo.isolation.worker.set_up"
        assert runtime_env.env_vars == {
            "MINE": "x", "SKPO_RUN_FOLDER": str(folder), "VLLM_RPC_BASE_PATH": str(folder)
        }  # fmt: skip
        options = config.actor_rollout_ref.rollout.engine_kwargs.vllm
        assert options.worker_extension_cls == "recipe.skpo.isolation.receiver.PrivateReceiver"
        assert options.middleware == "recipe.skpo.isolation.http_guard.RequireKey"
        assert options.block_size == 32, "the platform's own options stay"
    config = make_config("actor_rollout_ref.rollout.prometheus.enable=true")
    with isolated(config):
        assert config.ray_kwargs.ray_init.runtime_env.env_vars["SKPO_OPEN_PATHS"] == "/metrics"
        assert os.environ["RAY_TMPDIR"] == tempfile.gettempdir(), "where verl looks for Prometheus's file"


def test_what_the_user_has_set_stays(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"RAY_TMPDIR": str(tmp_path), "RAY_AUTH_TOKEN": "mine", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    with isolated(make_config()) as folder:
        assert {name: os.environ[name] for name in mine} == mine and "RAY_AUTH_TOKEN_PATH" not in os.environ
        assert modes(folder) == {"lock": 0o600}


def test_a_temporary_folder_too_long_for_sockets_is_used_for_files_alone(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with isolated(make_config()) as folder:
        assert folder.parent == Path("/tmp") and os.environ["TMPDIR"] == str(tmp_path)
        assert os.environ["RAY_TMPDIR"] == os.environ["VLLM_RPC_BASE_PATH"] == str(folder)


def test_on_a_cluster_of_others_nothing_of_ray_is_changed(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("ray_kwargs.ray_init.address=10.0.0.1:6379")
    before = dict(os.environ)
    with isolated(config) as folder:
        changed = {name for name in os.environ if os.environ[name] != before.get(name)}
        assert changed == {"SKPO_RUN_FOLDER", "VLLM_RPC_BASE_PATH"}, "its nodes need not have this one's TMPDIR"
        assert folder.parent == Path("/tmp") and config.ray_kwargs.ray_init.address == "10.0.0.1:6379"


def test_a_run_that_fails_keeps_rays_logs(make_config, tmp_path: Path, capsys) -> None:
    for text in ("first", "second"):
        with pytest.raises(ZeroDivisionError), isolated(make_config()) as folder:
            logs = folder / "ray/session_1/logs"
            logs.mkdir(parents=True)
            (logs / "worker.err").write_text(text)
            (folder / "ray/session_latest").symlink_to(logs.parent)
            raise ZeroDivisionError
        assert not folder.exists()
        assert (tmp_path / "out/ray_logs/worker.err").read_text() == text
        assert capsys.readouterr().out == f"note: Ray's logs of this run are in {tmp_path / 'out/ray_logs'}\n"
    with pytest.raises(KeyboardInterrupt), isolated(make_config()):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+ray_kwargs.ray_init.runtime_env.worker_process_setup_hook=my.hook", "worker_process_setup_hook: is my.hook"),
        ("+actor_rollout_ref.rollout.engine_kwargs.vllm.middleware=my.guard", "vllm.middleware: is my.guard"),
    ],
)
def test_a_setting_that_would_undo_it_is_refused_in_one_line(make_config, override: str, message: str) -> None:
    before = sorted(Path("/tmp").glob("skpo-????????"))
    with pytest.raises(IsolationError) as error, isolated(make_config(override)):
        pass
    assert message in str(error.value) and "leave it out" in str(error.value) and "\n" not in str(error.value)
    assert sorted(Path("/tmp").glob("skpo-????????")) == before


@pytest.mark.parametrize("address", [None, "", "null"])
def test_a_cluster_that_a_file_names_is_not_joined(compose_config, tmp_path: Path, monkeypatch, address) -> None:
    """Ray reads ``ray_current_cluster`` in a folder that everybody can write to, and sends that host its token."""
    from ray._private.services import canonicalize_bootstrap_address

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("203.0.113.7:6379")
    given = [] if address is None else [f"+ray_kwargs.ray_init.address={address or repr('')}"]
    ray_init = compose_config("platform=gpu", "data=files", *given).ray_kwargs.ray_init

    def joined(given: str | None) -> str | None:
        return canonicalize_bootstrap_address(given, str(tmp_path / "ray"))

    assert joined(None) == "203.0.113.7:6379", "what verl's plain ray.init would do"
    choose_cluster(ray_init)
    assert joined(ray_init.address) is None


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_cluster_that_the_user_names_is_joined(compose_config, monkeypatch, platform: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    plus = "+" if platform == "gpu" else ""
    ray_init = compose_config(f"platform={platform}", f"{plus}ray_kwargs.ray_init.address=auto").ray_kwargs.ray_init
    choose_cluster(ray_init)
    assert ray_init.address == "auto"
    ray_init = OmegaConf.create({"runtime_env": {}})
    choose_cluster(ray_init)
    assert ray_init.address == "10.0.0.1:6379", "as ray job submit sets it"


def test_what_killed_runs_left_is_looked_for_first(make_config, tmp_path: Path, monkeypatch) -> None:
    swept = []
    monkeypatch.setattr(folders, "sweep", swept.extend)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with isolated(make_config()):
        assert swept == [str(tmp_path), "/tmp"]
