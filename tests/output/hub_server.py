"""A stand-in for the Hub's HTTP API: the requests that huggingface_hub makes when it uploads a folder over git LFS."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories in memory: ``repos[name][path]`` is a file's content."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.objects, self.messages, self.requests = {}, {}, [], []
        self.refused = None  # a pattern of "METHOD /path" that is answered with 403

    def environment(self):
        """What a process needs to take this server for the Hub."""
        token = {"HF_TOKEN": "hf_stand_in", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", **token}

    def write(self, repo, directory):
        """Write a repository's files below ``directory``, as a clone would."""
        for name, content in self.repos[repo].items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def answer(self, request, body):  # noqa: PLR0911
        """The JSON answer to a request, or None for 404."""
        if request == "POST /api/repos/create":
            options = json.loads(body)
            repo = f"{options.get('organization') or 'user'}/{options['name']}"
            self.repos.setdefault(repo, {})
            return {"url": f"{self.url}/{repo}"}
        if request == "POST /api/validate-yaml":
            return {"errors": [], "warnings": []}
        if match := re.fullmatch(r"POST /api/models/(.+)/preupload/main", request):
            if match[1] not in self.repos:
                return None
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {
                        "path": p,
                        "shouldIgnore": False,
                        "uploadMode": modes[p.endswith((".safetensors", ".bin", ".pt"))],
                    }
                    for p in paths
                ]
            }
        if re.fullmatch(r"POST /(.+)\.git/info/lfs/objects/batch", request):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}
            return {"transfer": "basic", "objects": objects}
        if match := re.fullmatch(r"PUT /lfs/(\w+)", request):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.objects[match[1]] = body
            return {}
        if match := re.fullmatch(r"POST /api/models/(.+)/commit/main", request):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.messages.append(value["summary"])
                elif line["key"] == "file":
                    self.repos[match[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.repos[match[1]][value["path"]] = self.objects[value["oid"]]
            oid = hashlib.sha1(body).hexdigest()
            return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{match[1]}/commit/{oid}"}
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {urlsplit(self.path).path}"
        hub.requests.append(request)
        refused = hub.refused is not None and re.search(hub.refused, request)
        answer = None if refused else hub.answer(request, body)
        content = json.dumps({"error": "refused"} if answer is None else answer).encode()
        self.send_response(403 if refused else 404 if answer is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def log_message(self, *args):
        """Say nothing."""


@contextmanager
def running_hub():
    """A hub on a free port of this machine."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
