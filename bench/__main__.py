import os
import sys

# `python -m` searches the working directory first, where a file may have any module's name
if (
    __name__ == "__main__"
    and not sys.flags.safe_path
    and sys.path[0] != os.path.dirname(os.path.dirname(__file__))
):
    del sys.path[0]

import shlex
from typing import NoReturn

from bench.run import signals


def main() -> NoReturn:
    """Run the command line, as `python -m bench` or as `maect-bench`, and leave with its code."""
    signals.catch()  # first of all: the imports take a second
    try:
        from bench.cli import main

        code = main()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("bench", "maect", "reports", ""):
            raise
        print(
            f"error: {sys.executable} has no package '{error.name}'. `make install` puts all that "
            "is needed into .venv; then run .venv/bin/python -m bench",
            file=sys.stderr,
        )
        code = 2
    except BaseException:  # an import that a signal ends may raise anything
        if not signals.received:
            raise
        print(
            f"interrupted. To continue: python -m bench {shlex.join(sys.argv[1:])}", file=sys.stderr
        )
        code = signals.code()
    # Python's own ending waits for what Ray left in this process, and may crash in it
    if signals.received or "bench.run.cluster" in sys.modules:
        signals.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
