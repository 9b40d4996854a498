"""Rewards are -1 or +1, follow the last "#### number", and never fail on what a model wrote."""

from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reward_fns import TAIL_CHARACTERS, compute_score


def score(text: str, truth: str = "7", source: str = "skpo/arithmetic") -> float:
    result = compute_score(data_source=source, solution_str=text, ground_truth=truth)
    assert isinstance(result["score"], float)
    return result["score"]


@pytest.mark.parametrize(
    "text",
    [
        "3 + 4 = 7\n#### 7",
        "#### 7.",
        "####7",
        "#### 7.0",
        "#### +7",
        "#### 07",
        "#### 7 pens",
        "#### 7\nDone.",
        "#### 1\n#### 7",
    ],
)
def test_right_answers_score_plus_one(text: str) -> None:
    assert compute_score("skpo/arithmetic", text, "7")["score"] == 1.0


@pytest.mark.parametrize("text", ["#### 8", "#### -7", "#### 7.5", "#### 77", "#### 7\n#### 8", "#### 7,000"])
def test_wrong_answers_are_well_formed_and_score_minus_one(text: str) -> None:
    result = compute_score("skpo/arithmetic", text, "7")
    assert (result["score"], result["acc"], result["well_formed"]) == (-1.0, 0.0, 1.0)
    assert result["pred"] != ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "The answer is 7",
        "### 7",
        "####",
        "#### seven",
        "####\n7",
        "#### 7 - 0",
        "#### 7-0",
        "#### 1,007 + 1",
        "#### 7.0.0",
        "#### $7",
        "#### ٧",
        "#### 7\n####",
        "#### " + "0" * 200 + "7",
    ],
)
def test_answers_not_of_the_form_are_not_well_formed(text: str) -> None:
    assert compute_score("skpo/arithmetic", text, "7") == {
        "score": -1.0,
        "acc": 0.0,
        "well_formed": 0.0,
        "pred": "",
    }


def test_commas_are_removed_on_both_sides() -> None:
    assert compute_score("openai/gsm8k", "#### 1,234,567", "1234567")["pred"] == "1234567"
    assert score("#### 1,234", "1234", "openai/gsm8k") == 1.0
    assert score("#### 1234", "1,234", "openai/gsm8k") == 1.0


def test_only_the_end_of_a_long_response_is_read() -> None:
    assert score("#### 7" + "x" * (TAIL_CHARACTERS - 6)) == 1.0
    assert score("#### 7" + " " * TAIL_CHARACTERS) == -1.0


@given(st.integers(-(10**12), 10**12), st.integers(0, 10**6), st.integers(0, 6))
def test_numbers_are_compared_exactly(whole: int, fraction: int, places: int) -> None:
    number = Decimal(whole) + Decimal(fraction).scaleb(-places)
    truth = f"{number:f}"
    assert score(f"so\n#### {number:,f}", truth) == 1.0
    assert score(f"so\n#### {number + Decimal('0.000001'):f}", truth) == -1.0


SOURCES = ["skpo/arithmetic", "openai/gsm8k", "lighteval/MATH", "math_dapo", "aime2025"]


@settings(deadline=None)  # the first maths source imports verl, which takes seconds
@given(st.text(alphabet=st.sampled_from("#0123456789,.-+= \n\\boxed{}$Answer:xٴ٣é\0")), st.sampled_from(SOURCES))
@example("#### " + "9" * 5000, "skpo/arithmetic")
@example("####" * 500, "openai/gsm8k")
@example("\\boxed{" * 280, "lighteval/MATH")
@example("\\boxed", "lighteval/MATH")
@example("\\boxed{1}", "aime2025")
@example("Answer: \\frac{", "math_dapo")
def test_reward_never_raises_and_is_minus_or_plus_one(text: str, source: str) -> None:
    result = compute_score(source, text, "7")
    assert result["score"] in (-1.0, 1.0)
    assert result["score"] == 2 * result["acc"] - 1
    assert result["well_formed"] in (0.0, 1.0)
    assert isinstance(result["pred"], str)
    assert result["acc"] <= result["well_formed"]


@given(st.text())
def test_any_unicode_text_gets_a_reward(text: str) -> None:
    assert score("#### " + text) in (-1.0, 1.0)


