"""The built-in tasks as templates and names: data for `tasks`, which turns them into contrast pairs.

The Python tasks are the 20 of Gao et al. 2025, under the paper's names, the prompts being ours; the English ones are known from
circuits of GPT-2. In a template

    $a         is a name, the same in both prompts of a pair, drawn from the pool that NAMES has for its letter
    «x|y»      is x in the first prompt of a pair and y in the second: as many tokens, so that only what they say differs

    ⟦x⟧        is x in one prompt of a pair or in neither, as makes the two equally long under a tokenizer

and the answers after the first and after the second prompt are spellings, of which any will do; none at all stands for whatever
is not an answer of the other. Where a branch says less than the other, a second one, further on or back, makes up for it.
"""

# ruff: noqa: SIM905  (words in columns are easier to read and change than a list of quoted ones)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Templates:
    """A task before its names are drawn: pairs of prompts in one text each, and the answers after the first and the second."""

    name: str
    language: str
    about: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    texts: tuple[str, ...]


_VARIABLES = """
data path name value key index result text line file code date device header height width image input output layer length mask
matrix method mode model module names node num obj order other params parent pos position prefix res size source src stack state
target tensor time token tokens types unit values version video block chunk columns dimension example extra field final
first initial sequence stride tag total user default end error expr group inputs kernel last outputs config batch base
shape args
""".split()
_FUNCTIONS = """
call check format forward make read run build create update load parse find write apply handle convert process compute
copy match register send fetch save delete insert remove render merge resolve split join validate decode encode transform clean
select filter setup reset close collect connect extract generate lookup normalize
""".split()
_CLASSES = """
Base Config Model Parser Node Token Reader Writer Handler Client Server Session Request Response Context Cache Buffer Field Event
Task Query Table Column Encoder Decoder Layer Graph Stream Manager Loader Builder Formatter Runner Test Module Block Group Table
State Worker Store Record Schema Image Matrix Filter
""".split()
_WOMEN = """
Mary Anna Laura Alice Sarah Emma Julia Susan Karen Lisa Nancy Linda Helen Rachel Rebecca Amy Jane Kate Claire Diana Alexis Martha
Ruth Rose Grace Lucy Amanda Jessica Jennifer Michelle Nicole Maria
""".split()
_MEN = """
John James David Paul Mark Peter Tom Michael Robert Daniel Kevin Brian Steven George Edward Frank Henry Jack Adam Simon Scott Eric
Andrew Richard Thomas Charles Joseph Ryan Jason Justin Matthew Patrick
""".split()
_PLACES = (
    "store park school garden station beach library museum hospital office restaurant house market church theater airport".split()
)
_THINGS = "book ring drink letter ball phone key gift bottle ticket picture flower kiss bag coat card".split()
_NOUNS = """
teacher author doctor farmer pilot student writer lawyer driver painter singer dancer player worker actor officer manager senator
minister customer boy girl friend cat dog bird horse car truck boat tree window
""".split()
_EVENTS = (
    "war trip project voyage siege strike conflict expedition campaign crisis marriage program reign drought tour trial".split()
)
_WORDS = """
apple river stone cloud table green paper music silver forest winter yellow summer metal bread orange valley castle bridge mirror
candle desert engine finger hammer island jacket kitchen ladder morning needle ocean pencil rabbit shadow temple village whisper
sugar blanket
""".split()
_ROLES = "cook nurse guest neighbor leader speaker swimmer runner reader baker host judge coach tailor gardener partner".split()

POOLS: Mapping[str, Sequence[str]] = {
    "variable": _VARIABLES, "function": _FUNCTIONS, "class": list(dict.fromkeys(_CLASSES)), "woman": _WOMEN, "man": _MEN,
    "place": _PLACES, "thing": _THINGS, "noun": _NOUNS, "event": _EVENTS, "word": _WORDS, "role": _ROLES,
    "year": [f"{year:02}" for year in range(20, 80)], "century": ["11", "12", "13", "14", "15", "16", "17", "18"],
}  # fmt: skip
"""Names by kind; no word is in two."""

NAMES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys("abcd", ("variable",)), **dict.fromkeys("fg", ("function",)), "C": ("class",),
    **dict.fromkeys("mn", ("woman", "man")), "w": ("woman",), "h": ("man",), "p": ("place",), "o": ("thing",), "s": ("noun",),
    "t": ("noun",), "E": ("event",), "y": ("year",), "e": ("century",), "r": ("role",), **dict.fromkeys("ijklqx", ("word",)),
}  # fmt: skip
"""The pools that the name of each letter is drawn from; the names of a pair all differ."""

