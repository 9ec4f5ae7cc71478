"""What can end a build or a boot with one line for the person who started it."""


class BuildError(Exception):
    """The image cannot be built; the text says why and what to do."""


class BootError(Exception):
    """The machine cannot be started or died; the text says why, with the console's last lines."""
