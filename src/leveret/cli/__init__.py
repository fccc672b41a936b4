"""The command line: ``python -m leveret``. One file for each command, on the public API."""
