"""The command: what it prints, and its exit status."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from metalearn.audit import AuditLog, read_records, verify
from metalearn.cli import main

ROOT = Path(__file__).parents[1]
DECISION = {"index": 4, "step": 200, "status": "limited", "reasons": ["rate fell", "loss 3 % above"]}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    first, second = AuditLog(path, name="first", tenant="shop"), AuditLog(path, name="second")
    first.append("decision", DECISION)
    first.append("note", {"text": "größer \x1b[2J\u2028", "n": [1, None]})
    second.append("outcome", {"ndcg@10": 0.25})
    return path


def test_the_entry_point_is_there():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]["scripts"]
    module, _, function = scripts["metalearn"].partition(":")
    assert getattr(import_module(module), function) is main


def test_verify_says_what_is_there(log: Path, capsys: pytest.CaptureFixture):
    assert main(["audit", "verify", str(log)]) == 0
    head = verify(log).head
    assert capsys.readouterr().out == f"{log}: whole, 4 records, no key, head 3 {head.hash}\n"


def test_verify_tells_of_erasures_kills_and_old_anchors(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "older").write_bytes((tmp_path / "audit.jsonl.head").read_bytes())
    assert main(["audit", "erase", str(log), "--tenant", "shop"]) == 0
    assert capsys.readouterr().out == f"{log}: erased the content of 2 records\n"
    with log.open("a") as file:
        file.write('{"v"')
    assert main(["audit", "verify", str(log), "--anchor", str(tmp_path / "older")]) == 0
    _, erased, ahead, unfinished = capsys.readouterr().out.splitlines()
    assert erased.startswith("the content of 2 records was erased")
    assert ahead.startswith("1 records are newer than the anchor")
    assert unfinished.startswith("the last line is unfinished, 4 bytes")


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda content: content.replace(b"0.25", b"0.26"), ":4 has content that does not match its digest"),
        (lambda content: b"".join(content.splitlines(keepends=True)[:-1]), ":4 is missing: the anchor has 4 records"),
        (lambda content: content[1:], ":1 is not an audit record"),
        (lambda content: b"\xff\xfe", ":1 is missing"),
    ],
)
def test_tampering_is_exit_status_1(log: Path, capsys: pytest.CaptureFixture, alter, message: str):
    log.write_bytes(alter(log.read_bytes()))
    assert main(["audit", "verify", str(log)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{log}{message}" in captured.err
    assert main(["audit", "erase", str(log), "--tenant", "shop"]) == 1


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture):
    key, path, anchor = tmp_path / "key", str(tmp_path / "log"), str(tmp_path / "head")
    key.write_text("0123456789abcdef0123456789abcdef\n")
    AuditLog(path, key=key.read_bytes().strip(), anchor=anchor, tenant="shop").append("note", {})
    sealed = [path, "--anchor", anchor]
    assert main(["audit", "verify", *sealed, "--key-file", str(key)]) == 0
    assert "whole, 2 records, keyed" in capsys.readouterr().out
    assert main(["audit", "verify", *sealed]) == 1
    assert "pass its key" in capsys.readouterr().err
    assert main(["audit", "erase", *sealed, "--key-file", str(key), "--before", "2999-12-31"]) == 0
    assert main(["audit", "verify", *sealed, "--key-file", str(key)]) == 0
    key.write_text("another key of enough bytes")
    assert main(["audit", "verify", *sealed, "--key-file", str(key)]) == 1
    assert "the key is another" in capsys.readouterr().err
    assert main(["audit", "verify", *sealed, "--key-file", str(tmp_path / "none")]) == 2


def test_show_prints_one_safe_line_a_record(log: Path, capsys: pytest.CaptureFixture):
    assert main(["audit", "show", str(log)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u2028" not in out
    lines = out.splitlines()
    assert len(lines) == 4
    when = next(iter(read_records(log))).time
    assert lines[0].startswith(f'     0  {when:%Y-%m-%d %H:%M:%S}  genesis   first  package="metalearn"  version=')
    assert lines[1].endswith("decision  first [shop]  decision 4 at step 200, limited: rate fell; loss 3 % above")
    assert lines[2].endswith('note      first [shop]  text="größer \\u001b[2J\\u2028"  n=[1, null]')
    assert lines[3].endswith("outcome   second  ndcg@10=0.25")


@pytest.mark.parametrize(
    ("filters", "sequences"),
    [
        (["--kind", "note"], [2]),
        (["--kind", "note", "--kind", "outcome"], [2, 3]),
        (["--run", "first", "--last", "2"], [1, 2]),
        (["--tenant", "shop"], [1, 2]),
        (["--tenant", ""], [0, 3]),
        (["--run", "none"], []),
        (["--last", "99"], [0, 1, 2, 3]),
    ],
)
def test_show_filters(log: Path, capsys: pytest.CaptureFixture, filters: list[str], sequences: list[int]):
    assert main(["audit", "show", str(log), *filters]) == 0
    assert [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()] == sequences


def test_show_says_what_was_erased(log: Path, capsys: pytest.CaptureFixture):
    main(["audit", "erase", str(log), "--tenant", "shop"])
    main(["audit", "show", str(log), "--run", "first", "--tenant", "shop"])
    assert [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines()[1:]] == ["(erased)"] * 2


def test_what_cannot_be_done_is_exit_status_2(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for command in ("verify", "show"):
        assert main(["audit", command, str(tmp_path / "none")]) == 2
        assert "there is no audit log" in capsys.readouterr().err
    assert main(["audit", "erase", str(log)]) == 2
    wrong = (["show"], ["show", str(log), "--last", "0"], ["show", str(log), "--kind", "x"])
    for arguments in ([], ["audit"], *(["audit", *rest] for rest in (*wrong, ["erase", str(log), "--before", "soon"]))):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "must be like 2026-01-31" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path):
    path = tmp_path / "log"
    writer = AuditLog(path)
    for _ in range(3):
        writer.append("note", {"text": "x" * 100_000})
    command = [sys.executable, "-m", "metalearn.cli", "audit", "show", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
