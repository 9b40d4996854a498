r"""Find the final answer in a response: in ``\boxed{}``, after ``####``, or in a statement "the answer is ...".

The last occurrence of each form counts; docs/rewards.md has the rules. A ``\boxed{`` that is never closed is not an
answer: the response was cut, and an earlier box may be an intermediate step. All functions are linear in the text and
return "" if there is no answer.
"""

import re
from typing import Literal, get_args

AnswerFormat = Literal["any", "boxed", "gsm8k", "line"]
"""`any`: the later one of boxed and gsm8k ("####"), else a statement, else a bold last line. The others are strict."""

OLD_FORMATS = {"hash": "gsm8k"}
"""Former names, accepted for one release."""

HASH = "####"
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
"""Braces of LaTeX, and escaped characters."""
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])[ \t]*")
_UNBRACED = re.compile(r"[^\s$]*")
_HASH_LINE = re.compile(r"#{4,}([^\n]*)")
_HEADING = re.compile(r"[^\w\\$(]*(?:[0-9]{1,2}[.):]\s+)?[A-Z][a-z]{2,}")
_EMPHASIS = re.compile(r"(\*{1,3})([^*]+)\1")

# Between boxes that form one list: "and", "or", a comma, "x =", and what typesets them.
_JOINED = re.compile(
    r"(?:[\s$,;&]|\\[()\[\],;: !\\]|\\q?quad|\\(?:text|mbox|textrm|mathrm)\s*\{\s*(?:and|or)\s*\}"
    r"|\b(?:and|or)\b|[a-zA-Z](?:_\{?[0-9a-zA-Z]{1,3}\}?)?\s*=)*+"
)
_SEPARATOR = re.compile(r"[,;&]|quad|\b(?:and|or)\b")
_LONGEST_JOIN = 60
_LONGEST_LIST = 20

_NOUN = r"(?:answers?|(?:correct|right|best)[ \t]+(?:option|choice))"
_CUE = re.compile(
    # "Answer: 5", "**Answer**: 5", "The final answer to this problem is: 5", "answer = 5", "Ans: 5", "<answer>5"
    rf"(?<![a-z])(?:{_NOUN}[*_\"']{{0,3}}(?:[ \t]*[:：=]"
    r"|(?:,[^,.:\n]{1,40},|[ \t]+(?:to|for|of|in|here|we|that we|choice|option)\b[^.:\n]{0,80}?)?"
    r"[ \t*_]+(?:(?P<denied>(?:is|are)n['’]t|can(?:not|['’]t) be)|is|are|equals"
    r"|(?P<weak>(?:must|should|will|would) be|(?:comes|turns) out to be))\b[*_]{0,3}[ \t]*[:：]?)"
    r"|ans\.?[ \t]*[:：=]|<answer>)"
    # a heading "Final Answer" alone on its line
    r"|^[ \t#*_]*(?:(?:the|my)[ \t]+)?(?:(?:final|correct)[ \t]+)?answers?[ \t*_]*$",
    re.IGNORECASE | re.MULTILINE,
)
_LONGEST_STATEMENT = 600
_LONGEST_PREFACE = 100
# Typesetting before an answer that stands on a line of its own.
_LEAD = re.compile(r"(?:\n[ \t]*[-•][ \t]|[\s*_`]|\$\$(?=\s)|\\\[(?=\s)|-{3,}\s)*+")
_FILLER = re.compile(
    r"(?:(?:therefore|thus|then|hence|so|simply|just|indeed|clearly|actually|probably|most likely|likely|exactly|about"
    r"|approximately|roughly|given by|equal to|found to be|going to be)\b[\s,:*_]*+)*+",
    re.IGNORECASE,
)
_ABBREVIATED = r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bNo)"
_SENTENCE_END = re.compile(
    rf"\$[^$\n]*\$|\\\((?:[^\\]|\\(?!\)))*\\\)"
    rf"|({_ABBREVIATED}[.!?][*_)\"'”]*(?=\s+[A-Z(*])|[.,]?\s*I hope it is correct)"
)
_CLAUSE = re.compile(
    r",\s*(?:but\s+)?not\b|,?\s+(?:because|since|which|(?<=,\s)as\b|as (?:shown|required|desired|expected|stated))\b"
)
_DENIED = re.compile(r"(?:definitely |certainly |clearly |surely )?(?:not|never|wrong|incorrect)\b\s*", re.IGNORECASE)
_OWNER = r"(?:\s+(?:the|my|our|your))?"
_ADJECTIVE = r"(?:\s+(?:final|correct|right|numerical))*\s*\Z"
# "if the answer is 5", "this answer is short": nothing is stated.
_IDLE = re.compile(
    rf"\b(?:(?:if|whether|unless|suppose|assume|assuming)(?:\s+that)?{_OWNER}"
    rf"|this|that|each|any|every|an|another|such){_ADJECTIVE}",
    re.IGNORECASE,
)
# "not the answer: 5", "I don't think that the answer is 5", "a wrong answer is 5"
_DOUBT = re.compile(
    rf"(?:\b(?:not|wrong|incorrect|false|tempting|na[iï]ve)|(?:\bdoubt|\bunlikely|\bnot (?:think|believe|true|say)"
    rf"|n['’]t (?:think|believe|say))(?:\s+that)?){_OWNER}{_ADJECTIVE}",
    re.IGNORECASE,
)
_JUDGED = re.compile(r"(?:correct|right|valid|reasonable|consistent)\b|\Z")
_COMMENT = re.compile(
    r"(?:correct|right|reasonable|clear|obvious|valid|consistent|verified|confirmed|below|above|unique|known|found"
    r"|obtained|supported|based|in|as follows|wrong|incorrect)\b"
)
# "the answer must be" counts only before a number, mathematics or an option.
_VALUE = re.compile(r"[-+]?[$\\(\[€£]*[-+]?(?:[0-9.\\]|[a-zA-J](?![a-zA-Z ]))")
_CONDITION = re.compile(r"\b(?:if|unless|otherwise|without|had|instead)\b", re.IGNORECASE)
_PROSE = re.compile(r"[a-z]{2,}(?:[\s,'-]+[a-zA-Z]+){4,}+[^0-9\\$]*")


