# SPDX-License-Identifier: Apache-2.0
"""Inference and training steps of our network and of everybody else's, on the same weights and the same batch."""

import contextlib
import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.deployed import RUNTIMES, deployed_models
from benchmarks.peers import PEERS, build_peers, random_batch
from benchmarks.timing import OURS
from conversion.verification import model_output
from modeling_vit_scratch.acceleration.speed_up import speed_up
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.configuration_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchForImageClassification


TASKS = ("inference", "training")
ACCELERATED = "ours, accelerated"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain_model(variant: str, image_size: int, num_labels: int = 1000) -> ViTScratchForImageClassification:
    """A network of random weights, the same each time. Raises InputError for an unknown variant."""
    try:
        config = ViTScratchConfig.from_variant(
            variant, image_size=image_size, num_labels=num_labels, zero_init_head=False
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    torch.manual_seed(0)
    return ViTScratchForImageClassification(config).eval()


@dataclass(frozen=True)
class ModelBenchmark:
    """
    What is compared.

    Attributes:
        task: "inference", logits without gradients; "training", a whole step: forward, backward, fused AdamW.
        variant: e.g. "S/16".
        image_size: side in pixels.
        dtype: a name in `DTYPES`. In training the weights stay float32, and bfloat16 is autocast's.
        device: "cpu" or "cuda".
        compile: whether every model is compiled.
        num_labels: K of the classifier.
        peers: names of `peers.PEERS` and `deployed.RUNTIMES`: whom to compare with.
    """

    task: str
    variant: str
    image_size: int
    dtype: str = "float32"
    device: str = "cpu"
    compile: bool = False
    num_labels: int = 1000
    peers: tuple[str, ...] = (*PEERS, *RUNTIMES)

    def models(self) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """
        Ours first, plain and as `speed_up` makes it; then everybody else's, whose logits are ours; and why others are
        missing: see `build_peers`.
        """
        ours = plain_model(self.variant, self.image_size, self.num_labels)
        with tempfile.TemporaryDirectory() as folder:
            theirs, missing = build_peers(ours, folder, [name for name in self.peers if name in PEERS])
        if self.task == "inference" and self.device == "cpu" and not self.compile:
            deployed, not_deployed = deployed_models(ours, self.dtype, self.peers)
            theirs, missing = {**theirs, **deployed}, {**missing, **not_deployed}
        models = {OURS: ours, ACCELERATED: speed_up(copy.deepcopy(ours)), **theirs}
        return {name: self._prepare(model) for name, model in models.items()}, missing

    def _prepare(self, model: nn.Module) -> nn.Module:
        if self.task == "inference":
            return model.to(self.device, DTYPES[self.dtype]).eval()
        return model.to(self.device).train()

    def way(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
        """
        A step: it returns the logits, or the loss before the step. It waits for no device, as training does not; so
        several steps are timed together, see `block`.
        """
        # Every batch size gets code of its own: code for any size would be slower for everybody.
        run = torch.compile(model, dynamic=False) if self.compile else model
        if self.task == "inference":
            images = images.to(DTYPES[self.dtype])

            def infer() -> torch.Tensor:
                with torch.inference_mode():
                    return model_output(run, images)

            return infer
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        is_half = self.dtype != "float32"
        precision = torch.autocast(self.device, DTYPES[self.dtype]) if is_half else contextlib.nullcontext()

        def step() -> torch.Tensor:
            with precision:
                loss = F.cross_entropy(model_output(run, images).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    def block(self, step: Callable[[], torch.Tensor], steps: int) -> Callable[[], None]:
        """What is timed: some steps, and the wait until the device has done them."""

        def run() -> None:
            for _ in range(steps):
                step()
            if self.device == "cuda":
                torch.cuda.synchronize()

        return run

    def ways(self, models: dict[str, nn.Module], batch_size: int) -> dict[str, Callable[[], torch.Tensor]]:
        """By name, each on the same batch. Training steps are those of copies, which end with the other weights."""
        images, labels = random_batch(models[OURS], batch_size, self.device)
        is_training = self.task == "training"
        return {
            name: self.way(copy.deepcopy(model) if is_training else model, images, labels)
            for name, model in models.items()
        }

    def operations(self) -> int:
        """
        Of an image: multiplications and additions of the matrix products of the whole network, as published, and three
        times as many for a training step (a product has two in its backward pass). The same for everybody, so that who
        leaves something out gets a higher share of the peak.
        """
        config = ViTScratchConfig.from_variant(self.variant, image_size=self.image_size)
        rows, columns = config.grid_hw
        patches, width, mlp = rows * columns, config.hidden_size, config.intermediate_size
        tokens = patches + config.num_prefix_tokens
        layer = tokens * (4 * width**2 + 2 * width * mlp) + 2 * tokens**2 * width
        patch_area = config.patch_hw[0] * config.patch_hw[1]
        products = patches * patch_area * config.num_channels * width + config.num_hidden_layers * layer
        forward = 2 * (products + width * self.num_labels)
        return forward if self.task == "inference" else 3 * forward
