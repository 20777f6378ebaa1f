"""The nodes' texts in other languages: whole, in step with the nodes, and shown by the host."""

from __future__ import annotations

import json
import re

import pytest

from tools.docs.locales import LOCALES, build
from tools.generated import out_of_step

LANGUAGES = {
    "zh": r"[\u4e00-\u9fff]",
    "ja": r"[\u3040-\u30ff\u4e00-\u9fff]",
    "ko": r"[\uac00-\ud7af]",
}
"""Folders of `locales/`, and a letter of the language."""

TITLE = "() => LiteGraph.createNode('IPA_Apply').title"


def leaves(found, path=()):
    if isinstance(found, str):
        yield path, found
        return
    for key, value in found.items():
        yield from leaves(value, (*path, key))


def read(language):
    return json.loads((LOCALES / language / "nodeDefs.json").read_text("utf-8"))


def test_english_is_what_the_nodes_say(object_info):
    assert out_of_step(build(object_info)) == [], (
        "run `python -m tools.docs.locales`, and translate what changed"
    )


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_nothing_that_the_editor_takes_for_a_placeholder(language):
    for path, text in leaves(read(language)):
        assert not re.search(r"[{}@|]", text), path


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated_except_for_what_is_typed_or_chosen(language):
    """Numbers, quoted syntax and file names of the English text stay as they are."""
    english, translated = dict(leaves(read("en"))), dict(leaves(read(language)))
    assert translated.keys() == english.keys()
    for path, text in english.items():
        assert translated[path].strip(), path
        if path[-1] != "name":
            assert re.search(LANGUAGES[language], translated[path]), path
        kept = re.findall(r"\w+/\w+|\w+\.(?:json|safetensors|bin|pt)|per_latent|norm_average", text)
        kept += re.findall(r"'((?:input|output|all|middle)[^']*)'", text)
        kept += re.findall(r"'(\d[^']*)'", text)
        for word in kept:
            assert word in translated[path], (path, word)


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_the_host_offers_them(client, language):
    found = client.get("/i18n")[language]["nodeDefs"]
    assert {name: found[name] for name in read(language)} == read(language)


@pytest.mark.browser
@pytest.mark.nightly
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_editor_shows_them(page, language):
    """The title and the widgets of a node that is added in that language."""
    own = read(language)["IPA_Apply"]
    choose = "(language) => app.extensionManager.setting.set('Comfy.Locale', language)"
    try:
        for _ in range(5):  # the first change may come before the editor has read all texts
            page.evaluate(choose, language)
            page.wait_for_timeout(2000)
            if page.evaluate(TITLE) == own["display_name"]:
                break
            page.evaluate(choose, "en")
        assert page.evaluate(TITLE) == own["display_name"]
        shown = page.evaluate(
            """() => Object.fromEntries(LiteGraph.createNode('IPA_Apply').inputs.map(
                (input) => [input.name, input.localized_name]))"""
        )
    finally:
        page.evaluate(choose, "en")
    for name in ("model", "image_prompt", "weight", "layer_weights"):
        assert shown[name] == own["inputs"][name]["name"]
