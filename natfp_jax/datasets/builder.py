"""What the TFDS builders here have in common: one split `train` of documents or of conversations, kept as ArrayRecord.

A document has the field `text`, a conversation the field `messages`. A builder's configuration is named after its inputs, so
that TFDS never takes one input's data for another's. Must not know what becomes of either.
"""

import abc
import contextlib
import io
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from natfp_jax.errors import Damaged
from natfp_jax.files import MANIFEST, manifest, read_remade, verify, write_json

__all__ = ["Builder", "ConversationBuilder", "TextBuilder", "quiet"]


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


class Builder(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """A source of examples. `inputs` names what the examples are made from, `description` says it in words."""

    VERSION = tfds.core.Version("1.0.0")
    FIELD: ClassVar[str]  # the one that an example has
    COUNTED: ClassVar[str]  # what examples are called

    def __init__(self, *, data_dir: str | Path, inputs: str, description: str) -> None:
        prepared = Path(data_dir) / self.name / inputs / str(self.VERSION)
        if (prepared / MANIFEST).exists():  # TFDS reads these at once, and says nothing that helps where they are damaged
            self._verify(prepared, lambda name: name.endswith(".json"))
        with quiet():
            super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=inputs, description=description))
        self._advance: Callable[[int], None] = lambda examples: None

    @staticmethod
    @abc.abstractmethod
    def feature() -> Any:
        """The TFDS feature of the field."""

    @abc.abstractmethod
    def examples(self) -> Iterator[tuple[str, Any]]:
        """Yields (key, value of the field), the key unique and the same on every machine: TFDS orders by its hash."""

    @property
    def sealed(self) -> bool:
        """Whether the data is prepared, and its manifest written."""
        return (Path(self.data_dir) / MANIFEST).exists()

    def prepare(self, advance: Callable[[int], None]) -> None:
        """Writes the data, whole or not at all, telling `advance` of the examples; for one process at a time."""
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
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({self.FIELD: self.feature()}))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, value in self.examples():
            yield key, {self.FIELD: value}
            self._advance(1)


class TextBuilder(Builder):
    """A source of documents."""

    FIELD, COUNTED = "text", "documents"

    @staticmethod
    def feature() -> Any:
        """A text."""
        return tfds.features.Text()

    @abc.abstractmethod
    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields (key, text)."""

    def examples(self) -> Iterator[tuple[str, str]]:
        """The documents."""
        return self.documents()


class ConversationBuilder(Builder):
    """A source of conversations."""

    FIELD, COUNTED = "messages", "conversations"

    @staticmethod
    def feature() -> Any:
        """Messages in their order."""
        return tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})

    @abc.abstractmethod
    def conversations(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yields (key, [(role, content), ...])."""

    def examples(self) -> Iterator[tuple[str, list[dict[str, str]]]]:
        """The conversations."""
        for key, messages in self.conversations():
            yield key, [{"role": role, "content": content} for role, content in messages]
