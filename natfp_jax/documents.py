"""Where documents and conversations come from.

Owns the way from a source of the configuration to documents with random access, always through a prepared TFDS data set; and
the name under which a source's data is known, which changes when the data does. A conversation is a document in canonical
JSON. Must not know what becomes of documents.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from natfp_jax import config
from natfp_jax.datasets.builder import Builder, quiet
from natfp_jax.datasets.conversations import Conversations
from natfp_jax.datasets.machine_docs import MachineDocs
from natfp_jax.datasets.machine_qa import MachineQA
from natfp_jax.datasets.stories import Stories
from natfp_jax.datasets.text_folder import TextFolder
from natfp_jax.errors import UserError
from natfp_jax.files import canonical_json
from natfp_jax.lock import alone
from natfp_jax.progress import Progress

__all__ = ["Documents", "Source", "find"]


class Documents:
    """A sequence of texts with random access, in TFDS's order, which is that of a hash of their keys."""

    def __init__(self, folder: str, data: Any, field: str) -> None:
        self._folder, self._data, self._field = folder, data, field

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> str:
        """Document `index`, stripped of white space around it; a conversation is the JSON of its messages.

        Raises:
          UserError: it is not UTF-8, or its file is damaged.
        """
        try:
            value = self._data[index][self._field]
        except Exception as error:  # files are opened only here, and array_record raises whatever it likes
            raise UserError(
                f"document {index} in {self._folder} cannot be read ({_line(error)}): "
                f"remove that folder and run the same command again"
            ) from None
        try:
            return _text(value)
        except UnicodeDecodeError as error:
            raise UserError(f"document {index} in {self._folder} is not UTF-8 ({error.reason}): mend the data set") from None


def _text(value: Any) -> str:
    """A document from the bytes of its text, or from the roles and contents of its messages."""
    if isinstance(value, bytes):
        return value.decode().strip()
    pairs = zip(value["role"], value["content"], strict=True)
    return canonical_json([{"role": role.decode(), "content": content.decode()} for role, content in pairs])


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of a TFDS builder, perhaps not prepared yet."""

    builder: Any
    split: str
    field: str  # that holds the text or the messages

    @property
    def identity(self) -> str:
        """The data's name, such as `stories/seed0-count20000/1.0.0[train].text`; other data has another one."""
        name = f"{self.builder.info.full_name}[{self.split}].{self.field}"
        if isinstance(self.builder, Builder):  # its configuration is named after its inputs
            return name
        return f"{name} of {self.builder.info.splits[self.split].num_examples} examples"

    @property
    def description(self) -> str:
        """What the data was made from, in words."""
        return str(getattr(self.builder.builder_config, "description", None) or self.builder.info.full_name)

    def documents(self, progress: Progress) -> Documents:
        """Opens the data, preparing what is ours where that has not been done.

        Raises:
          UserError: the source is broken, or the data on disk is not whole.
          Damaged: data of ours is not what was written.
        """
        if isinstance(self.builder, Builder):
            with alone(Path(self.builder.data_dir).parent, progress, wait=True):
                if not self.builder.sealed:
                    with progress.task(f"collecting {self.builder.name}", None, self.builder.COUNTED) as advance:
                        self.builder.prepare(advance)
                self.builder.verify()
        with quiet():
            try:
                if self.builder.info.file_format == tfds.core.FileFormat.TFRECORD:
                    data: Any = _TFRecords(self.builder, self.split)
                else:
                    data = self.builder.as_data_source(self.split)
            except NotImplementedError:
                kept = self.builder.info.file_format.value
                raise UserError(
                    f"{self.builder.info.full_name} in {self.builder.data_dir} is kept as {kept}, "
                    f"expected array_record or tfrecord: prepare it as one of these, in another data_dir"
                ) from None
        expected = self.builder.info.splits[self.split].num_examples
        if len(data) != expected:
            raise UserError(
                f"{self.builder.data_dir} holds {len(data)} examples of split {self.split}, its description says {expected}: "
                f"remove that folder and run the same command again"
            )
        return Documents(self.builder.data_dir, data, self.field)


