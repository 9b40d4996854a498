"""The rollout hook on verl's real worker class: from q to G + 1 stored rows.

What is real and what stands for a process is told in ``rollout_setup``; what goes wrong is in ``test_faults``.
"""

import asyncio
import logging
from collections.abc import Callable
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recipe.skpo.method.rows import PHASE_FIELD, RECORD, REWARD_TAG, TRAINED_TAG, Rows, TokenCounts, read_record
from tests.support.queue import Queue
from tests.support.rollout_setup import (
    ANSWER,
    QUESTION,
    SEED,
    SPLIT,
    STEP,
    G,
    make_batch,
    make_prompt,
)

# ---------------------------------------------------------------- what is stored


async def test_a_prompt_ends_in_g_plus_one_rows_of_one_schema(two_phases) -> None:
    setup = two_phases()
    await setup.roll_out(make_prompt("v7"))
    assert sorted(setup.store.rows) == [f"v7_{session}_0" for session in range(G + 1)]
    assert {setup.store.partitions[key] for key in [*setup.store.rows, "v7"]} == {"train"}
    events = setup.store.events
    assert (events[0], events[-1], len(events)) == (("running", "v7"), ("finished", "v7"), 2 + G + 1)
    (names,) = {frozenset(row) for row in setup.store.rows.values()}  # TransferQueue's partitions need one schema
    expected = {"prompts", "responses", "input_ids", "position_ids", "response_mask", "loss_mask", "rm_scores"}
    expected |= {"rollout_log_probs", "uid", "id", "skpo_phase", "extra_fields", "raw_prompt", "reward_model"}
    assert expected <= names
    assert "agent_name" not in names, "it is verl's own choice of an agent loop, nothing to store"
    kinds = {
        tuple((name, value.dtype) for name, value in sorted(row.items()) if isinstance(value, torch.Tensor))
        for row in setup.store.rows.values()
    }
    assert len(kinds) == 1
    for key, row in setup.store.rows.items():
        tag, tokens = setup.store.tags[key], len(row["responses"])
        assert (row["id"], row["uid"]) == ("id-v7", "v7")
        assert len(row["rollout_log_probs"]) == len(row["response_mask"]) == len(row["rm_scores"]) == tokens
        assert row["input_ids"].tolist() == row["prompts"].tolist() + row["responses"].tolist()
        assert (tag["seq_len"], tag["global_steps"]) == (len(row["input_ids"]), STEP)


async def test_rows_and_tags_are_those_that_verl_would_store_one_by_one(two_phases, monkeypatch) -> None:
    setup = two_phases(downstream=lambda number: [] if number == 1 else setup.tokens(f"#### {'5' * (number + 1)}"))
    outputs: list[Any] = []
    roll_out = setup.worker._roll_out

    async def keep(*args: Any) -> list[Any]:
        outputs.extend(await roll_out(*args))
        return outputs

    monkeypatch.setattr(setup.worker, "_roll_out", keep)
    await setup.roll_out(make_prompt("v7"))
    rows, tags = dict(setup.store.rows), dict(setup.store.tags)
    setup.store.rows.clear()
    setup.store.tags.clear()
    for output, fields in outputs:
        await setup.worker._agent_loop_postprocess(output, False, **fields)
    outcome = {REWARD_TAG, TRAINED_TAG}
    assert {key: {name: tag[name] for name in tag.keys() - outcome} for key, tag in tags.items()} == setup.store.tags
    assert len(tags) == G + 1 and tags["v7_0_0"]["max_global_steps"] == 7
    for key, expected in setup.store.rows.items():
        assert rows[key].keys() == expected.keys()
        for name, value in expected.items():
            ours = rows[key][name]
            same = torch.equal(ours, value) if isinstance(value, torch.Tensor) else ours == value
            assert same and getattr(ours, "dtype", None) == getattr(value, "dtype", None), (key, name)


@pytest.mark.parametrize("skip", ["concat", "continual"])
async def test_the_trainer_reads_from_tags_what_the_columns_hold(two_phases, skip: str) -> None:
    answers = ["", f"#### {ANSWER}", "#### 9", "#### 10"]
    setup = two_phases(downstream=lambda number: setup.tokens(answers[number]) if number else [], skip=skip)
    await setup.roll_out(make_prompt("v7"))
    keys = sorted(setup.store.rows)
    columns = setup.store.kv_batch_get(keys, "train", ["id", "extra_fields", PHASE_FIELD])
    rows = Rows.read(columns, keys, [setup.store.tags[key] for key in keys])
    masks = [setup.store.rows[key]["response_mask"] for key in keys]
    assert [mask.tolist() for mask in rows.tokens["response_mask"].split()] == [mask.tolist() for mask in masks]
    assert rows.lengths.tolist() == [int(mask.sum()) for mask in masks]
    assert rows.rewards.equal(torch.stack([setup.store.rows[key]["rm_scores"].sum() for key in keys]))
    assert float(rows.rewards[0]) == pytest.approx(-1 / 3)


