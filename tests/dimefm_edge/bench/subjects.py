"""Subjects of bench that behave as a test wants: FILE.py:FUNCTION takes them."""

import os
import time

import numpy as np


def quick(batch_size):
    """Sleeps, which a busy machine does not prolong as it prolongs work."""
    return lambda: time.sleep(0.002)


def slower(batch_size):
    return lambda: time.sleep(0.003)


def crashes(batch_size):
    return lambda: os.abort()


def crashes_later(batch_size):
    calls = iter(range(10**9))
    began = time.monotonic()

    def call():
        time.sleep(0.002)
        if next(calls) > 200 or time.monotonic() - began > 2:
            os._exit(7)

    return call


def hangs(batch_size):
    return lambda: time.sleep(1000)


def raises(batch_size):
    raise RuntimeError("no such accelerator")


def takes(batch_size):
    memory = np.ones((64, 2**20), np.uint8)
    return lambda: memory.sum()


def gives_nothing(batch_size):
    return None
