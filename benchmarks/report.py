"""Writes the tables of benchmarks/README.md from the rows in results/, so that no figure is copied by hand.

python -m benchmarks.report

A table stands between `<!-- NAME -->` and `<!-- end -->`, and what is there is replaced. NAME is a file of results, or
`serving MODEL` for the run with most servers, or `serving-runs MODEL` for ours in all runs.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.rows import RESULTS
from benchmarks.serving.plot import newest

PAGE = Path(__file__).with_name("README.md")

Row = Mapping[str, str]
_TABLE = re.compile(r"(?P<start><!-- (?P<name>[\w-]+)(?: (?P<model>\w+))? -->\n).*?(?P<end><!-- end -->)", re.DOTALL)

_DISTANCES = {
    "num_tasks": "tasks",
    "median_rows": "rows each",
    "dim": "D",
    "num_target": "target",
    "contender": "",
    "p50": "p50, ms",
    "speedup": "of ours",
    "max_error": "largest error",
    "peak_mb": "peak MB",
    "of_floor": "floor / time",
}
_COLUMNS = {
    "textbook": {
        "workload": "", "num_images": "images", "epochs": "epochs", "textbook": "textbook, s", "ours_p50": "ours, s",
        "ratio_p50": "ratio, paired median", "ratio_p20": "p20", "ratio_p80": "p80", "limit": "limit",
        "accuracy_textbook": "textbook's accuracy", "accuracy_ours": "ours",
    },
    "precision": {
        "precision": "", "energy": "energy distance", "distance_error": "error of one distance",
        "energy_error": "of the energy", "sinkhorn_error": "of the Sinkhorn distance",
    },
    "stability": {
        "data": "", "precision": "", "num_tasks": "tasks", "dim": "D", "kendall_tau": "Kendall's tau",
        "largest_wrong_gap": "largest gap in wrong order", "max_error": "largest error", "stated_error": "stated error",
        "wrong_beyond_error": "wrong beyond it",
    },
}  # fmt: skip
_SERVERS = {
    "server": "", "transport": "", "overhead_ms": "p50 over bare, 1 client, ms", "requests_per_s 32": "requests/s, 32",
    "rate_ratio 1": "share of bare, 1", "rate_ratio 32": "32", "cpu_ms_per_request": "CPU ms a request",
    "peak_mb": "peak MB", "cold_start_s": "cold start, s", "difference": "largest difference from bare",
}  # fmt: skip
_NO_SHARES = ("rate_ratio 1", "rate_ratio 32")  # of a network of microseconds, whose share is a few percent of anything
_COMPARED = {
    "headstart binary": "ours", "sockets binary": "sockets", "uvicorn binary": "uvicorn", "headstart JSON": "our JSON",
    "FastAPI own JSON": "FastAPI's", "headstart gRPC": "our gRPC",
}  # fmt: skip
_BINARY = ("headstart binary", "sockets binary", "uvicorn binary")
_RUNS_FROM = "2026-11-28"
_AS_WRITTEN = ("commit", "kendall_tau")  # a commit of digits is no number, and three digits of .9998 are 1


def read_rows(name: str) -> list[Row]:
    """Return all rows of `results/<name>-cpu.csv`, oldest first."""
    with (RESULTS / f"{name}-cpu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def last_run(name: str) -> list[Row]:
    """Return the rows of the last commit; the rows that a run itself appends make the next ones dirty."""
    rows = read_rows(name)
    commit = rows[-1]["commit"].removesuffix("+dirty")
    return [row for row in rows if row["commit"].removesuffix("+dirty") == commit]


def servers(model: str) -> tuple[list[Row], Mapping[str, str]]:
    """Every server of the commit at which most were measured, least overhead first, a row each."""
    joined: dict[tuple[str, str], dict[str, str]] = {}
    for row in newest(read_rows("serving")):
        if row["model"] == model and row["transport"] and row["server"] != "echo":
            one = joined.setdefault((row["server"], row["transport"]), {})
            clients = row["concurrency"]
            one |= {key: value for key, value in row.items() if clients == "1" or key not in one}
            one |= {f"{key} {clients}": row[key] for key in ("rate_ratio", "requests_per_s")}
    left_out = _NO_SHARES if model == "mlp" else ()
    columns = {key: title for key, title in _SERVERS.items() if key not in left_out}
    return sorted(joined.values(), key=lambda row: float(row["overhead_ms"] or "inf")), columns


def serving_runs(model: str) -> tuple[list[Row], Mapping[str, str]]:
    """What each commit's run had of ours, and of what says how much of an overhead is anybody's, a row each."""
    joined: dict[str, dict[str, str]] = {}
    for row in read_rows("serving"):
        name, commit = f"{row['server']} {row['transport']}", row["commit"].removesuffix("+dirty")
        if row["model"] == model and row["date"] >= _RUNS_FROM and name in _COMPARED:
            one = joined.setdefault(commit, {"date": row["date"], "commit": commit, "rounds": row["rounds"]})
            keys = ("bare_p50_ms", "overhead_ms", "rate_ratio", "requests_per_s")
            one |= {f"{name} {key} {row['concurrency']}": row[key] for key in keys}
    columns = {"date": "date", "commit": "commit", "rounds": "rounds", "headstart binary bare_p50_ms 1": "bare, ms"}
    columns |= {f"{name} overhead_ms 1": f"+{title}" for name, title in _COMPARED.items()}
    if model == "mlp":
        columns |= {f"{name} requests_per_s 32": f"{title}/s" for name, title in _COMPARED.items()}
    else:
        for clients in (1, 8, 32, 128):
            columns |= {f"{name} rate_ratio {clients}": f"{_COMPARED[name]} {clients}" for name in _BINARY}
    return list(joined.values()), columns


def as_table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Return rows as a Markdown table of those columns that have a value in any of them."""
    kept = {key: title for key, title in columns.items() if any(row.get(key) for row in rows)}
    lines = [list(kept.values()), ["---"] * len(kept)]
    for row in rows:
        values = {key: row.get(key, "") for key in kept}
        lines.append([value if key in _AS_WRITTEN else _plain(value) for key, value in values.items()])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain(value: str) -> str:
    """Return a number with three digits, whole ones whole and only small ones with an exponent; text as it is."""
    try:
        number = float(value)
    except ValueError:
        return value
    if value.isdigit():
        return f"{number:,.0f}"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def render(page: str) -> str:
    """Return the page with each of its tables made anew."""

    def table(found: re.Match[str]) -> str:
        name = found["name"]
        made = ""
        if name == "serving-runs":
            rows, columns = serving_runs(found["model"])
        else:
            rows, columns = (
                servers(found["model"]) if name == "serving" else (last_run(name), _COLUMNS.get(name, _DISTANCES))
            )
            made = f"{rows[0]['date']}, {rows[0]['commit'].removesuffix('+dirty')}, torch {rows[0]['torch']}:\n\n"
        return f"{found['start']}{made}{as_table(rows, columns)}{found['end']}"

    return _TABLE.sub(table, page)


def main() -> None:
    """Rewrite the tables of the page."""
    PAGE.write_text(render(PAGE.read_text()))


if __name__ == "__main__":
    main()
