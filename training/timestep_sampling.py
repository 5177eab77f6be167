"""Which timesteps a training step sees: uniformly drawn, or more often where the loss is large."""

import numpy as np


class UniformTimestepSampler:
    """All timesteps alike."""

    def __init__(self, num_train_timesteps: int):
        self.num_train_timesteps = num_train_timesteps

    def sample(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turns uniform numbers in [0, 1) into timesteps.

        Args:
            uniforms: float64 (batch,).

        Returns:
            Timesteps, int64 (batch,), counted from 0, and the weight of each one's loss, float64 (batch,), that makes
            the weighted mean an unbiased estimate of the mean over all timesteps.
        """
        return self._to_timesteps(uniforms * self.num_train_timesteps), np.ones_like(uniforms)

    def update(self, timesteps: np.ndarray, losses: np.ndarray) -> None:
        """Tells the losses that the drawn timesteps had."""

    def state_dict(self) -> dict[str, np.ndarray]:
        """What must be kept to go on later."""
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Takes up what `state_dict` gave."""

    def _to_timesteps(self, positions: np.ndarray) -> np.ndarray:
        return np.minimum(positions.astype(np.int64), self.num_train_timesteps - 1)


class LossSecondMomentSampler(UniformTimestepSampler):
    """Importance sampling by the second moment of the loss (Nichol and Dhariwal 2021, arXiv 2102.09672, section 3.3).

    p_t is proportional to sqrt(E[L_t^2]) over the last losses of each timestep, and the loss is divided by T p_t.
    Until every timestep has a full history, and with a small probability always, timesteps are drawn uniformly.

    Args:
        num_train_timesteps: T.
        history_length: How many losses of each timestep are kept.
        uniform_probability: Share of draws that stay uniform, so that no timestep is forgotten.
    """

    def __init__(self, num_train_timesteps: int, history_length: int = 10, uniform_probability: float = 0.001):
        super().__init__(num_train_timesteps)
        self.uniform_probability = uniform_probability
        self._history = np.zeros((num_train_timesteps, history_length))
        self._counts = np.zeros(num_train_timesteps, dtype=np.int64)

    def probabilities(self) -> np.ndarray:
        """p_t, float64 (num_train_timesteps,)."""
        count = self.num_train_timesteps
        moments = np.sqrt(np.square(self._history).mean(axis=1))
        if (self._counts < self._history.shape[1]).any() or moments.sum() == 0:
            return np.full(count, 1 / count)
        return (1 - self.uniform_probability) * moments / moments.sum() + self.uniform_probability / count

    def sample(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        probabilities = self.probabilities()
        cumulative = probabilities.cumsum()
        timesteps = self._to_timesteps(np.searchsorted(cumulative, uniforms * cumulative[-1], side="right"))
        return timesteps, 1 / (self.num_train_timesteps * probabilities[timesteps])

    def update(self, timesteps: np.ndarray, losses: np.ndarray) -> None:
        length = self._history.shape[1]
        for timestep, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            # the oldest loss makes room; where it stands does not matter for the moment
            self._history[timestep, self._counts[timestep] % length] = loss
            self._counts[timestep] += 1

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"history": self._history.copy(), "counts": self._counts.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if state["history"].shape != self._history.shape:
            raise ValueError(
                f"the history of losses has shape {state['history'].shape}, but must have {self._history.shape}"
            )
        self._history[...] = state["history"]
        self._counts[...] = state["counts"]


TIMESTEP_SAMPLERS = {"uniform": UniformTimestepSampler, "importance": LossSecondMomentSampler}
