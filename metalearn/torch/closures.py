"""Closures: gradients that are computed while the optimizer steps, not before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def on_gradients(
    act: Callable[[], object], arguments: tuple[Any, ...], keywords: dict[str, Any], *, every: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Acts on gradients from a step pre-hook: now, or if the step was given a closure, once that has computed them.

    The closure is called when and as often as the optimizer likes. Calling it in the hook would be simpler and is wrong
    for optimizers that move the weights before they call it, as sharpness-aware ones do.

    Args:
      act: what looks at the gradients or changes them.
      arguments: of the step, as the hook gets them: the optimizer, and the closure if it is passed by position.
      keywords: likewise.
      every: act after every call of the closure; by default after the first.

    Returns:
      What the hook is to return: new arguments if there is a closure, else None.
    """
    closure = arguments[1] if len(arguments) > 1 else keywords.get("closure")
    if not callable(closure):
        act()
        return None
    pending = True

    def evaluate() -> Any:
        nonlocal pending
        loss = closure()
        if pending or every:
            pending = False
            act()
        return loss

    if len(arguments) > 1:
        return (arguments[0], evaluate, *arguments[2:]), keywords
    return arguments, {**keywords, "closure": evaluate}
