"""An in-memory server for the parts of Cloud Storage's JSON API that Beam and pairsift use.

It supports generations, preconditions (412), simple and resumable uploads, ranges, paged listings with a delimiter,
batches of at most 100 requests, and credentials. It refuses unknown parameters (501), so that no test passes because a
parameter was ignored. Every write is atomic, and an interrupted upload leaves nothing.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import http
import itertools
import json
import re
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import google_crc32c

_API = "/storage/v1/b/"
_IGNORED = {"alt", "projection", "prettyPrint", "uploadType", "name", "upload_id", "fields"}
_KNOWN = {
    "list": {"prefix", "delimiter", "pageToken", "maxResults"},
    "read": {"generation", "ifGenerationMatch"},
    "metadata": {"generation", "ifGenerationMatch"},
    "write": {"ifGenerationMatch"},
    "delete": {"generation", "ifGenerationMatch"},
}
_CHUNK_BYTES = 2**18  # all chunks of a resumable upload but the last are a multiple of this
_BATCHED = 100
TOKEN = "a-token"


@dataclasses.dataclass(frozen=True)
class Stored:
    """One generation of an object."""

    content: bytes
    generation: int
    updated: datetime.datetime


@dataclasses.dataclass(frozen=True)
class Request:
    """`kind` is list, read, metadata, write, delete, copy, batch or bucket."""

    kind: str
    bucket: str
    name: str
    method: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclasses.dataclass(frozen=True)
class Answer:
    """An HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def answer(self) -> Answer:
        """The error in the format of the API."""
        error = {"code": self.status, "message": str(self), "errors": [{"message": str(self), "domain": "global"}]}
        return _json(self.status, {"error": error})


@dataclasses.dataclass
class _Upload:
    bucket: str
    name: str
    conditions: Mapping[str, str]
    content: bytes = b""


class Pause:
    """Holds back the answer to a request.

    `reached` is set when the request arrives. `resume` then answers it, and `drop` closes its connection.
    """

    def __init__(self) -> None:
        self.reached, self._decided, self._dropped = threading.Event(), threading.Event(), False

    def drop(self) -> None:
        """Close the connection as if the request had never arrived."""
        self._dropped = True
        self._decided.set()

    def resume(self) -> None:
        """Answer the request."""
        self._decided.set()

    def wait(self) -> bool:
        """Wait for `resume` or `drop`; return whether to answer."""
        self.reached.set()
        self._decided.wait()
        return not self._dropped


Wanted = Callable[[Request], bool]