async def test_the_segment_row_is_the_segment_under_q_with_the_mean_reward_of_the_siblings(two_phases) -> None:
    setup = two_phases(
        upstream=lambda number: ([10, 11, 12, 13, 14, 15, 16, 17], [-0.1] * 8),
        downstream=lambda number: setup.tokens(f"#### {ANSWER if number == 2 else 9}"),
    )
    await setup.roll_out(make_prompt("v7"))
    segment, siblings = setup.store.row("v7", 0), setup.store.siblings("v7")
    assert segment["prompts"].tolist() == setup.problem_ids()
    assert segment["responses"].tolist() == [10, 11, 12, 13, 14, 15]
    assert segment["rollout_log_probs"].tolist() == pytest.approx([-0.1] * 6)
    assert segment["response_mask"].tolist() == segment["loss_mask"].tolist() == [1] * 6
    assert [float(row["rm_scores"].sum()) for row in siblings] == [-1, -1, 1, -1]
    assert segment["rm_scores"].tolist() == [0, 0, 0, 0, 0, -0.5]
    assert int(segment["skpo_phase"]) == 0
    assert [int(row["skpo_phase"]) for row in siblings] == [1] * G
    assert setup.reward.calls == G, "the truncated segment is never scored itself"


async def test_a_response_row_keeps_what_the_server_wrote(two_phases) -> None:
    answers = [([20 + n, 30, 2], [-0.1 - n, -0.2, -0.3]) for n in range(G)]
    setup = two_phases(downstream=lambda number: answers[number])
    await setup.roll_out(make_prompt("v7"))
    for row, (token_ids, logprobs) in zip(setup.store.siblings("v7"), answers, strict=True):
        assert row["responses"].tolist() == token_ids
        assert row["rollout_log_probs"].tolist() == pytest.approx(logprobs)
        assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [1, 1, 1]


# ---------------------------------------------------------------- phase one


async def test_longer_prompts_go_first_where_requests_queue(two_phases) -> None:
    setup = two_phases()
    await setup.roll_out(make_prompt("v1", skpo_expected_length=90), make_prompt("v2", skpo_expected_length=700))
    asked = {(request.request_id, request.priority) for request in setup.llm.requests}
    assert asked == {("v1-up", -90), ("v1-down", -90), ("v2-up", -700), ("v2-down", -700)}
    assert all("priority" not in request.params for request in setup.llm.requests), "vLLM's sampler knows none"


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
@pytest.mark.parametrize(
    ("written", "kept"),
    [(1, 1), (4, 2), (5, 2), (SPLIT, SPLIT // 2)],
    ids=["one token", "even", "odd", "end token right at the split position"],
)
async def test_a_candidate_that_ends_early_is_cut_in_half(two_phases, end: str, written: int, kept: int) -> None:
    setup = two_phases(upstream=lambda number: setup.tokens("abcdefgh"[: written - 1], end=end))
    await setup.roll_out(make_prompt("v7"))
    text = setup.tokens("abcdefgh"[: written - 1], end=end)
    assert setup.store.row("v7", 0)["responses"].tolist() == text[:kept]
    assert {tuple(request.prompt_ids) for request in setup.downstream()} == {(*text[:kept], *setup.problem_ids())}
    record = setup.store.record("v7")
    assert record.early_share == 1.0
    for candidate in record.candidates:
        assert (candidate.token_ids.tolist(), candidate.kept) == (text, kept)
        assert candidate.token_ids.dtype == np.int32, "verl's dump of a row keeps the array"


async def test_a_candidate_that_fills_the_split_position_is_kept_whole(two_phases) -> None:
    setup = two_phases(upstream=lambda number: setup.tokens("abcdef", end=""))
    await setup.roll_out(make_prompt("v7"))
    assert [request.params["max_tokens"] for request in setup.upstream()] == [SPLIT] * G
    assert setup.store.row("v7", 0)["responses"].tolist() == setup.tokens("abcdef", end="")
    assert setup.store.record("v7").early_share == 0.0


# ---------------------------------------------------------------- the skip prompt


@pytest.mark.parametrize(("model", "bos"), [("model_folder", 0), ("bos_model_folder", 1), ("chatml_model_folder", 0)])
async def test_siblings_are_asked_under_segment_then_problem(two_phases, request, model: str, bos: int) -> None:
    """A BOS that the template adds is at the front, once; one that is the mark of a turn stays with its turn."""
    setup = two_phases(model=request.getfixturevalue(model))
    await setup.roll_out(make_prompt("v7"))
    problem, segment = setup.problem_ids(), setup.store.row("v7", 0)
    if model != "model_folder":
        assert problem[0] == setup.tokenizer.bos_token_id and problem.count(problem[0]) == 2 - bos
    assert segment["prompts"].tolist() == problem
    expected = problem[:bos] + segment["responses"].tolist() + problem[bos:]
    assert [row["prompts"].tolist() for row in setup.store.siblings("v7")] == [expected] * G
    assert [request.prompt_ids for request in setup.routed("v7-down")] == [expected] * G


@pytest.mark.parametrize(
    ("skip", "context", "taken"),
    [("concat", None, 0), ("unconditional", None, 0), ("continual", None, SPLIT), ("concat", 60, SPLIT)]
    + [("continual", 60, SPLIT)],
)
async def test_a_response_gets_what_budget_and_context_leave(two_phases, skip: str, context, taken: int) -> None:
    options = [] if context is None else [f"actor_rollout_ref.rollout.max_model_len={context}"]
    setup = two_phases(None, lambda number: [40] * 100, *options, skip=skip)
    await setup.roll_out(make_prompt("v7"))
    left = 32 - taken if context is None else context - SPLIT - len(setup.problem_ids())
    assert 0 < left <= 32 - taken
    assert [request.params["max_tokens"] for request in setup.routed("v7-down")] == [left] * G
    assert {int(row["response_mask"].sum()) for row in setup.store.siblings("v7")} == {left}


# ---------------------------------------------------------------- skip: what the siblings continue


async def test_unconditional_siblings_are_plain_responses_to_the_problem(two_phases) -> None:
    setup = two_phases(skip="unconditional")
    await setup.roll_out(make_prompt("v7"))
    problem = setup.problem_ids()
    assert [request.prompt_ids for request in setup.routed("v7-down")] == [problem] * G
    for number, row in enumerate(setup.store.siblings("v7")):
        written = setup.tokens(f"#### {ANSWER if number % 2 else 6}")
        assert (row["prompts"].tolist(), row["responses"].tolist()) == (problem, written)
        assert row["response_mask"].tolist() == [1] * len(written)
        assert row["rollout_log_probs"].tolist() == [-0.5] * len(written)
    assert setup.store.row("v7", 0)["responses"].tolist() == setup.tokens("abcdef", end="")
    assert float(setup.store.row("v7", 0)["rm_scores"].sum()) == 0.0


async def test_continual_siblings_continue_the_segment_which_is_masked(two_phases) -> None:
    setup = two_phases(
        upstream=lambda number: (setup.tokens("abcdef", end=""), [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]),
        downstream=lambda number: ([40 + number, 50, 2], [-1.0, -2.0, -3.0]),
        skip="continual",
    )
    await setup.roll_out(make_prompt("v7"))
    problem, segment = setup.problem_ids(), setup.tokens("abcdef", end="")
    assert [request.prompt_ids for request in setup.routed("v7-down")] == [problem + segment] * G
    for number, row in enumerate(setup.store.siblings("v7")):
        assert row["prompts"].tolist() == problem
        assert row["responses"].tolist() == [*segment, 40 + number, 50, 2]
        assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [0] * SPLIT + [1] * 3
        assert row["rollout_log_probs"].tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -1, -2, -3])
        assert row["input_ids"].tolist() == problem + row["responses"].tolist()
        assert row["rm_scores"].tolist() == [0.0] * (SPLIT + 2) + [-1.0]
        record = read_record(row["extra_fields"][RECORD])
        assert (record.generated, record.prefilled) == (3, len(problem) + SPLIT)
    assert len({frozenset(row) for row in setup.store.rows.values()}) == 1
    assert setup.store.row("v7", 0)["response_mask"].tolist() == [1] * SPLIT


