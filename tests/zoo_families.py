"""The wider zoo: hand-written traps, and networks of timm and transformers with few layers and channels.

``FAMILIES`` lists them; listing needs neither package, and ``make`` of a network with the trait ``timm`` or
``transformers`` imports it. Nothing is downloaded: the weights are random.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo import TOKENS, Network
from zoo_sequences import SEQUENCES
from zoo_traps import TRAPS, Family, randomise_constants, registrar

FAMILIES: list[Network] = [*TRAPS, *SEQUENCES]
family = registrar(FAMILIES)


def import_torchvision() -> None:
    """Make ``import torchvision`` work beside a torch that its operators were not built for.

    torchvision's wheel is linked with a CUDA torch, so that beside torch's CPU build its library does not load; the
    import then fails as it registers shapes for two operators that nobody defined. No network here calls them.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def import_timm() -> Any:
    import_torchvision()
    return importlib.import_module("timm")


def import_transformers() -> Any:
    if importlib.util.find_spec("torchvision") is not None:  # Not needed, but imported where it is installed.
        import_torchvision()
    return importlib.import_module("transformers")


def timm_network(model: str, *traits: str, size: int = 32, num_folded: int = 0, **options: Any) -> None:
    def make() -> nn.Module:
        return randomise_constants(import_timm().create_model(model, pretrained=False, num_classes=7, **options))

    shapes = {"x": (3, size, size)}
    FAMILIES.append(Family(f"timm_{model}", make, shapes, frozenset({"timm", *traits}), num_folded))


