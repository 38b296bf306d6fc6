"""Models of the real architectures with random weights, saved in each format that a benchmark reads.

Speed does not depend on the weights, and a benchmark should not download gigabytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    OPTConfig,
    PreTrainedTokenizerFast,
)

PROMPT = "Question: is there any digit or number written in the image? Answer:"


def save_open_clip(folder: Path, model_cfg: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Save a model in open_clip's hub format. Returns its weights."""
    torch.manual_seed(0)
    architecture = dict(model_cfg)
    kind = open_clip.CustomTextCLIP if architecture.pop("custom_text", False) else open_clip.CLIP
    state = kind(**architecture).state_dict()
    folder.mkdir(parents=True)
    save_file(state, str(folder / "open_clip_model.safetensors"))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    return state


def save_clip(folder: Path, architecture: str) -> None:
    """Save a CLIP for open_clip (`folder`), clip-retrieval (`folder/open_clip.pt`) and transformers (`folder/hf`)."""
    model_cfg = open_clip.get_model_config(architecture)
    state = save_open_clip(folder, model_cfg)
    torch.save(state, folder / "open_clip.pt")
    _as_transformers(state, model_cfg).save_pretrained(folder / "hf")
    side = model_cfg["vision_cfg"]["image_size"]
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder / "hf")
    _save_clip_tokenizer(folder / "hf")


def save_tiny_clip(folder: Path) -> None:
    """Save a CLIP that costs almost nothing, because stage 2 cannot run BLIP or BLIP-2 without a CLIP."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    save_open_clip(folder, {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})


def save_siglip(folder: Path, embed_dim: int = 768, **smaller: dict[str, Any]) -> None:
    """Save SigLIP's ViT-B/16 architecture with a tokenizer in the same folder, as on a hub.

    `smaller` overrides settings of its towers, by tower.
    """
    model_cfg = {**open_clip.get_model_config("ViT-B-16-SigLIP"), "embed_dim": embed_dim}
    save_open_clip(folder, model_cfg | {tower: model_cfg[tower] | changes for tower, changes in smaller.items()})
    word_tokenizer().save_pretrained(folder)


ITM_TEXT = {"num_hidden_layers": 12, "vocab_size": 30524, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}
"""The text configuration of Salesforce/blip-itm-base-coco and -large-coco."""

OPT_2_7B = {
    "hidden_size": 2560, "ffn_dim": 10240, "num_attention_heads": 32, "word_embed_proj_dim": 2560,
    "num_hidden_layers": 32, "vocab_size": 50304,
}  # fmt: skip
"""The language-model configuration of Salesforce/blip2-opt-2.7b."""

LARGE_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
"""The vision settings in which Salesforce/blip-itm-large-coco differs from the base model."""


def save_itm(folder: Path, words: list[str], layers: int = 12, **vision: Any) -> None:
    """Save the architecture of Salesforce/blip-itm-base-coco, with `words` in its vocabulary.

    `vision` overrides settings of the vision tower.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})
    text = {**ITM_TEXT, "num_hidden_layers": layers}
    vision = {"num_hidden_layers": layers, "image_size": 384, **vision}
    torch.manual_seed(0)
    BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(), tokenizer).save_pretrained(folder)
    # A copy for transformers 4, which data-juicer pins and which cannot read the processor of transformers 5.
    BlipImageProcessor().save_pretrained(folder / "hf4")
    tokenizer.save_pretrained(folder / "hf4")
    for name in ("config.json", "model.safetensors"):
        (folder / "hf4" / name).symlink_to(folder / name)


def save_digit(folder: Path, tokenizer: Any, layers: int | None = None) -> None:
    """Save the architecture of Salesforce/blip2-opt-2.7b in bf16 (7.7 GB); `layers` limits the layers of each part."""
    depth = {} if layers is None else {"num_hidden_layers": layers}
    text = OPTConfig(**{**OPT_2_7B, **depth})
    config = Blip2Config(
        vision_config=depth,
        qformer_config=depth,
        text_config=text.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # creating it in fp32 would take 15 GB of memory
    try:
        Blip2ForConditionalGeneration(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    side = config.vision_config.image_size
    processor = Blip2Processor(BlipImageProcessor(size={"height": side, "width": side}), tokenizer, num_query_tokens=32)
    processor.save_pretrained(folder)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the digit question and its two answers; as in OPT's, a space is part of the word after it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([PROMPT, " yes yes no no"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )


def _as_transformers(state: dict[str, torch.Tensor], model_cfg: dict[str, Any]) -> CLIPModel:
    """Convert open_clip weights to a transformers model of the same architecture."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    dim = model_cfg["embed_dim"]
    config = CLIPConfig(
        text_config={
            "hidden_size": text["width"], "intermediate_size": 4 * text["width"], "hidden_act": "gelu",
            "num_hidden_layers": text["layers"], "num_attention_heads": text["heads"], "projection_dim": dim,
            "bos_token_id": 49406, "eos_token_id": 49407,
        },
        vision_config={
            "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"], "hidden_act": "gelu",
            "num_hidden_layers": vision["layers"], "num_attention_heads": vision["width"] // 64,
            "patch_size": vision["patch_size"], "image_size": vision["image_size"], "projection_dim": dim,
        },
        projection_dim=dim,
    )  # fmt: skip
    named = {
        "logit_scale": state["logit_scale"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
    }
    for theirs, ours in (
        ("text_model.final_layer_norm", "ln_final"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
    ):
        named |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    for theirs, ours, layers in (
        ("text_model.encoder.layers", "transformer.resblocks", text["layers"]),
        ("vision_model.encoder.layers", "visual.transformer.resblocks", vision["layers"]),
    ):
        for layer in range(layers):
            prefix = f"{ours}.{layer}."
            block = {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}
            for kind in ("weight", "bias"):
                query, key, value = block[f"attn.in_proj_{kind}"].chunk(3)
                named |= {
                    f"{theirs}.{layer}.{name}.{kind}": tensor
                    for name, tensor in {
                        "self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": value,
                        "self_attn.out_proj": block[f"attn.out_proj.{kind}"],
                        "layer_norm1": block[f"ln_1.{kind}"], "layer_norm2": block[f"ln_2.{kind}"],
                        "mlp.fc1": block[f"mlp.c_fc.{kind}"], "mlp.fc2": block[f"mlp.c_proj.{kind}"],
                    }.items()
                }  # fmt: skip
    model = CLIPModel(config)
    missing, unexpected = model.load_state_dict(named, strict=False)
    if unexpected or [name for name in missing if "position_ids" not in name]:
        raise AssertionError(f"the architectures differ: missing {missing}, unexpected {unexpected}")
    return model


def _save_clip_tokenizer(folder: Path) -> None:
    """Save CLIP's vocabulary and merges, taken from open_clip, in the two files that transformers reads."""
    tokenizer = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): number for word, number in tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
