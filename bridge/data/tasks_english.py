"""The built-in tasks on English as templates: tasks known from studies of circuits in GPT-2."""

from __future__ import annotations

from bridge.data.task_templates import EARLIER, LATER, Templates

ENGLISH: tuple[Templates, ...] = (
    Templates(
        "ioi", "english", "of two people, the recipient is the one who does not act",
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
        "gendered_pronoun", "english", "the pronoun matches the gender of the name",
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
        "greater_than", "english", "what began in a year ends in a later decade, what ended in it began in an earlier one",
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
        "induction", "english", "a repeated word is followed by the word that followed it before",
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
