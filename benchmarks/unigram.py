"""What the verdict of a bag of subwords costs, from 1,000 to 1,000,000 texts of each of two sources, and against scikit-learn.

    python -m benchmarks.unigram --save

Texts are made of the pieces that this machine's docstrings are written in (words with their space, signs, white space), drawn
independently, until 64 tokens are full. The second source has each piece a little more or less often than the first. They are
encoded again as those of a study are: that is most of the work.

First the whole verdict, as a study asks for it: the texts counted, C chosen, the classifier fitted and asked, p-value and
intervals. Each number of texts is a process of its own on two cores, and what is counted is its peak memory, with the texts
that it is given. Then choosing and fitting alone, against the script that one would write with scikit-learn, on the same
counts: the same C to choose from by the same loss on the same texts, its default solver with leave to converge. Each side is
a process of its own, and they are timed in turn.
"""

import argparse
import itertools
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.sides import Side, in_turn, started

__all__ = ["main"]

TOKENS, VOCABULARY = 64, 2048
DOCUMENTS = 4000  # docstrings that the tokenizer and the pieces come from
STRENGTH = 0.1  # standard deviation of the log-odds of a piece
PIECE = r" ?\w+| ?[^\w\s]+|\s+(?=\S)"
SIZES, PAIRED = (1_000, 10_000, 100_000, 1_000_000), (2_000, 10_000, 50_000)
CORES = 2
MEMORY, MINUTES, SLOWER, POINTS = 8 * 2**30, 10, 1.2, 0.2  # what is promised
_CHUNK = 20_000


@dataclass(frozen=True)
class Sources:
    """Two sources of independent pieces that are easily drawn from."""

    tokenizer: Any
    pieces_V: np.ndarray
    tokens_V: np.ndarray  # of each piece
    chances_KV: np.ndarray

    @classmethod
    def of(cls, file: Path) -> "Sources":
        """From docstrings and the tokenizer that is trained on them, kept in `file` with their pieces beside it."""
        from natfp_jax import rng
        from natfp_jax.datasets.machine_docs import MachineDocs
        from natfp_jax.tokenizer import Tokenizer

        kept = file.with_suffix(".npz")
        if not kept.exists():
            read = MachineDocs(data_dir=file.parent).documents()
            documents = [text for _, text in itertools.islice(read, DOCUMENTS)]
            Tokenizer.train(iter(documents), VOCABULARY).save(file)
            counted = Counter(piece for text in documents for piece in re.findall(PIECE, text))
            np.savez(kept, pieces=np.array(list(counted)), counts=np.array(list(counted.values())))
        tokenizer = Tokenizer.load(file)
        with np.load(kept) as found:
            pieces_V, count_V = found["pieces"].astype(object), found["counts"]
        tilt_V = STRENGTH * rng.generator(0, "benchmark", "tilt").normal(size=len(pieces_V))
        chances_KV = count_V * np.exp([np.zeros_like(tilt_V), tilt_V])
        tokens_V = np.array(list(map(len, tokenizer.encode_batch(pieces_V.tolist()))))
        return cls(tokenizer, pieces_V, tokens_V, chances_KV / chances_KV.sum(axis=1, keepdims=True))

    def texts(self, count: int) -> list[str]:
        """So many of each source, the first source's first."""
        from natfp_jax import rng

        found = []
        for k, chance_V in enumerate(self.chances_KV):
            random, upto_V = rng.generator(0, "benchmark", "texts", k), np.cumsum(chance_V)
            for first in range(0, count, _CHUNK):
                shape = min(_CHUNK, count - first), TOKENS
                piece_NT = np.searchsorted(upto_V[:-1], random.random(shape), side="right")
                length_N = (self.tokens_V[piece_NT].cumsum(axis=1) <= TOKENS).sum(axis=1)
                rows = zip(self.pieces_V[piece_NT], length_N, strict=True)
                found += ["".join(row[:length]) for row, length in rows]
        return found


def comparison(count: int) -> Any:
    """The first text of both sources continues one prompt, of a document of its own, and so on."""
    from natfp_jax.attribution import Comparison

    prompts = [f"prompt{number}" for number in range(count)] * 2
    documents = [f"document{number}" for number in range(count)] * 2
    labels = ["first"] * count + ["second"] * count
    return Comparison(f"{count} texts", np.arange(2 * count), labels, prompts, documents)


class Timed:
    """A rung that knows how long it took."""

    def __init__(self, rung: Any) -> None:
        self.rung, self.kind, self.seconds = rung, rung.kind, 0.0

    def judge(self, task: Any, settings: Any) -> Any:
        """As the rung."""
        begun = time.perf_counter()
        judged = self.rung.judge(task, settings)
        self.seconds += time.perf_counter() - begun
        self.task = task
        return judged


