"""Options of verl that this recipe, or verl's V1 trainer, would accept and then not read.

Each is refused or warned about in one line when it is not what verl has by default.  What a method here does honour is
not in the tables; neither is what ``config`` requires of every run.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.skpo.checks import ACTOR, CORRECTION, MODEL, ROLLOUT
from recipe.skpo.errors import ConfigError


@dataclass(frozen=True)
class Unread:
    """An option that nothing reads.

    Attributes:
        path: in the config.
        default: verl's, with which there is nothing to say.
        reason: why it has no effect, and what to set instead.
        refused: stop the run; otherwise note it and continue.
        read_with: options of which one that is set makes this one count.
    """

    path: str
    default: Any
    reason: str
    refused: bool = True
    read_with: tuple[str, ...] = ()


_LOSS = "the objective of method=skpo does not read it"
_TERMS = (f"{ACTOR}.entropy_coeff", f"{ACTOR}.use_kl_loss", f"{ACTOR}.calculate_entropy")
_AGGREGATION = (
    "without entropy_coeff, use_kl_loss or calculate_entropy nothing of method=skpo reads it; its objective has "
    "skpo.downstream_aggregation"
)
_ADVANTAGE = "the advantages of method=skpo do not read it; leave it out, or choose another method"
_REWARD_KL = "rewards have no KL penalty here; set actor_rollout_ref.actor.use_kl_loss=true for a KL loss"
_KL = f"without {ACTOR}.use_kl_loss=true nothing reads it; set that, or leave it out"
_WEIGHTS = f"without {CORRECTION}.rollout_is nothing reads it; set that, or leave it out"
_TRAINING = "training with method=skpo samples single turns by itself and would ignore it"
_THOUGHTS = (
    "requests name no budget of thoughts, and vLLM would write tokens that the policy did not choose; "
    "data.max_response_length bounds thought and answer together"
)
_V1 = "verl's V1 trainer does not read it; leave it out"

UNREAD_BY_SKPO = [
    Unread(f"{ACTOR}.clip_ratio", 0.2, f"{_LOSS}; set clip_ratio_low and clip_ratio_high"),
    Unread(f"{ACTOR}.clip_ratio_c", 3.0, f"{_LOSS}; there is no dual clip"),
    Unread(f"{ACTOR}.loss_agg_mode", "token-mean", _AGGREGATION, read_with=_TERMS),
    Unread(f"{ACTOR}.loss_scale_factor", None, _AGGREGATION, read_with=_TERMS),
    Unread(f"{ACTOR}.policy_loss.clip_cov_ratio", 0.0002, _LOSS),
    Unread(f"{ACTOR}.policy_loss.clip_cov_lb", 1.0, _LOSS),
    Unread(f"{ACTOR}.policy_loss.clip_cov_ub", 5.0, _LOSS),
    Unread(f"{ACTOR}.policy_loss.kl_cov_ratio", 0.0002, _LOSS),
    Unread(f"{ACTOR}.policy_loss.ppo_kl_coef", 0.1, _LOSS),
    Unread(f"{ACTOR}.policy_loss.dro_beta", None, _LOSS),
    Unread(f"{ACTOR}.tau_pos", 1.0, f"{_LOSS}; it is SAPO's"),
    Unread(f"{ACTOR}.tau_neg", 1.05, f"{_LOSS}; it is SAPO's"),
    Unread("algorithm.norm_adv_by_std_in_grpo", True, _ADVANTAGE),
    Unread("algorithm.gamma", 1.0, _ADVANTAGE),
    Unread("algorithm.lam", 1.0, _ADVANTAGE),
    Unread(f"{ROLLOUT}.multi_turn.enable", False, _TRAINING),
    Unread(f"{ROLLOUT}.multi_turn.tool_config_path", None, _TRAINING),
    Unread(f"{ROLLOUT}.multi_turn.function_tool_path", None, _TRAINING),
    Unread(f"{ROLLOUT}.multi_turn.max_user_turns", None, _TRAINING),
    Unread(f"{ROLLOUT}.multi_turn.max_assistant_turns", None, _TRAINING),
    Unread(f"{ROLLOUT}.agent.default_agent_loop", "single_turn_agent", _TRAINING),
    Unread(f"{ROLLOUT}.agent.agent_loop_config_path", None, _TRAINING),
    Unread("data.tool_config_path", None, _TRAINING),
    Unread("data.function_tool_path", None, _TRAINING),
    Unread("data.need_tools_kwargs", False, _TRAINING),
    Unread(f"{ROLLOUT}.ignore_eos", False, "a candidate that ends before t_q could not be told from one that was cut"),
    Unread(f"{ROLLOUT}.enable_rollout_routing_replay", False, "the rows of method=skpo do not carry routed experts"),
    Unread(f"{ACTOR}.router_replay.mode", "disabled", "the rows of method=skpo do not carry routed experts"),
    Unread(f"{ROLLOUT}.trace.backend", None, "training requests of method=skpo are not traced, validation is", False),
]
"""With method=skpo."""

UNREAD = [
    Unread("critic.enable", False, "no method here has a critic"),
    Unread("distillation.enabled", False, "no method here has a teacher"),
    Unread(f"{ROLLOUT}.repetition_penalty", 1.0, "verl's requests name a penalty of 1 by themselves; leave it out"),
    Unread(f"{ACTOR}.calculate_sum_pi_squared", False, "it would be computed and thrown away"),
    Unread(f"{ACTOR}.use_prefix_grouper", False, "verl's V1 trainer does not read it; set share_prefixes=true"),
    Unread(f"{ACTOR}.freeze_vision_tower", False, "there are no images"),
    Unread(f"{ACTOR}.kl_loss_type", "low_var_kl", _KL, read_with=(f"{ACTOR}.use_kl_loss",)),
    Unread(f"{ACTOR}.kl_loss_coef", 0.001, _KL, read_with=(f"{ACTOR}.use_kl_loss",)),
    Unread("algorithm.kl_penalty", "kl", _REWARD_KL),
    Unread("algorithm.kl_ctrl.type", "fixed", _REWARD_KL),
    Unread("algorithm.kl_ctrl.kl_coef", 0.001, _REWARD_KL),
    Unread("algorithm.use_pf_ppo", False, _V1),
    Unread(f"{CORRECTION}.rollout_is_threshold", 2.0, _WEIGHTS, read_with=(f"{CORRECTION}.rollout_is",)),
    Unread(f"{CORRECTION}.rollout_is_batch_normalize", False, _WEIGHTS, read_with=(f"{CORRECTION}.rollout_is",)),
    Unread(f"{CORRECTION}.rollout_rs_threshold", None, "no samples are rejected here; leave it out"),
    Unread(f"{CORRECTION}.loss_type", "ppo_clip", f"{_V1}: the loss is the method's"),
    Unread("actor_rollout_ref.hybrid_engine", True, "actor and rollout share their devices here"),
    Unread(f"{ROLLOUT}.disaggregation.enabled", False, "the synchronous trainer has no separate prefill servers"),
    Unread(f"{ROLLOUT}.checkpoint_engine.backend", "naive", "weights go to servers on the same devices"),
    Unread(f"{ROLLOUT}.engine_kwargs.vllm.reasoning_config", None, _THOUGHTS),
    Unread(f"{ROLLOUT}.engine_kwargs.vllm.reasoning_parser", None, _THOUGHTS),
    Unread(f"{ROLLOUT}.over_sample_rate", 0, _V1),
    Unread(f"{ROLLOUT}.multi_stage_wake_up", False, _V1),
    Unread(f"{ROLLOUT}.do_sample", True, f"{_V1}; for greedy decoding set rollout.temperature=0"),
    Unread(
        f"{ROLLOUT}.val_kwargs.do_sample",
        False,
        "verl's V1 trainer samples validation by val_kwargs.temperature, top_p and top_k alone",
        refused=False,
    ),
    Unread(
        "actor_rollout_ref.nccl_timeout",
        600,
        "verl's workers do not read it, and torch's own time-out of process groups counts",
        refused=False,
    ),
    Unread(f"{MODEL}.tiled_mlp.enabled", False, "verl's FSDP engine does not read it; leave it out"),
    Unread("skip.rollout_tq.enable", False, "stored rollouts of another run know no visits of this one"),
    Unread("skip.rollout.enable", False, "stored rollouts of another run know no visits of this one"),
    Unread("trainer.balance_batch", True, f"rows are always balanced over the ranks: {_V1}", refused=False),
    Unread("trainer.esi_redundant_time", 0, _V1, refused=False),
    Unread("data.reward_fn_key", "data_source", "verl's V1 trainer does not read it; call the column data_source"),
    Unread("data.return_raw_chat", True, _V1, refused=False),
    Unread("data.return_raw_input_ids", False, _V1, refused=False),
    Unread("data.return_full_prompt", False, _V1, refused=False),
]
"""With any method."""


def check_options(config: DictConfig, overrides: Iterable[str] = ()) -> None:
    """Refuse options and overrides of groups that nothing would read, and say which others have no effect."""
    check_unread(config, [*UNREAD, *(UNREAD_BY_SKPO if config.method.name == "skpo" else [])])
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        for group, lacking, switch in (("critic", "critic", "enable"), ("distillation", "teacher", "enabled")):
            if key.startswith(f"{group}.") and key != f"{group}.{switch}":
                raise ConfigError(f"{key}: is set, but no method here has a {lacking}; leave it out")
        if key.startswith("actor_rollout_ref.ref.") and not config.actor_rollout_ref.actor.use_kl_loss:
            raise ConfigError(f"{key}: is set, but there is no reference policy without {ACTOR}.use_kl_loss=true")
        if key.startswith(f"trainer.v1.{config.trainer.v1.trainer_mode}."):
            raise ConfigError(f"{key}: is set, but it belongs to verl's asynchronous trainers; leave it out")
    for sentence in _contradictions(config):
        raise ConfigError(sentence)
    for sentence in _remarks(config):
        print(f"note: {sentence}")


def check_unread(config: DictConfig, options: Iterable[Unread]) -> None:
    """Refuse those of the options that are not at their default, or say that they have no effect."""
    for option in options:
        value = OmegaConf.select(config, option.path)
        if value is None or value == option.default or any(OmegaConf.select(config, path) for path in option.read_with):
            continue
        if option.refused:
            raise ConfigError(f"{option.path}: is {value}, but {option.reason}")
        print(f"note: {option.path}={value} has no effect: {option.reason}")


def _contradictions(config: DictConfig) -> Iterator[str]:
    """Yield sentences on options that contradict each other."""
    rollout, correction = config.actor_rollout_ref.rollout, config.algorithm.rollout_correction
    bypass = correction.bypass_mode
    other_temperature = rollout.logprobs_mode == "raw_logprobs" and rollout.temperature != 1
    tracks = "tracker" in config.method.uses
    if bypass and tracks and config.skpo.tracker.drift == "logratio":
        yield (
            f"{CORRECTION}.bypass_mode: is true, which leaves no log-probs of the actor for "
            f"skpo.tracker.drift=logratio to compare; set one of them back"
        )
    if bypass and _nucleus(rollout):
        yield (
            f"{CORRECTION}.bypass_mode: is true with {ROLLOUT}.{_nucleus(rollout)}, so every ratio would begin at the "
            f"mass of the kept tokens, not at 1; set one of them back"
        )
    if bypass and correction.rollout_is is not None:
        yield (
            f"{CORRECTION}.rollout_is: is {correction.rollout_is} with bypass_mode=true, where every ratio begins at "
            f"the rollout's log-probs and nothing is left to correct; set one of them back"
        )
    if correction.rollout_is is not None and other_temperature:
        yield (
            f"{CORRECTION}.rollout_is: is {correction.rollout_is} with {ROLLOUT}.logprobs_mode=raw_logprobs and a "
            f"temperature of {rollout.temperature}, so every weight would compare two temperatures; set "
            f"processed_logprobs"
        )
    if bypass and other_temperature:
        yield (
            f"{CORRECTION}.bypass_mode: is true with {ROLLOUT}.logprobs_mode=raw_logprobs and a temperature of "
            f"{rollout.temperature}, so every ratio would compare two temperatures; set processed_logprobs"
        )
    if config.budget.match == "tokens":
        for name, flat in (("lr_scheduler_type", "constant"), ("lr_warmup_steps_ratio", 0.0)):
            value = config.actor_rollout_ref.actor.optim.get(name)
            if value not in (None, flat):
                yield (
                    f"{ACTOR}.optim.{name}: is {value}, but with budget=tokens the number of steps is not known "
                    f"beforehand; set {flat}, and give optim.lr_warmup_steps in steps"
                )


def _remarks(config: DictConfig) -> Iterator[str]:
    """Yield sentences on options that are honoured in one place and not in another."""
    rollout = config.actor_rollout_ref.rollout
    if _nucleus(rollout):
        yield (
            f"{ROLLOUT}.{_nucleus(rollout)} is obeyed by vLLM alone: the objective, d(s) and the drift take the "
            f"samples as drawn from the whole distribution"
        )
    if rollout.logprobs_mode == "raw_logprobs" and rollout.temperature != 1:
        yield f"{ROLLOUT}.logprobs_mode=raw_logprobs: d(s) is measured at temperature 1, not {rollout.temperature}"
    actor = config.actor_rollout_ref.actor
    if config.method.name == "skpo" and actor.loss_agg_mode != "token-mean":
        yield (
            f"{ACTOR}.loss_agg_mode={actor.loss_agg_mode} is obeyed by entropy bonus and KL loss alone: the objective "
            f"has skpo.downstream_aggregation"
        )
    if config.skpo.curriculum.enable and "curriculum" in config.method.uses:
        cut = config.data.get("train_max_samples", -1) > 0
        effect = "chooses the prompts of data.train_max_samples alone" if cut else "has no effect"
        if not config.data.shuffle:
            yield f"data.shuffle=false {effect}: skpo.curriculum draws the prompts; set its enable to false"
        if config.data.seed not in (1, None):
            yield f"data.seed={config.data.seed} {effect}: skpo.curriculum draws the prompts by skpo.seed"


def _nucleus(rollout: DictConfig) -> str:
    """Return ``top_p=...`` or ``top_k=...`` where sampling leaves tokens out, else an empty text."""
    if rollout.top_p not in (None, 1):
        return f"top_p={rollout.top_p}"
    return f"top_k={rollout.top_k}" if rollout.top_k not in (None, -1, 0) else ""
