"""The `jevons` command as a test calls it."""

from typer.testing import CliRunner

from training.commands.main import app


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def refusal(*arguments):
    """The one sentence with which the arguments are refused."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    return result.stderr
