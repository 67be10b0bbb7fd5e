"""Invariant 5: a replica is its solo run, whatever its companions, its place, and how arms are grouped; resumed too."""

import math
import shutil
from functools import lru_cache

import jax
import numpy as np
import pytest

from natfp_jax import blocks, checkpoint, config, mesh, optim, params, program, restart
from natfp_jax.cohort import fingerprints, fitting
from natfp_jax.config import Run, replace
from natfp_jax.errors import Failed, Stopped, UserError
from natfp_jax.lineage import identity
from natfp_jax.member import Member
from natfp_jax.runs import RunFolder
from natfp_jax.stopping import Stop
from natfp_jax.train import laid, load_params, quiet, train

KEPT = (0.25, 0.5)
STEPS = (0, 4, 8, 16)
# What an arm may differ in from its companions: seeds, the twin, every number of the optimiser.
DIFFERENCES = [
    {},
    {"seeds.init": 1},
    {"seeds.order": 1},
    {"optimiser.learning_rate": 1e-3, "optimiser.final": 0.5},
    {"optimiser.weight_decay": 0.0, "optimiser.clip": 0.1},
    {"optimiser.warmup": 0.5, "optimiser.beta1": 0.8, "data.first": 8},
    {"optimiser.beta2": 0.99, "optimiser.epsilon": 1e-6},
    {"perturb": config.Perturb(ulps=4)},
]


@pytest.fixture(scope="session")
def tiny(tiny):
    """Of one layer, which compiles faster: what is in a replica is not what is tested here."""
    return replace(tiny, "model.layers", 1)


@pytest.fixture(scope="session")
def members(tiny, tiny_store):
    """All kinds of arms, or some of them, in folders below `root`."""

    def made(root, places=range(8), base=tiny):
        found = []
        for place in places:
            experiment = base
            for path, value in DIFFERENCES[place].items():
                experiment = replace(experiment, path, value)
            pool = tiny_store.pool(experiment.data).sha256()
            who = identity(experiment, tiny_store.sha256, tiny_store.tokenizer.sha256, pool)
            found.append(Member(f"arm{place}", experiment, who, tiny_store, RunFolder(root / str(place))))
        return found

    return made


def trained(cohort, devices, advance=lambda steps: None, stop=None, **settings):
    chosen = Run(**{"log_every": 2, "validation_windows": 16, "checkpoints": KEPT, **settings})
    train(cohort, cohort[0].run.folder.parent / "restart", chosen, devices, advance, stop)


@pytest.fixture(scope="session")
def alone(members, one_device, tmp_path_factory):
    """Every arm by itself; read only."""
    root = tmp_path_factory.mktemp("alone")
    for member in members(root):
        trained([member], one_device)
    return root


def everything(run):
    """All that a run has recorded, and its log."""
    for step in STEPS:
        checkpoint.verify(run.checkpoints, step)
    return [run.record(step) for step in STEPS], run.metrics.read_bytes()


def weights(run):
    return [run.record(step)["weights"] for step in STEPS]


# --- strict: bit for bit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([0], marks=pytest.mark.slow),
        pytest.param([5], marks=pytest.mark.slow),
        [4, 0, 7],
        pytest.param(list(range(8)), marks=pytest.mark.slow),
        pytest.param(list(reversed(range(8))), marks=pytest.mark.slow),
    ],
)
def test_a_replica_is_its_solo_run(places, members, alone, one_device, tmp_path):
    cohort = members(tmp_path, places)
    trained(cohort, one_device)
    for place, member in zip(places, cohort, strict=True):
        assert everything(member.run) == everything(RunFolder(alone / str(place))), place
    assert len({tuple(weights(RunFolder(alone / str(place)))) for place in range(8)}) == 8


@pytest.mark.parametrize("count", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (4, 8))])
def test_replicas_on_devices_of_their_own(count, members, alone, tmp_path):
    """Three arms fill two or four places, of which one is left over; eight fill eight."""
    places = range(8) if count == 8 else range(3)
    cohort = members(tmp_path, places)
    trained(cohort, mesh.make(config.Mesh(replica=count), jax.devices()[:count]))
    for place, member in zip(places, cohort, strict=True):
        assert weights(member.run) == weights(RunFolder(alone / str(place))), place
        assert member.run.record(16)["numerics"]["mesh"]["replica"] == count


