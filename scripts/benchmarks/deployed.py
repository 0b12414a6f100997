# SPDX-License-Identifier: Apache-2.0
"""The same network in the programs that people deploy on CPUs. Each is made at its first step, from our weights."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from exporting.export import check, compare, export, missing_packages
from modeling_vit_scratch.acceleration.openvino import Program, is_installed
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchForImageClassification


OPENVINO, OPENVINO_INT8 = "OpenVINO", "OpenVINO, int8"
ONNX, ONNX_INT8 = "ONNX Runtime", "ONNX Runtime, int8 weights"
RUNTIMES = ("openvino", "onnxruntime")


class Deployed(nn.Module):
    """`make` gets the model in its dtype when the first images come, and gives what computes logits from then on."""

    def __init__(self, model: nn.Module, make: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.model, self.make, self.run = model, make, None
        self.config = model.config

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)"""
        self.run = self.run or self.make(self.model)
        return self.run(images.float()).to(images.dtype)


def _openvino(model: nn.Module) -> Callable[[Tensor], Tensor]:
    program = Program(model, (model.config.num_channels, *model.config.image_hw), False, torch.get_num_threads())
    return lambda images: program(images)[0]


def _openvino_int8(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Calibrated on noise: for its speed alone, and compared with nothing."""
    shape, settings = (1, model.config.num_channels, *model.config.image_hw), {"INFERENCE_PRECISION_HINT": "f32"}
    with torch.inference_mode(False), torch.no_grad():
        program = export(model, "openvino", calibration=[torch.randn(shape) for _ in range(4)])
    settings |= {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "ENABLE_CPU_PINNING": False}
    program.to(device="cpu", config=settings)
    return lambda images: torch.as_tensor(program(pixel_values=images).logits)


def _onnx(model: nn.Module, int8: bool = False) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with torch.inference_mode(False), torch.no_grad():
        program = export(model, "onnx", int8=int8).to(session_options=options)
    if not int8:  # and OpenVINO's is compared as it is compiled
        images = torch.randn(2, model.config.num_channels, *model.config.image_hw)
        check(compare(model, program, images), "onnx")
    return lambda images: torch.as_tensor(program(pixel_values=images).logits)


def deployed_models(
    ours: ViTScratchForImageClassification, dtype: str, runtimes: Sequence[str] = RUNTIMES
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The programs of these `RUNTIMES` by name, and for each that can't be had here, or not in this dtype, why."""
    models, missing = {}, {}
    rows = {
        OPENVINO: ("openvino", [] if is_installed() else ["openvino"], _openvino),
        OPENVINO_INT8: ("openvino", missing_packages("openvino in int8"), _openvino_int8),
        ONNX: ("onnxruntime", missing_packages("onnx"), _onnx),
        ONNX_INT8: ("onnxruntime", missing_packages("onnx"), lambda model: _onnx(model, int8=True)),
    }
    for name, (runtime, packages, make) in rows.items():
        if runtime not in runtimes:
            continue
        if dtype != "float32" and name != OPENVINO:
            missing[name] = f"it computes in float32 here, not in {dtype}"
        elif packages:
            missing[name] = f"{', '.join(packages)} is not installed"
        else:
            models[name] = Deployed(copy.deepcopy(ours), make)
    return models, missing
