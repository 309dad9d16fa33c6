"""config.json of version 1, which had a format of its own for decoders and one for encoders.

Tensors had the names, types and shapes of today, so this is all that differs.
"""

from __future__ import annotations

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject, check_keys
from nomatmul.formats.packed.layout import FLOAT_FORMS, TREE_PACKING

_COMMON = {"format", "format_version", "model"}
_KEYS = {
    "nomatmul-packed": _COMMON | {"packing", "embedding"},
    "nomatmul-packed-encoder": _COMMON | {"forms", "head"},
}


def upgraded(values: JsonObject) -> JsonObject:
    """A config.json of version 1 as version 2 says it; any other as it is.

    Raises FormatError for a key that is unknown or missing.
    """
    keys, version = _KEYS.get(str(values.get("format"))), values.get("format_version")
    if keys is None or isinstance(version, bool) or version != 1:
        return values
    check_keys("config key", values, keys)
    model = values["model"]
    trees = isinstance(model, dict) and model.get("channel_mixer") == "fff"
    said = {"format": "nomatmul-packed", "format_version": 2, "model": model}
    if "packing" in keys:
        forms = {"ternary": values["packing"], "embedding": values["embedding"]}
        return {**said, "forms": {**forms, "rows": TREE_PACKING} if trees else forms}
    check_keys("key of forms", values["forms"], {"rows", "dense", "embedding"})
    forms = dict(values["forms"])
    if not trees and forms["rows"] not in FLOAT_FORMS:  # said of models without trees, too
        raise FormatError(f"rows form {forms['rows']!r} is unknown")
    if not trees:
        del forms["rows"]
    return {**said, "forms": forms, "head": values["head"]}
