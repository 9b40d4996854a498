"""Every metric that a run logs: name, unit, meaning.

Metrics below ``skpo/`` are this recipe's, the others verl's, which mix the rows of both phases.  In a name,
``{a,b}`` stands for either and ``<n>`` for any text.
"""

import re
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Metric:
    """A metric, or several of one kind.

    Attributes:
        name: its pattern.
        unit: of its value; "" for a number without one.
        meaning: in a sentence; over a step's batch if it does not say otherwise.
        only: when it is logged; "" for every SKPO run.
    """

    name: str
    unit: str
    meaning: str
    only: str = ""

    @property
    def text(self) -> str:
        """Meaning and unit."""
        return f"{self.meaning} [{self.unit}]" if self.unit else self.meaning

    def names(self) -> list[str]:
        """Return the names with each alternative of ``{a,b}`` in turn."""
        parts = re.split(r"\{([^}]*)\}", self.name)
        choices = [part.split(",") if place % 2 else [part] for place, part in enumerate(parts)]
        return ["".join(chosen) for chosen in product(*choices)]

    def describes(self, name: str) -> bool:
        """Tell whether a logged name is one of this pattern."""
        return any(
            re.fullmatch(".+".join(map(re.escape, re.split(r"<\w+>", pattern))), name) for pattern in self.names()
        )


def described(name: str) -> Metric | None:
    """Find what a logged name means, the first pattern that fits it; None if it is in no pattern."""
    return next((metric for metric in METRICS if metric.describes(name)), None)


def unit_of(name: str) -> str:
    """Return the unit of a logged name; "" without one."""
    metric = described(name)
    return "" if metric is None else metric.unit


_BOTH, _UP, _DOWN, _TRACKER = "skpo/{upstream,downstream}/", "skpo/upstream/", "skpo/downstream/", "skpo/tracker/"
_POLARITY, _ON = "skpo/polarity/", "with `polarity.enable`"
_SPREAD = "{mean,max,min}"
_IS, _BASELINES = "with `algorithm.rollout_correction`", "with another method than SKPO"
_KNOWN = "once 32 visits were to prompts seen before, with `skpo.upstream_reward=mc`"
TERMS_OF_THE_LOSS = "with that term of the loss"

