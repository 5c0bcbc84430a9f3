"""Which size of batch is chosen, from times that are given and not taken."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.serving.server.scheduling.sizes import BatchSizes

KEY = ((224, 224, 3),)
ON_A_CORE = {1: 7.82, 2: 7.45, 4: 7.85, 8: 8.28, 16: 8.79}  # ms for a row: MobileNetV2 at 224 pixels


def chosen(sizes: BatchSizes, ms_a_row: Callable[[int], float], executions: int, waiting: int = 1000) -> list[int]:
    """The sizes of executions one after the other, each of which takes all it may of those who wait."""
    limits = []
    for _ in range(executions):
        limits.append(sizes.limit(KEY, waiting))
        rows = min(limits[-1], waiting)
        sizes.learn(KEY, rows, rows * ms_a_row(rows) * 1e6)
    return limits


def most(limits: list[int]) -> int:
    """The size that had most of the executions."""
    return max(set(limits), key=limits.count)


def test_the_size_that_takes_least_for_a_row_is_found_and_kept():
    limits = chosen(BatchSizes(16), ON_A_CORE.__getitem__, 2000)
    assert limits[:10] == [16] * 5 + [8] * 5
    assert limits[:25] == [size for size in (16, 8, 4, 2, 1) for _ in range(5)]
    assert limits[25:].count(2) > 0.98 * len(limits[25:])
    assert set(limits[25:]) == {1, 2, 4}  # its neighbours are measured from time to time


def test_where_larger_batches_pay_the_largest_is_kept_and_small_ones_are_not_tried():
    limits = chosen(BatchSizes(16), lambda rows: 10 / rows + 0.1, 1000)
    assert limits[:10] == [16] * 5 + [8] * 5
    assert limits.count(16) > 0.95 * len(limits)
    assert set(limits) == {16, 8}


def test_of_sizes_that_are_as_good_the_largest_is_kept():
    assert most(chosen(BatchSizes(12), lambda rows: 5 + 0.01 * rows, 1000)[50:]) == 12


def test_the_first_execution_of_a_size_which_allocates_says_nothing():
    seen = set()

    def ms_a_row(rows: int) -> float:
        first = rows not in seen
        seen.add(rows)
        return 1000 if first else ON_A_CORE[rows]

    assert most(chosen(BatchSizes(16), ms_a_row, 500)) == 2


def test_a_change_is_followed_in_time():
    sizes = BatchSizes(16)
    assert most(chosen(sizes, ON_A_CORE.__getitem__, 500)) == 2
    assert most(chosen(sizes, lambda rows: 10 / rows + 0.1, 20_000)[-500:]) == 16


def test_where_fewer_wait_the_sizes_that_they_can_fill_are_tried_and_the_best_of_them_is_kept():
    sizes = BatchSizes(16)
    limits = chosen(sizes, lambda rows: 8 + 0.3 * rows, 500, waiting=7)
    assert limits[:20] == [size for size in (8, 4, 2, 1) for _ in range(5)]
    assert limits[20:].count(1) > 0.98 * len(limits[20:])
    assert sizes.limit(KEY, 9) == 16  # which nothing is known of yet
    assert sizes.limit(KEY, 1) == 1


def test_where_larger_batches_pay_all_who_wait_are_taken():
    limits = chosen(BatchSizes(16), lambda rows: 10 / rows + 0.1, 1000, waiting=6)
    assert limits.count(8) > 0.95 * len(limits)
    assert set(limits) == {8, 4}


def test_long_executions_are_believed_sooner():
    limits = chosen(BatchSizes(8), lambda rows: 100 + 5 * rows, 16)
    assert limits == [8] * 2 + [4] * 3 + [2] * 4 + [1] * 5 + [1] * 2


def test_an_execution_without_rows_says_nothing():
    sizes = BatchSizes(16)
    sizes.learn(KEY, 0, 1e6)
    assert len(sizes._learnt) == 0


def test_each_shape_has_its_own_and_they_are_bounded():
    sizes = BatchSizes(16)
    chosen(sizes, ON_A_CORE.__getitem__, 500)
    assert sizes.limit(((28, 28, 3),), 16) == 16
    for side in range(1000):
        sizes.learn(((side, side, 3),), 16, 1e9)
    assert len(sizes._learnt) <= 256


@pytest.mark.parametrize("most_rows", [1, 2, 3, 7, 16, 100])
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_no_batch_is_larger_than_it_may_be_whatever_the_times(most_rows: int, data: st.DataObject):
    sizes = BatchSizes(most_rows)
    for ms in data.draw(st.lists(st.sampled_from([0.0, 1.0, 1.01, 2.0, 50.0]), max_size=100)):
        waiting = data.draw(st.integers(1, 2 * most_rows))
        limit = sizes.limit(KEY, waiting)
        assert 1 <= limit <= most_rows
        assert limit < 2 * waiting
        sizes.learn(KEY, data.draw(st.integers(1, most_rows)), ms * 1e6)
