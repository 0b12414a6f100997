# SPDX-License-Identifier: Apache-2.0
"""What pretraining predicts: against transformers' ViTMAE, explicit embeddings and brute force over pixels."""

import numpy as np
import pytest
import torch
from reference import transformers_keys
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForMaskedImageModeling
from modeling_vit_scratch.augmentation.masking import corrupted_patches, masked_squares, visible_patches
from modeling_vit_scratch.pretraining.models import (
    MPP_TARGETS,
    MaskedAutoencoder,
    MaskedPatchPrediction,
    patchify,
    unpatchify,
)


MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]


def batch(draw, grid, images=3):
    masks = [draw(*grid, np.random.default_rng(seed)) for seed in range(images)]
    return {name: torch.from_numpy(np.stack([mask[name] for mask in masks])) for name in masks[0]}


def pictures(size=(16, 24), images=3, channels=3):
    """Normalised pixels of 0 to 1."""
    pixels = torch.rand(images, channels, *size, generator=torch.Generator().manual_seed(0))
    return (pixels - torch.tensor(MEAN[:channels]).view(-1, 1, 1)) / torch.tensor(STD[:channels]).view(-1, 1, 1)


def test_patchify_cuts_as_the_patch_embedding_does():
    images, weight = torch.randn(2, 3, 8, 18), torch.randn(5, 3, 4, 6)
    patches = patchify(images, (4, 6))
    expected = torch.nn.functional.conv2d(images, weight, stride=(4, 6)).flatten(2).transpose(1, 2)
    assert torch.allclose(patches @ weight.flatten(1).T, expected, atol=1e-5)
    assert torch.equal(unpatchify(patches, (2, 3), (4, 6)), images)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def test_half_of_the_embeddings_are_corrupted_of_which_80_10_10():
    masks = batch(corrupted_patches(), (14, 14), images=400)
    corrupted, replaced, source = masks["corrupted"], masks["replaced"], masks["source"]
    assert (corrupted.sum(1) == 98).all()
    swapped = source != torch.arange(196)
    assert not (replaced & ~corrupted).any()
    assert not (swapped & ~corrupted).any()
    assert not (swapped & replaced).any()
    count = corrupted.sum().item()
    for mask, share in ((replaced, 0.8), (swapped, 0.1)):
        # five standard deviations of a binomial
        assert abs(mask.sum().item() / count - share) < 5 * (share * (1 - share) / count) ** 0.5
    # where a foreign embedding comes from is any other patch of the image
    distances = ((source - torch.arange(196)) % 196)[swapped]
    assert distances.unique().tolist() == list(range(1, 196))


def test_masked_squares_are_whole_and_cut_at_the_border():
    masks = batch(masked_squares(0.6, 32, (16, 16)), (14, 14), images=50)["bool_masked_pos"].view(50, 14, 14)
    squares = masks.view(50, 7, 2, 7, 2)
    assert (squares == squares[:, :, :1, :, :1]).all()
    assert (masks.sum((1, 2)) == 30 * 4).all()  # of 49 squares 29.4, rounded up
    odd = batch(masked_squares(0.5, 16, (8, 4)), (3, 9), images=50)["bool_masked_pos"].view(50, 3, 9)
    assert (odd[:, 0, :4] == odd[:, 1:2, :1].squeeze(1)).all()
    assert (odd[:, 2, 8].float().mean() - 0.5).abs() < 0.3
    with pytest.raises(ValueError, match="multiple of 48"):
        masked_squares(0.5, 32, (16, 12))