METRICS = (
    # ---- both phases
    Metric(
        f"{_BOTH}reward/mean", "-1 to 1", "mean reward; upstream R_I of the segments, downstream R_II of the responses"
    ),
    Metric(f"{_BOTH}advantage/{{mean,std}}", "", "mean and population standard deviation of the rows' advantages"),
    Metric(f"{_BOTH}length/mean", "tokens", "mean trained length of a segment, of a response"),
    Metric(f"{_BOTH}loss", "", "the phase's part of the loss, weight included; mean over updates"),
    Metric(f"{_BOTH}kl", "nats per token", "how far the policy moved in the step (k3 estimate), on the phase's tokens"),
    Metric(
        f"{_BOTH}ratio_clipped_{{low,high}}_share",
        "share of tokens",
        "tokens whose ratio was below 1 - `clip_ratio_low`, above 1 + `clip_ratio_high`",
    ),
    Metric(f"{_BOTH}tokens_generated", "tokens", "generated in the phase, discarded candidates included; sum"),
    Metric(f"{_BOTH}tokens_prefilled", "tokens", "prompt tokens of the phase's requests, cached ones included; sum"),
    Metric(f"{_BOTH}prefix_cache/hit_rate", "share of tokens", "prefilled tokens that came from vLLM's prefix cache"),
    Metric(f"{_BOTH}seconds/mean", "s", "mean time that the phase of a prompt took, queueing included"),
    # ---- upstream
    Metric(
        f"{_UP}baseline/mean",
        "-1 to 1",
        "mean baseline of the segments: the tracked value before this visit, as a reward",
    ),
    Metric(f"{_UP}split_position/mean", "tokens", "mean t_q"),
    Metric(f"{_UP}deviation/mean", "nats per token", "mean deviation d of the chosen segments"),
    Metric(f"{_UP}early_finish_share", "share of candidates", "candidates that ended before t_q and were cut in half"),
    Metric(
        f"{_UP}boundary_share",
        "share of candidates",
        "candidates in which a boundary was found",
        "with `skpo.split=boundary_token`",
    ),
    Metric(
        f"{_UP}signal_to_noise",
        "",
        "standard deviation of the true values of a prompt's segments over that of a mean of G rewards, estimated "
        "from the last 512 visits",
        _KNOWN,
    ),
    Metric(f"{_UP}signal_to_noise_{{low,high}}", "", "95% interval of `skpo/upstream/signal_to_noise`", _KNOWN),
    Metric(
        f"{_UP}shrinkage/mean",
        "share",
        "mean factor of the upstream advantages: the share of signal in their variance",
        "with `skpo.upstream.shrinkage`",
    ),
    # ---- downstream
    Metric(
        f"{_DOWN}copied_share",
        "share of responses",
        "responses that begin with all tokens of the segment that their prompt begins with",
    ),
    Metric(
        f"{_DOWN}all_equal_share",
        "share of groups",
        "groups whose rewards are all equal: they teach nothing downstream",
    ),
    # ---- both together
    Metric("skpo/loss", "", "the loss, mean over updates"),
    Metric(
        "skpo/policy_kl", "nats per token", "how far the policy moved in the step, over both phases; advances the drift"
    ),
    Metric(
        "skpo/rollout_actor_logprob_gap/mean",
        "nats per token",
        "mean |difference| of the log-probs of rollout and actor, see `skpo.max_logprob_gap`",
    ),
    Metric(
        "skpo/tokens/{generated,prefilled,cached}",
        "tokens",
        "of all requests of the step, dropped prompts included; sum",
    ),
    Metric(
        "skpo/tokens/generated_so_far", "tokens", "generated since the start of the run; what `budget.tokens` counts"
    ),
    Metric("skpo/requests_failed", "requests", "failed requests and rewards of the step"),
    Metric("skpo/prompts_dropped", "prompts", "prompts that gave no row"),
    # ---- trackers
    Metric(f"{_TRACKER}value/mean", "0 to 1", "mean tracked value V of the step's prompts, after the visit"),
    Metric(f"{_TRACKER}length/mean", "tokens", "mean tracked length L_q of the step's prompts, after the visit"),
    Metric(
        f"{_TRACKER}effective_count/mean",
        "visits",
        "mean N of the step's prompts: visits, older ones counted less. 1 on a first visit; tends to 8 to 25",
    ),
    Metric(f"{_TRACKER}drift/mean", "unit of `skpo.tracker.drift`", "mean drift D since the prompts' previous visits"),
    Metric(f"{_TRACKER}prompts_seen", "prompts", "prompts visited since the start of the run"),
    # ---- entropy polarity
    Metric(
        f"{_POLARITY}entropy", "nats per token", "H, mean entropy of the step's trained tokens before the updates", _ON
    ),
    Metric(
        f"{_POLARITY}target", "nats per token", "the entropy that H is compared with", f"{_ON}, from the second step on"
    ),
    Metric(f"{_POLARITY}phi", "-1 to 1", "(target - H) / target; above 0 the entropy is to rise", _ON),
    Metric(f"{_POLARITY}{{expanding,contracting}}/token_share", "share of tokens", "tokens of the branch", _ON),
    Metric(
        f"{_POLARITY}{{expanding,contracting}}/{{advantage_share,advantage_share_after}}",
        "share of the sum of |A|",
        "what the branch has of it, before and after the reweighting",
        _ON,
    ),
    Metric(f"{_POLARITY}mean", "", "mean P over the step's trained tokens, before the reweighting", _ON),
    Metric(
        f"{_POLARITY}predicted_change",
        "nats per unit of step on the logits",
        "the same after it: the change of entropy that is predicted, but for the length of the step",
        _ON,
    ),
    Metric(
        f"{_POLARITY}entropy_change",
        "nats per token",
        "measured change of H since the step before, whose prompts were others",
        f"{_ON}, from the second step on",
    ),
    Metric(
        f"{_POLARITY}correlation",
        "",
        "correlation of predicted and measured changes over the last 50 steps",
        f"{_ON}, from the fourth step on",
    ),
    # ---- validation
    Metric(
        "skpo/validation/skip_gap",
        "-2 to 2",
        "mean downstream reward since the previous validation, minus the held-out mean reward of plain responses. "
        "Problems and sampling differ, so that its course tells more than its level",
        "in steps that have a validation",
    ),
    Metric(
        "val-core/<source>/acc/mean@<n>", "share", "held-out accuracy of a data source, mean over n responses a problem"
    ),
    Metric(
        "val-core/<source>/reward/mean@<n>", "", "held-out mean reward", "with a reward function that reports no `acc`"
    ),
    Metric("val-aux/<source>/acc_success_only/mean@<n>", "share", "accuracy among the responses that did not fail"),
    Metric(
        "val-aux/<source>/well_formed/mean@<n>",
        "share",
        "responses with an answer in the form that the prompt requests",
    ),
    Metric("val-aux/<source>/{reward,score}/mean@<n>", "-1 to 1", "held-out mean reward"),
    Metric("val-aux/num_turns/{min,max,mean}", "turns", "messages of a held-out chat; 2 here"),
    Metric(
        "val-{core,aux}/<source>/<value>/<statistic>@<n>",
        "",
        "another value of the reward's record, or another statistic (`best`, `worst`, `maj`, `std`) over n responses",
        "with such a record, or `val_kwargs.n` above 1",
    ),
    # ---- the actor
    Metric("actor/entropy", "nats per token", "entropy of the policy on the step's tokens, before its updates"),
    Metric("actor/grad_norm", "", "norm of the gradient before clipping, mean over updates"),
    Metric("actor/loss", "", "loss as the optimizer sees it"),
    Metric("actor/lr", "", "learning rate"),
    Metric(
        "actor/packing/{positions,tokens}_sum",
        "tokens",
        "positions that the updates computed, and the tokens they stand for; fewer positions where prompts are shared",
        "where rows are packed",
    ),
    Metric(
        "actor/perf/{max_memory_allocated,max_memory_reserved,cpu_memory_used}_gb",
        "GiB",
        "memory of a rank; of its machine",
    ),
    Metric("actor/pg_loss", "", "the policy's part of the loss, without verl's other terms"),
    Metric("actor/{pg_clipfrac,pg_clipfrac_lower}", "share of tokens", "tokens whose ratio was clipped", _BASELINES),
    Metric(
        "actor/ppo_kl", "nats per token", "how far the policy moved in the step, as the mean of log pi_old - log pi"
    ),
    Metric("actor/entropy_loss", "nats per token", "entropy in the loss", TERMS_OF_THE_LOSS),
    Metric("actor/{kl_loss,kl_coef}", "", "divergence from the reference policy, and its weight", TERMS_OF_THE_LOSS),
    # ---- rows of both phases, by verl
    Metric(f"critic/{{score,rewards,advantages,returns}}/{_SPREAD}", "", "of all rows, segments among them"),
    Metric(
        f"{{prompt_length,response_length,response_length_non_aborted}}/{_SPREAD}",
        "tokens",
        "of all rows, segments among them",
    ),
    Metric(
        "{prompt_length,response_length,response_length_non_aborted}/clip_ratio",
        "share of rows",
        "rows as long as the longest",
    ),
    Metric("response/aborted_ratio", "share of rows", "rows without a token"),
    Metric(
        "global_seqlen/{min,max,mean,minmax_diff,balanced_min,balanced_max}", "tokens", "per rank, as balanced by verl"
    ),
    Metric(f"{{num_turns,training/num_turns}}/{_SPREAD}", "turns", "messages of a row's chat; 2 here"),
    Metric("training/{global_step,epoch}", "", "step; passes over the data, as verl counts them"),
    Metric(
        f"training/off_policy/{{trajectory_spans,trajectory_staleness,trajectory_staleness_worst}}/{_SPREAD}",
        "versions of the weights",
        "that generated a row (1 here), and how many versions behind they were (0 here)",
    ),
    Metric(
        "training/rollout_probs_diff_{mean,std,max}",
        "probability",
        "|difference| of the probabilities of rollout and actor",
    ),
    Metric("training/rollout_probs_diff_valid", "", "1 if they could be compared"),
    Metric("training/rollout_actor_probs_pearson_corr", "", "correlation of the probabilities of rollout and actor"),
    Metric("rollout_corr/<statistic>", "", "rollout against actor, by verl's importance correction", _IS),
    Metric(
        "training/filter_groups/{evicted,discarded_surplus}_samples",
        "groups",
        "groups without a signal that were replaced; complete ones that were not needed",
        "with `method=dapo`",
    ),
    Metric(
        "training/rollout_failure/evicted_samples",
        "prompts",
        "dropped prompts that were replaced",
        "with `sync_refill_failed_groups`",
    ),
    # ---- time
    Metric("timing_s/step", "s", "the whole step"),
    Metric("timing_s/gen", "s", "rollout: from the first request to the last reward"),
    Metric("timing_s/old_log_prob", "s", "log-probs of the rows before the updates"),
    Metric("timing_s/adv", "s", "advantages, trackers, metrics and trees"),
    Metric("timing_s/update_actor", "s", "updates"),
    Metric("timing_s/update_weights", "s", "weights to vLLM"),
    Metric("timing_s/save_checkpoint", "s", "a checkpoint, in steps that save one"),
    Metric("timing_s/testing", "s", "a validation, in steps that have one; not part of the step"),
    Metric("timing_s/ref", "s", "log-probs of the reference policy", TERMS_OF_THE_LOSS),
    Metric(
        "timing_per_token_ms/{gen,adv,update_actor}",
        "ms per token",
        "`timing_s/<name>` divided by the tokens of all rows",
    ),
    Metric("timing_per_token_ms/ref", "ms per token", "the same", TERMS_OF_THE_LOSS),
    Metric(
        "perf/{total_num_tokens,time_per_step,throughput}",
        "tokens; s; tokens per s and GPU",
        "prompts and responses of all rows",
    ),
    Metric(
        "perf/mfu/actor",
        "share",
        "of the device's peak FLOPs that the updates used, as verl estimates it; meaningless on a CPU",
    ),
)
