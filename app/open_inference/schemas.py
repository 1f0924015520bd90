"""The protocol's JSON bodies, each field described. This is what /docs shows; nothing here computes."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.open_inference.spec import MAX_ID_LETTERS, OutputName


def _forget_defaults(schema: dict[str, Any]) -> None:
    for described in schema["properties"].values():
        described.pop("default", None)


class Body(BaseModel):
    """A field with a default may be absent. The schema hides the default: generated clients would take it for the value
    sent."""

    model_config = ConfigDict(json_schema_extra=_forget_defaults)


class ServerMetadata(Body):
    """The server."""

    name: str = Field(description="Name of the service.", examples=["cifar-service"])
    version: str = Field(description="Version of the service.")
    extensions: list[str] = Field(description="The protocol extensions of Triton that it supports.")


class Live(Body):
    """The process is alive."""

    live: bool = Field(description="Always true.")


class Ready(Live):
    """Ready for requests."""

    ready: bool = Field(description="Always true; until it is ready, the answer is 503.")


class Models(Body):
    """The names of the models."""

    models: list[str] = Field(description="The name of the one model.", examples=[["cifar"]])


class ModelReady(Body):
    """The model is ready for requests."""

    name: str = Field(description="Name of the model.", examples=["cifar"])
    ready: bool = Field(description="Always true; until it is ready, the answer is 503.")


class TensorMetadata(Body):
    """A tensor that the model takes or gives."""

    name: str = Field(description="Name of the tensor.", examples=["pixels"])
    datatype: str = Field(description="Type of its elements.", examples=["UINT8"])
    shape: list[int] = Field(description="Its shape; -1 stands for any number of pictures.", examples=[[-1, 32, 32, 3]])


class ModelMetadata(Body):
    """What the model takes and gives."""

    name: str = Field(description="Name of the model.", examples=["cifar"])
    versions: list[str] = Field(description="Its one version.", examples=[["1"]])
    platform: str = Field(description="What kind of weights it has.")
    inputs: list[TensorMetadata] = Field(description="The inputs; a request gives one of them.")
    outputs: list[TensorMetadata] = Field(description="The outputs; a request may ask for some of them.")


class TensorConfiguration(Body):
    """A tensor in Triton's terms."""

    name: str = Field(description="Name of the tensor.", examples=["pixels"])
    data_type: str = Field(description="Type of its elements.", examples=["TYPE_UINT8"])
    dims: list[int] = Field(description="Its shape; -1 stands for any number of pictures.", examples=[[-1, 32, 32, 3]])
    optional: bool = Field(False, description="True for all inputs, because they are alternatives.")


class ModelConfiguration(Body):
    """What the model takes and gives, in Triton's terms."""

    name: str = Field(description="Name of the model.", examples=["cifar"])
    platform: str = Field(description="What kind of weights it has.")
    max_batch_size: int = Field(description="0: the number of pictures is the first of the `dims`.")
    input: list[TensorConfiguration] = Field(description="The inputs; a request gives one of them.")
    output: list[TensorConfiguration] = Field(description="The outputs; a request may ask for some of them.")


class Duration(Body):
    """How often, and how long in all."""

    count: int = Field(description="How many times.")
    ns: int = Field(description="Total time in nanoseconds.")


class InferenceStatistics(Body):
    """Where the time of requests went. A request is a picture, or up to a usual batch of raw pixels."""

    success: Duration = Field(description="From the admission of a picture to its result.")
    fail: Duration = Field(description="The same for pictures without a result.")
    queue: Duration = Field(description="Waiting for a batch.")
    compute_input: Duration = Field(description="Decoding.")
    compute_infer: Duration = Field(description="Forward passes.")
    compute_output: Duration = Field(description="Not counted: each request encodes its own answer, after its batch.")
    cache_hit: Duration = Field(description="There is no cache.")
    cache_miss: Duration = Field(description="There is no cache.")


