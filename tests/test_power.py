"""Power against enumeration, the textbook, and simulations of the project's own tests; and `natfp power` as users meet it."""

import math
import shutil
import subprocess
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import default_rng
from scipy.stats import binom, binomtest

from natfp_jax import cli, files, planning, stats
from natfp_jax.errors import UserError
from natfp_jax.power import MOST, Plan, least_excess, power, prompts_needed

EXCESSES = (0.005, 0.01, 0.02, 0.05, 0.1)
TEXTBOOK = {  # texts by the normal approximation of the test of a proportion, one-sided 0.05, power 0.8
    2: (61_830, 15_456, 3_863, 617, 153),
    3: (55_099, 13_808, 3_468, 562, 143),
    9: (24_749, 6_266, 1_605, 274, 75),
}
PILOT = Path(__file__).parent.parent / "docs" / "results" / "quickstart" / "summary.json"


def rate_bound(trials, rate):
    """Rejections that 99.9 % of simulations have."""
    return binom.interval(0.999, trials, rate)


def predictions(random, classes, prompts, excess):
    """Labels, prompts and predicted classes: right with the probability 1/m + excess, else any other class."""
    labels, prompt = np.tile(np.arange(classes), prompts), np.repeat(np.arange(prompts), classes)
    wrong = (labels + random.integers(1, classes, len(labels))) % classes
    return labels, prompt, np.where(random.random(len(labels)) < 1 / classes + excess, labels, wrong)


# --- the number of texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "place"), [(m, i) for m in TEXTBOOK for i in range(5)])
def test_texts_needed_are_those_of_the_textbook_and_the_hits_that_it_neglects(classes, place):
    chance, excess, known = 1 / classes, EXCESSES[place], TEXTBOOK[classes][place]
    accuracy = chance + excess
    by_hand = (1.645 * math.sqrt(chance * (1 - chance)) + 0.8416 * math.sqrt(accuracy * (1 - accuracy))) / excess
    assert math.ceil(by_hand**2) == known
    # Hits are whole numbers: the exact test of a proportion has less power with the textbook's texts than was asked for.
    assert binom.sf(binom.isf(0.05, known, chance), known, accuracy) < 0.8
    texts = classes * prompts_needed(Plan(classes), excess)
    assert 1 <= (texts - known) * excess <= 2.5


@pytest.mark.parametrize("prompts", range(1, 12))
@pytest.mark.parametrize("excess", [0.1, 0.3])
def test_of_two_classes_the_power_is_that_of_the_sign_test_by_enumeration(prompts, excess):
    right, wrong = (0.5 + excess) ** 2, (0.5 - excess) ** 2
    found = sum(
        binom.pmf(told, prompts, right + wrong) * binom.pmf(hits, told, right / (right + wrong))
        for told in range(1, prompts + 1)
        for hits in range(told + 1)
        if binomtest(hits, told, alternative="greater").pvalue < 0.05
    )
    assert power(Plan(2, permutations=10**9), prompts, excess) == pytest.approx(found, abs=1e-9)


@settings(max_examples=25)
@given(st.integers(2, 12), st.integers(1, 1000), st.floats(0.5, 0.95))
def test_the_least_excess_of_so_many_prompts_needs_so_many_prompts(classes, prompts, wanted):
    plan = Plan(classes)
    excess = least_excess(plan, prompts, wanted)
    if excess is None:
        assert power(plan, prompts, plan.most) < wanted
        return
    assert power(plan, prompts, excess) >= wanted > power(plan, prompts, max(excess - 2e-5, 0)) - 1e-3
    needed = prompts_needed(plan, excess, wanted)
    assert power(plan, needed, excess) >= wanted
    assert needed == 1 or power(plan, needed - 1, excess) < wanted
    # Hits are whole numbers, so that of few prompts one more may have less power.
    assert abs(needed - prompts) <= math.sqrt(prompts) + 2


@settings(max_examples=20)
@given(
    st.integers(2, 12),
    st.floats(0.03, 0.4),
    st.floats(0.5, 0.95),
    st.integers(1, 40),
    st.floats(1, 3),
    st.floats(1.05, 2),
)
def test_more_is_needed_for_less_and_for_more_certainty(classes, excess, wanted, tests, design_effect, more):
    needed = prompts_needed(Plan(classes, tests=tests), excess, wanted)
    assert prompts_needed(Plan(classes, tests=tests), min(excess * more, 0.5), wanted) <= needed
    assert prompts_needed(Plan(classes, tests=tests + 1), excess, wanted) >= needed
    assert prompts_needed(Plan(classes, alpha=0.05 / more, tests=tests), excess, wanted) >= needed
    assert prompts_needed(Plan(classes, tests=tests), excess, 1 - (1 - wanted) / more) >= needed
    clustered = Plan(classes, tests=tests, design_effect=design_effect)
    assert prompts_needed(clustered, excess, wanted) == math.ceil(needed * design_effect - 1e-9)
    assert power(clustered, prompts_needed(clustered, excess, wanted), excess) >= wanted


