# SPDX-License-Identifier: Apache-2.0
"""
What the stock `Trainer` restores from a checkpoint: every tensor of this model, 8 of 40 of transformers' own ViT.

transformers 5.23 writes ViT's weights under other names than its modules have, and Trainer loads them with
`load_state_dict(strict=False)`: training goes on from random weights with a warning. Keys on disk that equal the names
of the modules are the cure, and this is the proof.
"""

import pytest
import torch
from reference import transformers_twin
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification


class Images(Dataset):
    """Twenty-four fixed random images of three classes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.pixel_values = torch.randn(24, 3, 16, 24, generator=generator)
        self.labels = torch.randint(3, (24,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def fresh_model(options: dict) -> ViTScratchForImageClassification:
    torch.manual_seed(0)
    config = ViTScratchConfig.from_variant(
        "test/4", num_labels=3, hidden_dropout_prob=0.1, num_register_tokens=1, layer_scale_init_value=0.1, **options
    )
    return ViTScratchForImageClassification(config)


def trainer(model: torch.nn.Module, folder, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=4, learning_rate=1e-3, max_steps=6,
        logging_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Images(), eval_dataset=Images())


@pytest.mark.parametrize("options", [{}, {"position_embedding_placement": "every_layer", "qk_norm": True}])
def test_resuming_gives_the_weights_of_a_run_without_a_stop(tmp_path, options):
    straight = trainer(fresh_model(options), tmp_path, save_steps=3)
    straight.train()
    resumed = trainer(fresh_model(options), tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_the_best_model_is_the_checkpoint_itself(tmp_path):
    # The metric's direction is turned round, so that the best checkpoint is not the last.
    run = trainer(
        fresh_model({}), tmp_path, save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    best = run.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    loaded = ViTScratchForImageClassification.from_pretrained(best)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], tensor), name


def test_the_failure_of_the_stock_model_is_still_there_and_not_ours(tmp_path):
    ours = ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", num_labels=3))
    theirs = transformers_twin(ours)
    missing = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
        written = load_file(tmp_path / name / "model.safetensors")
        missing[name] = len(model.load_state_dict(written, strict=False).missing_keys)
    assert missing["ours"] == 0
    if missing["theirs"] == 0:
        pytest.skip("transformers has mended its ViT: the comparison in the documentation can go")
    assert missing["theirs"] == 32
