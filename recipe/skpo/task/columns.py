"""Columns of a user's data files: which leave the trainer with a row, and which names are reserved.

verl passes every column to the rollout as a keyword argument and writes it over what was generated, so a column
``output`` or ``responses`` would break or replace a response.
"""

from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf

OURS = "skpo_"
"""Prefix of the fields that the trainer adds to a prompt."""

SENT = frozenset(
    {
        *("id", "uid", "data_source", "raw_prompt", "reward_model", "extra_info", "index", "dummy_tensor"),
        *("agent_name", "tools_kwargs", "interaction_kwargs", "global_steps", "validate"),
    }
)
"""Fields of a prompt that the rollout or the reward reads; all others stay in the trainer."""

STEERING = {
    "__rollout_n__": "verl samples so many responses for it, in validation alone",
    "__do_sample__": "verl samples greedily for it, in validation alone",
    "validate": "verl treats the row as one of validation",
    "global_steps": "verl counts steps in it",
}
"""Column to its effect: refused for every method."""

GENERATED = frozenset(
    {
        # arguments of verl's worker
        *("output", "trace", "trajectory", "sampling_params", "session_id"),
        # fields of a stored row and of what a reward manager gets
        *("prompts", "responses", "response_mask", "loss_mask", "attention_mask", "input_ids", "position_ids"),
        *("rm_scores", "num_turns", "extra_fields", "metrics", "rollout_log_probs", "routed_experts"),
        *("multi_modal_data", "multi_modal_inputs", "mm_processor_kwargs", "mm_processor_output"),
        *("old_log_probs", "advantages", "returns", "teacher_ids", "teacher_logprobs"),
        *("__num_turns__", "tool_extra_fields", "prompt_len", "response_len", "reward_scores"),
    }
)
"""Names of a generated row's own fields: refused if columns are not left out."""


def sends_all(config: DictConfig) -> bool:
    """Tell whether the user's code gets the rows, which may read any column: an agent loop, a reward manager."""
    agent = config.actor_rollout_ref.rollout.agent
    return bool(
        config.reward.reward_manager.source != "register"
        or agent.get("agent_loop_config_path")
        or OmegaConf.select(config, "data.custom_cls.path")
    )


def sent(names: Iterable[str]) -> list[str]:
    """Choose the fields of a prompt that leave the trainer."""
    return [name for name in names if name in SENT or name.startswith(OURS)]
