"""Write a stand-in for the model hub: the small tokenizers, processors and encoders that diffusers' tests load.

Without a network, the tests could make few pipelines. A repository of the stand-in has the hub's name and layout, so
that ``from_pretrained`` finds it in the cache; vocabularies are single letters, and weights are random. Numbers that a
test compares with the hub's therefore differ, with and without fastguide.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines import kolors

_COMMIT = "0" * 40
_LETTERS = string.ascii_letters + string.digits + string.punctuation
_QWEN_NAMES = """
    endoftext im_start im_end object_ref_start object_ref_end box_start box_end
    quad_start quad_end vision_start vision_end vision_pad image_pad video_pad
"""
_QWEN_SPECIAL = [f"<|{name}|>" for name in _QWEN_NAMES.split()]
_QWEN_FIRST_SPECIAL = 151643  # the published vocabulary's, which models' configurations in the tests count on
_QWEN_WORDS = """
    are a prompt engineer Based on the provided source image ( and target create an interesting text that can be used
    together with to red square
"""  # of Kandinsky's tests, whose texts are cut at the published vocabulary's length, and an image's place with them
_QWEN_WORDS_WITHOUT_SPACE = "user You first second system"
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_hub(cache: Path) -> None:
    """Write all repositories into a cache folder, ``HF_HUB_CACHE`` of the process that uses them."""
    for name, write in _REPOSITORIES.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        folder = repository / "snapshots" / _COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(_COMMIT)
        torch.manual_seed(0)
        write(folder)


# ---- vocabularies ----


def _byte_letters() -> list[str]:
    """Return what byte-level vocabularies write for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = (byte for byte in range(256) if byte not in shown)
    return [chr(byte) for byte in shown] + [chr(256 + index) for index, _ in enumerate(hidden)]


def _numbered(*pieces: str) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def _scored(*special: str) -> list[tuple[str, float]]:
    """Return the pieces of a unigram vocabulary, each with its log-probability."""
    return [*((piece, 0.0) for piece in special), *((piece, -3.0) for piece in ("▁", *_LETTERS))]


def _clip() -> Any:
    letters = _byte_letters()
    vocabulary = _numbered(*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>")
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _t5(**config: Any) -> Any:
    return transformers.T5Tokenizer(vocab=_scored("<pad>", "</s>", "<unk>"), extra_ids=100, **config)


def _llama_like(kind: str, *special: str) -> Any:
    pieces = _numbered(*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *_LETTERS)
    return getattr(transformers, kind)(vocab=pieces, merges=[])


def _gemma() -> Any:
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = _llama_like("GemmaTokenizer", *special)
    tokenizer.add_bos_token = True  # as the published ones: an empty text has no mean over its tokens
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{{ part['text'] if 'text' in part }}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    return tokenizer


def _llama() -> Any:
    tokenizer = _llama_like("LlamaTokenizer", "<unk>", "<s>", "</s>", "<pad>")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def _merges(*pieces: str) -> list[tuple[str, str]]:
    """Return what makes one token of each piece, letter by letter."""
    return list(dict.fromkeys((piece[:end], piece[end]) for piece in pieces for end in range(1, len(piece))))


def _qwen() -> Any:
    merges: Any = _merges(*(f"Ġ{word}" for word in _QWEN_WORDS.split()), *_QWEN_WORDS_WITHOUT_SPACE.split())
    pieces = list(dict.fromkeys([*_byte_letters(), *map("".join, merges)]))
    unused = (f"unused {index}" for index in range(len(pieces), _QWEN_FIRST_SPECIAL))
    vocabulary = _numbered(*pieces, *unused, *_QWEN_SPECIAL)
    return transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, extra_special_tokens=_QWEN_SPECIAL, chat_template=_CHAT
    )


def _bert() -> Any:
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    return transformers.BertTokenizer(vocab=_numbered(*special, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)))


def _roberta() -> Any:
    return transformers.RobertaTokenizer(
        vocab=_numbered("<s>", "<pad>", "</s>", "<unk>", *_byte_letters(), "<mask>"), merges=[]
    )


