"""Google Cloud's REST APIs: requests as data, sent with google-auth's default credentials.

Transient errors (429, 5xx, a broken connection) are retried, honouring `Retry-After`, so every request must be safe to
send twice. Other errors become ApiError: one line that says what to do next.

The environment variables of gcloud and of the Cloud Storage client set other endpoints, for example private ones:
`CLOUDSDK_API_ENDPOINT_OVERRIDES_DATAFLOW=https://…/` and `STORAGE_EMULATOR_HOST`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import urllib.parse
from collections.abc import Iterator
from typing import Any

import google.auth
import requests
from google.auth.exceptions import GoogleAuthError, TransportError
from google.auth.transport.requests import AuthorizedSession
from requests.adapters import HTTPAdapter
from urllib3 import BaseHTTPResponse
from urllib3.util.retry import Retry

from transforms.core.errors import Failure

SCOPE = "https://www.googleapis.com/auth/cloud-platform"
STORAGE = "storage"

CONSOLE = "https://console.cloud.google.com"
LOG_IN = "gcloud auth application-default login"

_RETRIES = 5
_LONGEST_WAIT_SECONDS = 120  # per retry; the user retries a service that asks for more
_TIMEOUT_SECONDS = 60
_TRANSIENT = (429, 500, 502, 503, 504)
_ROLES = {
    "dataflow": "roles/dataflow.developer",
    "workflows": "roles/workflows.editor",
    "workflowexecutions": "roles/workflows.invoker",
    "cloudscheduler": "roles/cloudscheduler.admin",
}
_ACT_AS = "iam.serviceAccounts.actAs"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Request:
    """A request to the API `service`, within `project`. `permission` is the IAM permission that it needs, `missing` the
    advice to give if the API answers 404, `service_account` the account that the service acts as, if any."""

    service: str
    method: str
    path: str
    project: str
    permission: str
    missing: str = ""
    query: dict[str, str] = dataclasses.field(default_factory=dict)
    body: dict[str, Any] | bytes | None = None
    service_account: str | None = None

    @property
    def url(self) -> str:
        """The complete URL."""
        query = f"?{urllib.parse.urlencode(self.query)}" if self.query else ""
        return f"{endpoint(self.service)}/{self.path}{query}"


def endpoint(service: str) -> str:
    """The base URL of a service's API, without a trailing slash."""
    variable = "STORAGE_EMULATOR_HOST" if service == STORAGE else f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service.upper()}"
    return (os.environ.get(variable) or f"https://{service}.googleapis.com").rstrip("/")


class ApiError(Failure):
    """An API refused a request or failed. `status` is the HTTP status, 0 if there was no answer."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class Api:
    """Sends requests with default credentials. Raises ApiError if there are none."""

    def __init__(self) -> None:
        try:
            credentials, _ = google.auth.default(scopes=[SCOPE])
        except GoogleAuthError as error:
            raise ApiError(0, f"no credentials of Google Cloud: {_line(error)}; run `{LOG_IN}`") from error
        self._credentials = credentials
        self._session = AuthorizedSession(credentials)
        retry = _LoggedRetry(
            total=_RETRIES,
            status_forcelist=_TRANSIENT,
            allowed_methods=None,
            backoff_factor=1.0,
            backoff_max=_LONGEST_WAIT_SECONDS,
            retry_after_max=_LONGEST_WAIT_SECONDS,
            raise_on_status=False,
        )
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry))

    def send(self, request: Request) -> dict[str, Any]:
        """The API's answer. Raises ApiError."""
        content: dict[str, Any] = {}
        if isinstance(request.body, bytes):
            content = {"data": request.body, "headers": {"Content-Type": "application/octet-stream"}}
        elif request.body is not None:
            content = {"json": request.body}
        try:
            response = self._session.request(request.method, request.url, timeout=_TIMEOUT_SECONDS, **content)
        except TransportError as error:  # from the token server
            raise ApiError(0, f"credentials cannot be refreshed: {_line(error)}; check the network") from error
        except GoogleAuthError as error:
            raise ApiError(401, f"credentials are refused: {_line(error)}; run `{LOG_IN}`") from error
        except requests.RequestException as error:
            raise ApiError(0, f"{request.url} cannot be reached: {_line(error)}; check the network") from error
        if response.ok:
            return response.json() if response.content else {}
        raise _refusal(request, response, self._account)

    def pages(self, request: Request, items: str) -> Iterator[dict[str, Any]]:
        """The `items` of every page of a list."""
        query = request.query
        while True:
            page = self.send(dataclasses.replace(request, query=query))
            yield from page.get(items, ())
            if not page.get("nextPageToken"):
                return
            query = {**query, "pageToken": page["nextPageToken"]}

    @property
    def _account(self) -> str:
        """The account of the credentials as an IAM member; a placeholder if the credentials do not name it."""
        email = getattr(self._credentials, "service_account_email", None)
        if email and "@" in email:
            return f"serviceAccount:{email}"
        return f"user:{getattr(self._credentials, 'account', None) or 'YOUR_ACCOUNT'}"


