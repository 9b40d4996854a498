"""What follows the last thought of a response counts, in training, validation and evaluation alike."""

import shutil
import time
from pathlib import Path

import pytest

from recipe.skpo.task.thoughts import ThoughtReader, configured_marks
from reward_fns import OUR_REWARD, compute_score
from reward_fns.thoughts import AFTER_THOUGHT, after_thought, read_marks
from tests.conftest import build_tokenizer
from tests.support.rollout_setup import ANSWER, G, make_prompt

MATH, CHOICE, GSM8K = "math", "TIGER-Lab/MMLU-Pro", "openai/gsm8k"

# ---------------------------------------------------------------- by the response's text

RESPONSES = [
    ("<think>I guess \\boxed{5}. But wait, maybe it is 7, let me redo", None),
    ("<think>I guess \\boxed{7}.</think>\nIt is \\boxed{5}.", " It is \\boxed{5}."),
    ("so far\n<think>a</think> b <think>c</think> d", " d"),
    ("<think>a</think> \\boxed{5} <think>or 7", None),
    ("a thought whose opening is in the prompt </think>\\boxed{5}", "\\boxed{5}"),
    ("</think>a</think>\\boxed{5}", "\\boxed{5}"),
    ("<think>they say [THINK], <think> and [/THINK]", None),
    ("<think>they say [/THINK] and ◁/think▷</think>5", "5"),
    ("<Think>a</Think>5", "5"),
    ("<thinking>a</thinking>5", "5"),
    ("<thought>a</thought>5", "5"),
    ("<reasoning>a</reasoning><answer>5</answer>", "<answer>5</answer>"),
    ("<seed:think>a<seed:cot_budget_reflect></seed:think>5", "5"),
    ("<think:opensource>a</think:opensource>5", "5"),
    ("[THINK]a[/THINK]5", "5"),
    ("[THINK]a", None),
    ("◁think▷a◁/think▷5", "5"),
    ("<|begin_of_thought|>a<|end_of_thought|>5", "5"),
    ("<|START_THINKING|>a<|END_THINKING|>5", "5"),
    ("<|channel>thought\na<channel|>5", "5"),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>5", "<|message|>5"),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>5", None),
    ("<|channel|>final<|message|>5", "<|message|>5"),
    ("<|channel|>final<|message|>5<|end|><|start|>assistant<|channel|>analysis<|message|>or", None),
    ("I think it is 5 < 7 > 3, [think] thought", "I think it is 5 < 7 > 3, [think] thought"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "counts"), RESPONSES)
def test_what_follows_the_last_closing_mark_counts_and_an_open_thought_does_not(text: str, counts: str | None) -> None:
    assert after_thought(text).strip() == (counts or "").strip()


@pytest.mark.parametrize(
    ("source", "answer", "truth"),
    [
        ("skpo/arithmetic", "#### 5", "5"),
        (GSM8K, "\\boxed{5}", "5"),
        (MATH, "The answer is $5$.", "5"),
        ("aime2024", "**5**", "5"),
        (CHOICE, "The answer is (C).", "C"),
    ],
)
def test_every_route_reads_behind_the_thought(source: str, answer: str, truth: str) -> None:
    none = {"score": -1.0, "acc": 0.0, "well_formed": 0.0, "pred": ""}
    assert compute_score(source, f"<think>\n{answer}", truth) == none
    assert compute_score(source, f"<think>\nno\n</think>\n{answer}", truth)["acc"] == 1.0
    # The mark may stand far before the part of the response that is read.
    assert compute_score(source, "<think>" + "x" * 5000 + f"\n{answer}", truth) == none
    assert compute_score(source, "<think>a</think>" + "x" * 5000 + f"\n{answer}", truth)["acc"] == 1.0
    assert compute_score(source, f"<think>\n{answer}", truth, thought_marks="none")["acc"] == 1.0
    assert compute_score(source, f"<think>\n{answer}", truth, {AFTER_THOUGHT: f"so\n{answer}"})["acc"] == 1.0
    assert compute_score(source, answer, truth, {AFTER_THOUGHT: ""}) == none


