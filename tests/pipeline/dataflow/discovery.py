"""The official discovery documents of google-api-python-client as strict JSON schemas."""

from __future__ import annotations

import functools
import json
import re
from typing import Any, NamedTuple

import jsonschema
from googleapiclient.discovery_cache import get_static_doc

VERSIONS = {
    "dataflow": "v1b3",
    "cloudscheduler": "v1",
    "workflows": "v1",
    "workflowexecutions": "v1",
    "storage": "v1",
}
_FORMATS: dict[str, dict[str, Any]] = {
    "byte": {"pattern": r"^(?:[A-Za-z0-9+/_-]{4})*(?:[A-Za-z0-9+/_-]{2}==|[A-Za-z0-9+/_-]{3}=)?$"},
    "google-duration": {"pattern": r"^[0-9]+(\.[0-9]{1,9})?s$"},
    "google-datetime": {"pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z$"},
    "google-fieldmask": {"pattern": r"^[A-Za-z0-9_.]+(,[A-Za-z0-9_.]+)*$"},
    "int64": {"pattern": r"^-?[0-9]+$"},
    "uint64": {"pattern": r"^[0-9]+$"},
    "int32": {"minimum": -(2**31), "maximum": 2**31 - 1},
}


class Method(NamedTuple):
    """A method of an API, with the parameters in its path."""

    id: str
    description: dict[str, Any]
    named: dict[str, str]


class Service:
    """An API as described by its discovery document."""

    def __init__(self, name: str) -> None:
        self._name, self._document = name, json.loads(get_static_doc(name, VERSIONS[name]))
        self._methods = list(_methods(self._document))

    def method(self, verb: str, path: str) -> Method:
        """Return the method of a request. Raises LookupError."""
        for description in self._methods:
            upload = description.get("mediaUpload", {}).get("protocols", {}).get("simple", {}).get("path", "")
            plain = self._document["servicePath"] + (description.get("flatPath") or description["path"])
            for template in (plain, upload.lstrip("/")):
                pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/:]+)", re.escape(template))
                found = re.fullmatch(pattern, path)
                if template and found and description["httpMethod"] == verb:
                    return Method(description["id"], description, found.groupdict())
        raise LookupError(f"{self._name} has no {verb} {path}")

    def faults_of_query(self, method: Method, query: dict[str, str]) -> list[str]:
        """Return what is wrong with the query of a request."""
        known = {**method.description["parameters"], "uploadType": {"type": "string", "enum": ["media"]}}
        faults = [f"{name}: unknown" for name in query if known.get(name, {}).get("location", "query") != "query"]
        faults += [f"{name}: unknown" for name in query if name not in known]
        for name in query.keys() & known.keys():
            schema = self._schema({**known[name], "location": None}, for_request=True)
            faults += [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(query[name])]
        required = {name for name, spec in known.items() if spec.get("required") and spec["location"] == "query"}
        return faults + [f"{name}: missing" for name in required - query.keys()]

    def faults(self, method: Method, body: Any, of: str = "request") -> list[str]:
        """Return what violates the schema of the method's `request` or `response`."""
        name = method.description.get(of, {}).get("$ref")
        if name is None:
            return [] if body is None else [f"{method.id} has no body"]
        return self.faults_of(name, body, for_request=of == "request")

    def faults_of(self, name: str, body: Any, for_request: bool = True) -> list[str]:
        """Return what violates the schema `name`. Requests must not contain output-only fields."""
        errors = self._validator(name, for_request).iter_errors(body)
        return [f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message}" for error in errors]

    @functools.cache  # noqa: B019 - services live as long as the tests
    def _validator(self, name: str, for_request: bool) -> jsonschema.Draft202012Validator:
        definitions = {name: self._schema(schema, for_request) for name, schema in self._document["schemas"].items()}
        return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions})

    def _schema(self, found: dict[str, Any], for_request: bool) -> dict[str, Any]:
        if "$ref" in found:
            return {"$ref": f"#/$defs/{found['$ref']}"}
        if found.get("type") == "any":
            return {}
        schema: dict[str, Any] = {"type": found["type"], **_FORMATS.get(found.get("format", ""), {})}
        if "enum" in found:
            schema["enum"] = found["enum"]
        if "pattern" in found:
            schema["pattern"] = found["pattern"]
        if found["type"] == "array":
            schema["items"] = self._schema(found["items"], for_request)
        if found["type"] == "object":
            schema["properties"] = {
                name: self._schema(inner, for_request)
                for name, inner in found.get("properties", {}).items()
                if not (for_request and inner.get("readOnly"))
            }
            more = found.get("additionalProperties")
            schema["additionalProperties"] = self._schema(more, for_request) if more else False
        return schema


@functools.cache
def service(name: str) -> Service:
    """Return the API with this name."""
    return Service(name)


def _methods(resource: dict[str, Any]) -> Any:
    yield from resource.get("methods", {}).values()
    for inner in resource.get("resources", {}).values():
        yield from _methods(inner)
