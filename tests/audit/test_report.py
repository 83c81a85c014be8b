"""The report of a run: what is on the page, what never gets on it, and how a browser sees it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.domains import make_domain
from envs.simulated import SimulatedPrior, simulate
from metalearn import load_controller
from metalearn.audit import AuditLog, read_records, write_report
from metalearn.audit.figures import readable
from metalearn.audit.history import read_history
from metalearn.audit.record import format_anchor
from metalearn.audit.report_figures import STATUS_SHAPES
from metalearn.cli import main
from metalearn.errors import AuditError, InvalidArgumentError, MetalearnError
from metalearn.safety.rollback import RollbackConfig
from tests.audit.browser import BROWSER, visit
from tests.audit.chains import KEY, sealed
from tests.torch.runs import start

HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\x00"
VOID = {"meta", "link", "br", "input"}
TAGS = {
    *(
        "html",
        "head",
        "title",
        "style",
        "body",
        "header",
        "nav",
        "main",
        "section",
        "footer",
        "h1",
        "h2",
        "p",
        "strong",
    ),
    *("code", "ul", "li", "a", "dl", "dt", "dd", "div", "figure", "figcaption", "span", "fieldset", "legend", "label"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary", "svg", "desc", "g", "path", "text"),
    "line",
}
SECTIONS = [
    "Curves",
    "Hyperparameters",
    "Expected improvement",
    "Drift",
    "Cohorts",
    "Resources",
    "Decisions",
    "Outcome",
]


class Page(HTMLParser):
    """Tags with their attributes, and text by the tag that it is in; fails where a tag is not closed in its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def told(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]

    @property
    def text(self) -> str:
        return "".join(text for tag, text in self.texts if tag != "style")


def decision(index: int, step: int, **changes: Any) -> dict[str, Any]:
    """Return the content of a decision's record."""
    groups = [{"learning_rate": 0.01 * 0.9**index, "weight_decay": 0.1}, {"learning_rate": 0.02, "weight_decay": 0.2}]
    content = {"index": index, "step": step, "status": "applied", "groups": groups, "run": {"dropout": 0.1}}
    content |= {"schedule": 1.0, "confidence": 1.0, "mode": "control", "proposed": None, "advice": None}
    return content | {"improvement": None, "reasons": [f"reason {index}"]} | changes


def write(path: Path, contents: list[tuple[str, dict[str, Any]]], *, name: str = "run", **options: Any) -> Path:
    """Write a log."""
    log = AuditLog(path, name=name, **options)
    for kind, content in contents:
        log.append(kind, content)
    return path


