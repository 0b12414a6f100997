# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does for test_distributed.py: `python two_processes.py FOLDER IMAGES SHARDS`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_images import build, difference, flags, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.trainer_callback import TrainerCallback

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.modeling_vit_scratch import is_watched


SGD = ["--optim", "sgd", "--learning_rate", "0.05"]


def new_model() -> ViTScratchForImageClassification:
    torch.manual_seed(0)
    config = ViTScratchConfig.from_variant("test/4", num_labels=3, zero_init_head=False)
    return ViTScratchForImageClassification(config)


def shard(model: nn.Module) -> nn.Module:
    """As accelerate does it with FSDP2: what _no_split_modules names, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
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
    found["is_watched"] = any(is_watched(layer) for layer in sharded.vit.layers)
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
        self.seen.append(torch.cat(self.trainer.last_keys))


def train(folder: Path, *flags: str, resume: Path | None = None) -> dict:
    trainer = build(folder, *flags)
    keys = Keys(trainer)
    trainer.add_callback(keys)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    scores = trainer.evaluate()
    return {
        "weights": weights(trainer),
        "keys": torch.stack(keys.seen),
        "samples": trainer.samples.by_process,
        "scores": scores,
    }


def main() -> None:
    folder, images, shards = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo")
    found = {"fsdp": fsdp(folder)}
    common = ["--per_device_train_batch_size", "2", "--max_steps", "6", "--dataloader_num_workers", "0"]
    common += ["--per_device_eval_batch_size", "2"]
    found["plain"] = train(folder / "plain", *flags(images, *common, "--gradient_accumulation_steps", "2", *SGD))
    streamed = ["--train_dir", shards, "--validation_dir", images, "--streaming", "--shuffle_buffer_size", "4", *common]
    streamed += ["--save_strategy", "steps", "--save_steps", "4", "--eval_strategy", "no"]
    found["streamed"] = train(folder / "streamed", *streamed)
    found["resumed"] = train(folder / "resumed", *streamed, resume=folder / "streamed" / "checkpoint-4")
    torch.save(found, folder / f"found_{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