# --- simulations of the tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "excess"), [(2, 0.05), (2, 0.1), (3, 0.05), (3, 0.1)])
def test_the_permutation_test_rejects_as_often_as_is_claimed(classes, excess):
    random, trials, plan = default_rng(1), 800, Plan(classes, permutations=999)
    prompts, rejected = prompts_needed(plan, excess), 0
    for _ in range(trials):
        labels, prompt, predicted = predictions(random, classes, prompts, excess)
        rejected += stats.permutation_p(predicted, labels, prompt, random, 999) < 0.05
    low, high = rate_bound(trials, power(plan, prompts, excess))
    assert low <= rejected <= high


def test_the_sign_test_rejects_as_often_as_is_claimed():
    random, trials, plan = default_rng(2), 4000, Plan(2, permutations=10**9)
    prompts, rejected = prompts_needed(plan, 0.1), 0
    for _ in range(trials):
        labels, prompt, predicted = predictions(random, 2, prompts, 0.1)
        rejected += stats.sign_p(predicted == labels, labels, prompt) < 0.05
    low, high = rate_bound(trials, power(plan, prompts, 0.1))
    assert low <= rejected <= high


def permuted_hits(predicted):
    """The law of hits at one prompt with a text a class, every permutation spelled out."""
    orders = list(permutations(range(len(predicted))))
    hits = Counter(sum(p == label for p, label in zip(predicted, order, strict=True)) for order in orders)
    return np.array([hits[h] / len(orders) for h in range(len(predicted) + 1)])


@pytest.mark.parametrize("prompts", [40, 41, 42, 43, 52])
def test_of_three_classes_the_exact_permutation_test_rejects_as_often_as_is_claimed(prompts):
    """More trials than can be permuted one by one: by the three kinds of prompts the exact law of each trial is known."""
    random, trials, excess = default_rng(3), 20_000, 0.1
    labels = np.arange(3)
    hit = random.random((trials, prompts, 3)) < 1 / 3 + excess
    predicted = np.where(hit, labels, (labels + random.integers(1, 3, hit.shape)) % 3)
    different = (predicted == 0).any(2).astype(int) + (predicted == 1).any(2) + (predicted == 2).any(2)
    least: dict[tuple[int, ...], int] = {}
    laws = [np.fft.rfft(permuted_hits(kind), 3 * prompts + 1) for kind in ([0, 0, 0], [0, 0, 1], [0, 1, 2])]
    rejected = 0
    for kinds, hits in zip(np.stack([(different == n).sum(1) for n in (1, 2, 3)], axis=1), hit.sum((1, 2)), strict=True):
        if (key := tuple(kinds.tolist())) not in least:
            pmf = np.fft.irfft(math.prod(law**n for law, n in zip(laws, key, strict=True)), 3 * prompts + 1)
            least[key] = int(np.argmax(np.cumsum(pmf[::-1])[::-1] < 0.05))
        rejected += hits >= least[key]
    low, high = rate_bound(trials, power(Plan(3, permutations=10**9), prompts, excess))
    assert low <= rejected <= high


@pytest.mark.parametrize(("allowed", "tests"), [(39, 1), (199, 5)])
def test_few_permutations_cost_what_is_claimed(allowed, tests):
    random, trials, plan = default_rng(4), 1500, Plan(2, tests=tests, permutations=allowed)
    prompts, rejected = 100, 0
    for _ in range(trials):
        labels, prompt, predicted = predictions(random, 2, prompts, 0.1)
        rejected += stats.permutation_p(predicted, labels, prompt, random, allowed) * tests < 0.05
    claimed = power(plan, prompts, 0.1)
    low, high = rate_bound(trials, claimed)
    assert low <= rejected <= high
    assert claimed < power(Plan(2, tests=tests), prompts, 0.1) - 0.01


@pytest.mark.parametrize("design_effect", [0.7, 1.4])
def test_texts_of_a_prompt_that_resemble_each_other_count_as_so_many_independent_ones(design_effect):
    random, trials, excess = default_rng(5), 4000, 0.05
    plan = Plan(2, permutations=10**9, design_effect=design_effect)
    prompts = prompts_needed(plan, excess)
    # The variance of the hits at a prompt is that of two independent texts times the design effect.
    telling = design_effect * (0.5 - 2 * excess**2) + 4 * excess**2
    told = random.binomial(prompts, telling, trials)
    right = random.binomial(told, (telling + 2 * excess) / (2 * telling))
    rejected = np.count_nonzero(binom.sf(right - 1, told, 0.5) < 0.05)
    low, high = rate_bound(trials, power(plan, prompts, excess))
    assert low <= rejected <= high


