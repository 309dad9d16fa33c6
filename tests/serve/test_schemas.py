"""Schemas and response formats that are refused, and what hostile ones may cost."""

from __future__ import annotations

import threading
import time

import pytest
from serve.vocabularies import grammars_of, spec_of, wander

import nomatmul
from nomatmul.serve.response_format import response_grammar


@pytest.fixture(scope="module")
def lm():
    return nomatmul.load()


@pytest.fixture(scope="module")
def grammars(lm):
    return grammars_of(lm)


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def chained(count, link):
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{count}": {"type": "string"}}}


HOSTILE = {
    "nested": nested(2000),
    "exponential allOf": chained(60, lambda r: {"allOf": [r, r]}),
    "exponential anyOf": chained(60, lambda r: {"anyOf": [r, r]}),
    "exponential properties": chained(
        60, lambda r: {"type": "object", "properties": {"a": r, "b": r}, "required": ["a", "b"]}
    ),
    "products": {
        "allOf": [
            {"anyOf": [{"properties": {f"a{j}{i}": {"type": "string"}}} for i in range(30)]}
            for j in range(5)
        ]
    },
    "products of enums": {"allOf": [{"enum": list(range(400))} for _ in range(5)]},
    "items": {"type": "array", "items": nested(5), "minItems": 10**9, "maxItems": 10**10},
    "items of items": {
        "items": {"items": {"items": {}, "minItems": 9999}, "minItems": 9999}, "minItems": 9999
    },
    "a long text": {"type": "string", "minLength": 10**7},
    "many properties": {"properties": {f"p{i}": {} for i in range(100_000)}},
    "many values": {"enum": list(range(100_000))},
    "a long value": {"const": "x" * 150_000},
    "patterns together": {
        "allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(1, 40)]
    },
    "patterns together by references": {
        "allOf": [{"$ref": f"#/$defs/d{i}"} for i in range(40)],
        "$defs": {
            f"d{i}": {"properties": {"x": {"type": "string", "pattern": f"a.{{{i}}}b"}}}
            for i in range(40)
        },
    },
    "names by patterns": {"patternProperties": {f"^p{i}_.*$": {} for i in range(1000)}},
    "a repeated pattern": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
    "a nested pattern": {"type": "string", "pattern": "(" * 200 + "a" + ")*" * 200},
    "catastrophic backtracking": {"type": "string", "pattern": "^(a+)+(a|aa)+(.*a){12}$"},
    "a state for every subset": {"type": "string", "pattern": "(a|b)*a.{400}", "maxLength": 900},
    "a panic of the compiler": {
        "type": "string", "minLength": 2897, "maxLength": 9413,
        "pattern": "^(.*((.*|[^a])|(a|[^a]|\u00e9|\\p{L})|(\\w|\\d|.*|\\p{L}|\\d)|(\\s){2,}).{23})"
        "\\p{L}a(.*\\d.{27}).",
    },
    "a large multiple": {"type": "integer", "multipleOf": 1_000_003},
    "a large schema": {"properties": {f"{i}": {"enum": ["x" * 900, i]} for i in range(200)}},
    "no end": {"$ref": "#"},
    "a loop": {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}},
    "alternatives": {
        "anyOf": [{"properties": {f"a{i}": {}}, "required": [f"a{i}"]} for i in range(490)]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_end_soon_and_hold_up_nobody(lm, grammars, name):
    """Refused, or compiled and stepped; meanwhile another thread gets its turns."""
    pauses, over = [0.0], threading.Event()

    def watch():
        last = time.perf_counter()
        while not over.wait(0.005):
            now = time.perf_counter()
            pauses.append(now - last)
            last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.thread_time()  # others may use the machine meanwhile
    refusal = ""
    try:
        matcher = grammars.compile(spec_of(HOSTILE[name]))
        wander(matcher, 0, lm.config.end_token_ids, steps=40)
    except ValueError as error:
        refusal = str(error)
    finally:
        took = time.thread_time() - start
        over.set()
        watcher.join()
    assert took < 2
    assert "\n" not in refusal
    assert len(refusal) < 500
    assert max(pauses) < 1


@pytest.mark.parametrize(
    ("schema", "param", "reason"),
    [
        (None, "", "a schema must be an object, got null"),
        ({"properties": {"x": {"not": {}}}}, ".properties.x.not", "not supported"),
        ({"items": [{}]}, ".items", "prefixItems"),
        ({"anyOf": [{}, {"uniqueItems": True}]}, ".anyOf.1.uniqueItems", "not supported"),
        ({"x-guidance": {"lenient": True}}, ".x-guidance", "not supported"),
        ({"type": "text"}, ".type", "types are"),
        ({"format": "color"}, ".format", "formats are"),
        ({"pattern": 3}, ".pattern", "at most 500 characters"),
        ({"const": 2**53 + 1}, ".const", "64 bits hold exactly"),
        ({"enum": ["a", "b\x01"]}, ".enum", "control characters"),
        ({"pattern": r"a\x1fb"}, ".pattern", "control characters"),
        ({"pattern": r"\\\v"}, ".pattern", "control characters"),
        ({"minimum": 1e300}, ".minimum", "beyond"),
        ({"minimum": True}, ".minimum", "it must be a number"),
        ({"minLength": -1}, ".minLength", "whole number"),
        ({"multipleOf": 0}, ".multipleOf", "above 0"),
        ({"$ref": "https://example.com/x"}, ".$ref", "begin with #/"),
        ({"$ref": "#/$defs/x"}, ".$ref", "leads to no schema"),
        ({"required": "x"}, ".required", "list of names"),
        ({"minProperties": 2}, ".minProperties", "by one only"),
        ({"enum": []}, ".enum", "at least one"),
        ({"anyOf": []}, ".anyOf", "at least one"),
        ({"properties": []}, ".properties", "object of schemas"),
        ({"properties": {"a": 3}}, ".properties.a", "a schema must be an object"),
    ],
)
def test_what_is_refused_is_named(schema, param, reason):
    with pytest.raises(ValueError, match=reason) as found:
        spec_of(schema)
    assert found.value.param == "response_format.json_schema.schema" + param


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"properties": {"y": {"pattern": "(?=a)b"}}}, "#/properties/y", "look-around"),
        ({"oneOf": [{"type": "string"}, {"const": "a"}]}, "#", "oneOf"),
        ({"items": {"minLength": 3, "maxLength": 2, "type": "string"}, "minItems": 1,
          "type": "array"}, "#/items", "minLength"),
    ],
)  # fmt: skip
def test_what_the_compiler_refuses_is_named(grammars, schema, place, reason):
    with pytest.raises(ValueError, match=reason) as found:
        grammars.compile(spec_of(schema))
    assert f"at {place}: " in str(found.value)


def test_a_schema_without_text_is_refused(grammars):
    with pytest.raises(ValueError, match="no text satisfies it"):
        grammars.compile(spec_of({"$ref": "#"}))


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("json", ""),
        ({}, ".type"),
        ({"type": "xml"}, ".type"),
        ({"type": "json_object", "schema": {}}, ".schema"),
        ({"type": "json_schema"}, ".json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, ".json_schema.name"),
        (
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
            ".json_schema.name",
        ),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, ".json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": 1}},
            ".json_schema.strict",
        ),
    ],
)
def test_response_formats_are_checked(value, param):
    with pytest.raises(ValueError, match=r"\w") as found:
        response_grammar(value)
    assert found.value.param == "response_format" + param


def test_text_needs_no_grammar():
    assert response_grammar(None) is None
    assert response_grammar({"type": "text"}) is None
