r"""Where the answer stands: outputs as models write them, each with the answer that a careful reader takes from it."""

import time

import pytest

from reward_fns import compute_score
from reward_fns.forms import answer_parts, answer_text, last_boxed

GSM8K, MATH, CHOICE = "openai/gsm8k", "HuggingFaceH4/MATH-500", "TIGER-Lab/MMLU-Pro"

MINERVA = "Final Answer: The final answer is ${}$. I hope it is correct."

# (source, response, the answer that it gives, "" where it gives none)
OUTPUTS = [
    # Minerva's prompt and lm-eval's
    (MATH, MINERVA.format("204"), "204"),
    (MATH, "We have $x=2$.\n" + MINERVA.format("\\frac{1}{2}"), "\\frac{1}{2}"),
    (MATH, "so $24$.\nFinal Answer: The final answer is $24$.", "24"),
    (MATH, "Final Answer: The final answer is $24$. I hope it is correct", "24"),
    (MATH, "Final Answer: The final answer is $24$ I hope it is correct.", "24"),
    (MATH, "Final Answer: The final answer is $x \\in [-2,7]$. I hope it is correct.", "x \\in [-2,7]"),
    (MATH, "Final Answer: The final answer is (1, 2). I hope it is correct.", "(1, 2)"),
    (MATH, "The final answer is $f(x) = x^2. $ I hope it is correct.", "f(x) = x^2"),
    (GSM8K, "There are 15. Then 21 - 15 = 6. The answer is 6.", "6"),
    (GSM8K, "A: 5 + 4 = 9. So the answer is 9.", "9"),
    (GSM8K, "Therefore, the final answer is 42. I hope this helps!", "42"),
    (GSM8K, "The answer is 18. The answer is 20.", "20"),
    # Llama 3: headings and steps
    (MATH, "## Step 3: Add\nSo 5.\n\nThe final answer is: $\\boxed{34}$", "34"),
    (MATH, "## Step 3: Add\nSo 5.\n\nThe final answer is: 34", "34"),
    (GSM8K, "## Step 2\n18 eggs\n\nThe final answer is: $\\boxed{18}$ eggs", "18"),
    (GSM8K, "The answer is: 18", "18"),
    # markdown of chat models
    (GSM8K, "Answer:\n34", "34"),
    (GSM8K, "Answer:\n\n34\n", "34"),
    (GSM8K, "**Answer:**\n\n**34**", "34"),
    (GSM8K, "### Final Answer\n34", "34"),
    (GSM8K, "### Final Answer\n\n**34 apples**", "34"),
    (GSM8K, "**Final Answer**\n\n$34$", "34"),
    (MATH, "**Final Answer**\n\\[\n\\frac{3}{4}\n\\]", "\\frac{3}{4}"),
    (MATH, "**Final Answer:**\n$$\n\\frac{3}{4}\n$$", "\\frac{3}{4}"),
    (MATH, "Answer:\n\\[ 34 \\]", "34"),
    (GSM8K, "so it is 73.\n\n**73**", "73"),
    (GSM8K, "so it is 73.\n\n**73 apples**.", "73"),
    (MATH, "so\n\n**$\\frac{7}{2}$**", "\\frac{7}{2}"),
    (CHOICE, "so\n**C**", "C"),
    (GSM8K, "**Final Answer: 73**", "73"),
    (GSM8K, "**Final Answer: 73**.", "73"),
    (GSM8K, "> **Final Answer: $73**", "73"),
    (GSM8K, "**Answer**: 73", "73"),
    (GSM8K, "__Answer:__ 73", "73"),
    (GSM8K, "*The answer is 73.*", "73"),
    (GSM8K, "the answer is **73**, because 70 + 3 is it", "73"),
    (GSM8K, "the answer is `73`.", "73"),
    (GSM8K, "Answer = 73", "73"),
    (GSM8K, "Ans: 73", "73"),
    (GSM8K, "Answer：73", "73"),
    (GSM8K, "The answer to this question is 73.", "73"),
    (GSM8K, "The answer, therefore, is 73.", "73"),
    (GSM8K, "The answer we get is 73.", "73"),
    (GSM8K, "So the answer must be 73.", "73"),
    (GSM8K, "Answer:\n- 73", "73"),
    (GSM8K, "Answer: - 73", "-73"),
    (GSM8K, "The answer is $73 per day, as she sells 9 eggs.", "73"),
    (GSM8K, "so\n***73***", "73"),
    (GSM8K, "so\n__73__", "73"),
    (GSM8K, "The answer is therefore 73.", "73"),
    (GSM8K, "We conclude that the answer is 73.", "73"),
    (GSM8K, "Since 4 does not divide 73, the answer is 73, not 72.", "73"),
    (GSM8K, "The answer is 73 since 70 and 3 make that.", "73"),
    (GSM8K, "<reasoning>70 + 3</reasoning>\n<answer>\n73\n</answer>", "73"),
    (MATH, "The answers are 2 and 3.", "2 and 3"),
    (MATH, "The answer is the empty set.", "the empty set"),
    (MATH, "The correct answer is even. This answer is easy to check.", "even"),
    # remarks behind the answer
    (GSM8K, "The answer is 73. This answer is reasonable.", "73"),
    (GSM8K, "The answer is 73. The answer is supported by the numbers above.", "73"),
    (GSM8K, "The answer is 73. The answer is not 72.", "73"),
    (GSM8K, "The answer is 73. Is the answer 5? Yes.", "73"),
    (GSM8K, "The answer is 73. Could it be that the answer is 5? No.", "73"),
    (GSM8K, "The answer is 73. If the answer is 5, nothing adds up.", "73"),
    (GSM8K, "The answer is 73. The answer must be positive, and it is.", "73"),
    (GSM8K, "The answer is 73. If she sold 5, the answer would be 5.", "73"),
    (GSM8K, "A common wrong answer is 5. The answer is 73.", "73"),
    (GSM8K, "The answer is 73. A tempting answer is 5.", "73"),
    # nothing is stated, or it is taken back
    (GSM8K, "The answer is not 5.", ""),
    (GSM8K, "The answer isn't 5.", ""),
    (GSM8K, "The answer cannot be 5.", ""),
    (GSM8K, "This is not the answer: 5", ""),
    (GSM8K, "I don't think that the answer is 5.", ""),
    (GSM8K, "I doubt the answer is 5.", ""),
    (GSM8K, "The wrong answer is 5.", ""),
    (GSM8K, "If the answer is 5, then", ""),
    (GSM8K, "The answer is 5? Let me check.", ""),
    (GSM8K, "If she sold 5, the answer would be 5.", ""),
    (GSM8K, "The answer would be 5 without the rest.", ""),
    (GSM8K, "The answer is 5. No, the answer is not 5.", ""),
    (GSM8K, "The answer is 5. No, the answer isn't 5.", ""),
    (GSM8K, "The answer is 5. Wait, the answer is wrong.", ""),
    (GSM8K, "The answer is 5. Wait, the answer is 7 or 8.", ""),
    (GSM8K, "The answer is 5. So the answer is", ""),
    (GSM8K, "The answer is 5.\nAnswer:", ""),
    (GSM8K, "I answered 5.", ""),
    (GSM8K, "it is\n**73** or so", ""),
    (GSM8K, "**Let me check 73 once more:**", ""),
    # boxes
    (MATH, "\\boxed{**42**}", "42"),
    (MATH, "\\boxed{*42*}", "42"),
    (MATH, "so $x = \\boxed{2}$ or $x = \\boxed{3}$.", "2, 3"),
    (MATH, "$\\boxed{2}$, $\\boxed{3}$, and $\\boxed{5}$", "2, 3, 5"),
    (MATH, "$$\\boxed{2} \\quad\\text{and}\\quad \\boxed{3}$$", "2, 3"),
    (MATH, "\\(a_1=\\boxed{2}\\), \\(a_2=\\boxed{3}\\)", "2, 3"),
    (MATH, "first \\boxed{2}, so \\boxed{3}", "3"),
    (MATH, "\\boxed{2}. \\boxed{3}", "3"),
    (MATH, "\\boxed{2},\n\nand \\boxed{3}", "3"),
    (MATH, "\\boxed{3} or \\boxed{3}", "3"),
    (MATH, "\\boxed{1}, \\boxed{1} and \\boxed{2}", "1,1,2"),
    (MATH, "\\boxed{2} and \\boxed{3", ""),
    (MATH, "The answer is 7.\nso \\boxed{3}. The answer is nice.", "3"),
    # headings with four hashes
    (MATH, "\\boxed{42}\n\n#### Verification\nIt holds for all 7.", "42"),
    (MATH, "\\boxed{42}\n#### Verification", "42"),
    (GSM8K, "\\boxed{42}\n#### Step 4: Check\n40 + 2 = 42", "42"),
    (GSM8K, "#### 42\n\n#### Explanation\nIt is so.", "42"),
    (GSM8K, "#### 2. Add up\n40 + 2\n#### 42", "42"),
    (GSM8K, "#### 2. Add up\nThe answer is 42.", "42"),
    (GSM8K, "##### Final Answer\n42", "42"),
    (GSM8K, "#### Final Answer: 42", "42"),
    (GSM8K, "#### The final answer is **42**.", "42"),
    (GSM8K, "\\boxed{7}\n#### Answer: 42\nDone.", "42"),
    (MATH, "#### Monday", "Monday"),
    (MATH, "\\boxed{7}\n#### even", "even"),
    (GSM8K, "\\boxed{7}\n#### 42 apples\nDone.", "42"),
    # MMLU-Pro
    (CHOICE, "The correct answer is that X. The answer is (C).", "C"),
    (CHOICE, "Let's think. The answer is (C).", "C"),
    (CHOICE, "The answer is (C) 5 meters.", "C"),
    (CHOICE, "The answer is C. Carbon dioxide", "C"),
    (CHOICE, "The best answer is C, because A is not one.", "C"),
    (CHOICE, "The correct option is (C).", "C"),
    (CHOICE, "The best choice is: C", "C"),
    (CHOICE, "The correct answer would be (C).", "C"),
    (CHOICE, "The answer is therefore option C: blue.", "C"),
    (CHOICE, "The answer is most likely (C).", "C"),
    (CHOICE, "The answer choice is (C).", "C"),
    (CHOICE, "**Answer: (C) blue**", "C"),
    (CHOICE, "**Answer:**\n\n(C) blue", "C"),
    (CHOICE, "The answer is **(C) blue**.", "C"),
    (CHOICE, "The answer is $\\text{(C)}$.", "C"),
    (CHOICE, "The answer is (C). The answer is supported by the fact that A is false.", "C"),
    (CHOICE, "The answer is (C). The answer is not (A).", "C"),
    (CHOICE, "Answer: Option C", "C"),
    (CHOICE, "I think so.\nOption C", "C"),
    (CHOICE, "I think so.\n**Option C.**", "C"),
    (CHOICE, "\\boxed{Option C}", "C"),
    (CHOICE, "\\boxed{\\text{Option C}}", "C"),
    (CHOICE, "\\boxed{**C**}", "C"),
    (CHOICE, "#### Option (C)", "C"),
    (CHOICE, "Thus, (C) is the correct answer.", "C"),
    (CHOICE, "So option C is correct. It is blue.", "C"),
    (CHOICE, "\\boxed{C}\n#### Why not (A)\nIt is red.", "C"),
    (CHOICE, "\\boxed{C, D}", ""),
    (CHOICE, "\\boxed{C,D}", ""),
    (CHOICE, "\\boxed{C} and \\boxed{D}", ""),
    (CHOICE, "The answer is (C) or (D).", ""),
    (CHOICE, "The answer is C or D.", ""),
    (CHOICE, "The answer is C and D.", ""),
    (CHOICE, "The answer is C/D.", ""),
    (CHOICE, "The answer is (C)(D).", ""),
    (CHOICE, "Option C, Option D", ""),
    (CHOICE, "The answer is not (C).", ""),
    (CHOICE, "The answer is (C). Wait, the answer is either A or B.", ""),
    (CHOICE, "Option C is not correct.", ""),
    (CHOICE, "Option C: blue\nOption D: red", ""),
    (CHOICE, "A cat is the right animal", ""),
]


