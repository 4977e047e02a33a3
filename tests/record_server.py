"""A server on this machine that answers like Zenodo: records, files, and all that goes wrong."""

import contextlib
import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field


@dataclass
class Zenodo:
    """A record and how its server behaves; lists of faults are used up, one a request."""

    files: dict[str, bytes]
    record: str = "17212158"
    license: str | None = "cc-by-4.0"
    md5: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    answer: bytes | None = None
    redirects: bool = False
    wait: threading.Event | None = None
    log: list[tuple[str, str | None, int]] = field(default_factory=list)
    address: str = ""

    @property
    def asked(self) -> list[tuple[str, str | None, int]]:
        """Requests for files: name, Range, bytes sent."""
        return [entry for entry in self.log if entry[0] != "record"]

    def entry(self) -> bytes:
        """The JSON of the record."""
        if self.answer is not None:
            return self.answer
        files = [
            {
                "key": key,
                "size": self.sizes.get(key, len(content)),
                "checksum": "md5:" + self.md5.get(key, hashlib.md5(content).hexdigest()),
                "links": {"self": f"{self.address}/{self.record}/files/{index}/content"},
            }
            for index, (key, content) in enumerate(self.files.items())
        ]
        about = {"title": "Weights", "license": {"id": self.license} if self.license else None}
        doi = f"10.5281/zenodo.{self.record}"
        return json.dumps({"doi": doi, "metadata": about, "files": files}).encode()


@contextlib.contextmanager
def serve(zenodo):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            parts = self.path.strip("/").split("/")
            if zenodo.statuses and (status := zenodo.statuses.pop(0)) != 200:
                zenodo.log.append((parts[-2] if len(parts) > 1 else "record", None, 0))
                return self._send(status, b"no")
            if parts == [zenodo.record]:
                zenodo.log.append(("record", None, 0))
                return self._send(200, zenodo.entry())
            if len(parts) == 4 and zenodo.redirects:
                return self._send(302, b"", location=f"/{zenodo.record}/elsewhere/x/{parts[2]}/y")
            if len(parts) == 5:
                parts = [parts[0], "files", parts[3], "content"]
            if len(parts) == 4 and parts[0] == zenodo.record:
                return self._file(*list(zenodo.files.items())[int(parts[2])])
            self._send(404, b'{"status": 404}')

        def _file(self, key, content):
            if zenodo.wait is not None:
                zenodo.wait.wait(20)
            wanted = self.headers.get("Range")
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            partial = wanted is not None and zenodo.ranges
            body = content[start if partial else 0 :]
            sent = min(zenodo.cuts.pop(0), len(body)) if zenodo.cuts else len(body)
            zenodo.log.append((key, wanted, sent))
            self.send_response(206 if partial else 200)
            if partial:
                end = len(content) - 1
                self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:sent])
            if sent < len(body):
                self.wfile.flush()
                self.close_connection = True

        def _send(self, status, body, location=None):
            self.send_response(status)
            if location is not None:
                self.send_header("Location", location)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    zenodo.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield zenodo
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
