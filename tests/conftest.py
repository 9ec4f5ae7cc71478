"""Fixtures of all tests."""

pytest_plugins = [
    "tests.support.registry",
    "tests.support.certificates",
    "tests.support.private_registries",
    "tests.support.images",
    "tests.support.guest",
    "tests.support.rounds",
]
