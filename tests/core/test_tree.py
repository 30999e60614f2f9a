import jax.numpy as jnp
import optax
import pytest

from medsyn_jax.core import tree

PARAMS = {"image": {"stages": {"0": {"kernel": jnp.ones((2, 3))}}}, "text": {"bias": jnp.zeros(4)}}


def test_named_and_back():
    names = list(tree.named(PARAMS))
    assert names == ["image/stages/0/kernel", "text/bias"]
    back = tree.unnamed(tree.named(PARAMS), PARAMS)
    assert back["image"]["stages"]["0"]["kernel"] is PARAMS["image"]["stages"]["0"]["kernel"]


def test_names_of_optimizer_state_end_in_the_parameter_names():
    names = tree.named(optax.adam(1e-3).init(PARAMS))
    assert any(name.endswith("mu/image/stages/0/kernel") for name in names)


def test_unnamed_lists_what_does_not_fit():
    flat = tree.named(PARAMS)
    flat["more"] = flat.pop("text/bias")
    with pytest.raises(KeyError, match=r"missing \['text/bias'\] \(1\), extra \['more'\] \(1\)"):
        tree.unnamed(flat, PARAMS)


def test_first_matching_rule_wins_and_must_match_the_whole_name():
    rules = (("image/.*", 1), ("image", 2), (".*", 3))
    assert tree.match(rules, "image/stages") == 1
    assert tree.match(rules, "image") == 2
    assert tree.match(rules, "the image") == 3
    with pytest.raises(LookupError, match="no rule matches 'text/bias'"):
        tree.map_rules(rules[:2], PARAMS)
    assert tree.size(PARAMS) == 10
