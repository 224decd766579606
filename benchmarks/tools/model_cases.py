"""Image classifiers of torchvision, timm and transformers: small, with random weights.

Each is the library's own class, made as small as its arguments allow. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

CLASSES = 13  # a number that is no layer's width


@dataclass(frozen=True)
class Case:
    """A model of the table.

    Attributes:
        library: "torchvision", "timm" or "transformers".
        name: of the model, with what is special about it.
        family: what kind of architecture it is.
        build: returns the model, with the same weights at each call.
        side: images have this many rows and columns.
    """

    library: str
    name: str
    family: str
    build: Callable[[], nn.Module]
    side: int

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"


def _seeded(build: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*args, **options).eval()


def _torchvision(name: str, family: str, side: int, label: str = "", **options: Any) -> Case:
    def build() -> nn.Module:
        from torchvision import models

        return _seeded(models.get_model, name, weights=None, num_classes=CLASSES, **options)

    return Case("torchvision", label or name, family, build, side)


def _timm(
    name: str,
    family: str,
    side: int,
    label: str = "",
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
    **options: Any,
) -> Case:
    def build() -> nn.Module:
        import timm

        return change(_seeded(timm.create_model, name, num_classes=CLASSES, **options))

    return Case("timm", label or name, family, build, side)


def _class(
    library: str, path: str, family: str, side: int, label: str = "", **options: Any
) -> Case:
    """A model by its class, whose arguments the library's function for it does not pass on."""

    def build() -> nn.Module:
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        return _seeded(kind, num_classes=CLASSES, **options)

    return Case(library, label or path.rpartition(".")[2], family, build, side)


def _transformers(
    name: str, family: str, side: int, suffix: str = "ForImageClassification", **options: Any
) -> Case:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
        return _seeded(getattr(transformers, name + suffix), config)

    return Case("transformers", name + suffix, family, build, side)


def _fused(model: nn.Module) -> nn.Module:
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model)


def _torchvision_cases() -> list[Case]:
    make, tv = _torchvision, functools.partial(_class, "torchvision")
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.resnet import Bottleneck

    one_each: dict[str, Any] = {"block": Bottleneck, "layers": [1, 1, 1, 1]}
    windows: dict[str, Any] = {
        "patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 4],
        "window_size": [4, 4], "stochastic_depth_prob": 0.0,
    }  # fmt: skip
    v2 = ("PatchMergingV2", "SwinTransformerBlockV2")
    return [
        make("alexnet", "convolutional", 64),
        make("resnet18", "residual", 32),
        tv("torchvision.models.ResNet", "residual, grouped (ResNeXt)", 32, groups=8,
           width_per_group=4, **one_each),
        tv("torchvision.models.DenseNet", "densely connected", 32, growth_rate=8,
           block_config=(2, 2, 2, 2), num_init_features=16),
        make("squeezenet1_1", "convolutional head", 64),
        make("mobilenet_v2", "inverted residual", 32, width_mult=0.35),
        make("mobilenet_v3_small", "inverted residual", 32, width_mult=0.5),
        make("mnasnet0_5", "inverted residual", 32),
        make("shufflenet_v2_x0_5", "channel shuffle", 32),
        make("efficientnet_b0", "inverted residual", 32),
        make("regnet_y_400mf", "residual, squeeze-excitation", 32),
        make("googlenet", "Inception, two auxiliary heads", 64, "googlenet, aux_logits=True",
             aux_logits=True, init_weights=False),
        make("inception_v3", "Inception, an auxiliary head", 80, "inception_v3, aux_logits=True",
             aux_logits=True, init_weights=False),
        tv("torchvision.models.ConvNeXt", "ConvNeXt", 32, block_setting=[
            CNBlockConfig(16, 32, 1), CNBlockConfig(32, 48, 1), CNBlockConfig(48, None, 2)]),
        tv("torchvision.models.VisionTransformer", "vision transformer", 32, image_size=32,
           patch_size=8, num_layers=4, num_heads=3, hidden_dim=48, mlp_dim=96),
        tv("torchvision.models.SwinTransformer", "shifted windows", 32, **windows),
        tv("torchvision.models.SwinTransformer", "shifted windows, cosine attention", 32,
           "SwinTransformer, version 2", downsample_layer=_swin(v2[0]), block=_swin(v2[1]),
           **windows),
        tv("torchvision.models.MaxVit", "convolution and attention", 64, input_size=(64, 64),
           stem_channels=16, block_channels=[16, 24, 32, 48], block_layers=[1, 1, 1, 1],
           partition_size=2, head_dim=8, stochastic_depth_prob=0.0),
    ]  # fmt: skip


def _swin(name: str) -> Any:
    return getattr(importlib.import_module("torchvision.models.swin_transformer"), name)


