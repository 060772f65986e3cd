"""Which tokens count, from labels as models take them and from the user."""

import pytest
import torch
from torch import nn

from logalign.errors import InputError
from logalign.torch.masks import TokenMask, shifts_labels

LABELS = torch.tensor([[5, -100, 7, 8], [-100, 2, 3, -100]])
COUNTED = [[True, False, True, True], [False, True, True, False]]
SHIFTED = [[False, True, True, False], [True, True, False, False]]
TOKENS = torch.Size([2, 4])


class Plain(nn.Module):
    def forward(self, x, targets=None, *, labels=None, shift_labels=None, logits_to_keep=0): ...


class TinyForCausalLM(Plain):
    pass


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs): ...


def mask_for(model, *args, shifts=None, ignore_index=-100, **kwargs):
    mask = TokenMask(model, ignore_index=ignore_index, shift_labels=shifts)
    mask.see(args, kwargs)
    return mask


def test_no_labels_no_mask():
    mask = mask_for(Plain(), torch.ones(2, 4))
    assert mask.of(TOKENS) is None
    assert mask.source == "none seen: every token counts"
    assert not mask.was_seen


@pytest.mark.parametrize("name", ["labels", "targets", "shift_labels"])
def test_labels_by_keyword(name):
    mask = mask_for(Plain(), torch.ones(2, 4), **{name: LABELS})
    assert mask.of(TOKENS).tolist() == COUNTED
    assert mask.source == f"forward argument '{name}' != -100"
    assert mask.was_seen


def test_positional_targets():
    mask = mask_for(Plain(), torch.ones(2, 4), LABELS)
    assert mask.of(TOKENS).tolist() == COUNTED
    assert mask.source == "forward argument 'targets' != -100"


def test_labels_that_the_model_shifts():
    mask = mask_for(TinyForCausalLM(), labels=LABELS)
    assert mask.of(TOKENS).tolist() == SHIFTED
    assert mask.source == "forward argument 'labels' != -100, shifted by one"


def test_only_labels_are_shifted():
    assert mask_for(TinyForCausalLM(), targets=LABELS).of(TOKENS).tolist() == COUNTED
    not_given = mask_for(TinyForCausalLM(), labels=torch.zeros_like(LABELS), shift_labels=None)
    assert not_given.of(TOKENS).tolist() == [[True, True, True, False]] * 2


def test_labels_shifted_already_come_first():
    mask = mask_for(TinyForCausalLM(), labels=torch.zeros_like(LABELS), shift_labels=LABELS)
    assert mask.of(TOKENS).tolist() == COUNTED
    assert mask.source == "forward argument 'shift_labels' != -100"


def test_the_user_may_say_whether_labels_are_shifted():
    assert mask_for(Plain(), labels=LABELS, shifts=True).of(TOKENS).tolist() == SHIFTED
    assert mask_for(TinyForCausalLM(), labels=LABELS, shifts=False).of(TOKENS).tolist() == COUNTED


def test_another_index_to_ignore():
    mask = mask_for(Plain(), targets=torch.tensor([[1, 0, 2]]), ignore_index=0)
    assert mask.of(torch.Size([1, 3])).tolist() == [[True, False, True]]


def test_labels_of_a_classifier():
    mask = mask_for(TinyForCausalLM(), labels=torch.tensor([1, -100, 3]))
    assert mask.of(torch.Size([3])).tolist() == [True, False, True]


def test_labels_of_a_regression_are_no_mask():
    assert mask_for(Plain(), labels=torch.ones(2, 4)).of(TOKENS) is None


def test_the_last_logits_only():
    mask = mask_for(TinyForCausalLM(), labels=LABELS, logits_to_keep=2)
    assert mask.of(torch.Size([2, 2])).tolist() == [row[2:] for row in SHIFTED]


