"""The metric against `logalign.lar` over all tokens at once, merged every way that torchmetrics has."""

import math
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from logalign import Energies
from logalign.errors import InputError, LogAlignWarning
from logalign.integrations.torchmetrics import LogAlignmentRatio
from tests.torch.workers import Workers

FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "effective_dim")
M, N = 7, 12


def layer(tokens: int = 40, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(M, N, generator=generator) + 0.3
    inputs = torch.randn(tokens, N, generator=generator) + 0.5
    bias = torch.randn(M, generator=generator)
    return weight.to(dtype), inputs.to(dtype), bias.to(dtype)


def truth(form: str, weight, inputs, **rest) -> float:
    wide = {name: value.double() if value.is_floating_point() else value for name, value in rest.items()}
    return getattr(Energies.of(weight.double(), inputs.double(), **wide), form)


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.stop()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parts", [[40], [3, 30, 7]])
@pytest.mark.parametrize("given", ["alone", "with outputs", "with outputs and bias"])
def test_updates_pool_their_tokens(form, parts, given):
    weight, inputs, bias = layer()
    metric = LogAlignmentRatio(weight.shape, form=form)
    for part in torch.split(inputs, parts):
        rest = {}
        if given != "alone":
            rest["outputs"] = part @ weight.T
        if "bias" in given:
            rest = {"outputs": rest["outputs"] + bias, "bias": bias}
        metric.update(weight, part, **rest)
    value = metric.compute()
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(truth(form, weight, inputs), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_in_some_updates_only(form):
    weight, inputs, bias = layer()
    metric = LogAlignmentRatio(weight.shape, form=form)
    metric.update(weight, inputs[:10], outputs=inputs[:10] @ weight.T + bias, bias=bias)
    metric.update(weight, inputs[10:], outputs=inputs[10:] @ weight.T)
    assert float(metric.compute()) == pytest.approx(truth(form, weight, inputs), rel=1e-5)


def test_tokens_that_do_not_count():
    weight, inputs, _ = layer()
    mask = torch.arange(40) % 3 != 0
    poisoned = torch.where(mask[:, None], inputs, torch.nan)
    metric = LogAlignmentRatio(weight.shape)
    metric.update(weight, poisoned[:25].reshape(5, 5, N), mask=mask[:25].reshape(5, 5))
    metric.update(weight, poisoned[25:], mask=mask[25:])
    assert float(metric.compute()) == pytest.approx(truth("lar", weight, inputs, mask=mask), rel=1e-5)


def test_the_mean_of_the_parts_is_something_else():
    weight, inputs, _ = layer()
    inputs[:5] *= 30
    parts = [truth("lar", weight, part) for part in (inputs[:5], inputs[5:])]
    assert sum(parts) / 2 != pytest.approx(truth("lar", weight, inputs), rel=1e-3)
    metric = LogAlignmentRatio(weight.shape)
    for part in (inputs[:5], inputs[5:]):
        metric.update(weight, part)
    assert float(metric.compute()) == pytest.approx(truth("lar", weight, inputs), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_forward_gives_the_batch_and_keeps_the_whole(form):
    weight, inputs, _ = layer()
    metric = LogAlignmentRatio(weight.shape, form=form)
    for part in torch.split(inputs, 20):
        assert float(metric(weight, part)) == pytest.approx(truth(form, weight, part), rel=1e-5)
    assert float(metric.compute()) == pytest.approx(truth(form, weight, inputs), rel=1e-5)


def test_reset_begins_anew():
    weight, inputs, _ = layer()
    metric = LogAlignmentRatio(weight.shape)
    metric.update(weight, inputs)
    metric.reset()
    metric.update(2 * weight.roll(1, 0), inputs[:9])
    assert float(metric.compute()) == pytest.approx(truth("lar", weight.roll(1, 0), inputs[:9]), rel=1e-5)


def test_in_a_collection_beside_other_metrics():
    weight, inputs, bias = layer()
    logits = inputs @ weight.T + bias
    target = logits.argmax(-1)
    collection = MetricCollection(
        {form: LogAlignmentRatio(weight.shape, form=form) for form in FORMS} | {"accuracy": MulticlassAccuracy(M)}
    )
    for part in (slice(0, 25), slice(25, 40)):
        collection.update(
            preds=logits[part],
            target=target[part],
            weight=weight,
            inputs=inputs[part],
            outputs=logits[part],
            bias=bias,
        )
    found = collection.compute()
    assert float(found.pop("accuracy")) == 1.0
    assert {form: float(value) for form, value in found.items()} == {
        form: pytest.approx(truth(form, weight, inputs), rel=1e-5) for form in FORMS
    }
    # All forms are of the same sums, which are taken once.
    assert sorted(map(len, collection.compute_groups.values())) == [1, len(FORMS)]


@pytest.mark.parametrize(
    "cast",
    [
        lambda metric: metric.to(torch.bfloat16),
        lambda metric: metric.half(),
        lambda metric: metric.bfloat16(),
        lambda metric: torch.nn.ModuleDict({"metric": metric}).to(torch.float16)["metric"],
    ],
)
def test_casts_leave_the_sums_alone(cast):
    weight, inputs, _ = layer(5000)
    metric = LogAlignmentRatio(weight.shape)
    metric.update(weight, inputs[:4000])
    metric = cast(metric)
    metric.update(weight, inputs[4000:])
    assert metric.sums.dtype == metric.weight_squares.dtype == torch.float64
    assert float(metric.compute()) == pytest.approx(truth("lar", weight, inputs), abs=1e-6)
    metric.reset()
    assert metric.sums.dtype == torch.float64
    assert metric.energies().tokens == 0


def test_set_dtype_is_how_to_cast():
    weight, inputs, _ = layer()
    metric = LogAlignmentRatio(weight.shape).set_dtype(torch.float32)
    metric.update(weight, inputs[:20])
    metric.update(weight, inputs[20:])
    assert metric.sums.dtype == metric.compute().dtype == torch.float32
    assert float(metric.compute()) == pytest.approx(truth("lar", weight, inputs), rel=1e-5)


def test_moving_keeps_what_was_summed():
    weight, inputs, _ = layer()
    metric = LogAlignmentRatio(weight.shape)
    metric.update(weight, inputs)
    assert float(metric.to("cpu").compute()) == pytest.approx(truth("lar", weight, inputs), rel=1e-5)
    assert metric.to("meta").sums.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_layers_of_other_dtypes(dtype):
    weight, inputs, _ = layer(dtype=dtype)
    metric = LogAlignmentRatio(weight.shape)
    metric.update(weight, inputs, outputs=inputs @ weight.T)
    rel = 1e-12 if dtype == torch.float64 else 2e-3
    assert float(metric.compute()) == pytest.approx(truth("lar", weight, inputs), rel=rel)


def test_no_graph_is_kept():
    weight, inputs, _ = layer()
    weight.requires_grad_()
    metric = LogAlignmentRatio(weight.shape)
    metric(weight, inputs, outputs=inputs @ weight.T)
    assert not metric.sums.requires_grad


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda weight, inputs: (0 * weight, inputs), "the weight energy is zero"),
        (lambda weight, inputs: (weight, 0 * inputs), "the input energy is zero"),
        (lambda weight, inputs: (weight, inputs / 0), "40 rows of weight, inputs or outputs hold a NaN or an infinity"),
    ],
)
def test_what_is_undefined_is_nan_and_told(spoil, reason):
    weight, inputs = spoil(*layer()[:2])
    metric = LogAlignmentRatio(weight.shape)
    metric.update(weight, inputs, outputs=torch.ones(40, M) if "input energy" not in reason else torch.zeros(40, M))
    with pytest.warns(LogAlignWarning, match=f"lar is undefined, for {reason}"):
        assert math.isnan(metric.compute())


