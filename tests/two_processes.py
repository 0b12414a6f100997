# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does for test_distributed.py: `python two_processes.py FOLDER IMAGES SHARDS`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny_images import build, build_pretrainer, difference, flags, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.trainer_callback import TrainerCallback

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.acceleration.speed_up import has_user_hooks
from modeling_vit_scratch.training.trainer import ImageTrainer


SGD = ["--optim", "sgd", "--learning_rate", "0.05"]


def new_model() -> ViTScratchForImageClassification:
    torch.manual_seed(0)
    config = ViTScratchConfig.from_variant("test/4", num_labels=3, zero_init_head=False)
    return ViTScratchForImageClassification(config)


def shard(model: nn.Module) -> nn.Module:
    """As accelerate does it with FSDP2: what _no_split_modules names, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in reversed(list(model.modules())):  # the inner ones first
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: slice) -> torch.Tensor:
    images = torch.randn(4, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 1])
    loss = model(images[batch], labels=labels[batch]).loss
    loss.backward()
    return loss.detach()


def whole(tensors) -> dict[str, torch.Tensor]:
    return {name: getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)().clone() for name, tensor in tensors}


def fsdp(folder: Path) -> dict:
    """Losses, gradients and weights with and without FSDP, over two steps with a checkpoint between them."""
    rank, found = dist.get_rank(), {}
    sharded, plain = shard(new_model()), new_model()
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (sharded, plain)]
    for number in range(2):
        losses = [step(sharded, optimizers[0], slice(2 * rank, 2 * rank + 2)), step(plain, optimizers[1], slice(0, 4))]
        dist.all_reduce(losses[0])
        found[f"loss {number}"] = abs(losses[0] / 2 - losses[1]).item()
        grads = [whole((name, p.grad) for name, p in model.named_parameters()) for model in (sharded, plain)]
        largest = max(gradient.abs().max().item() for gradient in grads[1].values())
        found[f"gradients {number}"] = difference(*grads) / largest
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found[f"weights {number}"] = difference(*(whole(model.named_parameters()) for model in (sharded, plain)))
        if number == 0:
            state = {"model": get_model_state_dict(sharded)}
            dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "pytorch_model_fsdp_0"))
            stored = whole(sharded.named_parameters())
    found["has_user_hooks"] = any(has_user_hooks(layer.modules()) for layer in sharded.vit.layers)
    found["shards"] = sum(p.to_local().numel() for p in sharded.parameters()) / plain.num_parameters()
    resumed = shard(new_model())
    state = {"model": get_model_state_dict(resumed)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder / "pytorch_model_fsdp_0"))
    found["resumed"] = difference(whole(resumed.named_parameters()), stored)
    if rank == 0:
        plain.config.save_pretrained(folder)
        torch.save(stored, folder / "stored.pt")
    return found


class Keys(TrainerCallback):
    """Which images went through the model, by update."""

    def __init__(self, trainer) -> None:
        self.trainer, self.seen = trainer, []

    def on_step_end(self, *args, **kwargs) -> None:
        self.seen.append(torch.cat(self.trainer.step_guard.last_keys))


def train(folder: Path, *flags: str, resume: Path | None = None) -> dict:
    trainer = build(folder, *flags)
    keys = Keys(trainer)
    trainer.add_callback(keys)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    scores = trainer.evaluate()
    return {
        "weights": weights(trainer),
        "keys": torch.stack(keys.seen),
        "samples": trainer.samples_by_process,
        "scores": scores,
    }


@contextmanager
def sharding(trainer: ImageTrainer) -> Iterator[ImageTrainer]:
    """The trainer, as accelerate makes it with FSDP2 on accelerators; on a CPU it would take DDP."""
    plugin = {"auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "SHARDED_STATE_DICT"}
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **plugin)
    trainer.is_fsdp_enabled = True
    states = (AcceleratorState._shared_state, PartialState._shared_state)
    try:
        for state in states:
            state["distributed_type"] = DistributedType.FSDP
        yield trainer
    finally:
        for state in states:
            state["distributed_type"] = DistributedType.MULTI_CPU


def average(trainer: ImageTrainer, resume: Path | None = None) -> dict:
    """What a run with --ema_decay ends with, and what its evaluations on the way have found."""
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    return {"weights": whole(trainer.model.named_parameters()), "losses": losses}


def averages(folder: Path, images: str, *common: str) -> dict:
    """Runs with an average of weights that are whole, sharded, and sharded and resumed; SimMIM, sharded."""
    common = ["--train_dir", images, "--train_val_split", "0.25", *common, "--ema_decay", "0.9"]
    common += [f"--{what}_{name}" for what in ("eval", "save") for name in ("strategy=steps", "steps=2")]
    found = {"whole": average(build(folder / "whole", *common, *SGD))}
    with sharding(build(folder / "sharded", *common, *SGD)) as trainer:
        found["sharded"] = average(trainer)
    with sharding(build(folder / "again", *common, *SGD)) as trainer:
        found["again"] = average(trainer, folder / "sharded" / "checkpoint-4")
    with sharding(build_pretrainer(folder / "simmim", *common, "--objective", "simmim", "--max_steps", "2")) as trainer:
        found["simmim"] = average(trainer)
    return found


def main() -> None:
    folder, images, shards = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo")
    found = {"fsdp": fsdp(folder)}
    common = ["--per_device_train_batch_size", "2", "--max_steps", "6", "--dataloader_num_workers", "0"]
    common += ["--per_device_eval_batch_size", "2"]
    found["plain"] = train(folder / "plain", *flags(images, *common, "--gradient_accumulation_steps", "2", *SGD))
    repeated = [*common, "--gradient_accumulation_steps", "2", "--aug_repeats", "3", *SGD]
    found["repeated"] = train(folder / "repeated", *flags(images, *repeated))
    streamed = ["--train_dir", shards, "--validation_dir", images, "--streaming", "--shuffle_buffer_size", "4", *common]
    streamed += ["--save_strategy", "steps", "--save_steps", "4", "--eval_strategy", "no"]
    found["streamed"] = train(folder / "streamed", *streamed)
    found["resumed"] = train(folder / "resumed", *streamed, resume=folder / "streamed" / "checkpoint-4")
    found["averages"] = averages(folder, images, *common)
    torch.save(found, folder / f"found_{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