def _timm_convolutional_cases() -> list[Case]:
    make = _timm
    return [
        _class("timm", "timm.models.vgg.VGG", "convolutional", 32,
               cfg=(16, "M", 32, "M", 32, "M", 32, "M", 32, "M")),
        make("resnet10t", "residual", 32),
        make("resnetv2_50", "residual, pre-activation", 32, "resnetv2_50, layers=(1, 1, 1, 1)",
             layers=(1, 1, 1, 1)),
        make("resnetv2_50x1_bit", "residual, GroupNorm, standardised weights", 32),
        make("eca_nfnet_l0", "without normalisation, standardised weights", 32),
        make("skresnet18", "residual, selective kernels", 32),
        make("resnest14d", "residual, split attention", 32),
        make("res2net50d", "residual, multi-scale", 32, "res2net50d, layers=(1, 1, 1, 1)",
             layers=(1, 1, 1, 1)),
        make("tf_efficientnet_lite0", "inverted residual", 32),
        make("mobilenetv4_conv_small", "inverted residual", 64),
        make("ghostnet_050", "ghost modules", 32),
        make("repvgg_a0", "re-parametrised, before fusing", 32),
        make("repvgg_a0", "re-parametrised, after fusing", 32, "repvgg_a0, fused", _fused),
        make("mobileone_s0", "re-parametrised, before fusing", 32),
        make("mobileone_s0", "re-parametrised, after fusing", 32, "mobileone_s0, fused", _fused),
        make("repvit_m0_9", "re-parametrised, distilled (two heads)", 32),
        make("repvit_m0_9", "re-parametrised, after fusing", 32, "repvit_m0_9, fused", _fused),
        make("fastvit_t8", "re-parametrised, before fusing", 64),
        make("convnextv2_atto", "ConvNeXt", 32),
        _class("timm", "timm.models.convmixer.ConvMixer", "ConvMixer", 28, dim=64, depth=4),
        make("inception_next_atto", "ConvNeXt", 64),
        make("edgenext_xx_small", "convolution and attention", 64),
        make("starnet_s1", "element-wise products", 32),
        make("hgnetv2_b0", "convolutional", 32),
    ]  # fmt: skip


def _timm_transformer_cases() -> list[Case]:
    make = _timm
    small: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3}
    return [
        make("vit_tiny_patch16_224", "vision transformer", 32, patch_size=8, **small),
        make("vit_tiny_patch16_224", "vision transformer, averaged tokens", 32,
             "vit_tiny_patch16_224, global_pool='avg'", patch_size=8, global_pool="avg", **small),
        make("vit_tiny_patch16_224", "vision transformer, attention pooling", 32,
             "vit_tiny_patch16_224, global_pool='map'", patch_size=8, global_pool="map",
             class_token=False, **small),
        make("vit_small_patch14_reg4_dinov2", "vision transformer, register tokens", 32,
             patch_size=8, **small),
        make("deit_tiny_distilled_patch16_224", "distilled (two heads)", 32, patch_size=8, **small),
        make("eva02_tiny_patch14_224", "vision transformer, rotary positions", 32,
             patch_size=8, **small),
        make("beit_base_patch16_224", "vision transformer, relative positions", 32,
             patch_size=8, **small),
        make("cait_xxs24_224", "class attention", 32, patch_size=8, **small),
        make("xcit_nano_12_p16_224", "cross-covariance attention", 32, depth=2, embed_dim=32,
             num_heads=2),
        make("convit_tiny", "gated positional attention", 32, patch_size=8, img_size=32, depth=4,
             embed_dim=12, local_up_to_layer=2),
        _class("timm", "timm.models.crossvit.CrossVit", "two branches (two heads)", 48,
               img_size=48, img_scale=(1.0, 1.0), patch_size=(6, 8), embed_dim=(24, 48),
               depth=((1, 1, 0), (1, 1, 0)), num_heads=(2, 2), mlp_ratio=(2.0, 2.0, 1.0)),
        make("swin_tiny_patch4_window7_224", "shifted windows", 32, img_size=32, window_size=4,
             embed_dim=24, depths=(1, 1, 2, 1)),
        make("swinv2_tiny_window8_256", "shifted windows, cosine attention", 64, img_size=64,
             window_size=4, embed_dim=24, depths=(1, 1, 2, 1)),
        make("coatnet_nano_rw_224", "convolution and attention", 64, img_size=64),
        make("maxvit_rmlp_pico_rw_256", "convolution and attention", 64, img_size=64),
        make("mixer_s32_224", "MLP-Mixer", 64, img_size=64),
        make("gmlp_ti16_224", "gated MLP", 32, img_size=32),
        make("resmlp_12_224", "residual MLP", 32, img_size=32),
        make("poolformer_s12", "pooling as attention", 32),
        make("caformer_s18", "MetaFormer, MLP head", 32),
        make("levit_128s", "distilled (two heads), cached biases", 64, img_size=64),
        make("levit_conv_128s", "distilled (two heads), cached biases", 64, img_size=64),
        make("efficientformerv2_s0", "distilled (two heads)", 64, img_size=64),
        make("mobilevit_xxs", "convolution and attention", 32),
        make("mobilevitv2_050", "convolution and attention", 32),
        make("pit_ti_distilled_224", "pooling transformer, distilled (two heads)", 64, img_size=64),
        make("pvt_v2_b0", "pyramid transformer", 32),
        make("davit_tiny", "dual attention", 64, depths=(1, 1, 1, 1),
             embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4)),
        make("focalnet_tiny_srf", "focal modulation", 32),
        make("volo_d1_224", "outlook attention, auxiliary head", 64, img_size=64),
        make("efficientvit_b0", "linear attention", 64),
        make("sequencer2d_s", "recurrent", 32, layers=(1, 1, 1, 1), embed_dims=(24, 48, 48, 48),
             hidden_sizes=(6, 12, 12, 12)),
        make("mambaout_femto", "gated convolutions, MLP head", 64),
    ]  # fmt: skip


