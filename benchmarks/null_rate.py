"""How often is something found where there is nothing? Nulls through the whole pipeline, and planted leaks.

    python -m benchmarks.null_rate --save

Cheap models are trained once; every null is two new draws of one of them, split by a seed of its own, and given to each
classifier. A test at 5 % has to reject about 5 % of them: the bounds are those of 99.9 % of such experiments. p-values are
of counts, so that few different ones can occur; with their ties drawn at random (from the exact law of the sign test) they
have to be uniform. Then the same pipeline is given what must not be: a document on two sides, the prompt inside the text,
noise that two draws share, labels by the position of the prompt; each has to be caught.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report

__all__ = ["main"]

LINEAR, NEURAL = ("subwords", "words", "ngrams"), ("lm", "transformer")
ALPHA, BOUND = 0.05, 0.999
PROMPTS, TOKENS = 400, 24
RESULTS = Path(__file__).parent.parent / "docs" / "results" / "attribution"


def study() -> Any:
    """Two inits of a small model of stories."""
    from natfp_jax.config import Corpus, Data, Experiment, Factor, Model, Optimiser, Sampling, Stories, Study

    return Study(
        name="nulls",
        experiment=Experiment(
            corpus=Corpus(source=Stories(count=4000), vocabulary=512, prompt_fraction=0.25, shards=2),
            model=Model(width=64, layers=2, heads=4),
            data=Data(seq_len=64, windows=3200, batch=32),
            optimiser=Optimiser(learning_rate=3e-3),
        ),
        factors=(Factor("seeds.init", (1, 2)),),
        sampling=Sampling(prompts=PROMPTS, prompt_chars=30, new_tokens=TOKENS, batch=PROMPTS),
    )


@dataclass(frozen=True)
class Pair:
    """Two draws of one model at the same prompts."""

    texts: tuple[list[str], list[str]]
    first_ids: tuple[np.ndarray, np.ndarray]
    first_chance_N: np.ndarray  # of the first draw's first ids
    prompts: list[str]
    prompt_texts: list[str]
    documents: list[str]


class Model:
    """One trained model, ready to be drawn from as often as is asked for."""

    def __init__(self, out: Path, number: int) -> None:
        import jax

        from natfp_jax import config, mesh
        from natfp_jax.progress import Progress
        from natfp_jax.sample import programs_of
        from natfp_jax.stages import Work
        from natfp_jax.strategy import strategy_of
        from natfp_jax.train import load_params

        self.work = Work(study(), out, Progress(quiet=True))
        self.work.devices = mesh.make(config.Mesh(), jax.devices()[:1])
        arm = list(self.work.arms.values())[number]
        sampling, tokenizer = self.work.study.sampling, self.work.store.tokenizer
        self.strategy = strategy_of(sampling, 1.0)
        sizes = tokenizer.size, tokenizer.padded_size, tokenizer.eos_id, PROMPTS
        self.programs = programs_of(arm.experiment.model, self.strategy, *sizes, self.work.devices, sampling.cache)
        step, store = arm.experiment.steps, self.work.store_of(arm)
        load = partial(load_params, self.work.run_of(arm.id), step, arm.experiment, store, self.work.devices)
        self.weights, self.step = self.programs.weights([load]), step
        self.fingerprint = self.work.identities[arm.id].fingerprint
        self.encoded = self.work.prompts.encoded(tokenizer)

    def pair(self, number: int, shared: bool = False) -> Pair:
        """Two draws that nothing else has drawn; `shared`: with one noise for both."""
        from natfp_jax.sample import draw_key
        from natfp_jax.turns import draw

        prompts, tokenizer, found = self.work.prompts, self.work.store.tokenizer, []
        for which in (2 * number, 2 * number + (not shared)):
            key = draw_key(self.work.study.sampling.seed, self.fingerprint, self.step, self.strategy, which)
            found += draw(self.programs, self.weights, [key], prompts.ids, self.encoded, TOKENS)
        ids = [[row[:n].tolist() for row, n in zip(one.id_NW, one.length_N, strict=True)] for one in found]
        return Pair(
            texts=(tokenizer.decode_batch(ids[0]), tokenizer.decode_batch(ids[1])),
            first_ids=(found[0].id_NW[:, 0], found[1].id_NW[:, 0]),
            first_chance_N=np.exp(found[0].log_p_NW[:, 0]),
            prompts=list(map(str, prompts.ids)),
            prompt_texts=list(prompts.texts),
            documents=list(prompts.documents),
        )


def judged(pair: Pair, kind: str, seed: int, tokenizer: Any, mixed: bool = False) -> Any:
    """The verdict of one classifier on two draws; `mixed`: with their texts in an order that says nothing of them."""
    from natfp_jax import rng
    from natfp_jax.attribution import Comparison, attribute
    from natfp_jax.config import Attribution
    from natfp_jax.ladder import prepare

    drawn, count = [*pair.texts[0], *pair.texts[1]], len(pair.prompts)
    labels = ["draw 0"] * count + ["draw 1"] * count
    columns = [np.arange(2 * count), np.array(labels), np.array(pair.prompts * 2), np.array(pair.documents * 2)]
    if mixed:
        order = rng.generator(seed, "null rate", "order").permutation(2 * count)
        columns = [column[order] for column in columns]
    comparison = Comparison(f"null {seed}", columns[0], *(column.tolist() for column in columns[1:]))
    return attribute(prepare(kind, drawn, tokenizer), comparison, Attribution(split_seed=seed))


def spread_p(verdict: Any, seed: int) -> float:
    """The exact p-value with its ties drawn at random: uniform under the null, where that of whole counts cannot be."""
    from scipy.stats import binom

    from natfp_jax import rng

    hits_P = np.bincount(np.unique(verdict.prompts_N, return_inverse=True)[1], weights=verdict.correct_N)
    right, told = np.count_nonzero(hits_P == 2), np.count_nonzero(hits_P != 1)
    tie = rng.generator(seed, "null rate", verdict.result.classifier).uniform()
    return float(binom.sf(right, told, 0.5) + tie * binom.pmf(right, told, 0.5))


# --- what must be caught ----------------------------------------------------------------------------------------------


def document_on_two_sides(pair: Pair) -> Pair:
    """The second half of the documents are copies of the first under other names."""
    half = len(pair.prompts) // 2
    texts = tuple([*some[:half], *some[:half]] for some in pair.texts)
    return replace(pair, texts=texts)


def prompt_inside_the_text(pair: Pair) -> Pair:
    """One draw's texts begin with their prompts."""
    inside = [prompt + text for prompt, text in zip(pair.prompt_texts, pair.texts[1], strict=True)]
    return replace(pair, texts=(pair.texts[0], inside))


