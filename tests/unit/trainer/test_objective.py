"""The estimator and the policy loss inside verl's own: its dispatch, entropy bonus, KL loss and importance weights."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden.batches import Case, FlatPolicy, actor_config, gradient_of_updates, make_case
from tests.support.reference import reference_group_relative, reference_single_stream

seeds = st.integers(0, 2**32)


@settings(max_examples=15)
@given(seed=seeds)
def test_verls_dispatch_calls_the_estimator(seed: int) -> None:
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    import recipe.skpo.trainer.objective  # noqa: F401  registers it

    rng = np.random.default_rng(seed)
    rows, tokens, prompts = 12, 5, ["v03", "v1", "pad", "v2"]
    uids = rng.choice(prompts, rows)
    upstream = rng.random(rows) < 0.4
    mask = (np.arange(tokens) < rng.integers(0, tokens + 1, rows)[:, None]).astype(int)
    scores = np.where(np.arange(tokens) == tokens - 1, rng.choice([-1.0, 0.25, 1.0], rows)[:, None], 0.0)
    baselines = np.where(upstream, rng.uniform(-1, 1, rows), np.nan)
    data = DataProto.from_dict(
        tensors={
            "token_level_rewards": torch.from_numpy(scores).float(),
            "response_mask": torch.from_numpy(mask),
            "reward_baselines": torch.from_numpy(baselines).float(),
        },
        non_tensors={"uid": uids.astype(object)},
    )
    found = compute_advantage(data, adv_estimator="skpo", config=None).batch  # type: ignore[arg-type]

    rewards, valid = scores.sum(1).tolist(), mask.any(1)
    up = reference_single_stream(rewards, np.nan_to_num(baselines).tolist(), (valid & upstream).tolist())
    down = reference_group_relative(rewards, [prompts.index(uid) for uid in uids], (valid & ~upstream).tolist())
    expected = np.where(upstream, up, down)[:, None] * mask
    np.testing.assert_allclose(found["advantages"].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["returns"], found["advantages"])


def of_one_phase(case: Case, upstream: bool) -> Case:
    """All rows in one phase, with a loss weight of 1."""
    rows = [replace(row, upstream=upstream) for row in case.rows]
    return replace(case, rows=rows, weights=torch.ones(len(rows)))


def measured(policy: FlatPolicy) -> tuple[float, torch.Tensor]:
    """Return loss and gradient of the first update on one rank."""
    _, loss, gradient = next(gradient_of_updates(policy, [0], lambda data: [data]))
    return loss, gradient


def with_columns(policy: FlatPolicy, *names: str) -> FlatPolicy:
    """Give every token random values: log-probs for ``ref_log_prob``, positive ones for anything else."""
    rng = np.random.default_rng(len(policy.case.rows))
    for name in names:
        sign = -1 if name == "ref_log_prob" else 1
        policy.columns[name] = [(sign * rng.exponential(1.0, len(row.row.mask))).tolist() for row in policy.case.rows]
    return policy


@pytest.mark.parametrize("weights", [(), ("rollout_is_weights",)], ids=["", "rollout_is"])
@pytest.mark.parametrize(("upstream", "loss_mode"), [(True, "vanilla"), (False, "cispo")])
@settings(max_examples=15)
@given(seed=seeds)
def test_each_phase_is_verls_own_loss_of_that_surrogate(
    upstream: bool, loss_mode: str, weights: tuple[str, ...], seed: int
) -> None:
    # Vanilla has a dual clip besides; here it is out of reach.
    theirs = actor_config(loss_mode, loss_agg_mode="token-sum", clip_ratio_c=1e30)
    case = of_one_phase(make_case(seed, 1), upstream)
    found, expected = (
        measured(with_columns(FlatPolicy(case, torch.float64, config), *weights)) for config in (None, theirs)
    )
    assert found[0] == pytest.approx(expected[0], rel=1e-12, abs=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-15)


TERMS: dict[str, dict[str, Any]] = {
    "entropy": {"entropy_coeff": 0.05},
    "kl": {"use_kl_loss": True, "kl_loss_coef": 0.2},
    "kl k2": {"use_kl_loss": True, "kl_loss_coef": 0.2, "kl_loss_type": "mse"},
    "both, per sequence": {
        "entropy_coeff": 0.05,
        "use_kl_loss": True,
        "kl_loss_coef": 0.2,
        "loss_agg_mode": "seq-mean-token-mean",
    },
}


@pytest.mark.parametrize("options", TERMS.values(), ids=TERMS)
@settings(max_examples=10)
@given(seed=seeds)
def test_entropy_bonus_and_kl_loss_add_to_skpo_what_they_add_to_vanilla(options: dict[str, Any], seed: int) -> None:
    case = make_case(seed, 1)
    added = []
    for loss_mode in ("skpo", "vanilla"):
        results = []
        # The mode governs vanilla's own loss as well.
        mode = {name: value for name, value in options.items() if name == "loss_agg_mode"}
        for chosen in (mode, options):
            policy = with_columns(FlatPolicy(case, torch.float64, actor_config(loss_mode, **chosen)), "ref_log_prob")
            if "entropy_coeff" in chosen:
                policy.entropy = torch.square
            results.append(measured(policy))
        (plain, plain_gradient), (loss, gradient) = results
        added.append((loss - plain, gradient - plain_gradient))
    assert added[0][0] == pytest.approx(added[1][0], rel=1e-9, abs=1e-12)
    assert abs(added[0][0]) > 1e-6 and bool(added[0][1].any())
    torch.testing.assert_close(added[0][1], added[1][1], rtol=1e-9, atol=1e-12)


@settings(max_examples=10)
@given(seed=seeds, ranks=st.sampled_from([1, 2]))
def test_metrics_are_those_of_the_update_however_it_is_split(seed: int, ranks: int) -> None:
    from verl.utils.metric import Metric

    case = make_case(seed, ranks)
    policy = FlatPolicy(case, torch.float64)
    everything: list[dict[str, Any]] = []
    for rank in range(ranks):
        # As verl's engine: micro-batches of a rank are appended, then ranks are averaged.
        halves = [policy.data(part, ranks) for part in np.array_split(case.share(rank)[0], 2) if len(part)]
        reports = [policy.loss_and_metrics(part)[1] for part in halves]
        for other in reports[1:]:
            for name, metric in reports[0].items():
                metric.append(other[name])
        everything.append(reports[0])
    found = {name: float(Metric.aggregate_dp([own[name] for own in everything])) for name in everything[0]}

    rows = [index for rank in range(ranks) for index in case.share(rank)[0]]
    values, _ = case.reference()
    assert found["skpo/loss"] == pytest.approx(-values.get(0, 0.0), rel=1e-5, abs=1e-6)
    assert found["actor/pg_loss"] == pytest.approx(found["skpo/loss"], rel=1e-6, abs=1e-9)
    for phase, upstream in (("upstream", True), ("downstream", False)):
        tokens = sum(sum(case.rows[index].row.mask) for index in rows if case.rows[index].upstream == upstream)
        assert found[f"skpo/{phase}/tokens_sum"] * ranks == tokens
    assert {"actor/ppo_kl"} < set(found)


def test_an_update_of_padding_alone_stays_finite() -> None:
    from verl.utils import tensordict_utils

    policy = FlatPolicy(make_case(3, 1), torch.float32, actor_config(entropy_coeff=0.1))
    policy.entropy = torch.square
    data = policy.data([0, 1], 1)
    tensordict_utils.assign_non_tensor(data, batch_num_tokens=0)
    data["response_mask"] = data["response_mask"] * 0
    assert float(policy.loss(data).detach()) == 0.0


def test_the_policy_loss_says_what_it_needs() -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    import recipe.skpo.trainer.objective  # noqa: F401  registers it

    tokens = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="set method=skpo"):
        get_policy_loss_fn("skpo")(tokens, tokens, tokens, tokens.bool(), "token-mean", actor_config())
