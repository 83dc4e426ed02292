import os
import sys

# `python -m` searches the working directory first, where a file or folder may have any module's name
if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):
    del sys.path[0]

from bench.cli import main

if __name__ == "__main__":
    code = main()
    cluster = sys.modules.get("bench.run.cluster")
    if cluster is not None and cluster.abandoned:
        cluster.end_local_processes()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
