"""The networks of :mod:`benchmarks.zoo`: from three libraries, with random weights, and images that each takes."""

from copy import deepcopy
from collections.abc import Callable
from typing import Any

import torch
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor, nn
from torchvision import models

CLASSES = 7
# Not square, so that a map which is turned or no map shows; squares for networks that take no other image.
SIZES = ((64, 96), (96, 128), (128, 128), (224, 224), (256, 256), (192, 192), (240, 240), (384, 384))

# At least one of each family, in each of its variants of stem, head, normalisation or attention.
TIMM = """
beit_base_patch16_224 beitv2_base_patch16_224
botnet26t_256 eca_botnext26ts_256 halonet26t lambda_resnet26t sebotnet33ts_256 haloregnetz_b
bat_resnext26ts eca_resnext26ts gcresnext26ts gernet_s mobileone_s0 regnetz_b16 repvgg_a0 resnet32ts resnext26ts
seresnext26ts resnet50_mlp cait_xxs24_224 coat_lite_tiny coat_tiny convit_tiny convmixer_768_32
convnext_atto convnext_atto_ols convnext_atto_rms convnext_zepto_rms convnext_tiny_hnf convnextv2_atto
test_convnext3 cpubone_nano crossvit_9_240 csatv2 cs3darknet_focus_s cs3sedarknet_l cspdarknet53 cspresnet50
cspresnext50 darknet17 darknetaa53 sedarknet21 cspnext_tiny davit_tiny
deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
densenet121 densenetblur121d dla34 dla46x_c dla60_res2net dpn68 dpn48b edgenext_xx_small
efficientformer_l1 efficientformerv2_s0
efficientnet_b0 efficientnet_b0_gn efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnet_es efficientnet_lite0
efficientnetv2_rw_t efficientnet_x_b3 fbnetc_100 gc_efficientnetv2_rw_t mixnet_s mnasnet_small mobilenet_edgetpu_100
mobilenetv1_100 mobilenetv2_035 spnasnet_100 tinynet_e tf_efficientnet_b0 tf_efficientnet_lite0 tf_efficientnetv2_b0
tf_mixnet_s efficientvim_m1 efficientvit_b0 efficientvit_m0
eva02_tiny_patch14_224 vit_small_patch16_dinov3 vit_medium_patch16_rope_reg1_gap_256
fasternet_t0 fastvit_t8 fastvit_sa12 fastvit_mci0 focalnet_tiny_srf gcvit_xxtiny
ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
lcnetv2_small levit_128s levit_conv_128s lowformer_b0 mambaout_femto
coatnet_nano_rw_224 coatnet_bn_0_rw_224 coatnext_nano_rw_224 maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256
caformer_s18 convformer_s18 poolformer_s12 poolformerv2_s12
gmixer_12_224 gmlp_ti16_224 mixer_s32_224 resmlp_12_224
fbnetv3_b lcnet_035 mobilenetv3_small_050 tf_mobilenetv3_small_minimal_100 mobilenetv4_conv_small_035
mobilenetv4_hybrid_medium_075 mobilenetv5_base mobilevit_xxs mobilevitv2_050 mvitv2_tiny mvitv2_small_cls
naflexvit_base_patch16_gap nasnetalarge nest_tiny nest_tiny_jx nextvit_small
nfnet_l0 dm_nfnet_f0 eca_nfnet_l0 nf_regnet_b0 nf_resnet26 nf_seresnet26 nf_ecaresnet26 test_nfnet
pit_ti_224 pit_ti_distilled_224 pnasnet5large pvt_v2_b0 pvt_v2_b2_li rdnet_tiny
regnetx_002 regnety_002 regnetv_040 regnetz_005 regnety_040_sgn repghostnet_050 repvit_m0_9 repvit_m1
res2net50_14w_8s res2next50 resnest14d
resnet10t resnet18 resnet18d resnet26t resnet50_gn resnetaa34d resnetblur18 resnetrs50 resnext50_32x4d
ecaresnet26t seresnet18 seresnextaa101d_32x8d wide_resnet50_2 test_resnet
resnetv2_18 resnetv2_50d_evos resnetv2_50d_frn resnetv2_50d_gn resnetv2_50x1_bit
rexnet_100 rexnetr_100 selecsls42b legacy_seresnet18 legacy_seresnext26_32x4d legacy_senet154 sequencer2d_s shvit_s1
skresnet18 skresnext50_32x4d starnet_s1 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_patch16_224 tresnet_m tresnet_v2_l twins_svt_small twins_pcpvt_small vgg11 vgg16_bn visformer_tiny
vit_tiny_patch16_224 vit_small_patch16_224 vit_base_patch16_gap_224 vit_small_patch14_reg4_dinov2
vit_base_patch16_siglip_224 vit_tiny_r_s16_p8_224 vit_small_resnet26d_224 vit_relpos_small_patch16_224
vit_relpos_medium_patch16_cls_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224
ese_vovnet19b_slim_dw eca_vovnet39b vovnet39a legacy_xception xception41 xception41p xcit_nano_12_p16_224
""".split()

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
    "LevitConfig": {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "key_dim": [8, 8, 8], "architectures": ["LevitForImageClassificationWithTeacher"]},
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
                parameter += 0.2 * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
        for path, buffer in model.named_buffers():
            if path.endswith(("running_mean", "running_var")):
                buffer += 0.2 * torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype)
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
