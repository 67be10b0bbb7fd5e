"""`natfp audit --suite`: planted defects are found and put where they belong, and whoever has none is blamed for nothing.

The suites are made of one grid of three inits and three orders, trained here. A defect is a list whose paths lead elsewhere.
"""

import dataclasses
import json
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
from numpy.random import default_rng
from safetensors.numpy import load_file, save_file

from natfp_jax import cli, lineage
from natfp_jax.config import Run, replace
from natfp_jax.hf_export import export
from natfp_jax.kinship import beyond
from natfp_jax.likeness import measured
from natfp_jax.member import Member
from natfp_jax.progress import Progress
from natfp_jax.published import opened
from natfp_jax.runs import RunFolder
from natfp_jax.suite import Listed
from natfp_jax.suite_audit import audit, judged
from natfp_jax.train import load_params, train

QUIET = Progress(quiet=True)
BRANCHES = [(init, order) for init in range(3) for order in range(3)]
STEPS = [0, 1, 2, 4, 8, 16]
LATER = STEPS[1:]


@pytest.fixture(scope="session")
def grid(tiny, tiny_store, one_device, tmp_path_factory):
    """Nine trainings as Hugging Face folders, GRID/init-order-step; read only."""
    root, members = tmp_path_factory.mktemp("grid"), []
    for init, order in BRANCHES:
        experiment = replace(replace(tiny, "seeds.init", init), "seeds.order", order)
        pool = tiny_store.pool(experiment.data).sha256()
        who = lineage.identity(experiment, tiny_store.sha256, tiny_store.tokenizer.sha256, pool)
        members.append(Member(f"{init}-{order}", experiment, who, tiny_store, RunFolder(root / "runs" / f"{init}-{order}")))
    kept = tuple(step / 16 for step in LATER)
    settings = Run(log_every=8, validation_windows=8, checkpoints=kept, execution="fast")
    train(members, root / "restart", settings, one_device, lambda steps: None)
    for member in members:
        for step in STEPS:
            params = load_params(member.run, step, member.experiment, tiny_store, one_device)
            export(params, tiny.model, tiny_store.tokenizer, 32, root / f"{member.name}-{step}")
    return root


@pytest.fixture(scope="session")
def every(grid):
    """(branch, step) → its number in `alike`, and what was measured of all, any of which may be a start."""
    places = [(branch, step) for branch in BRANCHES for step in STEPS]
    folders = [opened(grid / f"{init}-{order}-{step}") for (init, order), step in places]
    shapes = {name: tensor.shape for name, tensor in folders[0].tensors.items()}
    return {place: n for n, place in enumerate(places)}, measured(folders, shapes, range(len(folders)))


def called(branch):
    return f"init{branch[0]}-order{branch[1]}"


def healthy(branches=BRANCHES, steps=STEPS):
    """What is published: (branch, step) → where its weights come from."""
    return {(branch, step): (branch, step) for branch in branches for step in steps}


def listed(published):
    return [Listed(called(branch), "-", branch[0], branch[1], step) for branch, step in published]


def part(every, published):
    """What `measured` says of these."""
    numbers, alike = every
    chosen = np.array([numbers[source] for source in published.values()])
    starts = [c for c, (_, step) in enumerate(published) if step == 0]
    zeros = chosen[starts]
    return dataclasses.replace(
        alike,
        digests=[alike.digests[n] for n in chosen],
        values={precision: value[:, chosen] for precision, value in alike.values.items()},
        exact={precision: value[:, chosen] for precision, value in alike.exact.items()},
        inner_PCC=alike.inner_PCC[:, chosen][:, :, chosen],
        rest_CC=alike.rest_CC[chosen][:, chosen],
        starts=tuple(starts),
        shown_TCS=alike.shown_TCS[:, chosen][:, :, zeros],
        squares_TCS=alike.squares_TCS[:, chosen][:, :, zeros],
        norms_TC=alike.norms_TC[:, chosen],
        drawn_TS=alike.drawn_TS[:, zeros],
        same_TS=alike.same_TS[:, zeros],
    )


