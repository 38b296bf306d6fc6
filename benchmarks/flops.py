"""Floating-point operations of one pair's forward pass, for `pairsift estimate`.

    python -m benchmarks.flops [--clip ARCHITECTURE …] [--json]

Counted by torch over the architectures of `recipes/paper.yaml` and the given ones of open_clip; captions as long as the
models take them. CLIPs are counted on the meta device. BLIP and BLIP-2 look at their inputs, so these are run, with one
layer more of each part in turn: their operations are linear in the layers. Last, the matrix products that one core of
this machine does a second, for devices that have no published peak.
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
PROMPT_TOKENS = 17  # of the default digit question, in OPT's tokens
CLIPS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14")


def count(forward: Callable[[], object]) -> float:
    """Floating-point operations of a call: two for each multiply-add."""
    torch.backends.mha.set_fastpath_enabled(False)  # which the counter does not see
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    torch.backends.mha.set_fastpath_enabled(True)
    return float(counter.get_total_flops())


def clip(architecture: str) -> dict[str, float]:
    """A picture and a caption of full length; the picture alone; the embedding's dimensions."""
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
    """BLIP with an image-text matching head: a picture and a caption of full length."""
    depth = {"vision": vision.get("num_hidden_layers", 12), "text": 12}

    def of(**layers: int) -> float:
        text = {**ITM_TEXT, "num_hidden_layers": layers["text"]}
        sight = {"image_size": 384, **vision, "num_hidden_layers": layers["vision"]}
        model = _still(BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=sight)))
        tokens, picture = torch.ones(1, ITM_TOKENS, dtype=torch.long), torch.empty(1, 3, 384, 384)
        return count(lambda: model(input_ids=tokens, pixel_values=picture, attention_mask=torch.ones_like(tokens)))

    return _linear(of, depth, {"vision": 1, "text": 1})


def digit() -> float:
    """BLIP-2 with OPT-2.7b: a picture and one question, up to the first token of the answer."""
    whole = Blip2Config()
    depth = {
        "vision": whole.vision_config.num_hidden_layers,
        "query": whole.qformer_config.num_hidden_layers,
        "text": OPT_2_7B["num_hidden_layers"],
    }
    queries, side = whole.num_query_tokens, whole.vision_config.image_size

    def of(**layers: int) -> float:
        config = Blip2Config(
            vision_config={"num_hidden_layers": layers["vision"]},
            qformer_config={"num_hidden_layers": layers["query"]},
            text_config=OPTConfig(**{**OPT_2_7B, "num_hidden_layers": layers["text"]}).to_dict(),
            image_token_index=2,
        )
        model = _still(Blip2ForConditionalGeneration(config))
        tokens = torch.tensor([[2] * queries + [5] * PROMPT_TOKENS])
        picture = torch.empty(1, 3, side, side)

        def forward() -> None:
            image = model.get_image_features(picture, return_dict=True)
            model(
                pixel_values=None, input_ids=tokens, attention_mask=torch.ones_like(tokens),
                mm_encoder_outputs={"image": image}, logits_to_keep=1,
            )  # fmt: skip

        return count(forward)

    # Every second layer of the query transformer looks at the picture.
    return _linear(of, depth, {"vision": 1, "query": 2, "text": 1})


def _still(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def _linear(of: Callable[..., float], depth: dict[str, int], step: dict[str, int]) -> float:
    """Operations at full depth, from those of the least depth and of one step more in each part."""
    least = of(**step)
    added = {part: of(**{**step, part: 2 * step[part]}) - least for part in step}
    return least + sum((depth[part] // step[part] - 1) * more for part, more in added.items())


def peak(dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product on one core."""
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
    parser.add_argument("--clip", nargs="*", default=CLIPS, help="architectures of open_clip")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
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
