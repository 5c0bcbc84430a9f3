"""Coverage-guided fuzzing for a while: nothing that a client sends may crash, hang or swell what reads it."""

import re
import time

import pytest

from tests.serving.fuzz import HANG_S, TARGETS, run

pytest.importorskip("atheris", reason="atheris, which is in the extra dev, does not import here")
HERE = "tests.serving.server.wire.test_fuzz"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_that_is_sent_breaks_what_reads_it(target: str):
    outcome = run(target, seconds=20, seed=1)  # as long as it is; `make fuzz` goes other ways each time
    print(outcome)
    assert not outcome.code, f"{outcome}\n{outcome.log[-4000:]}"
    assert outcome.executions > 1000
    assert outcome.features > 10, "the code under test was not instrumented"


def crash():
    def target(data: bytes) -> None:
        if len(data) > 2 and data[0] == 1 and data[1] == 97 and data[2] == 98:  # coverage leads there, step by step
            raise KeyError("planted")

    return target, [b"xxxx"]


def hang():
    def target(data: bytes) -> None:
        while data.startswith(b"\x01a"):
            pass

    return target, [b"\x01xx"]


def growth():
    kept, began = [], time.monotonic()

    def target(data: bytes) -> None:
        if time.monotonic() > 0.05 * len(kept) + began:
            kept.append(b"x" * (1 << 20))

    return target, [b"x"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "words"),
    [
        (crash, "KeyError: 'planted'"),
        (hang, f"timeout={HANG_S}s|timeout after {HANG_S}"),
        (growth, "MemoryError: the process grew"),
    ],
)
def test_what_is_planted_is_found(planted, words: str):
    outcome = run(f"{HERE}:{planted.__name__}", seconds=20, seed=1)
    assert outcome.code, outcome
    assert re.search(words, outcome.log)
    if planted is not growth:
        assert outcome.finding
        assert outcome.finding.startswith(b"\x01a")
