"""Whether a caption would be false of the mirrored picture.

A caption that names a side is: "a cup to the left of a plate". So is one that speaks of writing,
which is mirrored into none. Words that only sometimes mean a side (English "right", Spanish
"derecho", Polish "prawo") count always: a picture that is not mirrored costs a little variety, one
that is mirrored wrongly teaches a falsehood.
"""

from __future__ import annotations

import re
import unicodedata

from ldm_scaling.files import sha256_of

# Whole words; forms that share a stem are in _STEMS. Greek capitals have no accents, and those of
# Turkish end as other small letters.
_WORDS = frozenset(
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
    sağinda αριστερά δεξιά αριστερός δεξιός αριστερα δεξια αριστερος δεξιος
    text texts letter letters lettering lettered word words writing written handwriting handwritten
    inscription inscribed signature signed alphabet typography calligraphy graffiti logo logos says
    reads reading number numbers numeral numerals digit digits sign signs poster newspaper clock map
    schrift buchstabe buchstaben wort wörter texte texto testo lettre lettres letra letras lettere
    mot mots palabra palabras parola parole palavra palavras
    """.casefold().split()
)
# Words that begin so: languages that decline.
_STEMS = ("лев", "прав", "налев", "направ", "слева", "справа", "влево", "вправо", "лів", "ліворуч",
          "зліва", "праворуч", "lewo", "lewa", "lewy", "lewe", "prawo", "prawa", "prawy", "prawe",
          "levo", "levá", "levé", "levý", "vlevo", "vpravo", "prav")  # fmt: skip
# Scripts without spaces, or with particles grown together: anywhere.
_PARTS = ("左", "右", "왼쪽", "오른쪽", "좌측", "우측", "يسار", "يمين", "שמאל", "ימין",
          "बाएं", "बाएँ", "बायीं", "दाएं", "दाएँ", "दायीं", "ซ้าย", "ขวา", "文字", "글자")  # fmt: skip
# Writing is quoted.
_QUOTES = '"“”„«»「」『』'


VERSION = sha256_of(
    [1, sorted(_WORDS), _STEMS, _PARTS, _QUOTES]
)[:8]  # another may find other captions


def names_a_side(caption: str) -> bool:
    """Whether the caption names a side or speaks of writing, in one of some twenty languages."""
    # Accents that are characters of their own would part words.
    caption = unicodedata.normalize("NFC", caption.casefold())
    if any(part in caption for part in _PARTS) or any(mark in caption for mark in _QUOTES):
        return True
    words = re.findall(r"\w+", caption)
    return any(word in _WORDS or word.startswith(_STEMS) for word in words)
