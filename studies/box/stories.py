"""Requests of stories with the stories, and greetings: conversations that nobody had.

What a story is about stands in its title, or is what it names most often. A library of texts.py.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Iterator

from studies.box.conversations import Messages, message
from studies.recipes.clean import clean

OPENING = 250  # characters in which a story names what it is about
SHORTEST = 200
LEAST = 3  # how often a story must speak of it


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Characters of a story that is told to its end, and of what is told of a longer one, up to the
    end of a paragraph (0: nothing); how often one that is told to its end is asked for."""

    whole: int
    cut: int
    times: int


# The fables' grand words are beyond a small model; storybooks have the plain ones.
KINDS = {
    "fables": Lengths(1600, 0, 2),
    "storybooks": Lengths(1400, 900, 6),
    "fairytales": Lengths(1600, 1000, 3),
}

_REQUESTS = (
    "Tell me a story about {x}.", "Can you tell me a story about {x}?", "Tell a story about {x}.",
    "Please tell me a short story about {x}.", "I would like to hear a story about {x}.",
    "Do you know a story about {x}?", "Write a short story about {x}.",
    "Could you tell me a short story about {x}, please?", "Make up a story about {x}.",
    "Tell me a bedtime story about {x}.", "I want a story about {x}.", "A story about {x}, please.",
    "My children want to hear a story about {x}.", "Let me hear a tale about {x}.",
)  # fmt: skip
_ANY_REQUESTS = (
    "Tell me a story.", "Can you tell me a story?", "Please tell me a short story.",
    "I am bored. Tell me a story.", "Do you know any stories?", "Tell me a bedtime story.",
)  # fmt: skip
_MORALS = ("What is the moral of the story?", "What does the story teach us?", "And the moral?",
           "What can we learn from it?")  # fmt: skip
_THANKS = ("Thank you!", "Thanks!", "That was a nice story.", "I liked that story.", "Thank you.")
_WELCOME = ("You are welcome!", "I am glad that you liked it.", "You're welcome!",
            "I am happy to hear that.")  # fmt: skip
_HELLOS = ("Hi!", "Hello!", "Hello.", "Hi.", "Hey!", "Hi there!", "Good morning!", "Good evening!",
           "Hey there.", "Good afternoon.", "Hello there!", "Hi", "hello", "hey")  # fmt: skip
_HELLO_BACK = ("Hello! What would you like to talk about?", "Hi! How can I help you?",
               "Hello! How are you today?", "Hi there! How are you?",
               "Hello! It is nice to meet you.")  # fmt: skip
_HOW = ("How are you?", "How are you today?", "How are you doing?", "How do you do?")
_FINE = ("I am fine, thank you. How are you?", "I am doing well, thanks! And you?",
         "Very well, thank you. What would you like to talk about?")  # fmt: skip
_WELL = ("I am fine.", "I'm good, thanks.", "I am well, too.", "Pretty good!", "Not bad.")
_GOOD = ("I am glad to hear that. What would you like to talk about?",
         "That is good. Do you want to hear a story?",
         "Good! Do you like films, music or books?")  # fmt: skip
_WHO = ("Who are you?", "What are you?", "What is your name?", "Are you a person?",
        "Are you human?", "What can you do?", "Are you a robot?")  # fmt: skip
_SELF = ("I am a small language model. I can chat a little and tell short stories.",
         "I am a computer program, a small language model. I like to tell stories.",
         "I am a small language model. Ask me for a story!")  # fmt: skip
_BYES = ("Goodbye!", "Bye!", "Bye.", "I have to go now.", "Good night!", "See you later!")
_BYE_BACK = ("Goodbye! Have a nice day.", "Bye! It was nice talking to you.",
             "Goodbye! See you soon.")  # fmt: skip
_NAMED = re.compile(r"\b(?:the|a|an|this) (?:[a-z]+ ){0,2}?([a-z]{3,})(?= named | called |[.,!?;]"
                    r"| (?:was|had|said|and|is|did|went|could|would|saw|who|looked|came|then)\b)",
                    re.IGNORECASE)  # fmt: skip
_WITH_NAME = re.compile(r"\b([Aa]n?) (?:[a-z]+ ){0,2}?([a-z]{3,}) (?:named|called) ([A-Z][a-z]+)")
_PERSON = re.compile(r"(?<=[a-z,] )([A-Z][a-z]{2,})\b")
_NO_TOPIC = frozenset(
    """
    story other others same end way one first next whole moment day night time rest morning evening
    last thing things ground world land place side best top back middle truth sky air wind sun moon
    distance door house room village town forest two three moral heart midst shade river edge woods
    trees field fields valley mountains hills life home year years name jungle afternoon meadow
    that what who which something earth
    """.split()  # noqa: SIM905 - a list of these would be three times as long
)


