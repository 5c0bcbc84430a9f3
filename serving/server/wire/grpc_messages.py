"""The messages of `inference.GRPCInferenceService`, the Open Inference Protocol over gRPC as Triton numbers it.

They are built from the tables below and live in a descriptor pool of their own, so that a process that also
imports a client with its generated `grpc_service.proto` has no clash of names.

    request = MESSAGES["ModelReadyRequest"].FromString(data)
    MESSAGES["ModelReadyResponse"](ready=True).SerializeToString()

A field is `name:type=number`. `*` before a type is repeated; `map.TYPE` is a map with string keys; a name that
ends in `!` belongs to the message's oneof. Scalars are proto3's; other types are the tables' own.
Fields that a client may send and the server has no use for are left out: protobuf skips what it does not know.
"""

from typing import Any

# Neither publishes types; the stubs from other hands lag behind them.
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

_ENUMS: dict[str, str] = {
    "DataType": "TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 TYPE_INT32 "
    "TYPE_INT64 TYPE_FP16 TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16",
    "ModelInstanceGroup.Kind": "KIND_AUTO KIND_GPU KIND_CPU KIND_MODEL",
}
"""Values in the order of their numbers, from 0 on."""

_NAMED = "name:string=1 version:string=2"
_OUTCOMES = "success fail queue compute_input compute_infer compute_output cache_hit cache_miss"

_MESSAGES: dict[str, str] = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live:bool=1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready:bool=1",
    "ModelReadyRequest": _NAMED,
    "ModelReadyResponse": "ready:bool=1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": f"{_NAMED} extensions:*string=3",
    "ModelMetadataRequest": _NAMED,
    "ModelMetadataResponse": "name:string=1 versions:*string=2 platform:string=3 "
    "inputs:*ModelMetadataResponse.TensorMetadata=4 outputs:*ModelMetadataResponse.TensorMetadata=5",
    "ModelMetadataResponse.TensorMetadata": "name:string=1 datatype:string=2 shape:*int64=3",
    "InferParameter": "bool_param!:bool=1 int64_param!:int64=2 string_param!:string=3 double_param!:double=4 "
    "uint64_param!:uint64=5",
    "InferTensorContents": "bool_contents:*bool=1 int_contents:*int32=2 int64_contents:*int64=3 "
    "uint_contents:*uint32=4 uint64_contents:*uint64=5 fp32_contents:*float=6 fp64_contents:*double=7 "
    "bytes_contents:*bytes=8",
    "ModelInferRequest": "model_name:string=1 model_version:string=2 id:string=3 parameters:map.InferParameter=4 "
    "inputs:*ModelInferRequest.InferInputTensor=5 outputs:*ModelInferRequest.InferRequestedOutputTensor=6 "
    "raw_input_contents:*bytes=7",
    "ModelInferRequest.InferInputTensor": "name:string=1 datatype:string=2 shape:*int64=3 "
    "parameters:map.InferParameter=4 contents:InferTensorContents=5",
    "ModelInferRequest.InferRequestedOutputTensor": "name:string=1 parameters:map.InferParameter=2",
    "ModelInferResponse": "model_name:string=1 model_version:string=2 id:string=3 parameters:map.InferParameter=4 "
    "outputs:*ModelInferResponse.InferOutputTensor=5 raw_output_contents:*bytes=6",
    "ModelInferResponse.InferOutputTensor": "name:string=1 datatype:string=2 shape:*int64=3 "
    "parameters:map.InferParameter=4 contents:InferTensorContents=5",
    "ModelStreamInferResponse": "error_message:string=1 infer_response:ModelInferResponse=2",
    "ModelConfigRequest": _NAMED,
    "ModelConfigResponse": "config:ModelConfig=1",
    "ModelConfig": "name:string=1 platform:string=2 version_policy:ModelVersionPolicy=3 max_batch_size:int32=4 "
    "input:*ModelInput=5 output:*ModelOutput=6 instance_group:*ModelInstanceGroup=7 default_model_filename:string=8 "
    "dynamic_batching!:ModelDynamicBatching=11 parameters:map.ModelParameter=14 backend:string=17",
    "ModelVersionPolicy": "latest!:ModelVersionPolicy.Latest=1 specific!:ModelVersionPolicy.Specific=3",
    "ModelVersionPolicy.Latest": "num_versions:uint32=1",
    "ModelVersionPolicy.Specific": "versions:*int64=1",
    "ModelInput": "name:string=1 data_type:DataType=2 dims:*int64=4 optional:bool=8",
    "ModelOutput": "name:string=1 data_type:DataType=2 dims:*int64=3",
    "ModelInstanceGroup": "name:string=1 count:int32=2 kind:ModelInstanceGroup.Kind=4",
    "ModelDynamicBatching": "preferred_batch_size:*int32=1 max_queue_delay_microseconds:uint64=2",
    "ModelParameter": "string_value:string=1",
    "ModelStatisticsRequest": _NAMED,
    "ModelStatisticsResponse": "model_stats:*ModelStatistics=1",
    "ModelStatistics": f"{_NAMED} last_inference:uint64=3 inference_count:uint64=4 execution_count:uint64=5 "
    "inference_stats:InferStatistics=6 batch_stats:*InferBatchStatistics=7 memory_usage:*MemoryUsage=8",
    "MemoryUsage": "type:string=1 id:int64=2 byte_size:uint64=3",
    "StatisticDuration": "count:uint64=1 ns:uint64=2",
    "InferStatistics": " ".join(f"{name}:StatisticDuration={n}" for n, name in enumerate(_OUTCOMES.split(), 1)),
    "InferBatchStatistics": "batch_size:uint64=1 compute_input:StatisticDuration=2 compute_infer:StatisticDuration=3 "
    "compute_output:StatisticDuration=4",
    "ModelRepositoryParameter": "bool_param!:bool=1 int64_param!:int64=2 string_param!:string=3 bytes_param!:bytes=4",
    "RepositoryIndexRequest": "repository_name:string=1 ready:bool=2",
    "RepositoryIndexResponse": "models:*RepositoryIndexResponse.ModelIndex=1",
    "RepositoryIndexResponse.ModelIndex": "name:string=1 version:string=2 state:string=3 reason:string=4",
    "RepositoryModelLoadRequest": "repository_name:string=1 model_name:string=2 "
    "parameters:map.ModelRepositoryParameter=3",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": "repository_name:string=1 model_name:string=2 "
    "parameters:map.ModelRepositoryParameter=3",
    "RepositoryModelUnloadResponse": "",
}
"""Fields by message, as they were read from NVIDIA's grpc_service.proto and model_config.proto."""

