"""Settings in YAML files: typed, strict, and every fault told at once: its place, what it got and what is allowed."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar, TypeVar

import pydantic
import yaml

from transforms.storage import files

_EXPONENT = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+")


class SettingsError(ValueError):
    """Settings that cannot be used; `faults` holds one message for each thing wrong with them."""

    def __init__(self, source: str, faults: list[str]) -> None:
        self.source, self.faults = source, faults
        super().__init__(f"{source}: " + "; ".join(faults))


class Settings(pydantic.BaseModel):
    """A section of settings: no unknown names, no types made to fit, no change once it was checked."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    only_decide: ClassVar[frozenset[str]] = frozenset()
    """Settings that judge features and scores which are there already. All others change what is computed."""

    @property
    def computing(self) -> dict[str, Any]:
        """The settings that change what is computed."""
        return self.model_dump(exclude=set(self.only_decide))


AnySettings = TypeVar("AnySettings", bound=Settings)


class _UniqueKeysLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key that is given twice is an error, where PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_settings(path: str, model: type[AnySettings]) -> AnySettings:
    """The settings at `path` (local or `gs://`).

    Raises SettingsError with every fault at once: where it is, what was given, what is allowed.
    """
    try:
        content = yaml.load(files.read_bytes(path).decode("utf-8"), _UniqueKeysLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8
        raise SettingsError(path, [f"cannot be read as YAML: {' '.join(str(error).split())}"]) from error
    return parse_settings(content, path, model)


def parse_settings(content: Any, source: str, model: type[AnySettings]) -> AnySettings:
    """The settings in `content`, the mapping that YAML gave. Raises SettingsError with every fault at once."""
    if not isinstance(content, dict):
        raise SettingsError(source, [f"got {type(content).__name__}, allowed: a mapping of sections"])
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        raise SettingsError(source, [_fault(e, model) for e in error.errors()]) from error


def _fault(error: Any, model: type[pydantic.BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "settings"
    if error["type"] == "missing":
        return f"{where}: missing; it is required"
    given = _shown(error["input"])
    if error["type"] == "extra_forbidden":
        allowed = ", ".join(_fields_at(error["loc"][:-1], model))
        return f"{where}: unknown setting (got {given}); allowed here: {allowed}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "float_type" and _EXPONENT.fullmatch(str(error["input"])):
        message += "; YAML reads an exponent as a number only after a point and with a sign, for example 1.0e-6"
    return f"{where}: got {given[:200]}; {message}"


def _shown(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):  # YAML has keys that JSON has not, and lists that hold themselves
        return repr(value)


def _fields_at(path: tuple[int | str, ...], model: type[pydantic.BaseModel]) -> list[str]:
    """Names of the settings allowed under `path`."""
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel))
    return list(model.model_fields)
