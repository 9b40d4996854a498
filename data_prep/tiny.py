"""A Llama of a million parameters that two CPU cores pretrain in a few minutes: ``model=tiny``.

It has learned the task of `data_prep.steps` in part, so that reinforcement learning finds right and wrong answers. Its
tokens are bytes, so that it reads any text. A part of the pretraining documents are skip prompts [s, q] as SKPO builds
them: BOS, the beginning s of a solution, which may be wrong, and then the problem. Without them the first [s, q] of a
training run would be a kind of text that the model has never seen.

    python -m data_prep.tiny --out DIR [--seed S] [--documents N]
"""

import argparse
import hashlib
import json
import math
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep import steps
from data_prep.command import run
from data_prep.model_folder import ModelError, make_once
from data_prep.schema import progress

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, "<|system|>", USER, ASSISTANT)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT_TOKENS = 8192
DISK_BYTES = 50_000_000
WARM_UP = 40
"""Updates over which the learning rate rises."""
MEASURED = 640
"""Documents over which the accuracy is averaged."""
THREADS = 1
"""Of the pretraining: equal processors make equal models, however many they are, and other jobs slow it down less."""
VERSION = 2
"""To be raised when the same settings make another model."""


@dataclass(frozen=True)
class Settings:
    """What the model depends on.

    Attributes:
        seed: of weights and documents.
        accuracy: where to stop: the share of right answers at temperature 1.
        documents: number of solutions to learn from at most; with 0 the weights stay random.
        batch: documents of an update.
        learning_rate: after the first 40 updates, over which it rises.
        width, feed_forward, layers, heads: of the Llama; vLLM's CPU attention takes heads of 32, 64 or more.
        skip_share: share of the documents that are skip prompts.
        wrong_share: share of those whose segment comes from a solution with a wrong total.
    """

    seed: int = 1
    accuracy: float = 0.4
    documents: int = 128_000
    batch: int = 64
    learning_rate: float = 3e-3
    width: int = 128
    feed_forward: int = 512
    layers: int = 4
    heads: int = 2
    skip_share: float = 0.3
    wrong_share: float = 0.5


def folder_name(settings: Settings | None = None) -> str:
    """Return the name of the model's folder in the cache: other settings, other folder."""
    described = json.dumps([VERSION, asdict(settings or Settings())], sort_keys=True)
    return f"tiny-{hashlib.sha256(described.encode()).hexdigest()[:8]}"


def prepare(out: Path, settings: Settings | None = None) -> Path:
    """Make the model in `out` and return `out`; a finished one is reused at once.

    Concurrent processes wait for one another.

    Raises:
        ModelError: `out` is something else, or fewer documents than an update takes.
    """
    settings = settings or Settings()
    if settings.documents and settings.documents < settings.batch:
        raise ModelError(f"--documents {settings.documents}: must be 0, or {settings.batch} or more")
    return make_once(out, partial(write, settings), DISK_BYTES)


def write(settings: Settings, folder: Path) -> None:
    """Pretrain, and write model, tokenizer and chat template into the existing `folder`."""
    import torch
    from transformers.utils import logging

    started, threads = time.monotonic(), torch.get_num_threads()
    tokenizer = build_tokenizer()
    torch.set_num_threads(THREADS)
    try:
        # The caller's generator is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = build_model(tokenizer, settings)
            if settings.documents:
                print("pretraining the tiny model, once", flush=True)
                accuracy = pretrain(model, tokenizer, settings)
                print(f"  sampled answers are right in {accuracy:.0%}, {time.monotonic() - started:.0f} s")
    finally:
        torch.set_num_threads(threads)
    tokenizer.save_pretrained(folder)
    logging.disable_progress_bar()  # of a write that takes milliseconds
    model.save_pretrained(folder)
    logging.enable_progress_bar()


# ---------------------------------------------------------------- tokenizer and model


