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
        with quiet():
            super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=inputs, description=description))
        self._advance: Callable[[int], None] = lambda documents: None

    @abc.abstractmethod
    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields (key, text), the key unique and the same on every machine: TFDS orders documents by its hash."""

    def prepare(self, advance: Callable[[int], None]) -> None:
        """Writes the data, whole or not at all, telling `advance` of the documents; for one process at a time."""
        final = Path(self.data_dir)
        for remains in final.parent.glob(f"incomplete.*_{final.name}"):  # of a killed process
            shutil.rmtree(remains)
        self._advance = advance
        with quiet():
            self.download_and_prepare(file_format="array_record")

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
        for key, text in self.documents():
            yield key, {"text": text}
            self._advance(1)