def read_format(name: str) -> str:
    """Return the `AnswerFormat` of a name in a configuration.

    Raises:
        ValueError: the name is unknown.
    """
    name = OLD_FORMATS.get(name, name)
    if name not in get_args(AnswerFormat):
        raise ValueError(
            f"reward.custom_reward_function.reward_kwargs.answer_format: {name!r} is unknown; "
            f"known are {', '.join(get_args(AnswerFormat))}"
        )
    return name


def group_end(text: str, start: int) -> int:
    """Return the position after the brace that closes the one at `start`, -1 if there is none."""
    depth = 0
    for match in BRACES.finditer(text, start):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return match.end()
    return -1


def last_boxed(text: str) -> str:
    r"""Return the content of the last ``\boxed{...}`` or ``\fbox{...}`` with balanced braces; ``\boxed 5`` counts."""
    boxes, _ = _last_boxes(text)
    return boxes[-1] if boxes else ""


def answer_text(text: str, answer_format: str = "any") -> str:
    """Return the final answer as written, stripped; several boxes that form one list are joined by commas."""
    return ", ".join(answer_parts(text, answer_format))


def answer_parts(text: str, answer_format: str = "any") -> list[str]:
    """Return the final answer as written: one text, one per box if several boxes form a list, or none."""
    boxes, box = _last_boxes(text) if answer_format in ("any", "boxed") else ([], -1)
    if answer_format == "boxed":
        return boxes
    if answer_format in ("any", "gsm8k"):
        hashed, mark = _last_hash(text, box)
        if answer_format == "gsm8k":
            return list(filter(None, [hashed]))
        # A box after "####" is the answer; a box before it was an intermediate step.
        if box >= 0 or hashed:
            return boxes if box > mark else list(filter(None, [hashed]))
    stated = _last_statement(text)
    if stated is None and answer_format == "any":
        stated = _bold_line(text)
    return list(filter(None, [stated]))


def _last_boxes(text: str) -> tuple[list[str], int]:
    """Return the contents of the last box and of the boxes that form a list with it, and the start of the last (or -1).

    An incomplete or empty last box is not an answer, even if a complete box stands before it.
    """
    start = _box_before(text, len(text))
    if start < 0:
        return [], -1
    content, _ = _box_at(text, start)
    contents = [content] if content else []
    first = start
    while 0 < len(contents) < _LONGEST_LIST:
        earlier = _box_before(text, first)
        if earlier < 0:
            break
        content, end = _box_at(text, earlier)
        between = text[end:first] if 0 <= end <= first and first - end <= _LONGEST_JOIN else "."
        if not content or not _JOINED.fullmatch(between) or not _SEPARATOR.search(between) or "\n\n" in between:
            break
        contents.insert(0, content)
        first = earlier
    return contents if len(set(contents)) > 1 else contents[:1], start


