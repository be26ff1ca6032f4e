"""Series and their windows, forecasts and the rows beside them, against slow obvious oracles."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx.data import files, series
from dlx.models import forecast, rnn
from dlx.tasks import classical, forecasting

RANDOM = np.random.default_rng(0)
HOURS = np.datetime64("2012-01-01T00:00:00") + np.arange(300) * np.timedelta64(1, "h")
NOISY = 5 + np.sin(np.arange(300) * 2 * np.pi / 12)[:, None] + 0.3 * RANDOM.normal(size=(300, 2))
PART = (240, 300)


@pytest.fixture
def loose():
    """Flax, optax and experiments promote: on the command line nothing is strict."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# ---- Readers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines, message",
    [
        ("1990,1;1991,2;1993,3;1994,4", "1993 follows 1991 in row 3 and the usual step is 1 year"),
        ("1990,1;1991,2;1991,3;1992,4", "1991 follows 1991 in row 3"),
        ("1992,1;1991,2;1990,3", "1991 follows 1992 in row 2"),
        ("1990,1;1991,2;NaT,3;1993,4", "no time in row 3"),
        ("1990,1;1991,nan;1992,3", "column 1 is nan at 1991: fill it"),
        ("1990,1;1991,;1992,3", "column 1 is nan at 1991: fill it"),
        ("1990,1;1991,2;1992,inf", "column 1 is inf at 1992"),
        ("1990,1;1991,2", "has 2 times and 2 rows: it needs 3 or more"),
        ("1990,1;1991,x;1992,3", "no table of times and numbers"),
        ("1990,1;yes,2;1992,3", "no table of times and numbers"),
        ("1990,1;1991;1992,3", "no table of times and numbers"),
        ("", "no table of times and numbers"),
        ("2012-01-01 00:00:00,1;2012-01-01 01:00:00,2;2012-01-01 03:00:00,3", "without gaps"),
    ],
)
def test_a_series_that_is_not_whole_is_refused(lines, message):
    content = "\n".join(["time,value", *lines.split(";")]) if lines else ""
    with pytest.raises(dlx.BadInput) as e:
        series.parse(content.encode(), "table")
    assert message in str(e.value) and "table" in str(e.value) and "\n" not in str(e.value)


def test_the_sets_that_come_with_statsmodels(monkeypatch, tmp_path):
    monkeypatch.setenv("DLX_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sunspots, demand = series.load("sunspots"), series.load("demand")
    assert sunspots.values.shape == (288, 1) and demand.values.shape == (3600, 1)
    assert sunspots.part("train+validation") == (0, 221) and sunspots.part("test") == (221, 288)
    assert str(sunspots.time[221]) == "1921" and sunspots.values[221, 0] == 26.1
    assert demand.part("validation") == (2400, 2880)
    assert str(demand.time[-1]) == "2012-05-29T23:00:00"


def test_etth1(monkeypatch):
    monkeypatch.setattr(files.urllib.request, "urlopen", functools.partial(next, iter(())))
    try:
        found = series.load("ett")
    except (dlx.BadInput, StopIteration, TypeError) as e:
        pytest.skip(
            f"ett/ETTh1.csv is not in DLX_DATA_DIR: see github.com/zhouhaoyi/ETDataset: {e}"
        )
    assert found.values.shape == (14400, 7) and found.columns[-1] == "OT"
    made = forecasting.Task(lambda: found, 7, 336, 96, standard=True).windows("test")
    assert len(made["x"]) == 2880 and made["whole"].sum() == 2785


# ---- Windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part, L, H", [((0, 20), 4, 3), ((20, 29), 6, 1), ((25, 40), 5, 15)])
def test_windows(part, L, H):
    inputs = RANDOM.normal(size=(40, 5))
    made = series.windows(inputs, 2, part, L, H)
    starts = range(max(part[0], L), part[1])
    assert len(made["x"]) == len(made["y"]) == len(made["whole"]) == len(starts)
    for i, t in enumerate(starts):
        np.testing.assert_array_equal(made["x"][i], inputs[t - L : t])
        for h in range(H):
            wanted = inputs[t + h, :2] if t + h < part[1] else np.zeros(2)
            np.testing.assert_array_equal(made["y"][i, h], wanted)
        assert made["whole"][i] == (t + H <= part[1])


def test_a_part_that_is_too_short():
    with pytest.raises(dlx.BadInput, match="look_back 4 and horizon 7 do not fit a part"):
        series.windows(np.zeros((20, 1)), 1, (0, 10), 4, 7)


def test_scaling_is_of_what_is_learnt_from():
    values = NOISY.copy()
    values[200:] = 1e6  # what comes later is not looked at
    scale = series.scale(values[:200], root=True)
    np.testing.assert_allclose(scale.mean, np.sqrt(NOISY[:200]).mean(0))
    seen = series.encode(NOISY, scale)
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen[:200].std(0), 1, rtol=1e-5)
    task = forecasting.Task(
        lambda: series.Series(HOURS, values, ("a", "b"), (200, 240, 300)), 2, 10, 5, root=True
    )
    for a, b in zip(task.scale(), scale, strict=True):
        np.testing.assert_array_equal(a, b)
    mean, deviation = RANDOM.normal(size=(7, 5, 2)), np.full((7, 5, 2), 0.1)
    value, low, high = task.decode(mean, deviation)
    z = mean * scale.std + scale.mean
    np.testing.assert_allclose(value, z**2 + (0.1 * scale.std) ** 2, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(high) - np.sqrt(low), z * 0 + 0.32897 * scale.std, rtol=1e-4)
    np.testing.assert_allclose(task.decode(seen)[0], NOISY, rtol=1e-5)


