"""The codec of the Open Inference Protocol: probabilities -> bytes of an answer, and the model's metadata."""

import json
import struct
from typing import Any

import pytest

from app.open_inference import spec
from app.open_inference.request import Inference, Wanted
from app.open_inference.response import encode
from app.statistics import Statistics, Timing

ALL = [Wanted(name, binary=False) for name in ("probabilities", "label", "class_id", "familiarity")]
ROWS = [[0.25, 0.5, 0.125, 0.125], [0.0625, 0.0625, 0.125, 0.75]]
FAMILIARITY = [0.75, None]
CLASSES = ["plane", "car", "bird", "chat é"]


def strings(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def write(*outputs: Wanted, id: str = "") -> tuple[dict[str, Any], bytes, int | None]:
    body, length = encode(Inference(outputs=list(outputs), id=id), ROWS, FAMILIARITY, CLASSES, "abc")
    return json.loads(body[:length]), body[len(body) if length is None else length :], length


def test_an_answer_in_json() -> None:
    text, tail, length = write(*ALL, id="42")
    assert (length, tail) == (None, b"")
    assert text == {
        "model_name": "cifar",
        "model_version": "1",
        "id": "42",
        "parameters": {"weights_sha256": "abc"},
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [2, 4], "data": [*ROWS[0], *ROWS[1]]},
            {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["car", "chat é"]},
            {"name": "class_id", "datatype": "INT64", "shape": [2], "data": [1, 3]},
            {"name": "familiarity", "datatype": "FP32", "shape": [2], "data": [0.75, -1.0]},
        ],
    }


def test_an_answer_in_binary() -> None:
    text, tail, _ = write(*(Wanted(wanted.name, binary=True) for wanted in ALL))
    labels = strings(b"car", "chat é".encode())
    assert [output["parameters"]["binary_data_size"] for output in text["outputs"]] == [32, len(labels), 16, 8]
    assert not any("data" in output for output in text["outputs"])
    assert tail == struct.pack("<8f", *ROWS[0], *ROWS[1]) + labels + struct.pack("<2q2f", 1, 3, 0.75, -1.0)


def test_a_mixed_answer_keeps_the_order_asked_for() -> None:
    text, tail, _ = write(Wanted("class_id", True), Wanted("label", False), Wanted("probabilities", True))
    assert [output["name"] for output in text["outputs"]] == ["class_id", "label", "probabilities"]
    assert text["outputs"][1]["data"] == ["car", "chat é"]
    assert tail == struct.pack("<2q8f", 1, 3, *ROWS[0], *ROWS[1])


@pytest.mark.parametrize(("top_k", "given"), [(1, 1), (3, 3), (99, 4)])
def test_classification_ranks_and_clamps(top_k: int, given: int) -> None:
    text, _, _ = write(Wanted("probabilities", False, top_k))
    (output,) = text["outputs"]
    ranked = ["0.500000:1:car", "0.250000:0:plane", "0.125000:2:bird", "0.125000:3:chat é"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, given])
    assert output["data"][:given] == ranked[:given]
    assert output["data"][given] == "0.750000:3:chat é"


def test_classification_in_binary() -> None:
    _, tail, _ = write(Wanted("probabilities", True, 1))
    assert tail == strings(b"0.500000:1:car", "0.750000:3:chat é".encode())


def test_an_empty_id_is_not_echoed() -> None:
    assert "id" not in write(*ALL)[0]


# Metadata and statistics


def test_answers_match_the_outputs_described_in_the_metadata() -> None:
    described = {output["name"]: output for output in spec.metadata(4)["outputs"]}
    for output in write(*ALL)[0]["outputs"]:
        assert output["datatype"] == described[output["name"]]["datatype"]
        assert [-1, *output["shape"][1:]] == described[output["name"]]["shape"]


def test_the_statistics_in_nanoseconds() -> None:
    known = Statistics()
    known.success.add(0.5)
    timings = [Timing(queue_seconds=queue, prepare_seconds=0.001, run_seconds=0.002) for queue in (0.05, 0.1, 0.1)]
    known.record(timings, pictures=5, now=1000.5)
    (model,) = spec.statistics(known)["model_stats"]
    assert (model["inference_count"], model["execution_count"], model["last_inference"]) == (5, 1, 1_000_500)
    assert model["inference_stats"]["success"] == {"count": 1, "ns": 500_000_000}
    assert model["inference_stats"]["queue"] == {"count": 3, "ns": 250_000_000}
    assert model["inference_stats"]["compute_input"] == {"count": 3, "ns": 3_000_000}
    assert model["inference_stats"]["compute_infer"] == {"count": 3, "ns": 6_000_000}
