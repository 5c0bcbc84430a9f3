"""Load with faults for a minute, and that its judge would see what it looks for."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.serving.soak.load import Tally
from tests.serving.soak.versions import Version, corrupt, inputs, make_version

ROOT = Path(__file__).parents[2]
HEAD = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: %d\r\n\r\n"


@pytest.mark.slow
def test_a_minute_of_overload_with_faults_breaks_no_promise():
    command = [sys.executable, "-m", "tests.serving.soak", "--seconds", "60", "--workers", "2", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    report = json.loads(done.stdout)
    assert report["broken"] == [], report
    assert done.returncode == 0
    assert report["versions_deployed"] >= 8
    assert report["clients_killed"] >= 100
    assert report["outcomes"]["200"] > 1000
    assert report["outcomes"]["429"] > 1000
    assert report["outcomes"]["gRPC OK"] > 100


@pytest.fixture
def version(tmp_path: Path) -> Version:
    return make_version(tmp_path, 3)


def answer(tally: Tally, number: int, numbers: np.ndarray, version: int = 3) -> None:
    text = json.dumps({"model_name": "demo", "model_version": str(version), "outputs": []}).encode()
    body = text + numbers.astype(np.float32).tobytes()
    tally.judge(number, time.monotonic(), 200, HEAD % len(text), body)


def test_a_right_answer_is_the_version_s_own(version: Version, tmp_path: Path):
    tally = Tally({3: version})
    for number in range(len(inputs())):
        answer(tally, number, version.expected[number] * (1 + 1e-6))  # as a batch may round it
    assert not tally.problems
    assert tally.outcomes["200"] == len(inputs())
    assert 3 in tally.first_answers
    other = make_version(tmp_path / "other", 4)
    assert np.abs(other.expected - version.expected).min(initial=1) > 0
    answer(tally, 0, other.expected[0])  # another version's numbers under this one's name
    answer(tally, 1, version.expected[0])  # another client's answer
    tally.judge_call(2, "3", version.expected[2].tobytes())
    assert tally.problems == {"a wrong answer of version 3": 2}
    tally.judge_call(2, "3", version.expected[1].tobytes())
    assert tally.problems == {"a wrong answer of version 3": 3}
    answer(tally, 0, version.expected[0], version=9)
    assert tally.problems["an answer names a version that was never deployed whole"] == 1


def test_a_refusal_needs_its_sentence_and_a_reason_to_be(version: Version):
    tally, now = Tally({3: version}), time.monotonic()
    tally.judge(0, now, 429, b"HTTP/1.1 429\r\nRetry-After: 1\r\n\r\n", b'{"error": "the queue is full"}')
    assert not tally.problems
    tally.judge(0, now, 429, b"HTTP/1.1 429\r\n\r\n", b"")
    assert set(tally.problems) == {"429 without a sentence", "429 without Retry-After"}
    tally.judge(0, now, 503, b"HTTP/1.1 503\r\n\r\n", b'{"error": "is being taken down"}')  # a reload's fault
    assert tally.problems["503: is being taken down"] == 1
    tally.judge_refusal(now, "RESOURCE_EXHAUSTED", "the queue is full")
    assert "gRPC RESOURCE_EXHAUSTED: the queue is full" not in tally.problems
    tally.judge_refusal(now, "UNAVAILABLE", "is being taken down")
    assert tally.problems["gRPC UNAVAILABLE: is being taken down"] == 1
    tally.judge(0, now, 500, b"HTTP/1.1 500\r\n\r\n", b'{"error": "failed"}')
    assert tally.problems["500: failed"] == 1


def test_a_lost_connection_is_a_killed_worker_s_alone(version: Version):
    tally, now = Tally({3: version}), time.monotonic()
    tally.lost(now, ConnectionResetError("reset"))
    assert sum(tally.problems.values()) == 1
    tally = Tally({3: version}, killed_at=[now])
    tally.lost(now - 0.1, ConnectionResetError("reset"))
    assert not tally.problems
    tally.lost(now + 1, ConnectionResetError("reset"))  # begun after the kill
    assert sum(tally.problems.values()) == 1


def test_the_corrupt_package_differs_by_a_bit_in_its_graph(version: Version, tmp_path: Path):
    good, bad = ((folder / "model.onnx").read_bytes() for folder in (version.package, corrupt(version, tmp_path)))
    assert [a ^ b for a, b in zip(good, bad, strict=True) if a != b] == [1]