@pytest.mark.slow
def test_replicas_whose_loss_and_attention_go_in_many_blocks(members, one_device, tmp_path, monkeypatch):
    """Alone, together, and on devices of their own: which blocks there are is all that the program around may not decide."""
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 64)  # four blocks, of two rows or of eight tokens of every row
    monkeypatch.setattr(program, "_program", lru_cache(program.Program))
    pair = mesh.make(config.Mesh(replica=2), jax.devices()[:2])
    solo, together, apart = (members(tmp_path / name, range(3)) for name in ("solo", "together", "apart"))
    for member in solo:
        trained([member], one_device)
    trained(together, one_device)
    trained(apart, pair)
    for each in zip(solo, together, apart, strict=True):
        assert len({tuple(weights(member.run)) for member in each}) == 1


@pytest.mark.slow
def test_replicas_that_are_sharded_themselves(members, alone, tiny, tiny_store, one_device, tmp_path):
    """Init and order are the solo run's; so are the weights, up to the order of sums, wherever a replica lies."""
    cohort = members(tmp_path / "all", range(4))
    trained(cohort, mesh.make(config.Mesh(replica=2, fsdp=2, tensor=2)))
    fewer = members(tmp_path / "some", [3, 0])
    trained(fewer, mesh.make(config.Mesh(replica=2, fsdp=2, tensor=2)))
    assert [weights(member.run) for member in fewer] == [weights(cohort[place].run) for place in (3, 0)]
    for place, member in enumerate(cohort):
        solo = RunFolder(alone / str(place))
        for name in ("init_hash", "order_hash", "fingerprint"):
            assert member.run.record(4)[name] == solo.record(4)[name]
        ours, theirs = (
            params.flatten(load_params(run, 4, member.experiment, tiny_store, one_device)) for run in (member.run, solo)
        )
        for path, leaf in theirs.items():
            np.testing.assert_allclose(ours[path], leaf, rtol=0, atol=2e-4, err_msg=path)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"microbatches": 2}, marks=pytest.mark.slow),
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
        {"remat": "dots", "microbatches": 4},
    ],
)
def test_a_replica_is_its_solo_run_where_memory_is_saved(settings, members, one_device, tmp_path):
    solo, together = members(tmp_path / "solo", [1, 5]), members(tmp_path / "together", [1, 5])
    for member in solo:
        trained([member], one_device, **settings)
    trained(together, one_device, **settings)
    for one, other in zip(solo, together, strict=True):
        assert everything(one.run) == everything(other.run)


@pytest.mark.slow
def test_one_program_for_all(members, one_device, tmp_path):
    program._program.cache_clear()
    trained(members(tmp_path), one_device)
    assert program._program.cache_info().misses == 1


def test_a_step_copies_no_state(tiny, tiny_store, one_device):
    """The next state lies where the last one lay, and nothing else of its size is handed out."""
    made = program.program_of(tiny, tiny_store, one_device, Run(), 3)
    state = made.stack([lambda seed=seed: made.init(seed) for seed in range(3)])
    numbers = laid(made, [optim.hyperparameters(tiny.optimiser, tiny.steps)] * 3)
    windows = mesh.lay(np.zeros((3, tiny.data.batch, tiny.data.seq_len + 1), np.int32), mesh.batch_sharding(one_device))

    def places(state):
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]

    before = places(state)
    after, _ = made.step(state, numbers, windows, quiet(one_device))
    assert places(after) == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


# --- fast: within a tolerance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_batched_replicas_are_close_to_their_solo_runs(count, members, alone, tiny_store, one_device, tmp_path):
    places = [0, 1, 2, 3]
    cohort = members(tmp_path, places)
    trained(cohort, mesh.make(config.Mesh(replica=count), jax.devices()[:count]), execution="fast")
    for place, member in zip(places, cohort, strict=True):
        solo, record = RunFolder(alone / str(place)), member.run.record(4)
        assert (record["numerics"]["execution"], record["numerics"]["replicas"]) == ("fast", 4)
        for name in ("init_hash", "order_hash"):
            assert record[name] == solo.record(4)[name]
        assert member.run.record(16)["val_loss"] == pytest.approx(solo.record(16)["val_loss"], rel=1e-4)
        ours, theirs = (
            params.flatten(load_params(run, 4, member.experiment, tiny_store, one_device)) for run in (member.run, solo)
        )
        for path, leaf in theirs.items():
            np.testing.assert_allclose(ours[path], leaf, rtol=0, atol=2e-4, err_msg=path)


@pytest.mark.parametrize(
    ("count", "wished", "sizes"),
    [
        (6, 5, [2, 4]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((6, 4, [2, 4]), (5, None, [5]), (5, 4, [2, 3]))),
        (3, 1, [1, 1, 1]),
    ],
)
def test_cohorts_leave_no_more_places_empty_than_must_be(count, wished, sizes, members, tmp_path):
    pair = mesh.make(config.Mesh(replica=2), jax.devices()[:2])
    cut = list(fitting(members(tmp_path, range(count)), Run(cohort=wished), pair, print))
    assert list(map(len, cut)) == sizes


