"""The lines that a run prints for people."""

import pytest

from recipe.skpo.output.progress import ProgressLines, opening

SKPO = {
    "skpo/downstream/reward/mean": 0.594,
    "skpo/downstream/all_equal_share": 0.25,
    "skpo/upstream/length/mean": 6.1,
    "skpo/downstream/length/mean": 12.8,
    "skpo/tracker/value/mean": 0.66,
    "skpo/policy_kl": 0.0043,
    "timing_s/gen": 12.0,
    "timing_s/step": 38.04,
    "critic/score/mean": -9.0,
}
GRPO = {"critic/score/mean": 0.5, "response_length/mean": 13.6, "actor/ppo_kl": 0.001, "timing_s/step": 2.0}
VALID = {"val-core/a/b/acc/mean@1": 0.5, "val-aux/a/b/score/mean@1": 0.0, "val-aux/a/b/well_formed/mean@1": 1.0}


@pytest.mark.parametrize(
    ("ends", "data", "said"),
    [
        (
            (12, None),
            SKPO,
            "step 3/12  reward +0.59  equal groups 25%  tokens 6.1 + 12.8  value 0.66  KL 0.0043  38 s (rollout 12)  "
            "5:42 left",
        ),
        ((12, None), GRPO, "step 3/12  reward +0.50  tokens 13.6  KL 0.0010  2 s  0:18 left"),
        (
            (None, 5000),
            GRPO | {"skpo/tokens/generated_so_far": 1308},
            "step 3 (1,308 of 5,000 tokens)  reward +0.50  tokens 13.6  KL 0.0010  2 s",
        ),
        ((12, None), VALID, "validation after step 3: a/b accuracy 0.500, well-formed 1.000"),
        ((12, None), {"val-aux/a/b/reward/mean@1": -0.5}, "validation after step 3: a/b mean reward -0.500"),
        ((12, None), {"training/epoch": 1}, ""),
    ],
)
def test_a_step_is_one_line(ends, data, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLines(*ends).log(data, 3)
    assert capsys.readouterr().out.rstrip("\n") == said


def test_the_opening_says_what_runs_and_where(compose_config) -> None:
    config = compose_config("trainer.total_training_steps=12", "output_dir=outputs/here")
    assert "12 steps of 8 prompts x 9 rows" in opening(config, 0)
    assert "outputs/here/logs/run.log" in opening(config, 0)
    assert opening(config, 4).endswith("resuming from step 4 of 12 steps")
    config.trainer.total_training_steps, config.trainer.total_epochs = None, 3
    assert ": 3 epochs of 8 prompts" in opening(config, 0)
