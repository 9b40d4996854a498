"""The optimizer of a resumed run has the settings of the command and the moments of the checkpoint."""

from types import SimpleNamespace

import pytest
import torch
from verl.utils.torch_functional import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from recipe.skpo.engine.optimizer import use_own_settings, use_own_settings_in_worker


def made(lr: float, weight_decay: float, schedule: str) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=weight_decay, betas=(0.9, 1 - weight_decay / 4))
    if schedule == "cosine":
        return optimizer, get_cosine_schedule_with_warmup(optimizer, 2, 100)
    return optimizer, get_constant_schedule_with_warmup(optimizer, 4)


def step(optimizer: torch.optim.AdamW, scheduler: torch.optim.lr_scheduler.LambdaLR) -> float:
    (weight,) = optimizer.param_groups[0]["params"]
    weight.grad = torch.ones(2)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    return rate


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("steps", [2, 7], ids=["in the warm-up", "after it"])
def test_the_rate_is_what_the_command_would_have_at_this_step(schedule: str, steps: int) -> None:
    former, own, resumed = made(1e-5, 0.1, schedule), made(4e-5, 0.2, schedule), made(4e-5, 0.2, schedule)
    for _ in range(steps):
        step(*former)
        step(*own)
    for part, state in zip(resumed, former, strict=True):
        part.load_state_dict(state.state_dict())
    assert resumed[0].param_groups[0]["lr"] == former[0].param_groups[0]["lr"], "verl's resume"
    rate = use_own_settings(*resumed)
    group = resumed[0].param_groups[0]
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.2, (0.9, 0.95), rate)
    for _ in range(3):
        assert step(*resumed) == pytest.approx(step(*own))
    moments = next(iter(resumed[0].state.values()))
    assert int(moments["step"]) == steps + 3, "the checkpoint's moments go on"


def test_the_actor_is_found_in_a_process_of_several_roles() -> None:
    optimizer, scheduler = made(1e-5, 0.1, "constant")
    actor = SimpleNamespace(actor=SimpleNamespace(engine=SimpleNamespace(optimizer=optimizer, lr_scheduler=scheduler)))
    assert use_own_settings_in_worker(actor) == 0.0, "the warm-up begins at 0"
    assert use_own_settings_in_worker(SimpleNamespace(worker_dict={"ref": SimpleNamespace(), "actor": actor})) == 0.0
    assert use_own_settings_in_worker(SimpleNamespace(worker_dict={})) is None