def test_a_quarter_of_patches_stays_visible_in_order_and_each_as_often():
    visible = batch(visible_patches(0.75), (7, 8), images=600)["visible"]
    assert visible.shape == (600, 14)
    assert (visible.diff(dim=1) > 0).all()
    counts = visible.flatten().bincount(minlength=56)
    assert (counts - 150).abs().max() < 5 * (600 * 0.25 * 0.75) ** 0.5
    assert batch(visible_patches(0.99), (2, 2))["visible"].shape == (3, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Masked patch prediction


def mpp(target, **fields):
    torch.manual_seed(0)
    fields = {"image_size": [16, 24], **fields}
    channels = fields.get("num_channels", 3)
    config = ViTScratchConfig.from_variant("test/4", **fields)
    return MaskedPatchPrediction(config, target, MEAN[:channels], STD[:channels]).eval()


def test_the_encoder_sees_the_corrupted_embeddings_of_the_paper():
    model, images, masks = mpp("full_patch"), pictures(), batch(corrupted_patches(0.9, 0.4, 0.4), (4, 6))
    torch.nn.init.normal_(model.vit.embeddings.mask_token)
    embeddings = model.vit.embeddings
    tokens = embeddings.patch_embeddings(images)
    wanted = tokens.clone()
    for image in range(3):
        for patch in range(24):
            wanted[image, patch] = tokens[image, masks["source"][image, patch]]
            if masks["replaced"][image, patch]:
                wanted[image, patch] = embeddings.mask_token[0, 0]
    seen = []
    model.vit.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(images, **masks)
    positions = embeddings.position_embeddings
    expected = positions(torch.cat([embeddings.cls_token.expand(3, -1, -1), wanted], 1), grid=(4, 6))
    assert torch.allclose(seen[0], expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("target", "parts"), [("mean_color", 1), ("downsized", 4)])
def test_colours_are_those_of_brute_force_over_the_pixels(target, parts, channels):
    model, images = mpp(target, patch_size=8, num_channels=channels), pictures(channels=channels)
    statistics = (torch.tensor(values[:channels]).view(-1, 1, 1) for values in (MEAN, STD))
    mean, std = statistics
    pixels = (images.double() * std + mean).numpy()
    colors = model.mean_colors(patchify(images, (8, 8)), parts)
    side = 8 // parts
    for image in range(3):
        for patch in range(6):
            top, left = 8 * (patch // 3), 8 * (patch % 3)
            for part in range(parts**2):
                y, x = top + side * (part // parts), left + side * (part % parts)
                code = 0
                for channel in range(channels):
                    level = int(pixels[image, channel, y : y + side, x : x + side].mean() * 8)
                    code = code * 8 + min(max(level, 0), 7)
                assert colors[image, patch, part] == code


def test_white_and_black_are_the_last_and_the_first_of_512_colours():
    model = mpp("mean_color")
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    for value, color in ((1.0, 511), (0.0, 0)):
        images = ((torch.full((1, 3, 16, 24), value) - mean) / std).float()
        assert (model.mean_colors(patchify(images, (4, 4)), 1) == color).all()


@pytest.mark.parametrize("target", MPP_TARGETS)
def test_the_loss_is_the_mean_over_corrupted_patches_then_images(target):
    model, images, masks = mpp(target), pictures(), batch(corrupted_patches(), (4, 6))
    masks["corrupted"][0, :20] = False  # images with different numbers of corrupted patches
    outputs = model(images, **masks)
    predictions = outputs.predictions.double()
    patches = patchify(images, (4, 4)).double()
    losses = []
    for image in range(3):
        of_image = []
        for patch in torch.nonzero(masks["corrupted"][image]).flatten().tolist():
            if target == "full_patch":
                of_image.append(((predictions[image, patch] - patches[image, patch]) ** 2).mean())
            else:
                color = model.mean_colors(patchify(images, (4, 4)), 4 if target == "downsized" else 1)[image, patch]
                log_p = predictions[image, patch].view(len(color), 512).log_softmax(-1)
                of_image.append(-log_p[range(len(color)), color].mean())
        losses.append(torch.stack(of_image).mean() if of_image else torch.tensor(0.0))
    assert outputs.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "target", "message"),
    [({"patch_size": 2}, "downsized", "4 must divide"), ({}, "colour", "none of mean_color")],
)
def test_mpp_refuses(fields, target, message):
    with pytest.raises(ValueError, match=message):
        mpp(target, **fields)


# ---------------------------------------------------------------------------------------------------------------------
# MAE


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_mae_is_that_of_transformers_on_the_same_weights(norm_pix_loss):
    torch.manual_seed(0)
    shared = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = ViTScratchConfig(**shared, image_size=16, patch_size=4, layer_norm_eps=1e-12)
    ours = MaskedAutoencoder(config, 16, 1, 2, norm_pix_loss).eval()
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            **shared, image_size=16, patch_size=4, decoder_hidden_size=16, decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2, decoder_intermediate_size=64, norm_pix_loss=norm_pix_loss,
        )
    ).eval()  # fmt: skip
    state = transformers_keys({key: value for key, value in ours.state_dict().items() if key.startswith("vit.")})
    decoder = {key: value for key, value in ours.state_dict().items() if not key.startswith("vit.")}
    layers = {key.replace("decoder_layers", "vit.layers"): decoder.pop(key) for key in list(decoder) if "layers" in key}
    layers = {key.replace("vit.layers", "decoder_layers"): value for key, value in transformers_keys(layers).items()}
    # Theirs paints a patch pixel by pixel, ours channel by channel.
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        decoder[name] = decoder[name].unflatten(0, (3, 16)).transpose(0, 1).flatten(0, 1)
    state |= {f"decoder.{key}": value for key, value in {**decoder, **layers}.items()}
    y = x = torch.arange(4.0)
    from modeling_vit_scratch.positions_vit_scratch import sincos_positions

    state["decoder.decoder_pos_embed"] = torch.cat([torch.zeros(1, 1, 16), sincos_positions(y, x, 16)], 1)
    theirs.load_state_dict(state)

    images, noise = pictures((16, 16)), torch.rand(3, 16)
    visible = noise.argsort(1)[:, :4].sort(1).values
    expected = theirs(images, noise=noise)
    outputs = ours(images, visible)
    assert torch.allclose(outputs.loss, expected.loss, rtol=1e-5)
    mine = outputs.predictions.unflatten(2, (3, 16)).transpose(2, 3).flatten(2)
    assert torch.allclose(mine, expected.logits, atol=1e-5)