def test_a_mask_that_keeps_nothing():
    weight, inputs, _ = layer()
    metric = LogAlignmentRatio(weight.shape)
    metric.update(weight, inputs, mask=torch.zeros(40, dtype=torch.bool))
    with pytest.warns(LogAlignWarning, match="no token: the mask keeps none"):
        assert math.isnan(metric.compute())


def test_a_centered_form_of_which_only_rounding_is_left():
    weight, inputs, _ = layer()
    metric = LogAlignmentRatio(weight.shape, form="lar_token_centered")
    metric.update(weight, inputs[:1].expand(40, N))
    with pytest.warns(LogAlignWarning, match="lar_token_centered is undefined, for nothing but rounding is left"):
        assert math.isnan(metric.compute())


def test_a_weight_that_changes_between_updates_is_told():
    weight, inputs, _ = layer()
    metric = LogAlignmentRatio(weight.shape)
    metric.update(weight, inputs)
    metric.update(1.001 * weight, inputs)
    with pytest.warns(LogAlignWarning, match=r"the weight changed between updates.*reset\(\)"):
        metric.compute()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LogAlignmentRatio((7,)), r"shape: expected \(m, n\) .* found \(7,\)"),
        (lambda: LogAlignmentRatio((7, 1)), r"fan-in n of at least 2, found \(7, 1\)"),
        (lambda: LogAlignmentRatio((7, 12), form="LAR"), "form: expected one of lar, lar_vocab_centered"),
    ],
)
def test_what_no_metric_can_be_made_of(make, text):
    with pytest.raises(InputError, match=text):
        make()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"weight": torch.ones(M, N + 1), "inputs": torch.ones(4, N + 1)}, r"weight: expected shape \(7, 12\), found"),
        ({"inputs": torch.ones(4, N + 1)}, r"inputs: expected shape \[..., 12\]"),
        ({"outputs": torch.ones(3, M)}, "outputs: expected leading shape"),
        ({"mask": torch.ones(4)}, r"mask: expected bool of shape \(4,\), found torch.float32"),
        ({"inputs": torch.ones(4, N, dtype=torch.int64)}, "inputs: expected a real floating-point array"),
    ],
)
def test_what_an_update_refuses(given, text):
    metric = LogAlignmentRatio((M, N))
    with pytest.raises(InputError, match=text):
        metric.update(**{"weight": torch.ones(M, N), "inputs": torch.ones(4, N), **given})


