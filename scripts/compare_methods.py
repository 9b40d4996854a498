"""Run every method for a few steps on the same prompts and tabulate what it generates, relative to GRPO.

    python scripts/compare_methods.py [--steps 3] [--methods grpo dapo] [--out outputs/compare] [Hydra overrides]

The overrides are for every run, and a finished run is not repeated.  Prints a markdown table; tokens are per step and
prompt of the common batch (SPO has G times as many prompts with one response each: its tokens are divided by the common
number too).
"""

import argparse
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from data_prep.untrusted import read_yaml
from recipe.skpo.output.console import markdown_table
from recipe.skpo.output.metrics import training_steps

METHODS = ["grpo", "skpo", "grpo_curriculum", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "papo", "spo"]


def run(method: str, folder: Path, steps: int, overrides: list[str]) -> None:
    """Train the method from the start.

    Raises:
        subprocess.CalledProcessError: the run failed; its output was printed.
    """
    command = [sys.executable, "-m", "recipe.skpo.main", f"method={method}", f"output_dir={folder}"]
    command += [f"trainer.total_training_steps={steps}", "trainer.val_before_train=false", "trainer.test_freq=-1"]
    subprocess.run([*command, "trainer.save_freq=-1", *overrides], check=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python scripts/compare_methods.py", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="default %(default)s")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all; with grpo")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"), help="default %(default)s")
    arguments, overrides = parser.parse_known_args()

    rows = {}
    for method in dict.fromkeys(["grpo", *arguments.methods]):
        folder = arguments.out / method
        if len(training_steps(folder / "metrics.jsonl")) < arguments.steps:
            run(method, folder, arguments.steps, overrides)
        lines = training_steps(folder / "metrics.jsonl")
        config = OmegaConf.create(read_yaml(folder / "config.yaml"))
        prompts = config.data.train_batch_size // (config.skpo.group_size if method == "spo" else 1)
        rows[method] = {
            name: sum(line[f"skpo/tokens/{name}"] for line in lines) / len(lines) / prompts
            for name in ("generated", "prefilled", "cached")
        }
    base = rows["grpo"]["generated"]
    table = [
        [
            f"`{method}`",
            f"{row['generated']:.0f}",
            f"{row['generated'] / base:.2f}",
            f"{row['prefilled']:.0f}",
            f"{row['cached'] / row['prefilled']:.0%}",
        ]
        for method, row in rows.items()
    ]
    print(markdown_table(["method", "generated", "relative to GRPO", "prefilled", "of which cached"], table))


if __name__ == "__main__":
    main()
