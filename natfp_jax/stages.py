"""The stages of a study: corpus, train, sample, attribute.

Owns what each stage reads and writes, where it lies, and what makes it done; each does only what is missing, and a mismatch of
inputs is an error that names both sides. Must not know how any stage computes, nor how results look.

    OUT/data/                    what our TFDS builders prepared
    OUT/corpora/<hash>/          token stores
    OUT/runs/<fingerprint>/      one experiment each, shared by all studies below OUT
    OUT/studies/<name>/          study.json, arms.json, draws/, attribution.json, timings.json, report/
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from natfp_jax import attribution, classify, config, files, lineage, mesh, stats, texts
from natfp_jax.ceiling import log_likelihood
from natfp_jax.config import Corpus, Study
from natfp_jax.corpus import Prompt, Store, prepare
from natfp_jax.errors import UserError
from natfp_jax.lineage import Identity, numerics
from natfp_jax.lock import alone
from natfp_jax.progress import Progress
from natfp_jax.rng import words
from natfp_jax.runs import RunFolder
from natfp_jax.sample import Strategy, draw, draw_key, pad_prompts
from natfp_jax.study import Arm, Draw, arms, comparisons, draws
from natfp_jax.train import check, load_params, train

__all__ = ["Work"]

_RECIPE = 1  # raised when a change of the code attributes the same texts otherwise
_SCORE_ROWS = 128  # texts whose likelihood is computed together, about


class Work:
    """A study below an output folder: what is there, and what each stage adds."""

    def __init__(self, study: Study, out: Path, progress: Progress) -> None:
        self.study, self.out, self.progress = study, out, progress
        self.folder = out / "studies" / study.name
        self.arms = {arm.id: arm for arm in arms(study)}
        self.comparisons = comparisons(study)

    # --- whose folder, and how long things took ---

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the study's folder for this process alone, and says whose it is.

        Raises:
          UserError: another process holds it, or it belongs to another study.
        """
        path, mine = self.folder / "study.json", config.fingerprint(replace(self.study, run=config.Run()))
        begun = (self.folder / "arms.json").exists()  # until then there is nothing to be confused with
        if begun and (owner := _object(path)).get("fingerprint") != mine:
            changed = ", ".join(_differences(owner.get("study"), config.to_json(self.study))) or "version"
            raise UserError(
                f"{self.folder} holds the study {str(owner.get('fingerprint'))[:16]}, expected {mine[:16]} (they differ in "
                f"{changed}): give another --out, or another name=... to share its runs"
            )
        with alone(self.folder):
            for remains in self.folder.rglob(".*.tmp"):  # of a killed process
                remains.unlink()
            _write_if_new(path, {"fingerprint": mine, "study": config.to_json(self.study)})
            yield

    @contextmanager
    def _timed(self, stage: str) -> Iterator[dict[str, int]]:
        """Adds the seconds of a stage, and the amounts that it fills in, to timings.json."""
        start, amounts = time.perf_counter(), dict[str, int]()
        yield amounts
        path = self.folder / "timings.json"
        timings = _object(path) if path.exists() else {}
        entry = timings.setdefault(stage, {"seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + time.perf_counter() - start, 2)
        for name, amount in amounts.items():
            entry[name] = entry.get(name, 0) + amount
        files.write_json(path, timings)

    # --- corpus ---

    @cached_property
    def devices(self) -> jax.sharding.Mesh:
        """The mesh that everything runs on."""
        return mesh.make(self.study.run.mesh)

    @cached_property
    def store(self) -> Store:
        """The base arm's token store, which gives the tokenizer and the prompts of all arms; prepared if it is not there."""
        return next(iter(self._stores.values()))

    @cached_property
    def _stores(self) -> dict[Corpus, Store]:
        base = next(iter(self.arms.values())).experiment.corpus
        found = {base: prepare(base, self.out, self.progress)}
        for arm in self.arms.values():
            corpus = arm.experiment.corpus
            if corpus not in found:  # one tokenizer for all arms, so that texts and likelihoods are comparable
                shared = replace(corpus, tokenizer=str(found[base].folder / "tokenizer.json"))
                found[corpus] = prepare(shared, self.out, self.progress)
        return found

    def store_of(self, arm: Arm) -> Store:
        """The token store that an arm is trained on."""
        return self._stores[arm.experiment.corpus]

    @cached_property
    def identities(self) -> dict[str, Identity]:
        """Arm id → what the experiment is, now that its corpus is known."""
        pools: dict[Any, str] = {}
        found = {}
        for arm in self.arms.values():
            store, data = self.store_of(arm), arm.experiment.data
            pool = store.sha256, data.seq_len, data.windows
            if pool not in pools:
                pools[pool] = store.windows(data.seq_len, data.windows).sha256()
            found[arm.id] = lineage.identity(arm.experiment, store.sha256, store.tokenizer.sha256, pools[pool])
        same: dict[str, str] = {}
        for name, one in found.items():
            if (other := same.setdefault(one.fingerprint, name)) != name:
                raise UserError(f"arms {other} and {name} are the same experiment: change the factors so that all arms differ")
        return found

    def run_of(self, arm: str) -> RunFolder:
        """The run of an arm."""
        return RunFolder(self.out / "runs" / self.identities[arm].short)

    def corpus(self) -> None:
        """Prepares every corpus, and writes which arm is which experiment."""
        first = not (self.folder / "arms.json").exists()
        with self._timed("corpus") if first else nullcontext():
            listed = {arm: {"fingerprint": one.fingerprint, "inputs": one.inputs} for arm, one in self.identities.items()}
        for arm in self.arms.values():
            check(arm.experiment, self.store_of(arm), self.study.run, self.devices)
        mesh.check_batch("sampling.batch", self.study.sampling.batch, self.devices)
        _ = self.prompts  # too few of them is known before hours of training
        _write_if_new(self.folder / "arms.json", listed)

    # --- train ---

    def _kept(self, arm: Arm) -> list[int]:
        return arm.experiment.kept_steps(self.study.kept_fractions)

    def train(self) -> None:
        """Trains every arm that lacks a checkpoint."""
        self._check_owners()
        todo = [arm for arm in self.arms.values() if not self.run_of(arm.id).complete(self._kept(arm))]
        if not todo:
            return
        settings = replace(self.study.run, checkpoints=self.study.kept_fractions)
        with (
            self._timed("train") as amounts,
            self.progress.task(f"train {len(todo)} arms", sum(arm.experiment.steps for arm in todo), "steps") as advance,
        ):
            amounts["tokens"] = 0
            for arm in todo:
                identity, run = self.identities[arm.id], self.run_of(arm.id)
                with alone(run.folder):
                    steps = train(arm.experiment, identity, self.store_of(arm), run, settings, self.devices, arm.id, advance)
                amounts["tokens"] += steps * arm.experiment.data.batch * arm.experiment.data.seq_len

    # --- sample ---

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts of every draw."""
        sampling = self.study.sampling
        return self.store.prompts(sampling.prompts, sampling.prompt_chars, sampling.offsets_per_document)

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        """The ids of every prompt, EOS first."""
        tokenizer = self.store.tokenizer
        return [[tokenizer.eos_id, *ids] for ids in tokenizer.encode_batch([prompt.text for prompt in self.prompts])]

    def draw_path(self, one: Draw) -> Path:
        """The sample file of a draw."""
        return self.folder / "draws" / f"{one.arm}.step{one.step}.draw{one.number}.parquet"

    @cached_property
    def _prompt_hash(self) -> str:
        return files.hash_json([(prompt.id, prompt.document, prompt.text) for prompt in self.prompts])

    def _settings(self) -> dict[str, Any]:
        """What decides the texts of a draw besides the weights; batch shapes are part of the numerics record."""
        kept = config.to_json(self.study.sampling)
        return {name: kept[name] for name in ("new_tokens", "temperature", "top_k", "top_p", "seed")}

    def _draw_inputs(self, one: Draw) -> dict[str, str]:
        return {
            "settings": files.hash_json(self._settings()),
            "weights": self.run_of(one.arm).record(one.step)["weights"],
            "prompts": self._prompt_hash,
            "tokenizer": self.store.tokenizer.sha256,
        }

    def missing_draws(self) -> list[Draw]:
        """The draws that have no file yet.

        Raises:
          UserError: a file was drawn from something else.
        """
        missing = []
        for one in draws(self.study):
            path = self.draw_path(one)
            if not path.exists():
                missing.append(one)
                continue
            record = texts.read_record(path)
            for name, expected in self._draw_inputs(one).items():
                if (got := record["inputs"].get(name)) != expected:
                    raise UserError(
                        f"{path} was drawn from {name} {got}, expected {expected}: remove it, or give another --out"
                    )
        return missing

    def sample(self) -> None:
        """Draws what is missing."""
        self.require_trained()
        missing = self.missing_draws()
        if not missing:
            return
        count = len(missing) * len(self.prompts)
        with self._timed("sample") as amounts, self.progress.task("sample", count, "texts") as advance:
            amounts["texts"] = count
            for one in missing:
                self._draw(one, advance)

    def _check_owners(self) -> None:
        for arm, identity in self.identities.items():
            self.run_of(arm).check_owner(identity)

    def require_trained(self) -> None:
        """Raises a UserError if an arm lacks a checkpoint, or its run is another experiment's."""
        self._check_owners()
        for arm in self.arms.values():
            if missing := self.run_of(arm.id).missing(self._kept(arm)):
                raise UserError(f"arm {arm.id} lacks the checkpoints at steps {missing}: run `natfp train` first")

    def _draw(self, one: Draw, advance: Any) -> None:
        arm, sampling, tokenizer = self.arms[one.arm], self.study.sampling, self.store.tokenizer
        params = load_params(self.run_of(arm.id), one.step, arm.experiment, self.store_of(arm), self.devices)
        key = draw_key(sampling.seed, self.identities[arm.id].fingerprint, one.step, one.number)
        width = -(-max(map(len, self.prompt_ids)) // 8) * 8
        id_N2 = np.array([words(prompt.id) for prompt in self.prompts], np.uint32)
        rows, batch = mesh.batch_sharding(self.devices), sampling.batch
        continuations: list[list[int]] = []
        log_p: list[np.ndarray] = []
        for first in range(0, len(self.prompts), batch):
            real = min(batch, len(self.prompts) - first)
            some = [*range(first, first + real), *[first] * (batch - real)]  # one shape, whatever the number of prompts
            tokens_BP, length_B = pad_prompts([self.prompt_ids[i] for i in some], tokenizer.eos_id, width)
            drawn = jax.device_get(
                draw(
                    params,
                    key,
                    *jax.device_put((id_N2[some], tokens_BP, length_B), rows),
                    model=arm.experiment.model,
                    strategy=Strategy.of(sampling),
                    vocabulary=tokenizer.size,
                    eos=tokenizer.eos_id,
                    new_tokens=sampling.new_tokens,
                )
            )
            continuations += [ids[:n].tolist() for ids, n in zip(drawn.ids_BN[:real], drawn.length_B[:real], strict=True)]
            log_p.append(drawn.log_probability_B[:real])
            advance(real)
        n = len(self.prompts)
        columns = {
            "draw": [one.number] * n,
            "arm": [one.arm] * n,
            "checkpoint": [one.step] * n,
            "prompt_id": [prompt.id for prompt in self.prompts],
            "document_id": [prompt.document for prompt in self.prompts],
            "prompt": [prompt.text for prompt in self.prompts],
            "text": [tokenizer.decode(ids) for ids in continuations],
            "ids": continuations,
            "log_probability": np.concatenate(log_p),
        }
        record = {
            "fingerprint": self.identities[arm.id].fingerprint,
            "inputs": self._draw_inputs(one),
            "settings": self._settings(),
            "texts": files.hash_json(continuations),
            "numerics": numerics(self.devices, batch=batch, prompt_slots=width),
        }
        texts.write(self.draw_path(one), columns, record)

    # --- attribute ---

    def _test_rows(self) -> np.ndarray:
        """The rows, in the order of the prompts, of the test part: the ceiling is computed there alone."""
        settings = self.study.attribution
        parts_N = stats.split(
            [prompt.document for prompt in self.prompts],
            settings.split_seed,
            validation=settings.validation_fraction,
            test=settings.test_fraction,
        )
        return np.flatnonzero(parts_N == "test")

    def _likelihoods(self, drawn: dict[Draw, Any]) -> dict[tuple[Draw, str, int], np.ndarray]:
        """(draw, arm, step) → log-likelihood of the draw's test texts under the arm's checkpoint."""
        test = self._test_rows()
        pairs: dict[tuple[str, int], list[Draw]] = {}  # checkpoint → draws of other arms that it must score
        for comparison in self.comparisons:
            for one in comparison.draws:
                for other in comparison.draws:
                    known = pairs.setdefault((other.arm, other.step), [])
                    if other.arm != one.arm and one not in known:
                        known.append(one)
        # A draw's own likelihood is what its sampler recorded; so is that under an arm of bitwise equal weights.
        weights = {key: self.run_of(key[0]).record(key[1])["weights"] for key in pairs}
        found = {}
        for (name, step), scored in pairs.items():
            for one in [one for one in drawn if one in scored or one.arm == name]:
                if weights[one.arm, one.step] == weights[name, step]:
                    found[one, name, step] = drawn[one]["log_probability"].to_numpy()[test]
            scored[:] = [one for one in scored if (one, name, step) not in found]
        total = sum(map(len, pairs.values())) * len(test)
        ways = self.devices.shape["data"] * self.devices.shape["fsdp"]
        prompts = [self.prompt_ids[i] for i in test]
        with self.progress.task("likelihood ceiling", total, "texts") as advance:
            for (name, step), scored in pairs.items():
                if not scored:
                    continue
                arm = self.arms[name]
                params = load_params(self.run_of(name), step, arm.experiment, self.store_of(arm), self.devices)
                for one in scored:
                    ids = drawn[one]["ids"].to_pylist()
                    found[one, name, step] = log_likelihood(
                        params,
                        prompts,
                        [ids[i] for i in test],
                        arm.experiment.model,
                        Strategy.of(self.study.sampling),
                        self.store.tokenizer.size,
                        max(_SCORE_ROWS // ways, 1) * ways,
                        self.devices,
                    )
                    advance(len(test))
        return found

    def attribute(self) -> None:
        """Scores every comparison, unless that was done with the same texts and settings."""
        self.require_trained()
        if missing := self.missing_draws():
            raise UserError(f"draw {missing[0]} is missing: run `natfp sample` first")
        wanted = draws(self.study)
        records = {self.draw_path(one).stem: texts.read_record(self.draw_path(one)) for one in wanted}
        inputs = files.hash_json(
            {
                "recipe": _RECIPE,
                "draws": {name: [record["inputs"], record["texts"]] for name, record in records.items()},
                "settings": config.to_json(self.study.attribution),
            }
        )
        path = self.folder / "attribution.json"
        if path.exists() and _object(path).get("inputs") == inputs:
            return
        with self._timed("attribute"):
            drawn = {one: texts.read(self.draw_path(one)) for one in wanted}
            likelihoods = self._likelihoods(drawn)
            rows = self._attributions(drawn, likelihoods)
            files.write_json(path, {"inputs": inputs, "comparisons": rows})

    def _attributions(
        self, drawn: dict[Draw, Any], likelihoods: dict[tuple[Draw, str, int], np.ndarray]
    ) -> list[dict[str, Any]]:
        settings, count, test = self.study.attribution, len(self.prompts), self._test_rows()
        start = {one: place * count for place, one in enumerate(drawn)}
        every_text = [text for table in drawn.values() for text in table["text"].to_pylist()]
        features = [classify.featurise(kind, every_text, self.store.tokenizer) for kind in settings.classifiers]
        results = []
        with self.progress.task("attribute", len(self.comparisons) * len(features), "classifiers") as advance:
            for comparison in self.comparisons:
                sources = [(label, one) for label, pooled in comparison.classes.items() for one in pooled]
                compared = attribution.Comparison(
                    name=f"{comparison.name} @ {comparison.step}",
                    rows=np.concatenate([start[one] + np.arange(count) for _, one in sources]),
                    labels=[label for label, _ in sources for _ in range(count)],
                    prompts=[str(prompt.id) for prompt in self.prompts] * len(sources),
                    documents=[prompt.document for prompt in self.prompts] * len(sources),
                )
                likelihood_NA = np.full((count * len(sources), len(sources)), np.nan)
                for block, (_, one) in enumerate(sources):
                    for column, (_, other) in enumerate(sources):
                        likelihood_NA[block * count + test, column] = likelihoods[one, other.arm, other.step]
                bound = attribution.ceiling(likelihood_NA, [label for label, _ in sources], compared, settings)
                for counted in features:
                    result = attribution.attribute(counted, compared, settings)
                    advance(1)
                    results.append(
                        {
                            "name": comparison.name,
                            "factor": comparison.factor,
                            "checkpoint": comparison.step,
                            "draws": [self.draw_path(one).stem for one in comparison.draws],
                            **asdict(result),
                            "ceiling": bound.accuracy,
                            "ceiling_ci95": bound.ci95,
                        }
                    )
        for row, p_holm in zip(results, stats.holm([row["p_value"] for row in results]), strict=True):
            row["p_holm"] = float(p_holm)
        return results


def _object(path: Path) -> dict[str, Any]:
    found = files.read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: remove it and run the same command again")
    return found


def _write_if_new(path: Path, value: Any) -> None:
    """A file that says the same already is not touched."""
    if not path.exists() or files.read_json(path) != value:
        files.write_json(path, value)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The dotted paths at which two JSON values differ; `run` decides nothing and is left out."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [path] if old != new else []
    names = [name for name in {**old, **new} if path or name != "run"]
    return [where for name in names for where in _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))]