# --- stopped, resumed, grouped otherwise ------------------------------------------------------------------------------


def stopped(cohort, devices, step=10):
    """Trains and stops soon after so many steps; the step of the restart state."""
    stop, done = Stop(), []

    def advance(steps):
        done.append(steps)
        stop.requested = sum(done) >= step * len(cohort)

    with pytest.raises(Stopped):
        trained(cohort, devices, advance, stop)
    place = restart.folder(cohort[0].run.folder.parent / "restart", fingerprints(cohort))
    (saved,) = checkpoint.steps(place)
    assert step < saved < step + 3
    return saved


def test_a_cohort_that_is_stopped_at_every_step_ends_with_the_bits_of_solo_runs(members, alone, one_device, tmp_path):
    cohort, stop, said = members(tmp_path, [0, 1, 5]), Stop(), []

    def advance(steps):
        stop.requested = True

    while len(said) < 40:
        stop.requested = False
        try:
            trained(cohort, one_device, advance, stop)
        except Stopped as stopped:
            said.append(str(stopped))
        else:
            break
    assert said[:2] == [
        f"arms arm0, arm1, arm5 are saved at step {step}; the same command goes on from here" for step in (1, 2)
    ]
    assert len(said) == 9
    for place, member in zip([0, 1, 5], cohort, strict=True):
        assert everything(member.run) == everything(RunFolder(alone / str(place)))
    assert not list((tmp_path / "restart").iterdir())


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param([[0], [1], [5]], marks=pytest.mark.slow),
        pytest.param([[5, 1, 0]], marks=pytest.mark.slow),
        [[1, 5], [0]],
        pytest.param([[0, 1, 5]], marks=pytest.mark.slow),
        pytest.param([[0, 1, 5, 2]], marks=pytest.mark.slow),
    ],
)
def test_a_cohort_that_was_stopped_goes_on_in_other_groups(groups, members, alone, one_device, tmp_path):
    saved = stopped(members(tmp_path, [0, 1, 5]), one_device)
    for places in groups:
        first = []
        trained(members(tmp_path, places), one_device, first.append)
        assert first[0] == (0 if 2 in places else saved * len(places))  # arm 2 was not there
    for place in (0, 1, 5):
        assert everything(RunFolder(tmp_path / str(place))) == everything(RunFolder(alone / str(place)))
    assert not list((tmp_path / "restart").iterdir())


@pytest.mark.slow
def test_states_of_other_groups_do_not_stand_in_the_way(members, alone, one_device, tmp_path):
    """Arm 0 starts anew beside arm 2 while its older, further state waits for arm 1; each group is killed again on its way."""
    further = stopped(members(tmp_path, [0, 1]), one_device)
    for minutes in (1e-9, 10):
        stop, done = Stop(), []

        def advance(steps, stop=stop, done=done):
            done.append(steps)
            stop.requested = sum(done) >= 2 * 6

        with pytest.raises(Stopped):
            trained(members(tmp_path, [0, 2]), one_device, advance, stop, save_minutes=minutes)
    for places, least in ([1], further), ([0, 2], 2 * 6):
        first = []
        trained(members(tmp_path, places), one_device, first.append)
        assert first[0] >= least
    for place in (0, 1, 2):
        assert everything(RunFolder(tmp_path / str(place))) == everything(RunFolder(alone / str(place)))
    assert not list((tmp_path / "restart").iterdir())


def test_an_arm_that_lacks_more_than_its_companions_catches_up_with_them(members, alone, one_device, tmp_path):
    """As after a kill between the checkpoints of two arms at one step."""
    trained(members(tmp_path, [0, 1]), one_device)
    for place, step in [(0, 16), (1, 16), (1, 8)]:
        checkpoint.remove(tmp_path / str(place) / "checkpoints", step)
    trained(members(tmp_path, [0, 1]), one_device)
    for place in (0, 1):
        assert everything(RunFolder(tmp_path / str(place))) == everything(RunFolder(alone / str(place)))


