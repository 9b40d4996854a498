"""The exact objective through verl: the gradient of the real FSDP actor is that of eq. 5 and eq. 6, written naively.

A tiny Llama, verl's worker and engine built from the recipe's config, rows as the trainer stores them.  The reference
scores one row at a time with a plain Hugging Face model in float64 and knows nothing of rows, weights, micro-batches or
ranks: a wrong normaliser anywhere between the trainer and the optimizer shows here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from recipe.skpo.method.advantage import skpo_advantage
from recipe.skpo.method.loss_weights import loss_weights
from recipe.skpo.method.segments import skip_prompt
from recipe.skpo.trainer.order import minibatch_of_rows, minibatch_order
from tests.e2e.tiny import make_model
from tests.support.reference import reference_group_relative, reference_single_stream, reference_slope
from tests.support.rows import make_rows

ROOT = Path(__file__).resolve().parents[2]
GROUP, PER_UPDATE, WEIGHTS, CLIPS, TEMPERATURE, BOS = 3, 2, (0.7, 0.3), (0.2, 0.28), 0.8, 0
TOLERANCE = 1e-4

REGULARISED = {"entropy_coeff": 0.02, "use_kl_loss": True, "kl_loss_coef": 0.05}
"""Terms of verl's own loss, for the variants that name them."""


def variant(max_tokens: int = 0, packed: bool = False, rows: int = 0, **more: Any) -> dict[str, Any]:
    """Batching of the actor: dynamic up to ``max_tokens``, else micro-batches of ``rows``."""
    batching = {"use_dynamic_bsz": True, "max_token_len_per_gpu": max_tokens} if max_tokens else {}
    fixed = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": rows} if rows else {}
    groups = {"force_group_size": more.pop("group")} if "group" in more else {}
    return {"batching": batching | fixed | groups | {"use_remove_padding": packed}, "actor": more}


VARIANTS: dict[str, dict[str, Any]] = {
    "dynamic": variant(48),
    "dynamic, packed": variant(48, packed=True),
    "one micro-batch, two epochs": variant(4096, ppo_epochs=2),
    "micro-batches of 1": variant(rows=1),
    "micro-batches of 2, packed, entropy and KL": variant(rows=2, packed=True, **REGULARISED),
    "dynamic, entropy and KL": variant(48, **REGULARISED),
}

PACKED = {
    "one micro-batch": variant(4096, packed=True),
    "prompts whole": variant(90, packed=True, group=GROUP + 1),
    "prompts whole, entropy and KL": variant(90, packed=True, group=GROUP + 1, **REGULARISED),
    "a prompt above the budget": variant(30, packed=True, group=GROUP + 1),
}
"""Variants of the packed engine, where prompts are shared."""

SHARED = {"dynamic": variant(90), "dynamic, entropy and KL": variant(90, **REGULARISED)}
"""Variants of the dense engine, where prompts are shared."""


@dataclass
class Response:
    """A sequence that is trained: the tokens before it, its own, how many of them a beginning is that is not."""

    before: list[int]
    tokens: list[int]
    reward: float
    untrained: int = 0
    old: tuple[float, ...] = ()
    reference: tuple[float, ...] = ()
    importance: tuple[float, ...] = ()

    @property
    def positions(self) -> range:
        """Trained positions of the response."""
        return range(self.untrained, len(self.tokens))


@dataclass
class Visit:
    """One prompt's rollout; a sibling that failed is None."""

    baseline: float
    segment: Response
    responses: list[Response | None]


