"""Every fault of rollout and rewards, injected, and the policy that answers it; see docs/development/faults.md.

Faults come in at the borders: the server's answer, the reward function, the replay buffer's view of TransferQueue, the
socket to vLLM.  What is real and what stands for a process is told in ``rollout_setup``.
"""

import asyncio
import importlib.util
import json
import math
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError, RayTaskError

from tests.support.rollout_setup import ANSWER, SPLIT, G, make_prompt

pytestmark = pytest.mark.faults

REWARDS = Path(__file__).parents[2] / "support/faulty_rewards.py"

# ---------------------------------------------------------------- one request


VOCABULARY = 261


def output(token_ids: list[int], logprobs: list[float] | None, reason: str = "completed"):
    from verl.workers.rollout.replica import TokenOutput

    extra = {"global_steps": 7, "min_global_steps": 7, "max_global_steps": 7}
    return TokenOutput(token_ids=token_ids, log_probs=logprobs, stop_reason=reason, extra_fields=extra)


FAILURES = {
    "an error": lambda: RuntimeError("the server died"),
    "a dead replica": lambda: RayActorError(error_msg="the actor died"),
    "no tokens": lambda: [],
    "no log-probs": lambda: ([40, 41, 42], []),
    "log-probs missing": lambda: output([40, 41, 42], None),
    "log-probs too few": lambda: ([40, 41, 42], [-0.5, -0.5]),
    "log-probs too many": lambda: ([40, 41], [-0.5, -0.5, -0.5]),
    "log-probs NaN": lambda: ([40, 41, 42], [-0.5, math.nan, -0.5]),
    "log-probs infinite": lambda: ([40, 41, 42], [-0.5, -math.inf, -0.5]),
    "token id too large": lambda: ([40, VOCABULARY, 42], [-0.5] * 3),
    "token id below 0": lambda: ([40, -1, 42], [-0.5] * 3),
    "aborted": lambda: output([40, 41, 42], [-0.5] * 3, "aborted"),
}
"""What a server may answer that cannot be used."""
each_failure = pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)


@each_failure
async def test_a_failing_sibling_leaves_an_untrained_row(two_phases, failure, caplog) -> None:
    setup = two_phases(
        downstream=lambda number: failure() if number == 1 else setup.tokens(f"#### {ANSWER if number == 0 else 9}")
    )
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.status("v7") == ["running", "finished"]
    assert len(setup.store.rows) == G + 1
    missing = setup.store.row("v7", 2)
    assert not missing["response_mask"].any() and not missing["loss_mask"].any()
    assert len(missing["responses"]) >= 1, "verl needs at least one token per row"
    assert int(missing["skpo_phase"]) == 1
    assert missing["prompts"].tolist() == setup.store.row("v7", 1)["prompts"].tolist()
    assert len({frozenset(row) for row in setup.store.rows.values()}) == 1
    tag = setup.store.tags["v7_2_0"]
    assert (tag["min_global_steps"], tag["max_global_steps"]) == (7, 7)
    # +1, -1, -1: the one that failed does not count.
    assert float(setup.store.row("v7", 0)["rm_scores"].sum()) == pytest.approx(-1 / 3)
    assert "sibling 1 failed" in caplog.text


@each_failure
async def test_a_failing_candidate_is_left_out(two_phases, failure, caplog) -> None:
    deviations = [0.1, 5.0, 1.0, 2.0]  # without number 1 the median is 1.0, of number 2

    def upstream(number: int):
        return failure() if number == 1 else ([10 + number] * SPLIT, [-deviations[number]] * SPLIT)

    setup = two_phases(upstream)
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.status("v7") == ["running", "finished"]
    assert len(setup.store.rows) == G + 1
    assert setup.store.row("v7", 0)["responses"].tolist() == [12] * SPLIT
    assert len(setup.store.record("v7").candidates) == G - 1
    assert "candidate 1 failed" in caplog.text


