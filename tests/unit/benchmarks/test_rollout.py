"""The recipe's workers on a simulated cluster: what is compared is comparable, and counted right."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks import rollout
from benchmarks.comparison import tables
from benchmarks.rollout import LongTailedModel, Workload, simulate
from benchmarks.simulated_server import ServerConstants
from benchmarks.workers import Call, Variant, phase_costs, variants

WORKLOAD = Workload(
    prompts=6, group_size=4, response_length=300, median_length=80.0, prompt_sigma=0.8, response_sigma=0.8
)
"""Few prompts with long tails: some responses are cut at the budget, others have a few tokens."""


@cache
def costs() -> dict[str, dict[str, Any]]:
    """Variant to its record, of one seed on two replicas that have a slot for every request."""
    return {record["variant"]: record for record in simulate(WORKLOAD, 2, [1], ServerConstants(), variants(4))}


def tokens(record: dict[str, Any], phase: str, name: str = "generated") -> int:
    return record["phases"][phase][name]


def test_the_variants_are_those_promised() -> None:
    methods = ["grpo", "skpo", "skpo", "skpo", "arrival", "barrier", "two-batch"]
    candidates = [8, 8, 3, 1, 8, 8, 8]
    assert [(variant.method, variant.candidates) for variant in variants(8)] == [*zip(methods, candidates, strict=True)]
    assert [variant.candidates for variant in variants(2) if variant.method == "skpo"] == [2, 1]


def test_grpo_generates_what_the_model_writes_within_the_budget() -> None:
    # The same numbers from the model alone, with the seeds that the trainer's state draws.
    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.trainer.state import SkpoState

    model, state, expected = LongTailedModel(WORKLOAD, 1), SkpoState(SkpoSettings(group_size=4), 300), 0
    for number in range(WORKLOAD.prompts):
        seed = state.next_visit(str(number), 1).seed
        expected += sum(min(300, model.length(number, seed + session, skip=False)) for session in range(4))
    assert tokens(costs()["GRPO"], "responses") == expected
    assert tokens(costs()["GRPO"], "responses", "prefilled") == 4 * sum(map(len, model.problems))


def test_a_response_to_a_skip_prompt_is_shorter_by_the_factor_of_the_workload() -> None:
    model = LongTailedModel(WORKLOAD, 1)
    for seed in range(20):
        plain = model.length(0, seed, skip=False)
        assert model.length(0, seed, skip=True) == pytest.approx(0.9 * plain, abs=1)
    model.know(0, model.problems[0])
    under_q = model.write(model.problems[0], {"seed": 5, "max_tokens": 10**6})
    under_s_q = model.write([3, *model.problems[0]], {"seed": 5, "max_tokens": 10**6})
    assert (len(under_q), len(under_s_q)) == (model.length(0, 5, skip=False), model.length(0, 5, skip=True))


def test_every_form_of_skpo_writes_the_same_tokens() -> None:
    skpo = costs()["SKPO, candidates=4"]
    for other in ("SKPO in order of arrival", "SKPO with a barrier", "two-batch SKPO"):
        for phase in ("upstream", "downstream"):
            for name in ("requests", "generated", "prefilled"):
                assert tokens(costs()[other], phase, name) == tokens(skpo, phase, name)


def test_fewer_candidates_cost_fewer_upstream_tokens_alone() -> None:
    full, three, one = (costs()[f"SKPO, candidates={count}"] for count in (4, 3, 1))
    assert [record["phases"]["upstream"]["requests"] for record in (full, three, one)] == [24, 18, 6]
    assert tokens(full, "upstream") > tokens(three, "upstream") > tokens(one, "upstream")
    assert all(record["phases"]["downstream"]["requests"] == 24 for record in (full, three, one))


def test_where_requests_queue_two_batches_are_slower_and_the_order_matters() -> None:
    workload = replace(WORKLOAD, prompts=8, response_sigma=0.5)
    methods = ("skpo", "arrival", "two-batch")
    compared = [variant for variant in variants(4) if variant.method in methods and variant.candidates == 4]
    records = simulate(workload, 1, [1, 2, 3], ServerConstants(slots=16), compared)
    skpo, arrival, two_batch = pd.DataFrame(records).groupby("variant", sort=False)["seconds"].sum()
    assert skpo < 0.95 * arrival and skpo < 0.9 * two_batch and arrival < two_batch
    assert "two-batch SKPO" in tables([*records, *simulate(workload, 1, [1, 2, 3], ServerConstants(), variants(4)[:1])])


def test_with_a_barrier_no_downstream_request_starts_before_the_last_candidate_ends() -> None:
    found = costs()
    for name in ("SKPO with a barrier", "two-batch SKPO"):
        phases = found[name]["phases"]
        both = phases["upstream"]["seconds"] + phases["downstream"]["seconds"]
        assert both <= found[name]["seconds"] + 1e-9
    pipelined = found["SKPO, candidates=4"]["phases"]
    assert sum(phase["seconds"] for phase in pipelined.values()) > found["SKPO, candidates=4"]["seconds"]


def test_sticky_routing_finds_the_siblings_prefill_in_the_cache() -> None:
    share = 0.9 * 3 / 4
    found = {name: record["phases"]["downstream"] for name, record in costs().items() if name != "GRPO"}
    for name, phase in found.items():
        hit = phase["cached"] / phase["prefilled"]
        if name == "two-batch SKPO":
            assert hit < share, "its siblings are spread over the replicas"
        else:
            assert hit >= share, name


def test_phases_are_distinguished_by_their_requests() -> None:
    calls = [
        Call("downstream", 2.0, 9.0, 30, 50, 40),
        Call("upstream", 0.0, 3.0, 10, 20, 0),
        Call("upstream", 1.0, 2.0, 5, 20, 16),
    ]
    found = phase_costs(calls)
    assert list(found) == ["upstream", "downstream"]
    assert vars(found["upstream"]) == {"seconds": 3.0, "requests": 2, "generated": 15, "prefilled": 40, "cached": 16}
    assert found["downstream"].seconds == 7.0


def test_a_prompt_that_fails_spoils_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> list[int]:
        raise RuntimeError("no model")

    monkeypatch.setattr(LongTailedModel, "write", fail)
    with pytest.raises(RuntimeError, match="SKPO: 0 rows of 30 were stored"):
        simulate(WORKLOAD, 1, [1], ServerConstants(), [Variant("SKPO", "skpo", 4)])


def test_the_command_prints_and_stores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rollout.json"
    arguments = ["--shapes", "2x1x9", "--seeds", "1", "--group", "2", "--response-length", "60", "--out", str(out)]
    assert rollout.main(arguments) == 0
    assert "| 2 prompts, 1 x 9 slots | SKPO, candidates=2 |" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["settings"]["2x1x9"]["workload"]["response_length"] == 60
    assert len(content["runs"]) == 6