_ONEOFS = {"ModelConfig": "scheduling_choice", "ModelVersionPolicy": "policy_choice"}
_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    name: getattr(_FIELD, f"TYPE_{name.upper()}")
    for name in ("bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes")
}


def _describe() -> Any:
    """The tables as a FileDescriptorProto."""
    file = descriptor_pb2.FileDescriptorProto(name="headstart/inference.proto", package=PACKAGE, syntax="proto3")
    described: dict[str, Any] = {}
    for path, fields in _MESSAGES.items():
        outer, _, name = path.rpartition(".")
        message = (described[outer].nested_type if outer else file.message_type).add(name=name)
        described[path] = message
        for field in fields.split():
            _add_field(message, path, field)
    for path, values in _ENUMS.items():
        outer, _, name = path.rpartition(".")
        enum = (described[outer].enum_type if outer else file.enum_type).add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=value, number=number)
    return file


def _add_field(message: Any, path: str, text: str) -> None:
    name, _, rest = text.partition(":")
    kind, _, number = rest.partition("=")
    field = message.field.add(name=name.rstrip("!"), number=int(number), label=_FIELD.LABEL_OPTIONAL)
    if name.endswith("!"):
        if not message.oneof_decl:
            message.oneof_decl.add(name=_ONEOFS.get(path, "parameter_choice"))
        field.oneof_index = 0
    if kind.startswith("map."):
        entry_name = f"{name.title().replace('_', '')}Entry"
        entry = message.nested_type.add(name=entry_name)
        entry.options.map_entry = True
        _add_field(entry, "", "key:string=1")
        _add_field(entry, "", f"value:{kind.removeprefix('map.')}=2")
        kind = f"*{path}.{entry_name}"
    if kind.startswith("*"):
        field.label = _FIELD.LABEL_REPEATED
        kind = kind.removeprefix("*")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _FIELD.TYPE_ENUM if kind in _ENUMS else _FIELD.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"


def _classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_describe())
    return {
        path: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{path}")) for path in _MESSAGES
    }


MESSAGES: dict[str, Any] = _classes()
"""protobuf's classes by the messages' names; those of nested ones have a dot."""
