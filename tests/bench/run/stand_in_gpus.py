"""GPUs that compute on the CPU: a `sitecustomize.py` for all processes of a run.

Each worker of a group notes when it began and ended, which devices it sees, and its stages.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time


def note(**told):
    told |= {"pid": os.getpid(), "sees": os.environ.get("CUDA_VISIBLE_DEVICES"), "at": time.time()}
    with open(os.environ["STAND_IN_NOTES"], "a") as file:
        file.write(json.dumps(told) + "\n")


def require_gpu():
    """There is one, it says."""


class After(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "bench.run.worker":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            plant(module)

        spec.loader.exec_module = exec_module
        return spec


def plant(worker):
    serve, run_stage = worker.serve, worker.run_stage

    def noted_serve(take, tell, store, run_id, gpus):
        note(what="group", gpus=gpus)
        serve(take, tell, store, run_id, gpus)

    def noted_stage(stage, *given, **options):
        note(what="began", stage=stage.title)
        run_stage(stage, *given, **options)
        note(what="ended", stage=stage.title)

    worker.serve, worker.run_stage, worker.require_gpu = noted_serve, noted_stage, require_gpu
    worker.device_of = lambda gpus: worker.torch.device("cpu")
    worker.torch.cuda.get_device_name = lambda device: "Stand-in"


sys.meta_path.insert(0, After())
