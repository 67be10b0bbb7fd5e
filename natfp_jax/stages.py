"""The stages of a study: corpus, train, sample, attribute.

Owns what each stage reads and writes, and what makes it done; each does only what is missing, and a mismatch of inputs is an
error that names both sides. Must not know how any stage computes, nor how results look.
"""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from natfp_jax import attribution, classify, config, files, mesh, processes, stats, texts
from natfp_jax.ceiling import log_likelihood
from natfp_jax.cohort import fitting, standing
from natfp_jax.config import Study
from natfp_jax.errors import Failed, UserError
from natfp_jax.lineage import numerics
from natfp_jax.lock import alone
from natfp_jax.member import Member
from natfp_jax.progress import Progress
from natfp_jax.rng import words
from natfp_jax.runs import damaged_lines
from natfp_jax.sample import Strategy, draw, draw_key, pad_prompts
from natfp_jax.stopping import Stop
from natfp_jax.study import Arm, Draw, draws
from natfp_jax.train import check, load_params, train
from natfp_jax.workspace import Workspace, write_if_new

__all__ = ["Work"]

_RECIPE = 1  # raised when a change of the code attributes the same texts otherwise
_SCORE_ROWS = 128  # texts whose likelihood is computed together, about


class Work(Workspace):
    """A study below an output folder, and what each stage adds to it."""

    def __init__(self, study: Study, out: Path, progress: Progress, stop: Stop | None = None) -> None:
        super().__init__(study, out, progress)
        self.stop = stop

    # --- corpus ---

    def corpus(self) -> None:
        """Prepares every corpus, and writes which arm is which experiment.

        Raises:
          UserError: an arm is not the experiment that it was, or cannot run on these devices, or the processes differ.
        """
        first = processes.led(lambda: not (self.folder / "arms.json").exists())
        with self.timed("corpus") if first else nullcontext():
            identities = self.identities
        listed = {arm: {"fingerprint": one.fingerprint, "inputs": one.inputs} for arm, one in identities.items()}
        hashes = {f"{name} of arm {arm}": sha256 for arm, one in identities.items() for name, sha256 in one.inputs.items()}
        processes.agree({**hashes, **{f"fingerprint of arm {arm}": one.fingerprint for arm, one in identities.items()}})
        for arm in self.arms.values():
            check(arm.experiment, self.store_of(arm), self.study.run, self.devices)
        mesh.check_batch("sampling.batch", self.study.sampling.batch, self.devices, texts=True)
        _ = self.prompts  # too few of them is known before hours of training
        processes.led(lambda: self._write_arms(listed))

    def _write_arms(self, listed: dict[str, Any]) -> None:
        path = self.folder / "arms.json"
        for arm, entry in (files.read_json(path) if path.exists() else {}).items():
            mine = listed.get(arm, {"fingerprint": "none", "inputs": {}})
            if entry != mine:
                other = [name for name, sha256 in mine["inputs"].items() if entry["inputs"].get(name) != sha256]
                raise UserError(
                    f"arm {arm} of {self.folder} is the experiment {entry['fingerprint'][:16]}, expected "
                    f"{mine['fingerprint'][:16]} (another {', '.join(other) or 'version'}): give another --out or name=..."
                )
        write_if_new(path, listed, owned=True)

    # --- train ---

    def train(self) -> None:
        """Trains every arm that lacks a checkpoint."""

        def unfinished() -> list[str]:
            self.check_owners()
            return [name for name, arm in self.arms.items() if not self.run_of(name).complete(self.kept(arm))]

        todo = [self.arms[name] for name in processes.led(unfinished)]
        if not todo:
            return
        settings = replace(self.study.run, checkpoints=self.study.kept_fractions)
        with (
            self.timed("train") as amounts,
            self.progress.task(f"train {len(todo)} arms", sum(arm.experiment.steps for arm in todo), "steps") as advance,
        ):
            amounts["tokens"], failures = 0, list[str]()
            for cohort in self._cohorts(todo):
                data = cohort[0].experiment.data
                for member in cohort:
                    if damaged := damaged_lines(member.run.metrics):
                        self.progress.say(f"{member.run.metrics} has {damaged} damaged lines, which are left out")
                with ExitStack() as locks:
                    for member in sorted(cohort, key=lambda member: member.run.folder):  # studies may share them
                        locks.enter_context(processes.leading(alone(member.run.folder, self.progress)))
                    try:
                        steps = train(cohort, self.restarts, settings, self.devices, advance, self.stop, self.progress.say)
                    except Failed as failed:
                        failures.append(str(failed))
                        continue
                amounts["tokens"] += steps * data.batch * data.seq_len
            if failures:
                raise Failed("; ".join(failures), agreed=True)

    def _cohorts(self, todo: list[Arm]) -> Iterator[list[Member]]:
        """The arms that train together: of one shape, as far as one another, and as many as memory holds.

        So a cohort that was stopped finds itself again, whatever has been finished since, and no arm waits for those behind it.
        """
        members = [
            Member(arm.id, arm.experiment, self.identities[arm.id], self.store_of(arm), self.run_of(arm.id)) for arm in todo
        ]
        kept = [self.kept(arm) for arm in todo]
        stand = processes.led(
            lambda: [standing(member, steps, self.restarts) for member, steps in zip(members, kept, strict=True)]
        )
        groups = dict[Any, list[Member]]()
        for member, where in zip(members, stand, strict=True):
            groups.setdefault((config.shape(member.experiment), *where), []).append(member)
        for (_, *where), group in groups.items():
            if where:
                yield from fitting(group, self.study.run, self.devices, self.progress.say)
            else:  # they have all, and are finished alone
                yield group

    # --- sample ---

    def sample(self) -> None:
        """Draws what is missing."""

        def wanted() -> list[Draw]:
            self.check_trained()
            return self.missing_draws()

        missing = [Draw(*one) for one in processes.led(wanted)]
        if not missing:
            return
        count = len(missing) * len(self.prompts)
        with self.timed("sample") as amounts, self.progress.task("sample", count, "texts") as advance:
            amounts["texts"] = count
            for one in missing:
                self._draw(one, advance)

    def _draw(self, one: Draw, advance: Any) -> None:
        arm, sampling, tokenizer = self.arms[one.arm], self.study.sampling, self.store.tokenizer
        params = load_params(self.run_of(arm.id), one.step, arm.experiment, self.store_of(arm), self.devices)
        key = draw_key(sampling.seed, self.identities[arm.id].fingerprint, one.step, one.number)
        width = -(-max(map(len, self.prompt_ids)) // 8) * 8
        id_N2 = np.array([words(prompt.id) for prompt in self.prompts], np.uint32)
        rows, batch = mesh.text_sharding(self.devices), sampling.batch
        continuations: list[list[int]] = []
        log_p: list[np.ndarray] = []
        for first in range(0, len(self.prompts), batch):
            real = min(batch, len(self.prompts) - first)
            some = [*range(first, first + real), *[first] * (batch - real)]  # one shape, whatever the number of prompts
            tokens_BP, length_B = pad_prompts([self.prompt_ids[i] for i in some], tokenizer.eos_id, width)
            drawn = processes.gathered(
                draw(
                    params,
                    key,
                    *mesh.lay((id_N2[some], tokens_BP, length_B), rows),
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
            "inputs": processes.led(lambda: self.draw_inputs(one)),
            "settings": self.draw_settings(),
            "texts": files.hash_json(continuations),
            "numerics": numerics(self.devices, batch=batch, prompt_slots=width),
        }
        processes.led(lambda: texts.write(self.draw_path(one), columns, record))

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
        hashes = processes.led(lambda: [self.run_of(arm).record(step)["weights"] for arm, step in pairs])
        weights = dict(zip(pairs, hashes, strict=True))
        found = {}
        for (name, step), scored in pairs.items():
            for one in [one for one in drawn if one in scored or one.arm == name]:
                if weights[one.arm, one.step] == weights[name, step]:
                    found[one, name, step] = drawn[one]["log_probability"].to_numpy()[test]
            scored[:] = [one for one in scored if (one, name, step) not in found]
        total = sum(map(len, pairs.values())) * len(test)
        ways = mesh.text_ways(self.devices)
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
        wanted, path = draws(self.study), self.folder / "attribution.json"

        def undone() -> str | None:
            """The hash of all inputs, if nothing is attributed of them."""
            self.check_trained()
            if missing := self.missing_draws():
                raise UserError(f"draw {missing[0]} is missing: run `natfp sample` first")
            records = {self.draw_path(one).stem: texts.read_record(self.draw_path(one)) for one in wanted}
            inputs = files.hash_json(
                {
                    "recipe": _RECIPE,
                    "draws": {name: [record["inputs"], record["texts"]] for name, record in records.items()},
                    "settings": config.to_json(self.study.attribution),
                }
            )
            if path.exists() and files.read_remade(path).get("inputs") == inputs:
                return None
            for one in wanted:
                texts.verify(self.draw_path(one))
            return inputs

        inputs = processes.led(undone)
        if inputs is None:
            return
        with self.timed("attribute"):
            drawn = {one: texts.read(self.draw_path(one)) for one in wanted}
            likelihoods = self._likelihoods(drawn)

            def write() -> None:
                files.write_json(path, {"inputs": inputs, "comparisons": self._attributions(drawn, likelihoods)})

            processes.led(write)

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