class Outputs(nn.Module):
    """Calls a model of transformers and gives its tensors as a dict, or its first where there is one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def call(self, **inputs: Tensor) -> Any:
        outputs = {name: value for name, value in self.model(**inputs).items() if isinstance(value, Tensor)}
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))


class TokenModel(Outputs):
    def forward(self, ids: Tensor) -> Any:
        return self.call(input_ids=ids)


class EncoderDecoder(Outputs):
    def forward(self, ids: Tensor, decoder_ids: Tensor) -> Any:
        return {"logits": self.model(input_ids=ids, decoder_input_ids=decoder_ids).logits}


class ImageModel(Outputs):
    def forward(self, pixels: Tensor) -> Any:
        return self.call(pixel_values=pixels)


class WaveModel(Outputs):
    def forward(self, wave: Tensor) -> Any:
        return self.call(input_values=wave)


class SpectrumModel(Outputs):
    def forward(self, spectrum: Tensor) -> Any:
        return self.call(input_features=spectrum)


def transformers_network(
    model: str,
    config: str,
    wrapper: Callable[[nn.Module], nn.Module],
    *traits: str,
    num_folded: int = 0,
    shapes: dict[str, tuple[int, ...]],
    **options: Any,
) -> None:
    def make() -> nn.Module:
        transformers = import_transformers()
        built = getattr(transformers, model)(getattr(transformers, config)(**options))
        return randomise_constants(wrapper(built))

    FAMILIES.append(Family(model, make, shapes, frozenset({"transformers", *traits}), num_folded))


# -- timm ------------------------------------------------------------------------------------------------------------

WIDTHS = (16, 24, 32, 48)
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}

timm_network("resnet10t", "conv", num_folded=15, channels=WIDTHS)
timm_network("resnext50_32x4d", "conv", num_folded=16, layers=(1, 1, 1, 1), cardinality=8, channels=(16, 32, 64, 128))
timm_network("seresnet18", "conv", num_folded=21, channels=WIDTHS)
timm_network("ecaresnet26t", "conv", num_folded=18, layers=(1, 1, 1, 1), channels=(16, 32, 48, 64))
timm_network("skresnet18", "conv", num_folded=21, channels=(16, 32, 48, 64), layers=(1, 1, 1, 1))
timm_network("resnest14d", "conv", num_folded=22, channels=(16, 32, 48, 64))
timm_network("res2net50_26w_4s", "conv", num_folded=24, layers=(1, 1, 1, 1), channels=(16, 32, 48, 64))
timm_network("tresnet_m", "conv", num_folded=14, layers=(1, 1, 1, 1), width_factor=0.25)
timm_network("vgg11", "conv", mlp_ratio=0.02)
timm_network("densenet121", "conv", num_folded=10, growth_rate=8, block_config=(2, 3, 2, 2))
timm_network("dla46_c", "conv", num_folded=48)
timm_network("hrnet_w18_small", "conv", num_folded=91)
timm_network("ese_vovnet19b_dw", "conv", num_folded=23)
timm_network("cs3darknet_focus_s", "conv", num_folded=31)
timm_network("regnetx_002", "conv", num_folded=44)
timm_network("regnety_002", "conv", num_folded=44)
timm_network("repvgg_a0", "conv", num_folded=44)
timm_network("nfnet_l0", "conv", depths=(1, 1, 1, 1), channels=(32, 64, 96, 96), group_size=8)
timm_network("mobilenetv2_035", "conv", num_folded=52)
timm_network("mobilenetv3_small_050", "conv", num_folded=34)
timm_network("mobilenetv4_conv_small_050", "conv", num_folded=46)
timm_network("mnasnet_small", "conv", num_folded=46)
timm_network("efficientnet_b0", "conv", num_folded=49)
timm_network("ghostnet_050", "conv", num_folded=80)
timm_network("rexnet_100", "conv", num_folded=62, width_mult=0.5)
timm_network("convnext_atto", "conv", depths=(1, 1, 2, 1), dims=WIDTHS)
timm_network("inception_next_atto", "conv", num_folded=1, depths=(1, 1, 2, 1), dims=WIDTHS)
timm_network("vit_tiny_patch16_224", **VIT)
timm_network("deit_tiny_distilled_patch16_224", **VIT)
timm_network("beit_base_patch16_224", **VIT, num_heads=3)
timm_network("eva02_tiny_patch14_224", **VIT, num_heads=3)
timm_network("cait_xxs24_224", **VIT)
timm_network("convit_tiny", **{**VIT, "depth": 3}, local_up_to_layer=2)
timm_network("xcit_nano_12_p16_224", num_folded=3, **VIT, num_heads=3)
timm_network("visformer_tiny", num_folded=4, img_size=64, size=64, embed_dim=48, init_channels=8, num_heads=3)
timm_network(
    "swin_tiny_patch4_window7_224",
    img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4),
)  # fmt: skip
timm_network("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 32, 48), num_heads=(1, 2, 2, 4))
timm_network("davit_tiny", depths=(1, 1, 1, 1), embed_dims=WIDTHS, num_heads=(1, 2, 2, 4))
timm_network(
    "levit_128s", num_folded=4,
    img_size=64, size=64, embed_dim=(32, 48, 64), num_heads=(2, 3, 4), key_dim=8, depth=(1, 1, 1),
)  # fmt: skip
timm_network("coat_lite_tiny", img_size=64, size=64, embed_dims=WIDTHS, serial_depths=(1, 1, 1, 1))
timm_network("coatnet_nano_rw_224", num_folded=5, img_size=64, size=64, depths=(1, 1, 1, 1), embed_dim=(16, 32, 32, 48))
timm_network("edgenext_xx_small", depths=(1, 1, 2, 1), dims=WIDTHS)
timm_network("mobilevit_xxs", num_folded=32, size=64)
timm_network("mobilevitv2_050", "conv", num_folded=25, size=64)
timm_network("efficientvit_b0", num_folded=26)
timm_network("fastvit_t8", "conv", num_folded=46, size=64)
timm_network("starnet_s1", "conv", num_folded=35)


@family("timm", "conv", x=(3, 32, 32))
def timm_mixer() -> nn.Module:
    mixer = import_timm().models.mlp_mixer
    return mixer.MlpMixer(7, img_size=32, patch_size=8, num_blocks=2, embed_dim=48)


@family("timm", "conv", x=(3, 32, 32))
def timm_resmlp() -> nn.Module:
    mixer, options = import_timm().models.mlp_mixer, {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 48}
    return mixer.MlpMixer(7, block_layer=mixer.ResBlock, norm_layer=mixer.Affine, mlp_ratio=4, **options)


@family("timm", "conv", x=(3, 32, 32))
def timm_gmlp() -> nn.Module:
    mixer, options = import_timm().models.mlp_mixer, {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 48}
    mlp = importlib.import_module("timm.layers").GatedMlp
    return mixer.MlpMixer(7, block_layer=mixer.SpatialGatingBlock, mlp_layer=mlp, mlp_ratio=4, **options)


@family("timm", "conv", x=(3, 64, 64))
def timm_poolformer() -> nn.Module:
    metaformer, norm = import_timm().models.metaformer, importlib.import_module("timm.layers").GroupNorm1
    return metaformer.MetaFormer(
        num_classes=7, depths=(1, 1, 2, 1), dims=WIDTHS, token_mixers=metaformer.Pooling, norm_layers=norm,
        downsample_norm=None, mlp_act=nn.GELU, mlp_bias=True, layer_scale_init_values=1e-5, use_mlp_head=False,
    )  # fmt: skip


# -- transformers ----------------------------------------------------------------------------------------------------

EAGER: dict[str, Any] = {"attn_implementation": "eager"}
SDPA: dict[str, Any] = {"attn_implementation": "sdpa"}
IDS: dict[str, Any] = {"shapes": {"ids": (9,)}}
PIXELS: dict[str, Any] = {"shapes": {"pixels": (3, 32, 32)}}
BODY: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER: dict[str, Any] = {**IDS, **BODY, "intermediate_size": 48, "max_position_embeddings": 32}
DECODER: dict[str, Any] = {**ENCODER, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED: dict[str, Any] = {**DECODER, "num_key_value_heads": 2, "head_dim": 8}
VISION: dict[str, Any] = {
    **PIXELS, "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip

transformers_network("BertForSequenceClassification", "BertConfig", TokenModel, TOKENS, **ENCODER, **EAGER)
transformers_network("RobertaForMaskedLM", "RobertaConfig", TokenModel, TOKENS, **ENCODER, **SDPA)
transformers_network(
    "DistilBertForQuestionAnswering", "DistilBertConfig", TokenModel, TOKENS,
    **IDS, vocab_size=32, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=32, **SDPA,
)  # fmt: skip
transformers_network("AlbertForMaskedLM", "AlbertConfig", TokenModel, TOKENS, **ENCODER, embedding_size=16, **EAGER)
transformers_network("ElectraForTokenClassification", "ElectraConfig", TokenModel, TOKENS, **ENCODER, embedding_size=16)
transformers_network(
    "DebertaV2ForSequenceClassification", "DebertaV2Config", TokenModel, TOKENS,
    **ENCODER, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
    share_att_key=True, conv_kernel_size=3,
)  # fmt: skip
transformers_network("SqueezeBertForMaskedLM", "SqueezeBertConfig", TokenModel, TOKENS, **ENCODER, embedding_size=32)
transformers_network(
    "GPT2LMHeadModel", "GPT2Config", TokenModel, TOKENS,
    **IDS, vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1,
    eos_token_id=2, use_cache=False, **EAGER,
)  # fmt: skip
transformers_network(
    "GPTNeoForCausalLM", "GPTNeoConfig", TokenModel, TOKENS,
    **IDS, vocab_size=32, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, window_size=4,
    attention_types=[[["global", "local"], 1]], max_position_embeddings=32, use_cache=False,
)  # fmt: skip
transformers_network("GPTNeoXForCausalLM", "GPTNeoXConfig", TokenModel, TOKENS, **DECODER, **SDPA)
transformers_network(
    "OPTForCausalLM", "OPTConfig", TokenModel, TOKENS,
    **IDS, **BODY, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=32, use_cache=False, **SDPA,
)  # fmt: skip
transformers_network(
    "BloomForCausalLM", "BloomConfig", TokenModel, TOKENS,
    **IDS, vocab_size=32, hidden_size=32, n_layer=2, n_head=4, use_cache=False,
)  # fmt: skip
transformers_network(
    "FalconForCausalLM", "FalconConfig", TokenModel, TOKENS,
    **IDS, **BODY, multi_query=True, parallel_attn=True, use_cache=False, **EAGER,
)  # fmt: skip
transformers_network("LlamaForCausalLM", "LlamaConfig", TokenModel, TOKENS, **GROUPED, **SDPA)
transformers_network("MistralForCausalLM", "MistralConfig", TokenModel, TOKENS, **GROUPED, sliding_window=4, **EAGER)
transformers_network("Qwen2ForCausalLM", "Qwen2Config", TokenModel, TOKENS, **DECODER, num_key_value_heads=2, **SDPA)
transformers_network("Qwen3ForCausalLM", "Qwen3Config", TokenModel, TOKENS, **GROUPED, **EAGER)
transformers_network(
    "GemmaForCausalLM", "GemmaConfig", TokenModel, TOKENS, **DECODER, num_key_value_heads=1, head_dim=8, **EAGER
)
transformers_network("PhiForCausalLM", "PhiConfig", TokenModel, TOKENS, **DECODER, partial_rotary_factor=0.5, **SDPA)
transformers_network(
    "T5EncoderModel", "T5Config", TokenModel, TOKENS,
    **IDS, vocab_size=32, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    use_cache=False,
)  # fmt: skip
transformers_network(
    "BartForConditionalGeneration", "BartConfig", EncoderDecoder, TOKENS, shapes={"ids": (9,), "decoder_ids": (7,)},
    vocab_size=32, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, use_cache=False, **SDPA,
)  # fmt: skip
transformers_network("ViTForImageClassification", "ViTConfig", ImageModel, **VISION, **SDPA)
transformers_network("DeiTForImageClassificationWithTeacher", "DeiTConfig", ImageModel, **VISION, **EAGER)
transformers_network(
    "CLIPVisionModelWithProjection", "CLIPVisionConfig", ImageModel, **VISION, projection_dim=16, **SDPA
)
transformers_network(
    "SwinForImageClassification", "SwinConfig", ImageModel,
    **PIXELS, image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
)  # fmt: skip
transformers_network(
    "SegformerForSemanticSegmentation", "SegformerConfig", ImageModel, num_folded=1,
    **PIXELS, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4],
    decoder_hidden_size=16,
)  # fmt: skip
transformers_network(
    "ConvNextForImageClassification", "ConvNextConfig", ImageModel, "conv",
    **PIXELS, depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32],
)  # fmt: skip
transformers_network(
    "ResNetForImageClassification", "ResNetConfig", ImageModel, "conv", num_folded=17,
    **PIXELS, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], embedding_size=8,
)  # fmt: skip
transformers_network(
    "MobileNetV2ForImageClassification", "MobileNetV2Config", ImageModel, "conv", num_folded=52,
    **PIXELS, image_size=32, depth_multiplier=0.35,
)  # fmt: skip
transformers_network(
    "Wav2Vec2Model", "Wav2Vec2Config", WaveModel,
    shapes={"wave": (400,)}, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    conv_dim=(8, 12, 16), conv_kernel=(10, 3, 3), conv_stride=(5, 2, 2), num_feat_extract_layers=3,
    num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, apply_spec_augment=False, **SDPA,
)  # fmt: skip
transformers_network(
    "WhisperForAudioClassification", "WhisperConfig", SpectrumModel,
    shapes={"spectrum": (8, 32)}, vocab_size=32, num_mel_bins=8, d_model=32, encoder_layers=2, encoder_ffn_dim=48,
    encoder_attention_heads=4, max_source_positions=16, classifier_proj_size=16, use_weighted_layer_sum=True,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **EAGER,
)  # fmt: skip
