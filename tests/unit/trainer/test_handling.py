"""Every test of docs/development/faults.md fails without the handling that it is about.

Each row takes one piece of the handling away by a patch and runs the tests that must notice, in this process. Whole
runs (tests/e2e) are not here.
"""

import asyncio
import contextlib
import fcntl
import io
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

import recipe.skpo.trainer.skpo  # noqa: F401  and all below it
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.nightly, pytest.mark.faults, pytest.mark.timeout(600)]

FAULTS, TRAINER, KILLS = "trainer/test_faults.py", "trainer/test_skpo.py", "trainer/test_kills.py"
ROLLOUT, TRAINERS = "recipe.skpo.rollout", "recipe.skpo.trainer"


class Changed:
    """A module with some names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def nothing(*arguments: Any, **options: Any) -> None:
    """Do nothing, for a step that is left out."""


def first(value: Any, *others: Any) -> Any:
    """Return the first argument, for a wrapper that is left out."""
    return value


def impatient(self: Any, partition_id: str, last_debug_time: float) -> float:
    """verl's endless polling, which this test ends."""
    self.polls = getattr(self, "polls", 0) + 1
    assert self.polls < 1000, "polled without an end"
    return ReplayBuffer._wait_for_next_poll(self, partition_id, last_debug_time)


async def strict_gather(*awaitables: Any, return_exceptions: bool = False) -> list[Any]:
    """``asyncio.gather`` that raises the first error."""
    return await asyncio.gather(*awaitables)


NO_TIME_OUT = Changed(asyncio, timeout=lambda seconds: asyncio.timeout(None))

