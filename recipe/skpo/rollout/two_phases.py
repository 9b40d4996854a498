"""The rollout hook: one coroutine per prompt, from q to the G + 1 rows of verl's TransferQueue.

docs/method.md, sections 1 to 5.  Per prompt: G candidates of at most t_q tokens under q; the median one is kept
as s; G responses under [s, q]; their rewards while others still generate; then the rows are stored:

    session 0        the segment under q              reward = mean of the siblings     phase UPSTREAM
    session 1..G     the responses under [s, q]       reward of each                    phase DOWNSTREAM

Nothing waits for other prompts.  All requests of one phase carry one routing id, so that they land on one replica and
share its prefix cache.  Where requests queue for a replica, those of the longest prompts go first: a prompt with long
responses has a long segment too, so in order of arrival its siblings would come last and be waited for alone.  A
sibling that fails leaves a row without trained tokens; a prompt without a usable candidate or sibling is marked failed
and stores nothing.  Validation is verl's own path, plain pi(.|q).

No request is tried again: its siblings are the reserve, and what failed once under a seed fails again.  Answers of the
server and rewards are checked where they arrive, for every method; docs/operations.md has every fault and its policy.

The ablations (docs/method.md, section 12) change what the siblings continue (``skip``), where candidates are cut
(``split``), which one is kept (``selection``) and whose reward the segment gets (``upstream_reward``).  The baselines
use the worker ``MeteredWorker``: verl's own rollout with counted tokens and a seed per request.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch
import transfer_queue as tq
from ray.exceptions import RayTaskError
from tensordict import TensorDict
from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
from verl.workers.rollout.replica import TokenOutput

from recipe.skpo.errors import RunError
from recipe.skpo.method.rows import (
    DOWNSTREAM,
    LENGTH_FIELD,
    PHASE_FIELD,
    RECORD,
    SEED_FIELD,
    SPLIT_FIELD,
    STEP_FIELD,
    UPSTREAM,
    CandidateRecord,
    RolloutRecord,
    TokenCounts,
)
from recipe.skpo.method.segments import Segment, cut_segment, last_boundary, select_segment, skip_prompt
from recipe.skpo.rollout.admission import AbortingHandle, Admission, Clock, slots_of_worker
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.task.columns import sends_all, sent
from recipe.skpo.task.prompts import automatic_bos
from recipe.skpo.task.rewards import finite_number, shown, split_record
from recipe.skpo.task.thoughts import ThoughtReader, configured_marks

logger = logging.getLogger(__name__)

_CLOCK: ContextVar[Clock | None] = ContextVar("skpo_clock", default=None)
"""The clock of the prompt, or of the baseline's response, that this task works on."""

_REQUEST_ID: ContextVar[str | None] = ContextVar("skpo_request_id", default=None)
"""Name of the response that this task samples, where verl would call all of them alike."""

_ANSWER_S = 120.0
"""Seconds within which every worker must have told its counts, whatever else it does."""


class RolloutError(RunError):
    """A prompt that cannot be rolled out; the message names it and why."""


class RolloutStop(RolloutError):
    """A fault that no later prompt would be without: the run stops with this message after the batch."""


_STOP = "stop: "
"""How the cause of a ``RolloutStop`` begins where failures are counted."""


@dataclass(frozen=True)
class Candidate:
    """One upstream candidate: its segment, whether it ended by itself (at t_q at the latest), and what it cost."""

    segment: Segment
    ended_early: bool
    output: TokenOutput


@dataclass(frozen=True)
class SkipPrompt:
    """What the siblings are sampled from, and how their rows are stored.

    Attributes:
        request_ids: the prompt that the server sees.
        row_ids: the prompt of the stored row, a beginning of ``request_ids``; the rest opens the row's response.
        opening: the segment whose tokens open the response, not trained there; None where ``row_ids`` is all.
    """

    request_ids: list[int]
    row_ids: list[int]
    opening: Segment | None = None


