"""Documents from a folder: .txt (a document a file) and .jsonl (a document a line), each also as .gz and .zst.

Owns which files of a folder are read, and what their documents are called.
"""

from collections.abc import Iterator
from pathlib import Path

from natfp_jax.datasets.builder import TextBuilder
from natfp_jax.datasets.listing import below, digest
from natfp_jax.errors import UserError
from natfp_jax.records import jsonl, lines, text_of

__all__ = ["TextFolder"]

_SUFFIXES = tuple(kind + packing for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".zst"))


class TextFolder(TextBuilder):
    """Every .txt and .jsonl file below `path`. The data is named after the files' names, sizes and times of change.

    Raises:
      UserError: there is no such folder, or it holds no such file; on preparing: a file is broken.
    """

    def __init__(self, *, data_dir: str | Path, path: str | Path, text_key: str = "text") -> None:
        self._path, self._text_key = Path(path), text_key
        if not path or not self._path.is_dir():
            raise UserError(f"text folder {str(path)!r} is no folder: set the source's path to one with .txt or .jsonl files")
        self._files = below(self._path, _SUFFIXES)
        if not self._files:
            raise UserError(f"text folder {path} has no file that ends in {', '.join(_SUFFIXES)}: put texts there")
        super().__init__(
            data_dir=data_dir, inputs=digest(self._files, text_key), description=f"{len(self._files)} text files below {path}"
        )

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields (file or file:line, text)."""
        empty = True
        for name, file in self._files.items():
            is_jsonl = name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")
            for key, text in self._jsonl(name, file) if is_jsonl else [(name, _txt(file))]:
                if text.strip():
                    empty = False
                    yield key, text
        if empty:
            raise UserError(f"text folder {self._path} has files but no text in them: put texts there")

    def _jsonl(self, name: str, file: Path) -> Iterator[tuple[str, str]]:
        for number, record in jsonl(file):
            yield f"{name}:{number}", text_of(record, self._text_key, f"{file}, line {number}", "the source's text_key")


def _txt(file: Path) -> str:
    return "".join(lines(file))
