"""The verdict on one comparison: against a plain scikit-learn script, known answers, and the ceiling it stays below."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from scipy.special import softmax
from scipy.stats import binom, norm
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss

from natfp_jax import stats
from natfp_jax.attribution import Comparison, attribute, ceiling, ceiling_scores
from natfp_jax.config import Attribution
from natfp_jax.errors import UserError
from natfp_jax.ladder import prepare

SETTINGS = Attribution()


class Numbers:
    """A tokenizer of texts such as "w3 w14"."""

    def encode_batch(self, texts):
        return [[int(word[1:]) for word in text.split()] for text in texts]

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


class Sources:
    """Arms of independent words over common prompts, whose likelihoods are known exactly."""

    def __init__(self, seed, arms, prompts, strength, pieces=100, length=30, per_document=1):
        random = default_rng(seed)
        chances = (1 / np.arange(1, pieces + 1)) * np.exp(strength * random.normal(size=(arms, pieces)))
        self.chances = chances / chances.sum(axis=1, keepdims=True)
        ids = [random.choice(pieces, size=(prompts, length), p=chance) for chance in self.chances]
        self.ids = np.concatenate(ids)
        self.texts = [" ".join(f"w{i}" for i in row) for row in self.ids]
        self.arms = np.repeat([f"arm {k}" for k in range(arms)], prompts)
        self.prompts = np.tile([f"prompt {i}" for i in range(prompts)], arms)
        self.documents = np.tile([f"document {i // per_document}" for i in range(prompts)], arms)
        self.log_likelihood = np.log(self.chances)[:, self.ids].sum(axis=2).T

    def comparison(self, name="a comparison", labels=None, rows=slice(None)):
        labels = self.arms if labels is None else np.asarray(labels)
        numbers = np.arange(len(self.texts))[rows]
        return Comparison(name, numbers, labels[rows], self.prompts[rows], self.documents[rows])


@pytest.mark.parametrize("kind", ["subwords", "words"])
@pytest.mark.parametrize("arms", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_results_equal_a_plain_script(arms, kind):
    sources = Sources(0, arms, 300, 0.3)
    comparison = sources.comparison()
    result = attribute(prepare(kind, sources.texts, Numbers()), comparison, SETTINGS).result

    part = stats.split(sources.documents, 0, 0.1, 0.4)
    texts = np.array(sources.texts)
    analyzer = {"subwords": lambda text: Numbers().encode_batch([text])[0], "words": str.split}[kind]

    def fitted(rows, C):
        vectoriser = CountVectorizer(analyzer=analyzer)
        return vectoriser, LogisticRegression(C=C, tol=1e-6, max_iter=10_000).fit(
            vectoriser.fit_transform(texts[rows]), sources.arms[rows]
        )

    losses, scaled, held_arms = {}, {}, sources.arms[part == "validation"]
    for C in (0.001, 0.01, 0.1, 1.0):
        vectoriser, model = fitted(part == "training", C)
        log_p = model.predict_log_proba(vectoriser.transform(texts[part == "validation"]))
        losses[C] = log_loss(held_arms, np.exp(log_p))
        scaled[C] = min(log_loss(held_arms, softmax(scale * log_p, axis=1)) for scale in np.geomspace(0.1, 10, 500))
    best = min(losses, key=losses.get)
    vectoriser, model = fitted(part != "test", best)
    counts, true = vectoriser.transform(texts[part == "test"]), sources.arms[part == "test"]
    predicted = model.predict(counts)

    assert result.chosen == {"C": best}
    assert result.classes == tuple(model.classes_)
    assert result.accuracy == accuracy_score(true, predicted)
    assert result.confusion == confusion_matrix(true, predicted).tolist()
    bits = np.log2(arms) - log_loss(true, model.predict_proba(counts)) / np.log(2)
    assert result.bits_per_text == pytest.approx(bits, abs=1e-4)
    assert result.validation_bits == pytest.approx(np.log2(arms) - scaled[best] / np.log(2), abs=2e-4)
    assert result.test_texts == len(true)
    assert result.test_prompts == len(set(sources.prompts[part == "test"]))
    assert result.chance == 1 / arms


def test_a_planted_difference_is_found_and_the_result_is_json():
    sources = Sources(1, 2, 300, 0.5)
    result = attribute(prepare("words", sources.texts, Numbers()), sources.comparison(), SETTINGS).result
    assert result.p_value == 1 / (1 + SETTINGS.permutations)
    assert 0.5 < result.ci95[0] < result.accuracy < result.ci95[1]
    assert result.auc > 0.7
    ratio = np.log(sources.chances[1] / sources.chances[0])
    assert all(ratio[int(piece[1:])] > 0 for piece in result.telling["arm 1"][:3])
    assert all(ratio[int(piece[1:])] < 0 for piece in result.telling["arm 0"][:3])
    again = json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))
    assert again["classes"] == ["arm 0", "arm 1"]


def test_nulls_are_at_chance_and_the_test_has_its_size():
    nulls, hits, texts, p_values = 60, 0, 0, []
    for seed in range(nulls):
        sources = Sources(seed, 2, 120, 0.0, pieces=40, per_document=2)
        result = attribute(prepare("words", sources.texts, Numbers()), sources.comparison(), SETTINGS).result
        hits, texts = hits + round(result.accuracy * result.test_texts), texts + result.test_texts
        p_values.append(result.p_value)
    low, high = binom.interval(1 - 1e-6, texts, 0.5)
    assert low <= hits <= high
    assert np.count_nonzero(np.array(p_values) <= 0.05) <= binom.isf(1e-6, nulls, 0.05)


def test_a_result_depends_neither_on_the_rest_of_the_study_nor_on_the_order_of_its_texts():
    sources = Sources(2, 3, 150, 0.3)
    pair = sources.arms != "arm 1"
    others = [" ".join(f"{start}{i}" for i in range(300)) for start in "avwz"]  # words before, between and after
    rung = prepare("words", sources.texts + others, Numbers())
    among_others = attribute(rung, sources.comparison(rows=pair), SETTINGS).result
    own = [text for text, kept in zip(sources.texts, pair, strict=True) if kept]
    compact = Comparison(
        "a comparison", np.arange(len(own)), sources.arms[pair], sources.prompts[pair], sources.documents[pair]
    )
    assert attribute(prepare("words", own, Numbers()), compact, SETTINGS).result == among_others

    order = default_rng(0).permutation(np.flatnonzero(pair))
    shuffled = attribute(rung, sources.comparison(rows=order), SETTINGS).result
    assert (shuffled.accuracy, shuffled.p_value, shuffled.ci95) == (
        among_others.accuracy,
        among_others.p_value,
        among_others.ci95,
    )


def test_two_comparisons_share_no_random_stream():
    sources = Sources(3, 2, 200, 0.1)
    rung = prepare("words", sources.texts, Numbers())
    first, second = (attribute(rung, sources.comparison(name), SETTINGS).result for name in ("first", "second"))
    assert first.accuracy == second.accuracy
    assert first.p_value != second.p_value
    assert first == attribute(rung, sources.comparison("first"), SETTINGS).result


def test_the_test_part_chooses_nothing():
    """Other texts at the test prompts leave the fitted classifier as it was."""
    sources = Sources(4, 2, 200, 0.3)
    held = stats.split(sources.documents, 0, 0.1, 0.4) == "test"
    spoiled = ["w0 w0 unheard" if out else text for text, out in zip(sources.texts, held, strict=True)]
    before, after = (
        attribute(prepare("words", t, Numbers()), sources.comparison(), SETTINGS).result for t in (sources.texts, spoiled)
    )
    assert (before.chosen, before.telling) == (after.chosen, after.telling)
    assert after.accuracy == 0.5


def test_pooled_arms_are_one_class():
    sources = Sources(5, 4, 200, 0.4)
    labels = np.where(np.isin(sources.arms, ["arm 0", "arm 1"]), "first half", "second half")
    result = attribute(prepare("words", sources.texts, Numbers()), sources.comparison(labels=labels), SETTINGS).result
    assert result.classes == ("first half", "second half")
    assert result.chance == 0.5
    assert result.test_texts == 4 * result.test_prompts
    assert result.p_value < 0.01


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "prompts", "documents", "complaint"),
    [
        (["a", "b", "a"], ["0", "0", "1"], ["0", "0", "1"], "equally many texts"),
        (["a", "a"], ["0", "0"], ["0", "0"], "two or more"),
        (["a", "b"], ["0", "0"], ["0", "1"], "of two documents"),
        (["a", "b"], ["0", "0"], ["0"], "lengths"),
    ],
)
def test_a_comparison_that_would_mislead_is_refused(labels, prompts, documents, complaint):
    with pytest.raises(ValueError, match=complaint):
        Comparison("odd", np.arange(len(labels)), labels, prompts, documents)


def test_too_few_documents_are_a_clear_mistake():
    sources = Sources(0, 2, 3, 0.3)
    with pytest.raises(UserError, match=r"of 3 prompt documents, each part needs 2; raise sampling\.prompts"):
        attribute(prepare("words", sources.texts, Numbers()), sources.comparison(), SETTINGS)


def test_empty_training_texts_are_a_clear_mistake():
    sources = Sources(0, 2, 100, 0.3)
    held = stats.split(sources.documents, 0, 0.1, 0.4) == "test"
    texts = [text if out else "" for text, out in zip(sources.texts, held, strict=True)]
    with pytest.raises(UserError, match="no training text has words"):
        attribute(prepare("words", texts, Numbers()), sources.comparison(), SETTINGS)


# --- the ceiling ------------------------------------------------------------------------------------------------------


def test_ceiling_of_two_gaussians_is_what_theory_says():
    """Two normal distributions d standard deviations apart are told apart with accuracy Phi(d / 2)."""
    random = default_rng(0)
    distance, n = 1.5, 20_000
    labels = np.tile([0, 1], n // 2)
    x = random.normal(labels * distance)
    scores = ceiling_scores(np.stack([norm.logpdf(x, 0), norm.logpdf(x, distance)], axis=1), labels, [0, 1])
    low, high = binom.interval(1 - 1e-6, n, norm.cdf(distance / 2))
    assert low <= scores.sum() <= high


def test_ties_and_impossible_texts_share_the_point():
    inf = np.inf
    log_likelihood = [[-1, -1, -2], [-1, -1, -1], [-inf, -inf, -inf], [-1, -inf, -inf], [-inf, -5, -9], [-2, -1, -1]]
    labels = ["a", "a", "c", "a", "a", "a"]
    assert ceiling_scores(log_likelihood, labels, ["a", "b", "c"]).tolist() == [1 / 2, 1 / 3, 1 / 3, 1, 0, 0]


def test_nearly_is_not_a_tie():
    assert ceiling_scores([[-1.0, np.nextafter(-1.0, 0)]], [0], [0, 1]).tolist() == [0.0]


def test_pools_of_equal_arms_tie_in_any_order():
    """A sum taken in another order may differ in its last bit; the verdict may not."""
    arms = default_rng(0).normal(-3, 1, size=(200, 5))
    likelihood = np.concatenate([arms, arms[:, ::-1]], axis=1)
    assert (ceiling_scores(likelihood, np.tile([0, 1], 100), np.repeat([0, 1], 5)) == 0.5).all()


def test_one_arm_drawn_twice_is_at_one_half():
    likelihood = np.repeat(default_rng(0).normal(-100, 10, size=(50, 1)), 2, axis=1)
    assert (ceiling_scores(likelihood, np.tile([0, 1], 25), [0, 1]) == 0.5).all()


def test_a_pool_is_the_mixture_of_its_arms():
    likelihood = np.array([[0.5, 0.1, 0.25, 0.25], [0.6, 0.0, 0.35, 0.3], [0.8, 0.0, 0.35, 0.3]])
    with np.errstate(divide="ignore"):
        logs = np.log(likelihood)
    # means .30 .30 .40 against .25 .325 .325: not the likeliest arm, and neither the sum nor the mean of logarithms
    assert ceiling_scores(logs, ["x", "x", "x"], ["x", "x", "y", "y"]).tolist() == [1, 0, 1]
    assert ceiling_scores(logs - 5000, ["x", "x", "x"], ["x", "x", "y", "y"]).tolist() == [1, 0, 1]


def test_a_class_gains_nothing_by_pooling_more_arms():
    assert ceiling_scores(np.log([[0.3, 0.3, 0.4]]), ["y"], ["x", "x", "y"]).tolist() == [1]


@given(
    st.lists(st.lists(st.sampled_from([-np.inf, -700.0, -3.0, -2.9, -0.1]), min_size=9, max_size=9), min_size=1),
    st.permutations(range(9)),
)
def test_ceiling_does_not_depend_on_the_order_of_arms(likelihood, order):
    pools = np.tile(["x", "y", "z"], 3)
    labels = np.resize(["x", "y", "z"], len(likelihood))
    logs = np.array(likelihood)
    assert (ceiling_scores(logs, labels, pools) == ceiling_scores(logs[:, order], labels, pools[order])).all()


@given(st.lists(st.lists(st.sampled_from([-np.inf, -3.0, -2.0]), min_size=4, max_size=4), min_size=1))
def test_scores_over_all_labels_sum_to_one(likelihood):
    total = sum(ceiling_scores(likelihood, [k] * len(likelihood), [0, 1, 2, 1]) for k in range(3))
    assert total == pytest.approx(1)


def test_what_is_no_likelihood_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        ceiling_scores([[np.nan, -1]], [0], [0, 1])
    with pytest.raises(ValueError, match="expected the classes"):
        ceiling_scores([[-1, -1]], [2], [0, 1])


@pytest.mark.parametrize("strength", [0.1, 0.3, 1.0])
def test_no_classifier_beats_the_ceiling(strength):
    sources = Sources(6, 3, 600, strength, per_document=2)
    comparison = sources.comparison()
    held = comparison.parts(SETTINGS) == "test"
    likelihood = np.where(held[:, None], sources.log_likelihood, np.nan)  # only the test texts need one
    best = ceiling(likelihood, ["arm 0", "arm 1", "arm 2"], comparison, SETTINGS)
    result = attribute(prepare("words", sources.texts, Numbers()), comparison, SETTINGS).result
    error = np.sqrt(2 * 0.25 / result.test_texts)  # of a difference of two accuracies, at most
    assert result.accuracy <= best.accuracy + 3 * error
    assert best.ci95[0] <= best.accuracy <= best.ci95[1]
    if strength == 1.0:
        assert result.accuracy > best.accuracy - 0.1  # and with strong sources it comes near: the bound is not idle


# --- beside the ceiling, with fewer texts, with several in one decision -------------------------------------------------


def bounded(sources, comparison, arms):
    return ceiling(sources.log_likelihood, [f"arm {k}" for k in range(arms)], comparison, SETTINGS)


def test_the_share_is_of_the_excess_over_chance():
    sources = Sources(7, 2, 800, 0.3)
    comparison = sources.comparison()
    bound = bounded(sources, comparison, 2)
    rung = prepare("words", sources.texts, Numbers())
    result = attribute(rung, comparison, SETTINGS, bound).result
    assert result.share == pytest.approx((result.accuracy - 0.5) / (bound.accuracy - 0.5))
    assert result.share_ci95[0] < result.share < result.share_ci95[1]
    alone = attribute(rung, comparison, SETTINGS).result
    assert (alone.share, alone.share_ci95) == (None, None)
    assert dataclasses.replace(result, share=None, share_ci95=None) == alone


def test_a_null_has_no_share():
    sources = Sources(8, 2, 300, 0.0)
    comparison = sources.comparison()
    bound = ceiling(np.zeros((600, 2)), ["arm 0", "arm 1"], comparison, SETTINGS)
    result = attribute(prepare("words", sources.texts, Numbers()), comparison, SETTINGS, bound).result
    assert (result.share, result.share_ci95) == (None, None)
    assert [pooled.accuracy for pooled in bound.pooled] == [0.5] * len(bound.pooled)


def test_two_classes_have_the_exact_sign_test_beside_the_permutations():
    sources = Sources(9, 2, 300, 0.12)
    result = attribute(prepare("words", sources.texts, Numbers()), sources.comparison(), SETTINGS).result
    error = 6 * np.sqrt(result.sign_p * (1 - result.sign_p) / SETTINGS.permutations) + 1 / SETTINGS.permutations
    assert result.p_value == pytest.approx(result.sign_p, abs=error)
    sources = Sources(9, 3, 300, 0.12)
    assert attribute(prepare("words", sources.texts, Numbers()), sources.comparison(), SETTINGS).result.sign_p is None


def test_fewer_training_texts_are_judged_on_the_same_test_texts():
    sources = Sources(10, 2, 1500, 0.12)
    rung = prepare("words", sources.texts, Numbers())
    curve = [attribute(rung, sources.comparison(), SETTINGS, fraction=fraction).result for fraction in (0.03, 0.2, 1.0)]
    assert len({result.test_texts for result in curve}) == 1
    assert curve[2].training_texts == 3000 - curve[2].test_texts
    for result, fraction in zip(curve[:2], (0.03, 0.2), strict=True):
        low, high = binom.interval(1 - 1e-6, curve[2].training_texts // 2, fraction)
        assert 2 * low <= result.training_texts <= 2 * high
    assert curve[0].accuracy < curve[2].accuracy
    assert curve[0].bits_per_text < curve[2].bits_per_text


def test_several_texts_of_one_source_are_one_decision():
    """The ceiling's are the products of the likelihoods; both use the same groups, and more texts tell more."""
    sources = Sources(11, 3, 1200, 0.1)
    comparison = sources.comparison()
    bound = bounded(sources, comparison, 3)
    result = attribute(prepare("words", sources.texts, Numbers()), comparison, SETTINGS, bound).result
    assert [pooled.texts for pooled in result.pooled] == [4, 16]
    prompts = result.test_prompts
    assert [pooled.decisions for pooled in result.pooled] == [3 * (prompts // 4), 3 * (prompts // 16)]
    for row in (result, bound):
        first, second = row.pooled
        assert row.accuracy < first.accuracy < second.accuracy
        assert first.ci95[0] <= first.accuracy <= first.ci95[1]
    for ours, best in zip(result.pooled, bound.pooled, strict=True):
        assert ours.accuracy <= best.accuracy + 3 * np.sqrt(2 * 0.25 / ours.decisions)


def test_a_decision_is_on_one_source_where_a_class_pools_several():
    """Texts of two arms of one class are not one decision: their mixture would not be what either drew."""
    sources = Sources(12, 4, 400, 0.3)
    labels = np.where(np.isin(sources.arms, ["arm 0", "arm 1"]), "first", "second")
    rows = np.arange(len(labels))
    comparison = Comparison("pools", rows, labels, sources.prompts, sources.documents, sources.arms)
    bound = ceiling(sources.log_likelihood, ["first", "first", "second", "second"], comparison, SETTINGS)
    assert bound.pooled[0].decisions == 4 * (len(bound.scores_N) // 4 // 4)
    assert bound.pooled[0].accuracy > 0.95
