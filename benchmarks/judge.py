"""A talking model judged by counting: does it end its turns, repeat itself, copy, use grammar?

    python benchmarks/judge.py MODEL --held-out chat-valid.jsonl.bz2 --training chat-train.jsonl.bz2
    python benchmarks/judge.py OUT/judge.json --training ...    # count again, e.g. with a parser

MODEL is a packed model with a chat template. Turns of held-out conversations (rows of messages) are
drawn by seed: the model reads what was said before and answers. The same is counted of what people
answered there, and of stories about twenty subjects. `parsed` is the share of sentences that Link
Grammar parses whole, where `link-parser` is installed. Bits per byte are those of whole held-out
conversations, tokens of roles and ends included. OUT gets judge.json (figures and answers) and
samples.md, for the card.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from benchmarks.dry_run import add_tiny, shrink, temporary, write_conversations, write_talker
from benchmarks.judge_counts import counts, words
from nomatmul.formats.files.atomic import write_file
from nomatmul.train.conversations import Conversation
from nomatmul.train.documents import find_sources, read_pieces

SAMPLES = 20
# What stories are asked for about: does the answer speak of it?
SUBJECTS = (
    "fox", "lion", "cat", "dog", "king", "girl", "bear", "mouse", "bird", "farmer", "princess",
    "wolf", "fish", "tree", "rabbit", "boy", "cow", "crow", "teacher", "monkey",
)  # fmt: skip
Messages = list[dict[str, str]]


def conversations(file: Path) -> Iterator[Messages]:
    """Rows of messages in a file."""
    for piece, _ in read_pieces(find_sources([str(file)])[0]):
        if not isinstance(piece, Conversation):
            raise ValueError(f"{file} holds texts, and a judge needs conversations")
        yield [{"role": role, "content": content} for role, content in piece.messages]


def turns(rows: list[Messages], count: int, seed: int) -> list[tuple[Messages, str]]:
    """(what was said up to a question, what was answered there), one of a conversation at most."""
    draw = random.Random(seed)
    found = []
    for messages in draw.sample(rows, len(rows)):
        answers = [n for n, m in enumerate(messages) if n and m["role"] == "assistant"]
        if answers and len(found) < count:
            place = draw.choice(answers)
            found.append((messages[:place], messages[place]["content"]))
    return found


class Talker:
    """A packed model with its chat template. Raises ValueError for one without."""

    def __init__(self, directory: Path, threads: int | None) -> None:
        import nomatmul
        from nomatmul.engine.chat_text import ChatText
        from nomatmul.formats.chat_template import ChatTemplate

        self.lm = nomatmul.load(directory, kind="language", threads=threads)
        template = ChatTemplate.of(directory)
        if template is None or self.lm.tokenizer_path is None:
            raise ValueError(f"{directory} has no chat template")
        self.chat = ChatText(template, self.lm.tokenizer_path, ordinary=self.lm.tokenizer)

    def answers(self, asked: list[Messages], args: argparse.Namespace) -> list[dict[str, Any]]:
        """{text, tokens, finish_reason} of each."""
        from nomatmul.engine.generation import write_texts
        from nomatmul.engine.sampling import Sampling

        made = []
        for number, messages in enumerate(asked):
            ids = self.chat.ids(self.chat.render(messages))
            sampling = Sampling(
                temperature=args.temperature,
                top_p=args.top_p,
                repetition_penalty=args.repetition_penalty,
                seed=args.seed + number,
            )
            made.append(
                self.lm.text_generation(ids, args.max_tokens, sampling, end_tokens=self.chat.ends)
            )
        texts = write_texts(self.lm, made)
        return [
            {"text": text.strip(), "tokens": len(one.writer.token_ids),
             "finish_reason": one.finish_reason}
            for text, one in zip(texts, made, strict=True)
        ]  # fmt: skip

    def bits_per_byte(self, rows: list[Messages], max_tokens: int) -> dict[str, float]:
        """Of conversations from their beginnings, until so many tokens have been read."""
        nats, size, tokens = 0.0, 0, 0
        for messages in rows:
            ids = self.chat.ids(self.chat.render(messages, add_generation_prompt=False))
            nats -= float(self.lm.token_logprobs(ids).sum())
            size += sum(len(message["content"].encode("utf-8")) for message in messages)
            tokens += len(ids) - 1
            if tokens >= max_tokens:
                break
        return {"bits_per_byte": nats / math.log(2) / size, "tokens": tokens, "bytes": size}


def judge(args: argparse.Namespace) -> dict[str, Any]:
    """Figures, and the answers they were counted of."""
    began = time.monotonic()
    if args.model.suffix == ".json":
        document = json.loads(args.model.read_text("utf-8"))
        answers, asked = document["answers"], document["asked"]
        people, bits, told = document["people"], document["held_out"], document.get("told")
    else:
        rows = list(conversations(args.held_out))
        chosen = turns(rows, args.turns, args.seed)
        asked, people = [messages for messages, _ in chosen], [text for _, text in chosen]
        talker = Talker(args.model, args.threads)
        stories = [[{"role": "user", "content": f"Tell me a story about a {subject}."}]
                   for subject in SUBJECTS]  # fmt: skip
        answers, told = talker.answers(asked, args), talker.answers(stories, args)
        bits = talker.bits_per_byte(rows, args.bits_tokens)
    texts = [answer["text"] for answer in answers]
    training = None
    if args.training is not None:
        training = ["\n".join(m["content"] for m in row) for row in conversations(args.training)]
    settings = ("seed", "temperature", "top_p", "repetition_penalty", "max_tokens")
    return {
        "model": args.model.name,
        "settings": {name: getattr(args, name) for name in settings},
        "ended": sum(a["finish_reason"] == "end" for a in answers) / max(len(answers), 1),
        "tokens": sum(a["tokens"] for a in answers) / max(len(answers), 1),
        "counted": counts(texts, training),
        "counted_people": counts(people, training),
        "stories": told and counted_stories(told, training),
        "held_out": bits,
        "seconds": time.monotonic() - began,
        "asked": asked,
        "answers": answers,
        "people": people,
        "told": told,
    }


def counted_stories(told: list[dict[str, Any]], training: list[str] | None) -> dict[str, Any]:
    """What is counted of answers, and shares of the stories that speak of their subject or end."""
    speak = [subject in words(a["text"]) for subject, a in zip(SUBJECTS, told, strict=True)]
    ended = [answer["finish_reason"] == "end" for answer in told]
    return {
        **counts([answer["text"] for answer in told], training),
        "on_subject": sum(speak) / len(told),
        "ended": sum(ended) / len(told),
    }


def table(document: dict[str, Any]) -> str:
    """The figures as a table of markdown."""
    ours, theirs = document["counted"], document["counted_people"]
    told = document.get("stories")

    def row(name: str, mine: Any, people: Any = None, share: bool = True) -> str:
        cells = [
            "-" if value is None else f"{100 * value:.1f} %" if share else f"{value:.4g}"
            for value in (mine, people)
        ]
        return f"| {name} | {cells[0]} | {cells[1]} |"

    lines = [
        f"| {ours['answers']} turns, seed {document['settings']['seed']} | model | people |",
        "|---|---|---|",
        row("turns that end by themselves", document["ended"]),
        row("words a turn", ours["words"], theirs["words"], share=False),
        row("repeated 4-grams in a turn", ours["repeated_4_grams"], theirs["repeated_4_grams"]),
        *(row(f"different {n}-grams", ours[f"distinct_{n}"], theirs[f"distinct_{n}"])
          for n in (1, 2, 3)),
        row("8-grams of the tuning texts", ours["copied_8_grams"], theirs["copied_8_grams"]),
        row("sentences that Link Grammar parses whole", ours["parsed"], theirs["parsed"]),
        row("held-out dialogue, bits per byte", document["held_out"]["bits_per_byte"],
            share=False),
    ]  # fmt: skip
    if not told:  # of answers that were made before stories were asked for
        return "\n".join(lines)
    lines += [
        row(f"of {len(SUBJECTS)} stories asked for: that end", told["ended"]),
        row("that speak of their subject", told["on_subject"]),
        row("repeated 4-grams in them", told["repeated_4_grams"]),
    ]
    return "\n".join(lines)


def samples(document: dict[str, Any]) -> str:
    """The first answers in the order that the seed gave, with the questions before them."""
    pairs = zip(document["asked"], document["answers"], strict=True)
    parts = []
    for number, (asked, answer) in enumerate(list(pairs)[:SAMPLES], 1):
        question = asked[-1]["content"]
        if len(question) > 300:
            question = "[...] " + question[-300:]
        cut = "" if answer["finish_reason"] == "end" else " [cut off]"
        parts.append(f"{number}. turn {len(asked)}\n\nUser: {question}\n\n"
                     f"Model: {answer['text']}{cut}")  # fmt: skip
    return "\n\n".join(parts)


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="packed model, or a judge.json")
    parser.add_argument("--held-out", type=Path, help="conversations, JSONL")
    parser.add_argument("--training", type=Path, help="those of the tuning, to look for copies")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--repetition-penalty", type=float, default=1.1)
    parser.add_argument("--max-tokens", type=int, default=700)
    parser.add_argument("--bits-tokens", type=int, default=100_000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="folder of the results")
    add_tiny(parser)
    args = parser.parse_args(given)
    if args.tiny:
        shrink(args, parser, turns=4, max_tokens=12, bits_tokens=200, threads=1)
        if args.model is None:
            tiny_inputs(args)
    if args.model is None or (args.model.suffix != ".json" and args.held_out is None):
        parser.error("name a packed model and --held-out conversations, or a file of answers")
    return args


def tiny_inputs(args: argparse.Namespace) -> None:
    """A model of random weights that has a template, and conversations for it."""
    folder = temporary()
    args.held_out = args.training = write_conversations(folder / "chat.jsonl", 12)
    args.model = write_talker(folder / "model", args.held_out)
    args.out = args.out or folder / "out"


def write(document: dict[str, Any], out: Path) -> None:
    """OUT/judge.json and OUT/samples.md."""
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "judge.json", (json.dumps(document, indent=1) + "\n").encode("utf-8"))
    text = f"{table(document)}\n\n{samples(document)}\n"
    write_file(out / "samples.md", text.encode("utf-8"))


def main(given: list[str] | None = None) -> None:
    args = parse(given)
    document = judge(args)
    print(table(document))
    if args.out is not None:
        write(document, args.out)
        print(f"\n{args.out / 'judge.json'}, {args.out / 'samples.md'}")


if __name__ == "__main__":
    main()