def blamed(every, published):
    """The checkpoints that are blamed, and the contradictions that are not."""
    pedigree, _ = judged(listed(published), part(every, published))
    return {place for c, place in enumerate(published) if pedigree.wrong(c)}, pedigree.between, pedigree


def written(path, grid, published, **changed):
    """The list of a suite."""
    lines = []
    for (branch, step), ((init, order), source) in published.items():
        lines += ["[[checkpoint]]", f'branch = "{called(branch)}"', f'path = "{grid / f"{init}-{order}-{source}"}"']
        lines += [f"init = {branch[0]}", f"order = {branch[1]}", f"step = {step}"]
    path.write_text("\n".join(lines))
    return path


def claims_of(path):
    return audit(path, QUIET).claims


def false(claims):
    return [(claim.subject, claim.claim, claim.detail) for claim in claims if claim.verdict == "false"]


# --- healthy suites ---------------------------------------------------------------------------------------------------


def test_a_healthy_grid_is_proven_whole(grid, tmp_path):
    claims = claims_of(written(tmp_path / "suite.toml", grid, healthy()))
    assert {claim.verdict for claim in claims} == {"proven"}
    said = [claim for claim in claims if claim.subject == "branch init1-order0"]
    assert [claim.claim for claim in said] == [
        "step 0 is the start of init seed 1, and of no other",
        "steps 1, 2, 4, 8, 16 descend from the step 0 of init seed 1",
        "steps 1, 2, 4, 8, 16 go on with their own branch, of all from this start",
        "steps 1, 2, 4, 8, 16 lie where a training is at these steps",
        "steps 1, 2, 4, 8, 16 have weights that are found nowhere else",
    ]
    assert "the same as in init1-order1, init1-order2" in said[0].detail
    assert "correlation 0.8" in said[1].detail


def test_no_part_of_a_healthy_grid_is_blamed(every):
    for seed in range(60):
        random = default_rng([1, seed])
        branches = [BRANCHES[n] for n in sorted(random.choice(9, random.integers(1, 10), replace=False))]
        steps = sorted(random.choice(STEPS, random.integers(2, 7), replace=False).tolist())
        published = healthy(branches, steps)
        if seed % 2:  # each has steps of its own
            published = {place: place for place in published if random.random() < 0.7}
        found, between, _ = blamed(every, published)
        assert not found, f"seed {seed}: {list(published)}"
        assert not between, f"seed {seed}: {list(published)}"


# --- planted defects --------------------------------------------------------------------------------------------------


def chosen(random, least=1):
    """Branches that are published, and two of them."""
    branches = [BRANCHES[n] for n in sorted(random.choice(9, random.integers(max(4, least), 10), replace=False))]
    one, other = (branches[n] for n in random.choice(len(branches), 2, replace=False))
    return branches, one, other


def another_beginning(random):
    """The later steps of a branch are of the training from another branch's step 0, in the same order."""
    branches, one, other = chosen(random)
    while other[0] == one[0]:
        branches, one, other = chosen(random)
    published, first = healthy(branches), random.choice(LATER)
    steps = [step for step in LATER if step >= first]
    published |= {(one, step): ((other[0], one[1]), step) for step in steps}
    return published, {(one, step) for step in steps}


def same_first_step(random):
    """Two branches have the same weights at step 1."""
    branches, one, other = chosen(random)
    return healthy(branches) | {(one, 1): (other, 1)}, {(one, 1)}


def final_for_early(random):
    """A branch serves its final weights for an earlier step."""
    branches, one, _ = chosen(random)
    step = int(random.choice(STEPS[:-1]))
    return healthy(branches) | {(one, step): (one, 16)}, {(one, step)}


def swapped(random):
    """Two branches are swapped at one step."""
    branches, one, other = chosen(random)
    step = int(random.choice(LATER if one[0] == other[0] else STEPS))
    return healthy(branches) | {(one, step): (other, step), (other, step): (one, step)}, {(one, step), (other, step)}


