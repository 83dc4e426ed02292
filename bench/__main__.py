import os
import sys

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