@pytest.mark.parametrize(("kept", "last"), [(0, 0), (2, 2), (torch.tensor([1, 3]), -1)], ids=["all", "two", "some"])
def test_how_many_last_tokens_a_forward_keeps(kept, last):
    mask = mask_for(TinyForCausalLM(), labels=LABELS, logits_to_keep=kept)
    assert mask.last == last
    mask.see((), {"labels": LABELS})
    assert mask.last == 0


def test_targets_that_a_loss_was_given_come_before_the_labels_of_the_forward():
    mask = mask_for(TinyForCausalLM(), labels=LABELS)
    mask.see_targets(LABELS == 5, "targets of Loss")
    assert mask.of(TOKENS).tolist() == (LABELS == 5).tolist()
    assert mask.source == "targets of Loss"
    mask.see((), {"labels": LABELS})
    assert mask.of(TOKENS).tolist() == SHIFTED


def test_the_mask_of_the_user_comes_before_the_targets_of_a_loss():
    mask = mask_for(Plain())
    mask.give(LABELS == 7)
    mask.see((), {})
    mask.see_targets(LABELS == 5, "targets of Loss")
    assert mask.of(TOKENS).tolist() == (LABELS == 7).tolist()
    assert mask.source == "monitor.mask()"


def test_flat_tokens_take_the_same_mask():
    flat = mask_for(Plain(), targets=LABELS).of(torch.Size([8]))
    assert flat.tolist() == COUNTED[0] + COUNTED[1]


def test_consecutive_chunks_take_consecutive_parts():
    mask = mask_for(Plain(), targets=LABELS)
    parts = [mask.of(torch.Size([2, length])) for length in (1, 2, 1)]
    assert torch.cat(parts, dim=1).tolist() == COUNTED
    mask.see((), {"targets": LABELS})  # the next forward begins anew
    flat = [mask.of(torch.Size([length])) for length in (3, 5)]
    assert torch.cat(flat).tolist() == COUNTED[0] + COUNTED[1]


def test_labels_that_do_not_fit_are_said_so():
    mask = mask_for(Plain(), targets=LABELS)
    assert mask.of(torch.Size([3, 4])) is None
    assert mask.source == "none: labels of shape (2, 4) do not match the tokens (3, 4), every token counts"


def test_a_given_mask_comes_first_and_serves_one_forward():
    mask = TokenMask(Plain(), ignore_index=-100, shift_labels=None)
    given = torch.tensor(COUNTED).logical_not()
    mask.give(given)
    mask.see((), {"targets": LABELS})
    assert torch.equal(mask.of(TOKENS), given)
    assert mask.source == "monitor.mask()"
    mask.forward_over()
    assert torch.equal(mask.of(TOKENS), given)  # for what backward recomputes
    mask.see((), {})
    assert mask.of(TOKENS) is None
    mask.give(given)
    mask.step_over()
    mask.see((), {})
    assert mask.of(TOKENS) is None


def test_a_given_mask_that_does_not_fit_is_refused():
    mask = TokenMask(Plain(), ignore_index=-100, shift_labels=None)
    mask.give(torch.ones(2, 3, dtype=torch.bool))
    mask.see((), {})
    with pytest.raises(InputError) as caught:
        mask.of(TOKENS)
    assert str(caught.value) == (
        "mask: expected one value for each of the tokens (2, 4) that reach the layer, found shape (2, 3)"
    )
    with pytest.raises(InputError, match=r"mask: expected a tensor of bool, found torch\.int64; compare it first"):
        mask.give(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="mask: expected a tensor of bool, found list"):
        mask.give([True])


def test_wrappers_are_seen_through():
    wrapped = Wrapper(TinyForCausalLM())
    assert shifts_labels(wrapped)
    assert not shifts_labels(Wrapper(Plain()))
    positional = TokenMask(wrapped, ignore_index=-100, shift_labels=None)
    positional.see((torch.ones(2, 4), LABELS), {})
    assert positional.of(TOKENS).tolist() == COUNTED
    compiled = torch.compile(TinyForCausalLM(), backend="eager")
    assert mask_for(compiled, labels=LABELS).of(TOKENS).tolist() == SHIFTED