def rank_case(rank: int, world: int, form: str) -> tuple[float, float]:
    warnings.simplefilter("error")
    weight, inputs, bias = layer()
    metric = LogAlignmentRatio(weight.shape, form=form)
    parts = [torch.split(inputs[:15], 5), [inputs[15:]]][rank]  # three updates at one rank, one at the other
    for part in parts:
        metric.update(weight, part, outputs=part @ weight.T + bias, bias=bias)
    whole = float(metric.compute())
    with metric.sync_context(should_unsync=True):
        again = getattr(metric.energies(), form)
    return whole, again


@pytest.mark.parametrize("form", FORMS)
def test_ranks_add_up(two, form):
    weight, inputs, _ = layer()
    expected = pytest.approx(truth(form, weight, inputs), rel=1e-5)
    assert two.run(rank_case, form) == [(expected, expected)] * 2


def idle_case(rank: int, world: int) -> float:
    weight, inputs, _ = layer()
    metric = LogAlignmentRatio(weight.shape, form="lar_centered")
    if rank == 0:
        metric.update(weight, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchmetrics says that one rank had no update
        return float(metric.compute())


def test_a_rank_without_tokens(two):
    weight, inputs, _ = layer()
    assert two.run(idle_case) == [pytest.approx(truth("lar_centered", weight, inputs), rel=1e-5)] * 2


def test_missing_torchmetrics_names_the_command():
    code = "import sys; sys.modules['torchmetrics'] = None; import logalign.integrations.torchmetrics"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'LogAlignmentRatio needs torchmetrics: pip install "logalign[torchmetrics]"' in done.stderr


def test_an_unsupported_torchmetrics_says_which_are_supported():
    code = (
        "from importlib import metadata; known = metadata.version; "
        "metadata.version = lambda name: '0.11.4' if name == 'torchmetrics' else known(name); "
        "import logalign.integrations.torchmetrics"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "LogAlignmentRatio needs torchmetrics from 1.2 on and below 2, found 0.11.4" in done.stderr
