"""A pytest plugin that makes each MAE step slower, to see the regression check fail."""

import time

from maect.stages import mae

_quick = mae.random_masking


def _slow(*arguments):
    time.sleep(0.05)
    return _quick(*arguments)


mae.random_masking = _slow
