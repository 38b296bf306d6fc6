"""Tests of the metadata and specs of the templates, and of the workflow definition."""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.cloud import dataflow_v1beta3

from pipeline.dataflow.settings import TEMPLATES, load_dataflow_settings
from pipeline.dataflow.template import specs
from pipeline.dataflow.template.options import PairsiftOptions
from pipeline.dataflow.template.specs import spec
from pipeline.output_folder import versions
from tests.pipeline.dataflow.jobs import L4
from tests.pipeline.dataflow.test_settings import EXAMPLE, settings
from transforms.storage import files

FOLDER = EXAMPLE.parent


def metadata(template: str) -> dataflow_v1beta3.TemplateMetadata:
    return dataflow_v1beta3.TemplateMetadata.from_json((FOLDER / f"{template}.json").read_text())


def options() -> dict[str, Any]:
    """Return the launcher's options and their defaults, without the one that a template's spec sets."""
    parser = argparse.ArgumentParser()
    PairsiftOptions._add_argparse_args(parser)
    return {
        action.dest: action.default
        for action in parser._actions
        if action.dest != "help" and action.help != argparse.SUPPRESS
    }


@pytest.mark.parametrize("template", TEMPLATES)
def test_parameters_match_the_options_of_the_launcher(template: str) -> None:
    found = metadata(template)
    assert [parameter.name for parameter in found.parameters] == list(options())
    for parameter in found.parameters:
        assert parameter.label and parameter.help_text and list(parameter.regexes)
        assert parameter.is_optional == (options()[parameter.name] is not None)
    assert found.name and found.description


def allows(template: str, name: str, value: str) -> bool:
    (parameter,) = [one for one in metadata(template).parameters if one.name == name]
    return all(re.search(regex, value) for regex in parameter.regexes)


@pytest.mark.parametrize("template", TEMPLATES)
def test_defaults_match_those_of_the_launcher(template: str) -> None:
    raw = {one["name"]: one for one in json.loads((FOLDER / f"{template}.json").read_text())["parameters"]}
    assert raw["keep_versions"]["defaultValue"] == options()["keep_versions"] == str(versions.KEPT)
    if template != "all_stages":  # which allows only one value
        assert raw["gpus"]["defaultValue"] == options()["gpus"]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("recipe", "gs://bucket/paper.yaml", "recipes/paper.yaml"),
        ("input", "gs://bucket/pool/*.tar", "s3://bucket/pool"),
        ("output", "gs://bucket/out", "gs://bucket"),
        ("keep_versions", "3", "0"),
        ("accelerator", L4.option, "nvidia-l4"),
        ("accelerator", "", "type:nvidia-l4;count:2;machine_type:g2-standard-24;install-nvidia-driver"),
        ("gpus", "right_fitting", "both"),
    ],
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_allowed_parameter_values(template: str, name: str, good: str, bad: str) -> None:
    assert allows(template, name, good)
    assert not allows(template, name, bad)


def test_job_of_all_stages_allows_gpus_only_with_right_fitting() -> None:
    assert allows("cross_modality", "gpus", "all_workers")
    assert not allows("all_stages", "gpus", "all_workers")


@pytest.mark.parametrize("template", TEMPLATES)
def test_values_from_the_settings_are_allowed(template: str) -> None:
    for name, value in settings(gpus="right_fitting").gpu_parameters.items():
        assert allows(template, name, value)


@pytest.mark.parametrize("template", TEMPLATES)
def test_spec_contains_the_image_twice_and_the_stage(template: str) -> None:
    loaded = load_dataflow_settings(str(EXAMPLE))
    found = dataflow_v1beta3.ContainerSpec.from_json(json.dumps(spec(loaded, template)), ignore_unknown_fields=False)
    assert found.image == found.default_environment.sdk_container_image == loaded.image
    assert found.sdk_info.language == dataflow_v1beta3.SDKInfo.Language.PYTHON
    assert list(found.default_environment.additional_pipeline_options) == [f"stage={template}"]
    assert found.metadata == metadata(template)


def test_specs_are_written_to_the_folder_in_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, Any] = {}
    monkeypatch.setattr(files, "write_json", written.__setitem__)
    specs.main([str(EXAMPLE)])
    assert list(written) == [f"gs://my-bucket/templates/{template}.json" for template in TEMPLATES]