@each_failure
async def test_a_baseline_goes_on_without_a_response_that_failed(baseline, failure) -> None:
    setup = baseline(lambda request: failure() if request.number == 1 else setup.tokens("#### 5"))
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.status("v7") == ["running", "failure"]
    assert len(setup.store.rows) == G - 1
    ((cause, count),) = setup.worker.take_failures().items()
    assert cause.startswith("session: ") and count == 1


async def test_what_failed_is_counted_by_its_cause(two_phases) -> None:
    setup = two_phases(
        lambda number: [] if number == 1 else [10] * SPLIT,
        lambda number: RuntimeError("the server died\nand more") if number else setup.tokens("#### 5"),
    )
    await setup.roll_out(make_prompt("v7"))
    assert setup.worker.take_failures() == {
        "candidate: RolloutError: 0 tokens with 0 log-probs (stop reason completed)": 1,
        "sibling: RuntimeError: the server died": G - 1,
    }
    assert setup.worker.take_failures() == {}


def test_an_error_of_another_actor_is_counted_by_its_first_line() -> None:
    from recipe.skpo.rollout.failures import cause_of

    remote = [RayTaskError("compute_score", "the traceback", ValueError("bad\nworse"), pid=pid) for pid in (1, 2)]
    assert {cause_of("sibling", error) for error in remote} == {"sibling: ValueError: bad"}
    assert {cause_of("sibling", error.as_instanceof_cause()) for error in remote} == {"sibling: ValueError: bad"}


async def test_one_sibling_left_is_a_group_without_an_advantage(two_phases) -> None:
    from recipe.skpo.method.advantage import skpo_advantage
    from recipe.skpo.method.rows import PHASE_FIELD, Rows

    setup = two_phases(downstream=lambda number: [] if number else setup.tokens(f"#### {ANSWER}"))
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.status("v7") == ["running", "finished"]
    keys = [f"v7_{session}_0" for session in range(G + 1)]
    columns = setup.store.kv_batch_get(keys, "train", ["id", "extra_fields", PHASE_FIELD])
    rows = Rows.read(columns, keys, [setup.store.tags[key] for key in keys])
    assert rows.valid_mask.tolist() == [True, True] + [False] * (G - 1)
    advantages = skpo_advantage(rows.rewards, torch.zeros(G + 1), rows.phase, rows.prompts, rows.valid_mask)
    assert torch.isfinite(advantages).all() and not advantages[1:].any()


# ---------------------------------------------------------------- a whole prompt


def custom(name: str) -> list[str]:
    return [f"reward.custom_reward_function.path={REWARDS}", f"reward.custom_reward_function.name={name}"]


BAD_REWARDS = {
    "raises": "ZeroDivisionError",
    "hangs": "TimeoutError",
    "not_a_number": "returned nan, which is not a finite number",
    "infinite": "returned -inf, which is not a finite number",
    "text": "returned '1.0', which is not a finite number",
    "nothing": "returned None, which is not a finite number",
    "tensor": "which is not a finite number",
    "no_score": "KeyError",
    "too_large": "returned 2 for prompt id-v7, and method=skpo needs rewards within [-1, 1]",
}
SOON = {"prompt_timeout_s": 0.2}


def dead(number: int) -> Exception:
    return RuntimeError("the server died")


def empty(number: int) -> list[int]:
    return []


def never(number: int) -> Any:
    return asyncio.Event().wait()


NO_ROOM = {"skip": "continual"}
# (answers of either phase, options of the worker, changes of the prompt, what is logged)
DROPPED: dict[str, tuple[list[Any], dict[str, Any], dict[str, Any], str]] = {
    "no candidate comes back": ([dead], {}, {}, f"all {G} upstream candidates failed"),
    "none of two": ([empty], {"candidates": 2}, {}, "all 2 upstream candidates failed"),
    "no sibling comes back": ([None, empty], {}, {}, f"all {G} siblings failed"),
    "candidates never come": ([never], SOON, {}, "TimeoutError"),
    "a sibling never comes": ([None, lambda number: never(2) if number == 2 else [40, 2]], SOON, {}, "TimeoutError"),
    "no id": ([], {}, {"id": None}, "prompt None (v7) is dropped"),
    "a prompt as long as the context": ([], {}, {"question": "x" * 200}, "no room in max_model_len"),
    "a segment as long as the budget": ([lambda number: [40] * 32], NO_ROOM, {"skpo_split_position": 32}, "no room"),
    **{
        name: ([None, None, *custom(name)], SOON if name == "hangs" else {}, {}, said)
        for name, said in BAD_REWARDS.items()
    },
}


