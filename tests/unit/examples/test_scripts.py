"""The scripts of examples/ run in a shell whose programs write down what they are given; the overrides are composed."""

import os
import subprocess
from pathlib import Path

import pytest

from recipe.skpo.checks.reward import check_reward
from tests.conftest import REPOSITORY
from tests.unit.docs.test_documented_commands import check_training

EXAMPLES = REPOSITORY / "examples"
SRUN = """#!/bin/sh
case "$*" in
    *hostname*) echo 10.0.0.1 fe80::1 ;;
    *recipe.skpo.main*) printf '%s\\n' "$@" > "$NOTED" ;;
    *) echo "$@" >> "$NOTED.ray" ;;
esac
"""


def run(script: Path, folder: Path, *arguments: str) -> list[str]:
    """Run a script with a last override; returns what the training was given."""
    noted = folder / "noted"
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    path = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "NOTED": str(noted)}
    subprocess.run(["bash", script, *arguments], env=os.environ | slurm | path, check=True, timeout=60)
    return noted.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ["gsm8k_one_gpu.sh", "paper_8gpu.sh"])
def test_a_script_starts_a_training_with_overrides_that_compose(name, tmp_path, command_line, monkeypatch) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "run_skpo.sh").write_text('printf "%s\\n" "$@" > "$NOTED"\n')
    script = tmp_path / "examples" / name
    script.write_text((EXAMPLES / name).read_text(encoding="utf-8"))
    words = run(script, tmp_path, "trainer.save_freq=7", "trainer.logger=[console]")
    assert words[-2:] == ["trainer.save_freq=7", "trainer.logger=[console]"]
    check_training(words, command_line, monkeypatch)


def test_the_slurm_script_joins_both_nodes_and_starts_the_training(tmp_path, command_line, monkeypatch) -> None:
    programs = {"srun": SRUN, "sleep": "#!/bin/sh\n", "scontrol": "#!/bin/sh\nprintf 'node1\\nnode2\\n'\n"}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    script = tmp_path / "slurm.sh"
    script.write_text((EXAMPLES / "slurm.sh").read_text(encoding="utf-8").replace("/shared/verl-skpo", str(tmp_path)))
    words = run(script, tmp_path, "trainer.save_freq=7")
    assert words[-2:] == ["+ray_kwargs.ray_init.address=10.0.0.1:6379", "trainer.save_freq=7"]
    check_training(words[words.index("recipe.skpo.main") + 1 :], command_line, monkeypatch)
    assert sorted((tmp_path / "noted.ray").read_text(encoding="utf-8").splitlines()) == [
        "--nodes=1 --ntasks=1 --exclude=node1 ray start --address=10.0.0.1:6379 --block",
        "--nodes=1 --ntasks=1 -w node1 ray start --head --port=6379 --block",
    ]


@pytest.mark.parametrize(
    ("response", "score", "answer"),
    [("2 + 3 = 5", 1.0, "5"), ("so 1,005.0", -1.0, "1005.0"), ("", -1.0, ""), ("word " * 300 + "5", 0.799, "5")],
)
def test_the_own_reward_passes_the_check_of_a_run_and_scores(compose_config, response, score, answer) -> None:
    config = compose_config("platform=cpu", "data=files")
    reward = config.reward.custom_reward_function
    reward.path, reward.reward_kwargs = str(EXAMPLES / "own_reward.py"), {"free_words": 100}
    verdict = check_reward(config)("mine", response, "5", {"split": "train"})
    assert (verdict.score, verdict.record["pred"]) == (pytest.approx(score), answer)
    assert not verdict.left_out