def borrowed(random):
    """A branch serves another step of another branch."""
    branches, one, other = chosen(random)
    step, source = int(random.choice(LATER)), int(random.choice(STEPS))
    while source == step or (source == 0 and one[0] == other[0]):
        source = int(random.choice(STEPS))
    return healthy(branches) | {(one, step): (other, source)}, {(one, step)}


@pytest.mark.parametrize("defect", [another_beginning, same_first_step, final_for_early, swapped, borrowed])
def test_a_planted_defect_is_found_and_nobody_else_is_blamed(defect, every):
    for seed in range(20):
        published, guilty = defect(default_rng([2, seed]))
        found, between, pedigree = blamed(every, published)
        place = f"seed {seed}: { ({key: value for key, value in published.items() if key != value}) }"
        assert found == guilty, place
        assert not between, f"{place}: {between}"
        assert all(one.detail for of in pedigree.found for one in of.values())


@pytest.mark.parametrize("seed", range(5))
def test_two_defects_at_once_are_both_found(seed, every):
    random = default_rng([3, seed])
    one, two = (((0, n), (1, n)) for n in random.choice(3, 2, replace=False))
    published = healthy() | {(one[0], 4): (one[1], 4), (two[1], 2): (two[1], 16)}
    assert blamed(every, published)[0] == {(one[0], 4), (two[1], 2)}


def test_what_is_found_is_said(grid, tmp_path):
    """As it would have to be said of the decoupled seeds of Pythia, among others."""
    a, b, c = (0, 0), (0, 1), (1, 0)
    published = healthy([a, b, c, (1, 1), (2, 2)]) | {(c, 1): (a, 1), (b, 4): (a, 4), ((1, 1), 2): ((1, 1), 16)}
    found = false(claims_of(written(tmp_path / "suite.toml", grid, published)))
    assert [(subject, claim) for subject, claim, _ in found] == [
        ("branch init0-order1", "step 4 goes on with its own branch, of all from this start"),
        ("branch init1-order0", "step 1 descends from the step 0 of init seed 1"),
        ("branch init1-order1", "step 2 has weights that are found nowhere else"),
    ]
    assert "it goes on with init0-order0, nearest in direction from the start, cosine 0." in found[0][2]
    assert "it descends from step 0 of init0-order0, init0-order1, correlation 0.999" in found[1][2]
    assert "it has the weights of step 16 of its branch" in found[2][2]


def test_what_cannot_be_told_apart_is_said_once_and_blamed_on_nobody(every):
    two = [(0, 0), (0, 1)]
    swap = {(two[0], 4): (two[1], 4), (two[1], 4): (two[0], 4)}
    found, between, _ = blamed(every, healthy(two, [0, 2, 4]) | swap)
    assert not found
    (said,) = between
    assert set(said.branches) == {"init0-order0", "init0-order1"}
    assert "go on from one another" in said.claim
    found, between, _ = blamed(every, healthy(two, [0, 2]) | {(two[0], 2): (two[1], 2)})
    assert not found
    (said,) = between
    assert "identical" in said.detail
    exchanged = {((0, 0), 4): ((1, 0), 4), ((1, 0), 4): ((0, 0), 4)}
    found, between, _ = blamed(every, healthy([(0, 0), (1, 0)], [0, 4]) | exchanged)
    assert not found
    assert {branch for said in between for branch in said.branches} == {"init0-order0", "init1-order0"}


def test_one_start_under_two_seeds_is_the_fault_of_the_fewer_or_of_nobody(every):
    copied = {((1, 0), step): ((0, 2), step) for step in STEPS}
    found, between, _ = blamed(every, healthy([(0, 0), (1, 0)]) | copied)
    assert not found
    assert [said.claim for said in between] == ["step 0 differs where the init seed does"]
    found, between, _ = blamed(every, healthy([(0, 0), (0, 1), (1, 0)]) | copied)
    assert found == {((1, 0), 0)}
    assert not between


