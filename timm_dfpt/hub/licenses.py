"""Licenses: of what is published, and of the models that it comes from, whose terms may extend to it."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from .card_text import cell_text

__all__ = ['License', 'license_of', 'source_facts', 'source_terms']

# Ids as the Hub writes them: https://huggingface.co/docs/hub/repositories-licenses.
_ID = re.compile(r'[a-z0-9][a-z0-9.+\-]*')
_LINK = re.compile(r'https?://\S+')
# They ask for their text to be kept, and for nothing of what is made with the model.
_PERMISSIVE = (
    '0bsd', 'afl-3.0', 'apache-2.0', 'bsd', 'bsd-2-clause', 'bsd-3-clause', 'bsd-3-clause-clear', 'bsl-1.0',
    'cc-by-2.0', 'cc-by-2.5', 'cc-by-3.0', 'cc-by-4.0', 'cc0-1.0', 'isc', 'mit', 'ms-pl', 'ncsa', 'postgresql',
    'unlicense', 'wtfpl', 'zlib',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class License:
    """The license of published weights, as the metadata of a model card names it.

    Args:
        license: Id of the Hub, e.g. `'apache-2.0'`, or `'other'`; `None` if none is given.
        license_name: Name of another license, e.g. `'my-license-1.0'`.
        license_link: Address of its text.

    Raises:
        ValueError: If one of them is not what the Hub takes, or they do not fit each other.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None

    def __post_init__(self) -> None:
        for option, value in (('license', self.license), ('license_name', self.license_name)):
            if value is not None and (not isinstance(value, str) or not _ID.fullmatch(value)):
                raise ValueError(
                    f'{option}={value!r} must be lowercase letters, digits, dots and hyphens, such as '
                    f'{"apache-2.0" if option == "license" else "my-license-1.0"}.'
                )
        link = self.license_link
        if link is not None and (not isinstance(link, str) or not _LINK.fullmatch(link)):
            raise ValueError(f'license_link={link!r} must be the address of a text, such as https://example.org/terms.')
        if self.license == 'other' and not (self.license_name and link):
            missing = 'license_link' if self.license_name else 'license_name'
            raise ValueError(
                f'license=other needs {missing}: give --license-name and --license-link, or name a license of the Hub '
                'such as apache-2.0.'
            )
        for option in ('license_name', 'license_link'):
            value = getattr(self, option)
            if value is not None and self.license != 'other':
                raise ValueError(
                    f'{option}={value!r} has no effect with license={self.license}: leave it out, or give --license '
                    'other.'
                )

    @classmethod
    def given(cls, options: Mapping[str, Any]) -> License:
        """Return the license among options; see `License` for what raises."""
        return cls(**{field.name: options.get(field.name) for field in dataclasses.fields(cls)})

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> License:
        """Return the license in the `config.json` of a student."""
        if config.get('license_name') is None:
            return cls(config['pretrained_cfg'].get('license'))
        return cls('other', config['license_name'], config.get('license_link'))

    def write_to(self, config: dict[str, Any]) -> None:
        """Write it into the `config.json` of a student, by its name as timm does."""
        if self.license is None:
            return
        config['pretrained_cfg']['license'] = self.license_name or self.license
        for key in ('license_name', 'license_link'):
            config.pop(key, None)
            if getattr(self, key):
                config[key] = getattr(self, key)

    def metadata(self) -> dict[str, Any]:
        """Return the entries of a card's metadata, without those that are not given."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    def __str__(self) -> str:
        if self.license is None:
            return 'not given by the author'
        return f'[{self.license_name}]({self.license_link})' if self.license_name else self.license


def license_of(model: Any) -> str | None:
    """Return the license of a model's weights, as its `pretrained_cfg` names it; `None` if it does not."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    name = cfg.get('license')
    return name.lower() if isinstance(name, str) and name.lower() != 'unknown' else None


def source_facts(licenses: Mapping[str, str | None]) -> dict[str, str]:
    """Return lines of a card's table about the models that the weights come from.

    Args:
        licenses: License by `'teacher'` and `'start'`, the pretrained weights of a student, for those that there are.
    """
    titles = {'teacher': 'License of the teacher', 'start': 'License of the pretrained weights'}
    return {titles[role]: cell_text(name or 'not stated') for role, name in licenses.items() if role in titles}


def source_terms(licenses: Mapping[str, str | None]) -> str:
    """Return the sentence of a card about licenses whose terms may extend to what is published; `''` without any.

    Args:
        licenses: As for `source_facts`.
    """
    titles = {'teacher': 'the teacher', 'start': 'the pretrained weights that training started from'}
    named = [
        f'of {titles[role]} (`{cell_text(name)}`)'
        for role, name in licenses.items()
        if role in titles and name is not None and name not in _PERMISSIVE
    ]
    if not named:
        return ''
    return (
        f'The license {" and that ".join(named)} is not one of the common permissive ones: its terms may extend to '
        'this model. Read them before you use or publish it.'
    )