def test_marks_may_be_a_users_own() -> None:
    assert after_thought("<<a>> 5", ["<<", ">>"]) == " 5"
    assert after_thought("<<a 5", ["<<", ">>"]) == ""
    assert after_thought("<think>a", ["<<", ">>"]) == "<think>a"
    for option in ("off", None, ["<<"], ["<<", "<<"], ["<<", ""], ["<<", 3], 5):
        with pytest.raises(ValueError, match=r"reward_kwargs\.thought_marks: .* is unknown; give auto, none, or the"):
            compute_score(GSM8K, "#### 5", "5", thought_marks=option)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "<think>a</think>", "<|channel|>analysis", "<", "[THINK", "a:"]
)
def test_finding_the_thought_is_linear_in_the_text(piece: str) -> None:
    started = time.process_time()
    after_thought(piece * (2_000_000 // len(piece)))
    assert time.process_time() - started < 2


# ---------------------------------------------------------------- by prompt and tokens

THINKS = "<|im_start|>assistant\n<think>\n"


def reader(*special: str, marks="auto"):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return ThoughtReader(tokenizer, read_marks(marks)), lambda text: tokenizer(text, add_special_tokens=False)[
        "input_ids"
    ]


CHANNELS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>")
HARMONY = "<|channel|>analysis<|message|>7?<|end|><|start|>assistant<|channel|>final<|message|>It is 5.<|return|>"
# (special tokens, end of the prompt, response, the part that counts, None where its text alone tells it)
SEEN = [
    ((), "<|im_start|>assistant\n", "<think>7</think>5", None),
    ((), "Mind <think> tags.<|im_end|>\n<|im_start|>assistant\n", "5", None),
    ((), "assistant\n<think>\n\n</think>\n\n", "5", None),
    ((), THINKS, "7", ""),
    ((), THINKS, "7</think>\n\n5</s>", "\n\n5"),
    ((), THINKS, "7 [/THINK] 5", ""),
    (("<think>", "</think>"), THINKS, "7</think>5</s>", "5"),
    (("[THINK]", "[/THINK]"), "[/INST]", "[THINK]7[/THINK]5</s>", "5"),
    (("[THINK]", "[/THINK]"), "[/INST]", "[THINK]7", ""),
    (("[THINK]", "[/THINK]"), "[/INST]", "5", None),
    (CHANNELS, "<|start|>assistant", HARMONY, "It is 5."),
    (CHANNELS, "<|start|>assistant", HARMONY.partition("final")[0], ""),
    (CHANNELS, "<|start|>assistant<|channel|>analysis<|message|>", "7", ""),
    (("<|channel>", "<channel|>"), "model\n", "<|channel>thought\n7<channel|>5", "5"),
]


@pytest.mark.parametrize(("special", "prompt", "response", "part"), SEEN)
def test_prompt_and_special_tokens_tell_where_the_thought_ends(special, prompt, response, part) -> None:
    thoughts, encode = reader(*special)
    told = thoughts.extra_info({"index": 3, AFTER_THOUGHT: "of the data"}, encode(prompt), encode(response))
    assert told == {"index": 3} | ({} if part is None else {AFTER_THOUGHT: part})


def test_own_marks_that_are_special_tokens_are_seen_and_none_are_if_so_set() -> None:
    thoughts, encode = reader("<a>", "<b>", marks=["<a>note", "<b>"])
    assert thoughts.extra_info(None, encode("?"), encode("<a>note 7<b>5")) == {AFTER_THOUGHT: "5"}
    thoughts, encode = reader("<think>", marks="none")
    assert thoughts.extra_info(None, encode(THINKS), encode("7")) == {}
    assert configured_marks(OUR_REWARD, {"thought_marks": "none"}) is None
    assert configured_marks("mine.py", {"thought_marks": "none"}) == configured_marks(OUR_REWARD, None)


# ---------------------------------------------------------------- through rollout, reward loop and evaluation


@pytest.fixture(scope="module")
def thinking_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """As ``model_folder``, with a chat template that opens a thought, as that of DeepSeek-R1."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("thinking") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")
    tokenizer.save_pretrained(folder)
    return folder


GUESS, DONE = f"#### {ANSWER}", f"6</think>\n#### {ANSWER}"


@pytest.mark.parametrize(
    ("manager", "skip"),
    [("naive", "concat"), ("dapo", "concat"), ("naive", "chat"), ("naive", "continual"), ("naive", "unconditional")],
)
async def test_training_pays_no_guess_in_a_thought_that_the_template_opened(
    two_phases, thinking_folder, manager, skip
) -> None:
    setup = two_phases(
        lambda number: setup.tokens("<think>", end=""),
        lambda number: setup.tokens(DONE if number % 2 else GUESS),
        f"reward.reward_manager.name={manager}",
        "data.max_prompt_length=128",
        "data.max_response_length=64",
        model=thinking_folder,
        skip=skip,
    )
    await setup.roll_out(make_prompt())
    rewards = [float(row["rm_scores"].sum()) for row in setup.store.siblings("v0000000000")]
    assert rewards == [-1.0, 1.0] * (G // 2)
    assert AFTER_THOUGHT not in setup.store.siblings("v0000000000")[0]["extra_info"]


@pytest.mark.parametrize(("response", "reward"), [(GUESS, -1.0), (DONE, 1.0)])
async def test_validation_follows_the_same_rule(make_worker, thinking_folder, response: str, reward: float) -> None:
    setup = make_worker(lambda request: setup.tokens(response), model=thinking_folder)
    await setup.roll_out(make_prompt("val"), validate=True)
    assert float(setup.store.row("val", 0)["rm_scores"].sum()) == reward


@pytest.mark.parametrize(
    ("segment", "skip", "reward"),
    [
        *(("<think>", "continual", -1.0), ("abcdefg", "continual", 1.0)),
        *(("<think>", "concat", 1.0), ("<think>", "chat", 1.0), ("<think>", "unconditional", 1.0)),
    ],
)
async def test_a_thought_that_the_segment_opens_is_open_in_the_response_that_continues_it(
    two_phases, segment, skip, reward
) -> None:
    setup = two_phases(
        lambda number: setup.tokens(segment, end=""),
        lambda number: setup.tokens(f"\n{GUESS}"),
        "data.max_response_length=64",
        skip=skip,
    )
    await setup.roll_out(make_prompt(skpo_split_position=7))
    rewards = {float(row["rm_scores"].sum()) for row in setup.store.siblings("v0000000000")}
    assert rewards == {reward}


def test_evaluation_follows_the_same_rule(thinking_folder: Path) -> None:
    from recipe.skpo.evaluation.options import RewardFunction
    from recipe.skpo.evaluation.problems import Judge, Problem, Reward
    from recipe.skpo.task.model_files import load_tokenizer
    from recipe.skpo.task.prompts import problem_tokens

    tokenizer = load_tokenizer(str(thinking_folder))
    problem = Problem("a", "skpo/arithmetic", ({"role": "user", "content": "2 + 3?"},), "5")
    prompt = problem_tokens(tokenizer, problem.messages)
    for options, right in (({}, [False, True]), ({"thought_marks": "none"}, [True, True])):
        judge = Judge(Reward(RewardFunction(OUR_REWARD, "compute_score", options)), tokenizer)
        assert [judge(problem, prompt, tokenizer(text)["input_ids"])[1].right for text in (GUESS, DONE)] == right
