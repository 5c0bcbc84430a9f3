"""What is said of a name that does not serve, or not what it should."""

from typing import Any

import pytest

from headstart.serving.server.models.entry import Attempt, Entry
from headstart.serving.server.models.folder import Folder
from headstart.serving.server.models.policy import Policy

CHANGING = "its files are still changing; it is opened when two looks in a row saw the same"


def entry(*versions: int, policy: str = "latest") -> Entry:
    return Entry(name="demo", folder=Folder(versions=dict.fromkeys(versions, ())), policy=Policy.parse(policy))


def failed(*versions: int) -> dict[int, Attempt]:
    return {one: Attempt(files=(), reason=f"{one} is damaged") for one in versions}


def states(one: Entry) -> list[tuple[str, str, str]]:
    return [(row["version"], row["state"], row["reason"]) for row in one.index()]


def test_the_reason_is_that_of_the_last_version_that_is_chosen():
    one = entry(1, 2, 3)
    one.failed = failed(2, 1)
    assert one.reason() == "2 is damaged"
    one.changing = {3}
    assert one.reason() == CHANGING
    one.policy = Policy.parse("pinned:1")
    assert one.reason() == "1 is damaged"
    one.failed, one.changing = failed(3), {1}
    assert one.reason() == CHANGING


def test_a_version_that_is_opened_again_has_no_reason_meanwhile():
    one = entry(1, policy="pinned:1")
    one.failed = failed(1)
    assert states(one) == [("1", "UNAVAILABLE", "1 is damaged")]
    one.loading = {1}
    assert states(one) == [("1", "LOADING", "")]
    assert one.reason() == "it is being loaded"


def test_what_was_unloaded_says_that_and_not_what_else_is_wrong():
    one = entry(1, 2)
    one.failed, one.unloaded = failed(1), True
    unloaded = "unloaded by request; load it by request"
    assert states(one) == [(version, "UNAVAILABLE", unloaded) for version in "12"]
    assert one.reason() == unloaded


def test_a_name_that_cannot_be_listed_is_what_it_was():
    one = entry(1)
    one.see(Folder(refused={"": "it cannot be read"}, is_readable=False), at_once=False)
    assert states(one) == [
        ("1", "UNAVAILABLE", "not chosen by the policy latest"),
        ("", "UNAVAILABLE", "it cannot be read"),
    ]
    assert not one.changing
    one.see(Folder(versions={1: ()}), at_once=False)
    assert not one.changing
    assert one.folder.refused == {}


@pytest.mark.parametrize(
    ("state", "status", "words"),
    [
        ({}, 404, "demo version '2' is not served; served: none"),
        ({"loading": {2}}, 503, "demo version 2 is not ready: it is being loaded"),
        ({"changing": {2}}, 503, f"demo version 2 is not ready: {CHANGING}"),
        ({"failed": failed(2)}, 503, "demo version 2 is not ready: 2 is damaged"),
        ({"unloaded": True}, 503, "demo version 2 is not ready: unloaded by request; load it by request"),
    ],
    ids=["not chosen", "loading", "changing", "failed", "unloaded"],
)
def test_a_version_that_may_yet_serve_is_503_and_any_other_404(state: dict[str, Any], status: int, words: str):
    one = entry(1, 2)
    for name, value in state.items():
        setattr(one, name, value)
    told = one.absence("2", started=True)
    assert (told.status, str(told)) == (status, words)
    assert one.absence("2", started=False).status == 503
    assert one.absence("3", started=False).status == 404