def test_mae_takes_rectangles_of_any_size_and_every_prefix():
    config = ViTScratchConfig.from_variant("test/4", image_size=[16, 24], num_register_tokens=2)
    model = MaskedAutoencoder(config, 16, 1, 2)
    for size, grid in (((16, 24), (4, 6)), ((8, 40), (2, 10))):
        outputs = model(pictures(size), **batch(visible_patches(0.75), grid))
        assert outputs.predictions.shape == (3, grid[0] * grid[1], 48)
        outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_is_hidden_does_not_reach_the_encoder_and_what_is_visible_not_the_loss():
    config = ViTScratchConfig.from_variant("test/4", image_size=[16, 24])
    model, images = MaskedAutoencoder(config, 16, 1, 2, norm_pix_loss=False).eval(), pictures()
    visible = batch(visible_patches(0.75), (4, 6))["visible"]
    other = patchify(images, (4, 4)).clone()
    hidden = torch.ones(3, 24, dtype=torch.bool).scatter(1, visible, False)
    other[hidden] = 0.0
    other = unpatchify(other, (4, 6), (4, 4))
    assert torch.equal(model(images, visible).predictions, model(other, visible).predictions)
    predictions = model(images, visible).predictions
    error = (predictions - patchify(images, (4, 4))).square().mean(-1)
    assert model(images, visible).loss.item() == pytest.approx(error[hidden].mean().item(), rel=1e-5)


@pytest.mark.parametrize(("variant", "share"), [("L/16", 0.36), ("B/16", 0.58)])
def test_mae_costs_a_third_of_what_sees_every_patch(variant, share):
    # A quarter of it is the encoder; the rest is the decoder, which has the same size for all.
    config = ViTScratchConfig.from_variant(variant)
    with torch.device("meta"):
        mae, simmim = MaskedAutoencoder(config), ViTScratchForMaskedImageModeling(config)
        images = torch.empty(2, 3, 224, 224)
        visible, mask = torch.zeros(2, 49, dtype=torch.int64), torch.zeros(2, 196, dtype=torch.bool)
    runs = (lambda: mae(images, visible), lambda: simmim(images, mask), lambda: mae.encode(images, visible))
    operations = []
    for run in runs:
        with FlopCounterMode(display=False) as counter:
            run()
        operations.append(counter.get_total_flops())
    whole, full, encoder = operations
    assert whole / full < share
    assert encoder / full < 0.27


@pytest.mark.parametrize(
    "fields", [{"position_embedding": "relative_1d"}, {"position_embedding_placement": "every_layer"}]
)
def test_mae_refuses_positions_that_need_the_whole_grid(fields):
    with pytest.raises(ValueError, match="positions must enter once"):
        MaskedAutoencoder(ViTScratchConfig.from_variant("test/4", **fields), 16, 1, 2)


@pytest.mark.parametrize("kind", [MaskedAutoencoder, MaskedPatchPrediction])
def test_hybrids_are_refused(kind):
    more = {} if kind is MaskedAutoencoder else {"target": "mean_color", "image_mean": MEAN, "image_std": STD}
    with pytest.raises(ValueError, match="sees the pixels around"):
        kind(ViTScratchConfig.from_variant("R+Ti/16"), **more)
