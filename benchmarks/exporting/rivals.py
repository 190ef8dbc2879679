"""The files that ours is measured beside: torch's own export in float, and onnxruntime's static quantization of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

OPSET = 17


@contextmanager
def _quietly() -> Iterator[None]:
    """Both tools warn of their own parts."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def float_file(model: nn.Module, example: Tensor, path: Path) -> Path:
    """torch.onnx.export of the float network, simplified by onnxruntime's pre-processing for quantization."""
    import torch
    from onnxruntime.quantization.shape_inference import quant_pre_process

    raw, axes = path.with_suffix(".raw.onnx"), {"x": {0: "n"}, "logits": {0: "n"}}
    names = {"input_names": ["x"], "output_names": ["logits"], "dynamic_axes": axes}
    with _quietly():
        torch.onnx.export(model, (example,), str(raw), dynamo=False, opset_version=OPSET, **names)
        quant_pre_process(str(raw), str(path))
    return path


def quantized_file(simplified: Path, images: Tensor, path: Path) -> Path:
    """onnxruntime's quantize_static: QDQ, weights int8 per channel, activations uint8, calibrated by minimum and
    maximum."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images.split(1))

        def get_next(self) -> dict[str, object] | None:
            image = next(self.left, None)
            return None if image is None else {"x": image.numpy()}

    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    with _quietly():
        quantize_static(
            str(simplified), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds
        )  # fmt: skip
    return path
