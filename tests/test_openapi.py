"""The documentation says everything: each field, each parameter, each status that is really answered."""

import base64
import json
import re
from contextlib import nullcontext
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from app.images import Resize
from app.open_inference.schemas import InferenceRequest, InferenceResponse
from app.schemas import ErrorBody


@pytest.fixture
def openapi(client: TestClient) -> dict[str, Any]:
    document: dict[str, Any] = client.get("/openapi.json").json()
    return document


def test_the_documented_paths_are_as_expected(openapi: dict[str, Any]) -> None:
    assert {path: list(operations) for path, operations in openapi["paths"].items()} == {
        "/predict": ["post"],
        "/predict/batch": ["post"],
        "/v2": ["get"],
        "/v2/health/live": ["get"],
        "/v2/health/ready": ["get"],
        "/v2/models": ["get"],
        "/v2/models/stats": ["get"],
        "/v2/models/cifar": ["get"],
        "/v2/models/cifar/ready": ["get"],
        "/v2/models/cifar/config": ["get"],
        "/v2/models/cifar/infer": ["post"],
        "/v2/repository/index": ["post"],
        "/metrics": ["get"],
        "/metrics/per-class": ["get"],
        "/healthz": ["get"],
        "/readyz": ["get"],
    }


def test_the_documented_statuses_are_as_expected(openapi: dict[str, Any]) -> None:
    statuses = {path: set(next(iter(of.values()))["responses"]) for path, of in openapi["paths"].items()}
    assert {path: of for path, of in statuses.items() if of != {"200"}} == {
        "/predict": {"200", "400", "408", "413", "415", "422", "429", "500", "503", "504"},
        "/predict/batch": {"200", "400", "408", "413", "415", "422", "429", "500", "503", "504"},
        "/v2/health/ready": {"200", "503"},
        "/v2/models/cifar/ready": {"200", "503"},
        "/v2/models/cifar/infer": {"200", "400", "408", "413", "415", "422", "429", "500", "501", "503", "504"},
        "/metrics/per-class": {"200", "404", "500", "503"},
        "/readyz": {"200", "503"},
    }


def test_every_error_response_has_the_common_schema_and_a_description(openapi: dict[str, Any]) -> None:
    for operations in openapi["paths"].values():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                assert answer["description"] != "Successful Response"
                if status != "200":
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema == {"$ref": f"#/components/schemas/{ErrorBody.__name__}"}
                    assert answer["description"].endswith(".")
                    assert ("Retry-After" in answer["headers"]) == (status in ("429", "503"))


def test_every_answer_in_json_has_a_schema(openapi: dict[str, Any]) -> None:
    for path, operations in openapi["paths"].items():
        for operation in operations.values():
            schema = operation["responses"]["200"]["content"].get("application/json", {}).get("schema")
            assert schema is None or "$ref" in schema or "$ref" in schema["items"], path


def test_the_schemas_of_the_inference_protocol_leave_nothing_out(client: TestClient, png: bytes) -> None:
    octets = {"content-type": "application/octet-stream"}
    inference = {"Inference-Header-Content-Length": "0", "Accept": "application/json", **octets}
    answer = client.post("/v2/models/cifar/infer", content=png, headers=inference).json()
    assert InferenceResponse.model_validate(answer).model_dump(exclude_unset=True) == answer
    request = {
        "id": "42",
        "parameters": {"timeout": 10**7, "binary_data_output": False},
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(png).decode()]}],
        "outputs": [{"name": "probabilities", "parameters": {"classification": 3, "binary_data": False}}],
    }
    assert InferenceRequest.model_validate(request).model_dump(exclude_unset=True) == request
    assert client.post("/v2/models/cifar/infer", json=request).json()["outputs"][0]["shape"] == [1, 3]
    size = {"parameters": {"binary_data_size": len(png) + 4}}
    binary = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], **size}]}
    assert InferenceRequest.model_validate(binary).model_dump(exclude_unset=True) == binary
    head = json.dumps(binary).encode()
    body = head + len(png).to_bytes(4, "little") + png
    length = {"Inference-Header-Content-Length": str(len(head))}
    assert client.post("/v2/models/cifar/infer", content=body, headers=length).status_code == 200
    for described, bare in [
        ("/v2/models/cifar", "/v2/models/cifar/versions/1"),
        ("/v2/models/cifar/config", "/v2/models/cifar/versions/1/config"),
        ("/v2/models/cifar/ready", "/v2/models/cifar/versions/1/ready"),
        ("/v2/models/stats", "/v2/models/cifar/stats"),
    ]:
        assert client.get(described).json() == client.get(bare).json()