def rich(told: str = "plain") -> list[tuple[str, dict[str, Any]]]:
    """Return one of everything that a report shows; `told` goes wherever a text may be."""
    explanation = {
        "index": 1,
        "step": 10,
        "recorded": True,
        "sentence": f"because {told}",
        "attributions": [{"label": told, "action": 0.1, "factor": 1.2, "contributions": {told: 0.1, "rest": None}}],
        "expected": None,
        "similar": [],
        "counterfactual": None,
        "prior": [],
    }
    improvement = {"expected": 0.02, "low": -0.01, "high": 0.05, "probability": 0.8}
    proposed = {"groups": [{"learning_rate": 0.5}, {"learning_rate": 0.6}], "run": {told: 0.4}}
    contents: list[tuple[str, dict[str, Any]]] = [
        ("profile", {"fingerprint": "abc123", "num_users": 60, "controller": told}),
        ("decision", decision(0, 0, mode="control", run={told: 0.3, "dropout": 0.1})),
        ("decision", decision(1, 10, explanation=explanation, improvement=improvement, validation=0.1, loss=0.7)),
    ]
    for index, status in enumerate(STATUS_SHAPES, 2):
        measured = {"validation": 0.1 * index, "seconds": 2.0, "samples_per_second": 1e3, "memory_bytes": 2**28}
        extra = {"proposed": proposed} if status == "rejected" else {}
        row = decision(index, 10 * index, status=status, reasons=[told], improvement=improvement, **measured, **extra)
        contents.append(("decision", row | {"cohorts": {"new users": 0.1, told: 0.2}}))
    return [
        *contents,
        ("decision", decision(8, 80, mode="shadow", groups=[], run={}, proposed=proposed, status=told)),
        ("drift", {"step": 45, "stream": told, "degree": "severe", "kind": "abrupt", "size": 4.5, "sentence": told}),
        ("override", {"step": 55, "reason": f"rate by hand {told}"}),
        ("rollback", {"step": 85, "to_step": 80, "reason": told, "fallback": False}),
        ("outcome", {"ndcg@10": 0.25, told: 1}),
        ("note", {"text": told}),
    ]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a steered run, in which one batch spoilt the weights; with what a monitor and a human added."""
    folder = tmp_path_factory.mktemp("run")
    prior = SimulatedPrior(users=(60, 60), items=(40, 40), history=(10.0, 10.0))
    domain = make_domain(simulate(prior, seed=0), name="simulated", split="leave-last-out")
    log = AuditLog(folder / "audit.jsonl", name="movies-0")
    log.record_profile(domain.profile)
    run = start(
        domain,
        controller=load_controller(),
        horizon=120,
        decision_log=log,
        rollback=RollbackConfig(every=1),
    )
    run.advance(50)
    with torch.no_grad():
        next(iter(run.model.parameters()))[0, 0] = torch.nan
    run.advance(20)
    log.append("drift", {"stream": "ndcg", "degree": "drift", "kind": "abrupt", "size": 3.1, "sentence": "ndcg: down"})
    log.append("override", {"step": 70, "reason": "rate halved by hand"})
    run.advance(60)
    return log.path


def test_a_real_run_is_told_whole(real: Path, tmp_path: Path):
    path = write_report(real, tmp_path / "deep" / "run.html")
    assert path == tmp_path / "deep" / "run.html"
    page, records = Page(path), list(read_records(real))
    assert page.told("h1") == ["Run movies-0"]
    assert page.told("h2") == ["Curves", "Hyperparameters", "Expected improvement", "Drift", "Resources", "Decisions"]
    assert f"{len(records)} records; head {records[-1].sequence} {records[-1].hash}" in page.text
    assert str(real.parent) not in page.source
    decisions = [record for record in records if record.kind == "decision"]
    rows = [attrs for tag, attrs in page.tags if tag == "tr" and attrs.get("class")]
    assert len(rows) == len(decisions)
    assert sum("gone" in str(row["class"]) for row in rows) == 1  # the one that the spoilt interval began with
    assert re.search(r"step 54: rolled back: .*finite", page.text)
    for record in decisions:
        assert record.content is not None
        assert all(readable(reason) in page.source for reason in record.content["reasons"])
    curve = svg(page, "curve-validation")
    assert [group.get("class") for group in curve.iter("g") if "event" in (group.get("class") or "")] == [
        "event rollback",
        "event drift",
        "event override",
    ]
    assert write_report(real, tmp_path / "again.html", name="movies-0").read_bytes() == path.read_bytes()


def svg(page: Page, key: str) -> ElementTree.Element:
    """Return a chart of a page, without its names' spaces: XML that a parser of it takes."""
    charts = [ElementTree.fromstring(text) for text in re.findall(r'<svg class="chart" .*?</svg>', page.source)]
    return next(chart for chart in charts if (chart.get("aria-labelledby") or "").startswith(f"{key}-t"))


