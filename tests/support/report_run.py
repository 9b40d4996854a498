"""Run folders for the tests of the report: a believable run, a long one, and one whose texts mean harm.

The numbers come from a seeded generator; nothing here was trained.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.skpo.output.metrics import MetricsFile
from recipe.skpo.output.trees import FOLDER, TreeStore

NAMES = ("Ben", "Mia", "Zoë", "Omar")
THINGS = ("cups", "eggs", "shells", "maps")
SOURCE = "skpo/arithmetic"

CONFIG = """\
output_dir: outputs/smollm2_135m-arithmetic
skpo:
  group_size: 8
  split_low: 0.16666666666666666
  tracker: {rho_min: 0.875, rho_max: 0.96}
data:
  train_batch_size: 8
  train_files: data/arithmetic/train.parquet
actor_rollout_ref:
  model: {path: models/smollm2-135m-instruct}
  rollout: {name: vllm, temperature: 0.6, stop: [], val_kwargs: {temperature: 0, n: 1}}
ray_kwargs:
  ray_init:
    runtime_env:
      env_vars: {WANDB_API_KEY: do-not-show-me, OMP_NUM_THREADS: '2'}
trainer: {experiment_name: smollm2_135m-arithmetic, total_training_steps: 60, logger: [console, tensorboard]}
"""


def tree(step: int, rng: random.Random, skill: float, group: int = 8, words: int = 0) -> dict[str, Any]:
    """One tree of the arithmetic task; ``words``: so many words of thinking in every response."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    split = rng.randint(4, 9)
    starts = (
        f"{a} + {b} =",
        f"{name} has {a} {thing}",
        f"{a} {thing} + {b}",
        f"{a} * {b} =",
        f"{name} gets {b} {thing}",
    )
    candidates = []
    for _ in range(group):
        early = rng.random() < 0.2
        candidates.append(
            {
                "text": rng.choice(starts),
                "rest": f" {a + b}\n#### {a + b}" if early else "",
                "deviation": rng.uniform(0.1, 1.9),
                "ended_early": early,
                "chosen": False,
            }
        )
    chosen = sorted(range(group), key=lambda index: candidates[index]["deviation"])[(group - 1) // 2]
    candidates[chosen]["chosen"] = True
    segment = candidates[chosen]["text"]
    rewards = [1.0 if rng.random() < skill else -1.0 for _ in range(group)]
    mean = sum(rewards) / group
    std = (sum((reward - mean) ** 2 for reward in rewards) / group) ** 0.5
    problem = f"{name} has {a} {thing}. {name} gets {b}. How many now?"
    responses = []
    for reward in rewards:
        said = a + b if reward > 0 else rng.choice([a * b, a - b, a + b + 1])
        thinking = "".join(f"{rng.choice(_WORDS)} " for _ in range(words))
        responses.append(
            {
                "text": f"{thinking}{a} {thing} + {b} = {said} {thing}\n#### {said}",
                "reward": reward,
                "advantage": (reward - mean) / std if std else 0.0,
                "length": 12 + words,
                "answer": str(said),
            }
        )
    return {
        "step": step,
        "prompt_id": f"train-{rng.randrange(1000)}",
        "problem": problem,
        "answer": str(a + b),
        "split_position": split,
        "candidates": candidates,
        "segment": {"text": segment, "reward": mean, "baseline": 2 * skill - 1, "advantage": mean - (2 * skill - 1)},
        "skip_prompt": f"{segment}<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n",
        "responses": responses,
    }


_WORDS = [
    f"{first}{last}" for first in ("so", "then", "now", "let", "sum", "prime") for last in ("", " x", " =", ",", " 7")
]


def metrics(step: int, rng: random.Random, skill: float) -> dict[str, float]:
    """The metrics of one training step, named as the trainer names them."""
    line = {
        "skpo/loss": -0.02 * rng.random(),
        "skpo/policy_kl": 0.004 * rng.random(),
        "actor/entropy": 1.2 - 0.8 * skill + 0.05 * rng.random(),
        "actor/grad_norm": 1 + rng.random(),
        "skpo/rollout_actor_logprob_gap/mean": 0.008 + 0.002 * rng.random(),
        "skpo/upstream/baseline/mean": 2 * skill - 1.1,
        "skpo/tracker/value/mean": skill,
        "skpo/tracker/drift/mean": 3 * rng.random(),
        "skpo/tracker/effective_count/mean": 1 + step / 40,
        "skpo/tracker/length/mean": 18 + rng.random(),
        "skpo/downstream/all_equal_share": skill**3,
        "skpo/upstream/deviation/mean": 0.7 - 0.4 * skill,
        "skpo/upstream/early_finish_share": 0.1 + 0.2 * rng.random(),
        "timing_s/step": 28 + 4 * rng.random(),
        "timing_s/gen": 12 + 3 * rng.random(),
        "timing_s/old_log_prob": 4 + rng.random(),
        "timing_s/update_actor": 10 + rng.random(),
    }
    for role, length in (("upstream", 6), ("downstream", 17)):
        line |= {
            f"skpo/{role}/reward/mean": 2 * skill - 1 + 0.2 * (rng.random() - 0.5),
            f"skpo/{role}/advantage/std": 0.9 + 0.1 * rng.random(),
            f"skpo/{role}/length/mean": length + rng.random(),
            f"skpo/{role}/tokens_generated": 64.0 * length,
            f"skpo/{role}/prefix_cache/hit_rate": 0.8 + 0.1 * rng.random(),
            f"skpo/{role}/loss": -0.01 * rng.random(),
            f"skpo/{role}/ratio_clipped_low_share": 0.01 * rng.random(),
            f"skpo/{role}/ratio_clipped_high_share": 0.01 * rng.random(),
        }
    return line


def validation(acc: float, well_formed: float) -> dict[str, float]:
    """Held-out numbers, named as verl names them."""
    return {
        f"val-core/{SOURCE}/acc/mean@1": acc,
        f"val-aux/{SOURCE}/reward/mean@1": 2 * acc - 1,
        f"val-aux/{SOURCE}/well_formed/mean@1": well_formed,
    }


def make_run(folder: Path, steps: int = 60, per_step: int = 1, words: int = 0, max_mb: float = 64.0) -> Path:
    """A run folder of ``steps`` steps, with validation at the start, at every tenth step and at the end."""
    rng = random.Random(7)
    file = MetricsFile(folder / "metrics.jsonl", resumed_at=0)
    store = TreeStore(folder / FOLDER, max_mb, resumed_at=0)
    file.log(validation(0.32, 0.891), step=0)
    for step in range(1, steps + 1):
        skill = 0.02 + 0.93 * (1 - 0.5 ** (8 * (step / steps) ** 1.5))
        line = metrics(step, rng, skill)
        if step % 10 == 0 or step == steps:
            line |= validation(round(skill * 128) / 128, min(1.0, 0.891 + skill / 8))
        file.log(line, step)
        store.write(step, [tree(step, rng, skill, words=words) for _ in range(per_step)])
    (folder / "config.yaml").write_text(CONFIG)
    return folder


HARM = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\"><svg onload=alert(1)>",
    "<!--<script>-->]]></style><base href='https://example.invalid/'>&lt;b&gt;&amp;",
    "javascript:alert(1) ${alert(1)} {{7*7}} \\u003cscript\\u003e \\",
    "left \u202eright-to-left override\u202c \u2066isolate\u2069 \u200fmark \u061c מִלָּה مرحبا",
    "null\x00byte bell\x07 escape\x1b[31m delete\x7f c1\x9b carriage\rreturn",
    "half \ud83d of a pair \udc00 line\u2028separator paragraph\u2029separator bom\ufeff tag\U000e0041",
    "z" + "\u0301\u0323\u0336" * 300,
    "emoji 👩‍👩‍👧 family, 日本語, \U0001f600",
    "A" * 1_000_000,
    "<" * 1_000_000,
    "\u202e" * 200_000,
    "\x00" * 200_000,
    "\n" * 50_000,
    "",
)
"""Texts that would run, break, turn or flood a careless page."""


