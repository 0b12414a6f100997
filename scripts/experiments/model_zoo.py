# SPDX-License-Identifier: Apache-2.0
"""
Every Vision Transformer of timm and of transformers, small and with random weights: it opens with its own numbers, or
is refused by its name and for a reason that holds.

    python scripts/experiments/model_zoo.py timm              in an environment of its own with timm
    python scripts/experiments/model_zoo.py transformers
    python scripts/experiments/model_zoo.py timm --names "vit_*gap*"
    python scripts/experiments/model_zoo.py timm --write tests/model_zoo.json     what tests without timm compare with

Widths and heads are each model's own, since heads follow from the name; layers and images are few and small.
"""

import argparse
import fnmatch
import importlib.metadata
import importlib.util
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # it is missing, or was built for another torch: see scripts/benchmark.py
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[module]
    if importlib.util.find_spec("torchvision") is not None:
        OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import transformers
from safetensors.torch import save_file
from transformers.models.auto import modeling_auto

from modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchForMaskedImageModeling, ViTScratchModel
from modeling_vit_scratch.checkpoint.families import find_family
from modeling_vit_scratch.checkpoint.files import CheckpointError


TOLERANCE = 1e-5  # of the largest value
OTHER = "has the tensors of no Vision Transformer"
# Modules of timm whose networks are called Vision Transformers: built and compared. Of all others, only the names of
# the tensors are tried.
TIMM_MODULES = (
    "vision_transformer", "deit", "eva", "beit", "naflexvit", "vision_transformer_relpos", "vision_transformer_hybrid",
    "vision_transformer_sam", "qwen3_vit", "gemma4_vit", "deepseek_vit", "vitamin",
)  # fmt: skip


@dataclass
class Case:
    """
    A model of another library.

    Attributes:
        name: its name there, and its class where it has several.
        config: what `config.json` has, at least.
        network: of full size, without memory; None if a default configuration makes none.
        save: makes a small one with random weights in a folder; None where nothing is compared.
    """

    name: str
    config: dict[str, Any]
    network: torch.nn.Module | None
    save: Callable[[Path], torch.nn.Module] | None


def has_layer(*parts: str) -> Callable[[torch.nn.Module], bool]:
    """Whether a network has a layer whose class has one of the parts in its name."""
    return lambda network: any(part in type(layer).__name__ for layer in network.modules() for part in parts)


def has_tensor(*parts: str) -> Callable[[torch.nn.Module], bool]:
    return lambda network: any(part in name for name in network.state_dict() for part in parts)


# What must be seen in a network that is refused, by words of the reason.
EVIDENCE: dict[str, Callable[[torch.nn.Module], bool]] = {
    "rotary position": has_layer("Rotary", "Rope"),
    "relative positions": has_tensor("rel", "pos_embed.table", "position_table", "position_embedding_table"),
    "pools over": lambda network: network.pool_include_prefix,
    "res-post-norm": has_layer("ResPost", "PostNorm"),
    "inside of attention": has_tensor("attn.norm.weight"),
    "side by side": has_layer("Parallel"),
    "differential attention": has_layer("Diff"),
    "NaFlex": has_layer("NaFlex"),
    "convolutional stem": has_tensor("patch_embed.backbone."),
    "objects that it detects": has_tensor("detection_tokens"),
    "is no plain": lambda network: True,
    "is no architecture": lambda network: True,
}


def timm_cases(pattern: str) -> Iterator[Case]:
    import timm
    from timm.models import _registry

    for name in fnmatch.filter(timm.list_models(), pattern):
        with torch.device("meta"):
            network = timm.create_model(name)
        is_compared = _registry._model_to_module[name] in TIMM_MODULES
        yield Case(name, {"architecture": name}, network, timm_saver(name, network) if is_compared else None)


def timm_saver(name: str, network: torch.nn.Module) -> Callable[[Path], torch.nn.Module]:
    def save(folder: Path) -> torch.nn.Module:
        import timm
        from timm.models import _hub

        height, width = network.patch_embed.patch_size
        size = (4 * height, 4 * width)
        model = timm.create_model(name, depth=2, img_size=size, num_classes=5)
        shake(model)
        _hub.save_for_hf(model, folder, safe_serialization=True)
        config = json.loads((folder / "config.json").read_text())
        del config["model_args"]  # published models have none
        config["pretrained_cfg"]["input_size"] = [3, *size]
        (folder / "config.json").write_text(json.dumps(config))
        return model.eval()

    return save


def transformers_cases(pattern: str) -> Iterator[Case]:
    """Every model type whose images are cut into patches, in each class that has a task of ours."""
    mappings = (
        modeling_auto.MODEL_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES,
    )  # fmt: skip
    for model_type in fnmatch.filter(sorted(modeling_auto.MODEL_MAPPING_NAMES), pattern):
        is_beit = model_type in ("beit", "data2vec-vision")  # the published ones are not of the default
        options = {"use_relative_position_bias": True} if is_beit else {}
        config = transformers.CONFIG_MAPPING[model_type](**options)
        if not hasattr(config, "patch_size") and not hasattr(config, "vision_config"):
            continue
        is_compared = not find_family({"model_type": model_type}, "").row.refused
        for kind in dict.fromkeys(mapping[model_type] for mapping in mappings if model_type in mapping):
            for name in kind if isinstance(kind, tuple) else (kind,):
                save = transformers_saver(model_type, name) if is_compared else None
                yield Case(f"{model_type} {name}", {"model_type": model_type}, empty(name, config), save)


