"""The VM's network as the smolvm launcher describes it, in the words of a boot."""

from __future__ import annotations

from collections.abc import Mapping

from agent.settings import Given

_PREFIX = "SMOLVM_NETWORK_"
# The second is what it was called first.
_BACKENDS = ("virtio-net", "virtio")


def from_launcher(environ: Mapping[str, str]) -> dict[str, Given]:
    """The settings of the network that its variables amount to, by key.

    With another backend than a network interface, as by default, there is nothing to set up.
    """

    def told(*names: str) -> list[str]:
        return [text for name in names if (text := environ.get(_PREFIX + name, ""))]

    if not set(told("BACKEND")) & set(_BACKENDS):
        return {}
    given = {"dns": Given(f"{_PREFIX}DNS", ",".join(told("DNS")))}
    if told("SETUP") != ["preconfigured"]:
        addresses = [
            f"{ip}/{'/'.join(told(prefix))}"
            for name, prefix in (("GUEST_IP", "PREFIX_LEN"), ("GUEST_IP6", "PREFIX_LEN6"))
            for ip in told(name)
        ]
        given["ip"] = Given(f"{_PREFIX}GUEST_IP", ",".join(addresses))
        given["gateway"] = Given(f"{_PREFIX}GATEWAY", ",".join(told("GATEWAY", "GATEWAY6")))
        given["mac"] = Given(f"{_PREFIX}GUEST_MAC", "".join(told("GUEST_MAC")))
    return {key: each for key, each in given.items() if each.text}
