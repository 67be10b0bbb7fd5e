"""Who is one of several processes, and who would have been so in silence."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natfp_jax import launcher
from natfp_jax.errors import UserError
from natfp_jax.launcher import Launch, detect

ADDRESS = "JAX_COORDINATOR_ADDRESS"
ARGUMENTS = ("--coordinator", "--processes", "--process")


def skypilot(size=2, rank=0):
    ips = "\n".join(f"10.0.0.{n + 1}" for n in range(size))
    return {"SKYPILOT_NODE_IPS": ips, "SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_NODES": str(size)}


def slurm(size=2, rank=0):
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "node[1-2]" if size > 1 else "node1",
        "SLURM_NTASKS": str(size),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def slurm_job(size=2, rank=0):
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    return slurm(size, rank) | dict.fromkeys(names, str(size))


def ompi5(size=2, rank=0):
    names = ("SIZE", "RANK", "LOCAL_RANK")
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in zip(names, (size, rank, rank), strict=True)}


def ompi4(size=2, rank=0):
    return {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"} | ompi5(size, rank)


def kubernetes(size=2, rank=0):
    return {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(rank)}


def tpu(size=2, rank=0):
    return {"TPU_WORKER_HOSTNAMES": ",".join(f"t{n}" for n in range(size)), "TPU_WORKER_ID": str(rank)}


def multislice(size=2, rank=0):
    return {
        "MEGASCALE_COORDINATOR_ADDRESS": "t0:8080",
        "MEGASCALE_NUM_SLICES": str(size),
        "MEGASCALE_SLICE_ID": str(rank),
    }


def torchrun(size=2, rank=0):
    return {"WORLD_SIZE": str(size), "RANK": str(rank)}


def mpich(size=2, rank=0):
    return {"PMI_SIZE": str(size), "PMI_RANK": str(rank)}


def mvapich(size=2, rank=0):
    return {"MV2_COMM_WORLD_SIZE": str(size), "MV2_COMM_WORLD_RANK": str(rank)}


@pytest.fixture(params=[True, False], ids=["kubernetes", "bare"])
def package(request, monkeypatch):
    """Whether the package kubernetes is there."""
    monkeypatch.setattr(launcher, "find_spec", lambda name: object() if request.param and name == "kubernetes" else None)
    return request.param


def refused(environ, *args, **more):
    with pytest.raises(UserError) as caught:
        detect(environ, *args, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def each_missing(*environments):
    return [pytest.param(environ, name, id=name) for environ in environments for name in environ]


def test_it_knows_no_jax():
    code = "import natfp_jax.launcher, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_one_process_alone():
    ordinary = {"HOME": "/root", "RANK": "gold", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JAX_COORDINATOR_PORT": "99"}
    assert detect({}) is None
    assert detect(ordinary) is None


EVERYTHING = skypilot() | ompi4() | slurm() | tpu() | kubernetes() | torchrun() | {ADDRESS: "there:1"}


@pytest.mark.parametrize("environ", [{}, EVERYTHING, {"SLURM_NTASKS": "many", "SKYPILOT_NODE_RANK": "0"}])
def test_arguments_win_over_every_environment(environ):
    for coordinator in ("host:1", "10.0.0.1:65535", "[fe80::1]:80"):
        assert detect(environ, coordinator, 4, 3) == Launch("arguments", coordinator, 4, 3)
    assert detect(environ, processes=1) is None
    assert detect(environ, "host:1", 1, 0) is None


@pytest.mark.parametrize("shown", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_arguments_are_all_three_or_none(shown):
    values = [value if there else None for value, there in zip(("host:1", 4, 3), shown, strict=True)]
    got, missing = refused(EVERYTHING, *values).split(": give")[0].split(" without ")
    for argument, there in zip(("--coordinator HOST", "--processes", "--process I"), shown, strict=True):
        assert (argument in got, argument in missing) == (bool(there), not there)


@pytest.mark.parametrize(
    "address",
    [
        "host",
        "host:",
        ":80",
        "host:0",
        "host:65536",
        "host:-1",
        "host:+1",
        "http://host:80",
        "fe80::1:80",
        "[host]:80",
        "a b:80",
        "[]:80",
        "host:80\n",
        "",
    ],
)
def test_an_address_has_a_host_and_a_port(address):
    assert repr(address) in refused({}, address, 2, 0)
    assert "--coordinator" in refused({}, address, 2, 0)


@pytest.mark.parametrize(
    ("processes", "process", "message"),
    [
        (0, 0, "--processes is 0, expected at least 1: give the number of processes"),
        (-2, 0, "--processes is -2, expected at least 1: give the number of processes"),
        (4, 4, "--process is 4, expected 0 to 3 for --processes 4: count from 0"),
        (4, -1, "--process is -1, expected 0 to 3 for --processes 4: count from 0"),
        (1, 1, "--process is 1, expected 0 to 0 for --processes 1: count from 0"),
    ],
)
def test_arguments_out_of_range(processes, process, message):
    assert refused({}, "host:1", processes, process) == message


FULL = [
    (skypilot(3, 2), Launch("skypilot", "10.0.0.1:8476", 3, 2)),
    (skypilot() | {"JAX_COORDINATOR_PORT": "99"}, Launch("skypilot", "10.0.0.1:99", 2, 0)),
    (skypilot() | {"SKYPILOT_NODE_IPS": "fe80::1\nfe80::2\n"}, Launch("skypilot", "[fe80::1]:8476", 2, 0)),
    (slurm(), Launch("slurm")),
    (slurm_job(4, 3), Launch("slurm")),
    (slurm_job() | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_HET_SIZE": "2"}, Launch("slurm")),
    (ompi4(), Launch("ompi")),
    (ompi5(3, 2) | {ADDRESS: "host:1"}, Launch("ompi", "host:1", 3, 2)),
    (without(ompi5(), "OMPI_COMM_WORLD_LOCAL_RANK") | {ADDRESS: "host:1"}, Launch("ompi", "host:1", 2, 0)),
    (tpu(), Launch("tpu")),
    (tpu(1) | {"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, Launch("tpu")),
    (tpu(1) | multislice(), Launch("tpu")),
    (multislice(), Launch("tpu")),
]


@pytest.mark.parametrize(("environ", "launch"), FULL)
def test_a_launcher_of_several_processes(environ, launch):
    assert detect(environ) == launch
    assert detect(environ, tpu_vm=True) == launch


SOLO = [skypilot(1), slurm(1), slurm_job(1), ompi4(1), ompi5(1), tpu(1), torchrun(1), mpich(1), mvapich(1)]


@pytest.mark.parametrize("environ", SOLO)
def test_a_launcher_of_one_process(environ):
    assert detect(environ) is None


@pytest.mark.parametrize("environ", [slurm(1), ompi4(1), ompi5(1), tpu(1)])
def test_a_launcher_that_counts_one_process_answers_the_address_and_the_machine(environ):
    assert detect(environ | {ADDRESS: "host:1"}) is None
    assert detect(environ, tpu_vm=True) is None


@pytest.mark.parametrize(
    ("environ", "name"),
    each_missing(skypilot(), skypilot(1), slurm(), slurm(2, 1), ompi4(), ompi4(1), tpu(), tpu(1), multislice()),
)
def test_a_launcher_that_misses_one_variable(environ, name):
    rest = without(environ, name)
    if name == "OMPI_MCA_orte_hnp_uri":  # Open MPI 5 has none
        if environ["OMPI_COMM_WORLD_SIZE"] == "1":
            assert detect(rest) is None
        else:
            assert f"export {ADDRESS}=HOST:PORT" in refused(rest)
        return
    for broken in (rest, rest | {name: ""}, rest | {name: " "}):
        got, missing = refused(broken).split(" without ")
        assert name in missing
        assert any(other in got for other in rest)
        assert "--processes 1" in missing


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_NTASKS", "4"),
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("SLURM_NNODES", "2"),
        ("SLURM_JOB_NUM_NODES", "2"),
        ("SLURM_PROCID", "1"),
        ("SLURM_LOCALID", "1"),
    ],
)
def test_a_slurm_job_of_several_tasks_needs_srun(name, value):
    message = refused({"SLURM_JOB_ID": "4711", name: value})
    assert message.startswith(f"{name} is {value} without SLURM_STEP_NODELIST")
    assert "srun natfp" in message
    assert "--processes 1" in message


@pytest.mark.parametrize("more", [{}, {"SLURM_NTASKS": "1"}, {"SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1"}])
def test_a_slurm_job_of_one_task_is_alone_without_srun(more):
    assert detect({"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"} | more) is None


def test_the_shell_of_salloc_is_no_task_of_its_job():
    message = refused(slurm(4) | {"SLURM_STEP_NUM_TASKS": "1"})
    assert message.startswith("SLURM_NTASKS is 4 but SLURM_STEP_NUM_TASKS is 1: ")
    assert "srun natfp" in message


def test_a_launcher_wins_over_what_it_sets_for_mpi():
    sets = {"PMI_SIZE": "2", "PMI_RANK": "1", "PMIX_RANK": "1", "WORLD_SIZE": "2", "RANK": "1"}
    assert detect(slurm(2, 1) | sets) == Launch("slurm")
    assert detect(slurm(1) | {"PMI_SIZE": "1", "PMI_RANK": "0", "PMIX_RANK": "0"}) is None
    assert detect(ompi5(1) | {"PMIX_RANK": "0"}) is None


@pytest.mark.parametrize("many", [ompi4(), torchrun(), mpich(), mvapich()])
def test_several_processes_below_one_task_of_srun_are_not_alone(many):
    if many == ompi4():
        assert detect(slurm(1) | many) == Launch("ompi")
    else:
        assert next(iter(many)) in refused(slurm(1) | many)


def test_mpirun_wins_over_the_slurm_job_it_runs_in():
    for job in (slurm(), slurm(1), without(slurm(4), "SLURM_STEP_NODELIST")):
        assert detect(job | ompi4(8, 7)) == Launch("ompi")
        assert f"mpirun -x {ADDRESS}" in refused(job | ompi5(8, 7))


def test_kubernetes_needs_its_package_and_an_indexed_job(package):
    if package:
        assert detect(kubernetes()) == Launch("kubernetes")
        assert detect(kubernetes() | {ADDRESS: "host:1"}) == Launch("kubernetes")
    else:
        for environ in (kubernetes(), kubernetes() | {ADDRESS: "host:1"}):
            message = refused(environ)
            assert message.startswith("JOB_COMPLETION_INDEX is 0")
            assert all(remedy in message for remedy in ("pip install kubernetes", *ARGUMENTS, "--processes 1"))
    assert detect(without(kubernetes(), "JOB_COMPLETION_INDEX")) is None
    got, missing = refused(without(kubernetes(), "KUBERNETES_SERVICE_HOST")).split(" without ")
    assert "JOB_COMPLETION_INDEX" in got
    assert "KUBERNETES_SERVICE_HOST" in missing


def test_a_tpu_slice_wins_over_the_pods_of_its_job(package):
    assert detect(kubernetes() | tpu()) == Launch("tpu")
    assert detect(kubernetes() | tpu(1)) is None


def test_a_tpu_vm_is_a_slice_where_nothing_else_is_known():
    assert detect({}, tpu_vm=True) == Launch("tpu")
    assert detect(skypilot(1), tpu_vm=True) == Launch("tpu")
    assert detect({}, processes=1, tpu_vm=True) is None


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        (torchrun(), "WORLD_SIZE"),
        (torchrun() | skypilot(1), "WORLD_SIZE"),
        (torchrun() | ompi5(1), "WORLD_SIZE"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE"),
        (mpich(), "PMI_SIZE"),
        ({"PMI_RANK": "1"}, "PMI_RANK"),
        (mvapich(), "MV2_COMM_WORLD_SIZE"),
        ({"MV2_COMM_WORLD_RANK": "1"}, "MV2_COMM_WORLD_RANK"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK"),
        ({ADDRESS: "host:1"}, ADDRESS),
        (skypilot(1) | {ADDRESS: "host:1"}, ADDRESS),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID"),
    ],
)
def test_a_launcher_that_is_not_known(environ, name):
    message = refused(environ)
    assert name in message.split(": ")[0]
    assert all(remedy in message for remedy in (*ARGUMENTS, "--processes 1"))


NUMBERS = [
    (skypilot(), "SKYPILOT_NODE_RANK"),
    (skypilot(), "SKYPILOT_NUM_NODES"),
    *((slurm_job(), name) for name in slurm_job() if name != "SLURM_STEP_NODELIST" and "NODES" not in name),
    *((without(slurm_job(), "SLURM_STEP_NODELIST"), name) for name in ("SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_PROCID")),
    *((ompi5(), name) for name in ompi5()),
    (kubernetes(), "JOB_COMPLETION_INDEX"),
    (tpu(), "TPU_WORKER_ID"),
    (multislice(), "MEGASCALE_NUM_SLICES"),
    (multislice(), "MEGASCALE_SLICE_ID"),
    (torchrun(), "WORLD_SIZE"),
    (mpich(), "PMI_SIZE"),
    (mvapich(), "MV2_COMM_WORLD_SIZE"),
]


@pytest.mark.parametrize(("environ", "name"), NUMBERS)
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "1\n2", "²", "1_0", "9" * 5000])
def test_a_number_is_a_whole_number(environ, name, value):
    assert refused(environ | {name: value}).startswith(f"{name} is {value!r}, expected a whole number: ")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (skypilot(2, 2), "SKYPILOT_NODE_RANK is 2, expected below SKYPILOT_NUM_NODES = 2: "),
        (skypilot() | {"SKYPILOT_NUM_NODES": "3"}, "SKYPILOT_NODE_IPS has 2 addresses, expected SKYPILOT_NUM_NODES = 3: "),
        (skypilot() | {"SKYPILOT_NUM_NODES": "1"}, "SKYPILOT_NODE_IPS has 2 addresses, expected SKYPILOT_NUM_NODES = 1: "),
        (skypilot() | {"SKYPILOT_NUM_NODES": "0"}, "SKYPILOT_NUM_NODES is 0, expected at least 1: "),
        (skypilot() | {"JAX_COORDINATOR_PORT": "0"}, "the first of SKYPILOT_NODE_IPS with JAX_COORDINATOR_PORT or 8476 is"),
        (slurm(2, 2), "SLURM_PROCID is 2, expected below SLURM_NTASKS = 2: "),
        (slurm() | {"SLURM_NTASKS": "0"}, "SLURM_NTASKS is 0, expected at least 1: "),
        (ompi4(2, 2), "OMPI_COMM_WORLD_RANK is 2, expected below OMPI_COMM_WORLD_SIZE = 2: "),
        (ompi5() | {ADDRESS: "host"}, "JAX_COORDINATOR_ADDRESS is 'host', expected HOST:PORT "),
        (tpu(2, 2), "TPU_WORKER_ID is 2, expected below 2, the names in TPU_WORKER_HOSTNAMES: "),
        (tpu() | {"TPU_WORKER_HOSTNAMES": "t0,"}, "TPU_WORKER_HOSTNAMES is 't0,', expected names between commas: "),
        (multislice(2, 2), "MEGASCALE_SLICE_ID is 2, expected below MEGASCALE_NUM_SLICES = 2: "),
    ],
)
def test_a_launcher_that_contradicts_itself(environ, message):
    assert refused(environ).startswith(message)


# The variables of each launcher that say something of other processes; of those in the third place, a value above 0.
SIGNS = [
    (skypilot, set(skypilot()), set()),
    (
        slurm_job,
        {"SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_STEP_NODELIST"},
        {"SLURM_PROCID", "SLURM_LOCALID"},
    ),
    (ompi4, set(ompi4()), set()),
    (kubernetes, {"JOB_COMPLETION_INDEX"}, set()),
    (tpu, set(tpu()), set()),
    (multislice, set(multislice()), set()),
    (torchrun, {"WORLD_SIZE"}, set()),
    (mpich, {"PMI_SIZE"}, {"PMI_RANK"}),
    (mvapich, {"MV2_COMM_WORLD_SIZE"}, {"MV2_COMM_WORLD_RANK"}),
]


@given(st.data())
def test_no_part_of_a_launcher_becomes_silent_runs(data):
    launch, signs, ranks = data.draw(st.sampled_from(SIGNS))
    size = data.draw(st.integers(2, 40))
    rank = data.draw(st.integers(0, size - 1))
    full = launch(size, rank) | {ADDRESS: "host:1"}
    kept = data.draw(st.sets(st.sampled_from(sorted(full))))
    environ = {name: full[name] for name in kept}
    told = kept & (signs | {ADDRESS} | (ranks if rank else set()))
    try:
        found = detect(environ)
    except UserError as error:
        message = str(error)
        assert told
        assert "\n" not in message
        assert any(name in message for name in kept)
    else:
        assert (found is None) == (not told)
