"""Dates as people write them in many languages, with their ISO 8601 form: pairs made from Babel's CLDR data.

"domingo, 3 de abril de 2005" -> "2005-04-03". Every pair of a locale and a format is such that no text is
written for two dates (a test goes through all of them), so that the task can be done without a fault.
"""

from __future__ import annotations

import datetime

import numpy as np

from jaxgen.data.texts import SPLITS, Pairs, split_of
from jaxgen.types import UserError, unknown

LOCALES = (
    *("en_US", "en_GB", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "pl"),
    *("cs", "ru", "uk", "tr", "el", "fi", "hu", "ja", "zh", "ko", "id"),
)
FORMATS = ("full", "long", "medium")
FIRST, LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)
_SALTS = {split: salt for salt, split in enumerate(SPLITS, 1)}


def write_date(date: datetime.date, locale: str, form: str) -> str:
    """The date as CLDR writes it, lower case: "sunday, april 3, 2005"."""
    from babel.dates import format_date

    return format_date(date, form, locale=locale).lower()


def date_pairs(split: str, num: int, *, seed: int) -> Pairs:
    """`num` pairs of a date of this split, in a locale and a format drawn alike, and its ISO form.

    Dates are drawn with replacement from the days of 1950 to 2049 that belong to the split: no date is in two
    splits. The same (split, num, seed) gives the same pairs. Raises UserError where num is below 1.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if num < 1:
        raise UserError(f"the number of dates must be at least 1, not {num}")
    days = (FIRST + datetime.timedelta(days=n) for n in range((LAST - FIRST).days + 1))
    dates = [day for day in days if split_of(day.isoformat()) == split]
    generator = np.random.default_rng([seed, _SALTS[split]])
    chosen = generator.integers(0, (len(dates), len(LOCALES), len(FORMATS)), (num, 3))
    source = tuple(write_date(dates[d], LOCALES[locale], FORMATS[form]) for d, locale, form in chosen)
    return Pairs("dates", split, source, tuple(dates[d].isoformat() for d, _, _ in chosen))
