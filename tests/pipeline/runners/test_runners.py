"""Runners: missing requirements are reported before anything is written."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.local_job_service import LocalJobServicer

from pipeline.runners import supported
from pipeline.runners.job_service import JobService
from pipeline.runners.workers import run_to_end
from transforms.core.errors import UsageError

PORTABLE = ["--runner=PortableRunner", "--job_endpoint=embed"]
DATAFLOW = [
    "--runner=DataflowRunner", "--project=p", "--region=europe-west4", "--temp_location=gs://b/t",
    "--sdk_container_image=i",
]  # fmt: skip
IN_CLOUD = {"--input": "gs://b/pool", "--output": "gs://b/out"}
NOTHING_THERE = "localhost:1"


def check(options: list[str], paths: dict[str, str] | None = None, needs_gpu: bool = False, **models: str) -> None:
    supported.check(options, {"--input": "/pool", "--output": "/out"} if paths is None else paths, models, needs_gpu)


class Interrupted:
    """A job on a cluster, and a user who gives up waiting."""

    is_cancelled = False

    def wait_until_finish(self) -> None:
        raise KeyboardInterrupt

    def cancel(self) -> None:
        self.is_cancelled = True


def test_a_run_that_is_interrupted_ends_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the job would continue to write to an output folder that is no longer locked."""
    job = Interrupted()
    monkeypatch.setattr(beam.Pipeline, "run", lambda pipeline: job)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(beam.Pipeline(), "stage")
    assert job.is_cancelled


@pytest.fixture
def listening() -> Iterator[str]:
    """The address of a listening socket, like that of a worker pool."""
    with socket.create_server(("localhost", 0)) as server:
        yield f"localhost:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("runner", "why"),
    [
        ("DaskRunner", "writes empty files"),
        ("apache_beam.runners.dask.dask_runner.DaskRunner", "writes empty files"),
        ("PrismRunner", "downloads a program"),
        ("prism", "downloads a program"),
        ("InteractiveRunner", "for notebooks"),
        ("KafkaStreamsRunner", "it is not tested with pairsift"),
        ("NoSuchRunner", "it is not tested with pairsift"),
    ],
)
def test_runners_that_are_refused(runner: str, why: str) -> None:
    with pytest.raises(UsageError, match=rf"--runner: .*{runner}: .*{why}.*allowed: FnApiRunner, PortableRunner, "):
        check([f"--runner={runner}"])


@pytest.mark.parametrize("runner", ["FnApiRunner", "DirectRunner", "direct", "directrunner"])
def test_every_name_of_the_local_runner(runner: str) -> None:
    options = [f"--runner={runner}"]
    check(options)
    assert supported.is_here(options)
    assert type(supported.pipeline_of(options).runner) is FnApiRunner  # Beam's DirectRunner would try another first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runner=PortableRunner"], "--job_endpoint=embed for one in this process, or --job_endpoint=HOST:PORT"),
        (
            ["--runner=PortableRunner", f"--job_endpoint={NOTHING_THERE}"],
            rf"--job_endpoint: {NOTHING_THERE}: no job service answers there; .*pipeline.runners.job_service --port 1 ",
        ),
        (PORTABLE, r"Beam's own image, which has no pairsift; .*--environment_config=IMAGE"),
        ([*PORTABLE, "--environment_type=DOCKER", "--environment_config=i"], "a container cannot read"),
        ([*PORTABLE, "--environment_type=EXTERNAL", "--environment_config=x"], "needs the HOST:PORT of a worker pool"),
        (
            [*PORTABLE, "--environment_type=EXTERNAL", f"--environment_config={NOTHING_THERE}"],
            rf"{NOTHING_THERE}: no worker pool answers there; .*worker_pool_main --service_port=1$",
        ),
        (
            [*PORTABLE, "--environment_type=EXTERNAL", f'--environment_config={{"url": "{NOTHING_THERE}"}}'],
            rf"{NOTHING_THERE}: no worker pool answers there",
        ),
        (["--runner=FlinkRunner", "--job_server_java_launcher=no_java"], "there is no no_java on the PATH; install"),
        (["--runner=SparkRunner", "--job_server_java_launcher=no_java"], "there is no no_java on the PATH; install"),
    ],
)
def test_requirements_of_the_portable_runners(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        check(options, {"--input": str(tmp_path), "--output": str(tmp_path)})


def test_listening_worker_pool_is_accepted(listening: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*PORTABLE, "--environment_type=EXTERNAL", f"--environment_config={listening}"]
    check(options, {"--input": str(tmp_path)}, model=str(tmp_path), hub="bundled:clip")
    assert supported.is_here(options)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    with pytest.raises(UsageError, match="model: clip: workers have another working folder; give the absolute path"):
        check(options, {"--input": str(tmp_path)}, model="clip")


def test_remote_worker_pool_is_not_contacted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = [*PORTABLE, "--environment_type=EXTERNAL", "--environment_config=far.example:50000"]
    check(options, IN_CLOUD)
    assert not caplog.records and not supported.is_here(options)
    check(options, {"--input": str(tmp_path), "--output": "gs://b/out"})
    assert caplog.messages == [f"PortableRunner: every worker must see the same files at: {tmp_path}"]


def test_to_a_cluster_localhost_is_each_of_its_machines(listening: str) -> None:
    options = [
        "--runner=FlinkRunner", f"--job_endpoint={listening}", "--environment_type=EXTERNAL",
        f"--environment_config={NOTHING_THERE}",
    ]  # fmt: skip
    assert not supported.is_here(options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supported, "_describes_options", lambda endpoint: True)  # like Flink's job service
        check(options, IN_CLOUD)


def test_loopback_is_here() -> None:
    check([*PORTABLE, "--environment_type=LOOPBACK"], {"--input": "pool"})
    assert supported.is_here([*PORTABLE, "--environment_type=loopback"])
    assert supported.is_here(["--runner=FlinkRunner"])  # starts a cluster in this machine
    assert not supported.is_here(["--runner=FlinkRunner", "--flink_master=far.example:8081"])


def test_beams_own_job_service_is_refused() -> None:
    """It has one worker for each job, and waits forever if that dies."""
    theirs, ours = LocalJobServicer(), JobService()
    try:
        options = ["--runner=PortableRunner", "--environment_type=LOOPBACK"]
        with pytest.raises(UsageError, match=r"is Beam's own local job service .*waits forever if that dies"):
            check([*options, f"--job_endpoint=localhost:{theirs.start_grpc_server()}"])
        check([*options, f"--job_endpoint=localhost:{ours.start_grpc_server()}"])
    finally:
        theirs.stop()
        ours.stop()


def test_requirements_of_dataflow_are_reported_at_once() -> None:
    check(DATAFLOW, IN_CLOUD)
    assert not supported.is_here(DATAFLOW)
    with pytest.raises(UsageError) as caught:
        check(["--runner=dataflow"], {"--input": "/pool", "--output": "gs://b/out"}, needs_gpu=True)
    message = str(caught.value)
    for part in (
        "--project (", "--temp_location (", "--sdk_container_image (", "--input: /pool: workers read gs:// only",
        "cross_modality.device: cuda, but the options name no accelerator",
    ):  # fmt: skip
        assert part in message
    assert "gs://b/out" not in message
    check([*DATAFLOW, "--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1"], IN_CLOUD, needs_gpu=True)


def test_runner_without_metrics() -> None:
    assert supported.has_metrics([])
    assert supported.has_metrics(["--runner=SparkRunner"])
    assert not supported.has_metrics(["--runner=SparkRunner", "--spark_submit_uber_jar"])
