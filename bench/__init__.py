"""The suite runner: YAML -> plan -> Ray -> records, and the command line."""
