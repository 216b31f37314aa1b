r"""Problems of the user's own: what is read, what counts as the answer, what counts as equal to it."""

import json
import threading
import time

import pytest

from apr_jax.tasks.boxed import last_boxed
from apr_jax.tasks.equality import Verifier
from apr_jax.tasks.math_task import MathProblem, MathTask, read_problems


@pytest.fixture(scope="module")
def verifier():
    pytest.importorskip("math_verify")
    with_limit = Verifier(limit_s=30.0)  # the machine may be busy; nothing here takes a second
    yield with_limit
    with_limit.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} and then \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x : x > {3} \right\}} {", r"\left\{ x : x > {3} \right\}"),
        (r"\boxed {x^{2}}", "x^{2}"),
        (r"\boxed{3} and \boxed{\frac{1}{", "3"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{", None),
        (r"\boxed 5", None),
        ("the answer is 5", None),
    ],
)
def test_the_answer_is_in_the_last_whole_box(text, answer):
    assert last_boxed(text) == answer


EQUAL = [
    ("7", "7.0"),
    ("1000", "1,000"),
    (r"\frac{1}{2}", "0.5"),
    ("3/4", r"\dfrac34"),
    ("0.25", r"\frac{2}{8}"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\sin^2 x + \cos^2 x", "1"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("(1,2)", r"\left(1, 2\right)"),
    ("[0,1)", "[0, 1)"),
    ("5", "x = 5"),
    (r"\text{even}", "even"),
]
DIFFERENT = [
    ("42", "43"),
    ("0.5", "0.51"),
    (r"\pi", "3.14"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "[0,1]"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("x+1", "x-1"),
    ("42", "banana"),
    ("42", r"\frac{"),
    ("42", "\x00}{\n]"),
    ("42", ""),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_answers(verifier, gold, answer):
    assert verifier.is_equal(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers_and_junk(verifier, gold, answer):
    assert not verifier.is_equal(gold, answer)


def test_what_takes_too_long_is_given_up_and_the_next_pair_is_compared():
    pytest.importorskip("math_verify")
    verifier = Verifier(limit_s=3.0)
    verifier._started()  # the time to load sympy is not the pair's
    started_s = time.perf_counter()
    assert not verifier.is_equal("9^{9^{9^{9}}}", "2")
    assert time.perf_counter() - started_s < 60
    verifier.limit_s = 60.0
    assert verifier.is_equal("1/2", "0.5")
    verifier.close()


def test_answers_are_compared_in_threads_that_are_not_the_main_one(verifier):
    found = {}
    pairs = [EQUAL[2], DIFFERENT[0], EQUAL[5], DIFFERENT[6]]

    def compare(number):
        found[number] = verifier.is_equal(*pairs[number])

    threads = [threading.Thread(target=compare, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: True, 1: False, 2: True, 3: False}


def write(tmp_path, *lines):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_the_names_of_fields(tmp_path):
    path = write(
        tmp_path,
        {"problem": "a", "answer": "1"},
        "",
        {"question": "b", "answer": r"so \boxed{2}", "level": 5},
        {"problem": "c", "solution": r"first \boxed{0}, then \boxed{\frac{1}{3}}"},
        {"problem": "d", "answer": 4, "solution": "without a box"},
        {"problem": None, "question": "e\u2028f", "answer": " ", "solution": r"\boxed{5}"},
    )
    wanted = [("a", "1"), ("b", "2"), ("c", r"\frac{1}{3}"), ("d", "4"), ("e\u2028f", "5")]
    assert read_problems(path) == [MathProblem(*each) for each in wanted]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", r"line 2: is '\[1\]', must be an object"),
        ({"answer": "1"}, "line 2: has none of the fields problem, question"),
        ({"problem": "a"}, "line 2: has none of the fields answer, solution"),
        ({"problem": " ", "answer": "1"}, "line 2: problem is empty"),
        ({"problem": ["a"], "answer": "1"}, r"line 2: problem is \['a'\], must be text"),
        ({"problem": "a", "answer": True}, "line 2: answer is True, must be text"),
        ({"problem": "a", "answer": float("nan")}, "line 2: answer is nan, must be text or a finite number"),
        ("[" * 100_000, "line 2: no JSON"),
        ({"problem": "a", "solution": "five"}, r"line 2: solution holds no whole \\boxed"),
        ({"problem": "a", "answer": r"\boxed{5"}, r"line 2: answer holds no whole \\boxed"),
        ({"problem": "a", "answer": r"\boxed{}"}, "line 2: answer is empty"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, message):
    path = write(tmp_path, {"problem": "a", "answer": "1"}, line)
    with pytest.raises(ValueError, match=message):
        read_problems(path)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no problem"):
        read_problems(write(tmp_path))


def test_the_task(tmp_path):
    pytest.importorskip("math_verify")
    path = write(tmp_path, *({"problem": f"What is {i} + \\frac{{1}}{{2}}?", "answer": f"{i}.5"} for i in range(9)))
    task = MathTask(path, "Q {x}: {problem}\nA:")
    few, all_ = task.problems(3, 7), task.problems(100, 7)
    assert few == all_[:3] and sorted(p.answer for p in all_) == [f"{i}.5" for i in range(9)]
    assert task.problems(9, 8) != all_
    problem = MathProblem("What is 1 + \\frac{1}{2}?", "1.5")
    assert task.prompt(problem, "multiverse") == "Q {x}: What is 1 + \\frac{1}{2}?\nA:"
    assert task.check(problem, r"it is \boxed{\frac{3}{2}}").correct
    wrong = task.check(problem, r"it is \boxed{2}")
    assert (wrong.correct, wrong.answer, wrong.reason) == (False, "2", "2 is not 1.5")
    assert task.check(problem, "it is 1.5").reason == r"there is no answer in a \boxed{...}"
    assert task.fingerprint != MathTask(path).fingerprint
    with pytest.raises(ValueError, match=r"has no \{problem\}"):
        MathTask(path, "Q:")


def test_without_math_verify_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"math-verify, which is not installed \(pip install"):
        MathTask(write(tmp_path, {"problem": "a", "answer": "1"}))
