"""Sending a recipe to a cluster through Ray's job API, with the code as a wheel."""

import base64
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from headstart.cluster.connect import set_environment
from headstart.cluster.recipe_file import recipe_yaml
from headstart.trainer.errors import RunError
from headstart.trainer.recipe import Recipe

_POLL = 1.0  # seconds between two looks at a job
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def submit(recipe: Recipe, address: str, out: Path) -> dict[str, Any]:
    """Run `recipe` on the cluster whose dashboard is at `address`, and wait for its end; Ctrl-C stops the job.

    The token is the cluster's, in RAY_AUTH_TOKEN; RAY_ADDRESS is not heeded. Data, cache and `out` are paths of the
    cluster's machines: on more than one machine they must be shared folders. Ray calls `pip` and the job `python` by
    these names, so the PATH that the cluster was started with must lead to the Python that has Headstart's
    dependencies.

    Returns the job's name, its status, Ray's message on it and its run directory. Raises `RunError` when the cluster
    does not answer or refuses the token.
    """
    set_environment(address)
    from ray.exceptions import RayError

    # RuntimeError is Ray's answer to a refused request; requests' own errors and ConnectionError are OSErrors.
    refusals = (RayError, RuntimeError, OSError, ValueError)
    try:
        client, job = _send(recipe, address, out.absolute())
    except refusals as error:
        raise RunError(
            f"cannot submit to {address}: {_first_line(error)}. Start the cluster with `RAY_AUTH_MODE=token "
            "RAY_AUTH_TOKEN=... ray start --head`, give its dashboard's address, and set the same RAY_AUTH_TOKEN here"
        ) from error
    try:
        try:
            found = _follow(client, job)
        except KeyboardInterrupt:
            client.stop_job(job)
            raise
    except refusals as error:
        raise RunError(
            f"lost sight of job {job} at {address}: {_first_line(error)}. It may still run there, and leaves what it "
            f"makes in {out.absolute()}; see `ray job status {job} --address {address}`"
        ) from error
    message = found.message.partition(", last available logs")[0]  # the log itself has gone to stderr
    return {"job": job, "status": found.status.value, "message": message, "out": str(out.absolute())}


def _send(recipe: Recipe, address: str, out: Path) -> tuple[Any, str]:
    """Upload the recipe and the code; returns the client and the job's name."""
    client = _client(address)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        (work / "recipe.yaml").write_text(recipe_yaml(recipe))
        wheel = cluster_wheel(build_wheel(Path(folder)), Path(folder) / "sent")
        run = ["python", "-m", "headstart.cluster.cli", "run", "recipe.yaml", "--address", "auto", "--out", str(out)]
        environment = {"working_dir": str(work), "py_modules": [str(wheel)]}
        job: str = client.submit_job(entrypoint=shlex.join([*run, "--json"]), runtime_env=environment)
    return client, job


def _client(address: str) -> Any:
    """Return a client of the cluster at `address`; Ray itself puts its variables before what it is told."""
    from ray.job_submission import JobSubmissionClient

    taken = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        return JobSubmissionClient(address)
    finally:
        os.environ.update(taken)


def _follow(client: Any, job: str) -> Any:
    """Pass the job's log on to stderr until the job ends; returns Ray's record of it."""
    position = 0
    while True:
        found = client.get_job_info(job)
        logs = client.get_job_logs(job)
        sys.stderr.write(logs[position:])
        position = len(logs)
        if found.status.is_terminal():
            return found
        time.sleep(_POLL)


def build_wheel(folder: Path) -> Path:
    """Build our wheel into `folder` from the checkout that this process runs from.

    Raises `RunError` where there is no checkout: then the cluster's image must hold Headstart itself.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        raise RunError(
            "submit builds a wheel from a checkout of Headstart, and this is an installed one: run it from a checkout, "
            "or install Headstart in the cluster's image and run `headstart run RECIPE --address auto` there"
        )
    # A copy, because setuptools leaves files of earlier builds in a checkout's build/ and packs them again.
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("cluster", "kernels", "serving", "trainer"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(copy)]
    done = subprocess.run([*pip, "-w", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise RunError(f"building the wheel failed: {said[-1]}; try it alone: {shlex.join(pip)}")
    return next(folder.glob("headstart-*.whl"))


def cluster_wheel(wheel: Path, folder: Path) -> Path:
    """Write `wheel` into `folder` in the form that Ray must get, and return it: no dependencies, named by its content.

    Ray (2.60) installs a wheel of `py_modules` by `pip install --target`, which fetches every dependency again, 6 GB
    of them, and puts them before the cluster's own. And it takes two wheels of one file name for the same, so that a
    cluster would go on with the code that was sent to it first: the SHA-256 of what is in it becomes the build tag.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = {name: archive.read(name) for name in sorted(archive.namelist()) if not name.endswith("/")}
    metadata = next(name for name in members if name.endswith(".dist-info/METADATA"))
    record = next(name for name in members if name.endswith(".dist-info/RECORD"))
    header, _, body = members[metadata].partition(b"\n\n")
    lines = [line for line in header.splitlines() if not line.startswith(b"Requires-Dist:")]
    members[metadata] = b"\n".join(lines) + b"\n\n" + body
    members[record] = (
        b"".join(
            b"%b,%b,%d\n" % (name.encode(), _record_digest(content), len(content))
            for name, content in members.items()
            if name != record
        )
        + b"%b,,\n" % record.encode()
    )
    tag = hashlib.sha256(members[record]).hexdigest()[:16]  # the record has the digest of every other file
    distribution, version, python = wheel.name.split("-", maxsplit=2)
    folder.mkdir(parents=True, exist_ok=True)
    sent = folder / f"{distribution}-{version}-0{tag}-{python}"  # a build tag starts with a digit
    with zipfile.ZipFile(sent, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return sent


def _record_digest(content: bytes) -> bytes:
    return b"sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
