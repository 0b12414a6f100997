# SPDX-License-Identifier: Apache-2.0
"""LAMB against timm 1.0.31, as an optimizer of the Trainer; and the fused ones of torch."""

import numpy as np
import pytest
import torch
from tiny_images import build, difference, flags, weights

from modeling_vit_scratch.training.optimization import Lamb
from modeling_vit_scratch.training.safety import differences


# What timm.optim.lamb.Lamb gives for the four steps of `steps`: max_grad_norm -> weight, bias, a weight of zeros.
TIMM = {
    1.0: (
        [-0.856799707974, -0.532265017043, -0.168572370069, 0.205118630589, 0.518794091093, 0.791544922007],
        [0.437243076154, -0.266058285772],
        [-0.020318621838, 0.021016269038, 0.020698302738, 0.019390270204],
    ),
    0.0: (
        [-0.856080786137, -0.527480493736, -0.161758060713, 0.200756753898, 0.514257383579, 0.794001006593],
        [0.445591757785, -0.251758408933],
        [-0.020127880422, 0.020896703947, 0.020484485555, 0.019261646294],
    ),
}


def steps(max_grad_norm: float, stop: int = 4) -> list[torch.Tensor]:
    """A weight and one of zeros with decay, a bias without, at two rates; saved and loaded after the second step."""
    parameters = [
        (torch.arange(6.0, dtype=torch.float64).reshape(2, 3) - 2.5) / 3,
        torch.tensor([0.5, -0.25], dtype=torch.float64),
        torch.zeros(2, 2, dtype=torch.float64),
    ]
    parameters = [torch.nn.Parameter(parameter) for parameter in parameters]
    groups = [{"params": parameters[::2], "weight_decay": 0.05}, {"params": [parameters[1]], "weight_decay": 0.0}]

    def optimizer() -> Lamb:
        return Lamb([dict(group) for group in groups], lr=0.02, betas=(0.9, 0.95), max_grad_norm=max_grad_norm)

    lamb = optimizer()
    for step in range(stop):
        for index, parameter in enumerate(parameters):
            places = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            parameter.grad = torch.sin(places * 1.3 + step + index) * (1 + step)
        if step == 2:
            saved, lamb = lamb.state_dict(), optimizer()
            lamb.load_state_dict(saved)
            lamb.param_groups[0]["lr"] = 0.01
        lamb.step()
    return parameters


@pytest.mark.parametrize("max_grad_norm", TIMM)
def test_steps_are_those_of_timm(max_grad_norm):
    for ours, theirs in zip(steps(max_grad_norm), TIMM[max_grad_norm]):
        np.testing.assert_allclose(ours.detach().flatten().numpy(), theirs, atol=2e-12)


def test_a_parameter_without_gradient_stays():
    parameter = torch.nn.Parameter(torch.ones(2))
    Lamb([parameter]).step()
    assert parameter.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="lr=-1"):
        Lamb([parameter], lr=-1)


def test_a_run_with_lamb_resumes_bit_by_bit(pets, tmp_path):
    run = ["--optim", "lamb", "--loss", "bce", "--mixup", "0.8", "--max_steps", "4", "--dataloader_num_workers", "0"]
    run += ["--train_dir", pets, "--train_val_split", "0.25", "--eval_strategy", "no", "--save_steps", "2"]
    run += ["--save_strategy", "steps", "--adam_beta2", "0.99", "--layer_decay", "0.9"]
    straight = build(tmp_path / "out", *run)
    before = weights(straight)
    straight.train()
    optimizer = straight.optimizer.optimizer
    assert isinstance(optimizer, Lamb)
    assert (straight.args.optimizer_name, straight.args.to_dict()["optim"]) == ("lamb", "lamb")
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert difference(before, weights(straight)) > 1e-5
    place = str(tmp_path / "out" / "checkpoint-2")
    resumed = build(tmp_path / "out", *run, "--resume_from_checkpoint", place)
    resumed.train(resume_from_checkpoint=place)
    assert difference(weights(straight), weights(resumed)) == 0


@pytest.mark.parametrize(
    "optimizer",
    [["--optim", "sgd", "--optim_args", "momentum=0.9,fused={}"], ["--optim", "adamw_torch{}"]],
    ids=["sgd", "adamw"],
)
def test_fused_optimizers_give_the_weights_of_plain_ones(pets, tmp_path, optimizer):
    ends = []
    for fused in (("True", "_fused"), ("False", "")):
        kind = [word.format(fused["adamw_torch{}" in optimizer]) for word in optimizer]
        run = ["--max_steps", "3", "--dataloader_num_workers", "0", "--learning_rate", "0.001"]
        run += ["--adam_epsilon", "1e-3"]  # where a gradient is zero but for rounding, Adam's step is all rounding
        trainer = build(tmp_path / fused[0], *flags(pets, *kind, *run))
        before = weights(trainer)
        trainer.train()
        ends.append(weights(trainer))
        assert difference(before, ends[-1]) > 1e-4
        assert bool(trainer.optimizer.param_groups[0]["fused"]) == (fused[0] == "True")
    assert difference(*ends) < 1e-6


def test_a_checkpoint_of_when_it_was_a_flag_of_its_own_compares_as_what_it_is_now():
    before = {"--optim": "adamw_torch_fused", "--lamb": True, "--seed": 1}
    assert differences(before, {"--optim": "lamb", "--seed": 1}) == []
    assert differences({**before, "--lamb": False}, {"--optim": "adamw_torch_fused", "--seed": 1}) == []
    assert differences(before, {"--optim": "sgd", "--seed": 1}) == ["--optim: sgd now, lamb in the checkpoint's run"]