def caught(model: Model, number: int) -> dict[str, bool]:
    """Of each leak, planted in one null, whether it is found out."""
    from natfp_jax.attribution import Comparison
    from natfp_jax.stats import agreement_p

    tokenizer, found = model.work.store.tokenizer, {}
    for plant in (document_on_two_sides, prompt_inside_the_text):
        verdict = judged(plant(model.pair(number)), "subwords", number, tokenizer)
        found[plant.__name__.replace("_", " ")] = verdict.result.p_value < 0.01
    coupled = model.pair(number, shared=True)
    same_N = coupled.first_ids[0] == coupled.first_ids[1]
    found["noise shared between draws"] = agreement_p(same_N, coupled.first_chance_N) < 0.01
    # The first half of the prompts is of one draw, the second of the other: the place says the label, and so does the prompt.
    honest, half = model.pair(number), PROMPTS // 2
    labels = ["draw 0"] * half + ["draw 1"] * (PROMPTS - half)
    try:
        Comparison("by position", np.arange(PROMPTS), labels, honest.prompts, honest.documents)
        refused = False
    except ValueError:
        refused = True
    # Labels that follow one another in a file, as they do in every draw: their places must tell nothing.
    ordered, mixed = (judged(honest, "subwords", number, tokenizer, mixed=mixed).result for mixed in (False, True))
    found["labels by position"] = refused and (ordered.confusion, ordered.p_value) == (mixed.confusion, mixed.p_value)
    return found


# --- many of them -----------------------------------------------------------------------------------------------------

_MODELS: list[Model] = []  # of a worker process