@pytest.mark.parametrize("skip", ["concat", "chat", "continual", "unconditional"])
async def test_the_copied_share_counts_responses_that_begin_with_the_whole_segment(two_phases, skip: str) -> None:
    answers = ["abcdefgh", "abcdef", "abcde", "babcdef"]
    setup = two_phases(
        upstream=lambda number: (setup.tokens("abcdef", end=""), [-0.1] * SPLIT),
        downstream=lambda number: setup.tokens(answers[number], end=""),
        skip=skip,
    )
    await setup.roll_out(make_prompt("v7"))
    assert read_record(setup.store.row("v7", 0)["extra_fields"][RECORD]).copied_share == 2 / G


@pytest.mark.parametrize(("skip", "reward"), [("continual", 1.0), ("concat", -1.0), ("unconditional", -1.0)])
async def test_only_a_continued_segment_is_scored_with_its_response(two_phases, skip: str, reward: float) -> None:
    setup = two_phases(
        upstream=lambda number: setup.tokens(f"#### {ANSWER}", end=""),
        downstream=lambda number: setup.tokens("."),
        skip=skip,
    )
    await setup.roll_out(make_prompt("v7"))
    assert [float(row["rm_scores"].sum()) for row in setup.store.rows.values()] == [reward] * (G + 1)


@pytest.mark.parametrize("skip", ["concat", "chat", "continual", "unconditional"])
async def test_a_failed_sibling_has_the_prompt_of_its_group_whatever_it_continues(two_phases, skip: str) -> None:
    setup = two_phases(downstream=lambda number: [] if number == 0 else setup.tokens("#### 5"), skip=skip)
    await setup.roll_out(make_prompt("v7"))
    missing, other = setup.store.siblings("v7")[:2]
    assert missing["prompts"].tolist() == other["prompts"].tolist()
    assert missing["response_mask"].tolist() == [0]
    assert float(setup.store.row("v7", 0)["rm_scores"].sum()) == 1.0


async def test_chat_quotes_the_segment_inside_the_one_user_turn(two_phases) -> None:
    setup = two_phases(skip="chat")
    await setup.roll_out(make_prompt("v7"))
    expected = setup.problem_ids(f"Beginning of a solution:\nabcdef\n\n{QUESTION}")
    assert setup.tokenizer.decode(expected).count("<|im_start|>user") == 1
    assert [request.prompt_ids for request in setup.routed("v7-down")] == [expected] * G
    for row in setup.store.siblings("v7"):
        assert row["prompts"].tolist() == expected
        assert row["response_mask"].tolist() == [1] * len(row["responses"])
    assert setup.store.row("v7", 0)["prompts"].tolist() == setup.problem_ids(), "the segment itself is under q"


