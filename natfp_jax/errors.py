"""The exceptions that are no defects of the program.

Owns the line between a mistake of the user or of the disk (one clear line, exit code 2), a stop that was asked for (one line,
exit code 75) and a defect of the program (a traceback). Knows nothing else.
"""

from pathlib import Path

__all__ = ["Damaged", "Failed", "Stopped", "UserError"]


class UserError(Exception):
    """Something the user can mend. The message is one line: what was got, what was expected, what to do."""

    def __init__(self, message: str, agreed: bool = False) -> None:
        """`agreed`: whether every process of the program raises it."""
        super().__init__(message)
        self.agreed = agreed


class Damaged(UserError):
    """A file that is not what was written, and that can be made again: it is set aside, unless the user is strict about it."""

    def __init__(self, path: Path, why: str, agreed: bool = False) -> None:
        super().__init__(f"{path} {why}", agreed)
        self.path, self.why = path, why


class Failed(UserError):
    """Arms whose numbers are not finite: all others can be trained, and are."""


class Stopped(Exception):
    """A signal ended the work, on all processes at one step; everything is saved and the same command goes on. One line."""