class _LoggedRetry(Retry):
    """Logs each wait."""

    def sleep(self, response: BaseHTTPResponse | None = None) -> None:
        seconds = (response and self.get_retry_after(response)) or self.get_backoff_time()
        if seconds and self.history:
            last = self.history[-1]
            _log.warning("%s %s: %s; waiting %.0f s", last.method, last.url, last.status or last.error, seconds)
        super().sleep(response)


def _refusal(request: Request, response: requests.Response, account: str) -> ApiError:
    message, reason, metadata = _error_of(response)
    advice = _advice(request, response.status_code, f"{reason} {message}", metadata, account)
    said = f"{request.service} answered {response.status_code}: {message.rstrip('.') or response.reason}"
    return ApiError(response.status_code, f"{said}; {advice}")


def _error_of(response: requests.Response) -> tuple[str, str, dict[str, str]]:
    """Message, reason and metadata of the reason, as far as the answer has the form of Google's errors."""
    try:
        error = response.json()["error"]
        details = [detail for detail in error.get("details", ()) if detail.get("reason")]
        found = details[0] if details else {}
        return " ".join(error["message"].split()), found.get("reason", ""), found.get("metadata", {})
    except (ValueError, LookupError, TypeError, AttributeError):
        return " ".join(response.text.split())[:200], "", {}


def _advice(request: Request, status: int, error: str, metadata: dict[str, str], account: str) -> str:
    if status == 401:
        return f"run `{LOG_IN}`"
    if "SERVICE_DISABLED" in error:
        service = metadata.get("service", f"{request.service}.googleapis.com")
        return f"run `gcloud services enable {service} --project={request.project}`, then wait some minutes"
    if status == 403:
        return _grant(request, error, metadata, account)
    if status == 404 and request.missing:
        return request.missing
    if status == 429:
        return "a quota is used up: run the same command again later, or raise it on the quota page of the console"
    if status >= 500:
        return "the service is failing: run the same command again later; nothing is started twice"
    return f"nothing was changed; correct that (it was {request.method} {request.url})"


def _grant(request: Request, error: str, metadata: dict[str, str], account: str) -> str:
    if _ACT_AS in (metadata.get("permission") or error) and request.service_account:
        permission, role = _ACT_AS, "roles/iam.serviceAccountUser"
        where = f"iam service-accounts add-iam-policy-binding {request.service_account} --project={request.project}"
    elif request.service == STORAGE:
        permission, role = request.permission, "roles/storage.objectUser"
        where = f"storage buckets add-iam-policy-binding gs://{request.path.split('/')[4]}"
    else:
        permission, role = metadata.get("permission") or request.permission, _ROLES[request.service]
        where = f"projects add-iam-policy-binding {request.project}"
    who = account.partition(":")[2]
    return f"{who} lacks {permission}; `gcloud {where} --member={account} --role={role}` grants it"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