def test_everything_that_a_log_may_hold_is_shown(tmp_path: Path):
    page = Page(write_report(write(tmp_path / "log", rich()), tmp_path / "run.html"))
    assert page.told("h2") == [*SECTIONS, "Notes"]
    titles = page.told("title")
    for status in STATUS_SHAPES:
        assert any(f", {status}: learning_rate[0] = " in title for title in titles)
    assert any(", only proposed: learning_rate[1] = 0.6" in title for title in titles)
    assert any("+2.00 % (-1.00 to +5.00 %)" in title for title in titles)
    assert "step 45: severe: plain" in titles
    assert "step 85: rolled back: plain" in titles
    assert "because plain" in page.told("p")
    facts = dict(zip(page.told("dt"), page.told("dd"), strict=True))
    assert facts["Domain users"] == "60" and facts["Controller"] == "plain"
    assert facts["Mode"] == "control, shadow" and facts["ndcg@10"] == "0.25"
    assert [row for row in page.text.split() if row == "256"]  # MiB, on an axis
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    labelled = {label for _, attrs in page.tags for label in (attrs.get("aria-labelledby") or "").split()}
    assert labelled <= set(ids)


def test_rows_say_what_changed(tmp_path: Path):
    rows = [decision(0, 0), decision(1, 10, groups=[{"learning_rate": 0.005}, {"learning_rate": 0.02}], run={})]
    page = Page(write_report(write(tmp_path / "log", [("decision", row) for row in rows]), tmp_path / "run.html"))
    assert "learning_rate[0]: 0.01 → 0.005 (× 0.5)" in page.told("li")
    assert "learning_rate[1] = 0.02" in page.told("li")  # of the start
    assert not any("weight_decay" in text and "→" in text for text in page.told("li"))


def test_the_line_is_what_was_in_force(tmp_path: Path):
    held = [{"learning_rate": 0.01}]
    proposed = {"groups": [{"learning_rate": 0.5}], "run": {}}
    rows = [decision(0, 0, groups=held), decision(1, 10, groups=held, status="rejected", proposed=proposed)]
    rows += [decision(2, 20, groups=held), decision(3, 30, groups=[], run={}, mode="shadow", proposed=proposed)]
    page = Page(write_report(write(tmp_path / "log", [("decision", row) for row in rows]), tmp_path / "run.html"))
    chart = svg(page, "trajectory-0")
    lines = [path for path in chart.iter("path") if (path.get("class") or "").startswith("series")]
    assert [line.get("class") for line in lines] == ["series c0", "series faint c0"]
    heights = [{point.split()[1] for point in (line.get("d") or "")[1:].split("L")} for line in lines]
    assert [len(found) for found in heights] == [1, 1] and heights[0] != heights[1]
    crosses = [group for group in chart.iter("g") if "rejected: learning_rate[0] = 0.5" in "".join(group.itertext())]
    assert [(group.get("transform") or "").rstrip(")").split()[1] for group in crosses] == list(heights[1])


def test_what_was_gone_back_from_is_told_apart(tmp_path: Path):
    # Decisions at 0, 10, 20; the interval after 20 goes wrong at 30, back to 10. That is decided on as of step 0, then
    # what followed on the measurements at 10 is decided anew.
    log = write(
        tmp_path / "log",
        [
            *(("decision", decision(index, step, validation=step / 100)) for index, step in enumerate((0, 10, 20))),
            ("rollback", {"step": 30, "to_step": 10, "reason": "loss is not finite", "fallback": False}),
            ("decision", decision(1, 0, status="rolled back")),
            *(("decision", decision(index, step)) for index, step in ((2, 10), (3, 20))),
        ],
    )
    history = read_history(read_records(log))
    assert [one.superseded for one in history.decisions] == [False, True, True, False, False, False]
    assert [one.until for one in history.decisions] == [10, 20, 30, 10, 20, 20]
    assert [one.step for one in history.decisions] == [0, 10, 20, 10, 10, 20]
    assert [one.undone for one in history.decisions] == [False, False, True, False, False, False]
    assert history.end == 30
    page = Page(write_report(log, tmp_path / "run.html"))
    paths = [path.get("class") for path in svg(page, "curve-validation").iter("path")]
    assert [kind for kind in paths if kind and kind.startswith("series")] == ["series c0", "series faint c0"]
    assert "rollback, to step 10" in page.told("td")