def build_tokenizer() -> Any:
    """Return the tokenizer: a token per byte, and SPECIAL_TOKENS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_TOKENS,
    )


def build_model(tokenizer: Any, settings: Settings) -> Any:
    """Return the Llama with random weights, in float32."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        dtype=torch.float32,
        **ids,
    )
    model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(**ids)
    return model


# ---------------------------------------------------------------- pretraining


def documents(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield prompt and solution forever; some prompts are skip prompts."""
    rng = random.Random(settings.seed)
    for expression in steps.draw("pretraining", rng):
        totals = expression.totals()
        solution = steps.solution(totals, expression) + EOS
        segment = ""
        if rng.random() < settings.skip_share:
            source = solution
            if rng.random() < settings.wrong_share:
                source = steps.solution(mistaken(totals, rng), expression)
            # In bytes, as SKPO cuts: from a sixth to half of the response, whose end is a token.
            length = len(solution) - len(EOS) + 1
            segment = source[: rng.randint(math.ceil(length / 6), length // 2)]
        yield f"{BOS}{segment}{USER}{steps.question(expression)}{ASSISTANT}", solution


def mistaken(totals: Sequence[int], rng: random.Random) -> list[int]:
    """Return running totals that are wrong from one operation on, by a unit, two or ten; none is negative."""
    first = rng.randrange(1, len(totals))
    error = rng.choice((-10, -2, -1, 1, 2, 10))
    if min(totals[first:]) + error < 0:
        error = -error
    return [*totals[:first], *(total + error for total in totals[first:])]


def pretrain(model: Any, tokenizer: Any, settings: Settings) -> float:
    """Train the model on documents, for their solutions alone, until it is as good as it should be.

    A solution is written at temperature 1 with the probability exp(-its loss), and no document was seen before: the
    mean over the last documents estimates the accuracy of sampled answers without sampling any.

    Returns:
        That estimate; NaN without an update.
    """
    import torch

    updates, stream = settings.documents // settings.batch, documents(settings)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98), fused=True)
    recent: deque[float] = deque(maxlen=math.ceil(MEASURED / settings.batch))
    accuracy = math.nan
    model.train()
    with progress(updates, "updates of the pretraining, at most") as bar:
        for update in range(updates):
            optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, (update + 1) / WARM_UP)
            ids, targets = encode(tokenizer, list(islice(stream, settings.batch)))
            logits = model(input_ids=ids, use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, targets[:, 1:], reduction="none")
            recent.append(losses.detach().sum(-1).neg().exp().mean().item())
            accuracy = sum(recent) / len(recent)
            if len(recent) == recent.maxlen and accuracy >= settings.accuracy:
                break
            optimizer.zero_grad()
            (losses.sum() / (targets != -100).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix(accuracy=f"{accuracy:.3f}", refresh=False)
            bar.update()
    model.eval()
    return accuracy


def encode(tokenizer: Any, batch: Sequence[tuple[str, str]]) -> tuple[Any, Any]:
    """Tokenise prompts and solutions.

    Returns:
        Token ids and targets, int64 (documents, tokens), padded on the right; the target is -100 outside solutions.
    """
    import torch

    prompts, solutions = (
        tokenizer(list(texts), add_special_tokens=False).input_ids for texts in zip(*batch, strict=True)
    )
    width = max(len(prompt) + len(solution) for prompt, solution in zip(prompts, solutions, strict=True))
    ids = torch.full((len(batch), width), tokenizer.pad_token_id)
    targets = torch.full((len(batch), width), -100)
    for row, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        end = len(prompt) + len(solution)
        ids[row, :end] = torch.tensor(prompt + solution)
        targets[row, len(prompt) : end] = torch.tensor(solution)
    return ids, targets


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 with one line on stderr if the model cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.tiny", description="The policy of model=tiny.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; reused if finished")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="default %(default)s")
    parser.add_argument("--documents", type=int, default=Settings.documents, help="default %(default)s")
    given = parser.parse_args(argv)
    return run(lambda: print(prepare(given.out, Settings(seed=given.seed, documents=given.documents))))


if __name__ == "__main__":
    sys.exit(main())
