"""Which words: the pieces that one source uses more, or less, than all others, and how far that can be relied on.

Owns the log-odds ratio of a piece under a prior, its error, its stability over documents, and whether it holds in the test
texts. Must not know how texts were drawn, what the sources are, or how results look.

A ratio has two errors. That of the counts as if every piece had been drawn alone (multinomial) is too small where a text, or
the texts of a document, repeat a piece. That over resampled documents sees this, but takes a count of zero for certain. The
larger of the two is used, so that the intervals are too wide rather than too narrow.

Letters after an underscore name the axes: N texts, V pieces, D documents, K classes, B resamples. A V that counts are in has
one column more, the last, for all pieces that are not looked at.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.stats import norm

from natfp_jax import config, rng
from natfp_jax.attribution import Comparison
from natfp_jax.classify import Features
from natfp_jax.counts import LEAST_DOCUMENTS, by_document, spread
from natfp_jax.examples import Example, Examples

__all__ = ["STABLE", "Word", "Wording", "log_odds", "wording"]

PRIOR = 0.02  # of the pieces of an average class: two classes of a size are pulled together by 2 %
RESAMPLES = 200  # of the documents: an error is then known to 5 %
BLOCK = 20  # resamples at once: what bounds the memory
BEYOND = float(norm.isf(0.025))  # errors from zero
STABLE = 0.95  # the stability from which a piece is called stable
LISTED = 5  # pieces of a class that are used more, and as many that are used less

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Word:
    """One piece in one class against all other classes together.

    Everything but `held_out_z` is of the training and validation texts, in which it was chosen.

    Attributes:
      piece: as a report shows it.
      source: the class.
      used: "more" or "less" than in the other classes.
      log_odds: the logarithm of the ratio of its odds in the class and in the others (`log_odds`); its sign is that of `used`.
      ci95: of that, the larger error of two on each side, 1.96 times.
      z: the ratio in errors of the counts alone, as Monroe et al. rank by.
      stability: the part of the resamples of documents in which the ratio keeps its sign and is 1.96 errors from zero.
      held_out_z: the ratio in the test texts, in errors; positive where the sign is the same.
      documents: how many documents it occurs in.
      per_10000: uses among 10,000 pieces of the class.
      per_10000_elsewhere: the same in all other classes together.
      examples: texts of the class that have it, none where the class never uses it.
    """

    piece: str
    source: str
    used: str
    log_odds: float
    ci95: tuple[float, float]
    z: float
    stability: float
    held_out_z: float
    documents: int
    per_10000: float
    per_10000_elsewhere: float
    examples: list[Example]


@dataclass(frozen=True)
class Wording:
    """Which pieces the classes of one comparison use otherwise.

    Of two classes, what one uses more the other uses less: each piece counts, and is listed, once, in the class that uses it
    more. Of several, each piece counts once a class.

    Attributes:
      classifier: what the pieces are, "subwords" or "words".
      tested: how many pieces were looked at: those in ten documents or more.
      stable: how many of them have a stability of 0.95 or more.
      by_chance: how many of them would be if no class differed from another, about.
      held: how many of the stable ones have the same sign in the test texts.
      words: the strongest, class by class, in errors from zero.
    """

    classifier: str
    tested: int
    stable: int
    by_chance: float
    held: int
    words: list[Word]


def log_odds(own_V: ArrayLike, others_V: ArrayLike, prior_V: ArrayLike) -> tuple[Counts, Counts]:
    """The log-odds ratio of each piece, and its error as if each piece had been drawn alone.

    The maximum a posteriori under one informative Dirichlet prior for both sides, with its approximate variance (Monroe,
    Colaresi & Quinn 2008, "Fightin' Words", equations 16 and 20). Their z is the ratio over the error. Axes before the last
    broadcast.

    Args:
      own_V: how often each piece is used here.
      others_V: how often elsewhere.
      prior_V: how many uses the prior adds to both, more than none of each piece.
    """
    prior = np.asarray(prior_V, dtype=np.float64)
    sides = [np.asarray(uses_V, dtype=np.float64) + prior for uses_V in (own_V, others_V)]
    own, others = (np.log(side / (side.sum(axis=-1, keepdims=True) - side)) for side in sides)
    return own - others, np.sqrt(1 / sides[0] + 1 / sides[1])


@dataclass(frozen=True, eq=False)
class _Contrast:
    """The ratios of the pieces that are looked at; of two classes only those of the first."""

    ratio_KV: Counts
    counted_KV: Counts  # the error of the counts alone
    error_KV: Counts  # the larger of that and the one over resampled documents
    resampled_BKV: NDArray[np.float32]


def _contrast(uses_DKV: sparse.csr_array, classes: int, prior_V: Counts, random: np.random.Generator) -> _Contrast:
    """The ratios of each class against the others; the prior stays as it is in all resamples.

    Args:
      uses_DKV: the uses in each document, the classes one after another along its columns.
      classes: how many there are.
      prior_V: what the prior adds.
      random: where the resampling comes from.
    """
    D, compared = uses_DKV.shape[0], 1 if classes == 2 else classes

    def ratios(weights_BD: Counts) -> tuple[Counts, Counts]:
        # One pass over the counts for many resamples: the weights of a document are next to each other.
        uses_BKV = np.ascontiguousarray((uses_DKV.T @ weights_BD.T).T).reshape(len(weights_BD), classes, -1)
        own_BKV = uses_BKV[:, :compared]
        ratio, error = log_odds(own_BKV, uses_BKV.sum(axis=1, keepdims=True) - own_BKV, prior_V)
        return ratio[..., :-1], error[..., :-1]

    def drawn() -> Counts:
        return np.array([np.bincount(random.integers(D, size=D), minlength=D) for _ in range(BLOCK)], dtype=np.float64)

    (ratio_KV,), (counted_KV,) = ratios(np.ones((1, D)))
    blocks = [ratios(drawn())[0].astype(np.float32) for _ in range(RESAMPLES // BLOCK)]
    resampled_BKV = np.concatenate(blocks)
    spread_KV = resampled_BKV.std(axis=0, ddof=1, dtype=np.float64)
    return _Contrast(ratio_KV, counted_KV, np.maximum(counted_KV, spread_KV), resampled_BKV)


def wording(features: Features, comparison: Comparison, settings: config.Attribution) -> Wording:
    """The pieces that each class uses more or less than the others, the surest first.

    Chosen in the training and validation texts, and confirmed in the test texts. All resamples take a document whole, with its
    texts of all classes.

    Args:
      features: the counts of the study's texts.
      comparison: which texts are compared.
      settings: how they are split; the split seed also decides the resamples.

    Raises:
      UserError: a part has too few documents.
    """
    labels_N = np.unique(np.asarray(comparison.labels), return_inverse=True)[1]
    documents_N, counts_NV = np.asarray(comparison.documents), features.counts_NV[comparison.rows]
    test_N = comparison.parts(settings) == "test"
    spread_V = spread(counts_NV[~test_N], documents_N[~test_N])
    used_V = counts_NV[~test_N].sum(axis=0)
    # A piece that all texts consist of has no odds.
    looked_V = np.flatnonzero((spread_V >= LEAST_DOCUMENTS) & (used_V < used_V.sum()))
    K = len(comparison.classes)
    if not len(looked_V):
        return Wording(features.kind, 0, 0, 0.0, 0, [])

    known_DKV, held_DKV = (
        by_document(counts_NV[part_N], looked_V, labels_N[part_N], documents_N[part_N]) for part_N in (~test_N, test_N)
    )
    uses_KV = known_DKV.sum(axis=0).reshape(K, -1)
    # Nothing may be left for the last column, of which no result is kept; but zero has no logarithm.
    prior_V = np.maximum(PRIOR / K * uses_KV.sum(axis=0), np.finfo(np.float64).tiny)

    def random(purpose: str) -> np.random.Generator:
        return rng.generator(settings.split_seed, "wording", comparison.name, features.kind, purpose)

    known = _contrast(known_DKV, K, prior_V, random("training and validation"))
    held = _contrast(held_DKV, K, prior_V, random("test"))
    sign_KV = np.sign(known.ratio_KV)
    stability_KV = (known.resampled_BKV * sign_KV > BEYOND * known.error_KV).mean(axis=0)
    held_KV = sign_KV * held.ratio_KV / held.error_KV
    stable_KV = stability_KV >= STABLE

    rows = comparison.rows[~test_N]
    prompts, labels = (np.asarray(column)[~test_N] for column in (comparison.prompts, comparison.labels))
    shown = Examples(features, rows, prompts, labels)
    name_V, found = features.names(looked_V), []
    for k, source in enumerate(comparison.classes):
        row, turned = (0, -k) if K == 2 else (k, 0)  # the ratios of the second of two are those of the first, turned
        ratio_V = known.ratio_KV[row] * (-1 if turned else 1)
        sure_V = ratio_V / known.error_KV[row]
        share_V = uses_KV[k, :-1] / max(uses_KV[k].sum(), 1)
        elsewhere = uses_KV.sum(axis=0) - uses_KV[k]
        elsewhere_V = elsewhere[:-1] / max(elsewhere.sum(), 1)
        for used, sign in (("more", 1),) if K == 2 else (("more", 1), ("less", -1)):
            for v in np.argsort(-sign * sure_V, kind="stable")[:LISTED]:
                if sign * ratio_V[v] <= 0:
                    break
                width = BEYOND * known.error_KV[row, v]
                found.append(
                    Word(
                        piece=name_V[v],
                        source=source,
                        used=used,
                        log_odds=float(ratio_V[v]),
                        ci95=(float(ratio_V[v] - width), float(ratio_V[v] + width)),
                        z=float(ratio_V[v] / known.counted_KV[row, v]),
                        stability=float(stability_KV[row, v]),
                        held_out_z=float(held_KV[row, v]),
                        documents=int(spread_V[looked_V[v]]),
                        per_10000=float(10_000 * share_V[v]),
                        per_10000_elsewhere=float(10_000 * elsewhere_V[v]),
                        examples=shown.of(int(looked_V[v]), source),
                    )
                )
    return Wording(
        classifier=features.kind,
        tested=stable_KV.size,
        stable=int(stable_KV.sum()),
        # A resampled ratio is normal about the one found: 95 % of them lie beyond where that is 1.96 + 1.64 errors from zero.
        by_chance=float(stable_KV.size * 2 * norm.sf(BEYOND + norm.ppf(STABLE))),
        held=int((held_KV[stable_KV] > 0).sum()),
        words=found,
    )
