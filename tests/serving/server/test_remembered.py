"""What clients make the server remember is bounded, and what is remembered is right."""

from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.serving.server import remembered
from headstart.serving.server.remembered import MOST, Remembered


def test_a_key_beyond_the_limit_makes_room_and_a_known_one_does_not():
    kept: Remembered[int, int] = Remembered()
    for key in range(MOST):
        kept[key] = key
    kept[0] = 7
    assert (len(kept), kept[0], kept[MOST - 1]) == (MOST, 7, MOST - 1)
    kept[MOST] = 1
    assert kept == {MOST: 1}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers())))
@settings(deadline=None)
def test_it_never_grows_beyond_the_limit_and_gives_what_was_last_put(pairs: list[tuple[int, int]]):
    before, remembered.MOST = remembered.MOST, 4
    try:
        kept: Remembered[int, int] = Remembered()
        everything = {}
        for key, value in pairs:
            kept[key] = everything[key] = value
            assert len(kept) <= 4
            assert kept[key] == value
            assert kept.items() <= everything.items()
    finally:
        remembered.MOST = before