def empty(name: str, config: Any) -> torch.nn.Module | None:
    try:
        with torch.device("meta"):
            return getattr(transformers, name)(config)
    except Exception:  # some need more than a default configuration, and raise anything
        return None


def transformers_saver(model_type: str, name: str) -> Callable[[Path], torch.nn.Module]:
    small = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "mlp_ratio": 2,
        "image_size": 16, "patch_size": 4, "encoder_stride": 4, "mask_ratio": 0.0, "num_labels": 5,
    }  # fmt: skip

    def save(folder: Path) -> torch.nn.Module:
        default = transformers.CONFIG_MAPPING[model_type]()
        vision = getattr(default, "vision_config", default)
        options = {key: value for key, value in small.items() if hasattr(vision, key)}
        options |= {"num_patches": 16} if hasattr(vision, "num_patches") else {}
        if vision is not default:
            texts = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            options = {"vision_config": options, "text_config": texts, "num_labels": 5}
        config = type(default)(**options)
        model = getattr(transformers, name)(config)
        shake(model)
        model.save_pretrained(folder)
        return model.eval()

    return save


def shake(model: torch.nn.Module) -> None:
    """Every weight far from its start: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@torch.inference_mode()
def compare(folder: Path, theirs: torch.nn.Module) -> tuple[str, float]:
    """What was compared, and its largest difference in parts of the largest value."""
    name, kind = type(theirs).__name__, ViTScratchForImageClassification
    if "MaskedImageModeling" in name:
        kind = ViTScratchForMaskedImageModeling
    elif isinstance(theirs, transformers.PreTrainedModel) and "ForImageClassification" not in name:
        kind = ViTScratchModel
    ours = kind.from_pretrained(folder).eval()
    images = torch.randn(2, 3, *ours.config.image_hw, generator=torch.Generator().manual_seed(0))
    if kind is ViTScratchForImageClassification and not ours.config.num_labels:  # their head was left out
        ours, theirs = ours.vit, theirs.base_model
    options = {"noise": torch.arange(16.0).expand(2, -1)} if "ViTMAE" in name else {}
    if hasattr(theirs, "text_model"):
        theirs = theirs.vision_model
    if naflex := name.startswith("Siglip2"):  # takes patches, of channels last
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        mask, grid = torch.ones(2, 16, dtype=torch.long), torch.tensor([[4, 4]] * 2)
        images_of_theirs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": grid}
    got = ours(images)
    expected = theirs(**images_of_theirs) if naflex else theirs(images, **options)
    field = next(field for field in ("logits", "reconstruction", "last_hidden_state") if hasattr(got, field))
    wanted = expected if torch.is_tensor(expected) else expected[field]
    return field, ((got[field] - wanted).abs().max() / wanted.abs().max()).item()


def try_case(case: Case, folder: Path) -> tuple[str, str]:
    """ "exact" and the difference, "refused" and the reason, or "WRONG" and what is."""
    family = find_family(case.config, "model.safetensors")
    reason = family.row.refused if family.row else None
    theirs = None
    if case.save is None or reason:
        shapes = {} if case.network is None else {n: (1,) * t.dim() for n, t in case.network.state_dict().items()}
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(case.config))
    else:
        theirs = case.save(folder)
    try:
        if theirs is None:
            ViTScratchForImageClassification.from_pretrained(folder)
            return "WRONG", "opened"
        what, difference = compare(folder, theirs)
        return ("exact", what) if difference < TOLERANCE else ("WRONG", f"{what} differ by {difference:.1e}")
    except CheckpointError as error:
        message = str(error)
    if family.name not in message:
        return "WRONG", f"refused without its name: {message}"
    if not reason:
        return "refused", OTHER if case.save is None else message
    is_seen = next(look for words, look in EVIDENCE.items() if words in reason)
    if case.network is not None and not is_seen(case.network):
        return "WRONG", f"refused since it {reason}, which is not seen in it"
    return "refused", reason


def describe(network: torch.nn.Module | None) -> str:
    """What tensors don't say of a network of timm."""
    if not hasattr(network, "blocks"):
        return ""
    block = network.blocks[0]
    kinds = {"GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu", "QuickGELU": "quick_gelu", "SiLU": "silu"}
    activation, epsilon = kinds[type(block.mlp.act).__name__], block.norm1.eps
    return f"width {network.embed_dim}, heads {block.attn.num_heads}, {activation}, epsilon {epsilon:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("timm", "transformers"))
    parser.add_argument("--names", default="*", metavar="PATTERN", help="only these (default: all)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="JSON of what was found, for the tests")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("modeling_vit_scratch").setLevel(logging.ERROR)
    found: dict[str, dict[str, list[str]]] = {"exact": {}, "refused": {}, "WRONG": {}}
    for case in {"timm": timm_cases, "transformers": transformers_cases}[arguments.library](arguments.names):
        with tempfile.TemporaryDirectory() as folder:
            verdict, detail = try_case(case, Path(folder))
        if verdict == "exact":
            detail = describe(case.network) or detail
        found[verdict].setdefault(detail, []).append(case.name)
        if verdict == "WRONG":
            print(f"WRONG  {case.name}: {detail}", flush=True)
    for verdict, groups in found.items():
        print(f"{verdict}: {sum(map(len, groups.values()))}")
        for detail, names in sorted(groups.items(), key=lambda item: -len(item[1])):
            print(f"  {len(names):4}  {detail}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}")
    if arguments.write:
        found["refused"].pop(OTHER, None)
        versions = {"versions": {name: importlib.metadata.version(name) for name in ("timm", "transformers")}}
        arguments.write.write_text(json.dumps(versions | found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
