"""What the installed onnxruntime makes of quantized patterns, so that a change with an upgrade is noticed.

The exporter rests on these: which patterns become integer kernels, which are computed in float, which are refused.
Models are made by hand; the onnx reference evaluator is the witness of values. Seen with onnxruntime 1.32.0.
"""

import numpy as np
import onnx
import onnxruntime
import pytest
from ml_dtypes import float4_e2m1fn, float8_e4m3fn, int2, int4, uint2, uint4
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

TYPES = {
    **{"int8": np.int8, "uint8": np.uint8, "int16": np.int16, "uint16": np.uint16, "int32": np.int32},
    **{"int4": int4, "uint4": uint4, "int2": int2, "uint2": uint2, "fp8": float8_e4m3fn, "fp4": float4_e2m1fn},
}
RANGES = {"int4": (-8, 8), "uint4": (0, 16), "int2": (-2, 2), "uint2": (0, 4), "uint8": (0, 256), "uint16": (0, 999)}
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderOutput", "ReorderInput")
UNFUSED = ("session.disable_quant_qdq", "1")
EXACT = ("session.qdq_matmulnbits_accuracy_level", "0")
STEP = 0.05
"""Of quantized outputs; small enough for the fewest bits to show something."""

ROWS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0, "MatMul": 1}
"""The axis of output channels in each operator's weight."""


def codes(shape, kind):
    low, high = RANGES.get(kind, (-4, 5) if kind.startswith("fp") else (-99, 100))
    return np.random.default_rng(0).integers(low, high, shape).astype(np.float32).astype(TYPES[kind])


