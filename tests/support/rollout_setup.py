"""A rollout worker by its real constructor, and what stands for the processes around it.

Real here: verl's worker with its constructor and ``generate_sequences``, chat template, verl's reward worker with our
reward function.  Instead of a process border: the LLM client is a fake, TransferQueue's two asynchronous puts are
caught, the reward worker lives in this process behind a handle that pickles what it is given.
"""

import asyncio
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.queue import Queue

G, SPLIT, SEED, STEP = 4, 6, 1000, 3
QUESTION, ANSWER = "What is 2 plus 3?", "5"

# ---------------------------------------------------------------- the borders


class RewardHandle:
    """Stands for the Ray handle of verl's reward worker: arguments are copied as Ray would copy them.

    Attributes:
        calls: number of requested rewards.
        raises_at: numbers of the calls that raise.
        hangs: no call ever returns.
    """

    def __init__(self, config: Any) -> None:
        from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

        self.worker = RewardLoopWorker(config)
        self.compute_score = SimpleNamespace(remote=self._compute_score)
        self.calls = 0
        self.raises_at: set[int] = set()
        self.hangs = False

    async def _compute_score(self, data):
        number, self.calls = self.calls, self.calls + 1
        if self.hangs:
            await asyncio.Event().wait()
        if number in self.raises_at:
            raise RuntimeError("the reward function raised")
        return await self.worker.compute_score(pickle.loads(pickle.dumps(data)))


@dataclass
class Setup:
    """One worker with what surrounds it."""

    worker: Any
    llm: Any
    store: Queue
    reward: RewardHandle

    @property
    def tokenizer(self):
        return self.worker.tokenizer

    def tokens(self, text: str, end: str = "</s>") -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids + [self.tokenizer.convert_tokens_to_ids(end)] if end else ids

    def problem_ids(self, question: str = QUESTION) -> list[int]:
        """Tokens of q, straight from the tokenizer's chat template."""
        message = {"role": "user", "content": question}
        return self.tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]

    def upstream(self, question: str = QUESTION) -> list[Any]:
        """Requests under q alone."""
        return [request for request in self.llm.requests if request.prompt_ids == self.problem_ids(question)]

    def downstream(self, question: str = QUESTION) -> list[Any]:
        """Requests under [s, q]."""
        tail = self.problem_ids(question)[1:]
        return [
            request
            for request in self.llm.requests
            if len(request.prompt_ids) > len(tail) + 1 and request.prompt_ids[-len(tail) :] == tail
        ]

    def routed(self, route: str) -> list[Any]:
        """Requests with a routing id."""
        return [request for request in self.llm.requests if request.request_id == route]

    async def roll_out(self, *prompts: dict[str, Any], validate: bool = False) -> None:
        """What verl's manager does with a batch, up to the end of the worker's background tasks."""
        await self.worker.generate_sequences(make_batch(prompts, validate))
        # A hanging prompt must fail the test, not hang it.
        await asyncio.wait_for(asyncio.gather(*self.worker.background_tasks), 20)


def make_prompt(uid: str = "v0000000000", question: str = QUESTION, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"id-{uid}",
        "uid": uid,
        "data_source": "skpo/arithmetic",
        "raw_prompt": [{"role": "user", "content": question}],
        "reward_model": {"style": "rule", "ground_truth": ANSWER},
        "extra_info": {"split": "train", "index": 0, "question": question},
        "index": 0,
        "skpo_split_position": SPLIT,
        "skpo_expected_length": 60,
        "skpo_seed": SEED,
        "skpo_step": STEP,
        **changes,
    }


def make_batch(prompts, validate: bool):
    """A batch as the trainer hands it to verl's manager."""
    from verl.utils import tensordict_utils as tu

    columns: dict[str, Any] = {}
    for name in prompts[0]:
        values = [prompt[name] for prompt in prompts]
        if name.startswith("skpo_"):
            columns[name] = torch.tensor(values)
        else:
            columns[name] = np.empty(len(values), dtype=object)
            columns[name][:] = values
    if validate:  # the trainer adds ours to training prompts only
        columns = {name: value for name, value in columns.items() if not name.startswith("skpo_")}
    batch = tu.get_tensordict(columns)
    tu.assign_non_tensor_data(batch, "global_steps", STEP)
    if validate:
        tu.assign_non_tensor_data(batch, "validate", True)
    return batch


@pytest.fixture
def make_config(compose_config, model_folder):
    def make(*overrides: str, model=model_folder, skpo: dict[str, Any] | None = None):
        config = compose_config(
            "platform=cpu",
            f"actor_rollout_ref.model.path={model}",
            f"skpo.group_size={G}",
            "data.max_prompt_length=96",
            "data.max_response_length=32",
            *overrides,
        )
        for key, value in (skpo or {}).items():  # without composing again
            config.skpo[key] = value
        return config

    return make


@pytest.fixture
def make_worker(make_config, fake_llm, queue: Queue) -> Callable[..., Setup]:
    """Make an ``SkpoAgentLoopWorker`` by its real constructor; ``script`` answers its requests.

    Keyword arguments are settings below ``skpo``.
    """
    from recipe.skpo.rollout.two_phases import SkpoAgentLoopWorker

    def make(script=None, *overrides: str, worker_class=SkpoAgentLoopWorker, model=None, **skpo: Any) -> Setup:
        config = make_config(*overrides, skpo=skpo, **({"model": model} if model else {}))
        llm = fake_llm(script) if script else fake_llm()
        reward = RewardHandle(config)
        worker = worker_class(config, llm, reward_loop_worker_handles=[reward])
        return Setup(worker, llm, queue, reward)

    return make


@pytest.fixture
def baseline(make_worker) -> Callable[..., Setup]:
    """As ``make_worker`` for the worker of the baselines."""
    from recipe.skpo.rollout.worker import RolloutWorker

    def make(script=None, *overrides: str, **skpo: Any) -> Setup:
        return make_worker(script, "method=grpo", *overrides, worker_class=RolloutWorker, **skpo)

    return make


@pytest.fixture
def two_phases(make_worker) -> Callable[..., Setup]:
    """A worker whose upstream and downstream answers are scripted apart, each by its number within the phase.

    The routing id distinguishes the phases; ``own`` completes a candidate.
    """

    def make(upstream=None, downstream=None, *overrides: str, own=None, **options: Any) -> Setup:
        box: list[Setup] = []
        numbers = {"up": itertools.count(), "down": itertools.count()}
        up = upstream or (lambda number: box[0].tokens("abcdefgh", end=""))
        down = downstream or (lambda number: box[0].tokens(f"#### {ANSWER if number % 2 else 6}"))

        def script(request):
            if "-down" in request.request_id:
                return down(next(numbers["down"]))
            if own is not None and request.prompt_ids != box[0].problem_ids():
                return own(request)
            return up(next(numbers["up"]))

        box.append(make_worker(script, *overrides, **options))
        return box[0]

    return make