class _TFRecords:
    """The examples of a split that TFDS keeps as TFRecord, read without TensorFlow.

    The format has no random access: cheap while indices rise, a new pass over the files where one falls.
    """

    def __init__(self, builder: Any, split: str) -> None:
        self._features, self._split = builder.info.features, builder.info.splits[split]
        self._next, self._records = 0, self._read()

    def __len__(self) -> int:
        return int(self._split.num_examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < self._next:
            self._next, self._records = 0, self._read()
        try:
            record = next(itertools.islice(self._records, index - self._next, None))
        except (StopIteration, ValueError) as error:
            raise ValueError(f"no whole record {index}: {error}") from None
        self._next = index + 1
        example: dict[str, Any] = self._features.deserialize_example_np(record)
        return example

    def _read(self) -> Iterator[bytes]:
        import grain  # loads jax, which nothing else here needs

        for file in self._split.file_instructions:
            records = iter(grain.experimental.TFRecordIterDataset(file.filename))
            yield from itertools.islice(records, file.skip, file.skip + file.take)


def find(source: config.Source, data_dir: Path, progress: Progress) -> Source:
    """The data of a source. Our own builders keep theirs in `data_dir` and are not prepared here; others are, if they can be.

    Raises:
      UserError: there is no such source, split or text, or it is not prepared and cannot be.
    """
    match source:
        case config.MachineDocs():
            return _own(MachineDocs(data_dir=data_dir))
        case config.MachineQA():
            return _own(MachineQA(data_dir=data_dir))
        case config.TextFolder(path=path, text_key=key):
            return _own(TextFolder(data_dir=data_dir, path=path, text_key=key))
        case config.Conversations(path=path):
            return _own(Conversations(data_dir=data_dir, path=path))
        case config.Stories(count=count, seed=seed):
            return _own(Stories(data_dir=data_dir, count=count, seed=seed))
        case config.Tfds():
            with quiet():
                return _foreign(source, progress)


def _own(builder: Builder) -> Source:
    return Source(builder, "train", builder.FIELD)


def _foreign(source: config.Tfds, progress: Progress) -> Source:
    builder = _builder(source)
    if not builder.is_prepared():
        progress.say(f"TFDS prepares {source.name} in {builder.data_dir}; without a network it gives up after minutes")
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # whatever the network or the builder's code does
            module = type(builder).__module__  # imported by name: TFDS registers some builders only then
            raise UserError(
                f"TFDS data set {source.name!r} is not prepared in {builder.data_dir} and cannot be here ({_line(error)}): "
                f"where there is a network, and what the data set needs, such as tensorflow or apache_beam, run "
                f'python -c "import tensorflow_datasets as tfds, {module}; tfds.builder({source.name!r}, '
                f"data_dir={source.data_dir!r}).download_and_prepare(file_format='array_record')\""
            ) from None
    features = builder.info.features
    texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if source.text_key not in texts:
        known = f"its texts are {', '.join(texts)}" if texts else "it has no text at all"
        raise UserError(f"TFDS data set {source.name!r} has no text in {source.text_key!r}: {known}; set the source's text_key")
    try:
        builder.info.splits[source.split]
    except (KeyError, ValueError):
        known = ", ".join(sorted(builder.info.splits)) or "none"
        raise UserError(f"TFDS data set {source.name!r} has no split {source.split!r}: its splits are {known}") from None
    return Source(builder, source.split, source.text_key)


def _builder(source: config.Tfds) -> Any:
    try:
        with contextlib.suppress(tfds.core.DatasetNotFoundError):
            return tfds.builder(source.name, data_dir=source.data_dir)
        # TFDS registers c4, wiki40b, wikipedia and their like only when their module is imported.
        module = f"tensorflow_datasets.text.{source.name.partition('/')[0].partition(':')[0]}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
        return tfds.builder(source.name, data_dir=source.data_dir)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"TFDS knows no data set {source.name!r}, and none is prepared in {source.data_dir or 'its default data_dir'}: "
            f"look the name up at https://www.tensorflow.org/datasets/catalog or set the source's data_dir"
        ) from None
    except Exception as error:  # whatever the builder's code does
        raise UserError(f"TFDS cannot open {source.name!r} ({_line(error)}): check its config and version") from None


def _line(error: Exception) -> str:
    """The first line of a message that may be long."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