class ModelStatistics(Body):
    """What the model has done since the start, over any route."""

    name: str = Field(description="Name of the model.", examples=["cifar"])
    version: str = Field(description="Version of the model.", examples=["1"])
    last_inference: int = Field(
        description="When its last batch ended, in milliseconds since 1970; 0 before the first."
    )
    inference_count: int = Field(description="Number of pictures.")
    execution_count: int = Field(description="Number of forward passes.")
    inference_stats: InferenceStatistics = Field(description="Where the time went.")
    batch_stats: list[Any] = Field(description="Always empty.")


class AllStatistics(Body):
    """What has been done since the start."""

    model_stats: list[ModelStatistics] = Field(description="The statistics of the one model.")


class IndexEntry(Body):
    """A model of the repository."""

    name: str = Field(description="Name of the model.", examples=["cifar"])
    version: str = Field(description="Version of the model.", examples=["1"])
    state: Literal["READY", "UNAVAILABLE"] = Field(description="Whether it takes requests.")
    reason: str = Field(description="Why it is unavailable; empty otherwise.")


class InputParameters(Body):
    """Where the elements are."""

    binary_data_size: int | None = Field(None, ge=0, description="How many bytes follow the JSON, in place of `data`.")


class PixelsTensor(Body):
    """Raw pixels."""

    name: Literal["pixels"] = Field(description="The input for raw pixels, red first.")
    datatype: Literal["UINT8"] = Field(description="Type of its elements.")
    shape: list[int] = Field(
        description="[N, 32, 32, 3] for N pictures.", min_length=4, max_length=4, examples=[[1, 32, 32, 3]]
    )
    data: list[Any] | None = Field(None, description="Pixels in row-major order, flat or nested as the shape says.")
    parameters: InputParameters | None = Field(None, description="Needed if its elements follow the JSON.")


class ImageTensor(Body):
    """Encoded pictures."""

    name: Literal["image"] = Field(description="The input for encoded pictures.")
    datatype: Literal["BYTES"] = Field(description="Type of its elements.")
    shape: list[int] = Field(description="[N] for N pictures.", min_length=1, max_length=1, examples=[[1]])
    data: list[str] | None = Field(None, description="Each picture in base64.")
    parameters: InputParameters | None = Field(None, description="Needed if its elements follow the JSON.")


class OutputParameters(Body):
    """The form of an output."""

    binary_data: bool | None = Field(None, description="Whether its elements should follow the JSON.")
    classification: int | None = Field(
        None, ge=0, description="For `probabilities`: give this many classes as text instead, the most probable first."
    )


class RequestedOutput(Body):
    """A requested output."""

    name: OutputName = Field(description="Which output.")
    parameters: OutputParameters | None = Field(None, description="Its form.")


class RequestParameters(Body):
    """Parameters of the whole request."""

    timeout: int | None = Field(None, ge=0, description="Microseconds it may wait; 0 for the service's deadline.")
    binary_data_output: bool | None = Field(None, description="Whether all outputs should follow the JSON.")


class InferenceRequest(Body):
    """Pictures to classify."""

    id: str | None = Field(None, description="Returned in the answer.", max_length=MAX_ID_LETTERS)
    parameters: RequestParameters | None = Field(None, description="Parameters of the whole request.")
    inputs: list[PixelsTensor | ImageTensor] = Field(description="Exactly one.", min_length=1, max_length=1)
    outputs: list[RequestedOutput] | None = Field(None, description="The requested outputs; all if there are none.")


class OutputTensor(Body):
    """An output."""

    name: OutputName = Field(description="Which output.")
    datatype: str = Field(description="Type of its elements.", examples=["FP32"])
    shape: list[int] = Field(description="The number of pictures comes first.", examples=[[1, 10]])
    parameters: dict[str, int] = Field(
        {}, description="`binary_data_size`, if its elements follow the JSON: how many bytes they are."
    )
    data: list[Any] = Field([], description="Its elements in row-major order, unless they follow the JSON.")


class InferenceResponse(Body):
    """What the network makes of the pictures."""

    model_name: str = Field(description="Name of the model.", examples=["cifar"])
    model_version: str = Field(description="Version of the model.", examples=["1"])
    id: str = Field("", description="The request's id, if it has one.")
    parameters: dict[str, str] = Field(description="`weights_sha256`: which weights answered.")
    outputs: list[OutputTensor] = Field(description="The requested outputs, in that order; all if none were requested.")