def test_documents_that_give_away_more_than_others_cost_less_than_the_design_effect_says():
    """Labels are permuted as before, so that only the accuracy spreads wider: the claim is on the safe side, by so much."""
    random, trials, excess, spread, each = default_rng(6), 4000, 0.05, 0.1, 12
    accuracy = 0.5 + excess
    design_effect = 1 + (2 * each - 1) * spread**2 / (accuracy * (1 - accuracy))
    plan = Plan(2, permutations=10**9, design_effect=design_effect)
    documents = math.ceil(prompts_needed(plan, excess) / each)
    prompts = each * documents
    of_document = accuracy + spread * random.choice([-1, 1], (trials, documents, 1, 1))
    hits = random.random((trials, documents, each, 2)) < of_document
    right, told = (np.count_nonzero(hits.sum(3) == 2, axis=(1, 2)), np.count_nonzero(hits.sum(3) != 1, axis=(1, 2)))
    variance = hits.mean((1, 2, 3)).var() / (accuracy * (1 - accuracy) / (2 * prompts))
    assert variance == pytest.approx(design_effect, rel=0.1)
    rejected = np.count_nonzero(binom.sf(right - 1, told, 0.5) < 0.05)
    assert rejected > rate_bound(trials, power(plan, prompts, excess))[1]
    # The mean excess of the documents that came up has the variance that the design effect adds.
    places, weights = np.polynomial.hermite_e.hermegauss(15)
    shift = math.sqrt((design_effect - 1) * accuracy * (1 - accuracy) / (2 * prompts))
    alone = [power(Plan(2, permutations=10**9), prompts, max(excess + shift * place, 0)) for place in places]
    low, high = rate_bound(trials, weights @ alone / weights.sum())
    assert low <= rejected <= high


def test_a_design_effect_is_read_off_an_interval():
    random = default_rng(7)
    correct, document = random.random(600) < 0.6, np.arange(600)
    for copies in (1, 4):  # of each text: they tell nothing new
        hits = np.repeat(correct, copies)
        interval = stats.bootstrap_interval(hits, np.repeat(document, copies), random, 4000)
        assert planning.design_effect(hits.mean(), interval, len(hits)) == pytest.approx(copies, rel=0.12)
    assert planning.design_effect(1.0, (1.0, 1.0), 100) == 1.0


# --- what cannot be ---------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.floats(0.001, 0.5), st.integers(1, 10_000))
def test_too_few_permutations_find_nothing_however_many_texts(alpha, tests):
    fewest = Plan(2, alpha, tests).permutations_needed
    assert fewest == 1 or not 1 / fewest < alpha / tests * (1 - 1e-9)
    assert 1 / (1 + fewest) < alpha / tests
    assert power(Plan(2, alpha, tests, fewest), 5000, 0.3) > 0.99
    if fewest > 1:
        short = Plan(2, alpha, tests, fewest - 1)
        assert not short.possible
        assert power(short, 5000, 0.3) == 0
        assert prompts_needed(short, 0.3) is None
        assert least_excess(short, 5000) is None


