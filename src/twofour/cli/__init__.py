"""The command line: one file per subcommand, each calls one verb. Exit codes: 0 done, 1 the answer is no, 2 misuse."""

from .app import main as main
