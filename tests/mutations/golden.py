"""Changes of the method, one place each, that the fast golden tests of the module must notice (docs/method.md)."""

from tests.mutations import Mutation

TESTS = {
    "advantage": "advantage",
    "loss": "batch",
    "minibatch": "batch",
    "tracker": "trackers",
    "state": "trackers",
    "segments": "segments",
    "curriculum": "segments",
    "trainer": "step",
    "base_trainer": "step",
}
"""Per module, the golden test file that is to catch its mutations."""


def several(module: str, name: str, *changes: tuple[str, str]) -> Mutation:
    """A mutation in several places."""
    return Mutation(module, name, changes, (f"golden/test_golden_{TESTS[module]}.py",))


def one(module: str, name: str, old: str, new: str) -> Mutation:
    """A mutation in one place."""
    return several(module, name, (old, new))


DOWN_WEIGHT = "weight = _ratio(log_prob, old_log_prob).clamp(1 - clip_low, 1 + clip_high).detach()"
DOWN_SUM = "return -(weight * log_prob).sum(-1) * advantage"
UP_MEAN = "return -(surrogate * weight).sum(-1) / weight.sum(-1).clamp(min=1)"
UP_CLIP = "ratio.clamp(1 - clip_low, 1 + clip_high) * gain"
ESTIMATE = 'advantages = get_adv_estimator_fn("skpo")(rewards, baselines, phase, prompts, valid)'
READ_BASELINES = """        for row in segments:
            baselines[row] = self.state.baseline(ids[row])
"""

STORE_SEGMENTS = """        if self.settings.tracker.drift == "logratio":
"""

