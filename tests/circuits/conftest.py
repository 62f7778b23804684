"""Fixtures of this room's tests."""

from support.circuits_subject_cases import subject  # noqa: F401
