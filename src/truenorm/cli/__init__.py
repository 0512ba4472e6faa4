"""The command line: one module per group of commands, each thin: parse, call, print."""

from truenorm.cli.app import main as main
