"""Learning rates against batch size, at values that were published or follow by hand."""

import pytest

from largebatch.schedules import RULES, scale_lr


def test_linear_gives_the_learning_rate_of_imagenet_in_one_hour() -> None:
    # Goyal et al., 1706.02677: 0.1 for each 256 images, hence 3.2 at 8,192.
    assert scale_lr(0.1, 256, 8192, "linear") == pytest.approx(3.2, rel=1e-12)


def test_sqrt_gives_the_learning_rates_of_lamb_for_bert() -> None:
    # You et al., 1904.00962, table 4: 5 / (2^e 1000), where e falls by a half for each doubling.
    batches = [512, 1024, 2048, 4096, 8192, 16384, 32768]
    for batch, exponent in zip(batches, [3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.0], strict=True):
        published = 5.0 / (2.0**exponent * 1000)
        assert scale_lr(5e-3, 32768, batch, "sqrt") == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize(("rule", "lr"), [("none", 0.1), ("linear", 0.8), ("sqrt", 0.282842712)])
def test_eight_times_the_batch(rule: str, lr: float) -> None:
    assert scale_lr(0.1, 64, 512, rule) == pytest.approx(lr, rel=1e-8)


@pytest.mark.parametrize("rule", RULES)
def test_the_base_batch_keeps_its_learning_rate_to_the_last_bit(rule: str) -> None:
    assert scale_lr(0.1234, 192, 192, rule) == 0.1234


@pytest.mark.parametrize("rule", RULES)
def test_scaling_up_and_down_again_returns(rule: str) -> None:
    there = scale_lr(0.3, 256, 4096, rule)
    assert scale_lr(there, 4096, 256, rule) == pytest.approx(0.3, rel=1e-12)


def test_sqrt_is_the_rule_where_none_is_named() -> None:
    assert scale_lr(0.1, 64, 256) == scale_lr(0.1, 64, 256, "sqrt")


def test_any_function_of_the_ratio_is_a_rule() -> None:
    assert scale_lr(0.1, 64, 256, lambda kappa: kappa**0.25) == pytest.approx(0.1 * 2**0.5)


def test_an_unknown_rule_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="one of none, linear, sqrt, got 'cubic'"):
        scale_lr(0.1, 64, 256, "cubic")


def test_impossible_values_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^base_lr must be a number > 0, got 0.0$"):
        scale_lr(0.0, 64, 256)
    with pytest.raises(
        ValueError, match=r"^base_batch must be a whole number of at least 1 .*got 0$"
    ):
        scale_lr(0.1, 0, 256)
    with pytest.raises(ValueError, match=r"^batch must be a whole number of at least 1 .*got 2.5$"):
        scale_lr(0.1, 64, 2.5)  # type: ignore[arg-type]