def topic(story: str, draw: random.Random) -> str | None:
    """What the beginning of a story names and the rest speaks of, one or two; None for nothing."""
    opening, lower = story[:OPENING], story.lower()
    if (named := _WITH_NAME.search(opening)) and draw.random() < 0.5:
        return f"{with_article(named[2].lower())} named {named[3]}"
    counts: Counter[str] = Counter()
    # sorted: of equal counts the first is taken, and a set has another order in each process
    for word in sorted({word.lower() for word in _NAMED.findall(opening)} - _NO_TOPIC):
        counts[with_article(word)] = len(re.findall(rf"\b{word}\b", lower))
    for word in sorted(set(_PERSON.findall(opening))):
        if with_article(word.lower()) not in counts and word.lower() not in _NO_TOPIC:
            counts[word] = story.count(word)
    found = [words for words, count in counts.most_common(2) if count >= LEAST]
    return " and ".join(found[: 2 if draw.random() < 0.4 else 1]) or None


def with_article(word: str) -> str:
    if (word.endswith("s") and not word.endswith("ss")) or word in ("children", "people", "men"):
        return f"the {word}"
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def titled(document: str) -> tuple[str | None, str]:
    """(title, story): a first line that is short and no sentence is a title."""
    first, _, rest = document.partition("\n")
    if rest and len(first) < 60 and not re.search(r"[.:\"]$", first):
        return first.rstrip("!?"), rest.strip()
    return None, document


def parts(document: str, lengths: Lengths) -> tuple[str | None, str, bool] | None:
    """(title, story, whether it is told to its end), None for one that is too short or too long."""
    title, story = titled(clean(document))
    whole = len(story) <= lengths.whole
    if not whole:
        kept = ""
        for paragraph in story.split("\n\n"):
            if len(kept) + len(paragraph) > lengths.cut:
                break
            kept = f"{kept}\n\n{paragraph}" if kept else paragraph
        story = kept
    return (title, story, whole) if len(story) >= SHORTEST else None


def request(title: str | None, story: str, draw: random.Random) -> str:
    about = topic(story, draw)
    if title is not None and (about is None or draw.random() < 0.3):
        about = f'"{title}"' if draw.random() < 0.5 else title
    if about is None or draw.random() < 0.12:
        return draw.choice(_ANY_REQUESTS)
    return draw.choice(_REQUESTS).format(x=about)


def told(title: str | None, story: str, draw: random.Random) -> Messages:
    """A story that is asked for, sometimes behind a greeting, with its moral asked or thanks."""
    messages = [message("user", request(title, story, draw))]
    if draw.random() < 0.15:
        hello = (
            message("user", draw.choice(_HELLOS)),
            message("assistant", draw.choice(_HELLO_BACK)),
        )
        messages = [*hello, *messages]
    story, _, moral = story.partition("\n\nMoral: ")
    moral = moral.strip()
    if moral and draw.random() < 0.5:
        messages.append(message("assistant", f"{story}\n\nMoral: {moral}"))
    else:
        messages.append(message("assistant", story))
        if moral:
            messages += [message("user", draw.choice(_MORALS)), message("assistant", moral)]
    if draw.random() < 0.2:
        messages += [message("user", draw.choice(_THANKS)),
                     message("assistant", draw.choice(_WELCOME))]  # fmt: skip
    return messages


def stories(documents: list[str], lengths: Lengths, draw: random.Random) -> Iterator[Messages]:
    """Each story as often as `lengths` says, in other words; the beginning of a long one once."""
    for document in documents:
        found = parts(document, lengths)
        if found is not None:
            title, story, whole = found
            for _ in range(lengths.times if whole else 1):
                yield told(title, story, draw)


def greetings(count: int, draw: random.Random) -> Iterator[Messages]:
    """Small talk that a chat begins and ends with."""
    exchanges = {"hello": (_HELLOS, _HELLO_BACK), "how": (_HOW, _FINE), "well": (_WELL, _GOOD),
                 "who": (_WHO, _SELF), "bye": (_BYES, _BYE_BACK)}  # fmt: skip
    orders = (("hello",), ("hello", "how"), ("hello", "who"), ("how", "well"), ("who",), ("bye",),
              ("hello", "bye"), ("hello", "how", "well"), ("who", "bye"), ("how",))  # fmt: skip
    for _ in range(count):
        messages: Messages = []
        for name in draw.choice(orders):
            asked, answers = exchanges[name]
            messages += [message("user", draw.choice(asked)),
                         message("assistant", draw.choice(answers))]  # fmt: skip
        yield messages
