"""The command line: one file a command, each with ``run(arguments: list[str]) -> int``."""