@pytest.mark.parametrize("case", DROPPED)
async def test_a_prompt_that_cannot_be_rolled_out_is_a_failure_without_rows(two_phases, case: str, caplog) -> None:
    answers, options, changes, said = DROPPED[case]
    setup = two_phases(*answers, **options)
    prompt = make_prompt("v7", **changes)
    if prompt["id"] is None:
        del prompt["id"]
    await setup.roll_out(prompt)
    assert setup.store.status("v7") == ["running", "failure"] and not setup.store.rows
    assert f"prompt {prompt.get('id')} (v7) is dropped" in caplog.text and said in caplog.text
    (cause,) = [cause for cause in setup.worker.take_failures() if cause.startswith("prompt: ")]
    assert cause == "prompt: TimeoutError: " or said != "TimeoutError"


async def test_waiting_for_a_slot_does_not_drop_a_prompt(two_phases) -> None:
    """Five prompts one after the other take longer than the time limit of one; each alone keeps it."""

    async def slowly(number: int) -> list[int]:
        await asyncio.sleep(0.1)
        return setup.tokens("#### 7")

    few = ["actor_rollout_ref.rollout.max_num_seqs=3", "actor_rollout_ref.rollout.agent.num_workers=1"]
    setup = two_phases(slowly, slowly, *few, prompt_timeout_s=1.5)
    uids = [f"v{number:010d}" for number in range(5)]
    await setup.roll_out(*(make_prompt(uid, skpo_expected_length=number) for number, uid in enumerate(uids)))
    assert {setup.store.status(uid)[-1] for uid in uids} == {"finished"}
    assert setup.worker.take_failures() == {}


async def test_a_failing_prompt_does_not_touch_its_neighbour(make_worker) -> None:
    def script(request):
        return RuntimeError("no") if request.request_id.startswith("v7") else setup.tokens("#### 5")

    setup = make_worker(script)
    await setup.roll_out(make_prompt("v7"), make_prompt("v8"))
    assert setup.store.status("v7") == ["running", "failure"]
    assert setup.store.status("v8") == ["running", "finished"]
    assert {key.split("_")[0] for key in setup.store.rows} == {"v8"}


async def test_the_rows_of_a_prompt_are_stored_together_or_not_at_all(two_phases) -> None:
    """verl clears a failed group; a row written after that would belong to no prompt."""
    setup = two_phases()

    async def before_row(key: str) -> None:
        if key == "v7_1_0":
            raise RuntimeError("the storage unit died")
        await asyncio.sleep(0.05)

    setup.store.before_row = before_row
    await setup.roll_out(make_prompt("v7"))
    await asyncio.sleep(0.1)
    assert setup.store.events == [("running", "v7"), ("failure", "v7")]


@pytest.mark.parametrize(("position", "kept"), [(20, 1), (30, 2)], ids=["one token", "five tokens"])
async def test_a_split_position_beyond_what_was_written_halves_the_candidate(two_phases, position, kept) -> None:
    """Candidates that the server cut short, without an end token, too."""
    written = [40] if kept == 1 else [40, 41, 42, 43, 44]
    setup = two_phases(lambda number: written)
    await setup.roll_out(make_prompt("v7", skpo_split_position=position))
    assert setup.store.status("v7") == ["running", "finished"]
    assert setup.store.row("v7", 0)["responses"].tolist() == written[:kept]


