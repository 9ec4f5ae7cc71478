"""Chance that can be repeated: every trial says the seed that it was made from."""

import os
import random

VARIABLE = "INNKEEP_SEED"


def chance(trial: str) -> random.Random:
    """Random numbers for a trial, of a new seed that is printed, or of `INNKEEP_SEED`."""
    seed = os.environ.get(VARIABLE) or str(random.SystemRandom().getrandbits(32))
    print(f"{trial}: {VARIABLE}={seed}")
    return random.Random(f"{trial} {seed}")