def make_visits(seed: int) -> list[Visit]:
    """Three prompts: one with a missing sibling, one whose responses begin with the segment (skip=continual)."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(4, 260, int(rng.integers(low, high))).tolist()

    visits = []
    for number in range(3):
        problem, segment = [BOS, *tokens(3, 9)], tokens(2, 7)
        rewards = [[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, 1.0, -1.0]][number]
        responses: list[Response | None] = []
        for reward in rewards:
            if number == 1:
                responses.append(Response(problem, segment + tokens(1, 10), reward, len(segment)))
            else:
                responses.append(Response(skip_prompt(segment, problem, BOS), tokens(1, 10), reward))
        if number == 0:
            responses[1] = None
        came_back = [response.reward for response in responses if response is not None]
        mean = sum(came_back) / len(came_back)
        visits.append(Visit(float(rng.uniform(-1, 1)), Response(problem, segment, mean), responses))
    return visits


Score = Callable[[Response], tuple[list[torch.Tensor], list[torch.Tensor]]]


def scorer(model: Any) -> Score:
    """Score a response's tokens at the rollout's temperature by a forward over this row alone: log pi, entropy."""

    def score(response: Response) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        logits = model(torch.tensor([response.before + response.tokens])).logits[0] / TEMPERATURE
        every = torch.log_softmax(logits[len(response.before) - 1 : -1], -1)
        entropies = -(every.exp() * every).sum(-1)
        return [every[index, token] for index, token in enumerate(response.tokens)], list(entropies)

    return score


def with_other_policies(visits: list[Visit], score: Score, seed: int) -> None:
    """Give every response log-probs of two policies nearby, and importance weights.

    Ratios to the old policy lie on both sides of both clip bounds.
    """
    rng = np.random.default_rng(seed)
    for visit in visits:
        for response in (visit.segment, *visit.responses):
            if response is not None:
                with torch.no_grad():
                    now = [float(value) for value in score(response)[0]]
                response.old, response.reference = (
                    tuple(value + float(rng.normal(0, 0.3)) for value in now) for _ in range(2)
                )
                response.importance = tuple(float(np.float32(rng.uniform(0.5, 2.0))) for _ in now)


def naive_objective(visits: list[Visit], everything: list[Visit], score: Score, options: dict[str, Any]) -> Any:
    """Compute equations 5 and 6 over the prompts of one update; advantages over the whole batch, from the rewards.

    Each token's summand is multiplied by its importance weight.  Entropy bonus and KL loss are means over all trained
    tokens of the update.
    """
    clipped = (1 - CLIPS[0], 1 + CLIPS[1])
    upstream = reference_single_stream(
        [visit.segment.reward for visit in everything], [visit.baseline for visit in everything], [True] * 3
    )
    total = torch.zeros((), dtype=torch.float64)
    entropies: list[torch.Tensor] = []
    divergences: list[torch.Tensor] = []

    def scored(response: Response) -> list[torch.Tensor]:
        now, entropy = score(response)
        for index in response.positions:
            entropies.append(entropy[index])
            log_ratio = response.reference[index] - now[index]
            divergences.append(log_ratio.exp() - log_ratio - 1)
        return now

    for visit in visits:
        advantage = upstream[everything.index(visit)]
        now, up = scored(visit.segment), torch.zeros((), dtype=torch.float64)
        for index in visit.segment.positions:
            ratio = torch.exp(now[index] - visit.segment.old[index])
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(*clipped) * advantage)
            up = up + visit.segment.importance[index] * surrogate
        up = up / len(visit.segment.tokens)

        siblings = [response for response in visit.responses if response is not None]
        rewards = [response.reward for response in siblings]
        advantages = reference_group_relative(rewards, [0] * len(rewards), [True] * len(rewards))
        tokens, down = 0, torch.zeros((), dtype=torch.float64)
        for response, gain in zip(siblings, advantages, strict=True):
            now = scored(response)
            for index in response.positions:
                weight = min(max(math.exp(float(now[index].detach()) - response.old[index]), clipped[0]), clipped[1])
                down = down + response.importance[index] * weight * gain * now[index]
                tokens += 1
        total = total + (WEIGHTS[0] * up + WEIGHTS[1] * down / tokens) / len(visits)
    if options.get("use_kl_loss"):
        total = total - options["kl_loss_coef"] * torch.stack(divergences).mean()
    return total + options.get("entropy_coeff", 0.0) * torch.stack(entropies).mean()


def rows_of(visits: list[Visit], ranks: int, whole: bool) -> list[dict[str, Any]]:
    """The trainer's side: rows with advantages and loss weights, padded to whole updates, in verl's order."""
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

    flat: list[tuple[int, bool, Response | None, float, bool]] = []
    for number, visit in enumerate(visits):
        flat.append((number, True, visit.segment, visit.baseline, False))
        flat += [(number, False, response, 0.0, False) for response in visit.responses]
    padding = -len(flat) % (PER_UPDATE * (GROUP + 1))
    flat += [(len(visits), True, visits[0].segment, 0.9, True)] * padding
    # verl hands them over in any order.
    flat = [flat[int(index)] for index in np.random.default_rng(5).permutation(len(flat))]
    lost = Response(visits[0].segment.before, [1], 0.0, 1, old=(-1.0,), reference=(-1.0,), importance=(1.0,))
    size = PER_UPDATE * (GROUP + 1)
    order = minibatch_order(
        [number for number, *_ in flat],
        [len(response.before + response.tokens) if response else 2 for _, _, response, _, _ in flat],
        size,
        ranks,
        lambda lengths, parts: get_seqlen_balanced_partitions(lengths, k_partitions=parts, equal_size=True),
        whole,
    )
    flat = [flat[index] for index in order]
    responses = [response or lost for _, _, response, _, _ in flat]
    rows = make_rows(
        upstream=[row[1] for row in flat],
        prompts=[row[0] for row in flat],
        lengths=[len(response.positions) for response in responses],
        rewards=[response.reward for response in responses],
        padding=[row[4] for row in flat],
    )
    baselines = torch.tensor([row[3] for row in flat])
    advantage = skpo_advantage(rows.rewards, baselines, rows.phase, rows.prompts, rows.valid_mask)
    weights = loss_weights(rows, minibatch_of_rows(len(flat), size, ranks), *WEIGHTS)
    stored = []
    for index, response in enumerate(responses):
        # As in verl's padding, no token is trained.
        trained = [int(place in response.positions and not flat[index][4]) for place in range(len(response.tokens))]
        mask = torch.tensor(trained)
        stored.append(
            {
                "prompt": torch.tensor(response.before),
                "response": torch.tensor(response.tokens),
                "mask": mask,
                "old_log_probs": torch.tensor(response.old, dtype=torch.float32),
                "ref_log_prob": torch.tensor(response.reference, dtype=torch.float32),
                "rollout_is_weights": torch.tensor(response.importance, dtype=torch.float32) * mask,
                "advantages": advantage[index] * mask,
                "phase": rows.phase[index],
                "weight": weights[index],
            }
        )
    return stored


def assert_slopes(model: Any, rows: list[dict[str, Any]], found: list[torch.Tensor]) -> None:
    """The slopes that the actor returned, one place before each token of a response, are those of separate rows."""
    for row, slopes in zip(rows, found, strict=True):
        ids = torch.cat([row["prompt"], row["response"]])
        with torch.no_grad():
            logits = (model(ids[None]).logits[0] / TEMPERATURE).tolist()
        places = range(len(row["prompt"]) - 1, len(ids) - 1)
        expected = [reference_slope(logits[place], int(ids[place + 1])) for place in places]
        assert slopes[places.start : places.stop].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    ("ranks", "device", "variants"),
    [
        pytest.param(1, "cuda", VARIANTS, marks=pytest.mark.nightly),  # as in test_golden_batch.py, without an engine
        (2, "cuda", VARIANTS),
        (2, "packed", PACKED),
        pytest.param(1, "slopes", {"dynamic": VARIANTS["dynamic"]}, marks=pytest.mark.nightly),
        pytest.param(1, "shared_prefix", SHARED, marks=pytest.mark.nightly),
    ],
)
def test_the_gradient_of_verls_actor_is_that_of_the_paper(
    ranks: int, device: str, variants: dict[str, Any], tmp_path: Path, compose_config: Callable[..., Any], preloaded
) -> None:
    from transformers import LlamaForCausalLM

    path = make_model(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float64)
    score = scorer(model)
    visits = make_visits(seed=1)
    with_other_policies(visits, score, seed=2)
    config = compose_config(
        "platform=cpu",
        f"actor_rollout_ref.model.path={path}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PER_UPDATE}",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
        "actor_rollout_ref.rollout.dtype=float32",
        f"actor_rollout_ref.rollout.temperature={TEMPERATURE}",
        f"skpo.group_size={GROUP}",
        f"actor_rollout_ref.actor.clip_ratio_low={CLIPS[0]}",
        f"actor_rollout_ref.actor.clip_ratio_high={CLIPS[1]}",
        "actor_rollout_ref.model.external_lib=[recipe.skpo.engine.fsdp,recipe.skpo.engine.dense]",
        f"actor_rollout_ref.model.enable_gradient_checkpointing={device == 'packed'}",
    )
    OmegaConf.save(config, tmp_path / "config.yaml")
    rows = rows_of(visits, ranks, whole=device == "packed")
    job = {"rows": rows, "rows_per_update": PER_UPDATE * (GROUP + 1), "variants": variants, "device": device}
    torch.save(job, tmp_path / "rows.pt")
    preloaded.run_ranks("tests.golden.actor", *((str(tmp_path), str(rank), str(ranks)) for rank in range(ranks)))

    if device != "cuda":
        found = [row for rank in range(ranks) for row in torch.load(tmp_path / f"slopes-{rank}.pt")]
        assert_slopes(model, rows, found)
    updates = torch.load(tmp_path / "updates.pt")
    assert list(updates) == list(variants)
    for name, records in updates.items():
        options = variants[name]["actor"]
        assert len(records) == 2 * options.get("ppo_epochs", 1)
        moved = max(float((records[0][0][key] - tensor).abs().max()) for key, tensor in records[1][0].items())
        assert moved > 1e-3, "the second update has to see another policy than the first"
        for number, (weights, gradients) in enumerate(records):
            model.load_state_dict(weights, strict=False)  # the tied output layer is not listed twice
            model.zero_grad()
            first = number % 2 * PER_UPDATE
            (-naive_objective(visits[first : first + PER_UPDATE], visits, score, options)).backward()
            expected = {key: parameter.grad for key, parameter in model.named_parameters()}
            assert set(expected) == set(gradients)
            worst = 0.0
            for key, wanted in expected.items():
                assert wanted is not None
                worst = max(worst, float((gradients[key] - wanted).norm() / wanted.norm()))
            print(
                f"{ranks} ranks, {device}, {name}, update {number}: largest relative error of a parameter {worst:.1e}"
            )
            assert worst < TOLERANCE
