# SPDX-License-Identifier: Apache-2.0
"""
Other people's arithmetic for the tests: transformers' ViT with our weights, and a float64 forward in numpy.

The numpy forward is written from the paper's equations 1 to 7 and appendix D.4, and shares no code with the package.
"""

import math

import numpy as np
import torch
from scipy.special import erf
from transformers import ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling, ViTModel


SHARED_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
    "image_size", "patch_size", "num_channels", "qkv_bias", "hidden_dropout_prob",
)  # fmt: skip


def transformers_keys(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under the names of transformers' ViT, q, k and v apart."""
    theirs = {}
    for key, tensor in ours.items():
        new = key.replace("position_embeddings.weight", "position_embeddings").replace(
            "attention.proj", "attention.o_proj"
        )
        if "attention.qkv" in new:
            for name, part in zip("qkv", tensor.chunk(3)):
                theirs[new.replace("attention.qkv", f"attention.{name}_proj")] = part
        elif key == "decoder.weight":  # theirs is a 1 x 1 convolution and a pixel shuffle
            theirs["decoder.0.weight"] = tensor[:, :, None, None]
        else:
            theirs[new.replace("decoder.bias", "decoder.0.bias")] = tensor
    return theirs


def transformers_twin(ours: torch.nn.Module, attn_implementation: str = "eager") -> torch.nn.Module:
    """transformers' model of the same class, architecture and weights."""
    config = {name: getattr(ours.config, name) for name in SHARED_FIELDS}
    classes = {
        "ViTScratchModel": ViTModel,
        "ViTScratchForImageClassification": ViTForImageClassification,
        "ViTScratchForMaskedImageModeling": ViTForMaskedImageModeling,
    }
    theirs_class = classes[type(ours).__name__]
    more = {"add_pooling_layer": False} if theirs_class is ViTModel else {}
    config = ViTConfig(**config, num_labels=ours.config.num_labels, encoder_stride=ours.config.patch_hw[0])
    config._attn_implementation = attn_implementation
    theirs = theirs_class(config, **more)
    theirs.load_state_dict(transformers_keys(ours.state_dict()))
    return theirs.eval()


def numpy_logits(state: dict[str, torch.Tensor], config, images: torch.Tensor) -> np.ndarray:
    """Logits (B, K) of images (B, C, H, W) whose size is `config.image_size`, in float64."""
    weights = {key: value.double().numpy() for key, value in state.items()}
    width, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
    head_width = width // heads
    (patch_height, patch_width), (rows, columns) = config.patch_hw, config.grid_hw
    prefix = int(config.use_cls_token) + config.num_register_tokens
    activation = {
        "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
        "gelu_pytorch_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    }[config.hidden_act]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    def positions(name):
        """(T, D), one token after another."""
        table = np.zeros((prefix + rows * columns, width))
        for row in range(rows):
            for column in range(columns):
                n = row * columns + column
                if config.position_embedding == "learned_1d":
                    stored = weights[f"{name}.weight"][0]
                    table[prefix + n] = stored[n + int(len(stored) > rows * columns)]
                elif config.position_embedding == "learned_2d":
                    halves = weights[f"{name}.row_weight"][0, row, 0], weights[f"{name}.column_weight"][0, 0, column]
                    table[prefix + n] = np.concatenate(halves)
                elif config.position_embedding == "sincos_2d":
                    omega = 10_000.0 ** (-np.arange(width // 4) / (width // 4 - 1))
                    parts = [f(place * omega) for place in (column, row) for f in (np.sin, np.cos)]
                    table[prefix + n] = np.concatenate(parts)
        if config.position_embedding == "learned_1d" and config.use_cls_token and config.cls_token_position:
            table[0] = weights[f"{name}.weight"][0, 0]
        return table

    logits = []
    for image in images.double().numpy():
        tokens = []
        if config.use_cls_token:
            tokens.append(weights["vit.embeddings.cls_token"][0, 0])
        for register in range(config.num_register_tokens):
            tokens.append(weights["vit.embeddings.register_tokens"][0, register])
        kernel = weights["vit.embeddings.patch_embeddings.projection.weight"]
        for row in range(rows):
            for column in range(columns):
                patch = image[
                    :, row * patch_height : (row + 1) * patch_height, column * patch_width : (column + 1) * patch_width
                ]
                bias = weights["vit.embeddings.patch_embeddings.projection.bias"]
                tokens.append((kernel * patch).sum((1, 2, 3)) + bias)
        x = np.stack(tokens) + positions("vit.embeddings.position_embeddings")
        for layer in range(config.num_hidden_layers):
            if layer and config.position_embedding_placement == "every_layer":
                x = x + positions(f"vit.later_position_embeddings.{layer - 1}")
            if layer and config.position_embedding_placement == "every_layer_shared":
                x = x + positions("vit.embeddings.position_embeddings")
            name = f"vit.layers.{layer}"
            projected = linear(norm(x, f"{name}.layernorm_before"), f"{name}.attention.qkv")
            attended = []
            for head in range(heads):
                q, k, v = (
                    projected[:, part * width + head * head_width : part * width + (head + 1) * head_width]
                    for part in range(3)
                )
                if config.qk_norm:
                    q, k = norm(q, f"{name}.attention.q_norm"), norm(k, f"{name}.attention.k_norm")
                scores = q @ k.T
                if config.position_embedding == "relative_1d":
                    table = weights[f"{name}.attention.relative_positions.weight"]
                    for i in range(rows * columns):
                        for j in range(rows * columns):
                            scores[prefix + i, prefix + j] += q[prefix + i] @ table[i - j + rows * columns - 1]
                attended.append(softmax(scores / math.sqrt(head_width)) @ v)
            update = linear(np.concatenate(attended, axis=1), f"{name}.attention.proj")
            x = x + update * weights.get(f"{name}.layer_scale_attention.weight", 1.0)
            hidden = activation(linear(norm(x, f"{name}.layernorm_after"), f"{name}.mlp.fc1"))
            x = x + linear(hidden, f"{name}.mlp.fc2") * weights.get(f"{name}.layer_scale_mlp.weight", 1.0)
        x = norm(x, "vit.layernorm")
        pooled = x[0] if config.pooling == "cls" else x[prefix:].mean(0)
        if config.representation_size:
            pooled = np.tanh(linear(pooled, "vit.pooler.dense"))
        logits.append(linear(pooled, "classifier"))
    return np.stack(logits)
