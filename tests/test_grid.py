"""A crossed study from its texts to its page: its factors apart, what distances consist of, and both from step 0 on."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from natfp_jax import config, files, mesh
from natfp_jax.config import Attribution, Corpus, Data, Experiment, Factor, Model, Perturb, Sampling, Stories, Study
from natfp_jax.courses import trajectories
from natfp_jax.findings import verdicts
from natfp_jax.model import hidden
from natfp_jax.next_token import next_tokens
from natfp_jax.page import markdown
from natfp_jax.progress import Progress
from natfp_jax.prompts import Prompts
from natfp_jax.report import report
from natfp_jax.stages import Work
from natfp_jax.study import grids
from natfp_jax.train import load_params

STUDY = Study(
    name="crossed",
    experiment=Experiment(
        corpus=Corpus(source=Stories(count=1100), vocabulary=300, validation_fraction=0.05, prompt_fraction=0.5, shards=2),
        model=Model(width=32, layers=1, heads=2, tied=False),
        data=Data(seq_len=32, windows=64, epochs=1, batch=8),
    ),
    factors=(Factor("seeds.init", (0, 1)), Factor("seeds.order", (0, 1))),
    twin=Perturb(),
    sampling=Sampling(prompts=400, prompt_chars=30, new_tokens=24, temperature=0.7, batch=64, checkpoints=(0.0, 1.0)),
    attribution=Attribution(classifiers=("subwords",), bootstraps=999),
)
END = 8


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The study, done, and what its report says."""
    made = Work(STUDY, tmp_path_factory.mktemp("grid"), Progress(quiet=True))
    made.devices = mesh.make(config.Mesh(), jax.devices()[:1])
    with made.claimed():
        for stage in ("corpus", "train", "sample", "attribute"):
            getattr(made, stage)()
        return made, report(made)


def components_of(summary, step, distance):
    rows = [row for row in summary["components"] if (row["checkpoint"], row["distance"]) == (step, distance)]
    return {row["component"]: row for row in rows}


# --- which texts ------------------------------------------------------------------------------------------------------


def test_a_grid_has_every_cell_its_twins_and_the_second_draw_at_each_checkpoint():
    found = grids(STUDY)
    assert [grid.step for grid in found] == [0, END]
    for grid in found:
        assert list(grid.cells) == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
        assert [draw.name for draw in grid.draws] == [
            *(f"init{i}-order{o}.step{grid.step}.draw0" for i in (0, 1) for o in (0, 1)),
            f"init0-order0-twin.step{grid.step}.draw0",
            f"init0-order0.step{grid.step}.draw1",
        ]
        assert grid.twins[0][0] == grid.again[0] == ("0", "0")


def test_what_is_not_crossed_has_no_grid_and_of_several_settings_the_last_counts():
    assert grids(replace(STUDY, design="one_at_a_time")) == []
    assert grids(replace(STUDY, factors=STUDY.factors[:1])) == []
    swept = replace(STUDY, sampling=Sampling(new_tokens=(8, 24), temperature=(0.7, 1.0)))
    (grid,) = grids(swept)
    assert (grid.length, grid.setting) == (24, "temperature 1.0, 24 tokens")
    assert {draw.temperature for draw in grid.draws} == {1.0}


# --- step 0 -----------------------------------------------------------------------------------------------------------


def test_at_step_0_inits_are_recognised_beyond_doubt_and_orders_are_bitwise_equal(finished):
    made, summary = finished
    rows = [row for row in summary["comparisons"] if row["checkpoint"] == 0]
    pairs = [row for row in rows if row["factor"] in ("init", "order") and "pooled" not in row["name"]]
    assert len(pairs) == 4
    for row in pairs:
        if row["factor"] == "init":
            assert row["accuracy"] > 0.5
            assert row["sign_p"] < 1e-6  # which no number of permutations could say
        else:
            first, second = (made.run_of(name.split(".")[0]).record(0)["weights"] for name in row["draws"])
            assert first == second
            assert row["ceiling"] == 0.5
            assert row["sign_p"] > 1e-4
    weights = {arm: made.run_of(arm).record(0)["weights"] for arm in made.arms}
    assert len(set(weights.values())) == 3  # two inits, and the twin of one


def test_the_ceiling_of_a_twin_is_at_chance_whatever_the_rounding(finished):
    """The sampler's record of its own texts and a forward pass of the other arm's would differ by more than the twins do."""
    _, summary = finished
    rows = [row for row in summary["comparisons"] if row["factor"] == "twin"]
    assert [row["checkpoint"] for row in rows] == [0, END]
    for row in rows:
        assert row["ceiling_ci95"][0] <= 0.5 <= row["ceiling_ci95"][1]


def test_at_step_0_next_tokens_know_nothing_of_the_order_to_the_last_bit(finished):
    _, summary = finished
    found = components_of(summary, 0, "next token")
    assert (found["order"]["bits"], found["order"]["ci95"]) == (0, [0, 0])
    assert found["init"]["bits"] == found["all"]["bits"] > 0.01
    # One weight is moved by one unit in the last place, and nothing has grown of it yet.
    assert found["chaos"]["bits"] == -found["interaction"]["bits"] < 1e-12


