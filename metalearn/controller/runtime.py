"""The controller's networks in NumPy, for serving: no jax in the training job, microseconds per decision.

Shape legend as in `metalearn.controller.network`, whose function this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def _mean(hidden: np.ndarray) -> np.ndarray:
    """Returns the mean over parameter groups; `np.mean` takes three times as long."""
    return np.add.reduce(hidden, -2) / hidden.shape[-2]


class NumpyNetwork:
    """Evaluates trained parameters in float64.

    Args:
      params: flat mapping "module/parameter" -> array, as a checkpoint stores them.
    """

    def __init__(self, params: Mapping[str, np.ndarray]) -> None:
        self._params = {name: np.asarray(value, np.float64) for name, value in params.items()}

    def _dense(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self._params[f"{name}/kernel"] + self._params[f"{name}/bias"]

    @property
    def hidden_size(self) -> int:
        """Units of the recurrent state, per parameter group."""
        return self._params["mix/bias"].shape[0]

    def code(self, descriptors: np.ndarray, family: int) -> np.ndarray:
        """Maps scaled descriptors [D] and the model family to the code that both parts read."""
        return np.tanh(self._dense("encoder", descriptors) + self._params["family"][family])

    def code_towards(self, descriptors: np.ndarray, family: int, share: np.ndarray) -> np.ndarray:
        """Maps to codes [..., C] between that of an unknown family (share 0) and that of a family (share 1).

        Args:
          descriptors: [..., D].
          share: [...] in [0, 1].
        """
        rows, share = self._params["family"], share[..., None]
        return np.tanh(self._dense("encoder", descriptors) + (1.0 - share) * rows[0] + share * rows[family])

    def start(self, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps the code to the gate [S] and the modifier before tanh [S]."""
        return _sigmoid(self._params["gate"]), self._dense("modifier", np.tanh(self._dense("start_hidden", code)))

    def act(
        self, hidden: np.ndarray, group: np.ndarray, run: np.ndarray, code: np.ndarray, role: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Advances the policy by one decision.

        Args:
          hidden: [G, H], zeros at the start.
          group: [..., G, F] scaled group features; leading axes are variants of one observation.
          run: [..., F] scaled run features, with the same leading axes.
          code: [C] of domain and family, from `code`.
          role: int [G].

        Where every variant has a hidden state [..., G, H] of its own, each has a code [..., C] of its own.

        Returns:
          Action means before tanh, [..., G, A] and [..., B], and the next hidden state.
        """
        # In parts, not as a product with one long row per group: there, putting rows together takes most of the time.
        of_group, of_run, of_code, of_hidden = self._mix_parts(group.shape[-1], run.shape[-1])
        shared = run @ of_run + code @ of_code + _mean(hidden) @ of_hidden + self._params["mix/bias"]
        mixed = np.tanh(group @ of_group + shared[..., None, :] + self._params["role"][role])
        size = self.hidden_size
        from_input = self._dense("recurrent/input", mixed)
        from_hidden = self._dense("recurrent/hidden", hidden)
        gates = _sigmoid(from_input[..., : 2 * size] + from_hidden[..., : 2 * size])
        reset, update = gates[..., :size], gates[..., size:]
        new = np.tanh(from_input[..., 2 * size :] + reset * from_hidden[..., 2 * size :])
        hidden = new + update * (hidden - new)
        return self._dense("group_head", hidden), self._dense("run_head", _mean(hidden)), hidden

    def _mix_parts(self, group: int, run: int) -> list[np.ndarray]:
        """Returns the rows of the first layer's kernel by what they are multiplied with."""
        kernel, hidden = self._params["mix/kernel"], self.hidden_size
        ends = (0, group, group + run, len(kernel) - hidden, len(kernel))
        return [kernel[low:high] for low, high in pairwise(ends)]
