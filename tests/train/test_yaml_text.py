"""Configurations are written as OmegaConf writes them."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from largebatch.conf.yaml_text import to_yaml

ODD = ("", "yes", "N", "off", "True", "null", "~", "1e5", "1_000", "0x1F", "nan", ".inf", "- a",
       "a: b", "# no", "'", '"', " a ", "a\nb\n", "é x", "x" * 200 + " y", "=", "2026-01-01", "[1]",
       "{a}", "*a", "&a", "!a", "%a", "@a")  # fmt: skip

numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.booleans() | st.none()


def trees(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Dictionaries of lists and dictionaries of such texts, and of numbers."""
    texts = texts.filter(lambda text: "${" not in text)
    keys = st.sampled_from(["lr", "yes", "1e5", "a b", "momentum_0.9"])
    inner = st.recursive(
        texts | numbers, lambda of: st.lists(of, max_size=3) | st.dictionaries(keys, of, max_size=3)
    )
    return st.dictionaries(keys, inner, max_size=4)


@given(trees(st.sampled_from(ODD) | st.text(st.characters(min_codepoint=32, max_codepoint=126))))
def test_the_text_is_omegaconf_s(values: dict[str, Any]) -> None:
    assert to_yaml(values) == OmegaConf.to_yaml(OmegaConf.create(values))


@given(trees(st.text(st.characters(exclude_categories=["Cs", "Cc"]))))
def test_any_text_is_read_back(values: dict[str, Any]) -> None:
    assert OmegaConf.create(to_yaml(values)) == OmegaConf.create(values)
