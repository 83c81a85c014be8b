"""Public domains: one registry over Hugging Face `datasets` for hub ids, local folders and files."""

from envs.public.registry import BUNDLED, REGISTRY, find_source, load_bundled, load_folder, load_public
from envs.public.slices import crop, draw_slice
from envs.public.sources import PublicSource

__all__ = [
    "BUNDLED",
    "REGISTRY",
    "PublicSource",
    "crop",
    "draw_slice",
    "find_source",
    "load_bundled",
    "load_folder",
    "load_public",
]
