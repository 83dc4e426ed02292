"""The suite runner: YAML -> plan -> Ray -> records, and the command line."""

import sys
from pathlib import Path

# the packages beside this one, and not folders of their names in the working directory, which
# `python -m bench` and Ray's workers have in front of what is installed
sys.path.insert(0, str(Path(__file__).parents[1]))
import maect  # noqa: F401
import reports  # noqa: F401

del sys.path[0]
