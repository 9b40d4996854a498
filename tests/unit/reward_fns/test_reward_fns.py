"""Rewards are -1 or +1, follow the last "#### number", and never fail on what a model wrote."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import TAIL_CHARACTERS, compute_score


def score(text: str, truth: str = "7", source: str = "skpo/arithmetic") -> float:
    result = compute_score(data_source=source, solution_str=text, ground_truth=truth)
    assert isinstance(result["score"], float)
    return result["score"]


ARITHMETIC = {
    "right": [
        *("3 + 4 = 7\n#### 7", "#### 7.", "####7", "#### 7.0", "#### +7", "#### 07", "#### 7 pens"),
        *("#### 7\nDone.", "#### 1\n#### 7"),
    ],
    "wrong": ["#### 8", "#### -7", "#### 7.5", "#### 77", "#### 7\n#### 8", "#### 7,000"],
    "unformed": [
        *("", "7", "The answer is 7", "### 7", "####", "#### seven", "####\n7", "#### 7 - 0", "#### 7-0"),
        *("#### 1,007 + 1", "#### 7.0.0", "#### $7", "#### ٧", "#### 7\n####", "#### " + "0" * 200 + "7"),
    ],
}


@pytest.mark.parametrize(
    ("verdict", "text"), [(verdict, text) for verdict in ARITHMETIC for text in ARITHMETIC[verdict]]
)
def test_the_number_after_the_last_mark_is_the_answer(verdict: str, text: str) -> None:
    result = compute_score("skpo/arithmetic", text, "7")
    right, formed = verdict == "right", verdict != "unformed"
    assert (result["score"], result["acc"], result["well_formed"]) == (1.0 if right else -1.0, right, formed)
    assert bool(result["pred"]) == formed and isinstance(result["score"], float)


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


@pytest.mark.parametrize("source", ["HuggingFaceH4/MATH-500", "lighteval/MATH", "math_dapo", "aime2024", "amc23"])
def test_sources_of_mathematics_share_one_check(source: str) -> None:
    texts = "so \\boxed{\\frac{1}{2}}", "Answer: 0.5", "Answer: 2", "it is a half"
    results = [compute_score(source, text, "\\frac{1}{2}") for text in texts]
    assert [result["score"] for result in results] == [1.0, 1.0, -1.0, -1.0]
    assert [result["well_formed"] for result in results] == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("source", ["no/such", "codecontests", "numina_cn_k12"])
def test_unknown_and_code_running_sources_are_refused_by_name(source: str) -> None:
    with pytest.raises(ValueError, match=f"data_source '{source}' has no reward here"):
        compute_score(source, "#### 7", "7")


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
    *("#### 1,234.5", "####1234.50", "#### $1,234.5", "#### 1234.5 dollars.", "#### **1234.5**", "#### 1234.5 cm^2"),
    *("so \\boxed{1234.5}", "\\boxed{1{,}234.5}", "\\boxed{1\\,234.5}", "\\boxed{\\$1,234.50}", "\\boxed{x = 1234.5}"),
    *("\\boxed{1234.5\\text{ eggs}}", "\\boxed{+1234.5 \\%}", "\\boxed{1234.5\\text{ cm}^2}"),
    *("#### 2 * 617.25 = 1234.5", "\\boxed{7}\n#### 1234.5", "#### 7\n\\boxed{1234.5}", "Answer: 1,234.5"),
    *("The answer is $1234.5.", "#### $1,234.5/hour", "#### Rs. 1234.5", "#### USD 1,234.5", "#### 1.2345 thousand"),
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
    *("1234", "#### 7 or 1234", "#### 1234 - 0", "#### 1234/1", "#### 12,34", "#### 1,2345", "#### 1234.5.6"),
    *("\\boxed{}", "\\boxed{1234", "\\boxed{1234}\n####", "#### 1234\n\\boxed{", "#### 1234 and 7", "#### 12 34"),
    *("#### ١٢٣٤", "#### " + "1" * 300, "#### 1234 squared", "#### 1234 or more", "#### 1234 and a half"),
    *("#### 1234 thirds", "#### 1234k", "#### 1234:30"),
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


CHOICES = {
    "C": [
        *("\\boxed{C}", "\\boxed{\\text{(C)}}", "Answer: C", "The answer is (C).", "**Answer: C) blue**", "#### C"),
        *("The answer is option C because it is", "I think\nC", "I think\n(C).\n"),
    ],
    "J": ["\\boxed{C}. Not \\boxed{J}"],
    "": ["\\boxed{K}", "\\boxed{c}", "\\boxed{CD}", "\\boxed{Cats}", "A dog is C", ""],
}


@pytest.mark.parametrize(("letter", "text"), [(letter, text) for letter in CHOICES for text in CHOICES[letter]])
def test_the_letter_is_the_answer_to_a_choice(letter: str, text: str) -> None:
    result = compute_score("TIGER-Lab/MMLU-Pro", text, "C")
    assert result["pred"] == letter
    assert (result["acc"], result["well_formed"]) == (float(letter == "C"), float(bool(letter)))


def test_a_choice_has_a_letter_as_its_truth_and_a_lone_letter_is_no_strict_form() -> None:
    for truth in ("K", "CD", "", "c", "3"):
        with pytest.raises(ValueError, match="is not an option"):
            compute_score("TIGER-Lab/MMLU-Pro", "C", truth)
    assert compute_score("TIGER-Lab/MMLU-Pro", "so\nC", "C", answer_format="boxed")["pred"] == ""
