"""Addresses of this machine's loopback that nobody else uses: every port there is free."""

import ipaddress
import os

# pid_max is at most 2**22, proc_sys_kernel(5).
_NETWORKS = ("127.64.0.0", "127.128.0.0")


def own_address(which: int) -> str:
    """This process's own one, the first (0) or the second (1)."""
    return str(ipaddress.ip_address(_NETWORKS[which]) + os.getpid())
