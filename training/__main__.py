"""python -m training COMMAND; the commands are in commands.py."""

import io
import os
import signal
import sys

if __name__ == "__main__":
    # While torch is imported, which takes seconds, Ctrl-C would print a traceback of whatever is being imported.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from training.commands import main

    for sent in (signal.SIGINT, signal.SIGTERM):  # the latter comes from whoever takes the machine back
        signal.signal(sent, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for class names that its encoding cannot express
    sys.exit(main())
