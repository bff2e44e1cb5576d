"""The loss, the learning rate."""

import pytest
import torch

from samlora.data.ignored import IGNORE
from samlora.training import losses
from samlora.training.losses import dice_ce, dice_loss
from samlora.training.schedule import learning_rate


def test_dice_is_zero_for_a_sure_and_right_answer_and_one_for_a_wrong_one():
    labels = torch.tensor([[[0, 1], [2, 1]]])
    right = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float() * 100
    assert dice_loss(right, labels).item() == pytest.approx(0, abs=1e-4)
    assert dice_loss(right.roll(1, dims=1), labels).item() == pytest.approx(1, abs=1e-4)


def test_dice_counts_over_the_whole_batch_by_hand():
    logits = torch.zeros(2, 2, 1, 2)
    labels = torch.tensor([[[0, 0]], [[0, 1]]])
    # every probability 1/2: background 2 * 1.5 / (4 * .25 + 3), foreground 2 * .5 / (4 * .25 + 1)
    expected = (1 - 3 / 4 + 1 - 1 / 2) / 2
    assert dice_loss(logits, labels).item() == pytest.approx(expected, abs=1e-4)


def test_parts_add_up_and_are_float32():
    logits = torch.randn(2, 3, 4, 4).bfloat16()
    total, ce, dice = dice_ce(logits, torch.randint(0, 3, (2, 4, 4)), 0.7)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(0.3 * ce.item() + 0.7 * dice.item(), rel=1e-6)


@pytest.mark.parametrize("total", [None, 2])
def test_ignored_pixels_are_in_no_part_of_the_loss(total, monkeypatch):
    """The loss is that of the other pixels alone, its gradient is 0 at ignored ones."""
    monkeypatch.setattr(losses, "sum_over_processes", lambda part: part)  # there is one
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 5))
    ignored = torch.rand(2, 4, 5) < 0.4
    marked = labels.masked_fill(ignored, IGNORE)
    found = dice_ce(logits, marked, 0.8, total, ignore=True)
    kept = logits.movedim(1, -1)[~ignored].T[None, :, None]
    expected = dice_ce(kept, labels[~ignored][None, None], 0.8)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found[0], logits)
    assert not gradient.movedim(1, -1)[ignored].any()
    assert gradient.movedim(1, -1)[~ignored].any()
    nothing = dice_ce(logits, torch.full_like(labels, IGNORE), 0.8, total, ignore=True)
    assert torch.isfinite(nothing[0])


def test_a_recipe_that_ignores_changes_nothing_where_all_is_labelled():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    torch.testing.assert_close(dice_ce(logits, labels, ignore=True), dice_ce(logits, labels))


def test_schedule_warms_up_and_decays_to_nothing():
    rates = [learning_rate(s, 1.0, 100, 10) for s in range(130)]
    assert rates[0] == rates[1] == 0.1 and rates[10] == 1.0 and max(rates) == 1.0
    assert all(a >= b for a, b in zip(rates[11:], rates[12:])) and rates[-1] == 0
    assert learning_rate(0, 1.0, 100) == learning_rate(1, 1.0, 100) == 1.0
    assert learning_rate(51, 2.0, 100, exponent=7.0) == pytest.approx(2 * 0.5**7)
