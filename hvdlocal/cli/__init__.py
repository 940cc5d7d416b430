"""The command `hvdlocal`: one module per subcommand."""

from hvdlocal.cli.main import main

__all__ = ["main"]
