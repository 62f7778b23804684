"""Fixtures of this room's tests."""

from support.server_cases import client, coupled, explanation, root  # noqa: F401
