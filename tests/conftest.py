"""Fixtures of all tests."""

pytest_plugins = [
    "tests.support.registry",
    "tests.support.images",
    "tests.support.guest",
    "tests.support.rounds",
]
