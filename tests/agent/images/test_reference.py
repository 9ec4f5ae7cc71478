"""References, read as docker reads them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.images.reference import InvalidReference, parse_reference

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/alpine", "docker.io/library/alpine:latest"),
        ("user/alpine", "docker.io/user/alpine:latest"),
        ("a/b/c", "docker.io/a/b/c:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("LocalHost/x", "LocalHost/x:latest"),
        ("registry:5000/x", "registry:5000/x:latest"),
        ("127.0.0.1:5000/a/b:tag", "127.0.0.1:5000/a/b:tag"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        ("registry.example/x", "registry.example/x:latest"),
        ("host-name.example:443/a.b_c__d---e/f", "host-name.example:443/a.b_c__d---e/f:latest"),
        (f"alpine@{DIGEST}", f"docker.io/library/alpine@{DIGEST}"),
        (f"alpine:3@{DIGEST}", f"docker.io/library/alpine:3@{DIGEST}"),
        (f"h:1/x:_.-@{DIGEST}", f"h:1/x:_.-@{DIGEST}"),
        ("x:" + "t" * 128, "docker.io/library/x:" + "t" * 128),
    ],
)
def test_a_reference_is_completed_as_docker_does_it(text: str, canonical: str) -> None:
    assert str(parse_reference(text)) == canonical


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        (" alpine", "lowercase"),
        ("Alpine", "lowercase"),
        ("alpine:", "tag"),
        ("alpine:.x", "tag"),
        ("alpine:" + "t" * 129, "tag"),
        ("alpine@", "digest"),
        ("alpine@sha256:abc", "digest"),
        ("alpine@sha512:" + "0" * 128, "digest"),
        ("alpine@" + DIGEST.upper(), "digest"),
        ("alpine\n", "lowercase"),
        ("a//b", "lowercase"),
        ("a/b/", "lowercase"),
        ("/a", "lowercase"),
        ("a_-b", "lowercase"),
        ("a..b", "lowercase"),
        ("-a", "lowercase"),
        ("https://registry.example/x", "HOST:PORT"),
        ("host:port/x", "HOST:PORT"),
        ("-host.example/x", "HOST:PORT"),
        ("0123456789abcdef" * 4, "image's id"),
        ("x" * 300, "longer"),
        ("größe", "lowercase"),
        ("a:b:c", "lowercase"),
    ],
)
def test_anything_else_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(InvalidReference, match=why) as refused:
        parse_reference(text)
    assert "is not an image reference" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_digest_is_what_is_pulled_where_there_is_a_tag_too() -> None:
    assert parse_reference("alpine:3").target == "3"
    assert parse_reference(f"alpine:3@{DIGEST}").target == DIGEST


@given(st.text(alphabet="aZ09._-/:@[]é \n", max_size=60) | st.text(max_size=30))
def test_what_parses_parses_again_from_its_canonical_form(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidReference:
        return
    assert parse_reference(str(reference)) == reference