def test_a_step_0_that_nothing_descends_from_is_found(every):
    """Its own later steps are from a start that no branch lists."""
    branches = [(0, 0), (0, 1), (1, 0)]
    elsewhere = {((1, 0), step): ((2, 0), step) for step in LATER}
    found, between, _ = blamed(every, healthy(branches) | elsewhere)
    assert not found
    (said,) = between
    assert said.branches == ("init1-order0",)
    assert "step 0 does not show in steps 1, 2, 4" in said.detail
    found, between, _ = blamed(every, healthy([*branches, (1, 1)]) | elsewhere)
    assert not between
    assert found >= {((1, 0), 1), ((1, 0), 2)}  # what training leaves of a start later on is less than others prove
    assert {branch for branch, _ in found} == {(1, 0)}


def test_trained_weights_of_another_branch_as_a_step_0(every):
    for source in (4, 16):
        published = healthy([(0, 0), (1, 0), (2, 0)]) | {((0, 0), 0): ((2, 0), source)}
        found, between, _ = blamed(every, published)
        assert found == {((0, 0), 0)}
        assert not between


def test_steps_of_one_branch_swapped(every):
    published = healthy() | {((1, 1), 2): ((1, 1), 8), ((1, 1), 8): ((1, 1), 2)}
    found, between, pedigree = blamed(every, published)
    assert found == {((1, 1), 2), ((1, 1), 8)}
    assert not between
    details = {found.detail for of in pedigree.found for found in of.values() if found.verdict == "false"}
    assert details == {"it lies where other branches are at step 8", "it lies where other branches are at step 2"}


def test_a_first_step_of_rate_0_is_no_defect_unless_others_have_moved(every):
    at_rest = {(branch, 1): (branch, 0) for branch in BRANCHES}
    found, between, pedigree = blamed(every, healthy() | at_rest)
    assert not found
    assert not between
    resting = [pedigree.found[c]["weights"] for c, one in enumerate(pedigree.listed) if one.step == 1]
    assert {one.verdict for one in resting} == {"recorded"}
    found, between, _ = blamed(every, healthy() | {((0, 0), 1): ((0, 0), 0)})
    assert found == {((0, 0), 1)}
    assert not between


def test_one_branch_alone_and_one_without_step_0(every):
    found, between, pedigree = blamed(every, healthy([(0, 0)]))
    assert (found, between) == (set(), [])
    assert pedigree.found[0]["start"].verdict == "recorded"
    assert {of["descent"].verdict for of in pedigree.found[1:]} == {"proven"}
    found, between, pedigree = blamed(every, healthy([(0, 0), (1, 0)], [0]))
    assert (found, between) == (set(), [])
    assert {of["start"].verdict for of in pedigree.found} == {"proven"}
    found, between, pedigree = blamed(every, healthy(steps=LATER))
    assert (found, between) == (set(), [])
    assert {of["descent"].detail for of in pedigree.found} == {"no step 0 is listed"}


# --- what trained weights show ---------------------------------------------------------------------------------------


def test_trained_embeddings_are_no_draw_and_resemble_each_other(every):
    numbers, alike = every
    names = sorted(range(len(alike.sizes_T)), key=lambda t: -alike.sizes_T[t])
    embedding, last = names[0], [numbers[(init, 0), 16] for init in range(3)]
    assert alike.sizes_T[embedding] == 300 * 32
    assert not alike.drawn_TS[embedding, last].any()
    raw = alike.shown_TCS[embedding][last][:, last] / np.sqrt(alike.squares_TCS[embedding][last][:, last])
    assert np.abs(raw[~np.eye(3, dtype=bool)]).max() > beyond(9), "it would show, though the two have nothing in common"
    z, _ = alike.descent(last)
    assert np.abs(z[last][~np.eye(3, dtype=bool)]).max() < beyond(9)
    zeros = [numbers[branch, 0] for branch in BRANCHES]
    assert alike.drawn_TS[embedding, zeros].all()


# --- precision --------------------------------------------------------------------------------------------------------


