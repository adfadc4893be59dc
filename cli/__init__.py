"""Parse, call, print: the command line, installed as ``compress.cli``."""
