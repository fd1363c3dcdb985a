"""Noun phrases: from the short name of a pictogram to words that fit a caption."""

from __future__ import annotations

import collections
import dataclasses
import re

# Names of substances and games: no article, no plural.
_UNCOUNTED = frozenset(
    """american football,bacon,badminton,bowling,bread,breast-feeding,broccoli,bubble tea,
    building construction,butter,camping,canned food,cinema,cooked rice,cooking,coral,curly hair,
    curry rice,dashing away,dna,field hockey,fire,fog,fried shrimp,garlic,horse racing,ice,
    ice cream,ice hockey,lacrosse,left luggage,light rail,lipstick,luggage,mate,meat on bone,
    milky way,mount fuji,nail polish,oden,palms up together,ping pong,popcorn,pouring liquid,
    red hair,rugby football,sake,salt,shaved ice,soap,soft ice cream,spaghetti,
    star and crescent,statue of liberty,sushi,tennis,thread,thumbs down,thumbs up,tokyo tower,
    white hair,wood,yarn,yin yang""".replace("\n    ", "").split(",")
)
# Names that only say what a sign means.
_SIGNS = frozenset(
    """Aquarius,Aries,Cancer,Capricorn,Gemini,Leo,Libra,Ophiuchus,Pisces,Sagittarius,Scorpio,
    Taurus,Virgo,ZZZ,baggage claim,biohazard,circled equals,copyright,currency exchange,customs,
    divide,e-mail,high voltage,hundred points,infinity,information,input latin letters,
    input latin lowercase,input latin uppercase,input numbers,input symbols,low battery,minus,
    multiply,no bicycles,no entry,no littering,no mobile phones,no one under eighteen,
    no pedestrians,no smoking,non-potable water,om,passport control,plus,potable water,prohibited,
    radioactive,registered,service mark,sound recording copyright,trade mark,vibration mode,
    warning,wireless""".replace("\n    ", "").split(",")
)
_REWRITTEN = {
    "bald": "bald head",
    "construction": "construction barrier",
    "dizzy": "dizzy symbol",
    "foggy": "foggy bridge",
    "locked": "locked padlock",
    "locked with key": "locked padlock with key",
    "locked with pen": "locked padlock with pen",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "star-struck": "star-struck face",
    "unlocked": "unlocked padlock",
}
_SINGULAR_IN_S = ("ss", "us", "rhinoceros", "fleur-de-lis", "claus")
_PLURAL_HEADS = frozenset({"people", "men", "women", "children", "dice"})
_PERSON = frozenset({"person", "man", "woman"})
_PREPOSITION = re.compile(r" (?:with|without|of|in|on|at|from|behind|holding|showing|between) ")
_SOUNDS_AN = frozenset({"a", "ab", "atm", "o", "ok", "id", "sos", "ng", "x-ray", "hourglass"})
_SOUNDS_A = re.compile(r"(?:one\b|once\b|uni|euro|ewe|uk)")
_NUMBER = {1: "a", 2: "two", 3: "three", 4: "four"}
_IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children",
              "mouse": "mice", "goose": "geese", "foot": "feet", "tooth": "teeth", "ox": "oxen",
              "leaf": "leaves", "wolf": "wolves", "knife": "knives", "loaf": "loaves",
              "merman": "mermen", "snowman": "snowmen", "die": "dice"}  # fmt: skip
_SAME_IN_PLURAL = frozenset(
    "fish sheep deer bison squid shrimp moose salmon blowfish jellyfish t-rex".split()
)


@dataclasses.dataclass(frozen=True)
class Noun:
    """A noun phrase, e.g. `Noun("octopus")`.

    Attributes:
      text: the phrase without an article.
    """

    text: str

    @property
    def head(self) -> str:
        """The last word before any preposition: `face` in "face with tears of joy"."""
        return _PREPOSITION.split(self.text, maxsplit=1)[0].split()[-1].lower()

    @property
    def counted(self) -> bool:
        """Whether "a ..." reads well; names of signs, games, substances and people do not."""
        first = self.text.split()[0].lower()
        if self.text.lower() in _UNCOUNTED or first in _PLURAL_HEADS:
            return False
        if first in _PERSON:
            return True
        head = self.head
        if head in _PLURAL_HEADS or head == "claus":
            return False
        return not head.endswith("s") or head.endswith(_SINGULAR_IN_S)

    @property
    def singular(self) -> str:
        """With its article, where it takes one: "an octopus", "sushi"."""
        return f"{article(self.text)} {self.text}" if self.counted else self.text

    @property
    def plural(self) -> str | None:
        """Without an article, e.g. "octopuses"; None where a plural would not read well."""
        words = self.text.split()
        last = words[-1].lower()
        plain = re.fullmatch(r"[a-z-]+", words[-1]) is not None
        compound = words[1:] and (words[0] in _PERSON or words[0] == "circled")
        if not (self.counted and plain and len(words) <= 2 and self.head == last) or compound:
            return None
        if last.endswith(("ing", "up", "down", "off", "away", "ed", "right", "left", "closed")):
            return None
        return " ".join([*words[:-1], _plural_of(last)])


def article(words: str) -> str:
    """The indefinite article, "a" or "an", by the sound of the first word."""
    first = re.split(r"[ !]", words, maxsplit=1)[0].lower()
    if first in _SOUNDS_AN:
        return "an"
    return "an" if first[0] in "aeiou" and not _SOUNDS_A.match(first) else "a"


def _plural_of(word: str) -> str:
    if word in _SAME_IN_PLURAL:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    if word.endswith(("s", "x", "z", "ch", "sh")) or word in ("potato", "tomato", "mango", "dodo"):
        return word + "es"
    return word + "s"


def _members(words: list[str]) -> str:
    """["man", "boy", "boy"] -> "a man and two boys"."""
    phrases = []
    for word, count in collections.Counter(words).items():
        noun = word if count == 1 else _plural_of(word)
        phrases.append(f"{article(word) if count == 1 else _NUMBER[count]} {noun}")
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if phrases[1:] else phrases)


def from_cldr(name: str) -> Noun:
    """The noun phrase of a CLDR short name without skin tone, e.g. "man_red_hair".

    The names are taken as they are but for those that are lists or adjectives: families, couples,
    hair, hours.
    """
    text = name.strip(":").replace("_", " ").replace("’", "'")
    text = re.sub(r"[“”\"]|\(.*?\)", "", text)
    text = re.sub(r"\s+", " ", text).strip()
    if match := re.fullmatch(r"family ((?:(?:man|woman|boy|girl|adult|child) ?)+)", text):
        return Noun(f"family of {_members(match[1].split())}")
    if match := re.fullmatch(r"(kiss|couple with heart) (\w+) (\w+)", text):
        pair = _members([match[2], match[3]])
        return Noun(f"kiss between {pair}" if match[1] == "kiss" else f"heart between {pair}")
    if match := re.fullmatch(r"(.*) (red|curly|white|blond) hair", text):
        return Noun(f"{match[1]} with {match[2]} hair")
    if match := re.fullmatch(r"(man|woman|person) bald", text):
        return Noun(f"bald {match[1]}")
    if match := re.fullmatch(r"(man|woman|person) beard", text):
        return Noun(f"{match[1]} with a beard")
    if text in _SIGNS:
        return Noun(f"{text} sign")
    if text.endswith(("o'clock", "-thirty")):
        return Noun(f"clock showing {text}")
    return Noun(_REWRITTEN.get(text, text))
