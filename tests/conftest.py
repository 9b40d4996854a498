"""What the tests share: a fake LLM client, a tiny real tokenizer, the composed config.

Only the LLM server is faked here, and TransferQueue in ``tests/support/queue.py``. verl's classes, the reward
functions, the chat template and Hydra are real. There are no model weights.
"""

import asyncio
import gc
import inspect
import json
import pickle
import random
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

pytest_plugins = ("tests.support.queue", "tests.support.rollout_setup")

# Hundreds of thousands of objects of imported packages would be looked through again and again.
gc.set_threshold(100_000, 50, 50)

# ---------------------------------------------------------------- the LLM server


@dataclass(frozen=True)
class Request:
    """One call of ``generate``.

    Attributes:
        number: running number of the call, from 0.
        request_id: the routing id.
        prompt_ids: as they arrived.
        params: the sampling parameters as they arrived, before the server took keys out.
        given: the caller's own dictionary, emptied by now.
        priority: what a queueing server admits first, lowest first; None for a request without one.
    """

    number: int
    request_id: str
    prompt_ids: list[int]
    params: dict[str, Any]
    given: dict[str, Any]
    priority: int | None = None


Answer = Any
"""Token ids, or (token ids, log-probs), or a whole TokenOutput, or an exception that is raised."""