async def test_the_quote_of_chat_is_a_setting_and_leaves_other_turns_and_braces_alone(two_phases) -> None:
    bos = 1  # a special token, which a text does not quote
    setup = two_phases(
        upstream=lambda number: [bos, *setup.tokens("a{0}b", end="")],
        skip="chat",
        chat_quote="{problem} First: {segment}!",
    )
    question = "What is {x}?"
    turns = [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": question}]
    await setup.roll_out(make_prompt("v7", raw_prompt=turns))
    quoted = [turns[0], {"role": "user", "content": "What is {x}? First: a{0}b!"}]
    expected = setup.tokenizer.apply_chat_template(quoted, add_generation_prompt=True)["input_ids"]
    assert [request.prompt_ids for request in setup.routed("v7-down")] == [expected] * G


@pytest.mark.parametrize("skip", ["chat", "continual", "unconditional"])
async def test_every_skip_mode_has_exactly_one_bos_at_the_front(two_phases, bos_model_folder, skip: str) -> None:
    setup = two_phases(model=bos_model_folder, skip=skip)
    await setup.roll_out(make_prompt("v7"))
    for request in setup.llm.requests:
        bos = setup.tokenizer.bos_token_id
        assert (request.prompt_ids[0], request.prompt_ids.count(bos)) == (bos, 1)


# ---------------------------------------------------------------- upstream reward: own


async def test_own_reward_is_that_of_the_chosen_candidate_completed_under_the_problem(two_phases) -> None:
    setup = two_phases(
        upstream=lambda number: ([40 + number] * SPLIT, [-[2.0, 0.1, 0.9, 1.0][number]] * SPLIT),
        downstream=lambda number: setup.tokens("#### 9"),
        own=lambda request: setup.tokens(f"#### {ANSWER}"),
        upstream_reward="own",
    )
    await setup.roll_out(make_prompt("v7"))
    requests = [request for request in setup.routed("v7-up") if request.prompt_ids != setup.problem_ids()]
    assert [request.prompt_ids for request in requests] == [setup.problem_ids() + [42] * SPLIT]
    assert requests[0].params["max_tokens"] == 32 - SPLIT
    segment = setup.store.row("v7", 0)
    assert segment["responses"].tolist() == [42] * SPLIT, "the completion is not trained on"
    assert segment["rm_scores"].tolist() == [0.0] * (SPLIT - 1) + [1.0]
    assert [float(row["rm_scores"].sum()) for row in setup.store.siblings("v7")] == [-1.0] * G
    assert len(setup.store.rows) == G + 1 and setup.reward.calls == G + 1
    completion = len(setup.tokens(f"#### {ANSWER}"))
    assert setup.store.record("v7").generated == G * SPLIT + completion


@pytest.mark.parametrize(
    ("written", "end", "position", "kept"),
    [(f"#### {ANSWER}", "</s>", 10, 3), (f"{'x' * 26}#### {ANSWER}", "", 32, 32)],
    ids=["ended", "used the whole budget"],
)
async def test_a_candidate_that_is_whole_needs_no_completion(two_phases, written, end, position, kept) -> None:
    """It is scored for all that it wrote; of one that ended, the segment is a half."""
    setup = two_phases(
        lambda number: setup.tokens(written, end=end), lambda number: setup.tokens("#### 9"), upstream_reward="own"
    )
    await setup.roll_out(make_prompt("v7", skpo_split_position=position))
    assert len(setup.llm.requests) == 2 * G
    segment = setup.store.row("v7", 0)
    assert segment["responses"].tolist() == setup.tokens(written, end=end)[:kept]
    assert float(segment["rm_scores"].sum()) == 1.0
    assert setup.store.record("v7").generated == G * len(setup.tokens(written, end=end))


async def test_own_reward_does_not_depend_on_which_siblings_fail(two_phases) -> None:
    setup = two_phases(
        downstream=lambda number: [] if number else setup.tokens("#### 9"),
        own=lambda request: setup.tokens(f"#### {ANSWER}"),
        upstream_reward="own",
    )
    await setup.roll_out(make_prompt("v7"))
    assert float(setup.store.row("v7", 0)["rm_scores"].sum()) == 1.0


@pytest.mark.parametrize("fails", ["request", "reward"])
async def test_without_the_own_reward_the_prompt_is_dropped(two_phases, caplog, fails: str) -> None:
    def own(request):
        return RuntimeError("the server died") if fails == "request" else setup.tokens(f"#### {ANSWER}")

    setup = two_phases(own=own, upstream_reward="own")
    # Siblings answer at once, the completion's reward is requested among theirs; all calls but one succeed.
    if fails == "reward":
        compute = setup.worker._compute_score

        async def compute_score(outputs, kwargs):
            if outputs[0].prompt_ids == setup.problem_ids():
                raise RuntimeError("the reward function raised")
            await compute(outputs, kwargs=kwargs)

        setup.worker._compute_score = compute_score
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.status("v7") == ["running", "failure"] and not setup.store.rows
    assert "own response failed" in caplog.text


# ---------------------------------------------------------------- fewer candidates, other selections, other cuts


@pytest.mark.parametrize("count", [1, 2])
async def test_fewer_candidates_than_siblings(two_phases, count: int) -> None:
    setup = two_phases(upstream=lambda number: [40 + number] * (SPLIT - number), candidates=count)
    await setup.roll_out(make_prompt("v7"))
    assert len(setup.routed("v7-up")) == count and len(setup.routed("v7-down")) == G
    assert sorted(setup.store.rows) == [f"v7_{session}_0" for session in range(G + 1)]
    record = setup.store.record("v7")
    assert len(record.candidates) == count
    assert record.generated == sum(SPLIT - number for number in range(count))
    assert record.prefilled == count * len(setup.problem_ids())
    seeds = [request.params["seed"] for request in setup.llm.requests]
    assert len(set(seeds)) == len(seeds) == count + G


@pytest.mark.parametrize(
    ("selection", "step", "chosen"),
    [("median", 1, 2), ("extreme", 1, 1), ("extreme", 2, 0), ("first", 2, 0), ("random", 1, None)],
)
async def test_the_selection_decides_which_candidate_is_kept(two_phases, selection: str, step: int, chosen) -> None:
    deviations = [2.0, 0.1, 0.9, 1.0]  # middle values 0.9 and 1.0: the earlier of them is the median
    setup = two_phases(
        upstream=lambda number: ([40 + number] * SPLIT, [-deviations[number]] * SPLIT), selection=selection
    )
    if chosen is None:
        chosen = int(np.random.default_rng(SEED).integers(G))
    await setup.roll_out(make_prompt("v7", skpo_step=step))
    assert setup.store.row("v7", 0)["responses"].tolist() == [40 + chosen] * SPLIT
    record = setup.store.record("v7")
    assert (record.chosen, record.deviation) == (chosen, pytest.approx(deviations[chosen]))
    assert [candidate.deviation for candidate in record.candidates] == pytest.approx(deviations)


@pytest.mark.parametrize(
    ("boundaries", "kept"),
    [(["."], "ab."), ([".", "d"], "ab.d"), (["b.d"], "ab.d"), (["?"], "ab.def"), ([ord("b")], "ab.def")],
    ids=str,
)
async def test_a_segment_ends_at_its_last_boundary(two_phases, boundaries: list, kept: str) -> None:
    setup = two_phases(
        upstream=lambda number: (setup.tokens("ab.defgh", end=""), [-float(n + 1) for n in range(8)]),
        split="boundary_token",
        boundaries=boundaries,
    )
    await setup.roll_out(make_prompt("v7"))
    segment, row = setup.tokens(kept, end=""), setup.store.row("v7", 0)
    assert row["responses"].tolist() == segment
    assert setup.store.record("v7").deviation == pytest.approx(fmean(range(1, len(segment) + 1)))
    assert setup.store.record("v7").boundary_share == (0 if kept == "ab.def" else 1)
    assert {tuple(request.prompt_ids) for request in setup.routed("v7-down")} == {(*segment, *setup.problem_ids())}
    assert [request.params["max_tokens"] for request in setup.routed("v7-up")] == [SPLIT] * G


async def test_a_boundary_may_be_a_token_id(two_phases) -> None:
    token = two_phases().tokens("c", end="")[0]
    setup = two_phases(split="boundary_token", boundaries=[token])
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.row("v7", 0)["responses"].tolist() == setup.tokens("abc", end="")


async def test_the_half_of_an_early_finisher_is_cut_at_its_boundary_too(two_phases) -> None:
    setup = two_phases(
        upstream=lambda number: setup.tokens("a.bcde."), split="boundary_token", boundaries=["."], selection="first"
    )
    await setup.roll_out(make_prompt("v7", skpo_split_position=20))
    assert setup.store.row("v7", 0)["responses"].tolist() == setup.tokens("a.", end="")


# ---------------------------------------------------------------- counted tokens


async def test_every_request_is_counted_also_what_is_thrown_away(two_phases) -> None:
    def upstream(number: int):
        return RuntimeError("the server died") if number == 0 else ([40] * 5, [] if number == 1 else [-0.5] * 5)

    setup = two_phases(upstream=upstream, downstream=lambda number: setup.tokens("#### 5"))
    await setup.roll_out(make_prompt("v7"))
    answered = [request for request in setup.llm.requests if request.number != 0]
    assert len(answered) == 2 * G - 1
    counts = setup.worker.take_tokens()
    assert counts == {
        "generated": 5 * (G - 1) + G * len(setup.tokens("#### 5")),
        "prefilled": sum(len(request.prompt_ids) for request in answered),
        "cached": 16 * len(answered),
    }


async def test_tokens_of_a_dropped_prompt_are_counted(two_phases) -> None:
    setup = two_phases(downstream=lambda number: [])
    await setup.roll_out(make_prompt("v7"))
    assert setup.store.status("v7") == ["running", "failure"]
    assert setup.worker.take_tokens()["generated"] == G * SPLIT


async def test_taking_the_counts_starts_them_anew(two_phases) -> None:
    setup = two_phases()
    await setup.roll_out(make_prompt("v7"))
    first = setup.worker.take_tokens()
    assert all(first.values())
    assert setup.worker.take_tokens() == dict.fromkeys(first, 0)
    await setup.roll_out(make_prompt("v8"))
    assert setup.worker.take_tokens() == first


async def test_records_and_counts_agree_where_nothing_fails(two_phases) -> None:
    setup = two_phases(own=lambda request: setup.tokens("#### 5"), upstream_reward="own", skip="continual")
    await setup.roll_out(make_prompt("v7"))
    records = [read_record(row["extra_fields"][RECORD]) for row in setup.store.rows.values()]
    assert setup.worker.take_tokens()["generated"] == sum(record.generated for record in records)


# ---------------------------------------------------------------- the baselines' worker


async def test_a_baseline_samples_a_group_under_the_problem_with_a_seed_per_session(baseline) -> None:
    setup = baseline()
    await setup.roll_out(make_prompt("v7"), make_prompt("v8", skpo_seed=5000))
    assert sorted(setup.store.rows) == [f"{uid}_{session}_0" for uid in ("v7", "v8") for session in range(G)]
    assert [setup.store.status(uid) for uid in ("v7", "v8")] == [["running", "finished"]] * 2
    assert {tuple(request.prompt_ids) for request in setup.llm.requests} == {tuple(setup.problem_ids())}
    seeds = sorted(request.params["seed"] for request in setup.llm.requests)
    assert seeds == [*range(SEED, SEED + G), *range(5000, 5000 + G)]
    for session in range(G):
        own = [request for request in setup.llm.requests if request.params["seed"] == SEED + session]
        row = setup.store.row("v7", session)
        assert len(own) == 1 and len(row["responses"]) <= 32
        assert (row["id"], int(row["skpo_step"])) == ("id-v7", STEP)
    responses = [tuple(setup.store.row("v7", session)["responses"].tolist()) for session in range(G)]
    assert len(set(responses)) == G


@pytest.mark.parametrize("worker", ["baseline", "make_worker"])
async def test_the_same_seed_gives_the_same_rows(request, queue: Queue, worker: str) -> None:
    runs = []
    for seed in (1, 1, 2):
        queue.rows.clear()
        await request.getfixturevalue(worker)().roll_out(make_prompt("v7", skpo_seed=seed))
        runs.append({key: row["input_ids"].tolist() for key, row in queue.rows.items()})
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(("worker", "count"), [("baseline", G), ("make_worker", 2 * G)])
async def test_seeds_can_be_left_to_the_server(request, worker: str, count: int) -> None:
    setup = request.getfixturevalue(worker)(seed_requests=False)
    await setup.roll_out(make_prompt())
    assert len(setup.llm.requests) == count and not any("seed" in request.params for request in setup.llm.requests)


async def test_a_baselines_validation_is_not_seeded_by_us(baseline) -> None:
    setup = baseline()
    await setup.roll_out(make_prompt("val"), validate=True)
    assert [request.params.get("seed") for request in setup.llm.requests] == [None]
    assert setup.llm.requests[0].params["temperature"] == 0


async def test_a_baselines_tokens_are_counted(baseline) -> None:
    setup = baseline()
    await setup.roll_out(make_prompt("v7"))
    written = sum(len(row["responses"]) for row in setup.store.rows.values())
    assert setup.worker.take_tokens() == {
        "generated": written,
        "prefilled": G * len(setup.problem_ids()),
        "cached": 16 * G,
    }


# ---------------------------------------------------------------- requests


async def test_each_phase_has_one_routing_id_and_every_request_a_seed_of_its_own(two_phases) -> None:
    setup = two_phases()
    await setup.roll_out(make_prompt("v7", "2+2?"), make_prompt("v8", "3+3?", skpo_seed=5000))
    routes = [
        {request.request_id for request in phase(question)}
        for phase in (setup.upstream, setup.downstream)
        for question in ("2+2?", "3+3?")
    ]
    assert [len(route) for route in routes] == [1, 1, 1, 1], "one replica per phase: its prefix cache is shared"
    assert len(set.union(*routes)) == 4
    seeds = sorted(request.params["seed"] for request in setup.llm.requests)
    assert seeds == [*range(SEED, SEED + 2 * G), *range(5000, 5000 + 2 * G)]


async def test_full_determinism_names_every_request_apart(two_phases) -> None:
    setup = two_phases(None, None, "actor_rollout_ref.rollout.full_determinism=true")
    await setup.roll_out(make_prompt())
    assert len({request.request_id for request in setup.llm.requests}) == 2 * G


@pytest.mark.parametrize("validate", [False, True])
async def test_full_determinism_names_the_responses_of_verls_agent_loop_apart(baseline, validate) -> None:
    """Requests are routed by name there; verl's constant one would send them all to one server."""
    names = []
    for uids in (("v7", "v8"), ("v7", "v8") if not validate else ("r1", "r2")):  # validation's uids are random
        setup = baseline(None, "actor_rollout_ref.rollout.full_determinism=true")
        prompts = [make_prompt(uid, id=f"row {row}") for row, uid in enumerate(uids)]
        await setup.roll_out(*prompts, validate=validate)
        names.append(sorted(request.request_id for request in setup.llm.requests))
    assert len(set(names[0])) == (2 if validate else 2 * G)
    assert names[0] == names[1]


async def test_the_completion_of_a_candidate_has_a_name_and_a_seed_of_its_own_too(two_phases) -> None:
    override = "actor_rollout_ref.rollout.full_determinism=true"
    setup = two_phases(None, None, override, own=lambda request: setup.tokens("#### 5"), upstream_reward="own")
    await setup.roll_out(make_prompt("v7"))
    assert len({request.request_id for request in setup.llm.requests}) == 2 * G + 1
    assert sorted(request.params["seed"] for request in setup.llm.requests) == list(range(SEED, SEED + 2 * G + 1))


async def test_every_request_owns_its_sampling_parameters(two_phases) -> None:
    setup = two_phases()
    await setup.roll_out(make_prompt("v7", "2+2?"), make_prompt("v8", "3+3?"))
    requests = setup.llm.requests
    assert len({id(request.given) for request in requests}) == len(requests) == 4 * G
    rollout = setup.worker.config.actor_rollout_ref.rollout
    for request in requests:  # the server has emptied all the dictionaries before
        assert request.params["temperature"] == rollout.temperature
        assert (request.params["top_p"], request.params["top_k"]) == (rollout.top_p, rollout.top_k)
        assert request.params["logprobs"] is True
        assert set(request.params) >= {"max_tokens", "repetition_penalty"}


async def test_the_records_count_tokens_and_cache_hits(two_phases) -> None:
    setup = two_phases(upstream=lambda number: [10] * (3 + number), downstream=lambda number: [20] * (number + 1))
    await setup.roll_out(make_prompt("v7"))
    record = setup.store.record("v7")
    problem = len(setup.problem_ids())
    assert (record.generated, record.prefilled) == (3 + 4 + 5 + 6, problem * G)
    assert record.cached == 16 * G
    assert record.split_position == SPLIT
    assert record.early_share == 0.75
    assert record.seconds >= 0 and record.downstream_seconds >= 0
    for number, row in enumerate(setup.store.siblings("v7")):
        expected = TokenCounts(number + 1, prefilled=len(row["prompts"]), cached=16)
        assert read_record(row["extra_fields"][RECORD]) == expected


# ---------------------------------------------------------------- prompts side by side, validation


async def test_a_prompt_does_not_wait_for_another_ones_first_phase(make_worker) -> None:
    slow, quick = "slow question", "quick question"
    release = asyncio.Event()

    async def script(request):
        if request.prompt_ids == setup.problem_ids(slow):
            await release.wait()
        return setup.tokens(f"#### {ANSWER}")

    setup = make_worker(script)
    running = asyncio.create_task(setup.roll_out(make_prompt("v1", slow), make_prompt("v2", quick)))
    async with asyncio.timeout(10):
        while setup.store.status("v2") != ["running", "finished"]:
            await asyncio.sleep(0.01)
    assert len(setup.upstream(slow)) == G and not setup.downstream(slow)
    assert setup.store.status("v1") == ["running"]
    release.set()
    await running
    assert setup.store.status("v1") == ["running", "finished"]
    assert len(setup.store.rows) == 2 * (G + 1)


async def test_a_reward_is_asked_for_while_siblings_still_generate(two_phases) -> None:
    release = asyncio.Event()

    async def downstream(number: int):
        if number:
            await release.wait()
        return setup.tokens(f"#### {ANSWER}")

    setup = two_phases(downstream=downstream)
    running = asyncio.create_task(setup.roll_out(make_prompt("v7")))
    async with asyncio.timeout(10):
        while setup.reward.calls == 0:
            await asyncio.sleep(0.01)
    assert setup.reward.calls == 1
    release.set()
    await running
    assert setup.reward.calls == G


async def test_validation_is_verls_own_path(make_worker, queue: Queue, caplog) -> None:
    """The same requests and the same rows as verl's stock worker: plain q, no split, no skip, no seed of ours."""
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

    override = "actor_rollout_ref.rollout.val_kwargs.n=2"
    caplog.set_level(logging.ERROR)
    ours = make_worker(None, override)
    await ours.roll_out(make_prompt("val"), validate=True)
    rows, events = dict(queue.rows), sorted(queue.events)
    queue.rows.clear()
    queue.events.clear()
    stock = make_worker(None, override, worker_class=AgentLoopWorkerTQ.__ray_actor_class__)
    await stock.roll_out(make_prompt("val"), validate=True)

    assert sorted(rows) == sorted(queue.rows) == ["val_0_0", "val_1_0"]
    assert events == sorted(queue.events)
    for key, row in rows.items():
        assert row.keys() == queue.rows[key].keys()
        assert row["input_ids"].tolist() == queue.rows[key]["input_ids"].tolist()
        assert row["prompts"].tolist() == ours.problem_ids()
        assert row["rm_scores"].tolist() == queue.rows[key]["rm_scores"].tolist()
        assert not any(name.startswith("skpo") for name in [*row, *row["extra_fields"]])
    assert [request.params for request in ours.llm.requests] == [request.params for request in stock.llm.requests]
    assert ours.llm.requests[0].params["temperature"] == 0, "validation is greedy by default"
    assert set(queue.partitions.values()) == {"val"}
    assert not caplog.records


async def test_the_mean_reward_is_the_mean_of_what_is_stored(make_worker, queue: Queue) -> None:
    setup = make_worker()
    await setup.roll_out(*(make_prompt(f"v{n}", f"{n} + 1?", skpo_split_position=n + 1) for n in range(6)))
    for n in range(6):
        scores = [float(row["rm_scores"].sum()) for row in queue.siblings(f"v{n}")]
        assert float(queue.row(f"v{n}", 0)["rm_scores"].sum()) == pytest.approx(fmean(scores))
        assert 1 <= len(queue.row(f"v{n}", 0)["responses"]) <= n + 1


# ---------------------------------------------------------------- construction


def test_both_end_tokens_of_the_generation_config_are_known(make_worker) -> None:
    setup = make_worker()
    ends = [setup.tokenizer.eos_token_id, setup.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert setup.worker.stop_ids == set(ends)


@pytest.fixture
def make_manager(fake_llm) -> Callable[..., Any]:
    """Make the manager that a config names, without workers."""
    from verl.utils.import_utils import load_class_from_fqn

    def make(config: Any) -> Any:
        name = config.actor_rollout_ref.rollout.agent.agent_loop_manager_class
        manager_class = load_class_from_fqn(name, "AgentLoopManager")
        return manager_class(config=config, llm_client=fake_llm(), teacher_client=None, reward_loop_worker_handles=[])

    return make


def test_the_manager_starts_our_workers(make_config, make_manager) -> None:
    from recipe.skpo.rollout.two_phases import SkpoAgentLoopWorker
    from recipe.skpo.rollout.worker import RolloutWorker

    for method, worker in (("skpo", SkpoAgentLoopWorker), ("grpo", RolloutWorker)):
        manager = make_manager(make_config(f"method={method}"))
        assert manager.agent_loop_workers_class.__ray_actor_class__ is worker


@pytest.mark.parametrize("name", ["SkpoAgentLoopManager", "MeteredManager"])
def test_configs_of_version_0_1_find_their_manager(name: str) -> None:
    from verl.utils.import_utils import load_class_from_fqn

    from recipe.skpo.rollout import manager

    found = load_class_from_fqn(f"recipe.skpo.rollout.{name}", "AgentLoopManager")
    assert found is (manager.RolloutManager if name == "MeteredManager" else manager.SkpoAgentLoopManager)


@pytest.mark.parametrize("own_code", [False, True])
@pytest.mark.parametrize("validate", [False, True])
async def test_columns_that_nobody_reads_stay_in_the_trainer(
    make_worker, make_manager, monkeypatch, validate: bool, own_code: bool
) -> None:
    """Sent, each of them would break the response or replace a part of it."""
    import ray

    setup = make_worker(lambda request: setup.tokens("#### 5"))
    columns = {"output": "#### 6", "responses": [[1, 2]], "rm_scores": 9.0, "trace": True, "session_id": 3, "day": None}
    batch = make_batch([make_prompt(f"v{n}", **columns, prompt=[]) for n in range(2)], validate)
    config = setup.worker.config
    config.actor_rollout_ref.rollout.agent.agent_loop_config_path = "loops.yaml" if own_code else None
    manager = make_manager(config)
    sent: list[Any] = []
    manager.agent_loop_workers = [SimpleNamespace(generate_sequences=SimpleNamespace(remote=sent.append))]
    monkeypatch.setattr(ray, "get", lambda values: None)
    manager.generate_sequences(batch)
    (chunk,) = sent
    assert (columns.keys() <= set(chunk.keys())) is own_code
    if not own_code:
        assert set(chunk.keys()) == set(batch.keys()) - columns.keys() - {"prompt"}
        await setup.worker.generate_sequences(chunk)
        await asyncio.wait_for(asyncio.gather(*setup.worker.background_tasks), 20)
        assert setup.store.status("v0") == setup.store.status("v1") == ["running", "finished"]


@pytest.mark.parametrize(
    ("taken", "counts", "total"),
    [
        (
            "take_tokens",
            [{"generated": 1, "prefilled": 20, "cached": 300}, {"generated": 4, "prefilled": 50, "cached": 600}],
            {"generated": 5, "prefilled": 70, "cached": 900},
        ),
        ("take_failures", [{"sibling: A": 1}, {"sibling: A": 2, "prompt: B": 1}], {"sibling: A": 3, "prompt: B": 1}),
    ],
)
def test_the_manager_adds_up_what_its_workers_counted(
    make_config, make_manager, monkeypatch, taken, counts, total
) -> None:
    import ray

    manager = make_manager(make_config())
    # No Ray here: a call returns its result, and ray.get returns that.
    calls = [SimpleNamespace(remote=lambda count=count: count) for count in counts]
    manager.agent_loop_workers = [SimpleNamespace(**{taken: call}) for call in calls]
    waits = []
    monkeypatch.setattr(ray, "get", lambda values, timeout: waits.append(timeout) or list(values))
    assert getattr(manager, taken)() == total
    assert 0 < waits[0] < 600, "not forever"