def test_sections_without_data_are_left_out(tmp_path: Path):
    page = Page(write_report(write(tmp_path / "log", [("decision", decision(0, 0))]), tmp_path / "run.html"))
    assert page.told("h2") == ["Hyperparameters", "Decisions"]
    assert not [attrs for tag, attrs in page.tags if tag == "fieldset"]
    assert "Validation" not in page.told("th")


def test_markup_in_a_log_stays_text(tmp_path: Path):
    log = write(tmp_path / "log", rich(HOSTILE), name=HOSTILE)
    page = Page(write_report(log, tmp_path / "run.html"))
    assert {tag for tag, _ in page.tags} <= VOID | TAGS
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "srcdoc", "action")]
        assert (attrs.get("href") or "#").startswith("#") or attrs["href"] == "data:,"
    assert page.told("h1") == ["Run " + HOSTILE[:-2] + "��"]


def test_the_page_asks_for_nothing(real: Path, tmp_path: Path):
    page = Page(write_report(real, tmp_path / "run.html"))
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none';") and "script" not in policy
    assert not re.search(r"https?:|url\(|@import|<script|javascript:", page.source)


def test_ids_that_somebody_added_are_not_shown(tmp_path: Path):
    secret = "user-4711"
    contents = [
        ("profile", {"rows": [secret], "user": secret, "num_users": 3}),
        ("decision", decision(0, 0, user_id=secret, users=[secret], validation=0.1)),
        ("override", {"step": 0, "by": secret, "reason": "by hand"}),
        ("rollback", {"step": 5, "to_step": 0, "reason": "diverged", "batch": [secret]}),
        ("drift", {"step": 5, "stream": "ndcg", "users": [secret], "sentence": "fell"}),
        ("outcome", {"user": secret, "top": [secret], "ndcg": 0.1}),
        ("note", {"user": secret, "text": "hello"}),
    ]
    assert secret not in write_report(write(tmp_path / "log", contents), tmp_path / "run.html").read_text()


def test_a_run_is_chosen_by_its_name(tmp_path: Path):
    log = tmp_path / "log"
    for name in ("first", "second"):
        write(log, [("decision", decision(0, 0, reasons=[f"of the {name}"]))], name=name)
    write(log, [("note", {"text": "nothing decided"})], name="third")
    text = write_report(log, tmp_path / "run.html", name="second").read_text()
    assert "of the second" in text and "of the first" not in text
    with pytest.raises(InvalidArgumentError, match=r"of 2 runs; pass `name`, one of \['first', 'second'\]"):
        write_report(log, tmp_path / "run.html")
    with pytest.raises(InvalidArgumentError, match=r"\['first', 'second'\], got 'third'"):
        write_report(log, tmp_path / "run.html", name="third")


def test_what_cannot_be_reported_is_an_error(tmp_path: Path):
    log = write(tmp_path / "log", [("note", {"text": "no run yet"})])
    with pytest.raises(InvalidArgumentError, match="has no decisions"):
        write_report(log, tmp_path / "run.html")
    for output in (log, tmp_path / "log.head"):
        with pytest.raises(InvalidArgumentError, match="is the log or its anchor"):
            write_report(log, output)
    with pytest.raises(InvalidArgumentError, match="there is no audit log"):
        write_report(tmp_path / "none", tmp_path / "run.html")
    write(log, [("decision", decision(0, 0))])
    with pytest.raises(InvalidArgumentError, match="cannot write `output_path`"):
        write_report(log, tmp_path)
    write(log, [("decision", decision(1, 10) | {"step": "ten"})])
    with pytest.raises(AuditError, match=r"log:4 is not a decision record: ValueError: 'ten' is not a count"):
        write_report(log, tmp_path / "run.html")
    (tmp_path / "text").write_text("a diary\n")
    with pytest.raises(AuditError):
        write_report(tmp_path / "text", tmp_path / "run.html")


