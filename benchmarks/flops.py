"""Floating-point operations of the forward pass of one pair, for `pairsift estimate`.

    python -m benchmarks.flops [--clip ARCHITECTURE …] [--json]

torch counts them for the architectures of `recipes/paper.yaml` and for the given open_clip architectures, with captions
of maximum length. CLIP models are counted on the meta device. BLIP and BLIP-2 inspect their inputs, so small versions
run for real: their operations are linear in the number of layers of each part. Also measures the matrix-product
operations per second of one core of this machine, for devices without a published peak.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from typing import Any

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipConfig,
    BlipForImageTextRetrieval,
    OPTConfig,
)

from benchmarks.random_models import ITM_TEXT, LARGE_VISION, OPT_2_7B

ITM_TOKENS = 64
PROMPT_TOKENS = 17  # OPT tokens of the default digit question
CLIPS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14")


def count(forward: Callable[[], object]) -> float:
    """Floating-point operations of a call. A multiply-add counts as two."""
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see the fast path
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    torch.backends.mha.set_fastpath_enabled(True)
    return float(counter.get_total_flops())


def clip(architecture: str) -> dict[str, float]:
    """Operations for an image with a caption of maximum length and for the image alone, and embedding dimensions."""
    config = copy.deepcopy(open_clip.get_model_config(architecture))
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    side, tokens = config["vision_cfg"]["image_size"], config["text_cfg"].get("context_length", 77)
    with torch.device("meta"):
        model = kind(**config).eval()
        picture, caption = torch.empty(1, 3, side, side), torch.zeros(1, tokens, dtype=torch.long)
    image = count(lambda: model.encode_image(picture))
    return {
        f"flops/{architecture}": image + count(lambda: model.encode_text(caption)),
        f"flops/{architecture}/image": image,
        f"dimensions/{architecture}": float(config["embed_dim"]),
    }


def itm(vision: dict[str, int]) -> float:
    """Operations of BLIP with a matching head, for an image and a caption of maximum length."""
    depth = {"vision": vision.get("num_hidden_layers", 12), "text": 12}

    def operations(**layers: int) -> float:
        text = {**ITM_TEXT, "num_hidden_layers": layers["text"]}
        sight = {"image_size": 384, **vision, "num_hidden_layers": layers["vision"]}
        model = _frozen(BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=sight)))
        tokens, picture = torch.ones(1, ITM_TOKENS, dtype=torch.long), torch.empty(1, 3, 384, 384)
        return count(lambda: model(input_ids=tokens, pixel_values=picture, attention_mask=torch.ones_like(tokens)))

    return _linear(operations, depth, {"vision": 1, "text": 1})


def digit() -> float:
    """Operations of BLIP-2 with OPT-2.7b, for an image and one question, up to the first token of the answer."""
    full = Blip2Config()
    depth = {
        "vision": full.vision_config.num_hidden_layers,
        "query": full.qformer_config.num_hidden_layers,
        "text": OPT_2_7B["num_hidden_layers"],
    }
    queries, side = full.num_query_tokens, full.vision_config.image_size

    def operations(**layers: int) -> float:
        config = Blip2Config(
            vision_config={"num_hidden_layers": layers["vision"]},
            qformer_config={"num_hidden_layers": layers["query"]},
            text_config=OPTConfig(**{**OPT_2_7B, "num_hidden_layers": layers["text"]}).to_dict(),
            image_token_index=2,
        )
        model = _frozen(Blip2ForConditionalGeneration(config))
        tokens = torch.tensor([[2] * queries + [5] * PROMPT_TOKENS])
        picture = torch.empty(1, 3, side, side)

        def forward() -> None:
            image = model.get_image_features(picture, return_dict=True)
            model(
                pixel_values=None, input_ids=tokens, attention_mask=torch.ones_like(tokens),
                mm_encoder_outputs={"image": image}, logits_to_keep=1,
            )  # fmt: skip

        return count(forward)

    # Every second layer of the query transformer attends to the image, so layers are added in pairs.
    return _linear(operations, depth, {"vision": 1, "query": 2, "text": 1})


def _frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def _linear(operations: Callable[..., float], depth: dict[str, int], step: dict[str, int]) -> float:
    """Operations at full depth, extrapolated from the smallest depth and from one more step in each part."""
    smallest = operations(**step)
    added = {part: operations(**{**step, part: 2 * step[part]}) - smallest for part in step}
    return smallest + sum((depth[part] // step[part] - 1) * more for part, more in added.items())


def peak(dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product on one core."""
    torch.set_num_threads(1)
    left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    taken = []
    for _ in range(6):
        started = time.process_time()
        _ = left @ right
        taken.append(time.process_time() - started)
    return 2 * 2048**3 / min(taken[1:])


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clip", nargs="*", default=CLIPS, help="open_clip architectures")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    for architecture in arguments.clip:
        figures |= clip(architecture)
    figures["flops/Salesforce/blip-itm-base-coco"] = itm({})
    figures["flops/Salesforce/blip-itm-large-coco"] = itm(LARGE_VISION)
    figures["flops/Salesforce/blip2-opt-2.7b"] = digit()
    figures["peak/core/fp32"], figures["peak/core/bf16"] = peak(torch.float32), peak(torch.bfloat16)
    for name, value in figures.items():
        print(f"{name}: {value:.6g}")
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