def cause_of(kind: str, error: BaseException) -> str:
    """What is counted of a failure: ``kind`` (prompt, candidate, sibling, session) and the first line of the error.

    Of an error in another Ray actor it is the first line of that error: Ray's own line has process numbers in it, by
    which equal causes would be counted apart.
    """
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    if isinstance(error, RolloutStop):
        return f"{_STOP}{error}"
    lines = str(error).splitlines() or [""]
    return f"{kind}: {type(error).__name__}: {lines[0]}"[:300]


def stop_reason(failures: Iterable[str]) -> str | None:
    """Find the message of a ``RolloutStop`` among causes as ``cause_of`` makes them."""
    return next((cause.removeprefix(_STOP) for cause in failures if cause.startswith(_STOP)), None)


def flaw(output: TokenOutput, vocabulary: int) -> str | None:
    """Why an answer of the server cannot be used; None for a good one.

    Good are at least one token id within ``[0, vocabulary)`` with one finite log-prob each, of a request that was not
    aborted.
    """
    tokens, logprobs = output.token_ids, output.log_probs or ()
    if not tokens or len(tokens) != len(logprobs):
        return f"{len(tokens)} tokens with {len(logprobs)} log-probs"
    if output.stop_reason == "aborted":
        return f"aborted after {len(tokens)} tokens"
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        return f"token ids from {min(tokens)} to {max(tokens)}, the model has {vocabulary}"
    if not math.isfinite(math.fsum(logprobs)):
        return "a log-prob that is not finite"
    return None


