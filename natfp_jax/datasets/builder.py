"""What the TFDS builders here have in common: one split `train` of documents with the field `text`, kept as ArrayRecord.

A builder's configuration is named after its inputs, so that TFDS never takes one input's data for another's. Must not know
what becomes of the documents.
"""

import abc
import contextlib
import io
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from natfp_jax.errors import Damaged
from natfp_jax.files import MANIFEST, manifest, read_remade, verify, write_json

__all__ = ["TextBuilder", "quiet"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS and what it downloads with from printing to stdout, from warnings in the log, and from bars of their own."""
    tfds.disable_progress_bar()
    levels = {logger: logger.level for logger in map(logging.getLogger, ("absl", "urllib3"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


class TextBuilder(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """A source of documents. `inputs` names what the documents are made from, `description` says it in words."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, data_dir: str | Path, inputs: str, description: str) -> None:
        prepared = Path(data_dir) / self.name / inputs / str(self.VERSION)
        if (prepared / MANIFEST).exists():  # TFDS reads these at once, and says nothing that helps where they are damaged
            self._verify(prepared, lambda name: name.endswith(".json"))
        with quiet():
            super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=inputs, description=description))
        self._advance: Callable[[int], None] = lambda documents: None

    @abc.abstractmethod
    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields (key, text), the key unique and the same on every machine: TFDS orders documents by its hash."""

    @property
    def sealed(self) -> bool:
        """Whether the data is prepared, and its manifest written."""
        return (Path(self.data_dir) / MANIFEST).exists()

    def prepare(self, advance: Callable[[int], None]) -> None:
        """Writes the data, whole or not at all, telling `advance` of the documents; for one process at a time."""
        final = Path(self.data_dir)
        for remains in final.parent.glob(f"incomplete.*_{final.name}"):  # of a killed process
            shutil.rmtree(remains)
        self._advance = advance
        with quiet():
            if not self.is_prepared():  # else a process was killed before it wrote the manifest
                self.download_and_prepare(file_format="array_record")
        write_json(final / MANIFEST, {"files": manifest(final)})

    def verify(self) -> None:
        """Checks the data against its manifest.

        Raises:
          Damaged: a file is not what was written.
        """
        self._verify(Path(self.data_dir), lambda name: True)

    @staticmethod
    def _verify(folder: Path, wanted: Callable[[str], bool]) -> None:
        try:
            listed = read_remade(folder / MANIFEST)["files"]
        except Damaged as damage:
            raise Damaged(folder, f"is damaged: its {MANIFEST} {damage.why}") from None
        verify(folder, {name: entry for name, entry in listed.items() if wanted(name)})

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
        for key, text in self.documents():
            yield key, {"text": text}
            self._advance(1)
