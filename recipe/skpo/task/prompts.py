"""A problem's tokens under a tokenizer: the templated prompt, and the BOS it starts with.

Rollout, evaluation and analyses see the same tokens of q: the chat template is rendered as text and tokenised without
special tokens of its own, because the template brings them.
"""

from collections.abc import Mapping, Sequence
from typing import Any


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