@pytest.mark.parametrize("finished", [[0], *(pytest.param(finished, marks=pytest.mark.slow) for finished in ([], [0, 1]))])
def test_what_is_left_of_a_stopped_cohort_goes_on_from_where_it_was(finished, members, alone, one_device, tmp_path):
    """The others were finished since, or all of their checkpoints were there: also those of the arm whose folder holds it."""
    saved, first = stopped(members(tmp_path, [0, 1, 5]), one_device), []
    for place in finished:
        shutil.rmtree(tmp_path / str(place) / "checkpoints")
        shutil.copytree(alone / str(place) / "checkpoints", tmp_path / str(place) / "checkpoints")
        shutil.copy(alone / str(place) / "metrics.jsonl", tmp_path / str(place) / "metrics.jsonl")
    trained(members(tmp_path, [0, 1, 5]), one_device, first.append)
    assert first[: 1 + bool(finished)] == [16 * len(finished)] * bool(finished) + [saved * (3 - len(finished))]
    for place in (0, 1, 5):
        assert everything(RunFolder(tmp_path / str(place))) == everything(RunFolder(alone / str(place)))
    assert not list((tmp_path / "restart").iterdir())


@pytest.mark.parametrize(
    ("before", "after"), [(2, 1), *(pytest.param(*counts, marks=pytest.mark.slow) for counts in ((1, 2), (4, 2)))]
)
def test_a_restart_state_is_taken_up_on_another_number_of_devices(before, after, members, alone, tmp_path):
    """Three arms, which leave another number of places over."""
    saved = stopped(members(tmp_path, range(3)), mesh.make(config.Mesh(replica=before), jax.devices()[:before]))
    first = []
    cohort = members(tmp_path, range(3))
    trained(cohort, mesh.make(config.Mesh(replica=after), jax.devices()[:after]), first.append)
    assert first[0] == saved * 3
    for place, member in enumerate(cohort):
        assert weights(member.run) == weights(RunFolder(alone / str(place)))
        (stretch,) = member.run.record(16)["before"]
        assert (stretch["until"], stretch["numerics"]["mesh"]["replica"]) == (saved, before)


def test_a_state_that_does_not_descend_from_what_is_there_is_not_used(members, one_device, tmp_path):
    """Checkpoint 8 of arm 0 was lost after the state of both, and made again on another mesh, where sums have another order."""
    pair = members(tmp_path, [0, 1])
    stopped(pair, one_device)
    weights_8 = pair[0].run.record(8)["weights"]
    checkpoint.remove(pair[0].run.checkpoints, 8)
    stopped(pair[:1], mesh.make(config.Mesh(fsdp=2, tensor=2), jax.devices()[:4]), step=8)
    assert pair[0].run.record(8)["weights"] != weights_8
    first = []
    trained(pair, one_device, first.append)
    assert first[0] == 8 * 2
    for member in pair:
        assert member.run.record(16)["parent"] == {"step": 8, "weights": member.run.record(8)["weights"]}


def test_a_log_stands_while_companions_catch_up(members, alone, one_device, tmp_path):
    """Arm 0 is trained from step 4 again beside arm 1, and alone after that is stopped."""
    trained(members(tmp_path, [0, 1]), one_device)
    for place, step in [(0, 16), (1, 16), (1, 8)]:
        checkpoint.remove(tmp_path / str(place) / "checkpoints", step)
    stopped(members(tmp_path, [0, 1]), one_device, step=5)
    shutil.rmtree(tmp_path / "restart")
    trained(members(tmp_path, [0]), one_device)
    assert everything(RunFolder(tmp_path / "0")) == everything(RunFolder(alone / "0"))


# --- other optimisers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[pytest.param("lion", marks=pytest.mark.slow), "muon"])
def other(request, tiny):
    """The tiny experiment with another optimiser than AdamW."""
    return replace(tiny, "optimiser.kind", request.param)


@pytest.fixture(scope="module")
def other_alone(other, members, one_device, tmp_path_factory):
    """Two arms of another optimiser, which differ in their rate, each by itself; read only."""
    root = tmp_path_factory.mktemp("other")
    program._program.cache_clear()
    for member in members(root, [0, 3], other):
        trained([member], one_device)
    assert program._program.cache_info().misses == 1  # another rate is no other program
    return root


@pytest.mark.slow
def test_another_optimiser_learns_and_its_stopped_replicas_are_their_solo_runs(
    other, other_alone, members, one_device, tmp_path
):
    saved, first = stopped(members(tmp_path, [0, 3], other), one_device), []
    cohort = members(tmp_path, [0, 3], other)
    trained(cohort, one_device, first.append)
    assert first[0] == saved * 2
    for place, member in zip([0, 3], cohort, strict=True):
        assert everything(member.run) == everything(RunFolder(other_alone / str(place)))
        assert member.run.record(16)["val_loss"] < member.run.record(0)["val_loss"] - 0.2
    assert weights(cohort[0].run) != weights(cohort[1].run)


