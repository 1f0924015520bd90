"""The client that most people use, unchanged, against a real process: tritonclient[http], sync and asyncio.

Its sync client must stay in one thread; each test has its own.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import drawing, encode
from running import serving
from tritonclient import http
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

COUNT = 40
"""Enough pictures for compression to pay."""
PICTURES = [drawing().rotate(9 * number) for number in range(COUNT)]
PIXELS = np.stack([np.asarray(picture) for picture in PICTURES])
ENCODED = np.array([encode(picture) for picture in PICTURES], dtype=np.object_)


@pytest.fixture(scope="module")
def address(weights: Path) -> Iterator[str]:
    with serving("--weights", str(weights), "--max-batch", "8", "--drain-seconds", "0") as (_, url, _):
        yield url.removeprefix("http://")


@pytest.fixture
def client(address: str) -> Iterator[http.InferenceServerClient]:
    with http.InferenceServerClient(address, connection_timeout=30, network_timeout=30) as client:
        yield client


@pytest.fixture
async def aio_client(address: str) -> AsyncIterator[aio.InferenceServerClient]:
    async with aio.InferenceServerClient(address) as client:
        yield client


def pixels(values: Any = PIXELS, *, binary: bool = True) -> http.InferInput:
    tensor = http.InferInput("pixels", list(values.shape), "UINT8")
    return tensor.set_data_from_numpy(values, binary_data=binary)


def image(values: Any = ENCODED) -> http.InferInput:
    return http.InferInput("image", list(values.shape), "BYTES").set_data_from_numpy(values)


def check(result: http.InferResult, count: int = COUNT) -> None:
    """All outputs are there and say the same."""
    probabilities, label, class_id = (result.as_numpy(name) for name in ("probabilities", "label", "class_id"))
    assert (probabilities.shape, probabilities.dtype) == ((count, 10), np.float32)
    assert probabilities.sum(1) == pytest.approx(np.ones(count), abs=1e-5)
    assert (class_id == probabilities.argmax(1)).all()
    known = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    as_text = [each.decode() if isinstance(each, bytes) else each for each in label.ravel()]
    assert as_text == [known[each] for each in class_id]


def test_health_and_metadata(client: http.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("cifar")
    assert client.is_model_ready("cifar", "1")
    assert not client.is_model_ready("cifar", "99")
    assert not client.is_model_ready("resnet")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("cifar")
    assert metadata == client.get_model_metadata("cifar", "1")
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["pixels", "image"]
    assert client.get_model_config("cifar")["max_batch_size"] == 0
    assert client.get_model_repository_index() == [{"name": "cifar", "version": "1", "state": "READY", "reason": ""}]


@pytest.mark.parametrize(("name", "version"), [("resnet", ""), ("cifar", "99")])
def test_an_unknown_model_gives_404_with_a_sentence(
    client: http.InferenceServerClient, name: str, version: str
) -> None:
    with pytest.raises(InferenceServerException, match=r"\[404\] There is nothing at /v2/models/"):
        client.get_model_metadata(name, version)
    with pytest.raises(InferenceServerException, match=r"\[404\] There is nothing at /v2/models/"):
        client.infer(name, [pixels()], version)


@pytest.mark.parametrize("binary", [True, False])
def test_pixels(client: http.InferenceServerClient, binary: bool) -> None:
    """By the client's default, all outputs are binary."""
    result = client.infer("cifar", [pixels(PIXELS[:2], binary=binary)], request_id="42")
    check(result, 2)
    assert result.get_response()["id"] == "42"
    assert all("binary_data_size" in output["parameters"] for output in result.get_response()["outputs"])


def test_encoded_pictures_get_the_same_answers_as_their_pixels(client: http.InferenceServerClient) -> None:
    from_image, from_pixels = client.infer("cifar", [image()]), client.infer("cifar", [pixels()])
    check(from_image)
    assert from_image.as_numpy("probabilities") == pytest.approx(from_pixels.as_numpy("probabilities"), abs=0.003)


def test_a_picture_gets_the_same_answer_alone_as_in_a_batch(client: http.InferenceServerClient) -> None:
    together = client.infer("cifar", [pixels()]).as_numpy("probabilities")
    for index in (0, COUNT - 1):
        alone = client.infer("cifar", [pixels(PIXELS[index : index + 1])]).as_numpy("probabilities")
        assert alone == pytest.approx(together[index : index + 1], abs=0.003)