def test_invalid_settings_write_no_spec(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("project: Mine\n")
    command = [sys.executable, "-m", "pipeline.dataflow.template.specs", str(tmp_path / "d.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "d.yaml: project: got" in done.stderr
    assert "Traceback" not in done.stderr


# The workflow ------------------------------------------------------------------------------------------------------

WORKFLOW: dict[str, Any] = yaml.safe_load((FOLDER / "workflow.yaml").read_text())
CALLS = {
    "http.get": {"url", "auth", "query"}, "http.post": {"url", "auth", "body"}, "sys.sleep": {"seconds"},
}  # fmt: skip
FUNCTIONS = {
    "default", "list.concat", "map.get", "not", "http.default_retry_predicate",
    "http.default_retry_predicate_non_idempotent",
}  # fmt: skip
KEYS = {"assign", "call", "args", "result", "switch", "next", "return", "raise", "for", "try", "retry", "except"}
_STRING = re.compile(r'"[^"]*"')
_NAME = re.compile(r"(?<![\w.])([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\[\d+\])?(\()?")
_WORDS = {"in", "and", "or", "true", "false", "null"}
_ENDS = {"end", "break", "continue"}


def faults(workflow: dict[str, Any]) -> list[str]:
    """Return undefined names in the workflow: steps, subworkflows, arguments, functions and variables."""
    found: list[str] = []

    def expressions(value: Any) -> Iterator[str]:
        if isinstance(value, str) and value.startswith("${"):
            yield value[2:-1]
        elif isinstance(value, dict):
            for one in value.values():
                yield from expressions(one)
        elif isinstance(value, list):
            for one in value:
                yield from expressions(one)

    def check(value: Any, known: set[str]) -> None:
        for text in expressions(value):
            for name, called in _NAME.findall(_STRING.sub("0", text)):
                if called or name in FUNCTIONS:
                    if name not in FUNCTIONS:
                        found.append(f"function {name}")
                elif name not in _WORDS and name.partition(".")[0] not in known:
                    found.append(f"variable {name}")

    def block(steps: list[dict[str, Any]], known: set[str], outer: set[str]) -> None:
        names = [name for step in steps for name in step]
        if len(set(names)) != len(names):
            found.append(f"steps of one name in {names}")
        reachable = outer | set(names) | _ENDS
        for step in steps:
            ((name, body),) = step.items()
            if set(body) - KEYS:
                found.append(f"key {sorted(set(body) - KEYS)} in {name}")
            one(body, known, reachable)

    def one(body: dict[str, Any], known: set[str], reachable: set[str]) -> None:
        for assigned in body.get("assign", []):
            ((name, value),) = assigned.items()
            check(value, known)
            known.add(name)
        if "call" in body:
            call, given = body["call"], body.get("args", {})
            check(given, known)
            allowed = set(workflow[call]["params"]) if call in workflow else CALLS.get(call)
            if allowed is None:
                found.append(f"call {call}")
            elif (call in workflow and set(given) != allowed) or not set(given) <= allowed:
                found.append(f"arguments {sorted(given)} of {call}")
            if "result" in body:
                known.add(body["result"])
        for case in body.get("switch", []):
            check(case, known)
            if case.get("next", "end") not in reachable:
                found.append(f"next {case['next']}")
        if body.get("next", "end") not in reachable:
            found.append(f"next {body['next']}")
        check([body.get("return"), body.get("raise"), body.get("retry")], known)
        if "for" in body:
            check(body["for"]["in"], known)
            known.add(body["for"]["value"])
            block(body["for"]["steps"], known, reachable)
        if "try" in body:
            one(body["try"], known, reachable)
        if "except" in body:
            block(body["except"]["steps"], known | {body["except"]["as"]}, reachable)

    for workflow_body in workflow.values():
        block(workflow_body["steps"], set(workflow_body.get("params", [])), set())
    return found


def test_workflow_has_no_undefined_names() -> None:
    assert faults(WORKFLOW) == []
    assert set(WORKFLOW) == {"main", "start_job", "wait_for_job"}


def _step(workflow: dict[str, Any], subworkflow: str, name: str) -> dict[str, Any]:
    return next(step[name] for step in workflow[subworkflow]["steps"] if name in step)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda w: _step(w, "wait_for_job", "decide").update(next="paus"), "next paus"),
        (lambda w: _step(w, "start_job", "finish").update({"return": "${start.body}"}), "variable start.body"),
        (lambda w: _step(w, "start_job", "begin")["assign"].pop(0), "variable place"),
        (lambda w: _step(w, "main", "stages")["for"]["steps"][1]["wait"]["args"].pop("job"), "arguments"),
        (lambda w: _step(w, "main", "stages")["for"]["steps"][0]["start"].update(call="start_jobs"), "call start_jobs"),
        (lambda w: _step(w, "wait_for_job", "read").update(assign=[{"state": "${defaults(1)}"}]), "function defaults"),
        (lambda w: _step(w, "wait_for_job", "read").update(assigns=[]), "key ['assigns'] in read"),
    ],
)
def test_undefined_names_are_detected(spoil: Callable[[dict[str, Any]], object], fault: str) -> None:
    spoilt = copy.deepcopy(WORKFLOW)
    spoil(spoilt)
    assert any(found.startswith(fault) for found in faults(spoilt))


def test_workflow_only_calls_dataflow_with_its_own_account() -> None:
    calls = re.findall(r"call: (http\.\w+)\n(?:.*\n)*?.*url: \$\{(.+)\}\n.*auth:\n.*type: (\w+)", _text())
    assert [(call, scheme) for call, _, scheme in calls] == [
        ("http.post", "OAuth2"), ("http.get", "OAuth2"), ("http.get", "OAuth2"), ("http.get", "OAuth2"),
    ]  # fmt: skip
    assert set(re.findall(r"https://[a-z.]+/", _text())) == {
        "https://dataflow.googleapis.com/", "https://console.cloud.google.com/",
    }  # fmt: skip


def _text() -> str:
    return (FOLDER / "workflow.yaml").read_text()
