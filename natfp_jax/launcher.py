"""How the processes of one program find one another.

Owns what a launcher (SkyPilot, Open MPI, Slurm, a Kubernetes job, a TPU slice) leaves in the environment: whether this process
is one of several, who they are, and the refusal of an environment that is set by half, which would otherwise become as many
silent runs as there are processes. Must not know JAX, nor what the processes do.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import IPv6Address

from natfp_jax.errors import UserError

__all__ = ["Launch", "detect"]

_ARGUMENTS = "--coordinator HOST:PORT, --processes N and --process I"
_ALONE = "--processes 1 for processes that do not work together"
_REMEDY = f"give {_ARGUMENTS}, or {_ALONE}"

_ADDRESS, _PORT = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"
_OMPI_URI = "OMPI_MCA_orte_hnp_uri"  # Open MPI 4 and before; by it JAX knows Open MPI
_OMPI_SIZE, _OMPI_RANK, _OMPI_LOCAL = (f"OMPI_COMM_WORLD_{part}" for part in ("SIZE", "RANK", "LOCAL_RANK"))
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # what JAX needs
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # JAX looks in this order
_MEGASCALE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")


@dataclass(frozen=True)
class Launch:
    """That this process is one of several, and how they meet.

    Attributes:
      method: "arguments", "skypilot", "slurm", "ompi", "kubernetes" or "tpu".
      coordinator: HOST:PORT of process 0; None: JAX's own detection of this method finds it.
      processes: how many there are; None as above.
      process: which one this is, from 0; None as above.
    """

    method: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def detect(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    tpu_vm: bool = False,
) -> Launch | None:
    """How this process meets the others of its program; None for one process alone.

    A variable that is empty counts as not set.

    Args:
      coordinator: --coordinator of the command line, HOST:PORT. The three arguments win over the environment.
      processes: --processes; 1 without the other two is one process alone, whatever the environment says.
      process: --process, from 0.
      tpu_vm: whether this machine is known to be a TPU VM, whose slice is described outside the environment.

    Raises:
      UserError: something is set by half, contradicts itself, or belongs to a launcher that is not known.
    """
    if coordinator is not None or processes is not None or process is not None:
        return _arguments(coordinator, processes, process)
    env = {name: value.strip() for name, value in environ.items() if value.strip()}
    # A rule answers with a Launch, with True where its launcher counts one process, with False where there is no such launcher.
    # Open MPI before Slurm, as in JAX: below mpirun in a Slurm job, the step is that of mpirun's daemons.
    counted: dict[str, bool] = {}
    for method, rule in (("skypilot", _skypilot), ("ompi", _ompi), ("slurm", _slurm), ("tpu", _tpu)):
        found = rule(env)
        if isinstance(found, Launch):
            return found
        counted[method] = found
    if not counted["tpu"] and (indexed := _kubernetes(env)) is not None:
        return indexed
    if any(counted.values()):
        _refuse_unknown(env, counted["ompi"] or counted["slurm"])
        return None
    if tpu_vm:
        return Launch("tpu")
    _refuse_unknown(env, False)
    _refuse_address(env)
    return None


def _arguments(coordinator: str | None, processes: int | None, process: int | None) -> Launch | None:
    if coordinator is None and process is None and processes == 1:
        return None
    given = {"--coordinator HOST:PORT": coordinator, "--processes N": processes, "--process I": process}
    missing = [name for name, value in given.items() if value is None]
    if coordinator is None or processes is None or process is None:
        there = [name for name, value in given.items() if value is not None]
        raise UserError(f"got {_and(there)} without {_and(missing)}: give all three or none, or --processes 1 alone")
    _check_address("--coordinator", coordinator)
    if processes < 1:
        raise UserError(f"--processes is {processes}, expected at least 1: give the number of processes")
    if not 0 <= process < processes:
        raise UserError(f"--process is {process}, expected 0 to {processes - 1} for --processes {processes}: count from 0")
    return None if processes == 1 else Launch("arguments", coordinator, processes, process)


def _skypilot(env: Mapping[str, str]) -> Launch | bool:
    names = ("SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES")
    if not _all_or_none("SkyPilot", env, names):
        return False
    nodes, rank = _place(env, "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK")
    ips = env["SKYPILOT_NODE_IPS"].split()
    if len(ips) != nodes:
        raise UserError(f"SKYPILOT_NODE_IPS has {len(ips)} addresses, expected SKYPILOT_NUM_NODES = {nodes}: {_REMEDY}")
    if nodes == 1:
        return False  # one node, on which another launcher may have started several processes
    port = env.get(_PORT, "8476")
    host = f"[{ips[0]}]" if ":" in ips[0] and not ips[0].startswith("[") else ips[0]
    _check_address(f"the first of SKYPILOT_NODE_IPS with {_PORT} or 8476", f"{host}:{port}")
    return Launch("skypilot", f"{host}:{port}", nodes, rank)


def _ompi(env: Mapping[str, str]) -> Launch | bool:
    needed = [_OMPI_SIZE, _OMPI_RANK]
    if _OMPI_URI in env:
        needed.append(_OMPI_LOCAL)
    if not _all_or_none("Open MPI", env, needed, (_OMPI_URI, _OMPI_LOCAL)):
        return False
    size, rank = _place(env, _OMPI_SIZE, _OMPI_RANK)
    _number(env, _OMPI_LOCAL)
    if size == 1:
        return True
    if _OMPI_URI in env:
        return Launch("ompi")
    if _ADDRESS not in env:
        raise UserError(
            f"{_OMPI_SIZE} is {size}, but Open MPI 5 says not where rank 0 is: export {_ADDRESS}=HOST:PORT of rank 0 to all"
            f" processes (mpirun -x {_ADDRESS}), or {_REMEDY}"
        )
    _check_address(_ADDRESS, env[_ADDRESS])
    return Launch("ompi", env[_ADDRESS], size, rank)


def _slurm(env: Mapping[str, str]) -> Launch | bool:
    missing = [name for name in _SLURM if name not in env]
    if missing:
        _refuse_unstarted(env, missing)
        return False
    tasks, _ = _place(env, "SLURM_NTASKS", "SLURM_PROCID")
    _number(env, "SLURM_JOB_ID")
    _number(env, "SLURM_LOCALID")
    # The shell of salloc is a step of one task that keeps SLURM_NTASKS of its job. (A heterogeneous step counts its parts.)
    step = _number(env, "SLURM_STEP_NUM_TASKS", tasks)
    if step != tasks and "SLURM_HET_SIZE" not in env:
        raise UserError(
            f"SLURM_NTASKS is {tasks} but SLURM_STEP_NUM_TASKS is {step}: the job has {tasks} tasks and this process was not"
            f" started by srun: start it as `srun natfp ...`, or give {_ALONE}"
        )
    return True if tasks == 1 else Launch("slurm")


def _refuse_unstarted(env: Mapping[str, str], missing: list[str]) -> None:
    """Refuses a process in a Slurm job of several tasks that srun did not start."""
    count = "SLURM_NTASKS" if "SLURM_NTASKS" in env else "SLURM_STEP_NUM_TASKS"
    least = {count: 1, "SLURM_NNODES": 1, "SLURM_JOB_NUM_NODES": 1, "SLURM_PROCID": 0, "SLURM_LOCALID": 0}
    signs = [f"{name} is {env[name]}" for name, alone in least.items() if _number(env, name) > alone]
    if count not in env and "SLURM_STEP_NODELIST" in env:
        signs.append("SLURM_STEP_NODELIST is set")
    if signs:
        raise UserError(
            f"{_and(signs)} without {_and(missing)}: this process of a Slurm job was not started by srun: start it as"
            f" `srun natfp ...`, or give {_ALONE}"
        )


def _tpu(env: Mapping[str, str]) -> Launch | bool:
    hosts = next((name for name in _TPU_HOSTS if name in env), _TPU_HOSTS[-1])
    slices = _all_or_none("a TPU multislice", env, _MEGASCALE)
    workers = _all_or_none("a TPU slice", env, (hosts, "TPU_WORKER_ID"))
    if slices:
        _place(env, "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
    if not workers:
        return Launch("tpu") if slices else False
    names = [name.strip() for name in env[hosts].split(",")]
    if "" in names:
        raise UserError(f"{hosts} is {env[hosts]!r}, expected names between commas: mend it, or {_REMEDY}")
    worker = _number(env, "TPU_WORKER_ID")
    if worker >= len(names):
        raise UserError(f"TPU_WORKER_ID is {worker}, expected below {len(names)}, the names in {hosts}: mend it, or {_REMEDY}")
    return Launch("tpu") if slices or len(names) > 1 else True


def _kubernetes(env: Mapping[str, str]) -> Launch | None:
    index = "JOB_COMPLETION_INDEX"
    if index not in env:  # KUBERNETES_SERVICE_HOST alone is in every pod
        return None
    _all_or_none("a Kubernetes indexed job", env, (index, "KUBERNETES_SERVICE_HOST"))
    _number(env, index)
    if find_spec("kubernetes") is None:
        raise UserError(
            f"{index} is {env[index]}, but the number of pods is known to the package kubernetes alone, which is not installed:"
            f" pip install kubernetes, or {_REMEDY}"
        )
    return Launch("kubernetes")


def _refuse_unknown(env: Mapping[str, str], counted: bool) -> None:
    """Refuses the processes of a launcher that is not known.

    Args:
      counted: whether Open MPI or Slurm counts one process, which both may give a PMIX_RANK.
    """
    # A RANK alone may be anything.
    for count, index in (("WORLD_SIZE", None), ("PMI_SIZE", "PMI_RANK"), ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK")):
        name = index if index and count not in env else count
        if _number(env, name) > (1 if name == count else 0):
            raise UserError(f"{name} is {env[name]}, set by a launcher of several processes that is not known: {_REMEDY}")
    if "PMIX_RANK" in env and not counted:
        raise UserError(f"PMIX_RANK is {env['PMIX_RANK']!r}, but no launcher says how many processes there are: {_REMEDY}")


def _refuse_address(env: Mapping[str, str]) -> None:
    """Refuses variables of JAX's name where no launcher gives the number of processes."""
    there = [name for name in (_ADDRESS, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if name in env]
    if there:
        raise UserError(
            f"got {_and(there)}, but no launcher says how many processes there are and which one this is: JAX reads"
            f" {_ADDRESS}, and no JAX_NUM_PROCESSES or JAX_PROCESS_ID: {_REMEDY}"
        )


def _all_or_none(launcher: str, env: Mapping[str, str], names: list[str] | tuple[str, ...], more: tuple[str, ...] = ()) -> bool:
    """Whether all `names` are set.

    Args:
      more: variables that may be missing, but do not go without `names`.

    Raises:
      UserError: some variables are set and some of `names` are not.
    """
    missing = [name for name in names if name not in env]
    there = [name for name in dict.fromkeys((*names, *more)) if name in env]
    if there and missing:
        raise UserError(f"{launcher} is set by half: got {_and(there)} without {_and(missing)}: set all of them, or {_REMEDY}")
    return not missing


def _place(env: Mapping[str, str], count: str, index: str) -> tuple[int, int]:
    """The number of processes and which one this is, of two variables that are set."""
    size, place = _number(env, count), _number(env, index)
    if size < 1:
        raise UserError(f"{count} is {size}, expected at least 1: mend it, or {_REMEDY}")
    if place >= size:
        raise UserError(f"{index} is {place}, expected below {count} = {size}: mend it, or {_REMEDY}")
    return size, place


def _number(env: Mapping[str, str], name: str, unset: int = 0) -> int:
    if name not in env:
        return unset
    if not re.fullmatch("[0-9]{1,18}", env[name]):
        raise UserError(f"{name} is {env[name]!r}, expected a whole number: mend it, or {_REMEDY}")
    return int(env[name])


def _check_address(what: str, address: str) -> None:
    match = re.fullmatch(r"(?:\[(?P<six>[^\[\]]+)\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})", address)
    good = match is not None and 1 <= int(match["port"]) <= 65535
    if good and match is not None and match["six"] is not None:
        try:
            IPv6Address(match["six"])
        except ValueError:
            good = False
    if not good:
        raise UserError(
            f"{what} is {address!r}, expected HOST:PORT with a port of 1 to 65535: mend it (an IPv6 address stands in brackets)"
        )


def _and(names: list[str]) -> str:
    return " and ".join(names)