def rounded(source, target, how):
    """A copy of a folder in another precision; of each tensor `how` says which."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    save_file({name: value.astype(how(name)) for name, value in tensors.items()}, target / "model.safetensors")
    return opened(target)


def test_copies_are_equal_up_to_their_rounding_and_neighbouring_steps_are_not(grid, tmp_path):
    source = grid / "0-0-1"
    exact = opened(source)
    brain, half = (rounded(source, tmp_path / name, lambda _, name=name: name) for name in ("bfloat16", "float16"))
    mixed = rounded(source, tmp_path / "mixed", lambda name: "bfloat16" if "proj" in name else "float32")
    # A step so small that rounding hides nearly all of it.
    near = rounded(source, tmp_path / "near", lambda _: "float32")
    tensors = {name: value * np.float32(1 + 1e-5) for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, tmp_path / "near" / "model.safetensors")
    folders = [exact, brain, half, mixed, near]
    found = measured(folders, {name: tensor.shape for name, tensor in exact.tensors.items()}, [0])
    assert [found.equal(0, n) for n in range(5)] == ["float32", "bfloat16", "float16", "bfloat16", None]
    assert [found.equal(1, n) for n in (2, 3, 4)] == [None, "bfloat16", None]
    assert [found.equal_if_rounded(1, n) for n in (2, 4)] == [True, False]
    assert found.distance_CC[0, 4] < found.distance_CC[0, 1]


def test_a_suite_in_many_precisions_is_as_healthy_and_its_defects_are_found(grid, tmp_path):
    random = default_rng(8)
    branches = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for init, order in branches:
        for step in STEPS:
            kinds = ("float32", "float16", ml_dtypes.bfloat16)
            name = f"{init}-{order}-{step}"
            rounded(grid / name, tmp_path / name, lambda _, kinds=kinds: kinds[random.integers(3)])
    claims = claims_of(written(tmp_path / "suite.toml", tmp_path, healthy(branches)))
    assert {claim.verdict for claim in claims} <= {"proven", "recorded"}
    assert any("up to rounding to" in claim.detail for claim in claims)
    rounded(tmp_path / "0-1-4", tmp_path / "copy-0-4", lambda _: ml_dtypes.bfloat16)
    shutil.rmtree(tmp_path / "0-0-4")
    (tmp_path / "copy-0-4").rename(tmp_path / "0-0-4")
    (found,) = false(claims_of(tmp_path / "suite.toml"))
    assert found[:2] == ("branch init0-order0", "step 4 goes on with its own branch, of all from this start")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes_what_was_found(grid, tmp_path, monkeypatch, capsys):
    def ended(*arguments):
        monkeypatch.setattr(sys, "argv", ["natfp", "audit", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code, capsys.readouterr()
        return 0, capsys.readouterr()

    path = written(tmp_path / "suite.toml", grid, healthy([(0, 0), (0, 1), (1, 0)]))
    code, said = ended("--suite", path, "--json", tmp_path / "claims.json")
    assert code == 0
    assert "0 false" in said.out
    assert "Weights alone do not show which seed" in said.out
    stored = json.loads((tmp_path / "claims.json").read_text())
    assert {claim["verdict"] for claim in stored["claims"]} <= {"proven", "recorded"}
    assert len(stored["checkpoints"]) == 18
    assert {start["branch"] for start in stored["checkpoints"][3]["starts"]} == {"init0-order0", "init1-order0"}
    assert stored["checkpoints"][0]["equal_to"] == [{"branch": "init0-order1", "step": 0}]

    written(path, grid, healthy([(0, 0), (0, 1), (1, 0)]) | {((0, 0), 4): ((1, 0), 4)})
    code, said = ended("--suite", path)
    assert code == 1
    assert "1 false" in said.out
    for more in (["elsewhere"], ["--replay", "2"]):
        code, said = ended("--suite", path, *more)
        assert code == 2
        assert f"leave out {more[0]}" in said.err
    code, said = ended("--suite", tmp_path / "none.toml")
    assert code == 2
    assert "is no file" in said.err
    assert "Traceback" not in said.err
