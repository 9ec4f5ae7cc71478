"""Other ways of getting an image from a registry ready to run, each with an empty store.

All of them in a mount namespace of their own, with everything they keep in one directory.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PACKAGES = {"podman": "podman", "containerd": "containerd", "skopeo": "skopeo", "umoci": "umoci"}
PATIENCE_S = 30

# In namespaces of their own, so that no mount and no process of theirs outlives them or us.
_PRIVATE = (
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
)


def check_installed() -> None:
    """Raise RuntimeError, saying what to install, unless all of them are there."""
    missing = [package for name, package in PACKAGES.items() if shutil.which(name) is None]
    if missing:
        raise RuntimeError(f"not installed: apt-get install {' '.join(missing)}")


def unpack_with_umoci(reference: str, folder: Path) -> float:
    """Seconds of `skopeo copy` into a layout, then of `umoci unpack`.

    skopeo syncs each blob; umoci syncs nothing.
    """
    layout = f"{folder}/layout:image"
    return _seconds_of(
        *("skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"),
        *(f"docker://{reference}", f"oci:{layout}"),
    ) + _seconds_of("umoci", "unpack", "--image", layout, f"{folder}/bundle")


def pull_with_podman(reference: str, folder: Path) -> float:
    """Seconds of `podman pull` with the overlay driver. It syncs its records, and no file."""
    return _seconds_of(
        *_PRIVATE,
        *("podman", f"--root={folder}/root", f"--runroot={folder}/run"),
        *("--storage-driver=overlay", f"--tmpdir={folder}/tmp"),
        *("pull", "--quiet", "--tls-verify=false", reference),
    )


def pull_with_containerd(reference: str, folder: Path) -> float:
    """Seconds of `ctr image pull` with the overlayfs snapshotter, containerd running already.

    It syncs each blob and its records, and no file that it unpacks.
    """
    with _containerd(folder) as address:
        return _seconds_of(
            *("ctr", f"--address={address}", "image", "pull", "--plain-http"),
            *("--snapshotter=overlayfs", reference),
        )


@contextmanager
def _containerd(folder: Path) -> Iterator[Path]:
    address = folder / "containerd.sock"
    config = folder / "config.toml"
    # What JSON and TOML write alike: keys of one word, and strings.
    config.write_text(
        "version = 2\n"
        f"root = {json.dumps(f'{folder}/root')}\n"
        f"state = {json.dumps(f'{folder}/state')}\n"
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f"[grpc]\naddress = {json.dumps(str(address))}\n"
    )
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [*_PRIVATE, "containerd", f"--config={config}"], stdout=log, stderr=log
        ) as daemon,
    ):
        try:
            _wait_for(address, daemon)
            yield address
        finally:
            daemon.kill()  # unshare, and with it all that it started


def _wait_for(address: Path, daemon: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    with socket.socket(socket.AF_UNIX) as probe:
        while probe.connect_ex(str(address)) != 0:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"containerd did not start; see {address.parent}/log")
            time.sleep(0.01)


def _seconds_of(*argv: str) -> float:
    begun = time.perf_counter()
    _run(argv)
    return time.perf_counter() - begun


def _run(argv: Sequence[str]) -> None:
    ran = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {(ran.stderr or ran.stdout).strip()[-500:]}")
