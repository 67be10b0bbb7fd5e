"""Two hosts whose network is cut in the middle of training: each must end by itself, soon and in words, and go on later.

Owns the two hosts (network namespaces of this machine, each with its own name) and the cut: `python -m tests.soak.hosts
[--out DIR]` writes DIR/hosts.json and DIR/hosts.txt. Needs root and iproute2, and says so where they are missing.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import meshes

__all__ = ["ADDRESSES", "HEARTBEAT", "cut", "hosts", "mend", "missing", "study", "two_hosts"]

HEARTBEAT = 10  # seconds
SLACK = 2  # seconds, for a beat that had just begun and for the end of the process itself
PORT = 9876
NAMES = ("natfp-one", "natfp-two")  # of the hosts, and of their namespaces
ADDRESSES = ("10.77.1.11", "10.77.1.12")
ENDED_BY_US, ENDED_BY_JAX = 75, 134  # natfp_jax.processes.LOST; the runtime, where the process that coordinates ended first


def missing() -> str | None:
    """Why there can be no hosts here, in a line."""
    tools = [tool for tool in ("ip", "nsenter", "unshare", "mount") if shutil.which(tool) is None]
    if tools:
        return f"two hosts need iproute2 and util-linux: {', '.join(tools)} not found"
    if os.geteuid() != 0:
        return "two hosts need root, for namespaces of network"
    probe = subprocess.run(["unshare", "-m", "-u", "-n", "true"], capture_output=True, text=True, check=False)
    return f"this machine refuses namespaces: {probe.stderr.strip()}" if probe.returncode else None


def study(steps: int, save_minutes: float = 0.05) -> str:
    """The study of `meshes` with so many steps an arm."""
    changed = meshes.STUDY.replace("epochs=2", f"epochs={steps // 4}").replace("Run(log_every=2", "Run(log_every=100")
    return changed.replace("validation_windows=32", f"validation_windows=32, save_minutes={save_minutes}")


# --- the hosts --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def two_hosts(folder: Path, names: tuple[str, str] = NAMES) -> Iterator[Callable[[int], list[str]]]:
    """Joins two hosts by a cable; yields what to put before a command to have it run on host 0 or 1."""
    known = folder / "hosts"
    known.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, names, strict=True)))
    enter = f'mount --bind {known} /etc/hosts && hostname "$0" && exec "$@"'
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            mend(name)
            _ip("-n", name, "link", "set", "lo", "up")
        yield lambda host: ["nsenter", f"--net=/run/netns/{names[host]}", "unshare", "-m", "-u", "sh", "-c", enter, names[host]]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def mend(name: str) -> None:
    """Plugs the cable of a host in."""
    _ip("-n", name, "link", "set", "eth0", "up")


def cut(name: str) -> None:
    """Pulls it out."""
    _ip("-n", name, "link", "set", "eth0", "down")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def started(
    on: Callable[[int], list[str]], written: Path, out: Path, notes: Path, heartbeat_seconds: int
) -> list[subprocess.Popen]:
    """`natfp train` on both hosts; what they say goes to files, which no reader holds up."""
    notes.mkdir(parents=True, exist_ok=True)
    both = []
    for host in range(2):
        arguments = ["train", written, "run.mesh.fsdp=2", f"run.heartbeat_seconds={heartbeat_seconds}", "--out", out]
        meeting = meshes.command(f"{NAMES[0]}:{PORT}", 2, host)
        with open(notes / f"{host}.out", "w") as output, open(notes / f"{host}.err", "w") as errors:
            both.append(
                subprocess.Popen(
                    [*on(host), sys.executable, "-c", "from natfp_jax.cli import main; main()", *map(str, arguments), *meeting],
                    stdout=output,
                    stderr=errors,
                    env=meshes.environment(1),
                )
            )
    return both


def ended(both: list[subprocess.Popen], timeout: float) -> list[float | None]:
    """Seconds from now until each has ended; None: not in time, and it was killed."""
    begun, after = time.monotonic(), dict[int, float]()
    try:
        while len(after) < len(both) and time.monotonic() - begun < timeout:
            for host, process in enumerate(both):
                if host not in after and process.poll() is not None:
                    after[host] = round(time.monotonic() - begun, 1)
            time.sleep(0.05)
    finally:
        meshes.cleared(both)
    return [after.get(host) for host in range(len(both))]


# --- the cut ----------------------------------------------------------------------------------------------------------


def hosts(
    work: Path, steps: int, pulled: int = 1, heartbeat_seconds: int = HEARTBEAT, save_minutes: float = 0.05
) -> dict[str, object]:
    """Trains on two hosts untouched, and with a cut of host `pulled`'s cable once a restart state is there.

    Raises:
      RuntimeError: training did not come so far, or ended badly where nothing was cut.
    """
    written = work / "study.py"
    written.write_text(study(steps, save_minutes))

    def run(out: str, notes: str) -> list[subprocess.Popen]:
        return started(on, written, work / out, work / notes, heartbeat_seconds)

    with two_hosts(work) as on:
        begun = time.monotonic()
        _whole(run("untouched", "notes-untouched"), work / "notes-untouched")
        seconds = round(time.monotonic() - begun, 1)
        both = run("cut", "notes-cut")
        try:
            _until_saved(both, work / "cut", work / "notes-cut")
        except BaseException:
            meshes.cleared(both)
            raise
        cut(NAMES[pulled])
        after = ended(both, 6 * heartbeat_seconds)
        mend(NAMES[pulled])
        saved = _saved(work / "cut")
        _whole(run("cut", "notes-again"), work / "notes-again")
    sides = [
        {
            "host": NAMES[host],
            "seconds_to_end": after[host],
            "exit_code": both[host].returncode,
            "last_line": _last_line(work / "notes-cut" / f"{host}.err"),
            "in_words": "has lost another process" in (work / "notes-cut" / f"{host}.err").read_text(),
        }
        for host in range(2)
    ]
    records = {name: meshes.latest(work / name) for name in ("untouched", "cut")}
    weights = {name: {arm: record["weights"] for arm, record in arms.items()} for name, arms in records.items()}
    return {
        "heartbeat_seconds": heartbeat_seconds,
        "cable_of": NAMES[pulled],
        "untouched_seconds": seconds,
        "saved_steps": saved,
        "sides": sides,
        "all_within_heartbeat": all(second is not None and second <= heartbeat_seconds + SLACK for second in after),
        "all_in_words": all(side["in_words"] for side in sides),
        "weights": weights,
        "bitwise_equal_to_untouched": weights["untouched"] == weights["cut"],
    }


def _until_saved(both: list[subprocess.Popen], out: Path, notes: Path) -> None:
    until = time.monotonic() + meshes.STUCK
    while not _saved(out):
        if time.monotonic() > until or any(process.poll() is not None for process in both):
            raise RuntimeError(f"no restart state was saved: {_last_line(notes / '0.err')}; {_last_line(notes / '1.err')}")
        time.sleep(0.05)


def _saved(out: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in out.glob("restart/*/*/manifest.json") if path.parent.name.isdecimal())


def _whole(both: list[subprocess.Popen], notes: Path) -> None:
    ended(both, 300)
    for host, process in enumerate(both):
        if process.returncode:
            raise RuntimeError(f"host {host} ended with {process.returncode}: {(notes / f'{host}.err').read_text()[-2000:]}")


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _text(found: dict[str, object]) -> str:
    lines = [f"{found['command']}: a heartbeat of {HEARTBEAT} s, cut and mended {len(found['cuts'])} times"]
    for one in found["cuts"]:
        lines += ["", f"the cable of {one['cable_of']} was pulled with the steps {one['saved_steps']} saved:"]
        for side in one["sides"]:
            lines += [f"  {side['host']} ended after {side['seconds_to_end']} s with {side['exit_code']}: {side['last_line']}"]
        lines += [f"  {name}: {json.dumps(one[name])}" for name in one if name.startswith(("all_", "bitwise"))]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.hosts", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=meshes.ROOT / "docs" / "results" / "reliability")
    parser.add_argument("--steps", type=int, default=600, help="of each of two arms; a multiple of 4")
    arguments = parser.parse_args()
    if (why := missing()) is not None:
        print(f"skipped: {why}")
        return
    cuts = []
    for pulled in (1, 0):
        with tempfile.TemporaryDirectory() as work:
            cuts.append(hosts(Path(work), arguments.steps, pulled))
    found = {"command": "python -m tests.soak.hosts", "cuts": cuts}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "hosts.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "hosts.txt").write_text(_text(found))
    print(_text(found))


if __name__ == "__main__":
    main()
