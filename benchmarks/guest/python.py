"""How the image's Python is started with one of these programs."""

from __future__ import annotations

# As init starts the agent: isolated, and without `site` (initramfs/run_agent.py).
_PYTHON = ("/usr/bin/python3", "-I", "-S", "-B", "-c")
_LAUNCH = (
    "import runpy, sys; sys.path[:0] = ['/usr/lib/innkeep', '/run/host']; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours inside the machine."""
    return [*_PYTHON, _LAUNCH, module, *arguments]
