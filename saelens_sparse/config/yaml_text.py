"""YAML with the values of JSON."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from typing_extensions import override

from saelens_sparse.config.messages import shown


class _Loader(yaml.SafeLoader):
    """Of what PyYAML reads, leaves out aliases, dates and words such as `yes` for true."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    @override
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias; what several SAEs share goes into `sae`")
        return super().compose_node(parent, index)

    @override
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        values: dict[Hashable, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError("a field has no name")
            if key.value in values:
                raise ValueError(f"{shown(key.value)} is given twice")
            values[key.value] = self.construct_object(value, deep=True)
        return values


# As in YAML 1.2. For PyYAML, 1e-4 is a text.
for _tag, _pattern, _first in (
    ("null", r"(null|~|)$", "n~\0"),
    ("bool", r"(true|false)$", "tf"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)$", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _starts = ["" if one == "\0" else one for one in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _starts)


def parse_yaml(text: str) -> Any:
    """
    The value of a YAML text: objects, lists, texts, numbers, true, false and null.

    Raises:
        ValueError: it is no YAML, is nested too deeply for Python, names a field twice, or has
            aliases.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, AttributeError, LookupError) as error:  # of a value not of its tag
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
