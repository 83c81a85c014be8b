"""The controller's networks in NumPy, for serving: no jax in the training job, microseconds per decision.

Shape legend as in `metalearn.controller.network`, whose function this is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES


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
        # A decision comes between training steps, to cold caches: there, looking parameters up by name and cutting them
        # is a fifth of the time.
        rows = np.cumsum([len(GROUP_FEATURES), len(GLOBAL_FEATURES), len(self._params["encoder/bias"])])
        self._of_group, self._of_run, self._of_code, self._of_hidden = np.split(self._params["mix/kernel"], rows)
        self._mix_bias, self._role = self._params["mix/bias"], self._params["role"]
        self.hidden_size: int = len(self._mix_bias)
        """Units of the recurrent state, per parameter group."""
        halves = np.repeat([0.5, 0.5, 1.0], self.hidden_size)  # a gate is a logistic function, 0.5 + 0.5 tanh(x / 2)
        self._from_input, self._from_hidden = (
            (halves * self._params[f"recurrent/{name}/kernel"], halves * self._params[f"recurrent/{name}/bias"])
            for name in ("input", "hidden")
        )

    def _dense(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self._params[f"{name}/kernel"] + self._params[f"{name}/bias"]

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
        mixed = group @ self._of_group
        shared = run @ self._of_run + code @ self._of_code + _mean(hidden) @ self._of_hidden + self._mix_bias
        mixed = np.tanh(mixed + shared[..., None, :] + self._role[role])
        (kernel, bias), (kernel_hidden, bias_hidden) = self._from_input, self._from_hidden
        from_input, from_hidden = mixed @ kernel + bias, hidden @ kernel_hidden + bias_hidden
        size = self.hidden_size
        gates = 0.5 + 0.5 * np.tanh(from_input[..., : 2 * size] + from_hidden[..., : 2 * size])
        reset, update = gates[..., :size], gates[..., size:]
        new = np.tanh(from_input[..., 2 * size :] + reset * from_hidden[..., 2 * size :])
        hidden = new + update * (hidden - new)
        return self._dense("group_head", hidden), self._dense("run_head", _mean(hidden)), hidden
