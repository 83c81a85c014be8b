"""Every layout is read alike from the hub, a folder and a file; the hub path runs offline on a local mirror."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import polars as pl
import pytest

from envs.public import REGISTRY, ItemTable, PublicSource, find_source, load_public
from envs.public.layouts import read_lines, read_lists
from envs.public.tables import Table
from metalearn.errors import InteractionsError, InvalidArgumentError
from metalearn.interactions import Interactions

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments, **options):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], Path]:
    """Make a folder that stands for one commit of a hub data set; nothing but where files lie is replaced."""
    load_dataset, folders = datasets.load_dataset, {}

    def local(path: str) -> str:
        address = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", path)
        return str(folders[address[1], address[2]] / address[3]) if address else path

    def load_locally(path: str, config: str | None = None, *, revision: str | None = None, **options):
        if revision is not None:
            path = str(folders[path, revision])
        if "data_files" in options:
            options["data_files"] = [local(file) for file in options["data_files"]]
        return load_dataset(path, config, cache_dir=tmp_path / "cache", **options)

    def make(location: str, revision: str) -> Path:
        folder = tmp_path / location.replace("/", "--") / revision
        folder.mkdir(parents=True)
        folders[location, revision] = folder
        return folder

    monkeypatch.setattr(datasets, "load_dataset", load_locally)
    return make


def random_lists(users: int = 40, items: int = 30, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.choice(items, size=rng.integers(4, 12), replace=False).tolist() for _ in range(users)]


def pairs(interactions: Interactions) -> set[tuple[str, str]]:
    ids = interactions.user_ids(interactions.user), interactions.item_ids(interactions.item)
    return {(str(user), str(item)) for user, item in zip(*ids, strict=True)}


def test_lines_by_hand() -> None:
    table = read_lines(["7 30 10", "", "12 10", "8", "7  20"])
    # User 8 has no items and does not occur; the codes follow the numbers, so 7 is 0 and 12 is 1.
    assert (table.num_users, table.num_items) == (2, 3)
    assert table.user.tolist() == [0, 0, 1, 0]
    assert table.item_ids(table.item).tolist() == [30, 10, 10, 20]
    assert table.timestamp is None and table.rating is None


def test_ids_that_are_no_numbers_stay_text() -> None:
    table = read_lines(["ann 01 1", "bob 01"])
    assert sorted(pairs(table)) == [("ann", "01"), ("ann", "1"), ("bob", "01")]
    long = str(10**20)
    assert pairs(read_lines([f"1 {long} 2", "2 3"])) == {("1", long), ("1", "2"), ("2", "3")}


def test_lists_take_the_position_for_the_user() -> None:
    table = read_lists(["[[5, 7], [], [5]]", "[[], [9], [7]]"])
    assert pairs(table) == {("0", "5"), ("0", "7"), ("1", "9"), ("2", "5"), ("2", "7")}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("0 5 7", "document 1 of layout 'lists' is not JSON"),
        ('{"0": [1]}', "must be a list of lists"),
        ("[1, 2]", "one"),
    ],
)
def test_what_is_no_list_of_lists_is_named(document: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_lists(["[[1], [2]]", document])


def test_adjacency_text_loads_from_the_hub(mirror: Callable[[str, str], Path]) -> None:
    source = REGISTRY["gowalla_lightgcn"]
    folder = mirror(source.location, source.revision)
    lists = random_lists()
    train = [f"{user} {' '.join(map(str, items[:-1]))}" for user, items in enumerate(lists)]
    test = [f"{user} {items[-1]}" for user, items in enumerate(lists)]
    (folder / "train.txt").write_text("\n".join(train) + "\n")
    (folder / "test.txt").write_text("\n".join(test))
    (folder / "user_list.txt").write_text("org_id remap_id\n")
    wanted = {(str(user), str(item)) for user, items in enumerate(lists) for item in items}
    assert pairs(source.rows()) == wanted
    domain = source.domain()
    assert domain.split == "leave-last-out" and domain.provenance["revision"] == source.revision
    assert "30858" not in domain.provenance["hygiene"] and "29858 are stated" in domain.provenance["hygiene"]


def test_json_lists_load_from_the_hub(mirror: Callable[[str, str], Path]) -> None:
    source = REGISTRY["movielens_1m_lists"]
    folder = mirror(source.location, source.revision)
    lists = random_lists()
    parts = {
        "train": [items[:-2] for items in lists],
        "validation": [items[-2:-1] for items in lists],
        "test": [items[-1:] for items in lists],
    }
    for name, found in parts.items():
        (folder / f"{name}_data.json").write_text(json.dumps(found))
    assert pairs(source.rows()) == {(str(user), str(item)) for user, items in enumerate(lists) for item in items}
    assert len(source.domain().test) > 0


def ratings(rows: int = 4000) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    item = rng.integers(0, 60, rows)
    return pl.DataFrame(
        {
            "user_id": [f"A{user}" for user in rng.integers(0, 50, rows)],
            # Ids as of books: digits only, with leading zeros.
            "parent_asin": [f"{number:010d}" for number in item],
            "rating": rng.integers(1, 6, rows).astype(np.float64),
            "timestamp": 1_600_000_000_123 + 1_000_000 * np.arange(rows),
        }
    )


def test_milliseconds_and_ids_with_zeros_survive_csv(mirror: Callable[[str, str], Path]) -> None:
    source = REGISTRY["amazon_2023_video_games"]
    folder = mirror(source.location, source.revision) / "benchmark/5core/rating_only"
    folder.mkdir(parents=True)
    ratings().write_csv(folder / "Video_Games.csv")
    interactions = source.interactions()
    assert interactions.timestamp.min() == 1_600_000_000.123
    assert interactions.timestamp.max() == 1_600_000_000.123 + 3_999_000
    assert interactions.item_ids([0])[0] == "0000000000" and interactions.num_items == 60
    assert source.domain().split == "time"


def test_items_of_another_commit_describe_the_domain(mirror: Callable[[str, str], Path]) -> None:
    source = REGISTRY["amazon_2023_musical_instruments"]
    folder = mirror(source.location, source.revision) / "benchmark/5core/rating_only"
    folder.mkdir(parents=True)
    ratings().write_csv(folder / "Musical_Instruments.csv")
    items = mirror(source.items.location, source.items.revision) / "raw_meta_Musical_Instruments"
    items.mkdir()
    for part, codes in enumerate((range(0, 30), range(30, 50))):
        table = {
            "parent_asin": [f"{code:010d}" for code in codes],
            "title": [f"{'guitar' if code % 2 else 'drum'} number {code}" for code in codes],
            "categories": [["Instruments", "Strings" if code % 2 else "Percussion"] for code in codes],
            "price": ["1"] * len(codes),
        }
        pl.DataFrame(table).write_parquet(items / f"full-0000{part}-of-00002.parquet")
    domain = source.domain()
    names = domain.train.item_ids(np.arange(domain.num_items))
    code = {str(name): index for index, name in enumerate(names)}
    assert domain.item_titles[code["0000000031"]] == "guitar number 31"
    assert domain.item_titles[code["0000000055"]] == ""
    content = domain.item_content
    assert content.shape == (60, 32) and not content[code["0000000055"]].any()
    guitar, drum = content[code["0000000031"]], content[code["0000000030"]]
    assert guitar @ content[code["0000000033"]] > guitar @ drum


def test_parts_and_configurations_load_from_the_hub(mirror: Callable[[str, str], Path]) -> None:
    source = REGISTRY["movielens_titled"]
    folder = mirror(source.location, source.revision)
    frame = ratings().rename({"parent_asin": "movie_id"}).drop("timestamp").with_columns(title=pl.lit("a film"))
    frame = frame.with_columns(genres=pl.lit("Comedy|Drama"))
    frame.head(3000).write_parquet(folder / "train.parquet")
    frame.tail(1000).write_parquet(folder / "validation.parquet")
    files = "".join(f"  - split: {part}\n    path: {part}.parquet\n" for part in ("train", "validation"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    assert len(source.rows()) == 4000
    domain = source.domain()
    assert domain.split == "leave-last-out" and set(domain.item_titles) == {"a film"}
    np.testing.assert_allclose(domain.item_content @ domain.item_content[0], 1.0, atol=1e-6)


def test_a_local_folder_takes_the_same_way(tmp_path: Path) -> None:
    lists = random_lists()
    (tmp_path / "part.json").write_text(json.dumps(lists))
    (tmp_path / "part.txt").write_text("\n".join(f"{u} {' '.join(map(str, items))}" for u, items in enumerate(lists)))
    options = {"name": "local", "location": str(tmp_path), "timestamps": "none"}
    read = [
        PublicSource(files=("part.json",), layout="lists", **options).interactions(),
        PublicSource(files=("part.txt",), layout="lines", **options).interactions(),
    ]
    assert pairs(read[0]) == pairs(read[1])


def test_a_tsv_file_loads(tmp_path: Path) -> None:
    ratings().write_csv(tmp_path / "log.tsv", separator="\t")
    domain = load_public(tmp_path / "log.tsv", columns={"item": "parent_asin"})
    assert (domain.num_users, domain.num_items) == (50, 60)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.xls").write_text("")
    with pytest.raises(InvalidArgumentError, match=r"log.xls' has suffix '.xls'; pass a folder or a .parquet"):
        load_public(tmp_path / "log.xls")
    with (
        pytest.raises(InvalidArgumentError, match=r"has suffix '.xls'"),
        Table(location=str(tmp_path / "log.xls")).open(),
    ):
        pass
    with pytest.raises(
        InvalidArgumentError, match=r"`revision` of hub data set 'a/b'.*HfApi\(\).dataset_info\('a/b'\).sha"
    ):
        Table(location="a/b")
    ratings().write_parquet(tmp_path / "log.parquet")
    with pytest.raises(InteractionsError, match="no item column"):
        PublicSource(name="log", location=str(tmp_path / "log.parquet")).rows()
    items = ItemTable(location=str(tmp_path / "log.parquet"))
    with pytest.raises(InvalidArgumentError, match=r"has no columns \['item_id', 'title'\]"):
        items.read()


def test_a_pinned_data_set_is_never_a_folder_that_happens_to_lie_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner/data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_source("owner/data").is_local
    assert not find_source("owner/data", revision=REVISION).is_local


def test_content_is_identified_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("a")
    # SHA-256 of the letter a.
    letter = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert Table(location=str(path)).content_hash() == letter
    folder = Table(location=str(tmp_path))
    before = folder.content_hash()
    assert Table(location=str(tmp_path), files=("log.csv",)).content_hash() == before
    path.rename(tmp_path / "other.csv")
    renamed = folder.content_hash()
    (tmp_path / "other.csv").write_text("b")
    assert len({before, renamed, folder.content_hash()}) == 3
    assert Table(location="owner/data", revision=REVISION).content_hash() == f"owner/data@{REVISION}"
