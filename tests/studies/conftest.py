"""Fixtures of this room's tests."""

from support.studies_suite_cases import bridge_folder, task_file  # noqa: F401
