"""ONNX models for timing: whole models exported once and re-cut for every policy, single operations built by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.tracing.copies import float_tensors
from autoprune.tracing.eval_mode import without_cache
from autoprune.tracing.inputs import arguments, batch_size, call_model
from autoprune.tracing.onnx_int8 import as_stored
from autoprune.tracing.quiet import quiet
from autoprune.tracing.stand_ins import StandIn

TOLERANCE = 1e-3
"""Largest relative difference of a re-cut model's output from the eager one."""
FLAT = "autoprune_batch_and_features"


class OnnxFamily:
    """The dense model and its slim copies. Exporting takes seconds, so the dense graph is re-cut where that works.

    Re-cutting puts the slim tensors in place of the dense ones of the same name. It is believed only where the outputs
    are those of the slim model; any other model is exported anew.
    """

    def __init__(self, dense: nn.Module, inputs: Sequence[Any]) -> None:
        self.dense, self.inputs = dense, inputs
        self._graph: bytes | None = None

    def load(self, model: nn.Module, threads: int = 1) -> Callable[[], object]:
        """What runs `model` (the dense one or a slim copy) in a session of so many threads."""
        if model is not self.dense and self._graph is not None:
            run = self._recut(model, self._graph, threads)
            if run is not None:
                return run
        graph = exported(model, self.inputs)
        if model is self.dense:
            self._graph = graph
        return session_runner(self._stored(optimised(graph)), self.inputs, threads)

    def _stored(self, graph: bytes) -> bytes:
        """The graph with 8-bit products where 8 bits hold the weights, as in the file that `apply --int8` writes."""
        return as_stored(graph, feeds_of(self.inputs))

    def _recut(self, model: nn.Module, graph: bytes, threads: int) -> Callable[[], list[Any]] | None:
        if any(isinstance(module, StandIn) for module in model.modules()):
            return None  # the graph would keep what its blocks were made of
        with torch.no_grad():
            wanted = float_tensors(call_model(model, tuple(self.inputs)))[0]
        try:
            cut = optimised(recut(graph, model, batch_size(self.inputs)))
            run = session_runner(cut, self.inputs, threads)
            got = torch.from_numpy(run()[0])
        except Exception:  # a graph with a size baked in does not load or run, in many ways
            return None
        alike = got.shape == wanted.shape and bool((got - wanted).norm() <= TOLERANCE * wanted.norm())
        if not alike:
            return None
        stored = self._stored(cut)
        return run if stored is cut else session_runner(stored, self.inputs, threads)


def recut(graph: bytes, model: nn.Module, batch: int) -> bytes:
    """The exported graph with the tensors of `model` in place of those of the same name.

    Convs get its numbers of conv groups, and what is flattened to [batch, features] may have any number of features.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.load_from_string(graph)
    tensors = {name: t.detach().contiguous().numpy() for name, t in model.state_dict().items()}
    groups = {f"{n}.weight": m.groups for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    for constant in proto.graph.initializer:
        if constant.name in tensors:
            constant.CopyFrom(numpy_helper.from_array(tensors[constant.name], constant.name))
    flat = {node.output[0] for node in proto.graph.node if node.op_type == "Concat" and len(node.input) == 2}
    proto.graph.initializer.append(numpy_helper.from_array(np.array([batch, -1]), FLAT))
    for node in proto.graph.node:
        if node.op_type == "Reshape" and node.input[1] in flat:
            node.input[1] = FLAT
        for attribute in node.attribute:
            if node.op_type in ("Conv", "ConvTranspose") and attribute.name == "group":
                attribute.i = groups.get(node.input[1], attribute.i)
    del proto.graph.value_info[:]  # the shapes between are those of the dense model
    return bytes(proto.SerializeToString())


def exported(model: nn.Module, inputs: Sequence[Any]) -> bytes:
    """The model as ONNX for the batch size of `inputs`, its tensors by their own names: not optimised yet."""
    positional, keywords = arguments(model, tuple(inputs))
    taken = (*positional, {}) if positional and isinstance(positional[-1], dict) else positional  # else: keywords
    with quiet(), torch.no_grad(), without_cache(model):
        program = torch.onnx.export(model, taken, kwargs=keywords, dynamo=True, verbose=False, optimize=False)
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def optimised(graph: bytes) -> bytes:
    """The graph as `autoprune.exports` writes it: constants and batch norms folded (without, it runs half as fast)."""
    import onnx
    from onnxscript import optimizer

    with quiet():
        return bytes(optimizer.optimize(onnx.load_from_string(graph)).SerializeToString())


def session_runner(model: bytes, inputs: Sequence[Any], threads: int = 1) -> Callable[[], list[Any]]:
    """A session of so many threads and its feeds: the tensors in `inputs`, in order."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {spec.name: x for spec, x in zip(session.get_inputs(), feeds_of(inputs), strict=True)}

    def run() -> list[Any]:
        return list(session.run(None, feeds))

    return run


def feeds_of(inputs: Sequence[Any]) -> list[Any]:
    """The tensors in `inputs`, in order, as arrays."""
    return [x.contiguous().numpy() for x in tree_leaves(tuple(inputs)) if isinstance(x, Tensor)]


def operation(module: nn.Module, x: Tensor) -> bytes:
    """One conv or linear as an ONNX model; built here, since exporting thousands of them takes an hour."""
    from onnx import TensorProto, helper, numpy_helper

    weight, bias = module.get_parameter("weight").detach().cpu(), module._parameters.get("bias")
    linear = isinstance(module, nn.Linear)
    constants = [numpy_helper.from_array((weight.T if linear else weight).contiguous().numpy(), "w")]
    if bias is not None:
        constants.append(numpy_helper.from_array(bias.detach().cpu().numpy(), "b"))
    names = [c.name for c in constants]
    if linear:
        gemm = x.dim() == 2
        nodes = [helper.make_node("Gemm" if gemm else "MatMul", ["x", *(names if gemm else names[:1])], ["y"])]
        if bias is not None and not gemm:
            nodes[0].output[0] = "product"
            nodes.append(helper.make_node("Add", ["product", "b"], ["y"]))
    else:
        nodes = [helper.make_node(_onnx_name(module), ["x", *names], ["y"], **_onnx_attributes(module))]
    graph = helper.make_graph(
        nodes,
        "operation",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _onnx_name(module: nn.Module) -> str:
    return "ConvTranspose" if getattr(module, "transposed", False) else "Conv"


def _onnx_attributes(module: nn.Module) -> dict[str, Any]:
    assert isinstance(module, nn.modules.conv._ConvNd)
    attributes: dict[str, Any] = {
        "strides": list(module.stride),
        "dilations": list(module.dilation),
        "group": module.groups,
    }
    if isinstance(module.padding, str):
        attributes["auto_pad"] = "SAME_UPPER" if module.padding == "same" else "VALID"
    else:
        attributes["pads"] = [*module.padding, *module.padding]
    if module.transposed:
        attributes["output_padding"] = list(module.output_padding)
    return attributes