PIXELS: dict[str, Any] = {"name": "pixels", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
ABSENT = {"id": None, "outputs": None, "parameters": {"timeout": None, "binary_data_output": None}}


@pytest.mark.parametrize(
    ("request_", "accepted"),
    [
        ({"inputs": [PIXELS | {"parameters": {}}]}, True),
        (ABSENT | {"inputs": [PIXELS | {"parameters": {"binary_data_size": None}}]}, True),
        ({"inputs": [PIXELS | {"datatype": "BYTES"}]}, False),
        ({"inputs": [PIXELS | {"shape": [1]}]}, False),
        ({"inputs": [PIXELS], "outputs": [{"name": "logits"}]}, False),
        ({"inputs": [PIXELS], "outputs": [{"name": "label", "parameters": {"classification": -1}}]}, False),
        ({"inputs": [PIXELS, PIXELS]}, False),
    ],
)
def test_the_schema_of_a_request_accepts_what_the_service_accepts(
    client: TestClient, request_: dict[str, Any], accepted: bool
) -> None:
    assert (client.post("/v2/models/cifar/infer", json=request_).status_code == 200) == accepted
    with nullcontext() if accepted else pytest.raises(ValidationError):
        InferenceRequest.model_validate(request_, strict=True)


def test_the_example_is_a_request(client: TestClient, openapi: dict[str, Any]) -> None:
    body = openapi["paths"]["/v2/models/cifar/infer"]["post"]["requestBody"]["content"]["application/json"]
    answer = client.post("/v2/models/cifar/infer", json=body["example"])
    assert (answer.status_code, answer.json()["id"]) == (200, "42")


def test_optional_fields_have_no_default(openapi: dict[str, Any]) -> None:
    """Client generators would always send it."""
    for name in ("InferenceRequest", "PixelsTensor", "ImageTensor", "InferenceResponse", "OutputTensor"):
        schema = openapi["components"]["schemas"][name]
        assert schema["properties"].keys() > set(schema["required"])
        assert not [field for field, of in schema["properties"].items() if "default" in of]


def test_every_referenced_schema_exists(openapi: dict[str, Any]) -> None:
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(openapi)))
    assert "InferenceRequest" in names
    assert names <= openapi["components"]["schemas"].keys()


def test_every_field_and_parameter_is_described(openapi: dict[str, Any]) -> None:
    schemas = openapi["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    for name, schema in schemas.items():
        assert schema.get("description"), name
        for field, of in schema["properties"].items():
            assert of.get("description") or "$ref" in of, f"{name}.{field}"  # a referenced schema describes itself
    for parameter in openapi["paths"]["/predict"]["post"]["parameters"]:
        assert parameter["description"]


def test_the_body_and_the_parameters_of_predict(openapi: dict[str, Any]) -> None:
    operation = openapi["paths"]["/predict"]["post"]
    resize, top_k = operation["parameters"]
    assert resize["schema"]["enum"] == list(get_args(Resize))
    assert (top_k["schema"]["type"], top_k["schema"]["minimum"]) == ("integer", 1)  # neither may be null
    assert (resize["name"], top_k["name"]) == ("resize", "top_k")


@pytest.mark.parametrize(("path", "field"), [("/predict", "file"), ("/predict/batch", "files")])
def test_request_bodies_are_described_in_a_form_client_generators_support(
    openapi: dict[str, Any], path: str, field: str
) -> None:
    """A popular one leaves out a path with another content type, such as image/*, and fails on alternative forms."""
    content = openapi["paths"][path]["post"]["requestBody"]["content"]
    assert set(content) == {"multipart/form-data", "application/octet-stream"}
    form = content["multipart/form-data"]["schema"]
    assert (list(form["properties"]), form["required"]) == ([field], [field])
    assert not {"anyOf", "oneOf", "allOf"} & form.keys()


def test_operations_are_named_as_a_client_would_name_them(openapi: dict[str, Any]) -> None:
    """Generated clients name their functions like this, and names must be unique."""
    names = [operation["operationId"] for path in openapi["paths"].values() for operation in path.values()]
    assert {"predict", "predict_batch", "per_class", "model_infer"} <= set(names)
    assert len(set(names)) == len(names)
