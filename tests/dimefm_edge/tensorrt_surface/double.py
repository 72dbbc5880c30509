"""What a double of TensorRT answers: builds and runs that keep TensorRT's rules, as far as needed.

No engine is built or run here. "Building" packs the ONNX file with the batch sizes; "running"
asks ONNX Runtime for the file's answer, and copies it to where the engine's output should lie
when the (stand-in) stream comes to it. So buffers, shapes, order and files are proven; that
TensorRT builds these graphs, how fast they are and what it fuses is not.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from dimefm_edge.export.attention_patterns import find_attentions, node_name
from dimefm_kernels.tensorrt_plugin import PLUGIN_NAMESPACE
from tests.dimefm_edge.tensorrt_surface.plugin import Number, Symbol

_MAGIC = b"a double's engine\n"
_TIMINGS = b"a double's timings\n"
_LAYER_TYPES = {
    "MatMul": "MATRIX_MULTIPLY", "Gemm": "MATRIX_MULTIPLY", "Conv": "CONVOLUTION",
    "LayerNormalization": "NORMALIZATION", "Softmax": "SOFTMAX", "Shape": "SHAPE",
    "ReduceL2": "REDUCE", "Cast": "CAST",
}  # fmt: skip


class Double:
    """The answers; set an attribute to make something fail.

    Attributes:
        calls: What was called, in order, with its arguments.
        trt: The module, once it is made.
        driver: The stand-in for the CUDA driver.
    """

    def __init__(self, driver: Any) -> None:
        self.calls: list[str] = []
        self.trt: Any = None
        self.driver = driver
        self.parser_errors: list[tuple[str, str, str]] = []  # operator, node, description
        self.build_error = ""
        self.run_error = ""
        self.fuses_attention = True
        self.is_opaque = False
        self.num_dla_cores = 0
        self.plugin: Any = None
        self.launches: list[tuple[Any, ...]] = []  # what plugins answered a build
        self._kept: list[Any] = []

    # -------------------------------------------------------------------------- build

    def builder_init(self, this: Any, logger: Any) -> None:
        this.__dict__["_logger"] = logger

    def builder_num_dla_cores(self, this: Any) -> int:
        return self.num_dla_cores

    def builder_create_network(self, this: Any, flags: int = 0) -> Any:
        strong = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert flags in (0, strong)
        return self.trt._new("INetworkDefinition", is_strong=bool(flags), layers=[], logger=None)

    def builder_create_builder_config(self, this: Any) -> Any:
        return self.trt._new("IBuilderConfig", set_flags=[], profiles=[], cache=b"")

    def builder_create_optimization_profile(self, this: Any) -> Any:
        return self.trt._new("IOptimizationProfile", shapes={})

    def onnxparser_init(self, this: Any, network: Any, logger: Any) -> None:
        this.__dict__["_network"] = network

    def onnxparser_parse_from_file(self, this: Any, model: str) -> bool:
        if self.parser_errors:
            return False
        this._network.__dict__.update(_path=model, _layers=self._layers(onnx.load(model)))
        self._ask_plugins(onnx.load(model))
        return True

    def _ask_plugins(self, model: onnx.ModelProto) -> None:
        """As the parser and the builder do: a plugin comes before a function of its name."""
        shapes = {
            v.name: v.type.tensor_type
            for v in onnx.shape_inference.infer_shapes(model).graph.value_info
        }
        types = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF"}
        for node in model.graph.node:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            space = values.pop("plugin_namespace", b"").decode()
            assert values.pop("plugin_version", b"1") == b"1"
            registry = {} if self.plugin is None else self.plugin._lib.QDP_REGISTRY
            found = registry.get(f"{space}::{node.op_type}") if space else None
            if found is None:
                continue
            tensor = shapes[node.input[0]]
            batch, *others = (Number(d.dim_value) for d in tensor.shape.dim)
            sizes = (batch or Symbol("B"), *others)
            dtype = self.trt.DataType[types[tensor.elem_type]]
            given = self.plugin.TensorDesc(shape_expr=sizes, dtype=dtype)
            output = found.describe(given, **values)
            self.launches.append(found.implement(given, **values, outputs=(output,), tactic=0))

    def onnxparser_num_errors(self, this: Any) -> int:
        return len(self.parser_errors)

    def onnxparser_get_error(self, this: Any, index: int) -> Any:
        return self.trt._new("ParserError", error=self.parser_errors[index])

    def parsererror_node_operator(self, this: Any) -> str:
        return this._error[0]

    def parsererror_node_name(self, this: Any) -> str:
        return this._error[1]

    def parsererror_desc(self, this: Any) -> str:
        return this._error[2]

    def inetworkdefinition_num_inputs(self, this: Any) -> int:
        return len(onnx.load(this._path).graph.input)

    def inetworkdefinition_get_input(self, this: Any, index: int) -> Any:
        value = onnx.load(this._path).graph.input[index]
        dims = value.type.tensor_type.shape.dim
        shape = self._dims([d.dim_value or -1 for d in dims])
        return self.trt._new("ITensor", name=value.name, shape=shape)

    def inetworkdefinition_num_layers(self, this: Any) -> int:
        return len(this._layers)

    def inetworkdefinition_get_layer(self, this: Any, index: int) -> Any:
        return this._layers[index]

    def ilayer_get_output(self, this: Any, index: int) -> Any:
        kind = "INT64" if this._type is self.trt.LayerType.SHAPE else "FLOAT"
        return self.trt._new("ITensor", dtype=self.trt.DataType[kind])

    def ilayer_set_output_type(self, this: Any, index: int, dtype: Any) -> None:
        this.__dict__["_output_type"] = dtype

    def ioptimizationprofile_set_shape(self, this: Any, **shapes: Any) -> None:
        this._shapes[shapes.pop("input")] = [list(shapes[k]) for k in ("min", "opt", "max")]

    def ibuilderconfig_add_optimization_profile(self, this: Any, profile: Any) -> int:
        this._profiles.append(profile._shapes)
        return len(this._profiles) - 1

    def ibuilderconfig_set_flag(self, this: Any, flag: Any) -> None:
        this._set_flags.append(flag.name)

    def ibuilderconfig_create_timing_cache(self, this: Any, serialized_timing_cache: bytes) -> Any:
        return self.trt._new("ITimingCache", data=bytes(serialized_timing_cache))

    def ibuilderconfig_set_timing_cache(self, this: Any, cache: Any, ignore_mismatch: bool) -> bool:
        this.__dict__["_cache"] = cache._data
        return cache._data == b"" or cache._data.startswith(_TIMINGS)

    def ibuilderconfig_get_timing_cache(self, this: Any) -> Any:
        return self.trt._new("ITimingCache", data=this._cache or _TIMINGS)

    def itimingcache_serialize(self, this: Any) -> Any:
        return _HostMemory(this._data)

    def builder_build_serialized_network(self, this: Any, network: Any, config: Any) -> Any:
        if self.build_error:
            this._logger.log(self.trt.ILogger.Severity.ERROR, self.build_error)
            return None
        path = Path(network._path)
        facts = {
            "profiles": config._profiles,
            "flags": config._set_flags,
            "layers": self._engine_layers(onnx.load(path)),
        }
        return _HostMemory(_MAGIC + json.dumps(facts).encode() + b"\n" + path.read_bytes())

    # ------------------------------------------------------------------------ runtime

    def runtime_init(self, this: Any, logger: Any) -> None:
        this.__dict__["_logger"] = logger

    def runtime_deserialize_cuda_engine(self, this: Any, serialized_engine: bytes) -> Any:
        data = bytes(serialized_engine)
        if not data.startswith(_MAGIC):
            this._logger.log(self.trt.ILogger.Severity.ERROR, "the plan has a wrong magic tag")
            return None
        facts, _, graph = data.removeprefix(_MAGIC).partition(b"\n")
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        return self.trt._new("ICudaEngine", facts=json.loads(facts), session=session,
                             logger=this._logger)  # fmt: skip

    def icudaengine_num_io_tensors(self, this: Any) -> int:
        return len(_tensors(this._session))

    def icudaengine_get_tensor_name(self, this: Any, index: int) -> str:
        return list(_tensors(this._session))[index]

    def icudaengine_get_tensor_dtype(self, this: Any, name: str) -> Any:
        kinds = {"tensor(float)": "FLOAT", "tensor(uint8)": "UINT8"}
        return self.trt.DataType[kinds[_tensors(this._session)[name].type]]

    def icudaengine_get_tensor_shape(self, this: Any, name: str) -> Any:
        shape = _tensors(this._session)[name].shape
        return self._dims([size if isinstance(size, int) else -1 for size in shape])

    def icudaengine_get_tensor_profile_shape(self, this: Any, **at: Any) -> list[Any]:
        shapes = this._facts["profiles"][at["profile_index"]][at["name"]]
        return [self._dims(shape) for shape in shapes]

    def icudaengine_create_execution_context(self, this: Any, **_: Any) -> Any:
        return self.trt._new("IExecutionContext", engine=this, addresses={}, shapes={})

    def iexecutioncontext_set_input_shape(self, this: Any, name: str, shape: Any) -> bool:
        least, _, largest = this._engine._facts["profiles"][0][name]
        is_allowed = all(a <= n <= b for a, n, b in zip(least, shape, largest, strict=True))
        if is_allowed:
            this._shapes[name] = tuple(shape)
        return is_allowed

    def iexecutioncontext_set_tensor_address(self, this: Any, name: str, memory: int) -> bool:
        this._addresses[name] = memory
        return True

    def iexecutioncontext_execute_async_v3(self, this: Any, stream_handle: int) -> bool:
        if self.run_error or set(this._addresses) != set(_tensors(this._engine._session)):
            severity = self.trt.ILogger.Severity.ERROR
            this._engine._logger.log(severity, self.run_error or "a tensor has no address")
            return False
        call = ctypes.CFUNCTYPE(None, ctypes.c_long)(self._runner(this, dict(this._shapes)))
        self._kept.append(call)
        self.driver.fake_enqueue(ctypes.c_void_p(stream_handle), call, 0)
        return True

    def _runner(self, context: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
        def run(_: int) -> None:
            session = context._engine._session
            (name, shape), (output,) = *shapes.items(), session.get_outputs()
            is_pixels = "uint8" in session.get_inputs()[0].type
            dtype = np.uint8 if is_pixels else np.float32
            image = _at(context._addresses[name], shape, dtype)
            (embeds,) = session.run([output.name], {name: image.copy()})
            _at(context._addresses[output.name], embeds.shape)[:] = embeds
            profiler = context.__dict__.get("_profiler")
            if profiler is not None:
                for layer in context._engine._facts["layers"]:
                    profiler.report_layer_time(layer["Name"], 0.25)

        return run

    def icudaengine_create_engine_inspector(self, this: Any) -> Any:
        return self.trt._new("EngineInspector", facts=this._facts)

    def engineinspector_get_engine_information(self, this: Any, format: Any) -> str:
        assert format is self.trt.LayerInformationFormat.JSON
        is_11 = self.trt.__version__.startswith("11")
        tensors = {"I/O Tensors": [{"Name": "image"}]} if is_11 else {"Bindings": ["image"]}
        return json.dumps({"Layers": this._facts["layers"], **tensors})

    # ------------------------------------------------------------------------- layers

    def _layers(self, model: onnx.ModelProto) -> list[Any]:
        types = self.trt.LayerType
        return [
            self.trt._new("ILayer", name=node_name(n), num_outputs=1,
                          type=types[_LAYER_TYPES.get(n.op_type, "ELEMENTWISE")])
            for n in model.graph.node
        ]  # fmt: skip

    def _engine_layers(self, model: onnx.ModelProto) -> list[dict[str, Any]]:
        """As the inspector's pages show them; attentions as in NVIDIA/TensorRT issue 3243."""
        if self.is_opaque:
            return [{"Name": "{ForeignNode[conv...div]}", "LayerType": "Myelin"}]
        matches = find_attentions(model) if self.fuses_attention else []
        matches = [match for match in matches if match.form != "plugin"]
        inside = {name for match in matches for name in match.nodes}
        layers = [
            self._layer(f"_gemm_mha_v2_myl0_{i}", "kgen", "_gemm_mha_v2_0x9f3c", match.nodes)
            for i, match in enumerate(matches)
        ]
        outside = [n for n in model.graph.node if node_name(n) not in inside]
        layers += [
            self._layer(node_name(n), "PluginV3", "", [node_name(n)])
            for n in outside if self.launches and n.domain == PLUGIN_NAMESPACE
        ]  # fmt: skip
        return layers + [
            self._layer(node_name(n), "gemm" if "MatMul" in n.op_type else "kgen", "sm80_xmma",
                        [node_name(n)])
            for n in outside if n.domain != PLUGIN_NAMESPACE
        ]  # fmt: skip

    def _layer(self, name: str, kind: str, tactic: str, nodes: Any) -> dict[str, Any]:
        key = "Datatype" if self.trt.__version__.startswith("11") else "Format/Datatype"
        return {
            "Name": name,
            "LayerType": kind,
            "Inputs": [{"Name": "in", key: "Half"}],
            "Outputs": [{"Name": "out", key: "Half"}],
            "TacticName": tactic,
            "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
        }

    def _dims(self, sizes: list[int]) -> Any:
        made = self.trt.Dims(sizes)
        made.__dict__["_sizes"] = list(sizes)
        return made

    def dims_len(self, this: Any) -> int:
        return len(this._sizes)

    def dims_getitem(self, this: Any, arg0: Any) -> Any:
        found = this._sizes[arg0]
        return tuple(found) if isinstance(arg0, slice) else found


class _HostMemory(bytes):
    """IHostMemory: bytes that a build gives back."""


def _tensors(session: Any) -> dict[str, Any]:
    return {value.name: value for value in [*session.get_inputs(), *session.get_outputs()]}


def _at(address: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_byte * size).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)
