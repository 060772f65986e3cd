"""The small GPT is a causal language model with an unembedding of its own."""

import math

import pytest
import torch

from logalign.demos.gpt import GPT
from logalign.errors import InputError


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(0))


def small(*, tied: bool = False) -> GPT:
    torch.manual_seed(0)
    return GPT(vocabulary=50, width=32, layers=2, heads=4, context=16, tied=tied)


def test_a_later_token_changes_no_earlier_logit(tokens):
    model = small().eval()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_initial_loss_is_that_of_guessing(tokens):
    logits = small()(tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert logits.shape == (3, 16, 50)
    assert loss.item() == pytest.approx(math.log(50), abs=0.1)


def test_the_head_is_tied_only_when_asked():
    tied, untied = small(tied=True), small()
    assert tied.lm_head.weight is tied.tokens.weight
    assert untied.lm_head.weight is not untied.tokens.weight
    assert untied.lm_head.bias is None


def test_refuses_a_width_that_heads_do_not_divide():
    with pytest.raises(InputError, match="found width 30 and 4 heads"):
        GPT(vocabulary=50, width=30, heads=4)