def _transformers_cases() -> list[Case]:
    make = _transformers
    vit: dict[str, Any] = {
        "image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 3, "intermediate_size": 96,
    }  # fmt: skip
    stages: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    swin: dict[str, Any] = {
        "image_size": 64, "patch_size": 4, "window_size": 2, "embed_dim": 12,
        "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4],
    }  # fmt: skip
    return [
        make("ViT", "vision transformer", 32, **vit),
        make("ViTMSN", "vision transformer", 32, **vit),
        make("DeiT", "vision transformer", 32, **vit),
        make("DeiT", "distilled (two heads)", 32, "ForImageClassificationWithTeacher", **vit),
        make("Beit", "vision transformer, relative positions", 32, **vit),
        make("Data2VecVision", "vision transformer", 32, **vit),
        make("Dinov2", "vision transformer, class token and patches", 32, **vit),
        make("Dinov2WithRegisters", "vision transformer, register tokens", 32, **vit),
        make("IJepa", "vision transformer", 32, **vit),
        make("ConvNext", "ConvNeXt", 32, **stages),
        make("ConvNextV2", "ConvNeXt", 32, **stages),
        make("ResNet", "residual", 32, embedding_size=8, **stages),
        make("RegNet", "residual", 32, embedding_size=8, groups_width=8, **stages),
        make("Bit", "residual, standardised weights", 32, embedding_size=8, num_groups=4,
             hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]),
        make("EfficientNet", "inverted residual", 32, width_coefficient=0.25,
             depth_coefficient=0.3, hidden_dim=320),
        make("MobileNetV1", "depthwise convolutions", 32, depth_multiplier=0.25),
        make("MobileNetV2", "inverted residual", 32, depth_multiplier=0.35),
        make("MobileViT", "convolution and attention", 32, image_size=32,
             hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64]),
        make("MobileViTV2", "convolution and attention", 64, image_size=64, width_multiplier=0.25),
        make("Swin", "shifted windows", 64, **swin),
        make("Swinv2", "shifted windows, cosine attention", 64, **swin),
        make("DonutSwin", "shifted windows", 64, **swin),
        make("FocalNet", "focal modulation", 32, image_size=32, patch_size=2, embed_dim=12,
             depths=[1, 1, 2, 1], focal_levels=[1, 1, 1, 1], focal_windows=[3, 3, 3, 3]),
        make("Segformer", "pyramid transformer", 32, hidden_sizes=[8, 16, 24, 32],
             depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4]),
        make("Pvt", "pyramid transformer", 32, image_size=32, hidden_sizes=[8, 16, 24, 32],
             depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4]),
        make("PvtV2", "pyramid transformer", 32, image_size=32, hidden_sizes=[8, 16, 24, 32],
             depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4]),
        make("Cvt", "convolutional attention", 32, embed_dim=[8, 16, 24], num_heads=[1, 2, 3],
             depth=[1, 2, 3]),
        make("PoolFormer", "pooling as attention", 32, **stages),
        make("SwiftFormer", "additive attention, two heads", 32, image_size=32,
             embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
        make("Levit", "cached biases", 64, image_size=64, hidden_sizes=[16, 24, 32],
             num_attention_heads=[1, 2, 2], key_dim=[8, 8, 8], depths=[1, 1, 1]),
        make("Levit", "distilled (two heads)", 64, "ForImageClassificationWithTeacher",
             image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2],
             key_dim=[8, 8, 8], depths=[1, 1, 1]),
        make("Hiera", "hierarchical transformer", 64, image_size=[64, 64], embed_dim=12,
             depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4]),
        make("HGNetV2", "convolutional", 32),
        make("TextNet", "convolutional", 32),
        make("Perceiver", "latent array", 32,
             "ForImageClassificationLearned", num_latents=8, d_latents=48, d_model=64,
             num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=2,
             num_cross_attention_heads=1, image_size=32),
        make("ImageGPT", "takes tokens instead of pixels", 32, n_embd=48, n_layer=2, n_head=2),
    ]  # fmt: skip


@functools.cache
def cases() -> tuple[Case, ...]:
    """All models of the table."""
    return (
        *_torchvision_cases(),
        *_timm_convolutional_cases(),
        *_timm_transformer_cases(),
        *_transformers_cases(),
    )