def make_hostile_run(folder: Path, texts: Sequence[str] = HARM) -> Path:
    """A run whose every text is one of ``texts``, in every place where a text can stand."""
    make_run(folder, steps=3)
    file = MetricsFile(folder / "metrics.jsonl", resumed_at=3)
    file.log(
        {f"</script><b>{text[:80]}": 1.0 for text in texts} | {"skpo/loss": float("nan"), "__proto__": 2.0}, step=4
    )
    store = TreeStore(folder / FOLDER, 64.0, resumed_at=3)
    for step, text in enumerate(texts, start=4):
        one = tree(step, random.Random(step), skill=0.5)
        one |= {"prompt_id": text, "problem": text, "answer": text, "skip_prompt": one["segment"]["text"] + text}
        for item in [*one["candidates"], *one["responses"]]:
            item["text"] = text
        for item in one["candidates"]:
            item["rest"] = text[:1000]
        one["responses"][0] |= {"answer": text, "reward": float("nan"), "advantage": float("inf")}
        one["responses"][1] |= {"answer": None, "reward": 0.25}
        store.write(step, [one])
    quoted = "".join(f"  - {char!r}\n" for char in ("</script><script>document.title='owned'</script>", "x" * 100_000))
    (folder / "config.yaml").write_text(CONFIG + f"harm:\n{quoted}  \n")
    return folder
