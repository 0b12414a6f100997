# SPDX-License-Identifier: Apache-2.0
"""What holds for every configuration, image, grid and weight: examples that nobody has thought of."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.checkpoint.conversion import save_checkpoint
from modeling_vit_scratch.positions_vit_scratch import resample_positions


# Derandomised: the same examples each time, so that a failure is the change's.
quick = settings(max_examples=25, deadline=None, derandomize=True)
few = settings(max_examples=5, deadline=None, derandomize=True)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration

FIELDS = sorted(name for name in ViTScratchConfig.__annotations__ if not name.startswith("_"))
json_values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.integers(), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-1, 40), max_size=3), st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from(["learned_2d", "sincos_2d", "relative_1d", "none", "mean", "cls", "every_layer", "gelu"]),
)  # fmt: skip


@settings(quick, max_examples=80)
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=4))
def test_any_values_give_a_configuration_that_works_and_comes_back_or_an_error_that_names_one(fields):
    config, problem = None, ""
    try:
        config = ViTScratchConfig(**{**ViTScratchConfig.from_variant("test/4").to_dict(), **fields})
    except (ValueError, StrictDataclassError) as error:  # ours for a value, huggingface_hub's for a type
        problem = str(error)
    if config is None:
        assert any(name in problem for name in fields)
        return
    again = ViTScratchConfig(**json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    with torch.device("meta"):
        model = ViTScratchForImageClassification(config)
        logits = model(torch.zeros(1, config.num_channels, *config.image_hw)).logits
    assert logits.shape == (1, config.num_labels)


@settings(quick, max_examples=100)
@given(width=st.integers(1, 40), heads=st.integers(1, 4), image=st.tuples(st.integers(1, 12), st.integers(1, 12)),
       patch=st.integers(1, 3))  # fmt: skip
def test_what_does_not_divide_is_refused_and_nothing_else(width, heads, image, patch):
    fields = {"hidden_size": width, "num_attention_heads": heads, "image_size": list(image), "patch_size": patch}
    if width % heads or any(side % patch for side in image):
        with pytest.raises(ValueError, match="must divide"):
            ViTScratchConfig(**fields)
    else:
        assert ViTScratchConfig(**fields).grid_hw == (image[0] // patch, image[1] // patch)


# ---------------------------------------------------------------------------------------------------------------------
# Image processor

sides = st.integers(1, 40)
images = st.tuples(sides, sides, st.sampled_from(["L", "RGB", "RGBA", "CMYK", "1", "P", "I;16"]), st.integers(0, 9))


def draw(height: int, width: int, mode: str, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


@quick
@given(
    batch=st.lists(images, min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    channels=st.sampled_from([1, 3]),
    crop_pct=st.sampled_from([None, 1.0, 0.875]),
    crop=st.one_of(st.none(), st.tuples(st.integers(1, 30), st.integers(1, 30))),
    resample=st.sampled_from(list(Image.Resampling)),
)
def test_shape_and_range_are_the_processor_s_and_a_batch_is_its_images(batch, size, channels, crop_pct, crop, resample):
    settings = {"crop_pct": crop_pct} if crop is None or crop_pct else {"do_center_crop": True, "crop_size": crop}
    if "crop_size" in settings:
        settings["crop_size"] = {"height": crop[0], "width": crop[1]}
    height, width = crop if "crop_size" in settings else size
    processor = ViTScratchImageProcessor(
        num_channels=channels, size={"height": size[0], "width": size[1]}, resample=resample, **settings
    )
    pictures = [draw(*one) for one in batch]
    together = processor(pictures, return_tensors="np")["pixel_values"]
    assert together.shape == (len(batch), channels, height, width)
    assert together.dtype == np.float32
    assert -1 <= together.min() <= together.max() <= 1
    for picture, row in zip(pictures, together):
        np.testing.assert_array_equal(processor(picture, return_tensors="np")["pixel_values"][0], row)
        as_array = np.asarray(processor.decode(picture))
        np.testing.assert_array_equal(processor(as_array, return_tensors="np", input_data_format="channels_last" if
                                      as_array.ndim == 3 else None)["pixel_values"][0], row)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Positions

KERNELS = ("bilinear", "bicubic", "bicubic_antialias", "bicubic_align_corners")


@quick
@given(
    old=st.tuples(sides, sides), new=st.tuples(sides, sides), seed=st.integers(0, 99), kernel=st.sampled_from(KERNELS)
)
def test_resampling_keeps_what_it_must(old, new, seed, kernel):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randn(1, *old, 2, generator=generator, dtype=torch.float64)
    other = torch.randn(1, *old, 2, generator=generator, dtype=torch.float64)
    resized = resample_positions(positions, *new, kernel)
    assert resized.shape == (1, *new, 2)
    if old == new:
        torch.testing.assert_close(resized, positions)
    # Linear, rows apart from columns, the same for every channel, and no place is preferred.
    both = resample_positions(2 * positions + other, *new, kernel)
    torch.testing.assert_close(both, 2 * resized + resample_positions(other, *new, kernel))
    torch.testing.assert_close(
        resample_positions(positions.transpose(1, 2), *new[::-1], kernel), resized.transpose(1, 2)
    )
    if min(new) > 1:  # with corners aligned, a single place is the first corner
        torch.testing.assert_close(resample_positions(positions.flip(1, 2), *new, kernel), resized.flip(1, 2))
    constant = torch.full((1, *old, 1), 1.5, dtype=torch.float64)
    torch.testing.assert_close(resample_positions(constant, *new, kernel), constant.new_full((1, *new, 1), 1.5))
    if kernel == "bilinear" and min(old) > 1 and min(new) > 1:  # zoom knows no scale for one pixel
        zoom = (new[0] / old[0], new[1] / old[1], 1)
        theirs = scipy.ndimage.zoom(positions[0].numpy(), zoom, order=1, grid_mode=False)
        if theirs.shape == (*new, 2):
            np.testing.assert_allclose(resized[0].numpy(), theirs, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Conversion


@pytest.mark.parametrize("format", ["native", "npz", "transformers", "timm"])
@few
@given(
    heads=st.integers(1, 3),
    head_width=st.sampled_from([4, 8]),
    layers=st.integers(1, 3),
    ratio=st.sampled_from([1, 2, 4]),
    patch=st.integers(1, 5),
    grid=st.integers(1, 4),
    labels=st.integers(2, 5),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_there_and_back_gives_the_same_bits(
    format, heads, head_width, layers, ratio, patch, grid, labels, channels, seed
):
    width = heads * head_width
    more = {"hidden_act": "gelu_pytorch_tanh"} if format == "npz" else {}
    if format == "transformers":
        more["layer_norm_eps"] = 1e-12
    config = ViTScratchConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ratio * width,
        patch_size=patch, image_size=patch * grid, num_labels=labels, num_channels=channels, **more,
    )  # fmt: skip
    torch.manual_seed(seed)
    ours = ViTScratchForImageClassification(config).eval()
    for parameter in ours.parameters():  # no zeros that could be lost, no order that could be swapped
        torch.nn.init.normal_(parameter)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out.npz" if format == "npz" else "out")
        if format == "native":
            ours.save_pretrained(path)
        else:
            save_checkpoint(ours, path, format)
        given = {"num_attention_heads": heads} if format == "npz" else {}
        again = ViTScratchForImageClassification.from_pretrained(path, **given).eval()
    state = again.state_dict()
    assert state.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert (again.config.patch_hw, again.config.image_hw) == (config.patch_hw, config.image_hw)
    pixel_values = torch.randn(2, channels, *config.image_hw)
    with torch.no_grad():
        assert torch.equal(again(pixel_values).logits, ours(pixel_values).logits)
    assert math.isfinite(ours.config.layer_norm_eps)