def _xlm_roberta() -> Any:
    return transformers.XLMRobertaTokenizer(vocab=[*_scored("<s>", "<pad>", "</s>", "<unk>"), ("<mask>", 0.0)])


# ---- repositories ----


def _saved(*makers: Callable[[], Any]) -> Callable[[Path], None]:
    """Return what saves what these make."""

    def write(folder: Path) -> None:
        for make in makers:
            make().save_pretrained(folder)

    return write


def _model(kind: str, **config: Any) -> Callable[[], Any]:
    """Return what makes a model of a class with its configuration's class, and random weights."""

    def make() -> Any:
        model = getattr(transformers, kind)
        return model(model.config_class(**config))

    return make


def _qwen2_vl() -> Any:
    text: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 37, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 152064, "max_window_layers": 2}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 16, "num_heads": 4, "mlp_ratio": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen2_vl_processor() -> Any:
    images = transformers.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    videos = transformers.Qwen2VLVideoProcessor()
    processor: Any = transformers.Qwen2VLProcessor
    return processor(images, _qwen(), videos, chat_template=_CHAT)


def _siglip_processor() -> Any:
    return transformers.SiglipImageProcessor(size={"height": 30, "width": 30})


def _dpt_processor() -> Any:
    return transformers.DPTImageProcessor(size={"height": 32, "width": 32})


def _qwen3_vl() -> Any:
    text: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 37, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 152064}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 37, "num_heads": 4, "out_hidden_size": 16}
    vision |= {"num_position_embeddings": 16}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen3_vl_processor() -> Any:
    images = transformers.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112, patch_size=16)
    processor: Any = transformers.Qwen3VLProcessor
    return processor(images, _qwen(), transformers.Qwen3VLVideoProcessor(), chat_template=_CHAT)


def _gemma3() -> Any:
    text: dict[str, Any] = {**_TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    text |= {"vocab_size": 1000, "layer_types": ["full_attention"] * 2}
    vision = {**_VISION, "image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def _mistral_processor() -> Any:
    special = ("<unk>", "[IMG]", "<s>", "</s>", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]")
    tokenizer = _llama_like("LlamaTokenizer", *special)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    chat = _CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", "[IMG]")
    processor: Any = transformers.PixtralProcessor
    return processor(transformers.PixtralImageProcessor(), tokenizer, patch_size=6, chat_template=chat)


def _glm_image_processor() -> Any:
    vocabulary = _numbered(*_byte_letters(), *_QWEN_SPECIAL)
    named = {"image_token": "<|image_pad|>", "grid_bos_token": "<|box_start|>", "grid_eos_token": "<|box_end|>"}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=[], bos_token="<|vision_start|>", extra_special_tokens=named
    )
    processor: Any = transformers.GlmImageProcessor
    return processor(transformers.GlmImageImageProcessor(), tokenizer, chat_template=_CHAT)


def _write_chat_glm(folder: Path) -> None:
    """Write the vocabulary and the encoder that diffusers has for Kolors; no other needs sentencepiece."""
    import sentencepiece

    sentences = [" ".join(_LETTERS), _LETTERS] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=len(_LETTERS) + 4,
        minloglevel=2,
    )
    configuration: Any = kolors.text_encoder.ChatGLMConfig
    config = configuration(
        **{"num_layers": 2, "padded_vocab_size": 1000, "hidden_size": 8, "ffn_hidden_size": 37, "kv_channels": 4},
        **{"num_attention_heads": 2, "original_rope": True, "add_qkv_bias": True},
    )
    encoder: Any = kolors.text_encoder.ChatGLMModel
    model = encoder(config).float()
    for weights in model.parameters():  # which it leaves as the memory was
        torch.nn.init.normal_(weights, mean=float(weights.dim() == 1), std=0.1)
    model.save_pretrained(folder)
    tokenizer: Any = kolors.tokenizer.ChatGLMTokenizer
    tokenizer(str(folder / "tokenizer.model")).save_pretrained(folder)