@pytest.mark.parametrize(("source", "text", "answer"), OUTPUTS)
def test_the_answer_is_what_a_careful_reader_takes(source: str, text: str, answer: str) -> None:
    truth = answer or {GSM8K: "5", CHOICE: "C", MATH: "3"}[source]
    result = compute_score(source, text, truth)
    assert (result["acc"], bool(result["pred"]) or not answer) == (float(bool(answer)), True), result


def test_boxes_of_one_list_are_an_answer_each() -> None:
    assert answer_parts("$x=\\boxed{2}$ or $x=\\boxed{3}$") == ["2", "3"]
    assert answer_text("$x=\\boxed{2}$ or $x=\\boxed{3}$", "boxed") == "2, 3"
    # One value in two ways of writing it, as in a gold solution of MATH.
    text = "Thus, $d = \\boxed{15\\frac{39}{40}},$ or $\\boxed{\\frac{639}{40}}$ inches."
    assert compute_score(MATH, text, "\\frac{639}{40}")["acc"] == 1.0
    assert compute_score(MATH, text, "\\frac{640}{40}")["acc"] == 0.0
    assert compute_score(MATH, "\\boxed{2} or \\boxed{3}", "3")["acc"] == 0.0
    assert compute_score(GSM8K, "\\boxed{7} or \\boxed{8}", "8")["well_formed"] == 0.0


