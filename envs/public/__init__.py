"""Public domains: one registry over Hugging Face `datasets` for hub ids, local folders and files."""

from envs.public.hygiene import Finding, HygieneReport, check_hygiene
from envs.public.prepared import CacheStatistics, DomainCache
from envs.public.registry import BUNDLED, REGISTRY, find_source, load_bundled, load_folder, load_public
from envs.public.slices import crop, draw_slice
from envs.public.sources import PublicSource
from envs.public.tables import ItemTable

__all__ = [
    "BUNDLED",
    "REGISTRY",
    "CacheStatistics",
    "DomainCache",
    "Finding",
    "HygieneReport",
    "ItemTable",
    "PublicSource",
    "check_hygiene",
    "crop",
    "draw_slice",
    "find_source",
    "load_bundled",
    "load_folder",
    "load_public",
]
