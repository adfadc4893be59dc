"""Parse, call, print: the command line, installed as ``compress.cli``."""

import signal

# Until ``main`` handles it, Ctrl-C ends the process: there is nothing to clean up, and a traceback would say nothing.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
