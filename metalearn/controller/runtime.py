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
        # A decision comes between training steps, to cold caches: there every call of NumPy takes microseconds, and
        # looking parameters up by name and cutting them a fifth of the time.
        rows = np.cumsum([len(GROUP_FEATURES), len(GLOBAL_FEATURES), len(self._params["encoder/bias"])])
        self._of_group, self._of_run, self._of_code, self._of_hidden = np.split(self._params["mix/kernel"], rows)
        self.hidden_size: int = len(self._params["mix/bias"])
        """Units of the recurrent state, per parameter group."""
        halves = np.repeat([0.5, 0.5, 1.0], self.hidden_size)  # a gate is a logistic function, 0.5 + 0.5 tanh(x / 2)
        self._from_input, self._from_hidden = (
            (halves * self._params[f"recurrent/{name}/kernel"], halves * self._params[f"recurrent/{name}/bias"])
            for name in ("input", "hidden")
        )
        self._heads, self._heads_bias = (
            np.concatenate([self._params[f"{head}_head/{part}"] for head in ("group", "run")], -1)
            for part in ("kernel", "bias")
        )
        self._num_group_actions = len(self._params["group_head/bias"])

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

    def context(self, code: np.ndarray, role: np.ndarray) -> np.ndarray:
        """Maps what stays as it is during a run to its part in each decision, [..., G, H].

        Args:
          code: [..., C] of domain and family, from `code`.
          role: int [G].
        """
        shared = code @ self._of_code + self._params["mix/bias"]
        return shared[..., None, :] + self._params["role"][role]

    def reads(self, feature: str) -> bool:
        """Says whether a run feature can change what is decided; one that it was not trained with cannot."""
        return bool(self._of_run[GLOBAL_FEATURES.index(feature)].any())

    def act(
        self, hidden: np.ndarray, group: np.ndarray, run: np.ndarray, context: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Advances the policy by one decision.

        Args:
          hidden: [..., G, H], zeros at the start.
          group: [..., G, F] scaled group features; leading axes are variants of one observation.
          run: [..., F] scaled run features.
          context: [..., G, H] of domain, family and roles, from `context`.

        Leading axes are those of `group` and `run`; hidden state and context may do without, and are then shared.

        Returns:
          Action means before tanh, [..., G, A] and [..., B], and the next hidden state.
        """
        # In parts, not as a product with one long row per group: there, putting rows together takes most of the time.
        shared = run.dot(self._of_run) + _mean(hidden).dot(self._of_hidden)
        mixed = np.tanh(group.dot(self._of_group) + shared[..., None, :] + context)
        (kernel, bias), (kernel_hidden, bias_hidden) = self._from_input, self._from_hidden
        from_input, from_hidden = mixed.dot(kernel) + bias, hidden.dot(kernel_hidden) + bias_hidden
        size = self.hidden_size
        gates = 0.5 + 0.5 * np.tanh(from_input[..., : 2 * size] + from_hidden[..., : 2 * size])
        reset, update = gates[..., :size], gates[..., size:]
        new = np.tanh(from_input[..., 2 * size :] + reset * from_hidden[..., 2 * size :])
        hidden = new + update * (hidden - new)
        actions = hidden.dot(self._heads) + self._heads_bias
        return actions[..., : self._num_group_actions], _mean(actions[..., self._num_group_actions :]), hidden