MUTATIONS = (
    # SPEC section 2
    one(
        "segments", "first split position rounded down", "math.ceil(low * mean_length)", "math.floor(low * mean_length)"
    ),
    one(
        "segments", "last split position rounded up", "math.floor(high * mean_length)", "math.ceil(high * mean_length)"
    ),
    one("segments", "upper end of the split range left out", "last, endpoint=True", "max(first + 1, last)"),
    one("segments", "fixed split begins with the upper end", "[0 if step % 2 else 1]", "[1 if step % 2 else 0]"),
    one("segments", "early finisher kept whole", "max(1, len(token_ids) // 2)", "len(token_ids)"),
    one("segments", "half of an early finisher rounded up", "len(token_ids) // 2)", "(len(token_ids) + 1) // 2)"),
    one(
        "segments",
        "an end exactly at t_q is not early",
        "len(token_ids) <= split_position",
        "len(token_ids) < split_position",
    ),
    one("segments", "deviation is a sum", "-math.fsum(kept) / keep", "-math.fsum(kept)"),
    one("segments", "deviation has the wrong sign", "-math.fsum(kept) / keep", "math.fsum(kept) / keep"),
    one("segments", "median tie goes to the last", "(values == middle[1]))[0])", "(values == middle[1]))[-1])"),
    one(
        "segments",
        "lower middle value in place of the median",
        "(values.size - 1) // 2, values.size // 2",
        "(values.size - 1) // 2, (values.size - 1) // 2",
    ),
    one(
        "segments",
        "extreme takes the largest first",
        "values.argmin() if step % 2 else values.argmax()",
        "values.argmax() if step % 2 else values.argmin()",
    ),
    one("segments", "boundary token is cut off", "(index + 1 for index in reversed", "(index for index in reversed"),
    one("segments", "problem before the segment", "return segment + problem", "return problem + segment"),
    one("segments", "BOS stays in the middle as well", "*segment, *problem[1:]]", "*segment, *problem]"),
    # SPEC section 4
    one("curriculum", "weight without the root", "np.sqrt(inside * (1.0 - inside))", "(inside * (1.0 - inside))"),
    one("curriculum", "weight without epsilon", "(1.0 - inside)) + epsilon", "(1.0 - inside))"),
    one("curriculum", "drawn with replacement", "replace=False", "replace=True"),
    one("curriculum", "drawn uniformly", ", p=weights / weights.sum()", ""),
    one(
        "tracker",
        "no upper bound of rho",
        "min(self.rho_max, max(self.rho_min, 2.0 ** (-drift / self.half_life)))",
        "max(self.rho_min, 2.0 ** (-drift / self.half_life))",
    ),
    one(
        "tracker",
        "no lower bound of rho",
        "max(self.rho_min, 2.0 ** (-drift / self.half_life))",
        "2.0 ** (-drift / self.half_life)",
    ),
    one("tracker", "half-life is a decay constant", "2.0 ** (-drift", "2.718281828459045 ** (-drift"),
    one("tracker", "eta without the count's 1", "/ (kept + 1.0)", "/ max(kept, 1.0)"),
    one("tracker", "eta from the count before it decays", "/ (kept + 1.0)", "/ (self._counts[row] + 1.0)"),
    one("tracker", "count does not decay", "self._counts[row] = kept + 1.0", "self._counts[row] += 1.0"),
    one("tracker", "kl_steps is not divided by the mean", "return kl * self.steps / self.total_kl if", "return kl if"),
    one("tracker", "estimates of KL below 0 count", "max(0.0, kl)", "kl"),
    one(
        "state",
        "baseline in [0, 1]",
        "return 2.0 * self.values.value(prompt_id) - 1.0",
        "return self.values.value(prompt_id)",
    ),
    one("state", "reward not mapped to [0, 1]", "(reward + 1.0) / 2.0, drift", "reward, drift"),
    one("state", "first baseline is not 0", "KLAdaptiveTracker(0.5, **constants", "KLAdaptiveTracker(0.0, **constants"),
    one("state", "visit is not noted", "        self.clock.visit(prompt_id)\n", ""),
    one(
        "state",
        "length tracker sees no drift",
        "self.lengths.update(prompt_id, mean_length, drift)",
        "self.lengths.update(prompt_id, mean_length, 0.0)",
    ),
    one(
        "state",
        "initial length not bounded by the budget",
        "min(settings.initial_length, response_budget)",
        "settings.initial_length",
    ),
    one(
        "state",
        "measured drift is ignored",
        "if log_ratio is None else log_ratio",
        "if log_ratio is None else self.clock.drift(prompt_id)",
    ),
    one(
        "advantage",
        "baseline added",
        "(rewards.double() - baselines.double())",
        "(rewards.double() + baselines.double())",
    ),
    one("advantage", "upstream not centred", "((raw - raw.mean())", "((raw)"),
    one(
        "advantage", "upstream sample deviation", "raw.std(correction=0)", "raw.std(correction=min(1, raw.numel() - 1))"
    ),
    one("advantage", "upstream not divided by the deviation", "/ (raw.std(correction=0) + EPSILON)", "/ 1.0"),
    one(
        "advantage",
        "padding in the batch statistics",
        "[mask]\n        advantage[mask] = (",
        "\n        advantage = (advantage + ",
    ),
    # SPEC section 5
    one("advantage", "downstream sample deviation", "centred**2) / size)", "centred**2) / (size - 1).clamp(min=1))"),
    one("advantage", "downstream not divided by the deviation", "centred / std.clamp(min=EPSILON)", "centred"),
    one("advantage", "downstream not centred", "(value - mean[member]) * weight", "value * weight"),
    one(
        "advantage",
        "failed siblings in the group's mean",
        "weight, value = mask.double(), rewards.double()",
        "weight, value = torch.ones_like(rewards).double(), rewards.double()",
    ),
    one("advantage", "phases swapped", "upstream = phase == UPSTREAM", "upstream = phase != UPSTREAM"),
    # SPEC section 6, losses
    one("loss", "ratio upside down", "torch.exp((log_prob - old_log_prob)", "torch.exp((old_log_prob - log_prob)"),
    one("loss", "upstream sign", UP_MEAN, UP_MEAN.replace("-(", "(")),
    one("loss", "upstream sum over tokens", UP_MEAN, "return -(surrogate * weight).sum(-1)"),
    one("loss", "upstream optimistic", "torch.minimum(ratio * gain", "torch.maximum(ratio * gain"),
    one("loss", "upstream clip bounds swapped", UP_CLIP, "ratio.clamp(1 - clip_high, 1 + clip_low) * gain"),
    one("loss", "upstream clip at the lower bound alone", UP_CLIP, "ratio.clamp(min=1 - clip_low) * gain"),
    one("loss", "upstream not clipped", f"torch.minimum(ratio * gain, {UP_CLIP})", "ratio * gain"),
    one("loss", "downstream sign", DOWN_SUM, DOWN_SUM.replace("-(", "(")),
    one("loss", "downstream mean per response", DOWN_SUM, f"{DOWN_SUM} / mask.sum(-1).clamp(min=1)"),
    one("loss", "downstream weight not detached", DOWN_WEIGHT, DOWN_WEIGHT.replace(".detach()", "")),
    one("loss", "downstream not clipped", DOWN_WEIGHT, "weight = _ratio(log_prob, old_log_prob).detach()"),
    one("loss", "downstream upper bound e_low", DOWN_WEIGHT, DOWN_WEIGHT.replace("clip_high", "clip_low")),
    one("loss", "downstream mask dropped", f"{DOWN_WEIGHT} * mask.to(log_prob.dtype)", DOWN_WEIGHT),
    one(
        "loss",
        "losses of the phases swapped",
        "upstream_loss(*arguments), downstream_loss(*arguments)",
        "downstream_loss(*arguments), upstream_loss(*arguments)",
    ),
    one("loss", "row scale dropped", "downstream_loss(*arguments)) * scale", "downstream_loss(*arguments))"),
    one("loss", "mean over the micro-batch", "loss = row_loss.sum() *", "loss = row_loss.mean() *"),
    one("loss", "dp_size dropped", 'loss = row_loss.sum() * data["dp_size"]', "loss = row_loss.sum()"),
    # SPEC section 6, rows and updates
    one("minibatch", "padding rows count", "trained = ~padding & (lengths > 0)", "trained = lengths > 0"),
    one(
        "minibatch",
        "segments without a sibling count",
        "return trained & (downstream | torch.isin(prompts, prompts[trained & downstream]))",
        "return trained",
    ),
    one(
        "minibatch",
        "mean over the prompts of the batch",
        "prompts_per_update[minibatch].to(",
        "prompts_per_update.sum().to(",
    ),
    one(
        "minibatch",
        "mean over the rows of the update",
        "torch.stack([minibatch[valid], prompts[valid]]), dim=1)",
        "torch.stack([minibatch[valid], valid.nonzero().flatten()]), dim=1)",
    ),
    one("minibatch", "group normaliser missing", " / pool_tokens[pool].clamp(min=1)", ""),
    one("minibatch", "group normaliser counts the segment", "(lengths * (valid & ~upstream))", "(lengths * valid)"),
    one("minibatch", "token mean divided by prompts as well", "(torch.ones_like(share) if pooled else share)", "share"),
    one("minibatch", "token mean per group", "minibatch if pooled else prompts", "prompts"),
    one("minibatch", "weights swapped", "weight_up * share, downstream)", "weight_down * share, downstream)"),
    one("minibatch", "invalid rows keep a scale", "return (scale * valid)", "return (scale * 1.0)"),
    one(
        "minibatch",
        "updates cut through prompts",
        "sorted(range(len(prompts)), key=lambda row: prompts[row])",
        "list(range(len(prompts)))",
    ),
    one(
        "minibatch",
        "number of the update forgets the ranks",
        "torch.arange(rows) % (rows // ranks)",
        "torch.arange(rows)",
    ),
    # what only a whole step shows
    several(
        "trainer",
        "baselines read after the update",
        (READ_BASELINES, ""),
        (f"        {ESTIMATE}\n", ""),
        (STORE_SEGMENTS, f"{READ_BASELINES}        {ESTIMATE}\n{STORE_SEGMENTS}"),
    ),
    one("trainer", "reward is a mean over tokens", 'flat(data["rm_scores"]))', 'flat(data["rm_scores"])) / sizes'),
    one("trainer", "log-probs for rewards", 'data["rm_scores"]', "data[log_probs[0]]"),
    one(
        "trainer",
        "mean length of trained tokens alone",
        "torch.bincount(prompts, sizes * siblings)",
        "torch.bincount(prompts, lengths * siblings)",
    ),
    one(
        "trainer",
        "failed siblings in the mean length",
        "siblings = valid & (phase == DOWNSTREAM)",
        "siblings = phase == DOWNSTREAM",
    ),
    one(
        "trainer",
        "groups by prompt in place of visit",
        '[key.rsplit("_", 2)[0] for key in batch.keys]\n        number',
        'data.get("id").tolist()\n        number',
    ),
    one(
        "trainer",
        "weights of the objectives swapped",
        "(self.settings.weight_up, self.settings.weight_down)",
        "(self.settings.weight_down, self.settings.weight_up)",
    ),
    one("trainer", "aggregation of the settings ignored", "valid, *weights, aggregation)", "valid, *weights)"),
    one("trainer", "clock does not advance", "        self.state.clock.advance(policy_kl)\n", ""),
    one("trainer", "log-ratio not used", "mean_length, measured.get(ids[row])", "mean_length"),
    one("base_trainer", "log-ratio without the absolute value", "now[index]).abs().mean()", "now[index]).mean().abs()"),
)