# What is taken away -> (module or package and the name in it, what stands there instead, the tests that must notice).
HANDLING: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "one failed request does not end the others": (
        f"{ROLLOUT}:asyncio",
        Changed(asyncio, gather=strict_gather),
        (
            f"{FAULTS}::test_a_failing_candidate_is_left_out",
            f"{FAULTS}::test_a_failing_sibling_leaves_an_untrained_row",
            f"{FAULTS}::test_one_wrong_reward_costs_one_sibling",
        ),
    ),
    "answers are checked": (
        f"{ROLLOUT}:invalid_reason",
        nothing,
        (
            f"{FAULTS}::test_a_failing_candidate_is_left_out",
            f"{FAULTS}::test_a_baseline_goes_on_without_a_response_that_failed",
        ),
    ),
    "failures are counted by their cause": (
        f"{ROLLOUT}:cause_of",
        lambda kind, error: kind,
        (
            f"{FAULTS}::test_what_failed_is_counted_by_its_cause",
            f"{FAULTS}::test_an_error_of_another_actor_is_counted_by_its_first_line",
            f"{FAULTS}::test_a_reward_out_of_bounds_is_a_reason_to_stop",
        ),
    ),
    "a missing sibling is not trained": (
        f"{ROLLOUT}:SkpoAgentLoopWorker._missing_sibling",
        lambda self, skip_ids, sibling: sibling,
        (f"{FAULTS}::test_one_wrong_reward_costs_one_sibling",),
    ),
    "a prompt has a time limit": (
        f"{ROLLOUT}:Clock.start",
        nothing,
        (
            f"{FAULTS}::test_a_prompt_that_cannot_be_rolled_out_is_a_failure_without_rows[candidates never come]",
            f"{FAULTS}::test_a_baseline_does_not_wait_for_ever",
        ),
    ),
    "a reward has a time limit": (
        f"{ROLLOUT}:asyncio",
        NO_TIME_OUT,
        (f"{FAULTS}::test_validation_goes_on_without_a_reward",),
    ),
    "the clock stops before a row is stored": (
        f"{ROLLOUT}:Clock.rewarded",
        nothing,
        (f"{FAULTS}::test_a_row_of_a_baseline_is_stored_whole_whatever_the_time",),
    ),
    "rewards are finite numbers": (
        f"{ROLLOUT}:finite_number",
        lambda value: 0.0,
        (
            f"{FAULTS}::test_a_baseline_stores_no_row_with_a_wrong_reward",
            f"{FAULTS}::test_a_prompt_that_cannot_be_rolled_out_is_a_failure_without_rows[not_a_number]",
            f"{FAULTS}::test_dapos_reward_manager_punishes_long_responses",
        ),
    ),
    "records are reduced to numbers and texts": (
        f"{ROLLOUT}:split_record",
        lambda record, *others: (record, []),
        (f"{FAULTS}::test_what_the_reward_returned_is_stored_as_numbers_and_texts_that_validation_can_average",),
    ),
    "a run stops when too many prompts are dropped": (
        f"{TRAINERS}:ReplayBufferWithTimeout.sample",
        ReplayBuffer.sample,
        (f"{FAULTS}::test_more_dropped_prompts_than_the_share_stop_the_run",),
    ),
    "a batch that does not arrive is given up": (
        f"{TRAINERS}:ReplayBufferWithTimeout._wait_for_next_poll",
        impatient,
        (f"{FAULTS}::test_prompts_of_a_worker_that_died_stop_the_run",),
    ),
    "every trainer has the bounded buffer": (
        f"{TRAINERS}:ReplayBufferWithTimeout",
        first,
        (f"{TRAINER}::test_every_trainer_waits_with_a_bound",),
    ),
    "the replicas' manager has a time-out": (
        f"{TRAINERS}:CheckpointManagerWithTimeout",
        first,
        (f"{TRAINER}::test_a_replica_that_does_not_fall_asleep_is_not_waited_for_without_end",),
    ),
    "the servers' weights are checked": (
        f"{TRAINERS}:BaseTrainer._check_logprob_gap",
        nothing,
        (f"{TRAINER}::test_other_weights_in_the_servers_stop_the_run",),
    ),
    "a reason to stop is looked for": (
        f"{TRAINERS}:stop_reason",
        nothing,
        (f"{TRAINER}::test_a_reason_to_stop_ends_the_run_before_the_step_is_trained",),
    ),
    "what cannot be written is left out": (
        "recipe.skpo.output:BestEffort.attempt",
        lambda self, what, *errors: contextlib.nullcontext(),
        (
            f"{TRAINER}::test_trees_that_cannot_be_written_do_not_end_the_training",
            "output/test_best_effort.py::test_a_dump_that_cannot_be_written_is_skipped",
        ),
    ),
    "every run registers the adapter": (
        "recipe.skpo.launch:_apply_engine",
        lambda config: {},
        ("launch/test_main.py::test_the_engine_reaches_every_worker",),
    ),
    "the marker follows the checkpoint that is loaded": (
        f"{TRAINERS}:mark",
        nothing,
        (
            f"{KILLS}::test_going_back_to_an_older_checkpoint_makes_it_the_one_that_counts",
            f"{KILLS}::test_a_new_start_and_another_runs_checkpoint_leave_no_old_mark",
        ),
    ),
    "older checkpoints are removed": (
        f"{TRAINERS}:remove_older",
        nothing,
        (f"{KILLS}::test_one_checkpoint_is_enough_to_survive_a_kill",),
    ),
    "half of a checkpoint is removed": (
        f"{TRAINERS}:remove_checkpoint",
        nothing,
        (f"{KILLS}::test_a_full_disk_is_named_and_the_run_goes_on_from_the_last_whole_checkpoint",),
    ),
    "other data are read from their beginning": (
        f"{TRAINERS}:restarts_epoch",
        lambda changed: False,
        (f"{KILLS}::test_other_training_data_are_read_from_their_beginning",),
    ),
    "a changed learning rate reaches the workers": (
        f"{TRAINERS}:differences",
        lambda saved, own: [],
        (f"{KILLS}::test_a_changed_learning_rate_reaches_every_worker",),
    ),
    "a checkpoint is looked through": (
        "recipe.skpo.trainer:missing_piece",
        nothing,
        ("trainer/test_resume.py::test_a_marker_that_a_kill_left_empty_gets_the_last_whole_checkpoint",),
    ),
    "the run's folder is locked": (
        "recipe.skpo.checks.run_folder:fcntl",
        Changed(fcntl, flock=nothing),
        ("checks/test_run_folder.py::test_a_killed_command_frees_its_folder_while_its_children_live",),
    ),
    "processes of the run are watched": (
        "recipe.skpo.ending:Watch._look",
        nothing,
        (
            "launch/test_ending.py::test_a_process_that_the_run_does_not_miss_ends_it_all_the_same",
            "launch/test_ending.py::test_a_run_that_ends_by_itself_is_left_to_it_and_asked_who_died",
        ),
    ),
}


def take_away(patch: pytest.MonkeyPatch, place: str, without: Any) -> None:
    """Replace a name, or a method, wherever a module of the package has it."""
    package, _, name = place.partition(":")
    head, _, method = name.partition(".")
    found = [
        module
        for key, module in sys.modules.items()
        if (key == package or key.startswith(f"{package}.")) and head in vars(module)
    ]
    assert found, f"{place} has moved"
    for module in found:
        patch.setattr(vars(module)[head] if method else module, method or head, without)


@dataclass
class Outcome:
    """A plugin of pytest that keeps what became of the tests."""

    results: dict[str, str] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome of a call, or of a set-up that went wrong."""
        if report.when == "call" or report.outcome == "failed":
            self.results[report.nodeid] = report.outcome if report.when == "call" else "error"


@pytest.mark.parametrize("handling", HANDLING)
def test_without_the_handling_its_tests_fail(handling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, without, tests = HANDLING[handling]
    take_away(monkeypatch, place, without)
    outcome = Outcome()
    command = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "timeout=60",
        *(str(REPOSITORY / "tests/unit" / test) for test in tests),
    ]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pytest.main(command, plugins=[outcome])
    failed = [name for name, result in outcome.results.items() if result == "failed"]
    unnoticed = [test for test in tests if not any(test in name for name in failed)]
    assert not unnoticed, printed.getvalue()[-3000:]
