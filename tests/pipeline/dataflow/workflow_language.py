"""An interpreter for the part of Cloud Workflows' language that templates/workflow.yaml uses.

It follows the language's reference and evaluates expressions as Python, which is valid for the expressions used here.
"""

from __future__ import annotations

import json
import types
import urllib.parse
from typing import Any

from tests.pipeline.dataflow.google_cloud import TOKEN, GoogleCloud

_DATAFLOW = "https://dataflow.googleapis.com/"


class Raised(Exception):
    """An uncaught error of a step: text, or a map with `code` and `message`."""

    def __init__(self, value: Any) -> None:
        self.value = value
        super().__init__(str(value))


class _Map(dict):
    """A map with keys accessed as `map.key`. As in the language, a missing key is an error."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError as error:
            raise Raised({"message": f"KeyError: {key}"}) from error


def execute(definition: dict[str, Any], argument: Any, cloud: GoogleCloud) -> Any:
    """Run a definition and return its result. Raises Raised if it fails."""
    return _Execution(definition, cloud).call("main", [_maps(argument)])


class _Execution:
    def __init__(self, definition: dict[str, Any], cloud: GoogleCloud) -> None:
        self._definition, self._cloud = definition, cloud

    def call(self, name: str, arguments: list[Any]) -> Any:
        body = self._definition[name]
        scope = dict(zip(body["params"], arguments, strict=True))
        _, result = self._steps(body["steps"], scope)
        return result

    def _steps(self, steps: list[dict[str, Any]], scope: dict[str, Any]) -> tuple[str | None, Any]:
        """Run steps; return the jump target (`return`, the name of an outer step, or None) and the returned value."""
        names = [next(iter(step)) for step in steps]
        at = 0
        while at < len(steps):
            where, result = self._step(steps[at][names[at]], scope)
            if where is None:
                at += 1
            elif where in names:
                at = names.index(where)
            else:
                return where, result
        return None, None

    def _step(self, step: dict[str, Any], scope: dict[str, Any]) -> tuple[str | None, Any]:
        for assigned in step.get("assign", []):
            ((name, value),) = assigned.items()
            scope[name] = self._value(value, scope)
        if "try" in step:
            try:
                self._tried(step, scope)
            except Raised as error:
                caught = {**scope, step["except"]["as"]: error.value} if "except" in step else None
                if caught is None:
                    raise
                return self._steps(step["except"]["steps"], caught)
        if "call" in step:
            result = self._called(step["call"], self._value(step.get("args", {}), scope))
            if "result" in step:
                scope[step["result"]] = result
        if "for" in step:
            for each in self._value(step["for"]["in"], scope):
                inner = {**scope, step["for"]["value"]: each}
                where, result = self._steps(step["for"]["steps"], inner)
                scope.update({name: inner[name] for name in scope})  # variables of the outer scope are shared
                if where is not None:
                    return where, result
        for case in step.get("switch", []):
            if self._value(case["condition"], scope):
                return self._end(case, scope)
        return self._end(step, scope)

    def _tried(self, step: dict[str, Any], scope: dict[str, Any]) -> None:
        left = step.get("retry", {}).get("max_retries", 0)
        while True:
            try:
                self._step(step["try"], scope)
                return
            except Raised as error:
                if not left or error.value.get("code") not in (429, 503):
                    raise
                left -= 1

    def _end(self, body: dict[str, Any], scope: dict[str, Any]) -> tuple[str | None, Any]:
        if "raise" in body:
            raise Raised(self._value(body["raise"], scope))
        if "return" in body:
            return "return", self._value(body["return"], scope)
        return body.get("next"), None

    def _called(self, name: str, arguments: dict[str, Any]) -> Any:
        if name in self._definition:
            return self.call(name, [arguments[parameter] for parameter in self._definition[name]["params"]])
        if name == "sys.sleep":
            return None
        verb = {"http.get": "GET", "http.post": "POST"}[name]
        query = urllib.parse.urlencode(arguments.get("query", {}))
        path = f"/dataflow/{arguments['url'].removeprefix(_DATAFLOW)}?{query}"
        content = json.dumps(arguments["body"]).encode() if "body" in arguments else b""
        headers = {"Authorization": f"Bearer {TOKEN}"} if arguments["auth"] == {"type": "OAuth2"} else {}
        status, body, _ = self._cloud.answer(verb, path, content, headers)
        if status != 200:
            raise Raised(_maps({"code": status, "message": f"HTTP server responded with error code {status}"}))
        return _maps({"code": status, "body": body})

    def _value(self, found: Any, scope: dict[str, Any]) -> Any:
        if isinstance(found, dict):
            return _Map({key: self._value(value, scope) for key, value in found.items()})
        if isinstance(found, list):
            return [self._value(value, scope) for value in found]
        if not (isinstance(found, str) and found.startswith("${")):
            return found
        return eval(found[2:-1], {"__builtins__": {}}, {**_FUNCTIONS, **scope})


def _get(found: Any, keys: str | list[str]) -> Any:
    for key in [keys] if isinstance(keys, str) else keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


_FUNCTIONS: dict[str, Any] = {
    "list": types.SimpleNamespace(concat=lambda items, item: [*items, item]),
    "map": types.SimpleNamespace(get=_get),
    "default": lambda value, otherwise: otherwise if value is None else value,
}


def _maps(found: Any) -> Any:
    if isinstance(found, dict):
        return _Map({key: _maps(value) for key, value in found.items()})
    return [_maps(value) for value in found] if isinstance(found, list) else found
