"""What tests share: cli_cases."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from bridge.cli.main import app


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback, where a line was promised
    return result


def assert_refused(result: Result, message: str) -> None:
    """One line on standard error that holds the message, nothing on standard output, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("bridge: "), result.stderr
    assert message in result.stderr
    assert not result.stdout
