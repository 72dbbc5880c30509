"""The commands: options in, an `Outcome` out. cli.py parses the first and prints the second.

Each imports what it needs when it runs, so that `dimefm-edge targets` works where torch is not
installed.
"""
