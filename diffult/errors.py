"""The one exception that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do. Verbs print it and exit with 2."""
