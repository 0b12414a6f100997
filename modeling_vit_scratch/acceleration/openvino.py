# SPDX-License-Identifier: Apache-2.0
"""
A model compiled by OpenVINO (https://docs.openvino.ai): the same outputs, faster on a CPU. It takes seconds to convert,
so this is for many images, or for a server.
"""

import copy
import functools
import importlib.util
import threading
import warnings

import torch
from torch import Tensor, nn

from ..common.errors import InputError


# Of outputs, between OpenVINO's and torch's in the same precision, as a share of the largest. bfloat16 has 8 bits.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
# Images that make up for the conversion several times over, of small networks and of large ones, which take longer.
PAYS_FROM = 10_000


def is_installed() -> bool:
    return importlib.util.find_spec("openvino") is not None


class Program:
    """
    A classifier of transformers, or an encoder of this package, compiled for the CPU. Threads can share it.

    Args:
        model: on the CPU, in evaluation mode; later changes of its weights are not seen.
        image_shape: (C, H, W), of every image; the number of images in a batch is open.
        has_embeddings: whether a classifier also gives what its last layer sees.
        streams: calls that run side by side, and share the threads.

    InputError if OpenVINO is not installed, can't compile the model in its dtype, or computes something else.
    """

    def __init__(
        self, model: nn.Module, image_shape: tuple[int, int, int], has_embeddings: bool, threads: int, streams: int = 1
    ) -> None:
        parameter = next(model.parameters())
        self.dtype, self._requests = parameter.dtype, threading.local()
        if not is_installed():
            raise InputError('OpenVINO is not installed: pip install -e ".[openvino]"')
        if parameter.device.type != "cpu" or self.dtype not in _PRECISIONS:
            raise InputError(f"OpenVINO takes float32 or bfloat16 on the CPU, not {self.dtype} on {parameter.device}.")
        outputs, precision = _Outputs(model, has_embeddings).eval(), _PRECISIONS[self.dtype]
        try:
            self._compiled = _compile(outputs, image_shape, precision, threads, streams)
        except Exception as error:  # whatever a compiler raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"OpenVINO can't compile this model: {reason}") from error
        if (taken := self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()) != precision:
            raise InputError(f"OpenVINO computes in {taken} on this processor, and not in {self.dtype}.")
        self._compare(outputs, image_shape)

    def __call__(self, pixel_values: Tensor) -> list[Tensor]:
        """Of (B, C, H, W) in float32: logits (B, K) and embeddings (B, D), those of both that there are, in float32."""
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        found = self._requests.own.infer([pixel_values.float().contiguous().numpy()], share_inputs=True)
        return [torch.from_numpy(found[index]) for index in range(len(self._compiled.outputs))]

    @torch.inference_mode()
    def _compare(self, outputs: nn.Module, image_shape: tuple[int, int, int]) -> None:
        """Three images, where two were traced: a batch that is not open would show."""
        images = torch.randn(3, *image_shape, generator=torch.Generator().manual_seed(0))
        for got, expected in zip(self(images), outputs(images.to(self.dtype)), strict=True):
            difference, largest = (got - expected.float()).abs().max().item(), expected.abs().max().item()
            if not difference <= TOLERANCES[self.dtype] * largest:
                raise InputError(f"OpenVINO does not compute what torch does: they differ by {difference:.1e}, where "
                                 f"{TOLERANCES[self.dtype] * largest:.1e} is allowed.")  # fmt: skip


class _Outputs(nn.Module):
    """What is read of a model: logits, and what its classifier sees; of an encoder the pooled output."""

    def __init__(self, model: nn.Module, has_embeddings: bool) -> None:
        super().__init__()
        self.model, self.has_embeddings = model, has_embeddings

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) -> (B, K) and (B, D)"""
        if not hasattr(self.model, "classifier"):
            return (self.model(pixel_values).pooler_output,)
        seen: list[Tensor] = []
        hook = self.model.classifier.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        logits = self.model(pixel_values).logits
        hook.remove()
        return (logits, *seen) if self.has_embeddings else (logits,)


def _compile(outputs: nn.Module, image_shape: tuple[int, int, int], precision: str, threads: int, streams: int):
    from openvino import PartialShape
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    if precision != "f32":  # traced in float32, and rounded by the CPU's own instructions
        outputs = copy.deepcopy(outputs).float().eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer, on sizes, which are fixed here: what comes out is compared
        # What openvino.convert_model does, but for the message about it that it sends to its makers.
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(outputs, example_input=torch.zeros(2, *image_shape), shared_memory=False)
        program = frontend.convert(frontend.load(decoder))
        program.reshape(PartialShape([-1, *image_shape]))
    settings = {
        "INFERENCE_PRECISION_HINT": precision,  # by itself it takes bfloat16 where the processor has it
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": streams,
        "ENABLE_CPU_PINNING": False,  # several processes would be tied to the same cores
    }
    return _core().compile_model(program, "CPU", settings)


@functools.cache
def _core():
    """One for the process: each brings a stack for signals, and of two, the one that ends first leaves a dead one."""
    from openvino import Core

    return Core()
