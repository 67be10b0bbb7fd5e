"""A real SLURM of two hosts on this machine, started by hand.

Owns munge and SLURM's daemons, on the hosts of `hosts`, and what is asked of them. Must not know what the jobs are. Needs root,
Debian's slurm-wlm and munge, and what `hosts` needs.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.soak import hosts, meshes

__all__ = ["LATE", "NAMES", "Cluster", "Job", "cluster", "missing"]

NAMES = (f"natfp-{os.getpid()}-1", f"natfp-{os.getpid()}-2")  # of the nodes; the controller is on the first
LATE = 2 * meshes.STUCK  # seconds; a job is two starts of natfp, or three
STARTED = 30  # seconds for the daemons


def missing() -> str | None:
    """Why there can be no SLURM here, in a line."""
    tools = [tool for tool in ("slurmctld", "slurmd", "srun", "sbatch", "munged", "setpriv") if shutil.which(tool) is None]
    return f"SLURM needs Debian's slurm-wlm and munge: {', '.join(tools)} not found" if tools else hosts.missing()


@dataclass(frozen=True)
class Job:
    """What SLURM says of a job: such as "COMPLETED" and 0; how often it was queued again."""

    state: str
    code: int
    restarts: int


@dataclass(frozen=True)
class Cluster:
    """Two idle nodes, and their controller's commands."""

    folder: Path
    on: Callable[[int], list[str]]

    def asked(self, *command: object) -> str:
        """What a command of SLURM prints on the first host."""
        done = subprocess.run(
            [*self.on(0), *map(str, command)],
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=self.folder,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def environment(self) -> dict[str, str]:
        """That of every command and job."""
        natfp = str(Path(sys.executable).with_name("natfp"))
        return meshes.environment(1, SLURM_CONF=str(self.folder / "slurm.conf"), NATFP=natfp)

    def submitted(self, *arguments: object) -> str:
        """The id of a new job of `launch/slurm.sbatch`; its log is `log` of it."""
        return self.asked("sbatch", "--parsable", *arguments)

    def log(self, job: str) -> str:
        """What a job has said."""
        path = self.folder / f"natfp-{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def daemon_log(self, name: str) -> str:
        """What the daemon of a node has logged."""
        return (self.folder / "log" / f"slurmd-{name}.log").read_text(errors="replace")

    def job(self, job: str) -> Job:
        """How a job stands."""
        # The first job of an array has the array's number, by which SLURM shows all of them.
        every = re.split(r"^(?=JobId=)", self.asked("scontrol", "show", "job", job), flags=re.MULTILINE)
        said = next(one for one in every if one.startswith(f"JobId={job} "))
        fields = dict(re.findall(r"(JobState|ExitCode|Restarts)=(\S+)", said))
        return Job(fields["JobState"], int(fields["ExitCode"].split(":")[0]), int(fields["Restarts"]))

    def members(self, array: str) -> list[str]:
        """The ids of the jobs of an array, all of which have been started."""
        return sorted(re.findall(r"\bJobId=(\d+)", self.asked("scontrol", "show", "job", array)))

    def resumed(self, name: str) -> None:
        """Takes a node that was lost into service again, as its operator does."""
        self.asked("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def until(self, what: Callable[[], bool], why: str, seconds: float = LATE) -> None:
        """Waits for something to be so.

        Raises:
          RuntimeError: it is not so in time.
        """
        late = time.monotonic() + seconds
        while not what():
            if time.monotonic() > late:
                logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(self.folder.glob("natfp-*.log")))
                raise RuntimeError(f"not in {seconds} s: {why}\n{self.asked('squeue')}\n{logs}")
            time.sleep(0.2)

    def ended(self, job: str) -> Job:
        """How a job ended."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        self.until(lambda: self.job(job).state in over, f"job {job} ends")
        return self.job(job)


def _configuration(folder: Path) -> str:
    nodes = "\n".join(
        f"NodeName={name} NodeAddr={address} CPUs=2 State=UNKNOWN" for name, address in zip(NAMES, hosts.ADDRESSES, strict=True)
    )
    # A job that is queued again waits until its old credentials are no longer taken for the new one's: otherwise two minutes.
    return f"""
ClusterName=natfp
SlurmctldHost={NAMES[0]}({hosts.ADDRESSES[0]})
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=15
SchedulerParameters=sched_interval=1
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=5
SlurmdTimeout=15
InactiveLimit=0
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Two idle nodes; nothing of them is left behind."""
    folder = folder.resolve()
    for name in ("state", "log", *(f"spool/{name}" for name in NAMES)):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(_configuration(folder))
    munge = ["--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid"]
    munge += [f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/munge.seed"]
    daemons: list[subprocess.Popen] = []
    with hosts.two_hosts(folder, NAMES) as on:
        made = Cluster(folder, on)

        def start(name: str, command: list[str]) -> None:
            with open(folder / "log" / f"{name}.out", "w") as said:
                daemons.append(
                    subprocess.Popen(
                        ["setpriv", "--pdeathsig", "TERM", *command],  # so that none outlives a test that is killed
                        stdin=subprocess.DEVNULL,
                        stdout=said,
                        stderr=said,
                        env=made.environment(),
                        start_new_session=True,
                    )
                )

        try:
            start("munged", ["munged", *munge])
            made.until((folder / "munge.sock").exists, "munged answers", STARTED)
            start("slurmctld", [*on(0), "slurmctld", "-D", "-c"])
            for host, name in enumerate(NAMES):
                start(name, [*on(host), "slurmd", "-D", "-N", name])
            made.until(lambda: _idle(made), "both nodes are idle", STARTED)
            yield made
            with contextlib.suppress(RuntimeError):
                made.asked("scancel", "--user=root")
                made.until(lambda: not made.asked("squeue", "--noheader"), "no job is left", STARTED)
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


def _idle(made: Cluster) -> bool:
    with contextlib.suppress(RuntimeError):
        return made.asked("sinfo", "--noheader", "--format=%D %T") == "2 idle"
    return False