@pytest.mark.parametrize(("room", "status"), [(1, "finished"), (0, "failure")])
async def test_a_skip_prompt_at_the_length_limit(two_phases, room: int, status: str) -> None:
    """One token of room is a response of one token; none drops the prompt before any request."""
    setup = two_phases()
    setup.worker.rollout_config.max_model_len = SPLIT + len(setup.problem_ids()) + room
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.status("v7") == ["running", status]
    assert [request.params["max_tokens"] for request in setup.downstream()] == [1] * (G if room else 0)


# ---------------------------------------------------------------- rewards


async def test_one_wrong_reward_costs_one_sibling(two_phases) -> None:
    """One is NaN, one raises."""
    setup = two_phases(None, lambda number: setup.tokens(f"#### {(5, 6, 7, 5)[number]}"), *custom("for_five_only"))
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.status("v7") == ["running", "finished"]
    assert [bool(row["response_mask"].any()) for row in setup.store.siblings("v7")] == [True, False, False, True]
    assert float(setup.store.row("v7", 0)["rm_scores"].sum()) == 1.0


async def test_what_the_reward_returned_is_stored_as_numbers_and_texts_that_validation_can_average(
    two_phases, caplog
) -> None:
    """Each of what would end verl's validation, and what only has another type."""
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    setup = two_phases(None, None, *custom("rich_record"), "actor_rollout_ref.rollout.val_kwargs.n=2")
    await setup.roll_out(make_prompt("v7"))
    await setup.roll_out(make_prompt("val"), validate=True)
    assert [float(row["rm_scores"].sum()) for row in setup.store.siblings("v7")] == [1.0] * G
    rows = [setup.store.row(uid, session) for uid in ("v7", "val") for session in (0, 1)][1:]
    kept = {"score": 1.0, "acc": True, "pred": "5", "tokens": 7, "margin": 0.5, "share": 0.25, "ratio": 0.5}
    kept |= {"nothing": None, "word": "five"}
    for record in (row["extra_fields"]["reward_extra_info"] for row in rows):
        changing = record.pop("sometimes", None)
        assert record == kept and {type(value) for value in record.values()} <= {bool, int, float, str, type(None)}
        assert changing is None or isinstance(changing, float)
    for key in ("detail", "steps", "seen", "day", "vector", "reward"):
        assert f"the reward function returned '{key}' (" in caplog.text
        assert caplog.text.count(f"returned '{key}'") == 1, "said once"
    assert "returned 'sometimes' (a text here and a number there)" in caplog.text
    records = [row["extra_fields"]["reward_extra_info"] for row in rows[1:]]
    infos = {key: [record.get(key) for record in records] for key in {key for record in records for key in record}}
    metrics = process_validation_metrics(["s", "s"], ["val", "val"], infos)
    assert metrics["s"]["acc"]["mean@2"] == 1.0 and metrics["s"]["margin"]["mean@2"] == 0.5


async def test_a_plain_number_of_a_reward_function_is_a_mean_reward_and_not_an_accuracy(two_phases) -> None:
    setup = two_phases(None, None, *custom("plain_number"))
    await setup.roll_out(make_prompt("val"), validate=True)
    row = setup.store.row("val", 0)
    assert float(row["rm_scores"].sum()) == 0.5 and row["extra_fields"]["reward_extra_info"] == {}
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.row("v7", 1)["extra_fields"]["reward_extra_info"] == {"acc": 0.5}, "DAPO filters groups by it"


# ---------------------------------------------------------------- verl's DAPO manager