def _write_consistency_models(folder: Path) -> None:
    model: Any = diffusers.UNet2DModel
    for name, classes in {"test_unet": None, "test_unet_class_cond": 10}.items():
        model(
            **{"sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "norm_num_groups": 32},
            **{"block_out_channels": (32, 64), "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")},
            **{"up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "attention_head_dim": 8},
            **{"resnet_time_scale_shift": "scale_shift", "num_class_embeds": classes},
        ).save_pretrained(folder / name)


def _in(subfolder: str, *makers: Callable[[], Any]) -> Callable[[Path], None]:
    return lambda folder: _saved(*makers)(folder / subfolder)


_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4, "vocab_size": 1103}
_TEXT = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5, "num_attention_heads": 4}
_VISION = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
_TESTING = "hf-internal-testing"
_REPOSITORIES: dict[str, Callable[[Path], None]] = {
    f"{_TESTING}/tiny-random-clip": _saved(_clip),
    f"{_TESTING}/tiny-random-t5": _saved(_model("T5EncoderModel", **_T5), _t5),
    f"{_TESTING}/tiny-random-T5Model": _saved(_t5),
    f"{_TESTING}/tiny-random-umt5": _saved(_model("UMT5EncoderModel", **_T5), _t5),
    f"{_TESTING}/tiny-random-Qwen2VLForConditionalGeneration": _saved(_qwen2_vl, _qwen2_vl_processor),
    f"{_TESTING}/dummy-gemma": _saved(transformers.GemmaConfig, _gemma),
    f"{_TESTING}/tiny-random-Gemma3ForCausalLM": _saved(transformers.Gemma3TextConfig, _gemma),
    f"{_TESTING}/tiny-random-BertModel": _saved(_model("BertModel", vocab_size=1124, **_TEXT), _bert),
    f"{_TESTING}/tiny-random-LlamaForCausalLM": _saved(
        _model("LlamaForCausalLM", vocab_size=32000, **_TEXT | {"hidden_size": 16}), _llama
    ),
    f"{_TESTING}/tiny-random-roberta": _saved(_roberta),
    f"{_TESTING}/tiny-random-SiglipVisionModel": _saved(
        _model("SiglipVisionModel", image_size=30, patch_size=2, **_VISION), _siglip_processor
    ),
    f"{_TESTING}/tiny-random-ClapModel": _saved(transformers.ClapFeatureExtractor),
    f"{_TESTING}/tiny-random-DPTForDepthEstimation": _saved(_dpt_processor),
    "YiYiXu/tiny-random-mclip-base": _saved(_xlm_roberta),
    "finetrainers/dummy-hunyaunvideo": _in("tokenizer", _llama),
    f"{_TESTING}/tiny-random-T5ForConditionalGeneration": _saved(_model("T5EncoderModel", **_T5), _t5),
    f"{_TESTING}/tiny-gemma3": _saved(_gemma3, _gemma),
    f"{_TESTING}/llama-tokenizer": _saved(transformers.LlamaConfig, _llama),
    "Qwen/Qwen3-Embedding-0.6B": _saved(transformers.Qwen2Config, _qwen),
    f"{_TESTING}/tiny-cosmos3-modular-pipe": _in("text_tokenizer", transformers.Qwen2Config, _qwen),
    f"{_TESTING}/Mistral-Small-3.1-24B-Instruct-2503-only-processor": _saved(_mistral_processor),
    "huangfeice/tiny-random-Qwen3VLForConditionalGeneration": _saved(_qwen3_vl, _qwen3_vl_processor),
    "zai-org/GLM-Image": _in("processor", transformers.Qwen2Config, _glm_image_processor),
    "THUDM/glm-4-9b-chat": _saved(transformers.LlamaConfig, _llama),
    f"{_TESTING}/tiny-random-chatglm3-6b": _write_chat_glm,
    "diffusers/consistency-models-test": _write_consistency_models,
}
