"""Items of procedural tasks: endless draws of a text, its answer, and the key that keeps splits apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Nora Oscar Paul Rosa Sam Tina Victor "
    "Alice Brian Carl Diana Eric Fiona George Helen Ian Julia Kevin Laura Mark Nina Oliver Peter Rachel Simon Tom Vera"
)
SURNAMES = _words(
    "Adams Baker Carter Dixon Evans Fisher Green Harris Irving Jones King Lewis Mason Nelson Owens Parker Quinn Reed "
    "Smith Turner Underwood Vance Walker Young Allen Brown Clark Davis Ellis Ford Grant Hill Jackson Kelly Lopez Moore "
    "Norris Page Ross Scott"
)
CITIES = _words(
    "Berlin Paris London Rome Madrid Vienna Oslo Athens Boston Chicago Denver Dallas Miami Seattle "
    "Tokyo Delhi Cairo Lima Toronto Moscow Geneva Milan Lyon Oxford Austin"
)
PARTS = _words(
    "max min item user file name count size list index start end last first page image text total price order date "
    "time error message status input output data value key color width height line word group team score level "
    "code event load save read write open close send check build test"
)
UNITS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
LEAP_YEAR = date(2020, 1, 1)


@dataclass(frozen=True)
class Drawn:
    """A text, its answer, and what no two splits may share."""

    text: str
    answer: str
    key: str


Draw = Callable[[Random], Drawn]


def written_date(rng: Random) -> Drawn:
    """Draw a date in words, to be written as month and day in digits."""
    day = _day(rng)
    month = f"{day:%B}"
    forms = (
        f"{day.day} {month}",
        f"{month} {day.day}",
        f"the {ordinal(day.day)} of {month}",
        f"{month} {ordinal(day.day)}",
        f"{day.day} {month} {rng.randint(1990, 2029)}",
        f"{month[:3]} {day.day}, {rng.randint(1990, 2029)}",
    )
    return Drawn(rng.choice(forms), f"{day:%m-%d}", f"{day:%m-%d}")


def slashed_date(rng: Random) -> Drawn:
    """Draw an American date in digits, to be written as month and day."""
    day = _day(rng)
    forms = (f"{day.month}/{day.day}", f"{day.month}/{day.day}/{rng.randint(1990, 2029)}")
    return Drawn(rng.choice(forms), f"{day:%m-%d}", f"{day:%m-%d}")


def time_of_day(rng: Random) -> Drawn:
    """Draw a time on the 24-hour clock, to be written on the 12-hour clock."""
    hour, minute = divmod(rng.randrange(24 * 60), 60)
    text = f"{hour:02}:{minute:02}"
    return Drawn(text, f"{(hour - 1) % 12 + 1}:{minute:02} {'am' if hour < 12 else 'pm'}", text)


def number_in_words(rng: Random) -> Drawn:
    """Draw a number from 20 to 9,999 in words, to be written in digits."""
    number = rng.randint(20, 10 ** rng.choice((2, 3, 4)) - 1)
    return Drawn(in_words(number), str(number), str(number))


def full_name(rng: Random) -> Drawn:
    """Draw two or three names of a person, to be abridged to initials."""
    names = [*rng.sample(FIRST_NAMES, rng.choice((1, 2))), rng.choice(SURNAMES)]
    text = " ".join(names)
    return Drawn(text, " ".join(f"{name[0]}." for name in names), text)


def numbers_to_sort(rng: Random) -> Drawn:
    """Draw three different numbers, to be written in rising order."""
    numbers = rng.sample(range(1, 100), 3)
    rising = _spaced(sorted(numbers))
    return Drawn(_spaced(numbers), rising, rising)


def numbers_to_compare(rng: Random) -> Drawn:
    """Draw three different numbers of which the largest is asked for."""
    numbers = rng.sample(range(1, 1000), 3)
    return Drawn(", ".join(map(str, numbers)), str(max(numbers)), _spaced(sorted(numbers)))


def person(rng: Random) -> Drawn:
    """Draw a sentence about a person, to be written as name;age;city."""
    name, age, city = rng.choice(FIRST_NAMES), rng.randint(18, 89), rng.choice(CITIES)
    forms = (
        f"{name} is {age} and lives in {city}.",
        f"{name} from {city} is {age} years old.",
        f"In {city} lives {name}, aged {age}.",
        f"At the age of {age}, {name} moved to {city}.",
    )
    return Drawn(rng.choice(forms), f"{name};{age};{city}", f"{name} {age} {city}")


def snake_name(rng: Random) -> Drawn:
    """Draw a name with underscores, to be written in camel case."""
    return _identifier(rng, "_")


def kebab_name(rng: Random) -> Drawn:
    """Draw a name with hyphens, to be written in camel case."""
    return _identifier(rng, "-")


def bare_sum(rng: Random) -> Drawn:
    """Draw a sum or a difference of two numbers below 50."""
    larger, smaller = sorted(rng.sample(range(1, 50), 2), reverse=True)
    if rng.random() < 0.5:
        return Drawn(f"{larger} + {smaller}", str(larger + smaller), f"{larger} {smaller}")
    return Drawn(f"{larger} - {smaller}", str(larger - smaller), f"{larger} {smaller}")


def ordinal(number: int) -> str:
    """Return a day of the month as 1st, 2nd, 3rd, 4th."""
    ending = "th" if number in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def in_words(number: int) -> str:
    """Return a whole number below 10,000 in British words: two thousand and seven."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        tens, units = divmod(number, 10)
        return TENS[tens - 2] + (f"-{UNITS[units]}" if units else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    count, rest = divmod(number, size)
    joint = " and " if rest < 100 else " "
    return f"{UNITS[count]} {name}" + (f"{joint}{in_words(rest)}" if rest else "")


def _day(rng: Random) -> date:
    return LEAP_YEAR + timedelta(days=rng.randrange(366))


def _identifier(rng: Random, separator: str) -> Drawn:
    parts = rng.sample(PARTS, rng.choice((2, 3)))
    return Drawn(separator.join(parts), parts[0] + "".join(map(str.capitalize, parts[1:])), " ".join(parts))


def _spaced(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
