"""The commands around shards: exit codes, one-line errors, and real signals to real processes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from data_pipelines.emoji.prepare import SOURCE
from data_pipelines.pack import pack
from data_pipelines.shard_writer import output_folder
from data_pipelines.shards import ShardError, ShardReader, index_shards
from data_pipelines.tool_config import IMAGE_KEYS, PackConfig
from scripts.shards import TOOLS, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half the embedded pictures of one style, with captions."""
    out = tmp_path_factory.mktemp("pictures")
    with tarfile.open(SOURCE / "fluent-3d.tar.gz") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None and not member.name.endswith(".json"):
                (out / member.name).write_bytes(content.read())
            if len(os.listdir(out)) == 1400:
                break
    return out


def start_pack(folder: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """A process that packs, in a process group of its own; returns when it is in the middle."""
    words = ["pack", str(folder), "--out", str(out), "--max_samples", "20", *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.shards", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (out / "00002.tar").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    return process


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_stopped_and_killed_packs_go_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C, which a terminal sends to the whole group, and SIGKILL to the first process."""
    settings = ("--shorter_side", "60", "--encode", "png")
    whole = tmp_path / "whole"
    config = PackConfig(str(folder), str(whole), max_samples=20, shorter_side=60, encode="png")
    pack(config, 0)

    out = tmp_path / "stopped"
    process = start_pack(folder, out, *settings, "--workers", "2")
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")
    left = files(out)
    assert not [name for name in left if name.endswith(".part")]
    assert not (out / "sizes.json").exists()
    expected = files(whole)
    assert all(expected[name] == data for name, data in left.items())

    process = start_pack(folder, out, *settings, "--workers", "2")
    process.kill()
    process.communicate(timeout=60)  # returns when the workers have closed their ends, too
    assert process.returncode == -signal.SIGKILL
    assert not (out / "sizes.json").exists()
    config.out = str(out)
    assert pack(config, 0).kept >= 2
    assert files(out) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_cleaned_copy_has_whole_shards_only_and_is_made_anew(
    tmp_path: Path, number: int
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for shard in range(60):
        with TarWriter(str(source / f"{shard:02d}.tar"), encoder=False) as writer:
            for sample in range(4):
                pixels = np.random.default_rng([shard, sample]).integers(0, 256, (99, 99, 3), "u1")
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                data = b"broken" if sample == shard % 5 else buffer.getvalue()
                writer.write({"__key__": f"{shard:02d}{sample}", "png": data, "txt": b"text"})
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert code_of("validate", str(source), "--clean", str(whole), "--workers", "0") == 1
    words = ["validate", str(source), "--clean", str(out), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.shards", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (out / "01.tar").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    left, expected = files(out), files(whole)
    tars = {name: data for name, data in left.items() if name.endswith(".tar")}
    assert 2 <= len(tars) < 60
    assert tars.items() <= expected.items()
    begun = {f".{len(tars):02d}.tar.part"} if number == signal.SIGKILL else set()
    assert left.keys() - tars.keys() - begun == {"unfinished.json"}
    (out / "foreign.tar").touch()
    assert code_of(*words) == 2
    (out / "foreign.tar").unlink()
    (source / "00.tar").unlink()  # what the first run wrote of it must go
    assert code_of(*words) == 1
    del expected["00.tar"]
    assert {n: d for n, d in files(out).items() if n != "sizes.json"} == {
        name: data for name, data in expected.items() if name != "sizes.json"
    }
    assert len(json.loads((out / "sizes.json").read_text())) == 59


def test_two_packs_do_not_share_a_folder(folder: Path, tmp_path: Path) -> None:
    config = PackConfig(str(folder), str(tmp_path))
    with output_folder(tmp_path), pytest.raises(ShardError, match="another process is writing"):
        pack(config, 0)
    assert not list(tmp_path.iterdir())


def code_of(*words: str) -> int | str | None:
    try:
        main(list(words))
    except SystemExit as stop:
        return stop.code
    return 0


def test_every_tool_on_good_shards(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern, out = str(shards / "train-{0..1}.tar"), str(tmp_path)
    assert code_of("validate", pattern, "--report", f"{out}/r.json", "--workers", "0") == 0
    assert "24 samples in 2 shards: no problems" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["findings"] == []
    names = ["--classnames", str(shards / "classnames.txt")]
    assert code_of("stats", str(shards), "--out", f"{out}/s", "--workers", "0", *names) == 0
    printed = capsys.readouterr().out
    assert "0 red 6, 1 green 6" in printed
    assert json.loads((tmp_path / "s" / "stats.json").read_text())["top_words"][0] == ["a", 24]
    assert Image.open(tmp_path / "s" / "stats.png").width > 500
    assert code_of("show", str(shards), "--output", f"{out}/s.png", "--count", "3") == 0
    assert np.asarray(Image.open(tmp_path / "s.png")).std() > 10
    assert code_of("index", str(shards), "--index_folder", f"{out}/indexes") == 0
    printed = capsys.readouterr().out
    assert "24 samples in 2 shards" in printed
    assert f"2 indexes in {out}/indexes" in printed
    assert len(list((tmp_path / "indexes").glob("*.index.safetensors"))) == 2


def test_problems_are_exit_code_1_and_a_cleaned_copy_has_none(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (shards / "train-0.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    clean = str(tmp_path / "clean")
    assert code_of("validate", str(tmp_path), "--clean", clean, "--workers", "0") == 1
    assert "1 truncated_shard" in capsys.readouterr().out
    assert code_of("validate", clean, "--workers", "0") == 0


def test_a_crashing_decoder_is_one_line_with_the_sample(shards: Path) -> None:
    code = """
import os, signal, sys
from data_pipelines import validate
from scripts.shards import main
real = validate.decode_rgb
def crash(data, *rest):
    if validate.hashlib.sha256(data).hexdigest() == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(data, *rest)
validate.decode_rgb = crash
main(["validate", sys.argv[2], "--workers", "2"])
"""
    index = index_shards([str(shards / "train-1.tar")])
    extension = next(ext for ext in index.members if ext in IMAGE_KEYS)
    data = ShardReader(index).read(5, extension)
    assert data is not None
    words = [hashlib.sha256(data).hexdigest(), str(shards / "train-{0..1}.tar")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    # Torch has a line of its own before, with a NUL at its end.
    message = done.stderr.rpartition("error: ")[2]
    assert f"it crashed (SIGSEGV) at sample '{index.keys[5]}' of" in message
    assert message.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no tool given: choose one of pack, validate"),
        (["pakc"], "there is no tool 'pakc'; did you mean 'pack'?"),
        (["pack"], "source is not given"),
        (["pack", "nowhere", "--out", "OUT"], "source 'nowhere' does not exist"),
        (["pack", "HERE", "--out", "OUT", "--qualty", "3"], "did you mean 'quality'?"),
        (["pack", "HERE", "--out", "OUT", "--encode", "tiff"], "encode"),
        (["pack", "HERE", "--out", "OUT", "--quality", "0"], "quality must be 1 to 100"),
        (["pack", "HERE", "--out", "FILE"], "is a file: name a folder"),
        (["pack", "HERE", "--out", "OUT", "--workers", "-1"], "workers must not be negative"),
        (["validate", "nowhere"], "no shard matches"),
        (["validate", "SHARDS", "--ignore", "[x]"], "there is no problem 'x'"),
        (["validate", "SHARDS", "--clean", "SHARDS"], "the folder of the shards"),
        (["validate", "SHARDS", "--report", "nowhere/r.json"], "no folder 'nowhere'"),
        (["validate", "SHARDS::SHARDS"], "is named twice"),
        (["stats", "SHARDS", "--label_key", "json:x"], "for the label: looked for json"),
        (["stats", "SHARDS", "--top", "0"], "top must be at least 1"),
        (["show", "SHARDS", "--output", "x.jpg"], "ends in .png"),
        (["index", "HERE"], "no shard matches"),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"caption")
    places = {
        "HERE": str(tmp_path), "OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "file"),
        "SHARDS": str(shards), "SHARDS::SHARDS": f"{shards}::{shards}",
    }  # fmt: skip
    assert code_of(*(places.get(word, word) for word in words)) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
    assert message in errors


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--help") == 0
    printed = capsys.readouterr().out
    assert all(f"scripts.shards {tool} " in printed for tool in TOOLS)
    for name, tool in TOOLS.items():
        assert code_of(name, "--help") == 0
        assert f"--{tool.first}" in capsys.readouterr().out
