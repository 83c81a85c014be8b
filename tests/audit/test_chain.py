"""The chain: exact bytes, an independent recomputation of its hashes, and every kind of tampering at many places."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import re
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalearn.audit.record import (
    MAX_LINE_BYTES,
    START,
    Head,
    check_key,
    format_anchor,
    format_time,
    parse_anchor,
    read_record,
    seal,
    split_line,
    without_content,
)
from metalearn.errors import AuditError, InvalidArgumentError, MetalearnError
from tests.audit.chains import KEY, NOON, check, notes, sealed

KEYS = pytest.mark.parametrize("key", [None, KEY], ids=["unkeyed", "keyed"])
COUNT = 40
PLACES = 150


def test_bytes_of_a_record_are_pinned():
    line, head = seal(
        "note", {"a": [1, None]}, head=Head(6, "ab" * 32), time=NOON, salt=bytes(16), name='r"1', tenant="é"
    )
    body = b"0" * 32 + b'","content":{"a":[1,null]}'
    header = (
        b'{"v":1,"seq":7,"time":"2026-01-31T12:00:00.000000Z","kind":"note","name":"r\\"1","tenant":"\\u00e9",'
        b'"digest":"' + hashlib.sha256(body).hexdigest().encode() + b'","prev":"' + b"ab" * 32 + b'"'
    )
    own = hashlib.sha256(header).hexdigest()
    assert line == header + b',"hash":"' + own.encode() + b'","salt":"' + body + b"}\n"
    assert head == Head(7, own)


@KEYS
def test_hashes_agree_with_a_recomputation_from_parsed_json(key: bytes | None):
    lines, head = sealed(notes(5), key=key)
    previous = "0" * 64
    for sequence, line in enumerate(lines):
        parsed = json.loads(line)
        header = {name: parsed[name] for name in ("v", "seq", "time", "kind", "name", "tenant", "digest", "prev")}
        content = json.dumps(parsed["content"], separators=(",", ":"))
        texts = {
            "digest": parsed["salt"] + '","content":' + content,
            "hash": json.dumps(header, separators=(",", ":")).removesuffix("}"),
        }
        for name, text in texts.items():
            plain, keyed = hashlib.sha256(text.encode()), hmac.new(KEY, text.encode(), "sha256")
            assert parsed[name] == (plain if key is None else keyed).hexdigest()
        assert (parsed["seq"], parsed["prev"]) == (sequence, previous)
        previous = parsed["hash"]
    assert head.hash == previous


def test_records_read_back():
    lines, _ = sealed([("note", {"text": "a\u2028\n\x00\ud800"})])
    record = read_record(lines[1], 2)
    assert (record.sequence, record.kind, record.name, record.tenant) == (1, "note", "run", "tenant-1")
    assert record.time == NOON.replace(second=1)
    assert record.content == {"text": "a\u2028\n\x00\ud800"}
    assert read_record(without_content(split_line(lines[1], 2)), 2).content is None


@KEYS
def test_a_whole_log_verifies(key: bytes | None):
    lines, head = sealed(notes(COUNT), key=key)
    found = check(b"".join(lines), head, key)
    assert (found.records, found.head, found.keyed) == (COUNT + 1, head, key is not None)
    assert (found.erased, found.ahead, found.unfinished_bytes) == (0, 0, 0)


Tampering = Callable[[list[bytes], random.Random, bytes | None], bytes]


def edit(lines: list[bytes], rng: random.Random, key: bytes | None) -> bytes:
    content = bytearray(b"".join(lines))
    content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    return bytes(content)


def reorder(lines: list[bytes], rng: random.Random, key: bytes | None) -> bytes:
    first, second = rng.sample(range(len(lines)), 2)
    lines[first], lines[second] = lines[second], lines[first]
    return b"".join(lines)


def insert_a_copy(lines: list[bytes], rng: random.Random, key: bytes | None) -> bytes:
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return b"".join(lines)


def insert_a_forgery(lines: list[bytes], rng: random.Random, key: bytes | None) -> bytes:
    place = rng.randrange(len(lines))  # after it; without a key the last place is an append, and passes
    place = min(place, len(lines) - 2) if key is None else place
    head = Head(place, split_line(lines[place], place + 1).hash.decode())
    forged, _ = seal("note", {}, head=head, time=NOON, salt=bytes(16), key=key and bytes(32))
    return b"".join([*lines[: place + 1], forged, *lines[place + 1 :]])


def replace_by_a_forgery(lines: list[bytes], rng: random.Random, key: bytes | None) -> bytes:
    place = rng.randrange(1, len(lines))
    head = Head(place - 1, split_line(lines[place - 1], place).hash.decode())
    lines[place], _ = seal("note", {}, head=head, time=NOON, salt=bytes(16), key=key and bytes(32))
    return b"".join(lines)


def delete(lines: list[bytes], rng: random.Random, key: bytes | None) -> bytes:
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def cut_records(lines: list[bytes], rng: random.Random, key: bytes | None) -> bytes:
    return b"".join(lines[: rng.randrange(len(lines))])


def cut_bytes(lines: list[bytes], rng: random.Random, key: bytes | None) -> bytes:
    content = b"".join(lines)
    return content[: rng.randrange(len(content))]


def swap_contents(lines: list[bytes], rng: random.Random, key: bytes | None) -> bytes:
    first, second = rng.sample(range(1, len(lines)), 2)
    bodies = {place: split_line(lines[place], place + 1).body or b"" for place in (first, second)}
    for place, other in ((first, second), (second, first)):
        lines[place] = lines[place].replace(bodies[place], bodies[other])
    return b"".join(lines)


def drop_content(lines: list[bytes], rng: random.Random, key: bytes | None) -> bytes:
    place = rng.randrange(len(lines))
    lines[place] = without_content(split_line(lines[place], place + 1))
    return b"".join(lines)


def rewrite_from_somewhere_on(lines: list[bytes], rng: random.Random, key: bytes | None) -> bytes:
    place = rng.randrange(1, len(lines))
    head = Head(place - 1, split_line(lines[place - 1], place).hash.decode())
    for index in range(place, len(lines)):
        lines[index], head = seal("note", {}, head=head, time=NOON, salt=bytes(16), key=key and bytes(32))
    return b"".join(lines)


@KEYS
@pytest.mark.parametrize(
    "tampering",
    [
        edit,
        reorder,
        insert_a_copy,
        insert_a_forgery,
        replace_by_a_forgery,
        delete,
        cut_records,
        cut_bytes,
        swap_contents,
        drop_content,
        rewrite_from_somewhere_on,
    ],
)
def test_tampering_is_detected(tampering: Tampering, key: bytes | None):
    lines, head = sealed(notes(COUNT), key=key)
    whole = b"".join(lines)
    for seed in range(PLACES):
        content = tampering(list(lines), random.Random(seed), key)
        assert content != whole
        with pytest.raises(AuditError) as caught:
            check(content, head, key)
        # The line that is named is the first that differs, or one that has become wrong by it.
        line = caught.value.line
        same = next((i for i, (a, b) in enumerate(zip(content, whole, strict=False)) if a != b), len(content))
        assert line is not None and line >= whole[:same].count(b"\n") + 1
        assert f"log:{line} " in str(caught.value)


@KEYS
def test_every_byte_of_a_record_counts(key: bytes | None):
    lines, head = sealed(notes(3), key=key)
    start = len(lines[0])
    for place in range(start, start + len(lines[1])):
        content = bytearray(b"".join(lines))
        content[place] ^= 1
        with pytest.raises(AuditError) as caught:
            check(bytes(content), head, key)
        assert caught.value.line == 2


def test_the_first_bad_line_is_named():
    lines, head = sealed(notes(9))
    other_kind = lines[5].replace(b'"kind":"note"', b'"kind":"nota"')
    other_content = lines[5].replace(b'"number":4', b'"number":5')
    cases = {
        r"^log:4 holds record 4 instead of 3: records were deleted": [*lines[:3], *lines[4:]],
        r"^log:10 is missing: the anchor has 10 records": lines[:9],
        r"^log:6 does not match its hash": [*lines[:5], other_kind, *lines[6:]],
        r"^log:6 has content that does not match": [*lines[:5], other_content, *lines[6:]],
        r"^log:1 is not the genesis": [sealed([])[0][0].replace(b"genesis", b"general")],
        r"^log:2 is not an audit record": [lines[0], b"\n", *lines[1:]],
        r"^log:2 has format 2, this metalearn reads 1$": [lines[0], lines[1].replace(b'{"v":1', b'{"v":2')],
    }
    for message, altered in cases.items():
        with pytest.raises(AuditError, match=message):
            check(b"".join(altered), head)


def test_a_key_is_demanded_refused_or_wrong():
    keyed, head = sealed(notes(3), key=KEY)
    with pytest.raises(AuditError, match=r"^log:1 says that the log is keyed; pass its key"):
        check(b"".join(keyed), head)
    with pytest.raises(AuditError, match=r"^log:1 does not match its hash: it was altered, or the key is another"):
        check(b"".join(keyed), head, bytes(32))
    unkeyed, head = sealed(notes(3))
    with pytest.raises(AuditError, match=r"^log:1 says that the log has no key"):
        check(b"".join(unkeyed), head, KEY)


@pytest.mark.parametrize("key", ["0123456789abcdef", b"short", b"", bytearray(32), 3])
def test_what_cannot_be_a_key_is_refused(key):
    with pytest.raises(InvalidArgumentError, match="`key` must be at least 16 bytes, got"):
        check_key(key)


def test_records_ahead_of_the_anchor_are_fine_and_counted():
    lines, _ = sealed(notes(5))
    for place in range(6):
        anchor = Head(place, split_line(lines[place], place + 1).hash.decode())
        assert check(b"".join(lines), anchor).ahead == 5 - place
        with pytest.raises(AuditError, match=f"^log:{place + 1} is missing"):
            check(b"".join(lines[:place]), anchor)


def test_an_unfinished_last_line_is_fine_only_beyond_the_anchor():
    lines, head = sealed(notes(5))
    anchor = Head(4, split_line(lines[4], 5).hash.decode())
    for cut in range(1, len(lines[5])):
        found = check(b"".join(lines)[:-cut], anchor)
        assert (found.records, found.unfinished_bytes) == (5, len(lines[5]) - cut)
        with pytest.raises(AuditError, match=r"^log:6 is missing"):
            check(b"".join(lines)[:-cut], head)


@pytest.mark.parametrize(
    "erased",
    [
        None,
        3,
        [1],
        [[1]],
        [[1, 1, 1]],
        [[2, 1]],
        [[-1, 1]],
        [[1, 99]],
        [[1, 1], [1, 1]],
        [[True, 1]],
        [[1.0, 1]],
        {"a": 1},
    ],
)
def test_an_erasure_record_that_makes_no_sense_is_refused(erased):
    lines, head = sealed([*notes(3), ("erasure", {"erased": erased})])
    with pytest.raises(AuditError, match=r"^log:5 is not an erasure record"):
        check(b"".join(lines), head)


def test_content_comes_off_only_with_an_erasure_record_and_stays_off():
    lines, head = sealed([*notes(4), ("erasure", {"erased": [[1, 2], [4, 4]]}), *notes(1)])
    bare = [without_content(split_line(line, number)) for number, line in enumerate(lines, 1)]
    erased = [lines[0], bare[1], bare[2], lines[3], bare[4], *lines[5:]]
    assert check(b"".join(erased), head).erased == 3
    for place, line in ((1, lines[1]), (4, lines[4])):
        with pytest.raises(AuditError, match=f"^log:{place + 1} has content that line 6 says was erased"):
            check(b"".join([*erased[:place], line, *erased[place + 1 :]]), head)
    for place in (3, 6):
        with pytest.raises(AuditError, match=f"^log:{place + 1} has no content, and no erasure record says why"):
            check(b"".join([*erased[:place], bare[place], *erased[place + 1 :]]), head)


def test_the_anchor_has_one_length_and_reads_back():
    heads = [START, Head(0, "ab" * 32), Head(10**17, "cd" * 32)]
    assert [parse_anchor(format_anchor(head)) for head in heads] == heads
    assert len({len(format_anchor(head)) for head in heads}) == 1
    anchor = json.loads(format_anchor(heads[1]))
    text = format_anchor(heads[1])[: -len(',"check":"0123456789abcdef"}\n')]
    assert anchor.pop("check") == hashlib.sha256(text).hexdigest()[:16]
    assert anchor == {"v": 1, "seq": 0, "hash": "ab" * 32}


def test_a_torn_write_leaves_the_anchor_where_it_was():
    older, old, new = (Head(9 + index, digit * 64) for index, digit in enumerate("abc"))
    lines = format_anchor(older) + format_anchor(old)
    for size in range(len(lines) // 2):
        torn = format_anchor(new)[:size] + lines[size:]
        assert parse_anchor(torn) == (new if torn.startswith(format_anchor(new)) else old)
    assert parse_anchor(format_anchor(new) + format_anchor(old)) == new
    for size in range(len(lines) // 2):
        assert parse_anchor(format_anchor(START)[:size]) is None
    for content in (b"\n", b"{}", lines[1 : len(lines) // 2], b"x"):
        with pytest.raises(AuditError, match="is not the anchor"):
            parse_anchor(content)


def test_times_are_ordered_as_texts():
    times = [datetime(1, 2, 3, tzinfo=UTC), datetime(999, 1, 1, tzinfo=UTC), NOON, NOON.replace(microsecond=1)]
    texts = [format_time(time) for time in times]
    assert texts == sorted(texts)
    assert texts[2] == "2026-01-31T12:00:00.000000Z"


def test_a_record_has_a_largest_size():
    with pytest.raises(InvalidArgumentError, match=f"{MAX_LINE_BYTES} is the most"):
        seal("note", {"text": "x" * MAX_LINE_BYTES}, head=START, time=NOON, salt=bytes(16))
    lines, head = sealed([])
    with pytest.raises(AuditError, match=r"^log:2 is not an audit record"):
        check(lines[0] + b"x" * (MAX_LINE_BYTES + 1), head)


@settings(max_examples=200)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_only_raise_metalearn_errors(content: bytes):
    for parse in (parse_anchor, lambda b: read_record(b, 1), lambda b: check(b, START), lambda b: check(b, START, KEY)):
        try:
            parse(content)
        except AuditError as error:
            assert re.match(r"(log:\d+|anchor) ", str(error))


LINES, HEAD = sealed([*notes(3), ("erasure", {"erased": []})])


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(st.integers(0, len(b"".join(LINES))), st.integers(0, 40), st.binary(max_size=20)),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_logs_only_raise_metalearn_errors(splices: list[tuple[int, int, bytes]]):
    content = whole = b"".join(LINES)
    for place, length, new in splices:
        content = content[:place] + new + content[place + length :]
    try:
        found = check(content, HEAD)
    except AuditError as error:
        assert error.line is not None
    else:  # unchanged, or more than there was: an unfinished line
        assert content.startswith(whole) and found.unfinished_bytes == len(content) - len(whole)
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            read_record(line, number)
        except AuditError as error:
            assert error.line == number


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100)
@given(
    st.dictionaries(st.sampled_from(["erased", "format", "keyed"]) | st.text(), JSON, max_size=4), st.text(), st.text()
)
def test_any_content_that_is_properly_sealed_reads_back_or_is_refused(content: dict, name: str, tenant: str):
    line, head = seal("note", content, head=Head(0, "0" * 64), time=NOON, salt=bytes(16))
    assert read_record(line, 2).content == content
    line, _ = seal("note", {}, head=START, time=NOON, salt=bytes(16), name=name, tenant=tenant)
    assert (read_record(line, 1).name, read_record(line, 1).tenant) == (name, tenant)
    for kind in ("genesis", "erasure"):
        first = [] if kind == "genesis" else LINES[:1]
        start = START if kind == "genesis" else Head(0, split_line(LINES[0], 1).hash.decode())
        line, head = seal(kind, content, head=start, time=NOON, salt=bytes(16))
        try:
            check(b"".join([*first, line]), head)
        except MetalearnError as error:
            assert isinstance(error, AuditError)
