"""The growth of costs: the arithmetic, and no exponent that is 1 becomes another."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks import recipe, scale


def test_a_power_law_is_found_and_continued() -> None:
    growth = scale.Growth((10, 20, 40, 80), [0.003 * size**1.5 for size in (10, 20, 40, 80)], (0, 0, 0, 7_000_000))
    assert growth.exponent == pytest.approx(1.5)
    for size in (1, 25, 80, 1000):
        assert growth.at(size) == pytest.approx(0.003 * size**1.5)
    noisy = scale.Growth((10, 100), [1.0, 10.0], (0, 0))
    assert noisy.at(300) == pytest.approx(30), "from the nearest"


def test_the_reference_step_is_computed_and_only_the_trainers_parts_are_added() -> None:
    sizes = (10, 20, 40, 80)
    linear = scale.Growth(sizes, [size / 1000 for size in sizes], (1, 2, 3, 4_000_000))

    def part(name: str, at: int | str, role: str, times: float = 1.0) -> tuple[scale.Part, scale.Growth]:
        return scale.Part(name, "rows", sizes, lambda _: list, at, role, times), linear  # type: ignore[arg-type]

    text = scale.report(
        [
            part("a", 3000, "trainer"),
            part("b", "data", "trainer", 0.001),
            part("c", 60, "worker"),
            part("d", 60, "once"),
        ]
    )
    lines = text.splitlines()[2:]
    assert lines[0] == (
        "| a | trainer | 10, 20, 40, 80 rows | 0.01, 0.02, 0.04, 0.08 | 4 | 1.00 | 3 s (5.0%) | 3 s (5.0%) |"
    )
    assert lines[1].endswith("| 0.0174 s (0.0%) | 2 s (3.3%) |")
    assert lines[2].endswith("| 0.06 s (0.1%) | 0.06 s (0.1%) |") and lines[3].endswith("| 0.06 s | 0.06 s |")
    assert lines[4].endswith("| 3.02 s (5.0%) | 5 s (8.3%) |")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the command: where torch takes a second thread, at some size, other jobs are waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("part", scale.PARTS, ids=lambda part: part.name)
def test_nothing_grows_faster_than_its_size(part: scale.Part) -> None:
    growth = scale.measured(part, 5)
    assert growth.exponent <= 1.3, f"{part.name}: {growth.seconds} s at {growth.sizes} {part.unit}"


def test_a_draw_is_from_ids_in_another_order_than_they_were_visited() -> None:
    state = recipe.visited_state(100)
    assert sorted(state.prompts.rows(map(recipe.prompt_key, range(100)))) == list(range(100))
    assert list(state.prompts.rows(map(recipe.prompt_key, range(100)))) != list(range(100))
