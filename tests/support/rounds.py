"""How often chance is tried: as often as a run of all tests bears, or as `make soak` wants it.

`INNKEEP_ROUNDS` is `quick`, which it is unless set, or `soak`.
"""

import os

from hypothesis import HealthCheck, settings

VARIABLE = "INNKEEP_ROUNDS"


def rounds(quick: int, soak: int) -> int:
    """The number for this run. Raises ValueError where `INNKEEP_ROUNDS` is a word of its own."""
    numbers = {"quick": quick, "soak": soak}
    word = os.environ.get(VARIABLE) or "quick"
    if word not in numbers:
        raise ValueError(f"{VARIABLE} is quick or soak, not {word!r}")
    return numbers[word]


def examples(quick: int, soak: int) -> settings:
    """A decorator for a property whose examples take as long as a machine needs for them."""
    return settings(
        max_examples=rounds(quick, soak),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def pytest_configure() -> None:
    """For properties that say nothing themselves: the same word is a profile of hypothesis."""
    settings.register_profile("quick", max_examples=100)
    settings.register_profile("soak", max_examples=5_000, deadline=None)
    settings.load_profile(os.environ.get(VARIABLE) or "quick")
