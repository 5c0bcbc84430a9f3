"""The benchmark of the server: its clock, its formats, and a quick run of our own server."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving.__main__ import main
from benchmarks.serving.client import Clock
from benchmarks.serving.formats import FORMATS
from benchmarks.serving.measure import TOLERANCE, beside
from benchmarks.serving.plot import newest, plot
from benchmarks.serving.servers import PEERS, PROGRAMS, SERVERS

ROOT = Path(__file__).parents[2]


def test_bursts_are_counted_at_their_rate(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(16, seconds=10, warm_up_s=0.3)
    for turn in range(1, 100):
        now = turn * 0.7
        more = [clock.answered(now - 0.7, is_first=turn == 1) for _ in range(16)]
        if not all(more):
            break
    assert clock.rate == pytest.approx(16 / 0.7)
    assert np.allclose(clock.latencies_ms, 700)


def test_a_slow_client_s_first_answer_begins_the_spell(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(2, seconds=1, warm_up_s=0.3)
    for _ in range(50):
        now += 0.1
        assert clock.answered(now - 0.1, is_first=now < 0.15)
    assert clock.latencies_ms == []  # the other client has not been answered yet
    assert clock.answered(0, is_first=True)
    now += 0.5
    assert clock.answered(now - 0.1, is_first=False)
    assert clock.rate == pytest.approx(2)


def test_a_spell_has_two_answers_a_client_however_short_it_is(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(2, seconds=0.1, warm_up_s=0)
    assert [clock.answered(0, is_first=True) for _ in range(2)] == [True, True]
    asked = []
    for now in (0.4, 0.4, 0.8, 0.8):
        asked.append(clock.answered(now - 0.4, is_first=False))
    assert asked == [True, True, True, False]
    assert clock.latencies_ms == pytest.approx([400] * 4)
    assert clock.rate == pytest.approx(5)


def test_a_clock_that_moves_between_blocks_moves_no_overhead():
    # A block each, and the bare calls on both sides of it; numbers that make the medians of all of them 10.5 and 14.
    slow = [1.0, 1.0, 1.4, 1.4, 1.4]
    latencies = [[10.5 * one] * count for one, count in zip(slow, (20, 20, 3, 3, 3), strict=True)]
    calls = [[10.0 * one] * count for one, count in zip(slow, (3, 3, 20, 20, 20), strict=True)]
    figures = beside(latencies, [1e3 / block[0] for block in latencies], calls, 1, alone=True)
    assert figures == pytest.approx(
        {"rate_ratio": 1 / 1.05, "bare_p50_ms": 14.0, "overhead_ms": 0.7, "p50_ratio": 1.05}
    )
    assert beside([[320.0] * 32], [96.0], [[160.0] * 4], 16, alone=False) == {"rate_ratio": pytest.approx(0.96)}


def test_the_picture_is_of_the_last_commit_that_has_most_servers(tmp_path: Path):
    table = tmp_path / "serving-cpu.csv"

    def rows(*commits: str, servers: str, overhead: int = 3) -> list[str]:
        return [
            f"{commit},mlp,{server},binary,{clients},{overhead},5"
            for commit in commits for server in servers for clients in (1, 32)
        ]  # fmt: skip

    def drawn(*lines: str) -> list[tuple[str, str, str]]:
        table.write_text("\n".join(["commit,model,server,transport,concurrency,overhead_ms,requests_per_s", *lines]))
        with table.open() as file:
            return [(row["commit"], row["server"], row["overhead_ms"]) for row in newest(csv.DictReader(file))][::2]

    old, new = rows("old", servers="abc"), [*rows("new", servers="a"), *rows("new+dirty", servers="bc")]
    assert {commit for commit, *_ in drawn(*old, *new[:4])} == {"old"}
    assert {commit for commit, *_ in drawn(*old, *new)} == {"new", "new+dirty"}
    again = [*rows("new+dirty", servers="a", overhead=7), *rows("newer", servers="a")]
    assert drawn(*old, *new, *again) == [("new+dirty", "a", "7"), ("new+dirty", "b", "3"), ("new+dirty", "c", "3")]
    picture = plot(table)
    assert picture.parent == tmp_path
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["binary", "JSON"])
def test_requests_state_their_length_and_hold_the_row(kind: str):
    row = np.arange(2048, dtype=np.float32)[None]
    head, _, body = FORMATS[kind].encode(row, "features", "logits").partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    length = int(head.split(b"Inference-Header-Content-Length: ")[1].split(b"\r\n")[0]) if kind == "binary" else None
    document = json.loads(body[:length])
    data = np.frombuffer(body[length:], np.float32) if length else document["inputs"][0]["data"]
    assert np.array_equal(data, row[0])
    assert document["inputs"][0]["shape"] == [1, 2048]


def test_every_peer_has_a_program_and_a_pinned_list():
    assert all((PROGRAMS / server.program).is_file() for server in SERVERS if server.program)
    for peer in PEERS:
        if peer != "ray":  # in the extra `serve`
            assert all("==" in line for line in (PROGRAMS / f"{peer}.txt").read_text().split())


@pytest.mark.parametrize(
    ("option", "given", "said"),
    [
        ("--peers", "lit,nope", "no peer 'nope'; accepted: "),
        ("--models", "mlp,", "no model ''; accepted: mlp, mobilenet_v2"),
        ("--concurrency", "1,eight", "--concurrency has 'eight'; accepted: whole numbers"),
        ("--concurrency", "0", "--concurrency has '0'"),
    ],
)
def test_what_is_not_known_is_refused_before_anything_is_installed(
    option: str, given: str, said: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        main([option, given])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_run_measures_our_server(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.serving", "--quick", "--peers", "", "--no-rows", "--json"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200, check=True
    )
    report = json.loads(done.stdout)
    assert report["failures"] == {}
    rows = {(row["server"], row["transport"], row["concurrency"]): row for row in report["rows"]}
    for way in ("binary", "JSON", "gRPC"):
        for concurrency in (1, 32):
            row = rows["headstart", way, concurrency]
            assert 0 <= row["difference"] <= TOLERANCE
            assert row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
            assert row["requests_per_s"] > 0
            assert row["cpu_ms_per_request"] > 0
    assert rows["headstart", "binary", 1]["overhead_ms"] > 0
    assert 30 < rows["headstart", "binary", 1]["peak_mb"] < 1000  # torch would not fit