async def test_dapos_reward_manager_punishes_long_responses(baseline) -> None:
    """It returns a tensor for those, and an answer that is right and too long must not be lost, nor count as wrong."""
    shaped = ["data.max_response_length=32", "reward.reward_kwargs.overlong_buffer_cfg.log=true"]
    setup = baseline(None, "method=dapo", *shaped)
    short, long = setup.tokens("#### 5"), setup.tokens("#### 5" + " " * 20)
    assert len(short) <= 26 < len(long) <= 32
    setup.llm.script = lambda request: long if request.number % 2 else short
    await setup.roll_out(make_prompt("v7"))
    await setup.roll_out(make_prompt("val"), validate=True)
    assert setup.store.status("v7") == setup.store.status("val") == ["running", "finished"]
    assert setup.worker.take_failures() == {}
    for row in setup.store.rows.values():
        record = row["extra_fields"]["reward_extra_info"]
        over = max(0, len(row["responses"]) - 26) / 6
        assert float(row["rm_scores"].sum()) == pytest.approx(1 - over)
        assert record["overlong_reward"] == pytest.approx(-over) and record["acc"] == 1.0


# ---------------------------------------------------------------- the baselines, validation


@pytest.mark.parametrize("name", [name for name in BAD_REWARDS if name != "too_large"])
async def test_a_baseline_stores_no_row_with_a_wrong_reward(baseline, name: str) -> None:
    setup = baseline(None, *custom(name), **(SOON if name == "hangs" else {}))
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.status("v7") == ["running", "failure"] and not setup.store.rows


async def test_only_training_with_trackers_bounds_the_reward(make_worker, baseline) -> None:
    """DAPO's punishment of long responses leaves [-1, 1], and no tracker sees what validation earns."""
    setup = baseline(None, *custom("too_large"))
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.status("v7") == ["running", "finished"]
    setup = make_worker(None, *custom("too_large"))
    await setup.roll_out(make_prompt("val"), validate=True)
    assert setup.store.status("val") == ["running", "finished"] and setup.worker.take_failures() == {}


@pytest.mark.parametrize("name", ["too_large", "too_small_for_long_ones"])
async def test_a_reward_out_of_bounds_is_a_reason_to_stop(two_phases, name: str) -> None:
    """One sibling is enough: without it, responses would be selected by what earned them such a reward."""
    from recipe.skpo.rollout.failures import stop_reason
    from recipe.skpo.trainer.timeouts import ReplayBufferWithTimeout

    setup = two_phases(None, lambda number: setup.tokens("#### 5" + "  " * number), *custom(name))
    await setup.roll_out(make_prompt("v7"))
    failures = setup.worker.take_failures()
    reason = stop_reason(failures)
    assert reason is not None and reason.endswith("(method=grpo)") and len(reason) < 250
    buffer = SimpleNamespace(causes=lambda: failures)
    assert ReplayBufferWithTimeout._why(buffer) == reason, "said instead of three causes"
    assert stop_reason(["sibling: ValueError: stop: 3"]) is None


async def test_a_baseline_does_not_wait_for_ever(baseline) -> None:
    async def script(request):
        if request.number == 2:
            await asyncio.Event().wait()
        return setup.tokens("#### 5")

    setup = baseline(script, prompt_timeout_s=0.5)
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.status("v7") == ["running", "failure"] and len(setup.store.rows) == G - 1
    assert setup.worker.take_failures() == {"session: TimeoutError: ": 1}


async def test_a_row_of_a_baseline_is_stored_whole_whatever_the_time(baseline) -> None:
    setup = baseline(lambda request: setup.tokens("#### 5"), prompt_timeout_s=1.0)

    async def slow(key: str) -> None:
        await asyncio.sleep(1.2)

    setup.store.before_row = slow
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.status("v7") == ["running", "finished"] and len(setup.store.rows) == G


@pytest.mark.parametrize("name", ["hangs", "not_a_number"])
async def test_validation_goes_on_without_a_reward(make_worker, name: str) -> None:
    setup = make_worker(None, *custom(name), **SOON)
    await setup.roll_out(make_prompt("val"), validate=True)
    assert setup.store.status("val") == ["running", "failure"] and not setup.store.rows


