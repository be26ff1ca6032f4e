"""What a network's forecasts must beat: the last season again, autoregression, SARIMA, and a linear
map from window to horizon. Each is a function of the past alone, made at every step of a part.

All take `values` (T, D), learn from the steps before `end`, and forecast t, ..., t + H - 1 for
every step t of `part` = (first, step after the last) from all that came before it: (n, H, D).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlx.errors import BadInput


def seasonal_naive(
    values: np.ndarray, period: int, part: tuple[int, int], horizon: int
) -> np.ndarray:
    """The last season again: y[t + h] = y[t + (h mod period) - period].

    >>> seasonal_naive(np.arange(6.0)[:, None], 2, (4, 6), 3)[..., 0].tolist()
    [[2.0, 3.0, 2.0], [3.0, 4.0, 3.0]]
    """
    if not 1 <= period <= part[0]:
        raise BadInput(f"period {period} does not fit the {part[0]} steps before the part")
    t, h = np.arange(*part)[:, None], np.arange(horizon)[None]
    return values[t + h % period - period]


def autoregression(
    values: np.ndarray, lags: Sequence[int], end: int, part: tuple[int, int], horizon: int
) -> tuple[np.ndarray, np.ndarray]:
    """y[t] = c + sum over the lags of a_i y[t - i] by least squares, a series by itself; forecasts
    further than a step take the ones before them as values.

    Returns:
      Forecasts, and their standard deviations (H, D) from that of the residuals, s, and the
      response to an impulse: s^2 (1 + psi_1^2 + ... + psi_{h-1}^2).
    """
    P, D = max(lags), values.shape[1]
    if end - P <= P or part[0] < P:
        raise BadInput(f"lag {P} does not fit {end} steps to learn from: take fewer lags")
    forecasts = np.empty((part[1] - part[0], horizon, D))
    spread = np.empty((horizon, D))
    for d, y in enumerate(values.T):
        t = np.arange(P, end)
        X = np.stack([np.ones(len(t)), *(y[t - i] for i in lags)], 1)
        a = np.linalg.lstsq(X, y[t], rcond=None)[0]
        s2 = ((y[t] - X @ a) ** 2).sum() / (len(t) - len(a))
        known = y[np.arange(*part)[:, None] - np.arange(P, 0, -1)[None]]  # (n, P), then forecasts
        psi = np.r_[np.zeros(P - 1), 1.0]  # the impulse
        for h in range(horizon):
            new = a[0] + sum(w * known[:, -i] for w, i in zip(a[1:], lags, strict=True))
            known = np.concatenate([known, new[:, None]], 1)
            forecasts[:, h, d] = new
            spread[h, d] = np.sqrt(s2 * (psi[P - 1 :] ** 2).sum())
            psi = np.r_[psi, sum(w * psi[-i] for w, i in zip(a[1:], lags, strict=True))]
    return forecasts, spread


def sarima(
    values: np.ndarray,
    order: tuple[int, int, int],
    seasonal: tuple[int, int, int, int],
    end: int,
    part: tuple[int, int],
    horizon: int,
) -> np.ndarray:
    """Seasonal ARIMA by maximum likelihood (statsmodels), a series by itself. The coefficients stay
    what they were at `end`; the Kalman filter goes on over what is seen since."""
    from statsmodels.tsa.statespace.sarimax import SARIMAX

    options: dict[str, Any] = {"order": order, "seasonal_order": seasonal}
    options["trend"] = "n" if order[1] + seasonal[1] else "c"
    out = []
    for y in values.T:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how the search began, or that it ended early
            fitted: Any = SARIMAX(y[:end], **options).fit(disp=False)
            model = SARIMAX(y[: part[1]], **options)
            filtered: Any = model.filter(fitted.params)
        Z, T = model["design"][0], model["transition"]
        # The intercepts may have a column a step, all alike.
        c, d = model["state_intercept"].reshape(len(T), -1)[:, :1], model["obs_intercept"].ravel()
        state = filtered.predicted_state[:, part[0] : part[1]]  # of step t, given all before t
        steps = []
        for _ in range(horizon):
            steps.append(Z @ state + d[:1])
            state = T @ state + c
        out.append(np.stack(steps, 1))  # (n, H)
    return np.stack(out, -1)


def linear(
    train: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray], ridge: float
) -> np.ndarray:
    """A matrix from window to horizon, the same for all series, by least squares with a penalty of
    `ridge` a window; known inputs count at the window's last step.

    Args:
      train, test: as `dlx.data.series.windows` gives them.
      ridge: 0 or more.
    """
    W, D = weights(train, ridge), test["y"].shape[2]
    return np.stack([_features(test["x"], d, D) @ W for d in range(D)], -1)  # (n, H, D)


def weights(train: Mapping[str, np.ndarray], ridge: float) -> np.ndarray:
    """The matrix of `linear`: rows for the L steps, the K known inputs, and 1; (L + K + 1, H)."""
    D = train["y"].shape[2]
    whole = np.flatnonzero(train["whole"])
    gram, cross = 0.0, 0.0
    for d in range(D):
        X = _features(train["x"][whole], d, D)
        gram, cross = gram + X.T @ X, cross + X.T @ train["y"][whole, :, d]
    penalty = np.eye(len(gram)) * ridge * len(whole) * D  # type: ignore[arg-type]
    penalty[-1, -1] = 0.0
    return np.linalg.lstsq(gram + penalty, cross, rcond=None)[0]


def _features(x: np.ndarray, d: int, D: int) -> np.ndarray:
    ones = np.ones((len(x), 1))
    return np.concatenate([x[..., d], x[:, -1, D:], ones], 1).astype(np.float64)