@pytest.mark.parametrize(
    ("source", "right", "wrong", "unformed"),
    [
        ("HuggingFaceH4/MATH-500", "so \\boxed{\\frac{1}{2}}", "so \\boxed{2}", "so 1/2"),
        ("math_dapo", "Answer: \\frac{1}{2}", "Answer: 2", "it is a half"),
        ("aime2024", "Answer: \\frac{1}{2}", "Answer: 2", "it is a half"),
    ],
)
def test_verls_maths_checks_become_plus_and_minus_one(source: str, right: str, wrong: str, unformed: str) -> None:
    truth = "\\frac{1}{2}"
    results = [compute_score(source, text, truth) for text in (right, wrong, unformed)]
    assert [result["score"] for result in results] == [1.0, -1.0, -1.0]
    assert [result["well_formed"] for result in results] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("source", ["no/such", "codecontests", "numina_cn_k12"])
def test_unknown_and_code_running_sources_are_refused_by_name(source: str) -> None:
    with pytest.raises(ValueError, match=f"data_source '{source}' has no reward here"):
        compute_score(source, "#### 7", "7")


def test_a_ground_truth_that_is_no_number_is_a_fault_of_the_data() -> None:
    with pytest.raises(ValueError, match="ground_truth 'seven' is not a number"):
        compute_score("skpo/arithmetic", "#### 7", "seven")


@pytest.mark.parametrize("truth", ["5", 5, 5.0, Decimal("5"), Decimal("5.0")], ids=repr)
@pytest.mark.parametrize("source", ["skpo/arithmetic", "openai/gsm8k", "HuggingFaceH4/MATH-500"])
def test_a_ground_truth_may_be_a_number(source: str, truth: object) -> None:
    assert compute_score(source, "#### 5", truth)["score"] == 1.0
    assert compute_score(source, "#### 50", truth)["score"] == -1.0


@pytest.mark.parametrize("truth", [True, None, ["5"], {"value": 5}, b"5", 5j], ids=repr)
def test_a_ground_truth_that_is_neither_text_nor_number_is_a_fault_of_the_data(truth: object) -> None:
    with pytest.raises(ValueError, match=rf"is a {type(truth).__name__}; write a text or a number$"):
        compute_score("openai/gsm8k", "#### 5", truth)


def test_verl_can_load_and_call_the_reward_by_path_and_by_package() -> None:
    from verl.utils.import_utils import load_extern_object

    import reward_fns

    for path in (str(reward_fns.__file__), "pkg://reward_fns"):
        loaded = load_extern_object(path, "compute_score")
        result = loaded(
            data_source="skpo/arithmetic",
            solution_str="#### 7",
            ground_truth="7",
            extra_info={"num_turns": None},
        )
        assert result == {"score": 1.0, "acc": 1.0, "well_formed": 1.0, "pred": "7"}


GSM8K_RIGHT = [
    "#### 1,234.5",
    "####1234.50",
    "#### $1,234.5",
    "#### 1234.5 dollars.",
    "#### **1234.5**",
    "so \\boxed{1234.5}",
    "\\boxed{1{,}234.5}",
    "\\boxed{1\\,234.5}",
    "\\boxed{\\$1,234.50}",
    "\\boxed{x = 1234.5}",
    "\\boxed{1234.5\\text{ eggs}}",
    "\\boxed{+1234.5 \\%}",
    "#### 2 * 617.25 = 1234.5",
    "\\boxed{7}\n#### 1234.5",
    "#### 7\n\\boxed{1234.5}",
    "Answer: 1,234.5",
    "The answer is $1234.5.",
    "#### 1234.5 cm^2",
    "\\boxed{1234.5\\text{ cm}^2}",
    "#### $1,234.5/hour",
    "#### Rs. 1234.5",
    "#### USD 1,234.5",
    "#### 1.2345 thousand",
    "#### 1234.5 eggs and that is all",
]


@pytest.mark.parametrize("text", GSM8K_RIGHT)
def test_gsm8k_answers_are_read_as_a_person_would(text: str) -> None:
    assert score(text, "1234.5", "openai/gsm8k") == 1.0
    assert score(text, "1234.6", "openai/gsm8k") == -1.0
    assert score(text, "-1234.5", "openai/gsm8k") == -1.0