def _start(out: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    _MODELS.extend(Model(Path(out), number) for number in range(2))


def _null(number: int, kinds: Sequence[str]) -> tuple[list[dict[str, Any]], float]:
    from natfp_jax.stats import agreement_p

    model = _MODELS[number % 2]
    pair, rows = model.pair(number), []
    for kind in kinds:
        begun = time.perf_counter()
        verdict = judged(pair, kind, number, model.work.store.tokenizer)
        p_values = {"p_value": verdict.result.p_value, "spread_p": spread_p(verdict, number)}
        rows.append(
            {"classifier": kind, "accuracy": verdict.result.accuracy, **p_values, "seconds": time.perf_counter() - begun}
        )
    return rows, agreement_p(pair.first_ids[0] == pair.first_ids[1], pair.first_chance_N)


def _leaks(number: int) -> dict[str, bool]:
    return caught(_MODELS[number % 2], 1_000_000 + number)


def row_of(kind: str, p_values: Sequence[float], spread: Sequence[float]) -> dict[str, Any]:
    """The rejections of one classifier, and the bound of their rate."""
    from scipy.stats import binom, kstest

    low, high = binom.interval(BOUND, len(p_values), ALPHA) / np.float64(len(p_values))
    return {
        "classifier": kind,
        "nulls": len(p_values),
        "rejected": int(np.count_nonzero(np.array(p_values) <= ALPHA)),
        "low": float(low),
        "high": float(high),
        "uniform_p": float(kstest(spread, "uniform").pvalue),
    }


def measured(linear: int, neural: int, leaks: int, told: Callable[[str], None]) -> dict[str, Any]:
    """All nulls and leaks, on every core."""
    with tempfile.TemporaryDirectory() as place:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(_train, place).result()
        cores = len(os.sched_getaffinity(0))
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(cores, context, initializer=_start, initargs=(place,)) as pool:
            jobs = [pool.submit(_null, number, (*LINEAR, *NEURAL) if number < neural else LINEAR) for number in range(linear)]
            found, noise = [], []
            for number, job in enumerate(jobs):
                rows, agreement = job.result()
                found += rows
                noise.append(agreement)
                if number % 20 == 19:
                    told(f"{number + 1} of {linear} nulls")
            catches = [job.result() for job in [pool.submit(_leaks, number) for number in range(leaks)]]
    return {"nulls": found, "noise": noise, "caught": catches}


def _train(out: str) -> None:
    from natfp_jax.progress import Progress
    from natfp_jax.stages import Work

    work = Work(study(), Path(out), Progress(quiet=True))
    with work.claimed():
        work.corpus()
        work.train()


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.null_rate", description=__doc__.partition("\n")[0])
    parser.add_argument("--linear", type=int, default=400, help="nulls of the counting classifiers")
    parser.add_argument("--neural", type=int, default=100, help="of these, how many the reading classifiers judge too")
    parser.add_argument("--leaks", type=int, default=20, help="of each kind")
    parser.add_argument("--save", action="store_true", help="write docs/results/attribution/null_rate.* and leaks.json")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    found = measured(arguments.linear, arguments.neural, arguments.leaks, partial(print, file=sys.stderr, flush=True))
    kinds = dict.fromkeys(row["classifier"] for row in found["nulls"])
    of = {kind: [row for row in found["nulls"] if row["classifier"] == kind] for kind in kinds}
    rows = [row_of(kind, [one["p_value"] for one in some], [one["spread_p"] for one in some]) for kind, some in of.items()]
    # Agreements are few whole numbers, so that their p-values are not uniform but at least so large.
    leaks = [
        {"leak": name, "planted": len(found["caught"]), "caught": sum(one[name] for one in found["caught"])}
        for name in found["caught"][0]
    ]
    lines = [
        (row["classifier"], row["nulls"], row["rejected"], f"{100 * row['rejected'] / row['nulls']:.1f}",
         f"{100 * row['low']:.1f} to {100 * row['high']:.1f}", f"{row['uniform_p']:.3f}",
         f"{np.mean([one['accuracy'] for one in of[row['classifier']]]):.4f}",
         f"{np.median([one['seconds'] for one in of[row['classifier']]]):.2f}")
        for row in rows
    ]  # fmt: skip
    table = report.show(
        "tests at 5 % of two draws of one model",
        ["classifier", "nulls", "rejected", "%", "bound of 99.9 %", "uniform p", "mean accuracy", "s a null"],
        lines,
    )
    table += report.show(
        "planted leaks", ["leak", "planted", "caught"], [(one["leak"], one["planted"], one["caught"]) for one in leaks]
    )
    rejected = int(np.count_nonzero(np.array(found["noise"]) < 0.01))
    table += f"two draws agreed too often (p < 0.01) in {rejected} of {len(found['noise'])} honest nulls\n"
    print(f"{time.perf_counter() - begun:.0f} s")
    if arguments.save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "null_rate.json").write_text(json.dumps(rows, indent=1) + "\n")
        about = {"command": " ".join(["python -m benchmarks.null_rate", *sys.argv[1:]]), "versions": report.versions()}
        about |= {"machine": report.machine(), "noise_rejected": rejected}
        (RESULTS / "leaks.json").write_text(json.dumps({**about, "rows": leaks}, indent=1) + "\n")
        (RESULTS / "null_rate.txt").write_text(table)


if __name__ == "__main__":
    main()
