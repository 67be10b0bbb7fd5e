"""The exceptions that are no defects of the program.

Owns the line between a mistake of the user or of the disk (one clear line, exit code 2), a stop that was asked for (one line,
exit code 75) and a defect of the program (a traceback). Knows nothing else.
"""

from pathlib import Path

__all__ = ["Damaged", "Stopped", "UserError"]


class UserError(Exception):
    """Something the user can mend. The message is one line: what was got, what was expected, what to do."""

    agreed = False  # whether every process of the program raises it


class Damaged(UserError):
    """A file that is not what was written, and that can be made again: it is set aside, unless the user is strict about it."""

    def __init__(self, path: Path, why: str, agreed: bool = False) -> None:
        super().__init__(f"{path} {why}")
        self.path, self.why, self.agreed = path, why, agreed


class Stopped(Exception):
    """A signal ended the work, on all processes at one step; everything is saved and the same command goes on. One line."""