class CloudStorage(ThreadingHTTPServer):
    """The server.

    `clock` is the difference of its clock to this machine's. `page_size` is the page size of listings. `asked` counts
    requests by kind.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.clock, self.page_size = datetime.timedelta(), 1000
        self.asked: Counter[str] = Counter()
        self._uploads: dict[str, _Upload] = {}
        self._generations = itertools.count(1_700_000_000_000_000)
        self._pauses: list[tuple[Wanted, Pause]] = []
        self._faults: list[tuple[Wanted, int, bool]] = []
        self._state = threading.RLock()

    @property
    def url(self) -> str:
        """The URL of the server."""
        return f"http://127.0.0.1:{self.server_port}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[CloudStorage]:
        """Serve while the body runs."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def environment(self, folder: Path) -> dict[str, str]:
        """Return variables that direct Google's clients to this server. Stores their credentials in `folder`."""
        user = {
            "type": "authorized_user", "client_id": "a-client", "client_secret": "a-secret", "refresh_token": "refresh",
            "token": TOKEN, "expiry": "2999-01-01T00:00:00Z",
        }  # fmt: skip
        path = folder / "credentials.json"
        path.write_text(json.dumps(user))
        variables = {"STORAGE_EMULATOR_HOST": self.url, "GOOGLE_APPLICATION_CREDENTIALS": str(path)}
        return {**variables, "GOOGLE_CLOUD_PROJECT": "test"}

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Return the sorted names of the objects of a bucket."""
        with self._state:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def put(self, bucket: str, name: str, content: bytes) -> None:
        """Store an object as if by another client."""
        with self._state:
            self._store(bucket, name, content, {})

    def put_folder(self, bucket: str, prefix: str, folder: Path) -> None:
        """Store all files under a local folder."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(bucket, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def pause(self, wanted: Wanted) -> Pause:
        """Hold back the answer to the next matching request."""
        pause = Pause()
        self._pauses.append((wanted, pause))
        return pause

    def fail(self, wanted: Wanted, status: int = 503, *, done: bool = False, times: int = 1) -> None:
        """Answer the next matching requests with an error status; with `done`, only after executing them."""
        self._faults += [(wanted, status, done)] * times

    def answer(self, request: Request) -> Answer | None:
        """Return the answer to a request; None to close its connection."""
        with self._state:
            request = self._named(request)
            if request.kind != "bucket":  # each client requests it once, at an arbitrary time
                self.asked[request.kind] += 1
            pause = _taken(self._pauses, request)
        if pause and not pause[1].wait():
            return None
        with self._state:
            fault = _taken(self._faults, request)
            if fault and not fault[2]:
                return Refused(fault[1], "told to fail").answer
            try:
                answer = self._answer(request)
            except Refused as refused:
                answer = refused.answer
            return Refused(fault[1], "told to fail").answer if fault else answer

    def _named(self, request: Request) -> Request:
        """Return the request with the name of its object, which may be outside the URL."""
        upload = self._uploads.get(request.query.get("upload_id", ""))
        if upload:
            return dataclasses.replace(request, name=upload.name)
        if request.kind != "write" or request.name or "upload_id" in request.query:
            return request
        metadata = _parts(request)[0][1] if request.query["uploadType"] == "multipart" else request.body
        return dataclasses.replace(request, name=json.loads(metadata)["name"])

    def _answer(self, request: Request) -> Answer:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "Anonymous caller does not have storage.objects.get access")
        if request.kind == "batch":
            return self._batch(request)
        if request.bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        unknown = request.query.keys() - _KNOWN.get(request.kind, set()) - _IGNORED
        if unknown:
            raise Refused(501, f"{request.kind}: {', '.join(sorted(unknown))} is not known here")
        doing = {
            "list": self._list, "read": self._read, "metadata": self._metadata, "write": self._write,
            "delete": self._delete, "copy": self._copy, "bucket": self._bucket,
        }  # fmt: skip
        if request.kind not in doing:
            raise Refused(501, f"{request.method} {request.kind}: is not known here")
        return doing[request.kind](request)

    def _bucket(self, request: Request) -> Answer:
        return _json(200, {"kind": "storage#bucket", "id": request.bucket, "name": request.bucket})

    def _list(self, request: Request) -> Answer:
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter")
        after = base64.b64decode(request.query.get("pageToken", "")).decode()
        size = min(self.page_size, int(request.query.get("maxResults", self.page_size)))
        items: list[dict[str, Any]] = []
        last = after
        prefixes: list[str] = []
        for name in self.names(request.bucket, prefix):
            rest = name[len(prefix) :]
            folder = prefix + rest.partition(delimiter)[0] + delimiter if delimiter and delimiter in rest else None
            if (folder or name) <= after or folder in prefixes:
                continue
            if len(items) + len(prefixes) == size:
                token = base64.b64encode(last.encode()).decode()
                return _json(200, {"items": items, "prefixes": prefixes, "nextPageToken": token})
            if folder:
                prefixes.append(folder)
            else:
                items.append(self._resource(request.bucket, name))
            last = folder or name
        return _json(200, {"items": items, "prefixes": prefixes})

    def _resource(self, bucket: str, name: str) -> dict[str, Any]:
        stored = self.buckets[bucket][name]
        link = f"{self.url}/download{_API}{bucket}/o/{quote(name, safe='')}?generation={stored.generation}&alt=media"
        time = stored.updated.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {
            "kind": "storage#object", "id": f"{bucket}/{name}/{stored.generation}", "name": name, "bucket": bucket,
            "generation": str(stored.generation), "metageneration": "1", "size": str(len(stored.content)),
            "contentType": "application/octet-stream", "timeCreated": time, "updated": time, "etag": "e",
            "crc32c": _crc32c(stored.content), "mediaLink": link,
        }  # fmt: skip

    def _found(self, request: Request) -> Stored:
        """Return the object of a request, if it exists with the requested generation."""
        stored = self.buckets[request.bucket].get(request.name)
        if stored is None or request.query.get("generation", str(stored.generation)) != str(stored.generation):
            raise Refused(404, f"No such object: {request.bucket}/{request.name}")
        self._check(request.bucket, request.name, request.query)
        return stored

    def _check(self, bucket: str, name: str, conditions: Mapping[str, str]) -> None:
        stored = self.buckets[bucket].get(name)
        if conditions.get("ifGenerationMatch") not in (None, str(stored.generation if stored else 0)):
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")

    def _metadata(self, request: Request) -> Answer:
        self._found(request)
        return _json(200, self._resource(request.bucket, request.name))

    def _read(self, request: Request) -> Answer:
        stored = self._found(request)
        headers = {"Content-Type": "application/octet-stream", "X-Goog-Generation": str(stored.generation)}
        if "range" not in request.headers:
            return Answer(200, {**headers, "X-Goog-Hash": f"crc32c={_crc32c(stored.content)}"}, stored.content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers["range"])
        if asked is None:
            raise Refused(501, f"range {request.headers['range']} is not known here")
        start, size = int(asked[1]), len(stored.content)
        if start >= size:
            refused = Refused(416, "The requested range cannot be satisfied.").answer
            return dataclasses.replace(refused, headers={**refused.headers, "Content-Range": f"bytes */{size}"})
        stop = min(int(asked[2]) + 1 if asked[2] else size, size)
        return Answer(
            206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, stored.content[start:stop]
        )

    def _delete(self, request: Request) -> Answer:
        self._found(request)
        del self.buckets[request.bucket][request.name]
        return Answer(204, {})

    def _copy(self, request: Request) -> Answer:
        stored = self._found(request)
        bucket, name = (unquote(part) for part in request.query["name"].split("/o/", 1))
        return self._store(bucket, name, stored.content, {})

    def _store(self, bucket: str, name: str, content: bytes, conditions: Mapping[str, str]) -> Answer:
        self._check(bucket, name, conditions)
        now = datetime.datetime.now(datetime.UTC) + self.clock
        self.buckets.setdefault(bucket, {})[name] = Stored(content, next(self._generations), now)
        return _json(200, self._resource(bucket, name))

    def _write(self, request: Request) -> Answer:
        if "upload_id" in request.query:
            return self._resumed(request)
        if request.query["uploadType"] == "multipart":
            (_, metadata), (_, content) = _parts(request)
            _check_crc32c(json.loads(metadata).get("crc32c"), content)
            return self._store(request.bucket, request.name, content, request.query)
        if request.query["uploadType"] != "resumable":
            raise Refused(501, f"uploadType {request.query['uploadType']} is not known here")
        upload = uuid.uuid4().hex
        self._uploads[upload] = _Upload(request.bucket, request.name, request.query)
        place = f"{self.url}/upload{_API}{request.bucket}/o?uploadType=resumable&upload_id={upload}"
        return Answer(200, {"Location": place})

    def _resumed(self, request: Request) -> Answer:
        upload = self._uploads.get(request.query["upload_id"])
        if upload is None:
            raise Refused(404, "No such upload")
        if request.method == "DELETE":
            del self._uploads[request.query["upload_id"]]
            return Answer(499, {})
        sent = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", request.headers["content-range"])
        assert sent is not None
        if sent[1] is not None:
            if int(sent[1]) != len(upload.content) or (sent[3] == "*" and len(request.body) % _CHUNK_BYTES):
                raise Refused(400, f"{sent[0]}: not where the upload goes on, or no multiple of 256 KiB")
            upload.content += request.body
        if sent[3] == "*" or int(sent[3]) > len(upload.content):
            return Answer(308, {"Range": f"bytes=0-{len(upload.content) - 1}"} if upload.content else {})
        _check_crc32c(request.headers.get("x-goog-hash", "").removeprefix("crc32c=") or None, upload.content)
        del self._uploads[request.query["upload_id"]]
        return self._store(upload.bucket, upload.name, upload.content, upload.conditions)

    def _batch(self, request: Request) -> Answer:
        parts = _parts(request)
        if len(parts) > _BATCHED:
            raise Refused(400, f"{len(parts)} calls in a batch; at most {_BATCHED}")
        boundary, answers = "batch_answers", b""
        for headers, content in parts:
            method, target, _ = content.decode().split(" ", 2)
            answer = self.answer(_request(method, target, request.headers, b""))  # these requests have no body
            assert answer is not None
            reason = http.HTTPStatus(answer.status).phrase
            head = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
            identity = headers.get("content-id", "<0>").replace("<", "<response-")
            answers += (
                f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: {identity}\r\n\r\n"
                f"HTTP/1.1 {answer.status} {reason}\r\n{head}\r\n"
            ).encode() + answer.body + b"\r\n"  # fmt: skip
        content_type = f"multipart/mixed; boundary={boundary}"
        return Answer(200, {"Content-Type": content_type}, answers + f"--{boundary}--\r\n".encode())


