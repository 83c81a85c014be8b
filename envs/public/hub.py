"""What is registered of the Hugging Face hub: pinned commits, columns, terms.

Every revision is a commit that the hub's own pages list for that data set. Columns and layouts are from the data set's
card, files or loader at that commit where `verified` says so, and second-hand otherwise.
"""

from __future__ import annotations

from typing import Any

from envs.public.sources import PublicSource
from envs.public.tables import ItemTable

_GROUPLENS = "GroupLens terms of use (research; no redistribution, no commercial use without permission)"
_MOVIELENS = "Harper, F. M., Konstan, J. A. (2015). The MovieLens Datasets. ACM TiiS 5(4). doi:10.1145/2827872"
_UNSTATED = "not stated by the repository; {origin}"
_AMAZON = "Amazon review data is for research"
_LIGHTGCN = "He, X. et al. (2020). LightGCN. SIGIR. arXiv:2002.02126"
_ULTRAGCN = "Mao, K. et al. (2021). UltraGCN. CIKM. arXiv:2110.15114"
_SIMPLEX = "Mao, K. et al. (2021). SimpleX. CIKM. arXiv:2109.12613"


def _movielens() -> list[PublicSource]:
    ratings, tagged = "AiresPucrs/movielens-user-ratings", "ashraq/movielens_ratings"
    pinned = "7b90c1c90682e23d2fabbc88e47ea27aab309896"
    return [
        PublicSource(
            name="movielens_latest_small",
            location=ratings,
            revision="f3d673361aeae4de0f69f255494ab9b2191f040f",
            columns={"user": "userId", "item": "movieId", "timestamp": "timestamp", "rating": "rating"},
            items=ItemTable(
                location="AiresPucrs/movielens-movies",
                revision="3aec3975916bd198dc06c045e33143a5e4ec05a1",
                item="movieId",
            ),
            counts={"interactions": 100_836},
            licence=_GROUPLENS,
            source=f"https://huggingface.co/datasets/{ratings}",
            citation=_MOVIELENS,
            verified="columns and rows from both cards at these commits",
        ),
        PublicSource(
            name="movielens_titled",
            location=tagged,
            dataset_split="train+validation",
            revision=pinned,
            columns={"user": "user_id", "item": "movie_id", "timestamp": None, "rating": "rating"},
            timestamps="none",
            items=ItemTable(location=tagged, dataset_split="train+validation", revision=pinned, item="movie_id"),
            counts={"interactions": 990_467},
            licence=_UNSTATED.format(origin=_GROUPLENS),
            source=f"https://huggingface.co/datasets/{tagged}",
            citation=_MOVIELENS,
            verified="columns and rows from dataset_infos.json at this commit",
        ),
    ]


def _reczoo(
    name: str, repository: str, revision: str, counts: tuple[int, ...], *, lists: bool = False, **about: Any
) -> PublicSource:
    """Describe a benchmark of RecZoo: its parts are read as one, since this package splits for itself."""
    return PublicSource(
        name=name,
        location=f"reczoo/{repository}",
        files=("train_data.json", "validation_data.json", "test_data.json") if lists else ("train.txt", "test.txt"),
        revision=revision,
        layout="lists" if lists else "lines",
        timestamps="none",
        counts=dict(zip(("users", "items", "interactions"), counts, strict=False)),
        source=f"https://huggingface.co/datasets/reczoo/{repository}",
        **about,
    )


def _amazon_2023(category: str, counts: dict[str, int], items: ItemTable | None = None) -> PublicSource:
    """Describe one category of the 5-core ratings of Amazon Reviews 2023."""
    repository = "McAuley-Lab/Amazon-Reviews-2023"
    return PublicSource(
        name=f"amazon_2023_{category.lower()}",
        location=repository,
        files=(f"benchmark/5core/rating_only/{category}.csv",),
        revision="2aa726ef444e72c6a1364c4baa0bcdfb1de55db6",
        # Without types, ids that look like numbers lose their leading zeros.
        features={"user_id": "string", "parent_asin": "string", "rating": "float64", "timestamp": "int64"},
        columns={"user": "user_id", "item": "parent_asin", "timestamp": "timestamp", "rating": "rating"},
        time_unit="ms",
        items=items,
        counts=counts,
        licence=_UNSTATED.format(origin=_AMAZON),
        source=f"https://huggingface.co/datasets/{repository}",
        citation="Hou, Y. et al. (2024). Bridging Language and Items for Retrieval. arXiv:2403.03952",
        verified="path and milliseconds from the repository's loader and card, columns second-hand",
    )


