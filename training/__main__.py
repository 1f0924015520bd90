"""python -m training COMMAND; the commands are in commands.py."""

import os
import signal
import sys

if __name__ == "__main__":
    heeds_interrupts = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # a script's background job does not
    if heeds_interrupts:  # importing torch takes seconds, and Python would answer a Ctrl-C with a traceback
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from app.logs import escape_unprintable
    from training.commands import main

    if heeds_interrupts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C; sent when the machine is taken back
    escape_unprintable(sys.stdout)
    sys.exit(main())