async def test_a_long_wait_for_the_server_is_no_fault_in_validation(make_worker) -> None:
    """All of its prompts are sent at once."""

    async def script(request):
        await asyncio.sleep(1.2)
        return setup.tokens("#### 5")

    setup = make_worker(script, prompt_timeout_s=1.0)
    await setup.roll_out(make_prompt("val"), validate=True)
    assert setup.store.status("val") == ["running", "finished"]


# ---------------------------------------------------------------- batches that do not arrive, or in part


class Tags:
    """TransferQueue's list of prompts and rows, as the replay buffer polls it."""

    partition = "train"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, partition: str = "train") -> None:
        import transfer_queue

        monkeypatch.setattr(Tags, "partition", partition)
        self.items: dict[str, dict[str, Any]] = {}
        self.polls = self.idle = 0
        self.at_poll: dict[int, dict[str, str]] = {}
        monkeypatch.setattr(transfer_queue, "kv_list", self.list)
        # The clock of the buffer: one second per poll, on a busy machine too.
        monkeypatch.setattr(
            "recipe.skpo.trainer.timeouts.time", SimpleNamespace(monotonic=lambda: float(self.polls + self.idle))
        )
        monkeypatch.setattr(transfer_queue, "kv_clear", lambda keys, partition_id: None)

    def list(self) -> dict[str, dict[str, dict[str, Any]]]:
        self.polls += 1
        for uid, status in self.at_poll.get(self.polls, {}).items():
            self.prompt(uid, status)
        return {self.partition: self.items}

    def prompt(self, uid: str, status: str, rows: int = 0) -> None:
        self.items[uid] = {"is_prompt": True, "status": status, "global_steps": 3}
        for session in range(rows):
            self.items[f"{uid}_{session}_0"] = {"seq_len": 5}


def sample(
    causes: dict[str, int] | Exception | None = None, share: float = 0.5, patience: float = 30.0, buffer: Any = None
) -> tuple[Any, Any]:
    """Sample 4 prompts of step 3; returns the buffer, for a next batch, and the rows."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    from recipe.skpo.trainer.timeouts import ReplayBufferWithTimeout

    def ask() -> Counter[str]:
        if isinstance(causes, Exception):
            raise causes
        return Counter(causes or {})

    if buffer is None:
        inner = ReplayBuffer("sync", {}, 1, "drop", {}, poll_interval=0.001, train_batch_size=4)
        buffer = ReplayBufferWithTimeout(inner, 1.0, share, ask)
        assert buffer.patience_s == 61.0
        buffer.patience_s = patience
    return buffer, buffer.sample(global_steps=3, partition_id=Tags.partition, batch_size=4)[0]


HALF = {"prompt: TimeoutError: ": 2, "sibling: A: a": 7, "x": 1, "y": 1}


@pytest.mark.parametrize("partition", ["train", "val"])
@pytest.mark.parametrize(
    ("dropped", "share", "said"),
    [
        (1, 0.25, None),
        (2, 0.25, "2 of 4 prompts were dropped, more than skpo.max_dropped_share=0.25 allows"),
        (1, 0.0, "1 of 4 prompts were dropped, more than skpo.max_dropped_share=0 allows"),
        (4, 0.99, "4 prompts were dropped"),
    ],
)
def test_more_dropped_prompts_than_the_share_stop_the_run(
    monkeypatch, dropped: int, share: float, said: str | None, partition: str
) -> None:
    from recipe.skpo.trainer.timeouts import BatchError

    tags = Tags(monkeypatch, partition)
    for number in range(4):
        tags.prompt(f"v{number}", *(("failure", 0) if number < dropped else ("finished", 2)))
    if said is None:
        assert len(sample(HALF, share)[1]) == 6
        return
    with pytest.raises(BatchError) as error:
        sample(HALF, share)
    message = str(error.value)
    assert said in message and ("validation" if partition == "val" else "training") in message
    assert "causes: 7 x sibling: A: a; " in message and "step 3" in message and "y" not in message.split("causes")[1]


def test_other_errors_of_the_replay_buffer_are_its_own(monkeypatch) -> None:
    import transfer_queue

    def fails() -> None:
        raise RuntimeError("TransferQueue died")

    Tags(monkeypatch)
    monkeypatch.setattr(transfer_queue, "kv_list", fails)
    with pytest.raises(RuntimeError, match=r"^TransferQueue died$"):
        sample()


def test_prompts_of_a_worker_that_died_stop_the_run(monkeypatch) -> None:
    from recipe.skpo.trainer.timeouts import BatchError

    tags = Tags(monkeypatch)
    for number in range(4):
        tags.prompt(f"v{number}", "running")
    with pytest.raises(BatchError) as error:
        sample(RuntimeError("the actor died"), patience=10.0)
    assert tags.polls in (12, 13)
    message = str(error.value)
    assert "no prompt has ended for 10 s" in message and "4 still run" in message and "the actor died" in message


def test_a_slow_batch_in_which_prompts_still_end_is_waited_for(monkeypatch) -> None:
    """The patience is for one prompt, not for the batch, and begins again with the next batch."""
    tags = Tags(monkeypatch)
    for number in range(4):
        tags.prompt(f"v{number}", "running", 1)
    tags.at_poll = {8 * (number + 1): {f"v{number}": "finished"} for number in range(4)}
    buffer, rows = sample(patience=10.0)
    assert len(rows) == 4 and tags.polls == 32
    tags.idle = 100
    tags.at_poll = {33: {"v0": "running"}, 37: {"v0": "finished"}}
    assert len(sample(buffer=buffer)[1]) == 4


# ---------------------------------------------------------------- weights to vLLM


ADAPTER = """
import asyncio, json, sys, threading, time
from concurrent.futures import Future
from types import SimpleNamespace
import torch, zmq
import recipe.skpo.cpu.verl_plugin
import recipe.skpo.trainer.weight_sync_registration
from verl.workers.rollout.base import get_rollout_class
from recipe.skpo.trainer import timeouts, weight_sync

