"""A bucket of Google Cloud Storage on this machine, for processes that really talk to one.

The part of the JSON API that gcsfs, TensorStore and google-cloud-storage use of buckets without folders: objects that appear
whole, listings that are consistent at once, generations. No credentials, no versions, no quotas.
"""

import base64
import contextlib
import email
import email.policy
import hashlib
import itertools
import json
import struct
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c


class Bucket:
    """Objects by their names: (bytes, generation). `environment` leads processes to it."""

    def __init__(self, port: int, name: str) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.name, self.lock, self.generations, self.uploads = name, threading.RLock(), itertools.count(1), dict[str, Any]()
        self.written: list[str] = []  # every name, each time that it was written
        self.asked: list[str] = []  # every request
        self.address = f"http://localhost:{port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process is started with to find this bucket, and none of Google's."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",  # TensorStore
            "GOOGLE_CLOUD_PROJECT": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC what kind of bucket it is
            "NO_GCE_CHECK": "true",
        }

    def put(self, name: str, data: bytes) -> dict[str, Any]:
        """Writes an object whole."""
        with self.lock:
            self.objects[name] = data, next(self.generations)
            self.written.append(name)
            return self.described(name)

    def described(self, name: str) -> dict[str, Any]:
        """The resource of an object."""
        data, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "id": f"{self.name}/{name}/{generation}",
            "name": name,
            "bucket": self.name,
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "size": str(len(data)),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "crc32c": base64.b64encode(struct.pack(">I", google_crc32c.value(data))).decode(),
            "etag": f"e{generation}",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def listed(self, prefix: str, delimiter: str, after: str, most: int, first: str) -> dict[str, Any]:
        """One page of a listing."""
        with self.lock:
            items: list[dict[str, Any]] = []
            prefixes: list[str] = []
            token, last = None, ""
            for name in sorted(self.objects):
                if not name.startswith(prefix) or name <= after or name < first:
                    continue
                rest = name[len(prefix) :]
                folder = prefix + rest[: rest.index(delimiter) + 1] if delimiter and delimiter in rest else None
                if folder is not None and folder in prefixes:
                    last = name
                    continue
                if len(items) + len(prefixes) >= most:
                    token = last
                    break
                last = name
                if folder is None:
                    items.append(self.described(name))
                else:
                    prefixes.append(folder)
        page = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        return page if token is None else {**page, "nextPageToken": base64.b64encode(token.encode()).decode()}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that does not want the answer any more
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, code: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Type" not in headers:
            self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, code: int, why: str) -> None:
        self._answer(code, {"error": {"code": code, "message": why, "errors": [{"message": why, "reason": why}]}})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _handle(self) -> None:
        body = self._body()
        self.bucket.asked.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        asked = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        upload = parts[0] in ("upload", "resumable")
        if parts[0] in ("upload", "download", "resumable"):
            parts = parts[1:]
        if parts[:3] != ["storage", "v1", "b"] or len(parts) < 4:
            self._refuse(404, "notFound")
        elif parts[3] != self.bucket.name:
            self._refuse(404, "The specified bucket does not exist.")
        elif len(parts) == 4:
            self._answer(200, {"kind": "storage#bucket", "name": self.bucket.name, "id": self.bucket.name, "location": "US"})
        elif upload:
            self._upload(asked, body)
        elif len(parts) == 5:
            token = base64.b64decode(asked.get("pageToken", "")).decode()
            most = int(asked.get("maxResults", 1000))
            names = asked.get("prefix", ""), asked.get("delimiter", ""), token, most, asked.get("startOffset", "")
            self._answer(200, self.bucket.listed(*names))
        elif len(parts) > 6 and parts[6] in ("rewriteTo", "copyTo"):
            self._copy(parts[5], parts[10])
        else:
            self._object(parts[5], asked)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _object(self, name: str, asked: dict[str, str]) -> None:
        with self.bucket.lock:
            there = self.bucket.objects.get(name)
            if there is None:
                self._refuse(404, f"No such object: {self.bucket.name}/{name}")
                return
            if asked.get("ifGenerationNotMatch") == str(there[1]):
                self._answer(304)
                return
            if asked.get("ifGenerationMatch", str(there[1])) != str(there[1]):
                self._refuse(412, "conditionNotMet")
                return
            if self.command == "DELETE":
                del self.bucket.objects[name]
                self._answer(204)
                return
            described = self.bucket.described(name)
        if asked.get("alt") == "media":
            self._media(there[0], described)
        else:
            self._answer(200, described)

    def _media(self, data: bytes, described: dict[str, Any]) -> None:
        headers = {
            "x_goog_generation": described["generation"],
            "x_goog_metageneration": "1",
            "ETag": described["etag"],
            "Content_Type": "application/octet-stream",
        }
        span = self.headers.get("Range", "").removeprefix("bytes=")
        if not span:
            self._answer(200, data, x_goog_hash=f"crc32c={described['crc32c']},md5={described['md5Hash']}", **headers)
            return
        begin, _, end = span.partition("-")
        if not begin:
            first, last = max(0, len(data) - int(end)), len(data) - 1
        else:
            first, last = int(begin), min(int(end or len(data) - 1), len(data) - 1)
        if first >= len(data):
            self._answer(416, b"", Content_Range=f"bytes */{len(data)}")
            return
        self._answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)

    def _copy(self, source: str, target: str) -> None:
        with self.bucket.lock:
            if source not in self.bucket.objects:
                self._refuse(404, f"No such object: {self.bucket.name}/{source}")
                return
            made = self.bucket.put(target, self.bucket.objects[source][0])
        size = made["size"]
        self._answer(200, {"done": True, "resource": made, "objectSize": size, "totalBytesRewritten": size})

    def _upload(self, asked: dict[str, str], body: bytes) -> None:
        kind = asked.get("uploadType")
        if "upload_id" in asked:
            self._part(asked["upload_id"], body)
            return
        if kind == "resumable":
            name = asked.get("name") or json.loads(body)["name"]
            key = str(next(self.bucket.generations))
            self.bucket.uploads[key] = (name, bytearray(), asked)
            where = f"{self.bucket.address}/upload/storage/v1/b/{self.bucket.name}/o?uploadType=resumable&upload_id={key}"
            self._answer(200, b"", Location=where)
            return
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
            meta, data = _parts(head, body)
            self._put(json.loads(meta)["name"], data, asked)
            return
        self._put(asked["name"], body, asked)

    def _part(self, key: str, body: bytes) -> None:
        name, data, asked = self.bucket.uploads[key]
        span, _, total = self.headers.get("Content-Range", f"bytes 0-{len(body) - 1}/{len(body)}")[6:].partition("/")
        if span != "*":
            del data[int(span.partition("-")[0]) :]
            data += body
        if total != "*" and len(data) >= int(total):
            self._put(name, bytes(data), asked)
            return
        self._answer(308, b"", **({"Range": f"bytes=0-{len(data) - 1}"} if data else {}))

    def _put(self, name: str, data: bytes, asked: dict[str, str]) -> None:
        with self.bucket.lock:
            wanted = asked.get("ifGenerationMatch")
            if wanted is not None and wanted != str(self.bucket.objects.get(name, (b"", 0))[1]):
                self._refuse(412, "conditionNotMet")
                return
            made = self.bucket.put(name, data)
        self._answer(200, made)


def _parts(head: bytes, body: bytes) -> tuple[bytes, bytes]:
    """The two parts of multipart/related, byte for byte: `email` would mend line ends."""
    mark = email.message_from_bytes(head, policy=email.policy.HTTP).get_boundary()
    assert mark is not None
    between = b"--" + mark.encode()
    _, meta, rest = body.split(between, 2)
    data = rest[: rest.rindex(between)]

    def content(part: bytes) -> bytes:
        ends = {part.find(end): len(end) for end in (b"\r\n\r\n", b"\n\n") if end in part}
        first = min(ends)
        return part[first + ends[first] :]

    found = content(data)
    return content(meta), found[:-2] if found.endswith(b"\r\n") and b"\r\n\r\n" in data[:200] else found[:-1]


@contextlib.contextmanager
def bucket(name: str = "bucket") -> Iterator[Bucket]:
    """Serves an empty bucket meanwhile."""
    server = _Server(("localhost", 0), _Handler)
    made = Bucket(server.server_address[1], name)
    server.RequestHandlerClass = type("Handler", (_Handler,), {"bucket": made})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
