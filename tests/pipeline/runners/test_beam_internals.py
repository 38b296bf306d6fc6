"""The undocumented names of Beam in `pipeline.runners.beam_internals` exist in the installed release, with the shape
that is expected. A failure means that a new release of Beam has changed one of them."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, PortableOptions
from apache_beam.portability import common_urns, python_urns
from apache_beam.portability.api import beam_fn_api_pb2, beam_provision_api_pb2, beam_runner_api_pb2
from apache_beam.runners import DataflowRunner
from apache_beam.runners.dataflow.internal import apiclient
from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo
from apache_beam.runners.portability.fn_api_runner.worker_handlers import (
    ControlConnection,
    ControlFuture,
    WorkerHandlerManager,
)
from apache_beam.runners.portability.local_job_service import BeamJob
from apache_beam.transforms import core

from pipeline.runners import beam_internals, workers
from pipeline.runners.job_service import JobService

POOL = beam_runner_api_pb2.ExternalPayload(
    endpoint={"url": "localhost:1"}
)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture
def handlers() -> Any:
    """The handlers of two workers of a pool, neither of them started."""
    environment = beam_runner_api_pb2.Environment(
        urn=common_urns.environments.EXTERNAL.urn, payload=POOL.SerializeToString()
    )
    manager = WorkerHandlerManager({"e": environment}, ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo()))
    started, workers._ExternalWorker.start_worker = workers._ExternalWorker.start_worker, lambda self: None  # type: ignore
    try:
        yield manager.get_worker_handlers("e", 2)
    finally:
        workers._ExternalWorker.start_worker = started  # type: ignore[method-assign]
        manager._grpc_server.close()


class _DoFn(beam.DoFn):
    def process(self, element: int, given: int = 3, window: Any = beam.DoFn.WindowParam) -> list[int]:
        return [element + given]


def test_functions_and_views_are_inspected_once() -> None:
    inspected: list[Any] = []
    plain = inspect.unwrap(core.get_function_args_defaults)

    def count(function: Any) -> Any:
        inspected.append(function)
        return plain(function)

    arguments = beam_internals._arguments_memoised(count)
    for _ in range(2):
        assert arguments(_DoFn().process) == (["element", "given", "window"], [3, beam.DoFn.WindowParam])
        assert arguments(_DoFn.process) == (["self", "element", "given", "window"], [3, beam.DoFn.WindowParam])
        assert arguments((1).__add__) == plain((1).__add__) == (["value"], [])  # has no weak references
    assert len(inspected) == 4
    arguments(_DoFn().process)[0].clear()
    assert arguments(_DoFn().process)[0] == ["element", "given", "window"]

    view_as = beam_internals._views_memoised(inspect.unwrap(PipelineOptions.view_as))
    options, others = PipelineOptions(["--job_name=a"]), PipelineOptions(["--job_name=b"])
    view = view_as(options, GoogleCloudOptions)
    assert view is view_as(options, GoogleCloudOptions)
    view.job_name = "c"
    assert [view_as(one, GoogleCloudOptions).job_name for one in (options, others)] == ["c", "b"]


def test_beam_calls_what_is_memoised() -> None:
    beam_internals.memoise_inspection()
    assert core.get_function_args_defaults.__wrapped__ and PipelineOptions.view_as.__wrapped__
    assert "get_function_args_defaults(f)" in inspect.getsource(core.get_function_arguments)
    assert sorted([1, 2] | beam.ParDo(_DoFn(), 5)) == [6, 7]


def test_our_handlers_replace_those_of_beam() -> None:
    registered = beam_internals.WorkerHandler._registered_environments
    assert registered[python_urns.SUBPROCESS_SDK] == (workers._LocalWorker, bytes)
    assert registered[common_urns.environments.EXTERNAL.urn] == (
        workers._ExternalWorker, beam_runner_api_pb2.ExternalPayload,
    )  # fmt: skip
    assert parameters(beam_internals.GrpcWorkerHandler.__init__)[1:] == ["state", "provision_info", "grpc_server"]
    assert parameters(beam_internals.ExternalWorkerHandler.__init__)[1] == "external_payload"


def test_the_workers_of_a_job_know_each_other(handlers: list[Any]) -> None:
    for handler in handlers:
        assert beam_internals.workers_of_job(handler) == handlers
        assert beam_internals.pool_address(handler) == "localhost:1"
        assert isinstance(handler.provision_info, ExtendedProvisionInfo)
        assert handler.job == ""


def test_pending_answers_can_be_failed(handlers: list[Any]) -> None:
    handler = handlers[0]
    assert beam_internals.pending_answers(handler) == []
    future = handler.control_conn.push(beam_fn_api_pb2.InstructionRequest(instruction_id="i"))
    assert beam_internals.pending_answers(handler) == [future]
    assert isinstance(future, ControlFuture) and not future.is_done()
    future.set(beam_fn_api_pb2.InstructionResponse(error="died"))
    assert future.is_done() and future.get().error == "died"


def test_the_connection_thread_starts_with_the_connection(handlers: list[Any]) -> None:
    handler = handlers[0]
    thread = beam_internals.connection_thread(handler)
    assert isinstance(thread, threading.Thread) and thread.ident is None
    handler.control_conn.set_input(iter(()))
    thread.join(10)
    assert thread.ident is not None and not thread.is_alive()
    assert isinstance(handler.control_conn, ControlConnection)


def test_a_job_calls_invoke_in_place_of_beams_runner() -> None:
    assert "_invoke_runner" in inspect.getsource(BeamJob._run_job)
    assert parameters(BeamJob._invoke_runner) == ["self"]
    assert {"_job_id", "_pipeline_proto"} <= set(
        vars(BeamJob.__mro__[1]("i", "n", beam_runner_api_pb2.Pipeline(), {}))
    )
    assert "_provision_info" in inspect.getsource(BeamJob.__init__)


def test_a_service_gives_its_job_by_id() -> None:
    service = JobService()
    service._jobs["i"] = job = object()
    assert beam_internals.job_of_service(service, "i") is job
    assert parameters(beam_internals.LocalJobServicer.__init__)[1:3] == ["staging_dir", "beam_job_type"]


def test_the_local_runner_has_as_many_workers_as_it_is_given() -> None:
    assert beam_internals.FnApiRunner()._num_workers == 1
    runner = beam_internals._RunnerOfManyWorkers(3)
    assert runner._num_workers == 3
    assert parameters(runner.run_via_runner_api) == ["pipeline_proto", "options"]


def test_a_job_is_followed_without_a_time_limit() -> None:
    handle = beam_internals.JobServiceHandle(None, PipelineOptions(["--job_server_timeout=7"]))
    assert handle.timeout == PipelineOptions(["--job_server_timeout=7"]).view_as(PortableOptions).job_server_timeout
    beam_internals.without_time_limit(handle)
    assert handle.timeout is None
    assert parameters(beam_internals.PortableRunner.create_job_service) == ["self", "options"]
    assert parameters(beam_internals.PortableRunner.create_job_service_handle) == ["self", "job_service", "options"]
    assert parameters(handle.run) == ["preparation_id"]


def test_the_sizes_of_a_dataflow_job() -> None:
    runner = DataflowRunner()
    options = PipelineOptions(
        ["--project=p", "--region=europe-west4", "--temp_location=gs://b/t", "--job_name=j", "--staging_location=gs://b/s"]
    )
    runner.proto_pipeline = beam.Pipeline().to_runner_api()
    runner.job = apiclient.Job(options, runner.proto_pipeline)
    request_bytes, graph_bytes = beam_internals.dataflow_bytes(runner)
    assert request_bytes > 0 and graph_bytes == len(runner.proto_pipeline.SerializeToString())
    source = inspect.getsource(DataflowRunner.run_pipeline)
    assert "self.job = " in source and "self.proto_pipeline" in source
