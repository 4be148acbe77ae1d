"""The page in a real browser, its server against hostile requests, and what the command refuses."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageStat
from playwright import sync_api

from contrastive.config import ImageTowerConfig
from data_pipelines.picture_sets import open_picture_set
from eval import page_server
from eval.collection import build_collection
from eval.embedder import Embedder
from eval.open_model import open_model
from eval.page_answers import Page, PageOptions
from eval.page_html import percent
from eval.page_server import web_app
from eval.playground import Playground
from scripts import app
from tests.conftest import ROOT, RunPython
from tests.tiny_models import write_dual_encoder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
# The command, in a process that tells when it reaches for another machine.
WATCHED = """
import sys

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = args[1] if event == "socket.connect" else args
        host = address[0] if isinstance(address, tuple) else None
        if host not in (None, "", "127.0.0.1", "localhost", "::1"):
            print("REACHED FOR", event, host, file=sys.stderr, flush=True)

sys.addaudithook(watch)
from scripts.app import main
main(sys.argv[1:])
"""


class Server:
    """The command on a small set, and what it has said so far."""

    def __init__(self, run: Path, images: Path, folder: Path) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.stderr = folder / "stderr.txt"
        command = [
            sys.executable, "-c", WATCHED, str(run), f"--images={images}", "--port=0",
            f"--cache={folder / 'cache'}", "--max_upload_mb=1", "--max_pixels=90000", "--threads=1",
        ]  # fmt: skip
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(self.temporary),
            "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("page: "):
                self.url = line.split()[1]
                return
        raise AssertionError(self.stderr.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tower = ImageTowerConfig("soft_moe_vit_test_patch16_64", arguments={"moe_blocks": [0, 1]})
    return write_dual_encoder(tmp_path_factory.mktemp("model") / "run", tower)


@pytest.fixture
def server(run: Path, shards: Path, tmp_path: Path) -> Iterator[Server]:
    found = Server(run, shards, tmp_path)
    yield found
    found.process.kill()
    found.process.wait()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_in_a_browser(server: Server, run: Path, shards: Path, tmp_path: Path) -> None:
    """One server and one browser: upload, classify, search, slide, refuse, and every look."""
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, args=FLAGS,
            viewport={"width": 1280, "height": 900}, color_scheme="light",
        )  # fmt: skip
        context.set_default_timeout(15_000)
        requests: list[str] = []
        problems: list[str] = []
        context.on("request", lambda request: requests.append(request.url))
        page = context.pages[0]
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console", lambda said: problems.append(said.text) if said.type == "error" else None
        )
        page.goto(server.url)
        page.wait_for_selector("#samples .card")
        reference = Reference(run, shards)
        classify(page, reference, tmp_path)
        search(page, reference)
        slide(page)
        refuse(page, tmp_path)
        look(page, tmp_path)
        context.close()
    assert requests
    ours = (server.url, "data:", "blob:http://127.0.0.1")
    assert [url for url in requests if not url.startswith(ours)] == []
    assert problems == []
    assert "REACHED FOR" not in server.stderr.read_text()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 143
    assert list(server.temporary.glob("softmoe_clip_app_*")) == []  # no upload is left


class Reference:
    """The same model and set in this process."""

    def __init__(self, run: Path, shards: Path) -> None:
        embedder = Embedder(open_model(str(run)))
        pictures = open_picture_set(str(shards), embedder.transform, image_keys=["png"])
        self.collection = build_collection(embedder, pictures)
        self.playground = Playground(embedder, self.collection)
        buffer = io.BytesIO()
        Image.linear_gradient("L").convert("RGB").resize((120, 80)).save(buffer, "PNG")
        self.upload = buffer.getvalue()

    def bars(self, labels: list[str], templates: list[str]) -> list[str]:
        scores = self.playground.classify(self.upload, labels, templates)
        return [f"{score.label} {percent(score.probability)}" for score in scores]


def texts(page: Any, selector: str) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(selector).all_inner_texts()]


def wait_until(page: Any, selector: str, expected: list[str]) -> None:
    """Until the texts of the elements are these; they are compared in the end for the message."""
    for _ in range(100):
        if texts(page, selector) == expected:
            return
        page.wait_for_timeout(100)
    assert texts(page, selector) == expected


def classify(page: Any, reference: Reference, folder: Path) -> None:
    """Upload a picture, and change labels and templates."""
    labels = page.locator("#labels textarea")
    own = labels.input_value().splitlines()
    assert own[0] == "a red square, number 0"  # of the set
    (folder / "upload.png").write_bytes(reference.upload)
    page.set_input_files("#picture input[type=file]", folder / "upload.png")
    wait_until(page, "#scores .bars li", reference.bars(own, ["{}"]))
    labels.fill("red\n\n <b>green</b>\n${1 + 1} {{value}}")
    names = ["red", "<b>green</b>", "${1 + 1} {{value}}"]  # all of it is text
    wait_until(page, "#scores .bars li", reference.bars(names, ["{}"]))
    templates = page.locator("#templates textarea")
    templates.fill("a photo of {}.\n{}")
    wait_until(page, "#scores .bars li", reference.bars(names, ["a photo of {}.", "{}"]))
    templates.fill("a photo")
    page.wait_for_selector("#scores .wrong:has-text('0 placeholders')")


def search(page: Any, reference: Reference) -> None:
    """Words to pictures, and a picture, first ours and then the found one, to captions."""
    page.get_by_role("tab", name="Search").click()
    captions = reference.collection.captions
    nearest = reference.playground.describe(reference.upload, 10)
    expected = [f"{captions[hit.number]} {hit.score:.3f}" for hit in nearest]
    wait_until(page, "#captions li", expected)
    page.locator("#query input, #query textarea").fill("a green thing")
    page.keyboard.press("Enter")
    hits = reference.playground.find("a green thing", 12)
    expected = [f"{captions[hit.number]} {hit.score:.3f}" for hit in hits]
    wait_until(page, "#found .card", expected)
    page.click("#found .card >> nth=2")
    data = reference.collection.pictures.read(hits[2].number)
    nearest = reference.playground.describe(data, 10)
    expected = [f"{captions[hit.number]} {hit.score:.3f}" for hit in nearest]
    wait_until(page, "#captions li", expected)


def slide(page: Any) -> None:
    """Layer and slot by their sliders, and a slot by its picture."""
    page.get_by_role("tab", name="Look inside").click()
    title, drawn = page.locator("#inside .slot p b"), page.locator("#inside .map img >> nth=0")
    page.wait_for_selector("#inside .slot")
    assert title.inner_text() == "Block 0, slot 0"
    assert page.locator("#slots .card").count() == 4
    before = drawn.get_attribute("src")
    page.locator("#slot input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    wait_until(page, "#inside .slot p b", ["Block 0, slot 2"])
    assert drawn.get_attribute("src") != before
    card = page.locator("#slots .card img >> nth=0")
    before = card.get_attribute("src")
    page.locator("#layer input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    wait_until(page, "#inside .slot p b", ["Block 1, slot 2"])
    for _ in range(100):
        if card.get_attribute("src") != before:
            break
        page.wait_for_timeout(100)
    page.click("#slots .card:has-text('slot 3')")
    wait_until(page, "#inside .slot p b", ["Block 1, slot 3"])


def refuse(page: Any, folder: Path) -> None:
    """What is no picture, or has too many pixels, gets a sentence and not a stack trace."""
    (folder / "fake.png").write_bytes(b"not a picture")
    Image.new("L", (301, 300)).save(folder / "large.png")
    for name, message in (("fake", "is no picture that can be read"), ("large", "90,000 pixels")):
        page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
        page.wait_for_selector("#inside .notice.empty")
        page.set_input_files("#picture input[type=file]", folder / f"{name}.png")
        page.wait_for_selector(f"#inside .wrong:has-text('{message}')")
    page.click("#samples .card >> nth=0")
    page.wait_for_selector("#inside .slot")


def look(page: Any, folder: Path) -> None:
    """Nothing sticks out of a phone, and dark is dark; the pictures are kept for people."""
    for width, scheme in ((1280, "light"), (390, "light"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        if scheme == "dark":
            page.emulate_media(color_scheme="dark")
            page.reload()
            page.wait_for_selector("#samples .card")
        for tab in ("Name it", "Search", "Look inside"):
            page.get_by_role("tab", name=tab).click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        path = folder / f"{scheme}-{width}.png"
        page.screenshot(path=path)
        with Image.open(path) as shot:
            brightness = ImageStat.Stat(shot.convert("L")).mean[0]
            assert len(shot.convert("RGB").getcolors(1 << 24) or ()) > 500
        assert brightness < 90 if scheme == "dark" else brightness > 180


def test_requests_that_no_browser_of_ours_sends(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starlette.testclient import TestClient

    from eval.page import build_page, mount_page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    limit = 1 << 20
    playground = Playground(Embedder(open_model(str(run))))
    blocks = build_page(playground, PageOptions("title", [], [], ["{}"], limit), tmp_path)
    site = web_app(lambda app: mount_page(app, blocks, limit), "127.0.0.1", limit, tmp_path)
    with TestClient(site, base_url="http://127.0.0.1") as client:
        first = client.get("/")
        assert first.status_code == 200
        assert "default-src 'self'" in first.headers["content-security-policy"]
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
        for path in ("file=http://127.0.0.1:9/a", "proxy=http://127.0.0.1:9/a", "openapi.json"):
            assert client.get(f"/gradio_api/{path}").status_code == 404

        def ask(payload: object) -> int:
            body = {"data": [payload, "a", "{}"], "fn_index": 0, "session_hash": "x"}
            return client.post("/gradio_api/run/predict", json=body).status_code

        meta = {"meta": {"_type": "gradio.FileData"}}
        assert ask({"path": "http://127.0.0.1:9/a.png"} | meta) == 400
        assert ask([{"deep": {"path": " HTTPS://example.org/a.png"} | meta}]) == 400
        assert ask("x" * (3 << 20)) == 413
        assert ask(None) == 200
        for sizes, expected in (([1000], 200), ([limit + 1], 413), ([limit - 9] * 2, 413)):
            files = [("files", (f"{size}.png", b"0" * size)) for size in sizes]
            assert client.post("/gradio_api/upload", files=files).status_code == expected
        monkeypatch.setattr(page_server, "KEPT", 3)
        for number in range(7):  # of other contents, for gradio keeps equal ones once
            content = bytes([number]) * (limit - 9)
            client.post("/gradio_api/upload", files=[("files", (f"{number}.png", content))])
            assert len(kept(tmp_path)) <= 4  # the three that may be there, and the new one
        assert [path.name for path in kept(tmp_path)] == ["3.png", "4.png", "5.png", "6.png"]
        parts = (b"--b" for _ in range(2))  # of unknown length
        assert client.post("/gradio_api/upload", content=parts).status_code == 411


def kept(folder: Path) -> list[Path]:
    return sorted((path for path in folder.rglob("*.png")), key=lambda path: path.name)


def test_only_uploads_are_read(run: Path, tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (uploads / "large.png").write_bytes(b"0" * 11)
    page = Page(
        Playground(Embedder(open_model(str(run)))), PageOptions("", [], [], ["{}"], 10), uploads
    )
    for path, message in (
        (tmp_path / "secret.png", "is gone"),
        (uploads / ".." / "secret.png", "is gone"),
        (uploads, "is gone"),
        (uploads / "large.png", "is over"),
    ):
        assert message in page.classify({"path": str(path)}, "a", "{}")
    assert "Drop or choose a picture" in page.classify(None, "a", "{}")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        app.main(list(arguments))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_what_cannot_be_shown_is_refused(
    capsys: pytest.CaptureFixture[str], run: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    free = ["--port=0", "--cache=null"]
    for arguments, problem in (
        ([], "no model given"),
        ([str(tmp_path / "none"), *free], "does not exist"),
        ([str(run), f"--images={tmp_path / 'empty'}", *free], "without pictures"),
        ([str(run), f"--images={shards}", "--image_keys=[gif]", *free], "member for the picture"),
        ([str(run), "--templates=[photo]"], "template 'photo' must have {} once"),
        ([str(run), "--max_pixels=0"], "max_pixels must be at least 1"),
        ([str(run), "--port=65536"], "port must be from 0 to 65535"),
        ([str(run), "--host=192.0.2.1", *free], "192.0.2.1:0 cannot be used"),
        ([str(run), "--imagse=x"], "did you mean 'images'"),
    ):
        assert problem in refusal(capsys, *arguments), arguments


def test_what_to_install_for_the_page(
    capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'softmoe-clip[app]'" in refusal(capsys, str(run))


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (1.0, "100.0 %"), (0.0005, "0.1 %"), (0.00049, "0.05 %"), (4.5e-5, "0.005 %"),
        (1.1e-8, "0.000001 %"), (9e-9, "< 0.000001 %"), (0.0, "< 0.000001 %"),
    ],
)  # fmt: skip
def test_small_shares_are_told_apart(share: float, shown: str) -> None:
    assert percent(share) == shown


def test_help_is_short_of_heavy_imports(run_python: RunPython) -> None:
    code = (
        "import sys\nfrom scripts.app import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print('loaded:', sorted({'torch', 'gradio', 'timm'} & set(sys.modules)))\n"
    )
    result = run_python("-c", code)
    assert result.stdout.splitlines()[-1] == "loaded: []"
    assert "--images" in result.stdout