def test_a_log_that_does_not_verify_is_said_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log, output = write(tmp_path / "log", [("decision", decision(0, 0))] * 3), tmp_path / "run.html"
    assert main(["audit", "report", str(log), "--output", str(output), "--name", "run"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert "Chain verified" in output.read_text()
    log.write_bytes(log.read_bytes().replace(b'"confidence":1.0', b'"confidence":0.5', 1))
    assert main(["audit", "report", str(log), "--output", str(output)]) == 1
    page = Page(output)
    alert = next(text for tag, text in page.texts if text.startswith("NOT VERIFIED"))
    assert "log:2 has content that does not match its digest" in alert and str(tmp_path) not in page.source
    log.write_bytes(b"\n".join([*log.read_bytes().splitlines()[:3], b"torn"]))
    assert "NOT VERIFIED" in write_report(log, output).read_text()  # with the records up to there
    assert len([tag for tag, attrs in Page(output).tags if tag == "tr" and attrs.get("class")]) == 2


def test_a_key_and_an_erasure_are_told(tmp_path: Path):
    log = AuditLog(tmp_path / "log", name="run", key=KEY)
    for index in range(3):
        log.append("decision", decision(index, index))
    log._tenant = "leaving"
    log.append("note", {"text": "to be forgotten"})
    log.erase(tenant="leaving")
    page = Page(write_report(log.path, tmp_path / "run.html", key=KEY))
    assert "Chain verified, with its key" in page.text
    assert "The content of 1 records was erased" in page.text and "to be forgotten" not in page.source
    assert "NOT VERIFIED" in write_report(log.path, tmp_path / "run.html").read_text()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**320), 10**320)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def fields() -> Iterator[tuple[int, str]]:
    return ((row, name) for row, (_, content) in enumerate(rich()) for name in content)


@settings(max_examples=150)
@given(place=st.sampled_from(list(fields())), value=JSON)
def test_whatever_a_record_holds_there_is_a_page_or_an_error(
    place: tuple[int, str], value: Any, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("fuzz")
    contents = rich()
    contents[place[0]][1][place[1]] = value
    lines, head = sealed(contents)
    (folder / "log").write_bytes(b"".join(lines))
    (folder / "log.head").write_bytes(format_anchor(head))
    try:
        write_report(folder / "log", folder / "run.html")
    except MetalearnError as error:
        assert str(folder / "log") in str(error)
        assert not (folder / "run.html").exists()
        return
    page = Page(folder / "run.html")
    assert {tag for tag, _ in page.tags} <= VOID | TAGS
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name == "src"]
    assert {"Hyperparameters", "Decisions"} <= set(page.told("h2")) <= {*SECTIONS, "Notes"}
    charts = [ElementTree.fromstring(text) for text in re.findall(r"<svg .*?</svg>", page.source, re.DOTALL)]
    assert len(charts) == sum(tag == "svg" for tag, _ in page.tags) > 0


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium, such as Debian's chromium-headless-shell")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (375, True)])
def test_a_browser_shows_it_without_a_network(width: int, dark: bool, tmp_path: Path):
    path = write_report(write(tmp_path / "log", rich(HOSTILE), name=HOSTILE), tmp_path / "run.html")
    seen = visit(
        path,
        "document.documentElement.scrollWidth <= innerWidth",
        "document.scripts.length",
        "[...document.querySelectorAll('figure > svg')].every(s => s.getBoundingClientRect().height > 50)",
        "getComputedStyle(document.documentElement).backgroundColor",
        "document.querySelector('#show-held').click() || getComputedStyle(document.querySelector('tr.held')).display",
        folder=tmp_path / "profile",
        width=width,
        dark=dark,
    )
    assert seen.requests == [path.resolve().as_uri()]
    assert seen.complaints == []
    assert seen.answers == [True, 0, True, "rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)", "none"]
