"""What a host asks for, as what is started."""

import attrs
import pytest

from agent.errors import AgentError
from agent.processes.command import Bind, Command, ContainerCommand
from agent.processes.network_files import hosts_file
from protocol.errors import ErrorCode
from tests.support.image_info import image_info

IMAGE = image_info()


def refusal(argv: tuple[str, ...], env: tuple[tuple[str, str], ...] = (), workdir: str = "") -> str:
    with pytest.raises(AgentError) as raised:
        Command.from_request(argv, env, workdir)
    assert raised.value.code is ErrorCode.INVALID_REQUEST
    return raised.value.message


def test_what_no_program_can_be_given_is_refused_by_name() -> None:
    assert "expected at least one word" in refusal(())
    assert refusal(("a", "\0")).startswith("command:")
    assert refusal(("a",), workdir="/\0").startswith("workdir:")
    for name in ("", "A=B", "A\0"):
        assert repr(name) in refusal(("a",), ((name, "secret"),))
    message = refusal(("a",), (("TOKEN", "secret\0"),))
    assert "TOKEN" in message
    assert "secret" not in message


def test_values_of_the_environment_are_not_shown() -> None:
    command = Command.from_request(("a",), (("TOKEN", "secret"),))
    assert "secret" not in repr(command)
    assert "secret" not in repr(
        ContainerCommand.from_request("demo", IMAGE, ("a",), (("TOKEN", "secret"),))
    )


def test_a_container_without_a_command_is_refused_in_words_that_hosts_know() -> None:
    with pytest.raises(AgentError) as raised:
        ContainerCommand.from_request("demo", IMAGE)
    assert raised.value.code is ErrorCode.INVALID_REQUEST
    assert raised.value.message == (
        "no command given and image 'demo' defines no entrypoint or cmd"
    )


def test_a_command_replaces_the_images_entrypoint_and_cmd() -> None:
    image = attrs.evolve(IMAGE, entrypoint=("entry",), cmd=("cmd",))
    assert ContainerCommand.from_request("demo", image).argv == ("entry", "cmd")
    assert ContainerCommand.from_request("demo", image, ("mine",)).argv == ("mine",)


def test_an_images_variables_are_overridden_one_by_one() -> None:
    image = attrs.evolve(IMAGE, env=("A=1", "B=x=y", "EMPTY=", "ODD", "=bad", "A=2"))
    command = ContainerCommand.from_request("demo", image, ("a",), (("B", "mine"), ("C", "3")))
    assert command.environment == {"A": "2", "B": "mine", "EMPTY": "", "C": "3"}


def test_variables_of_the_vm_give_way_to_the_images_and_the_requests() -> None:
    of_vm = {"AGENT": "/of/vm", "OTHER": "1"}
    command = Command.from_request(("a",), (("OTHER", "2"),), defaults=of_vm)
    assert {**of_vm, "OTHER": "2"}.items() <= command.environment.items()
    image = attrs.evolve(IMAGE, env=("AGENT=/of/image",))
    in_container = ContainerCommand.from_request("demo", image, ("a",), defaults=of_vm)
    assert in_container.environment == {"AGENT": "/of/image", "OTHER": "1"}
    env = (("AGENT", "/mine"),)
    in_container = ContainerCommand.from_request("demo", image, ("a",), env, defaults=of_vm)
    assert in_container.environment == {"AGENT": "/mine", "OTHER": "1"}


def test_what_gives_way_does_so_where_it_has_no_place() -> None:
    socket = Bind("/tmp/s", "/tmp/s", gives_way=True)
    assert not socket.is_displaced_by([])
    assert not socket.is_displaced_by([Bind("/a", "/tmp"), Bind("/a", "/tm", read_only=True)])
    assert socket.is_displaced_by([Bind("/a", "/tmp/s")])
    assert socket.is_displaced_by([Bind("/a", "/tmp", read_only=True)])
    assert not Bind("/tmp/s", "/tmp/s").is_displaced_by([Bind("/a", "/tmp/s")])


def test_a_workdir_is_absolute() -> None:
    assert Command.from_request(("a",)).directory == "/"
    assert Command.from_request(("a",), workdir="x/y").directory == "/x/y"
    of_image = attrs.evolve(IMAGE, workdir="srv")
    assert ContainerCommand.from_request("demo", of_image, ("a",)).directory == "/srv"
    assert ContainerCommand.from_request("demo", of_image, ("a",), workdir="/x").directory == "/x"


@pytest.mark.parametrize(
    ("of_vm", "expected"),
    [
        ("", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tvm\n"),
        ("127.0.0.1 localhost", "127.0.0.1 localhost\n127.0.1.1\tvm\n"),
        ("127.0.0.1 localhost vm # me\n", "127.0.0.1 localhost vm # me\n"),
        ("127.0.0.1 localhost # vm\n", "127.0.0.1 localhost # vm\n127.0.1.1\tvm\n"),
    ],
)
def test_a_container_finds_its_own_name(of_vm: str, expected: str) -> None:
    assert hosts_file(of_vm, "vm") == expected
