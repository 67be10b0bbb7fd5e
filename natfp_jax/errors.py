"""The one exception for a user's mistake.

Owns the line between a mistake of the user (one clear line, exit code 2) and a defect of the program (a traceback).
Knows nothing else.
"""

__all__ = ["UserError"]


class UserError(Exception):
    """Something the user can mend. The message is one line: what was got, what was expected, what to do."""
