"""The stages of a study: corpus, train, sample, attribute.

Owns what each stage reads and writes, and what makes it done; each does only what is missing, and a mismatch of inputs is an
error that names both sides. Must not know how any stage computes, nor how results look.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from natfp_jax import attribution, config, encoder, files, processes, scoring, texts
from natfp_jax.analysis import Analysis
from natfp_jax.cohort import fitting, standing
from natfp_jax.config import Sampling, Study
from natfp_jax.drawing import sample
from natfp_jax.errors import Failed, UserError
from natfp_jax.lock import alone
from natfp_jax.member import Member
from natfp_jax.next_token import next_tokens
from natfp_jax.progress import Progress
from natfp_jax.runs import damaged_lines
from natfp_jax.share import Share
from natfp_jax.stopping import Stop
from natfp_jax.strategy import strategy_of
from natfp_jax.study import Arm, draws, grids, kept_fractions
from natfp_jax.train import check, train
from natfp_jax.workspace import Workspace, write_if_new

__all__ = ["Work"]

_TRUNCATES = ("top_k", "top_p", "min_p", "repetition_penalty", "greedy")
_RECIPE = 4  # raised when a change of the code attributes the same texts otherwise


class Work(Workspace):
    """A study below an output folder, and what each stage adds to it."""

    def __init__(
        self, study: Study, out: Path, progress: Progress, stop: Stop | None = None, share: Share | None = None
    ) -> None:
        super().__init__(study, out, progress, share)
        self.stop = stop

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Holds the study with its corpora prepared; where tasks share it, then this one's share alone."""
        with ExitStack() as mine:
            with self.claimed():
                mine.enter_context(self.shared())
                self.corpus()
                if self.share is None:
                    yield
            if self.share is not None:
                yield

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
        if first:
            self._tell_left_out()
        wanted = processes.led(self._wanted)
        for arm in (*(parent for name, parent in self.parents.items() if name in wanted), *self.arms.values()):
            try:
                if arm.id in self.published:
                    self.published[arm.id].check(self.devices)
                else:
                    check(arm.experiment, self.store_of(arm), self.study.run, self.devices)
            except UserError as error:
                raise UserError(f"{arm.id if arm.id in self.parents else f'arm {arm.id}'}: {error}") from None
        sampling = self.study.sampling
        self._check_comparable()
        for temperature in sampling.temperatures:
            strategy_of(sampling, temperature)
        if sampling.file_texts * sampling.lengths[-1] >= 2**31:
            raise UserError(
                f"sampling.file_texts {sampling.file_texts} times {sampling.lengths[-1]} new tokens are more than a column "
                f"of one file holds: set sampling.file_texts={2**30 // sampling.lengths[-1]} or fewer"
            )
        # What is wrong with the prompts is known before hours of training; their file may be another one elsewhere.
        processes.agree({"prompts": self.prompts.sha256})
        _ = self.longest_prompt
        processes.led(lambda: self._write_arms(listed))

    def _check_comparable(self) -> None:
        """Raises a UserError if texts are drawn in a way in which arms of different tokenizers cannot be compared."""
        sampling, plain = self.study.sampling, Sampling()
        if not self.reencoded:
            return
        if len(sampling.lengths) > 1:
            raise UserError(
                f"sampling.new_tokens {list(sampling.lengths)}: arms of different tokenizers share no lengths; give one"
            )
        for name in _TRUNCATES:
            if (got := getattr(sampling, name)) != getattr(plain, name):
                raise UserError(
                    f"sampling.{name} {got}: arms of different tokenizers are compared by whole distributions, since one "
                    "never draws by the ids of another; leave it out"
                )

    def _tell_left_out(self) -> None:
        """Says of how many conversations nothing is learnt."""
        for corpus, length in dict.fromkeys((arm.experiment.corpus, arm.experiment.data.seq_len) for arm in self.arms.values()):
            if left_out := self._stores[corpus].left_out(length):
                folder = self._stores[corpus].folder.name
                self.progress.say(f"corpus {folder}: {left_out:,} conversations of more than {length + 1} tokens are left out")

    @cached_property
    def encoder_files(self) -> dict[str, str]:
        """The sha256 of the files of the pretrained encoder, where the study asks for one; it is used by the first process.

        Raises:
          UserError: there is none, or what it needs is not installed.
        """
        folder = self.study.attribution.encoder
        if "encoder" not in self.study.attribution.classifiers:
            return {}
        if folder is None:
            raise UserError("attribution.classifiers names an encoder: give attribution.encoder, a local folder that has one")
        return processes.led(lambda: encoder.identity(Path(folder)))

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
        """Trains every arm that lacks a checkpoint, after the parents that it descends from; adopts what is published."""
        todo = processes.led(self._wanted)
        self._adopt([name for name in todo if name in self.published])
        every = [
            arm for arm in (*self.parents.values(), *self.arms.values()) if arm.id in todo and arm.id not in self.published
        ]

        def together(arm: Arm) -> tuple[Any, ...]:
            fractions = kept_fractions(self.study, self.arms.values(), arm.experiment)
            return arm.id in self.arms, 0 if arm.id in self.arms else len(arm.experiment.ancestors), fractions

        for _, group in groupby(sorted(every, key=together), key=together):
            self._train(list(group))

    def _adopt(self, todo: list[str]) -> None:
        """Writes the runs of published models."""
        if not todo:
            return
        with self.timed("adopt"), self.progress.task(f"adopt {len(todo)} published", len(todo), "models") as advance:
            for name in todo:
                for note in self.published[name].source.described.notes:
                    self.progress.say(f"arm {name} {note}")
                run = self.run_of(name)
                with processes.leading(alone(run.folder, self.progress, wait=self.share is not None)):
                    self.published[name].save(run, self.devices)
                advance(1)

    def _wanted(self) -> list[str]:
        """The arms of this command that lack a checkpoint, and of their ancestors those that do; one process reads files."""
        self.check_owners()
        lacking = {arm.id for arm in self.mine.values() if not self.run_of(arm.id).complete(self.kept(arm))}
        line = {one for name in lacking for one in self.arms[name].experiment.ancestors}
        found = [parent for parent in self.parents.values() if parent.experiment in line]
        return [*(one.id for one in found if not self.run_of(one.id).complete(self.kept(one))), *lacking]

    def _train(self, todo: list[Arm]) -> None:
        settings = replace(self.study.run, checkpoints=kept_fractions(self.study, self.arms.values(), todo[0].experiment))
        called = "arms" if todo[0].id in self.arms else "parents" if len(todo) > 1 else "parent"
        with (
            self.timed("train") as amounts,
            self.progress.task(f"train {len(todo)} {called}", sum(arm.experiment.steps for arm in todo), "steps") as advance,
        ):
            amounts["tokens"], failures = 0, list[str]()
            for cohort in self._cohorts(todo):
                data = cohort[0].experiment.data
                for member in cohort:
                    if damaged := damaged_lines(member.run.metrics):
                        self.progress.say(f"{member.run.metrics} has {damaged} damaged lines, which are left out")
                with ExitStack() as locks:
                    for member in sorted(cohort, key=lambda member: member.run.folder):  # studies may share them
                        # Tasks that share a study have parents in common: the first trains them, the others find them there.
                        lock = alone(member.run.folder, self.progress, wait=self.share is not None)
                        locks.enter_context(processes.leading(lock))
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
            Member(
                arm.id, arm.experiment, self.identities[arm.id], self.store_of(arm), self.run_of(arm.id), self.origin_of(arm)
            )
            for arm in todo
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
        sample(self)

    # --- attribute ---

    @cached_property
    def test_rows(self) -> np.ndarray:
        """The rows, in the order of the prompts, of the test part: the ceiling is computed there alone.

        Raises:
          UserError: a part has too few documents.
        """
        parts_N = attribution.parts(self.prompts.documents, self.study.attribution, f"study {self.study.name}")
        return np.flatnonzero(parts_N == "test")

    def attribute(self) -> None:
        """Scores every comparison, unless that was done with the same texts and settings."""
        wanted, path = draws(self.study), self.folder / "attribution.json"
        drawn_files = [one for draw_of in wanted for one in self.draw_paths(draw_of)]

        def undone() -> str | None:
            """The hash of all inputs, if nothing is attributed of them."""
            self.check_trained()
            if missing := self.missing_files():
                raise UserError(f"draw {next(iter(missing)).name} is missing: run `natfp sample` first")
            records = {one.stem: texts.read_record(one) for one in drawn_files}
            inputs = files.hash_json(
                {
                    "recipe": _RECIPE,
                    "draws": {name: [record["inputs"], record["texts"]] for name, record in records.items()},
                    "settings": config.to_json(self.study.attribution),
                    "encoder": self.encoder_files,
                }
            )
            if path.exists() and files.read_remade(path).get("inputs") == inputs:
                return None
            for one in drawn_files:
                texts.verify(one)
            return inputs

        inputs = processes.led(undone)
        if inputs is None:
            return
        with self.timed("attribute"):
            drawn = {one: texts.read_all(self.draw_paths(one)) for one in wanted}
            likelihoods = scoring.likelihoods(self, drawn, self.test_rows)
            crossed = grids(self.study)
            expected = next_tokens(self, crossed, self.test_rows)

            def write() -> None:
                analysis = Analysis(self, drawn, self.test_rows)
                files.write_json(path, {"inputs": inputs, **analysis.made(likelihoods, crossed, expected)})
                for kind, (seconds, count) in analysis.costs.items():
                    self.spent(f"attribute by {kind}", seconds, {"texts": count})

            processes.led(write)
