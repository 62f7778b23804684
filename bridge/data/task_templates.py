"""Templates of tasks and the names that fill them: the notation of `tasks_python` and `tasks_english`, read by `task_pairs`.

In a template

    $a         is a name, the same in both prompts of a pair, drawn from the pools that POOLS_BY_LETTER has for its letter
    «x|y»      is x in the first prompt of a pair and y in the second, with as many tokens, so that only their content differs
    ⟦x⟧        is x in one prompt of a pair or in neither, whichever makes the two equally long under a tokenizer

The answers after the first and after the second prompt are lists of spellings, any of which counts; an empty list means any token
that the other side does not list. If x and y are unequal in length, a second «x|y» elsewhere in the template compensates for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Templates:
    """A task before its names are drawn: texts that hold a pair of prompts each, and the answers after the first and second."""

    name: str
    language: str
    about: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    texts: tuple[str, ...]


_WORDS = {
    "variable": """
        data path name value key index result text line file code date device header height width image input output layer length
        mask matrix method mode model module names node num obj order other params parent pos position prefix res size source src
        stack state target tensor time token tokens types unit values version video block chunk columns dimension example extra
        field final first initial sequence stride tag total user default end error expr group inputs kernel last outputs config
        batch base shape args
    """,
    "function": """
        call check format forward make read run build create update load parse find write apply handle convert process compute
        copy match register send fetch save delete insert remove render merge resolve split join validate decode encode transform
        clean select filter setup reset close collect connect extract generate lookup normalize
    """,
    "class": """
        Base Config Model Parser Node Token Reader Writer Handler Client Server Session Request Response Context Cache Buffer
        Field Event Task Query Table Column Encoder Decoder Layer Graph Stream Manager Loader Builder Formatter Runner Test Module
        Block Group State Worker Store Record Schema Image Matrix Filter
    """,
    "woman": """
        Mary Anna Laura Alice Sarah Emma Julia Susan Karen Lisa Nancy Linda Helen Rachel Rebecca Amy Jane Kate Claire Diana Alexis
        Martha Ruth Rose Grace Lucy Amanda Jessica Jennifer Michelle Nicole Maria
    """,
    "man": """
        John James David Paul Mark Peter Tom Michael Robert Daniel Kevin Brian Steven George Edward Frank Henry Jack Adam Simon
        Scott Eric Andrew Richard Thomas Charles Joseph Ryan Jason Justin Matthew Patrick
    """,
    "place": """
        store park school garden station beach library museum hospital office restaurant house market church theater airport
    """,
    "thing": "book ring drink letter ball phone key gift bottle ticket picture flower kiss bag coat card",
    "noun": """
        teacher author doctor farmer pilot student writer lawyer driver painter singer dancer player worker actor officer manager
        senator minister customer boy girl friend cat dog bird horse car truck boat tree window
    """,
    "event": "war trip project voyage siege strike conflict expedition campaign crisis marriage program reign drought tour trial",
    "word": """
        apple river stone cloud table green paper music silver forest winter yellow summer metal bread orange valley castle bridge
        mirror candle desert engine finger hammer island jacket kitchen ladder morning needle ocean pencil rabbit shadow temple
        village whisper sugar blanket
    """,
    "role": "cook nurse guest neighbor leader speaker swimmer runner reader baker host judge coach tailor gardener partner",
}

POOLS: Mapping[str, Sequence[str]] = {
    **{pool: words.split() for pool, words in _WORDS.items()},
    "year": [f"{year:02}" for year in range(20, 80)],
    "century": [str(century) for century in range(11, 19)],
}
"""Names by kind; only "key" is in two pools (variable and thing)."""

POOLS_BY_LETTER: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys("abcd", ("variable",)), **dict.fromkeys("fg", ("function",)), "C": ("class",),
    **dict.fromkeys("mn", ("woman", "man")), "w": ("woman",), "h": ("man",), "p": ("place",), "o": ("thing",), "s": ("noun",),
    "t": ("noun",), "E": ("event",), "y": ("year",), "e": ("century",), "r": ("role",), **dict.fromkeys("ijklqx", ("word",)),
}  # fmt: skip
"""The pools that the name of each letter is drawn from; the names of a pair all differ."""

LATER, EARLIER = "later than $y", "earlier than $y"  # answers: all years of other decades in $y's century
