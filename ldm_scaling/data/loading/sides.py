"""Whether a caption would be false of the mirrored picture.

A caption that names a side is: "a cup to the left of a plate". So is one that speaks of writing,
which is mirrored into none. Words that only sometimes mean a side (English "right", Spanish
"derecho", Polish "prawo") count always: a picture that is not mirrored costs a little variety, one
that is mirrored wrongly teaches a falsehood.
"""

from __future__ import annotations

import re
import unicodedata


def _plain(text: str) -> str:
    """Small letters without accents, which may be characters of their own, or left out of capitals;
    Turkish loses its dots with them."""
    apart = unicodedata.normalize("NFKD", text.casefold().replace("ı", "i"))
    return "".join(c for c in apart if not unicodedata.combining(c))


# Raised with these rules: what was found by others is found anew.
VERSION = 2
# Whole words; forms that share a stem are in _STEMS.
_WORDS = frozenset(_plain(
    """
    left right lefthand righthand leftmost rightmost leftward leftwards rightward rightwards lefty
    clockwise anticlockwise counterclockwise
    links rechts linke linken linker linkes linkem rechte rechten rechter rechtes rechtem
    linksherum rechtsherum linkshändig rechtshändig rechterhand linkerhand
    gauche gauches droite droites droit
    izquierda izquierdas izquierdo izquierdos derecha derechas derecho derechos
    sinistra sinistre sinistro sinistri destra destre destro destri
    esquerda esquerdas esquerdo esquerdos direita direitas direito direitos
    esquerra dreta stânga dreapta
    vänster vänstra höger högra venstre højre høyre vasen vasemmalla vasemmalle oikea oikealla
    oikealle bal jobb balra jobbra sol sağ solda sağda solunda sağında trái kiri kanan
    αριστερά δεξιά αριστερός δεξιός
    text texts letter letters lettering lettered word words writing written handwriting handwritten
    inscription inscribed signature signed alphabet typography calligraphy graffiti logo logos says
    reads reading number numbers numeral numerals digit digits sign signs poster newspaper clock map
    schrift buchstabe buchstaben wort wörter texte texto testo lettre lettres letra letras lettere
    mot mots palabra palabras parola parole palavra palavras
    """
).split())
# Words that begin so: languages that decline.
_STEMS = tuple(map(_plain, (
          "лев", "прав", "налев", "направ", "слева", "справа", "влево", "вправо", "лів", "ліворуч",
          "зліва", "праворуч", "lewo", "lewa", "lewy", "lewe", "prawo", "prawa", "prawy", "prawe",
          "levo", "levá", "levé", "levý", "vlevo", "vpravo", "prav")))  # fmt: skip
# Scripts without spaces, or with particles grown together: anywhere.
_PARTS = ("左", "右", "왼쪽", "오른쪽", "좌측", "우측", "يسار", "يمين", "שמאל", "ימין",
          "बाएं", "बाएँ", "बायीं", "दाएं", "दाएँ", "दायीं", "ซ้าย", "ขวา", "文字", "글자")  # fmt: skip
# Writing is quoted.
_QUOTES = '"“”„«»「」『』'


def names_a_side(caption: str) -> bool:
    """Whether the caption names a side or speaks of writing, in one of some twenty languages."""
    whole = unicodedata.normalize("NFC", caption)
    if any(part in whole for part in _PARTS) or any(mark in whole for mark in _QUOTES):
        return True
    words = re.findall(r"\w+", _plain(caption))
    return any(word in _WORDS or word.startswith(_STEMS) for word in words)