def test_mixed_outputs_and_classification(client: http.InferenceServerClient) -> None:
    outputs = [
        http.InferRequestedOutput("class_id", binary_data=False),
        http.InferRequestedOutput("probabilities", binary_data=True, class_count=3),
    ]
    result = client.infer("cifar", [pixels()], outputs=outputs)
    ranked = result.as_numpy("probabilities")
    assert ranked.shape == (COUNT, 3)
    assert [int(each.split(b":")[1]) for each in ranked[:, 0]] == result.as_numpy("class_id").tolist()
    assert result.as_numpy("label") is None


@pytest.mark.parametrize("binary", [True, False])
def test_a_class_count_beyond_the_classes_is_clamped(client: http.InferenceServerClient, binary: bool) -> None:
    output = http.InferRequestedOutput("probabilities", binary_data=binary, class_count=99)
    assert client.infer("cifar", [pixels()], outputs=[output]).as_numpy("probabilities").shape == (COUNT, 10)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_both_ways(client: http.InferenceServerClient, algorithm: str) -> None:
    result = client.infer(
        "cifar", [pixels()], request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
    )
    check(result)


def test_an_error_reaches_the_caller_as_a_sentence(client: http.InferenceServerClient) -> None:
    broken = ENCODED.copy()
    broken[3] = b"no picture"
    with pytest.raises(InferenceServerException, match=r"\[400\] Input 'image', element 3: The 10 bytes are not a"):
        client.infer("cifar", [image(broken)])
    with pytest.raises(InferenceServerException, match=r"\[504\] The request waited longer than 0\.000001 seconds"):
        client.infer("cifar", [pixels()], timeout=1)
    with pytest.raises(InferenceServerException, match=r"\[501\] This service does not offer loading"):
        client.unload_model("cifar")
    with pytest.raises(InferenceServerException, match=r"\[501\] This service does not offer .* shared memory"):
        client.get_system_shared_memory_status()


def test_a_picture_of_another_size_is_resized_on_request(client: http.InferenceServerClient) -> None:
    large = np.array([encode(drawing(64, 48))], dtype=np.object_)
    with pytest.raises(InferenceServerException, match=r"\[400\] Input 'image', element 0: The picture is 64 x 48"):
        client.infer("cifar", [image(large)])
    check(client.infer("cifar", [image(large)], query_params={"resize": "crop"}), 1)


@pytest.mark.anyio
async def test_the_asyncio_client(aio_client: aio.InferenceServerClient) -> None:
    """It always accepts compressed answers, and asks for octets."""
    assert await aio_client.is_server_ready()
    assert "statistics" in (await aio_client.get_server_metadata())["extensions"]
    assert (await aio_client.get_model_metadata("cifar"))["platform"] == "pytorch_state_dict"
    check(await aio_client.infer("cifar", [pixels()], request_compression_algorithm="gzip"))
    check(await aio_client.infer("cifar", [image(ENCODED[:1])]), 1)
    output = http.InferRequestedOutput("probabilities", binary_data=False, class_count=3)
    result = await aio_client.infer("cifar", [pixels()], outputs=[output], request_id="42")
    assert result.as_numpy("probabilities").shape == (COUNT, 3)
    with pytest.raises(InferenceServerException, match=r"\[400\] Input 'pixels' has the shape \[40, 32, 32\]"):
        await aio_client.infer("cifar", [pixels(PIXELS[..., 0])])


def test_the_statistics_show_that_pictures_share_forward_passes(client: http.InferenceServerClient) -> None:
    before, after = (statistics(client, PIXELS[:count]) for count in (1, COUNT))
    assert after["inference_count"] - before["inference_count"] == COUNT
    assert after["execution_count"] - before["execution_count"] == COUNT / 8
    for part in ("success", "queue", "compute_input", "compute_infer"):
        assert after["inference_stats"][part]["count"] - before["inference_stats"][part]["count"] == COUNT / 8
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]
    assert after["last_inference"] >= before["last_inference"]


def statistics(client: http.InferenceServerClient, values: Any) -> dict[str, Any]:
    """After one request."""
    client.infer("cifar", [pixels(values)])
    (model,) = client.get_inference_statistics("cifar")["model_stats"]
    return dict(model)


@pytest.mark.anyio
async def test_concurrent_requests_get_their_own_answers(aio_client: aio.InferenceServerClient) -> None:
    expected = (await aio_client.infer("cifar", [pixels()])).as_numpy("probabilities")
    requests = (aio_client.infer("cifar", [pixels(PIXELS[n : n + 1])], request_id=str(n)) for n in range(COUNT))
    results = await asyncio.gather(*requests)
    assert [result.get_response()["id"] for result in results] == [str(n) for n in range(COUNT)]
    assert np.concatenate([result.as_numpy("probabilities") for result in results]) == pytest.approx(
        expected, abs=0.003
    )
