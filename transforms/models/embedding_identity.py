"""Embedding identities: everything that determines the embedding of an image.

They keep embeddings of different models from being compared. `clip.embedding_identity` builds one with the fields

- `model`, `weights` (tag or file) and `revision`, as given in the recipe;
- `weights_sha256`: sorted hashes of the weight files, empty if the files are not on this machine;
- `image_tower`: the architecture of the image tower;
- `preprocessing`: the image preprocessing settings;
- `image`: "flipped" or "unflipped";
- `precision`: the dtype of the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ALWAYS = ("image_tower", "preprocessing", "image")
_NAMES = ("model", "weights", "revision")
_FIELDS = (*_NAMES, "weights_sha256", *_ALWAYS, "precision")


def parse_identity(text: str) -> dict[str, Any]:
    """Parse an identity from JSON. Raises ValueError unless it is an object with exactly the fields above."""
    identity = json.loads(text)
    if not isinstance(identity, dict) or set(identity) != set(_FIELDS):
        raise ValueError(f"allowed: a JSON object with the fields {', '.join(_FIELDS)}")
    return identity


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The differing fields that make the embeddings of two identities incomparable; empty if they are comparable.

    Weights are compared by hash if both identities have hashes, because the same model may be loaded from a hub in
    one place and from a folder in another; otherwise by model name, tag and revision. Precision may differ: it changes
    embeddings slightly (docs/models.md), but they stay in the same space.
    """
    hashes = ours["weights_sha256"] and theirs["weights_sha256"]
    compared = (*(("weights_sha256",) if hashes else _NAMES), *_ALWAYS)
    return [field for field in compared if ours[field] != theirs[field]]


def described(identity: Mapping[str, Any], fields: list[str]) -> str:
    """The model name and the given fields of an identity on one line, for messages."""
    return ", ".join(f"{field} {json.dumps(identity[field])}" for field in dict.fromkeys(("model", *fields)))
