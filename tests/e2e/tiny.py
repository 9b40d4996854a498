"""A tiny random Llama with its own tokenizer, a task and a reward for it: the real stack in a minute."""

from pathlib import Path

import reward_fns
from data_prep import tiny as policy
from data_prep.schema import Row, write_parquet
from reward_fns.code_tests import read_tests

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}answer: {% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
REWARD = "reward.custom_reward_function"
OPENS, CLOSES = "<think>", "</think>"


def make_model(folder: Path) -> Path:
    """Write a Llama of about 100,000 random parameters whose tokens are bytes; returns the folder."""
    policy.prepare(folder, policy.Settings(documents=0, width=64, feed_forward=128, layers=2))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def make_data(folder: Path, rows: int = 16) -> tuple[Path, Path]:
    """Write train and val parquet files of made-up problems; returns both paths."""
    paths = []
    for split in ("train", "val"):
        path = folder / f"{split}.parquet"
        write_parquet(
            [
                Row(
                    "tiny",
                    [{"role": "user", "content": f"{split} {index}"}],
                    str(index),
                    "none",
                    split,
                    index,
                    f"{split} {index}",
                )
                for index in range(rows)
            ],
            path,
        )
        paths.append(path)
    return paths[0], paths[1]


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: object = None, **kwargs: object
) -> dict[str, float]:
    """Right where the response has an even number of characters: a coin that a random model can win."""
    correct = len(solution_str) % 2 == 0
    return {"score": 1.0 if correct else -1.0, "acc": float(correct), "well_formed": 1.0}


def score_of_program(
    data_source: str, solution_str: str, ground_truth: str, extra_info: object = None, **kwargs: object
) -> dict[str, float | str]:
    """The recipe's own reward of a program, which a random model cannot write: a right one after an even text."""
    tests = read_tests(ground_truth)
    known = {str(given): result for (given,), result in tests.tests}
    found = f"{known!r}[str(value)]" if len(solution_str) % 2 == 0 else "None"
    program = f"```python\ndef {tests.names[0]}(value):\n    return {found}\n```\n"
    return reward_fns.compute_score(data_source, program, ground_truth)


def score_of_answer(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict, **kwargs: object
) -> float:
    """Right where an odd number of ASCII characters follows the thought: a coin that an open thought does not win."""
    answer = extra_info.get("response_after_thought", solution_str)
    return 1.0 if sum(map(str.isascii, answer)) % 2 else -1.0


def overrides(folder: Path, thinks: bool = False) -> list[str]:
    """Overrides of ``recipe.skpo.main`` that train the tiny model in ``folder``."""
    train, val = make_data(folder)
    model = make_model(folder / "model", thinks)
    thinking = ["+data.apply_chat_template_kwargs.enable_thinking=true", f"{REWARD}.name=score_of_answer"]
    return [
        *(thinking if thinks else []),
        "platform=cpu",
        "data=files",
        f"data.train_files={train}",
        f"data.val_files={val}",
        "data.train_batch_size=4",
        "data.max_prompt_length=48",
        "data.max_response_length=16",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        # The same precision on both sides, high enough to tell agreement from luck.
        "actor_rollout_ref.rollout.dtype=float32",
        "actor_rollout_ref.rollout.temperature=1.0",
        "skpo.group_size=4",
        f"{REWARD}.path={Path(__file__).resolve()}",
        f"output_dir={folder / 'out'}",
        "trainer.save_freq=2",
        "trainer.test_freq=1000",
    ]