class FakeLLMClient:
    """``verl.workers.rollout.llm_server.LLMServerClient`` without a server: same ``generate``, scripted answers.

    Like the server it cuts an answer at ``max_tokens``, empties the sampling parameters it is given, and sends the
    weight version and the number of cached prompt tokens along.

    Args:
        script: what to answer to a request, at once or later.
        response_length: longest answer to a request without ``max_tokens``.
    """

    def __init__(self, script: Callable[[Request], Answer | Awaitable[Answer]], response_length: int = 32) -> None:
        self.script = script
        self.response_length = response_length
        self.requests: list[Request] = []

    async def generate(
        self,
        request_id,
        *,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
        audio_data: list[Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        from verl.workers.rollout.replica import TokenOutput

        asked, priority = dict(sampling_params), kwargs.get("priority")
        request = Request(len(self.requests), request_id, list(prompt_ids), asked, sampling_params, priority)
        self.requests.append(request)
        sampling_params.clear()
        await asyncio.sleep(0)
        answer = self.script(request)
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, TokenOutput):
            return answer
        token_ids, logprobs = answer if isinstance(answer, tuple) else (answer, [-0.5] * len(answer))
        limit = request.params.get("max_tokens", self.response_length)
        return TokenOutput(
            token_ids=list(token_ids)[:limit],
            log_probs=list(logprobs)[:limit],
            stop_reason="completed",
            num_preempted=0,
            extra_fields={
                "global_steps": 7,
                "min_global_steps": 7,
                "max_global_steps": 7,
                "num_cached_tokens": min(16, len(request.prompt_ids)),
            },
        )


def seeded_answer(request: Request) -> tuple[list[int], list[float]]:
    """A script: 1 to 40 random byte tokens, the same for the same prompt and seed."""
    rng = random.Random(f"{request.params.get('seed')} {request.prompt_ids}")
    length = rng.randint(1, 40)
    return [rng.randrange(N_SPECIAL, N_SPECIAL + 256) for _ in range(length)], [
        -3 * rng.random() for _ in range(length)
    ]


@pytest.fixture
def fake_llm() -> Callable[..., FakeLLMClient]:
    """Make a fake LLM client; without a script its answers are random and depend on prompt and seed."""

    def make(script: Callable[[Request], Any] = seeded_answer, **options: Any) -> FakeLLMClient:
        return FakeLLMClient(script, **options)

    return make


# ---------------------------------------------------------------- tokenizer

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
N_SPECIAL = len(SPECIAL_TOKENS)
"""One token per byte follows the special ones, so that every text comes back as it was."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(bos: str | None = None):
    """A byte-level tokenizer of 261 tokens.

    Args:
        bos: its BOS.  ``<s>`` behaves as Llama's: template and tokenizer both add it.  ``<|im_start|>`` behaves as
            SmolLM2's: it is called BOS, yet nothing adds it and every turn starts with it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    names = {"pad_token": "<pad>", "eos_token": "</s>"}
    template = CHAT_TEMPLATE
    if bos is not None:
        names["bos_token"] = bos
    if bos == "<s>":
        template = "{{ bos_token }}" + template
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def _write_model_folder(folder: Path, bos: str | None) -> Path:
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    tokenizer = build_tokenizer(bos)
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    # As good as weights for whoever reads their header.
    save_file({"model.norm.weight": torch.ones(16)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with one weight; its tokenizer has no BOS.  Two tokens end a response: </s>, <|im_end|>."""
    return _write_model_folder(tmp_path_factory.mktemp("model"), bos=None)


@pytest.fixture(scope="session")
def bos_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``model_folder``, with a BOS that the chat template and the tokenizer each add."""
    return _write_model_folder(tmp_path_factory.mktemp("bos_model"), bos="<s>")


@pytest.fixture(scope="session")
def chatml_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``model_folder``, with a "BOS" that is the mark of a turn, as in SmolLM2."""
    return _write_model_folder(tmp_path_factory.mktemp("chatml_model"), bos="<|im_start|>")


# ---------------------------------------------------------------- config

CHOICES = {
    "platform": "cpu",
    "method": "skpo",
    "preset": "paper",
    "model": "smollm2_135m",
    "data": "files",
    "budget": "steps",
    "model_engine": "dp",
}
COMMAND = {"hydra": {"overrides": {"task": []}, "runtime": {"choices": CHOICES}}}
"""What Hydra has noted of the command line."""


@pytest.fixture(scope="session", autouse=True)
def hydra_composes_once() -> Iterator[None]:
    """Let Hydra keep what it parses and composes."""
    from tests.support import fast_hydra

    with pytest.MonkeyPatch.context() as patch:
        fast_hydra.install(patch, str(REPOSITORY))
        yield


@pytest.fixture(scope="session", autouse=True)
def prompt_lengths_are_kept_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the project's cache alone."""
    from recipe.skpo.task import prompt_lengths

    kept = tmp_path_factory.mktemp("prompt_lengths")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_lengths, "folder", lambda: kept)
        yield


@cache
def _composed(overrides: Sequence[str]) -> bytes:
    """The composed config, pickled: that is copied 15 times as fast as OmegaConf copies itself."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    import recipe.skpo.main  # noqa: F401  registers the resolvers

    with initialize_config_dir(str(REPOSITORY / "recipe/skpo/config"), version_base=None):
        config = compose("skpo_trainer", overrides=list(overrides), return_hydra_config=True)
    # As hydra.main does: ${hydra:...} is answered by the singleton, and the job's config has no hydra node.
    singleton = HydraConfig.instance()
    before, singleton.cfg = singleton.cfg, None
    try:
        singleton.set_config(config)
        with open_dict(config):
            del config["hydra"]
        OmegaConf.resolve(config)
    finally:
        singleton.cfg = before
    return pickle.dumps(config)


@pytest.fixture(scope="session")
def compose_config() -> Callable[..., Any]:
    """Compose the recipe's config under Hydra overrides and resolve it; every call gives a copy of its own."""

    def compose_with(*overrides: str):
        return pickle.loads(_composed(overrides))

    return compose_with


@dataclass(frozen=True)
class Launched:
    """What came of a command line: its message where it was refused, else the config that was launched."""

    message: str | None = None
    config: Any = None


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Launched]:
    """Run ``python -m recipe.skpo.main`` in this process, up to its launch, without files of data and model."""
    from hydra.core.global_hydra import GlobalHydra

    from recipe.skpo import main

    def run(*arguments: str, platform: str = "cpu") -> Launched:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SKPO_PLATFORM", platform)
        monkeypatch.delenv("NOT_SET_HERE", raising=False)
        quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        # An imported module has no config folder beside it, as far as Hydra is concerned.
        folder = ["--config-path", str(REPOSITORY / "recipe/skpo/config")]
        monkeypatch.setattr(sys, "argv", ["main", *arguments, *quiet, *folder])
        launched: list[Any] = []
        machine = ("check_packages", "check_machine", "check_memory", "check_room", "apply_platform")
        for step in (*machine, "prepare_data", "prepare_model", "check_model", "check_prompt_lengths"):
            monkeypatch.setattr(main, step, lambda *arguments: None)
        if arguments != ("data=files",):  # the data are not there
            monkeypatch.setattr(main, "check_data", lambda config: None)
        monkeypatch.setattr(main, "fingerprint", lambda config: SimpleNamespace(write=lambda folder: None))
        monkeypatch.setattr(main, "launch", lambda config, done: launched.append(config))
        monkeypatch.setattr(main, "report", lambda folder, minutes=None: None)
        try:
            main.main()
        except SystemExit as error:
            assert error.code == 0 or isinstance(error.code, str), "Hydra printed a traceback"
            return Launched(message=error.code or None)
        finally:
            GlobalHydra.instance().clear()
        return Launched(config=launched[0] if launched else None)

    return run


# ---------------------------------------------------------------- checkpoints


def write_checkpoint(folder: Path, state: Any = None, ranks: int = 1) -> Path:
    """A checkpoint folder with every piece of a whole one, without weights; returns it.

    Args:
        folder: ``.../global_step_N``.
        state: the SKPO state in it; that of a run with the default settings and nothing visited if None.
        ranks: processes of the actor that saved it.
    """
    import torch

    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.trainer.checkpoints import ACTOR_FILES, DATA_FILE
    from recipe.skpo.trainer.state import SkpoState

    (state or SkpoState(SkpoSettings(), 64)).save(folder)
    (folder / "actor").mkdir(exist_ok=True)
    for start in ACTOR_FILES.values():
        for rank in range(ranks):
            torch.save({}, folder / "actor" / f"{start}_world_size_{ranks}_rank_{rank}.pt")
    torch.save({}, folder / DATA_FILE)
    return folder


@pytest.fixture(scope="session")
def trained(preloaded, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint of step 3 from two ranks, and ``reference``, the weights that went into it."""
    folder = tmp_path_factory.mktemp("trained")
    actor = folder / "run/checkpoints/global_step_3/actor"
    actor.mkdir(parents=True)
    paths = (model_folder, actor, folder / "reference")
    preloaded.run_ranks("tests.support.fsdp_checkpoint", tuple(map(str, paths)))
    (folder / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("3")
    return folder


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the folder ``run`` of ``trained`` that may be broken."""
    return shutil.copytree(trained / "run", tmp_path / "run")


THINKING_TEMPLATE = (
    CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}[no]{% else %}[think]{% endif %}"
)


def thinking_run(folder: Path, model: Path, reward: dict[str, Any] | None = None) -> Path:
    """A run's folder whose template reads ``enable_thinking``, with a whole model as checkpoint of step 3."""
    described = folder / "checkpoints/global_step_3/actor/huggingface"
    shutil.copytree(model, described)
    (described.parent / "fsdp_config.json").write_text('{"world_size": 1}')
    (folder / "checkpoints/latest_checkpointed_iteration.txt").write_text("3")
    ours = {"path": "pkg://reward_fns", "name": "compute_score", "reward_kwargs": {"answer_format": "boxed"}}
    config = {
        "skpo": {},
        "actor_rollout_ref": {"model": {"custom_chat_template": THINKING_TEMPLATE}},
        "data": {"apply_chat_template_kwargs": {"enable_thinking": False}},
        "reward": {"custom_reward_function": reward or ours},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def move_checkpoints(run: Path, elsewhere: Path) -> None:
    """Let the checkpoints of a run lie elsewhere, as ``trainer.default_local_dir`` does."""
    (run / "checkpoints").rename(elsewhere)
    config = json.loads((run / "config.yaml").read_text())
    config["output_dir"], config.setdefault("trainer", {})["default_local_dir"] = str(run), str(elsewhere)
    (run / "config.yaml").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def preloaded() -> Any:
    """Run scripts in processes of their own that have the heavy packages imported."""
    from tests.support.preloaded import Preloaded

    return Preloaded()
