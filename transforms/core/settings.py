"""Typed, strict settings in YAML files. All faults are reported at once, with path, value and what is allowed."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
import yaml
from pydantic import Field

from transforms.storage import files

Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveShare = Annotated[float, Field(gt=0.0, le=1.0)]
Cosine = Annotated[float, Field(ge=-1.0, le=1.0)]

_MAX_BYTES = 2**18
_MAX_DEPTH = 32
_MAX_DIGITS = 64
_TOO_DEEP = f"nested too deeply; {_MAX_DEPTH} levels are allowed"
_EXPONENT = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+")


class SettingsError(ValueError):
    """Settings that cannot be used. `faults` holds one message for each fault."""

    def __init__(self, source: str, faults: list[str]) -> None:
        self.source, self.faults = source, faults
        super().__init__(f"{source}: " + "; ".join(faults))


class Settings(pydantic.BaseModel):
    """A section of settings. Unknown names and wrong types are refused, and values never change after validation."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    only_decide: ClassVar[frozenset[str]] = frozenset()
    """Names of the settings that only decide about kept columns. All others change what is computed."""

    @property
    def computing(self) -> dict[str, Any]:
        """The settings that change what is computed."""
        return self.model_dump(exclude=set(self.only_decide))


class ThresholdSettings(Settings):
    """A threshold on a score: keep samples with a score of at least `min`, or the best `keep_fraction` of the samples
    that reach the rule. The threshold is then the score at index int(n * keep_fraction) in descending order, as in
    DataComp."""

    only_decide = frozenset({"min", "keep_fraction"})

    min: float | None = None
    keep_fraction: PositiveShare | None = None

    @pydantic.model_validator(mode="after")
    def _exactly_one(self) -> ThresholdSettings:
        if (self.min is None) == (self.keep_fraction is None):
            raise ValueError("give exactly one of `min` and `keep_fraction`")
        return self


AnySettings = TypeVar("AnySettings", bound=Settings)


class _Alias(yaml.YAMLError):
    """An alias in settings. The message names the setting."""


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader for settings: what they do not need is an error, before it costs time or memory.

    A key that is given twice, of which PyYAML silently takes the last; aliases, which multiply; nesting deeper than
    any settings; numbers of more digits than any quantity.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._path: list[str] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._path.append(str(index.value) if isinstance(index, yaml.ScalarNode) else "")
        if self.check_event(yaml.AliasEvent):
            where, name = ".".join(filter(None, self._path)) or "settings", self.peek_event().anchor
            raise _Alias(f"{where}: got the alias *{name}"[:200] + "; aliases are not allowed: write the value out")
        node = super().compose_node(parent, index)
        self._path.pop()
        return node

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= _MAX_DEPTH:
            raise self._refused(_TOO_DEEP)
        super().fetch_flow_collection_start(token_class)

    def add_indent(self, column: int) -> bool:
        if len(self.indents) > _MAX_DEPTH:
            raise self._refused(_TOO_DEEP)
        return super().add_indent(column)

    def _refused(self, message: str) -> yaml.YAMLError:
        return yaml.scanner.ScannerError(None, None, message, self.get_mark())

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_DIGITS:
            message = f"a number of {len(node.value)} characters; allowed: {_MAX_DIGITS}"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)


def load_settings(path: str, model: type[AnySettings]) -> AnySettings:
    """The settings at `path` (local or `gs://`).

    Raises SettingsError with every fault at once: its path, the value, and what is allowed.
    """
    try:
        content = yaml.load(_text(path), _PlainLoader)
    except _Alias as error:
        raise SettingsError(path, [str(error)]) from error
    except (OSError, ValueError, LookupError, AttributeError, yaml.YAMLError) as error:
        # ValueError: not UTF-8. PyYAML raises LookupError or AttributeError for `!!int ""` and `!!timestamp x`.
        raise SettingsError(path, [f"cannot be read as YAML: {' '.join(str(error).split())}"]) from error
    return parse_settings(content, path, model)


def _text(path: str) -> str:
    with files.open_binary(path) as file, files.client_errors(path):
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"has more than {_MAX_BYTES} bytes")
    return content.decode("utf-8")


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
        return f"{where}: unknown setting (got {given[:200]}); allowed here: {allowed}"
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