LATER, EARLIER = "later than $y", "earlier than $y"  # answers that stand for the years of other decades in $y's century
_NEWLINE = ("\n", "\n\n", "\n\n\n", "\n    x", "\n        x", "\n            x", "\n\n    x", "\n\n        x")
_COLON = (":", ":\n")
_AFTER_IF = (" ==", " is", " in", " !=", ":", " and", " or", " not", " <", " >")

TASKS: tuple[Templates, ...] = (
    Templates(
        "single_double_quote", "python", "a string ends with the quote that began it",
        ('"', '")', '",'), ("'", "')", "',"),
        (
            "def $f(self, $a):\n    print(«\"|'»$b",
            "def $f($a, $c):\n    if not $a:\n        raise ValueError(«\"|'»$b",
            "def $f(self, $a):\n    $c = $a.get(«\"|'»$b",
            "    parser.add_argument(«\"|'»$a",
            "class $C:\n    def $f(self):\n        return getattr(self, «\"|'»$b",
            "def $f($a):\n    return $a[«\"|'»$b",
            "    def $f(self):\n        self.assertEqual(self.$a, «\"|'»$b",
            "import os\n\n$a = os.environ.get(«\"|'»$b",
            "def $f($a):\n    $c = $a.$g(«\"|'»$b",
            "def $f(self):\n    self.$a = «\"|'»$b",
            "    if $a == «\"|'»$b",
            "class $C:\n    $a = «\"|'»$b",
            "    for $a in $c.get(«\"|'»$b",
            "def $f(self, $a):\n    return self.$g($a, «\"|'»$b",
            "    with open(«\"|'»$a",
        ),
    ),
    Templates(
        "final_kwarg", "python", "a parameter after one with a default has one too",
        ("=None", "=False", "=True", "=0", "=1"), ("):", ")", ","),
        (
            "def $f($a«=None|, $c», $b",
            "def $f(self, $a«=None|, $c», $b",
            "class $C:\n    def __init__(self, $a«=None|, $c», $b",
            "class $C:\n    @classmethod\n    def $f(cls, $a«=None|, $c», $b",
            "class $C(object):\n    def $f(self, $d, $a«=True|, $c», $b",
            "    return $d\n\n\ndef $f($a«=False|, $c», $b",
            "        return self.$d\n\n    def $f(self, $a«=False|, $c», $b",
            "def $f($d, $a«=None|, $c», $b",
            "class $C:\n    def $f(self, $d, $a«=0|, $c», $b",
            "@$d\ndef $f($a«=True|, $c», $b",
            "    pass\n\n\ndef $f(self, $a«=None|, $c», $b",
            "class $C(object):\n    def __init__(self, $a«=False|, $c», $b",
            "import os\n\n\ndef $f($d, $a«=None|, $c», $b",
        ),
    ),
    Templates(
        "set_or_string", "python", "a set is added to, a string appended to",
        (".add", ".update"), (" +=", " = "),
        (
            "def $f($b):\n    $a = «set|str»()\n    for $c in $b:\n        $a",
            "def $f(self, $b):\n    $a = «set|str»()\n    for $c in self.$b:\n        if $c:\n            $a",
            "    $a = «set|str»()\n    for $c, $d in $b.items():\n        $a",
            "def $f(self):\n    $a = «set|str»($b)\n    if $c:\n        $a",
            "def $f(self, $b, $c):\n    $a = «set|str»($b)\n    $a",
            "class $C:\n    def $f(self):\n        $a = «set|str»()\n        while self.$b:\n            $a",
            "def $f($b, $d):\n    $a = «set|str»()\n    if $b:\n        $a",
            "    def $f(self):\n        $a = «set|str»(self.$b)\n        for $c in self.$d:\n            $a",
            "    $a = «set|str»($b)\n    for $c in $d:\n        $a",
            "def $f($b):\n    $a = «set|str»()\n    while $b:\n        $c = $b.pop()\n        $a",
            "class $C:\n    def $f(self, $b):\n        $a = «set|str»($b)\n        $a",
            "def $f($b):\n    $c = 0\n    $a = «set|str»()\n    for $d in $b:\n        $a",
        ),
    ),
    Templates(
        "set_or_string_fixedvarname", "python", "a set is added to, a string appended to; the variable is always `current`",
        (".add", ".update"), (" +=", " = "),
        (
            "def $f($b):\n    current = «set|str»()\n    for $c in $b:\n        current",
            "def $f(self, $b):\n    current = «set|str»()\n    for $c in self.$b:\n        if $c:\n            current",
            "    current = «set|str»()\n    for $c, $d in $b.items():\n        current",
            "def $f(self):\n    current = «set|str»($b)\n    if $c:\n        current",
            "def $f(self, $b, $c):\n    current = «set|str»($b)\n    current",
            "class $C:\n    def $f(self):\n        current = «set|str»()\n        while self.$b:\n            current",
            "def $f($b, $d):\n    current = «set|str»()\n    if $b:\n        current",
            "    def $f(self):\n        current = «set|str»(self.$b)\n        for $c in self.$d:\n            current",
            "    current = «set|str»($b)\n    for $c in $d:\n        current",
            "def $f($b):\n    current = «set|str»()\n    while $b:\n        $c = $b.pop()\n        current",
            "class $C:\n    def $f(self, $b):\n        current = «set|str»($b)\n        current",
            "def $f($b):\n    $c = 0\n    current = «set|str»()\n    for $d in $b:\n        current",
        ),
    ),
    Templates(
        "class_init", "python", "an attribute is assigned the parameter of its name",
        (" $a",), (" $b",),
        (
            "class $C:\n    def __init__(self, $a, $b):\n        self.«$a|$b» =",
            "class $C(object):\n    def __init__(self, $c, $b, $a):\n        self.$c = $c\n        self.«$a|$b» =",
            "class $C:\n    def __init__(self, $a, $b, $c):\n        self.$c = $c\n        self.«$a|$b» =",
            "class $C:\n    def __init__(self, $c, $a, $b):\n        self.$c = $c\n        self.«$a|$b» =",
            "class $C:\n    def __init__(self, $d, $b, $a):\n        self.$d = $d\n        self.«$a|$b» =",
            "class $C:\n\n    def __init__(self, $c, $a, $b=None):\n        self.$c = $c\n        self.«$a|$b» =",
            "    def __init__(self, $c, $b, $a):\n        super().__init__()\n        self.$c = $c\n        self.«$a|$b» =",
            "class $C:\n    def __init__(self, $b, $a):\n        self.«$a|$b» =",
            "class $C(object):\n    def __init__(self, $a, $b):\n        self.«$a|$b» =",
            "    def __init__(self, $a, $b):\n        self.«$a|$b» =",
            "    def __init__(self, $b, $a, $c):\n        self.$c = $c\n        self.«$a|$b» =",
            "class $C:\n    def __init__(self, $a, $c, $b):\n        super().__init__($c)\n        self.«$a|$b» =",
            "class $C:\n    def __init__(self, $b, $a):\n        $C.__init__(self)\n        self.«$a|$b» =",
        ),
    ),
    Templates(
        "with_as", "python", "`with open(...)` goes on with `as`, another call does not",
        (" as",), _NEWLINE,
        (
            "def $f($a):\n    «with|return» open($a)",
            "def $f(self, $a):\n    «with|return» open(self.$b)",
            "    def $f(self, $a):\n        $c = self.$b\n        «with|return» open($c)",
            "class $C:\n    def $f(self, $a):\n        «with|return» self.$g($a)",
            "def $f($a, $b):\n    if $b:\n        «with|return» open($a, 'rb')",
            "def $f(self):\n    $a = self.$g()\n    «with|return» open($a, 'w')",
            "    if not $b:\n        «with|return» $g($a)",
            "def $f($a):\n    $b = $a.$g()\n    «with|return» open($b)",
            "    for $a in $b:\n        «with|return» open($a)",
            "class $C:\n    def $f(self):\n        «with|return» open(self.$a)",
            "def $f($a):\n    if not $a:\n        $a = $b\n    «with|return» open($a)",
            "    def $f(self):\n        «with|return» self.$a.$g()",
            "def $f($a, $b):\n    «with|return» $a.$g($b)",
        ),
    ),
    Templates(
        "bracket_brace", "python", "a dictionary's key is followed by a colon, a list's element is not",
        (":", ": "), (",", "]", ")"),
        (
            "def $f(self):\n    return «{|[»$a«:|,» self.$d, $b«:|,» self.$c, $c",
            "def $f($a, $b, $c):\n    $d = «{|[»$a«:|,» 1, $b«:|,» 2, $c",
            "    def $f(self):\n        self.$d = «{|[»\"$a\"«:|,» 0, \"$b\"",
            "def $f($a, $d):\n    return «{|[»\"$b\"«:|,» $a, \"$c\"«:|,» $d, \"$d\"",
            "    $d = «{|[»\n        '$a'«:|,» 1,\n        '$b'«:|,» 2,\n        '$c'",
            "    self.$d = «{|[»\n        \"$a\"«:|,» None,\n        \"$b\"",
            "class $C:\n    def $f(self, $a, $b):\n        $d = «{|[»$a«:|,» 0, $b",
            "def $f($a, $b):\n    $d = «{|[»\"$a\"«:|,» 1, \"$b\"",
            "    return «{|[»\"$a\"«:|,» $b, \"$c\"",
            "    def $f(self):\n        return «{|[»\"$a\"«:|,» self.$b, \"$c\"",
            "$a = «{|[»\n    '$b'«:|,» 1,\n    '$c'",
            "    self.$a = «{|[»\"$b\"«:|,» 0, \"$c\"",
            "def $f($a):\n    $b = «{|[»1«:|,» $a, 2",
        ),
    ),
    Templates(
        "with_open", "python", "a file opened with 'r' is read, one opened with 'w' is written",
        (".read", ".readline", ".readlines"), (".write", ".writelines"),
        (
            "def $f($a):\n    with open($a, '«r|w»') as f:\n        f",
            "def $f(self, $b):\n    with open(self.$a, '«r|w»') as f:\n        f",
            "    with open($a, '«r|w»') as $b:\n        $c = $d\n        $b",
            "import os\n\nwith open($a, \"«r|w»\") as f:\n    f",
            "    $c = open($a, '«r|w»')\n    $c",
            "def $f(self):\n    f = open(self.$a, \"«r|w»\")\n    f",
            "def $f($a):\n    with open(self.$b, '«r|w»') as $c:\n        $c",
            "    def $f(self, $a):\n        with open($a, '«r|w»') as f:\n            f",
            "    f = open($a, '«r|w»')\n    f",
            "class $C:\n    def $f(self):\n        with open(self.$a, '«r|w»') as f:\n            f",
            "def $f($a, $b):\n    with open($a, \"«r|w»\") as f:\n        f",
            "    with open($a + $b, '«r|w»') as f:\n        f",
        ),
    ),
    Templates(
        "bracket_counting", "python", "as many brackets are closed as are open",
        ("]]", "]])", "]],"), ("]",),
        (
            "def $f(self, $c):\n    self.$d = ⟦not ⟧$c\n    self.$c = [«[|»1, 2«], [|, »3, 4",
            "def $f($c):\n    $d = ⟦not ⟧$c\n    $c = [«[|»0, 1«], [|, »2, 3",
            "    def $f(self):\n        $c = ⟦not ⟧self.$d\n        $d = [«[|»1, 2«], [|, »4, 5",
            "    $d = ⟦not ⟧$c\n    $c = [«[|»5, 6«], [|, »7, 8",
            "class $C:\n    def $f(self, $c):\n        $d = ⟦not ⟧$c\n        $c = [«[|»1, 3«], [|, »2, 4",
            "    if ⟦not ⟧$c:\n        $d = [«[|»2, 3«], [|, »4, 5",
            "    self.$d = ⟦not ⟧$c\n    $c = [«[|»1, 2«], [|, »3, 5",
            "def $f($c):\n    $d = ⟦not ⟧$c\n    return [«[|»1, 2«], [|, »3, 4",
            "    $d = ⟦not ⟧self.$c\n    $a = [«[|»0, 1«], [|, »2, 3",
            "def $f(self):\n    $d = ⟦not ⟧$c\n    self.$a = [«[|»0, 2«], [|, »1, 3",
            "    for $a in ⟦not ⟧$b:\n        $c = [«[|»1, 2«], [|, »3, 4",
            "class $C:\n    $a = ⟦not ⟧$b\n    $c = [«[|»1, 0«], [|, »0, 1",
            "    def $f(self, $c):\n        if ⟦not ⟧$c:\n            $d = [«[|»1, 2«], [|, »2, 3",
        ),
    ),
    Templates(
        "for_while", "python", "a `for` takes `in`, a `while` a condition",
        (" in",), (*_COLON, " <", " >", " and", " is", " !="),
        (
            "def $f(self, $b):\n    $c = ⟦not ⟧$b\n    «for|while» $a",
            "def $f($b, $c):\n    $d = ⟦not ⟧$c\n    «for|while» $a",
            "    def $f(self, $b, $c):\n        $d = ⟦not ⟧$b\n        «for|while» $a",
            "    $b = ⟦not ⟧self.$c\n    «for|while» $a",
            "class $C:\n    def $f(self):\n        self.$b = ⟦not ⟧$c\n        «for|while» $a",
            "def $f($b, $c):\n    if ⟦not ⟧$b:\n        return $c\n    «for|while» $a",
            "    if ⟦not ⟧$b:\n        $c = 1\n        «for|while» $a",
            "def $f($b):\n    $c = ⟦not ⟧$b.$g()\n    «for|while» $a",
            "    def $f(self):\n        $b = ⟦not ⟧self.$c\n        «for|while» $a",
            "class $C:\n    def $f(self, $b):\n        $c = ⟦not ⟧$b\n        «for|while» $a",
            "def $f(self):\n    if ⟦not ⟧self.$b:\n        return\n    «for|while» $a",
            "    $c = []\n    $d = ⟦not ⟧$b\n    «for|while» $a",
            "    if ⟦not ⟧self.$b:\n        «for|while» $a",
        ),
    ),
    Templates(
        "else_elif", "python", "`else` takes a colon, `elif` a condition first",
        _COLON, (),
        (
            "def $f($a):\n    if $a:\n        return $b\n    «else|elif»",
            "def $f(self, $a):\n    if $a is None:\n        $b = 0\n    «else|elif»",
            "    if self.$a:\n        self.$b = $c\n    «else|elif»",
            "    def $f(self, $a, $b):\n        if $a == $b:\n            return True\n        «else|elif»",
            "        if not $a:\n            $b = self.$f()\n        «else|elif»",
            "class $C:\n    def $f(self, $a):\n        if $a:\n            pass\n        «else|elif»",
            "    for $a in $b:\n        if $a in $c:\n            continue\n        «else|elif»",
            "def $f($a, $b):\n    if $a < $b:\n        $c = 1\n    «else|elif»",
            "    if $a in $b:\n        $c = $b[$a]\n    «else|elif»",
            "def $f(self):\n    if self.$a:\n        return self.$b\n    «else|elif»",
            "    def $f(self, $a):\n        if not $a:\n            self.$b = $a\n        «else|elif»",
            "class $C:\n    def $f(self):\n        if self.$a == 0:\n            $b = 1\n        «else|elif»",
            "    while $a:\n        if $b:\n            break\n        «else|elif»",
        ),
    ),
    Templates(
        "fstring_brace", "python", "a brace in an f-string is closed by a brace, a parenthesis by a parenthesis",
        ("}", "}'", '}"', "})", "}')", '}")', "!r}"), (")", ")'", ')"', "))", ")')", '")'),
        (
            "def $f(self, $a):\n    print(f'$b «{|(»$a",
            "def $f($a, $b):\n    raise ValueError(f\"$c «{|(»$a",
            "    def $f(self, $a):\n        return f'«{|(»$a",
            "    if $a is None:\n        raise TypeError(f'$b «{|(»$a",
            "def $f(self):\n    $a = self.$b\n    return f\"$c «{|(»$a",
            "class $C:\n    def __repr__(self):\n        return f\"$C«{|(»self.$a",
            "def $f($a):\n    return f'$b «{|(»$a",
            "    raise ValueError(f'$a «{|(»$b",
            "class $C:\n    def $f(self, $a):\n        return f'$b «{|(»self.$c",
            "def $f($a, $b):\n    if not $a:\n        print(f\"$c «{|(»$b",
            "    $a = f\"$b «{|(»$c",
            "    for $a in $b:\n        print(f'$c «{|(»$a",
            "def $f(self):\n    raise TypeError(f'$a «{|(»self.$b",
        ),
    ),
    Templates(
        "if_ternary", "python", "a statement's `if` takes a colon, an expression's an `else`",
        _COLON, (" else",),
        (
            "def $f($a, $b):\n    «if $b and|return $b if» $a is None",
            "def $f(self, $a):\n    «if self.$b and|return self.$b if» $a is None",
            "    def $f(self, $a, $b):\n        «if $b or|return $b if» $a is not None",
            "def $f($a, $b, $c):\n    «if not $b and|$c = $b if» $a is None",
            "    $b = $c.$g()\n    «if not $b and|$d = $b if» $a is not None",
            "class $C:\n    def $f(self, $a, $b):\n        «if $b and|return $b if» self.$a is not None",
            "def $f(self, $a, $b):\n    $d = self.$g()\n    «if not $d and|$b = $d if» $a is None",
            "def $f($a, $b, $c):\n    «if not $c and|$d = $c if» $a is not None",
            "    def $f(self, $a):\n        «if self.$b and|return self.$b if» $a is not None",
            "class $C:\n    def $f(self):\n        «if $b and|return $b if» self.$a is None",
            "class $C:\n    def $f(self, $a):\n        «if self.$b and|return self.$b if» $a is None",
            "def $f($a, $b):\n    $c = $b\n    «if not $c and|$d = $c if» $a is None",
            "    for $a in $b:\n        «if not $c and|$d = $c if» $a is None",
        ),
    ),
    Templates(
        "var_swap", "python", "two variables change places: the last one is the first one",
        (" $a",), (" $c",),
        (
            "def $f($a, $b, $c):\n    «$a|$c», $b = $b,",
            "def $f(self, $a, $c):\n    $b = self.$g\n    «$a|$c», $b = $b,",
            "    if $a > $c:\n        «$a|$c», $b = $b,",
            "def $f($b, $c, $a):\n    if $b < $d:\n        «$a|$c», $b = $b,",
            "def $f($d):\n    $a = 0\n    $c = 1\n    while $b:\n        «$a|$c», $b = $b,",
            "    def $f(self, $a, $b, $c):\n        if $d:\n            «$a|$c», $b = $b,",
            "def $f($a, $c):\n    if $a < $c:\n        «$a|$c», $b = $b,",
            "    for $d in $b:\n        «$a|$c», $b = $b,",
            "def $f($a, $b, $c):\n    while $a:\n        «$a|$c», $b = $b,",
            "class $C:\n    def $f(self, $a, $b, $c):\n        «$a|$c», $b = $b,",
            "    $a = $c = 0\n    «$a|$c», $b = $b,",
            "def $f($c, $a):\n    $b = 1\n    «$a|$c», $b = $b,",
        ),
    ),
    Templates(
        "indent_for", "python", "what follows a `for` line is indented further, what follows a statement is not",
        ("\n        x",), ("\n    x", "\n", "\n\n", "\n\n    x", "\n\n\n"),
        (
            "def $f($b):\n    «for $a in $b:|$a = $b + $c»",
            "def $f(self, $b):\n    $c = []\n    «for $a in $b:|$a = $b + $c»",
            "def $f(self, $b, $c):\n    «for $a in self.$b:|$a = self.$b + $c»",
            "def $f($b, $c):\n    $d = $b.$g($c)\n    «for $a in $d:|$a = $d + $c»",
            "def $f($b, $c):\n    if not $b:\n        return\n    «for $a in $b:|$a = $b - $c»",
            "def $f(self, $b):\n    self.$d = $b\n    «for $a in $b:|$a = $b + $d»",
            "def $f($b, $c):\n    $d = 0\n    «for $a in $b:|$a = $b + $c»",
            "def $f(self):\n    $b = self.$c\n    «for $a in $b:|$a = $b + $c»",
            "def $f($b):\n    $c = {}\n    $d = $b.$g()\n    «for $a in $d:|$a = $d + $c»",
            "def $f(self, $b, $c):\n    if $b is None:\n        $b = $c\n    «for $a in $b:|$a = $b + $c»",
            "import os\n\n\ndef $f($b, $c):\n    «for $a in $b:|$a = $b - $c»",
            "def $f(self, $c):\n    $b = self.$g($c)\n    «for $a in $b:|$a = $b + $c»",
            "def $f($b, $c):\n    $d = $c\n    «for $a in $b:|$a = $b - $d»",
        ),
    ),
    Templates(
        "lambda_func", "python", "a lambda's parameter is followed by a colon, a function's name by a parenthesis",
        (":", ": ", ","), ("(", "()", "():", "(self"),
        (
            "    return $a\n\n    «lambda|def» $b",
            "class $C:\n    $a = 0\n\n    «lambda|def» $b",
            "def $f(self, $a):\n    «lambda|def» $b",
            "    $c = $a\n    «lambda|def» $b",
            "def $f($a):\n    $c = $a.$d\n\n    «lambda|def» $b",
            "class $C(object):\n    «lambda|def» $b",
            "class $C:\n    def $f(self):\n        return $a\n\n    «lambda|def» $b",
            "    for $a in $b:\n        «lambda|def» $c",
            "    if $a:\n        $c = $b\n        «lambda|def» $d",
            "def $f(self):\n    $a = self.$b\n    «lambda|def» $c",
            "    @property\n    «lambda|def» $a",
            "def $f($a, $b):\n    «lambda|def» $c",
        ),
    ),
    Templates(
        "if_equals", "python", "a variable in a condition is compared, one that begins a statement is assigned",
        _AFTER_IF, (" =", " +=", " -="),
        (
            "def $f($c, $a):\n    $d = $c«|()»\n    «if |»$a",
            "def $f(self, $a, $b):\n    $c = «|not »$b\n    «if |»$a",
            "    def $f(self, $b):\n        self.$c = $b«|()»\n        «if |»$a",
            "def $f($a, $b):\n    if $b:\n        return«| $c»\n    «if |»$a",
            "    $d = self.$c«|()»\n    «if |»$a",
            "class $C:\n    def $f(self, $a):\n        self.$b = «|not »$c\n        «if |»$a",
            "    for $b in «|not »$c:\n        «if |»$a",
            "def $f($a, $b):\n    $c = $b«|()»\n    «if |»$a",
            "def $f(self, $a):\n    self.$b = «|not »$c\n    «if |»$a",
            "    $b = «|not »$c\n    «if |»$a",
            "class $C:\n    def $f(self, $a, $b):\n        $c = $b«|()»\n        «if |»$a",
            "    if $b:\n        $c = $d«|()»\n    «if |»$a",
            "def $f($a):\n    $b = self.$c«|()»\n    «if |»$a",
            "    while «|not »$c:\n        «if |»$a",
        ),
    ),
    Templates(
        "enumerate_range", "python", "an index and an element come from enumerate, an index alone from range",
        (" enumerate",), (" range",),
        (
            "def $f($a«|, $b»):\n    for i«, $c|» in",
            "def $f(self, $a«|, $b»):\n    for i«, $c|» in",
            "    def $f(self, $a«|, $b»):\n        $d = []\n        for i«, $c|» in",
            "    $d = $f($a«|, $b»)\n    for i«, $c|» in",
            "    self.$f($a«|, $b»)\n    for i«, $c|» in",
            "class $C:\n    def $f(self, $a«|, $b»):\n        for i«, $c|» in",
            "def $f($a«|, $b»):\n    $d = 0\n    for i«, $c|» in",
            "class $C:\n    def $f(self, $a«|, $b»):\n        self.$d = []\n        for i«, $c|» in",
            "    $d = self.$f($a«|, $b»)\n    for i«, $c|» in",
            "    print($a«|, $b»)\n    for i«, $c|» in",
            "def $f(self):\n    $d = self.$g($a«|, $b»)\n    for i«, $c|» in",
            "    if $d:\n        $f($a«|, $b»)\n    for i«, $c|» in",
        ),
    ),
    Templates(
        "var_if", "python", "a condition that begins with `if` ends with a colon, a value with the line",
        _COLON, _NEWLINE,
        (
            "def $f($a):\n    «if|return» $a is None",
            "def $f(self, $b):\n    «if|return» self.$a is None",
            "    def $f(self, $a, $b):\n        $c = $b\n        «if|return» $a is None",
            "def $f($a, $b):\n    «if not|$c =» $a is None",
            "class $C:\n    def $f(self, $a):\n        «if|return» $a is None",
            "    $b = $c.$f()\n    «if|return» $b is None",
            "    @property\n    def $a(self):\n        «if|return» self.$b is None",
            "def $f(self, $a):\n    self.$b = $a\n    «if|return» $a is None",
            "def $f($a, $b):\n    if $b:\n        return $a\n    «if|return» $a is None",
            "    for $a in $b:\n        «if not|$c =» $a is None",
            "    def $f(self):\n        «if not|$b =» self.$a is None",
            "def $f($a):\n    $b = []\n    «if not|$c =» $a is None",
            "    if $a:\n        $b = $a.$f()\n        «if|return» $b is None",
        ),
    ),
    Templates(
        "while_return_true", "python", "`while True` takes a colon, `return True` ends the line",
        _COLON, _NEWLINE,
        (
            "def $f($a):\n    $b = ⟦not ⟧$a\n    «while|return» True",
            "def $f(self, $a, $b):\n    self.$b = ⟦not ⟧$a\n    «while|return» True",
            "    def $f(self, $a):\n        $b = ⟦not ⟧self.$c\n        «while|return» True",
            "class $C:\n    def $f(self, $a):\n        if ⟦not ⟧$a:\n            «while|return» True",
            "def $f($a):\n    $b = ⟦not ⟧$a.$g()\n    «while|return» True",
            "    if ⟦not ⟧$a == $b:\n        «while|return» True",
            "    def $f(self):\n        self.$a = ⟦not ⟧$b\n        «while|return» True",
            "def $f($a, $b):\n    $c = ⟦not ⟧$b\n    «while|return» True",
            "    $a = ⟦not ⟧$b\n    «while|return» True",
            "def $f(self):\n    $a = ⟦not ⟧self.$b\n    «while|return» True",
            "class $C:\n    def $f(self):\n        self.$a = ⟦not ⟧$b\n        «while|return» True",
            "    if ⟦not ⟧self.$a:\n        «while|return» True",
            "def $f($a):\n    if ⟦not ⟧$a:\n        $b = $c\n    «while|return» True",
            "    for $a in ⟦not ⟧$b:\n        «while|return» True",
        ),
    ),
    Templates(
        "ioi", "english", "of two people the one who did not give is given to",
        (" $m",), (" $n",),
        (
            "When $m and $n went to the $p, «$n|$m» gave a $o to",
            "When $n and $m went to the $p, «$n|$m» gave the $o to",
            "Then, $m and $n had a long argument at the $p, and afterwards «$n|$m» said to",
            "After $n and $m got a $o at the $p, «$n|$m» decided to give it to",
            "While $m and $n were working at the $p, «$n|$m» gave a $o to",
            "Then, $n and $m were thinking about going to the $p, and «$n|$m» wanted to give a $o to",
        ),
    ),
    Templates(
        "gendered_pronoun", "english", "a name's pronoun",
        (" she",), (" he",),
        (
            "So «$w|$h» is a really great $r, isn't",
            "«$w|$h» is such a good $r, isn't",
            "I think that «$w|$h» is a very good $r, isn't",
            "«$w|$h» went to the $p because",
            "The $r named «$w|$h» left the $p when",
            "«$w|$h» bought the $o that",
        ),
    ),
    Templates(
        "greater_than", "english", "what began ends later, what ended began earlier (years of another decade)",
        (LATER,), (EARLIER,),
        (
            "The $E that «began|ended» in the year $e$y «ended|began» in the year $e",
            "The $E «started|ended» in $e$y and it «ended|started» in the year $e",
            "The $E «from|until» the year $e$y «to|from» the year $e",
            "It was the year $e$y when the $E «began|ended», and it «ended|began» in the year $e",
            "The long $E «began|ended» in $e$y and «ended|began» in $e",
            "Historians say the $E «began|ended» in $e$y and «ended|began» in $e",
        ),
    ),
    Templates(
        "subject_verb_agreement", "english", "a singular subject takes a singular verb, a plural one a plural verb",
        (" is", " was", " has"), (" are", " were", " have"),
        (
            "I saw that the «$s|$ss» near the $p",
            "We know that the «$s|$ss» behind the $p",
            "The «$s|$ss» that the $ts like",
            "The «$s|$ss» near the $t",
            "I think the «$s|$ss» with the $o",
            "The «$s|$ss» behind the $ts",
        ),
    ),
    Templates(
        "induction", "english", "what followed a word before follows it again",
        (" $j",), (" $l",),
        (
            " $i $j $q $k $l $x «$i|$k»",
            " $q $k $l $i $j $x «$i|$k»",
            " $i $j $k $l $q $x $i $j $q «$i|$k»",
            " $x $k $l $q $i $j\n $q «$i|$k»",
            " $i $j $x $q $k $l $q «$i|$k»",
            " $k $l $x $i $j $q $x «$i|$k»",
        ),
    ),
)  # fmt: skip
