"""Tests of `pairsift launch` against a local server that answers like the APIs."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

from pipeline.dataflow.launch import BY, REQUEST
from pipeline.dataflow.names import job_name, run_name
from pipeline.dataflow.settings import TEMPLATES
from tests.pipeline.dataflow.conftest import ACCOUNT, EXAMPLE, PLACES, Pairsift
from tests.pipeline.dataflow.discovery import service
from tests.pipeline.dataflow.google_cloud import Answer, GoogleCloud, counter
from transforms.core.recipe import STAGES

LAUNCH = ("launch", "recipe.yaml", *PLACES)
STAGE_1 = (*LAUNCH, "--stage", "single_modality")
FOLLOW = ("--follow", "--poll-seconds", "0.01")
NAME = job_name("gs://my-bucket/out", "single_modality")


def change_settings(place: Path, **changes: Any) -> None:
    path = place / "dataflow.yaml"
    changed = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump({name: value for name, value in changed.items() if value is not None}))


def events(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def output(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("  cids: {tasks: tasks.npz}", "distribution_alignment.cids.tasks: tasks.npz"),
        ("  clusters: {count: 24, centroids: old/c.npy}", "distribution_alignment.clusters.centroids: old/c.npy"),
        ("    model: ./clip", "cross_modality.flipped_clip.model: ./clip"),
        ("    model: here", "cross_modality.flipped_clip.model: here"),
    ],
)
def test_recipe_with_local_files_is_refused(
    cloud: GoogleCloud, place: Path, pairsift: Pairsift, line: str, named: str
) -> None:
    (place / "here").mkdir()
    setting = line.split(":")[0] + ":"
    lines = (place / "recipe.yaml").read_text().splitlines()
    first = next(number for number, found in enumerate(lines) if found.startswith(setting))
    (place / "recipe.yaml").write_text("\n".join([*lines[:first], line, *lines[first + 1 :]]))
    result = pairsift(*LAUNCH)
    assert result.exit_code == 2 and f"recipe: {named} is a file on this machine; give a gs:// path" in output(result)
    assert cloud.sent == []


@pytest.mark.parametrize("path", ["gs://My Bucket/pool", "gs://b_/pool", "gs://my-bucket", "gs://my-bucket//", "pool"])
def test_paths_outside_cloud_storage_are_refused(cloud: GoogleCloud, pairsift: Pairsift, path: str) -> None:
    for option in ("--input", "--output"):
        at = LAUNCH.index(option) + 1
        result = pairsift(*LAUNCH[:at], path, *LAUNCH[at + 1 :])
        assert result.exit_code == 2 and f"{option}: got {path}; workers can only access gs://" in output(result)
    assert cloud.sent == []


def test_trailing_slash_does_not_change_a_launch(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    slashed = [f"{word}/" if word.startswith("gs://") else word for word in STAGE_1]
    assert [pairsift(*arguments, "--dry-run").stdout for arguments in (STAGE_1, slashed)] == [
        pairsift(*STAGE_1, "--dry-run").stdout
    ] * 2


# Requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", ["all_workers", "right_fitting"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_request_is_valid_and_equals_the_dry_run(
    cloud: GoogleCloud, place: Path, pairsift: Pairsift, template: str, gpus: str
) -> None:
    change_settings(place, gpus=gpus)
    arguments = (*LAUNCH, "--stage", template, "--json")
    if (template, gpus) == ("all_stages", "all_workers"):
        result = pairsift(*arguments)
        assert result.exit_code == 2 and "would hold GPUs during all three stages" in output(result)
        assert cloud.sent == []
        return
    dry = pairsift(*arguments, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert cloud.sent == []
    result = pairsift(*arguments)
    assert result.exit_code == 0, result.output

    upload, request = events(dry)
    assert (request["method"], request["body"]) == ("POST", cloud.bodies("flexTemplates.launch")[0])
    assert request["url"] == (
        f"{cloud.url}/dataflow/v1b3/projects/my-project/locations/us-central1/flexTemplates:launch"
    )
    launch = request["body"]["launchParameter"]
    assert launch["jobName"] == job_name("gs://my-bucket/out", template)
    assert launch["containerSpecGcsPath"] == f"gs://my-bucket/templates/{template}.json"
    assert cloud.objects == {launch["parameters"]["recipe"]: (place / "recipe.yaml").read_bytes()}
    assert upload["body"] == (place / "recipe.yaml").read_text()
    metadata = json.loads((EXAMPLE.parent / f"{template}.json").read_text())
    regexes = {parameter["name"]: parameter["regexes"] for parameter in metadata["parameters"]}
    assert set(launch["parameters"]) == set(regexes)
    for name, value in launch["parameters"].items():
        assert all(re.search(regex, value) for regex in regexes[name]), (name, value)
    assert launch["parameters"]["gpus"] == gpus
    assert launch["environment"]["machineType"] == {
        "single_modality": "n2-standard-8",
        "cross_modality": "g2-standard-8" if gpus == "all_workers" else "n2-standard-8",
        "distribution_alignment": "n2-highmem-8",
        "all_stages": "n2-standard-8",
    }[template]
    assert launch["environment"].get("flexrsGoal") == (
        "FLEXRS_COST_OPTIMIZED" if template == "single_modality" else None
    )
    (event,) = events(result)
    assert event["event"] == "launched" and event["address"].endswith(f"/{event['id']}?project=my-project")


def test_unset_settings_are_left_to_the_service(cloud: GoogleCloud, place: Path, pairsift: Pairsift) -> None:
    change_settings(place, service_account=None, use_public_ips=True, labels={}, network="n", subnetwork="regions/r/s")
    assert pairsift(*STAGE_1).exit_code == 0
    (body,) = cloud.bodies("flexTemplates.launch")
    environment = body["launchParameter"]["environment"]
    assert "serviceAccountEmail" not in environment
    assert (environment["network"], environment["subnetwork"]) == ("n", "regions/r/s")
    assert environment["ipConfiguration"] == "WORKER_IP_PUBLIC"
    assert set(environment["additionalUserLabels"]) == {REQUEST, BY}


def test_invalid_requests_are_detected() -> None:
    """The checks of requests detect unknown names, wrong types, enums and numbers, and output-only fields."""
    for name, schema, body in (
        ("dataflow", "LaunchFlexTemplateRequest", {"launchParameter": {"jobname": "x"}}),
        ("dataflow", "LaunchFlexTemplateRequest", {"launchParameter": {"parameters": {"keep_versions": 3}}}),
        ("dataflow", "FlexTemplateRuntimeEnvironment", {"ipConfiguration": "PRIVATE"}),
        ("dataflow", "FlexTemplateRuntimeEnvironment", {"maxWorkers": "50"}),
        ("dataflow", "FlexTemplateRuntimeEnvironment", {"maxWorkers": 2**31}),
        ("cloudscheduler", "Job", {"state": "PAUSED"}),
        ("cloudscheduler", "Job", {"attemptDeadline": "3 min"}),
        ("cloudscheduler", "HttpTarget", {"body": "{}"}),
        ("workflowexecutions", "Execution", {"argument": {}}),
        ("workflows", "Workflow", {"sourceContent": ""}),
    ):
        assert len(service(name).faults_of(schema, body)) == 1, (schema, body)
    method = service("dataflow").method("GET", "v1b3/projects/p/locations/l/jobs")
    assert service("dataflow").faults_of_query(method, {"filter": "ACTIVE", "name": "x"}) == []
    assert len(service("dataflow").faults_of_query(method, {"filter": "RUNNING", "nam": "x"})) == 2
    with pytest.raises(LookupError):
        service("dataflow").method("PUT", "v1b3/projects/p/locations/l/flexTemplates:launch")


def test_dry_run_uses_no_credentials_and_no_network(
    place: Path, pairsift: Pairsift, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was tried"))
    for recipe in ("recipe.yaml", "gs://my-bucket/recipe.yaml"):
        for more in (["--stage", "cross_modality"], []):
            result = pairsift("launch", recipe, *PLACES, *more, "--dry-run")
            assert result.exit_code == 0, result.output
            assert "nothing was sent" in result.stderr
            assert "POST https://" in result.stdout
    assert "POST https://storage" not in result.stdout  # the recipe is already on gs://


def test_wrong_use(cloud: GoogleCloud, place: Path, pairsift: Pairsift) -> None:
    for arguments, message in (
        ((*LAUNCH, "--stage", "cross"), "--stage: got cross; allowed: single_modality, cross_modality"),
        (("launch", "recipe.yaml", "--input", "pool", *PLACES[2:]), "--input: got pool; workers can only access gs://"),
        (("launch", "recipe.yaml", *PLACES[:3], "gs://b", *PLACES[4:]), "--output: got gs://b; workers can only access gs://"),
        (("launch", "none.yaml", *PLACES), "none.yaml: cannot be read as YAML"),
        ((*LAUNCH[:-1], "none.yaml"), "none.yaml: cannot be read as YAML"),
    ):
        result = pairsift(*arguments)
        assert result.exit_code == 2 and message in output(result), result.output
    change_settings(place, project="My", region="here")
    result = pairsift(*STAGE_1)
    assert result.exit_code == 2
    assert sorted(line.split(": ")[2] for line in result.stderr.splitlines()) == ["project", "region"]
    assert len(json.loads(pairsift(*STAGE_1, "--json").stdout)["faults"]) == 2
    assert cloud.sent == []


def test_recipe_that_does_not_fit_the_settings(cloud: GoogleCloud, place: Path, pairsift: Pairsift) -> None:
    change_settings(place, accelerator=None)
    result = pairsift(*STAGE_1)
    assert result.exit_code == 2 and "cuda, but the settings have no accelerator" in output(result)
    (place / "recipe.yaml").write_text((place / "recipe.yaml").read_text().replace("device: cuda", "device: cpu"))
    assert pairsift(*STAGE_1).exit_code == 0
    change_settings(place, accelerator={"type": "nvidia-l4", "count": 1})
    result = pairsift(*STAGE_1)
    assert result.exit_code == 2 and "remove the accelerator, or set the device to cuda" in output(result)


# Adoption ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_page_is_empty", [False, True])
def test_second_identical_launch_adopts_the_job(
    cloud: GoogleCloud, pairsift: Pairsift, first_page_is_empty: bool
) -> None:
    cloud.first_page_is_empty = first_page_is_empty
    first, second = (pairsift(*STAGE_1, "--json") for _ in range(2))
    assert second.exit_code == 0
    assert [event["event"] for event in events(first) + events(second)] == ["launched", "adopted"]
    assert events(first)[0]["id"] == events(second)[0]["id"]
    assert len(cloud.jobs) == 1
    slash = (*STAGE_1[:5], "gs://my-bucket/out/", *STAGE_1[6:])
    assert "which is already running with the same parameters" in pairsift(*slash).stdout


def test_launch_with_other_parameters_is_refused(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    job = cloud.add_job(NAME, {REQUEST: "0" * 32, BY: "ada_on_laptop"}, "JOB_STATE_RUNNING")
    result = pairsift(*STAGE_1)
    assert result.exit_code == 2
    assert "is running with other parameters, started by ada_on_laptop at 2026-11-23T11:00:00.123456Z" in output(result)
    assert f"gcloud dataflow jobs cancel {job['id']} --project=my-project --region=us-central1" in output(result)
    assert cloud.bodies("flexTemplates.launch") == []
    job["currentState"] = "JOB_STATE_CANCELLED"
    assert pairsift(*STAGE_1).exit_code == 0


def test_job_without_labels_yet_is_not_adopted(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    cloud.add_job(NAME, {})
    result = pairsift(*STAGE_1)
    assert result.exit_code == 2 and "repeat the same command in a few minutes" in output(result)


@pytest.mark.parametrize("is_same", [True, False])
def test_job_started_between_check_and_launch(
    cloud: GoogleCloud, pairsift: Pairsift, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    def launch(named: Any, query: Any, body: Any) -> Any:  # another client comes first
        labels = body["launchParameter"]["environment"]["additionalUserLabels"]
        cloud.add_job(NAME, labels if is_same else {REQUEST: "0", BY: "ada"}, "JOB_STATE_RUNNING")
        return usual(named, query, body)

    usual = cloud._dataflow_flexTemplates_launch
    monkeypatch.setattr(cloud, "_dataflow_flexTemplates_launch", launch)
    result = pairsift(*STAGE_1)
    assert (result.exit_code, len(cloud.jobs)) == (0 if is_same else 2, 1)
    assert ("adopted" if is_same else "started by ada at") in output(result)


def test_lost_answer_does_not_start_a_second_job(cloud: GoogleCloud, pairsift: Pairsift, waits: list) -> None:
    cloud.fail("flexTemplates.launch", Answer(503, "lost on the way", does_it=True))
    result = pairsift(*STAGE_1)
    assert result.exit_code == 0, result.output
    assert len(cloud.jobs) == 1
    assert cloud.ids().count("flexTemplates.launch") == 2
    assert "adopted" in result.stdout


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (Answer(401, "Request had invalid credentials."), "run `gcloud auth application-default login`"),
        (
            Answer(403, "The caller does not have permission"),
            f"{ACCOUNT} lacks dataflow.jobs.create; `gcloud projects add-iam-policy-binding my-project "
            f"--member=serviceAccount:{ACCOUNT} --role=roles/dataflow.developer` grants it",
        ),
        (
            Answer(403, "denied", "IAM_PERMISSION_DENIED", {"permission": "iam.serviceAccounts.actAs"}),
            "`gcloud iam service-accounts add-iam-policy-binding pairsift@my-project.iam.gserviceaccount.com "
            f"--project=my-project --member=serviceAccount:{ACCOUNT} --role=roles/iam.serviceAccountUser` grants it",
        ),
        (
            Answer(403, "not used before", "SERVICE_DISABLED", {"service": "dataflow.googleapis.com"}),
            "run `gcloud services enable dataflow.googleapis.com --project=my-project`",
        ),
        (
            Answer(404, "Unable to open template file"),
            "check that gs://my-bucket/templates/single_modality.json exists",
        ),
        (Answer(400, "Invalid value"), "nothing was changed; correct that"),
    ],
)
def test_error_says_what_to_do_next(
    cloud: GoogleCloud, pairsift: Pairsift, waits: list, answer: Answer, advice: str
) -> None:
    for more in ([], ["--json"]):
        cloud.fail("flexTemplates.launch", *[answer] * 3)  # after a 401, credentials are refreshed twice
        result = pairsift(*STAGE_1, *more)
        assert result.exit_code == 1
        lines = (result.stdout if more else result.stderr).splitlines()
        assert len(lines) == 1
        assert advice in lines[0] and answer.message.rstrip(".") in lines[0]
        assert "Traceback" not in result.output
        cloud.answers.clear()
    assert cloud.jobs == {}


def test_error_of_the_bucket(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    cloud.fail("objects.insert", Answer(403, "no"))
    result = pairsift(*STAGE_1)
    assert result.exit_code == 1
    assert "`gcloud storage buckets add-iam-policy-binding gs://my-bucket --member=serviceAccount:" in output(result)
    assert cloud.jobs == {}


def test_quota_error_waits_as_long_as_the_service_says(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    cloud.fail("flexTemplates.launch", Answer(429, "Quota exceeded", headers={"Retry-After": "1"}))
    result = pairsift(*STAGE_1)
    assert result.exit_code == 0, result.output
    first, second = (sent for sent in cloud.sent if sent.method.endswith("flexTemplates.launch"))
    assert 1.0 <= second.at - first.at < 5.0
    assert first.body == second.body


@pytest.mark.parametrize(("status", "advice"), [(429, "a quota is used up"), (503, "the service is failing")])
def test_persistent_error_ends_the_retries(
    cloud: GoogleCloud, pairsift: Pairsift, waits: list[float], status: int, advice: str
) -> None:
    cloud.fail("flexTemplates.launch", *[Answer(status, "not now", headers={"Retry-After": "7200"})] * 6)
    result = pairsift(*STAGE_1)
    assert result.exit_code == 1
    assert advice in output(result) and "again later" in output(result)
    assert waits == [120.0] * 5  # not two hours
    assert cloud.jobs == {}


def test_service_that_recovers(cloud: GoogleCloud, pairsift: Pairsift, waits: list[float]) -> None:
    cloud.fail("flexTemplates.launch", *[Answer(503)] * 3)
    assert pairsift(*STAGE_1).exit_code == 0
    assert waits == [2.0, 4.0]  # doubles each time
    assert len(cloud.jobs) == 1


def test_missing_credentials(place: Path, pairsift: Pairsift) -> None:
    result = pairsift(*STAGE_1)
    assert result.exit_code == 1
    assert "no credentials of Google Cloud" in output(result)
    assert "run `gcloud auth application-default login`" in output(result)


def test_unreachable_service(cloud: GoogleCloud, pairsift: Pairsift, monkeypatch: Any, waits: list) -> None:
    monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_DATAFLOW", "http://127.0.0.1:9/")
    result = pairsift(*STAGE_1)
    assert result.exit_code == 1 and "cannot be reached" in output(result) and "check the network" in output(result)


# Following --------------------------------------------------------------------------------------------------------


def scripted(cloud: GoogleCloud, end: str = "DONE", name: str = NAME) -> None:
    """Set up a job that is queued, starts, works and ends."""
    cloud.states[name] = [f"JOB_STATE_{state}" for state in ("QUEUED", "PENDING", "RUNNING", "RUNNING", end)]
    cloud.metrics[name] = [
        [],
        [
            counter("samples_done", 400), counter("samples_done", 100, step="s2"),
            counter("samples_done", 900, tentative=True), counter("samples_done", 7, namespace="other"),
            counter("shards_done", 5), counter("tars_opened", 5),
            {"name": {"origin": "dataflow/v1b3", "name": "MeanByteCount", "context": {}}, "scalar": 8.5},
            counter("latency_COUNT", 3),
        ],
        [counter("samples_done", 1151), counter("shards_done", 12)],
    ]  # fmt: skip


def test_job_is_followed_to_its_end(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    scripted(cloud)
    result = pairsift(*STAGE_1, *FOLLOW)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert [line.split(", ")[0] for line in lines] == [
        f"{NAME}: {state}" for state in ("queued", "pending", "running", "running", "done")
    ]
    assert "5 done now; 500 samples" in lines[3]
    assert "12 done now; 1,151 samples" in lines[-1]

    scripted(cloud)
    shown = events(pairsift(*STAGE_1, *FOLLOW, "--json"))
    assert [event["event"] for event in shown] == ["launched", *["progress"] * 4, "ended"]
    assert shown[4]["counters"] == {"samples_done": 500, "shards_done": 5, "tars_opened": 5}
    assert shown[-1]["state"] == "done"


def test_funnel_so_far(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    name = job_name("gs://my-bucket/out", "distribution_alignment")
    cloud.states[name] = ["JOB_STATE_RUNNING", "JOB_STATE_DONE"]
    early = [counter("samples_done", 400), counter("dead_letters_bad_image", 3), counter("dead_letters_no_text", 1)]
    late = [
        counter("funnel_in", 1151), counter("funnel_dropped_semantic_dedup", 20), counter("funnel_dropped_language", 9),
        counter("funnel_dead_letters_undecodable", 2), counter("funnel_survivors", 1120),
        counter("funnel_samples", 300), counter("funnel_copies", 1240),
    ]  # fmt: skip
    cloud.metrics[name] = [early, late]
    result = pairsift(*LAUNCH, "--stage", "distribution_alignment", *FOLLOW)
    first, last = (line for line in result.stderr.splitlines() if line)
    assert first.endswith("; 4 dead letters")
    assert "min; funnel so far" in last
    assert last.endswith(
        "; funnel so far: 1,151 in, gone: dead letters 2, language 9, semantic_dedup 20; 1,120 survivors, 300 of them "
        "in the subset, 1,240 copies"
    )


@pytest.mark.parametrize("end", ["FAILED", "CANCELLED", "DRAINED"])
def test_failed_job(cloud: GoogleCloud, pairsift: Pairsift, end: str) -> None:
    scripted(cloud, end)
    cloud.messages = [{"messageText": "Workflow failed. Causes: shard a: no\n\x1b[2Jspace", "id": "1"}]
    result = pairsift(*STAGE_1, *FOLLOW)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert f"{NAME} {end.lower()}: Workflow failed. Causes: shard a: no \\x1b[2Jspace; see https://console" in last


def test_unavailable_service_is_retried(cloud: GoogleCloud, pairsift: Pairsift, waits: list) -> None:
    scripted(cloud)
    cloud.fail("jobs.getMetrics", *[Answer(503, "not now")] * 6)
    result = pairsift(*STAGE_1, *FOLLOW)
    assert result.exit_code == 0, result.output
    assert "not now" in output(result) and "retrying" in output(result)


def test_interrupted_following(cloud: GoogleCloud, pairsift: Pairsift, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    result = pairsift(*STAGE_1, *FOLLOW)
    assert result.exit_code == 130
    assert f"stopped following {NAME}, which continues; repeat the command to follow it" in output(result)
    assert "`gcloud dataflow jobs cancel" in output(result)
    assert [job["currentState"] for job in cloud.jobs.values()] == ["JOB_STATE_QUEUED"]


# The workflow -----------------------------------------------------------------------------------------------------


def test_launch_without_a_stage_starts_the_workflow(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    dry = events(pairsift(*LAUNCH, "--json", "--dry-run"))
    result = pairsift(*LAUNCH, "--json")
    assert result.exit_code == 0, result.output
    assert cloud.ids() == [
        "objects.insert", "workflows.get", "workflows.create", "operations.get", "executions.list", "executions.create",
    ]  # fmt: skip
    (created,), (started,) = cloud.bodies("workflows.create"), cloud.bodies("executions.create")
    assert [request["body"] for request in dry[1:]] == [created, started]
    assert list(cloud.workflows) == [run_name("gs://my-bucket/out")]
    assert "main:" in created["sourceContents"]
    assert created["serviceAccount"] == "pairsift@my-project.iam.gserviceaccount.com"
    given = json.loads(started["argument"])
    for stage, body in zip(STAGES, given["launches"], strict=True):
        assert service("dataflow").faults_of("LaunchFlexTemplateRequest", body) == []
        assert pairsift(*LAUNCH, "--stage", stage).exit_code == 0
        assert body == cloud.bodies("flexTemplates.launch")[-1]
    assert len(started["argument"]) < 32_000 and len(created["sourceContents"]) < 128_000  # limits of the service


def test_active_workflow_is_adopted_or_refused(cloud: GoogleCloud, place: Path, pairsift: Pairsift) -> None:
    first, second = (events(pairsift(*LAUNCH, "--json"))[0] for _ in range(2))
    assert (first["event"], second["event"]) == ("launched", "adopted")
    assert first["execution"] == second["execution"]
    assert cloud.ids().count("workflows.create") == 1 and "workflows.patch" not in cloud.ids()
    change_settings(place, labels={"application": "other"})
    result = pairsift(*LAUNCH)
    assert result.exit_code == 2
    assert "is running with other parameters, started by" in output(result)
    assert f"gcloud workflows executions cancel {first['execution']}" in output(result)
    cloud.executions[first["execution"]]["state"] = "SUCCEEDED"
    assert pairsift(*LAUNCH).exit_code == 0


def test_outdated_workflow_definition_is_updated(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    cloud.workflows[run_name("gs://my-bucket/out")] = {"sourceContents": "main: {}", "serviceAccount": "x"}
    assert pairsift(*LAUNCH).exit_code == 0
    assert "workflows.create" not in cloud.ids()
    assert "main: {}" not in cloud.workflows[run_name("gs://my-bucket/out")]["sourceContents"]


def test_workflow_created_concurrently(cloud: GoogleCloud, pairsift: Pairsift, waits: list) -> None:
    cloud.fail("workflows.create", Answer(503, "lost on the way", does_it=True))
    result = pairsift(*LAUNCH)
    assert result.exit_code == 0, result.output
    assert len(cloud.executions) == 1


def test_rejected_definition(cloud: GoogleCloud, pairsift: Pairsift, monkeypatch: Any) -> None:
    def refuse(named: Any, query: Any, body: Any) -> Any:
        return 200, {"name": "operations/1", "done": True, "error": {"code": 3, "message": "parse error in line 3"}}

    monkeypatch.setattr(cloud, "_workflows_operations_get", refuse)
    result = pairsift(*LAUNCH)
    assert result.exit_code == 1 and "workflows rejected the definition: parse error in line 3" in output(result)
    assert cloud.executions == {}


def test_workflow_is_followed_through_its_jobs(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    for stage in STAGES:
        cloud.add_job(job_name("gs://my-bucket/out", stage), {}, "JOB_STATE_QUEUED")
        scripted(cloud, name=job_name("gs://my-bucket/out", stage))
    cloud.execution_states = [*["ACTIVE"] * 20, "SUCCEEDED"]
    lines = events(pairsift(*LAUNCH, *FOLLOW, "--json"))
    ended = [event for event in lines if event["event"] == "ended"]
    assert [event.get("job", event.get("workflow")) for event in ended] == [
        *(job_name("gs://my-bucket/out", stage) for stage in STAGES),
        run_name("gs://my-bucket/out"),
    ]
    assert [event["counters"].get("samples_done") for event in ended[:3]] == [1151] * 3
    assert [name for name, _ in itertools.groupby(line["state"] for line in lines[1:])][-2:] == ["active", "succeeded"]


def test_failed_workflow(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    cloud.execution_states = ["ACTIVE", "FAILED"]
    cloud.execution_error = {"payload": '"pairsift-x-cross-modality ended as JOB_STATE_FAILED"'}
    result = pairsift(*LAUNCH, *FOLLOW)
    assert result.exit_code == 1
    assert f"{run_name('gs://my-bucket/out')} failed: " in output(result)
    assert "ended as JOB_STATE_FAILED" in output(result)
