"""python -m lib_hypermerge."""

import os
import sys


def run() -> int:
    try:
        from .cli import main

        return main()
    except KeyboardInterrupt:  # before main() could take it as a request to stop
        return 130


if __name__ == "__main__":
    code = run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is on the disk and all threads have ended; torch takes 0.4 s to say goodbye