def verdict(file: str, count: int) -> Callable[[int], dict[str, Any]]:
    """The side that goes all the way from texts to the verdict."""
    from natfp_jax import ladder
    from natfp_jax.attribution import attribute
    from natfp_jax.config import Attribution

    sources, settings = Sources.of(Path(file)), Attribution()
    texts = sources.texts(count)

    def run(_: int) -> dict[str, Any]:
        begun, cpu = time.perf_counter(), time.process_time()
        rung = Timed(ladder.prepare("subwords", texts, sources.tokenizer))
        counted = time.perf_counter()
        result = attribute(rung, comparison(count), settings).result
        ended, cpu, judging = time.perf_counter(), time.process_time() - cpu, rung.seconds
        # Once more with nothing to choose, which tells choosing from fitting.
        rung.judge(rung.task, replace(settings, regularisation=(result.chosen["C"],)))
        fitting = rung.seconds - judging
        seconds = {
            "count": counted - begun,
            "choose": judging - fitting,
            "fit": fitting,
            "statistics": ended - counted - judging,
            "in all": ended - begun,
        }
        found = {"accuracy": result.accuracy, "ci95": result.ci95, "p_value": result.p_value, "auc_ci95": result.auc_ci95}
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "chosen": result.chosen,
            "training_texts": result.training_texts,
            **found,
        }

    return run


# --- choosing and fitting alone ---------------------------------------------------------------------------------------


def _prepared(file: str, count: int) -> tuple[Any, Any]:
    """The counts of the texts, and what each text is for."""
    from natfp_jax import ladder
    from natfp_jax.config import Attribution

    sources = Sources.of(Path(file))
    parts_N = comparison(count).parts(Attribution())
    masks = [parts_N == part for part in ("training", "validation", "test")]
    labels_N = np.repeat([0, 1], count)
    task = ladder.Task("benchmark", np.arange(2 * count), labels_N, *masks, tried_N=np.ones(2 * count, bool))
    return ladder.prepare("subwords", sources.texts(count), sources.tokenizer), task


def ours(file: str, count: int) -> Callable[[int], tuple[float, float]]:
    """The accuracy on the test texts, and C."""
    from natfp_jax.config import Attribution

    rung, task = _prepared(file, count)

    def run(_: int) -> tuple[float, float]:
        judged = rung.judge(task, Attribution())
        right_N = judged.probabilities_NK.argmax(axis=1) == task.labels_N[task.test_N]
        return float(right_N.mean()), judged.chosen["C"]

    return run


def theirs(file: str, count: int) -> Callable[[int], tuple[float, float]]:
    """The same, by scikit-learn."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    from natfp_jax.config import Attribution

    rung, task = _prepared(file, count)
    X, y, training, validation, test = rung.features.counts_NV, task.labels_N, task.training_N, task.validation_N, task.test_N

    def run(_: int) -> tuple[float, float]:
        losses = {}
        for C in Attribution().regularisation:
            model = LogisticRegression(C=C, max_iter=100_000).fit(X[training], y[training])
            losses[C] = log_loss(y[validation], model.predict_proba(X[validation]))
        best = min(losses, key=losses.__getitem__)
        model = LogisticRegression(C=best, max_iter=100_000).fit(X[training | validation], y[training | validation])
        return float(model.score(X[test], y[test])), best

    return run


# --- all of it --------------------------------------------------------------------------------------------------------


def measured(sizes: Sequence[int], paired: Sequence[int], rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of both tables."""
    cores = [sorted(os.sched_getaffinity(0))[:CORES]]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "tokenizer.json"
        # The first side, of no texts, makes the tokenizer, so that no other has its memory.
        with started([Side("sources", _kept, [{"file": str(file)}], cores)]) as running:
            running["sources"].run(1)
        wholes, pairs = [], []
        for count in sizes:
            with started([Side("verdict", verdict, [{"file": str(file), "count": count}], cores)]) as running:
                _, (found,), peak = running["verdict"].run(1)
            wholes.append({"texts": count, "peak_memory_bytes": peak, **found})
            print(f"{count:,} texts: {found['seconds']['in all']:.0f} s", file=sys.stderr, flush=True)
        for count in paired:
            given = [{"file": str(file), "count": count}]
            with started([Side("ours", ours, given, cores), Side("theirs", theirs, given, cores)]) as running:
                reached = {name: one.run(1)[1][0] for name, one in running.items()}
                timings = in_turn(running, dict.fromkeys(running, 1), rounds)
            ratios = [a / b for a, b in zip(timings["ours"].seconds, timings["theirs"].seconds, strict=True)]
            row = {"texts": count, "time_ratio": statistics.median(ratios), "time_ratios": ratios}
            for name, timing in timings.items():
                accuracy, C = reached[name]
                costs = {"seconds": timing.seconds, "median": timing.median, "spread": timing.spread, "peak": timing.peak_bytes}
                row[name] = {"accuracy": accuracy, "C": C, **costs}
            pairs.append(row)
            print(f"{count:,} texts paired", file=sys.stderr, flush=True)
    return wholes, pairs


