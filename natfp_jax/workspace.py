"""A study below an output folder: what lies where, and whose it is.

Owns the paths, the token stores and identities of the arms, the prompts, and what a draw is made from; and that a study belongs
to one command at a time. Must not know how a stage does its work.

    OUT/data/                    what our TFDS builders prepared
    OUT/corpora/<hash>/          token stores
    OUT/runs/<fingerprint>/      one experiment each, shared by all studies below OUT
    OUT/restart/<arms>/          what stopped or killed trainings go on from, whatever study they are of
    OUT/studies/<name>/          study.json, arms.json, draws/, attribution.json, timings.json, report/
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from natfp_jax import config, files, lineage, mesh, processes, texts
from natfp_jax.config import Corpus, Study
from natfp_jax.contrast import differences
from natfp_jax.corpus import Store, opened, prepare
from natfp_jax.errors import UserError
from natfp_jax.lineage import Identity, code
from natfp_jax.lock import LOCK, alone
from natfp_jax.progress import Progress
from natfp_jax.prompts import Prompts, prompts_of
from natfp_jax.runs import RunFolder
from natfp_jax.study import Arm, Draw, arms, comparisons, draws

__all__ = ["Workspace", "write_if_new"]


class Workspace:
    """What is there of a study. With many processes all of them have one, and use it alike."""

    def __init__(self, study: Study, out: Path, progress: Progress) -> None:
        self.study, self.out, self.progress = study, out, progress
        self.folder = out / "studies" / study.name
        self.arms = {arm.id: arm for arm in arms(study)}
        self.comparisons = comparisons(study)

    # --- whose folder, and how long things took ---

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the study's folder for this command alone, and says whose it is.

        Raises:
          UserError: another process holds it, it belongs to another study, or the processes of this command differ.
        """
        processes.agree({"study": config.fingerprint(self.study), "version of natfp_jax": code()})
        with processes.leading(self._owned()):
            lock = self.folder / LOCK
            # A folder of its own for every host would be found out much later, by a process that waits for ever.
            processes.agree({"file system at --out": lock.read_text() if lock.exists() else "none"})
            yield

    @contextmanager
    def _owned(self) -> Iterator[None]:
        path, mine = self.folder / "study.json", config.fingerprint(replace(self.study, run=config.Run()))
        begun = (self.folder / "arms.json").exists()  # until then there is nothing to be confused with
        if begun and path.exists() and (owner := files.read_json(path)).get("fingerprint") != mine:
            found = differences(owner.get("study"), config.to_json(self.study))
            changed = ", ".join(path for path in found if path.split(".")[0] != "run") or "version"  # which decides nothing
            raise UserError(
                f"{self.folder} holds the study {str(owner.get('fingerprint'))[:16]}, expected {mine[:16]} (they differ in "
                f"{changed}): give another --out, or another name=... to share its runs"
            )
        with alone(self.folder, self.progress):
            for remains in self.folder.rglob(".*.tmp"):  # of a killed process
                remains.unlink()
            write_if_new(path, {"fingerprint": mine, "study": config.to_json(self.study)}, begun)
            yield

    @contextmanager
    def timed(self, stage: str) -> Iterator[dict[str, int]]:
        """Adds the seconds of a stage, and the amounts that it fills in, to timings.json."""
        start, amounts = time.perf_counter(), dict[str, int]()
        yield amounts
        processes.led(lambda: self.spent(stage, time.perf_counter() - start, amounts))

    def spent(self, stage: str, seconds: float, amounts: dict[str, int]) -> None:
        """Adds to timings.json; of many processes the first one's task."""
        path = self.folder / "timings.json"
        timings = files.read_remade(path) if path.exists() else {}
        entry = timings.setdefault(stage, {"seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + seconds, 2)
        for name, amount in amounts.items():
            entry[name] = entry.get(name, 0) + amount
        files.write_json(path, timings)

    # --- arms ---

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
        found = {base: self._opened(base)}
        for arm in self.arms.values():
            corpus = arm.experiment.corpus
            if corpus not in found:  # one tokenizer for all arms, so that texts and likelihoods are comparable
                found[corpus] = self._opened(replace(corpus, tokenizer=str(found[base].folder / "tokenizer.json")))
        return found

    def _opened(self, corpus: Corpus) -> Store:
        mine: list[Store] = []

        def prepared() -> str:
            mine.append(prepare(corpus, self.out, self.progress))
            return str(mine[0].folder)

        folder = processes.led(prepared)
        return mine[0] if mine else opened(Path(folder))

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
            pool = store.sha256, data.seq_len, data.windows, data.first
            if pool not in pools:
                pools[pool] = store.pool(data).sha256()
            found[arm.id] = lineage.identity(arm.experiment, store.sha256, store.tokenizer.sha256, pools[pool])
        same: dict[str, str] = {}
        for name, one in found.items():
            if (other := same.setdefault(one.fingerprint, name)) != name:
                raise UserError(f"arms {other} and {name} are the same experiment: change the factors so that all arms differ")
        return found

    def run_of(self, arm: str) -> RunFolder:
        """The run of an arm."""
        return RunFolder(self.out / "runs" / self.identities[arm].short)

    @property
    def restarts(self) -> Path:
        """The folder of what stopped or killed trainings go on from, of all studies."""
        return self.out / "restart"

    def kept(self, arm: Arm) -> list[int]:
        """The steps whose checkpoints an arm keeps."""
        return arm.experiment.kept_steps(self.study.kept_fractions)

    def check_owners(self) -> None:
        """Raises a UserError if the run of an arm is another experiment's."""
        for arm, identity in self.identities.items():
            self.run_of(arm).check_owner(identity)

    def check_trained(self) -> None:
        """Raises a UserError if an arm lacks a checkpoint, or its run is another experiment's."""
        self.check_owners()
        for arm in self.arms.values():
            if missing := self.run_of(arm.id).missing(self.kept(arm)):
                raise UserError(f"arm {arm.id} lacks the checkpoints at steps {missing}: run `natfp train` first")

    # --- prompts and draws ---

    @cached_property
    def prompts(self) -> Prompts:
        """The prompts of every draw."""
        return prompts_of(self.store, self.study.sampling)

    @cached_property
    def longest_prompt(self) -> int:
        """Its tokens, EOS with them.

        Raises:
          UserError: an arm has not been trained on as many.
        """
        context = min(arm.experiment.data.seq_len for arm in self.arms.values())
        source = self.study.sampling.prompt_file or "the corpus"
        return self.prompts.check(self.store.tokenizer, context, source)

    def draw_paths(self, one: Draw) -> list[Path]:
        """The sample files of a draw."""
        sampling = self.study.sampling
        return [self.folder / "draws" / name for name in one.files(sampling.prompts, sampling.file_texts)]

    def draw_settings(self, one: Draw) -> dict[str, Any]:
        """What decides the texts of a draw besides the weights; batch shapes are part of the numerics record."""
        kept = config.to_json(self.study.sampling)
        names = ("top_k", "top_p", "min_p", "repetition_penalty", "greedy", "cache", "seed")
        tokens = self.study.sampling.lengths[-1]
        return {"new_tokens": tokens, "temperature": one.drawn_at(self.study.sampling), **{name: kept[name] for name in names}}

    def draw_inputs(self, one: Draw) -> dict[str, str]:
        """The hashes of all that a draw is made from."""
        return {
            "settings": files.hash_json(self.draw_settings(one)),
            "weights": self.run_of(one.arm).record(one.step)["weights"],
            "prompts": self.prompts.sha256,
            "tokenizer": self.store.tokenizer.sha256,
        }

    def missing_files(self) -> dict[Draw, list[int]]:
        """The draws that are not whole yet, and which of their files are not there.

        Raises:
          UserError: a file was drawn from something else.
        """
        missing: dict[Draw, list[int]] = {}
        for one in draws(self.study):
            inputs = self.draw_inputs(one)
            for number, path in enumerate(self.draw_paths(one)):
                if not texts.exists(path):
                    missing.setdefault(one, []).append(number)
                    continue
                record = texts.read_record(path)
                for name, expected in inputs.items():
                    if (got := record["inputs"].get(name)) != expected:
                        raise UserError(
                            f"{path} was drawn from {name} {got}, expected {expected}: remove it, or give another --out"
                        )
        return missing


def write_if_new(path: Path, value: dict[str, Any], owned: bool = False) -> None:
    """A file that says the same already is not touched; one that is damaged is written over, unless it is `owned`."""
    try:
        same = path.exists() and files.read_remade(path) == value
    except UserError:
        if owned:
            raise
        same = False
    if not same:
        files.write_json(path, value)
