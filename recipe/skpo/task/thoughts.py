"""Where a response's thought ends, found from its prompt and tokens.

verl decodes a response without special tokens and without its prompt. That text misses a mark that is a special token
(gpt-oss, Mistral, Cohere) or that the chat template puts at the end of the prompt (DeepSeek-R1, Qwen3-Thinking). So the
part that counts is found here and passed to the reward in `extra_info`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from reward_fns import OUR_REWARD, check_options
from reward_fns.thoughts import AFTER_THOUGHT, Marks, read_marks

_PROMPT_END = 24
"""Tokens at the end of a prompt that may hold an opening mark."""


def configured_marks(path: str | None, reward_kwargs: Mapping[str, Any] | None) -> Marks | None:
    """Return the marks of a reward function's settings; functions of the user's own have no such option: known marks.

    Raises:
        ValueError: an unknown option of our function, or an unknown value.
    """
    options = dict(reward_kwargs or {}) if path == OUR_REWARD else {}
    check_options(**options)
    return read_marks(options.get("thought_marks", "auto"))


class ThoughtReader:
    """Finds what follows the last thought of a response.

    Args:
        tokenizer: of the model.
        marks: of a thought; None finds no thought.
    """

    def __init__(self, tokenizer: Any, marks: Marks | None) -> None:
        """Find the tokenizer's special tokens."""
        self._tokenizer, self._marks = tokenizer, marks
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self._dropped = marks is not None and any(map(marks.consist_of, special))

    def extra_info(
        self, extra_info: Mapping[str, Any] | None, prompt_ids: Sequence[int], response_ids: Sequence[int]
    ) -> dict[str, Any]:
        """Add the part of the response that counts to a row's `extra_info`, if its text alone does not show it.

        Args:
            extra_info: as in the data.
            prompt_ids: tokens that the response continues; an open thought in the s of [s, q] is closed by q's turn.
            response_ids: tokens of the response.
        """
        kept = {key: value for key, value in (extra_info or {}).items() if key != AFTER_THOUGHT}
        part = self._after_thought(prompt_ids, response_ids)
        return kept if part is None else {**kept, AFTER_THOUGHT: part}

    def _after_thought(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str | None:
        """Return that part; None if the response's text shows it, or without a thought."""
        if self._marks is None:
            return None
        opened = self._marks.opened_by(self._decode(prompt_ids[-_PROMPT_END:]))
        if opened is None and not self._dropped:
            return None
        text = self._decode(response_ids)
        start = self._marks.answer_start(text, opened)
        if start is None:
            return ""
        return self._special.sub("", text[start:]) if start else None

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))
