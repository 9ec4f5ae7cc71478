"""Run as a script by spawn.py where glibc cannot put a new process into a cgroup: go in, exec.

Arguments: the cgroup's directory, the program's path, the number of environment strings, those
strings, then the program's own arguments. Descriptor 3 takes the errno of what fails, as decimal
digits; exec closes it.
"""

import os
import signal
import sys


def main() -> None:
    cgroup, path, count, *words = (os.fsencode(word) for word in sys.argv[1:])
    environment = dict(word.split(b"=", 1) for word in words[: int(count)])
    os.set_inheritable(3, False)
    # Python ignores these for itself, and what is ignored stays so over exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        with open(os.path.join(cgroup, b"cgroup.procs"), "wb", buffering=0) as members:  # noqa: PTH118, PTH123 importing pathlib costs 10 ms of each command
            members.write(b"0")
        os.execve(path, words[int(count) :], environment)
    except OSError as error:
        os.write(3, b"%d" % (error.errno or 0))
    os._exit(127)


if __name__ == "__main__":
    main()