def _kept(file: str) -> Callable[[int], None]:
    Sources.of(Path(file))
    return lambda _: None


def whole_table(rows: Sequence[dict[str, Any]]) -> str:
    """What the verdict costs."""
    steps = ["count", "choose", "fit", "statistics", "in all"]
    lines = [
        (
            f"{row['texts']:,}",
            *(f"{row['seconds'][step]:.1f}" for step in steps),
            f"{row['cpu_seconds']:.1f}",
            f"{1e6 * row['seconds']['in all'] / (2 * row['texts']):,.0f}",
            f"{row['peak_memory_bytes'] / 2**30:.2f}",
            f"{row['accuracy']:.4f}",
            f"{row['ci95'][0]:.4f} to {row['ci95'][1]:.4f}",
            f"{row['chosen']['C']:g}",
        )
        for row in rows
    ]
    names = ["texts of each", *(f"{step} s" for step in steps), "CPU s", "µs a text", "peak GiB", "accuracy", "95 %", "C"]
    return report.show("the whole verdict: subwords, two sources, 9,999 permutations, 2,000 resamples", names, lines)


def paired_table(rows: Sequence[dict[str, Any]]) -> str:
    """Choosing and fitting, against scikit-learn."""
    lines = [
        (
            f"{row['texts']:,}",
            *(f"{row[name]['median']:.2f} ± {50 * row[name]['spread']:.0f} %" for name in ("ours", "theirs")),
            f"{row['time_ratio']:.2f}",
            f"{min(row['time_ratios']):.2f} to {max(row['time_ratios']):.2f}",
            *(f"{100 * row[name]['accuracy']:.2f}" for name in ("ours", "theirs")),
            f"{100 * (row['ours']['accuracy'] - row['theirs']['accuracy']):+.2f}",
            *(f"{row[name]['C']:g}" for name in ("ours", "theirs")),
            *(f"{row[name]['peak'] / 2**30:.2f}" for name in ("ours", "theirs")),
        )
        for row in rows
    ]
    names = ["texts of each", "ours s", "theirs s", "ratio", "of rounds", "ours %", "theirs %", "points"]
    names += ["our C", "their C", "our GiB", "their GiB"]
    return report.show("choosing C and fitting, on the same counts", names, lines)


def kept_promises(wholes: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> str:
    """What is promised of the largest and of every pair, and whether it was found."""
    lines = []
    if wholes:
        last = max(wholes, key=lambda row: row["texts"])
        memory, seconds = last["peak_memory_bytes"], last["seconds"]["in all"]
        held = memory <= MEMORY and seconds <= 60 * MINUTES
        of = f"{last['texts']:,} texts of each: {memory / 2**30:.2f} of {MEMORY / 2**30:.0f} GiB, "
        lines.append(f"{of}{seconds / 60:.1f} of {MINUTES} minutes: {'held' if held else 'missed'}")
        for less, more in itertools.pairwise(sorted(wholes, key=lambda row: row["texts"])):
            ratio = (more["seconds"]["in all"] / more["texts"]) / (less["seconds"]["in all"] / less["texts"])
            lines.append(f"time a text at {more['texts']:,} over that at {less['texts']:,}: {ratio:.2f}")
    for row in pairs:
        points = abs(100 * (row["ours"]["accuracy"] - row["theirs"]["accuracy"]))
        held = row["time_ratio"] <= SLOWER and points <= POINTS
        of = f"{row['texts']:,} texts of each: {row['time_ratio']:.2f} of {SLOWER} times the time, "
        lines.append(f"{of}{points:.2f} of {POINTS} points apart: {'held' if held else 'missed'}")
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unigram", description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, nargs="*", default=SIZES, help="of each source, for the whole verdict")
    parser.add_argument("--paired", type=int, nargs="*", default=PAIRED, help="of each source, against scikit-learn")
    parser.add_argument("--rounds", type=int, default=5, help="of each pair")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/unigram.*")
    arguments = parser.parse_args()
    wholes, pairs = measured(arguments.texts, arguments.paired, arguments.rounds)
    found = {
        "command": " ".join(["python -m benchmarks.unigram", *sys.argv[1:]]),
        "machine": report.machine(),
        "versions": report.versions("scikit-learn", "scipy", "tokenizers"),
        "rows": wholes,
        "paired": pairs,
    }
    table = "\n".join([whole_table(wholes), paired_table(pairs), promised := kept_promises(wholes, pairs)])
    print(promised, end="")
    if arguments.save:
        report.save("unigram", found, table)


if __name__ == "__main__":
    main()