@pytest.mark.parametrize("values, root", [(np.ones((5, 1)), False), (-NOISY, True)])
def test_values_without_a_scale(values, root):
    with pytest.raises(dlx.BadInput):
        series.scale(values, root)


def test_calendar():
    found = series.calendar(HOURS)
    assert found.shape == (300, 7)
    for i in (0, 23, 24, 100, 167):
        time = HOURS[i].astype(object)
        assert found[i, 6] == (time.weekday() >= 5)
        turn = 2 * np.pi * time.hour / 24
        np.testing.assert_allclose(found[i, [0, 3]], [np.sin(turn), np.cos(turn)], atol=1e-4)
    np.testing.assert_allclose(found[168:], found[:-168], atol=1e-4)


# ---- The rows beside the network ---------------------------------------------------------------

LINEAR = functools.partial(series.windows, series=2, look_back=24, horizon=6)
ROWS = {
    "naive": lambda v: classical.seasonal_naive(v, 12, PART, 6),
    "ar": lambda v: classical.autoregression(v, (1, 2, 12), 240, PART, 6)[0],
    "sarima": lambda v: classical.sarima(v[:, :1], (1, 0, 0), (0, 1, 0, 2), 240, PART, 6),
    "linear": lambda v: classical.linear(
        LINEAR(v, part=(0, 240)), LINEAR(v, part=PART), ridge=1e-3
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_forecast_knows_the_past_alone(name):
    """Nothing that comes at its time or later changes it, and what came just before does."""
    before = ROWS[name](NOISY)
    assert before.shape[:2] == (60, 6)
    changed = NOISY.copy()
    changed[270:] += 1
    after = ROWS[name](changed)
    np.testing.assert_allclose(after[:31], before[:31], rtol=1e-9)
    # The naive one sees a change within the horizon only after so many steps.
    assert np.abs(after[31:] - before[31:]).max() > 0.01


def test_seasonal_naive():
    found = classical.seasonal_naive(NOISY, 4, PART, 10)
    for i in range(60):
        for h in range(10):
            at = 240 + i + h
            while at >= 240 + i:
                at -= 4
            np.testing.assert_array_equal(found[i, h], NOISY[at])


@pytest.mark.parametrize("lags", [(1, 2, 3), (1, 2, 12)])
def test_autoregression(lags):
    """Against statsmodels: forecasts, residual variance, impulse response."""
    from statsmodels.tsa.ar_model import AutoReg
    from statsmodels.tsa.arima_process import arma_impulse_response

    found, spread = classical.autoregression(NOISY, lags, 240, PART, 5)
    y = NOISY[:, 1]
    fitted = AutoReg(y[:240], list(lags)).fit()
    for i in (0, 1, 30, 59):
        longer = AutoReg(y[: 240 + i], list(lags))
        wanted = longer.predict(fitted.params, 240 + i, 244 + i)
        np.testing.assert_allclose(found[i, :, 1], wanted, rtol=1e-9)
    a = np.zeros(max(lags) + 1)
    a[0], a[list(lags)] = 1, -fitted.params[1:]
    psi = arma_impulse_response(a, [1.0], 5)
    s2 = (fitted.resid**2).sum() / (len(fitted.resid) - len(fitted.params))
    np.testing.assert_allclose(spread[:, 1], np.sqrt(s2 * np.cumsum(psi**2)), rtol=1e-9)


def test_the_published_baseline_of_sunspots():
    """AR(9) of 221 years on the 67 after them, and its lags 1, 2 and 9."""
    found = series.load("sunspots")
    y = found.values[221:288]
    for lags, wanted in ((range(1, 10), 305.25), ((1, 2, 9), 302.24)):
        forecasts, _ = classical.autoregression(found.values, lags, 221, (221, 288), 1)
        assert abs(((forecasts[:, 0] - y) ** 2).mean() - wanted) < 0.01


@pytest.mark.filterwarnings("ignore")  # statsmodels tells how its search began
@pytest.mark.parametrize("order, seasonal", [((1, 0, 0), (0, 1, 1, 4)), ((2, 0, 1), (0, 0, 0, 0))])
def test_sarima(order, seasonal):
    """Against statsmodels' own forecasts of a series that ends at each step."""
    from statsmodels.tsa.statespace.sarimax import SARIMAX

    found = classical.sarima(NOISY[:, :1], order, seasonal, 100, (100, 130), 6)
    y, trend = NOISY[:, 0], "n" if seasonal[1] else "c"
    options = {"order": order, "seasonal_order": seasonal, "trend": trend}
    params = SARIMAX(y[:100], **options).fit(disp=False).params
    for i in (0, 1, 15, 29):
        wanted = SARIMAX(y[: 100 + i], **options).filter(params).forecast(6)
        np.testing.assert_allclose(found[i, :, 0], wanted, rtol=1e-6)


def test_linear():
    """Two series and a known input, one by one."""
    inputs = np.concatenate([NOISY, RANDOM.normal(size=(300, 1))], 1)
    learn = series.windows(inputs, 2, (0, 240), 5, 3)
    test = series.windows(inputs, 2, PART, 5, 3)
    found = classical.linear(learn, test, 0.01)
    X, Y = [], []
    for t in range(5, 238):
        for d in (0, 1):
            X.append([*inputs[t - 5 : t, d], inputs[t - 1, 2], 1])
            Y.append(inputs[t : t + 3, d])
    n, penalty = len(X), np.diag([0.1] * 6 + [0.0])
    X, Y = np.array(X), np.array(Y)
    X, Y = np.r_[X, np.sqrt(n) * penalty], np.r_[Y, np.zeros((7, 3))]
    W = np.linalg.lstsq(X, Y, rcond=None)[0]
    wanted = [*inputs[248 - 5 : 248, 1], inputs[247, 2], 1] @ W
    np.testing.assert_allclose(found[8, :, 1], wanted, rtol=1e-8)


@pytest.mark.parametrize(
    "call", [lambda: classical.seasonal_naive(NOISY, 241, PART, 1),
             lambda: classical.autoregression(NOISY, (1, 130), 240, PART, 1)],
)  # fmt: skip
def test_a_row_that_does_not_fit(call):
    with pytest.raises(dlx.BadInput):
        call()


# ---- Models ------------------------------------------------------------------------------------


def perturbed(model, x):
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    random = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * random.normal(size=s.shape)), variables)


