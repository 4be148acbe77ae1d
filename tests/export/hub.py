"""A stand-in for the Hugging Face hub's file API: what huggingface_hub asks to push and to fetch.

A program: prints its address, then serves one folder of files for each repository. Small files
come inside a commit, large ones by git-lfs or, from who has hf_xet, in its blocks, as on the hub.
Of files in blocks only the hash is kept, for which the client vouches.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0" * 39 + "1"
LARGE = (".safetensors", ".onnx", ".data")


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    objects: Path

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        if self.headers.get("Authorization") not in ("Bearer hf_stand_in", "Bearer blocks"):
            self.body()
            self.answer({"error": "Invalid credentials"}, 401)
            return
        content, path = self.body(), self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            there = (self.root / name).is_dir()
            if not there:
                (self.root / name).mkdir(parents=True)
                (self.root / name / ".asked").write_bytes(content)
            known = {"url": f"{self.address}/{name}", "name": name}
            self.answer(known, 409 if there else 200)
        elif path == "/api/validate-yaml":  # of the model card
            known = json.loads(content)["content"].startswith("---\nlicense: ")
            self.answer({"errors": [] if known else [{"message": "no licence"}], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            self.answer({"files": files})
        elif path.startswith("/v1/xorbs/"):  # hf_xet's blocks
            with (self.objects / "blocks").open("ab") as blocks:
                blocks.write(content)
            self.answer({"was_inserted": True})
        elif path.startswith("/v1/shards"):
            self.answer({"result": 1})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                thing | {"actions": {"upload": {"href": f"{self.address}/objects/{thing['oid']}"}}}
                for thing in json.loads(content)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(found[1], [json.loads(line) for line in content.splitlines()])
        else:
            self.answer({"error": f"the stand-in does not know {path}"}, 404)

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value, target = line["value"], self.root / name / line["value"].get("path", "")
            target.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                target.write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                whole = self.objects / value["oid"]
                target.write_bytes(whole.read_bytes() if whole.is_file() else value["oid"].encode())
        url = f"{self.address}/{name}/commit/{COMMIT}"
        self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})

    def do_PUT(self) -> None:
        content = self.body()
        (self.objects / hashlib.sha256(content).hexdigest()).write_bytes(content)
        self.answer({})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            file = self.root / found[1] / found[2]
            if not file.is_file():
                self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                return
            content = file.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.answer(content, ETag=tag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        elif "/xet-write-token/" in path:
            self.answer({"casUrl": self.address, "accessToken": "blocks", "exp": 1 << 33})
        elif found := re.match(r"/api/models/([^/]+/[^/]+)", path):
            folder = self.root / found[1]
            if not folder.is_dir():
                self.answer({}, 404, X_Error_Code="RepoNotFound")
                return
            files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
            siblings = [{"rfilename": name} for name in sorted(files)]
            if "/tree/" in path:
                self.answer([{"type": "file", "path": n, "size": 0, "oid": "0"} for n in files])
                return
            private = json.loads((folder / ".asked").read_text())["visibility"] == "private"
            facts = {"id": found[1], "sha": COMMIT, "siblings": siblings, "private": private}
            self.answer(facts)
        else:
            self.answer({}, 404)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing."""


if __name__ == "__main__":
    Hub.root, Hub.objects = Path(sys.argv[1]) / "repositories", Path(sys.argv[1]) / "objects"
    Hub.root.mkdir(parents=True)
    Hub.objects.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
