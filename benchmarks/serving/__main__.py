"""What the server adds to a bare call of ONNX Runtime, beside the servers that others have written.

python -m benchmarks.serving                                # all models, all peers: an hour or two
python -m benchmarks.serving --quick --peers fastapi,lit    # one model, two concurrencies, one round

On the CPU, or with the CUDA provider where torch sees a GPU (CUDA_VISIBLE_DEVICES= leaves the CPU).

Linux with two cores: the server under test has core 0, the client core 1. Each peer is installed from the pinned list
`benchmarks/peers/NAME.txt` into a virtual environment of its own below `--environments`.
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rows import append_rows, device_slug
from benchmarks.serving.measure import Plan, run
from benchmarks.serving.models import MODELS
from benchmarks.serving.plot import plot
from benchmarks.serving.servers import PEERS, SERVERS, install
from headstart.serving.device import CUDA, Device, check
from headstart.serving.errors import PackageError
from headstart.serving.runtime import CPU

_SHOWN = ("p50_ms", "p99_ms", "overhead_ms", "p50_ratio", "requests_per_s", "rate_ratio", "cpu_ms_per_request")


def main(arguments: list[str]) -> int:
    """Measure, append the rows, draw them and print them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives a run that is cut short
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}; empty for ours alone")
    parser.add_argument("--concurrency", default="1,8,32,128", help="numbers of clients")
    parser.add_argument("--rounds", type=int, default=3, help="each starts every server afresh")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a server at one concurrency in one round")
    parser.add_argument("--quick", action="store_true", help="the MLP, 1 and 32 clients, one round of half a second")
    parser.add_argument("--folder", type=Path, default=Path("runs/serving-benchmark"), help="the models are made here")
    parser.add_argument("--environments", type=Path, help="of the peers; in the folder by default")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--no-rows", action="store_true", help="append nothing to benchmarks/results, draw nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.concurrency, options.rounds, options.seconds = "mlp", "1,32", 1, 0.5
    provider = CPU if device_slug() == "cpu" else CUDA  # as the rows name the device
    environments = "environments" if provider == CPU else "environments-gpu"
    environments = (options.environments or options.folder / environments).absolute()
    peers = [name for name in options.peers.split(",") if name]
    models, clients = options.models.split(","), options.concurrency.split(",")
    for what, names, accepted in (("peer", peers, PEERS), ("model", models, MODELS)):
        if unknown := set(names) - set(accepted):
            parser.error(f"no {what} {min(unknown)!r}; accepted: {', '.join(accepted)}")
    if wrong := [number for number in clients if not number.isdecimal() or int(number) < 1]:
        parser.error(f"--concurrency has {wrong[0]!r}; accepted: whole numbers of at least 1, separated by commas")
    try:
        check(Device(provider=provider))
    except PackageError as error:
        parser.error(str(error))
    failures = install(peers, environments, provider)
    groups = {"transport", "headstart", *peers} - set(failures)
    plan = Plan(
        models=tuple(models),
        servers=tuple(server for server in SERVERS if server.group in groups),
        concurrencies=tuple(map(int, clients)),
        rounds=options.rounds,
        seconds=options.seconds,
        models_folder=options.folder.absolute() / "models",
        environments=environments,
        provider=provider,
    )
    rows: list[dict[str, Any]] = []
    for found, failed in run(plan, lambda line: print(line, file=sys.stderr, flush=True)):
        rows, failures = rows + found, failures | failed
        if not options.no_rows:
            plot(append_rows("serving", found))  # after each model: an hour's rows are not lost with the last minute
    if options.json:
        print(json.dumps({"rows": rows, "failures": failures}, indent=2))
    else:
        _print(rows, failures)
    return 0


def _print(rows: list[dict[str, Any]], failures: dict[str, str]) -> None:
    console = Console(width=150)
    for model in dict.fromkeys(row["model"] for row in rows):
        table = Table(title=model, title_justify="left")
        for column in ("server", "transport", "clients", *_SHOWN):
            table.add_column(column, justify="left" if column in ("server", "transport") else "right")
        for row in sorted((row for row in rows if row["model"] == model), key=lambda row: row["concurrency"]):
            table.add_row(*(str(row[column]) for column in ("server", "transport", "concurrency", *_SHOWN)))
        console.print(table)
        starts = {row["server"]: (row["cold_start_s"], row["peak_mb"]) for row in rows if row["cold_start_s"] != ""}
        console.print("; ".join(f"{name}: ready in {start:g} s, {peak:g} MB" for name, (start, peak) in starts.items()))
    for name, reason in failures.items():
        console.print(f"not measured: {name}: {reason}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
