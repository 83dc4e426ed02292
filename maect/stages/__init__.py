"""The units of work: MAE pretraining, NNCLR head, contrastive tuning, features.

Each module has `run(job) -> Output`, or of a training `training(job)`, which `loop.train` runs. A
stage knows its settings, its inputs' files and the group
of workers it runs in; it knows nothing of stores, records or Ray.
"""
