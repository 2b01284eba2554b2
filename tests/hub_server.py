"""
A small server of the Hub's protocol on loopback: accounts, repositories, commits, large files, downloads.

Speaks to the real `huggingface_hub` client. It keeps everything in memory and can refuse or drop requests.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_test_token_of_the_suite"
USER = "someone"


class Hub(ThreadingHTTPServer):
    """
    The server.

    Attributes:
        repos: content of each repository, by path. commits: (repository, message) of each commit, in order.
        requests: method and path of each request. drop: pattern of requests whose connection is cut, and how often.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.commits, self.requests, self.large = {}, [], [], {}
        self.drop = ["", 0]
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a connection that was cut on purpose


@contextmanager
def hub():
    """A server for the length of a `with` statement."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.requests.append((self.command, path))
            pattern, left = self.server.drop
            if left and re.search(pattern, f"{self.command} {path}"):
                self.server.drop[1] -= 1
                self.close_connection = True
                return  # nothing is answered
            self._route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _route(self, path, body):
        reading = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        if reading:
            return self._file(reading[1], reading[3])
        stored = re.fullmatch(r"/large/(\w+)", path)  # a signed address: no token is sent along
        if stored and self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == stored[1]
            self.server.large[stored[1]] = body
            return self._answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            return self._answer(200, {"type": "user", "name": USER})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self._answer(200, {"errors": [], "warnings": []})
        large = re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path)
        if large:
            return self._batch(json.loads(body))
        action = r"(?:/(preupload|commit|revision|tree)/(\w+)(?:/(.*))?)?"
        asked = re.fullmatch(rf"/api/models/([\w.-]+/[\w.-]+?){action}", path)
        if asked is None or asked[1] not in self.server.repos:
            return self._answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
        if asked[2] == "tree":
            return self._tree(asked[1], asked[4] or "")
        return {"preupload": self._preupload, "commit": self._commit}.get(asked[2], self._info)(asked[1], body)

    def _create(self, asked):
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        known = name in self.server.repos
        self.server.repos.setdefault(name, {})
        return self._answer(409 if known else 200, {"url": f"{self.server.url}/{name}", "name": name})

    def _preupload(self, name, body):
        files = json.loads(body)["files"]
        modes = ("lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular" for file in files)
        answers = [
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            for file, mode in zip(files, modes, strict=True)
        ]
        return self._answer(200, {"files": answers})

    def _batch(self, asked):
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}}
            for entry in asked["objects"]
        ]
        return self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name, body):
        files = self.server.repos[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.server.commits.append((name, value["summary"]))
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        oid = hashlib.sha1(str(len(self.server.commits)).encode()).hexdigest()
        return self._answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def _tree(self, name, folder):
        found = {path: data for path, data in self.server.repos[name].items() if path.startswith(folder)}
        return self._answer(
            200, [{"type": "file", "path": path, "oid": "0", "size": len(data)} for path, data in found.items()]
        )

    def _info(self, name, body):
        files = [{"rfilename": path} for path in self.server.repos[name]]
        return self._answer(200, {"id": name, "sha": "0" * 40, "siblings": files})

    def _file(self, name, path):
        content = self.server.repos.get(name, {}).get(path)
        if content is None:
            return self._answer(404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound"})
        tags = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        return self._answer(200, content, **tags)