_INSTRUMENTS = ItemTable(
    location="McAuley-Lab/Amazon-Reviews-2023",
    files=tuple(f"raw_meta_Musical_Instruments/full-0000{part}-of-00002.parquet" for part in (0, 1)),
    revision="f9ed2598dc7859533960d426608d3809bd8efec2",
    item="parent_asin",
)

HUB: tuple[PublicSource, ...] = (
    *_movielens(),
    _reczoo(
        "movielens_1m_lists",
        "Movielens1M_m1",
        "1186acccb5a9d3efb310a9dd842a65cc4b666c60",
        (),
        lists=True,
        licence=_UNSTATED.format(origin=_GROUPLENS),
        citation=_MOVIELENS,
        verified="layout and files from the card at this commit",
    ),
    _reczoo(
        "gowalla_lightgcn",
        "Gowalla_m1",
        "b2dcc4972912b4d7e5a164fd694020f3cca92964",
        (29_858, 40_981, 1_027_370),
        licence=_UNSTATED.format(origin="SNAP, which has the check-ins, states none"),
        citation=_LIGHTGCN,
        verified="files from the hub at this commit, layout and counts second-hand",
    ),
    _reczoo(
        "yelp18_lightgcn",
        "Yelp18_m1",
        "8c6e8b56e5a674b3b60ed859a617cb001b8280d0",
        (31_668, 38_048, 1_561_406),
        licence=_UNSTATED.format(origin="Yelp Dataset terms of use (academic, no redistribution)"),
        citation=_LIGHTGCN,
        verified="layout and counts from the card, files from the hub at this commit",
    ),
    _reczoo(
        "amazon_books_lightgcn",
        "AmazonBooks_m1",
        "69008aca172fea74b441667e759213a4c0591a4e",
        (52_643, 91_599, 2_984_108),
        licence=_UNSTATED.format(origin=_AMAZON),
        citation=_LIGHTGCN,
        verified="layout from the card, files from the hub at this commit, counts second-hand",
    ),
    _reczoo(
        "amazon_cds_bgcf",
        "AmazonCDs_m1",
        "ff4ac583bc5399b59234278fa5398b86061d0b61",
        (43_169, 35_648, 777_426),
        licence=_UNSTATED.format(origin=_AMAZON),
        citation=_SIMPLEX,
        verified="layout from the card and the hub's viewer, files from the hub at this commit, counts second-hand",
    ),
    _reczoo(
        "amazon_movies_bgcf",
        "AmazonMovies_m1",
        "d3a792d4a67a919fa5a80eee00a30cc0ff8da97f",
        (44_439, 25_047, 1_070_860),
        licence=_UNSTATED.format(origin=_AMAZON),
        citation=_SIMPLEX,
        verified="files from the hub at this commit, layout and counts second-hand",
    ),
    _reczoo(
        "amazon_beauty_bgcf",
        "AmazonBeauty_m1",
        "98ca0545ccd9dbf0533eceb7d789c5fe91582e82",
        (7_068, 3_570, 79_506),
        licence=_UNSTATED.format(origin=_AMAZON),
        citation=_SIMPLEX,
        verified="layout from the card, files from the hub at this commit, counts second-hand",
    ),
    _reczoo(
        "amazon_electronics_ultragcn",
        "AmazonElectronics_m1",
        "d6951f1a171149ebb7729505984bbed2d4ab653a",
        (1_435, 1_522, 35_931),
        lists=True,
        licence=_UNSTATED.format(origin=_AMAZON),
        citation=_ULTRAGCN,
        verified="layout from the card, files from the hub at this commit, counts second-hand",
    ),
    _reczoo(
        "citeulike_a",
        "CiteUlikeA_m1",
        "58b9cc7c3b1cd185cce221e0f32b9cc8406dd9fe",
        (),
        licence=_UNSTATED.format(origin="CiteULike is gone"),
        citation=_SIMPLEX,
        verified="layout from the card, files from the hub at this commit",
    ),
    _amazon_2023("Video_Games", {"users": 94_762, "items": 25_612, "interactions": 814_586}),
    _amazon_2023("Baby_Products", {"users": 152_296, "items": 35_504, "interactions": 943_073}),
    _amazon_2023("Office_Products", {"users": 223_213, "items": 77_551, "interactions": 1_243_186}),
    _amazon_2023("Musical_Instruments", {}, _INSTRUMENTS),
    _amazon_2023("Industrial_and_Scientific", {}),
    _amazon_2023("Software", {}),
    _amazon_2023("Magazine_Subscriptions", {}),
)
"""Registered hub data sets."""
