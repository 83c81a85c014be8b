"""Public domains: the bundled one, folders, files and hub ids go through one registry, offline and without litter."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import polars as pl
import pytest

from envs.domains import make_domain
from envs.public import BUNDLED, REGISTRY, PublicSource, draw_slice, find_source, load_bundled, load_folder, load_public
from envs.simulated import SimulatedPrior, simulate
from metalearn.errors import InteractionsError, InvalidArgumentError
from metalearn.interactions import Interactions


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments, **options):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def table(rows: int = 3000, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, 60, rows),
            "item_id": rng.integers(0, 90, rows) * 10,
            "timestamp": np.arange(rows) + 1_600_000_000,
            "rating": rng.integers(0, 6, rows).astype(np.float32),
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    table().write_parquet(tmp_path / "timed.parquet")
    table(seed=1).write_csv(tmp_path / "ordered.csv")
    table(seed=2).sort("user_id", "item_id").write_parquet(tmp_path / "unordered.parquet")
    titles = pl.DataFrame({"item_id": [0, 10], "title": ["zero ", None]})
    titles.write_parquet(tmp_path / "timed.items.parquet")
    manifest = {
        "datasets": [
            {"name": "timed", "role": "meta-training", "has_timestamps": "true timestamps", "licence": "MIT"},
            {"name": "ordered", "role": "validation", "has_timestamps": "order only", "min_rating": 4},
            {"name": "unordered", "role": "meta-training", "has_timestamps": "none"},
            {"name": "elsewhere", "role": "meta-training"},
        ]
    }
    (tmp_path / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")
    return tmp_path


def test_the_bundled_domain_loads_offline_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    domain = load_bundled()
    assert domain.split == "time" and domain.name == "uci_online_retail"
    assert (domain.num_users, domain.num_items) == (3890, 3607)
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (221393, 17616, 14767)
    assert "INFLATABLE POLITICAL GLOBE" in domain.item_titles.tolist()
    assert domain.provenance["licence"] == "CC BY 4.0" and "10.24432/C5BW33" in domain.provenance["credit"]
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_the_bundled_files_are_as_their_readme_says() -> None:
    readme = (Path(BUNDLED.location) / "README.md").read_text(encoding="utf-8")
    assert "license: cc-by-4.0" in readme and "Creative Commons Attribution 4.0" in readme
    interactions = BUNDLED.interactions()
    assert f"{len(interactions):,}" in readme
    assert f"{interactions.num_users:,} users, {interactions.num_items:,} items" in readme
    assert f"{len(interactions.deduplicate()):,} distinct pairs" in readme


def test_a_folder_is_described_without_reading_it(folder: Path) -> None:
    sources = load_folder(folder)
    assert list(sources) == ["ordered", "timed", "unordered"]
    assert [source.timestamps for source in sources.values()] == ["order", "real", "none"]
    assert list(load_folder(folder, role="meta-training")) == ["timed", "unordered"]
    assert list(load_folder(folder, role="unheard of")) == []
    assert sources["timed"].licence == "MIT" and sources["ordered"].licence == "not stated"


def test_what_times_mean_decides_the_split(folder: Path) -> None:
    domains = {name: source.domain() for name, source in load_folder(folder).items()}
    assert {name: domain.split for name, domain in domains.items()} == {
        "timed": "time",
        "ordered": "leave-last-out",
        "unordered": "leave-last-out",
    }
    assert domains["ordered"].train.timestamp is None
    assert domains["timed"].item_titles[:3].tolist() == ["zero", "", ""]
    assert domains["unordered"].item_titles is None
    # The rows are sorted by item, which must not decide what is left out.
    last = domains["unordered"].test
    assert last.item.min() < domains["unordered"].num_items / 3


def test_order_only_times_order_the_rows(tmp_path: Path) -> None:
    frame = table()
    frame.sample(fraction=1.0, shuffle=True, seed=0).write_parquet(tmp_path / "shuffled.parquet")
    source = PublicSource(name="shuffled", location=str(tmp_path / "shuffled.parquet"), timestamps="order")
    interactions = source.interactions()
    kept = frame.filter(pl.col("rating") > 0)
    assert interactions.timestamp is None
    assert interactions.item_ids(interactions.item).tolist() == kept["item_id"].to_list()


def test_ratings_decide_what_is_a_positive(folder: Path) -> None:
    sources = load_folder(folder)
    assert len(sources["timed"].interactions()) == (table()["rating"] > 0).sum()
    assert len(sources["ordered"].interactions()) == (table(seed=1)["rating"] >= 4).sum()


def test_a_file_or_folder_loads_by_its_path(folder: Path, tmp_path: Path) -> None:
    by_path = load_public(folder / "timed.parquet")
    by_folder = load_folder(folder)["timed"].domain()
    assert by_path.name == "timed"
    np.testing.assert_array_equal(by_path.train.item, by_folder.train.item)
    configured = tmp_path / "configured"
    configured.mkdir()
    table().rename({"user_id": "who", "item_id": "what"}).write_parquet(configured / "log.parquet")
    table(seed=1).write_parquet(configured / "other.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("log", "other"))
    (configured / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    domain = load_public(configured, config="log", columns={"user": "who", "item": "what"})
    np.testing.assert_array_equal(domain.train.item, by_path.train.item)
    with pytest.raises(InteractionsError, match="user"):
        load_public(configured, config="log")


def test_a_hub_id_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(location, config, **options):
        calls.append((location, config, options))
        if location == source.location:
            frame = table().rename({"user_id": "userId", "item_id": "movieId"})
        else:
            frame = pl.DataFrame(
                {"movieId": [0, 10], "title": ["Zero (1995)", "Ten"], "genres": ["Drama", "Comedy|War"]}
            )
        return datasets.Dataset.from_dict(frame.to_dict(as_series=False))

    source = REGISTRY["movielens_latest_small"]
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    domain = load_public("movielens_latest_small")
    assert calls == [
        (source.location, None, {"split": "train", "revision": source.revision}),
        (source.items.location, None, {"split": "train", "revision": source.items.revision}),
    ]
    assert domain.split == "time" and domain.provenance["revision"] == source.revision
    assert domain.item_titles[:3].tolist() == ["Zero (1995)", "Ten", ""]
    assert domain.item_content[:3].any(axis=1).tolist() == [True, True, False]
    assert find_source("owner/data", revision="abc").name == "data"
    with pytest.raises(InvalidArgumentError, match="`revision` of hub data set 'owner/data' is missing"):
        load_public("owner/data")


def test_every_registered_source_states_its_terms() -> None:
    for name, source in REGISTRY.items():
        assert source.name == name
        assert source.licence != "not stated" and source.citation and source.source and source.verified
        lines = source.describe()
        assert lines[0] == name and f"  licence: {source.licence}" in lines and f"  cite: {source.citation}" in lines


def test_at_least_twelve_hub_data_sets_are_registered_and_pinned() -> None:
    hub = [source for source in REGISTRY.values() if not source.is_local]
    assert len(hub) >= 12
    tables = [*hub, *(source.items for source in hub if source.items is not None)]
    for table in tables:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", table.location)
        assert re.fullmatch("[0-9a-f]{40}", table.revision), table.location
        assert table.dataset_split in ("train", "train+validation")
    assert len({(source.location, source.files) for source in hub}) == len(hub)


def test_the_command_line_shows_the_terms() -> None:
    def show(*names: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "envs.public", *names], capture_output=True, text=True)

    shown = show("gowalla_lightgcn", "uci_online_retail")
    source = REGISTRY["gowalla_lightgcn"]
    assert f"  location: {source.location}@{source.revision}" in shown.stdout
    assert "  licence: CC BY 4.0" in shown.stdout and "doi:10.24432/C5BW33" in shown.stdout
    assert show("gowala").stderr.startswith("error: `name_or_path` 'gowala' is neither")


def test_k_core_and_sizes_are_parameters(folder: Path) -> None:
    source = load_folder(folder)["timed"]
    whole = source.domain()
    core = source.domain(min_user_interactions=20, min_item_interactions=13)
    assert np.bincount(whole.train.user).min() < 20 and np.bincount(whole.train.item).min() < 13
    assert np.bincount(core.train.user).min() >= 20 and np.bincount(core.train.item).min() >= 13
    small = source.domain(max_users=48, max_items=40, seed=1)
    again, other = (source.domain(max_users=48, max_items=40, seed=seed) for seed in (1, 2))
    assert small.num_users <= 48 and small.num_items == 40 and small.split == "time"
    np.testing.assert_array_equal(small.train.user, again.train.user)
    users = [set(domain.train.user_ids(domain.train.user).tolist()) for domain in (small, other)]
    assert users[0] != users[1]
    popular = np.argsort(-np.bincount(source.interactions().item), kind="stable")[:30]
    assert set(source.interactions().item_ids(popular)) <= set(small.train.item_ids(small.train.item))
    by_path = load_public(folder / "timed.parquet", max_users=48, max_items=40, seed=1)
    np.testing.assert_array_equal(small.train.user, by_path.train.user)
    with pytest.raises(InvalidArgumentError, match="`max_items` must be at least 2 or None, got 1"):
        source.domain(max_items=1)


def test_progress_bars_are_left_as_they_were(folder: Path) -> None:
    shown = not datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    load_folder(folder)["timed"].interactions()
    assert not datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()


@pytest.mark.parametrize("name", ["nowhere.parquet", "uci_online_retial", "a/b/c"])
def test_what_is_not_there_is_named(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name}.*uci_online_retail"):
        load_public(name)


def test_bad_folders_are_named(folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="`directory`"):
        load_folder(folder / "missing")
    table().write_csv(folder / "timed.csv")
    with pytest.raises(InvalidArgumentError, match="two files for domain 'timed'"):
        load_folder(folder)
    (folder / "MANIFEST.json").write_text('{"datasets": [{"name": "timed", "has_timestamps": "maybe"}]}')
    with pytest.raises(InvalidArgumentError, match="`has_timestamps` of 'timed'"):
        load_folder(folder)
    (folder / "MANIFEST.json").write_text('["timed"]')
    with pytest.raises(InvalidArgumentError, match="must be JSON like"):
        load_folder(folder)
    (folder / "notes.txt").write_text("text")
    with pytest.raises(InvalidArgumentError, match=r"suffix '.txt'.*\.parquet or \.csv or \.tsv"):
        load_public(folder / "notes.txt")
    with pytest.raises(InvalidArgumentError, match="is registered"):
        find_source("uci_online_retail", revision="abc")


@pytest.fixture(scope="module")
def log() -> Interactions:
    prior = SimulatedPrior(users=(600, 600), items=(400, 400), history=(25.0, 25.0), untimed=0.0)
    return simulate(prior, seed=0)


def test_slices_are_small_enough_large_enough_and_varied(log: Interactions) -> None:
    rng = np.random.default_rng(0)
    slices = [draw_slice(log, max_users=300, max_items=200, key=rng) for _ in range(40)]
    for piece in slices:
        assert piece.num_users <= 300 and 32 <= piece.num_items <= 200
        assert (np.bincount(piece.user) >= 3).sum() >= 48
        assert set(piece.item.tolist()) == set(range(piece.num_items))
    densities = [len(piece) / piece.num_users / piece.num_items for piece in slices]
    assert max(densities) > 3 * min(densities)
    assert len({piece.num_users for piece in slices}) > 20


def test_slices_are_parts_of_the_domain_and_repeat_by_key(log: Interactions) -> None:
    piece, again = (draw_slice(log, max_users=200, max_items=150, key=np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(piece.item, again.item)
    rows, whole = (
        set(zip(part.user_ids(part.user), part.item_ids(part.item), part.timestamp, strict=True))
        for part in (piece, log)
    )
    assert len(rows) == len(piece) and rows <= whole


def test_slices_of_sparse_and_small_domains_still_split() -> None:
    prior = SimulatedPrior(users=(400, 400), items=(1000, 1000), history=(6.0, 6.0), activity_std=(0.3, 0.3))
    sparse = simulate(prior, seed=1)
    rng = np.random.default_rng(0)
    for _ in range(5):
        piece = draw_slice(sparse, max_users=256, max_items=256, key=rng)
        assert len(make_domain(piece, name="slice", split="leave-last-out").test) > 0


def test_impossible_slices_are_an_error() -> None:
    tiny = Interactions.from_arrays(np.arange(100) % 10, np.arange(100) // 10)
    with pytest.raises(InvalidArgumentError, match="no slice of `interactions`"):
        draw_slice(tiny, max_users=100, max_items=100, key=np.random.default_rng(0))
    with pytest.raises(InvalidArgumentError, match="`max_users` must be at least 48, got 10"):
        draw_slice(tiny, max_users=10, max_items=100, key=np.random.default_rng(0))
