# SPDX-License-Identifier: Apache-2.0
"""
The official JAX model in float64 numpy, on the flat names of its `.npz`: written from the paper and from models_vit.py
and models_resnet.py of google-research/vision_transformer, sharing no code with the package.
"""

import math

import numpy as np


OLD = ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
NEW = ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")


def random_parameters(
    *, patch=(4, 4), grid=(4, 4), width=24, heads=3, layers=2, mlp=40, classes=5, channels=3, token=True,
    representation=None, names=OLD, stem=None, stem_width=32, seed=0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Random parameters in the official layout, float32. `stem`: units in each stage of the ResNet."""
    random = np.random.RandomState(seed)

    def draw(*shape, around=0.0, scale=0.3):
        return (around + scale * random.standard_normal(shape)).astype(np.float32)

    attention, norm2, mlp_name = names
    parameters: dict[str, np.ndarray] = {}

    def norm(name, size):
        parameters[f"{name}/scale"], parameters[f"{name}/bias"] = draw(size, around=1), draw(size)

    def kernel(name, *shape, bias=None):
        parameters[f"{name}/kernel"] = draw(*shape)
        if bias is not None:
            parameters[f"{name}/bias"] = draw(*bias)

    if stem is not None:
        kernel("conv_root", 7, 7, channels, stem_width)
        norm("gn_root", stem_width)
        channels = stem_width
        for stage, units in enumerate(stem):
            size = stem_width * 2**stage
            for unit in range(units):
                name = f"block{stage + 1}/unit{unit + 1}"
                if channels != 4 * size or (stage and not unit):
                    kernel(f"{name}/conv_proj", 1, 1, channels, 4 * size)
                    norm(f"{name}/gn_proj", 4 * size)
                for index, shape in enumerate(((1, 1, channels, size), (3, 3, size, size), (1, 1, size, 4 * size)), 1):
                    kernel(f"{name}/conv{index}", *shape)
                    norm(f"{name}/gn{index}", shape[-1])
                channels = 4 * size
    kernel("embedding", *patch, channels, width, bias=(width,))
    if token:
        parameters["cls"] = draw(1, 1, width)
    parameters["Transformer/posembed_input/pos_embedding"] = draw(1, int(token) + math.prod(grid), width)
    for layer in range(layers):
        block = f"Transformer/encoderblock_{layer}"
        norm(f"{block}/LayerNorm_0", width)
        for part in ("query", "key", "value"):
            kernel(f"{block}/{attention}/{part}", width, heads, width // heads, bias=(heads, width // heads))
        kernel(f"{block}/{attention}/out", heads, width // heads, width, bias=(width,))
        norm(f"{block}/{norm2}", width)
        kernel(f"{block}/{mlp_name}/Dense_0", width, mlp, bias=(mlp,))
        kernel(f"{block}/{mlp_name}/Dense_1", mlp, width, bias=(width,))
    norm("Transformer/encoder_norm", width)
    if representation:
        kernel("pre_logits", width, representation, bias=(representation,))
    kernel("head", representation or width, classes, bias=(classes,))
    return parameters


def forward(parameters: dict[str, np.ndarray], images: np.ndarray, positions_after_token: bool = True) -> np.ndarray:
    """Logits (B, K) of images (B, H, W, C)."""
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    x = images.astype(np.float64)
    if "conv_root/kernel" in p:
        x = np.maximum(group_norm(standardised(x, p["conv_root/kernel"], 2), p, "gn_root"), 0)
        x = max_pool(x)
        stage = 1
        while f"block{stage}/unit1/conv1/kernel" in p:
            unit = 1
            while f"block{stage}/unit{unit}/conv1/kernel" in p:
                x = residual_unit(x, p, f"block{stage}/unit{unit}", 2 if stage > 1 and unit == 1 else 1)
                unit += 1
            stage += 1
    kernel = p["embedding/kernel"]
    height, width = kernel.shape[:2]
    rows, columns = x.shape[1] // height, x.shape[2] // width
    patches = x.reshape(len(x), rows, height, columns, width, -1).transpose(0, 1, 3, 2, 4, 5)
    x = patches.reshape(len(x), rows * columns, -1) @ kernel.reshape(-1, kernel.shape[3]) + p["embedding/bias"]
    names = ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding", "pos_embedding")
    positions = next(p[name] for name in names if name in p)
    if not positions_after_token:
        x = x + positions
    if "cls" in p:
        x = np.concatenate([np.broadcast_to(p["cls"], (len(x), 1, x.shape[2])), x], axis=1)
    if positions_after_token:
        x = x + positions
    layer = 0
    while f"Transformer/encoderblock_{layer}/LayerNorm_0/scale" in p:
        block = f"Transformer/encoderblock_{layer}"
        attention, norm2, mlp = OLD if f"{block}/LayerNorm_2/scale" in p else NEW
        x = x + self_attention(layer_norm(x, p, f"{block}/LayerNorm_0"), p, f"{block}/{attention}")
        y = layer_norm(x, p, f"{block}/{norm2}") @ p[f"{block}/{mlp}/Dense_0/kernel"] + p[f"{block}/{mlp}/Dense_0/bias"]
        y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ p[f"{block}/{mlp}/Dense_1/kernel"] + p[f"{block}/{mlp}/Dense_1/bias"]
        layer += 1
    x = layer_norm(x, p, "Transformer/encoder_norm")
    x = x[:, 0] if "cls" in p else x.mean(axis=1)
    if "pre_logits/kernel" in p:
        x = np.tanh(x @ p["pre_logits/kernel"] + p["pre_logits/bias"])
    return x @ p["head/kernel"] + p["head/bias"] if "head/kernel" in p else x


def layer_norm(x, p, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]


def group_norm(x, p, name):
    groups = x.reshape(len(x), -1, 32, x.shape[3] // 32)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    x = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    return x * p[f"{name}/scale"].ravel() + p[f"{name}/bias"].ravel()


def self_attention(x, p, name):
    q, k, v = (
        np.einsum("btd,dhe->bhte", x, p[f"{name}/{part}/kernel"]) + p[f"{name}/{part}/bias"][:, None]
        for part in ("query", "key", "value")
    )
    scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1])
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    attended = scores / scores.sum(-1, keepdims=True) @ v
    return np.einsum("bhte,hed->btd", attended, p[f"{name}/out/kernel"]) + p[f"{name}/out/bias"]


def same_padding(x, kernel, stride, fill):
    """TensorFlow's "SAME": as many outputs as ceil(size / stride), the odd pixel after."""
    pads = [(0, 0)]
    for size in x.shape[1:3]:
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
    return np.pad(x, [*pads, (0, 0)], constant_values=fill)


def windows(x, kernel, stride):
    view = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(1, 2))
    return view[:, ::stride, ::stride]  # (B, rows, columns, C, kernel, kernel)


def standardised(x, kernel, stride):
    kernel = kernel - kernel.mean((0, 1, 2))
    kernel = kernel / (kernel.std((0, 1, 2)) + 1e-5)
    size = kernel.shape[0]
    return np.einsum("brcikl,klio->brco", windows(same_padding(x, size, stride, 0.0), size, stride), kernel)


def max_pool(x):
    return windows(same_padding(x, 3, 2, -np.inf), 3, 2).max((4, 5))


def residual_unit(x, p, name, stride):
    residual = x
    if f"{name}/conv_proj/kernel" in p:
        residual = group_norm(standardised(x, p[f"{name}/conv_proj/kernel"], stride), p, f"{name}/gn_proj")
    x = np.maximum(group_norm(standardised(x, p[f"{name}/conv1/kernel"], 1), p, f"{name}/gn1"), 0)
    x = np.maximum(group_norm(standardised(x, p[f"{name}/conv2/kernel"], stride), p, f"{name}/gn2"), 0)
    return np.maximum(residual + group_norm(standardised(x, p[f"{name}/conv3/kernel"], 1), p, f"{name}/gn3"), 0)
