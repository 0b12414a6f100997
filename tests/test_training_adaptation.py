# SPDX-License-Identifier: Apache-2.0
"""Frozen layers, adapters and stored features: what changes, what must not, and what is left in the folder."""

import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny_images import build, class_folders, difference, flags, weights

from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.cards.records import model_metadata
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.training.arguments import ModelArguments


STEPS = ("--max_steps", "6", "--learning_rate", "0.01", "--dataloader_num_workers", "0")
SAVED = ("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "9")
DISTILLED = ("--config_overrides", "use_distillation_token=True,use_distillation_head=True")
NOISE = "hidden_dropout_prob=0.1,attention_probs_dropout_prob=0.1,drop_path_rate=0.1"


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return str(class_folders(tmp_path_factory.mktemp("pets"), each=8))


@pytest.mark.parametrize(
    ("what", "frozen"),
    [
        ("embeddings", ["vit.embeddings."]),
        ("1", ["vit.embeddings.", "vit.layers.0."]),
        ("2", ["vit.embeddings.", "vit.layers."]),
        ("encoder", ["vit."]),
    ],
)
def test_frozen_weights_stay_bit_by_bit_and_all_others_learn(pets, tmp_path, what, frozen):
    trainer = build(tmp_path / "out", *flags(pets, *STEPS, "--freeze", what, "--config_overrides", NOISE))
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    assert stayed == {name for name in before if name.startswith(tuple(frozen))}
    trained = sum(after[name].numel() for name in after.keys() - stayed)
    assert any(
        f"Trained: {trained:,} of {trainer.model.num_parameters():,} parameters" in x for x in trainer.describe()
    )
    modules = trainer.model.train().named_modules()
    noisy = {name for name, part in modules if getattr(part, "p", 0) or getattr(part, "rate", 0)}
    assert not any(name.startswith(tuple(frozen)) for name in noisy)
    assert bool(noisy) == (what in ("embeddings", "1"))


@pytest.mark.parametrize("more", [(), ("--smallest_area", "0.5"), ("--mixup", "0.2"), DISTILLED])
def test_without_augmentation_the_encoder_has_seen_all_images_before_the_first_step(pets, tmp_path, more):
    seen = []
    trainer = build(tmp_path / "out", *flags(pets, *STEPS, "--freeze", "encoder", *more))
    trainer.model.vit.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(len(args[0])))
    trainer.train()
    scores = trainer.evaluate()
    assert bool(seen) == bool(more)
    trainer.save_model()
    # The folder has the whole network, whose loss on the pixels is that on the features.
    model = ViTScratchForImageClassification.from_pretrained(tmp_path / "out")
    held_out = trainer.eval_dataset.examples
    images = [held_out.decode(index, trainer.processing_class) for index in range(len(held_out))]
    pixels = trainer.processing_class(images, return_tensors="pt")["pixel_values"]
    loss = model(pixels, labels=torch.tensor(held_out.labels)).loss
    assert float(loss) == pytest.approx(scores["eval_loss"], abs=1e-6)
    assert float(loss) < 1.0 < float(torch.tensor(3.0).log())


@pytest.mark.parametrize("how", [("--freeze", "encoder"), ("--freeze", "1"), ("--lora_rank", "2")])
def test_resuming_is_exact(pets, tmp_path, how):
    straight = build(tmp_path / "straight", *flags(pets, *STEPS, *how, *SAVED))
    straight.train()
    resumed = build(tmp_path / "resumed", *flags(pets, *STEPS, *how, *SAVED))
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert difference(weights(resumed), weights(straight)) == 0.0


def test_adapters_become_plain_weights_with_the_same_logits(pets, tmp_path):
    trainer = build(tmp_path / "out", *flags(pets, *STEPS, "--lora_rank", "2", *SAVED))
    plain = build(tmp_path / "plain", *flags(pets, *STEPS)).model
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    assert learned == {name for name in before if ".lora_" in name or name.startswith("classifier.")}
    trainer.save_model()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: value.shape for name, value in stored.items()} == {n: v.shape for n, v in plain.state_dict().items()}
    assert model_metadata(trainer.model, ModelArguments())["num_parameters"] == plain.num_parameters()
    # As peft merges, and with the logits of the adapters.
    adapted = trainer.model.eval()
    pixels = torch.randn(4, 3, *adapted.config.image_hw, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = adapted(pixels).logits
        merged = ViTScratchForImageClassification.from_pretrained(tmp_path / "out").eval()
        assert (merged(pixels).logits - expected).abs().max() < 1e-6
        assert (plain.eval()(pixels).logits - expected).abs().max() > 0.1
    by_peft = copy.deepcopy(adapted)
    for name, layer in by_peft.named_modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
            assert torch.allclose(layer.base_layer.weight, stored[f"{name}.weight"], atol=1e-7)

    others = flags(pets, *STEPS, "--lora_rank", "3", *SAVED)
    with pytest.raises(InputError, match="another --lora_rank"):
        build(tmp_path / "other", *others).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--freeze", "head"), "--freeze head: give encoder, embeddings, or a number of layers from 1 on"),
        (("--freeze", "0"), "--freeze 0: give encoder"),
        (("--freeze", "3"), "--freeze 3: the network has 2 layers"),
        (("--freeze", "1", "--lora_rank", "2"), "Keep one of them"),
    ],
)
def test_mistakes_are_named(pets, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        build(tmp_path / "out", *flags(pets, *STEPS, *more))