@pytest.mark.parametrize(
    "piece",
    ["answer is ", "the answer is 5. ", "Answer:\n", "#### A ", "\\boxed{1}, ", "answer of a a ", "**", "$", "answer "]
    + ["if ", " \n", "\\boxed{", "the answer is not 5. ", "answer is a b c d e "],
)
def test_finding_the_answer_is_linear_in_the_text(piece: str) -> None:
    def seconds(size: int) -> float:
        text = (piece * size)[:size]
        started = time.process_time()
        answer_text(text)
        return time.process_time() - started

    seconds(1000)
    assert seconds(40_000) < max(0.1, 40 * seconds(4_000))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{5}", "5"),
        ("\\boxed{1} and then \\boxed{2}.", "2"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{[0, 1\\}}", "[0, 1\\}"),
        ("\\boxed{a \\\\}", "a \\\\"),
        ("\\fbox{7}", "7"),
        ("\\boxed {7}", "7"),
        ("$\\boxed 7$", "7"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{5} and \\boxed{6", ""),
        ("\\boxedx{5}", ""),
        ("\\boxed{}", ""),
        ("nothing", ""),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, answer: str) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("\\boxed{1}\n#### 2", {"any": "2", "boxed": "1", "gsm8k": "2", "line": ""}),
        ("#### 2\n\\boxed{1}", {"any": "1", "boxed": "1", "gsm8k": "2", "line": ""}),
        ("Answer: 3\nso \\boxed{1}", {"any": "1", "boxed": "1", "gsm8k": "", "line": "3"}),
        ("**Answer:** 3.", {"any": "3", "boxed": "", "gsm8k": "", "line": "3"}),
        ("Answer: 3\nANSWER : 4", {"any": "4", "boxed": "", "gsm8k": "", "line": "4"}),
        ("The final answer is $x^2$.", {"any": "$x^2$", "boxed": "", "gsm8k": "", "line": "$x^2$"}),
        ("Answer: 3, no \\boxed{", {"any": "", "boxed": "", "gsm8k": "", "line": "3, no \\boxed{"}),
        ("#### 2 \nthat is it", {"any": "2", "boxed": "", "gsm8k": "2", "line": ""}),
        ("it is 5", {"any": "", "boxed": "", "gsm8k": "", "line": ""}),
    ],
)
def test_every_form_counts_by_its_last_occurrence(text: str, wanted: dict[str, str]) -> None:
    assert {form: answer_text(text, form) for form in wanted} == wanted
