"""Which sample a row is: hashes of rows against what must and must not change them."""

import numpy as np
import pytest
import torch

from logalign.torch.rows import HIGHEST, LARGEST_ROW, can_be_hashed, mixed_up, row_hashes, rows_among


def tokens(rows=50, length=20, seed=0):
    return torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


KINDS = {
    "tokens": tokens(),
    "int32": tokens().int(),
    "images": torch.randint(0, 256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8),
    "float32": torch.randn(50, 12, generator=torch.Generator().manual_seed(0)),
    "float64": torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "bfloat16": torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "float16": torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).half(),
    "complex": torch.randn(50, 12, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)),
    "bool": torch.rand(50, 64, generator=torch.Generator().manual_seed(0)) < 0.5,
    "numbers": torch.arange(50),
    "one-hot": torch.eye(50).long(),
}


@pytest.mark.parametrize("rows", KINDS.values(), ids=KINDS)
def test_rows_are_told_apart_and_known_again_wherever_they_stand(rows):
    hashes = row_hashes(rows)
    assert hashes.dtype == torch.int64
    assert hashes.shape == (50,)
    assert int(hashes.min()) >= 0
    assert int(hashes.max()) <= HIGHEST
    assert hashes.unique().numel() == 50
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(row_hashes(rows[order]), hashes[order])
    assert torch.equal(row_hashes(rows[7:8]), hashes[7:8])


@pytest.mark.parametrize("rows", KINDS.values(), ids=KINDS)
def test_one_element_changes_a_hash(rows):
    rows = rows.clone()
    before = row_hashes(rows)
    flat = rows.reshape(50, -1)
    flat[3, -1] = ~flat[3, -1] if rows.dtype == torch.bool else flat[3, -1] + 1
    after = row_hashes(rows)
    assert after[3] != before[3]
    assert (after == before).sum() == 49


def test_order_matters():
    rows = tokens()
    assert (row_hashes(rows.flip(1)) == row_hashes(rows)).sum() == 0


def test_zeros_behind_change_nothing():
    rows = tokens()
    assert torch.equal(row_hashes(torch.nn.functional.pad(rows, (0, 9))), row_hashes(rows))


@pytest.mark.parametrize("padding", [(0, 9), (9, 0), (4, 5)])
@pytest.mark.parametrize("known_by", ["mask", "token"])
def test_padding_anywhere_changes_nothing_where_it_is_known(padding, known_by):
    rows, value = tokens(), 0 if known_by == "mask" else 77
    padded = torch.nn.functional.pad(rows, padding, value=value)
    mask = torch.nn.functional.pad(torch.ones_like(rows), padding)
    if known_by == "mask":
        assert torch.equal(row_hashes(padded, mask=mask), row_hashes(rows, mask=torch.ones_like(rows)))
        assert torch.equal(row_hashes(padded, mask=mask), row_hashes(rows))
    else:
        assert torch.equal(row_hashes(padded, padding=77), row_hashes(rows))


def test_of_large_rows_some_elements_are_looked_at():
    rows = torch.randn(4, 3 * LARGEST_ROW, generator=torch.Generator().manual_seed(0))
    before = row_hashes(rows)
    rows[0, 3] += 1
    rows[1, 1] += 1
    assert (row_hashes(rows) == before).tolist() == [False, True, True, True]


def test_hashes_are_spread_evenly():
    """As uniform numbers are: the highest of 10,000 halves' shares is within five standard deviations."""
    hashes = mixed_up(torch.arange(10_000)).double() / HIGHEST
    counts = np.histogram(hashes.numpy(), bins=20, range=(0, 1))[0]
    assert abs(counts - 500).max() < 5 * 500**0.5
    assert float(np.corrcoef(hashes[:-1], hashes[1:])[0, 1]) == pytest.approx(0, abs=0.05)


def test_which_argument_the_rows_are():
    ids, mask, images, labels = tokens(), torch.ones(50, 20), KINDS["images"], torch.arange(50)
    floats = KINDS["float32"]

    def of(positional, args, **kwargs):
        rows, attention = rows_among(positional, args, kwargs)
        return [id(each) for each in rows], attention

    def are(*tensors):
        return [id(each) for each in tensors]

    assert of(("x",), (floats,))[0] == are(floats)
    assert of((), (), attention_mask=mask, input_ids=ids) == (are(ids), mask)
    assert of(("pixels", "labels"), (floats, labels))[0] == are(floats)
    assert of(("floats", "ids"), (floats, ids))[0] == are(ids, floats)
    assert of((), (), inputs_embeds=floats, labels=labels)[0] == []
    assert of(("batch",), ({"input_ids": ids, "labels": labels, "attention_mask": mask},)) == (are(ids), mask)
    assert of(("batch",), ({"label": labels, "image": images},))[0] == are(images)
    assert of((), (), input_ids=ids, pixel_values=images)[0] == are(ids, images)
    assert of(("batch",), ([floats, labels],))[0] == are(floats, labels)
    assert of(("x", "scale"), (floats, torch.ones(3)))[0] == are(floats)
    assert of(("images",), (images,))[0] == are(images)
    assert of((), ())[0] == []
    assert of(("n",), (3,))[0] == []
    assert of(("a",), (ids, floats))[0] == are(ids, floats)  # more than the forward takes: of a wrapper


@pytest.mark.parametrize(
    ("rows", "can"),
    [
        (tokens(), True),
        (torch.eye(3).to_sparse(), False),
        (torch.empty(3, 2, device="meta"), False),
        (torch.empty(0, 2), False),
        (torch.tensor(3), False),
    ],
)
def test_what_cannot_be_hashed(rows, can):
    assert can_be_hashed(rows) is can
