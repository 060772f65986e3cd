"""The energy of outputs that never exist, against the outputs themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logalign.errors import InputError
from logalign.torch import output_energy
from logalign.torch.linear import Dense
from logalign.torch.meter import Meter, Share, unpack
from logalign.torch.output_energy import SAMPLE, OutputEnergy, Way


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def of(way, weight, *calls, mask=None, row_mean=None):
    energy = OutputEnergy(way)
    found = [energy.of(Dense(weight), rows, mask=mask, row_mean=row_mean) for rows in calls]
    return sum(each.energy.item() for each in found), sum(each.variance.item() for each in found)


def exact(weight, *calls):
    return sum((rows.double() @ weight.double().T).square().sum().item() for rows in calls)


@given(st.integers(1, 40), st.integers(2, 12), st.lists(st.integers(0, 50), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_exact_over_any_chunks(m, n, tokens):
    weight = random(m, n)
    calls = [random(count, n, seed=i) for i, count in enumerate(tokens)]
    energy, variance = of(Way("exact"), weight, *calls)
    assert energy == pytest.approx(exact(weight, *calls), rel=1e-5)
    assert variance == 0


def test_many_chunks_cost_at_most_twice_the_cheapest(monkeypatch):
    m, n, spent = 640, 16, 0
    one_by_one, gram = output_energy.reduce.output_energies, output_energy.reduce.gram

    def count_one_by_one(blocks, rows):
        nonlocal spent
        spent += rows.shape[0] * m * n
        return one_by_one(blocks, rows)

    def count_gram(blocks, *rest):
        nonlocal spent
        blocks = list(blocks)
        spent += sum(block.shape[0] for block in blocks) * n * n
        return gram(blocks, *rest)

    monkeypatch.setattr(output_energy.reduce, "output_energies", count_one_by_one)
    monkeypatch.setattr(output_energy.reduce, "gram", count_gram)
    calls = [random(4, n, seed=i) for i in range(200)]
    assert of(Way("exact"), random(m, n), *calls)[0] == pytest.approx(exact(random(m, n), *calls), rel=1e-5)
    tokens = 4 * len(calls)  # one by one they would cost 50 m n^2
    assert m * n * n < spent <= 2 * m * n * n + tokens * n * n


@pytest.mark.parametrize("softmax", [False, True])
def test_a_sample_is_unbiased_and_knows_its_error(softmax):
    """Over 400 samples: the mean is right, and the error reported is the scatter that is seen."""
    scale = torch.linspace(0.2, 3, 1000)[:, None]
    weight, rows = random(50, 16) + 0.2, random(1000, 16, seed=1) * scale + 0.1
    weight[0] *= 8  # tokens differ in what the layer makes of them
    way, truth = Way(100), exact(weight, rows)
    given = {"row_mean": weight.double().mean(0)} if softmax else {}
    energies, variances = zip(*(of(way, weight, rows, **given) for _ in range(400)), strict=True)
    energies, variances = torch.tensor(energies), torch.tensor(variances)
    scatter = energies.std().item()
    assert energies.mean().item() == pytest.approx(truth, abs=3 * scatter / 20)
    assert variances.mean().sqrt().item() == pytest.approx(scatter, rel=0.1)
    inside = ((energies - truth).abs() <= 3 * variances.sqrt()).float().mean().item()
    assert inside >= 0.98
    assert scatter > 0.02 * truth  # else nothing was tested


def test_a_token_that_is_masked_is_never_drawn():
    weight, rows = random(50, 16), random(1000, 16, seed=1)
    mask = torch.arange(1000) % 50 == 3
    rows[~mask] = 0
    rows[mask] += 1
    energy, variance = of(Way(400), weight, rows, mask=mask)
    assert energy == pytest.approx(exact(weight, rows), abs=3 * variance**0.5)
    assert of(Way(400), weight, torch.zeros(1000, 16), mask=torch.zeros(1000, dtype=torch.bool)) == (0, 0)


def test_what_all_tokens_and_all_words_share_adds_no_error():
    weight, rows = random(50, 16), random(1000, 16, seed=1)
    _, small = of(Way(100), weight, rows, row_mean=weight.double().mean(0))
    weight, rows = weight + 30 * random(1, 16, seed=2), rows + 30 * random(1, 16, seed=3)
    energy, variance = of(Way(100), weight, rows, row_mean=weight.double().mean(0))
    assert variance == pytest.approx(small, rel=0.1)
    assert energy == pytest.approx(exact(weight, rows), abs=3 * variance**0.5)
    assert variance**0.5 < 1e-4 * energy


def test_the_sample_leaves_global_random_numbers_alone_and_repeats():
    weight, rows = random(50, 16), random(1000, 16, seed=1)
    state = torch.random.get_rng_state()
    first, second = (of(Way("sample"), weight, rows) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == second
    way = Way("sample")
    assert of(way, weight, rows) != of(way, weight, rows)


def samples(way, tokens, m, n):
    return way.samples(n * n * (m + tokens), tokens=tokens, m=m, n=n)


def test_auto_is_exact_where_that_is_affordable():
    gpt2, llama = {"m": 50_304, "n": 768, "tokens": 4096}, {"m": 128_256, "n": 4096, "tokens": 8192}
    assert samples(Way("auto", every=1), **gpt2)
    assert not samples(Way("auto", every=10), **gpt2)
    assert samples(Way("auto", every=10), **llama)
    assert not samples(Way("auto", every=20), **llama)
    assert not samples(Way("auto", every=1), m=5000, n=SAMPLE // 2, tokens=1000)  # dearer as a sample
    assert not samples(Way("auto", every=1), m=SAMPLE, n=4096, tokens=100_000)  # a small layer to begin with
    assert not samples(Way("exact", every=1), **llama)
    assert samples(Way("sample", every=1000), **llama)
    assert not samples(Way("sample"), m=500, n=300, tokens=SAMPLE)  # no more tokens than that


@pytest.mark.parametrize("asked", ["never", 1, 0, -3, True, 2.5, None])
def test_what_is_asked_for_is_checked(asked):
    with pytest.raises(InputError, match=r"without_logits: expected 'auto', 'exact', 'sample' or a number of tokens"):
        Way(asked)


def test_errors_of_all_forms_against_their_scatter():
    weight, inputs = random(60, 16) + 0.3, random(2000, 16, seed=1) * torch.linspace(0.5, 2, 16) + 0.3
    way, forms = Way(200), ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
    found, errors = {form: [] for form in forms}, {form: [] for form in forms}
    for _ in range(200):
        meter = Meter((60, 16), weight.device, way=way)
        meter.add(weight, inputs)
        packed = meter.pack()
        energies, _, _ = unpack(packed, packed.vector.numpy())
        for form in forms:
            found[form].append(getattr(energies, form))
            errors[form].append(energies.standard_errors[form])
    for form in forms:
        scatter = torch.tensor(found[form]).std().item()
        assert torch.tensor(errors[form]).mean().item() == pytest.approx(scatter, rel=0.15), form
    assert sum(errors["lar_centered"]) > 1.1 * sum(errors["lar"])


def test_of_a_part_of_the_rows_no_sample_is_taken_and_of_a_part_of_the_columns_no_energy():
    weight, inputs = random(60, 16), random(2000, 16, seed=1)
    meter = Meter(Share(shape=(60, 16), spread=True), weight.device, way=Way(100))
    meter.add(weight[:30], inputs)
    packed = meter.pack()
    energies, _, _ = unpack(packed, packed.vector.numpy())
    assert energies.output_error == 0
    assert energies.output == pytest.approx(exact(weight[:30], inputs), rel=1e-5)
    meter = Meter(Share(shape=(60, 32)), weight.device)
    with pytest.raises(InputError, match="this rank has 16 of 32 columns"):
        meter.add(weight, inputs)