adapter = get_rollout_class("vllm", "async")
assert adapter is weight_sync.ServerAdapterWithTimeout
weight_sync._LOST_S = 0.5

class Answer:  # stands for a Ray object that may never come
    def __init__(self):
        self.future_ = Future()

    def future(self):
        return self.future_

    def __await__(self):
        return asyncio.wrap_future(self.future_).__await__()

class Server:  # stands for the Ray handle of a vLLM server whose receiver never answers
    def __init__(self, outcome):
        self.collective_rpc = self.wake_up = self.sleep = SimpleNamespace(remote=self.call)
        self.outcome = outcome

    def call(self, *args, **kwargs):
        answer = Answer()
        if self.outcome == "fails":
            answer.future_.set_exception(ValueError("no such weight"))
        if self.outcome == "dies later":
            error = type("EngineDeadError", (Exception,), {})("see stack trace (above)")
            threading.Timer(0.3, answer.future_.set_exception, [error]).start()
        if self.outcome == "has a time-out":
            answer.future_.set_exception(TimeoutError("its own"))
        if self.outcome == "is gone":
            answer.future_.set_result(None)
        return answer

def make(outcome):
    made = adapter.__new__(adapter)
    made.config = SimpleNamespace(
        custom={"weight_sync_timeout_s": 2.0},
        checkpoint_engine=SimpleNamespace(update_weights_bucket_megabytes=1),
        free_cache_engine=True,
    )
    made.server_handle, made._has_server, made.use_shm = Server(outcome), True, True
    return made

async def sync(outcome, peer=False, rank_has_server=True):
    made = make(outcome)
    made._has_server = rank_has_server
    made.zmq_handle = f"ipc://{sys.argv[1]}/weights.sock"
    # A receiver that takes the first message and answers nothing; without one, nothing can even be sent.
    other = zmq.Context()
    silent = other.socket(zmq.REP)
    if peer:
        silent.connect(made.zmq_handle)
    context = zmq.Context.instance()
    before, started = (dict(context.sockopts), context._socket_class), time.monotonic()
    try:
        await made.update_weights(iter([("w", torch.ones(2))]))
    except timeouts.WeightSyncError as error:
        message = str(error)
    assert (context.sockopts, context._socket_class) == before, "other sockets of the process wait as they did"
    other.destroy(linger=0)
    return message, time.monotonic() - started

