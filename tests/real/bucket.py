"""An emulator of Google Cloud Storage behind a proxy that adds preconditions, delays, faults."""

import contextlib
import http.client
import http.server
import itertools
import json
import pathlib
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import processes
import programs

NAME = "bucket"
DELAY = 0.05  # seconds per request
FAULT_EVERY = 20  # requests; in turn one is refused with 503, and one loses its reply
HOP = ("connection", "content-length", "host", "transfer-encoding")  # headers of one connection


class Bucket:
    """A bucket that is served at `address`.

    Attributes:
        faults: whether requests fail at times.
        refused: the requests that were answered by 503 and not done.
        lost: the requests that were done, but whose reply was lost.
        unmet: the requests whose precondition was not met.
    """

    def __init__(self, emulator: int, faults: bool) -> None:
        self.faults = faults
        self.emulator = f"127.0.0.1:{emulator}"
        self.address = ""
        self.refused: list[str] = []
        self.lost: list[str] = []
        self.unmet: list[str] = []
        self.uploads: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}
        self.count = itertools.count(1)
        self.writing = threading.Lock()

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Returns the status, headers and body of the emulator's reply, without faults."""
        connection = http.client.HTTPConnection(self.emulator, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body or None, headers or {})
            reply = connection.getresponse()
            return reply.status, reply.getheaders(), reply.read()

    def generation(self, name: str) -> str:
        """Returns the generation of an object; 0 if it does not exist."""
        place = f"/storage/v1/b/{NAME}/o/{urllib.parse.quote(name, safe='')}"
        status, _, body = self.ask("GET", place)
        return json.loads(body)["generation"] if status == 200 else "0"

    def put(self, name: str, content: bytes) -> None:
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        kind = {"Content-Type": "application/octet-stream"}
        status, _, body = self.ask("POST", f"/upload/storage/v1/b/{NAME}/o?{query}", content, kind)
        assert status == 200, body

    def names(self, prefix: str) -> list[str]:
        query = urllib.parse.urlencode({"prefix": prefix, "maxResults": 10000})
        _, _, body = self.ask("GET", f"/storage/v1/b/{NAME}/o?{query}")
        return [item["name"] for item in json.loads(body).get("items", [])]

    def download(self, prefix: str, folder: pathlib.Path) -> None:
        """Copies all objects whose names begin with `prefix/`."""
        for name in self.names(f"{prefix}/"):
            place = f"/storage/v1/b/{NAME}/o/{urllib.parse.quote(name, safe='')}?alt=media"
            file = folder / name.removeprefix(f"{prefix}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.ask("GET", place)[2])

    def variables(self) -> dict[str, str]:
        """Returns the environment of a command that uses this bucket for `gs://`."""
        site = next((programs.ROOT / ".venv-real" / "lib").glob("python*/site-packages"))
        return programs.environment(
            GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
            GOOGLE_AUTH_TOKEN_FOR_TESTING="none",  # no search for credentials
            PYTHONPATH=f"{programs.ROOT}:{site}",
            STORAGE_EMULATOR_HOST=f"http://{self.address}",
            TENSORSTORE_GCS_HTTP_URL=f"http://{self.address}",
        )


def handler(bucket: Bucket) -> type[http.server.BaseHTTPRequestHandler]:
    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            time.sleep(DELAY)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            number, request = next(bucket.count), f"{self.command} {self.path}"
            turn = number % (2 * FAULT_EVERY) if bucket.faults else None
            if turn == FAULT_EVERY:
                bucket.refused.append(request)
                return self.reply(503, [], b"{}")
            with bucket.writing if self.command != "GET" else contextlib.nullcontext():
                status, headers, answer = (
                    self.precondition(body)
                    or bucket.uploads.get(request)  # a finished upload answers again as before
                    or bucket.ask(self.command, self.path, body, self.kept(self.headers.items()))
                )
            if "upload_id=" in self.path and status == 200:
                bucket.uploads[request] = status, headers, answer
            if turn == 0:
                bucket.lost.append(request)
                self.close_connection = True
                return None
            if "alt=media" in self.path and status in (200, 206):
                name = urllib.parse.unquote(self.path.partition("/o/")[2].partition("?")[0])
                headers = [*headers, ("x-goog-generation", bucket.generation(name))]
            own, other = bucket.address.encode(), bucket.emulator.encode()
            if self.kept(headers).get("Content-Type", "").startswith("application/json"):
                answer = answer.replace(other, own)
            self.reply(status, headers, answer)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = pass_on

        def precondition(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes] | None:
            parts = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(parts.query))
            wanted, unwanted = (query.get(f"ifGeneration{kind}Match") for kind in ("", "Not"))
            if wanted is None and unwanted is None:
                return None
            name = query.get("name") or urllib.parse.unquote(parts.path.rpartition("/o/")[2])
            if "multipart" in query.get("uploadType", ""):
                name = json.loads(body[body.index(b"{") : body.index(b"}") + 1])["name"]
            now = bucket.generation(name)
            if (wanted is None or now == wanted) and (unwanted is None or now != unwanted):
                return None
            bucket.unmet.append(f"{self.command} {self.path}")
            return 412 if unwanted is None else 304, [], b""

        def kept(self, headers: Any) -> dict[str, str]:
            return {name: value for name, value in headers if name.lower() not in HOP}

        def reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in self.kept(headers).items():
                self.send_header(name, value.replace(bucket.emulator, bucket.address))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    return Proxy


@contextlib.contextmanager
def start(folder: pathlib.Path, faults: bool) -> Iterator[Bucket]:
    """Starts an emulator with an empty bucket, and the proxy; stops both."""
    emulator = programs.installed("gcp-storage-emulator")
    port = processes.free_port()
    bucket = Bucket(port, faults)
    command = [emulator, "start", "--host=127.0.0.1", f"--port={port}", "--in-memory", "--quiet"]
    with programs.start([*command, f"--default-bucket={NAME}"], folder / "emulator.log") as running:

        def ready() -> bool:
            with contextlib.suppress(OSError):
                return bucket.ask("GET", f"/storage/v1/b/{NAME}")[0] == 200
            return False

        programs.wait_for("the emulator", ready, running.says, timeout=120)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(bucket)) as proxy:
            proxy.daemon_threads = True
            bucket.address = f"127.0.0.1:{proxy.server_address[1]}"
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            try:
                yield bucket
            finally:
                proxy.shutdown()