@pytest.mark.parametrize("L, k", [(9, 5), (4, 7), (6, 1)])
def test_dlinear(L, k, x64, promoting):
    """Step by step; the model is linear, so its gradients are products."""
    x, weight = RANDOM.normal(size=(3, L, 2)), RANDOM.normal(size=(3, 4, 2))
    model = forecast.DLinear(4, k)
    variables = perturbed(model, jnp.asarray(x))
    slow = np.zeros_like(x)
    for t in range(L):
        at = [min(max(t + i, 0), L - 1) for i in range(-(k // 2), k // 2 + 1)]
        slow[:, t] = x[:, at].mean(1)
    np.testing.assert_allclose(forecast.trend(jnp.asarray(x), k), slow, atol=1e-12)
    p = variables["params"]
    wanted = sum(
        np.einsum("bld,lh->bhd", part, np.asarray(p[name]["kernel"]))
        + np.asarray(p[name]["bias"])[:, None]
        for name, part in (("trend", slow), ("remainder", x - slow))
    )
    np.testing.assert_allclose(model.apply(variables, jnp.asarray(x)), wanted, atol=1e-12)
    g = jax.grad(lambda v: (model.apply(v, jnp.asarray(x)) * weight).sum())(variables)["params"]
    for name, part in (("trend", slow), ("remainder", x - slow)):
        kernel = np.einsum("bld,bhd->lh", part, weight)
        np.testing.assert_allclose(g[name]["kernel"], kernel, atol=1e-12)
        np.testing.assert_allclose(g[name]["bias"], weight.sum((0, 2)), atol=1e-12)


def test_parameters(promoting):
    def count(model, shape):
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
        assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
        return sum(x.size for x in jax.tree.leaves(variables))

    assert count(forecast.DLinear(96), (2, 336, 7)) == 2 * (336 * 96 + 96)
    member = forecast.Forecaster(rnn.RNN(16), 11)
    one = 4 * (16 * 1 + 16 * 16 + 16) + (16 * 22 + 22) + (20 * 11 + 11)
    assert count(member, (2, 20, 1)) == one
    assert count(forecast.Ensemble(member, 3), (2, 20, 1)) == 3 * one


def test_an_ensemble_is_its_members(x64, promoting):
    """Values and gradients of each, alone; they begin differently."""
    x, y = jnp.asarray(RANDOM.normal(size=(3, 6, 2))), jnp.asarray(RANDOM.normal(size=(3, 4, 1)))
    member = forecast.Forecaster(rnn.RNN(5, cell="gru"), 4)
    model = forecast.Ensemble(member, 3)
    init = jax.jit(model.init)(jax.random.key(0), x)["params"]["member"]
    assert np.abs(np.diff(init["head"]["kernel"], axis=0)).min() > 0
    variables = perturbed(model, x)
    batch, key = {"x": x, "y": y}, jax.random.key(1)

    @functools.partial(jax.jit, static_argnums=0)
    def run(net, params):
        g = jax.grad(lambda p: forecast.gaussian(net)(p, {}, batch, key)[0])(params)
        return net.apply({"params": params}, x), g

    out, g = run(model, variables["params"])
    for m in range(3):
        alone = jax.tree.map(lambda p: p[m], variables["params"]["member"])  # noqa: B023
        values, gradient = run(member, alone)
        for a, b in zip(out, values, strict=True):
            np.testing.assert_allclose(a[m], b, atol=1e-12)
        for a, b in zip(jax.tree.leaves(g["member"]), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(3 * a[m], b, atol=1e-12)
            assert np.abs(b).max() > 0  # every parameter learns


def test_a_linear_part_that_is_given(x64, promoting):
    """Every member then forecasts as `classical.linear` does, but for what its network adds."""
    learn = series.windows(NOISY, 2, (0, 240), 5, 3)
    test = series.windows(NOISY, 2, PART, 5, 3)
    model = forecast.Ensemble(forecast.Forecaster(rnn.RNN(4), 3, 2), 2)
    x = jnp.asarray(test["x"])
    params = perturbed(model, x[:1])["params"]
    found = forecast.with_linear(params, classical.weights(learn, 0.01))
    fixed = jax.tree_util.tree_map_with_path(lambda path, _: forecast.is_linear(path), params)
    assert sum(jax.tree.leaves(fixed)) == 2
    jax.tree.map(lambda a, b, f: f or np.testing.assert_array_equal(a, b), found, params, fixed)
    found["member"]["head"] = jax.tree.map(jnp.zeros_like, found["member"]["head"])
    mean = jax.jit(model.apply)({"params": found}, x).mean
    wanted = classical.linear(learn, test, 0.01)
    np.testing.assert_allclose(mean, np.stack([wanted, wanted]), rtol=1e-9)


def test_mixture_and_gaussian(x64):
    from scipy.stats import norm

    mean, scale = RANDOM.normal(size=(3, 4, 2, 1)), np.exp(RANDOM.normal(size=(3, 4, 2, 1)))
    found = forecast.mixture(forecast.Forecast(jnp.asarray(mean), jnp.log(jnp.asarray(scale))))
    second = (scale**2 + mean**2).mean(0)
    np.testing.assert_allclose(found.mean, mean.mean(0), atol=1e-12)
    np.testing.assert_allclose(jnp.exp(2 * found.log_scale), second - mean.mean(0) ** 2, rtol=1e-9)

    y = RANDOM.normal(size=(4, 2, 1))
    out = forecast.Forecast(jnp.asarray(mean), jnp.log(jnp.asarray(scale)))
    model = types.SimpleNamespace(apply=lambda *args, **kwargs: out)
    loss, _ = forecast.gaussian(model)({}, {}, {"x": 0, "y": jnp.asarray(y)}, jax.random.key(0))
    wanted = -norm.logpdf(y, mean, scale).mean() - np.log(2 * np.pi) / 2
    np.testing.assert_allclose(loss, wanted, atol=1e-12)


@pytest.mark.parametrize(
    "make", [lambda: forecast.DLinear(0), lambda: forecast.DLinear(4, 24),
             lambda: forecast.Forecaster(rnn.RNN(4), 0),
             lambda: forecast.Forecaster(rnn.RNN(4), 3, dropout=1.0),
             lambda: forecast.Ensemble(rnn.RNN(4), 0),
             lambda: forecast.Forecaster(rnn.RNN(4), 3, 5).init(
                 jax.random.key(0), jnp.zeros((1, 4, 2)))],
)  # fmt: skip
def test_models_that_cannot_be(make):
    with pytest.raises(dlx.BadInput):
        make()


# ---- The protocol ------------------------------------------------------------------------------


def made(batch, learn="train", point=False):
    found = series.Series(HOURS, NOISY, ("a", "b"), (200, 240, 300))
    task = forecasting.Task(lambda: found, 2, 12, 6, learn, root=True, known=not point)
    model = forecast.DLinear(6, 3) if point else forecast.Forecaster(rnn.RNN(4), 6, 2)
    built = forecasting.experiment(
        model, optax.adam(1e-3),
        forecast.gaussian(model),
        (lambda mean: (mean, None)) if point else lambda out: out,
        task, batch_size=8, seed=0, eval_batch=batch,
        rows=lambda: {"naive": classical.seasonal_naive(NOISY, 12, PART, 6)},
    )  # fmt: skip
    return built, task


@pytest.mark.parametrize("batch", [7, 60, 256])
def test_every_window_counts(batch, loose):
    """The scores of one step and of many, forecast by forecast, whatever the batch."""
    built, task = made(batch)
    state = jax.jit(built.init)(jax.random.key(0), None)
    found = built.test(state)
    one, many, inside, hours = [], [], [], series.calendar(HOURS)
    z = series.encode(NOISY, task.scale())
    window = jax.jit(built.predict)
    for t in range(240, 300):
        x = np.concatenate([z[t - 12 : t], hours[t - 12 : t]], 1)
        value, low, high = (np.asarray(a)[0] for a in window(state, x[None]))
        y = NOISY[t : t + 6]
        one.append(((value[0] - y[0]) ** 2).mean())
        if t + 6 <= 300:
            many.append(((value - y) ** 2).mean())
            inside.append(((low <= y) & (y <= high)).mean())
    assert len(one) == 60 and len(many) == 55
    np.testing.assert_allclose(found["mse_1"], np.mean(one), rtol=1e-4)
    np.testing.assert_allclose(found["mse"], np.mean(many), rtol=1e-4)
    np.testing.assert_allclose(found["coverage"], np.mean(inside), rtol=1e-4)
    naive = [np.abs(NOISY[t - 12 : t - 6] - NOISY[t : t + 6]).mean() for t in range(240, 295)]
    np.testing.assert_allclose(found["mae_naive"], np.mean(naive), rtol=1e-4)


def test_what_is_learnt_from(loose):
    """Only windows that lie in the part as a whole; where validation is among them, there is none
    to evaluate."""
    built, task = made(60)
    assert len(task.windows("train")["x"]) == 200 - 12 - 5
    assert set(built.evals) == {"validation"} and set(built.pictures) == {"forecast"}
    both, task = made(60, learn="train+validation")
    assert len(task.windows("train+validation")["x"]) == 240 - 12 - 5
    assert not both.evals and set(both.pictures) == {"forecast"}


@pytest.mark.parametrize("point", [False, True])
def test_pictures(point, loose):
    built, _ = made(60, point=point)
    state = jax.jit(built.init)(jax.random.key(0), None)
    image = built.pictures["forecast"](state)
    assert image.shape == (560, 900, 3) and image.dtype == np.uint8 and image.std() > 10
    assert not np.array_equal(image, built.sample(state, jax.random.key(0)))