class Builder:
    """Nodes and initialisers of a small model with one input `x` and one output `y`."""

    def __init__(self):
        self.nodes, self.constants = [], {}

    def node(self, kind, inputs, output, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def quantized(self, name, kind, scale, as_name):
        """Quantize and dequantize a tensor."""
        self.constants |= {
            f"{as_name}.s": np.float32(scale),
            f"{as_name}.z": np.zeros((), np.int64).astype(TYPES[kind]),
        }
        grid = [f"{as_name}.s", f"{as_name}.z"]
        self.node("QuantizeLinear", [name, *grid], f"{as_name}.q")
        return self.node("DequantizeLinear", [f"{as_name}.q", *grid], as_name)

    def weight(self, shape, kind, axis, sharing, zero=True, block=None):
        """Dequantize a constant with one scale, one for each channel, or one for each block along another axis."""
        value, attributes, scales = codes(shape, kind), {}, np.float32(0.1)
        if sharing == "channel":
            scales, attributes = np.linspace(0.05, 0.1, shape[axis], dtype=np.float32), {"axis": axis}
        elif sharing == "block":
            other = 1 if axis == 0 else 0
            blocks = [n // block if i == other else n for i, n in enumerate(shape)]
            scales, attributes = np.full(blocks, 0.1, np.float32), {"axis": other, "block_size": block}
        self.constants |= {"w": value, "w.s": scales}
        if zero:
            self.constants["w.z"] = np.zeros(np.shape(scales)).astype(value.dtype)
        return self.node("DequantizeLinear", ["w", "w.s", *(["w.z"] if zero else [])], "w.real", **attributes)

    def model(self, before, after, opset=25):
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", before), ("y", after))]
        held = [numpy_helper.from_array(np.asarray(v), k) for k, v in self.constants.items()]
        opsets = [helper.make_opsetid("", opset)]
        graph = helper.make_graph(self.nodes, "g", ends[:1], ends[1:], held)
        made = helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
        onnx.checker.check_model(made, full_check=True)
        return made


def product(kind, *, sharing="tensor", zero=False):
    """A float input times a dequantized weight [64, 32]."""
    to = Builder()
    to.node("MatMul", ["x", to.weight([64, 32], kind, 1, sharing, zero, block=32)], "y")
    return to.model([2, 64], [2, 32])


def static(operator, weight="int8", activation="uint8", *, sharing="tensor", out=True, zero=True, bias=None, groups=1):
    """Quantized input, quantized weight, and (`out`) quantized output."""
    shapes = {"Conv": [8, 8 // groups, 3, 3], "ConvTranspose": [8, 8, 3, 3], "Gemm": [32, 64], "MatMul": [64, 32]}
    before = [1, 8, 6, 6] if "Conv" in operator else [2, 64]
    after = {"Conv": [1, 8, 4, 4], "ConvTranspose": [1, 8, 8, 8]}.get(operator, [2, 32])
    to, attributes = Builder(), {"Gemm": {"transB": 1}, "Conv": {"group": groups}}.get(operator, {})
    block = 4 if "Conv" in operator else 32
    inputs = [to.quantized("x", activation, 0.05, "a")]
    inputs.append(to.weight(shapes[operator], weight, ROWS[operator], sharing, zero, block))
    if bias == "float":
        to.constants["b"] = np.linspace(-1, 1, after[1], dtype=np.float32)
        inputs.append("b")
    elif bias:  # `fine`: in a finer unit than that of the sums
        unit = np.float32(0.05 if bias == "int32" else 0.05 / 32) * to.constants["w.s"]
        to.constants |= {"b": np.arange(after[1], dtype=np.int32), "b.s": unit}
        inputs.append(to.node("DequantizeLinear", ["b", "b.s"], "b.real", axis=0))
    to.node(operator, inputs, "y.real", **attributes)
    to.node("Identity", [to.quantized("y.real", activation, STEP, "o") if out else "y.real"], "y")
    return to.model(before, after)


class Outcome:
    """What a session runs, gives, and how far that is from the reference evaluator, of the largest value."""

    def __init__(self, model, tmp_path, *entries):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        for entry in entries:
            options.add_session_config_entry(*entry)
        shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
        feed = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
        made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
        self.kernels = [kind for kind in kinds if kind not in CONVERSIONS]
        self.value, (expected,) = made.run(None, feed)[0], ReferenceEvaluator(model).run(None, feed)
        assert np.abs(expected).max() > 0, "zeros equal to zeros prove nothing"
        self.off = np.abs(self.value - expected).max() / np.abs(expected).max()
        self.steps = round(float(np.abs(self.value - expected).max() / STEP), 3)


class TestWeightOnly:
    """A float input: products with packed weights become MatMulNBits, all else is dequantized."""

    @pytest.mark.parametrize("sharing", ["tensor", "channel", "block"])
    @pytest.mark.parametrize("kind", ["int8", "uint8", "int4", "uint4", "int2", "uint2"])
    def test_packed_products_are_fused(self, tmp_path, kind, sharing):
        """Trap: by default their input is quantized once more, which no one asked for."""
        model = product(kind, sharing=sharing)
        exact, default = Outcome(model, tmp_path, EXACT), Outcome(model, tmp_path)
        assert exact.kernels == default.kernels == ["MatMulNBits"]
        assert exact.off < 1e-5 and 1e-4 < default.off < 0.05

    @pytest.mark.parametrize("kind", ["int16", "uint16", "int32", "fp8"])
    def test_others_are_dequantized(self, tmp_path, kind):
        outcome = Outcome(product(kind, sharing="channel"), tmp_path)
        assert outcome.kernels == ["MatMul"] and outcome.off < 1e-6

    def test_fp4_has_no_kernel(self, tmp_path):
        with pytest.raises(Exception, match="Could not find an implementation for DequantizeLinear"):
            Outcome(product("fp4"), tmp_path)

    @pytest.mark.parametrize("kind", ["int8", "int4", "int2", "fp8"])
    def test_convolutions_are_computed_in_float(self, tmp_path, kind):
        to = Builder()
        to.node("Conv", ["x", to.weight([8, 8, 3, 3], kind, 0, "channel")], "y")
        outcome = Outcome(to.model([1, 8, 6, 6], [1, 8, 4, 4]), tmp_path)
        assert outcome.kernels == ["Conv"] and outcome.off < 1e-5


class TestStatic:
    """Quantized inputs, weights and outputs."""

    @pytest.mark.parametrize("bias", [None, "float", "int32"])
    @pytest.mark.parametrize("groups", [1, 8])
    @pytest.mark.parametrize("sharing", ["tensor", "channel"])
    @pytest.mark.parametrize("activation", ["uint8", "int8"])
    def test_convolutions_are_fused(self, tmp_path, activation, sharing, groups, bias):
        outcome = Outcome(static("Conv", "int8", activation, sharing=sharing, groups=groups, bias=bias), tmp_path)
        assert outcome.kernels == ["QLinearConv"] and outcome.steps <= 1

    @pytest.mark.parametrize(
        ("operator", "options", "kernel"),
        [
            ("Conv", {"zero": False}, "QLinearConv"),
            ("Conv", {"out": False}, "Conv"),
            ("MatMul", {}, "QLinearMatMul"),
            ("MatMul", {"sharing": "channel"}, "QLinearMatMul"),
            ("MatMul", {"zero": False}, "QLinearMatMul"),
            ("MatMul", {"out": False}, "MatMulIntegerToFloat"),
            ("MatMul", {"sharing": "block"}, "MatMul"),
            ("Gemm", {}, "QGemm"),
            ("Gemm", {"sharing": "channel"}, "QGemm"),
            ("Gemm", {"out": False}, "QGemm"),
            ("Gemm", {"zero": False}, "Gemm"),  # why the writer gives every weight its zero-points
            ("Gemm", {"sharing": "block"}, "Gemm"),
            ("ConvTranspose", {}, "ConvTranspose"),
        ],
    )
    def test_eight_bits(self, tmp_path, operator, options, kernel):
        outcome = Outcome(static(operator, **options), tmp_path)
        assert outcome.kernels == [kernel] and outcome.steps <= 1

    @pytest.mark.parametrize(("weight", "activation"), [("int4", "uint8"), ("fp8", "uint8"), ("int8", "uint16")])
    @pytest.mark.parametrize("operator", ["Conv", "MatMul", "Gemm", "ConvTranspose"])
    def test_other_types_are_computed_in_float(self, tmp_path, operator, weight, activation):
        """Except a product with 16-bit activations, which is caught by the fusion for packed weights."""
        caught = operator == "MatMul" and activation == "uint16"
        outcome = Outcome(static(operator, weight, activation, sharing="tensor"), tmp_path, EXACT)
        assert outcome.kernels == ["MatMulNBits" if caught else operator] and outcome.steps <= 1


class TestKnownFailures:
    """Faults that the exporter works around. When one of these fails, the runtime has been repaired: use it."""

    REFUSED = "Type .tensor.u?int[24].. of input parameter"

    @pytest.mark.parametrize(
        ("operator", "weight", "activation"),
        [
            *((operator, "int2", "uint8") for operator in ("Conv", "MatMul", "Gemm")),
            *((operator, "int8", "uint2") for operator in ("Conv", "MatMul", "Gemm")),
            ("Conv", "int8", "uint4"),
        ],
    )
    def test_narrow_types_are_fused_into_kernels_that_refuse_them(self, tmp_path, operator, weight, activation):
        model = static(operator, weight, activation)
        with pytest.raises(Exception, match=self.REFUSED):
            Outcome(model, tmp_path)
        outcome = Outcome(model, tmp_path, UNFUSED)
        assert outcome.kernels == [operator] and outcome.steps <= 1

    def test_two_bit_weights_with_a_finer_bias_are_not_fused(self, tmp_path):
        """Which is why packed files with 2 bits load where every layer has a bias: the writer holds it finely."""
        outcome = Outcome(static("Conv", "int2", sharing="channel", bias="fine"), tmp_path)
        assert outcome.kernels == ["Conv"] and outcome.steps <= 1
        for bias in (None, "float", "int32"):
            with pytest.raises(Exception, match=self.REFUSED):
                Outcome(static("Conv", "int2", sharing="channel", bias=bias), tmp_path)

    def test_blocks_of_a_convolution_are_ignored_by_the_fusion(self, tmp_path):
        model = static("Conv", "int8", sharing="block")
        with pytest.raises(Exception, match="QLinearConv"):
            Outcome(model, tmp_path)
        outcome = Outcome(model, tmp_path, UNFUSED)
        assert outcome.kernels == ["Conv"] and outcome.steps <= 1


class TestOtherOperators:
    @pytest.mark.parametrize("first", ["uint8", "int8"])
    @pytest.mark.parametrize("second", ["uint8", "int8"])
    @pytest.mark.parametrize("operator", ["MatMulInteger", "ConvInteger"])
    def test_integer_products_are_exact(self, tmp_path, operator, first, second):
        to = Builder()
        shape, weight = ([2, 64], [64, 32]) if operator == "MatMulInteger" else ([1, 8, 6, 6], [8, 8, 3, 3])
        after = [2, 32] if operator == "MatMulInteger" else [1, 8, 4, 4]
        to.constants |= {"s": np.float32(0.05), "z": np.zeros((), TYPES[first]), "w": codes(weight, second)}
        to.constants["wz"] = np.zeros((), TYPES[second])
        to.node("QuantizeLinear", ["x", "s", "z"], "q")
        to.node(operator, ["q", "w", "z", "wz"], "sum")
        to.node("Cast", ["sum"], "y", to=TensorProto.FLOAT)
        outcome = Outcome(to.model(shape, after), tmp_path)
        assert operator in outcome.kernels and outcome.off == 0.0

    def test_dynamic_quantization_is_one_kernel(self, tmp_path):
        to = Builder()
        to.constants |= {"w": codes([64, 32], "int8"), "wz": np.zeros((), np.int8), "ws": np.float32(0.1)}
        to.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]))
        to.node("MatMulInteger", ["q", "w", "z", "wz"], "sum")
        to.node("Cast", ["sum"], "real", to=TensorProto.FLOAT)
        to.node("Mul", ["s", "ws"], "unit")
        to.node("Mul", ["real", "unit"], "y")
        outcome = Outcome(to.model([2, 64], [2, 32]), tmp_path)
        assert outcome.kernels == ["DynamicQuantizeMatMul"] and outcome.off < 0.02

    @pytest.mark.parametrize(
        ("bits", "block", "runs"), [(2, 32, True), (4, 16, True), (8, 256, True), (3, 32, False), (4, 8, False)]
    )
    def test_packed_products_exist_for_few_widths(self, tmp_path, bits, block, runs):
        size = 256
        held = {"w": np.zeros((8, size // block, block * bits // 8), np.uint8)}
        held["s"] = np.ones(8 * (size // block), np.float32)
        options = {"K": size, "N": 8, "bits": bits, "block_size": block, "domain": "com.microsoft"}
        node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], **options)
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, s]) for n, s in (("x", size), ("y", 8))]
        constants = [numpy_helper.from_array(v, k) for k, v in held.items()]
        graph = helper.make_graph([node], "g", ends[:1], ends[1:], constants)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        content = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        if runs:
            made = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
            value = made.run(None, {"x": np.ones((1, size), np.float32)})[0]
            assert np.array_equal(value, np.full((1, 8), -size * (1 << (bits - 1)), np.float32))
        else:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            with pytest.raises(Exception, match=r"MatMulNBits|bits|block"):
                onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
