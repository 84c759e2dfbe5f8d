"""Which recipe a stack gets: rules as users write them, and their order."""

from __future__ import annotations

import pytest

from qmoe_format.conversion.methods import Method, Methods, Rule
from qmoe_format.quantize import recipe
from tests.refusals import refusal

NAMES = [f"model.layers.{n}.experts.{m}" for n in range(12) for m in ("w1", "w2", "w3")]


def parse(text: str, calibrated: bool = True) -> Rule:
    return Rule.parse(text, calibrated=calibrated)


@pytest.mark.parametrize(
    ("text", "pattern", "name", "choices"),
    [
        ("*.w2=gptq:3", "*.w2", "gptq", {"bits": 3}),
        ("*=rd", "*", "rd", {}),
        ("*=rd:3", "*", "rd", {"levels": 3}),
        ("*=moqe", "*", "moqe", {}),
        ("*=moqe:4:log", "*", "moqe", {"bits": 4, "grid": "log"}),
        ("*=moqe:log:4", "*", "moqe", {"bits": 4, "grid": "log"}),
        ("*=moqe:log", "*", "moqe", {"grid": "log"}),
        ("[ab]?.*=int4-experts", "[ab]?.*", "int4-experts", {}),
        ("a=b=finequant:8", "a=b", "finequant", {"bits": 8}),
        ("*=int-group", "*", "gptq", {}),
        ("*=int-group:2", "*", "gptq", {"bits": 2}),
        ("*=int-group:8", "*", "moqe", {"bits": 8}),
        ("*=int-group:3:log", "*", "moqe", {"bits": 3, "grid": "log"}),
    ],
)
def test_rules(text: str, pattern: str, name: str, choices: dict[str, object]) -> None:
    rule = parse(text)
    assert rule.pattern == pattern
    assert rule.method.recipe is recipe(name)
    assert rule.method.choices == choices


def test_integers_without_text_are_rounded() -> None:
    for text in ("*=int-group", "*=int-group:3", "*=int-group:8"):
        assert parse(text, calibrated=False).method.recipe.name == "moqe"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not understood; write PATTERN=RECIPE"),
        ("rd", "is not understood"),
        ("=rd", "is not understood"),
        ("*=", "is not understood"),
        ("*=:3", "is not understood"),
        ("*=rdd", "recipe 'rdd' is unknown; choose one of "),
        ("*=gptq:8", "recipe 'gptq' has no choice '8'; choose one of bits 2, 3, 4"),
        ("*=gptq:", "recipe 'gptq' has no choice ''; choose one of"),
        ("*=rd:5", "recipe 'rd' has no choice '5'; choose one of levels 3"),
        ("*=rd:log", "recipe 'rd' has no choice 'log'"),
        ("*=rtn:3", "recipe 'rtn' has no choice '3'; leave it out"),
        ("*=moqe:3:sine", "no choice 'sine'; choose one of bits 2, 3, 4, 8; grid linear, log"),
        ("*=gptq:2:3", "two choices are of one kind; leave out one of them"),
    ],
)
def test_rules_that_make_no_sense(text: str, said: str) -> None:
    message = refusal(lambda: parse(text), "argument")
    assert message.startswith(f"rule {text!r}")
    assert said in message


def test_the_last_rule_that_matches_counts() -> None:
    rules = [parse("*.w2=gptq:4"), parse("*.layers.1.*=rd:3"), parse("*.layers.1[01].*=moqe:8")]
    methods = Methods(Method(recipe("rd")), rules)
    assert str(methods.of("model.layers.0.experts.w1")) == "rd"
    assert str(methods.of("model.layers.0.experts.w2")) == "gptq:4"
    assert str(methods.of("model.layers.1.experts.w2")) == "rd:3"
    assert str(methods.of("model.layers.11.experts.w2")) == "moqe:8"
    swapped = Methods(Method(recipe("rd")), rules[::-1])
    assert str(swapped.of("model.layers.1.experts.w2")) == "gptq:4"


def test_case_matters_everywhere() -> None:
    methods = Methods(Method(recipe("rtn")), [parse("*.W2=moqe")])
    assert methods.of("experts.w2").recipe.name == "rtn"
    assert methods.of("experts.W2").recipe.name == "moqe"


def test_rules_that_match_nothing() -> None:
    methods = Methods(Method(recipe("rd")), [parse("*.w2=gptq"), parse("*.w4=gptq")])
    message = refusal(lambda: methods.check(NAMES), "argument")
    assert message.startswith("no stack matches '*.w4'; the experts' stacks are model.layers.0.")
    Methods(Method(recipe("rd")), [parse("*.w2=gptq"), parse("*=rd")]).check(NAMES)


def test_whether_a_rate_is_needed() -> None:
    plain, rated = Method(recipe("qmoe")), Rule("*.w2", Method(recipe("rd")))
    assert not Methods(plain).rated
    assert Methods(plain, [rated]).rated
    assert Methods(Method(recipe("rd")), [Rule("*", plain)]).rated


def test_choices_are_checked_at_once() -> None:
    message = refusal(lambda: Method(recipe("gptq"), {"bits": 8}), "argument")
    assert message == "recipe 'gptq' does not have bits 8; choose one of 2, 3, 4"
    message = refusal(lambda: Method(recipe("rtn"), {"levels": 3}), "argument")
    assert message == "recipe 'rtn' has no 'levels'; use it with rd"
