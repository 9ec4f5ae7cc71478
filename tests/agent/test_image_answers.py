"""What is told of images is written once, and never after it has changed."""

from pathlib import Path

import pytest

from agent.image_answers import ImageAnswers
from agent.images.content_store import ContentStore
from agent.images.reference import parse_reference
from protocol import AgentResponse, decode, encode, responses
from tests.agent.images.test_content_store import add_image
from tests.support.layout import LayerBlob, plain_layer


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path)


LAYERS: list[LayerBlob] = [plain_layer(b"one")]


def told(data: object) -> object:
    """What a host makes of it."""
    answer = decode(encode(responses.Ok(data)), AgentResponse).body
    assert isinstance(answer, responses.Ok)
    return answer.data


def test_an_answer_is_the_same_byte_for_byte_as_one_written_anew(store: ContentStore) -> None:
    images = [add_image(store, name, LAYERS, Cmd=[name]) for name in ("a", "b", "c")]
    answers = ImageAnswers(store)
    for _ in range(2):
        assert encode(responses.Ok(answers.of(images[1]))) == encode(responses.Ok(images[1].info()))
        assert encode(responses.Ok(answers.of_all())) == encode(
            responses.Ok([image.info() for image in images])
        )


def test_an_answer_follows_a_tag_that_moves_or_is_forgotten(store: ContentStore) -> None:
    answers = ImageAnswers(store)
    assert told(answers.of_all()) == []
    for command in ("first", "second"):
        image = add_image(store, "moving", LAYERS, Cmd=[command])
        (listed,) = told(answers.of_all())  # type: ignore[misc]
        assert listed["cmd"] == [command]
        assert told(answers.of(image)) == listed
    store.forget({image.reference})
    assert store.find(parse_reference("moving")) is None
    assert told(answers.of_all()) == []