def test_numbers_out_of_range_are_refused():
    for wrong in ({"classes": 1}, {"alpha": math.nan}, {"tests": 0}, {"permutations": 0}, {"design_effect": 0.0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} .*: give a number from"):
            Plan(**{"classes": 2, **wrong})
    for excess in (-0.1, 0.6, math.nan):
        with pytest.raises(UserError, match=r"give 0 to 0\.5"):
            power(Plan(2), 10, excess)
    with pytest.raises(UserError, match="prompts 0"):
        power(Plan(2), 0, 0.1)
    with pytest.raises(UserError, match="power 1"):
        prompts_needed(Plan(2), 0.1, 1.0)
    assert prompts_needed(Plan(2), 1e-6) is None
    assert least_excess(Plan(3), 1) is None
    assert 0 < least_excess(Plan(2), MOST) < 0.001


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def natfp_power(monkeypatch, capsys):
    """Runs `natfp power` in this process; its exit code, what it printed, and its one line on standard error."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["natfp", "power", *map(str, args)])
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def numbers(printed):
    """The rows of a table whose cells are numbers."""
    rows = [line.replace(",", "").split() for line in printed.splitlines()]
    return [[float(cell) for cell in row] for row in rows if len(row) == 6 and row[0].replace(".", "").isdecimal()]


def test_power_prints_texts_prompts_and_what_a_study_has_to_draw(natfp_power):
    code, printed, _ = natfp_power("--classes", 3, "--excess", 0.1, "--test_fraction", 0.25)
    prompts = prompts_needed(Plan(3), 0.1)
    assert code == 0
    assert numbers(printed)[0][2:5] == [3 * prompts, prompts, 4 * prompts]
    _, printed, _ = natfp_power("--classes", 3, "--texts", 3 * prompts)
    assert numbers(printed)[0][0] == pytest.approx(10, abs=0.02)
    _, printed, _ = natfp_power("--classes", 3, "--texts", 3 * prompts + 2, "--excess", 0.2)
    assert numbers(printed)[0][2:4] == [3 * prompts, prompts], "a prompt has a text of every class"
    assert numbers(printed)[0][5] == round(power(Plan(3), prompts, 0.2), 3)
    _, printed, _ = natfp_power("--classes", 9)
    assert [row[0] for row in numbers(printed)] == [0.5, 1, 2, 5, 10]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--classes", 1), "classes 1: give a number from 2 to 100"),
        (("--excess", 0.7), "excess 0.7: 2 classes have a chance of 1/2, give 0 to 0.5"),
        (("--excess", 0), "excess 0.0: give a number above 0"),
        (("--excess", 1e-7), "takes more than 10,000,000 prompts"),
        (("--texts", 1), "texts 1: a prompt has a text of each of 2 classes"),
        (("--texts", 2), "not even a classifier that is always right is found out"),
        (("--power", 1), "power 1.0: give a number between 0 and 1"),
        (("--tests", 600), "no number of texts detects anything, give 12000 or more"),
        (("--test_fraction", 0), "test_fraction 0.0: give a number between 0 and 1"),
        (("--pilot", PILOT, "--classes", 2, "--texts", 9), "leave out --classes, --texts"),
        (("--pilot", "nowhere.json"), "nowhere.json is no file: give the report/summary.json of a study"),
        (("--pilot", Path(__file__)), "is not valid JSON"),
    ],
)
def test_a_mistake_is_one_line(natfp_power, args, message):
    code, printed, said = natfp_power(*args)
    assert (code, printed, said.count("\n")) == (2, "", 1)
    assert message in said


def test_a_pilot_says_what_its_study_has_to_be(tmp_path, natfp_power):
    """A summary with one finding and one that is none: the numbers are those of the same plan by hand."""
    summary = files.read_json(PILOT)
    found = next(row for row in summary["comparisons"] if row["name"] == "all arms")
    n, k = 800 * 4, 4
    half = 1.96 * math.sqrt(0.3 * 0.7 / n * 1.5)
    found |= {"test_texts": n, "test_prompts": 800}
    rows = [
        {**found, "name": name, "accuracy": accuracy, "ci95": [accuracy - half, accuracy + half]}
        for name, accuracy in (("told [apart]", 0.3), ("not told", 0.25))
    ]
    path = tmp_path / "summary.json"
    files.write_json(path, {**summary, "comparisons": rows})
    code, printed, said = natfp_power("--pilot", path)
    assert (code, said) == (0, "")
    told, nothing = (line for line in printed.splitlines() if "told" in line)
    plan = Plan(4, tests=2, design_effect=planning.design_effect(0.3, (0.3 - half, 0.3 + half), n))
    assert plan.design_effect == pytest.approx(1.5)
    for excess in (0.05, 0.05 - half):
        prompts = prompts_needed(plan, excess)
        assert f"{prompts * k:,} / {math.ceil(prompts / 0.4 - 1e-9):,}" in told
    assert told.split()[-1] == f"{100 * least_excess(plan, 800):.1f}"
    assert nothing.count("not to be had") == 2


def test_a_pilot_with_too_few_permutations_is_told_so(natfp_power):
    code, printed, _ = natfp_power("--pilot", PILOT, "--tests", 600)
    assert code == 0
    assert "never" in printed
    assert "12000 or more" in " ".join(printed.split())


def foreign(summary):
    return {"colour": "red"}


def without_results(summary):
    return {**summary, "comparisons": []}


def mistyped(summary):
    return {**summary, "comparisons": [{**summary["comparisons"][0], "accuracy": "high"}]}


@pytest.mark.parametrize("change", [foreign, without_results, mistyped])
def test_a_file_that_is_no_summary_is_one_line(natfp_power, tmp_path, change):
    path = tmp_path / "summary.json"
    files.write_json(path, change(files.read_json(PILOT)))
    code, printed, said = natfp_power("--pilot", path)
    assert (code, printed, said.count("\n")) == (2, "", 1)
    assert f"{path} is no summary of a study" in said


def test_a_damaged_pilot_is_one_line(natfp_power, tmp_path):
    path = tmp_path / "summary.json"
    shutil.copy(PILOT, path)
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.6", 1))
    code, _, said = natfp_power("--pilot", path)
    assert (code, said.count("\n")) == (2, 1)
    assert "is not what was written" in said


def test_power_waits_for_no_jax():
    code = "import sys, natfp_jax.planning, natfp_jax.cli; assert not {'jax', 'sklearn', 'scipy.stats'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
