"""The rollout worker of all methods: verl's, with seeded and checked requests, time limits and checked rewards.

The baselines use it as it is; ``two_phases`` builds SKPO's on it.  Every fault and its policy is in
docs/development/faults.md.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

from recipe.skpo.method.rows import SEED_FIELD
from recipe.skpo.output.console import configure_logging
from recipe.skpo.rollout.admission import Clock, slots_of_worker
from recipe.skpo.rollout.client import CLOCK, REQUEST_ID, CheckedLLMClient
from recipe.skpo.rollout.failures import RolloutError, RolloutStop, cause_of
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.task.rewards import finite_number, shown, split_record
from recipe.skpo.task.thoughts import ThoughtReader, configured_marks

logger = logging.getLogger(__name__)


class RolloutWorker(AgentLoopWorkerTQ.__ray_actor_class__):  # type: ignore[name-defined,misc]
    """verl's TransferQueue rollout worker with counted tokens and, if ``skpo.seed_requests``, a seed per request.

    ``AgentLoopWorkerTQ`` is a Ray actor class and cannot be subclassed itself, hence ``__ray_actor_class__``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        configure_logging()
        self.settings = SkpoSettings.from_config(self.config.skpo)
        vocabulary = self.model_config.hf_config.get_text_config().vocab_size
        self.llm_client: CheckedLLMClient = CheckedLLMClient(self.llm_client, vocabulary, slots_of_worker(self.config))
        self.failures: Counter[str] = Counter()
        reward = self.config.reward.custom_reward_function
        self.thoughts = ThoughtReader(self.tokenizer, configured_marks(reward.path, reward.get("reward_kwargs")))
        self._record_types: dict[str, type] = {}
        self._left_out: set[str] = set()

    def take_failures(self) -> dict[str, int]:
        """How often what failed since the last call; keys as ``cause_of`` makes them."""
        taken, self.failures = self.failures, Counter()
        return dict(taken)

    def _note_failures(self, results: Sequence[object], kind: str, where: str) -> None:
        """Count every exception among gathered results, and log it with its traceback."""
        for index, result in enumerate(results):
            if isinstance(result, BaseException):
                self.failures[cause_of(kind, result)] += 1
                logger.error("%s: %s %d failed", where, kind, index, exc_info=result)

    def take_tokens(self) -> dict[str, int]:
        """Tokens of all requests since the last call: ``generated``, ``prefilled``, ``cached``."""
        taken = self.llm_client.tokens
        self.llm_client.tokens = dict.fromkeys(taken, 0)
        return taken

    async def _run_agent_loop(
        self,
        sampling_params: dict[str, Any],
        trajectory: dict[str, Any],
        *,
        agent_name: str,
        trace: bool = True,
        **kwargs: Any,
    ) -> Any:
        """One response of a prompt; overrides verl's, which neither seeds nor names a request and has no time limit."""
        if not trajectory["validate"] and self.settings.seed_requests:
            sampling_params = dict(sampling_params, seed=int(kwargs[SEED_FIELD]) + int(kwargs["session_id"]))
        if self.rollout_config.full_determinism:
            # verl's agent loop gives all requests one name there, and requests are routed by name: to one server.
            # The uid of a validation prompt is random, its id is not.
            validated = f"val-{kwargs.get('data_source')}-{kwargs.get('id')}-{trajectory['sample_index']}"
            REQUEST_ID.set(f"{validated if trajectory['validate'] else kwargs['uid']}-{kwargs['session_id']}")
        # Validation sends all its prompts at once, most of which only wait: there, the replay buffer watches progress.
        limit = None if trajectory["validate"] else self.settings.prompt_timeout_s
        try:
            async with asyncio.timeout(None) as bound:
                # The row is stored after the reward, and a time-out must not leave half of it.
                CLOCK.set(Clock(bound, limit, until_reward=True))
                return await super()._run_agent_loop(
                    sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs
                )
        except Exception as error:  # counted; verl logs it and marks the prompt
            self.failures[cause_of("session", error)] += 1
            raise

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict) -> None:
        """Compute the reward of the last output; overrides verl's, which has no time-out and takes whatever comes.

        Raises:
            RolloutError: a reward that is not a finite number.
            RolloutStop: in training of a method with trackers, one that is not within [-1, 1].
            TimeoutError: none within ``skpo.prompt_timeout_s``.
        """
        last = outputs[-1]
        # verl's reward managers see neither the prompt nor special tokens, and both may hold the marks of a thought.
        told = await asyncio.get_running_loop().run_in_executor(
            None, self.thoughts.extra_info, kwargs.get("extra_info"), last.prompt_ids, last.response_ids
        )
        async with asyncio.timeout(self.settings.prompt_timeout_s):
            await super()._compute_score(outputs, kwargs=dict(kwargs, extra_info=told))
        reward = finite_number(last.reward_score)
        if reward is None:
            raise RolloutError(f"the reward function returned {shown(last.reward_score)}, which is not a finite number")
        # Left out, such a response would be selected by what earned its reward, its length for example.
        trains = SEED_FIELD in kwargs
        if trains and "tracker" in self.config.method.uses and not -1 <= reward <= 1:
            raise RolloutStop(
                f"the reward function returned {reward:g} for prompt {kwargs.get('id')}, and "
                f"method={self.config.method.name} needs rewards within [-1, 1]; scale the reward, or choose a method "
                f"without a tracker (method=grpo)"
            )
        last.reward_score = reward
        record = last.extra_fields.get("reward_extra_info") or {}
        if not trains and "score" not in record:
            # verl stores a plain number as "acc", too; validation would show its mean as an accuracy.
            record.pop("acc", None)
        self._reduce_record(last)
        clock = CLOCK.get()
        if clock is not None:
            clock.rewarded()

    def _reduce_record(self, output: AgentLoopOutput) -> None:
        """Keep what can be averaged or shown of what the reward returned beside its score; verl averages all of it.

        A key is either numbers or texts: verl goes by its first value.
        """
        kept, left_out = split_record(output.extra_fields.get("reward_extra_info") or {})
        for key, value in list(kept.items()):
            kind = str if isinstance(value, str) else float
            if value is not None and self._record_types.setdefault(key, kind) is not kind:
                left_out[key] = "a text here and a number there"
                del kept[key]
        for key in left_out.keys() - self._left_out:
            self._left_out.add(key)
            logger.warning(
                "the reward function returned %r (%s) beside its score: it has no mean, and is left out of the metrics",
                key,
                left_out[key],
            )
        output.extra_fields["reward_extra_info"] = kept
