"""Which validated step is the best, and how many validations followed it."""

import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipe.skpo.errors import RunError
from recipe.skpo.output.best import Validations, kept_best
from recipe.skpo.output.metrics import MetricsFile

ACC = "val-core/math/acc/mean@1"


def validations(given: str, *values: float) -> Validations:
    found = Validations(given)
    for step, value in enumerate(values):
        found.add(step, {ACC: value})
    return found


@pytest.mark.parametrize(
    ("given", "values", "best", "without_gain"),
    [
        (ACC, (), None, 0),
        (ACC, (0.5,), 0, 0),
        (ACC, (0.1, 0.5, 0.3, 0.4), 1, 2),
        (f"-{ACC}", (0.1, 0.5, 0.05, 0.4), 2, 1),
        (ACC, (0.5, 0.5, 0.5), 0, 2),  # an equal value is not a gain
        (ACC, (math.nan, 0.5, math.nan), 1, 1),
        (ACC, (math.nan, math.nan), None, 2),
    ],
)
def test_the_best_and_what_came_after_it(given, values, best, without_gain) -> None:
    found = validations(given, *values)
    assert (found.best(), found.without_gain()) == (best, without_gain)


def test_the_best_of_those_that_have_a_checkpoint() -> None:
    found = validations(ACC, 0.9, 0.1, 0.5, 0.2)
    assert found.best([1, 2, 3, 4]) == 2 and found.best([4]) is None


def test_a_metric_that_validation_does_not_log_is_refused() -> None:
    with pytest.raises(RunError) as error:
        Validations("val-core/maths/acc/mean@1").add(0, {ACC: 1.0, "val-aux/math/reward/mean@1": 1.0})
    assert str(error.value) == (
        f"trainer.keep_best: validation logs no val-core/maths/acc/mean@1; the nearest names are {ACC}, "
        "val-aux/math/reward/mean@1"
    )


def test_a_run_is_read_from_its_files(tmp_path: Path) -> None:
    assert kept_best(tmp_path) is None
    config = {"trainer": {"keep_best": ACC}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    file = MetricsFile(tmp_path / "metrics.jsonl", resumed_at=0)
    # Step 2 was validated again after a resume; its first value decided what was kept.
    for step, value in ((0, 0.8), (2, 0.7), (4, 0.6), (2, 0.1)):
        file.log({ACC: value, "other": 1.0}, step)
    file.log({"other": 1.0}, 5)
    assert kept_best(tmp_path) is None, "no step has a checkpoint"
    for step in (2, 4):
        (tmp_path / f"checkpoints/global_step_{step}").mkdir(parents=True)
    found, best = kept_best(tmp_path) or pytest.fail("nothing was read")
    assert found.values == {0: 0.8, 2: 0.7, 4: 0.6} and best == 2
    assert Validations(ACC).read(tmp_path / "metrics.jsonl", last=2).values == {0: 0.8, 2: 0.7}
