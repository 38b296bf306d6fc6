"""Identities of embeddings: what decides a picture's embedding, so that those of two models are never compared.

`clip.embedding_identity` makes them. Fields: `model`, `weights` (tag or file) and `revision` as the recipe has them;
`weights_sha256`, a sorted list, empty where the files do not lie on this machine; `image_tower`, what it is made of;
`preprocessing`; `image`, flipped or unflipped; `precision`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ALWAYS = ("image_tower", "preprocessing", "image")
_NAMES = ("model", "weights", "revision")
_FIELDS = (*_NAMES, "weights_sha256", *_ALWAYS, "precision")


def parse_identity(text: str) -> dict[str, Any]:
    """An identity from its JSON. Raises ValueError where it is none."""
    identity = json.loads(text)
    if not isinstance(identity, dict) or set(identity) != set(_FIELDS):
        raise ValueError(f"allowed: a JSON object of {', '.join(_FIELDS)}")
    return identity


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The fields in which two identities differ so that their embeddings cannot be compared; none where they can.

    Weights are compared by their hashes where both are known, else by model name, tag and revision: one model may come
    from a hub here and from a folder there. Precision is recorded and may differ: it moves embeddings a little
    (docs/models.md), not into another space.
    """
    hashes = ours["weights_sha256"] and theirs["weights_sha256"]
    compared = (*(("weights_sha256",) if hashes else _NAMES), *_ALWAYS)
    return [field for field in compared if ours[field] != theirs[field]]


def described(identity: Mapping[str, Any], fields: list[str]) -> str:
    """The model's name and the given fields, on one line."""
    return ", ".join(f"{field} {json.dumps(identity[field])}" for field in dict.fromkeys(("model", *fields)))
