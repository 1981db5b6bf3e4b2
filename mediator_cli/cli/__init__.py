"""The command line: one file for each command. The only room that knows typer and rich."""