@pytest.mark.parametrize("text", ["#### 18 million", "\\boxed{18\\text{ million}}", "Answer: $18 million dollars"])
def test_words_for_powers_of_ten_belong_to_the_number(text: str) -> None:
    for source in ("openai/gsm8k", "math"):
        assert (score(text, "18000000", source), score(text, "18", source)) == (1.0, -1.0)
    assert compute_score("skpo/arithmetic", "#### 18 million", "18")["well_formed"] == 0.0


def test_signs_and_fractions_of_gsm8k() -> None:
    for text in ("#### -3", "\\boxed{-3}", "#### −3", "#### -$3", "#### - 3"):
        assert score(text, "-3", "openai/gsm8k") == 1.0, text
        assert score(text, "3", "openai/gsm8k") == -1.0, text
    assert score("#### .5", "0.5", "openai/gsm8k") == 1.0


GSM8K_UNFORMED = [
    "1234",
    "#### 7 or 1234",
    "#### 1234 - 0",
    "#### 1234/1",
    "#### 12,34",
    "#### 1,2345",
    "#### 1234.5.6",
    "\\boxed{}",
    "\\boxed{1234",
    "\\boxed{1234}\n####",
    "#### 1234\n\\boxed{",
    "#### 1234 and 7",
    "#### 12 34",
    "#### ١٢٣٤",
    "#### " + "1" * 300,
    "#### 1234 squared",
    "#### 1234 or more",
    "#### 1234 and a half",
    "#### 1234 thirds",
    "#### 1234k",
    "#### 1234:30",
]


@pytest.mark.parametrize("text", GSM8K_UNFORMED)
def test_gsm8k_answers_that_are_no_single_number_are_not_well_formed(text: str) -> None:
    result = compute_score("openai/gsm8k", text, "1234")
    assert (result["score"], result["well_formed"], result["pred"]) == (-1.0, 0.0, "")


def test_a_strict_format_takes_that_form_alone() -> None:
    texts = {"gsm8k": "#### 7", "boxed": "\\boxed{7}", "line": "Answer: 7"}
    for source, truth in (("openai/gsm8k", "7"), ("math", "7")):
        for form in texts:
            verdicts = {
                name: compute_score(source, text, truth, answer_format=form)["acc"] for name, text in texts.items()
            }
            assert verdicts == {name: float(name == form) for name in texts}
    for form in ("any", *texts):
        assert compute_score("skpo/arithmetic", "#### 7", "7", answer_format=form)["acc"] == 1.0
        assert compute_score("skpo/arithmetic", "\\boxed{7}", "7", answer_format=form)["acc"] == 0.0
    assert compute_score("math", "#### 7", "7", answer_format="hash")["acc"] == 1.0  # the former name of gsm8k
    with pytest.raises(ValueError, match="answer_format: 'loose' is unknown"):
        compute_score("math", "7", "7", answer_format="loose")


CHOICES = [
    ("\\boxed{C}", "C"),
    ("\\boxed{\\text{(C)}}", "C"),
    ("\\boxed{C}. Not \\boxed{J}", "J"),
    ("Answer: C", "C"),
    ("The answer is (C).", "C"),
    ("**Answer: C) blue**", "C"),
    ("The answer is option C because it is", "C"),
    ("#### C", "C"),
    ("I think\nC", "C"),
    ("I think\n(C).\n", "C"),
    ("\\boxed{K}", ""),
    ("\\boxed{c}", ""),
    ("\\boxed{CD}", ""),
    ("\\boxed{Cats}", ""),
    ("A dog is C", ""),
    ("", ""),
]


@pytest.mark.parametrize(("text", "letter"), CHOICES)
def test_the_letter_is_the_answer_to_a_choice(text: str, letter: str) -> None:
    result = compute_score("TIGER-Lab/MMLU-Pro", text, "C")
    assert result["pred"] == letter
    assert (result["acc"], result["well_formed"]) == (float(letter == "C"), float(bool(letter)))


def test_a_choice_has_a_letter_as_its_truth_and_a_lone_letter_is_no_strict_form() -> None:
    for truth in ("K", "CD", "", "c", "3"):
        with pytest.raises(ValueError, match="is not an option"):
            compute_score("TIGER-Lab/MMLU-Pro", "C", truth)
    assert compute_score("TIGER-Lab/MMLU-Pro", "so\nC", "C", answer_format="boxed")["pred"] == ""