def _box_before(text: str, end: int) -> int:
    """Return the start of the last box that starts before `end`, or -1."""
    start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
    return start if start >= 0 and _BOX.match(text, start) else -1


def _box_at(text: str, start: int) -> tuple[str, int]:
    """Return the content and the end of the box at `start`; the end is -1 if the box is never closed."""
    match = _BOX.match(text, start)
    assert match is not None
    begin = match.end()
    if not text.startswith("{", begin):
        bare = _UNBRACED.match(text, begin)
        assert bare is not None
        return bare[0], bare.end()
    end = group_end(text, begin)
    content = text[begin + 1 : end - 1].strip() if end > 0 else ""
    emphasised = _EMPHASIS.fullmatch(content)
    return emphasised[2].strip() if emphasised else content, end


def _last_hash(text: str, box: int) -> tuple[str, int]:
    """Return the text after the last "####" that is not a heading, and its place, or -1.

    A heading starts with a word and is followed by text or preceded by a box; `box` is the start of the last box.
    """
    written = len(text.rstrip())
    for match in reversed(list(_HASH_LINE.finditer(text))):
        line = match[1].strip()
        cue = next((cue for cue in _CUE.finditer(line) if cue.end() < len(line)), None)
        if cue is None and _HEADING.match(line) and (match.end() < written or 0 <= box < match.start()):
            continue
        return (_last_statement(line) or "") if cue else _bare(line), match.start()
    return "", -1


def _last_statement(text: str) -> str | None:
    """Return the content of the last statement of an answer; "" if it was cut or taken back, None if there is none.

    A remark of five or more words ("The answer is supported by the fact that ...") counts only if there is no other.
    """
    stated: str | None = None
    remark: str | None = None
    for cue in _CUE.finditer(text):
        preface = text[max(0, cue.start() - _LONGEST_PREFACE) : cue.start()]
        content = _statement(text[cue.end() : cue.end() + _LONGEST_STATEMENT])
        if content is None or _IDLE.search(preface):
            continue
        if cue["weak"] and (_CONDITION.search(preface + content) or not _VALUE.match(content)):
            continue
        denied = _DENIED.match(content)
        if denied or cue["denied"] or _DOUBT.search(preface):
            rest = content[denied.end() :] if denied else content
            if stated and (_JUDGED.match(rest) or re.match(re.escape(stated) + r"(?![0-9a-zA-Z.])", rest)):
                stated = ""
        elif _COMMENT.match(content) or _PROSE.fullmatch(content):
            remark = content
        else:
            stated = content
    return remark if stated is None else stated


def _statement(rest: str) -> str | None:
    """Return the answer after a cue: the rest of its sentence, or of the next line if its own is empty.

    A question returns None.
    """
    lead = _LEAD.match(rest)
    line = rest[lead.end() if lead else 0 :].split("\n", 1)[0].split("</answer>", 1)[0]
    end = next((match for match in _SENTENCE_END.finditer(line) if match[1]), None)
    if (end[1] if end else line.rstrip()[-1:]).startswith("?"):
        return None
    line = _CLAUSE.split(line[: end.start()] if end else line, maxsplit=1)[0]
    filler = _FILLER.match(line)
    return _bare(line[filler.end() if filler else 0 :])


def _bold_line(text: str) -> str | None:
    """Return the content of a last line that is all bold and has at most three words or a digit."""
    line = text.rstrip().rpartition("\n")[2].strip().rstrip(".")
    match = re.fullmatch(r"(\*{2,3}|__)([^*]{1,200})\1", line)
    content = _bare(match[2]) if match else ""
    if not content or content.endswith((":", "?", "!")):
        return None
    return content if len(content.split()) <= 3 or re.search("[0-9]", content) else None


def _bare(line: str) -> str:
    """Strip emphasis and quotes, and the full stop of the sentence."""
    line = line.strip(' \t\r*`"“”')
    return line[:-1].rstrip(' \t*`"“”') if line.endswith(".") else line
