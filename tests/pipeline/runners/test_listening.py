"""Nothing that a run on this machine starts listens on another interface than loopback: those ports carry pickles."""

from __future__ import annotations

import inspect
import os
import socket

import apache_beam as beam
import pytest
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_provision_api_pb2, beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo
from apache_beam.runners.portability.fn_api_runner.worker_handlers import WorkerHandlerManager
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
from apache_beam.testing.util import assert_that

from pipeline.runners import beam_internals, workers
from pipeline.runners.job_service import JobService
from pipeline.runners.supported import pipeline_of
from tests.pipeline.runners.listeners import listeners, of_runner_and_worker

PROVISION = ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo())


def pool_at(address: str) -> beam_runner_api_pb2.Environment:
    payload = beam_runner_api_pb2.ExternalPayload(endpoint={"url": address})
    return beam_runner_api_pb2.Environment(
        urn=common_urns.environments.EXTERNAL.urn, payload=payload.SerializeToString()
    )


@pytest.fixture
def opened() -> dict[str, bool]:
    """What this process listens on before the test."""
    return listeners(os.getpid())


def look(before: dict[str, bool]) -> dict[str, bool]:
    """What this process listens on now and did not before."""
    return {address: is_loopback for address, is_loopback in listeners(os.getpid()).items() if address not in before}


def test_a_run_with_two_processes_listens_on_loopback_only() -> None:
    def check(found: list[tuple[bool, dict[str, bool]]]) -> None:
        for is_worker, addresses in found:
            assert is_worker
            assert len(addresses) >= 4  # control, data, state and logging
            assert all(addresses.values()), addresses

    options = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    with pipeline_of(options) as pipeline:
        assert_that(pipeline | beam.Create([1, 2]) | beam.Reshuffle() | beam.Map(of_runner_and_worker), check)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", socket.gethostname()])
def test_servers_for_a_pool_on_this_machine(
    host: str, opened: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers._ExternalWorker, "start_worker", lambda self: None)
    manager = WorkerHandlerManager({"e": pool_at(f"{host}:1")}, PROVISION)
    (handler,) = manager.get_worker_handlers("e", 1)
    try:
        found = look(opened)
        assert len(found) >= 4 and all(found.values()), found
        assert handler.control_address.startswith("localhost:")  # another name may stand for another address
    finally:
        manager._grpc_server.close()


def test_servers_for_a_pool_elsewhere_can_be_reached(
    opened: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers._ExternalWorker, "start_worker", lambda self: None)
    manager = WorkerHandlerManager({"e": pool_at("far.example:1")}, PROVISION)
    (handler,) = manager.get_worker_handlers("e", 1)
    try:
        found = look(opened)
        assert len(found) >= 4 and not any(found.values()), found
        assert handler.control_address.startswith(f"{socket.getfqdn()}:")
    finally:
        manager._grpc_server.close()


def test_loopback_workers_and_the_job_service(opened: dict[str, bool]) -> None:
    _, pool = BeamFnExternalWorkerPoolServicer.start()
    service = JobService()
    try:
        service.start_grpc_server()
        found = look(opened)
        assert len(found) >= 2 and all(found.values()), found
    finally:
        pool.stop(0)
        service.stop()


def test_the_modules_of_beam_that_bind_every_interface() -> None:
    """Each binds through the name `grpc`, which `beam_internals` replaces."""
    for module in beam_internals.LISTENING_MODULES:
        assert isinstance(module.grpc, beam_internals._Grpc)
        assert module.grpc.StatusCode is not None
        assert "grpc.server(" in inspect.getsource(module) and '"[::]' in inspect.getsource(module).replace("'", '"')
    assert "GrpcServer(" in inspect.getsource(WorkerHandlerManager.get_worker_handlers)
    assert worker_handlers.GrpcServer is beam_internals._RunnerServer
