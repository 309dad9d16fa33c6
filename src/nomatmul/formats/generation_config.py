"""generation_config.json: how the makers of a model mean its tokens to be chosen.

Its end tokens are joined with those of config.json when a model is opened (`checkpoint`).
"""

from __future__ import annotations

from pathlib import Path

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import read_json_object

GENERATION_FILE = "generation_config.json"
# The keys that are read are the fields of engine.sampling.Sampling of the same names.
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")


def sampling_defaults(directory: Path) -> dict[str, float | int]:
    """{field of Sampling: value} that the file in a model directory gives; {} where there is none.

    `do_sample: false` is temperature 0, which takes the likeliest token. Raises FormatError for a
    file that is damaged, or a value that is no number.
    """
    path = directory / GENERATION_FILE
    if not path.is_file():
        return {}
    values = read_json_object(path)
    found: dict[str, float | int] = {}
    for key in (*_NUMBERS, "top_k"):
        value = values.get(key)
        if value is None:
            continue
        wrong = not isinstance(value, int) if key == "top_k" else not isinstance(value, int | float)
        if wrong or isinstance(value, bool):
            kind = "whole number" if key == "top_k" else "number"
            raise FormatError(f"{path}: {key} must be a {kind}, found {value!r}")
        found[key] = value
    if values.get("do_sample") is False:
        found["temperature"] = 0.0
    return found