@pytest.mark.slow
def test_another_optimiser_in_batches_over_sharded_replicas_is_close_to_solo_runs(
    other, other_alone, members, tiny_store, one_device, tmp_path
):
    cohort = members(tmp_path, [0, 3], other)
    trained(cohort, mesh.make(config.Mesh(fsdp=2), jax.devices()[:2]), execution="fast")
    for place, member in zip([0, 3], cohort, strict=True):
        solo = RunFolder(other_alone / str(place))
        assert member.run.record(0)["weights"] == solo.record(0)["weights"]
        assert member.run.record(16)["val_loss"] == pytest.approx(solo.record(16)["val_loss"], rel=1e-4)
        ours, theirs = (
            params.flatten(load_params(run, 4, member.experiment, tiny_store, one_device)) for run in (member.run, solo)
        )
        for path, leaf in theirs.items():
            np.testing.assert_allclose(ours[path], leaf, rtol=0, atol=2e-5, err_msg=path)


# --- what ends one arm ------------------------------------------------------------------------------------------------


def test_an_arm_that_fails_is_named_and_its_companions_are_trained(members, alone, tiny, one_device, tmp_path):
    good, wild = members(tmp_path, [0, 1]), members(tmp_path, [2], replace(tiny, "optimiser.learning_rate", 1e30))
    wanted = f"arm arm2: gradient norm nan at step 2, last good checkpoint 0 in {tmp_path / '2'}"
    for _ in range(2):  # and again by itself
        with pytest.raises(UserError) as error:
            trained([good[0], *wild, good[1]], one_device)
        assert str(error.value) == f"{wanted}: lower its learning rate"
        for place in (0, 1):
            assert everything(RunFolder(tmp_path / str(place))) == everything(RunFolder(alone / str(place)))
    assert checkpoint.steps(wild[0].run.checkpoints) == [0]


@pytest.mark.slow
def test_an_arm_that_failed_holds_nobody_back(members, alone, tiny, one_device, tmp_path):
    """Stopped and started again, its companions go on from where they were, and it is still told of."""
    cohort = [*members(tmp_path, [0]), *members(tmp_path, [2], replace(tiny, "optimiser.learning_rate", 1e30))]
    saved, first = stopped(cohort, one_device), []
    with pytest.raises(UserError, match="arm arm2: gradient norm nan at step 2, last good checkpoint 0 in "):
        trained(cohort, one_device, first.append)
    assert first[0] == saved * 2 > 8 * 2
    assert everything(cohort[0].run) == everything(RunFolder(alone / "0"))


def test_an_arm_that_has_all_is_finished_though_its_last_companion_fails(members, alone, tiny, one_device, tmp_path):
    """It lacked step 4 alone, and no more is trained than that."""
    (arm,), (wild,) = members(tmp_path, [0]), members(tmp_path, [2], replace(tiny, "optimiser.learning_rate", 1e30))
    trained([arm], one_device)
    checkpoint.remove(arm.run.checkpoints, 4)
    done = []
    with pytest.raises(Failed) as failed:
        trained([wild, arm], one_device, done.append)
    assert str(failed.value).count("gradient norm") == 1
    assert sum(done) == 2 * 4
    assert arm.run.complete(list(STEPS))
    assert everything(arm.run) == everything(RunFolder(alone / "0"))
    assert not list((tmp_path / "restart").iterdir())


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wished", "room", "sizes"),
    [
        (None, 4, [4, 4]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((None, 8, [8]), (3, 8, [2, 3, 3]), (None, 0, [1] * 8))),
    ],
)
def test_a_cohort_is_cut_to_what_memory_holds(
    wished, room, sizes, members, tiny, tiny_store, one_device, tmp_path, monkeypatch
):
    taken = {count: program.program_of(tiny, tiny_store, one_device, Run(), count).device_bytes for count in (1, 2, 4, 8)}
    assert taken[1] < taken[2] < taken[4] < taken[8]
    there = math.ceil(taken.get(room, 0) / 0.8)  # the rest is for what is copied while saving
    monkeypatch.setattr(mesh, "device_memory", lambda devices: there)
    said = []
    cut = list(fitting(members(tmp_path), Run(cohort=wished), one_device, said.append))
    assert sorted(map(len, cut)) == sizes
    assert [member.name for cohort in cut for member in cohort] == [f"arm{place}" for place in range(8)]
    assert bool(said) == (room < 8)
    if said:
        assert said[0].startswith(
            f"8 arms together take {taken[8] / 1e9:.2f} GB of the {taken.get(room, 0) / 1e9:.2f} GB that a device can give"
        )
