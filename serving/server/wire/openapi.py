"""The OpenAPI 3.1 document of what is served."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from headstart.serving.server.wire.encoded import ENCODED
from headstart.serving.server.wire.tensors import DATATYPES

_SCALAR = {"type": ["string", "number", "boolean"]}
_NAME = {"type": "string", "minLength": 1, "maxLength": 256}
_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP438AAAAQBAYDFKhhdAAAAAElFTkSuQmCC"
_EXAMPLES = {
    "pixels": {"name": "images", "datatype": "UINT8", "shape": [1, 1, 2, 3], "data": [0, 0, 0, 255, 255, 255]},
    "file": {"name": ENCODED, "datatype": "BYTES", "shape": [1], "data": [_PNG]},
}
_REFUSALS = {
    "Error": "Refused",
    "400": "The request is wrong",
    "404": "There is no such model, version or path",
    "413": "The body or an image is beyond a limit",
    "415": "The body's type is not accepted",
    "429": "The queue is full",
    "503": "The server or the model is not ready, or has no memory for the request",
    "504": "The deadline passed before the request ran",
}
_MODEL, _RUN = (404, 503), (400, 404, 413, 429, 503, 504)
"""What questions about a model, and requests to run one, may be told."""


def document() -> dict[str, Any]:
    """The document, as JSON takes it."""
    try:
        number = version("headstart")
    except PackageNotFoundError:
        number = "0"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Headstart",
            "version": number,
            "summary": "Open Inference Protocol v2, and images in plain HTTP.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "parameters": {
                "name": _path_parameter("name", "Name of the model."),
                "version": _path_parameter("version", "Version of the model, a whole number."),
                "model": {
                    "name": "model",
                    "in": "query",
                    "description": "Name of the model; needed where there are several.",
                    "schema": {"type": "string", "minLength": 1, "maxLength": 128},
                },
                "jsonLength": _header(
                    "Inference-Header-Content-Length",
                    "Bytes of JSON at the body's start; the tensors' bytes follow.",
                    {"type": "integer", "minimum": 0},
                ),
                "priority": _header(
                    "Headstart-Priority",
                    "Larger goes first among what waits.",
                    {"type": "integer", "minimum": -100, "maximum": 100, "default": 0},
                ),
                "timeout": _header(
                    "Headstart-Timeout-Ms",
                    "After this many milliseconds the request is dropped with 504 if it still waits.",
                    {"type": "integer", "minimum": 1},
                ),
            },
            "responses": {
                status: {
                    "description": f"{what}; the sentence says what to do.",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
                for status, what in _REFUSALS.items()
            },
        },
        "security": [{}, {"token": []}],
    }


def _paths() -> dict[str, Any]:
    model = {"$ref": "#/components/parameters/model"}
    paths: dict[str, Any] = {
        "/": {"get": _operation("page", "A page to try a model with.", media="text/html")},
        "/openapi.json": {"get": _operation("openapi", "This document.", schema={"type": "object"})},
        "/metrics": {"get": _operation("metrics", "Prometheus' metrics.", media="text/plain")},
        "/v1/card": {
            "get": _operation("card", "What a model says.", "Card", parameters=[model], refusals=(400, *_MODEL))
        },
        "/v1/predict": {"post": _predict(model)},
        "/v2": {"get": _operation("serverMetadata", "The server's name, version and extensions.", "ServerMetadata")},
        "/v2/health/live": {"get": _health("live", "Whether the process works.", "Live")},
        "/v2/health/ready": {
            "get": _health("ready", "Whether requests are taken; refused packages change nothing.", "Ready")
        },
        "/v2/models/stats": {"get": _operation("allStatistics", "Statistics of all models.", "Statistics")},
        "/v2/repository/index": {"post": _index()},
    }
    for prefix, suffix in (("/v2/models/{name}", ""), ("/v2/models/{name}/versions/{version}", "Version")):
        words = ["name", "version"] if suffix else ["name"]
        references = [{"$ref": f"#/components/parameters/{word}"} for word in words]
        for path, operation in {
            prefix: {
                "get": _operation(
                    f"metadata{suffix}", "A model's inputs and outputs.", "ModelMetadata", refusals=_MODEL
                )
            },
            f"{prefix}/ready": {"get": _health(f"modelReady{suffix}", "Whether a model is ready.", "ModelReady")},
            f"{prefix}/config": {
                "get": _operation(
                    f"config{suffix}", "A model's configuration.", schema={"type": "object"}, refusals=_MODEL
                )
            },
            f"{prefix}/stats": {
                "get": _operation(f"statistics{suffix}", "Statistics of a model.", "Statistics", refusals=_MODEL)
            },
            f"{prefix}/infer": {"post": _infer(suffix)},
        }.items():
            paths[path] = {"parameters": references, **operation}
    for verb in ("load", "unload"):
        operation = _operation(f"{verb}Model", f"{verb.capitalize()} a model.", refusals=(400, *_MODEL))
        operation["requestBody"] = _body(f"{verb.capitalize()}Request", required=False)
        path = f"/v2/repository/models/{{name}}/{verb}"
        paths[path] = {"parameters": [{"$ref": "#/components/parameters/name"}], "post": operation}
    return paths


def _operation(
    name: str,
    summary: str,
    component: str | None = None,
    *,
    schema: dict[str, Any] | None = None,
    media: str = "application/json",
    parameters: list[dict[str, Any]] | None = None,
    refusals: tuple[int, ...] = (),
) -> dict[str, Any]:
    good: dict[str, Any] = {"description": summary}
    if component is not None:
        schema = {"$ref": f"#/components/schemas/{component}"}
    if schema is not None or media != "application/json":
        good["content"] = {media: {"schema": schema or {"type": "string"}}}
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": good, "default": {"$ref": "#/components/responses/Error"}},
    }
    for status in refusals:
        operation["responses"][str(status)] = {"$ref": f"#/components/responses/{status}"}
    if parameters:
        operation["parameters"] = parameters
    return operation


def _health(name: str, summary: str, component: str) -> dict[str, Any]:
    operation = _operation(name, summary, component)
    schema = {"anyOf": [{"$ref": f"#/components/schemas/{one}"} for one in (component, "Error")]}
    operation["responses"]["503"] = {"description": "Not now.", "content": {"application/json": {"schema": schema}}}
    return operation


def _infer(suffix: str) -> dict[str, Any]:
    parameters = [{"$ref": f"#/components/parameters/{one}"} for one in ("jsonLength", "priority", "timeout")]
    operation = _operation(f"infer{suffix}", "Run a model.", "InferResponse", parameters=parameters, refusals=_RUN)
    operation["description"] = (
        f"A model of images takes uint8 pixels, or in their place `{ENCODED}`: JPEG or PNG files as BYTES [N], of any "
        "sizes; in JSON, whose strings carry no bytes, each in base64."
    )
    binary = {"description": "JSON, then the tensors' bytes.", "type": "string", "format": "binary"}
    operation["requestBody"] = _body("InferRequest")
    operation["requestBody"]["content"]["application/json"]["examples"] = {
        name: {"value": {"inputs": [tensor]}} for name, tensor in _EXAMPLES.items()
    }
    operation["requestBody"]["content"]["application/octet-stream"] = {"schema": binary}
    operation["responses"]["200"]["content"]["application/octet-stream"] = {"schema": binary}
    return operation


def _predict(model: dict[str, Any]) -> dict[str, Any]:
    parameters = [model, *({"$ref": f"#/components/parameters/{one}"} for one in ("priority", "timeout"))]
    refusals = (*_RUN, 415)
    operation = _operation("predict", "Classify one image.", "Prediction", parameters=parameters, refusals=refusals)
    image = {"schema": {"type": "string", "format": "binary"}}
    form = {"type": "object", "properties": {"image": image["schema"]}, "required": ["image"], "maxProperties": 1}
    operation["requestBody"] = {
        "required": True,
        "content": {"image/jpeg": image, "image/png": image, "multipart/form-data": {"schema": form}},
    }
    return operation


def _index() -> dict[str, Any]:
    schema = {"type": "array", "items": {"$ref": "#/components/schemas/IndexRow"}}
    operation = _operation("repositoryIndex", "The models of the repository.", schema=schema, refusals=(400,))
    operation["requestBody"] = _body("IndexRequest", required=False)
    return operation


def _body(component: str, required: bool = True) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{component}"}
    return {"required": required, "content": {"application/json": {"schema": schema}}}


def _path_parameter(name: str, description: str) -> dict[str, Any]:
    schema = {"type": "string", "minLength": 1, "maxLength": 128}
    return {"name": name, "in": "path", "required": True, "description": description, "schema": schema}


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": schema}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _schemas() -> dict[str, Any]:
    text: dict[str, Any] = {"type": "string"}
    yes: dict[str, Any] = {"type": "boolean"}
    parameters = {"type": ["object", "null"], "additionalProperties": _SCALAR}
    datatype = {"type": "string", "enum": list(DATATYPES)}
    shape = _list({"type": "integer", "minimum": 0})
    data = {"description": "Elements in row-major order, flat or nested like the shape.", "type": "array"}
    described = _object({"name": text, "datatype": datatype, "shape": _list({"type": "integer", "minimum": -1})})
    tensor = {"name": _NAME, "datatype": datatype, "shape": shape}
    return {
        "Error": _object({"error": text}),
        "Live": _object({"live": yes}),
        "Ready": _object({"ready": yes}),
        "ModelReady": _object({"name": text, "ready": yes}),
        "ServerMetadata": _object({"name": text, "version": text, "extensions": _list(text)}),
        "ModelMetadata": _object(
            {"name": text, "platform": text, "inputs": _list(described), "outputs": _list(described)},
            {"versions": _list(text)},
        ),
        "Statistics": _object({"model_stats": _list({"type": "object"})}),
        "Card": {"type": "object", "properties": {"labels": {"type": ["array", "null"], "items": text}}},
        "IndexRequest": _object({}, {"ready": yes}),
        "IndexRow": _object({"name": text}, {"version": text, "state": text, "reason": text}),
        "LoadRequest": _object({}, {"parameters": {"type": ["object", "null"], "maxProperties": 0}}),
        "UnloadRequest": _object({}, {"parameters": parameters}),
        "InferRequest": _object(
            {"inputs": {**_list(_object(tensor, {"parameters": parameters, "data": data})), "minItems": 1}},
            {
                "id": {"type": "string", "maxLength": 1024},
                "parameters": parameters,
                "outputs": {**_list(_object({"name": _NAME}, {"parameters": parameters})), "type": ["array", "null"]},
            },
        ),
        "InferResponse": _object(
            {
                "model_name": text,
                "model_version": text,
                "outputs": _list(_object(tensor, {"parameters": parameters, "data": data})),
            },
            {"id": text, "parameters": parameters},
        ),
        "Prediction": _object(
            {
                "label": text,
                "probability": {"type": "number"},
                "probabilities": {"type": "object", "additionalProperties": {"type": "number"}},
            },
            {"model": text, "version": text},
        ),
    }
