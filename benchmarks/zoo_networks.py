"""The networks of :mod:`benchmarks.zoo`: from three libraries, with random weights, and images that each takes."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor, nn
from torchvision import models

CLASSES = 7
# Not square, so that a map which is turned or no map shows; squares for networks that take no other image.
SIZES = (
    (64, 96),
    (96, 128),
    (128, 128),
    (224, 224),
    (256, 256),
    (192, 192),
    (240, 240),
    (384, 384),
    (112, 112),
    (518, 518),
)

# At least one of each family, in each of its variants of stem, head, normalisation or attention.
TIMM = (Path(__file__).parent / "zoo_timm.txt").read_text().split()

# Settings of small networks, by the name of their configuration.
_SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ViTConfig": _SMALL,
    "DeiTConfig": _SMALL | {"architectures": ["DeiTForImageClassificationWithTeacher"]},
    "BeitConfig": _SMALL,
    "Dinov2Config": _SMALL,
    "ConvNextConfig": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]},
    "ConvNextV2Config": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]},
    "SwinConfig": {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "ResNetConfig": {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]},
    "RegNetConfig": {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "groups_width": 8},
    "MobileNetV1Config": {"depth_multiplier": 0.5},
    "MobileNetV2Config": {"depth_multiplier": 0.5},
    "EfficientNetConfig": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "SegformerConfig": {"hidden_sizes": [16, 24, 32, 48], "decoder_hidden_size": 32},
    "PvtV2Config": {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]},
    "LevitConfig": {
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "key_dim": [8, 8, 8],
        "architectures": ["LevitForImageClassificationWithTeacher"],
    },
    "PoolFormerConfig": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]},
}


def names() -> list[str]:
    """Of all networks, ``library/name``."""
    listed = {"torchvision": models.list_models(module=models), "timm": TIMM, "transformers": TRANSFORMERS}
    return [f"{library}/{name}" for library, own in listed.items() for name in own]


def network(name: str) -> nn.Module:
    """In evaluation mode and float64, with the normalisation and all that starts as a constant shaken."""
    library, _, own = name.partition("/")
    torch.manual_seed(0)
    model = _MAKERS[library](own).eval().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.min() == parameter.max():  # a layer scale, a token, an affine map
                parameter.add_(0.2 * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
        for path, buffer in model.named_buffers():
            if path.endswith(("running_mean", "running_var")):
                buffer.add_(0.2 * torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return model


def images_for(model: nn.Module) -> Tensor:
    """Two images of the first size that the network takes."""
    for size in SIZES:
        images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                deepcopy(model)(images)  # some adapt to the first images that they see
        except Exception:  # whatever it says to a size that it does not take
            continue
        return images
    raise ValueError(f"expected a network that takes one of {SIZES}")


def family(model: nn.Module) -> str:
    """The file that the class of a network is in."""
    return type(model).__module__.rpartition(".")[2].removeprefix("modeling_")


def _torchvision(name: str) -> nn.Module:
    settings: dict[str, Any] = {"num_classes": CLASSES}
    if name in ("googlenet", "inception_v3"):
        settings["init_weights"] = False  # which takes minutes
    if name.startswith("vit"):
        settings["image_size"] = 112 if name == "vit_h_14" else 128
    return models.get_model(name, **settings)


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES)


def _transformers(name: str) -> nn.Module:
    import transformers

    settings = getattr(transformers, name)(num_labels=CLASSES, **TRANSFORMERS[name])
    return transformers.AutoModelForImageClassification.from_config(settings)


_MAKERS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}
