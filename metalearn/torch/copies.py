"""Copies of nested values with tensors in them: made into memory that is held, and put back in place."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from metalearn.torch.sharding import local

_PLAIN = frozenset({int, float, bool, str, bytes, type(None)})
Pairs = list[tuple[torch.Tensor, torch.Tensor]]
"""Copies to make: (into, from)."""
PIECE_BYTES = 2**22
"""What stays in a processor's cache between a copy and a look at it."""
NUM_THREADS = 2
"""That copy large tables: one does not take all that memory gives."""
PIECES_TO_SHARE = 16
"""From so many on, a second thread saves more than it takes to start."""


class Held(NamedTuple):
    """A tensor of a snapshot."""

    tensor: torch.Tensor
    device: str
    """of the tensor that was copied"""


def hold(value: Any, former: Any, pairs: Pairs, *, on_host: bool) -> Any:
    """Returns a copy of a live value, of dicts, lists, tuples and tensors, all else copied deeply.

    Args:
      value: live.
      former: copy whose memory is used again where it fits; None allocates.
      pairs: what is still to be copied is appended.
      on_host: whether memory is the host's, pinned for CUDA tensors, or lies beside each tensor.
    """
    if isinstance(value, torch.Tensor):
        value = local(value)
        if value.layout is not torch.strided:
            return Held(value.detach().clone(), str(value.device))
        device = torch.device("cpu") if on_host else value.device
        into = former.tensor if isinstance(former, Held) else None
        if into is None or not _alike(into, value) or into.device != device:
            pinned = value.is_cuda and device.type == "cpu"
            into = torch.empty_like(value, device=device, pin_memory=pinned, requires_grad=False)
        pairs.append((into, value.detach()))
        return Held(into, str(value.device))
    if type(value) in (dict, OrderedDict):
        former = former if isinstance(former, dict) else {}
        return {key: hold(item, former.get(key), pairs, on_host=on_host) for key, item in value.items()}
    if type(value) in (list, tuple):
        if _PLAIN.issuperset(map(type, value)):
            return copy.copy(value)
        matching = former if type(former) is type(value) and len(former) == len(value) else [None] * len(value)
        return type(value)([hold(v, f, pairs, on_host=on_host) for v, f in zip(value, matching, strict=True)])
    return value if type(value) in _PLAIN else copy.deepcopy(value)


def put(live: Any, held: Any, pairs: Pairs) -> Any:
    """Returns what stands for a held value in the run: the live one where it can be copied into, else a copy.

    Args:
      live: what is there now; None if nothing is.
      held: from `hold`.
      pairs: what is still to be copied is appended.
    """
    if isinstance(held, Held):
        if isinstance(live, torch.Tensor):
            part = local(live)
            if _alike(part, held.tensor) and _writable(part):
                pairs.append((part.detach(), held.tensor))
                return live
        return held.tensor.to(held.device, copy=True)
    if isinstance(held, dict):
        into = live if isinstance(live, dict) else {}
        put_all(into, held, pairs)
        return into
    if type(held) in (list, tuple):
        if _PLAIN.issuperset(map(type, held)):
            return copy.copy(held)
        return type(held)([put(None, item, pairs) for item in held])
    return held if type(held) in _PLAIN else copy.deepcopy(held)


def put_all(live: dict[Any, Any], held: dict[Any, Any], pairs: Pairs) -> None:
    """Makes a live dict hold what a held one does, and nothing else."""
    for key in [key for key in live if key not in held]:
        del live[key]
    for key, value in held.items():
        live[key] = put(live.get(key), value, pairs)


def fresh(held: Any) -> Any:
    """Returns a copy of a held value, tensors on the device that they came from."""
    return put(None, held, [])


def by_reference(value: Any) -> Any:
    """Returns a live value in the form of a held one, sharing its memory."""
    if isinstance(value, torch.Tensor):
        return Held(local(value).detach(), str(value.device))
    if type(value) in (dict, OrderedDict):
        return {key: by_reference(item) for key, item in value.items()}
    return type(value)(map(by_reference, value)) if type(value) in (list, tuple) else value


def copy_pairs(pairs: Pairs) -> None:
    """Makes the copies, and waits for them."""
    if not pairs:
        return
    into, values = zip(*pairs, strict=True)
    torch._foreach_copy_(into, values, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
    _wait(pairs)


def copy_looking(pairs: Pairs) -> bool:
    """Makes the copies, waits for them, and returns whether everything in them is finite.

    On the host piece by piece, so that memory is read once for both, and in several threads if there is much to copy:
    training waits for it, so that what it does not use of the processor is idle.
    """
    pieces = [piece for pair in pairs for piece in _pieces(*pair)]
    on_host = all(tensor.device.type == "cpu" for pair in pairs for tensor in pair)
    if not on_host or len(pieces) - len(pairs) < PIECES_TO_SHARE or torch.get_num_threads() > 1:
        finite = all_finite(_copied(pieces))
    else:
        inference = torch.is_inference_mode_enabled()  # of each thread its own, unlike the number above

        def copy_share(share: Pairs) -> bool:
            with torch.inference_mode(inference):
                return all_finite(_copied(share))

        with ThreadPoolExecutor(NUM_THREADS, "metalearn-copies") as pool:
            finite = all(list(pool.map(copy_share, [pieces[start::NUM_THREADS] for start in range(NUM_THREADS)])))
    _wait(pairs)
    return finite


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Returns whether every floating-point number in dense tensors is finite; other tensors are passed over."""
    looked: list[torch.Tensor] = []
    sums: defaultdict[torch.device, list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.layout is torch.strided and (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel():
            looked.append(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
            sums[tensor.device].append(looked[-1].sum().float())
    # A sum is not finite if a term is not, and takes a fiftieth of the time of `isfinite`. The sum of large finite
    # numbers may overflow too, so then they are looked at one by one.
    if all(torch.stack(row).isfinite().all() for row in sums.values()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in looked)


def _pieces(into: torch.Tensor, value: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Returns a copy to make as several that fit into a cache, if it is within the host's memory."""
    if not (into.device.type == value.device.type == "cpu" and into.is_contiguous() and value.is_contiguous()):
        return [(into, value)]
    length = PIECE_BYTES // value.element_size()
    return zip(into.view(-1).split(length), value.view(-1).split(length), strict=True)


def _copied(pairs: Pairs) -> Iterator[torch.Tensor]:
    """Makes copies, and yields what was copied right after."""
    for into, value in pairs:
        into.copy_(value, non_blocking=True)
        yield into if into.device.type == value.device.type else value


def _wait(pairs: Pairs) -> None:
    """Waits for copies from and to accelerators."""
    for device in {tensor.device for pair in pairs for tensor in pair if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def num_bytes(tree: Any) -> int:
    """Returns the bytes that all tensors in a live or held value take in this process."""
    if isinstance(tree, Held):
        return num_bytes(tree.tensor)
    if isinstance(tree, torch.Tensor):
        return local(tree).nbytes if tree.layout is torch.strided else 0
    if isinstance(tree, dict):
        return sum(map(num_bytes, tree.values()))
    is_sequence = type(tree) in (list, tuple) and not _PLAIN.issuperset(map(type, tree))
    return sum(map(num_bytes, tree)) if is_sequence else 0


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.layout == other.layout


def _writable(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor can be written into: it is dense and was not expanded."""
    if tensor.layout is not torch.strided:
        return False
    return not any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
