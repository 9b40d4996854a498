"""SKPO's rollout worker: one coroutine per prompt, from q to its G + 1 stored rows.

Paper section 3; docs/method.md, sections 1 to 4 and 12.  Per prompt: G candidates of at most t_q tokens under q; the
median one is kept as s; G responses under [s, q]; their rewards while others still generate; then the rows are stored.
No prompt waits for another one.  All requests of a phase carry one routing id, so that they share a replica's prefix
cache; those of the longest prompts go first.  A failed request is not retried: the rest of the group is enough, and
the same seed would fail the same way.  Validation is verl's own path, plain pi(.|q).
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
from verl.workers.rollout.replica import TokenOutput

from recipe.skpo.method.rows import (
    DOWNSTREAM,
    LENGTH_FIELD,
    PHASE_FIELD,
    RECORD,
    REWARD_TAG,
    SEED_FIELD,
    SPLIT_FIELD,
    STEP_FIELD,
    TRAINED_TAG,
    UPSTREAM,
    CandidateRecord,
    RolloutRecord,
    RowKey,
    TokenCounts,
)
from recipe.skpo.method.segments import Segment, begins_with, cut_segment, last_boundary, select_segment, skip_prompt
from recipe.skpo.rollout.admission import Clock
from recipe.skpo.rollout.client import CLOCK, cached_tokens
from recipe.skpo.rollout.failures import RolloutError, cause_of
from recipe.skpo.rollout.worker import RolloutWorker
from recipe.skpo.task.prompts import automatic_bos

logger = logging.getLogger(__name__)


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


class SkpoAgentLoopWorker(RolloutWorker):
    """verl's rollout worker with the two phases of SKPO instead of n independent samples."""

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
                CLOCK.set(Clock(bound, self.settings.prompt_timeout_s))
                rows = await self._roll_out(prompt, sampling_params)
            # Outside the time-out and at once: half of a prompt's rows must never be stored.
            keys, fields, tags = zip(*(self._stored(output, fields) for output, fields in rows), strict=True)
            columns = list_of_dict_to_tensordict(fields)
            await tq.async_kv_batch_put(keys=list(keys), partition_id="train", fields=columns, tags=list(tags))
            status = "finished"
        except Exception as error:  # process border: verl must learn of every prompt's end, or its replay buffer waits
            self.failures[cause_of("prompt", error)] += 1
            logger.exception("prompt %s (%s) is dropped", prompt.get("id"), uid)
            status = "failure"
        await tq.async_kv_put(key=uid, partition_id="train", tag={"status": status})

    def _stored(self, output: AgentLoopOutput, fields: dict) -> tuple[str, dict, dict]:
        """Return key, fields and tag of a row, as verl's ``_agent_loop_postprocess`` stores it, with two tags more."""
        row = output.as_dict() | fields
        row.pop("multi_modal_data", None)
        ids = torch.cat([row["prompts"], row["responses"]])
        inputs = self._compute_multi_modal_inputs(output, ids)
        positions = self._compute_position_ids(ids[None], torch.ones_like(ids)[None], inputs)[0]
        row |= {"loss_mask": row["response_mask"], "input_ids": ids, "position_ids": positions}
        row["multi_modal_inputs"] = inputs
        tag = {
            "status": "success",
            "prompt_len": len(row["prompts"]),
            "response_len": len(row["responses"]),
            "seq_len": len(ids),
            "global_steps": row["global_steps"],
            **{name: row["extra_fields"].get(name) for name in ("min_global_steps", "max_global_steps")},
            REWARD_TAG: output.reward_score,
            TRAINED_TAG: sum(output.response_mask),
        }
        return str(RowKey(row["uid"], row["session_id"], 0)), row, tag

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
        segment = candidates[chosen].segment.token_ids
        copies = [begins_with(response.response_ids[opened:], segment) for response in responses]
        written = len(scored[0].response_ids) - len(candidates[chosen].output.token_ids) if completed else 0
        copied_share = sum(copies) / len(copies)
        upstream = self._segment_row(problem_ids, candidates, chosen, split_position, times, written, copied_share)
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
        """Return the prompt that the siblings continue (docs/method.md, sections 4 and 12)."""
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
        """Sample upstream candidates of at most t_q tokens each and cut them; failed ones are dropped."""
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
        record = TokenCounts(len(output.token_ids), len(skip.request_ids), cached_tokens(output))
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
        """Complete the candidate's own response to q and compute its reward; it is not trained."""
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
        """Build verl's output record; all rows set the same fields, as one TransferQueue partition needs."""
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
        copied_share: float,
    ) -> AgentLoopOutput:
        """Build the upstream row, with the record of the prompt from which metrics and rollout trees are made.

        ``seconds``: of both phases; ``written``: tokens that completed the chosen candidate's own response;
        ``copied_share``: of the prompt's responses.
        """
        segment = candidates[chosen].segment
        looks_for_boundaries = self.settings.split == "boundary_token"
        record = RolloutRecord(
            generated=sum(len(candidate.output.token_ids) for candidate in candidates) + written,
            prefilled=len(problem_ids) * len(candidates),
            cached=sum(cached_tokens(candidate.output) for candidate in candidates),
            split_position=split_position,
            candidates=tuple(
                CandidateRecord(
                    token_ids=np.array(candidate.output.token_ids, dtype=np.int32),
                    kept=len(candidate.segment.token_ids),
                    deviation=candidate.segment.deviation,
                    ended_early=candidate.ended_early,
                    at_boundary=candidate.segment.at_boundary if looks_for_boundaries else None,
                )
                for candidate in candidates
            ),
            chosen=chosen,
            seconds=seconds[0],
            downstream_seconds=seconds[1],
            copied_share=copied_share,
        )
        fields = candidates[chosen].output.extra_fields | {RECORD: record}
        row = self._row(problem_ids, list(segment.token_ids), list(segment.logprobs), fields)
        row.extra_fields["reward_extra_info"] = {}
        return row

    def _missing_sibling(self, skip_ids: list[int], sibling: AgentLoopOutput) -> AgentLoopOutput:
        """Build a row of one untrained token for a failed sibling: verl expects G + 1 rows per prompt."""
        fields = {key: sibling.extra_fields.get(key) for key in ("min_global_steps", "max_global_steps")}
        row = self._row(skip_ids, [self.tokenizer.eos_token_id], [0.0], fields | {RECORD: None})
        row.response_mask = [0]
        row.reward_score = 0.0
        row.extra_fields["reward_extra_info"] = {}
        return row
