"""As strict as serde, as lenient as serde, and messages that say what is wrong."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol import (
    AgentRequest,
    AgentResponse,
    MalformedMessage,
    decode,
    requests,
    responses,
)
from protocol.values import Mount, RegistryAuth
from tests.protocol.kinds import KINDS

VM_EXEC = {"method": "vm_exec", "command": ["a"]}
RUN = {"method": "run", "image": "a", "command": []}
PULL = {"method": "pull", "image": "a"}
RESIZE = {"method": "resize", "cols": 80, "rows": 24}
GUESSED = "s3cret"


def refusal(members: Any, kind: Any = AgentRequest) -> str:
    with pytest.raises(MalformedMessage) as raised:
        decode(json.dumps(members).encode(), kind)
    # The cause of a JSON error would hold the whole document.
    assert raised.value.__cause__ is None
    return str(raised.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({**VM_EXEC, "tty": 1}, "vm_exec.tty: expected a boolean, got an integer"),
        ({**VM_EXEC, "tty": "true"}, "vm_exec.tty: expected a boolean, got a string"),
        ({**VM_EXEC, "tty": None}, "vm_exec.tty: expected a boolean, got null"),
        (
            {**VM_EXEC, "timeout_ms": 5.0},
            "vm_exec.timeout_ms: expected an unsigned 64-bit integer or null, got a float",
        ),
        (
            {**VM_EXEC, "timeout_ms": "5"},
            "vm_exec.timeout_ms: expected an unsigned 64-bit integer or null, got a string",
        ),
        (
            {**VM_EXEC, "timeout_ms": True},
            "vm_exec.timeout_ms: expected an unsigned 64-bit integer or null, got a boolean",
        ),
        (
            {**VM_EXEC, "timeout_ms": -1},
            "vm_exec.timeout_ms: expected an unsigned 64-bit integer or null, got -1",
        ),
        (
            {**VM_EXEC, "timeout_ms": 2**64},
            "vm_exec.timeout_ms: expected an unsigned 64-bit integer or null, got a float",
        ),
        ({**VM_EXEC, "command": "ls"}, "vm_exec.command: expected an array, got a string"),
        ({**VM_EXEC, "command": None}, "vm_exec.command: expected an array, got null"),
        ({**VM_EXEC, "command": ["a", 1]}, "vm_exec.command[1]: expected a string, got an integer"),
        (
            {"method": "vm_exec"},
            "vm_exec.command: expected an array, got nothing: the field is missing",
        ),
        ({**VM_EXEC, "env": {"A": "1"}}, "vm_exec.env: expected an array, got an object"),
        ({**VM_EXEC, "env": None}, "vm_exec.env: expected an array, got null"),
        (
            {**VM_EXEC, "env": [["A", "1"], ["B"]]},
            "vm_exec.env[1]: expected an array of 2, got one of 1",
        ),
        ({**VM_EXEC, "env": ["A=1"]}, "vm_exec.env[0]: expected an array of 2, got a string"),
        (
            {**VM_EXEC, "env": [["A", 1]]},
            "vm_exec.env[0][1]: expected a string, got an integer",
        ),
        ({**VM_EXEC, "workdir": 1}, "vm_exec.workdir: expected a string or null, got an integer"),
        (
            {**VM_EXEC, "stdin_data": []},
            "vm_exec.stdin_data: expected a string or null, got an array",
        ),
        (
            {**RUN, "mounts": [["t", "/p", 1]]},
            "run.mounts[0][2]: expected a boolean, got an integer",
        ),
        ({**RUN, "mounts": [["t", "/p"]]}, "run.mounts[0]: expected an array of 3, got one of 2"),
        ({**RUN, "unprivileged": None}, "run.unprivileged: expected a boolean, got null"),
        ({**PULL, "auth": "u:p"}, "pull.auth: expected an object or null, got a string"),
        (
            {**PULL, "auth": {"username": "u"}},
            "pull.auth.password: expected a string, got nothing: the field is missing",
        ),
        (
            {**PULL, "auth": {"username": "u", "password": None}},
            "pull.auth.password: expected a string, got null",
        ),
        ({**RESIZE, "cols": 65536}, "resize.cols: expected an unsigned 16-bit integer, got 65536"),
        ({**RESIZE, "rows": -1}, "resize.rows: expected an unsigned 16-bit integer, got -1"),
        ({"method": "stdin", "data": None}, "stdin.data: expected base64 text, got null"),
        (
            {"method": "stdin", "data": "aGk"},
            "stdin.data: expected base64 of the standard alphabet with padding, got other text",
        ),
        (
            {"method": "file_write", "path": "/x", "data": "", "mode": 2**32},
            "file_write.mode: expected an unsigned 32-bit integer or null, got 4294967296",
        ),
        ({"method": None}, "method: expected a string, got null"),
        ({"METHOD": "ping"}, "method: expected a string, got nothing: the field is missing"),
        ([{"method": "ping"}], "expected an object, got an array"),
        ("ping", "expected an object, got a string"),
        (5, "expected an object, got an integer"),
        (True, "expected an object, got a boolean"),
    ],
)
def test_a_refusal_names_the_field_and_what_was_expected(members: Any, message: str) -> None:
    assert refusal(members) == message


def test_an_unknown_method_is_told_the_known_ones() -> None:
    message = refusal({"method": "frobnicate"})
    assert message.startswith('unknown method "frobnicate"; expected one of: ping, pull, query,')
    assert ", flatten_layers, vm_stats, diagnose" in message


def test_an_unknown_method_is_not_repeated_at_any_length() -> None:
    assert len(refusal({"method": "x" * 1_000_000})) < 500


@pytest.mark.parametrize(
    "members",
    [
        {**PULL, "auth": {"username": "u", "password": [GUESSED]}},
        {**PULL, "auth": {"username": {"x": GUESSED}, "password": GUESSED}},
        {**PULL, "auth": GUESSED},
        {**PULL, "proxy": [f"http://u:{GUESSED}@proxy"]},
        {**VM_EXEC, "env": [["A", [GUESSED]]]},
        {**VM_EXEC, "env": [["A", GUESSED, GUESSED]]},
        {**VM_EXEC, "env": GUESSED},
        {**VM_EXEC, "env": {"A": GUESSED}},
        {**VM_EXEC, "stdin_data": {"x": GUESSED}},
        {**RUN, "remote_volume_mount": [GUESSED]},
        {"method": "stdin", "data": GUESSED + "!"},
        {"method": "stdin", "data": [GUESSED]},
        {"method": "file_write", "path": "/x", "data": GUESSED + "!"},
        GUESSED,
        [GUESSED],
    ],
)
def test_a_refusal_does_not_repeat_what_may_be_secret(members: Any) -> None:
    assert GUESSED not in refusal(members)


def test_a_number_in_place_of_a_secret_is_not_repeated_either() -> None:
    assert "1234" not in refusal({**PULL, "auth": {"username": "u", "password": 1234}})
    assert "1234" not in refusal({"method": "stdin", "data": 1234})


def test_broken_json_with_a_secret_in_it_does_not_show_it() -> None:
    with pytest.raises(MalformedMessage, match=r"^not JSON: ") as raised:
        decode(b'{"method":"stdin","data":"s3cret}', AgentRequest)
    assert GUESSED not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize(
    ("lowest", "highest", "members", "field"),
    [
        (0, 2**16 - 1, RESIZE, "cols"),
        (0, 2**64 - 1, VM_EXEC, "timeout_ms"),
        (0, 2**32 - 1, {"method": "file_write", "path": "/x", "data": ""}, "mode"),
        (0, 2**64 - 1, {"method": "file_write_begin", "path": "/x"}, "total_size"),
        (0, 2**64 - 1, {"method": "export_layer", "image_digest": "d"}, "layer_index"),
    ],
)
def test_integers_reach_to_the_ends_of_their_type(
    lowest: int, highest: int, members: dict[str, Any], field: str
) -> None:
    for value in (lowest, highest):
        payload = json.dumps({**members, field: value}).encode()
        assert getattr(decode(payload, AgentRequest).body, field) == value
    for value in (lowest - 1, highest + 1):
        refusal({**members, field: value})


@pytest.mark.parametrize(
    ("lowest", "highest", "members", "field"),
    [
        (-(2**31), 2**31 - 1, {"status": "exited"}, "exit_code"),
        (0, 2**8 - 1, {"status": "progress", "message": "m"}, "percent"),
        (0, 2**32 - 1, {"status": "pong"}, "version"),
    ],
)
def test_the_same_for_answers(
    lowest: int, highest: int, members: dict[str, Any], field: str
) -> None:
    for value in (lowest, highest):
        payload = json.dumps({**members, field: value}).encode()
        assert getattr(decode(payload, AgentResponse).body, field) == value
    for value in (lowest - 1, highest + 1):
        refusal({**members, field: value}, AgentResponse)


@pytest.mark.parametrize("trace_id", ["5", "null", "true", "[]", '{"a":1}', "1.5"])
def test_a_trace_id_that_is_no_string_is_ignored(trace_id: str) -> None:
    envelope = decode(b'{"trace_id":%s,"method":"ping"}' % trace_id.encode(), AgentRequest)
    assert envelope.trace_id is None
    assert envelope.body == requests.Ping()


def test_a_trace_id_may_stand_anywhere_and_beside_any_kind() -> None:
    assert decode(b'{"method":"ping","trace_id":"t"}', AgentRequest).trace_id == "t"
    assert decode(b'{"status":"ok","trace_id":"t"}', AgentResponse).trace_id == "t"


def test_unknown_fields_any_order_and_missing_optional_ones_are_taken() -> None:
    payload = b'{"x":{"y":[null]},"command":["a"],"future":1,"method":"vm_exec","workdir":null}'
    assert decode(payload, AgentRequest).body == requests.VmExec(command=("a",))


def test_newer_hosts_fields_are_known() -> None:
    run = {
        **RUN,
        "stdin_data": "in",
        "remote_volume_mount": "mount x",
        "unprivileged": False,
        "mounts": [["t", "/p", True]],
    }
    assert decode(json.dumps(run).encode(), AgentRequest).body == requests.Run(
        image="a",
        command=(),
        stdin_data="in",
        remote_volume_mount="mount x",
        unprivileged=False,
        mounts=(Mount("t", "/p", True),),
    )
    pull = {
        **PULL,
        "proxy": "http://p",
        "no_proxy": None,
        "auth": {"username": "u", "password": "p"},
    }
    assert decode(json.dumps(pull).encode(), AgentRequest).body == requests.Pull(
        "a", proxy="http://p", auth=RegistryAuth("u", "p")
    )


def test_huge_numbers_in_unknown_fields_are_taken() -> None:
    payload = b'{"method":"ping","x":123456789012345678901234567890,"y":-1e300}'
    assert decode(payload, AgentRequest).body == requests.Ping()


@pytest.mark.parametrize("text", [rb"\ud800", rb"\udc00", rb"\ud800\ud800", rb"\ud800x"])
def test_lone_surrogates_are_refused_also_in_unknown_fields(text: bytes) -> None:
    for field in (b"image", b"x"):
        payload = b'{"method":"query","image":"a","%s":"%s"}' % (field, text)
        with pytest.raises(MalformedMessage, match="not JSON"):
            decode(payload, AgentRequest)


def test_pairs_of_surrogates_are_characters() -> None:
    payload = rb'{"method":"query","image":"\ud83d\ude00"}'
    assert decode(payload, AgentRequest).body == requests.Query("\N{GRINNING FACE}")


@pytest.mark.parametrize("depth", [127, 128, 1_000, 1_025, 100_000, 5_000_000])
@pytest.mark.parametrize("brackets", [(b"[", b"]"), (b'{"x":', b"}")])
def test_deep_nesting_is_an_answer_not_a_crash(depth: int, brackets: tuple[bytes, bytes]) -> None:
    deep = brackets[0] * depth + b"1" + brackets[1] * depth
    for payload in (b'{"method":"ping","x":%s}' % deep, deep, brackets[0] * depth):
        try:
            envelope = decode(payload, AgentRequest)
        except MalformedMessage:
            continue
        assert envelope.body == requests.Ping()


def test_deep_nesting_inside_ok_is_no_crash_either() -> None:
    payload = b'{"status":"ok","data":%s}' % (b"[" * 120 + b"]" * 120)
    assert isinstance(decode(payload, AgentResponse).body, responses.Ok)


@given(st.binary(max_size=60))
@example(b"\xef\xbb\xbf{}")
@example(b"\x00")
def test_any_bytes_are_a_message_or_a_protocol_error(payload: bytes) -> None:
    for kind in KINDS.values():
        with pytest.raises(MalformedMessage):
            decode(payload, kind)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(
    st.sampled_from([VM_EXEC, RUN, PULL, RESIZE]),
    st.sampled_from(
        ["method", "command", "env", "workdir", "timeout_ms", "tty", "auth", "mounts", "cols"]
    ),
    _JSON,
)
def test_any_value_in_any_field_is_a_message_or_names_the_field(
    members: dict[str, Any], field: str, value: Any
) -> None:
    payload = json.dumps({**members, field: value}).encode()
    fault = ""
    try:
        decode(payload, AgentRequest)
    except MalformedMessage as error:
        fault = str(error)
    assert not fault or field in fault or fault.startswith("not JSON")