def test_later_the_order_has_a_component_too(finished):
    _, summary = finished
    found = components_of(summary, END, "next token")
    assert found["order"]["ci95"][0] > 0
    parts = [found[name]["bits"] for name in ("init", "order", "interaction", "chaos")]
    assert sum(parts) == pytest.approx(found["all"]["bits"])
    assert sum(found[name]["share"] for name in ("init", "order", "interaction", "chaos")) == pytest.approx(1)


# --- distances --------------------------------------------------------------------------------------------------------


def test_distances_by_next_token_are_those_of_the_models_prompt_by_prompt(finished):
    made, _ = finished
    prompts, tokenizer = Prompts(made.prompts.table.take(made.test_rows)), made.store.tokenizer
    encoded = prompts.encoded(tokenizer)[::40]
    tokens = np.full((len(encoded), 40), 7, np.int32)  # what stands behind a prompt does not matter
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    forward = jax.jit(hidden, static_argnums=0)
    for grid, found in zip(grids(STUDY), next_tokens(made, grids(STUDY), made.test_rows), strict=True):
        assert found.documents == prompts.documents  # there are fewer than would be too many
        p_AMV = []
        for one in grid.models:
            arm = made.arms[one.arm]
            params = load_params(made.run_of(one.arm), one.step, arm.experiment, made.store, made.devices)
            plain = jax.tree.map(lambda leaf: np.asarray(leaf, dtype=np.float64), params)
            if grid.step == 0:  # blocks add nothing yet: the last token's embedding, normed, alone
                x = plain["embedding"][[ids[-1] for ids in encoded]]
                x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + arm.experiment.model.norm_epsilon) * plain["norm"]
            else:
                states = np.asarray(forward(arm.experiment.model, params, tokens), dtype=np.float64)
                x = np.stack([state[len(ids) - 1] for state, ids in zip(states, encoded, strict=True)])
            p_AMV.append(softmax((x @ plain["head"])[:, : tokenizer.size], axis=1))
        for a, b in np.ndindex(len(p_AMV), len(p_AMV)):
            expected = [jensenshannon(p, q, base=2) ** 2 for p, q in zip(p_AMV[a], p_AMV[b], strict=True)]
            assert found.distance_AAN[a, b, ::40].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_null_is_about_zero_and_twins_part_chaos_from_interaction(finished):
    _, summary = finished
    for step in (0, END):
        found = components_of(summary, step, "subwords")
        assert list(found) == ["init", "order", "interaction", "chaos", "all", "null", "sampling noise"]
        low, high = found["null"]["ci95"]
        assert low < 0 < high
        assert abs(found["null"]["bits"]) < found["sampling noise"]["bits"]
    assert components_of(summary, 0, "subwords")["init"]["ci95"][0] > 0


# --- held-out levels, and the report ----------------------------------------------------------------------------------


def test_of_two_by_two_runs_the_report_says_that_nothing_can_be_shown(finished):
    _, summary = finished
    assert {(row["factor"], row["checkpoint"]) for row in summary["apart"]} == {
        (factor, step) for factor in ("init", "order") for step in (0, END)
    }
    for row in summary["apart"]:
        assert (row["least_p"], row["relabellings"], row["exact"]) == (0.5, 2, True)
        assert row["p_value"] in (0.5, 1.0)
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
    (init,) = (row for row in summary["apart"] if (row["factor"], row["checkpoint"]) == ("init", 0))
    assert init["ci95"][0] > 0.5  # order 1 has the weights of order 0
    said = [line for line in verdicts(summary) if "apart from the other factors" in line]
    assert len(said) == 4
    assert all("can give is 0.5000, so nothing is shown by it" in line for line in said)


def test_the_page_has_both_tables_and_the_components_over_training(finished):
    made, summary = finished
    page = markdown(summary)
    section = page.split("## The factors apart")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| (init|order) \| subwords \|", section, re.MULTILINE)) == 4
    assert len(re.findall(r"^\| next token \|", section, re.MULTILINE)) == 2 * 5
    assert "| next token | order | 0 | 0 [0, 0] | 0.0 [0.0, 0.0] |" in section
    assert "(components.png)" in section
    assert (made.folder / "report" / "components.png").stat().st_size > 10_000
    assert "components.png" in files.read_json(made.folder / "report" / "summary.json")["files"]
    courses = trajectories(summary)
    assert list(courses) == ["subwords", "next token"]
    assert courses["next token"]["order"].x == [0, END]
    assert courses["next token"]["order"].y[0] == 0 < courses["next token"]["order"].y[1]


def test_a_study_of_one_factor_has_no_such_section(finished):
    _, summary = finished
    page = markdown({**summary, "apart": [], "components": []})
    assert "factors apart" not in page
    assert "components.png" not in page