class MeteredClient:
    """verl's LLM client, which counts the tokens of every request, discarded ones included, and checks its answer.

    Requests beyond what the servers run at once wait here, lowest ``priority`` first; the clock of a request's prompt
    starts when the first of them is sent.

    Args:
        client: verl's.
        vocabulary: number of token ids that the model knows.
        slots: requests in flight.
    """

    def __init__(self, client: Any, vocabulary: int, slots: int) -> None:
        self._client, self._vocabulary = client, vocabulary
        self._admission = Admission(slots)
        if hasattr(client, "_acquire_server"):
            acquire = client._acquire_server

            async def acquire_aborting(*args: Any, **kwargs: Any) -> tuple[str, AbortingHandle]:
                server_id, server = await acquire(*args, **kwargs)
                return server_id, AbortingHandle(server)

            client._acquire_server = acquire_aborting
        self.tokens = {"generated": 0, "prefilled": 0, "cached": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(self, request_id: str, *, prompt_ids: list[int], **kwargs: Any) -> TokenOutput:
        """As verl's client; prompt tokens and generated ones are added up.

        Raises:
            RolloutError: an answer that cannot be used, see ``flaw``.
        """
        request_id = _REQUEST_ID.get() or request_id
        clock = _CLOCK.get()
        async with self._admission.slot(kwargs.get("priority") or 0, clock):
            if clock is not None:
                clock.start()
            output = await self._client.generate(request_id=request_id, prompt_ids=prompt_ids, **kwargs)
        self.tokens["generated"] += len(output.token_ids)
        self.tokens["prefilled"] += len(prompt_ids)
        self.tokens["cached"] += _cached(output)
        problem = flaw(output, self._vocabulary)
        if problem is not None:
            raise RolloutError(f"{problem} (stop reason {output.stop_reason})")
        return output


class MeteredWorker(AgentLoopWorkerTQ.__ray_actor_class__):  # type: ignore[name-defined,misc]
    """verl's TransferQueue rollout worker with counted tokens and, if ``skpo.seed_requests``, a seed per request.

    ``AgentLoopWorkerTQ`` is a Ray actor class and cannot be subclassed itself, hence ``__ray_actor_class__``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = SkpoSettings.from_config(self.config.skpo)
        vocabulary = self.model_config.hf_config.get_text_config().vocab_size
        self.llm_client: MeteredClient = MeteredClient(self.llm_client, vocabulary, slots_of_worker(self.config))
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
            _REQUEST_ID.set(f"{validated if trajectory['validate'] else kwargs['uid']}-{kwargs['session_id']}")
        # Validation sends all its prompts at once, most of which only wait: there, the replay buffer watches progress.
        limit = None if trajectory["validate"] else self.settings.prompt_timeout_s
        try:
            async with asyncio.timeout(None) as bound:
                # The row is stored after the reward, and a time-out must not leave half of it.
                _CLOCK.set(Clock(bound, limit, until_reward=True))
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
        self._reduce_record(last)
        clock = _CLOCK.get()
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


class SkpoAgentLoopWorker(MeteredWorker):
    """verl's rollout worker with the two SKPO phases in place of n independent samples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The same builder as verl's single-turn agent: training and validation see the same tokens of q.
        self.token_builder = create_continuous_token_builder(
            self.tokenizer,
            hf_model_type=self.hf_model_type,
            chat_template_kwargs=self.config.data.get("apply_chat_template_kwargs", {}),
            mm_processor_kwargs=self.mm_processor_kwargs,
            processor=self.processor,
        )
        stops = getattr(self.model_config.generation_config, "eos_token_id", None)
        self.bos_token_id = automatic_bos(self.tokenizer)
        self.stop_ids = {self.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
        texts = [boundary for boundary in self.settings.boundaries if isinstance(boundary, str)]
        ids = [boundary for boundary in self.settings.boundaries if isinstance(boundary, int)]
        self.find_boundary = partial(last_boundary, boundary_ids=ids, boundary_texts=texts, decode=self._decode)

    async def _run_prompt(self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False) -> None:
        """Roll one prompt out; override of verl's hook, which samples n independent responses."""
        if trajectory["validate"]:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
            return
        uid = prompt["uid"]
        await tq.async_kv_put(key=uid, partition_id="train", tag={"status": "running"})
        try:
            async with asyncio.timeout(None) as bound:
                _CLOCK.set(Clock(bound, self.settings.prompt_timeout_s))
                rows = await self._roll_out(prompt, sampling_params)
            # Outside the time-out: half of a prompt's rows must never be stored.
            puts = [self._agent_loop_postprocess(output, False, **fields) for output, fields in rows]
            # All settle before the status says so: verl may clear a failed prompt, and no row may follow.
            errors = [result for result in await asyncio.gather(*puts, return_exceptions=True) if result]
            if errors:
                raise errors[0]
            status = "finished"
        except Exception as error:  # process border: verl must learn of every prompt's end, or its replay buffer waits
            self.failures[cause_of("prompt", error)] += 1
            logger.exception("prompt %s (%s) is dropped", prompt.get("id"), uid)
            status = "failure"
        await tq.async_kv_put(key=uid, partition_id="train", tag={"status": status})

    async def _roll_out(self, prompt: dict, sampling_params: dict) -> list[tuple[AgentLoopOutput, dict]]:
        """Both phases of one prompt.

        Returns:
            G + 1 pairs of verl output and row fields: the siblings in order, then the segment.

        Raises:
            RolloutError: no usable candidate, no usable sibling, or [s, q] leaves no room for a response.
        """
        prompt = {key: value for key, value in prompt.items() if key != "agent_name"}
        split_position, seed, step = int(prompt[SPLIT_FIELD]), int(prompt[SEED_FIELD]), int(prompt[STEP_FIELD])
        size, uid = self.settings.group_size, prompt["uid"]
        messages = list(prompt["raw_prompt"])
        problem_ids = await self._tokenize(messages)
        # With the parameters of every request; vLLM heeds it under scheduling_policy=priority, lowest first.
        sampling_params = dict(sampling_params, priority=-int(prompt[LENGTH_FIELD]))

        started = time.perf_counter()
        candidates = await self._sample_candidates(f"{uid}-up", problem_ids, sampling_params, split_position, seed)
        deviations = [candidate.segment.deviation for candidate in candidates]
        chosen = select_segment(deviations, self.settings.selection, step, seed)
        skip = await self._skip_prompt(messages, problem_ids, candidates[chosen].segment)
        opened = len(skip.request_ids) - len(skip.row_ids)
        limits = self.rollout_config
        budget = min(limits.response_length - opened, limits.max_model_len - len(skip.request_ids))
        if budget < 1:
            raise RolloutError(f"skip prompt of {len(skip.request_ids)} tokens leaves no room in max_model_len")

        upstream_done = time.perf_counter()
        own = []
        if self.settings.upstream_reward == "own":
            own.append(self._complete(uid, candidates[chosen], problem_ids, sampling_params, seed, prompt))
        requests = [
            self._respond(f"{uid}-down", index, skip, dict(sampling_params, max_tokens=budget), seed, prompt)
            for index in range(size)
        ]
        settled = await asyncio.gather(*requests, *own, return_exceptions=True)
        self._note_failures(settled, "sibling", f"prompt {prompt['id']} ({uid})")
        siblings, completed = settled[:size], settled[size:]
        responses = [response for response in siblings if isinstance(response, AgentLoopOutput)]
        if not responses:
            raise RolloutError(f"all {size} siblings failed")
        if any(isinstance(response, BaseException) for response in completed):
            raise RolloutError("the chosen candidate's own response failed")
        scored = [response for response in completed if isinstance(response, AgentLoopOutput)] or responses

        outputs = [
            response if isinstance(response, AgentLoopOutput) else self._missing_sibling(skip.row_ids, responses[0])
            for response in siblings
        ]
        times = (upstream_done - started, time.perf_counter() - upstream_done)
        written = len(scored[0].response_ids) - len(candidates[chosen].output.token_ids) if completed else 0
        upstream = self._segment_row(problem_ids, candidates, chosen, split_position, times, written)
        upstream.reward_score = sum(response.reward_score or 0.0 for response in scored) / len(scored)
        return [
            (output, {**prompt, "session_id": session, PHASE_FIELD: torch.tensor(phase)})
            for output, session, phase in [
                *((output, index + 1, DOWNSTREAM) for index, output in enumerate(outputs)),
                (upstream, 0, UPSTREAM),
            ]
        ]

    async def _tokenize(self, messages: list[dict]) -> list[int]:
        """Tokens of the templated messages, as verl's single-turn agent makes them."""
        build = self.token_builder.build_initial_tokens
        return list(await asyncio.get_running_loop().run_in_executor(None, build, messages))

    def _decode(self, token_ids: Sequence[int]) -> str:
        # Without clean-up: the text of a prefix has to be a prefix of the text.
        return self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    async def _skip_prompt(self, messages: list[dict], problem_ids: list[int], segment: Segment) -> SkipPrompt:
        """The prompt that the siblings continue (docs/method.md, sections 4 and 12)."""
        tokens = list(segment.token_ids)
        if self.settings.skip == "unconditional":
            return SkipPrompt(problem_ids, problem_ids)
        if self.settings.skip == "continual":
            return SkipPrompt(problem_ids + tokens, problem_ids, segment)
        if self.settings.skip == "chat":
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            quote = self.settings.chat_quote.format(segment=text, problem=messages[-1]["content"])
            ids = await self._tokenize([*messages[:-1], {**messages[-1], "content": quote}])
        else:
            ids = skip_prompt(tokens, problem_ids, self.bos_token_id)
        return SkipPrompt(ids, ids)

    async def _sample_candidates(
        self, route: str, problem_ids: list[int], sampling_params: dict, split_position: int, seed: int
    ) -> list[Candidate]:
        """The upstream candidates, of at most t_q tokens each, cut; those that failed are left out."""
        params = dict(sampling_params, max_tokens=split_position)
        outputs = await asyncio.gather(
            *(
                self._generate(route, index, problem_ids, params, seed)
                for index in range(self.settings.candidate_count)
            ),
            return_exceptions=True,
        )
        self._note_failures(outputs, "candidate", route)
        boundary = self.find_boundary if self.settings.split == "boundary_token" else None
        candidates = []
        for output in outputs:
            if isinstance(output, TokenOutput):
                finished = len(output.token_ids) < split_position or output.token_ids[-1] in self.stop_ids
                segment = cut_segment(output.token_ids, output.log_probs or [], split_position, finished, boundary)
                candidates.append(Candidate(segment, finished, output))
        if not candidates:
            raise RolloutError(f"all {self.settings.candidate_count} upstream candidates failed")
        return candidates

    async def _respond(
        self, route: str, index: int, skip: SkipPrompt, params: dict, seed: int, prompt: dict
    ) -> AgentLoopOutput:
        """One downstream sibling with its reward."""
        # Seeds of the siblings follow those of the candidates: no two requests of a prompt share one.
        output = await self._generate(route, index, skip.request_ids, params, seed + self.settings.group_size)
        record = TokenCounts(len(output.token_ids), len(skip.request_ids), _cached(output))
        row = self._row(skip.row_ids, output.token_ids, output.log_probs, output.extra_fields | {RECORD: record})
        if skip.opening is not None:
            # Under q, the segment is the hard beginning of the response: read and scored, not trained again.
            row.response_ids = [*skip.opening.token_ids, *row.response_ids]
            row.response_logprobs = [*skip.opening.logprobs, *(row.response_logprobs or ())]
            row.response_mask = [0] * len(skip.opening.token_ids) + row.response_mask
        await self._compute_score([row], kwargs=prompt)
        return row

    async def _complete(
        self, uid: str, candidate: Candidate, problem_ids: list[int], sampling_params: dict, seed: int, prompt: dict
    ) -> AgentLoopOutput:
        """The candidate's own response to q, written to its end, with its reward; it is not trained on."""
        written = list(candidate.output.token_ids)
        rest: list[int] = []
        budget = self.rollout_config.response_length - len(written)
        if not candidate.ended_early and budget > 0:
            params = dict(sampling_params, max_tokens=budget)
            output = await self._generate(
                f"{uid}-up", 0, problem_ids + written, params, seed + 2 * self.settings.group_size, name="own"
            )
            rest = output.token_ids
        row = self._row(problem_ids, written + rest, None, {})
        await self._compute_score([row], kwargs=prompt)
        return row

    async def _generate(
        self, route: str, index: int, prompt_ids: list[int], params: dict, seed: int, name: str = ""
    ) -> TokenOutput:
        """One request; ``route`` and ``index`` tell it apart, and ``name`` where several share both.

        The server empties the parameters it is given, so each request gets its own copy.
        """
        own = dict(params, seed=seed + index) if self.settings.seed_requests else dict(params)
        priority = own.pop("priority")
        # Full determinism hands the routing id on to vLLM as the request's name, which must be unique there.
        request_id = f"{route}-{name}{index}" if self.rollout_config.full_determinism else route
        return await self.llm_client.generate(
            request_id=request_id, prompt_ids=prompt_ids, sampling_params=own, priority=priority
        )

    def _row(
        self, prompt_ids: list[int], token_ids: list[int], logprobs: list[float] | None, extra_fields: dict
    ) -> AgentLoopOutput:
        """verl's output record; all rows set the same fields, as one TransferQueue partition needs."""
        # Not validated: that would copy every list of tokens, which takes longer than all else that is done for a row.
        return AgentLoopOutput.model_construct(
            prompt_ids=prompt_ids,
            response_ids=list(token_ids),
            response_mask=[1] * len(token_ids),
            response_logprobs=logprobs,
            num_turns=2,
            metrics=AgentLoopMetrics(),
            extra_fields=dict(extra_fields, turn_scores=[], tool_rewards=[]),
        )

    def _segment_row(
        self,
        problem_ids: list[int],
        candidates: Sequence[Candidate],
        chosen: int,
        split_position: int,
        seconds: tuple[float, float],
        written: int,
    ) -> AgentLoopOutput:
        """The upstream row, with the record of the whole prompt that metrics and rollout trees are made from.

        ``seconds``: of both phases; ``written``: tokens that completed the chosen candidate's own response.
        """
        segment = candidates[chosen].segment
        looks_for_boundaries = self.settings.split == "boundary_token"
        record = RolloutRecord(
            generated=sum(len(candidate.output.token_ids) for candidate in candidates) + written,
            prefilled=len(problem_ids) * len(candidates),
            cached=sum(_cached(candidate.output) for candidate in candidates),
            split_position=split_position,
            candidates=tuple(
                CandidateRecord(
                    token_ids=candidate.segment.token_ids,
                    rest_ids=tuple(candidate.output.token_ids[len(candidate.segment.token_ids) :]),
                    deviation=candidate.segment.deviation,
                    ended_early=candidate.ended_early,
                    at_boundary=candidate.segment.at_boundary if looks_for_boundaries else None,
                )
                for candidate in candidates
            ),
            chosen=chosen,
            seconds=seconds[0],
            downstream_seconds=seconds[1],
        )
        fields = candidates[chosen].output.extra_fields | {RECORD: record}
        row = self._row(problem_ids, list(segment.token_ids), list(segment.logprobs), fields)
        row.extra_fields["reward_extra_info"] = {}
        return row

    def _missing_sibling(self, skip_ids: list[int], sibling: AgentLoopOutput) -> AgentLoopOutput:
        """A row of one untrained token for a sibling that failed: verl expects G + 1 rows per prompt."""
        fields = {key: sibling.extra_fields.get(key) for key in ("min_global_steps", "max_global_steps")}
        row = self._row(skip_ids, [self.tokenizer.eos_token_id], [0.0], fields | {RECORD: None})
        row.response_mask = [0]
        row.reward_score = 0.0
        row.extra_fields["reward_extra_info"] = {}
        return row


def _cached(output: TokenOutput) -> int:
    """Prompt tokens of a request that came from the server's prefix cache."""
    return int(output.extra_fields.get("num_cached_tokens") or 0)


class MeteredManager(AgentLoopManagerTQ):
    """Starts our workers; ``actor_rollout_ref.rollout.agent.agent_loop_manager_class`` names it."""

    worker_class: type = MeteredWorker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # verl's constructor sets its own worker class; workers are started later, by ``create``.
        self.agent_loop_workers_class = ray.remote(self.worker_class)

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Send prompts to the workers; overrides verl's, which sends columns of the user's that nobody reads too."""
        if not sends_all(self.config):
            prompts = prompts.select(*sent(prompts.keys()))
        super().generate_sequences(prompts)

    def take_tokens(self) -> dict[str, int]:
        """Tokens of all workers' requests since the last call: ``generated``, ``prefilled``, ``cached``."""
        counts = self._ask("take_tokens")
        return {name: sum(count[name] for count in counts) for name in counts[0]}

    def take_failures(self) -> Counter[str]:
        """How often what failed in all workers since the last call; keys as ``cause_of`` makes them."""
        return sum(map(Counter, self._ask("take_failures")), Counter())

    def _ask(self, method: str) -> list[dict[str, int]]:
        workers: list[Any] = self.agent_loop_workers
        return ray.get([getattr(worker, method).remote() for worker in workers], timeout=_ANSWER_S)


class SkpoAgentLoopManager(MeteredManager):
    """The manager of the two SKPO phases."""

    worker_class = SkpoAgentLoopWorker
