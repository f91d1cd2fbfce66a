"""A stand-in for the hub on 127.0.0.1: what `huggingface_hub` calls to make a repository and to commit files to it."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_right"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """repositories: by kind and id, such as ("model", "me/student"). readonly: nobody may write."""

    url: str = ""
    readonly: bool = False
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files, by sha256

    def call(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        """Status and JSON of the answer."""
        if method == "PUT" and (found := re.fullmatch("/lfs/([0-9a-f]{64})", path)):
            self.stored[found[1]] = body
            return (200, {}) if hashlib.sha256(body).hexdigest() == found[1] else (400, {"error": "another sha256"})
        if (method, path) == ("POST", "/api/validate-yaml"):
            return 200, {}
        if (method, path) == ("POST", "/api/repos/create"):
            return self._create(**json.loads(body))
        if found := re.fullmatch(r"/(datasets/)?([\w-]+/[\w-]+)\.git/info/lfs/objects/batch", path):
            objects = [
                o | {"actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}} for o in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        found = re.fullmatch(r"/api/(model|dataset)s/([\w-]+/[\w-]+)(?:/(tree|preupload|commit)/main)?", path)
        repository = found and self.repositories.get((found[1], found[2]))
        if not repository:
            return 404, {"error": "Repository not found"}
        if found[3] is None:
            return 200, {"id": found[2], "private": repository.private, "sha": "0" * 40, "siblings": []}
        if found[3] == "tree":
            return 200, [
                {"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in repository.files.items()
            ]
        if found[3] == "preupload":
            large = (".safetensors", ".parquet")
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        for line in map(json.loads, body.splitlines()):
            self._apply(repository, line["key"], line["value"])
        return 200, {"commitUrl": f"{self.url}/{found[2]}/commit/{'0' * 40}", "commitOid": "0" * 40}

    def _create(self, name: str, organization: str, type: str = "model", visibility: str = "public", **_):
        key, prefix = (type, f"{organization}/{name}"), "datasets/" if type == "dataset" else ""
        url = {"url": f"{self.url}/{prefix}{organization}/{name}"}
        if key in self.repositories:
            return 409, url | {"error": "You already created this repo"}
        self.repositories[key] = Repository(visibility == "private")
        return 200, url

    def _apply(self, repository: Repository, key: str, value: dict) -> None:
        if key == "header":
            repository.commits.append(value["summary"])
        elif key == "deletedFile":
            del repository.files[value["path"]]
        elif key == "lfsFile":
            repository.files[value["path"]] = self.stored[value["oid"]]
        elif key == "file":
            repository.files[value["path"]] = base64.b64decode(value["content"])


@contextmanager
def hub_server():
    """The hub, answering at `hub.url` inside the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            token = self.headers.get("authorization", "").removeprefix("Bearer ")
            path = self.path.partition("?")[0]
            if token != TOKEN and not path.startswith("/lfs/"):
                status, value = 401, {"error": "Invalid username or password."}
            elif hub.readonly and self.command == "POST":
                status, value = 403, {"error": "Forbidden"}
            else:
                status, value = hub.call(self.command, path, body)
            data = json.dumps(value).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("x-error-code", "RepoNotFound")
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
