"""What --task may say."""

import pytest
import task_flags
from absl import flags

from apr_jax.tasks.countdown_task import TASKS


@pytest.fixture
def chosen():
    """The task that a flag's value names."""
    before = flags.FLAGS["task"].value
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    def choose(text: str):
        flags.FLAGS["task"].value = text
        return task_flags.chosen_task()

    yield choose
    flags.FLAGS["task"].value = before


def test_a_task_is_named_or_dialled(chosen):
    assert chosen("countdown_hard") is TASKS["countdown_hard"]
    task = chosen("countdown+num_numbers=5+min_target=101+max_target=999+min_hardness=2")
    problems = task.problems(5, seed=1)
    assert all(len(problem.numbers) == 5 and problem.target > 100 for problem in problems)
    assert task.problem_of(task.prompt(problems[0], "multiverse")) == problems[0]
    assert task.name.startswith("countdown+num_numbers=5")
    assert len({task.fingerprint, chosen("countdown+num_numbers=5").fingerprint, chosen("countdown").fingerprint}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("countdow", "--task=countdow is not one of countdown, countdown_five"),
        ("countdown_hard+num_numbers=5", "is not one of"),
        ("countdown+size=5", "there is no option 'size', it takes num_numbers, min_number"),
        ("countdown+num_numbers=four", "num_numbers is 'four', must be a whole number"),
        ("countdown+num_numbers=4+num_numbers=5", "num_numbers is there twice"),
        ("countdown+num_numbers=7", "--task=countdown+num_numbers=7: num_numbers is 7, must be in [3, 6]"),
        ("countdown+min_hardness=0", "min_hardness is 0, must be in [1, 26]"),
    ],
)
def test_errors_name_the_value_and_the_bound(chosen, text, message):
    with pytest.raises(ValueError) as error:
        chosen(text)
    assert message in str(error.value)