class _Handler(BaseHTTPRequestHandler):
    server: CloudStorage
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY, because an answer takes two writes

    def _do(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        headers = {name.lower(): value for name, value in self.headers.items()}
        complete = len(body) == length  # otherwise the client has died
        answer = self.server.answer(_request(self.command, self.path, headers, body)) if complete else None
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _do

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # clients may be killed
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


def _request(method: str, target: str, headers: Mapping[str, str], body: bytes) -> Request:
    url = urlsplit(target)
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    path = re.sub(r"^/(upload|download)(?=/storage)", "", url.path)

    def request(kind: str, bucket: str = "", name: str = "") -> Request:
        return Request(kind, unquote(bucket), unquote(name), method, query, headers, body)

    if path == "/batch/storage/v1":
        return request("batch")
    bucket, _, rest = path.removeprefix(_API).partition("/")
    if not path.startswith(_API) or not (rest == "o" or rest.startswith("o/") or not rest):
        return request(f"path {path}", bucket)
    if not rest:
        return request("bucket", bucket)
    if url.path.startswith("/upload") or rest == "o":
        return request("list" if method == "GET" else "write", bucket, query.get("name", ""))
    name = rest.removeprefix("o/")
    if "/copyTo/b/" in name:
        name, _, query["name"] = name.partition("/copyTo/b/")
        return request("copy", bucket, name)
    reads = "read" if query.get("alt") == "media" else "metadata"
    return request({"GET": reads, "DELETE": "delete"}.get(method, method), bucket, name)


def _parts(request: Request) -> list[tuple[dict[str, str], bytes]]:
    """Return the headers and the content of each part. Parsed by hand, because the email parser expects text."""
    boundary = re.search(r'boundary="?([^";]+)"?', request.headers["content-type"])
    assert boundary is not None
    found = []
    for part in re.split(rb"\r?\n--" + re.escape(boundary[1].encode()), b"\n" + request.body)[1:-1]:
        head, content = re.split(rb"\r?\n\r?\n", part, maxsplit=1)
        lines = (line.partition(":") for line in head.decode().splitlines())
        found.append(({name.strip().lower(): value.strip() for name, _, value in lines}, content))
    return found


def _check_crc32c(told: str | None, content: bytes) -> None:
    if told not in (None, _crc32c(content)):
        raise Refused(400, "Provided CRC32C doesn't match calculated CRC32C")


def _crc32c(content: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


def _json(status: int, content: Any) -> Answer:
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(content).encode())


def _taken(planned: list[Any], request: Request) -> Any:
    """Remove and return the first plan that matches this request, if any."""
    for index, plan in enumerate(planned):
        if plan[0](request):
            return planned.pop(index)
    return None
