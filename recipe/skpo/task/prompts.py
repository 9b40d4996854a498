"""A problem's tokens under a tokenizer: the templated prompt, and the BOS it starts with.

Rollout, evaluation and analyses see the same tokens of q: the chat template is rendered as text and tokenised without
special tokens of its own, because the template brings them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from recipe.skpo.method.segments import skip_prompt


def automatic_bos(tokenizer: Any) -> int | None:
    """Return the BOS that prompts of this tokenizer start with, or None.

    Only a token that the tokenizer or its chat template puts there as BOS counts: in ChatML models like SmolLM2 the
    "BOS" is ``<|im_start|>``, the mark of a turn, and moving it would break the first turn.
    """
    bos = tokenizer.bos_token_id
    template = str(tokenizer.chat_template or "")
    starts_with_bos = bos is not None and list(tokenizer("").input_ids[:1]) == [bos]
    return bos if starts_with_bos or "bos_token" in template else None


def problem_tokens(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Tokenise a chat with the mark that opens the model's turn."""
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def segment_prompt(
    mode: str,
    segment: Sequence[int],
    problem: Sequence[int],
    messages: Sequence[Mapping[str, str]],
    tokenizer: Any,
    quote: str,
) -> list[int]:
    """Return the prompt that siblings continue in a skip mode (docs/method.md, sections 4 and 12).

    Args:
        mode: one of the choices of ``skpo.skip``.
        segment: tokens of s.
        problem: tokens of q.
        messages: q as a chat.
        tokenizer: with the run's chat template.
        quote: last turn of ``chat``, with {segment} and {problem}.
    """
    if mode == "chat":
        text = tokenizer.decode(list(segment), skip_special_tokens=True)
        content = quote.format(segment=text, problem=messages[-1]["content"])
        return problem_tokens(tokenizer, [*messages[:-1], {**messages[-1], "content": content}])
    if mode == "concat":
        return skip_prompt(segment, problem, automatic_bos(tokenizer))
    return [*problem, *segment] if mode == "continual" else list(problem)