async def calls():
    return await asyncio.gather(*(call(*case) for case in CALLS))

async def call(outcome, method, *args):
    try:
        await getattr(make(outcome), method)(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

CASES = [
    ("fails",), ("fails", True), ("dies later", True), ("is gone", True),
    ("hangs", True), ("hangs",), ("fails", True, False),
]
CALLS = [("hangs", "resume", ["weights"]), ("hangs", "release"), ("is gone", "release"), ("has a time-out", "release")]
print(json.dumps([[asyncio.run(sync(*case)) for case in CASES], asyncio.run(calls())]))
"""


def test_weights_that_nobody_acknowledges_stop_the_run(tmp_path: Path, preloaded) -> None:
    """In a process of its own, because importing vLLM changes the process."""
    variables = {"VERL_PLATFORM": "cpu", "VLLM_TARGET_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = preloaded.run(ADAPTER, str(tmp_path), variables={**os.environ, **variables})
    assert done.returncode == 0, done.stderr[-3000:]
    late = "vLLM did not acknowledge weights within skpo.weight_sync_timeout_s=2 s; "
    failed = "vLLM failed while it received weights: "
    reasons = [
        (f"{failed}ValueError: no such weight", False),
        (f"{failed}ValueError: no such weight", False),
        (f"{failed}a vLLM engine died", False),
        ("vLLM reports that it has received the weights, but its acknowledgement was lost", False),
        (f"{late}it has not reported a failure, so it hangs or is slower than that", True),
        (f"{late}it has not reported a failure, so it hangs or is slower than that", True),
        (f"{late}this rank does not talk to the server itself, see the log of the vLLM process", True),
    ]
    syncs, calls = json.loads(done.stdout.splitlines()[-1])
    for (message, seconds), (reason, waited) in zip(syncs, reasons, strict=True):
        assert message == reason
        assert seconds >= 2 if waited else seconds < 2, "what is known at once is not waited for"
    assert not list(tmp_path.iterdir()), "the socket is gone"
    assert calls == [
        "WeightSyncError: vLLM did not answer wake_up within skpo.weight_sync_timeout_s=2 s",
        "WeightSyncError: vLLM did not answer sleep within skpo.weight_sync_timeout_s=2 s",
        None,
        "TimeoutError: its own",
    ]


# ---------------------------------------------------------------- the soak's own tools


def test_injected_faults_have_the_rate_that_is_asked_for() -> None:
    from tests.e2e import injected

    draws = 20_000
    found = Counter(injected.fault(injected.SERVER, "slow", str(number)) for number in range(draws))
    for kind in injected.SERVER:
        rate = injected.RATE / injected.PER_PROMPT if kind == "slow" else injected.RATE
        assert found[kind] == pytest.approx(rate * draws, rel=0.35), kind
    assert injected.fault(injected.SERVER, "slow", "7") == injected.fault(injected.SERVER, "slow", "7")


def test_the_soak_measures_a_slope_after_the_warm_up() -> None:
    spec = importlib.util.spec_from_file_location("soak", REWARDS.parents[2] / "scripts/soak.py")
    assert spec is not None and spec.loader is not None
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    steps = range(200)
    readings = [
        {"step": step, "programs": {"a": 1000 + (0.5 * step if step > soak.WARM_UP else -40 * step), "b": 7.0}}
        for step in steps
    ]
    ending = [{"step": 199, "programs": {"b": 1.0}}] * 20
    slopes = soak.memory_slopes([*readings, *ending])
    assert slopes == pytest.approx({"all": 50.0, "a": 50.0, "b": 0.0}, abs=1e-9)
    assert soak.memory_slopes(readings[:10]) == {"all": 0.0}
